"""RULER's 13 tasks as a group, its scores against recorded ones, and each way in which lm-eval's stock tasks differ.

official_ruler.json holds answers and the scores that RULER's own evaluation gives them (NVIDIA/RULER,
scripts/eval/evaluate.py and scripts/eval/synthetic/constants.py), recorded once. The stock tasks are lm-eval 0.4.13's.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks.ruler import common_utils as stock
from lm_eval.tasks.ruler import qa_utils as stock_qa
from lm_eval.tasks.ruler import vt_utils as stock_vt
from transformers import AutoTokenizer

from refine_harness.config import Evaluation
from refine_harness.errors import TaskError
from refine_harness.evaluation import longqa, niah, ruler
from refine_harness.evaluation.generation import token_counter
from refine_harness.evaluation.scorers import string_match_all, string_match_part
from refine_harness.evaluation.tasks import _registry_name, extract_scores, our_groups, resolve
from refine_harness.models import EMBEDDED, resolve_model
from refine_harness.resources import resource
from refine_harness.synthetic.questions import make_multidoc

from .test_tasks import RightHalfTheTime

OFFICIAL = json.loads((Path(__file__).parent / "official_ruler.json").read_text(encoding="utf-8"))
TOKENS = 2000
"""Room for the longest solved example, in the tokens of the tests' tokenizer."""


def docs(spec: str, tokenizer: str, **more: Any) -> list[dict[str, Any]]:
    found: Any = ruler.load(**{"spec": spec, "tokenizer": tokenizer, "lengths": [TOKENS], "limit": 2, **more})["test"]
    return list(found)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: repr(case["prediction"])[:20])
def test_scores_are_those_that_rulers_evaluation_gave(case: dict[str, Any]):
    for scorer in (string_match_all, string_match_part):
        assert scorer(case["prediction"], case["references"]) == pytest.approx(case[scorer.__name__])


# The three tasks made in evaluation/ruler.py


@pytest.mark.parametrize("spec", ruler.TASKS)
def test_examples_do_not_depend_on_what_else_is_made(spec: str, tokenizer_folder: str):
    alone = docs(spec, tokenizer_folder)
    random.seed(5)
    for other in ruler.TASKS:
        docs(other, tokenizer_folder, limit=1)
    beside = docs(spec, tokenizer_folder, lengths=[TOKENS + 200, TOKENS], limit=3)
    assert [doc for doc in beside if doc["length"] == TOKENS][:2] == alone
    assert docs(spec, tokenizer_folder, seed=7) != alone


@pytest.mark.parametrize("spec", ruler.TASKS)
def test_examples_are_counted_in_the_models_tokens(spec: str, tokenizer_folder: str):
    exact = token_counter(tokenizer_folder).exact
    room = ruler.TASKS[spec][1]
    for doc in docs(spec, tokenizer_folder, lengths=[TOKENS, 4096], limit=3):
        assert doc["tokens"] == exact(doc["prompt"]) + room
        assert 0.99 * doc["length"] <= doc["tokens"] <= doc["length"]


def test_every_answer_counts_for_its_share(tokenizer_folder: str):
    doc = docs("vt", tokenizer_folder, limit=1)[0]
    assert ruler.process_results(doc, [" ".join(doc["answers"]).lower()]) == {str(TOKENS): 1.0}
    assert ruler.process_results(doc, [doc["answers"][3]]) == {str(TOKENS): 0.2}


def test_an_unknown_task_of_ruler_is_refused(tokenizer_folder: str):
    with pytest.raises(TaskError, match=r"Did you mean cwe\?"):
        docs("cew", tokenizer_folder)


def test_lists_have_words_for_the_longest_contexts():
    words, more = ruler.list_words()
    assert (len(words), len(more)) == (len(set(words)), len(set(more)))
    assert len(words) > 8000
    assert len(more) > 20_000


def test_a_counter_that_errs_is_put_right(tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch):
    counter = token_counter(tokenizer_folder)
    right = docs("fwe", tokenizer_folder, limit=1)
    quick = counter.quick
    monkeypatch.setattr(counter, "quick", lambda text: quick(text) - 5)
    assert docs("fwe", tokenizer_folder, limit=1) == right


# The group


def test_all_thirteen_tasks_run_through_lm_eval(data_folder: str, tokenizer_folder: str):
    evaluation = Evaluation(lengths=(TOKENS,), limit=2, data=data_folder)
    resolved = resolve(["ruler"], evaluation, tokenizer_folder)
    scores = extract_scores(resolved.evaluate(AnswersByTask()), resolved)
    tasks = {score.task: score for score in scores if score.kind == "task"}
    assert set(tasks) == {task.removeprefix("refine_") for task in our_groups()["refine_ruler"]}
    assert {score.group for score in tasks.values()} == {"ruler"}
    assert all(score.n == 2 and score.data_sha256 for score in tasks.values())
    assert {task for task, score in tasks.items() if score.metric == "string_match_part"} == {
        "longqa_squad",
        "longqa_hotpot",
    }
    group = next(score for score in scores if score.kind == "group")
    assert (group.group, group.length, group.n) == ("ruler", TOKENS, 26)
    assert group.value == pytest.approx(sum(score.value for score in tasks.values()) / 13)


class AnswersByTask(RightHalfTheTime):
    @staticmethod
    def answer(doc: dict[str, Any]) -> str:
        return " ".join(doc["answers"])


def test_niah_and_longqa_beside_ruler_are_parts_of_it():
    resolved = resolve(["niah", "ruler", "longqa", "ruler_vt"], Evaluation(), "unused")
    assert resolved.names == ("refine_ruler",)
    assert resolve(["niah", "longqa"], Evaluation(), "unused").names == ("refine_niah", "refine_longqa")


def test_groups_that_share_a_task_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    groups = {**our_groups(), "refine_mine": ("refine_niah_single_1", "refine_ruler_vt")}
    monkeypatch.setattr("refine_harness.evaluation.tasks.our_groups", lambda: groups)
    with pytest.raises(TaskError, match=r"^niah and mine share the task niah_single_1\. Ask for one of the two"):
        resolve(["niah", "mine"], Evaluation(), "unused")


def test_rulers_stock_group_is_still_there():
    assert _registry_name("stock:ruler") == "ruler"


# Where lm-eval's stock tasks and RULER differ


def test_difference_1_any_right_answer_of_several_counts_fully():
    answers = [
        "10th and 11th centuries",
        "in the 10th and 11th centuries",
        "10th and 11th centuries",
        "10th and 11th centuries",
    ]
    said = "10th and 11th centuries"
    assert longqa.process_results({"length": 4096, "answers": answers}, [said]) == {"4096": 1.0}
    assert stock.string_match_part([said], [answers]) == 0.75


def test_difference_2_examples_do_not_depend_on_the_global_generator(tokenizer_folder: str):
    random.seed(42)
    ours, theirs = docs("vt", tokenizer_folder, limit=1), stock_vt.generate_input_output(10, 1, 4)[1]
    random.seed(42)
    random.random()  # what any task loaded before may do
    assert docs("vt", tokenizer_folder, limit=1) == ours
    assert stock_vt.generate_input_output(10, 1, 4)[1] != theirs


def test_difference_3_prompts_are_as_long_as_asked_for():
    # The embedded tokenizer: the tests' own makes so many tokens that the stock task never ends.
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(EMBEDDED))
    solved = stock_vt.sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    theirs = stock_vt.sys_vartrack_w_noise_random(tokenizer, 1, 4096, icl_example=solved)[0]
    whole = theirs["input"] + " " + theirs["gen_prefix"]
    assert len(tokenizer(whole)["input_ids"]) + 30 < 0.99 * 4096
    ours = docs("vt", EMBEDDED, lengths=[4096], limit=1)[0]
    assert 0.99 * 4096 <= len(tokenizer(ours["prompt"])["input_ids"]) + 30 <= 4096


def test_difference_4_a_small_corpus_repeats_and_is_never_shuffled_in_place(tokenizer_folder: str):
    corpus = [f"Paragraph {i} is about thing {i}." for i in range(8)]
    question = {"query": "Which thing?", "outputs": ["thing 3"], "context": [3]}

    given = list(corpus)
    theirs, _ = stock_qa.generate_input_output(0, 30, [question], given)
    assert theirs.count("Paragraph 3 ") == 1, "30 documents were asked for; stock gives the 8 that there are"
    assert given != corpus, "and later questions find their documents in other places"

    given = list(corpus)
    ours = make_multidoc(
        "Which thing?",
        [given[3]],
        given,
        tokens=1000,
        count_tokens=token_counter(tokenizer_folder).exact,
        seed=1,
        fill=True,
    )
    assert given == corpus
    assert ours.prompt.count("Paragraph 3 ") > 1
    assert 990 <= ours.tokens <= 1000


def test_difference_4_a_small_text_of_essays_repeats(tokenizer_folder: str, tmp_path: Path):
    path = tmp_path / "essay.txt"
    path.write_text("An essay of one sentence.", encoding="utf-8")
    settings = {"tokenizer": tokenizer_folder, "lengths": [1024], "limit": 1, "essays": str(path)}
    doc = niah.load(spec="niah_single_2", **settings)["test"][0]
    assert doc["prompt"].count("An essay of one sentence.") > 30
    assert doc["tokens"] >= 0.99 * 1024


def test_difference_5_common_words_come_after_a_solved_example(tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch):
    words, _ = ruler.list_words()
    wonderwords: Any = ModuleType("wonderwords")  # what the stock task imports it for
    wonderwords.RandomWord = lambda: type("Words", (), {"_categories": {"noun": words, "adjective": [], "verb": []}})
    monkeypatch.setitem(sys.modules, "wonderwords", wonderwords)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.cwe_utils", raising=False)
    from lm_eval.tasks.ruler import cwe_utils

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(EMBEDDED))
    theirs = cwe_utils.sys_word_pair_random(1, 3000, tokenizer)[0]
    question = "What are the 10 most common words in the above list?"
    assert theirs["input"].count(question) == 1
    ours = docs("cwe", tokenizer_folder, limit=1)[0]
    assert ours["prompt"].count(question) == 2
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.cwe_utils")


def test_difference_6_lengths_that_were_not_run_have_no_score():
    assert niah.process_results({"length": 8192, "answers": ["7"]}, ["7"]) == {"8192": 1.0}
    assert ruler.process_results({"length": 8192, "answers": ["7"]}, ["7"]) == {"8192": 1.0}
    assert stock.process_results({"max_length": 8192, "outputs": ["7"]}, ["7"]) == {"4096": -1.0, "8192": 1.0}


def test_difference_7_scores_are_published_from_0_to_100(tokenizer_folder: str):
    resolved = resolve(["ruler_fwe"], Evaluation(lengths=(TOKENS,), limit=2), tokenizer_folder)
    results = resolved.evaluate(AnswersByTask())  # right where the index is even
    assert results["results"]["refine_ruler_fwe"][f"{TOKENS},none"] == 0.5
    assert extract_scores(results, resolved)[0].value == 50.0


def test_difference_8_the_answer_to_variable_tracking_begins_as_ruler_spells_it(tokenizer_folder: str):
    # Not in the first seven: RULER corrected its "assgined", lm-eval 0.4.13 still has it.
    assert "variables are assigned the value" in docs("vt", tokenizer_folder, limit=1)[0]["prompt"]
    assert "variables are assgined the value" in stock_vt.TEMPLATE


def test_words_for_long_lists_are_attributed():
    folder = resource("tasks") / "ruler" / "data"
    assert "english_words.txt" in (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_a_dummy_scores_nothing(data_folder: str, tokenizer_folder: str):
    resolved = resolve(["ruler_cwe"], Evaluation(lengths=(TOKENS,), limit=1), tokenizer_folder)
    assert extract_scores(resolved.evaluate(DummyLM()), resolved)[0].value == 0.0
