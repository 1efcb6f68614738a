"""The composition root: settings become training, checkpoints, scores, records and a page.

    <out>/run.json            what this run is; another run is refused
    <out>/final/              the trained model, a Hugging Face folder (training only)
    <out>/metrics.jsonl       one line per optimizer step (training only)
    <out>/scores/<hash>/      answers of one evaluation: resumable while it runs, then samples.parquet and its record
    <out>/records/            every record, for `refine leaderboard build`

An experiment has such a folder for each of its runs, and one `records/` and `page/` for all of them. Everything that
can be wrong with the input is found before anything is written, and every command that was interrupted goes on
where it was when it is given again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from transformers.utils import logging as transformers_logging

from refine_harness import leaderboard
from refine_harness.checkpoint import (
    FINAL,
    claim_run_folder,
    final_checkpoint,
    latest_checkpoint,
    load_train_state,
    prune,
    save_checkpoint,
    step_folder,
    weights_sha256,
)
from refine_harness.config import Evaluation, Experiment, PostConfig, Run, TestTimeConfig, TrainConfig
from refine_harness.errors import RunError
from refine_harness.log import Metrics, Progress, step_facts
from refine_harness.models import load_model, load_tokenizer, resolve_model
from refine_harness.models.load import pick_device
from refine_harness.records import ScoreRecord, TrainingFacts, canonical_json, read_record, write_record
from refine_harness.training.optim import moved_share
from refine_harness.training.stages import open_data
from refine_harness.training.stages import train as training_steps
from refine_harness.training.trainer import Trainer, training_device

if TYPE_CHECKING:
    from refine_harness.evaluation.tasks import Resolved

Method = Literal["none", "ntp", "refine"]

FEW_MOVE = 0.5
"""Share of weights that an optimizer step changes; where it is less, it is said that the others stay as they are."""
KEPT_WHILE_TRAINING = 2**28
"""Bytes of examples that stay in memory while a model is trained; more are built again when they are scored on."""


@dataclass(frozen=True)
class Made:
    """A checkpoint and how it came to be."""

    model: str
    """What load_model takes."""
    stage: Literal["base", "mid", "post"] = "base"
    method: Method = "none"
    chain: tuple[str, ...] = ()
    """Of the stages that led here, as records say it."""
    parent_sha256: str | None = None
    training: TrainingFacts | None = None
    seed: int | None = None


def train(
    stage: str,
    model: str,
    out: Path,
    config: TrainConfig,
    evaluation: Evaluation | None,
    name: str | None,
    argv: Sequence[str],
) -> None:
    """`refine train`. Raises RefineError for whatever the user can put right."""
    if isinstance(config, TestTimeConfig):
        assert evaluation is not None, "the command line asks for tasks"
        return evaluate(model, out, evaluation, "refine-ttt", config, name, argv)
    with _progress() as progress:
        benchmarks = None
        if evaluation is not None:
            benchmarks = _benchmarks(evaluation, model, progress, [_scores_folder(out, evaluation)])
        made = _train(stage, model, out, config, progress, "train", benchmarks)
        record = None
        if benchmarks is not None:
            record = _score(made, benchmarks, out, out / "records", name or out.name, name, progress, argv, "score")
    if _is_first():
        print(made.model)
    if record is not None:
        _show([record])
    return None


def evaluate(
    model: str,
    out: Path,
    evaluation: Evaluation,
    backend: str,
    test_time: TestTimeConfig | None,
    name: str | None,
    argv: Sequence[str],
) -> None:
    """`refine eval`, and `refine train --stage test-time`. Raises RefineError for whatever the user can put right."""
    if backend == "refine-ttt" and test_time is None:
        test_time = TestTimeConfig()
    with _progress() as progress:
        benchmarks = _benchmarks(evaluation, model, progress, [_scores_folder(out, evaluation, test_time)])
        made = _made_before(model)
        claim_run_folder(out, {"kind": "evaluation", "model": _weights(model)})
        record = _score(
            made, benchmarks, out, out / "records", name or out.name, name, progress, argv, "score", test_time
        )
    if record is not None:
        _show([record])


def experiment(config: Experiment, out: Path | None, argv: Sequence[str]) -> None:
    """`refine run`: every run of an experiment in turn, then the page. Raises RefineError."""
    out = out or Path(config.out or f"runs/{config.name}")
    records, page = [], None
    with _progress() as progress:
        folders = [_scores_folder(out / run.name, config.evaluation, _test_time(run)) for run in config.runs]
        benchmarks = _benchmarks(config.evaluation, config.model, progress, folders)
        claim_run_folder(out, {"kind": "experiment", "experiment": config.name, "model": _weights(config.model)})
        made: dict[str | None, Made] = {None: _made_before(config.model)}
        for number, run in enumerate(config.runs, start=1):
            title = f"{number}/{len(config.runs)} {run.label or run.name}"
            record = _one_run(run, made, benchmarks, out, progress, argv, title)
            if record is not None:
                records.append(record)
                page = leaderboard.build([out / "records"], out / "page")
    if page is not None:
        _show(records)
        print(f"\nThe page, for any browser: {page.resolve()}")


def _one_run(
    run: Run,
    made: dict[str | None, Made],
    benchmarks: Resolved,
    out: Path,
    progress: Progress,
    argv: Sequence[str],
    title: str,
) -> ScoreRecord | None:
    parent, folder, config, test_time = made[run.parent], out / run.name, run.training, _test_time(run)
    if config is not None and test_time is None:
        made[run.name] = _train(run.stage, parent.model, folder, config, progress, f"{title}: training", benchmarks)
    else:
        made[run.name] = parent
        claim_run_folder(folder, {"kind": "evaluation", "model": _weights(parent.model)})
    return _score(
        made[run.name],
        benchmarks,
        folder,
        out / "records",
        run.name,
        run.label,
        progress,
        argv,
        f"{title}: {'adapting and scoring' if test_time else 'scoring'}",
        test_time,
    )


def _train(
    stage: str,
    model: str,
    out: Path,
    config: TrainConfig,
    progress: Progress,
    title: str,
    benchmarks: Resolved | None,
) -> Made:
    """Train, or go on training, or see that it is done; the final checkpoint. `benchmarks` are for later."""
    source = resolve_model(model)
    parent_sha256 = _weights(source)
    chain = (*_made_before(source).chain, describe(config))
    fingerprint = {
        "kind": "training",
        "stage": stage,
        "model": parent_sha256,
        "config": config.model_dump(mode="json", exclude={"device", "checkpoint_every"}),
    }
    done = final_checkpoint(out)
    if done is not None:
        claim_run_folder(out, fingerprint)
        progress.say(f"{title}: done before")
        return _made_before(str(done))

    if benchmarks is not None and benchmarks.nbytes > KEPT_WHILE_TRAINING:
        benchmarks.forget()
    transformers_logging.disable_progress_bar()  # its bar over the shards of a checkpoint would break ours
    resumed = latest_checkpoint(out)
    network, tokenizer = load_model(resumed or source, training_device(config.device), config.dtype)
    data = open_data(config, tokenizer)
    trainer = Trainer(network, config)
    claim_run_folder(out, fingerprint)
    if resumed is not None:
        trainer.load(load_train_state(resumed))
    elif (share := moved_share(trainer.parameters.values(), config.optim.lr)) < FEW_MOVE:
        progress.say(
            f"{title}: steps of optim.lr={config.optim.lr:g} are too small for {1 - share:.0%} of the weights in "
            f"{config.dtype}, which will stay as they are. With dtype=float32 all learn, and autocast=bf16 keeps the "
            "forward narrow."
        )
    first = trainer.accelerator.is_main_process
    before = trainer.done.optimizer_steps
    tick = progress.task(title, trainer.planned_steps, before)
    with Metrics(out, done=before) if first else nullcontext() as metrics:
        for report in training_steps(trainer, data):
            tick(report.step, report.steps, **step_facts(report))
            if metrics is not None:
                metrics.write(report)
            if first and trainer.checkpoint_due and not trainer.finished:
                state = trainer.state()
                folder = step_folder(out, state.optimizer_steps)
                save_checkpoint(folder, network, tokenizer, config, state, parent=parent_sha256, chain=chain)
                prune(out)
    if first:
        save_checkpoint(
            out / FINAL,
            network,
            tokenizer,
            config,
            trainer.state(),
            parent=parent_sha256,
            chain=chain,
            data_sha256=data.facts.data_sha256,
            resumable=False,
        )
        prune(out, keep_last=False)
    trainer.accelerator.wait_for_everyone()
    return _made_before(str(out / FINAL))


def _score(
    made: Made,
    benchmarks: Resolved,
    out: Path,
    records: Path,
    name: str,
    label: str | None,
    progress: Progress,
    argv: Sequence[str],
    title: str,
    test_time: TestTimeConfig | None = None,
) -> ScoreRecord | None:
    """Score a checkpoint, or see that it is done; the record, written to `records`.

    None in a process beside the first of several, which has the record and writes it.
    """
    evaluation = benchmarks.evaluation
    folder = _scores_folder(out, evaluation, test_time)
    if (done := _record_in(folder)) is not None:
        progress.say(f"{title}: done before")
        record = read_record(done)
        write_record(record, records)
        return record
    from refine_harness.evaluation.score import score  # lm-eval, which training alone need not wait for

    _build(benchmarks, progress)
    chain = made.chain if test_time is None else (*made.chain, describe(test_time))
    record = score(
        made.model,
        evaluation,
        name=_file_name(name),
        label=label,
        argv=argv,
        stage=made.stage,
        method=made.method,
        chain=chain,
        parent_sha256=made.parent_sha256,
        training=made.training,
        seed=None if test_time is not None else made.seed,
        test_time=test_time,
        resolved=benchmarks,
        folder=folder,
        cache_dir=folder / "answers",
        progress=progress.task(title),
    )
    if record is not None:
        write_record(record, records)
        write_record(record, folder)
    return record


def _scores_folder(out: Path, evaluation: Evaluation, test_time: TestTimeConfig | None = None) -> Path:
    """Where answers and record of an evaluation belong, in the folder of a run."""
    asked = evaluation.model_dump(mode="json", exclude={"device", "batch_size"})
    asked["test_time"] = None if test_time is None else test_time.model_dump(mode="json")
    return out / "scores" / hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:12]


def _record_in(folder: Path) -> Path | None:
    """The record of an evaluation that is done, in its folder."""
    return min(folder.glob("*.json"), default=None)


def _test_time(run: Run) -> TestTimeConfig | None:
    return run.training if isinstance(run.training, TestTimeConfig) else None


def _progress() -> Progress:
    """Lines of how far it is, by the first of several processes alone."""
    return Progress(Console(stderr=True, quiet=not _is_first()))


def _is_first() -> bool:
    """Whether this process is the first of several, as torchrun and accelerate number them."""
    return os.environ.get("RANK", "0") == "0"


def describe(config: TrainConfig) -> str:
    """A stage in a record's chain: `refine mid`, `nested ntp post`, `refine test-time (restored)`."""
    method = "refine" if config.algorithm.lambda_rl > 0 else "ntp"
    if isinstance(config, PostConfig):
        return f"nested {method} post" if config.nested else "answers post"
    if isinstance(config, TestTimeConfig):
        return f"{method} test-time ({'restored' if config.restore == 'prompt' else 'carried over'})"
    return f"{method} mid"


def _made_before(model: str) -> Made:
    """What a checkpoint of ours says of how it was made; any other model is a base."""
    path = Path(resolve_model(model)) / "training_config.json"
    if not path.is_file():
        return Made(model)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        config, progress, stage = about["config"], about["progress"], about["stage"]
        facts = TrainingFacts(
            config=config,
            optimizer_steps=progress["steps"],
            answer_steps=progress["answer_steps"],
            tokens=progress["tokens"],
            seconds=progress["seconds"],
            data_sha256=about["data_sha256"],
        )
        method = "refine" if config["algorithm"]["lambda_rl"] > 0 else "ntp"
        return Made(model, stage, method, tuple(about["chain"]), about["parent_sha256"], facts, config["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} does not say how its checkpoint was made ({error}). Restore it, or delete it to use the "
            "checkpoint as a base."
        ) from None


def _benchmarks(evaluation: Evaluation, model: str, progress: Progress, folders: Sequence[Path]) -> Resolved:
    """What `model`, and those trained from it, which have its tokenizer, are scored on.

    Built, unless each of `folders`, where the scores belong, has its record. Raises TaskError, DataError or ModelError
    now rather than after training.
    """
    from refine_harness.evaluation.tasks import resolve  # lm-eval, which training alone need not wait for

    source = resolve_model(model)
    load_tokenizer(source)
    pick_device(evaluation.device)
    benchmarks = resolve(evaluation.tasks, evaluation, source)
    if any(_record_in(folder) is None for folder in folders):
        _build(benchmarks, progress)
    return benchmarks


def _build(benchmarks: Resolved, progress: Progress) -> None:
    """Build the examples that are not built yet, which can take minutes; the first process says how far it is."""
    if not benchmarks.built:
        benchmarks.load(progress.task("examples") if os.environ.get("RANK", "0") == "0" else None)


def _weights(model: str) -> str:
    """Identity of a model: the hash of its weights, or its hub id until it is on this disk."""
    source = resolve_model(model)
    return weights_sha256(source) if Path(source).is_dir() else source


def _file_name(name: str) -> str:
    """A label as the beginning of a file name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).lstrip("._-")
    return kept[:100] or "run"


def _show(records: Sequence[ScoreRecord]) -> None:
    Console().print(leaderboard.summary_table(records))
