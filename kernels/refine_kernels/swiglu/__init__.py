"""silu(gate) · up, alone or followed by a linear map."""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose

__all__ = ["swiglu", "swiglu_linear"]


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) · up, computed in float32 or wider, in the dtype of `up`; all [..., I]."""
    return choose(__name__, impl, gate).swiglu(gate, up)


def swiglu_linear(gate: Tensor, up: Tensor, weight_DI: Tensor, *, impl: Impl = "auto") -> Tensor:
    """(silu(gate) · up) @ weight^T, [..., D]; the fused form makes the product again instead of storing it."""
    return choose(__name__, impl, gate).swiglu_linear(gate, up, weight_DI)
