"""The short convolution as Triton kernels: convolution, bias, activation and the norm of each head in one pass.

With z the convolution and y = unit(silu(z)), the backward first makes dz from dy (z is computed again from x, so only x
is stored) with the filters' gradient, then dx[t] = sum_j weight[j] · dz[t + W - 1 - j].
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.runtime import ceiling, why_no_triton

TOKENS = 64
CHANNELS = 64
"""Of one program; where heads are normed, a program holds one whole head instead."""
LARGEST_HEAD = 512


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    return why_no_triton(x)


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    before_BPD: Tensor | None = None,
    *,
    bias_D: Tensor | None = None,
    silu: bool = True,
    unit_heads: int | None = None,
) -> Tensor:
    """See `refine_kernels.short_conv.short_conv`."""
    return _ShortConv.apply(x_BTD, weight_DW, before_BPD, bias_D, silu, unit_heads or 0)  # pyright: ignore[reportReturnType]


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, before, bias, silu, heads):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = x.contiguous(), weight.contiguous()
        before = None if before is None else before.contiguous()
        B, T, D = x.shape
        W = weight.shape[1]
        C = D // heads if heads else min(CHANNELS, D)
        ctx.sizes = {
            "T": T, "D": D, "C": C, "W": W, "BT": min(TOKENS, triton.next_power_of_2(T)),
            "BC": triton.next_power_of_2(C), "BEFORE": before is not None,
        }  # fmt: skip
        ctx.form = {"SILU": silu, "UNIT": bool(heads), "BIAS": bias is not None}
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _forward_kernel[(ceiling(T, ctx.sizes["BT"]), ceiling(D, C), B)](
                x, weight, before, bias, y, **ctx.sizes, **ctx.form
            )
        ctx.save_for_backward(x, weight, before, bias)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, before, bias = ctx.saved_tensors
        B, T, D = x.shape
        W, C, BT = ctx.sizes["W"], ctx.sizes["C"], ctx.sizes["BT"]
        NT = ceiling(T, BT)
        dz, dx = torch.empty_like(x), torch.empty_like(x)
        dbefore = torch.empty_like(before) if before is not None and ctx.needs_input_grad[2] else None
        dweight = torch.empty(B * NT, W + 1, D, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _slope_kernel[(NT, ceiling(D, C), B)](
                x, weight, before, bias, dy.contiguous(), dz, dweight, **ctx.sizes, **ctx.form
            )
            _input_kernel[(ceiling(T + W - 1, BT), ceiling(D, C), B)](
                dz, weight, dx, dbefore,
                T=T, D=D, C=C, W=W, BT=BT, BC=ctx.sizes["BC"], STATE=dbefore is not None,
            )  # fmt: skip
        total = dweight.sum(0)
        dbias = None if bias is None else total[W].to(bias.dtype)
        return dx, total[:W].t().to(weight.dtype), dbefore, dbias, None, None


@triton.jit
def _convolve(
    x, weight, before, bias, tokens, channels, row, T, D: tl.constexpr, W: tl.constexpr, inside,
    BEFORE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    b_z = tl.zeros(inside.shape, dtype=tl.float32)
    for j in tl.static_range(W):
        b_x = _input(x, before, tokens + (j - W + 1), channels, row, T, D, W, inside, BEFORE)
        b_w = tl.load(weight + channels * W + j, mask=channels < D, other=0).to(tl.float32)
        b_z += b_x * b_w[None, :]
    if BIAS:
        b_z += tl.load(bias + channels, mask=channels < D, other=0).to(tl.float32)[None, :]
    return b_z


@triton.jit
def _input(x, before, tokens, channels, row, T, D: tl.constexpr, W: tl.constexpr, inside, BEFORE: tl.constexpr):
    here = inside & (tokens[:, None] >= 0) & (tokens[:, None] < T)
    b_x = tl.load(x + (row * T + tokens)[:, None] * D + channels[None, :], mask=here, other=0).to(tl.float32)
    if BEFORE:
        earlier = inside & (tokens[:, None] < 0) & (tokens[:, None] > -W)
        at = (row * (W - 1) + tokens + W - 1)[:, None] * D + channels[None, :]
        b_x += tl.load(before + at, mask=earlier, other=0).to(tl.float32)
    return b_x


@triton.jit
def _forward_kernel(
    x, weight, before, bias, y, T, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, BEFORE: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    local = tl.arange(0, BC)
    channels = tl.program_id(1) * C + local
    inside = (tokens[:, None] < T) & (local[None, :] < C) & (channels[None, :] < D)
    b_y = _convolve(x, weight, before, bias, tokens, channels, row, T, D, W, inside, BEFORE, BIAS)
    if SILU:
        b_y *= tl.sigmoid(b_y)
    if UNIT:
        b_y = tl.where(inside, b_y, 0)
        b_y *= (1 / tl.sqrt(tl.sum(b_y * b_y, 1) + 1e-6))[:, None]
    at = (row * T + tokens)[:, None] * D + channels[None, :]
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _slope_kernel(
    x, weight, before, bias, dy, dz, dweight, T, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BEFORE: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    local = tl.arange(0, BC)
    channels = tl.program_id(1) * C + local
    inside = (tokens[:, None] < T) & (local[None, :] < C) & (channels[None, :] < D)
    at = (row * T + tokens)[:, None] * D + channels[None, :]
    b_z = _convolve(x, weight, before, bias, tokens, channels, row, T, D, W, inside, BEFORE, BIAS)
    b_dz = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    b_s = tl.sigmoid(b_z)
    if UNIT:
        b_a = tl.where(inside, b_z * b_s if SILU else b_z, 0)
        b_rstd = (1 / tl.sqrt(tl.sum(b_a * b_a, 1) + 1e-6))[:, None]
        b_a *= b_rstd
        b_dz = (b_dz - b_a * tl.sum(b_dz * b_a, 1)[:, None]) * b_rstd
    if SILU:
        b_dz *= b_s * (1 + b_z * (1 - b_s))
    # The filters' gradient and the inputs' use the same rounded values.
    b_dz = b_dz.to(dz.dtype.element_ty)
    tl.store(dz + at, b_dz, mask=inside)
    b_dz = tl.where(inside, b_dz.to(tl.float32), 0)
    share = dweight + (row * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * D + channels
    kept = (local < C) & (channels < D)
    for j in tl.static_range(W):
        b_x = _input(x, before, tokens + (j - W + 1), channels, row, T, D, W, inside, BEFORE)
        tl.store(share + j * D, tl.sum(b_dz * b_x, 0), mask=kept)
    tl.store(share + W * D, tl.sum(b_dz, 0), mask=kept)


@triton.jit
def _input_kernel(
    dz, weight, dx, dbefore, T, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT) - (W - 1)
    local = tl.arange(0, BC)
    channels = tl.program_id(1) * C + local
    inside = (local[None, :] < C) & (channels[None, :] < D)
    b_dx = tl.zeros([BT, BC], dtype=tl.float32)
    for j in tl.static_range(W):
        later = tokens + (W - 1 - j)
        there = inside & (later[:, None] >= 0) & (later[:, None] < T)
        b_dz = tl.load(dz + (row * T + later)[:, None] * D + channels[None, :], mask=there, other=0).to(tl.float32)
        b_w = tl.load(weight + channels * W + j, mask=channels < D, other=0).to(tl.float32)
        b_dx += b_dz * b_w[None, :]
    here = inside & (tokens[:, None] >= 0) & (tokens[:, None] < T)
    at = (row * T + tokens)[:, None] * D + channels[None, :]
    tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=here)
    if STATE:
        earlier = inside & (tokens[:, None] < 0)
        at = (row * (W - 1) + tokens + W - 1)[:, None] * D + channels[None, :]
        tl.store(dbefore + at, b_dx.to(dbefore.dtype.element_ty), mask=earlier)
