"""From names to scores: what `resolve` accepts, and a whole run of lm-eval with its `dummy` model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager

from refine_harness.config import Evaluation
from refine_harness.errors import TaskError
from refine_harness.evaluation import tasks
from refine_harness.evaluation.tasks import TaskScore, extract_scores, our_groups, resolve, sorted_samples
from refine_harness.resources import resource


class RightHalfTheTime(LM):
    """Answers rightly where an example's index is even; knows the answers because lm-eval passes the example on."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise AssertionError("no task of ours asks for this")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("no task of ours asks for this")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.answer(request.doc) if request.doc["index"] % 2 == 0 else "" for request in requests]

    @staticmethod
    def answer(doc: dict[str, Any]) -> str:
        return " and ".join(doc["answers"]) if "depths" in doc else doc["answers"][0]


@pytest.fixture(scope="module")
def scored(data_folder: str, tokenizer_folder: str) -> tuple[dict[str, Any], list[TaskScore]]:
    evaluation = Evaluation(lengths=(768, 1000), limit=2, data=data_folder)
    resolved = resolve(["niah", "longqa", "longbench"], evaluation, tokenizer_folder)
    results = resolved.evaluate(RightHalfTheTime())
    return results, extract_scores(results, resolved)


def test_all_three_groups_run_through_lm_eval(scored: tuple[dict[str, Any], list[TaskScore]]):
    _, scores = scored
    single = [score for score in scores if score.kind == "task"]
    generated = [
        (task.removeprefix("refine_"), length)
        for group in ("refine_niah", "refine_longqa")
        for task in our_groups()[group]
        for length in (768, 1000)
    ]
    longbench = [(task.removeprefix("refine_"), None) for task in our_groups()["refine_longbench"]]
    assert {(score.task, score.length) for score in single} == {*generated, *longbench}
    assert all(score.n == 2 for score in single), "limit counts examples per task and per length"
    assert {(score.group, score.length) for score in scores if score.kind == "group"} == {
        ("niah", 768),
        ("niah", 1000),
        ("longqa", 768),
        ("longqa", 1000),
        ("longbench", None),
    }


def test_values_and_errors_are_those_of_the_examples(scored: tuple[dict[str, Any], list[TaskScore]]):
    _, scores = scored
    needle = next(score for score in scores if (score.task, score.length) == ("niah_single_2", 1000))
    assert (needle.value, needle.metric, needle.percent, needle.higher_is_better) == (
        50.0,
        "string_match_all",
        True,
        True,
    )
    assert needle.stderr == pytest.approx(50.0)  # deviation of (0, 100) is 70.7, divided by the root of 2
    group = next(score for score in scores if score.kind == "group" and (score.group, score.length) == ("niah", 1000))
    assert group.value == pytest.approx(50.0)
    assert group.stderr == pytest.approx(math.sqrt(8 * 50.0**2) / 8)
    assert (group.n, group.metric) == (16, "string_match_all")
    metrics = {score.task: score.metric for score in scores if score.group == "longbench" and score.kind == "task"}
    assert metrics["longbench_trec"] == "classification"
    assert metrics["longbench_lcc"] == "code_similarity_difflib"
    assert metrics["longbench_samsum"] == "rouge_l"
    assert metrics["longbench_hotpotqa"] == "qa_f1"


def test_lm_evals_own_table_says_the_same(scored: tuple[dict[str, Any], list[TaskScore]]):
    results, scores = scored
    for score in scores:
        if score.kind == "task":
            metric = str(score.length) if score.length else "score"
            assert 100 * results["results"][f"refine_{score.task}"][f"{metric},none"] == pytest.approx(score.value)
    assert 100 * results["groups"]["refine_longbench"]["score,none"] == pytest.approx(
        next(score.value for score in scores if score.task == "longbench")
    )


def test_examples_have_the_same_hash_alone_or_among_others(
    scored: tuple[dict[str, Any], list[TaskScore]], data_folder: str, tokenizer_folder: str
):
    _, scores = scored
    evaluation = Evaluation(lengths=(1000,), limit=2, data=data_folder)
    resolved = resolve(["longqa_squad", "multikey_2"], evaluation, tokenizer_folder)
    alone = extract_scores(resolved.evaluate(DummyLM()), resolved)
    among = {(score.task, score.length): score.data_sha256 for score in scores}
    assert [score.task for score in alone] == ["longqa_squad", "niah_multikey_2"]
    for score in alone:
        assert score.data_sha256 == among[score.task, score.length]
        assert score.value == 0.0


def test_resolved_tasks_can_be_run_again(data_folder: str, tokenizer_folder: str):
    resolved = resolve(["longbench_hotpotqa"], Evaluation(data=data_folder), tokenizer_folder)
    first, second = (extract_scores(resolved.evaluate(model), resolved) for model in (RightHalfTheTime(), DummyLM()))
    assert [score.value for score in (*first, *second)] == [pytest.approx(200 / 3), 0.0]
    assert first[0].data_sha256 == second[0].data_sha256
    assert first[0].n == 3


def test_examples_are_built_once_until_they_are_forgotten_and_building_says_how_far_it_is(
    data_folder: str, tokenizer_folder: str
):
    evaluation = Evaluation(lengths=(1000,), limit=2, data=data_folder)
    resolved = resolve(["longqa", "longbench_trec"], evaluation, tokenizer_folder)
    assert (resolved.built, resolved.nbytes) == (False, 0)
    told = []
    loaded: Any = resolved.load(lambda *now: told.append(now))
    assert told == [(0, 3, "longqa_squad"), (1, 3, "longqa_hotpot"), (2, 3, "longbench_trec"), (3, 3, "")]
    assert resolved.load(lambda *now: told.append(now)) is loaded
    assert len(told) == 4
    prompts = [doc["prompt"] for task in loaded["tasks"].values() for doc in task.eval_docs]
    assert resolved.nbytes > sum(map(len, prompts))
    resolved.forget()
    assert (resolved.built, resolved.nbytes) == (False, 0)
    again: Any = resolved.load()
    assert [doc["prompt"] for task in again["tasks"].values() for doc in task.eval_docs] == prompts


def test_one_example_has_no_standard_error(data_folder: str, tokenizer_folder: str):
    resolved = resolve(["longbench_trec"], Evaluation(data=data_folder, limit=1), tokenizer_folder)
    score = extract_scores(resolved.evaluate(DummyLM()), resolved)[0]
    assert (score.n, score.stderr) == (1, None)


def test_samples_of_several_processes_are_put_in_order_and_counted_once():
    rows = [{"filter": "none", "doc_id": i} for i in (0, 2, 1, 3, 3)]
    assert [row["doc_id"] for row in sorted_samples({"samples": {"t": rows}})["t"]] == [0, 1, 2, 3]


def test_lm_eval_alone_runs_our_groups(data_folder: str, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch):
    # As `lm_eval --include_path <tasks> --metadata ...` does; describing the machine would take seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    metadata = {"lengths": "768,1000", "samples": 2, "pretrained": tokenizer_folder, "data": data_folder}
    manager = TaskManager(include_path=str(resource("tasks")), include_defaults=False, metadata=metadata)
    groups: list[Any] = ["refine_niah", "refine_longqa", "refine_longbench"]
    results: Any = simple_evaluate("dummy", tasks=groups, task_manager=manager, limit=2, bootstrap_iters=0)
    assert results is not None
    assert set(results["groups"]) == set(groups)
    assert {"768,none", "1000,none"} <= set(results["results"]["refine_niah_multivalue"])
    assert results["results"]["refine_longbench_qmsum"]["score,none"] == 0.0


@pytest.mark.parametrize(
    ("name", "registered"),
    [
        ("niah", "refine_niah"),
        ("refine_longqa", "refine_longqa"),
        ("niah_single_1", "refine_niah_single_1"),
        ("longbench_hotpotqa", "refine_longbench_hotpotqa"),
        ("multikey_3", "refine_niah_multikey_3"),
        ("hotpot", "refine_longqa_hotpot"),
        ("hotpotqa", "refine_longbench_hotpotqa"),
        ("arc_easy", "arc_easy"),
        ("triviaqa", "triviaqa"),  # a stock task's name stays its own
        ("stock:niah_single_1", "niah_single_1"),
    ],
)
def test_names_mean_ours_first_and_then_lm_evals(name: str, registered: str):
    assert tasks._registry_name(name) == registered


def test_a_task_within_a_group_asked_for_is_not_run_twice():
    resolved = resolve(["longbench_trec", "longbench", "longbench", "single_1"], Evaluation(), "unused")
    assert resolved.names == ("refine_longbench", "refine_niah_single_1")
    part = resolve(["longbench_open", "longbench"], Evaluation(), "unused")
    assert part.names == ("refine_longbench",)
    assert resolve(["longbench_open"], Evaluation(), "unused").names == ("refine_longbench_open",)
    assert list(resolved.groups) == ["refine_longbench"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("niahh", r"niahh is not a task\. Did you mean niah\?"),
        ("arc_easyy", r"Did you mean arc_easy\?"),
        (
            "qzxv",
            r"Known are the groups babilong, .*longbench, .*longqa, niah, ruler, short, their tasks, and the stock",
        ),
        ("stock:niah", "niah is not a stock task"),
        ("1", "Write which"),
    ],
)
def test_an_unknown_name_is_one_sentence(name: str, sentence: str):
    with pytest.raises(TaskError, match=sentence):
        resolve([name], Evaluation(), "unused")


def test_no_name_at_all_is_refused():
    with pytest.raises(TaskError, match="no task is named"):
        resolve([], Evaluation(), "unused")


def test_missing_data_is_reported_when_tasks_are_loaded(tmp_path, tokenizer_folder: str):
    resolved = resolve(["longbench"], Evaluation(data=str(tmp_path)), tokenizer_folder)
    with pytest.raises(TaskError, match="refine_longbench_narrativeqa found none of its files"):
        resolved.load()


def test_numbers_that_are_no_shares_stay_as_they_are():
    results = {
        "samples": {
            "wiki": [{"doc_id": 0, "filter": "none", "metrics": ["ppl"], "ppl": (-3.0, 2), "doc": {"text": "a"}}],
            "quiz": [
                {"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": float(i), "doc": {"text": str(i)}}
                for i in range(2)
            ],
        },
        "results": {
            "wiki": {"ppl,none": 12.5, "ppl_stderr,none": "N/A"},
            "quiz": {"acc,none": 0.5, "acc_stderr,none": 0.5},
        },
        "higher_is_better": {"wiki": {"ppl": False}, "quiz": {"acc": True}},
        "groups": {"both": {"acc,none": 0.5, "acc_stderr,none": 0.25, "sample_len": 3, "alias": "both"}},
        "group_subtasks": {"both": ["quiz", "wiki"]},
        "configs": {},
    }
    resolved = resolve(["niah"], Evaluation(), "unused")
    wiki, quiz, both = extract_scores(results, resolved)
    assert (wiki.value, wiki.stderr, wiki.percent, wiki.higher_is_better) == (12.5, None, False, False)
    assert (quiz.value, quiz.stderr, quiz.percent, quiz.group) == (50.0, pytest.approx(50.0), True, "both")
    assert (both.kind, both.value, both.stderr, both.n) == ("group", 50.0, 25.0, 3)
