"""What people and programs see of a run while it goes on: a live line and `metrics.jsonl`.

`metrics.jsonl` has one JSON object per optimizer step, as the step reported it, and survives interruption: a run
that goes on from a checkpoint first drops the lines of the steps it will take again. What a run *found* is not
logged here but recorded (`records.py`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as LiveProgress
from rich.text import Text

from refine_harness.errors import RunError

if TYPE_CHECKING:
    from refine_harness.types import StepReport

METRICS = "metrics.jsonl"

Tick = Callable[..., None]
"""`tick(done, total, at, **facts)`: how far a task is, what it is at, and numbers to show beside it. Its clock starts
anew where another total is told than before."""


class Metrics:
    """Appends step reports to `metrics.jsonl` in the folder `run`.

    `done`: optimizer steps that the run has behind it; later lines, from an attempt that was interrupted after its
    last checkpoint, are dropped. Raises RunError when the file cannot be written or is no such file.
    """

    def __init__(self, run: str | Path, *, done: int = 0) -> None:
        self.path = Path(run) / METRICS
        try:
            self._keep(done)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}). Choose another --out.") from None

    def write(self, report: StepReport) -> None:
        """One line, on its way to the disk when this returns. A number that is not finite is written as null."""
        json.dump(_finite(asdict(report)), self._file, allow_nan=False)
        self._file.write("\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, done: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (step := _step(line)) is not None and step <= done]
        draft = self.path.with_name(f"{METRICS}.tmp-{os.getpid()}")
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(draft, self.path)


def _step(line: str) -> int | None:
    """The step of a whole line; None for the stump that a crash can leave."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A live line per task on a terminal; elsewhere (a pipe, a log) a plain line every few seconds.

    with Progress() as progress:
        tick = progress.task("niah")
        tick(3, 40)                                             # 3 of 40 done, with the time left
        ...
        tick(report.step, report.steps, **step_facts(report))   # a training step

    Prints to stderr, so that what a command prints on stdout stays whole.
    """

    def __init__(self, console: Console | None = None, *, every: float = 5.0) -> None:
        """`every`: seconds between plain lines of one task."""
        self.console = console or Console(stderr=True)
        self._every = every
        self._live = _live(self.console) if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def task(self, name: str, total: int | None = None, done: int = 0) -> Tick:
        """A line called `name`; `done` of `total` were there before (a resumed run), so the time left ignores them.

        Without a total its clock starts at the first tick, and what is done by then was there before.
        """
        return self._live_task(name, total, done) if self._live is not None else self._plain_task(name, total, done)

    def say(self, text: str) -> None:
        """A line of plain text above the live ones, never read as markup."""
        self.console.print(Text(text), soft_wrap=True)

    def _live_task(self, name: str, total: int | None, done: int) -> Tick:
        live = self._live
        assert live is not None
        known, started = total, total is not None
        task = live.add_task(name, start=started, total=total, completed=done, facts="")

        def tick(done: int, total: int | None = None, at: str = "", /, **facts: float) -> None:
            nonlocal known, started
            total = known if total is None else total
            if not started or (known is not None and total != known):
                live.reset(task, total=total, completed=done)
            known, started = total, True
            live.update(task, completed=done, total=total, facts=_beside(at, facts))

        return tick

    def _plain_task(self, name: str, total: int | None, first: int) -> Tick:
        known, started = total, None if total is None else time.monotonic()
        told = -math.inf

        def tick(done: int, total: int | None = None, at: str = "", /, **facts: float) -> None:
            nonlocal known, started, first, told
            now = time.monotonic()
            total = known if total is None else total
            if started is None or (known is not None and total != known):
                started, first = now, done
            known = total
            if now - told < self._every and done != known:
                return
            told = now
            spent = now - started
            left = spent / (done - first) * (known - done) if known is not None and done > first else None
            of = f"{done}/{known}" if known is not None else str(done)
            times = f"{clock(spent)} so far" + (f", {clock(left)} left" if left else "")
            self.say("  ".join(part for part in (name, of, _beside(at, facts), times) if part))

        return tick


def _live(console: Console) -> LiveProgress:
    return LiveProgress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False, style="dim"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        speed_estimate_period=300,  # a step of long documents can take a minute
    )


def step_facts(report: StepReport) -> dict[str, float]:
    """The few numbers of a step that are worth a glance while it trains."""
    facts = {"loss": report.ntp_loss}  # the policy loss is near zero by construction; its reward says how it goes
    if "reward" in report.facts:
        facts["reward"] = report.facts["reward"]
    facts["grad"] = report.gradient_norm
    return facts | ({"tokens/s": report.tokens / report.seconds} if report.seconds > 0 else {})


def _beside(at: str, facts: Mapping[str, float]) -> str:
    return "  ".join(part for part in (at, facts_text(facts)) if part)


def facts_text(facts: Mapping[str, float]) -> str:
    """`{"loss": 3.2104, "tokens/s": 5120.0}` as `loss 3.21  tokens/s 5120`."""
    return "  ".join(
        f"{name} {value:.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}" for name, value in facts.items()
    )


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
