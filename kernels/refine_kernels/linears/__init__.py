"""Several linear maps of the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from refine_kernels.choose import Impl, choose

__all__ = ["Map", "linears"]

Map = tuple[Tensor, Tensor | None]
"""Weight [N, D] and bias [N] of a linear map."""


def linears(x: Tensor, maps: Sequence[Map], *, impl: Impl = "auto") -> list[Tensor]:
    """x [..., D] under each map, [..., N], in the dtype that torch's linear map would have (autocast included).

    Differentiable in x, weights and biases.
    """
    return choose(__name__, impl, x).linears(x, maps)
