"""A checkpoint and a choice of benchmarks become one record, and a file of what was answered.

What is asked for is checked first (names, then data), then the model is loaded, lm-eval runs it without a word on
the terminal, and scores, cut prompts and hashes are collected. How tasks are built is `tasks`', how the model
answers is `lm`'s, how sure a score is is `statistics`', what is kept of each example is `samples`', what a record is
is `records`'.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from refine_harness.checkpoint import FINAL, weights_sha256
from refine_harness.config import Evaluation, TestTimeConfig
from refine_harness.data.tokenizer import count_all
from refine_harness.errors import TaskError
from refine_harness.evaluation import longbench, statistics
from refine_harness.evaluation.lm import Progress, RefineLM, RefineTTTLM, tokenizer_sha256
from refine_harness.evaluation.samples import (
    Sample,
    as_text,
    by_part,
    plain,
    samples_sha256,
    score_name,
    write_samples,
)
from refine_harness.evaluation.statistics import Estimate
from refine_harness.evaluation.tasks import (
    PREFIX,
    Resolved,
    chosen_metrics,
    extract_scores,
    resolve,
    sorted_samples,
)
from refine_harness.evaluation.tasks import TaskScore as Found
from refine_harness.models.load import pick_device, resolve_model
from refine_harness.records import (
    EvaluationFacts,
    GroupScore,
    ModelFacts,
    ScoreRecord,
    TaskScore,
    TrainingFacts,
    category_weights,
    provenance,
)

log = logging.getLogger(__name__)

_Part = tuple[str, int | None]
"""A task's short name and a context length, where it has lengths."""


def score(
    model: str | Path,
    evaluation: Evaluation,
    *,
    name: str,
    argv: Sequence[str],
    label: str | None = None,
    stage: Literal["base", "mid", "post"] = "base",
    method: Literal["none", "ntp", "refine"] = "none",
    chain: Sequence[str] = (),
    parent_sha256: str | None = None,
    training: TrainingFacts | None = None,
    test_time: TestTimeConfig | None = None,
    seed: int | None = None,
    loaded: tuple[Any, Any] | None = None,
    resolved: Resolved | None = None,
    folder: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> ScoreRecord | None:
    """Score a checkpoint; its record, which the caller writes where it belongs.

    Where several processes run, all make this call; the first gets the record, the others None.

    Args:
        model: a model folder, the name of an embedded model or a hub id.
        name: of the run; `label` is what tables call it.
        argv: the command that asked for this.
        stage, method, chain, parent_sha256, training: how the checkpoint was made, as its record will say.
        test_time: adapt on every prompt before it is answered. The record's stage, method and training are then
            those of test-time training, and `model` is its parent.
        seed: what the record calls its seed; None for that of test-time training or of the evaluation.
        loaded: the model and tokenizer that `load_model(model)` gave, to load nothing again; its device and dtype
            count. It comes back as it was.
        resolved: what `resolve` gave for this evaluation and a model with this tokenizer, to build no example again.
        folder: where to write `samples.parquet`: one row per example (`samples.Sample`).
        cache_dir: keeps answers as they come, so that the same call goes on after an interruption.
        progress: told how many requests are answered; None for silence.

    Raises TaskError before the model is loaded for unknown tasks and missing data, ModelError for a bad model,
    RunError for folders that cannot be written.
    """
    with _quiet(), _own_randomness():
        source = resolve_model(model)
        pick_device(evaluation.device)  # the backend takes the CPU where lm-eval's default device is not there
        resolved = resolved or resolve(evaluation.tasks, evaluation, source)
        resolved.load()
        lm = _backend(source, evaluation, test_time, loaded, cache_dir, progress)
        weights = weights_sha256(source if Path(source).is_dir() else lm.model)
        results = _evaluate(resolved, lm)
    if lm.process:
        return None
    samples = _samples(results, lm)
    if folder is not None:
        write_samples(samples, folder)
    found = extract_scores(results, resolved)
    scores = list(_task_scores(found, results, samples, resolved))
    if test_time is not None:
        training = TrainingFacts(
            config=test_time.model_dump(mode="json"),
            optimizer_steps=int(lm.adaptation.get("optimizer_steps", 0)),
            tokens=int(lm.adaptation.get("tokens", 0)),
            seconds=lm.adaptation.get("seconds", 0.0),
        )
        method = "refine" if test_time.algorithm.lambda_rl > 0 else "ntp"
        parent_sha256 = weights
    if seed is None:
        seed = evaluation.seed if test_time is None else test_time.seed
    return ScoreRecord(
        source="measured",
        name=name,
        label=label or name,
        stage="test-time" if test_time is not None else stage,
        method=method,
        restore=None if test_time is None else test_time.restore,
        chain=tuple(chain),
        model=ModelFacts(
            name=_model_name(model),
            model_type=lm.model.config.model_type,
            parameters=sum(p.numel() for p in lm.model.parameters()),
            weights_sha256=weights,
            parent_sha256=parent_sha256,
            tokenizer_sha256=tokenizer_sha256(lm.tokenizer),
        ),
        training=training,
        evaluation=_facts(evaluation, lm, found),
        scores=tuple(scores),
        groups=tuple(_group_scores(found, scores, resolved)),
        seconds=lm.seconds,
        provenance=provenance(argv, seed),
    )


def _backend(
    source: str,
    evaluation: Evaluation,
    test_time: TestTimeConfig | None,
    loaded: tuple[Any, Any] | None,
    cache_dir: str | Path | None,
    progress: Progress | None,
) -> RefineLM:
    model, tokenizer = loaded if loaded is not None else (None, None)
    if model is not None and test_time is not None and test_time.restore == "never":
        model = copy.deepcopy(model)  # what is learned is carried over, but not to the caller
    settings: dict[str, Any] = {
        "device": evaluation.device,
        "dtype": evaluation.dtype,
        "batch_size": evaluation.batch_size,
        "max_length": evaluation.max_length,
        "truncation": evaluation.truncation,
        "model": model,
        "tokenizer": tokenizer,
        "cache_dir": cache_dir,
        "progress": progress or (lambda done, total: None),
    }
    if test_time is None:
        return RefineLM(source, **settings)
    return RefineTTTLM(source, config=test_time, **settings)


def _evaluate(resolved: Resolved, lm: RefineLM) -> dict[str, Any]:
    try:
        # Standard errors come from the samples; lm-eval's own bootstrap would only take time.
        return resolved.evaluate(lm, bootstrap_iters=0)
    except ValueError as error:
        if "marked as unsafe" in str(error):
            raise TaskError(
                f"{', '.join(resolved.names)} runs code that the model writes, which this command does not do. "
                "Use lm_eval itself with --confirm_run_unsafe_code in a sandbox."
            ) from None
        raise


def _facts(evaluation: Evaluation, lm: RefineLM, found: Sequence[Found]) -> EvaluationFacts:
    generated = any(score.length is not None for score in found)
    return EvaluationFacts(
        backend="refine-ttt" if isinstance(lm, RefineTTTLM) else "refine",
        tasks=evaluation.tasks,
        lengths=evaluation.lengths if generated else (),
        limit=evaluation.limit,
        samples=evaluation.samples if generated else None,
        seed=evaluation.seed,
        max_length=evaluation.max_length,
        truncation=None if evaluation.max_length is None else lm.truncation,
        dtype=str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        device=lm.device.type,
        batch_size=None if evaluation.batch_size == "auto" else evaluation.batch_size,
        data_sha256=_data_hashes(found),
    )


def _data_hashes(found: Sequence[Found]) -> dict[str, str]:
    """By task and length; where metrics have examples of their own (LongBench-E's buckets), one for all of them."""
    hashes: dict[str, list[str]] = {}
    for score in found:
        if score.data_sha256 is not None:
            same = hashes.setdefault(score.task if score.length is None else f"{score.task}@{score.length}", [])
            if score.data_sha256 not in same:
                same.append(score.data_sha256)
    return {
        name: same[0] if len(same) == 1 else hashlib.sha256("\n".join(same).encode()).hexdigest()
        for name, same in hashes.items()
    }


def _task_scores(
    found: Sequence[Found], results: Mapping[str, Any], samples: Sequence[Sample], resolved: Resolved
) -> Iterator[TaskScore]:
    versions = {_short(task): version for task, version in results.get("versions", {}).items()}
    items = _items(results)
    parts = by_part(samples)
    for score in found:
        if score.kind != "task":
            continue
        if not math.isfinite(score.value):
            log.warning("%s has no finite %s; its record leaves that out", score.task, score.metric)
            continue
        rows = parts[score.task, score.length]
        scores = items[score.task, score.length, score.metric]
        value, stderr = (
            statistics.percent(scores)
            if score.percent
            else statistics.aggregated(scores, _aggregation(resolved, score))
        )
        group = score.group or score.task
        declared = results["configs"].get(PREFIX + score.task, {}).get("metric_list") or ()
        if score.length is None and len(declared) > 1:
            group = (
                f"{group} {score.metric}"  # LongBench-E: each bucket has examples, and a mean over tasks, of its own
            )
        yield TaskScore(
            task=score.task,
            group=group,
            metric=score.metric,
            length=score.length,
            value=value,
            stderr=stderr,
            n=score.n,
            truncated=min(score.n, sum(row.truncated for row in rows if score.metric in row.scores)),
            higher_is_better=score.higher_is_better,
            version=str(versions.get(score.task) or "0"),
            unit="percent" if score.percent else "raw",
            samples_sha256=samples_sha256(rows),
        )


def _aggregation(resolved: Resolved, score: Found) -> Callable[[Sequence[Any]], Any] | None:
    """lm-eval's aggregation of a stock task's metric; None for the mean, which is what tasks of ours have."""
    task: Any = resolved.load()["tasks"].get(score.task)
    return None if task is None else task.aggregation().get(score.metric.partition(",")[0])


def _items(results: Mapping[str, Any]) -> dict[tuple[str, int | None, str], list[Any]]:
    """Every example's score, in the order of the data, by task, length and metric as records name them."""
    items: dict[tuple[str, int | None, str], list[Any]] = {}
    for task, samples in sorted_samples(results).items():
        scorer = _scorer(task, results)
        for sample in samples:
            for metric in sample["metrics"]:
                key = (_short(task), _length(task, sample), score_name(metric, sample["filter"], scorer))
                items.setdefault(key, []).append(sample[metric])
    return items


def _group_scores(found: Sequence[Found], scores: Sequence[TaskScore], resolved: Resolved) -> Iterator[GroupScore]:
    """Means of percentages; lm-eval's aggregates of other numbers have no place on a page of percentages."""
    shares = [score for score in scores if score.unit == "percent"]
    for name in resolved.groups:
        chosen = chosen_metrics().get(name, {})
        ours = [
            score
            for score in shares
            if score.group.partition(" ")[0] == _short(name) and chosen.get(score.task, score.metric) == score.metric
        ]
        keys = {(score.group, score.length) for score in ours}
        for key in sorted(keys, key=lambda key: (key[0], key[1] or 0)):
            yield _group_score(key, [score for score in ours if (score.group, score.length) == key], scores)
    seen: set[str] = set()
    for group in found:
        if group.kind != "group" or not group.percent or PREFIX + group.task in resolved.groups:
            continue
        members = [score for score in shares if (score.group, score.metric) == (group.task, group.metric)]
        if members and group.task not in seen:  # of several metrics, a record has one number for a group
            seen.add(group.task)
            yield _group_score((group.task, None), members, scores, group)


def _group_score(
    key: _Part, members: Sequence[TaskScore], scores: Sequence[TaskScore], said: Found | None = None
) -> GroupScore:
    """The mean of a group's tasks, which count alike unless lm-eval says a number that is the mean by size."""
    parts = [Estimate(score.value, score.stderr) for score in members]
    sizes = [score.n or 1 for score in members]
    categories = longbench.categories(key[0], [score.task for score in members])
    weights = category_weights([score.task for score in members], categories)
    (value, stderr), by_size = statistics.combined(parts, weights), False
    if said is not None and not math.isclose(value, said.value, abs_tol=1e-6):
        (value, stderr), by_size = statistics.combined(parts, sizes), True
        if not math.isclose(value, said.value, abs_tol=1e-6):  # a group with groups in it
            value, stderr, by_size = said.value, said.stderr, False
    others = {(score.task, score.length) for score in scores if score not in members and score.group == key[0]}
    return GroupScore(
        group=key[0],
        length=key[1],
        value=value,
        stderr=stderr,
        n_tasks=len(members),
        n=sum(sizes),
        metrics={score.task: score.metric for score in members if (score.task, score.length) in others},
        by_size=by_size,
        categories=categories,
    )


def _samples(results: Mapping[str, Any], lm: RefineLM) -> list[Sample]:
    """What was answered, per task and length, in the order of the data."""
    samples: list[Sample] = []
    for task, found in sorted(sorted_samples(results).items()):
        config = results.get("configs", {}).get(task, {})
        kind = str(config.get("output_type", "generate_until"))
        scores: dict[int, dict[str, Any]] = {}
        first: dict[int, Mapping[str, Any]] = {}
        for sample in found:  # one for every filter
            first.setdefault(sample["doc_id"], sample)
            for metric in sample["metrics"]:
                name = score_name(metric, sample["filter"], _scorer(task, results))
                scores.setdefault(sample["doc_id"], {})[name] = plain(sample[metric])
        texts = [_texts(sample, kind) for sample in first.values()]
        new = [prompt for prompt, _ in texts if prompt not in lm.prompt_tokens]
        counts = lm.prompt_tokens | dict(zip(new, count_all(lm.tokenizer, new), strict=True))
        answers = count_all(lm.tokenizer, [answer for _, answer in texts])
        samples += [
            Sample(
                task=_short(task),
                length=_length(task, sample),
                doc_id=doc_id,
                prompt_sha256=sample["prompt_hash"],
                doc_sha256=sample["doc_hash"],
                output_type=kind,
                answers=tuple(as_text(answer) for request in sample["resps"] for answer in request),
                reference=_reference(task, sample, config),
                scores=scores[doc_id],
                prompt_tokens=counts[prompt],
                answer_tokens=answer_tokens,
                truncated=(task, doc_id) in lm.shortened,
            )
            for (doc_id, sample), (prompt, _), answer_tokens in zip(first.items(), texts, answers, strict=True)
        ]
    return samples


def _texts(sample: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """What was read, and what was generated or scored after it."""
    arguments = sample["arguments"]
    if kind == "generate_until":
        return str(arguments[0][0]), "".join(str(answer) for request in sample["resps"] for answer in request)
    if kind == "loglikelihood_rolling":
        return "", str(arguments[0][0])
    return str(arguments[0][0]), "".join(str(argument[1]) for argument in arguments)


def _reference(task: str, sample: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """What scoring reads of an example of ours, which is all but its prompt; a stock task's target."""
    if not task.startswith(PREFIX):
        return plain(sample["target"])
    return {key: plain(value) for key, value in sample["doc"].items() if key != config.get("doc_to_text", "prompt")}


def _scorer(task: str, results: Mapping[str, Any]) -> str | None:
    """What a task of ours calls its score; lm-eval knows it by the name of the length."""
    if not task.startswith(PREFIX):
        return None
    return (results.get("configs", {}).get(task, {}).get("metadata") or {}).get("scorer")


def _length(task: str, sample: Mapping[str, Any]) -> int | None:
    length = sample["doc"].get("length") if task.startswith(PREFIX) else None
    return length if str(length) in sample["metrics"] else None


def _short(task: str) -> str:
    return task.removeprefix(PREFIX)


def _model_name(model: str | Path) -> str:
    """A folder's name; of a run's final checkpoint, the run's; a hub id as it is."""
    path = Path(model)
    if not path.is_dir():
        return str(model)
    path = path.resolve()
    return path.parent.name if path.name == FINAL else path.name


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """lm-eval seeds Python, numpy and torch for the whole process; a training run beside it must not notice."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval, datasets and transformers keep their bars and chatter to themselves."""
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    names = ("lm_eval", "datasets", "transformers", "huggingface_hub", "accelerate")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = (
        (datasets.is_progress_bar_enabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        (not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars),
        (
            transformers_logging.is_progress_bar_enabled(),
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
    )
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
            stack.callback(logging.getLogger(name).setLevel, levels[name])
        for enabled, disable, enable in bars:
            disable()
            if enabled:
                stack.callback(enable)
        # Its bar over the documents of a task knows no switch, and its text about this machine takes seconds to
        # collect and has no place in a record.
        stack.enter_context(_instead(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)))
        stack.enter_context(_instead(lm_eval.evaluator, "add_env_info", lambda storage: None))
        yield


@contextlib.contextmanager
def _instead(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """`value` under a module's name for a while, if the module has that name."""
    if not hasattr(module, name):
        yield
        return
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)
