"""Every YAML under tasks/ as lm-eval reads it, without building data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from refine_harness.evaluation.tasks import PREFIX, our_groups
from refine_harness.resources import resource

FOLDER = resource("tasks")
TASKS = sorted({task for tasks in our_groups().values() for task in tasks if task.startswith(PREFIX)})
GENERATED = [task for task in TASKS if "longbench" not in task]
"""LongBench's tasks are held against what was published in tests/evaluation/test_longbench.py."""
LONGEST_ANSWERS = {"niah": 128, "ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50, "longqa": 32, "babilong": 20}
"""As RULER's scripts/data/synthetic/constants.py and BABILong's evaluation have it."""


@cache
def paths() -> dict[Any, Path]:
    """The file of each task."""
    files = sorted(FOLDER.glob("*/*.yaml"))
    named = {path: load_yaml(path, resolve_func=False).get("task") for path in files}
    return {task: path for path, task in named.items() if isinstance(task, str)}


@cache
def config(task: str) -> dict[str, Any]:
    return load_yaml(paths()[task])


def test_the_registry_holds_our_groups_and_their_tasks():
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(manager.all_groups) == set(our_groups())
    assert set(manager.all_subtasks) == set(TASKS)


def test_ruler_has_thirteen_tasks_eight_with_needles_and_two_with_questions():
    groups = our_groups()
    ruler = set(groups["refine_ruler"])
    assert len(groups["refine_ruler"]) == len(ruler) == 13
    assert set(groups["refine_niah"]) | set(groups["refine_longqa"]) < ruler
    assert (len(groups["refine_niah"]), len(groups["refine_longqa"])) == (8, 2)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_greedy_has_functions_and_no_default_stop(task: str):
    tree = config(task)
    assert callable(tree["custom_dataset"])
    assert callable(tree["process_results"])
    assert tree["output_type"] == "generate_until"
    assert (tree["doc_to_text"], tree["target_delimiter"], tree["num_fewshot"]) == ("prompt", "", 0)
    arguments = tree["generation_kwargs"]
    assert (arguments["do_sample"], arguments["until"]) == (False, [])
    assert tree["metadata"]["version"] >= 1.0
    assert {metric["aggregation"] for metric in tree["metric_list"]} == {"mean"}


@pytest.mark.parametrize("task", GENERATED)
def test_an_answer_may_have_as_many_tokens_as_published(task: str):
    expected = next(tokens for name, tokens in LONGEST_ANSWERS.items() if name in task)
    assert config(task)["generation_kwargs"]["max_gen_toks"] == expected


@pytest.mark.parametrize("task", GENERATED)
def test_scores_of_the_usual_lengths_are_declared(task: str):
    names = [metric["metric"] for metric in config(task)["metric_list"]]
    assert names == (["score"] if "_0k_" in task else [str(2**n) for n in range(8, 18)])


def test_rows_of_a_benchmark_and_rows_made_here_have_names_of_their_own():
    rows = {task: config(task)["metadata"]["rows"] for task in TASKS if "babilong" in task}
    assert {"style" in task for task, source in rows.items() if source == "made here"} == {True}
    assert {"style" in task for task, source in rows.items() if source == "RMT-team/babilong"} == {False}
    for group, tasks in our_groups().items():
        assert len({"style" in task for task in tasks}) == 1, group


def test_the_aggregates_of_a_group_are_plain_means():
    for group in our_groups():
        path = next(FOLDER.glob(f"*/{group}.yaml"))
        for aggregate in load_yaml(path)["aggregate_metric_list"]:
            assert aggregate["weight_by_size"] is False
