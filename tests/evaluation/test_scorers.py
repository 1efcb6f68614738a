"""RULER's matches against worked examples, and LongBench's scores against what its own scorer gave (recorded)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refine_harness.evaluation import scorers

RECORDED = json.loads((Path(__file__).parent / "official_longbench.json").read_text(encoding="utf-8"))["metrics"]
SCORES = {
    "qa_f1": scorers.qa_f1,
    "qa_f1_zh": scorers.qa_f1_zh,
    "rouge_l": scorers.rouge_l,
    "rouge_l_zh": scorers.rouge_l_zh,
    "code_similarity": scorers.code_similarity,
    "count": scorers.count,
    "retrieval": scorers.retrieval,
    "retrieval_zh": scorers.retrieval_zh,
    "classification": scorers.classification,
}


def test_any_of_rulers_references_is_enough_for_a_question():
    references = ["10th and 11th centuries", "in the 10th and 11th centuries", "10th and 11th centuries"]
    assert scorers.string_match_part("The 10th and 11th Centuries.", references) == 1.0
    assert scorers.string_match_part("the 12th century", references) == 0.0


def test_all_of_rulers_references_count_for_needles():
    assert scorers.string_match_all(" 123, 456 and 789.", ["123", "456", "999", "789"]) == 0.75
    assert scorers.string_match_all("ABC-def", ["abc-DEF"]) == 1.0
    assert scorers.string_match_all("12\x003", ["123"]) == 0.0, "control characters separate"


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{i}") for name, cases in RECORDED.items() for i, case in enumerate(cases)],
)
def test_a_score_is_what_longbenchs_own_scorer_gave(name: str, case: dict[str, Any]):
    extra = [case["classes"]] if "classes" in case else []
    found = SCORES[name](case["prediction"], case["reference"], *extra)
    assert found == pytest.approx(case["score"], abs=1e-12)
    assert 0.0 <= found <= 1.0


def test_every_longbench_score_has_ten_recorded_cases_and_more_than_one_outcome():
    assert set(RECORDED) == set(SCORES)
    for name, cases in RECORDED.items():
        assert len(cases) >= 10, name
        assert len({case["score"] for case in cases}) >= 3, name
        assert any(case["prediction"] == "" for case in cases), name


def test_few_shot_answers_are_scored_on_their_first_line():
    assert scorers.first_line("\n\nDate\nQuestion: x") == "Date"
    assert scorers.first_line("Date") == "Date"
    assert scorers.first_line(" \nDate") == " "


def test_classification_steps_over_the_name_after_a_dropped_one():
    # The published loop drops `a b` while it stands on it, and so never looks at `b c`.
    assert scorers.classification("a b c", "a b c", ["a b", "b c", "a b c"]) == 0.5


def test_only_the_closing_half_of_a_chinese_title_mark_is_punctuation():
    assert scorers.qa_f1_zh("红楼梦》", "红楼梦") == 1.0
    assert scorers.qa_f1_zh("《红楼梦", "红楼梦") == pytest.approx(2 / 3)


def test_chinese_words_lose_nothing_of_the_text():
    text = "我来到北京清华大学，GPT-3.5 的分数是 ３５％。\n　谢谢"
    assert "".join(scorers.words_zh(text)) == text
    assert scorers.words_zh("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]


def test_two_sentences_of_a_thousand_words_are_no_bound_for_rouge():
    # The published package walks back recursively, is stopped by Python here, and LongBench counts 0.
    words = [f"w{i}" for i in range(1200)]
    assert scorers.rouge_l(" ".join(words), " ".join(words)) == pytest.approx(1.0)


def test_a_reference_that_names_no_paragraph_is_refused():
    with pytest.raises(ValueError, match="names no paragraph"):
        scorers.retrieval("Paragraph 3", "3")


def test_jieba_reads_its_dictionary_from_its_package_alone(tmp_path: Path):
    # Its own cache, in the shared temporary folder, is marshal data that anyone could put there.
    (tmp_path / "jieba.cache").write_bytes(b"not marshal")
    code = "from refine_harness.evaluation.scorers import words_zh; print(len(words_zh('我来到北京清华大学')))"
    environment = {"TMPDIR": str(tmp_path), "PATH": "", "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("4", "")
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"not marshal"
