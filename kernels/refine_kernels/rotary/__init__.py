"""Rotary position embedding: channels in pairs, turned by angles that grow with a token's place in its text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refine_kernels.choose import Impl, choose

__all__ = ["Turns", "rotary", "turns"]


class Turns(NamedTuple):
    """Cosine and sine of each token's angles, float32 or wider; P is half the size of a head. One serves all layers."""

    cos_BTP: Tensor
    sin_BTP: Tensor


def turns(positions_BT: Tensor, size: int, theta: float, wide: torch.dtype = torch.float32) -> Turns:
    """Pair i of a head of that size turns by position · theta^(-2i / size) (Su et al., arXiv 2104.09864)."""
    pairs_P = torch.arange(0, size, 2, device=positions_BT.device, dtype=wide)
    angles_BTP = positions_BT[..., None].to(wide) * theta ** (-pairs_P / size)
    return Turns(angles_BTP.cos(), angles_BTP.sin())


def rotary(x_BTHI: Tensor, by: Turns, *, impl: Impl = "auto") -> Tensor:
    """Each head turned, the first half of its channels paired with the second; in the dtype of x, float32 inside.

    Args:
        x_BTHI: heads of even size I, any float dtype.
        by: from `turns`, for heads of this size; float64 for float64.
        impl: see `refine_kernels.choose`.
    """
    return choose(__name__, impl, x_BTHI).rotary(x_BTHI, by)
