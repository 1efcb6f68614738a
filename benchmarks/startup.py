"""Seconds from the start of a process to the end of its first training step, on a machine that has compiled nothing.

The process imports, builds DeltaNet-1.3B with random weights on the GPU, and makes one step (forward, backward, AdamW)
on 16,384 tokens. Its compiler cache is an empty folder; what was tuned for this GPU comes with the package.

    python benchmarks/startup.py [--tokens 16384] [--layers 24]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        first_step(asked.tokens, asked.layers)
        return
    from report import Row, publish

    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--child"]
        command += ["--tokens", str(asked.tokens), "--layers", str(asked.layers)]
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    print(done.stdout, end="")
    name = "process start to end of first training step, nothing compiled before"
    print(publish("startup", [Row(name, seconds, "s", 1, f"at most {GOAL:.0f}", seconds <= GOAL)]))


def first_step(tokens: int, layers: int) -> None:
    started = time.perf_counter()

    def say(what: str) -> None:
        torch.cuda.synchronize()
        print(f"{time.perf_counter() - started:6.1f} s  {what}", flush=True)

    import torch
    from shapes import DELTANET_1B

    from refine_harness.algorithm import refine_step
    from refine_harness.config import Algorithm
    from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM
    from refine_harness.types import Batch

    say("imported")
    shape = {key: value for key, value in DELTANET_1B.items() if key != "model_type"}
    with torch.device("cuda"):
        model = DeltaNetForCausalLM(DeltaNetConfig(**{**shape, "num_hidden_layers": layers}))
        text = torch.randint(3, 32000, (1, tokens))
        batch = Batch(text, torch.tensor([tokens]))
    torch.nn.Module.to(model, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    say("model built")
    losses = refine_step(model.train(), batch, Algorithm(lambda_rl=0.0), [])
    say("forward")
    (losses.ntp_sum / losses.ntp_count).backward()
    say("backward")
    optimizer.step()
    say("step")


if __name__ == "__main__":
    main()
