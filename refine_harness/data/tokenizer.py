"""Text to token ids: the two calls every data module shares, and training a small tokenizer.

Nothing here adds special tokens by itself: a document's first and last token are put there by whoever
builds the document, so that lengths are exact.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from refine_harness.errors import DataError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
"""Ids 0, 1 and 2 of a tokenizer trained here."""

_TEXTS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 2**22
"""Bounds the memory of texts whose ids are not kept."""
_SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
"""Every byte has a token, so that no text is unknown."""


def id_dtype(tokenizer: Any) -> type[np.uint16] | type[np.uint32]:
    """The narrowest of uint16 and uint32 that holds every id of `tokenizer`."""
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, one 1-D array of `id_dtype` a text, without special tokens.

    A fast tokenizer reads the texts on all cores at once, unless `TOKENIZERS_PARALLELISM` is off.
    """
    dtype = id_dtype(tokenizer)
    if not texts:
        return []
    if getattr(tokenizer, "is_fast", False):
        return [np.array(encoding.ids, dtype=dtype) for encoding in _encodings(tokenizer, texts)]
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(row, dtype=dtype) for row in rows]


def encode_one(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of one text, as in `encode_all`."""
    return encode_all(tokenizer, [text])[0]


class WordEncoder:
    """Encodes and counts many similar texts quickly: a word is encoded once, with the space before it.

    Most tokenizers never put the end of a word and the space after it into one token, and then the ids of a text
    are those of its words. Whether that holds is tried on a text that mixes what can go wrong; where it does
    not, every text is encoded whole, so that `encode` and `count` are exact either way.
    """

    PROBE = (
        'Well?" (No.)\n\nHe said: "12 345,\n6789"  and  x-y; 70%...\nAn end.\n\n\t- Item: café—naïve!\n   Q: 3? \nA \n'
    )
    _SPACE = re.compile(r" (?=\S)")
    _ANCHOR = "."
    """What a word is encoded after: some tokenizers treat a word that starts a text in a way of its own."""
    _FIRST = "\ud800"
    """Marks a text's first word; no text has this code point, which UTF-8 cannot write."""
    _CACHED_WORDS = 200_000

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._dtype = id_dtype(tokenizer)
        self._ids: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}
        self._anchor = encode_one(tokenizer, self._ANCHOR).tolist()
        self.by_words = True
        """Whether texts are put together from words."""
        self.by_words = self._by_words(self.PROBE).tolist() == encode_one(tokenizer, self.PROBE).tolist()

    def count(self, text: str) -> int:
        """Tokens of `text`, without special tokens."""
        if not self.by_words:
            return len(encode_one(self._tokenizer, text))
        words = self._words(text)
        try:
            return sum(map(self._counts.__getitem__, words))
        except KeyError:
            self._learn(words)
            return sum(map(self._counts.__getitem__, words))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode_all` returns."""
        if self.by_words:
            return [self._by_words(text) for text in texts]
        return encode_all(self._tokenizer, texts)

    def _by_words(self, text: str) -> np.ndarray:
        words = self._words(text)
        self._learn(words)
        return np.fromiter(chain.from_iterable(map(self._ids.__getitem__, words)), dtype=self._dtype)

    def _words(self, text: str) -> list[str]:
        """Words without the space before them; other white space stays with the word that it touches."""
        # Splitting at every space is several times faster, and the same where no two spaces meet.
        words = self._SPACE.split(text) if "  " in text else text.split(" ")
        # A text's first word has no space before it: it is kept apart from the same word after others.
        words[0] = f"{self._FIRST}{words[0]}"
        return words

    def _learn(self, words: Sequence[str]) -> None:
        if len(self._ids) > self._CACHED_WORDS:
            self._ids.clear()
            self._counts.clear()
        new = [word for word in dict.fromkeys(words) if word not in self._ids]
        first = [word[:1] == self._FIRST for word in new]
        after = [word[1:] if alone else f"{self._ANCHOR} {word}" for word, alone in zip(new, first, strict=True)]
        for word, alone, encoded in zip(new, first, encode_all(self._tokenizer, after), strict=True):
            ids = encoded.tolist() if alone else encoded[len(self._anchor) :].tolist()
            self._ids[word], self._counts[word] = ids, len(ids)


def count_all(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """Tokens of each text, without special tokens; no ids are kept, and equal texts are counted once."""
    texts = list(texts)
    counts: dict[str, int] = {}
    for batch in _portions(dict.fromkeys(texts)):
        if getattr(tokenizer, "is_fast", False):
            lengths = map(len, _encodings(tokenizer, batch))
        else:
            lengths = map(len, tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])
        counts.update(zip(batch, lengths, strict=True))
    return [counts[text] for text in texts]


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists that do not cost too much memory at once."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and (len(batch) == _TEXTS_AT_ONCE or characters + len(text) > _CHARACTERS_AT_ONCE):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def _encodings(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """What a fast tokenizer makes of each text, on all cores at once."""
    backend = tokenizer.backend_tokenizer
    # Some are saved with one of these, and would lengthen all texts to the longest, or cut them.
    if backend.padding is not None:
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    return backend.encode_batch_fast(list(texts), add_special_tokens=False)


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows on the right: the tokenizer's pad, else its end, else 0 (lengths hide it anyway)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a byte-level BPE of exactly `vocab_size` tokens and save it in the folder `out`.

    Digits are split one by one, so that a number costs the same whatever it is. `<pad>` is 0, `<s>` 1 and
    `</s>` 2. `transformers.AutoTokenizer.from_pretrained(out)` loads what is saved. Returns `out`.
    Raises DataError when the vocabulary is too small for the bytes, or larger than the texts can fill.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab_size = {vocab_size} is too small: {_SMALLEST_VOCABULARY} tokens are the bytes and "
            f"the special tokens alone. Raise it."
        )
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_paragraphs(texts), trainer=trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the texts fill only {tokenizer.get_vocab_size()} tokens; vocab_size = {vocab_size} was asked for. "
            f"Give more text or lower vocab_size."
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL_TOKENS[0],
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "clean_up_tokenization_spaces": False,
        # A recurrent state has no longest input; this silences a warning about one.
        "model_max_length": 1 << 30,
    }
    _write(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write(out / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return out


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at newlines, which BPE never merges across words anyway: whole books at once cost much memory."""
    for text in texts:
        yield from text.splitlines(keepends=True)


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
