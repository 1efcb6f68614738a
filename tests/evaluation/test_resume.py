"""The real command, killed while it answers: started again it ends with the scores of one that was left alone."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from refine_harness import cli
from refine_harness.evaluation.lm import RefineLM
from refine_harness.records import ScoreRecord, read_records

TASKS = ["--tasks", "niah_single_1", "--lengths", "512", "--limit", "10", "--batch-size", "2"]


def arguments(out: Path) -> list[str]:
    return ["eval", "--model", "refine-tiny", *TASKS, "--out", str(out)]


def scored(out: Path) -> ScoreRecord:
    done = CliRunner().invoke(cli.app, arguments(out))
    assert done.exit_code == 0, (done.output, done.stderr, done.exception)
    (record,) = read_records(out / "records")
    return record


def kept(out: Path) -> int:
    """Answers on disk."""
    for path in out.rglob("responses.sqlite"):
        try:
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as database:
                return database.execute("SELECT COUNT(*) FROM responses").fetchone()[0]
        except sqlite3.OperationalError:  # not made yet
            return 0
    return 0


def test_a_killed_evaluation_goes_on_and_gives_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "refine_harness", *arguments(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not kept(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    before = kept(out)
    assert 0 < before < 10, said
    assert not (out / "records").exists()

    portions: list[int] = []
    generate: Any = RefineLM._generate
    monkeypatch.setattr(
        RefineLM, "_generate", lambda lm, prompts: portions.append(len(prompts)) or generate(lm, prompts)
    )
    again = scored(out)
    assert sum(portions) == 10 - before
    assert again.scores == scored(tmp_path / "whole").scores, "the hash of every answer among them"
