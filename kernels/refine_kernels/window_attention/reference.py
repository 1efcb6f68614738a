"""Windowed causal attention in plain torch, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from refine_kernels.packing import Packing

BLOCK = 256
"""Queries whose scores are stored together."""


def window_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    past_B: Tensor | None = None,
    *,
    past: Sequence[int] | None = None,
    window: int | None,
    scale: float | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """See `refine_kernels.window_attention.window_attention`."""
    if packing is not None:
        texts = zip(*(x.split(packing.lengths, 1) for x in (q_BTHD, k_BSGD, v_BSGD)), strict=True)
        return torch.cat([window_attention(*text, window=window, scale=scale) for text in texts], 1)
    B, T, H, D = q_BTHD.shape
    S, G = k_BSGD.shape[1:3]
    q_BTGND = q_BTHD.view(B, T, G, H // G, D) * (D**-0.5 if scale is None else scale)
    first_B = None if past_B is None else S - T - past_B
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        low, high = 0 if window is None else max(0, S - T + start - window + 1), S - T + stop
        visible = _visible(stop - start, low, high, window, first_B, q_BTHD.device)
        block = q_BTGND[:, start:stop], k_BSGD[:, low:high], v_BSGD[:, low:high], visible
        # Scores are made again in the backward pass, so that T × S of them are never kept.
        blocks.append(_attend(*block) if stop - start == T else checkpoint(_attend, *block, use_reentrant=False))
    o_BTGND = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    return o_BTGND.reshape(B, T, H, D)


def _visible(
    queries: int, low: int, high: int, window: int | None, first_B: Tensor | None, device: torch.device
) -> Tensor:
    """bool [B or 1, queries, keys]: which of the keys low .. high the last `queries` tokens before `high` see."""
    keys_1K = torch.arange(low, high, device=device)[None]
    own_Q1 = torch.arange(high - queries, high, device=device)[:, None]
    visible = (keys_1K <= own_Q1)[None]
    if window is not None:
        visible = visible & (keys_1K > own_Q1 - window)
    if first_B is not None:
        visible = visible & (keys_1K >= first_B[:, None])[:, None]
    return visible


def _attend(q_BTGND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, visible_BTS: Tensor) -> Tensor:
    wide = torch.float64 if q_BTGND.dtype == torch.float64 else torch.float32
    with torch.autocast(q_BTGND.device.type, enabled=False):
        scores_BGNTS = torch.einsum("btgnd,bsgd->bgnts", q_BTGND.to(wide), k_BSGD.to(wide))
        scores_BGNTS = scores_BGNTS.masked_fill(~visible_BTS[:, None, None], float("-inf"))
        o_BTGND = torch.einsum("bgnts,bsgd->btgnd", scores_BGNTS.softmax(-1), v_BSGD.to(wide))
    return o_BTGND.to(v_BSGD.dtype)
