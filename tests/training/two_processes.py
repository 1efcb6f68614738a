"""Run by test_two_processes.py, once for each of two processes that train together and write their weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from conftest import Lab

from refine_harness.data.stream import rank_positions
from refine_harness.training.group import leave_group
from refine_harness.training.trainer import Trainer


def train(out: Path) -> None:
    lab = Lab()
    trainer = Trainer(lab.model(), lab.mid(steps=3, sequences=8, micro=1))
    assert (trainer.rank, trainer.world_size) == (int(os.environ["RANK"]), 2)

    def shares():
        for number in range(2):
            rows = rank_positions(0, sequences=8, steps=2, rank=trainer.rank, world_size=trainer.world_size)
            batch = lab.batch(number, rows=8)
            yield type(batch)(batch.tokens_BT[rows], batch.lengths_B[rows])

    reports = list(trainer.run(shares()))
    losses = torch.tensor([[report.loss, report.gradient_norm, report.tokens] for report in reports])
    facts = torch.tensor([[report.facts["reward"], report.facts["ratio_max"]] for report in reports])
    save_file(lab.weights(trainer.model) | {"losses": losses, "facts": facts}, out / f"{trainer.rank}.safetensors")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
    leave_group()
