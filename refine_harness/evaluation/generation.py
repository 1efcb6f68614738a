"""What all generated tasks share: their settings, a tokenizer to count with, and their examples as a data set.

lm-eval hands the functions that build data one flat mapping (a YAML's metadata, the model's arguments, the command
line's `--metadata`), in which everything may be a string. `GeneratorSettings.read` is where it becomes typed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from refine_harness.data.tokenizer import WordEncoder, count_all
from refine_harness.errors import TaskError
from refine_harness.resources import find
from refine_harness.synthetic.fitting import CountTokens, Example

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

Doc = dict[str, Any]
"""One example as lm-eval sees it."""

T = TypeVar("T")
E = TypeVar("E", bound=Example)

SPLIT = "test"

TOGETHER = 64
"""Examples whose tokens are counted at once, on all cores."""


@dataclass(frozen=True)
class GeneratorSettings:
    """How many examples of which lengths are generated, and from what."""

    lengths: tuple[int, ...] = (4096,)
    """Tokens of prompt and answer together. Key `lengths`, or `max_seq_lengths` as lm-eval's own RULER says."""
    samples: int = 500
    """Examples per task and length, before `limit`."""
    limit: int | None = None
    """At most so many of them are made; they are the same with and without a limit."""
    seed: int = 42
    tokenizer: str | None = None
    """Folder or id whose tokenizer counts. Keys `tokenizer`, `pretrained` or `model`, in this order."""
    data: str | None = None
    """Folder with local data; shipped data is found from any folder (`configs/...`). Keys `data` or `data_dir`."""

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> GeneratorSettings:
        """Settings from lm-eval's mapping; keys that mean nothing here are passed over. Raises TaskError."""
        lengths = metadata.get("lengths") or metadata.get("max_seq_lengths") or cls.lengths
        if isinstance(lengths, str):
            lengths = [part for part in lengths.replace(",", " ").split() if part]
        if not isinstance(lengths, Sequence) or isinstance(lengths, str):
            lengths = [lengths]
        limit = metadata.get("limit")
        return cls(
            lengths=tuple(sorted({_positive(length, "lengths") for length in lengths})),
            samples=_positive(metadata.get("samples") or cls.samples, "samples"),
            limit=None if limit is None else _positive(limit, "limit"),
            seed=int(metadata.get("seed") or 0) if "seed" in metadata else cls.seed,
            tokenizer=_first(metadata, "tokenizer", "pretrained", "model"),
            data=data_folder(metadata),
        )

    @property
    def count(self) -> int:
        """Examples per task and length."""
        return self.samples if self.limit is None else min(self.samples, self.limit)

    def seed_of(self, task: str, length: int, index: int) -> str:
        """What decides one example: nothing but the base seed, the task, the length and the index."""
        return f"{self.seed}/{task}/{length}/{index}"

    def token_counter(self, task: str) -> TokenCounter:
        """Counts a text's tokens, without special ones. Raises TaskError when there is no usable tokenizer."""
        if self.tokenizer is None:
            raise TaskError(
                f"{task} needs a tokenizer to make prompts of a given length. "
                "Give metadata tokenizer=<model folder>, or a model with pretrained=<model folder>."
            )
        return token_counter(self.tokenizer)


def _positive(value: Any, name: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number <= 0 or (isinstance(value, float) and value != number):
        raise TaskError(f"{name} is {value!r}; expected a whole number above 0, or several separated by commas.")
    return number


def _first(metadata: Mapping[str, Any], *keys: str) -> str | None:
    for key in keys:
        if isinstance(value := metadata.get(key), str) and value:
            return value
    return None


def data_folder(metadata: Mapping[str, Any]) -> str | None:
    """The folder with local data that lm-eval's mapping names, or None."""
    named = _first(metadata, "data", "data_dir")
    return None if named is None else str(find(named, "configs"))


class TokenCounter:
    """Counts tokens as a tokenizer does: quickly while a size is searched, and exactly where one is found."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.quick: CountTokens = WordEncoder(tokenizer).count
        """From the counts of words, each of which is tokenized once; wrong only for texts of unforeseen kinds."""

    def exact(self, text: str) -> int:
        """The tokens of the whole text, without special ones."""
        return count_all(self._tokenizer, [text])[0]

    def fitted(self, makers: Iterable[Callable[[CountTokens], E]], answer_tokens: int) -> Iterator[E]:
        """The example of every maker, in order. Raises the TaskError of the first that cannot make one."""
        remaining = iter(makers)
        while batch := list(islice(remaining, TOGETHER)):
            for example in self.tried(batch, answer_tokens):
                if isinstance(example, TaskError):
                    raise example
                yield example

    def tried(self, makers: Sequence[Callable[[CountTokens], E]], answer_tokens: int) -> list[E | TaskError]:
        """For every maker the example that it makes with quick counts; where these are not exact, the one with exact
        counts; the TaskError, where it raises one. What a maker makes does not depend on the others."""
        drafts = [_tried(make, self.quick) for make in makers]
        prompts = [draft.prompt for draft in drafts if not isinstance(draft, TaskError)]
        exact = iter(count_all(self._tokenizer, prompts))
        return [
            draft
            if isinstance(draft, TaskError) or next(exact) + answer_tokens == draft.tokens
            else _tried(make, self.exact)
            for make, draft in zip(makers, drafts, strict=True)
        ]


def _tried(make: Callable[[CountTokens], E], count_tokens: CountTokens) -> E | TaskError:
    try:
        return make(count_tokens)
    except TaskError as error:
        return error


@lru_cache(maxsize=4)
def token_counter(source: str) -> TokenCounter:
    """Counts with the tokenizer at `source`, a model folder, an embedded model's name or a hub id. Raises TaskError."""
    from transformers import AutoTokenizer

    from refine_harness.models import EMBEDDED, resolve_model

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(source) if source == EMBEDDED else source, trust_remote_code=False
        )
    except Exception as error:  # many kinds for one cause: there is no tokenizer
        raise TaskError(
            f"no tokenizer can be read from {source} ({first_line(error)}). "
            "Give the folder of a model with its tokenizer."
        ) from None
    counter = TokenCounter(tokenizer)
    if counter.exact("The quick brown fox.") == 0:
        raise TaskError(
            f"the tokenizer of {source} makes no token of English text. Give the folder of a model with its tokenizer."
        )
    return counter


def doc(example: Example, index: int, length: int, **more: Any) -> Doc:
    """An example as lm-eval sees it.

    Columns: index, length (as asked), prompt, answers, tokens (prompt and room for the answer), and `more`.
    """
    return {
        "index": index,
        "length": length,
        "prompt": example.prompt,
        "answers": list(example.answers),
        "tokens": example.tokens,
        **more,
    }


def by_length(task: str, lengths: Iterable[int], make: Callable[[int], Iterable[Doc]]) -> dict[str, Dataset]:
    """The examples of every length, index by index, so that the first n of them spread over all lengths.

    lm-eval's own `limit` cuts the front of a task; this keeps it from cutting whole lengths away. The log says what
    was made: its number and the SHA-256 that a record of scores has, too.
    """
    columns = [_logged(task, length, list(make(length))) for length in lengths]
    rows = [row for rank in range(max(map(len, columns), default=0)) for row in _at(columns, rank)]
    return as_dataset(rows)


def _logged(task: str, length: int, rows: list[Doc]) -> list[Doc]:
    if log.isEnabledFor(logging.INFO):  # the hash takes seconds where prompts are long
        log.info("%s at %d tokens: %d examples, sha256 %s", task, length, len(rows), data_sha256(rows))
    return rows


def _at(columns: Sequence[Sequence[T]], rank: int) -> list[T]:
    return [column[rank] for column in columns if rank < len(column)]


def as_dataset(rows: Sequence[Doc]) -> dict[str, Dataset]:
    """Rows in memory, as the one split that tasks are scored on."""
    import datasets

    return {SPLIT: datasets.Dataset.from_list(list(rows), split=datasets.Split.TEST)}


def data_sha256(docs: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of examples in their order: what was asked and what would have been right, whoever generated it."""
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(json.dumps(doc, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for the middle of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
