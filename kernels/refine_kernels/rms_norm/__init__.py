"""Root-mean-square norm, alone, behind a residual sum, or with an output gate."""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose

__all__ = ["add_rms_norm", "gated_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, impl: Impl = "auto") -> Tensor:
    """x / rms(x) · weight over the last dimension, computed in float32 or wider, in the dtype of x.

    Args:
        x: [..., D], any float dtype.
        weight_D: the scale of each channel.
        eps: added to the mean square.
        impl: see `refine_kernels.choose`.
    """
    return choose(__name__, impl, x).rms_norm(x, weight_D, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, in the dtype of x, and x + residual, in the dtype of the residual; both [..., D]."""
    return choose(__name__, impl, x).add_rms_norm(x, residual, weight_D, eps)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, *, activation: str = "silu", impl: Impl = "auto"
) -> Tensor:
    """rms_norm(x) · activation(gate), in the dtype of x; activation is silu or sigmoid; gate [..., D]."""
    return choose(__name__, impl, x).gated_rms_norm(x, gate, weight_D, eps, activation=activation)
