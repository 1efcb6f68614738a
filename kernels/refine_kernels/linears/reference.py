"""Several linear maps of the same rows, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Map = tuple[Tensor, Tensor | None]
"""Weight [N, D] and bias [N] of a linear map."""


def linears(x: Tensor, maps: Sequence[Map]) -> list[Tensor]:
    """See `refine_kernels.linears.linears`."""
    return [F.linear(x, weight, bias) for weight, bias in maps]
