"""A tokenizer folder and a data folder in the layouts that the tasks read, both made here; and silence."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LONGBENCH = {
    "2wikimqa": ["Ann"],
    "dureader": ["小明"],
    "gov_report": ["The report is short."],
    "hotpotqa": ["Ann", "Ann Lee"],
    "lcc": ["return x"],
    "lsht": ["体育"],
    "multi_news": ["Much happened."],
    "multifieldqa_en": ["Ann"],
    "multifieldqa_zh": ["小明"],
    "musique": ["Ann"],
    "narrativeqa": ["Ann"],
    "passage_count": ["3"],
    "passage_retrieval_en": ["Paragraph 3"],
    "passage_retrieval_zh": ["段落3"],
    "qasper": ["yes"],
    "qmsum": ["They met."],
    "repobench-p": ["return x"],
    "samsum": ["Ann is late."],
    "trec": ["Date"],
    "triviaqa": ["Ann"],
    "vcsum": ["会议很短。"],
}
"""Task -> answers of every row of the fixture."""

ARTICLES = ("Towers", "Rivers", "Birds")


def squad_rows() -> list[dict[str, Any]]:
    """Six paragraphs in three articles, two questions a paragraph, one of which has two right answers."""
    rows = []
    for article in ARTICLES:
        for number in (1, 2):
            context = f"{article} number {number} was named by Ann{number} and is {number}00 years old."
            ask = f"of {article} number {number}?"
            rows.append(
                {"title": article, "context": context, "question": f"Who named one {ask}", "answers": [f"Ann{number}"]}
            )
            rows.append(
                {
                    "title": article,
                    "context": context,
                    "question": f"How old {ask}",
                    "answers": [f"{number}00 years", f"{number}00"],
                }
            )
    return rows


def hotpot_rows() -> list[dict[str, Any]]:
    return [
        {
            "question": f"Which town does the maker of thing {i} live in?",
            "answers": [f"Town{i}"],
            "paragraph_titles": [f"Thing {i}", f"Maker {i}", f"Other {i}", f"Another {i}"],
            "paragraphs": [
                f"Thing {i} was made by Maker {i}.",
                f"Maker {i} lives in Town{i}.",
                f"Other {i} is neither here nor there.",
                f"Another {i} is somewhere else.",
            ],
            "supporting_titles": [f"Maker {i}", f"Thing {i}"],
        }
        for i in range(6)
    ]


def longbench_rows(task: str) -> list[dict[str, Any]]:
    classes = {"all_classes": ["体育", "军事"]} if task == "lsht" else {}
    return [
        {"context": f"Some text {i} about Ann.", "input": f"question {i}", "answers": LONGBENCH[task], **classes}
        for i in range(3)
    ]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_json(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "squad" / "dev.parquet", squad_rows())
    write_parquet(folder / "multihop" / "hotpotqa_dev.parquet", hotpot_rows())
    for task in LONGBENCH:
        write_parquet(folder / "longbench" / f"{task}.parquet", longbench_rows(task))
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import PreTrainedTokenizerFast

    text = (
        "One of the special magic numbers for tall-tree is: 12. The grass is green. There and back again. "
        "Answer the question based on the given documents. I cannot understand the people who take it seriously. "
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer=trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
