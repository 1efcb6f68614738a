"""Questions and the paragraphs that answer them, from any of the layouts that data sets use.

    context, question, answers                  one paragraph a row (SQuAD); `title` names its article
    question, answers, paragraphs               a list a row (HotpotQA, MuSiQue); `paragraph_titles`,
                                                `supporting_titles` say which of them are needed
    story_id, question, answers, section_index  with stories (id, sections) in a file beside (FairytaleQA)

`answers` is a string, a list of strings, or SQuAD's {text: [...]}; the first one is what training says.
Left out: how a prompt is written (synthetic/questions.py) and how long it is (corpus.py, qa.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from refine_harness.data.read import Excluded, Row, Table, tables
from refine_harness.data.tokenizer import WordEncoder, count_all
from refine_harness.errors import DataError, TaskError
from refine_harness.synthetic.questions import make_multidoc, prompt

_OPTIONAL = ("id", "title")
LAYOUTS = (
    ("context", "question", "answers"),
    ("question", "answers", "paragraphs"),
    ("story_id", "question", "answers", "section_index"),
    ("id", "sections"),
)
EXPECTED = "context, question, answers; or question, answers, paragraphs; or story_id, question, answers, section_index"


@dataclass(frozen=True)
class Question:
    """One question; paragraphs are numbers into `QuestionSet.paragraphs`."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """Paragraphs that answer it; all of the row's own where the data does not say which."""
    group: int
    """Which of `QuestionSet.groups` it belongs to; -1 for none."""


@dataclass
class QuestionSet:
    """Questions of one source and the pool that distractors are drawn from."""

    questions: list[Question] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    """Paragraphs that belong together: of one article, one story, or one row."""
    rows: int = 0
    excluded: int = 0
    unanswered: int = 0
    """Rows without an answer or a question, left out."""
    sha256: str = ""
    """Of the rows that were kept, in order."""
    _numbers: dict[str, int] = field(default_factory=dict)

    def add_paragraph(self, text: str) -> int:
        """The number of a paragraph, the same for the same text."""
        number = self._numbers.setdefault(text, len(self.paragraphs))
        if number == len(self.paragraphs):
            self.paragraphs.append(text)
        return number


class LongPrompts:
    """RULER's prompts over the paragraphs of a question set, filled to a length in tokens.

    The paragraphs that answer come first, then others of the same article, story or row, then any of the set.
    """

    _MARGIN = 8
    """Tokens by which the sum of a prompt's parts may differ from the whole."""

    def __init__(self, found: QuestionSet, words: WordEncoder, tokenizer: Any) -> None:
        self.found = found
        self._count = words.count
        self._empty = words.count(prompt("", [""])) + self._MARGIN
        self._heading = words.count("\n\nDocument 1000:\n")
        self._paragraphs = count_all(tokenizer, found.paragraphs)
        self._questions = count_all(tokenizer, [question.text for question in found.questions])
        self._typical = self._heading + sum(self._paragraphs) / max(1, len(self._paragraphs))

    def least(self, number: int) -> int:
        """About how many tokens question `number` takes with nothing but the paragraphs that answer it (no fewer)."""
        gold = self.found.questions[number].gold
        return self._empty + self._questions[number] + sum(self._heading + self._paragraphs[place] for place in gold)

    def build(self, asked: Sequence[Question], *, tokens: int, room: int, seed: str) -> str | None:
        """A prompt for the first of `asked` that holds what all of them need, and with `room` more at most `tokens`.

        None where that does not fit.
        """
        paragraphs = self.found.paragraphs
        gold = dict.fromkeys(place for question in asked for place in question.gold)
        groups = dict.fromkeys(question.group for question in asked if question.group >= 0)
        near = dict.fromkeys(place for group in groups for place in self.found.groups[group] if place not in gold)
        try:
            return make_multidoc(
                asked[0].text,
                [paragraphs[place] for place in gold],
                paragraphs,
                near=[paragraphs[place] for place in near],
                tokens=tokens,
                count_tokens=self._count,
                seed=seed,
                answer_tokens=room,
                guess=max(len(gold), int(0.9 * tokens / self._typical)),
            ).prompt
        except TaskError:
            return None


def read_questions(path: str, *, exclude: str | None = None, expected: str = EXPECTED) -> QuestionSet:
    """All questions at `path`. Raises DataError: an unknown layout, a story that is missing, no question."""
    found, excluded, digest = QuestionSet(), Excluded(exclude), hashlib.sha256()
    stories: dict[str, list[str]] | None = None
    articles: dict[str, int] = {}
    for table in tables(path):
        layout = _layout(table, expected)
        if layout == LAYOUTS[3]:
            continue
        if layout == LAYOUTS[2] and stories is None:
            stories = _stories(path)
        for row in table.rows(layout, optional=(*_OPTIONAL, "paragraph_titles", "supporting_titles")):
            found.rows += 1
            if row in excluded:
                found.excluded += 1
                continue
            answers = answer_texts(row["answers"])
            text = str(row["question"] or "").strip()
            if not answers or not text:
                found.unanswered += 1
                continue
            if layout == LAYOUTS[0]:
                gold, group = _from_context(found, row, articles)
            elif layout == LAYOUTS[1]:
                gold, group = _from_paragraphs(found, row, table)
            else:
                gold, group = _from_story(found, row, table, stories or {}, articles)
            found.questions.append(Question(text, answers, gold, group))
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    if not found.questions:
        raise DataError(
            f"{path} has no question to train on: of {found.rows} rows {found.excluded} are excluded and "
            f"{found.unanswered} have no answer. Give more data."
        )
    found.sha256 = digest.hexdigest()
    return found


def _layout(table: Table, expected: str) -> tuple[str, ...]:
    for layout in LAYOUTS:
        if set(layout) <= set(table.columns):
            return layout
    raise DataError(f"{table.name} has columns {', '.join(table.columns) or 'none'}; expected {expected}.")


def answer_texts(value: Any) -> tuple[str, ...]:
    """The answers in a cell: a string, a list of strings, or SQuAD's {text: [...]}; empty ones are dropped."""
    if isinstance(value, dict):
        value = value.get("text")
    values = [value] if isinstance(value, str) else value or []
    return tuple(text for text in (str(item).strip() for item in values) if text)


def _from_context(found: QuestionSet, row: Row, articles: dict[str, int]) -> tuple[tuple[int, ...], int]:
    number = found.add_paragraph(str(row["context"]).strip())
    title = str(row.get("title") or "")
    if not title:
        return (number,), -1
    group = articles.setdefault(title, len(found.groups))
    if group == len(found.groups):
        found.groups.append([])
    if number not in found.groups[group]:
        found.groups[group].append(number)
    return (number,), group


def _from_paragraphs(found: QuestionSet, row: Row, table: Table) -> tuple[tuple[int, ...], int]:
    paragraphs: Sequence[Any] = row["paragraphs"] or []
    titles: Sequence[Any] = row.get("paragraph_titles") or [""] * len(paragraphs)
    if not paragraphs or len(titles) != len(paragraphs):
        raise DataError(
            f"{table.name}: a row has {len(paragraphs)} paragraphs and {len(titles)} titles; "
            f"expected at least one, and as many titles. Row: {str(row['question'])[:80]}"
        )
    titled = zip(titles, paragraphs, strict=True)
    numbers = [found.add_paragraph(f"{title}\n{paragraph}".strip()) for title, paragraph in titled]
    supporting = set(row.get("supporting_titles") or ())
    gold = [number for number, title in zip(numbers, titles, strict=True) if title in supporting] or numbers
    found.groups.append(list(dict.fromkeys(numbers)))
    return tuple(dict.fromkeys(gold)), len(found.groups) - 1


def _from_story(
    found: QuestionSet, row: Row, table: Table, stories: dict[str, list[str]], articles: dict[str, int]
) -> tuple[tuple[int, ...], int]:
    story = str(row["story_id"])
    sections = stories.get(story)
    places = row["section_index"] if isinstance(row["section_index"], list) else [row["section_index"]]
    if sections is None or not places or not all(0 <= place < len(sections) for place in places):
        raise DataError(
            f"{table.name} asks about sections {places} of story {story}, which no file beside it has. "
            f"Put the stories (columns id, sections) in the same folder."
        )
    numbers = [found.add_paragraph(section.strip()) for section in sections]
    group = articles.setdefault(f"story {story}", len(found.groups))
    if group == len(found.groups):
        found.groups.append(list(dict.fromkeys(numbers)))
    return tuple(dict.fromkeys(numbers[place] for place in places)), group


def _stories(path: str) -> dict[str, list[str]]:
    """Sections of every story at `path`."""
    stories: dict[str, list[str]] = {}
    for table in tables(path):
        if {"id", "sections"} <= set(table.columns):
            for row in table.rows(("id", "sections")):
                stories[str(row["id"])] = [str(text) for text in row["sections"]]
    return stories
