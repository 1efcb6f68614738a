"""What every benchmark prints and writes: a table, and a JSON file that says on what it was measured."""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from refine_harness.records import provenance

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured number; `goal` is what it should reach, as text, and `passed` whether it does."""

    name: str
    value: float
    unit: str
    n: int
    goal: str | None = None
    passed: bool | None = None


def median_seconds(run: Callable[[], object], *, repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls after `warm_up` calls, the device idle before and after each."""
    seconds = []
    for number in range(warm_up + repeats):
        settle()
        started = time.perf_counter()
        run()
        settle()
        if number >= warm_up:
            seconds.append(time.perf_counter() - started)
    return seconds


def peak_bytes(run: Callable[[], object]) -> float:
    """Bytes at most in use on the GPU during a call, over what was in use before it."""
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return float(torch.cuda.max_memory_allocated() - before)


def at_most(name: str, value: float, goal: float | None, n: int, unit: str = "ratio") -> Row:
    """A row that passes when the value is no larger than the goal; without a goal it only says."""
    return Row(name, value, unit, n) if goal is None else Row(name, value, unit, n, f"at most {goal:g}", value <= goal)


def at_least(name: str, value: float, goal: float | None, n: int, unit: str = "ratio") -> Row:
    """A row that passes when the value is no smaller than the goal; without a goal it only says."""
    return Row(name, value, unit, n) if goal is None else Row(name, value, unit, n, f"at least {goal:g}", value >= goal)


def time_row(name: str, seconds: Sequence[float]) -> Row:
    """The median, in seconds."""
    return Row(name, statistics.median(seconds), "s", len(seconds))


def publish(benchmark: str, rows: Sequence[Row], argv: Sequence[str] | None = None) -> Path:
    """Print the rows and write results/<benchmark>-<machine>.json; its path."""
    facts = provenance(argv or sys.argv, seed=0)
    table = Table("measure", "value", "unit", "goal", "n", title=benchmark)
    for row in rows:
        verdict = "" if row.passed is None else ("  pass" if row.passed else "  MISS")
        table.add_row(row.name, f"{row.value:.4g}", row.unit, (row.goal or "") + verdict, str(row.n))
    Console().print(table)
    machine = facts.machine.gpu or f"cpu-{facts.machine.cores}-cores"
    path = RESULTS / f"{benchmark}-{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.json"
    tree = {
        "machine": facts.machine.model_dump(),
        "versions": facts.versions,
        "commit": facts.commit,
        "dirty": facts.dirty,
        "date": facts.date,
        "command": facts.command,
        "rows": [{("pass" if key == "passed" else key): value for key, value in asdict(row).items()} for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return path


def free() -> None:
    """Give back memory that nobody holds any more, and what is reserved for shapes that do not come again."""
    gc.collect()
    torch.cuda.empty_cache()


def settle() -> None:
    """Wait until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
