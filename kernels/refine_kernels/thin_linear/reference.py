"""Linear maps of a few rows in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from refine_kernels.swiglu.reference import swiglu


def thin_linears(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
    """See `refine_kernels.thin_linear.thin_linears`."""
    return tuple(F.linear(x, weight_ND, bias_N) for weight_ND, bias_N in maps)


def thin_swiglu(x: Tensor, gate_ID: Tensor, up_ID: Tensor) -> Tensor:
    """See `refine_kernels.thin_linear.thin_swiglu`."""
    return swiglu(F.linear(x, gate_ID), F.linear(x, up_ID))
