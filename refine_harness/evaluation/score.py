"""A checkpoint and a choice of benchmarks become one record.

What is asked for is checked first (names, then data), then the model is loaded, lm-eval runs it without a word on
the terminal, and scores, cut prompts and hashes are collected. How tasks are built is `tasks`', how the model
answers is `lm`'s, what a record is is `records`'.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from refine_harness.checkpoint import FINAL, weights_sha256
from refine_harness.config import Evaluation, TestTimeConfig
from refine_harness.errors import RunError, TaskError
from refine_harness.evaluation.lm import Progress, RefineLM, RefineTTTLM, tokenizer_sha256
from refine_harness.evaluation.tasks import PREFIX, Resolved, extract_scores, resolve, sorted_samples
from refine_harness.evaluation.tasks import TaskScore as Found
from refine_harness.models.load import pick_device, resolve_model
from refine_harness.records import (
    EvaluationFacts,
    GroupScore,
    ModelFacts,
    ScoreRecord,
    TaskScore,
    TrainingFacts,
    canonical_json,
    provenance,
)

log = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
"""Name of the file of answers."""

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
        folder: where to write `samples.jsonl`: one line per answer, sorted by task and document.
        cache_dir: keeps answers as they come, so that the same call goes on after an interruption.
        progress: told how many requests are answered; None for silence.

    Raises TaskError before the model is loaded for unknown tasks and missing data, ModelError for a bad model,
    RunError for folders that cannot be written.
    """
    with _quiet(), _own_randomness():
        source = resolve_model(model)
        pick_device(evaluation.device)  # the backend takes the CPU where lm-eval's default device is not there
        resolved = resolve(evaluation.tasks, evaluation, source)
        resolved.load()
        lm = _backend(source, evaluation, test_time, loaded, cache_dir, progress)
        weights = weights_sha256(source if Path(source).is_dir() else lm.model)
        results = _evaluate(resolved, lm)
    if lm.process:
        return None
    answers = _answers(results, lm.shortened)
    if folder is not None:
        _write_answers(Path(folder), answers)
    found = extract_scores(results, resolved)
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
        scores=tuple(_task_scores(found, results, answers)),
        groups=tuple(_group_scores(found)),
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
        batch_size=lm.batch_size,
        data_sha256={
            score.task if score.length is None else f"{score.task}@{score.length}": score.data_sha256
            for score in found
            if score.data_sha256 is not None
        },
    )


def _task_scores(
    found: Sequence[Found], results: Mapping[str, Any], answers: Mapping[_Part, Sequence[Mapping[str, Any]]]
) -> Iterator[TaskScore]:
    versions = {_short(task): version for task, version in results.get("versions", {}).items()}
    for score in found:
        if score.kind != "task":
            continue
        if not math.isfinite(score.value):
            log.warning("%s has no finite %s; its record leaves that out", score.task, score.metric)
            continue
        rows = answers[score.task, score.length]
        yield TaskScore(
            task=score.task,
            group=score.group or score.task,
            metric=score.metric,
            length=score.length,
            value=score.value,
            stderr=score.stderr,
            n=score.n,
            truncated=min(score.n, sum(row["truncated"] for row in rows)),
            higher_is_better=score.higher_is_better,
            version=str(versions.get(score.task) or "0"),
            unit="percent" if score.percent else "raw",
            samples_sha256=hashlib.sha256("\n".join(map(canonical_json, rows)).encode()).hexdigest(),
        )


def _group_scores(found: Sequence[Found]) -> Iterator[GroupScore]:
    """Means of percentages; lm-eval's aggregates of other numbers have no place on a page of percentages."""
    for score in found:
        if score.kind != "group" or not score.percent:
            continue
        # A stock group may have several metrics, and a record has one number for a group and length.
        first = next(s for s in found if s.kind == "group" and (s.task, s.length) == (score.task, score.length))
        tasks = {s.task for s in found if s.kind == "task" and s.group == score.group and s.length == score.length}
        if score is first and tasks:
            yield GroupScore(
                group=score.task,
                length=score.length,
                value=score.value,
                stderr=score.stderr,
                n_tasks=len(tasks),
                n=score.n or None,
            )


def _answers(results: Mapping[str, Any], shortened: set[tuple[str, int | None]]) -> dict[_Part, list[dict[str, Any]]]:
    """What was answered, per task and length, in the order of the data; no prompts, which may not be ours to give."""
    answers: dict[_Part, list[dict[str, Any]]] = {}
    for task, samples in sorted(sorted_samples(results).items()):
        config = results.get("configs", {}).get(task, {})
        scorer = (config.get("metadata") or {}).get("scorer") if task.startswith(PREFIX) else None
        rows: dict[int, dict[str, Any]] = {}
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            row = rows.get(sample["doc_id"])
            if row is None:
                length = sample["doc"].get("length") if task.startswith(PREFIX) else None
                row = rows[sample["doc_id"]] = {
                    "task": _short(task),
                    "length": length if str(length) in sample["metrics"] else None,
                    "doc_id": sample["doc_id"],
                    "prompt_sha256": sample["prompt_hash"],
                    "answer": _unwrapped(_plain(sample["resps"])),
                    "targets": _plain(sample["target"]),
                    "truncated": (task, sample["doc_id"]) in shortened,
                    "scores": {},
                }
                answers.setdefault((row["task"], row["length"]), []).append(row)
            for metric in sample["metrics"]:
                key = scorer or (metric if sample["filter"] == "none" else f"{metric},{sample['filter']}")
                row["scores"][key] = _plain(sample[metric])
    return answers


def _write_answers(folder: Path, answers: Mapping[_Part, Sequence[Mapping[str, Any]]]) -> None:
    rows = [row for part in sorted(answers, key=lambda part: (part[0], part[1] or 0)) for row in answers[part]]
    rows.sort(key=lambda row: (row["task"], row["doc_id"]))
    partial_path: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial_path = tempfile.mkstemp(dir=folder, prefix=f".{SAMPLES}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.chmod(partial_path, 0o644)
        os.replace(partial_path, folder / SAMPLES)
    except OSError as error:
        raise RunError(f"{folder / SAMPLES} cannot be written ({error.strerror}). Choose another --out.") from None
    finally:
        if partial_path is not None:
            Path(partial_path).unlink(missing_ok=True)


def _unwrapped(value: Any) -> Any:
    """Lists of one are that one: lm-eval has a list of requests, and of repetitions of each."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _plain(value: Any) -> Any:
    """JSON values."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


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
