from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from refine_harness.config import CorpusData, MidConfig, QuestionData, TestTimeConfig
from refine_harness.errors import DataError
from refine_harness.training.stages import open_data, train
from refine_harness.training.trainer import Trainer

WORDS = [f"w{number}" for number in range(61)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def text(start: int, words: int) -> str:
    return " ".join(WORDS[(start * 7 + number * number) % 61] for number in range(words))


@pytest.fixture
def books(tmp_path) -> str:
    for number in range(4):
        (tmp_path / f"book{number}.txt").write_text(text(number, 200))
    return str(tmp_path)


@pytest.fixture
def questions(tmp_path) -> str:
    rows = [{"prompt": text(number, 30), "answer": text(number, 3)} for number in range(6)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_mid_training_reads_windows_and_goes_on_where_it_was(lab, tokenizer, books):
    config = MidConfig(**{**lab.mid(steps=4).model_dump(), "data": CorpusData(path=books, window=40)})
    data = open_data(config, tokenizer)
    whole = Trainer(lab.model(), config)
    reports = list(train(whole, data))
    assert [report.tokens for report in reports] == [80] * 4
    assert "reward" in reports[0].facts

    first = Trainer(lab.model(), config)
    loop = train(first, data)
    for _ in range(2):
        next(loop)
    second = Trainer(first.model, config)
    second.load(first.state())
    later = list(train(second, open_data(config, tokenizer)))
    assert [replace(report, seconds=0.0) for report in later] == [replace(r, seconds=0.0) for r in reports[2:]]
    assert lab.same(lab.weights(whole.model), lab.weights(second.model))


def test_post_training_learns_prompts_and_answers(lab, tokenizer, questions):
    config = lab.post(steps=4).model_copy(update={"data": QuestionData(path=questions, prompt_tokens=40)})
    reports = list(train(Trainer(lab.model(), config), open_data(config, tokenizer)))
    assert ["answer_step" in report.facts for report in reports] == [False, False, True] * 2
    prompt = 1 + 30  # <s> and the prompt's words
    assert [report.tokens for report in reports] == [2 * prompt, 2 * prompt, 4 * (prompt + 3 + 1)] * 2


def test_data_that_cannot_be_used_is_said_before_training(lab, tokenizer, books):
    config = MidConfig(**{**lab.mid().model_dump(), "data": CorpusData(path=books, window=4000)})
    with pytest.raises(DataError, match="window"):
        open_data(config, tokenizer)


def test_test_time_training_has_no_data_of_its_own(tokenizer):
    with pytest.raises(TypeError):
        open_data(TestTimeConfig(), tokenizer)
