"""The long question-answering tasks for lm-eval: RULER's SQuADQA and HotpotQA, built from local files.

What a YAML of tasks/longqa names: `load` builds the examples, `process_results` scores one. The first file that is
there is read, under the folder the user gives (`--data DIR`, or metadata `data=DIR`):

    squad   DIR/squad/dev.parquet, DIR/squad.parquet, DIR/squad/dev.jsonl, DIR/squad.jsonl,
            DIR/squad/dev-v2.0.json, DIR/dev-v2.0.json, DIR/squad/dev-v1.1.json, DIR/dev-v1.1.json
    hotpot  DIR/multihop/hotpotqa*.parquet, DIR/hotpotqa*.parquet, DIR/multihop/hotpotqa*.jsonl, DIR/hotpotqa*.jsonl,
            DIR/hotpotqa/hotpot_dev_distractor_v1.json, DIR/hotpot_dev_distractor_v1.json

JSON files are in their publishers' layout. A row of parquet or jsonl has `question`, `answers` (a list of strings, a
string, or {text: [...]}) and, for squad, `context` and perhaps `title`; for hotpot, `paragraphs` with
`paragraph_titles` and perhaps `supporting_titles`, or the hub's `context` and `supporting_facts`. Without a folder,
RULER's sources are read from the hub (rajpurkar/squad_v2, hotpotqa/hotpot_qa).
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from refine_harness.errors import TaskError, suggest
from refine_harness.evaluation.generation import TOGETHER, Doc, GeneratorSettings, by_length, doc, first_line
from refine_harness.evaluation.scorers import string_match_part
from refine_harness.synthetic.fitting import CountTokens, Example
from refine_harness.synthetic.questions import ANSWER_TOKENS, make_multidoc

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

CorpusName = Literal["squad", "hotpot"]

FILES: dict[CorpusName, tuple[str, ...]] = {
    "squad": (
        "squad/dev.parquet",
        "squad.parquet",
        "squad/dev.jsonl",
        "squad.jsonl",
        "squad/dev-v2.0.json",
        "dev-v2.0.json",
        "squad/dev-v1.1.json",
        "dev-v1.1.json",
    ),
    "hotpot": (
        "multihop/hotpotqa*.parquet",
        "hotpotqa*.parquet",
        "multihop/hotpotqa*.jsonl",
        "hotpotqa*.jsonl",
        "hotpotqa/hotpot_dev_distractor_v1.json",
        "hotpot_dev_distractor_v1.json",
    ),
}
"""Names looked for under the data folder, in this order; of several files that fit a pattern, the first by name."""

HUB: dict[CorpusName, tuple[str, str | None]] = {
    "squad": ("rajpurkar/squad_v2", None),
    "hotpot": ("hotpotqa/hotpot_qa", "distractor"),
}
"""Data set and subset on the hub, of which the validation split is read."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One question; paragraphs are places in `Corpus.paragraphs`."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """Paragraphs that answer it; all of the row's own where the data does not say which."""
    near: tuple[int, ...]
    """Paragraphs that RULER takes next: of the same article (squad), the question's own distractors (hotpot)."""


@dataclass(frozen=True)
class Corpus:
    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]
    """Every paragraph of the data once; the distractors of every question."""


def load(*, corpus: CorpusName, **metadata: Any) -> dict[str, Dataset]:
    """Examples of RULER's question answering over many documents, the same whatever else is loaded.

    As RULER does, the first `samples` questions of the data are asked; `limit` takes as many of them at random, so
    that a short run does not ask about one article only. Questions whose own paragraphs do not fit into a length are
    replaced by later ones, and their number is logged.

    Columns: index (of the question), length (as asked), prompt, answers, tokens (prompt and room for the answer).
    Raises TaskError: no data, unreadable data, no tokenizer, a length too small for every question.
    """
    if corpus not in get_args(CorpusName):
        raise TaskError(f"{corpus} is not a question corpus; known are {', '.join(FILES)}.{suggest(corpus, FILES)}")
    settings = GeneratorSettings.read(metadata)
    counter = settings.token_counter(f"refine_longqa_{corpus}")
    data = read_corpus(corpus, settings.data)

    def examples(length: int) -> Iterator[Doc]:
        def make(index: int, count_tokens: CountTokens) -> Example:
            question = data.questions[index]
            return make_multidoc(
                question.text,
                [data.paragraphs[i] for i in question.gold],
                data.paragraphs,
                answers=question.answers,
                near=[data.paragraphs[i] for i in question.near],
                tokens=length,
                count_tokens=count_tokens,
                seed=settings.seed_of(corpus, length, index),
                fill=True,
            )

        made = skipped = 0
        wanted = min(settings.count, len(data.questions))
        asked = _asked(len(data.questions), settings, corpus, length)
        while batch := list(islice(asked, min(wanted - made, TOGETHER))):  # never one that might not be needed
            makers = [partial(make, index) for index in batch]
            for index, example in zip(batch, counter.tried(makers, ANSWER_TOKENS), strict=True):
                if isinstance(example, TaskError):
                    skipped += 1
                    if not made and skipped == min(settings.samples, len(data.questions)):
                        raise TaskError(
                            f"refine_longqa_{corpus} finds no question that fits into {length} tokens. "
                            f"The last: {example}"
                        )
                    continue
                made += 1
                yield doc(example, index, length)
        if skipped:
            log.warning("refine_longqa_%s: %d questions exceed %d tokens; others are asked", corpus, skipped, length)

    return by_length(f"refine_longqa_{corpus}", settings.lengths, examples)


def _asked(n: int, settings: GeneratorSettings, corpus: str, length: int) -> Iterator[int]:
    """Indices of questions in the order of asking: RULER's first `samples`, shuffled; then, as a reserve, the rest."""
    first = list(range(min(n, settings.samples)))
    random.Random(f"{settings.seed}/{corpus}/{length}/order").shuffle(first)
    yield from first
    yield from range(len(first), n)


def process_results(example: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if any right answer is found, under the name of the example's length."""
    return {str(example["length"]): string_match_part(results[0], example["answers"])}


@lru_cache(maxsize=4)
def read_corpus(name: CorpusName, folder: str | None) -> Corpus:
    """Questions and paragraphs from the user's folder, or from the hub without one. Raises TaskError."""
    if folder is None:
        return _read(_squad_row if name == "squad" else _hotpot_row, _hub_rows(name), _hub_name(name))
    path = find_file(name, folder)
    if path.suffix == ".json":
        rows = _well_formed(_published_squad(path) if name == "squad" else _published_hotpot(path), path)
    else:
        rows = read_rows(path)
    return _read(_squad_row if name == "squad" else _hotpot_row, rows, str(path))


def find_file(name: CorpusName, folder: str) -> Path:
    """The first of `FILES` that is under `folder`. Raises TaskError, saying what was looked for."""
    for pattern in FILES[name]:
        if found := sorted(path for path in Path(folder).glob(pattern) if path.is_file()):
            return found[0]
    what = "folder" if Path(folder).is_dir() else "folder (there is no such folder)"
    raise TaskError(
        f"refine_longqa_{name} found none of its files under the data {what} {folder}; looked for "
        f"{', '.join(FILES[name])}. Put one there, or name another folder with --data."
    )


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet or jsonl file. Raises TaskError when it is corrupt."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
                yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> TaskError:
    return TaskError(f"{path} cannot be read ({first_line(error)}). Replace it, or name another data folder.")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _published_squad(path: Path) -> Iterator[Row]:
    """SQuAD 1.1 or 2.0 as published: articles, paragraphs, questions; RULER leaves out the unanswerable."""
    for article in _json(path)["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield {
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]],
                }


def _published_hotpot(path: Path) -> Iterator[Row]:
    """HotpotQA's distractor setting as published: ten titled lists of sentences a question."""
    for row in _json(path):
        yield {
            "question": row["question"],
            "answers": [row["answer"]],
            "paragraph_titles": [title for title, _ in row["context"]],
            "paragraphs": ["".join(sentences) for _, sentences in row["context"]],
            "supporting_titles": [title for title, _ in row.get("supporting_facts") or ()],
        }


def _well_formed(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    try:
        yield from rows
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TaskError(
            f"{path} is not in the layout it was published in ({type(error).__name__}: {first_line(error)}). "
            "Take the publisher's file, or name another data folder."
        ) from None


def _hub_name(name: CorpusName) -> str:
    return f"the hub's {HUB[name][0]}"


def _hub_rows(name: CorpusName) -> Iterator[Row]:
    import datasets

    repository, subset = HUB[name]
    try:
        rows = datasets.load_dataset(repository, subset, split="validation")
    except Exception as error:  # the hub client raises many kinds: offline, not found, no room
        raise TaskError(
            f"refine_longqa_{name} was given no data folder, and {repository} could not be read from the hub "
            f"({first_line(error)}). Give --data DIR with one of {', '.join(FILES[name])}."
        ) from None
    for row in rows:
        yield dict(row)


class _Paragraphs:
    """Every paragraph once, by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(self, text: str) -> int:
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number


_RowReader = Callable[[Row, _Paragraphs], tuple[str, tuple[int, ...], tuple[int, ...]]]
"""A row to (article, gold, near); rows of one article get its other paragraphs as `near`."""


def _read(read_row: _RowReader, rows: Iterable[Row], where: str) -> Corpus:
    paragraphs = _Paragraphs()
    found: list[tuple[str, tuple[str, ...], str, tuple[int, ...], tuple[int, ...]]] = []
    articles: dict[str, dict[int, None]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            article, gold, near = read_row(row, paragraphs)
            text, answers = str(row["question"]), _answers(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TaskError(
                f"{where}, row {number} is not a question in a known layout ({type(error).__name__}: "
                f"{first_line(error)}); it has {', '.join(row) if isinstance(row, Mapping) else type(row).__name__}. "
                "Rows need question and answers, and context or paragraphs with paragraph_titles."
            ) from None
        if article:
            articles.setdefault(article, {}).update(dict.fromkeys(gold))
        if answers:
            found.append((text, answers, article, gold, near))
    if not found:
        raise TaskError(f"{where} holds no question with an answer. Name another data folder.")
    questions = tuple(
        Question(text, answers, gold, near or tuple(i for i in articles.get(article, ()) if i not in gold))
        for text, answers, article, gold, near in found
    )
    return Corpus(questions, tuple(paragraphs.texts))


def _answers(row: Row) -> tuple[str, ...]:
    value = row["answers"] if "answers" in row else [row["answer"]]
    if isinstance(value, Mapping):
        value = value["text"]
    values = [value] if isinstance(value, str) else list(value or ())
    return tuple(str(answer) for answer in values if str(answer).strip())


def _squad_row(row: Row, paragraphs: _Paragraphs) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    return str(row.get("title") or ""), (paragraphs.add(str(row["context"])),), ()


def _hotpot_row(row: Row, paragraphs: _Paragraphs) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    if "paragraphs" in row:
        titles, texts = list(row["paragraph_titles"]), list(row["paragraphs"])
        supporting = set(row.get("supporting_titles") or ())
    else:
        titles = list(row["context"]["title"])
        texts = ["".join(sentences) for sentences in row["context"]["sentences"]]
        supporting = set((row.get("supporting_facts") or {}).get("title") or ())
    numbers = [paragraphs.add(f"{title}\n{text}") for title, text in zip(titles, texts, strict=True)]
    gold = [number for number, title in zip(numbers, titles, strict=True) if title in supporting] or numbers
    return "", tuple(dict.fromkeys(gold)), tuple(dict.fromkeys(number for number in numbers if number not in gold))
