"""A tokenizer of a few hundred tokens, trained here in a moment, to count with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = (
    "One of the special magic numbers for tall-tree is: 1234567. The grass is green. Here we go. There and back again. "
    "What is the special magic number mentioned in the provided text? Answer the question based on the documents. "
    "Sentence one of a long story goes on for some words and ends here. A short, merry, sad or plain story of seven. "
    "It is not the critic who counts; the credit belongs to whoever is in the arena, whose face is marred by dust. "
)


@pytest.fixture(scope="session")
def count_tokens() -> Callable[[str], int]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer=trainer)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
