"""BABILong: its layout, prompts and score, and rows made in its manner.

official_babilong.json holds answers and the verdicts of the benchmark's own compare_answers (booydar/babilong,
babilong/metrics.py, commit eeec607), recorded once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refine_harness.config import Evaluation
from refine_harness.errors import TaskError
from refine_harness.evaluation import babilong
from refine_harness.evaluation.tasks import _registry_name, extract_scores, resolve

from .conftest import write_json, write_parquet
from .test_tasks import RightHalfTheTime

OFFICIAL = json.loads((Path(__file__).parent / "official_babilong.json").read_text(encoding="utf-8"))

ROWS = [
    {"input": f" Some text. John went to the {place}. ", "question": "Where is John? ", "target": place}
    for place in ("office", "garden", "kitchen")
]

GIFTS = [
    {"input": f"Mary gave the apple to {person}.", "question": "Who did Mary give the apple to?", "target": person}
    for person in ("Bill", "Fred", "Jeff")
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """The hub's layout."""
    for name in ("0k", "1k", "4k"):
        for task in babilong.TASKS:
            rows = GIFTS if task == "qa5" else ROWS
            write_parquet(tmp_path / "babilong" / name / f"{task}-00000-of-00001.parquet", rows)
    return str(tmp_path)


def rows(**arguments: Any) -> list[dict[str, Any]]:
    found: Any = babilong.load(**{"task": "qa1", "lengths": [1024], **arguments})["test"]
    return list(found)


def made(tokenizer: str, **arguments: Any) -> list[dict[str, Any]]:
    settings = {"task": "qa2", "lengths": [2048], "limit": 2, "tokenizer": tokenizer, **arguments}
    found: Any = babilong.make(**settings)["test"]
    return list(found)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: case["output"][:25] or "nothing")
def test_scores_are_those_of_the_benchmark(case: dict[str, Any]):
    doc = {"length": 4096, "task": case["task"], "answers": [case["target"]], "question": case["question"]}
    assert babilong.process_results(doc, [case["output"]]) == {"4096": case["score"]}


def test_lm_evals_stock_task_takes_an_answer_with_every_label():
    from lm_eval.tasks.babilong import common_utils as stock

    said = "bathroom, bedroom, garden, hallway, kitchen, office"
    assert stock.process_results({"target": "garden"}, [said]) == {"acc": 1.0}
    assert babilong.only_label(said, "garden", "Where is John? ", babilong.LABELS["qa1"]) == 0.0


def test_the_prompt_is_the_published_one(data: str):
    assert rows(data=data)[0]["prompt"] == (
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        "question. You need to answer the question based only on the information from the facts. If a person was in "
        "different locations, use the latest location to answer the question.\n\n"
        "<example>\nCharlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. Where "
        "is Charlie?\nAnswer: The most recent location of Charlie is balcony.\n</example>\n\n"
        "<example>\nAlan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to "
        "balcony. Where is Alan?\nAnswer: The most recent location of Alan is shop.\n</example>\n\n"
        "Always return your answer in the following format: The most recent location of \u2019person\u2019 is "
        "\u2019location\u2019. Do not write anything else after that.\n\n"
        "<context>\nSome text. John went to the office.\n</context>\n\nQuestion: Where is John?"
    )


def test_rows_come_in_their_order_and_say_what_they_are(data: str):
    found = rows(data=data, lengths=[4096, 1024], limit=2)
    assert [(doc["length"], doc["index"]) for doc in found] == [(1024, 0), (4096, 0), (1024, 1), (4096, 1)]
    assert {doc["data"] for doc in found} == {"RMT-team/babilong"}
    assert len(rows(data=data)) == 3


@pytest.mark.parametrize("name", ["babilong/qa1/1k.json", "RMT-team/babilong/data/qa1/1k.json"])
def test_what_the_benchmarks_script_writes_is_read_too(name: str, data: str, tmp_path: Path):
    write_json(tmp_path / "other" / name, ROWS)
    assert rows(data=str(tmp_path / "other")) == rows(data=data)


def test_lengths_and_data_that_are_not_there_are_one_sentence(data: str, tmp_path: Path):
    with pytest.raises(TaskError, match=r"BABILong has no rows of 1000 tokens; its lengths are 1024, 2048, .*131072\."):
        rows(data=data, lengths=[1000])
    with pytest.raises(TaskError, match=r"found no rows of length 2k under .*babilong/2k/qa1-\*\.parquet.*_style"):
        rows(data=data, lengths=[2048])
    with pytest.raises(
        TaskError, match=r"no data folder, and RMT-team/babilong could not be read from the hub .*--data"
    ):
        rows()
    with pytest.raises(TaskError, match=r"Did you mean qa1\?"):
        rows(data=data, task="qa11")
    write_json(tmp_path / "bad" / "babilong" / "qa1" / "1k.json", [{"input": "a", "question": "b"}])
    with pytest.raises(TaskError, match=r"1k\.json, row 1 has no target; it has input, question\. Take"):
        rows(data=str(tmp_path / "bad"))
    write_json(tmp_path / "worse" / "babilong" / "qa1" / "1k.json", {"a": 1})
    with pytest.raises(TaskError, match=r"1k\.json is no list of rows"):
        rows(data=str(tmp_path / "worse"))


@pytest.mark.parametrize("task", babilong.TASKS)
def test_rows_made_here_have_their_length_and_hold_their_story(task: str, tokenizer_folder: str):
    for doc in made(tokenizer_folder, task=task):
        assert 0.99 * 2048 <= doc["tokens"] <= 2048
        assert doc["prompt"].endswith(f"Question: {doc['question']}")
        assert doc["answers"][0] in babilong.LABELS[task]
        assert babilong.process_results(doc, [doc["answers"][0]]) == {"2048": 1.0}
        assert doc["data"] == "made here, in the manner of BABILong"


def test_rows_made_here_do_not_depend_on_what_else_is_made(tokenizer_folder: str):
    alone = made(tokenizer_folder)
    made(tokenizer_folder, task="qa5")
    beside = made(tokenizer_folder, lengths=[1500, 2048], limit=3)
    assert [doc for doc in beside if doc["length"] == 2048][:2] == alone
    assert made(tokenizer_folder, seed=7) != alone


def test_facts_alone_have_no_length(data: str, tokenizer_folder: str):
    found = rows(data=data, facts_only=True)[0]
    assert babilong.process_results(found, ["office"]) == {"score": 1.0}
    alone = made(tokenizer_folder, facts_only=True)[0]
    assert alone["length"] == 0
    assert len(alone["prompt"]) < 3500


def test_rows_made_here_and_rows_of_the_benchmark_never_meet(data: str, tokenizer_folder: str):
    made_anyway = made(tokenizer_folder, data=data)
    assert made_anyway == made(tokenizer_folder), "a folder with the benchmark's rows changes nothing"


def test_both_run_through_lm_eval(data: str, tokenizer_folder: str):
    names = ["babilong", "babilong_0k", "babilong_style_qa1", "babilong_style_0k_qa4"]
    resolved = resolve(names, Evaluation(lengths=(1024, 4096), limit=2, data=data), tokenizer_folder)
    scores = extract_scores(resolved.evaluate(RightHalfTheTime()), resolved)
    means = {(score.group, score.length): score.value for score in scores if score.kind == "group"}
    assert means == {("babilong", 1024): 50.0, ("babilong", 4096): 50.0, ("babilong_0k", None): 50.0}
    assert {score.metric for score in scores} == {"only_label"}
    assert {score.group for score in scores if "style" in score.task} == {"babilong_style", "babilong_style_0k"}


def test_the_stock_tasks_are_still_there():
    assert _registry_name("stock:babilong_qa1") == "babilong_qa1"
