"""One of two processes that answer the same requests together; run by test_ranks.py, which also answers them alone."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from refine_harness.evaluation.lm import RefineLM


def requests() -> dict[str, list[Instance]]:
    """Prompts that share beginnings and prompts that do not, of many lengths, some asked twice."""
    rng = random.Random(0)
    words = ["harbour", "master", "counted", "boats", "noon", "wrote", "blue", "book", "keeper", "slept", "three"]

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=n)).capitalize() + "."

    shared = text(120)
    prompts = [text(n) for n in (5, 80, 33, 150, 12, 47)] + [f"{shared} {text(n)}" for n in (4, 9, 6)]
    prompts.append(prompts[1])
    settings = [{"until": ["\n"], "max_gen_toks": 4 + i % 3} for i in range(len(prompts))]
    return {
        "generate_until": [
            Instance("generate_until", {}, (prompt, setting), 0, ("t", i, 1))
            for i, (prompt, setting) in enumerate(zip(prompts, settings, strict=True))
        ],
        "loglikelihood": [
            Instance("loglikelihood", {}, (prompt, f" {ending}"), 0, ("t", i, 1))
            for i, prompt in enumerate(prompts)
            for ending in ("boats", "the keeper slept", text(12))
        ],
        "loglikelihood_rolling": [
            Instance("loglikelihood_rolling", {}, (prompt,), 0, ("t", i, 1)) for i, prompt in enumerate(prompts)
        ],
    }


def answer(folder: str | Path, kinds: Sequence[str], **settings: Any) -> tuple[dict[str, Any], RefineLM]:
    """Everything asked of a model in float32, where a batch's shape shows in the last bits; numbers as hexadecimal."""
    lm = RefineLM(folder, device="cpu", dtype="float32", batch_size=2, max_length=140, **settings)
    found = {kind: getattr(lm, kind)(requests()[kind], disable_tqdm=True) for kind in kinds}
    return {kind: json.loads(json.dumps(values, default=str)) for kind, values in _exact(found).items()}, lm


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _exact(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(part) for part in value]
    return value.hex() if isinstance(value, float) else value


KINDS = tuple(requests())

if __name__ == "__main__":
    folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    stage = 0

    def progress(done: int, total: int) -> None:
        if stage == 1 and 4 <= done < total:
            os.kill(os.getpid(), signal.SIGKILL)

    found, lm = answer(folder, KINDS[:1], cache_dir=out, progress=progress)
    found |= {"truncated": dict(lm.truncated), "ranks": [lm.process, lm.processes], "reads": lm.answerer.reads}
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    stage = 1
    lm.loglikelihood(requests()[KINDS[1]])
    raise AssertionError("the first process kills itself before this, and the second cannot do without it")
