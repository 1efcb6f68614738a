"""Two runs on the same examples: what is matched, what is said, what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from refine_harness.errors import ConfigError, DataError
from refine_harness.evaluation.compare import Comparison, Row, compare, comparison_table, footer, open_run, p_text
from refine_harness.evaluation.samples import SAMPLES
from refine_harness.records import EvaluationFacts, TrainingFacts

from .runs import make_run, sample, sha256

ONE, TWO = ("niah_single_1", 512), ("niah_single_2", 512)


def shares(seed: int, n: int = 40, chance: float = 0.5) -> list[float]:
    return (np.random.default_rng(seed).random(n) < chance).astype(float).tolist()


def compared(*sides: Path | list[Path], **options: Any) -> Comparison:
    first, second = ([open_run(path) for path in (side if isinstance(side, list) else [side])] for side in sides)
    return compare(first, second, **{"resamples": 2000, **options})


def row(comparison: Comparison, name: str, length: int | None = 512) -> Row:
    (found,) = [row for row in comparison.rows if (row.name, row.length) == (name, length)]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a and b, with the same two tasks."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "a", {ONE: shares(1), TWO: shares(2)})
    make_run(folder / "b", {ONE: shares(3, chance=0.9), TWO: shares(2)})
    return folder


# What is compared


def test_means_are_those_of_the_records_and_a_group_is_the_mean_of_its_tasks(runs: Path):
    found = compared(runs / "a", runs / "b")
    records = [open_run(runs / name).record for name in "ab"]
    for name, place in (("niah_single_1", 0), ("niah_single_2", 1)):
        result = row(found, name).result
        assert (result.first, result.second) == pytest.approx(tuple(record.scores[place].value for record in records))
        assert result.n == 40
    group = row(found, "niah")
    assert (group.kind, group.tasks, group.result.n) == ("group", 2, 80)
    assert group.result.first == pytest.approx(records[0].groups[0].value)
    assert group.result.difference == pytest.approx(records[1].groups[0].value - records[0].groups[0].value)
    assert row(found, "niah_single_1").result.p < 0.01
    assert (row(found, "niah_single_2").result.p, row(found, "niah_single_2").result.difference) == (1.0, 0.0)
    assert [r.kind for r in found.rows] == ["group", "task", "task"]


def test_a_run_against_itself_has_p_1_everywhere(runs: Path):
    for found in compared(runs / "a", runs / "a").rows:
        assert (found.result.p, found.p_holm, found.result.difference) == (1.0, 1.0, 0.0)


def test_sides_can_be_swapped(runs: Path):
    there, back = compared(runs / "a", runs / "b"), compared(runs / "b", runs / "a")
    one, other = row(there, "niah_single_1").result, row(back, "niah_single_1").result
    assert one.difference == -other.difference
    assert one.p == other.p
    assert one.low == pytest.approx(-(other.high or 0), abs=2)


def test_a_tasks_numbers_do_not_depend_on_what_else_is_compared(runs: Path, tmp_path: Path):
    for name, seed in (("a", 1), ("b", 3)):
        make_run(tmp_path / name, {ONE: shares(seed, chance=0.5 if name == "a" else 0.9)})
    alone = row(compared(tmp_path / "a", tmp_path / "b"), "niah_single_1")
    assert alone.result == row(compared(runs / "a", runs / "b"), "niah_single_1").result


def test_examples_are_matched_by_prompt_wherever_they_stand(runs: Path, tmp_path: Path):
    scores = shares(3, chance=0.9)
    shuffled = [replace(sample(*ONE, 39 - i, scores[39 - i]), doc_id=i) for i in range(40)]
    make_run(tmp_path / "b", {}, samples=[*shuffled, *(sample(*TWO, i, s) for i, s in enumerate(shares(2)))])
    assert compared(runs / "a", tmp_path / "b").rows == compared(runs / "a", runs / "b").rows


def test_what_cannot_be_matched_is_left_out_and_counted(runs: Path, tmp_path: Path):
    scores = shares(3, chance=0.9)
    make_run(tmp_path / "b", {ONE: scores[:30], ("niah_single_3", 512): scores})
    found = compared(runs / "a", tmp_path / "b")
    (task,) = [row for row in found.rows if row.kind == "task"]
    assert (task.name, task.result.n, task.unmatched) == ("niah_single_1", 30, 10)
    assert task.result.first == pytest.approx(100 * np.mean(shares(1)[:30]))
    assert any("10 examples are not in every run" in note for note in found.notes)
    assert any("2 scores are not in every run" in note for note in found.notes)


def test_the_same_example_in_other_words_is_matched_by_its_own_hash(runs: Path, tmp_path: Path):
    scores = shares(3, chance=0.9)
    templated = [replace(sample(*ONE, i, s), prompt_sha256=sha256(f"<user>{i}")) for i, s in enumerate(scores)]
    make_run(tmp_path / "b", {}, samples=templated)
    task = row(compared(runs / "a", tmp_path / "b"), "niah_single_1")
    assert (task.result.n, task.unmatched) == (40, 0)
    assert task.result.difference == row(compared(runs / "a", runs / "b"), "niah_single_1").result.difference


def test_an_example_that_stands_twice_is_matched_twice(tmp_path: Path):
    for name, scores in (("a", [1.0, 0.0, 0.0]), ("b", [1.0, 1.0, 1.0])):
        rows = [replace(sample(*ONE, i, s), prompt_sha256=sha256("the same")) for i, s in enumerate(scores)]
        make_run(tmp_path / name, {}, samples=rows)
    assert row(compared(tmp_path / "a", tmp_path / "b"), "niah_single_1").result.n == 3


def test_groups_by_size_weigh_tasks_by_their_examples(tmp_path: Path):
    make_run(tmp_path / "a", {ONE: [0.0] * 30, TWO: [0.0] * 10}, by_size=True)
    make_run(tmp_path / "b", {ONE: [1.0] * 30, TWO: [0.0] * 10}, by_size=True)
    assert row(compared(tmp_path / "a", tmp_path / "b"), "niah").result.difference == pytest.approx(75)


def test_metrics_with_examples_of_their_own_are_compared_apart(tmp_path: Path):
    for name, right in (("a", 0.0), ("b", 1.0)):
        rows = [
            replace(
                sample("longbench_qasper_e", None, i, 0.0), scores={("0-4k", "8k+")[i % 2]: right if i % 2 else 0.5}
            )
            for i in range(10)
        ]
        record = make_run(tmp_path / "throwaway" / name, {("longbench_qasper_e", None): [0.0]})
        scores = [
            record.scores[0].model_copy(
                update={"metric": metric, "value": value, "n": 5, "group": f"longbench_e {metric}"}
            )
            for metric, value in (("0-4k", 50.0), ("8k+", 100 * right))
        ]
        groups = [
            record.groups[0].model_copy(update={"group": score.group, "value": score.value, "n": 5}) for score in scores
        ]
        make_run(tmp_path / name, {}, samples=rows, scores=tuple(scores), groups=tuple(groups), rehash=True)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert {(r.name, r.metric, r.result.difference, r.result.n) for r in found.rows if r.kind == "task"} == {
        ("longbench_qasper_e", "0-4k", 0.0, 5),
        ("longbench_qasper_e", "8k+", 100.0, 5),
    }
    assert {r.name for r in found.rows if r.kind == "group"} == {"longbench_e 0-4k", "longbench_e 8k+"}


def test_corpus_scores_are_named_and_not_compared(runs: Path, tmp_path: Path):
    for name in "ab":
        rows = [sample(*ONE, i, s) for i, s in enumerate(shares(1))]
        bleu = [replace(sample("wmt", None, i, 0.0), scores={"bleu": ["a", "b"]}) for i in range(3)]
        record = make_run(tmp_path / "throwaway" / name, {ONE: shares(1), ("wmt", None): [0.0] * 3})
        scores = (
            record.scores[0],
            record.scores[1].model_copy(update={"metric": "bleu", "unit": "raw", "value": 20.0}),
        )
        make_run(tmp_path / name, {}, samples=[*rows, *bleu], scores=scores, rehash=True)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert [row.name for row in found.rows if row.kind == "task"] == ["niah_single_1"]
    assert any(note.startswith("wmt bleu: no mean") for note in found.notes)


# Several seeds


def test_three_seeds_a_side_are_one_comparison_without_the_warning(tmp_path: Path):
    for seed in range(3):
        make_run(tmp_path / f"a{seed}", {ONE: shares(seed, 200, 0.4)})
        make_run(tmp_path / f"b{seed}", {ONE: shares(10 + seed, 200, 0.7)})
    sides = [[tmp_path / f"{side}{seed}" for seed in range(3)] for side in "ab"]
    found = compared(*sides)
    result = row(found, "niah_single_1").result
    assert result.first == pytest.approx(np.mean([100 * np.mean(shares(seed, 200, 0.4)) for seed in range(3)]))
    assert result.low is not None
    assert result.low > 0
    assert result.p < 0.05
    assert not any("winner" in note for note in found.notes)
    assert any("A has 2 and B has 3" in note for note in compared(sides[0][:2], sides[1]).notes)


def test_the_same_weights_are_one_seed_however_often_they_were_scored(tmp_path: Path):
    for seed in range(3):
        make_run(tmp_path / f"a{seed}", {ONE: shares(seed)}, weights="a")
        make_run(tmp_path / f"b{seed}", {ONE: shares(seed)})
    found = compared([tmp_path / f"a{seed}" for seed in range(3)], [tmp_path / f"b{seed}" for seed in range(3)])
    assert any("A has 1 and B has 3" in note for note in found.notes)


def test_a_run_twice_on_a_side_is_refused(runs: Path):
    with pytest.raises(ConfigError, match="are one run, not two seeds"):
        compared([runs / "a", next((runs / "a" / "records").glob("*.json"))], runs / "b")


def test_other_steps_and_settings_are_said(runs: Path, tmp_path: Path):
    record = open_run(runs / "b").record
    make_run(
        tmp_path / "b",
        {ONE: shares(1)},
        stage="mid",
        method="refine",
        training=TrainingFacts(config={}, optimizer_steps=7, tokens=100, seconds=1),
        evaluation=EvaluationFacts(**{**record.evaluation.model_dump(), "dtype": "bfloat16"}),
    )
    notes = compared(runs / "a", tmp_path / "b").notes
    assert any("optimizer steps differ: 0 in A, 7 in B" in note for note in notes)
    assert any("dtype differ: float32 in A, bfloat16 in B" in note for note in notes)


# Where runs are


def test_a_run_is_its_folder_or_any_of_its_records(runs: Path):
    (kept,) = (runs / "a" / "scores").iterdir()
    (record,) = (runs / "a" / "records").iterdir()
    found = [open_run(path) for path in (runs / "a", kept, record, kept / record.name)]
    assert len({run.record.id for run in found}) == 1
    assert all(run.samples == found[0].samples for run in found)


def test_a_record_of_an_experiment_finds_its_answers(runs: Path, tmp_path: Path):
    record = make_run(tmp_path / "out" / "one", {ONE: shares(1)})
    make_run(tmp_path / "out" / "two", {ONE: shares(2)})
    for file in tmp_path.glob("out/*/records/*.json"):
        (tmp_path / "out" / "records").mkdir(exist_ok=True)
        file.rename(tmp_path / "out" / "records" / file.name)
        file.parent.rmdir()
    run = open_run(tmp_path / "out" / "records" / record.file_name)
    assert len(run.samples[ONE]) == 40
    with pytest.raises(DataError, match=r"holds several runs \(one, two\)"):
        open_run(tmp_path / "out")


def test_a_checkpoint_scored_in_several_goes_is_one_run(tmp_path: Path):
    make_run(tmp_path / "a", {ONE: shares(1)}, weights="w")
    make_run(tmp_path / "a", {TWO: shares(2)}, weights="w")
    run = open_run(tmp_path / "a")
    assert {task for task, _, _ in run.scores} == {"niah_single_1", "niah_single_2"}
    make_run(tmp_path / "a", {TWO: shares(3)}, weights="w")
    with pytest.raises(DataError, match="holds two scores of niah_single_2"):
        open_run(tmp_path / "a")


def test_runs_without_common_examples_are_refused_in_one_sentence(runs: Path, tmp_path: Path):
    make_run(tmp_path / "c", {("niah_single_1", 1024): shares(1)})
    make_run(
        tmp_path / "d",
        {},
        samples=[
            replace(sample(*ONE, i, 1.0), prompt_sha256=sha256(f"p{i}"), doc_sha256=sha256(f"d{i}")) for i in range(4)
        ],
    )
    for name in "cd":
        with pytest.raises(DataError, match="no example in common") as refused:
            compared(runs / "a", tmp_path / name)
        assert "\n" not in str(refused.value)


def test_what_is_no_run_is_refused(runs: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "holds no score record")):
        with pytest.raises(DataError, match=says):
            open_run(path)
    make_run(tmp_path / "a", {ONE: shares(1)})
    (file,) = tmp_path.glob(f"a/scores/*/{SAMPLES}")
    file.rename(tmp_path / SAMPLES)
    with pytest.raises(DataError, match="has no answers beside it"):
        open_run(tmp_path / "a")
    baseline = next((Path(__file__).parents[2] / "leaderboard" / "baselines").glob("*.json"))
    with pytest.raises(DataError, match="row of the paper"):
        open_run(baseline)


# How it is shown


def shown(comparison: Comparison, **options: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(comparison, **options))
    return console.export_text()


def test_the_table_has_every_row_and_says_how_many_were_compared(runs: Path):
    found = compared(runs / "a", runs / "b")
    text = shown(found)
    assert "niah, mean of 2" in text
    assert "niah_single_2" in text
    assert "2 task scores and 1 group means were compared at once" in text
    assert "No claim of a winner is justified" in text
    assert "(Holm)" not in text
    assert "p (Holm)" in shown(found, holm=True)
    assert all(len(line) <= 100 for line in text.splitlines())


def test_holm_corrects_tasks_and_groups_each_among_themselves(runs: Path):
    found = compared(runs / "a", runs / "b")
    assert row(found, "niah_single_1").p_holm == pytest.approx(2 * row(found, "niah_single_1").result.p)
    assert row(found, "niah").p_holm == row(found, "niah").result.p
    assert any("keeps the chance of any false alarm" in line for line in footer(found, holm=True))


def test_p_values_are_short():
    assert [p_text(p) for p in (1.0, 0.9996, 0.0421, 0.00312, 0.00001)] == ["1", "1", "0.042", "0.0031", "<0.0001"]


def test_json_has_every_number(runs: Path):
    found = compared(runs / "a", runs / "b")
    tree = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert [run["name"] for side in "ab" for run in tree[side]] == ["a", "b"]
    assert tree["rows"][1]["difference"] == found.rows[1].result.difference
    assert tree["rows"][1]["p"] == found.rows[1].result.p
    assert set(tree["rows"][0]) >= {"kind", "name", "length", "n", "unmatched", "a", "b", "low", "high", "p_holm"}


def test_comparing_imports_no_torch_and_no_pandas(runs: Path):
    code = (
        "import sys; from refine_harness.evaluation.compare import *\n"
        "print(len(compare([open_run(sys.argv[1])], [open_run(sys.argv[2])]).rows))\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = [sys.executable, "-c", code, str(runs / "a"), str(runs / "b")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
