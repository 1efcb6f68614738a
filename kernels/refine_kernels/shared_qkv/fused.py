"""The two uses of one projection as one Triton kernel forward and one backward, each a single pass over it.

Fast queries, keys and values are written head by head ([B, H, T, K] in memory), where the products of fast weights read
them without a copy. Only the projection is kept for the backward, which makes everything else again. Its programs walk
over tokens a fixed stride apart, so that the shares of the gradients of scale and offset are few and need no atomics.

With z = x · scale + offset, a = silu(z), n = ‖a‖ and u = a / (n + ε): da = (du - u ⟨du, u⟩ (n + ε) / n) / (n + ε).
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.rotary import Turns
from refine_kernels.runtime import ceiling, why_no_triton
from refine_kernels.shared_qkv import UNIT_EPS, SharedQKV

PAIRS = 2048
"""Channel pairs of one program's tile."""
PROGRAMS = 1536
"""Of the backward, about."""
LARGEST_HEAD = 4096


def why_not(x: Tensor, *, whole_heads: bool) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if not whole_heads:
        return "heads of fast weights are not whole heads of attention"
    return why_no_triton(x)


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
    flags = {"SILU": silu, "SILU_V": silu_values, "TURN": turn_fast}
    made: Any = _SharedQKV.apply(qkv_BT3D, scale_D2, offset_D2, *by, fast_heads, flags)
    q, k, v, *fast = made
    A, size = qkv_BT3D.shape[-1] // (2 * by.cos_BTP.shape[-1]), 2 * by.cos_BTP.shape[-1]
    fast_q, fast_k, fast_v = (x.transpose(1, 2) for x in fast)
    return SharedQKV(q.unflatten(-1, (A, size)), k.unflatten(-1, (A, size)), v, fast_q, fast_k, fast_v)


class _SharedQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, scale, offset, cos, sin, heads, flags):  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, scale, offset, cos, sin = (x.contiguous() for x in (qkv, scale, offset, cos, sin))
        B, T, _, D = qkv.shape
        turned = qkv.new_empty(2, B, T, D)
        fast = qkv.new_empty(3, B, heads, T, D // heads)
        BP = triton.next_power_of_2(D // heads // 2)
        BT = min(max(1, PAIRS // BP), triton.next_power_of_2(T))
        ctx.tile = {"H": heads, "K": D // heads, "HALF": cos.shape[-1], "BT": BT, "BP": BP, "EPS": UNIT_EPS, **flags}
        with torch.cuda.device_of(qkv):
            _shared_qkv_kernel[(ceiling(T, BT), heads, 3 * B)](
                qkv, scale, offset, cos, sin, turned, fast, T, B, **ctx.tile
            )
        ctx.save_for_backward(qkv, scale, offset, cos, sin)
        return turned[0], turned[1], qkv[:, :, 2], fast[0], fast[1], fast[2]

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        qkv, scale, offset, cos, sin = ctx.saved_tensors
        B, T, _, D = qkv.shape
        H, BT = ctx.tile["H"], ctx.tile["BT"]
        P = min(ceiling(T, BT), ceiling(PROGRAMS, 3 * B * H))
        dqkv = torch.empty_like(qkv)
        shares = torch.empty(2, B * P, D, 2, dtype=torch.float32, device=qkv.device)
        with torch.cuda.device_of(qkv):
            _shared_qkv_back_kernel[(P, H, 3 * B)](
                qkv, scale, offset, cos, sin, *(x.contiguous() for x in grads), dqkv, shares, T, B, **ctx.tile
            )
        dscale, doffset = shares.sum(1)
        return dqkv, dscale.to(scale.dtype), doffset.to(offset.dtype), None, None, None, None


@triton.jit
def _slope(z, s):
    """Of silu, where s is the sigmoid of z."""
    return s * (1 + z * (1 - s))


@triton.jit
def _shared_qkv_kernel(
    qkv, scale, offset, cos, sin, turned, fast, T, B,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr,
    SILU: tl.constexpr, SILU_V: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    which, b, h = tl.program_id(2) % 3, (tl.program_id(2) // 3).to(tl.int64), tl.program_id(1)
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    pairs = tl.arange(0, BP)
    inside = (tokens[:, None] < T) & (pairs[None, :] < K // 2)
    first = pairs // HALF * (2 * HALF) + pairs % HALF
    at = (((b * T + tokens) * 3 + which) * H + h)[:, None] * K + first[None, :]
    x_1 = tl.load(qkv + at, mask=inside, other=0).to(tl.float32)
    x_2 = tl.load(qkv + at + HALF, mask=inside, other=0).to(tl.float32)
    to = fast + (((which * B + b) * H + h) * T + tokens)[:, None] * K + first[None, :]
    if which == 2:
        if SILU_V:
            x_1 *= tl.sigmoid(x_1)
            x_2 *= tl.sigmoid(x_2)
        tl.store(to, x_1.to(fast.dtype.element_ty), mask=inside)
        tl.store(to + HALF, x_2.to(fast.dtype.element_ty), mask=inside)
    else:
        angle = (b * T + tokens)[:, None] * HALF + (pairs % HALF)[None, :]
        c = tl.load(cos + angle, mask=inside, other=0)
        s = tl.load(sin + angle, mask=inside, other=0)
        plain = turned + (((which * B + b) * T + tokens) * H + h)[:, None] * K + first[None, :]
        tl.store(plain, (x_1 * c - x_2 * s).to(turned.dtype.element_ty), mask=inside)
        tl.store(plain + HALF, (x_1 * s + x_2 * c).to(turned.dtype.element_ty), mask=inside)
        channel = (h * K + first) * 2 + which
        kept = pairs < K // 2
        z_1 = x_1 * tl.load(scale + channel, mask=kept, other=0).to(tl.float32)[None, :]
        z_2 = x_2 * tl.load(scale + channel + 2 * HALF, mask=kept, other=0).to(tl.float32)[None, :]
        z_1 += tl.load(offset + channel, mask=kept, other=0).to(tl.float32)[None, :]
        z_2 += tl.load(offset + channel + 2 * HALF, mask=kept, other=0).to(tl.float32)[None, :]
        if SILU:
            z_1 *= tl.sigmoid(z_1)
            z_2 *= tl.sigmoid(z_2)
        n = tl.sqrt(tl.sum(z_1 * z_1, 1) + tl.sum(z_2 * z_2, 1))
        z_1 /= (n + EPS)[:, None]
        z_2 /= (n + EPS)[:, None]
        if TURN:
            u_1 = z_1 * c - z_2 * s
            z_2 = z_1 * s + z_2 * c
            z_1 = u_1
        tl.store(to, z_1.to(fast.dtype.element_ty), mask=inside)
        tl.store(to + HALF, z_2.to(fast.dtype.element_ty), mask=inside)


@triton.jit
def _shared_qkv_back_kernel(
    qkv, scale, offset, cos, sin, dq, dk, dv, dfast_q, dfast_k, dfast_v, dqkv, shares, T, B,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr,
    SILU: tl.constexpr, SILU_V: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    which, b, h = tl.program_id(2) % 3, (tl.program_id(2) // 3).to(tl.int64), tl.program_id(1)
    pairs = tl.arange(0, BP)
    kept = pairs < K // 2
    first = pairs // HALF * (2 * HALF) + pairs % HALF
    if which == 2:
        for block in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
            tokens = (block * BT + tl.arange(0, BT)).to(tl.int64)
            inside = (tokens[:, None] < T) & kept[None, :]
            at = (((b * T + tokens) * 3 + which) * H + h)[:, None] * K + first[None, :]
            plain = ((b * T + tokens) * H + h)[:, None] * K + first[None, :]
            fast = ((b * H + h) * T + tokens)[:, None] * K + first[None, :]
            for half in tl.static_range(2):
                x = tl.load(qkv + at + half * HALF, mask=inside, other=0).to(tl.float32)
                d = tl.load(dfast_v + fast + half * HALF, mask=inside, other=0).to(tl.float32)
                if SILU_V:
                    d *= _slope(x, tl.sigmoid(x))
                d += tl.load(dv + plain + half * HALF, mask=inside, other=0).to(tl.float32)
                tl.store(dqkv + at + half * HALF, d.to(dqkv.dtype.element_ty), mask=inside)
    else:
        own, fast_own = dq, dfast_q
        if which == 1:
            own, fast_own = dk, dfast_k
        channel = (h * K + first) * 2 + which
        scale_1 = tl.load(scale + channel, mask=kept, other=0).to(tl.float32)[None, :]
        scale_2 = tl.load(scale + channel + 2 * HALF, mask=kept, other=0).to(tl.float32)[None, :]
        offset_1 = tl.load(offset + channel, mask=kept, other=0).to(tl.float32)[None, :]
        offset_2 = tl.load(offset + channel + 2 * HALF, mask=kept, other=0).to(tl.float32)[None, :]
        dscale_1 = tl.zeros([BT, BP], dtype=tl.float32)
        dscale_2 = tl.zeros([BT, BP], dtype=tl.float32)
        doffset_1 = tl.zeros([BT, BP], dtype=tl.float32)
        doffset_2 = tl.zeros([BT, BP], dtype=tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
            tokens = (block * BT + tl.arange(0, BT)).to(tl.int64)
            inside = (tokens[:, None] < T) & kept[None, :]
            at = (((b * T + tokens) * 3 + which) * H + h)[:, None] * K + first[None, :]
            plain = ((b * T + tokens) * H + h)[:, None] * K + first[None, :]
            fast = ((b * H + h) * T + tokens)[:, None] * K + first[None, :]
            angle = (b * T + tokens)[:, None] * HALF + (pairs % HALF)[None, :]
            c = tl.load(cos + angle, mask=inside, other=0)
            s = tl.load(sin + angle, mask=inside, other=0)
            x_1 = tl.load(qkv + at, mask=inside, other=0).to(tl.float32)
            x_2 = tl.load(qkv + at + HALF, mask=inside, other=0).to(tl.float32)
            z_1 = x_1 * scale_1 + offset_1
            z_2 = x_2 * scale_2 + offset_2
            u_1, u_2 = z_1, z_2
            if SILU:
                u_1 *= tl.sigmoid(z_1)
                u_2 *= tl.sigmoid(z_2)
            n = tl.sqrt(tl.sum(u_1 * u_1, 1) + tl.sum(u_2 * u_2, 1))
            u_1 /= (n + EPS)[:, None]
            u_2 /= (n + EPS)[:, None]
            d_1 = tl.load(fast_own + fast, mask=inside, other=0).to(tl.float32)
            d_2 = tl.load(fast_own + fast + HALF, mask=inside, other=0).to(tl.float32)
            if TURN:
                back_1 = d_1 * c + d_2 * s
                d_2 = d_2 * c - d_1 * s
                d_1 = back_1
            along = tl.sum(d_1 * u_1, 1) + tl.sum(d_2 * u_2, 1)
            along = tl.where(n > 0, along * (n + EPS) / tl.where(n > 0, n, 1), 0)[:, None]
            d_1 = (d_1 - u_1 * along) / (n + EPS)[:, None]
            d_2 = (d_2 - u_2 * along) / (n + EPS)[:, None]
            if SILU:
                d_1 *= _slope(z_1, tl.sigmoid(z_1))
                d_2 *= _slope(z_2, tl.sigmoid(z_2))
            dscale_1 += d_1 * x_1
            dscale_2 += d_2 * x_2
            doffset_1 += d_1
            doffset_2 += d_2
            a_1 = tl.load(own + plain, mask=inside, other=0).to(tl.float32)
            a_2 = tl.load(own + plain + HALF, mask=inside, other=0).to(tl.float32)
            d_1 = d_1 * scale_1 + a_1 * c + a_2 * s
            d_2 = d_2 * scale_2 + a_2 * c - a_1 * s
            tl.store(dqkv + at, d_1.to(dqkv.dtype.element_ty), mask=inside)
            tl.store(dqkv + at + HALF, d_2.to(dqkv.dtype.element_ty), mask=inside)
        share = (b * tl.num_programs(0) + tl.program_id(0)) * (2 * H * K) + channel
        other = B * tl.num_programs(0) * (2 * H * K)
        tl.store(shares + share, tl.sum(dscale_1, 0), mask=kept)
        tl.store(shares + share + 2 * HALF, tl.sum(dscale_2, 0), mask=kept)
        tl.store(shares + other + share, tl.sum(doffset_1, 0), mask=kept)
        tl.store(shares + other + share + 2 * HALF, tl.sum(doffset_2, 0), mask=kept)
