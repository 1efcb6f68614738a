"""The real command on a tiny model: train, score, stop, go on, and say what is wrong. Nothing is faked here."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from typer.testing import CliRunner

from refine_harness import cli
from refine_harness.records import read_records

WORDS = ["river", "stone", "winter", "letter", "morning", "garden", "silver", "window", "mountain", "captain", "paper"]
SMALL = [
    "steps=4",
    "batch.sequences=4",
    "batch.steps=2",
    "batch.micro=2",
    "data.window=64",
    "algorithm.chunks=3",
    "algorithm.rollout_length=3",
    "optim.lr=0.01",
]
TASKS = ["--tasks", "niah_single_1", "--lengths", "1024", "--limit", "2"]


def refine(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def did(*arguments: str) -> str:
    done = refine(*arguments)
    assert done.exit_code == 0, (done.output, done.stderr, done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, questions, a tokenizer and an untrained model, all made by the command."""
    home = tmp_path_factory.mktemp("home")
    rng = random.Random(0)
    (home / "texts").mkdir()
    for name in ("a", "b", "c"):
        sentences = [" ".join(rng.choices(WORDS, k=8)).capitalize() + f" {rng.randint(0, 999)}." for _ in range(80)]
        (home / "texts" / f"{name}.txt").write_text(" ".join(sentences))
    rows = [
        {"prompt": f"{' '.join(rng.choices(WORDS, k=60))} What comes? Answer:", "answer": rng.choice(WORDS)}
        for _ in range(12)
    ]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_type": "delta_net", "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 300}
    (home / "config.json").write_text(json.dumps({**config, **special}))
    tokenizer = str(home / "tokenizer")
    did("tokenizer", "--data", str(home / "texts"), "--vocab-size", "300", "--out", tokenizer)
    did("init", str(home / "config.json"), "--tokenizer", tokenizer, "--out", str(home / "model"))
    return home


def mid(home: Path, out: Path, *more: str) -> list[str]:
    data = f"data.path={home / 'texts'}"
    return ["train", "--stage", "mid", "--model", str(home / "model"), "--out", str(out), data, *SMALL, *more]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "final" / "model.safetensors")


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_one_command_trains_and_scores_and_does_neither_twice(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    table = did(*mid(home, out), *TASKS, "--name", "first")
    assert "first" in table
    assert "niah" in table
    (record,) = read_records(out / "records")
    assert (record.stage, record.method, record.chain) == ("mid", "refine", ("refine mid",))
    assert record.training is not None
    assert (record.training.optimizer_steps, record.training.tokens) == (4, 4 * 2 * 64)
    assert record.scores[0].n == 2
    assert record.model.parent_sha256 != record.model.weights_sha256
    assert {path.name for path in (out / "final").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training_config.json",
    }
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = refine(*mid(home, out), *TASKS, "--name", "first")
    assert again.exit_code == 0
    assert "done before" in again.stderr
    assert "examples" not in again.stderr  # they are built for scoring alone
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_next_token_training_is_lambda_zero_on_the_same_documents(home: Path, tmp_path: Path) -> None:
    did(*mid(home, tmp_path / "ntp", "algorithm.lambda_rl=0"))
    did(*mid(home, tmp_path / "refine"))
    ntp, both = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ntp", "refine")
    )
    assert [step["tokens"] for step in ntp] == [step["tokens"] for step in both]
    assert ntp[0]["ntp_loss"] == pytest.approx(both[0]["ntp_loss"], abs=1e-6)
    assert ntp[0]["loss"] == ntp[0]["ntp_loss"]
    assert not same(weights(tmp_path / "ntp"), weights(tmp_path / "refine"))


def test_training_that_its_dtype_loses_is_said(home: Path, tmp_path: Path) -> None:
    narrow = refine(*mid(home, tmp_path / "narrow", "dtype=bfloat16", "optim.lr=1e-6"))
    assert narrow.exit_code == 0, (narrow.output, narrow.exception)
    assert re.search(r"1e-06 are too small for 9\d% of the weights in bfloat16", narrow.stderr)
    assert "too small" not in refine(*mid(home, tmp_path / "wide", "optim.lr=1e-6")).stderr


def test_nested_post_training_takes_prompt_and_answer_steps(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "post"
    settings = [setting for setting in SMALL if "window" not in setting]
    did(
        *["train", "--stage", "post", "--model", str(home / "model"), "--out", str(out)],
        *[f"data.path={home / 'questions.jsonl'}", "data.prompt_tokens=400", *settings],
    )
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["facts"].get("answer_step", 0.0) for step in steps] == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("restore", ("prompt", "never"))
def test_test_time_training_scores_and_leaves_the_model_alone(home: Path, tmp_path: Path, restore: str) -> None:
    before = (home / "model" / "model.safetensors").read_bytes()
    settings = [setting for setting in SMALL if not setting.startswith(("data", "steps"))]
    did(
        *["train", "--stage", "test-time", "--model", str(home / "model"), "--out", str(tmp_path / "ttt")],
        *[f"restore={restore}", "steps=1", *settings, *TASKS],
    )
    (record,) = read_records(tmp_path / "ttt" / "records")
    assert (record.stage, record.restore, record.evaluation.backend) == ("test-time", restore, "refine-ttt")
    assert (home / "model" / "model.safetensors").read_bytes() == before


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What lm-eval was asked to build, each time."""
    asked: list[list[str]] = []
    usual = TaskManager.load
    monkeypatch.setattr(TaskManager, "load", lambda self, names: asked.append(names) or usual(self, names))
    return asked


def test_an_evaluation_builds_its_examples_once_and_says_so(home: Path, tmp_path: Path, builds: list) -> None:
    model = str(home / "model")
    done = refine("eval", "--model", model, "--out", str(tmp_path / "eval"), *TASKS)
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(builds) == 1
    said = done.stderr.splitlines()
    assert said[0].startswith("examples  0/1  niah_single_1  0:00 so far")
    assert said[1].startswith("examples  1/1")
    assert said[2] == "score  0/2  0:00 so far", "the clock starts with the first request"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there")
def test_a_device_that_is_not_there_is_said_before_anything_is_built(home: Path, tmp_path: Path, builds: list) -> None:
    out = tmp_path / "eval"
    done = refine("eval", "--model", str(home / "model"), "--out", str(out), *TASKS, "--device", "cuda")
    assert done.exit_code == 2
    assert "torch sees no GPU" in done.stderr
    assert not builds
    assert not out.exists()


def test_kernels_that_cannot_run_are_said_in_one_sentence(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINE_KERNELS", "fast")
    done = refine("eval", "--model", str(home / "model"), "--out", str(tmp_path / "eval"), *TASKS)
    assert done.exit_code == 2, done.exception
    assert done.stderr.endswith("error: REFINE_KERNELS is 'fast'; expected auto, reference or fused.\n")


@pytest.mark.parametrize(("kept", "times"), ((None, 1), (0, 2)))
def test_an_experiment_builds_examples_once_or_again_after_training_where_they_are_large(
    home: Path, tmp_path: Path, builds: list, monkeypatch: pytest.MonkeyPatch, kept: int | None, times: int
) -> None:
    if kept is not None:
        monkeypatch.setattr("refine_harness.run.KEPT_WHILE_TRAINING", kept)
    settings = {"steps": 1, "batch": {"sequences": 2, "steps": 1}, "algorithm": {"lambda_rl": 0.0}}
    experiment = {
        "name": "tiny",
        "model": str(home / "model"),
        "evaluation": {"tasks": ["niah_single_1"], "lengths": [1024], "limit": 2},
        "runs": [
            {"name": "base", "stage": "base"},
            {
                "name": "mid",
                "stage": "mid",
                "config": {**settings, "data": {"path": str(home / "texts"), "window": 64}},
            },
        ],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    did("run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"))
    assert len(builds) == times
    first, second = read_records(tmp_path / "out" / "records")
    assert first.evaluation.data_sha256 == second.evaluation.data_sha256


def started(arguments: list[str], environment: Mapping[str, str] = {}, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "refine_harness", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell gives what it starts in the background no interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(home: Path, tmp_path: Path) -> None:
    long = ["steps=150", "checkpoint_every=2"]  # long enough to be met under way on a busy machine
    did(*mid(home, tmp_path / "whole", *long))
    out = tmp_path / "parts"
    process = started(mid(home, out, *long))
    deadline = time.monotonic() + 120
    while not any(out.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "goes on where it was" in said
    assert not (out / "final").exists()
    did(*mid(home, out, *long))
    assert same(weights(out), weights(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 151))
    assert not any(out.glob("step-*"))


def in_two_processes(arguments: list[str], group: Sequence[dict[str, str]]) -> list[str]:
    """What each of them prints; the first alone says how far it is."""
    processes = [started(arguments, environment) for environment in group]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "so far" in said[0][1] and "so far" not in said[1][1]
    return [printed for printed, _ in said]


def test_two_processes_train_and_score_what_one_does(home: Path, tmp_path: Path, group_of_two) -> None:
    settings = [*TASKS, "dtype=float64"]
    did(*mid(home, tmp_path / "one", *settings))
    first, second = in_two_processes(mid(home, tmp_path / "two", *settings), group_of_two)
    assert "two/final" in first and not second
    alone, together = (weights(tmp_path / name) for name in ("one", "two"))
    assert alone.keys() == together.keys()
    for name, x in alone.items():
        torch.testing.assert_close(together[name], x, rtol=1e-9, atol=1e-12)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 4
    [one], [two] = (read_records(tmp_path / name / "records") for name in ("one", "two"))
    assert [(score.task, score.n) for score in two.scores] == [(score.task, score.n) for score in one.scores]


def tiny_experiment(home: Path, folder: Path) -> list[str]:
    """The command for an experiment of three runs."""
    settings = {
        "steps": 2,
        "batch": {"sequences": 2, "steps": 1},
        "algorithm": {"chunks": 3, "rollout_length": 3, "rollouts_from": "step"},
        "data": {"path": str(home / "texts"), "window": 64},
    }
    experiment = {
        "name": "tiny",
        "model": str(home / "model"),
        "evaluation": {"tasks": ["niah_single_1"], "lengths": [1024], "limit": 2},
        "runs": [
            {"name": "base", "stage": "base"},
            {"name": "mid", "stage": "mid", "config": settings},
            {"name": "ttt", "stage": "test-time", "parent": "mid", "config": {"steps": 1}},
        ],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    return ["run", str(folder / "tiny.yaml"), "--out", str(folder / "out")]


def test_two_processes_go_through_an_experiment_together(home: Path, tmp_path: Path, group_of_two) -> None:
    first, second = in_two_processes(tiny_experiment(home, tmp_path), group_of_two)
    assert "The page" in first and not second
    assert sorted(record.name for record in read_records(tmp_path / "out" / "records")) == ["base", "mid", "ttt"]


def test_an_experiment_goes_on_where_it_was_killed_and_makes_its_page(home: Path, tmp_path: Path) -> None:
    arguments = tiny_experiment(home, tmp_path)
    process = started(arguments)
    deadline = time.monotonic() + 120
    while not any((tmp_path / "out" / "records").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    kept = {path.name for path in (tmp_path / "out" / "records").glob("*.json")}
    assert kept

    shown = did(*arguments)
    records = {record.name: record for record in read_records(tmp_path / "out" / "records")}
    assert set(records) == {"base", "mid", "ttt"}
    assert kept <= {record.file_name for record in records.values()}
    assert records["ttt"].chain == ("refine mid", "refine test-time (restored)")
    assert records["ttt"].model.parent_sha256 == records["mid"].model.weights_sha256
    page = tmp_path / "out" / "page" / "index.html"
    assert str(page.resolve()) in shown.replace("\n", "")
    assert all(record.file_name[-17:-5] in page.read_text() for record in records.values())
    again = refine(*arguments).stderr
    assert "done before" in again
    assert "examples" not in again


def refused(out: Path, *arguments: str) -> str:
    """What a command says that exits with 2; nothing is written at `out`."""
    before = sorted(out.rglob("*")) if out.exists() else None
    done = refine(*arguments)
    assert done.exit_code == 2, (done.output, done.stderr, done.exception)
    said = [line for line in done.stderr.splitlines() if not line.startswith("examples")]  # how far building was
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    return said[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["algorithm.rewrad=exact"], "algorithm.rewrad is not a setting. Did you mean algorithm.reward?"),
        (["steps=many"], "steps is 'many'; it should be a valid integer"),
        (["algorithm.group=position"], "no spread to learn from"),
        (["data.window=100000"], "are all shorter than window=100000 (longest: "),
        (["algorithm.chunks=70"], "window is 64"),
        (["algorithm.rollout_length=80"], "window is 64"),
        (["data.path=nowhere/at/all"], "nowhere/at/all"),
        (["--tasks", "niha"], "Did you mean niah?"),
        (["--tasks", "longqa", "--data", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    home: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    assert said in refused(tmp_path / "out", *mid(home, tmp_path / "out"), *more)


def test_empty_data_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "out", *mid(home, tmp_path / "out"), f"data.path={tmp_path / 'empty'}")
    (tmp_path / "empty" / "a.txt").write_text("")
    assert "empty" in refused(tmp_path / "out", *mid(home, tmp_path / "out"), f"data.path={tmp_path / 'empty'}")


def test_a_missing_or_corrupt_model_is_refused(home: Path, tmp_path: Path) -> None:
    arguments = mid(home, tmp_path / "out")
    place = arguments.index("--model") + 1
    arguments[place] = str(tmp_path / "missing")
    assert "no model folder at" in refused(tmp_path / "out", *arguments)
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    for file in (home / "model").iterdir():
        (corrupt / file.name).write_bytes(file.read_bytes()[: 3000 if file.suffix == ".safetensors" else None])
    arguments[place] = str(corrupt)
    assert "corrupt" in refused(tmp_path / "out", *arguments)
    config = json.loads((home / "model" / "config.json").read_text())
    (corrupt / "model.safetensors").write_bytes((home / "model" / "model.safetensors").read_bytes())
    (corrupt / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    assert "Use the tokenizer that the model was trained with" in refused(tmp_path / "out", *arguments)


def test_an_output_that_cannot_be_written_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(tmp_path / "file" / "out", *mid(home, tmp_path / "file" / "out"))


def test_a_folder_that_holds_another_run_is_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    did(*mid(home, out))
    assert "holds another run: config.optim.lr" in refused(out, *mid(home, out, "optim.lr=0.02"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "holds other files" in refused(tmp_path / "other", *mid(home, tmp_path / "other"))


def test_scoring_in_python_as_lm_eval_users_do(home: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import refine_harness  # noqa: F401  (registers the backend)
    from refine_harness.resources import resource

    # lm-eval's module imports this name lazily, which type checkers take for another function.
    simple_evaluate: Any = lm_eval.simple_evaluate
    metadata: dict[str, Any] = {"pretrained": str(home / "model"), "lengths": [1024], "limit": 2}
    results = simple_evaluate(
        model="refine",
        model_args=f"pretrained={home / 'model'}",
        tasks=["refine_niah_single_1"],
        task_manager=TaskManager(include_path=str(resource("tasks")), include_defaults=False, metadata=metadata),
        limit=2,
        device="cpu",
    )
    assert results["results"]["refine_niah_single_1"]["1024,none"] in (0.0, 0.5, 1.0)
