"""Scores against worked examples of the benchmarks' published code, among them those where lm-eval's differ."""

from __future__ import annotations

import pytest

from refine_harness.evaluation import scorers


def test_any_of_rulers_references_is_enough_for_a_question():
    references = ["10th and 11th centuries", "in the 10th and 11th centuries", "10th and 11th centuries"]
    assert scorers.string_match_part("The 10th and 11th Centuries.", references) == 1.0
    assert scorers.string_match_part("the 12th century", references) == 0.0


def test_all_of_rulers_references_count_for_needles():
    assert scorers.string_match_all(" 123, 456 and 789.", ["123", "456", "999", "789"]) == 0.75
    assert scorers.string_match_all("ABC-def", ["abc-DEF"]) == 1.0
    assert scorers.string_match_all("12\x003", ["123"]) == 0.0, "control characters separate"


def test_few_shot_answers_are_scored_on_their_first_line():
    assert scorers.first_line("\n\nDate\nQuestion: x") == "Date"
    assert scorers.first_line("Date") == "Date"
    assert scorers.first_line(" \nDate") == " "


def test_qa_f1_ignores_case_articles_and_punctuation():
    assert scorers.qa_f1("The Eiffel Tower!", "eiffel tower") == 1.0
    assert scorers.qa_f1("in Paris France", "Paris") == pytest.approx(0.5)
    assert scorers.qa_f1("", "Paris") == 0.0
    assert scorers.qa_f1("the", "a") == 0.0


CLASSES = ["location", "Other location", "Date", "Other", "Other entity"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Type: Date", "Date", 1.0),
        ("Date or Other entity", "Date", 1 / 3),  # `Other` is named too
        ("Other location", "Other location", 1.0),  # its parts do not count against it
        ("Other location", "location", 1 / 3),
        ("city", "Date", 0.0),
    ],
)
def test_classification_by_names_found(prediction: str, reference: str, expected: float):
    assert scorers.classification(prediction, reference, CLASSES) == pytest.approx(expected)


def test_classification_steps_over_the_name_after_a_dropped_one():
    # The published loop drops `a b` while it stands on it, and so never looks at `b c`.
    assert scorers.classification("a b c", "a b c", ["a b", "b c", "a b c"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("return x + y", "return x + y", 1.0),
        ("return x + y", "return y + x", 0.83),
        ("self.total += value", "self.count += 1", 0.59),  # 0.65 with python-Levenshtein
        ("# c\n\nreturn x", "return x", 0.0),  # the empty line is taken; lm-eval skips it
        ("\n\n# why\n```python\nreturn x\nmore", "return x", 1.0),
        ("", "return x", 0.0),
    ],
)
def test_code_similarity_of_the_first_line_of_code(prediction: str, reference: str, expected: float):
    assert scorers.code_similarity(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [  # computed with the package `rouge` 1.0.1
        ("the cat sat on the mat", "the cat lay on the mat", 0.7999999950000002),
        ("The cat sat. The dog ran away.", "The dog ran. The cat sat down.", 0.8333333283333335),
        ("a b c. c b a.", "c b a. a b c.", 0.999999995),
        ("Tom will bring food. ", "Terry will bring some food.", 0.5999999950000001),
        ("x. y", "x . y. z", 0.7999999952000001),
        ("", "something", 0.0),
        ("...", "something", 0.0),
    ],
)
def test_rouge_l_is_the_packages(prediction: str, reference: str, expected: float):
    assert scorers.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)
