"""Attention of short continuations to the window of a text that they go on from, which stays where it is."""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.fork_attention.elsewhere import Elsewhere

__all__ = ["Elsewhere", "fork_attention"]


def fork_attention(
    q_FQHD: Tensor,
    k_FQHD: Tensor,
    v_FQHD: Tensor,
    keys_BTHD: Tensor | Elsewhere,
    values_BTHD: Tensor | Elsewhere,
    positions_BC: Tensor,
    *,
    length: int,
    window: int,
    impl: Impl = "auto",
) -> Tensor:
    """What `window_attention` gives tokens read after each position, [F, Q, H, D] in the dtype of v.

    F = B·C forks, row-major, each continued N times by K tokens: Q = N·K, a continuation's tokens side by side. Query j
    of a continuation after position p sees the text's tokens p + j - W + 2 .. p and its continuation's up to itself.
    No window is copied, and its gradients are added up per token of the text, in a fixed order.

    Args:
        q_FQHD, k_FQHD, v_FQHD: of the continuations, any float dtype; the softmax runs in float32 or wider.
        keys_BTHD, values_BTHD: of the texts, which begin at token 0. Tokens after a row's last position are not looked
            at, and may be anything. Where both are `Elsewhere`, in the dtype of q, there are no gradients, and no plain
            form.
        positions_BC: int64, from -1 (before the text) to T - 1.
        length: K.
        window: W, how many keys a query sees at most, its own included.
        impl: see `refine_kernels.choose`.
    """
    ops = choose(__name__, impl, q_FQHD, short=length <= 64)
    return ops.fork_attention(
        q_FQHD, k_FQHD, v_FQHD, keys_BTHD, values_BTHD, positions_BC, length=length, window=window
    )
