"""Questions over many paragraphs, as RULER builds them from SQuAD and HotpotQA (arXiv 2404.06654).

The paragraphs that hold the answer are shuffled among distractors until the prompt has the length asked for. RULER
stops at the last whole document; an evaluation prompt here also takes the beginning of one more distractor, so that a
prompt of 1,000 tokens is as long as it says.
Pure: paragraphs come as arguments and everything that chance decides comes from the caller's seed.

Left out: where questions and paragraphs come from, scores, tokenizers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from refine_harness.errors import TaskError
from refine_harness.synthetic.fitting import CountTokens, Example, largest_fit

ANSWER_TOKENS = 32
"""Room that RULER leaves for the answer; it counts towards the length of an example."""
ANSWER_PREFIX = " Answer:"

_FULL = 0.995
"""The part of a prompt's length at which it is long enough, and how many documents are tried to get there."""
_LATER = 8

_TASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


def make_multidoc(
    question: str,
    gold: Sequence[str],
    distractors: Sequence[str],
    *,
    answers: Sequence[str] = (),
    near: Sequence[str] = (),
    tokens: int,
    count_tokens: CountTokens,
    seed: int | str,
    answer_tokens: int = ANSWER_TOKENS,
    guess: int | None = None,
    fill: bool = False,
) -> Example:
    """As many documents as fit into `tokens` tokens with the question and `answer_tokens` more: never more tokens.

    All of `gold` first, then `near` (RULER: the other paragraphs of the question's article) at random, then
    `distractors` at random, which may be the whole corpus: what is already there is passed over. A corpus that is used
    up is repeated, as RULER does. `guess` is a likely number of documents and saves counting. `fill` adds as many words
    of the next document as there is room for. The example's `size` counts whole documents; any of its answers will do.

    Raises TaskError when the question and `gold` alone are too long.
    """
    rng = random.Random(seed)
    queue = _Queue(rng, gold, near, distractors)
    order_seed = rng.getrandbits(64)

    def render(size: int, words: int = 0, ahead: int = 0) -> str:
        documents = queue.first(size)
        if words:
            documents.append(" ".join(queue.first(size + ahead + 1)[-1].split(" ")[:words]))
        random.Random(order_seed).shuffle(documents)
        return prompt(question, documents)

    def cost(size: int, words: int = 0, ahead: int = 0) -> int:
        return count_tokens(render(size, words, ahead)) + answer_tokens

    size = largest_fit(cost, tokens, lowest=len(gold), guess=guess)
    if size is None:
        raise TaskError(
            f"a question, what answers it (paragraphs: {len(gold)}) and room for an answer of {answer_tokens} tokens "
            f"take {cost(len(gold))}; the length asked for is {tokens}. Ask for a larger length."
        )
    words = ahead = 0
    if fill:
        size, words, ahead = _filled(cost, size, len(gold), queue, tokens)
    text = render(size, words, ahead)
    return Example(text[: -len(ANSWER_PREFIX)], ANSWER_PREFIX, tuple(answers), cost(size, words, ahead), size)


def _filled(
    cost: Callable[[int, int, int], int], size: int, gold: int, queue: _Queue, tokens: int
) -> tuple[int, int, int]:
    """How a prompt of `size` whole documents is filled up: whole documents, words of one more, its place after them.

    Usually the next document is cut. Where there is no room for a heading and a word of it, one of the longer documents
    after it takes the place of the last whole one.
    """
    tries = [(size, 0), *((size - 1, ahead) for ahead in range(1, _LATER) if size > gold)]
    found = (size, 0, 0)
    for whole, ahead in tries:

        def taken(words: int, whole: int = whole, ahead: int = ahead) -> int:
            return cost(whole, words, ahead)

        longest = len(queue.first(whole + ahead + 1)[-1].split(" "))
        words = largest_fit(taken, tokens, lowest=0, highest=longest) or 0
        if taken(words) > cost(*found):
            found = whole, words, ahead
        if cost(*found) > _FULL * tokens:
            break
    return found


def prompt(question: str, documents: Sequence[str]) -> str:
    """RULER's prompt, to the answer prefix."""
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1))
    return (
        f"{_TASK}\n\nThe following are given documents.\n\n{context}\n\n{_TASK}\n\nQuestion: {question}{ANSWER_PREFIX}"
    )


class _Queue:
    """Documents in the order in which a growing prompt takes them; drawn only as far as they are needed."""

    def __init__(
        self, rng: random.Random, gold: Sequence[str], near: Sequence[str], distractors: Sequence[str]
    ) -> None:
        if not (gold or near or distractors):
            raise TaskError("a question has no paragraphs to choose from. Give it at least one.")
        self._taken = list(gold)
        self._seen = set(gold)
        self._rest = self._fresh(rng, near, distractors)

    def first(self, n: int) -> list[str]:
        if n > len(self._taken):
            self._taken.extend(islice(self._rest, n - len(self._taken)))
        rounds, rest = divmod(n, len(self._taken))
        return self._taken * rounds + self._taken[:rest]

    def _fresh(self, rng: random.Random, *pools: Sequence[str]) -> Iterator[str]:
        for pool in pools:
            indices = list(range(len(pool)))
            while indices:
                # A shuffle that stops when nobody asks for more: corpora are large and prompts are short.
                i = rng.randrange(len(indices))
                indices[i], indices[-1] = indices[-1], indices[i]
                document = pool[indices.pop()]
                if document not in self._seen:
                    self._seen.add(document)
                    yield document
