"""One more token of each row: attention to a window and the token itself, and the window moves on by it, in place."""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose

__all__ = ["window_step"]


def window_step(
    q_BHD: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    keys_BPC: Tensor,
    values_BPC: Tensor,
    seen_B: Tensor,
    *,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(scale · q k^T) v over the window's tokens and the row's own; [B, H, D] in the dtype of v.

    Keys and values of the window are overwritten: each moves one place to the left, the first is dropped, and the own
    token's become the last. There are no gradients.

    Args:
        q_BHD, k_BHD, v_BHD: of the one token, any float dtype; the softmax runs in float32 (float64 for float64).
        keys_BPC, values_BPC: of the P tokens before it, the last one right before it; C = H·D, the heads side by side.
        seen_B: int64, how many tokens came before. Where they are fewer than P, that many entries are real, the last
            ones, and the others must be finite.
        scale: of the scores; None for D**-0.5.
        impl: see `refine_kernels.choose`.
    """
    ops = choose(__name__, impl, q_BHD)
    return ops.window_step(q_BHD, k_BHD, v_BHD, keys_BPC, values_BPC, seen_B, scale=scale)
