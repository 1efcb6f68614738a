"""Several linear maps of the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.linears.reference import Map

__all__ = ["Map", "linears"]


def linears(x: Tensor, maps: Sequence[Map], *, impl: Impl = "auto") -> list[Tensor]:
    """x [..., D] under each map, [..., N], in the dtype that torch's linear map would have (autocast included).

    Differentiable in x, weights and biases.
    """
    return choose(__name__, impl, x).linears(x, maps)
