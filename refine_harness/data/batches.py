"""Rows of token ids become a right-padded `Batch`; how short a row may be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from refine_harness.config import Algorithm
from refine_harness.types import Batch


def right_padded(
    rows: Sequence[Sequence[int] | np.ndarray], pad: int, *, loss_from: Sequence[int] | None = None
) -> Batch:
    """A Batch on the CPU of at least one row, padded with `pad` to the longest; tokens, lengths and loss_from int64."""
    lengths = [len(row) for row in rows]
    tokens_BT = np.full((len(rows), max(lengths)), pad, dtype=np.int64)
    for place, row in enumerate(rows):
        tokens_BT[place, : len(row)] = row
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.tensor(lengths, dtype=torch.int64),
        None if loss_from is None else torch.tensor(loss_from, dtype=torch.int64),
    )


def least_tokens(algorithm: Algorithm) -> int:
    """Tokens of the shortest document that the algorithm can learn from: c positions, k true tokens after the last."""
    return algorithm.chunks + algorithm.rollout_length if algorithm.lambda_rl > 0 else 2
