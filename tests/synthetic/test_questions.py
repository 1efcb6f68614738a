from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from refine_harness.errors import TaskError
from refine_harness.synthetic.fitting import Example
from refine_harness.synthetic.questions import ANSWER_TOKENS, make_multidoc, prompt

Count = Callable[[str], int]

CORPUS = [f"Paragraph {i} speaks of thing {i} and says a little more about it." for i in range(60)]
GOLD = "The tower was built by Ann in the year of the flood."
NEAR = [f"Near paragraph {i} is from the same article as the tower." for i in range(3)]
QUESTION = "Who built the tower?"


def build(tokens: int, count_tokens: Count, seed: int | str = 1, corpus: list[str] = CORPUS) -> Example:
    return make_multidoc(
        QUESTION, [GOLD], corpus, answers=["Ann"], near=NEAR, tokens=tokens, count_tokens=count_tokens, seed=seed
    )


def documents(text: str) -> list[str]:
    body = text.partition("documents.\n\n")[2].partition("\n\nAnswer the question")[0]
    body = body.removeprefix("The following are given documents.\n\n")
    return [part.partition("\n")[2] for part in body.split("\n\n")]


def test_the_template_is_rulers():
    task = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    assert prompt("Why?", ["One.", "Two."]) == (
        f"{task}\n\nThe following are given documents.\n\nDocument 1:\nOne.\n\nDocument 2:\nTwo.\n\n{task}\n\n"
        "Question: Why? Answer:"
    )


@pytest.mark.parametrize("tokens", [400, 800])
def test_as_many_documents_as_fit_and_no_more(tokens: int, count_tokens: Count):
    made = build(tokens, count_tokens)
    assert made.tokens == count_tokens(made.prompt) + ANSWER_TOKENS <= tokens
    longest = max(count_tokens(f"\n\nDocument 99:\n{text}") for text in [*CORPUS, *NEAR])
    assert tokens - made.tokens < longest + 2
    assert made.answer_prefix == " Answer:"
    assert made.prompt.endswith(f"Question: {QUESTION} Answer:")


def test_gold_is_there_once_and_its_article_comes_before_the_rest(count_tokens: Count):
    small = documents(build(300, count_tokens).prompt)
    assert small.count(GOLD) == 1
    assert 1 < len(small) <= 4
    assert set(small) <= {GOLD, *NEAR}
    large = documents(build(900, count_tokens).prompt)
    assert {GOLD, *NEAR} < set(large)
    assert len(set(large)) == len(large), "nothing repeats before the corpus is used up"


def test_a_used_up_corpus_repeats(count_tokens: Count):
    made = build(900, count_tokens, corpus=[*CORPUS[:2], GOLD])
    found = documents(made.prompt)
    assert set(found) == {GOLD, *NEAR, *CORPUS[:2]}
    assert len(found) == made.size > len(set(found))


@pytest.mark.parametrize("tokens", [600, 900])
def test_a_filled_prompt_has_its_length_and_whole_gold(tokens: int, count_tokens: Count):
    for seed in range(6):
        made = make_multidoc(
            QUESTION,
            [GOLD],
            CORPUS,
            near=NEAR,
            tokens=tokens,
            count_tokens=count_tokens,
            seed=seed,
            fill=True,
        )
        assert made.tokens == count_tokens(made.prompt) + ANSWER_TOKENS
        assert 0.99 * tokens <= made.tokens <= tokens
        found = documents(made.prompt)
        cut = [document for document in found if document not in {*CORPUS, *NEAR, GOLD}]
        assert GOLD in found
        assert len(cut) <= 1
        assert all(any(whole.startswith(text) for whole in [*CORPUS, *NEAR]) for text in cut)


def test_a_corpus_is_never_shuffled_in_place(count_tokens: Count):
    corpus, near = list(CORPUS), list(NEAR)
    make_multidoc(QUESTION, [GOLD], corpus, near=near, tokens=3000, count_tokens=count_tokens, seed=1, fill=True)
    assert (corpus, near) == (CORPUS, NEAR)


def test_documents_are_shuffled_by_the_seed_alone(count_tokens: Count):
    assert build(700, count_tokens, "a") == build(700, count_tokens, "a")
    places = {documents(build(700, count_tokens, seed).prompt).index(GOLD) for seed in range(12)}
    assert len(places) > 3
    numbers = re.findall(r"Document (\d+):", build(700, count_tokens).prompt)
    assert numbers == [str(i + 1) for i in range(len(numbers))]


def test_too_small_a_length_says_so(count_tokens: Count):
    with pytest.raises(TaskError, match=r"the length asked for is 64\. Ask for a larger length"):
        build(64, count_tokens)


def test_a_question_without_any_paragraph_is_refused(count_tokens: Count):
    with pytest.raises(TaskError, match="no paragraphs"):
        make_multidoc("Why?", [], [], tokens=500, count_tokens=count_tokens, seed=0)
