"""Where to continue from: one uncertain position in each chunk of a document (PAPER: steps 1 and 2).

Two choices where the paper is silent or its code has gaps. Pooling averages over the entropies that exist, so the
document's ends are not pulled to zero. The chunks divide the positions that have k true tokens after them, so every
such position can be drawn, the tail included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_harness.errors import DataError

Rule = Literal["entropy", "uniform", "argmax", "argmin"]


def pooled_entropy(entropy_BT: Tensor, lengths_B: Tensor, window: int) -> Tensor:
    """Mean entropy in a centred window (an even width uses one more), over real predictions only.

    entropy_BT[b, t] is the entropy, in nats, of the prediction of token t + 1; the last real one is at
    lengths_B[b] - 2. Returns [B, T]; 0 where there is no prediction in the window.
    """
    width = window + 1 - window % 2
    steps_T = torch.arange(entropy_BT.shape[1], device=entropy_BT.device)
    real_BT = (steps_T < lengths_B[:, None] - 1).to(entropy_BT.dtype)
    kernel = entropy_BT.new_ones(1, 1, width)
    sums_BT = F.conv1d((entropy_BT * real_BT)[:, None], kernel, padding=width // 2)[:, 0]
    counts_BT = F.conv1d(real_BT[:, None], kernel, padding=width // 2)[:, 0]
    return sums_BT / counts_BT.clamp(min=1)


def pick_positions(
    entropy_BT: Tensor,
    lengths_B: Tensor,
    *,
    chunks: int,
    length: int,
    rule: Rule,
    rng: Sequence[torch.Generator],
) -> Tensor:
    """One position per chunk, int64 [B, C]: the last token that a rollout of `length` tokens has read.

    Drawn from softmax(pooled entropy) within the chunk (`entropy`), evenly (`uniform`), or at the chunk's highest or
    lowest pooled entropy (`argmax`, `argmin`). rng: one CPU generator per document, so that a document's draws do not
    depend on its neighbours. Raises DataError when a document has no room for c chunks and k tokens.
    """
    pooled_BT = pooled_entropy(entropy_BT, lengths_B, length).double().cpu()
    rows: list[list[int]] = []
    for pooled_T, tokens, generator in zip(pooled_BT, lengths_B.tolist(), rng, strict=True):
        usable = tokens - length
        if usable < chunks:
            raise DataError(
                f"a document of {tokens} tokens has no room for {chunks} chunks and rollouts of {length} tokens; "
                f"it needs {chunks + length}. Lower algorithm.chunks or algorithm.rollout_length, or use "
                f"longer documents."
            )
        draws_C = torch.rand(chunks, generator=generator, dtype=torch.float64)
        edges = [i * usable // chunks for i in range(chunks + 1)]
        rows.append(
            [
                start + _pick(pooled_T[start:stop], rule, draw)
                for start, stop, draw in zip(edges[:-1], edges[1:], draws_C, strict=True)
            ]
        )
    return torch.tensor(rows, device=entropy_BT.device)


def _pick(pooled_S: Tensor, rule: Rule, draw: Tensor) -> int:
    """An index into one chunk; `draw` is uniform in [0, 1)."""
    if rule == "argmax":
        return int(pooled_S.argmax())
    if rule == "argmin":
        return int(pooled_S.argmin())
    weights_S = pooled_S.softmax(0) if rule == "entropy" else torch.full_like(pooled_S, 1 / len(pooled_S))
    return min(int(torch.searchsorted(weights_S.cumsum(0), draw, right=True)), len(pooled_S) - 1)
