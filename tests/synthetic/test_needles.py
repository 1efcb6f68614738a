from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from refine_harness.errors import TaskError
from refine_harness.synthetic.fitting import largest_fit
from refine_harness.synthetic.needles import (
    ANSWER_TOKENS,
    DOCUMENT_KINDS,
    NOISE,
    SPECS,
    DocumentKind,
    Haystack,
    NiahExample,
    hide_in_prose,
    make_niah,
    needle_document,
    split_sentences,
)

Count = Callable[[str], int]

SENTENCES = [
    f"Sentence {word} of a {kind} story goes on for some words and ends here."
    for word in ("one", "two", "three", "four", "five", "six", "seven")
    for kind in ("long", "short", "merry", "sad", "plain")
]
NOUNS = [f"noun{letter}{other}" for letter in "abcdefghij" for other in "abcdefghij"]
ADJECTIVES = [f"adj{letter}{other}" for letter in "abcdefghij" for other in "abcdefghij"]
HAYSTACK = Haystack(SENTENCES, NOUNS, ADJECTIVES)


def example(name: str, tokens: int, count_tokens: Count, index: int = 0) -> NiahExample:
    return make_niah(
        SPECS[name], tokens=tokens, count_tokens=count_tokens, seed=f"42/{name}/{tokens}/{index}", haystack=HAYSTACK
    )


def needles_in(text: str) -> list[tuple[str, str, str]]:
    return re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", text)


def test_ruler_hides_and_asks_what_its_table_says(count_tokens: Count):
    table = {
        "niah_single_1": (1, 1, "numbers"),
        "niah_single_2": (1, 1, "numbers"),
        "niah_single_3": (1, 1, "uuids"),
        "niah_multikey_1": (4, 1, "numbers"),
        "niah_multivalue": (4, 4, "numbers"),
        "niah_multiquery": (4, 4, "numbers"),
    }
    for name, (hidden, asked, kind) in table.items():
        made = example(name, 1024, count_tokens)
        found = needles_in(made.prompt)
        assert len(found) == hidden, name
        assert len(made.answers) == asked, name
        assert {what for what, _, _ in found} == {kind}, name


@pytest.mark.parametrize("name", SPECS)
def test_every_answer_stands_exactly_once_in_the_text(name: str, count_tokens: Count):
    for index in range(4):
        made = example(name, 1024, count_tokens, index)
        for answer in made.answers:
            assert made.prompt.count(answer) == 1
        values = [value for _, _, value in needles_in(made.prompt)]
        assert len(set(values)) == len(values)


def test_the_key_asked_for_is_the_one_whose_needle_holds_the_answer(count_tokens: Count):
    for name in ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"):
        made = example(name, 1024, count_tokens)
        asked = re.search(r"number for (\S+) mentioned|uuid for (\S+) mentioned", made.input)
        assert asked is not None
        key = asked.group(1) or asked.group(2)
        values = {key: value for _, key, value in needles_in(made.prompt)}
        assert values[key] == made.answers[0]
        assert len(values) > 3, "the other keys are distractors"


def test_needle_haystacks_are_nothing_but_distractors(count_tokens: Count):
    made = example("niah_multikey_2", 2048, count_tokens)
    lines = made.input.split("\n")[1:-1]
    assert len(lines) - made.size - 1 in (0, 1), "the needle, and perhaps the beginning of one line more"
    assert all(needles_in(line) for line in lines[: made.size + 1])
    assert all("One of the special magic numbers for ".startswith(line[:37]) for line in lines[made.size + 1 :])


def test_noise_is_one_sentence_over_and_over(count_tokens: Count):
    made = example("niah_single_1", 1024, count_tokens)
    lines = made.input.split("\n")[1:-1]
    assert lines.count(NOISE) == made.size
    assert [line for line in lines if line != NOISE and not NOISE.startswith(line)] == [
        line for line in lines if needles_in(line)
    ]


def test_phrasing_is_rulers_in_singular_and_plural(count_tokens: Count):
    one = example("niah_single_2", 512, count_tokens)
    assert one.input.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert re.search(r"\nWhat is the special magic number for \S+ mentioned in the provided text\?$", one.input)
    assert re.fullmatch(r" The special magic number for \S+ mentioned in the provided text is", one.answer_prefix)
    many = example("niah_multiquery", 1024, count_tokens)
    assert many.input.startswith("Some special magic numbers are hidden within the following text. ")
    keys = r"\S+, \S+, \S+, and \S+"
    assert re.search(
        rf"\nWhat are all the special magic numbers for {keys} mentioned in the provided text\?$", many.input
    )
    assert re.fullmatch(
        rf" The special magic numbers for {keys} mentioned in the provided text are", many.answer_prefix
    )
    assert many.prompt == many.input + many.answer_prefix


@pytest.mark.parametrize("tokens", [1024, 4096])
@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_is_within_one_percent_of_its_length_and_never_longer(name: str, tokens: int, count_tokens: Count):
    for index in range(3):
        made = example(name, tokens, count_tokens, index)
        assert made.tokens == count_tokens(made.prompt) + ANSWER_TOKENS
        assert 0.99 * tokens <= made.tokens <= tokens


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_3"])
def test_a_line_that_is_cut_holds_no_needle(name: str, count_tokens: Count):
    for index in range(6):
        made = example(name, 1024, count_tokens, index)
        lines = made.input.split("\n")[1:-1]
        places = [place for place, line in enumerate(lines) if made.answers[0] in line]
        assert len(places) == 1
        assert places[0] <= made.size


def test_examples_depend_on_their_seed_alone(count_tokens: Count):
    first = example("niah_multikey_1", 512, count_tokens, 3)
    random.seed(0)
    example("niah_multikey_1", 1024, count_tokens, 3)
    state = random.getstate()
    assert example("niah_multikey_1", 512, count_tokens, 3) == first
    assert random.getstate() == state, "the global generator is not touched"
    assert example("niah_multikey_1", 512, count_tokens, 4).answers != first.answers


def test_needles_reach_every_depth(count_tokens: Count):
    depths = [example("niah_single_2", 512, count_tokens, index).depths[0] for index in range(40)]
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert all(0 <= depth <= 1 for depth in depths)


def test_too_small_a_length_is_one_sentence_that_says_how_much_is_needed(count_tokens: Count):
    with pytest.raises(
        TaskError, match=r"niah_multiquery cannot be made 256 tokens long: .* take (\d+)\. Ask"
    ) as caught:
        example("niah_multiquery", 256, count_tokens)
    needed = re.search(r"take (\d+)", str(caught.value))
    assert needed is not None
    made = example("niah_multiquery", int(needed.group(1)) + 16, count_tokens)
    assert made.tokens <= int(needed.group(1)) + 16


def test_an_essay_without_prose_is_refused(count_tokens: Count):
    with pytest.raises(TaskError, match="no prose"):
        make_niah(
            SPECS["niah_single_2"],
            tokens=512,
            count_tokens=count_tokens,
            seed=0,
            haystack=Haystack((), NOUNS, ADJECTIVES),
        )


def test_a_haystack_starts_again_when_it_is_used_up():
    haystack = Haystack(["a b c.", "d e."])
    assert haystack.first_words(0) == []
    assert haystack.first_words(4) == ["a b c.", "d"]
    assert haystack.first_words(5) == ["a b c.", "d e."]
    assert " ".join(haystack.first_words(13)).split() == [
        "a",
        "b",
        "c.",
        "d",
        "e.",
        "a",
        "b",
        "c.",
        "d",
        "e.",
        "a",
        "b",
        "c.",
    ]


def test_prose_keeps_its_order_around_the_needles():
    hidden = hide_in_prose(["N1.", "N2."], ["A.", "B.", "C.", "D."], [0, 50])
    assert hidden.split() == ["N1.", "A.", "B.", "N2.", "C.", "D."]


def test_largest_fit_stays_within_its_bounds():
    assert largest_fit(lambda n: n, 100, lowest=0, highest=40) == 40
    assert largest_fit(lambda n: n, 30, lowest=0, highest=40) == 30
    assert largest_fit(lambda n: n, 30, lowest=40, highest=50) is None
    assert largest_fit(lambda n: 0, 30, lowest=0, highest=0) == 0


def test_a_haystack_may_start_anywhere_and_goes_around():
    starts = {HAYSTACK.starting_anywhere(seed).first_words(3)[0] for seed in range(20)}
    assert len(starts) > 5
    whole = HAYSTACK.starting_anywhere("a")
    assert sorted(whole.sentences) == sorted(SENTENCES)


@pytest.mark.parametrize("slack", [0, 5])
def test_largest_fit_is_the_largest_that_fits(slack: int):
    rng = random.Random(1)
    for _ in range(200):
        steps = [rng.randint(1, 9) for _ in range(200)]
        costs = [sum(steps[:n]) for n in range(201)]
        lowest, budget = rng.randint(0, 10), rng.randint(0, 600)
        guess = rng.choice([None, rng.randint(0, 100)])
        found = largest_fit(lambda n, costs=costs: costs[min(n, 200)], budget, lowest=lowest, slack=slack, guess=guess)
        best = max((n for n in range(lowest, 201) if costs[n] <= budget), default=None)
        if best is None or slack == 0:
            assert found == best
        else:
            assert found is not None
            assert costs[found] <= budget
            assert found == best or budget - costs[found] <= slack


@pytest.mark.parametrize("kind", DOCUMENT_KINDS)
@pytest.mark.parametrize("tokens", [400, 1000])
def test_training_documents_end_with_right_answers_in_the_evaluations_words(
    kind: DocumentKind, tokens: int, count_tokens: Count
):
    for seed in range(6):
        made = needle_document(
            random.Random(seed),
            sentences=SENTENCES,
            nouns=NOUNS,
            adjectives=ADJECTIVES,
            tokens=tokens,
            count_tokens=count_tokens,
            kinds=[kind],
            questions=3,
        )
        assert made.tokens == count_tokens(made.text) <= tokens
        assert made.answers[-1][1] == len(made.text)
        hidden: dict[str, list[str]] = {}
        for _, key, value in needles_in(made.text):
            hidden.setdefault(key, []).append(value)
        for start, stop in made.answers:
            prefix = made.text[:start].rpartition("? ")[2]
            asked = re.fullmatch(r"The special magic \w+ for (.+) mentioned in the provided text (?:is|are)", prefix)
            assert asked is not None, prefix
            keys = re.split(r", and |, ", asked.group(1))
            said = re.split(r", and |, ", made.text[start:stop].strip().rstrip("."))
            assert sorted(said) == sorted(value for key in keys for value in hidden[key])


def test_training_documents_are_varied_and_nearly_as_long_as_asked(count_tokens: Count):
    made = [
        needle_document(
            random.Random(seed),
            sentences=SENTENCES,
            nouns=NOUNS,
            adjectives=ADJECTIVES,
            tokens=1500,
            count_tokens=count_tokens,
            questions=3,
        )
        for seed in range(30)
    ]
    assert len({document.text for document in made}) == 30
    assert {len(document.answers) for document in made} >= {1, 2, 3}
    assert {NOISE in document.text for document in made} == {True, False}
    assert all(0.9 * 1500 <= document.tokens <= 1500 for document in made)


def test_a_document_too_short_for_one_needle_is_refused(count_tokens: Count):
    with pytest.raises(TaskError, match="cannot be made 60 tokens long"):
        needle_document(
            random.Random(0),
            sentences=SENTENCES,
            nouns=NOUNS,
            adjectives=ADJECTIVES,
            tokens=60,
            count_tokens=count_tokens,
        )


def test_sentences_end_where_a_reader_would_end_them():
    text = 'Mr. Smith came at 3.\nHe said "Go!" Then he left.  What? \u201cYes.\u201d\n\nA TITLE\n\nJ. R. was there'
    assert split_sentences(text) == [
        "Mr. Smith came at 3.",
        'He said "Go!"',
        "Then he left.",
        "What?",
        "\u201cYes.\u201d",
        "A TITLE",
        "J. R. was there",
    ]
    assert split_sentences(text, limit=2) == ["Mr. Smith came at 3.", 'He said "Go!"']
