"""A small tokenizer, and small texts and questions written on the spot."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.synthetic import needles
from refine_harness.synthetic.questions import prompt

WORDS = ("river", "stone", "lamp", "garden", "winter", "letter", "captain", "silver", "window", "road", "table", "old")


def prose(words: int, seed: int = 0) -> str:
    """Sentences of WORDS; some paragraphs."""
    rng = random.Random(seed)
    parts = []
    while sum(len(part.split()) for part in parts) < words:
        sentence = " ".join(rng.choices(WORDS, k=rng.randint(4, 10))).capitalize() + rng.choice([".", "!", "?"])
        parts.append(sentence + rng.choice([" ", " ", "\n\n"]))
    return "".join(parts).strip()


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int] | np.ndarray) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    phrasing = [prompt("What is the code of place?", ["The code of place is word."])]
    for kind in ("numbers", "words"):
        asked = needles.question(kind, ["x"], 1) + needles.answer_prefix(kind, ["x"], 1)
        phrasing += [needles.preamble(kind, 1), asked, needles.NEEDLE.format(kind=kind, key="x", value="y")]
    texts = [prose(4000, seed) for seed in range(3)] + 100 * phrasing
    folder = train_tokenizer(texts, 490, tmp_path_factory.mktemp("tokenizer"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[dict]], str]:
    """Writes rows as a parquet file below a temporary folder; returns its path."""

    def write(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)

    return write


@pytest.fixture
def books(write: Callable[[str, list[dict]], str]) -> str:
    """Six texts of different lengths."""
    rows = [{"id": f"b{i}", "title": f"Book {i}", "text": prose(300 + 100 * i, i)} for i in range(6)]
    return write("books/books.parquet", rows)


def squad_rows(articles: int = 3, contexts: int = 4, questions: int = 2) -> list[dict]:
    """Paragraphs each of which holds its own code word."""
    return [
        {
            "id": f"q{a}-{c}-{q}",
            "title": f"Article {a}",
            "context": f"{prose(20, 100 * a + c)} The code of place {a}{c} is word{a}{c}.",
            "question": f"What is the code of place {a}{c}{'?' * (q + 1)}",
            "answers": [f"word{a}{c}", "another"],
        }
        for a in range(articles)
        for c in range(contexts)
        for q in range(questions)
    ]


def hotpot_rows(rows: int = 4) -> list[dict]:
    """Three paragraphs a row, two of which answer."""
    return [
        {
            "id": f"h{r}",
            "question": f"Which codes has row {r}?",
            "answers": [f"code{r}"],
            "paragraph_titles": [f"First {r}", f"Second {r}", f"Third {r}"],
            "paragraphs": [f"One code{r}.", f"Two code{r}. {prose(10, r)}", f"Other {prose(10, r + 50)}"],
            "supporting_titles": [f"First {r}", f"Second {r}"],
        }
        for r in range(rows)
    ]
