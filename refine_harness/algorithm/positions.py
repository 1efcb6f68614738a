"""Where to continue from: one uncertain position in each chunk of a document (PAPER: steps 1 and 2).

Two choices where the paper is silent or its code has gaps. Pooling averages over the entropies that exist, so the
document's ends are not pulled to zero. The chunks divide the positions that have k true tokens after them, so every
such position can be drawn, the tail included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_harness.errors import DataError
from refine_harness.types import upload

Rule = Literal["entropy", "uniform", "argmax", "argmin"]


def pooled_entropy(entropy_BT: Tensor, lengths_B: Tensor, window: int) -> Tensor:
    """Mean entropy in a centred window (an even width uses one more), over real predictions only.

    entropy_BT[b, t] is the entropy, in nats, of the prediction of token t + 1; the last real one is at
    lengths_B[b] - 2. Returns [B, T]; 0 where there is no prediction in the window.
    """
    width = window + 1 - window % 2
    steps_T = torch.arange(entropy_BT.shape[1], device=entropy_BT.device)
    real_BT = (steps_T < lengths_B[:, None] - 1).to(entropy_BT.dtype)

    def sums(x_BT: Tensor) -> Tensor:
        x_B11T, padding = x_BT[:, None, None], (0, width // 2)
        return F.avg_pool2d(x_B11T, (1, width), stride=1, padding=padding, divisor_override=1).view(x_BT.shape)

    return sums(entropy_BT * real_BT) / sums(real_BT).clamp(min=1)


def pick_positions(
    entropy_BT: Tensor,
    lengths: Sequence[int],
    *,
    chunks: int,
    length: int,
    rule: Rule,
    rng: Sequence[torch.Generator],
) -> Tensor:
    """One position per chunk, int64 [B, C]: the last token that a rollout of `length` tokens has read.

    Drawn from softmax(pooled entropy) within the chunk (`entropy`), evenly (`uniform`), or at the chunk's highest or
    lowest pooled entropy (`argmax`, `argmin`). Nothing here waits for the device.

    Args:
        entropy_BT: in nats, of the prediction of token t + 1.
        lengths: real tokens of each document, on the host.
        rng: one CPU generator per document, so that a document's draws do not depend on its neighbours.

    Raises DataError when a document has no room for c chunks and k tokens.
    """
    C, device = chunks, entropy_BT.device
    for tokens in lengths:
        if tokens - length < C:
            raise DataError(
                f"a document of {tokens} tokens has no room for {C} chunks and rollouts of {length} tokens; "
                f"it needs {C + length}. Lower algorithm.chunks or algorithm.rollout_length, or use "
                f"longer documents."
            )
    draws_BC = upload(draw_uniforms(rng, C), device)
    edges = [[i * (tokens - length) // C for i in range(C + 1)] for tokens in lengths]
    widest = max(stop - start for row in edges for start, stop in pairwise(row))
    edges_BE = upload(torch.tensor(edges), device)
    start_BC1, stop_BC1 = edges_BE[:, :-1, None], edges_BE[:, 1:, None]
    at_BCS = start_BC1 + torch.arange(widest, device=device)
    inside_BCS = at_BCS < stop_BC1
    lengths_B = upload(torch.tensor(tuple(lengths)), device)
    pooled_BT = pooled_entropy(entropy_BT.double(), lengths_B, length)
    pooled_BCS = pooled_BT.gather(1, at_BCS.clamp(max=pooled_BT.shape[1] - 1).flatten(1)).view(at_BCS.shape)
    if rule == "argmax":
        return start_BC1[..., 0] + pooled_BCS.masked_fill(~inside_BCS, -math.inf).argmax(-1)
    if rule == "argmin":
        return start_BC1[..., 0] + pooled_BCS.masked_fill(~inside_BCS, math.inf).argmin(-1)
    scores_BCS = pooled_BCS if rule == "entropy" else torch.zeros_like(pooled_BCS)
    ladder_BCS = scores_BCS.masked_fill(~inside_BCS, -math.inf).softmax(-1).cumsum(-1)
    # The first step of the ladder above the draw; rounding can leave the last one a little below 1.
    below_BC = ((ladder_BCS <= draws_BC[..., None]) & inside_BCS).sum(-1)
    return start_BC1[..., 0] + torch.minimum(below_BC, (stop_BC1 - start_BC1)[..., 0] - 1)


def draw_uniforms(rng: Sequence[torch.Generator], count: int) -> Tensor:
    """[B, count] uniform numbers in [0, 1), float64, row b from generator b."""
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in rng])
