from __future__ import annotations

import pytest

from refine_harness.data.prompts import prompt_batch
from refine_harness.errors import DataError


def test_prompts_are_rows_padded_on_the_right():
    batch = prompt_batch([[1, 5, 6], [1], [1, 7]], pad=9)
    assert batch.tokens_BT.tolist() == [[1, 5, 6], [1, 9, 9], [1, 7, 9]]
    assert batch.lengths_B.tolist() == [3, 1, 2]
    assert batch.loss_from_B is None
    assert batch.rows(1, 3).tokens_BT.tolist() == [[1, 9], [1, 7]]


def test_no_prompt_and_an_empty_prompt():
    with pytest.raises(DataError, match="there is no prompt to adapt on"):
        prompt_batch([])
    with pytest.raises(DataError, match="prompt 1 has no token to adapt on"):
        prompt_batch([[1], []])
