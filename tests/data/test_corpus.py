from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from refine_harness.config import Algorithm, MidConfig, build
from refine_harness.data import read
from refine_harness.data.corpus import Corpus, check_window, midtrain_batches
from refine_harness.errors import ConfigError, DataError
from refine_harness.types import Batch

from .conftest import decode, hotpot_rows, prose, squad_rows


def config(**settings: object) -> MidConfig:
    tree = {"batch": {"sequences": 8, "steps": 2}, "steps": 10, **settings}
    return build(MidConfig, tree, where="test")


def mixed(books: str, questions: str, **settings: object) -> MidConfig:
    sources = [
        {"kind": "text", "path": books, "weight": 2},
        {"kind": "needles", "path": books},
        {"kind": "questions", "path": questions},
    ]
    return config(data={"window": 400, "sources": sources}, **settings)


@pytest.fixture
def questions(write: Callable[[str, list[dict]], str]) -> str:
    return write("questions/squad.parquet", squad_rows())


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens_BT, b.tokens_BT) and torch.equal(a.lengths_B, b.lengths_B)


def documents(batch: Batch) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(batch.tokens_BT, batch.lengths_B, strict=True)]


def test_windows_are_exact_pieces_of_the_text(tokenizer: PreTrainedTokenizerFast, books: str):
    window = 100
    corpus = Corpus(config(data={"path": books, "window": window}), tokenizer)
    texts = [tokenizer(row["text"])["input_ids"] for row in read.read_rows(books, ["text"])]
    pieces = [
        (1, *text[start : start + window - 1])
        for text in texts
        for start in range(0, len(text) - window + 2, window - 1)
    ]
    assert corpus.facts.windows == len(pieces) == sum(len(text) // (window - 1) for text in texts)
    seen = [tuple(document) for number in range(len(pieces)) for document in documents(corpus.batch(number))]
    for epoch in range(8):
        assert sorted(seen[epoch * len(pieces) : (epoch + 1) * len(pieces)]) == sorted(pieces)
    assert seen[: len(pieces)] != seen[len(pieces) : 2 * len(pieces)]


def test_short_documents_are_left_out_and_counted(tokenizer: PreTrainedTokenizerFast, write):
    path = write("a.parquet", [{"text": prose(words, words)} for words in (20, 400, 30)])
    facts = Corpus(config(data={"path": path, "window": 300}), tokenizer).facts
    [source] = facts.sources
    assert (source.rows, source.left_out, source.documents) == (3, 2, 1)
    assert (facts.left_out, facts.documents, facts.tokens) == (2, 1, 300 * facts.windows)
    assert re.fullmatch("[0-9a-f]{64}", facts.data_sha256)


def test_documents_all_shorter_than_the_window(tokenizer: PreTrainedTokenizerFast, write):
    path = write("a.parquet", [{"text": "short"}, {"text": prose(30)}])
    longest = len(tokenizer(prose(30))["input_ids"]) + 1
    with pytest.raises(DataError) as error:
        Corpus(config(data={"path": path, "window": 16384}), tokenizer)
    assert str(error.value) == (
        f"documents in {path} are all shorter than window=16384 (longest: {longest} tokens). "
        f"Lower data.window or choose another corpus."
    )


def test_a_document_that_is_just_long_enough_is_one_window(tokenizer: PreTrainedTokenizerFast, write):
    path = write("a.parquet", [{"text": prose(50)}])
    exact = len(tokenizer(prose(50))["input_ids"]) + 1
    assert Corpus(config(data={"path": path, "window": exact}), tokenizer).facts.windows == 1
    with pytest.raises(DataError, match="all shorter"):
        Corpus(config(data={"path": path, "window": exact + 1}), tokenizer)


def test_text_columns_and_text_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write):
    path = write("data/a.parquet", [{"body": prose(100)}])
    (tmp_path / "data" / "b.txt").write_text(prose(90, 1), encoding="utf-8")
    folder = str(tmp_path / "data")
    facts = Corpus(config(data={"path": folder, "text_column": "body", "window": 50}), tokenizer).facts
    assert facts.documents == 2
    with pytest.raises(DataError, match="has no column text; it has body"):
        Corpus(config(data={"path": path, "window": 50}), tokenizer)


def test_text_must_be_text(tokenizer: PreTrainedTokenizerFast, write):
    with pytest.raises(DataError, match="column text holds a int; expected text"):
        Corpus(config(data={"path": write("a.parquet", [{"text": 3}]), "window": 50}), tokenizer)


def test_the_same_seed_gives_the_same_documents_and_another_seed_others(
    tokenizer: PreTrainedTokenizerFast, books: str, questions: str
):
    first, again = (Corpus(mixed(books, questions), tokenizer) for _ in range(2))
    other = Corpus(mixed(books, questions, seed=1), tokenizer)
    assert first.facts == again.facts
    assert all(equal(first.batch(number), again.batch(number)) for number in range(3))
    assert not equal(first.batch(0), other.batch(0))
    needles = first.sources[1].documents(range(50))
    assert len({tuple(document) for document in needles}) == 50


def test_a_resumed_run_reads_what_an_uninterrupted_one_does(
    tokenizer: PreTrainedTokenizerFast, books: str, questions: str
):
    settings = mixed(books, questions)
    whole = list(islice(midtrain_batches(settings, tokenizer), 6))
    resumed = list(islice(midtrain_batches(settings, tokenizer, start_batch=4), 2))
    assert all(equal(a, b) for a, b in zip(whole[4:], resumed, strict=True))


def test_processes_share_every_optimizer_step(tokenizer: PreTrainedTokenizerFast, books: str, questions: str):
    corpus = Corpus(mixed(books, questions), tokenizer)
    alone = documents(corpus.batch(1))
    shares = [documents(corpus.batch(1, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    assert alone == shares[0][:2] + shares[1][:2] + shares[0][2:] + shares[1][2:]
    with pytest.raises(ConfigError, match="4 documents per optimizer step cannot be shared by 3 processes"):
        corpus.batches(world_size=3)


def test_other_processes_make_the_same_batches(tokenizer: PreTrainedTokenizerFast, books: str, questions: str):
    corpus = Corpus(mixed(books, questions), tokenizer)
    made = list(islice(corpus.batches(start_batch=2, workers=1), 3))
    assert all(equal(batch, corpus.batch(2 + place)) for place, batch in enumerate(made))


def test_generated_documents_keep_their_bounds_and_end_with_an_answer(
    tokenizer: PreTrainedTokenizerFast, books: str, questions: str
):
    corpus = Corpus(mixed(books, questions), tokenizer)
    _, needles, asked = (source.documents(range(60)) for source in corpus.sources)
    for document in (*needles, *asked):
        assert (document[0], document[-1]) == (1, 2)
        assert len(document) <= 400
        assert not {0, 1, 2} & set(document[1:-1].tolist())
    assert max(map(len, needles)) > 350
    assert min(map(len, needles)) < 250
    for document in needles:
        text = decode(tokenizer, document[1:-1])
        values = re.search(r"in the provided text (?:is|are) ([^\n]*)\.$", text)
        assert values is not None
        for value in re.split(r", and |, ", values[1]):
            assert text.count(value) >= 2, "an answer must occur in the document"
    counts = set()
    for document in asked:
        text = decode(tokenizer, document[1:-1])
        pairs = re.findall(r"Question: What is the code of place (\d\d)\?+ Answer: word(\d\d)", text)
        assert all(place == answer for place, answer in pairs)
        assert all(f"The code of place {place} is word{place}." in text for place, _ in pairs)
        assert text.endswith(f"word{pairs[-1][1]}")
        counts.add(len(pairs))
    assert counts >= {1, 2}


def test_multihop_documents_hold_all_paragraphs_that_answer(tokenizer: PreTrainedTokenizerFast, write):
    path = write("h.parquet", hotpot_rows())
    source = {"kind": "questions", "path": path}
    corpus = Corpus(config(data={"window": 500, "sources": [source]}), tokenizer)
    for document in corpus.sources[0].documents(range(12)):
        text = decode(tokenizer, document)
        rows = re.findall(r"Question: Which codes has row (\d)\? Answer: code(\d)", text)
        assert rows
        for row, answer in rows:
            assert row == answer
            assert f"First {row}\nOne code{row}." in text
            assert f"Second {row}\nTwo code{row}." in text


def test_stories_are_joined_to_their_questions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write):
    write("f/stories.parquet", [{"id": "s1", "sections": ["A fox came by.", "The king was old."]}])
    ask = {"id": "q", "story_id": "s1", "question": "Who was old?", "answers": ["the king"], "section_index": [1]}
    write("f/questions.parquet", [ask])
    source = {"kind": "questions", "path": str(tmp_path / "f")}
    corpus = Corpus(config(data={"window": 300, "sources": [source]}), tokenizer)
    text = decode(tokenizer, corpus.sources[0].documents([0])[0])
    assert "The king was old." in text
    assert text.endswith("Question: Who was old? Answer: the king</s>")
    write("f/questions.parquet", [{**ask, "section_index": [2]}])
    with pytest.raises(DataError, match=r"asks about sections \[2\] of story s1, which no file beside it has"):
        Corpus(config(data={"window": 300, "sources": [source]}), tokenizer)


def test_questions_that_do_not_fit_are_left_out(tokenizer: PreTrainedTokenizerFast, write):
    rows = squad_rows()
    rows[0]["context"] = prose(900)
    rows[1]["answers"] = []
    source = {"kind": "questions", "path": write("q.parquet", rows)}
    facts = Corpus(config(data={"window": 400, "sources": [source]}), tokenizer).facts
    assert (facts.left_out, facts.documents) == (2, len(rows) - 2)
    with pytest.raises(DataError, match=r"no question of .* fits into window=50 with the paragraphs that answer it"):
        Corpus(config(data={"window": 50, "sources": [source]}), tokenizer)


def test_an_unknown_layout_of_questions(tokenizer: PreTrainedTokenizerFast, write):
    source = {"kind": "questions", "path": write("q.parquet", [{"ask": "?", "reply": "!"}])}
    with pytest.raises(DataError, match=r"has columns ask, reply; expected context, question, answers; or"):
        Corpus(config(data={"window": 400, "sources": [source]}), tokenizer)


def test_excluded_rows_are_not_read(tokenizer: PreTrainedTokenizerFast, books: str, questions: str, write):
    by_id = write("out.parquet", [{"id": "b5"}, {"id": "b4"}])
    by_title = write("titles.parquet", [{"title": "Article 0"}])
    sources = [
        {"kind": "text", "path": books, "exclude": by_id},
        {"kind": "questions", "path": questions, "exclude": by_title},
    ]
    corpus = Corpus(config(data={"window": 300, "sources": sources}), tokenizer)
    text, asked = (source.facts for source in corpus.sources)
    assert (text.rows, text.excluded, text.documents) == (6, 2, 4)
    assert (asked.rows, asked.excluded, asked.documents) == (24, 8, 16)
    written = "".join(decode(tokenizer, document) for document in corpus.sources[1].documents(range(40)))
    assert "place 00" not in written
    assert "place 10" in written
    everything = write("all.parquet", [{"id": f"b{i}"} for i in range(6)])
    sources = [{"kind": "text", "path": books, "exclude": everything}]
    with pytest.raises(DataError, match=r"has no row left: .* excludes all 6"):
        Corpus(config(data={"window": 300, "sources": sources}), tokenizer)


def test_a_window_too_small_for_needles(tokenizer: PreTrainedTokenizerFast, books: str):
    source = {"kind": "needles", "path": books}
    with pytest.raises(DataError, match="window=64 is too short for needle documents"):
        Corpus(config(data={"window": 64, "sources": [source]}), tokenizer)


def test_c_and_k_are_checked_against_the_window(tokenizer: PreTrainedTokenizerFast, books: str):
    check_window(13, Algorithm(chunks=8, rollout_length=5))
    with pytest.raises(ConfigError) as error:
        Corpus(config(data={"path": books, "window": 12}), tokenizer)
    assert str(error.value) == (
        "rollout_length=5 and chunks=8 need at least 13 tokens; window is 12. "
        "Raise data.window, or lower algorithm.chunks or algorithm.rollout_length."
    )
    check_window(12, Algorithm(lambda_rl=0))
    with pytest.raises(ConfigError, match=r"data\.window = 1 holds no token to predict"):
        check_window(1, Algorithm(lambda_rl=0))


def test_data_must_be_named(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ConfigError, match=r"set data\.path or data\.sources"):
        Corpus(config(), tokenizer)


def test_a_tokenizer_without_first_and_end_token(tokenizer: PreTrainedTokenizerFast, books: str):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    sources = [{"kind": "text", "path": books}, {"kind": "needles", "path": books}]
    corpus = Corpus(config(data={"window": 300, "sources": sources}), bare)
    texts, needles = (source.documents(range(10)) for source in corpus.sources)
    assert {len(document) for document in texts} == {300}
    assert all(decode(bare, document).endswith(".") for document in needles)


def test_what_is_streamed_is_read_only_as_far_as_the_run_needs_it(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    served = []

    class Stream:
        def __iter__(self):
            served.clear()
            for i in range(50):
                served.append(i)
                yield {"text": prose(100, i)}

    monkeypatch.setattr(read, "_open_hub", lambda *_: Stream())
    monkeypatch.setattr("refine_harness.data.corpus._CHARACTERS_AT_ONCE", 1)
    facts = Corpus(config(data={"path": "someone/books", "window": 50}, steps=10), tokenizer).facts
    assert 40 <= facts.windows < 60
    assert len(served) < 50
