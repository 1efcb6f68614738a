"""Two runs, or several seeds of each, against one another on the same examples: `refine compare A B`.

A run is what `refine eval` or `refine train` wrote: its folder, or one record. Its examples are matched with those of
the other runs by task, length and the hash of the prompt, or else of the example itself (the same question in another
chat template). What cannot be matched is left out of both means, and counted. How differences are judged is
`statistics`'; this file imports neither torch nor lm-eval.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from refine_harness.errors import ConfigError, DataError
from refine_harness.evaluation import statistics
from refine_harness.evaluation.samples import SAMPLES, Sample, by_part, checked, read_samples
from refine_harness.evaluation.statistics import CONFIDENCE, RESAMPLES, Difference, Resampled, Stratum
from refine_harness.records import SHORT_ID, ScoreRecord, TaskScore, canonical_json, in_order, read_record

if TYPE_CHECKING:
    from rich.console import Group

SEEDS = 3
"""Runs a side, below which nothing is called better (CONTRIBUTING.md)."""

Cell = tuple[str, str, int | None]
"""Task, metric and length."""


# --- Runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A record and the file of its answers."""

    record: ScoreRecord
    path: Path

    @cached_property
    def samples(self) -> list[Sample]:
        """Raises DataError for a file that is not there or not what was scored."""
        return checked(read_samples(self.path), self.record, self.path)


@dataclass(frozen=True)
class ScoredRun:
    """One run: every record of one checkpoint, which may have been scored in several goes."""

    path: str
    """As it was asked for."""
    parts: tuple[Scored, ...]

    @property
    def record(self) -> ScoreRecord:
        """The first one."""
        return self.parts[0].record

    @cached_property
    def scores(self) -> dict[Cell, TaskScore]:
        return {(s.task, s.metric, s.length): s for part in self.parts for s in part.record.scores}

    @cached_property
    def samples(self) -> dict[tuple[str, int | None], list[Sample]]:
        return by_part(sample for part in self.parts for sample in part.samples)


def open_run(path: str | Path) -> ScoredRun:
    """The run in a folder or record that `refine eval` or `refine train` wrote.

    Raises DataError for what is neither, for a folder with several runs, and for a run without its answers.
    """
    path = Path(path)
    if path.is_file():
        parts = [_beside(path)]
    else:
        found = sorted([*path.glob("scores/*/*.json"), *(path.glob("*.json") if (path / SAMPLES).is_file() else ())])
        found = found or sorted(path.glob("records/*.json"))
        if not found:
            what = "holds no score record" if path.is_dir() else "does not exist"
            raise DataError(f"{path} {what}. Give a folder that `refine eval --out` wrote, or a record in it.")
        parts = [_beside(file) for file in found]
    ordered = in_order(part.record for part in parts)
    parts = [next(part for part in parts if part.record.id == record.id) for record in ordered]
    _refuse_several(path, parts)
    return ScoredRun(str(path), tuple(parts))


def _beside(path: Path) -> Scored:
    """A record with its answers, which lie beside it or, of a record in `records/`, beside its twin in `scores/`."""
    record = read_record(path)
    if record.source == "paper":
        raise DataError(f"{path} is a row of the paper, which has no examples. Give a run that was scored here.")
    out = path.absolute().parent.parent
    twins = [path, *sorted(out.glob(f"scores/*/{path.name}")), *sorted(out.glob(f"*/scores/*/{path.name}"))]
    for twin in twins:
        if (twin.parent / SAMPLES).is_file():
            return Scored(record, twin.parent / SAMPLES)
    raise DataError(
        f"{path} has no answers beside it ({SAMPLES}). Give the folder that it was written in, or score again."
    )


def _refuse_several(path: Path, parts: Sequence[Scored]) -> None:
    names = sorted({part.record.name for part in parts})
    if len({part.record.model.weights_sha256 for part in parts}) > 1:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise DataError(f"{path} holds several runs ({shown}). Give one of their folders, or a record.")
    seen: dict[Cell, Scored] = {}
    for part in parts:
        for score in part.record.scores:
            other = seen.setdefault((score.task, score.metric, score.length), part)
            if other is not part:
                raise DataError(
                    f"{path} holds two scores of {score.task}, in {other.record.file_name} and "
                    f"{part.record.file_name}. Give one of the two records."
                )


# --- The comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One task, or one group's mean, at one length."""

    kind: Literal["group", "task"]
    name: str
    metric: str | None
    length: int | None
    unit: Literal["percent", "raw"]
    higher_is_better: bool
    tasks: int
    """Tasks averaged; 1 for a task."""
    unmatched: int
    """Examples that some run has and not all."""
    result: Difference
    p_holm: float = 1.0
    """The p-value, corrected for the number of rows of this kind."""


@dataclass(frozen=True)
class Comparison:
    first: tuple[ScoredRun, ...]
    second: tuple[ScoredRun, ...]
    rows: tuple[Row, ...]
    """Groups first."""
    notes: tuple[str, ...]
    """What to know before believing it, gravest first."""
    seed: int
    resamples: int
    confidence: float = CONFIDENCE

    def as_json(self) -> dict[str, Any]:
        return {
            "a": [_about(run) for run in self.first],
            "b": [_about(run) for run in self.second],
            "difference": "b - a",
            "confidence": self.confidence,
            "resamples": self.resamples,
            "seed": self.seed,
            "rows": [_row_json(row) for row in self.rows],
            "notes": list(self.notes),
        }


def compare(
    first: Sequence[ScoredRun], second: Sequence[ScoredRun], *, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """`second` against `first`, each one run or several seeds of one, on the examples that all of them answered.

    Raises ConfigError for a run that a side has twice, DataError when no example is in all of them.
    """
    runs = [*first, *second]
    _refuse_twice(first)
    _refuse_twice(second)
    shared = [cell for cell in runs[0].scores if all(cell in run.scores for run in runs)]
    tasks: dict[Cell, tuple[Row, Resampled]] = {}
    left_out: list[str] = []
    for cell in shared:
        scores_NS, unmatched = _matched(cell, runs)
        if scores_NS is None:
            left_out.append(_called(cell))
        elif len(scores_NS):
            part = Resampled.of(Stratum(scores_NS, _seed_of(cell, seed)), resamples)
            score = runs[0].scores[cell]
            result = statistics.compare([part], len(first), seed=seed)
            row = Row("task", cell[0], cell[1], cell[2], score.unit, score.higher_is_better, 1, unmatched, result)
            tasks[cell] = row, part
    if not tasks:
        raise DataError(
            f"{runs[0].path} and {runs[-1].path} have no example in common (tasks, lengths and prompts were compared). "
            "Score both with the same tasks, lengths, data, seed and tokenizer."
        )
    groups = list(_groups(runs, tasks, len(first), seed))
    rows = (*_corrected(groups), *_corrected([row for row, _ in tasks.values()]))
    notes = (*_claims(first, second), *_differing(first, second), *_gaps(runs, rows, shared, left_out))
    return Comparison(tuple(first), tuple(second), rows, notes, seed, resamples)


def _refuse_twice(side: Sequence[ScoredRun]) -> None:
    seen: dict[str, str] = {}
    for run in side:
        if run.record.id in seen:
            raise ConfigError(f"{run.path} and {seen[run.record.id]} are one run, not two seeds. Leave one out.")
        seen[run.record.id] = run.path


def _matched(cell: Cell, runs: Sequence[ScoredRun]) -> tuple[statistics.Array | None, int]:
    """Scores [N, S] of the examples of a task that all runs answered, and how many only some did.

    None where the task has no scores of single examples whose mean is its value (corpus BLEU, perplexities).
    """
    task, metric, length = cell
    columns: list[dict[tuple[str, int], float]] = []
    rows = [[sample for sample in run.samples[task, length] if metric in sample.scores] for run in runs]
    for run, samples in zip(runs, rows, strict=True):
        score = run.scores[cell]
        scale = 100.0 if score.unit == "percent" else 1.0
        values = [sample.scores[metric] for sample in samples]
        numbers = [scale * float(value) for value in values if isinstance(value, int | float)]
        if len(numbers) < len(values) or abs(np.mean(numbers) - score.value) > 1e-6 * max(1.0, abs(score.value)):
            return None, 0
        columns.append(dict(zip(_numbered(sample.prompt_sha256 for sample in samples), numbers, strict=True)))
    same = set.intersection(*map(set, columns))
    scores = [[column[key] for column in columns] for key in sorted(same)]
    rest = [
        {key: sample.doc_sha256 for sample, key in zip(samples, column, strict=True) if key not in same}
        for samples, column in zip(rows, columns, strict=True)
    ]
    if all(rest):  # the same examples, asked in other words
        by_doc = [dict(zip(_numbered(docs.values()), docs, strict=True)) for docs in rest]
        for doc in sorted(set.intersection(*map(set, by_doc))):
            scores.append([column[keys[doc]] for column, keys in zip(columns, by_doc, strict=True)])
            for docs, keys in zip(rest, by_doc, strict=True):
                del docs[keys[doc]]
    unmatched = len({key for docs in rest for key in docs})
    return np.array(scores, dtype=float).reshape(len(scores), len(runs)), unmatched


def _numbered(hashes: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Hashes with the count of each so far, because data sets repeat examples."""
    seen: Counter[str] = Counter()
    for value in hashes:
        yield value, seen[value]
        seen[value] += 1


def _groups(
    runs: Sequence[ScoredRun], tasks: Mapping[Cell, tuple[Row, Resampled]], firsts: int, seed: int
) -> Iterator[Row]:
    """Group means over the tasks that were compared, as the first run's records group them."""
    for part in runs[0].parts:
        for group in part.record.groups:
            members = {(s.task, s.metric, s.length) for s in part.record.scores if group.averages(s)}
            found = [tasks[cell] for cell in sorted(members & set(tasks), key=str)]
            if not found:
                continue
            weights = group.weights([row.name for row, _ in found], [row.result.n for row, _ in found])
            result = statistics.compare([resampled for _, resampled in found], firsts, weights=weights, seed=seed)
            unmatched = sum(row.unmatched for row, _ in found)
            yield Row("group", group.group, None, group.length, "percent", True, len(found), unmatched, result)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    adjusted = statistics.holm([row.result.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def _seed_of(cell: Cell, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(canonical_json([*cell, seed]).encode()).digest()[:8], "big")


def _called(cell: Cell) -> str:
    task, metric, length = cell
    return f"{task} {metric}" if length is None else f"{task} {metric} at {length}"


# --- What to know before believing it ---------------------------------------------------------------------------------


def _claims(first: Sequence[ScoredRun], second: Sequence[ScoredRun]) -> Iterator[str]:
    counts = [len({_training(run.record) for run in side}) for side in (first, second)]
    if min(counts) < SEEDS:
        yield (
            f"No claim of a winner is justified: that takes {SEEDS} seeds a side or more; here A has {counts[0]} and B "
            f"has {counts[1]}. The interval says what other examples would change"
            + (", not what other seeds would." if max(counts) == 1 else ", and little of what other seeds would.")
        )


def _training(record: ScoreRecord) -> tuple[Any, ...]:
    """What tells one training run from another; test-time training starts from the same weights every time."""
    seed = record.provenance.seed if record.provenance is not None and record.stage == "test-time" else None
    return record.model.weights_sha256, seed


def _differing(first: Sequence[ScoredRun], second: Sequence[ScoredRun]) -> Iterator[str]:
    """What besides the method differs, where the records know."""

    def values(side: Sequence[ScoredRun], read: Any) -> list[str]:
        return sorted({str(read(run.record)) for run in side})

    facts = {
        "optimizer steps": lambda record: record.training.optimizer_steps if record.training else 0,
        "training tokens": lambda record: record.training.tokens if record.training else 0,
        "max_length": lambda record: record.evaluation.max_length,
        "dtype": lambda record: record.evaluation.dtype,
        "tokenizer": lambda record: (record.model.tokenizer_sha256 or "not known")[:SHORT_ID],
    }
    for name, read in facts.items():
        a, b = values(first, read), values(second, read)
        if a != b:
            yield f"Besides the runs, {name} differ: {', '.join(a)} in A, {', '.join(b)} in B."


def _gaps(runs: Sequence[ScoredRun], rows: Sequence[Row], shared: Sequence[Cell], left_out: list[str]) -> Iterator[str]:
    unmatched = sum(row.unmatched for row in rows if row.kind == "task")
    if unmatched:
        yield f"{unmatched} examples are not in every run and were left out of both means."
    alone = {cell for run in runs for cell in run.scores} - set(shared)
    if alone:
        yield f"{len(alone)} scores are not in every run and were not compared, such as {_called(min(alone, key=str))}."
    if left_out:
        yield f"{', '.join(left_out)}: no mean of single examples' scores, and not compared."
    flat = sum(row.kind == "task" and row.result.low is not None and row.result.low == row.result.high for row in rows)
    if flat:
        yield f"{flat} intervals have no width because all differences were alike, which is no certainty."


# --- How it is shown --------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison, *, holm: bool = False) -> Group:
    """For a terminal: a line for each group and task, and below it what to know."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("tokens", "n", "A", "B", "B − A", f"{comparison.confidence:.0%} interval", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    if holm:
        table.add_column("p (Holm)", justify="right", no_wrap=True)
    metrics = Counter((row.name, row.length) for row in comparison.rows if row.kind == "task")
    before = None
    for row in comparison.rows:
        if before not in (None, row.kind):
            table.add_section()
            table.add_row()
        before = row.kind
        result = row.result
        digits = 1 if row.unit == "percent" else 4
        name = f"{row.name}, mean of {row.tasks}" if row.kind == "group" else row.name
        if row.kind == "task" and metrics[row.name, row.length] > 1:
            name = f"{row.name} {row.metric}"
        name += "" if row.higher_is_better else " (lower is better)"
        interval = (
            "" if result.low is None else f"{result.low:+.{digits}f} to {result.high:+.{digits}f}".replace("-", "−")
        )
        cells = [
            Text(name, style="bold" if row.kind == "group" else ""),
            "" if row.length is None else str(row.length),
            str(result.n),
            f"{result.first:.{digits}f}",
            f"{result.second:.{digits}f}",
            f"{result.difference:+.{digits}f}".replace("-", "−"),
            interval,
            p_text(result.p),
        ]
        table.add_row(*cells, *([p_text(row.p_holm)] if holm else []))
    lines = [
        Text.assemble((f"{letter} ", "bold"), ", ".join(_shown(run) for run in side))
        for letter, side in (("A", comparison.first), ("B", comparison.second))
    ]
    return Group(*lines, Text(), table, Text(), *(Text(line) for line in footer(comparison, holm=holm)))


def footer(comparison: Comparison, *, holm: bool) -> list[str]:
    """The sentences below the table."""
    tasks = sum(row.kind == "task" for row in comparison.rows)
    groups = len(comparison.rows) - tasks
    many = f"{tasks} task scores" + (f" and {groups} group means" if groups else "") + " were compared at once"
    if holm:
        correction = "; p (Holm) keeps the chance of any false alarm among the tasks, and among the groups."
    elif tasks > 1:
        correction = (
            f": without a difference, {0.05 * tasks:.2g} of the tasks would still have p < 0.05; --holm corrects."
        )
    else:
        correction = "."
    draws = f"Intervals: paired bootstrap, {comparison.resamples} resamples; p: sign-flip test; seed {comparison.seed}."
    return [draws, f"{many}{correction}", *comparison.notes]


def p_text(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}" if p < 0.9995 else "1"


def _shown(run: ScoredRun) -> str:
    return f"{run.record.label} ({run.record.name}-{run.record.id[:SHORT_ID]})"


def _about(run: ScoredRun) -> dict[str, Any]:
    record = run.record
    return {
        "name": record.name,
        "label": record.label,
        "records": [part.record.id for part in run.parts],
        "weights_sha256": record.model.weights_sha256,
        "seed": None if record.provenance is None else record.provenance.seed,
    }


def _row_json(row: Row) -> dict[str, Any]:
    tree = asdict(row)
    result = tree.pop("result")
    holm = tree.pop("p_holm")
    return {
        **tree,
        "n": result["n"],
        "a": result["first"],
        "b": result["second"],
        "difference": result["difference"],
        "low": result["low"],
        "high": result["high"],
        "p": result["p"],
        "p_holm": holm,
        "exact": result["exact"],
    }
