"""The two uses of one projection in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.rotary import Turns
from refine_kernels.rotary.reference import rotary
from refine_kernels.shared_qkv import UNIT_EPS, SharedQKV


def shared_qkv(
    qkv_BT3D: Tensor,
    scale_D2: Tensor,
    offset_D2: Tensor,
    by: Turns,
    *,
    fast_heads: int,
    silu: bool = True,
    silu_values: bool = True,
    turn_fast: bool = True,
) -> SharedQKV:
    """See `refine_kernels.shared_qkv.shared_qkv`."""
    B, T, _, D = qkv_BT3D.shape
    size = 2 * by.cos_BTP.shape[-1]
    qk_BT2D, v_BTD = qkv_BT3D[:, :, :2], qkv_BT3D[:, :, 2]

    def turned(x_BT2D: Tensor) -> Tensor:
        return rotary(x_BT2D.reshape(B, T, 2 * D // size, size), by).view(B, T, 2, D // size, size)

    q_BTAI, k_BTAI = turned(qk_BT2D).unbind(2)
    fast_BT2D = qk_BT2D * scale_D2.t() + offset_D2.t()
    if silu:
        fast_BT2D = F.silu(fast_BT2D)
    fast_BT2D = _unit(fast_BT2D.view(B, T, 2, fast_heads, -1)).flatten(3)
    if turn_fast:
        fast_BT2D = turned(fast_BT2D).flatten(3)
    fast_q_BTHK, fast_k_BTHK = fast_BT2D.to(v_BTD.dtype).view(B, T, 2, fast_heads, -1).unbind(2)
    fast_v_BTHK = (F.silu(v_BTD) if silu_values else v_BTD).view(B, T, fast_heads, -1)
    return SharedQKV(q_BTAI, k_BTAI, v_BTD, fast_q_BTHK, fast_k_BTHK, fast_v_BTHK)


def _unit(x: Tensor) -> Tensor:
    """x over its Euclidean norm along the last dimension, with the published epsilon; float32 or wider inside."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + UNIT_EPS)).to(x.dtype)
