"""Names of benchmarks become lm-eval tasks, and lm-eval's results become scores.

The command line says `ruler`, `longbench`, `short`; lm-eval's registry says `refine_ruler`, `refine_longbench`,
`refine_short`, so that its stock tasks stay what they are. A name is looked up in this order:

1. a group or task of ours, with or without `refine_`: niah, niah_single_1, longbench_hotpotqa, refine_longqa_squad;
2. any stock lm-eval name: arc_easy, triviaqa, mmlu;
3. the end of exactly one task of ours: single_1, squad, hotpotqa.

`stock:NAME` is the stock task where ours has its name (stock:niah_single_1). Data of stock tasks, `short` among them,
come from the hub, or from a copy of the hub's data set under the data folder: DIR/allenai/ai2_arc for arc_easy.

Unknown names are refused before anything is built; `Resolved.load` then builds all examples, so that missing data
is reported before a model is loaded. They are kept for every model that is scored on them.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

import yaml

from refine_harness.config import Evaluation
from refine_harness.errors import TaskError, suggest
from refine_harness.evaluation import longbench
from refine_harness.evaluation.generation import data_folder, data_sha256, first_line
from refine_harness.resources import resource

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

log = logging.getLogger(__name__)

BuildProgress = Callable[[int, int | None, str], None]
"""Called as each task's examples begin to be built, with tasks done so far, tasks in all (None where that is not known
before) and the task's short name; and once at the end, without a name."""

PREFIX = "refine_"
STOCK = "stock:"
_TASK = re.compile(r"^task:[ \t]*[\"']?([^\s#\"']+)", re.MULTILINE)
_GROUP = re.compile(r"^group:[ \t]*[\"']?([^\s#\"']+)", re.MULTILINE)
_TAG = re.compile(r"^tag:[ \t]*(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)


@lru_cache(maxsize=1)
def our_groups() -> dict[str, tuple[str, ...]]:
    """Registry name of each group of ours -> registry names of its tasks, in the groups' order."""
    groups: dict[str, tuple[str, ...]] = {}
    for path in sorted(resource("tasks").glob(f"*/{PREFIX}*.yaml")):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        groups[tree["group"]] = tuple(tree["task"])
    return groups


@lru_cache(maxsize=1)
def chosen_metrics() -> dict[str, dict[str, str]]:
    """Registry name of a group of stock tasks -> task -> the one of its metrics that the group's mean takes."""
    chosen: dict[str, dict[str, str]] = {}
    for path in sorted(resource("tasks").glob(f"*/{PREFIX}*.yaml")):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if metrics := (tree.get("metadata") or {}).get("metrics"):
            chosen[tree["group"]] = metrics
    return chosen


def stock_names() -> frozenset[str]:
    """Every name in lm-eval's own task folder."""
    return frozenset(_stock_folders())


@lru_cache(maxsize=1)
def _stock_folders() -> dict[str, Path | None]:
    """Names in lm-eval's own task folder -> the folder of a single task's YAML; None for groups and tags.

    Read as text: building lm-eval's index of them all takes many times as long.
    """
    import lm_eval.tasks

    folders: dict[str, Path | None] = {}
    for path in sorted(Path(str(lm_eval.tasks.__file__)).parent.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        groups = set(_GROUP.findall(text))
        for tags in _TAG.findall(text):
            groups.update(re.findall(r"[^\s,\[\]\"'-][^\s,\[\]\"']*", tags))
        for name in _TASK.findall(text):
            folders.setdefault(name, path.parent)
        folders.update(dict.fromkeys(groups))
    return folders


@dataclass(frozen=True)
class TaskScore:
    """One number: a task, or a group's mean over its tasks, at one length."""

    kind: Literal["task", "group"]
    group: str | None
    """niah, ruler, longbench or another of ours, or a stock group; None for a stock task asked for by itself."""
    task: str
    """The task's short name; of a group's mean, the group's."""
    metric: str
    length: int | None
    """Tokens of prompt and answer, for generated tasks."""
    value: float
    """0 to 100 where `percent`."""
    stderr: float | None
    """Standard error of `value`, on its scale; None where there is none (n < 2, or no mean)."""
    n: int
    """Examples; of a group, over all its tasks."""
    higher_is_better: bool = True
    percent: bool = True
    """False for numbers that are no share, such as a perplexity, which stay as they are."""
    data_sha256: str | None = None
    """Of the examples, in order, as lm-eval saw them; None for a group."""


@dataclass(frozen=True)
class Resolved:
    """Benchmarks that are known to exist, ready to be built and run."""

    names: tuple[str, ...]
    """Names in lm-eval's registry, in the order asked for; none is part of another."""
    task_manager: TaskManager
    """Knows our tasks (and lm-eval's, where one is asked for) and carries lengths, limit, seed, data and tokenizer."""
    evaluation: Evaluation
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Groups of ours that were asked for -> their tasks, by registry name."""
    _built: list[TaskDict] = field(default_factory=list, init=False, repr=False, compare=False)
    """What `load` built: one, or none."""

    def load(self, progress: BuildProgress | None = None) -> TaskDict:
        """All tasks with all their examples, built once. Raises TaskError for data that is missing or too short."""
        if not self._built:
            self._built.append(self._build(progress or (lambda done, total, task: None)))
        return self._built[0]

    @property
    def built(self) -> bool:
        return bool(self._built)

    def forget(self) -> None:
        """Frees the memory of the examples; `load` builds them again."""
        self._built.clear()

    @property
    def nbytes(self) -> int:
        """Memory of the examples of ours that are built; those of stock tasks stay on the disk."""
        loaded: list[tuple[str, Any]] = [item for built in self._built for item in built["tasks"].items()]
        ours = [task for name, task in loaded if name.startswith(PREFIX)]
        return sum(split.data.nbytes for task in ours for split in task.dataset.values())

    @property
    def _count(self) -> int | None:
        """Tasks in all; None where a stock group is among them, which only lm-eval's index knows."""
        ours = our_groups()
        if any(not name.startswith(PREFIX) and _stock_folders().get(name, Path()) is None for name in self.names):
            return None
        return sum(len(ours.get(name, (name,))) for name in self.names)

    def _build(self, progress: BuildProgress) -> TaskDict:
        count, begun = self._count, 0

        def begins(task: str) -> None:
            nonlocal begun
            progress(begun, count, task.removeprefix(PREFIX))
            begun += 1

        try:
            with _lm_eval_randomness(), _copies_under(data_folder({"data": self.evaluation.data})), _heard(begins):
                built = self.task_manager.load(list(self.names))
        except ValueError as error:
            if "Duplicate task" in str(error):
                raise TaskError(f"{first_line(error)}. Ask for one of the two groups.") from None
            raise
        except (OSError, ImportError, KeyError) as error:
            raise TaskError(
                f"the data of {', '.join(self.names)} cannot be loaded ({first_line(error)}). "
                "Stock tasks read the hub, or a copy of its data set under --data (such as DIR/allenai/ai2_arc), or "
                "need packages of their own: connect, copy or install them, or leave the task out."
            ) from None
        progress(begun, begun, "")
        return built

    @property
    def samples(self) -> dict[str, list[int]] | None:
        """lm-eval's `samples` argument that applies `limit` to stock tasks alone: ours are limited as they are built,
        per length, which lm-eval's own `limit` cannot do."""
        limit = self.evaluation.limit
        if limit is None:
            return None
        stock = {name: task for name, task in self.load()["tasks"].items() if not name.startswith(PREFIX)}
        return {name: list(range(min(limit, len(task.eval_docs)))) for name, task in stock.items()} or None

    def evaluate(self, lm: LM, **options: Any) -> dict[str, Any]:
        """Run lm-eval's `evaluate` on everything here, as often as there are models; `options` go to it as they are.

        Not `simple_evaluate`, which spends seconds of every call on describing the machine; it does nothing else here.
        Results carry samples, which `extract_scores` needs. Empty in all processes but the first.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate

        loaded = self.load()
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with _lm_eval_randomness():
            results = evaluate(lm=lm, task_dict=loaded, samples=self.samples, log_samples=True, **options)
        return dict(results or {})


@contextmanager
def _heard(begins: Callable[[str], None]) -> Iterator[None]:
    """For a while `begins` hears the name of every task whose data lm-eval begins to get, which takes the time."""
    from lm_eval.api.task import ConfigurableTask

    usual = ConfigurableTask.download

    def download(self: ConfigurableTask, *args: Any, **settings: Any) -> None:
        begins(str(self.config.task))
        usual(self, *args, **settings)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = usual


@contextmanager
def _copies_under(folder: str | None) -> Iterator[None]:
    """Data sets of the hub are read from their copies under `folder` for a while, where there are any.

    lm-eval has no such setting: a stock task names its data set, and `datasets` is asked for it by that name.
    """
    import datasets

    usual = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **settings: Any) -> Any:
        copy = Path(folder or "") / path
        if folder is None or not copy.is_dir():
            return usual(path, *args, **settings)
        try:
            return usual(str(copy), *args, **settings)
        except Exception as error:  # many kinds for one cause: this is no such data set
            raise TaskError(
                f"{copy} cannot be read as the hub's data set {path} ({first_line(error)}). "
                "Copy the data set with its README.md, which says what its parts are."
            ) from None

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = usual


@contextmanager
def _lm_eval_randomness() -> Iterator[None]:
    """Global generators as lm-eval seeds them, for the stock tasks that draw from them; then as they were."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    before = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def resolve(names: Sequence[str], evaluation: Evaluation, tokenizer_path: str) -> Resolved:
    """The benchmarks called `names`, with the settings of `evaluation`; nothing is built yet.

    Args:
        names: short names, registry names or stock names; see above. One that another contains is dropped: `niah`
            beside `ruler` is a part of it.
        tokenizer_path: folder (or id) of the tokenizer that counts the tokens of generated examples.

    Raises TaskError for an unknown name, quickly: lm-eval's index of stock tasks is only built for a known one. Also
    for two groups that share a task, neither of which contains the other.
    """
    if not names:
        raise TaskError("no task is named. Name one or more, such as niah,longqa,longbench.")
    groups = our_groups()
    found = list(dict.fromkeys(_registry_name(name) for name in names))
    covered = {task for group in found for task in groups.get(group, ())}
    for group in found:
        covered.update(part for part in found if set(groups.get(part, (part,))) < set(groups.get(group, ())))
    for name in found:
        if name in covered:
            log.info("%s is part of another benchmark asked for, and is scored there", name.removeprefix(PREFIX))
    found = [name for name in found if name not in covered]
    _refuse_shared([name for name in found if name in groups], groups)
    found = [part for name in found for part in _at_hand(name, groups.get(name), evaluation.data)]
    return Resolved(
        names=tuple(found),
        task_manager=_task_manager(found, evaluation, tokenizer_path),
        evaluation=evaluation,
        groups={name: groups[name] for name in found if name in groups},
    )


def _at_hand(name: str, tasks: tuple[str, ...] | None, data: str | None) -> tuple[str, ...]:
    """The name; or, of a group of LongBench of which the data folder has only some tasks, those tasks.

    They are then scored one by one, without the group's mean: a mean over fewer tasks is not the benchmark's.
    """
    folder = data_folder({"data": data})
    if tasks is None or folder is None or not name.startswith(f"{PREFIX}longbench"):
        return (name,)
    named = {task: re.sub(rf"^{PREFIX}longbench(_e)?_", "", task) for task in tasks}
    missing = set(longbench.missing(list(named.values()), folder))
    if not missing or len(missing) == len(set(named.values())):
        return (name,)
    log.warning(
        "%s: no data for %s; the other tasks are scored, without a mean",
        name.removeprefix(PREFIX),
        ", ".join(sorted(missing)),
    )
    return tuple(task for task, short in named.items() if short not in missing)


def _refuse_shared(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """lm-eval builds no task twice, and a task's scores are one group's."""
    owner: dict[str, str] = {}
    for group in names:
        for task in groups[group]:
            if (other := owner.setdefault(task, group)) != group:
                shared, first, second = (name.removeprefix(PREFIX) for name in (task, other, group))
                raise TaskError(f"{first} and {second} share the task {shared}. Ask for one of the two groups.")


def _registry_name(name: str) -> str:
    groups = our_groups()
    members = (task for tasks in groups.values() for task in tasks if task.startswith(PREFIX))
    ours = list(dict.fromkeys([*groups, *members]))
    if name.startswith(STOCK):
        bare = name.removeprefix(STOCK)
        if bare in stock_names():
            return bare
        raise TaskError(f"{bare} is not a stock task of the installed lm-eval.{suggest(bare, stock_names())}")
    for candidate in (name, PREFIX + name):
        if candidate in ours:
            return candidate
    if name in stock_names():
        return name
    ends = [task for task in ours if task.endswith(f"_{name}")]
    if len(ends) == 1:
        return ends[0]
    short = [task.removeprefix(PREFIX) for task in ours]
    if ends:
        raise TaskError(f"{name} may be {' or '.join(task.removeprefix(PREFIX) for task in ends)}. Write which.")
    hint = suggest(name, [*short, *groups, *stock_names()])
    known = ", ".join(group.removeprefix(PREFIX) for group in groups)
    raise TaskError(
        f"{name} is not a task.{hint or f' Known are the groups {known}, their tasks, and the stock tasks of lm-eval.'}"
    )


def _task_manager(names: Sequence[str], evaluation: Evaluation, tokenizer_path: str) -> TaskManager:
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {
        "lengths": list(evaluation.lengths),
        "max_seq_lengths": list(evaluation.lengths),
        "samples": evaluation.samples,
        "seed": evaluation.seed,
        "tokenizer": tokenizer_path,
    }
    if evaluation.limit is not None:
        metadata["limit"] = evaluation.limit
    if evaluation.data is not None:
        metadata["data"] = evaluation.data
    logging.getLogger("lm_eval.api.task").addFilter(_not_about_metadata)
    parts = [part for name in names for part in (name, *our_groups().get(name, ()))]
    stock = [_stock_folders()[part] for part in parts if not part.startswith(PREFIX)]
    return TaskManager(
        # Single stock tasks need their own folders only; a group or tag may name tasks of any other.
        include_path=[*dict.fromkeys(str(folder) for folder in stock if folder), str(resource("tasks"))],
        include_defaults=None in stock,
        metadata=metadata,
    )


def _not_about_metadata(record: logging.LogRecord) -> bool:
    """lm-eval says of every generated task, at each load, how metadata can be given; it has been."""
    return "Custom kwargs" not in record.getMessage()


def extract_scores(results: Mapping[str, Any], resolved: Resolved) -> list[TaskScore]:
    """The scores in lm-eval's results (with samples), tasks first, then the means of groups asked for.

    A task's value is the mean over its examples and its standard error their deviation / sqrt(n). A group's value is
    the plain mean of its tasks, per length, with the error that follows from theirs.
    """
    scores = [score for task, samples in sorted_samples(results).items() for score in _scores(task, samples, results)]
    order = [task for tasks in resolved.groups.values() for task in tasks]
    rank = {task.removeprefix(PREFIX): i for i, task in enumerate(order)}
    scores.sort(key=lambda score: (rank.get(score.task, len(rank)), score.length or 0))
    for group, tasks in resolved.groups.items():
        short = [task.removeprefix(PREFIX) for task in tasks]
        chosen = chosen_metrics().get(group, {})
        parts = [score for score in scores if score.task in short]
        parts = [score for score in parts if chosen.get(score.task, score.metric) == score.metric]
        scores.extend(_means(group.removeprefix(PREFIX), parts))
    scores.extend(_stock_groups(results, scores))
    return scores


def sorted_samples(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Samples of each task in the order of its data, each document once (several processes give them rank by rank)."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for task, samples in results["samples"].items():
        unique = {(sample.get("filter"), sample["doc_id"]): sample for sample in samples}
        found[task] = [unique[key] for key in sorted(unique, key=lambda key: (str(key[0]), key[1]))]
    return found


def _scores(task: str, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Iterator[TaskScore]:
    ours = task.startswith(PREFIX)
    metadata = (results.get("configs", {}).get(task, {}).get("metadata") or {}) if ours else {}
    better = results.get("higher_is_better", {}).get(task, {})
    group = _group_of(task, results)
    if group is not None:
        group = group.removeprefix(PREFIX)
    elif ours:  # a task by itself: the group that it belongs to
        group = _our_group_of(task)
    by_metric: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            by_metric.setdefault((metric, sample.get("filter", "none")), []).append(sample)
    for (metric, filtered), scored in by_metric.items():
        length = int(metric) if ours and metric.isdigit() else None
        name = str(metadata.get("scorer", metric)) if ours else _metric_name(metric, filtered)
        aggregate = results["results"].get(task, {})
        value, stderr, percent = _value(
            [sample[metric] for sample in scored],
            aggregate.get(f"{metric},{filtered}"),
            aggregate.get(f"{metric}_stderr,{filtered}"),
        )
        yield TaskScore(
            kind="task",
            group=group,
            task=task.removeprefix(PREFIX),
            metric=name,
            length=length,
            value=value,
            stderr=stderr,
            n=len(scored),
            higher_is_better=bool(better.get(metric, True)),
            percent=percent,
            data_sha256=data_sha256(sample["doc"] for sample in scored),
        )


def _value(scores: Sequence[Any], aggregate: Any, stderr: Any) -> tuple[float, float | None, bool]:
    """(value, standard error, is it a percentage): from the examples' scores where lm-eval's value is the mean of
    shares, else lm-eval's own numbers."""
    number = float(aggregate) if isinstance(aggregate, Real) else math.nan
    shares = [100.0 * float(score) for score in scores if isinstance(score, Real)]
    if len(shares) == len(scores) and all(0 <= share <= 100 for share in shares):
        mean = fmean(shares)
        if math.isclose(100.0 * number, mean, abs_tol=1e-6):
            return mean, stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None, True
    return number, float(stderr) if isinstance(stderr, Real) else None, False


def _metric_name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _our_group_of(task: str) -> str | None:
    return next((group.removeprefix(PREFIX) for group, tasks in our_groups().items() if task in tasks), None)


def _group_of(task: str, results: Mapping[str, Any]) -> str | None:
    return next((group for group, tasks in results.get("group_subtasks", {}).items() if task in tasks), None)


def _means(group: str, scores: Sequence[TaskScore]) -> Iterator[TaskScore]:
    for length in sorted({score.length for score in scores}, key=lambda length: length or 0):
        parts = [score for score in scores if score.length == length]
        errors = [part.stderr for part in parts if part.stderr is not None]
        metrics = sorted({part.metric for part in parts})
        yield TaskScore(
            kind="group",
            group=group,
            task=group,
            metric=metrics[0] if len(metrics) == 1 else "mean",
            length=length,
            value=fmean(part.value for part in parts),
            stderr=math.sqrt(sum(error**2 for error in errors)) / len(parts) if len(errors) == len(parts) else None,
            n=sum(part.n for part in parts),
        )


def _stock_groups(results: Mapping[str, Any], scores: Sequence[TaskScore]) -> Iterator[TaskScore]:
    """lm-eval's own aggregates of stock groups."""
    raw = {(score.group, score.metric) for score in scores if not score.percent}
    for group, values in results.get("groups", {}).items():
        if group.startswith(PREFIX):
            continue
        better = results.get("higher_is_better", {}).get(group, {})
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            name = _metric_name(metric, filtered)
            percent = (group, name) not in raw and 0 <= float(value) <= 1
            stderr = values.get(f"{metric}_stderr,{filtered}")
            scale = 100.0 if percent else 1.0
            yield TaskScore(
                kind="group",
                group=group,
                task=group,
                metric=name,
                length=None,
                value=scale * float(value),
                stderr=scale * float(stderr) if isinstance(stderr, Real) else None,
                n=int(values.get("sample_len", 0)),
                higher_is_better=better.get(metric) is not False,
                percent=percent,
            )
