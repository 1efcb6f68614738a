"""Linear maps of a few rows without gradients, where reading the weights is all of the work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from refine_kernels.choose import Impl, choose

__all__ = ["ALONE", "FEW", "thin_linear", "thin_linears", "thin_swiglu"]

FEW = 16
"""Rows that the fused form takes at most."""
ALONE = 2
"""Rows up to which one map by itself is faster in the fused form than in the library's product, on a Hopper GPU."""


def thin_linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """x @ weight^T + bias, [..., N] in the dtype of x; see `thin_linears`."""
    return thin_linears(x, [(weight_ND, bias_N)], impl=impl)[0]


def thin_linears(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], *, impl: Impl = "auto") -> tuple[Tensor, ...]:
    """x @ weight^T + bias for each of a few maps of the same x, in one pass; [..., N] each, in memory of its own.

    There are no gradients.

    Args:
        x: [..., D], any float dtype; sums are in float32 (float64 for float64).
        maps: weight [N, D] and bias [N] or None, in the dtype of x. Their N may differ.
        impl: see `refine_kernels.choose`. The fused form takes at most `FEW` rows of x.
    """
    return _ops(impl, x, [tensor for each in maps for tensor in each]).thin_linears(x, maps)


def thin_swiglu(x: Tensor, gate_ID: Tensor, up_ID: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(x @ gate^T) · (x @ up^T), [..., I] in the dtype of x, to which both products are rounded; no gradients.

    Args: see `thin_linears`; the weights have one shape.
    """
    return _ops(impl, x, (gate_ID, up_ID)).thin_swiglu(x, gate_ID, up_ID)


def _ops(impl: Impl, x: Tensor, given: Sequence[Tensor | None]):
    return choose(__name__, impl, x, one_dtype=all(tensor is None or tensor.dtype == x.dtype for tensor in given))
