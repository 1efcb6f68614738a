from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from refine_harness.data import tokenizer as module
from refine_harness.data.tokenizer import WordEncoder, count_all, encode_all, pad_id, train_tokenizer
from refine_harness.errors import DataError

from .conftest import prose

AWKWARD = "Ça va?\n\n  Two  spaces,\ttabs\r\n and 日本語 🦆 \\ 007. The answer: 1234567.\n"


def test_what_is_saved_is_loaded_by_transformers_and_loses_nothing(tmp_path: Path):
    out = train_tokenizer([prose(2000)], 300, tmp_path / "new" / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 300
    ids = tokenizer(AWKWARD)["input_ids"]
    assert tokenizer.decode(ids) == AWKWARD
    assert not {0, 1, 2} & set(ids)
    assert sorted(file.name for file in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_digits_are_tokens_one_by_one(tokenizer: PreTrainedTokenizerFast):
    assert len(encode_all(tokenizer, ["1234567"])[0]) == 7


def test_ids_are_compact_and_counted(tokenizer: PreTrainedTokenizerFast):
    texts = [prose(10), "", AWKWARD]
    ids = encode_all(tokenizer, texts)
    assert [array.dtype for array in ids] == [np.uint16] * 3
    assert [tokenizer.decode(array) for array in ids] == texts
    assert count_all(tokenizer, texts) == [len(array) for array in ids]
    assert encode_all(tokenizer, []) == []


def test_texts_are_counted_once_and_in_portions(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    texts = [*(prose(n) for n in range(1, 30)), prose(5), ""]
    alone = [len(encode_all(tokenizer, [text])[0]) for text in texts]
    portions = []
    monkeypatch.setattr("refine_harness.data.tokenizer._CHARACTERS_AT_ONCE", 300)
    usual = module._encodings
    monkeypatch.setattr(module, "_encodings", lambda t, batch: portions.append(batch) or usual(t, batch))
    assert count_all(tokenizer, texts) == alone
    assert len(portions) > 2
    assert [text for portion in portions for text in portion] == list(dict.fromkeys(texts))
    assert all(len(portion) == 1 or sum(map(len, portion)) <= 300 for portion in portions)


def test_a_tokenizer_that_was_saved_with_a_longest_text_cuts_nothing(tokenizer: PreTrainedTokenizerFast):
    texts = [prose(10), "", AWKWARD]
    ids = encode_all(tokenizer, texts)
    cutting = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    cutting.backend_tokenizer.enable_truncation(8)
    assert count_all(cutting, texts) == [len(expected) for expected in ids]
    cutting.backend_tokenizer.enable_truncation(8)
    assert [found.tolist() for found in encode_all(cutting, texts)] == [expected.tolist() for expected in ids]


def test_a_tokenizer_that_was_saved_with_padding_pads_nothing(tokenizer: PreTrainedTokenizerFast):
    texts = [prose(10), "", AWKWARD]
    ids = encode_all(tokenizer, texts)
    padding = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    padding.backend_tokenizer.enable_padding(pad_token="<pad>")
    assert [found.tolist() for found in encode_all(padding, texts)] == [expected.tolist() for expected in ids]
    padding.backend_tokenizer.enable_padding(pad_token="<pad>")
    assert count_all(padding, texts) == [len(expected) for expected in ids]


def test_a_vocabulary_that_is_too_small_or_cannot_be_filled(tmp_path: Path):
    with pytest.raises(DataError, match="vocab_size = 100 is too small: 259 tokens are the bytes"):
        train_tokenizer(["text"], 100, tmp_path)
    with pytest.raises(DataError, match=r"the texts fill only \d+ tokens; vocab_size = 5000 was asked for"):
        train_tokenizer(["a few words"], 5000, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_padding_falls_back_on_the_end_token(tokenizer: PreTrainedTokenizerFast):
    assert pad_id(tokenizer) == 0
    assert pad_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")) == 2


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    alphabet = sorted(set(WordEncoder.PROBE + AWKWARD))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["?"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([prose(3000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(("kind", "by_words"), [("bytes", True), ("metaspace", True), ("none", False)])
def test_words_give_the_same_ids_as_the_whole_text(tokenizer: PreTrainedTokenizerFast, kind: str, by_words: bool):
    """`none` merges across spaces, so that texts must be encoded whole."""
    if kind == "metaspace":
        lines = pre_tokenizers.Split("\n", "isolated")
        tokenizer = trained(pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="first")]))
    elif kind == "none":
        tokenizer = trained(None)
    words = WordEncoder(tokenizer)
    assert words.by_words is by_words
    texts = [
        prose(200, 7),
        AWKWARD,
        "",
        " ",
        "\n\nA leading line.",
        "word",
        "word word",
        *(prose(30, i) for i in range(9)),
    ]
    for ours, whole in zip(words.encode(texts), encode_all(tokenizer, texts), strict=True):
        assert ours.tolist() == whole.tolist()
    assert [words.count(text) for text in texts] == count_all(tokenizer, texts)


def test_forgetting_words_changes_nothing(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(WordEncoder, "_CACHED_WORDS", 3)
    words = WordEncoder(tokenizer)
    texts = [prose(40, i) for i in range(5)]
    assert [ids.tolist() for ids in words.encode(texts)] == [ids.tolist() for ids in encode_all(tokenizer, texts)]
