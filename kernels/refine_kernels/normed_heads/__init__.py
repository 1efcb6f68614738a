"""What heads read is normed, gated and added to what another branch made of the same tokens."""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose

__all__ = ["add_normed_heads"]


def add_normed_heads(
    base_BTD: Tensor, x_BTHK: Tensor, weight_K: Tensor, gate_BTH: Tensor | None, eps: float, *, impl: Impl = "auto"
) -> Tensor:
    """base + rms_norm(x) · silu(gate), the heads side by side; [B, T, D] in the dtype of the base.

    Args:
        base_BTD: D = H·K, any float dtype; sums are in float32 (float64 for float64).
        x_BTHK: each head's output; the fused form takes it in any memory order of tokens and heads.
        weight_K: the scale of each channel of a head.
        gate_BTH: one number per token and head, before silu; None for a factor of 1.
        eps: added to the mean square.
        impl: see `refine_kernels.choose`.
    """
    return choose(__name__, impl, x_BTHK).add_normed_heads(base_BTD, x_BTHK, weight_K, gate_BTH, eps)
