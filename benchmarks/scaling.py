"""What more GPUs bring: one optimizer step of ReFINE in one process, and shared between as many as there are GPUs.

Both are `training.Trainer` under torchrun on the same documents, with float32 weights and a bfloat16 forward as `refine
train` has them on GPUs; their losses and first gradients are compared, too. Weights are random.

    python benchmarks/scaling.py [--shape deltanet-1b] [--tokens 16384] [--documents 8]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from report import at_least, at_most, publish, time_row
from shapes import SHAPES, build

from refine_harness.config import Algorithm, Batching, MidConfig
from refine_harness.data.stream import rank_positions
from refine_harness.training.group import leave_group
from refine_harness.training.trainer import Trainer, training_device
from refine_harness.types import Batch

WARM_UP = 3
"""Steps that compile and record."""
EFFICIENCY = 0.9
"""Of each process, beside one that is alone."""
SAME = 1e-3
"""Largest relative difference of losses, and of the first gradient's norm: processes add up the same documents in
another order. Later gradients come from rollouts of weights that differ by as much, and with another token in one of
them they are others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="deltanet-1b")
    parser.add_argument("--layers", type=int, help="of the shape, instead of its own number")
    parser.add_argument("--tokens", type=int, default=16384, help="per document")
    parser.add_argument("--documents", type=int, default=8, help="of an optimizer step, over all processes")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.report is not None:
        train(asked)
        leave_group()
        return
    alone, together = (launched(asked, processes) for processes in (1, asked.processes))
    n = asked.repeats
    rows = [time_row("a step, 1 process", alone["seconds"])]
    rows.append(time_row(f"a step, {asked.processes} processes", together["seconds"]))
    gain = statistics.median(alone["seconds"]) / statistics.median(together["seconds"])
    rows.append(at_least(f"1 process / {asked.processes}", gain, EFFICIENCY * asked.processes, n))
    for what, steps in (("losses", n + WARM_UP), ("gradient norm", 1)):
        error = max(abs(b / a - 1) for a, b in zip(alone[what], together[what], strict=True))
        rows.append(at_most(f"{what}, {asked.processes} processes from 1", error, SAME, steps, "relative"))
    print(publish("scaling", rows))


def launched(asked: argparse.Namespace, processes: int) -> dict[str, Any]:
    """What a run in so many processes reports."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(Path(__file__).resolve()), "--report", str(report), *sys.argv[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        told = json.loads(report.read_text())
    print(processes, told, flush=True)
    return told


def train(asked: argparse.Namespace) -> None:
    """This process's part of a run; the first one reports."""
    device = training_device("auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shape = SHAPES[asked.shape]
    model = build({**shape, "num_hidden_layers": asked.layers or shape["num_hidden_layers"]}, torch.float32)
    config = MidConfig(
        steps=WARM_UP + asked.repeats,
        algorithm=Algorithm(rollouts_from="step"),
        batch=Batching(sequences=asked.documents, steps=1, micro=1),
    )
    trainer = Trainer(model, config)
    reports = list(trainer.run(batches(asked, trainer)))
    if trainer.rank == 0:
        told = {
            "seconds": [report.seconds for report in reports[WARM_UP:]],
            "losses": [report.loss for report in reports],
            "gradient norm": [reports[0].gradient_norm],
            "costs": reports[-1].costs,
        }
        asked.report.write_text(json.dumps(told))


def batches(asked: argparse.Namespace, trainer: Trainer) -> Iterator[Batch]:
    """This process's documents of each step: random tokens, whose cost is that of any."""
    for number in range(trainer.planned_batches):
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(3, trainer.model.config.vocab_size, (asked.documents, asked.tokens), generator=generator)
        own = text[
            rank_positions(0, sequences=asked.documents, steps=1, rank=trainer.rank, world_size=trainer.world_size)
        ]
        yield Batch(own, torch.full((len(own),), asked.tokens))


if __name__ == "__main__":
    main()
