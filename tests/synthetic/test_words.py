from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from refine_harness.errors import TaskError
from refine_harness.synthetic.fitting import Example
from refine_harness.synthetic.words import (
    COMMON_ANSWER_TOKENS,
    FREQUENT_ANSWER_TOKENS,
    make_common_words,
    make_frequent_words,
    occurrences,
)

Count = Callable[[str], int]

WORDS = [first + second for first in ("sun", "moon", "tree", "hill", "lake", "bird") for second in "abcdefghijklmnop"]
MORE = [f"more{number}" for number in range(2000)]

INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
PREFIX = " Answer: The top 10 words that appear most often in the list are:"


def few(text: str) -> int:
    """A counter with few tokens a word, as large vocabularies have: RULER's lists fit into 4,096."""
    return len(re.findall(r"\w+", text))


def common(tokens: int, count_tokens: Count, seed: int | str = 1, words: list[str] = WORDS) -> Example:
    return make_common_words(tokens=tokens, count_tokens=count_tokens, seed=seed, words=words, more_words=MORE)


def listed(text: str) -> list[str]:
    numbered = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [word for _, word in numbered]


def lists(made: Example) -> tuple[Counter[str], list[str], Counter[str]]:
    """Words of the solved example, its answer, and words of the task."""
    nothing, solved, task = made.prompt.split(INSTRUCTION)
    assert nothing == ""
    before, _, answer = solved.partition(QUESTION + PREFIX)
    assert task.endswith(QUESTION + PREFIX)
    return Counter(listed(before)), listed(answer), Counter(listed(task.removesuffix(QUESTION + PREFIX)))


@pytest.mark.parametrize(
    ("tokens", "solved_times", "times", "solved_words"), [(2048, (3, 1), (6, 1), 20), (4096, (10, 3), (30, 3), 40)]
)
def test_ten_words_occur_as_often_as_ruler_says(
    tokens: int, solved_times: tuple[int, int], times: tuple[int, int], solved_words: int
):
    for seed in range(3):
        made = common(tokens, few, seed, MORE[:600])
        solved, answer, task = lists(made)
        assert len(made.answers) == 10
        assert dict(task) == {word: times[word not in made.answers] for word in task}
        assert len(task) in (made.size, made.size + 1)
        assert set(made.answers) < set(task)
        assert dict(solved) == {word: solved_times[word not in answer] for word in solved}
        assert (len(answer), len(solved)) == (10, solved_words)


def test_the_solved_example_is_another_list_and_its_answer_is_numbered():
    made = common(4096, few)
    _, answer, _ = lists(made)
    assert f"{PREFIX} 1. {answer[0]} 2. {answer[1]}" in made.input
    assert set(answer) != set(made.answers)


@pytest.mark.parametrize("tokens", [2048, 4096, 8192])
def test_lists_are_within_one_percent_of_their_length_and_never_longer(tokens: int, count_tokens: Count):
    for count in (few, count_tokens):
        for seed in range(3):
            made = common(tokens, count, seed, MORE[:1000])
            assert made.tokens == count(made.prompt) + COMMON_ANSWER_TOKENS
            assert 0.99 * tokens <= made.tokens <= tokens


def test_a_list_that_needs_more_words_than_there_are_takes_them_all_from_the_longer_one():
    made = common(2048, few)
    _, _, task = lists(made)
    assert len(task) > len(WORDS)
    assert set(task) <= set(MORE)
    _, _, small = lists(common(480, few))
    assert set(small) <= set(WORDS)


def test_a_tokenizer_with_many_tokens_a_word_keeps_all_examples_to_the_short_rules(count_tokens: Count):
    def many(text: str) -> int:
        return 10 * few(text)

    for seed in range(6):
        _, _, task = lists(common(6000, many, seed))
        assert max(task.values()) == 6


def test_lengths_that_lists_cannot_have_are_one_sentence():
    with pytest.raises(TaskError, match=r"common words cannot be made 200 tokens long: .* Ask for a larger length"):
        common(200, few)
    with pytest.raises(TaskError, match=r"all 2000 words that there are take \d+\. Ask for a smaller length"):
        common(60_000, few)


def frequent(tokens: int, count_tokens: Count, seed: int | str = 1) -> Example:
    return make_frequent_words(tokens=tokens, count_tokens=count_tokens, seed=seed)


def coded(made: Example) -> Counter[str]:
    text = made.input.partition("appeared coded words. ")[2].partition("\nQuestion: ")[0]
    return Counter(text.split(" "))


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_the_answers_are_the_three_most_frequent_words_without_the_noise(tokens: int, count_tokens: Count):
    for seed in range(8):
        made = frequent(tokens, count_tokens, seed)
        counts = coded(made)
        dots = counts.pop("...")
        ranked = counts.most_common()
        assert [word for word, _ in ranked[:3]] == list(made.answers)
        assert ranked[2][1] > ranked[3][1], "no tie"
        assert dots > ranked[0][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
        assert all(count == occurrences(made.size, rank) for rank, (_, count) in enumerate(ranked, start=2))


def test_frequent_words_ask_in_rulers_words(count_tokens: Count):
    made = frequent(1024, count_tokens)
    assert made.input.startswith(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    assert made.input.endswith(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    assert made.answer_prefix == (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_coded_texts_are_within_one_percent_of_their_length_and_never_longer(tokens: int, count_tokens: Count):
    for seed in range(8):
        made = frequent(tokens, count_tokens, seed)
        assert made.tokens == count_tokens(made.prompt) + FREQUENT_ANSWER_TOKENS
        assert 0.99 * tokens <= made.tokens <= tokens


def test_occurrences_are_zetas():
    # zeta(2) = pi^2 / 6 = 1.644934: 1000 words are 607 of rank 1, 151 of rank 2, 67 of rank 3.
    assert [occurrences(1000, rank) for rank in (1, 2, 3, 24, 25)] == [607, 151, 67, 1, 0]


def test_words_depend_on_their_seed_alone(count_tokens: Count):
    state = random.getstate()
    for make in (common, frequent):
        assert make(2048, count_tokens, "a") == make(2048, count_tokens, "a")
        assert make(2048, count_tokens, "a").answers != make(2048, count_tokens, "b").answers
    assert random.getstate() == state


def test_a_coded_text_too_short_for_three_counts_is_refused(count_tokens: Count):
    with pytest.raises(TaskError, match="frequent words cannot be made 200 tokens long"):
        frequent(200, count_tokens)
