"""The command line: what it passes on, and how it says that something is wrong with what it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import refine_harness
from refine_harness import cli
from refine_harness.config import STAGES, Evaluation, MidConfig, PostConfig, TestTimeConfig, load
from refine_harness.errors import ConfigError, DataError

from .evaluation.runs import make_run

MID = ["train", "--stage", "mid", "--model", "m", "--out", "out"]
EVAL = ["eval", "--model", "m", "--out", "out"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, tuple[Any, ...]]]:
    """What reached `run.py`, whose place is taken; from an empty folder."""
    made: list[tuple[str, tuple[Any, ...]]] = []

    def taker(name: str) -> Any:
        return lambda *args: made.append((name, args))

    stand_in = SimpleNamespace(train=taker("train"), evaluate=taker("evaluate"), experiment=taker("experiment"))
    monkeypatch.setitem(sys.modules, "refine_harness.run", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(refine_harness, "run", stand_in, raising=False)
    monkeypatch.chdir(tmp_path)
    return made


def refine(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def refused(*arguments: str) -> str:
    """The sentence that a command prints when it exits with 2 and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    done = refine(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    kind, _, sentence = done.stderr.partition(": ")
    assert kind == "error"
    assert sentence.endswith((".\n", "?\n"))
    assert sentence.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before
    return sentence.strip()


# Help ----------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from refine_harness import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    # Processor time, so that other work on the machine cannot fail this; on an idle one it is the time to wait.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "refine_harness", "--version"], capture_output=True, text=True)
    assert done.stdout == f"refine-harness {refine_harness.__version__}\n"


@pytest.mark.parametrize(
    "name", ["train", "eval", "compare", "rescore", "run", "init", "tokenizer", "explain", "leaderboard build"]
)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    done = refine(*name.split(), "--help")
    assert done.exit_code == 0
    assert "Example" in done.output
    assert f"refine {name}" in done.output


@pytest.mark.parametrize(
    "arguments",
    [["train", "--stage", "pre", "--model", "m", "--out", "o"], ["evaluate"], [*EVAL, "--task", "niah"], ["train"]],
)
def test_usage_errors_exit_with_2(arguments: list[str], calls: list) -> None:
    assert refine(*arguments).exit_code == 2
    assert calls == []


# What is passed on ---------------------------------------------------------------------------------------------------


def test_stages_are_those_of_the_settings() -> None:
    assert {stage.value for stage in cli.Stage} == set(STAGES)
    assert {kind.value for kind in cli.Explained} == {*STAGES, "eval"}


def test_train_reads_a_file_then_overrides(calls: list) -> None:
    Path("my.yaml").write_text("steps: 8\nalgorithm: {reward: exact}\n")
    assert refine(*MID, "optim.lr=3e-6", "my.yaml", "steps=12", "data.path=books").exit_code == 0
    [(name, (stage, model, out, config, evaluation, label, argv))] = calls
    assert (name, stage, model, out) == ("train", "mid", "m", Path("out"))
    assert isinstance(config, MidConfig)
    assert (config.steps, config.optim.lr, config.algorithm.reward, config.data.path) == (12, 3e-6, "exact", "books")
    assert evaluation is None
    assert label is None
    assert argv == sys.argv


def test_train_scores_when_tasks_are_named(calls: list) -> None:
    options = ["--tasks", "niah, longqa", "--lengths", "1024,2048", "--limit", "5", "--data", "here", "--name", "mine"]
    assert refine("train", "--stage", "post", "--model", "m", "--out", "out", *options).exit_code == 0
    [(_, (_, _, _, config, evaluation, label, _))] = calls
    assert isinstance(config, PostConfig)
    assert evaluation == Evaluation(tasks=("niah", "longqa"), lengths=(1024, 2048), limit=5, data="here")
    assert label == "mine"


def test_shipped_configs_are_found_from_any_folder(calls: list) -> None:
    assert refine(*MID, "configs/midtrain/deltanet_1b.yaml").exit_code == 0
    assert calls[0][1][3] == MidConfig()


def test_eval_lets_options_win_over_overrides_over_the_file(calls: list) -> None:
    Path("scoring.yaml").write_text("tasks: [niah]\nlimit: 1\nseed: 1\nsamples: 1\n")
    assert refine(*EVAL, "scoring.yaml", "limit=2", "seed=2", "--seed", "3", "--max-length", "4096").exit_code == 0
    [(name, (model, out, evaluation, backend, test_time, label, _))] = calls
    assert (name, model, out, backend, test_time, label) == ("evaluate", "m", Path("out"), "refine", None, None)
    assert evaluation == Evaluation(tasks=("niah",), samples=1, limit=2, seed=3, max_length=4096)


def test_eval_with_test_time_training_has_its_settings(calls: list) -> None:
    Path("ttt.yaml").write_text("restore: never\n")
    assert refine(*EVAL, "--tasks", "niah", "--backend", "refine-ttt", "--config", "ttt.yaml").exit_code == 0
    assert refine(*EVAL, "--tasks", "niah", "--backend", "refine-ttt").exit_code == 0
    assert [args[4] for _, args in calls] == [TestTimeConfig(restore="never"), TestTimeConfig()]


def test_run_reads_an_experiment(calls: list) -> None:
    Path("two.yaml").write_text("name: two\nmodel: m\nruns: [{name: base, stage: base}]\n")
    assert refine("run", "two.yaml", "--out", "there").exit_code == 0
    [(name, (config, out, _))] = calls
    assert (name, config.name, out) == ("experiment", "two", Path("there"))


# What is refused -----------------------------------------------------------------------------------------------------


def test_an_unknown_setting_is_refused_with_a_suggestion(calls: list) -> None:
    assert "Did you mean algorithm.reward?" in refused(*MID, "algorithm.rewrad=exact")
    Path("my.yaml").write_text("algorithm: {rewrad: exact}\n")
    assert refused(*MID, "my.yaml").startswith("my.yaml: algorithm.rewrad is not a setting.")
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*MID, "steps=many"], "steps is 'many'"),
        ([*MID, "nowhere.yaml"], "there is no config file nowhere.yaml"),
        ([*MID, "configs/midtrain/deltanet_1.yaml"], "Did you mean configs/midtrain/deltanet_1b.yaml?"),
        ([*MID, "configs/midtrain/deltanet_1b.yaml", "configs/eval/niah.yaml"], "Give one file"),
        ([*MID, "algorithm.group=position"], "has no spread to learn from"),
        ([*MID, "--lengths", "1024"], "--lengths is about scoring and no tasks are named"),
        ([*MID, "--tasks", "niah", "--lengths", "1k"], "1k is not a number of tokens"),
        ([*MID, "--tasks", "niah", "--lengths", "0"], "0 is not a number of tokens"),
        ([*MID, "--tasks", "niah,"], "has an empty part"),
        ([*MID, "--tasks", ""], "has an empty part"),
        ([*MID, "--tasks", "niah,longqa,niah"], "names niah twice"),
        ([*MID, "--tasks", "niah", "--limit", "0"], "limit is 0"),
        (["train", "--stage", "test-time", "--model", "m", "--out", "o"], "Add --tasks"),
        ([*EVAL, "--dtype", "float8"], "dtype is 'float8'"),
        ([*EVAL, "--config", "ttt.yaml"], "Add --backend refine-ttt"),
        ([*EVAL, "--backend", "refine-ttt", "--config", "ttt.yaml"], "there is no config file ttt.yaml"),
        (["run", "configs/nothing.yaml"], "there is no config file configs/nothing.yaml"),
        (["run", "configs/midtrain/deltanet_1b.yaml"], "deltanet_1b.yaml: "),
        (["explain", "steps=0"], "steps is 0"),
        (["leaderboard", "build", "--records", "nowhere"], "nowhere is not a folder of records"),
        (["compare", "nowhere", "nowhere"], "nowhere does not exist"),
        (["compare", "a,,b", "c"], "A 'a,,b' has an empty part"),
        (["compare", "c", "a,a"], "B 'a,a' names a twice"),
        (["rescore", "nowhere"], "nowhere does not exist"),
        (["tokenizer", "--data", "nowhere.txt", "--vocab-size", "300", "--out", "t"], "nowhere.txt does not exist"),
        (["init", "nowhere.json", "--tokenizer", "t", "--out", "o"], "nowhere.json cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(arguments: list[str], says: str, calls: list) -> None:
    assert says in refused(*arguments)
    assert calls == []


def test_what_users_typed_is_never_read_as_markup(calls: list) -> None:
    assert "[bold]x[/bold]" in refused("run", "[bold]x[/bold]")


def test_any_error_of_ours_from_below_is_one_sentence(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise DataError("data/books is empty. Put books there.")

    monkeypatch.setattr(refine_harness.run, "train", fails)  # type: ignore[attr-defined]
    assert refused(*MID) == "data/books is empty. Put books there."


def test_any_other_error_keeps_its_traceback(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine_harness.run, "train", lambda *_: 1 / 0)  # type: ignore[attr-defined]
    assert isinstance(refine(*MID).exception, ZeroDivisionError)


def test_an_interruption_says_that_the_same_command_goes_on(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(refine_harness.run, "train", interrupted)  # type: ignore[attr-defined]
    done = refine(*MID)
    assert done.exit_code == 130
    assert done.stderr == "interrupted: The same command goes on where it was.\n"


def test_an_existing_folder_is_not_written_over(calls: list) -> None:
    Path("full").mkdir()
    Path("full/mine").touch()
    assert refused("init", "config.json", "--tokenizer", "t", "--out", "full").startswith("full exists already")
    assert refused("tokenizer", "--data", "x.txt", "--vocab-size", "300", "--out", "full").startswith("full exists")


# Commands with a body of their own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [kind.value for kind in cli.Explained])
def test_what_explain_prints_is_a_config_with_the_same_settings(stage: str, calls: list) -> None:
    kind = Evaluation if stage == "eval" else STAGES[stage]
    override = "limit=7" if stage == "eval" else "optim.lr=1.25e-6"
    done = refine("explain", "--stage", stage, override)
    assert done.exit_code == 0
    Path("explained.yaml").write_text(done.stdout)
    assert load(kind, "explained.yaml") == load(kind, None, [override])


def test_explain_says_what_settings_mean(calls: list) -> None:
    printed = refine("explain", "--stage", "mid", "data.sources=[{kind: needles, path: books, weight: 2}]").stdout
    assert "  # c: equal chunks per document; one position is picked in each.\n  chunks: 8\n" in printed
    assert yaml.safe_load(printed)["data"]["sources"][0]["kind"] == "needles"


def test_a_tokenizer_and_a_model_from_nothing(calls: list) -> None:
    from refine_harness.models import load_model

    Path("books").mkdir()
    for number in range(3):
        Path(f"books/{number}.txt").write_text("It was a bright cold day in April. " * 50)
    made = refine("tokenizer", "--data", "books", "--vocab-size", "270", "--out", "words")
    assert (made.exit_code, made.stdout) == (0, "words\n"), made.output
    Path("config.json").write_text(
        '{"model_type": "delta_net", "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 272}'
    )
    for out in ("one", "two"):
        assert refine("init", "config.json", "--tokenizer", "words", "--out", out, "--seed", "3").exit_code == 0
    assert sorted(path.name for path in Path("one").iterdir()) == sorted(path.name for path in Path("two").iterdir())
    one, two = (load_model(folder) for folder in ("one", "two"))
    assert one[0].config.eos_token_id == one[1].eos_token_id == 2
    assert all(a.equal(b) for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True))
    assert not list(Path.cwd().glob(".*tmp*"))


def test_a_tokenizer_larger_than_the_model_is_refused(calls: list) -> None:
    Path("b.txt").write_text("It was a bright cold day in April. " * 50)
    assert refine("tokenizer", "--data", "b.txt", "--vocab-size", "270", "--out", "words").exit_code == 0
    Path("config.json").write_text('{"model_type": "delta_net", "hidden_size": 32, "num_heads": 2, "vocab_size": 64}')
    assert "has 270 tokens" in refused("init", "config.json", "--tokenizer", "words", "--out", "one")
    Path("config.json").write_text('{"model_type": "bert"}')
    assert "of model_type 'bert'" in refused("init", "config.json", "--tokenizer", "words", "--out", "one")


def test_the_page_is_built_and_checked(calls: list) -> None:
    Path("records").mkdir()
    built = refine("leaderboard", "build", "--records", "records", "--out", "page")
    assert (built.exit_code, built.stdout) == (0, f"page{os.sep}index.html\n"), built.output
    check = ["leaderboard", "check", "--records", "records", "--page", "page/index.html"]
    assert refine(*check).exit_code == 0
    Path("page/index.html").write_text("changed")
    stale = refine(*check)
    assert stale.exit_code == 1
    assert "Run refine leaderboard build" in stale.stderr


def test_runs_are_compared_and_scored_again(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    part = ("niah_single_1", 512)
    make_run(Path("a"), {part: [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]})
    make_run(Path("b"), {part: [1.0] * 7})
    make_run(Path("other"), {("niah_single_1", 1024): [1.0]})
    shown = refine("compare", "a", "b", "--holm")
    assert shown.exit_code == 0, shown.output
    assert "p (Holm)" in shown.stdout
    assert "No claim of a winner" in shown.stdout
    tree = json.loads(refine("compare", "a", "b", "--json", "--seed", "4", "--resamples", "500").stdout)
    assert (tree["seed"], tree["resamples"], tree["rows"][1]["p"]) == (4, 500, 2 / 64)
    assert "no example in common" in refused("compare", "a", "other")

    assert refine("rescore", "a").stdout == "2 scores from 7 saved answers: all the same, bit for bit\n"
    monkeypatch.setattr("refine_harness.evaluation.niah.string_match_all", lambda *_: 0.25)
    changed = refine("rescore", "a")
    assert changed.exit_code == 1
    assert "2 are others now" in changed.stdout
    assert [row["same"] for row in json.loads(refine("rescore", "a", "--json").stdout)] == [False, False]
    for file in Path("b").glob("scores/*/samples.parquet"):
        file.write_bytes(file.read_bytes()[:-100])
    assert "is no parquet file" in refused("compare", "a", "b")
    assert "is no parquet file" in refused("rescore", "b")


def test_comma_lists_are_read_in_one_place() -> None:
    assert cli.comma_list("--tasks", " a, b", str) == ("a", "b")
    with pytest.raises(ConfigError, match="--lengths 'x'"):
        cli.comma_list("--lengths", "x", cli._length)
