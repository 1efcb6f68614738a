"""The short convolution in plain torch: a sum of W shifted copies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.packing import Packing


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    before_BPD: Tensor | None = None,
    *,
    bias_D: Tensor | None = None,
    silu: bool = True,
    unit_heads: int | None = None,
    packing: Packing | None = None,
    leading: bool = False,
) -> Tensor:
    """See `refine_kernels.short_conv.short_conv`. Packed texts are computed as padded rows."""
    if packing is not None:
        rows_BTD = packing.spread(x_BTD)
        y_BTD = short_conv(rows_BTD, weight_DW, before_BPD, bias_D=bias_D, silu=silu, unit_heads=unit_heads)
        return packing.pack(y_BTD)
    W = weight_DW.shape[1]
    if leading:
        before_BPD, x_BTD = x_BTD[:, : W - 1], x_BTD[:, W - 1 :]
    B, T, D = x_BTD.shape
    if before_BPD is None:
        before_BPD = x_BTD.new_zeros(B, W - 1, D)
    wide = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    inputs_BSD = torch.cat((before_BPD.to(x_BTD.dtype), x_BTD), 1).to(wide)
    taps_WD = weight_DW.to(wide).t()
    y_BTD = inputs_BSD[:, :T] * taps_WD[0]
    for j in range(1, W):
        y_BTD = torch.addcmul(y_BTD, inputs_BSD[:, j : j + T], taps_WD[j])
    if bias_D is not None:
        y_BTD = y_BTD + bias_D.to(wide)
    if silu:
        y_BTD = F.silu(y_BTD)
    if unit_heads is not None:
        y_BTHK = y_BTD.view(B, T, unit_heads, -1)
        y_BTD = (y_BTHK * torch.rsqrt(y_BTHK.square().sum(-1, keepdim=True) + 1e-6)).view(B, T, D)
    return y_BTD.to(x_BTD.dtype)


def short_conv_step(
    x_BD: Tensor, weight_DW: Tensor, before_BPD: Tensor, *, silu: bool = True, unit_heads: int | None = None
) -> Tensor:
    """See `refine_kernels.short_conv.short_conv_step`."""
    y_B1D = short_conv(x_BD[:, None], weight_DW, before_BPD, silu=silu, unit_heads=unit_heads)
    before_BPD.copy_(last_inputs(x_BD[:, None], before_BPD, None, weight_DW.shape[1]))
    return y_B1D[:, 0]


def last_inputs(
    x_BTD: Tensor,
    before_BPD: Tensor | None,
    positions_BC: Tensor | None,
    taps: int,
    packing: Packing | None = None,
) -> Tensor:
    """See `refine_kernels.short_conv.last_inputs`."""
    P = taps - 1
    if positions_BC is None and packing is not None:
        positions_BC = packing.lengths_B[:, None] - 1
    if positions_BC is None:
        B, T, D = x_BTD.shape
        if T >= P:
            return x_BTD[:, T - P :].clone()
        earlier_BPD = x_BTD.new_zeros(B, P, D) if before_BPD is None else before_BPD.to(x_BTD.dtype)
        return torch.cat((earlier_BPD[:, T:], x_BTD), 1)
    at_BCP = positions_BC[..., None] + torch.arange(1 - P, 1, device=positions_BC.device)
    rows_B11 = torch.arange(len(positions_BC), device=x_BTD.device)[:, None, None]
    if packing is None:
        here = x_BTD[rows_B11, at_BCP.clamp(min=0)]
    else:
        here = x_BTD[0, packing.starts[:-1, None, None] + at_BCP.clamp(min=0)]
    if before_BPD is None:
        earlier = here.new_zeros(())
    else:
        earlier = before_BPD[rows_B11, (at_BCP + P).clamp(max=P - 1)].to(x_BTD.dtype)
    return torch.where(at_BCP[..., None] >= 0, here, earlier).flatten(0, 1)
