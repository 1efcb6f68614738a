"""The quickstart's data: small, attributed, and kept apart where training must not see what is evaluated."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from refine_harness.config import MidConfig, load
from refine_harness.data.questions import read_questions
from refine_harness.resources import resource

DATA = resource("configs") / "quickstart" / "data"
FILES = sorted(DATA.rglob("*.parquet"))


def values(name: str, column: str) -> list:
    return pq.read_table(DATA / name, columns=[column])[column].to_pylist()


def test_it_is_small():
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 3_000_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(DATA).as_posix())
def test_every_file_is_attributed_with_its_rows(file: Path):
    text = (file.parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    stated = re.search(rf"{re.escape(file.name)} \((\d+) rows\)", text)
    assert stated is not None
    assert int(stated[1]) == pq.ParquetFile(file).metadata.num_rows


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(DATA).as_posix())
def test_rows_that_name_a_licence_name_an_open_one(file: Path):
    if "licence" in pq.ParquetFile(file).schema_arrow.names:
        licences = set(pq.read_table(file, columns=["licence"])["licence"].to_pylist())
        assert all(licence.startswith(("Public domain", "CC BY-SA 4.0")) for licence in licences)


def test_questions_are_read_and_their_answers_are_in_what_answers_them():
    for name in ("post/squad.parquet", "eval/squad/dev.parquet"):
        found = read_questions(str(DATA / name))
        for question in found.questions:
            gold = " ".join(found.paragraphs[place] for place in question.gold)
            assert any(answer in gold for answer in question.answers)
    assert len(read_questions(str(DATA / "post")).questions) == 480


def test_training_rows_are_not_evaluated():
    assert not set(values("post/squad.parquet", "title")) & set(values("eval/squad/dev.parquet", "title"))
    assert not set(values("post/hotpotqa.parquet", "id")) & set(values("eval/multihop/hotpotqa.parquet", "id"))
    trained = {title for titles in values("post/hotpotqa.parquet", "paragraph_titles") for title in titles}
    asked = {title for titles in values("eval/multihop/hotpotqa.parquet", "supporting_titles") for title in titles}
    assert not trained & asked


def test_there_are_enough_contexts_to_fill_long_prompts():
    assert len(set(values("eval/squad/dev.parquet", "context"))) >= 200


def test_the_base_recipe_loads_and_leaves_the_quickstart_out():
    config = load(MidConfig, resource("configs") / "base" / "pretrain.yaml")
    assert config.algorithm.lambda_rl == 0
    excluded = {source.exclude for source in config.data.all_sources}
    assert excluded == {"configs/quickstart/data/mid/books.parquet", "configs/quickstart/data/post/squad.parquet"}
    assert all((resource("configs").parent / str(path)).is_file() for path in excluded)
