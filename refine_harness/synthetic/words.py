"""RULER's aggregation tasks (NVIDIA/RULER, arXiv 2404.06654): which words of a long list occur most often?

Common words: a numbered list in which ten words occur more often than all others, after a solved example. Frequent
words: made-up words whose counts fall with the square of their rank; the most frequent is "...", which is noise.
Pure: word lists come as arguments, and everything that chance decides comes from the caller's seed.

Left out: scores, tokenizers, files.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from refine_harness.errors import TaskError
from refine_harness.synthetic.fitting import CountTokens, Example, largest_fit, too_short

COMMON = 10
"""Words to find."""
COMMON_ANSWER_TOKENS = 120
FREQUENT_ANSWER_TOKENS = 50
"""Rooms that RULER leaves for the answers; they count towards the length of an example."""

_LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"


@dataclass(frozen=True)
class _Repeats:
    """How often words occur."""

    words: int
    """Different words of the solved example."""
    solved: tuple[int, int]
    asked: tuple[int, int]
    """Occurrences of a common word and of any other."""


_SHORT, _LONG = _Repeats(20, (3, 1), (6, 1)), _Repeats(40, (10, 3), (30, 3))
_LONG_FROM = 4096
"""RULER's rules for prompts of fewer tokens, and of this many or more. Where a tokenizer makes so many tokens of a word
that the second kind has no room for `_LONG_WORDS` words, the first stays (RULER then tries for ever)."""
_LONG_WORDS = 2 * COMMON
_TRIALS = 4
_REDRAWS = 50
"""Words of a list whose ten do not fit are drawn again so often: some words are very long."""
_LATER = 100


def make_common_words(
    *,
    tokens: int,
    count_tokens: CountTokens,
    seed: int | str,
    words: Sequence[str],
    more_words: Sequence[str] = (),
    answer_tokens: int = COMMON_ANSWER_TOKENS,
) -> Example:
    """A prompt that, with `answer_tokens` more, has `tokens` tokens or a few less; its `size` is in different words.

    Args:
        words: what lists are drawn from.
        more_words: drawn from in their place where a list needs more different words than `words` has.

    Raises TaskError when `tokens` is too small for the solved example and ten words, or needs more different words
    than there are.
    """
    repeats = _repeats(tokens, answer_tokens, count_tokens, words)
    highest = max(len(words), len(more_words))
    least: list[int] = []
    for redraw in range(_REDRAWS):
        lists = _Lists.draw(f"{seed}/{redraw}" if redraw else seed, words, more_words, repeats)

        def cost(size: int, last: int = 0, lists: _Lists = lists) -> int:
            return count_tokens(lists.prompt(size, last)) + answer_tokens

        size = largest_fit(cost, tokens, lowest=COMMON, highest=highest)
        if size is None:
            least.append(cost(COMMON))
            continue
        if size == highest and cost(size) < 0.99 * tokens:
            raise TaskError(
                f"a list of common words cannot be made {tokens} tokens long: all {highest} words that there are take "
                f"{cost(size)}. Ask for a smaller length."
            )
        # The word that would come next is too long; one of those after it may not be.
        later = range(1, min(_LATER, lists.left(size)))
        last = next((last for last in later if cost(size, last) <= tokens), 0) if cost(size) < 0.995 * tokens else 0
        text = lists.prompt(size, last)
        answers = tuple(lists.chosen(size)[:COMMON])
        return Example(text[: -len(_LIST_PREFIX)], _LIST_PREFIX, answers, count_tokens(text) + answer_tokens, size)
    raise too_short("a list of common words", tokens, answer_tokens, min(least))


def _repeats(tokens: int, answer_tokens: int, count_tokens: CountTokens, words: Sequence[str]) -> _Repeats:
    """The rules for prompts of so many tokens. Tried on words that no seed decides: all examples keep to the same."""
    if tokens < _LONG_FROM:
        return _SHORT
    trials = [_Lists.draw(f"trial {i}", words, (), _LONG).prompt(_LONG_WORDS) for i in range(_TRIALS)]
    return _LONG if sum(map(count_tokens, trials)) / _TRIALS + answer_tokens <= tokens else _SHORT


@dataclass(frozen=True)
class _Lists:
    """What chance decides about one prompt; its text is then a function of the number of different words alone."""

    solved: str
    pools: tuple[Sequence[str], Sequence[str]]
    repeats: _Repeats
    seed: int

    @classmethod
    def draw(cls, seed: int | str, words: Sequence[str], more_words: Sequence[str], repeats: _Repeats) -> _Lists:
        rng = random.Random(seed)
        solved = rng.sample(list(words), repeats.words)
        listed = _numbered(_repeated(solved, *repeats.solved, rng.getrandbits(64)))
        return cls(
            f"{_LIST.format(context=listed)}{_LIST_PREFIX} {_numbered(solved[:COMMON])}\n",
            (words, more_words),
            repeats,
            rng.getrandbits(64),
        )

    @cached_property
    def _order(self) -> Sequence[str]:
        return _shuffled(self.pools[0], self.seed)

    @cached_property
    def _long_order(self) -> Sequence[str]:
        return _shuffled(self.pools[1], self.seed)

    def chosen(self, size: int, last: int = 0) -> Sequence[str]:
        """The different words of a list, common ones first; with `last`, one more: the word so many places on."""
        order = self._in_order(size)
        return [*order[:size], *([order[size + last]] if last else [])]

    def left(self, size: int) -> int:
        """How many words a list of `size` leaves."""
        return len(self._in_order(size)) - size

    def _in_order(self, size: int) -> Sequence[str]:
        return self._order if size <= len(self.pools[0]) else self._long_order

    def prompt(self, size: int, last: int = 0) -> str:
        listed = _numbered(_repeated(self.chosen(size, last), *self.repeats.asked, self.seed))
        return f"{self.solved}{_LIST.format(context=listed)}{_LIST_PREFIX}"


def _shuffled(words: Sequence[str], seed: int) -> list[str]:
    return random.Random(seed).sample(list(words), len(words))


def _repeated(words: Sequence[str], common: int, others: int, seed: int) -> list[str]:
    listed = [*words[:COMMON]] * common + [*words[COMMON:]] * others
    random.Random(seed).shuffle(listed)
    return listed


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


FREQUENT = 3
"""Made-up words to find."""
_CODE = "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
_CODE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
_CODE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_DOTS = "..."
_CODE_LETTERS = 6
_TOKENS_PER_CODE_WORD = 50
"""RULER makes up one word for so many tokens of length."""


def make_frequent_words(
    *, tokens: int, count_tokens: CountTokens, seed: int | str, answer_tokens: int = FREQUENT_ANSWER_TOKENS
) -> Example:
    """A prompt that, with `answer_tokens` more, has `tokens` tokens or a few less.

    Its `size` n sets how often each word occurs: the word of rank k, int(n / (zeta(2) k^2)) times. n is never so
    small that the third most frequent word could occur as often as the fourth. As n grows, several words may come at
    once; what room they leave is filled with the noise "...".

    Raises TaskError when `tokens` is too small for that.
    """
    rng = random.Random(seed)
    made_up: dict[str, None] = {_DOTS: None}
    while len(made_up) < max(tokens // _TOKENS_PER_CODE_WORD, FREQUENT + 2):
        made_up["".join(rng.choices(string.ascii_lowercase, k=_CODE_LETTERS))] = None
    vocabulary = list(made_up)
    order_seed = rng.getrandbits(64)

    def render(size: int, dots: int = 0) -> str:
        listed = [word for rank, word in enumerate(vocabulary, start=1) for _ in range(occurrences(size, rank))]
        listed += [_DOTS] * dots
        random.Random(order_seed).shuffle(listed)
        return f"{_CODE}appeared coded words. {' '.join(listed)}{_CODE_QUESTION}{_CODE_PREFIX}"

    def cost(size: int, dots: int = 0) -> int:
        return count_tokens(render(size, dots)) + answer_tokens

    # From here on the counts of ranks 4 and 5 (the third word and the one after it) differ by one at least.
    lowest = math.ceil(math.pi**2 / 6 / ((FREQUENT + 1) ** -2 - (FREQUENT + 2) ** -2))
    size = largest_fit(cost, tokens, lowest=lowest)
    if size is None:
        raise too_short("a text of frequent words", tokens, answer_tokens, cost(lowest))
    text = render(size, largest_fit(lambda dots: cost(size, dots), tokens, lowest=0) or 0)
    answers = tuple(vocabulary[1 : 1 + FREQUENT])
    return Example(text[: -len(_CODE_PREFIX)], _CODE_PREFIX, answers, count_tokens(text) + answer_tokens, size)


def occurrences(size: int, rank: int) -> int:
    """How often the word of `rank` (from 1) occurs among about `size` words: Zipf's law with exponent 2."""
    return int(size / (math.pi**2 / 6 * rank**2))
