"""Step reports on disk survive interruption; progress is a live line on a terminal and plain lines elsewhere."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from refine_harness.errors import RunError
from refine_harness.log import METRICS, Metrics, Progress, clock, facts_text, step_facts
from refine_harness.types import StepReport


def report(step: int, loss: float = 2.0) -> StepReport:
    return StepReport(step, 10, 4000, 2.0, loss, loss, 0.1, 1.5, 1e-6, {"reward": 0.25})


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def test_every_step_is_a_line_of_json(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.write(report(1))
        assert lines(tmp_path)[0]["facts"] == {"reward": 0.25}, "a line is there before the file is closed"
        metrics.write(report(2, loss=math.nan))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert lines(tmp_path)[1]["loss"] is None


def test_a_resumed_run_drops_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(report(step))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # the stump of a crash
    with Metrics(tmp_path, done=3) as metrics:
        metrics.write(report(4, loss=7.0))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 7.0)]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    Metrics(tmp_path).close()
    assert (tmp_path / METRICS).read_text() == ""


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        Metrics(tmp_path / "missing")


def test_off_a_terminal_progress_is_plain_lines_now_and_then() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=40), every=3600) as progress:
        tick = progress.task("niah [red]", 3)
        tick(1, loss=3.2104)
        tick(2, loss=3.0)
        tick(3, loss=2.5)
    first, last = out.getvalue().splitlines()
    assert first.startswith("niah [red]  1/3  loss 3.21")
    assert last.startswith("niah [red]  3/3  loss 2.5"), "the last step is always told"


def test_time_left_ignores_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0])
    monkeypatch.setattr("refine_harness.log.time.monotonic", lambda: next(now))
    out = io.StringIO()
    Progress(Console(file=out, width=200)).task("train", 100, done=90)(91)
    assert out.getvalue() == "train  91/100  0:10 so far, 1:30 left\n"


@pytest.mark.parametrize("total", (None, 100))
def test_the_clock_of_a_task_starts_with_it_or_where_its_total_is_first_told(
    total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([5.0, 100.0, 110.0] if total else [100.0, 110.0])
    monkeypatch.setattr("refine_harness.log.time.monotonic", lambda: next(now))
    out = io.StringIO()
    tick = Progress(Console(file=out, width=200)).task("score", total)
    tick(80, 100)
    tick(90, 100)
    before, after = out.getvalue().splitlines()
    if total is None:
        assert before == "score  80/100  0:00 so far", "80 answers were kept, and took no time"
        assert after == "score  90/100  0:10 so far, 0:10 left"
    else:
        assert after.startswith("score  90/100  1:45 so far")


def test_another_total_starts_the_clock_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 60.0, 100.0, 110.0])
    monkeypatch.setattr("refine_harness.log.time.monotonic", lambda: next(now))
    out = io.StringIO()
    tick = Progress(Console(file=out, width=200)).task("score")
    for done, total in ((0, 4), (4, 4), (0, 30), (10, 30)):
        tick(done, total)
    assert out.getvalue().splitlines()[-1] == "score  10/30  0:10 so far, 0:20 left"


def test_what_a_task_is_at_is_said_beside_its_numbers() -> None:
    for terminal in (False, True):
        out = io.StringIO()
        with Progress(Console(file=out, force_terminal=terminal, width=120)) as progress:
            tick = progress.task("examples")
            tick(3, 12, "niah_multikey_1")
        assert "3/12" in out.getvalue()
        assert "niah_multikey_1" in out.getvalue()


def test_on_a_terminal_progress_is_a_live_line() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120)) as progress:
        tick = progress.task("train")
        tick(2, 4, **step_facts(report(2)))
    assert "2/4" in out.getvalue()
    assert "tokens/s 2000" in out.getvalue()


def test_numbers_are_short() -> None:
    assert facts_text({"loss": 3.21044, "tokens/s": 51234.7}) == "loss 3.21  tokens/s 51235"
    assert [clock(seconds) for seconds in (42.4, 725, 3723)] == ["0:42", "12:05", "1:02:03"]
