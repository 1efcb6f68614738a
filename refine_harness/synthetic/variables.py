"""RULER's variable tracking (NVIDIA/RULER, arXiv 2404.06654): a chain of assignments hidden in noise.

One variable gets a number, the next that variable, and so on; asked is which variables hold the number. A solved
example of about 500 tokens stands before the task, as in RULER. Pure: chance comes from the caller's seed.

Left out: scores, tokenizers, files.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from refine_harness.synthetic.fitting import CountTokens, Example, largest_fit, too_short
from refine_harness.synthetic.needles import NOISE

HOPS = 4
"""Assignments after the first: a chain has one variable more."""
ANSWER_TOKENS = 30
"""Room that RULER leaves for the answer; it counts towards the length of an example."""

_NAME_LETTERS, _SOLVED_NAME_LETTERS = 5, 3
_SOLVED_TOKENS = 500
"""The solved example has as many lines of noise as fit into this, and one for every assignment at least."""


def make_variable_tracking(
    *, tokens: int, count_tokens: CountTokens, seed: int | str, answer_tokens: int = ANSWER_TOKENS
) -> Example:
    """A prompt that, with `answer_tokens` more, has `tokens` tokens or a few less; its `size` is in lines of noise.

    The last line of noise is cut where the length is reached. The answers are the chain's variables in its order, all
    of which are expected.

    Raises TaskError when `tokens` is too small for the solved example and the chain.
    """
    rng = random.Random(seed)
    solved_chain, chain = _Chain.draw(rng, _SOLVED_NAME_LETTERS), _Chain.draw(rng, _NAME_LETTERS)
    least = HOPS + 1
    solved_size = largest_fit(lambda n: count_tokens(solved_chain.prompt(n)), _SOLVED_TOKENS, lowest=least) or least
    solved = f"{solved_chain.prompt(solved_size)} {' '.join(solved_chain.names)}\n"

    def render(size: int, cut: int = 0) -> str:
        return f"{solved}\n{chain.prompt(size, cut)}"

    def cost(size: int, cut: int = 0) -> int:
        return count_tokens(render(size, cut)) + answer_tokens

    size = largest_fit(cost, tokens, lowest=least)
    if size is None:
        raise too_short("variable tracking", tokens, answer_tokens, cost(least))
    cut = largest_fit(lambda characters: cost(size, characters), tokens, lowest=0, highest=len(NOISE)) or 0
    text = render(size, cut)
    prefix = chain.answer_prefix
    return Example(text[: -len(prefix)], prefix, chain.names, count_tokens(text) + answer_tokens, size)


@dataclass(frozen=True)
class _Chain:
    """What chance decides about one prompt; its text is then a function of the noise alone."""

    names: tuple[str, ...]
    value: int
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, letters: int) -> _Chain:
        names: dict[str, None] = {}
        while len(names) < HOPS + 1:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        return cls(tuple(names), rng.randrange(10_000, 99_999), rng.getrandbits(64))

    @property
    def assignments(self) -> list[str]:
        """The lines of the chain in its order; RULER ends all but the first with a space."""
        later = [f"VAR {name} = VAR {before} " for before, name in pairwise(self.names)]
        return [f"VAR {self.names[0]} = {self.value}", *later]

    @property
    def answer_prefix(self) -> str:
        return (
            f" Answer: According to the chain(s) of variable assignment in the text above, {len(self.names)} variables "
            f"are assigned the value {self.value}, they are: "
        )

    def prompt(self, size: int, cut: int = 0) -> str:
        """Instruction, `size` lines of noise with the chain in them, `cut` characters more, question, answer prefix."""
        lines = [NOISE] * size
        places = sorted(random.Random(self.seed).sample(range(size), len(self.names)))
        for i, (place, line) in enumerate(zip(places, self.assignments, strict=True)):
            lines.insert(place + i, line)
        if last := NOISE[:cut].rstrip():
            lines.append(last)
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(lines)
            + f"\nQuestion: Find all variables that are assigned the value {self.value} in the text above."
            f"{self.answer_prefix}"
        )
