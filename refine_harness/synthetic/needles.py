"""Needles in a haystack, as RULER defines them (NVIDIA/RULER, arXiv 2404.06654): values hidden in long text.

Two uses of one phrasing: `make_niah` builds an evaluation prompt of a given length, `needle_document` a training
document that ends with its answers. Both are pure: text and word lists come as arguments, and everything that
chance decides comes from the caller's seed.

What RULER leaves to luck is settled here: no key or value occurs twice in one example, so every answer is found
exactly once in its text, and each prompt is filled on its own, so that all are as long as was asked. An essay's last
sentence may be cut for that, as RULER's is; so may the last line of noise or of distractors.

Left out: scores, tokenizers, files.
"""

from __future__ import annotations

import random
import re
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Literal

from refine_harness.errors import TaskError
from refine_harness.synthetic.fitting import CountTokens, Example, largest_fit, too_short

Kind = Literal["words", "numbers", "uuids"]
"""What a key or a value looks like: adjective-noun, seven digits, a UUID of version 4."""

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ANSWER_TOKENS = 128
"""Room that RULER leaves for the answer; it counts towards the length of an example."""

_DEPTHS = [round(100 * step / 39) for step in range(40)]
"""RULER's depths in percent: needles of an essay go to as many of these 40 as there are needles."""


@dataclass(frozen=True)
class NiahSpec:
    """One of RULER's needle tasks."""

    name: str
    haystack: Literal["noise", "essay", "needle"]
    """One sentence over and over; running prose; or more needles, which are distractors."""
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    """Keys hidden, of which `queries` are asked for."""
    values: int = 1
    """Values of each key."""
    queries: int = 1

    @property
    def needles(self) -> int:
        return self.keys * self.values


SPECS: dict[str, NiahSpec] = {
    spec.name: spec
    for spec in (
        NiahSpec("niah_single_1", "noise"),
        NiahSpec("niah_single_2", "essay"),
        NiahSpec("niah_single_3", "essay", value_kind="uuids"),
        NiahSpec("niah_multikey_1", "essay", keys=4),
        NiahSpec("niah_multikey_2", "needle"),
        NiahSpec("niah_multikey_3", "needle", key_kind="uuids", value_kind="uuids"),
        NiahSpec("niah_multivalue", "essay", values=4),
        NiahSpec("niah_multiquery", "essay", keys=4, queries=4),
    )
}
"""RULER's eight needle tasks, by RULER's names."""


@dataclass(frozen=True)
class Haystack:
    """What needles are hidden in, and the words that keys are made of."""

    sentences: Sequence[str] = ()
    """Prose in reading order, for spec.haystack == "essay"; it starts again when it is used up."""
    nouns: Sequence[str] = ()
    adjectives: Sequence[str] = ()

    @cached_property
    def _word_counts(self) -> list[int]:
        return list(accumulate(len(sentence.split()) for sentence in self.sentences))

    def starting_anywhere(self, seed: int | str) -> Haystack:
        """The same prose from a sentence on that the seed decides, around its end if need be."""
        start = random.Random(seed).randrange(max(1, len(self.sentences)))
        return replace(self, sentences=[*self.sentences[start:], *self.sentences[:start]])

    def first_words(self, n: int) -> list[str]:
        """The first `n` words as sentences, the last of which may be cut."""
        total = self._word_counts[-1] if self._word_counts else 0
        if n <= 0 or not total:
            return []
        rounds, rest = divmod(n, total)
        taken = list(self.sentences) * rounds
        if rest:
            last = bisect_left(self._word_counts, rest)
            before = self._word_counts[last - 1] if last else 0
            taken += [*self.sentences[:last], " ".join(self.sentences[last].split()[: rest - before])]
        return taken


@dataclass(frozen=True)
class NiahExample(Example):
    """A prompt with needles; its `size` is in words of essay, or whole lines of noise or distractors."""

    depths: tuple[float, ...] = ()
    """Where each answer stands in the text, from 0 (start) to 1."""


def make_niah(
    spec: NiahSpec,
    *,
    tokens: int,
    count_tokens: CountTokens,
    seed: int | str,
    haystack: Haystack,
    answer_tokens: int = ANSWER_TOKENS,
) -> NiahExample:
    """A prompt that, with `answer_tokens` more, has `tokens` tokens or a few less, and never more.

    An essay is filled word by word; noise and distractors by lines, the last of which is cut where the length is
    reached. Needles stand before that last line.

    Raises TaskError when `tokens` is too small for the question and its needles.
    """
    draw = _Draw(random.Random(seed), spec, haystack)
    lines = spec.haystack != "essay"
    lowest = spec.needles if lines else 0

    def cost(size: int, cut: int = 0) -> int:
        return count_tokens(draw.prompt(size, cut)) + answer_tokens

    size = largest_fit(cost, tokens, lowest=lowest)
    if size is None:
        raise too_short(spec.name, tokens, answer_tokens, cost(lowest))
    cut = 0
    if lines:
        longest = len(draw.line(size))
        cut = largest_fit(lambda characters: cost(size, characters), tokens, lowest=0, highest=longest) or 0
    prompt = draw.prompt(size, cut)
    text = draw.text(size, cut)
    return NiahExample(
        input=prompt[: -len(draw.answer_prefix)],
        answer_prefix=draw.answer_prefix,
        answers=draw.answers,
        tokens=count_tokens(prompt) + answer_tokens,
        size=size,
        depths=tuple(round(text.index(answer) / len(text), 4) for answer in draw.answers),
    )


class _Draw:
    """What chance decides about one example; its text is then a function of the haystack's size alone."""

    def __init__(self, rng: random.Random, spec: NiahSpec, haystack: Haystack) -> None:
        if spec.haystack == "essay" and not haystack.first_words(1):
            raise TaskError(f"{spec.name} has no prose to hide its needles in. Give it text with at least one word.")
        self.spec = spec
        self.haystack = haystack
        self._used: set[str] = set()
        self._rng = rng
        self.keys = [self._fresh(rng, spec.key_kind) for _ in range(spec.keys)]
        self.values = [[self._fresh(rng, spec.value_kind) for _ in range(spec.values)] for _ in self.keys]
        self._needles = [
            NEEDLE.format(kind=spec.value_kind, key=key, value=value)
            for key, values in zip(self.keys, self.values, strict=True)
            for value in values
        ]
        rng.shuffle(self._needles)
        self._depths = sorted(rng.sample(_DEPTHS, len(self._needles))) if spec.haystack == "essay" else []
        self.asked = rng.sample(range(spec.keys), spec.queries)
        self._places_seed = rng.getrandbits(64)
        self._distractor_rng = random.Random(rng.getrandbits(64))
        self._distractors: list[str] = []

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(value for i in self.asked for value in self.values[i])

    @property
    def answer_prefix(self) -> str:
        return answer_prefix(self.spec.value_kind, [self.keys[i] for i in self.asked], len(self.answers))

    def prompt(self, size: int, cut: int = 0) -> str:
        keys = [self.keys[i] for i in self.asked]
        ask = question(self.spec.value_kind, keys, len(self.answers))
        text = self.text(size, cut)
        return f"{preamble(self.spec.value_kind, len(self.answers))}\n{text}\n{ask}{self.answer_prefix}"

    def text(self, size: int, cut: int = 0) -> str:
        """`size` words (essay) or lines (noise, needle) of haystack with the needles in it, and `cut` characters of
        the line that would come next."""
        if self.spec.haystack == "essay":
            return hide_in_prose(self._needles, self.haystack.first_words(size), self._depths)
        lines = [self.line(i) for i in range(size)]
        places = random.Random(self._places_seed).sample(range(size), len(self._needles))
        for place, needle in zip(sorted(places, reverse=True), self._needles, strict=True):
            lines.insert(place, needle)
        if last := self.line(size)[:cut].rstrip():
            lines.append(last)
        return "\n".join(lines)

    def line(self, number: int) -> str:
        """A line of noise, or a distractor."""
        if self.spec.haystack == "noise":
            return NOISE
        while len(self._distractors) <= number:
            self._distractors.append(self._distractor())
        return self._distractors[number]

    def _distractor(self) -> str:
        rng, spec = self._distractor_rng, self.spec
        key, value = self._fresh(rng, spec.key_kind), self._fresh(rng, spec.value_kind)
        return NEEDLE.format(kind=spec.value_kind, key=key, value=value)

    def _fresh(self, rng: random.Random, kind: Kind) -> str:
        return fresh_value(rng, kind, self.haystack, self._used)


def fresh_value(rng: random.Random, kind: Kind, haystack: Haystack, used: set[str]) -> str:
    """A key or value that is not in `used` yet, where it is then noted."""
    while True:
        if kind == "numbers":
            value = str(rng.randint(10**6, 10**7 - 1))
        elif kind == "uuids":
            value = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        else:
            value = f"{rng.choice(haystack.adjectives)}-{rng.choice(haystack.nouns)}"
        if value not in used:
            used.add(value)
            return value


def hide_in_prose(needles: Sequence[str], sentences: Sequence[str], depths: Sequence[int]) -> str:
    """Prose with needle i at depths[i] percent of its sentences; depths must not fall.

    The empty pieces before the first sentence and between needles at one place leave spaces, as RULER's do.
    """
    places = [0, *(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
    parts: list[str] = []
    for i, (start, stop) in enumerate(pairwise(places)):
        parts.append(" ".join(sentences[start:stop]))
        parts.extend(needles[i : i + 1])
    return " ".join(parts)


def preamble(kind: Kind, answers: int) -> str:
    """The instruction above the text, for a question with that many answers."""
    some, are, name = _number(kind, answers)
    return (
        f"{some} special magic {name} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {name} afterwards."
    )


def question(kind: Kind, keys: Sequence[str], answers: int) -> str:
    """The question about `keys`, whose values are `answers` in number."""
    _, are, name = _number(kind, answers)
    what = "is the" if are == "is" else "are all the"
    return f"What {what} special magic {name} for {_listed(keys)} mentioned in the provided text?"


def answer_prefix(kind: Kind, keys: Sequence[str], answers: int) -> str:
    """How the answer to `question` begins; the values follow."""
    _, are, name = _number(kind, answers)
    return f" The special magic {name} for {_listed(keys)} mentioned in the provided text {are}"


def _number(kind: Kind, answers: int) -> tuple[str, str, str]:
    """Singular or plural: the article, the verb and the noun."""
    return ("A", "is", kind[:-1]) if answers == 1 else ("Some", "are", kind)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


DocumentKind = Literal["single", "multikey", "multivalue", "multiquery"]
DOCUMENT_KINDS: tuple[DocumentKind, ...] = ("single", "multikey", "multivalue", "multiquery")


@dataclass(frozen=True)
class NeedleDocument:
    """A training document: the phrasing of the evaluation, and then the answers."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Characters [start, stop) of every question's answer in `text`, in order, with the space before it."""
    tokens: int


def needle_document(
    rng: random.Random,
    *,
    sentences: Sequence[str],
    nouns: Sequence[str],
    adjectives: Sequence[str],
    tokens: int,
    count_tokens: CountTokens,
    kinds: Sequence[DocumentKind] = DOCUMENT_KINDS,
    questions: int = 1,
) -> NeedleDocument:
    """A document of at most `tokens` tokens (no special ones) and nearly as many, its needles hidden in `sentences`.

    Chance picks the kind, the number of needles, the kinds of keys and values, the passage and whether the haystack
    is prose, noise or more needles. Up to `questions` different questions, each with its answer, stand at the end.
    Where the needles drawn do not fit, fewer are drawn.

    Raises TaskError when not even one needle and its question fit.
    """
    for fewer in range(8):
        layout = _Layout.draw(rng, rng.choice(list(kinds)), questions, fewer)
        haystack = Haystack(_passage(rng, sentences, tokens), nouns, adjectives)
        draw = _Draw(rng, layout.spec, haystack)
        ends = [layout.question_and_answer(draw, asked) for asked in layout.asked]
        tail = "".join(f"\n{ask}{answer}" for ask, answer in ends)
        head = preamble(layout.spec.value_kind, layout.answers_each)

        def render(size: int, head: str = head, draw: _Draw = draw, tail: str = tail) -> str:
            return f"{head}\n{draw.text(size)}{tail}"

        size = largest_fit(
            lambda n: count_tokens(render(n)),
            tokens,
            lowest=0 if layout.spec.haystack == "essay" else layout.spec.needles,
            slack=tokens // 100,
        )
        if size is not None:
            text = render(size)
            return NeedleDocument(text, tuple(_spans(text, ends)), count_tokens(text))
    raise TaskError(
        f"a needle document cannot be made {tokens} tokens long: one needle and its question do not fit. "
        "Use longer documents."
    )


@dataclass(frozen=True)
class _Layout:
    """What is hidden in a training document, and which keys each of its questions asks for."""

    spec: NiahSpec
    asked: tuple[tuple[int, ...], ...]

    @property
    def answers_each(self) -> int:
        return len(self.asked[0]) * self.spec.values

    @classmethod
    def draw(cls, rng: random.Random, kind: DocumentKind, questions: int, fewer: int) -> _Layout:
        """`fewer` is how often a larger layout did not fit."""
        key_kind: Kind = rng.choice(["words", "words", "words", "uuids"]) if not fewer else "words"
        value_kind: Kind = rng.choice(["numbers", "numbers", "uuids", "words"]) if not fewer else "numbers"
        many = max(2, rng.randint(2, 8) - 2 * fewer)
        haystack: Literal["noise", "essay", "needle"] = "essay"
        keys = values = queries = 1
        if kind == "single" or fewer > 3:
            haystack = rng.choice(["noise", "essay", "essay"])
        elif kind == "multikey":
            haystack = rng.choice(["essay", "needle"])
            keys = many
        elif kind == "multivalue":
            values, keys = min(many, 4), rng.randint(1, 2)
        else:
            keys = many
            queries = rng.randint(2, min(keys, 4))
        spec = NiahSpec(f"training {kind}", haystack, key_kind, value_kind, keys, values, queries)
        order = rng.sample(range(keys), keys)
        groups = [tuple(order[i : i + queries]) for i in range(0, keys - queries + 1, queries)]
        return cls(spec, tuple(groups[: max(1, questions)]))

    def question_and_answer(self, draw: _Draw, asked: Sequence[int]) -> tuple[str, str]:
        keys = [draw.keys[i] for i in asked]
        values = [value for i in asked for value in draw.values[i]]
        ask = question(self.spec.value_kind, keys, len(values))
        return ask + answer_prefix(self.spec.value_kind, keys, len(values)), f" {_listed(values)}."


def _spans(text: str, ends: Sequence[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    stop = len(text) - sum(len(ask) + len(answer) + 1 for ask, answer in ends)
    for ask, answer in ends:
        start = stop + 1 + len(ask)
        stop = start + len(answer)
        yield start, stop


def _passage(rng: random.Random, sentences: Sequence[str], tokens: int) -> list[str]:
    """Sentences from a random one on, around the end if need be: no more than `tokens` words are ever needed."""
    if not sentences:
        return []
    start = rng.randrange(len(sentences))
    taken: list[str] = []
    words = 0
    for i in range(len(sentences)):
        sentence = sentences[(start + i) % len(sentences)]
        taken.append(sentence)
        words += len(sentence.split())
        if words >= tokens:
            break
    return taken


_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'\u201c])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Rev|Hon|Gen|Col|Capt|Lt|Sir|Jr|Sr|vs|etc|viz|cf|No|Vol|Fig|i\.e|e\.g)\.$"
)


def split_sentences(text: str, limit: int | None = None) -> list[str]:
    """Sentences of English prose, each with its white space made single; the first `limit` of them.

    A rule of thumb, not a parser: a sentence ends at a stop before white space and a capital or digit, unless the
    stop belongs to a title or an initial. A blank line ends one always.
    """
    return list(islice(_sentences(text), limit))


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        start = 0
        for match in _SENTENCE_END.finditer(paragraph):
            if _ABBREVIATION.search(paragraph[max(start, match.start() - 8) : match.start() + 1]):
                continue
            yield " ".join(paragraph[start : match.end()].split())
            start = match.end()
        if rest := " ".join(paragraph[start:].split()):
            yield rest
