"""Every score of a run again, from its saved answers and without its model: `refine rescore RUN`.

A task of ours is scored by the function that its YAML names, on what `samples.parquet` kept of the example; nothing is
loaded or generated for that. A stock task is scored by lm-eval itself, on its own data, which must be at hand; the
hashes of its examples say whether it is the same data. Means, errors and group means are computed as at first, so that
nothing differs, to the last bit, unless a scorer changed.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from refine_harness.errors import DataError, TaskError
from refine_harness.evaluation import statistics
from refine_harness.evaluation.compare import ScoredRun
from refine_harness.evaluation.samples import Sample, plain, score_name
from refine_harness.evaluation.statistics import Estimate
from refine_harness.records import ScoreRecord
from refine_harness.resources import resource

if TYPE_CHECKING:
    from rich.table import Table

PREFIX = "refine_"
"""Of the names of our tasks in lm-eval's registry (`tasks.PREFIX`, which comes with lm-eval)."""


@dataclass(frozen=True)
class Rescored:
    """One number of a record, computed again."""

    kind: Literal["task", "group"]
    name: str
    metric: str | None
    length: int | None
    n: int | None
    saved: Estimate
    again: Estimate
    changed: int
    """Examples whose score is another now; of a group, over its tasks."""

    @property
    def same(self) -> bool:
        return self.saved == self.again and not self.changed

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        for name in ("saved", "again"):
            tree[name] = {"value": tree[name][0], "stderr": tree[name][1]}
        return {**tree, "same": self.same}


def rescore(run: ScoredRun, data: str | None = None) -> list[Rescored]:
    """Every task's and group's score of `run`, computed again from its answers.

    `data`: folder with copies of the data of stock tasks; None reads the hub.

    Raises DataError for answers that are not there or were changed, TaskError for a task that is gone, that needs
    more of an example than was kept, or whose data is not at hand.
    """
    return [rescored for part in run.parts for rescored in _rescored(part.record, part.samples, data)]


def _rescored(record: ScoreRecord, samples: Sequence[Sample], data: str | None) -> Iterator[Rescored]:
    again: dict[tuple[str, int | None, str], list[Any]] = {}
    changed: dict[tuple[str, int | None, str], int] = {}
    aggregations: dict[tuple[str, str], Any] = {}
    tasks: dict[str, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task, []).append(sample)
    for task, rows in tasks.items():
        scorer = our_scorer(task)
        if scorer is not None:
            results = [scorer(row) for row in rows]
        else:
            results, functions = _stock(task, rows, data)
            aggregations |= {(task, metric): function for metric, function in functions.items()}
        for row, scores in zip(rows, results, strict=True):
            for metric, score in scores.items():
                key = (*row.part, metric)
                again.setdefault(key, []).append(score)
                changed[key] = changed.get(key, 0) + (plain(score) != row.scores.get(metric))
    estimates: dict[tuple[str, int | None, str], Estimate] = {}
    for score in record.scores:
        key = (score.task, score.length, score.metric)
        if key not in again:
            raise TaskError(f"{score.task} has no {score.metric} any more. Score the checkpoint again.")
        items = again[key]
        aggregation = aggregations.get((score.task, score.metric.partition(",")[0]))
        percent = score.unit == "percent"
        estimates[key] = statistics.percent(items) if percent else statistics.aggregated(items, aggregation)
        saved = Estimate(score.value, score.stderr)
        yield Rescored("task", score.task, score.metric, score.length, len(items), saved, estimates[key], changed[key])
    for group in record.groups:
        members = [(s.task, s.length, s.metric) for s in record.scores if group.averages(s)]
        weights = group.weights([task for task, _, _ in members], [len(again[key]) for key in members])
        saved = Estimate(group.value, group.stderr)
        before = {(s.task, s.length, s.metric): Estimate(s.value, s.stderr) for s in record.scores}
        if not members or not math.isclose(
            statistics.combined([before[key] for key in members], weights).value, group.value, abs_tol=1e-6
        ):
            continue  # a stock group with groups in it, whose parts the record does not have
        value = statistics.combined([estimates[key] for key in members], weights)
        yield Rescored(
            "group",
            group.group,
            None,
            group.length,
            group.n,
            saved,
            value,
            sum(changed[key] for key in members),
        )


# --- Tasks of ours: their YAML names a function -----------------------------------------------------------------------


def our_scorer(task: str) -> Callable[[Sample], dict[str, Any]] | None:
    """Scores an example of a task of ours; None for a task that is not ours. Imports no lm-eval."""
    config = _our_tasks().get(task)
    if config is None:
        return None
    if "process_results" not in config or "filter_list" in config:
        raise TaskError(f"{task} names no function that scores one answer. Score the checkpoint again.")
    module, _, name = str(config["process_results"]).rpartition(".")
    score = getattr(importlib.import_module(module), name)
    called = (config.get("metadata") or {}).get("scorer")

    def scores(sample: Sample) -> dict[str, Any]:
        try:
            found: Mapping[str, Any] = score(sample.reference, list(sample.answers))
        except (KeyError, TypeError) as error:
            raise TaskError(
                f"{task} cannot be scored again: its example {sample.doc_id} was saved without what scoring needs now "
                f"({error}). Score the checkpoint again."
            ) from None
        return {score_name(metric, "none", called): value for metric, value in found.items()}

    return scores


class _Functions(yaml.SafeLoader):
    """lm-eval's YAML, with functions as the dotted names that they are."""


_Functions.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _our_tasks() -> dict[str, dict[str, Any]]:
    """Short name of every task of ours -> its settings, includes filled in."""
    configs = (_read_yaml(path) for path in sorted(resource("tasks").glob("*/*.yaml")))
    return {c["task"].removeprefix(PREFIX): c for c in configs if isinstance(c.get("task"), str)}


def _read_yaml(path: Path) -> dict[str, Any]:
    tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Functions) or {}
    include = tree.pop("include", None)
    parents = [include] if isinstance(include, str) else include or []
    merged: dict[str, Any] = {}
    for parent in parents:
        merged |= _read_yaml(path.parent / parent)
    return merged | tree


# --- Stock tasks: lm-eval has their data ------------------------------------------------------------------------------


def _stock(
    task: str, samples: Sequence[Sample], data: str | None
) -> tuple[list[dict[str, Any]], Mapping[str, Callable[[Sequence[Any]], Any]]]:
    """Scores of a stock task's answers, and its aggregations."""
    from lm_eval.api.instance import Instance
    from lm_eval.utils import handle_non_serializable, hash_string

    from refine_harness.config import Evaluation
    from refine_harness.evaluation.tasks import STOCK, resolve

    built: Any = resolve([f"{STOCK}{task}"], Evaluation(tasks=(task,), data=data), "").load()["tasks"][task]
    docs = built.eval_docs
    instances: list[Instance] = []
    for sample in samples:
        doc = docs[sample.doc_id] if sample.doc_id < len(docs) else None
        text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        if hash_string(text) != sample.doc_sha256:
            raise DataError(f"{task} has other data now than when it was scored: example {sample.doc_id} differs.")
        for index, answers in enumerate(_requests(sample, built)):
            instance = Instance(sample.output_type, doc, ("", ""), index, (task, sample.doc_id, len(answers)))  # type: ignore[arg-type]
            instance.resps = answers
            instances.append(instance)
    for ensemble in built._filters:
        ensemble.apply(instances)
    of_doc: dict[int, list[Instance]] = {}
    for instance in instances:
        of_doc.setdefault(instance.doc_id or 0, []).append(instance)
    results: list[dict[str, Any]] = []
    for sample in samples:
        mine = of_doc[sample.doc_id]
        scores: dict[str, Any] = {}
        for filtered in mine[0].filtered_resps:
            found = built.process_results(mine[0].doc, [instance.filtered_resps[filtered] for instance in mine])
            scores |= {score_name(metric, filtered, None): value for metric, value in found.items()}
        results.append(scores)
    return results, built.aggregation()


def _requests(sample: Sample, task: Any) -> list[list[Any]]:
    """Answers of one example as lm-eval has them: for every request, those of its repetitions."""
    repeats = int(task.config.repeats or 1)
    if sample.output_type == "generate_until":
        answers: list[Any] = list(sample.answers)
    else:
        parsed = [json.loads(answer) for answer in sample.answers]
        answers = [tuple(answer) if isinstance(answer, list) else answer for answer in parsed]
    return [answers[start : start + repeats] for start in range(0, len(answers), repeats)]


# --- How it is shown --------------------------------------------------------------------------------------------------


def rescore_table(results: Sequence[Rescored]) -> Table:
    """Those scores that are others now."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("tokens", "n", "saved", "now", "examples changed"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        if not result.same:
            name = result.name if result.metric is None else f"{result.name} {result.metric}"
            length = "" if result.length is None else str(result.length)
            values = (f"{result.saved.value:.4f}", f"{result.again.value:.4f}", str(result.changed))
            table.add_row(name, length, str(result.n), *values)
    return table


def summary(run: ScoredRun, results: Sequence[Rescored]) -> str:
    """One line on all of them."""
    answers = sum(len(rows) for rows in run.samples.values())
    different = sum(not result.same for result in results)
    outcome = "all the same, bit for bit" if not different else f"{different} are others now"
    return f"{len(results)} scores from {answers} saved answers: {outcome}"
