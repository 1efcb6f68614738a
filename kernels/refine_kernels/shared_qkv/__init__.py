"""One projection to queries, keys and values, used twice: by attention, and by fast weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.rotary import Turns

__all__ = ["SharedQKV", "shared_qkv"]

UNIT_EPS = 1e-5
"""Added to the norm of a head of fast queries or keys, as published."""


class SharedQKV(NamedTuple):
    """What each of the two is given, in the dtype of the projection."""

    q_BTAI: Tensor
    k_BTAI: Tensor
    v_BTD: Tensor
    fast_q_BTHK: Tensor
    fast_k_BTHK: Tensor
    fast_v_BTHK: Tensor


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
    impl: Impl = "auto",
) -> SharedQKV:
    """Attention's queries and keys turned by their positions; those of fast weights scaled, shifted, activated, made
    unit vectors in each of their heads (x / (‖x‖ + 1e-5)) and turned in attention's heads; and activated values.

    Args:
        qkv_BT3D: queries, keys and values, any float dtype; everything is computed in float32 (float64 for float64).
        scale_D2, offset_D2: of fast queries and keys, per channel.
        by: angles for attention's heads, whose size they tell.
        fast_heads: H; a head has K = D / H channels.
        silu, silu_values: whether fast queries and keys, and fast values, go through silu.
        turn_fast: whether fast queries and keys are turned.
        impl: see `refine_kernels.choose`.
    """
    size, K = 2 * by.cos_BTP.shape[-1], qkv_BT3D.shape[-1] // fast_heads
    ops = choose(__name__, impl, qkv_BT3D, whole_heads=K % size == 0)
    return ops.shared_qkv(
        qkv_BT3D, scale_D2, offset_D2, by,
        fast_heads=fast_heads, silu=silu, silu_values=silu_values, turn_fast=turn_fast,
    )  # fmt: skip
