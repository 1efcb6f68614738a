"""Causal softmax attention to the last few tokens, with keys and values of tokens read earlier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.packing import Packing

__all__ = ["window_attention"]


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
    impl: Impl = "auto",
) -> Tensor:
    """softmax(scale · q k^T) v over the keys that each query may see; [B, T, H, D] in the dtype of v.

    Args:
        q_BTHD: queries of T tokens, any float dtype; the softmax runs in float32 (float64 for float64).
        k_BSGD, v_BSGD: keys and values, S >= T. The last T belong to the queries' own tokens; the S - T before them
            are history. G divides H: consecutive H / G query heads share a key head.
        past_B: int64, how many entries of each row's history are real; they are the last ones, and the others must
            be finite. None: all of them.
        past: the same on the host, where it is known; many queries of rows that differ are much faster with it.
        window: how many keys a query sees at most, its own included; None for all up to its own.
        scale: of the scores; None for D**-0.5.
        packing: where several texts, without history, lie one after another in one row (B = 1, S = T = M); a query sees
            nothing of other texts. None for a text in each row.
        impl: see `refine_kernels.choose`.
    """
    ops = choose(__name__, impl, q_BTHD)
    return ops.window_attention(q_BTHD, k_BSGD, v_BSGD, past_B, past=past, window=window, scale=scale, packing=packing)
