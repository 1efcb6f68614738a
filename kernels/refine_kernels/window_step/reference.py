"""One step of windowed attention in plain torch: the longer window is made, read, and copied back without its start."""

from __future__ import annotations

import torch
from torch import Tensor

from refine_kernels.window_attention.reference import window_attention


def window_step(
    q_BHD: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    keys_BPC: Tensor,
    values_BPC: Tensor,
    seen_B: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """See `refine_kernels.window_step.window_step`."""
    P, heads = keys_BPC.shape[1], q_BHD.shape[1:]
    keys_BSC, values_BSC = (
        torch.cat((past, own.flatten(1)[:, None].to(past.dtype)), 1)
        for past, own in ((keys_BPC, k_BHD), (values_BPC, v_BHD))
    )
    o_B1HD = window_attention(
        q_BHD[:, None], keys_BSC.unflatten(2, heads), values_BSC.unflatten(2, heads), seen_B.clamp(max=P),
        window=P + 1, scale=scale,
    )  # fmt: skip
    keys_BPC.copy_(keys_BSC[:, 1:])
    values_BPC.copy_(values_BSC[:, 1:])
    return o_B1HD[:, 0].to(v_BHD.dtype)
