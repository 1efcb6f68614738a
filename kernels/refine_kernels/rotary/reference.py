"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from refine_kernels.rotary import Turns


def rotary(x_BTHI: Tensor, by: Turns) -> Tensor:
    """See `refine_kernels.rotary.rotary`."""
    cos_BT1P, sin_BT1P = by.cos_BTP[:, :, None], by.sin_BTP[:, :, None]
    first, second = x_BTHI.to(cos_BT1P.dtype).chunk(2, -1)
    turned = first * cos_BT1P - second * sin_BT1P, first * sin_BT1P + second * cos_BT1P
    return torch.cat(turned, -1).to(x_BTHI.dtype)
