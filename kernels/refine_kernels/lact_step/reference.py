"""One token of LaCT in plain torch: one reading of the fast weights, and one write into each buffer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact.reference import Chunk, Weights, apply


def lact_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    rates_BHX: Tensor,
    momentum_BH: Tensor | None,
    weights: Weights,
    unfinished: Chunk,
    held_B: Tensor,
    *,
    rate_bias: float,
) -> Tensor:
    """See `refine_kernels.lact_step.lact_step`."""
    with torch.autocast(q_BHK.device.type, enabled=False):
        outputs_B1HV = apply(weights, q_BHK[:, None])
    wide = torch.float64 if rates_BHX.dtype == torch.float64 else torch.float32
    rates_BHX = F.softplus(rates_BHX.to(wide) + rate_bias)
    token = k_BHK, v_BHV, rates_BHX, None if momentum_BH is None else momentum_BH.sigmoid()
    for buffer, x in zip(unfinished, token, strict=True):
        if buffer is not None and x is not None:
            at = held_B.view(-1, *[1] * x.dim()).expand_as(x[:, None])
            buffer.scatter_(1, at, x[:, None].to(buffer.dtype))
    return outputs_B1HV[:, 0]
