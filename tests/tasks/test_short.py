"""Stock tasks, by themselves and as the group `short`, with data in a folder laid out as on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from refine_harness.config import Evaluation
from refine_harness.errors import TaskError
from refine_harness.evaluation import tasks
from refine_harness.evaluation.tasks import chosen_metrics, extract_scores, our_groups, resolve, stock_names

from .conftest import write_parquet

QUESTIONS = [
    {
        "id": str(i),
        "question": f"Which one is number {i}?",
        "choices": {"text": [f"one{i}", f"number{i}"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    for i in range(5)
]
SPLITS = ("train", "validation", "test")
LAMBADA = [{"text": f"The {word} saw the river and the boat"} for word in ("man", "cat", "dog", "fox", "boy")]


class Prefers(LM):
    """Finds every text that has `word` likely."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        texts: list[Any] = [request.arguments for request in requests]
        return [(0.0 if self.word in continuation else -9.0, True) for _, continuation in texts]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("no task here asks for this")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise AssertionError("no task here asks for this")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two data sets as `hf download` leaves them: parquet files, and a README that says what they are."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    arc = tmp_path / "allenai" / "ai2_arc"
    for name in ("ARC-Easy", "ARC-Challenge"):
        for split in SPLITS:
            write_parquet(arc / name / f"{split}-00000-of-00001.parquet", QUESTIONS)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in SPLITS)
        for name in ("ARC-Challenge", "ARC-Easy")
    )
    (arc / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    lambada = tmp_path / "EleutherAI" / "lambada_openai"
    write_parquet(lambada / "data" / "test-00000-of-00001.parquet", LAMBADA)
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n---\n"
    (lambada / "README.md").write_text(readme, encoding="utf-8")
    return str(tmp_path)


def test_short_is_made_of_stock_tasks_and_says_which_metric_counts():
    members = our_groups()["refine_short"]
    assert set(members) <= stock_names()
    assert set(chosen_metrics()["refine_short"]) == set(members)
    resolved = resolve(["short", "arc_easy"], Evaluation(), "unused")
    assert resolved.names == ("refine_short",)
    assert set(members) <= set(resolved.task_manager.all_subtasks)


def test_stock_tasks_read_copies_of_the_hubs_data_sets(data: str):
    resolved = resolve(["arc_easy", "arc_challenge"], Evaluation(data=data, limit=3), "unused")
    usual = datasets.load_dataset
    resolved.load()
    assert datasets.load_dataset is usual
    scores = extract_scores(resolved.evaluate(Prefers("number")), resolved)
    assert {(score.task, score.metric): (score.value, score.n) for score in scores} == {
        (task, metric): (100.0, 3) for task in ("arc_easy", "arc_challenge") for metric in ("acc", "acc_norm")
    }


def test_shorts_mean_is_over_one_metric_of_each_task(data: str, monkeypatch: pytest.MonkeyPatch):
    members = ("arc_easy", "arc_challenge", "lambada_openai")
    resolved = resolve(["short"], Evaluation(data=data), "unused")
    entry: Any = resolved.task_manager.task_index["refine_short"]
    whole = tasks.our_groups()
    monkeypatch.setattr(resolved.task_manager._factory, "_load_full_config", _only(resolved, members))
    assert entry.name == "refine_short"
    assert set(members) < set(whole["refine_short"])
    scores = extract_scores(resolved.evaluate(Prefers("boat")), resolved)
    found = {(score.task, score.metric): score.value for score in scores if score.kind == "task"}
    assert found["lambada_openai", "acc"] == 100.0
    # Both choices are as unlikely; the longer one, which is right, wins per character.
    assert (found["arc_easy", "acc"], found["arc_easy", "acc_norm"], found["arc_challenge", "acc_norm"]) == (
        0,
        100,
        100,
    )
    assert ("lambada_openai", "perplexity") in found
    assert {score.group for score in scores} == {"short"}
    mean = next(score for score in scores if score.kind == "group")
    assert (mean.value, mean.n) == (pytest.approx(200 / 3), 15)


def _only(resolved: Any, members: tuple[str, ...]) -> Any:
    """The group with some of its tasks: this folder has no more data."""
    usual = resolved.task_manager._factory._load_full_config

    def load(entry: Any, overrides: Any = None) -> dict[str, Any]:
        config = usual(entry, overrides)
        return {**config, "task": list(members)} if entry.name == "refine_short" else config

    return load


def test_a_data_set_that_is_neither_copied_nor_on_the_hub_is_one_sentence(data: str):
    with pytest.raises(TaskError, match=r"the data of sciq cannot be loaded .*a copy of its data set under --data"):
        resolve(["sciq"], Evaluation(data=data), "unused").load()


def test_a_copy_that_is_no_data_set_is_one_sentence(tmp_path: Path):
    (tmp_path / "allenai" / "sciq").mkdir(parents=True)
    with pytest.raises(TaskError, match=r"allenai/sciq cannot be read as the hub's data set allenai/sciq .*README\.md"):
        resolve(["sciq"], Evaluation(data=str(tmp_path)), "unused").load()
