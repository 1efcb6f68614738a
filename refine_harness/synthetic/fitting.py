"""What all generated prompts share: an example, and the search for the size at which it is as long as was asked.

Left out: what a prompt says (the other modules here), and the tokenizer, which the caller brings as a counter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refine_harness.errors import TaskError

CountTokens = Callable[[str], int]
"""How many tokens a text has, without special tokens."""


@dataclass(frozen=True)
class Example:
    """One evaluation prompt and its right answers."""

    input: str
    """Instruction, text and question."""
    answer_prefix: str
    """How the answer begins; the end of the prompt of a base model."""
    answers: tuple[str, ...]
    tokens: int
    """Of prompt and room for the answer."""
    size: int
    """Whole units of haystack: words, lines or documents; what else, the function that makes it says."""

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix


def too_short(name: str, tokens: int, answer_tokens: int, least: int) -> TaskError:
    """The error of a length that holds not even the smallest prompt, which takes `least`."""
    return TaskError(
        f"{name} cannot be made {tokens} tokens long: the least it needs and room for an answer of "
        f"{answer_tokens} tokens take {least}. Ask for a larger length."
    )


def largest_fit(
    measure: Callable[[int], int],
    budget: int,
    *,
    lowest: int,
    highest: int | None = None,
    slack: int = 0,
    guess: int | None = None,
) -> int | None:
    """The largest n from `lowest` to `highest` with measure(n) <= budget, for a measure that grows with n.

    None if there is none. With `slack`, any n that leaves no more than that of the budget. Interpolates, and bisects
    where that is slow; `guess` only saves measurements.
    """
    start = lowest if guess is None else max(lowest, guess)
    if highest is not None:
        start = min(start, highest)
    cost = measure(start)
    if cost <= budget:
        low, low_cost = start, cost
        high: int | None = None
        high_cost = 0
    elif start == lowest:
        return None
    else:
        high, high_cost = start, cost
        low, low_cost = lowest, measure(lowest)
        if low_cost > budget:
            return None
    stride, tries = 16, 0
    while budget - low_cost > slack and low != highest and (high is None or high - low > 1):
        tries += 1
        if high is None:
            n = low + stride if highest is None else min(low + stride, highest)
        elif tries % 4 == 0:
            n = (low + high) // 2
        else:
            n = low + (budget - low_cost) * (high - low) // max(1, high_cost - low_cost)
            n = min(max(n, low + 1), high - 1)
        cost = measure(n)
        if cost > budget:
            high, high_cost = n, cost
            continue
        if high is None:
            # Aim just past the budget, so that the next measurement bounds n from above.
            rate = max(1e-3, (cost - low_cost) / (n - low))
            stride = max(1, min(int((budget - cost) / rate) + 1, 1000 * (n + 16)))
        low, low_cost = n, cost
    return low
