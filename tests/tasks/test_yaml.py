"""Every YAML under tasks/ as lm-eval reads it, without building data."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from refine_harness.evaluation.tasks import our_groups
from refine_harness.resources import resource

FOLDER = resource("tasks")
TASKS = [task for tasks in our_groups().values() for task in tasks]
TEMPLATE_ENDS = {
    "triviaqa": "\n\n{context}\n\n{input}",
    "samsum": "\n\n{context}\n\n{input}",
    "trec": "\n\n{context}\n{input}",
    "lcc": "\n{context}Next line of code:\n",
    "repobench-p": "\n{context}{input}Next line of code:\n",
    "hotpotqa": "\nAnswer:",
    "narrativeqa": "\n\nAnswer:",
    "gov_report": "\n\nSummary:",
}
LONGEST_ANSWERS = {
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
    **dict.fromkeys(("multifieldqa_en", "trec", "lcc", "repobench-p"), 64),
    **dict.fromkeys(("narrativeqa", "qasper", "samsum"), 128),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), 512),
}


def config(task: str) -> dict[str, Any]:
    path = next(path for path in FOLDER.glob("*/*.yaml") if load_yaml(path, resolve_func=False).get("task") == task)
    return load_yaml(path)


def test_the_registry_holds_our_three_groups_and_their_tasks():
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    groups = {"refine_niah", "refine_longqa", "refine_longbench", "refine_longbench_open"}
    assert set(manager.all_groups) == groups == set(our_groups())
    assert set(manager.all_subtasks) == set(TASKS)
    assert [len(our_groups()[name]) for name in ("refine_niah", "refine_longqa", "refine_longbench")] == [8, 2, 14]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_greedy_has_functions_and_no_default_stop(task: str):
    tree = config(task)
    assert callable(tree["custom_dataset"])
    assert callable(tree["process_results"])
    assert tree["output_type"] == "generate_until"
    assert (tree["doc_to_text"], tree["target_delimiter"], tree["num_fewshot"]) == ("prompt", "", 0)
    arguments = tree["generation_kwargs"]
    assert (arguments["do_sample"], arguments["until"]) == (False, [])
    expected = (
        128 if "niah" in task else 32 if "longqa" in task else LONGEST_ANSWERS[task.removeprefix("refine_longbench_")]
    )
    assert arguments["max_gen_toks"] == expected
    assert tree["metadata"]["version"] == 1.0
    assert {metric["aggregation"] for metric in tree["metric_list"]} == {"mean"}


@pytest.mark.parametrize("task", [task.removeprefix("refine_longbench_") for task in our_groups()["refine_longbench"]])
def test_a_longbench_template_takes_the_context_once_and_ends_as_published(task: str):
    template = config(f"refine_longbench_{task}")["dataset_kwargs"]["template"]
    assert template.count("{context}") == 1
    assert template.count("{") == template.count("{context}") + template.count("{input}")
    assert template.endswith(TEMPLATE_ENDS.get(task, ":" if task != "qmsum" else "\nAnswer:"))


def test_the_aggregates_of_a_group_are_plain_means():
    for group in our_groups():
        path = next(FOLDER.glob(f"*/{group}.yaml"))
        for aggregate in load_yaml(path)["aggregate_metric_list"]:
            assert aggregate["weight_by_size"] is False
