"""Make what base training starts from: a tokenizer and random weights. Run: python prepare.py DATA OUT

DATA holds books.parquet (column text) and squad.parquet (context, question), as README.md says. OUT becomes a
Hugging Face model folder described by config.json beside this file.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from refine_harness.data.read import Excluded, read_rows
from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.resources import resource
from refine_harness.synthetic.needles import needle_document, split_sentences
from refine_harness.synthetic.questions import prompt

BOOK_CHARACTERS = 100_000
"""Of each book: all of every book would leave the encyclopedia few words of the vocabulary."""
NEEDLE_DOCUMENTS, NEEDLE_WORDS = 3000, 250
"""Short ones, so that the phrasing of needles counts for something."""
SEED = 0


def main(data: Path, out: Path) -> None:
    tree = json.loads((Path(__file__).parent / "config.json").read_text(encoding="utf-8"))
    train_tokenizer(texts(data), tree["vocab_size"], out)
    torch.manual_seed(SEED)
    DeltaNetForCausalLM(DeltaNetConfig(**tree)).save_pretrained(out)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


def texts(data: Path) -> Iterator[str]:
    """Text of all kinds that training sees, without the rows that the quickstart trains on."""
    held_out, sentences = Excluded("configs/quickstart/data/mid/books.parquet"), []
    for row in read_rows(data / "books.parquet", ["id", "text"]):
        if row not in held_out:
            text = row["text"][:BOOK_CHARACTERS]
            sentences += split_sentences(text)
            yield text
    words = json.loads((resource("tasks") / "niah/data/words.json").read_text(encoding="utf-8"))
    for number in range(NEEDLE_DOCUMENTS):
        yield needle_document(
            random.Random(f"{SEED}/{number}"),
            sentences=sentences,
            nouns=words["nouns"],
            adjectives=words["adjectives"],
            tokens=NEEDLE_WORDS,
            count_tokens=lambda text: len(text.split()),
            questions=2,
        ).text
    held_out, seen = Excluded("configs/quickstart/data/post/squad.parquet"), set()
    for row in read_rows(data / "squad.parquet", ["id", "title", "context", "question"]):
        if row in held_out:
            continue
        yield row["question"]
        if row["context"] not in seen:
            seen.add(row["context"])
            yield prompt(row["question"], [row["context"]])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
