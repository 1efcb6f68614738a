from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from refine_harness.training.trainer import Trainer

WORKER = Path(__file__).with_name("two_processes.py")


def test_two_processes_learn_what_one_does(lab, tmp_path, group_of_two):
    # Two processes of their own, not a fork: torch has threads by then.
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in group_of_two
    ]
    try:
        said = [worker.communicate(timeout=180)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said

    alone = Trainer(lab.model(), lab.mid(steps=3, sequences=8, micro=1))
    reports = list(alone.run(lab.batches(rows=8)))
    expected = lab.weights(alone.model)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        losses, facts = found.pop("losses").tolist(), found.pop("facts").tolist()
        assert lab.furthest(expected, found) < 1e-10
        for report, (loss, norm, tokens), (reward, ratio_max) in zip(reports, losses, facts, strict=True):
            assert (loss, norm) == pytest.approx((report.loss, report.gradient_norm), rel=1e-6)
            assert tokens == report.tokens
            assert (reward, ratio_max) == pytest.approx((report.facts["reward"], report.facts["ratio_max"]), rel=1e-6)
