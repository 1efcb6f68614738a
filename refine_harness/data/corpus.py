"""Mid-training: windows of long texts, generated needle documents and many-paragraph questions, in any mixture.

The i-th document of a run is a function of the configuration, the data and i alone, so a run can be resumed at
any batch, and the global order is the same for every number of processes. Every document starts with
the tokenizer's first token if it has one. A window of text has exactly `window` tokens; a generated document
has at most so many and ends with the end token.

Left out: optimizer steps and micro-batches, which the trainer cuts a batch into, in its order.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch.utils.data

from refine_harness.config import Algorithm, MidConfig, Source
from refine_harness.data.batches import least_tokens, right_padded
from refine_harness.data.questions import LongPrompts, Question, read_questions
from refine_harness.data.read import Excluded, tables
from refine_harness.data.stream import Mixture, Order, rank_positions
from refine_harness.data.tokenizer import WordEncoder, encode_all, id_dtype, pad_id
from refine_harness.errors import ConfigError, DataError, TaskError
from refine_harness.resources import resource
from refine_harness.synthetic.needles import needle_document, split_sentences
from refine_harness.synthetic.questions import ANSWER_PREFIX
from refine_harness.types import Batch

_CHARACTERS_AT_ONCE = 4_000_000
_STREAMED_HAYSTACK = 20_000_000
"""Characters read for needles from a data set that comes over the network."""
_MOST_QUESTIONS = 4
"""Questions at the end of one generated document."""


@dataclass(frozen=True)
class SourceFacts:
    """What one source holds, for logs and records."""

    kind: str
    path: str
    rows: int
    """Rows read."""
    excluded: int
    """Rows left out because `exclude` names them."""
    left_out: int
    """Rows too short for a window (text), without an answer, or too long for a window (questions)."""
    documents: int
    """Rows that are used."""
    windows: int
    """Windows of text; 0 for generated documents, which have no end."""
    tokens: int
    """Tokens in those windows; of generated documents, tokens of the text they are made of are not counted."""
    sha256: str
    """Of the rows that were kept, in order."""


@dataclass(frozen=True)
class CorpusFacts:
    """What all sources hold, for logs and records."""

    documents: int
    windows: int
    left_out: int
    tokens: int
    data_sha256: str
    sources: tuple[SourceFacts, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class DocumentSource(Protocol):
    """One source of documents."""

    facts: SourceFacts

    def documents(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Token ids of the documents with these numbers (0, 1, ... in the order they are trained on)."""
        ...


def check_window(window: int, algorithm: Algorithm) -> None:
    """Raises ConfigError when a document of `window` tokens is too short for the algorithm."""
    if window < least_tokens(algorithm):
        if algorithm.lambda_rl == 0:
            raise ConfigError(f"data.window = {window} holds no token to predict from another. Raise it.")
        raise ConfigError(
            f"rollout_length={algorithm.rollout_length} and chunks={algorithm.chunks} need at least "
            f"{least_tokens(algorithm)} tokens; window is {window}. "
            f"Raise data.window, or lower algorithm.chunks or algorithm.rollout_length."
        )


def midtrain_batches(
    config: MidConfig, tokenizer: Any, *, rank: int = 0, world_size: int = 1, start_batch: int = 0, workers: int = 0
) -> Iterator[Batch]:
    """The endless batches of one process, from number `start_batch` on: `Corpus.batches` of a corpus read now.

    Everything that can be wrong with the data is raised by this call, before the first batch is asked for.
    """
    corpus = Corpus(config, tokenizer)
    return corpus.batches(rank=rank, world_size=world_size, start_batch=start_batch, workers=workers)


class Corpus:
    """All documents of a mid-training run, read and tokenised once.

    Raises ConfigError (window too small for c and k, no source) and DataError (data that cannot be used).
    """

    def __init__(self, config: MidConfig, tokenizer: Any) -> None:
        check_window(config.data.window, config.algorithm)
        if not config.data.all_sources:
            raise ConfigError("mid-training needs data: set data.path or data.sources.")
        self.config = config
        self._pad = pad_id(tokenizer)
        self._mixture = Mixture([source.weight for source in config.data.all_sources], config.seed)
        needed = self._mixture.counts(config.steps * config.batch.per_step)
        self.sources = [
            _open(source, tokenizer, config, place, needed[place])
            for place, source in enumerate(config.data.all_sources)
        ]

    @property
    def facts(self) -> CorpusFacts:
        """Counts and hashes over all sources."""
        facts = tuple(source.facts for source in self.sources)
        hashes = [fact.sha256 for fact in facts]
        return CorpusFacts(
            documents=sum(fact.documents for fact in facts),
            windows=sum(fact.windows for fact in facts),
            left_out=sum(fact.left_out for fact in facts),
            tokens=sum(fact.tokens for fact in facts),
            data_sha256=hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
            sources=facts,
        )

    def batch(self, number: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """Batch `number` of process `rank`: batch.sequences / world_size documents, optimizer steps in order."""
        batching = self.config.batch
        positions = rank_positions(
            number, sequences=batching.sequences, steps=batching.steps, rank=rank, world_size=world_size
        )
        wanted: dict[int, list[tuple[int, int]]] = {}
        for row, position in enumerate(positions):
            source, nth = self._mixture.pick(position)
            wanted.setdefault(source, []).append((row, nth))
        rows: list[np.ndarray] = [np.empty(0)] * len(positions)
        for source, places in wanted.items():
            documents = self.sources[source].documents([nth for _, nth in places])
            for (row, _), document in zip(places, documents, strict=True):
                rows[row] = document
        return right_padded(rows, self._pad)

    def batches(self, *, rank: int = 0, world_size: int = 1, start_batch: int = 0, workers: int = 0) -> Iterator[Batch]:
        """Endless batches from number `start_batch` on.

        `workers` > 0 makes batches ahead of time in that many processes, in the same order and with the same
        content; it pays where generated documents cannot keep up with a GPU. Raises ConfigError at once where a
        batch cannot be shared by the processes.
        """
        batching = self.config.batch
        rank_positions(0, sequences=batching.sequences, steps=batching.steps, rank=rank, world_size=world_size)
        return self._batches(rank, world_size, start_batch, workers)

    def _batches(self, rank: int, world_size: int, start_batch: int, workers: int) -> Iterator[Batch]:
        if not workers:
            number = start_batch
            while True:
                yield self.batch(number, rank=rank, world_size=world_size)
                number += 1
        numbered = _Numbered(self, rank, world_size)
        yield from torch.utils.data.DataLoader(
            numbered,
            batch_size=None,
            sampler=range(start_batch, 1 << 62),
            num_workers=workers,
            worker_init_fn=_quiet_worker,
            multiprocessing_context="fork",
        )


class _Numbered(torch.utils.data.Dataset[Batch]):
    """The batches of one process by number, for DataLoader's workers."""

    def __init__(self, corpus: Corpus, rank: int, world_size: int) -> None:
        self._corpus, self._rank, self._world_size = corpus, rank, world_size

    def __getitem__(self, number: int) -> Batch:
        return self._corpus.batch(number, rank=self._rank, world_size=self._world_size)


def _quiet_worker(_: int) -> None:
    # A forked tokenizer must not use threads; it warns unless it is told so.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _open(source: Source, tokenizer: Any, config: MidConfig, place: int, needed: int) -> DocumentSource:
    # Two sources over the same text must not walk through it in step.
    seed = config.seed + 1_000_003 * place
    if source.kind == "text":
        return _Windows(source, tokenizer, config.data.window, seed, needed)
    if source.kind == "needles":
        return _Needles(source, tokenizer, config, seed)
    return _Questions(source, tokenizer, config, seed)


@dataclass
class _Kept:
    """The texts of a source one by one, counted and hashed."""

    source: Source
    rows: int = 0
    excluded: int = 0
    streamed: bool = False
    digest: Any = field(default_factory=hashlib.sha256)

    def __iter__(self) -> Iterator[str]:
        column, path = self.source.text_column, str(self.source.path)
        excluded = Excluded(self.source.exclude)
        for table in tables(path):
            self.streamed = table.streamed
            # A txt file has one text, whatever the column of other files is called.
            name = "text" if table.columns == ("id", "text") else column
            for row in table.rows((name,), optional=("id", "title")) if table.columns else ():
                self.rows += 1
                if row in excluded:
                    self.excluded += 1
                    continue
                text = row[name]
                if not isinstance(text, str):
                    raise DataError(
                        f"{table.name}: column {name} holds a {type(text).__name__}; expected text. "
                        f"Name another column with text_column."
                    )
                self.digest.update(json.dumps([row.get("id"), text]).encode())
                yield text
        if self.rows == 0:
            raise DataError(f"{path} is empty: there is no row of text in it. Put text there or name another path.")
        if self.rows == self.excluded:
            raise DataError(f"{path} has no row left: {self.source.exclude} excludes all {self.rows}.")


class _Windows:
    """Non-overlapping windows of long texts. Every epoch visits each window once, in an order of its own."""

    def __init__(self, source: Source, tokenizer: Any, window: int, seed: int, needed: int) -> None:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._first = np.array(bos, dtype=id_dtype(tokenizer))
        self._span = window - len(bos)
        if self._span < 1:
            raise ConfigError(f"data.window = {window} has no room for text beside the first token. Raise it.")
        self._texts: list[np.ndarray] = []
        places: list[tuple[int, int]] = []
        kept, longest, short = _Kept(source), 0, 0
        for ids in _encoded(kept, tokenizer):
            longest = max(longest, len(ids) + len(bos))
            windows = len(ids) // self._span
            if not windows:
                short += 1
                continue
            places += [(len(self._texts), start * self._span) for start in range(windows)]
            self._texts.append(ids[: windows * self._span].copy())
            # What comes over the network is read only as far as this run needs it.
            if kept.streamed and len(places) >= needed:
                break
        if not places:
            raise DataError(
                f"documents in {source.path} are all shorter than window={window} (longest: {longest} tokens). "
                f"Lower data.window or choose another corpus."
            )
        self._places = np.array(places, dtype=np.int64)
        self._order = Order(len(places), seed)
        self.facts = SourceFacts(
            kind="text",
            path=str(source.path),
            rows=kept.rows,
            excluded=kept.excluded,
            left_out=short,
            documents=len(self._texts),
            windows=len(places),
            tokens=len(places) * window,
            sha256=kept.digest.hexdigest(),
        )

    def documents(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return [self._window(self._order.example_index(number)[1]) for number in numbers]

    def _window(self, index: int) -> np.ndarray:
        text, start = self._places[index]
        return np.concatenate((self._first, self._texts[text][start : start + self._span]))


def _encoded(texts: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids of texts, several texts at once."""
    waiting: list[str] = []
    characters = 0
    for text in texts:
        waiting.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield from encode_all(tokenizer, waiting)
            waiting, characters = [], 0
    yield from encode_all(tokenizer, waiting)


class _Generated:
    """What generated documents share: a length of their own, a first and an end token, an exact bound."""

    def __init__(self, tokenizer: Any, config: MidConfig, seed: int) -> None:
        self._words = WordEncoder(tokenizer)
        ends = [[] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
        self._first, self._last = (np.array(end, dtype=id_dtype(tokenizer)) for end in ends)
        self._seed = seed
        self._window = config.data.window
        around = len(self._first) + len(self._last)
        self._longest = self._window - around
        """Tokens of the longest text."""
        self._least = least_tokens(config.algorithm) - around
        """Tokens that a text must have for the algorithm's positions."""
        self._shortest = min(max(self._window // 4 - around, self._least, 1), self._longest)
        if self._longest < 1:
            raise ConfigError(f"data.window = {self._window} has no room for text. Raise it.")

    def documents(self, numbers: Sequence[int]) -> list[np.ndarray]:
        encoded = self._words.encode([self.text(number, self._shortest) for number in numbers])
        return [
            np.concatenate((self._first, self._bounded(number, ids), self._last))
            for number, ids in zip(numbers, encoded, strict=True)
        ]

    def text(self, number: int, shortest: int) -> str:
        """Document `number`, filled to a length drawn between `shortest` and the longest. Raises DataError."""
        raise NotImplementedError

    def _bounded(self, number: int, ids: np.ndarray) -> np.ndarray:
        if len(ids) < self._least:
            ids = self._words.encode([self.text(number, self._longest)])[0]
        assert self._least <= len(ids) <= self._longest, (self._least, len(ids), self._longest)
        return ids

    def _random(self, number: int) -> random.Random:
        return random.Random(f"{self._seed}/{number}")


class _Needles(_Generated):
    """Endless needle-in-a-haystack documents; the prose among them is the source's text."""

    def __init__(self, source: Source, tokenizer: Any, config: MidConfig, seed: int) -> None:
        super().__init__(tokenizer, config, seed)
        kept, characters = _Kept(source), 0
        self._sentences: list[str] = []
        for text in kept:
            self._sentences += split_sentences(text)
            characters += len(text)
            if kept.streamed and characters >= _STREAMED_HAYSTACK:
                break
        words = json.loads((resource("tasks") / "niah/data/words.json").read_text(encoding="utf-8"))
        self._nouns, self._adjectives = words["nouns"], words["adjectives"]
        self.text(0, self._longest)
        self.facts = SourceFacts(
            kind="needles",
            path=str(source.path),
            rows=kept.rows,
            excluded=kept.excluded,
            left_out=0,
            documents=kept.rows - kept.excluded,
            windows=0,
            tokens=0,
            sha256=kept.digest.hexdigest(),
        )

    def text(self, number: int, shortest: int) -> str:
        rng = self._random(number)
        questions = rng.randint(1, _MOST_QUESTIONS)
        for tokens in (rng.randint(shortest, self._longest), self._longest):
            try:
                return needle_document(
                    rng,
                    sentences=self._sentences,
                    nouns=self._nouns,
                    adjectives=self._adjectives,
                    tokens=tokens,
                    count_tokens=self._words.count,
                    questions=questions,
                ).text
            except TaskError:
                continue
        raise DataError(
            f"window={self._window} is too short for needle documents: not even one needle and its question fit. "
            f"Raise data.window or leave out the source of kind needles."
        )


class _Questions(_Generated):
    """Documents of many paragraphs that end with one or more questions and their answers.

    Every epoch asks each question first in one document; what it is asked among is drawn anew.
    """

    def __init__(self, source: Source, tokenizer: Any, config: MidConfig, seed: int) -> None:
        super().__init__(tokenizer, config, seed)
        found = read_questions(str(source.path), exclude=source.exclude)
        self._prompts = LongPrompts(found, self._words, tokenizer)
        self._questions = found.questions
        self._neighbours: dict[int, list[int]] = {}
        usable: list[int] = []
        for number, question in enumerate(found.questions):
            if self._prompts.least(number) + self._words.count(f" {question.answers[0]}") <= self._longest:
                usable.append(number)
                self._neighbours.setdefault(question.group, []).append(number)
        if not usable:
            raise DataError(
                f"no question of {source.path} fits into window={self._window} with the paragraphs that answer it. "
                f"Raise data.window or choose other questions."
            )
        self._usable = usable
        self._order = Order(len(usable), seed)
        self.facts = SourceFacts(
            kind="questions",
            path=str(source.path),
            rows=found.rows,
            excluded=found.excluded,
            left_out=found.unanswered + len(found.questions) - len(usable),
            documents=len(usable),
            windows=0,
            tokens=0,
            sha256=found.sha256,
        )

    def text(self, number: int, shortest: int) -> str:
        rng = self._random(number)
        first = self._usable[self._order.example_index(number)[1]]
        group = self._questions[first].group
        # Questions about one article or story share paragraphs; a row with paragraphs of its own has no such others.
        pool = self._neighbours[group] if len(self._neighbours[group]) > 1 else self._usable
        more = rng.sample(pool, min(len(pool), rng.randint(0, _MOST_QUESTIONS - 1)))
        asked = [first, *(other for other in more if other != first)]
        tokens, seed = rng.randint(shortest, self._longest), f"{self._seed}/{number}/prompt"
        for length, count in [*((tokens, n) for n in range(len(asked), 0, -1)), (self._longest, 1)]:
            questions = [self._questions[place] for place in asked[:count]]
            ending = _answers(questions)
            room = self._words.count(ending) + 1
            if (prompt := self._prompts.build(questions, tokens=length, room=room, seed=seed)) is not None:
                return prompt + ending
        raise AssertionError(f"question {first} was counted as one that fits")


def _answers(questions: Sequence[Question]) -> str:
    """The first question's answer, then the other questions with theirs."""
    first, *others = questions
    more = (f"\n\nQuestion: {question.text}{ANSWER_PREFIX} {question.answers[0]}" for question in others)
    return f" {first.answers[0]}{''.join(more)}"
