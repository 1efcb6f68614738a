"""Scores from saved answers alone: the same to the last bit, and what changed is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from refine_harness.errors import DataError, TaskError
from refine_harness.evaluation import niah
from refine_harness.evaluation.compare import open_run
from refine_harness.evaluation.rescore import our_scorer, rescore, rescore_table, summary
from refine_harness.evaluation.samples import SAMPLES, read_samples, write_samples
from refine_harness.resources import resource

from .runs import make_run, sample

SCORES = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
PARTS = {("niah_single_1", 512): SCORES, ("niah_single_2", 512): SCORES[:3], ("niah_single_2", 1024): SCORES[1:]}


def test_every_number_is_the_same_to_the_last_bit(tmp_path: Path):
    record = make_run(tmp_path / "a", PARTS)
    run = open_run(tmp_path / "a")
    results = rescore(run)
    assert [(r.kind, r.name, r.length) for r in results] == [
        *(("task", score.task, score.length) for score in record.scores),
        *(("group", group.group, group.length) for group in record.groups),
    ]
    assert all(result.same for result in results)
    assert [result.again for result in results][:3] == [(s.value, s.stderr) for s in record.scores]
    assert summary(run, results) == "5 scores from 16 saved answers: all the same, bit for bit"
    assert rescore_table(results).row_count == 0


def test_a_changed_scorer_is_found_example_by_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "a", PARTS)
    usual = niah.string_match_all
    monkeypatch.setattr(niah, "string_match_all", lambda text, answers: 0.5 if "6" in answers else usual(text, answers))
    run = open_run(tmp_path / "a")
    results = rescore(run)
    different = [(r.kind, r.name, r.length, r.changed) for r in results if not r.same]
    assert different == [("task", "niah_single_1", 512, 1), ("group", "niah", 512, 1)]
    assert "2 are others now" in summary(run, results)
    assert rescore_table(results).row_count == 2
    assert results[0].again.value == pytest.approx(100 * 3.5 / 7)


def test_a_change_that_leaves_the_mean_alone_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "a", {("niah_single_1", 512): [1.0, 0.0]})
    monkeypatch.setattr(niah, "string_match_all", lambda text, answers: float("1" in answers))
    assert not any(result.same for result in rescore(open_run(tmp_path / "a")))


def test_answers_that_were_changed_are_refused_before_anything_is_scored(tmp_path: Path):
    make_run(tmp_path / "a", PARTS)
    (path,) = tmp_path.glob(f"a/scores/*/{SAMPLES}")
    rows = read_samples(path)
    write_samples([replace(rows[0], answers=("better",)), *rows[1:]], path.parent)
    with pytest.raises(DataError, match="does not hold the answers"):
        rescore(open_run(tmp_path / "a"))


def test_what_scoring_needs_and_was_not_saved_is_one_sentence(tmp_path: Path):
    rows = [replace(sample("niah_single_1", 512, 0, 1.0), reference={"length": 512})]
    make_run(tmp_path / "a", {}, samples=rows)
    with pytest.raises(TaskError, match=r"example 0 was saved without what scoring needs now \('answers'\)"):
        rescore(open_run(tmp_path / "a"))


def test_every_task_of_ours_is_scored_by_the_function_that_lm_eval_finds():
    found = 0
    for path in sorted(resource("tasks").glob("*/*.yaml")):
        config = load_yaml(path)
        task = config.get("task")
        if not isinstance(task, str):
            continue
        scorer = our_scorer(task.removeprefix("refine_"))
        assert scorer is not None
        assert scorer.__closure__ is not None
        cells = [cell.cell_contents for cell in scorer.__closure__]
        assert config["process_results"] in cells, task
        assert config["metadata"].get("scorer") in cells, task
        found += 1
    assert found > 20
    assert our_scorer("arc_easy") is None
