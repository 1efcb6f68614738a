from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from refine_harness.errors import TaskError
from refine_harness.synthetic.fitting import Example
from refine_harness.synthetic.needles import NOISE
from refine_harness.synthetic.variables import ANSWER_TOKENS, make_variable_tracking

Count = Callable[[str], int]

INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def example(tokens: int, count_tokens: Count, seed: int | str = 1) -> Example:
    return make_variable_tracking(tokens=tokens, count_tokens=count_tokens, seed=seed)


def parts(made: Example) -> tuple[str, str]:
    """The solved example and the task, each with its instruction."""
    nothing, solved, task = made.prompt.split(INSTRUCTION)
    assert nothing == ""
    return solved, task


def holding(value: str, text: str) -> list[str]:
    """Variables that hold `value`, found by reading the assignments in order."""
    held: list[str] = []
    for name, number, source in re.findall(r"^VAR ([A-Z]+) = (?:(\d+)|VAR ([A-Z]+) )$", text, re.MULTILINE):
        if number == value or source in held:
            held.append(name)
    return held


@pytest.mark.parametrize("tokens", [1200, 4096])
def test_the_answers_are_the_variables_that_hold_the_value(tokens: int, count_tokens: Count):
    for seed in range(8):
        made = example(tokens, count_tokens, seed)
        solved, task = parts(made)
        asked = re.search(
            r"\nQuestion: Find all variables that are assigned the value (\d{5}) in the text above\.", task
        )
        assert asked is not None
        assert list(made.answers) == holding(asked.group(1), task)
        assert len(made.answers) == 5
        assert all(len(name) == 5 for name in made.answers)
        assert not any(name in solved for name in made.answers)


def test_a_solved_example_of_about_500_tokens_stands_before_the_task(count_tokens: Count):
    solved, _ = parts(example(4096, count_tokens))
    told = re.search(
        r" Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assigned the "
        r"value (\d{5}), they are:  ((?:[A-Z]{3} ?){5})\n\n$",
        solved,
    )
    assert told is not None
    assert told.group(2).split() == holding(told.group(1), solved)
    assert 400 < count_tokens(INSTRUCTION + solved) < 560


def test_the_answer_begins_with_rulers_words(count_tokens: Count):
    made = example(2048, count_tokens)
    assert re.fullmatch(
        r" Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assigned the "
        r"value \d{5}, they are: ",
        made.answer_prefix,
    )
    assert made.input.endswith("in the text above.")


@pytest.mark.parametrize("tokens", [1200, 4096])
def test_a_prompt_is_within_one_percent_of_its_length_and_never_longer(tokens: int, count_tokens: Count):
    for seed in range(4):
        made = example(tokens, count_tokens, seed)
        assert made.tokens == count_tokens(made.prompt) + ANSWER_TOKENS
        assert 0.99 * tokens <= made.tokens <= tokens
        _, task = parts(made)
        text = task.partition("\nQuestion")[0].split("\n")
        assert text.count(NOISE) == made.size
        assert all(line.startswith("VAR ") or NOISE.startswith(line) for line in text)


def test_examples_depend_on_their_seed_alone(count_tokens: Count):
    first = example(1200, count_tokens, "a")
    state = random.getstate()
    assert example(1200, count_tokens, "a") == first
    assert random.getstate() == state
    assert example(1200, count_tokens, "b").answers != first.answers


def test_too_small_a_length_is_one_sentence(count_tokens: Count):
    with pytest.raises(TaskError, match=r"variable tracking cannot be made 400 tokens long: .* Ask for a larger"):
        example(400, count_tokens)
