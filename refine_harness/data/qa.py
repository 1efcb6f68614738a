"""Post-training: a long prompt to learn from as a document, and its short answer to learn by heart.

Rows give prompt and answer, or questions and paragraphs from which prompts of one length are built as
RULER builds them. Prompt and answer are tokenised apart, so that the place where the answer starts is exact and
the prompt's tokens are those that evaluation reads. The i-th example of a run is a function of the configuration, the
data and i alone.

Left out: which loss is taken where (training/).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from refine_harness.config import PostConfig
from refine_harness.data.batches import least_tokens, right_padded
from refine_harness.data.questions import EXPECTED, LongPrompts, Question, answer_texts, read_questions
from refine_harness.data.read import tables
from refine_harness.data.stream import Order, rank_positions
from refine_harness.data.tokenizer import WordEncoder, encode_all, id_dtype, pad_id
from refine_harness.errors import ConfigError, DataError
from refine_harness.types import Batch

_GIVEN = ("prompt", "answer")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PostBatch:
    """The same examples twice: as documents for the nested step, and with their answers."""

    prompts: Batch
    """Prompts alone."""
    answers: Batch
    """Prompt, answer and end token; `loss_from_B` is the first token of each answer."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class QaFacts:
    """What the data holds, for logs and records."""

    path: str
    rows: int
    examples: int
    """Rows that are used."""
    unanswered: int
    """Left out: no question or no answer."""
    long_answers: int
    """Left out: answer longer than answer_tokens."""
    long_prompts: int
    """Left out: prompt longer than prompt_tokens, or what answers the question alone is."""
    short_prompts: int
    """Left out: prompt too short for c positions and k tokens."""
    data_sha256: str
    """Of the rows in order."""

    @property
    def left_out(self) -> int:
        return self.rows - self.examples

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def posttrain_batches(
    config: PostConfig, tokenizer: Any, *, rank: int = 0, world_size: int = 1, start_batch: int = 0
) -> Iterator[PostBatch]:
    """The endless batches of one process, from number `start_batch` on: `Examples.batches` of data read now.

    Everything that can be wrong with the data is raised by this call, before the first batch is asked for.
    """
    return Examples(config, tokenizer).batches(rank=rank, world_size=world_size, start_batch=start_batch)


class Examples:
    """All examples of a post-training run.

    Raises ConfigError (prompts too short for c and k, no path) and DataError (data that cannot be used).
    """

    def __init__(self, config: PostConfig, tokenizer: Any) -> None:
        if config.data.path is None:
            raise ConfigError("post-training needs data: set data.path.")
        least = least_tokens(config.algorithm) if config.nested else 1
        if config.data.prompt_tokens < least:
            raise ConfigError(
                f"rollout_length={config.algorithm.rollout_length} and chunks={config.algorithm.chunks} need at least "
                f"{least} tokens; data.prompt_tokens is {config.data.prompt_tokens}. "
                f"Raise it, or lower algorithm.chunks or algorithm.rollout_length."
            )
        self.config = config
        self._pad = pad_id(tokenizer)
        ends = [[] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
        self._first, self._last = (np.array(end, dtype=id_dtype(tokenizer)) for end in ends)
        given = set(_GIVEN) <= set(next(tables(config.data.path)).columns)
        bounds = _Bounds(
            path=config.data.path,
            shortest=least - len(self._first),
            longest=config.data.prompt_tokens - len(self._first),
            answer=config.data.answer_tokens,
        )
        self._source: _Source = (_Given if given else _Built)(bounds, tokenizer, config.seed)
        self.facts = self._source.facts
        if not self.facts.examples:
            facts = self.facts
            raise DataError(
                f"{facts.path} has no example to train on: of {facts.rows} rows {facts.unanswered} have no answer, "
                f"{facts.long_answers} have one longer than answer_tokens={config.data.answer_tokens}, and the prompts "
                f"of {facts.long_prompts} are longer than prompt_tokens={config.data.prompt_tokens}, of "
                f"{facts.short_prompts} shorter than {least} tokens. Change data.prompt_tokens or data.answer_tokens."
            )
        self._order = Order(self.facts.examples, config.seed)

    def batch(self, number: int, *, rank: int = 0, world_size: int = 1) -> PostBatch:
        """Batch `number` of process `rank`: batch.sequences / world_size examples, optimizer steps in order."""
        batching = self.config.batch
        positions = rank_positions(
            number, sequences=batching.sequences, steps=batching.steps, rank=rank, world_size=world_size
        )
        prompts, answers = [], []
        for position in positions:
            prompt, answer = self._source.example(self._order.example_index(position)[1], position)
            prompts.append(np.concatenate((self._first, prompt)))
            answers.append(np.concatenate((prompts[-1], answer, self._last)))
        starts = [len(prompt) for prompt in prompts]
        return PostBatch(right_padded(prompts, self._pad), right_padded(answers, self._pad, loss_from=starts))

    def batches(self, *, rank: int = 0, world_size: int = 1, start_batch: int = 0) -> Iterator[PostBatch]:
        """Endless batches from number `start_batch` on. Raises ConfigError at once where they cannot be shared."""
        batching = self.config.batch
        rank_positions(0, sequences=batching.sequences, steps=batching.steps, rank=rank, world_size=world_size)
        return self._batches(rank, world_size, start_batch)

    def _batches(self, rank: int, world_size: int, number: int) -> Iterator[PostBatch]:
        while True:
            yield self.batch(number, rank=rank, world_size=world_size)
            number += 1


@dataclass(frozen=True)
class _Bounds:
    """Lengths in tokens, first and end token not counted."""

    path: str
    shortest: int
    longest: int
    answer: int


class _Source(Protocol):
    facts: QaFacts

    def example(self, index: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of prompt and answer of example `index`; `position` seeds what is drawn about it."""
        ...


class _Given:
    """Rows that hold prompt and answer as they are to be used."""

    def __init__(self, bounds: _Bounds, tokenizer: Any, seed: int) -> None:
        self._examples: list[tuple[np.ndarray, np.ndarray]] = []
        digest = hashlib.sha256()
        rows = unanswered = long_answers = long_prompts = short_prompts = 0
        for chunk in _chunks(_given_rows(bounds.path)):
            rows += len(chunk)
            for prompt, answer in chunk:
                digest.update(json.dumps([prompt, answer]).encode())
            full = [(prompt, answer) for prompt, answer in chunk if prompt.strip() and answer.strip()]
            unanswered += len(chunk) - len(full)
            prompts = encode_all(tokenizer, [prompt for prompt, _ in full])
            answers = encode_all(tokenizer, [_apart(prompt, answer) for prompt, answer in full])
            for prompt, answer in zip(prompts, answers, strict=True):
                if len(answer) > bounds.answer:
                    long_answers += 1
                elif len(prompt) > bounds.longest:
                    long_prompts += 1
                elif len(prompt) < bounds.shortest:
                    short_prompts += 1
                else:
                    self._examples.append((prompt, answer))
        if not rows:
            raise DataError(f"{bounds.path} is empty: there is no row of data in it. Put data there.")
        self.facts = QaFacts(
            path=bounds.path,
            rows=rows,
            examples=len(self._examples),
            unanswered=unanswered,
            long_answers=long_answers,
            long_prompts=long_prompts,
            short_prompts=short_prompts,
            data_sha256=digest.hexdigest(),
        )

    def example(self, index: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        return self._examples[index]


class _Built:
    """Prompts built from questions and paragraphs, filled anew every time a question is asked."""

    def __init__(self, bounds: _Bounds, tokenizer: Any, seed: int) -> None:
        found = read_questions(bounds.path, expected=f"prompt, answer; or {EXPECTED}")
        self._words = WordEncoder(tokenizer)
        self._prompts = LongPrompts(found, self._words, tokenizer)
        self._bounds, self._seed = bounds, seed
        answers = encode_all(tokenizer, [_apart("Answer:", question.answers[0]) for question in found.questions])
        self._examples: list[tuple[Question, np.ndarray]] = []
        long_answers = long_prompts = 0
        for number, (question, answer) in enumerate(zip(found.questions, answers, strict=True)):
            if len(answer) > bounds.answer:
                long_answers += 1
            elif self._prompts.least(number) > bounds.longest:
                long_prompts += 1
            else:
                self._examples.append((question, answer))
        self.facts = QaFacts(
            path=bounds.path,
            rows=found.rows,
            examples=len(self._examples),
            unanswered=found.unanswered,
            long_answers=long_answers,
            long_prompts=long_prompts,
            short_prompts=0,
            data_sha256=found.sha256,
        )

    def example(self, index: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        question, answer = self._examples[index]
        seed = f"{self._seed}/{position}/prompt"
        prompt = self._prompts.build([question], tokens=self._bounds.longest, room=0, seed=seed)
        assert prompt is not None, f"{question.text} was counted as one that fits"
        ids = self._words.encode([prompt])[0]
        if len(ids) < self._bounds.shortest:
            raise DataError(
                f"{self._bounds.path}: the prompt of {question.text!r} has {len(ids)} tokens, fewer than the "
                f"{self._bounds.shortest} that algorithm.chunks and algorithm.rollout_length need. Lower them."
            )
        return ids, answer


def _given_rows(path: str) -> Iterator[tuple[str, str]]:
    for table in tables(path):
        for row in table.rows(_GIVEN):
            answers = answer_texts(row["answer"])
            yield str(row["prompt"] or ""), answers[0] if answers else ""


def _apart(prompt: str, answer: str) -> str:
    """The answer with a space before it, unless the prompt ends with white space or the answer starts with it."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def _chunks(rows: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _ROWS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
