"""The short convolution as Triton kernels: convolution, bias, activation and the norm of each head in one pass.

With z the convolution and y = unit(silu(z)), the backward first makes dz from dy (z is computed again from x, so only x
is stored) with the filters' gradient, then dx[t] = sum_j weight[j] · dz[t + W - 1 - j].

A program has a block of one text's tokens; where texts are packed, `blocks` says which.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.packing import Packing
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
    packing: Packing | None = None,
) -> Tensor:
    """See `refine_kernels.short_conv.short_conv`."""
    return _ShortConv.apply(x_BTD, weight_DW, before_BPD, bias_D, silu, unit_heads or 0, packing)  # pyright: ignore[reportReturnType]


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, before, bias, silu, heads, packing):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = x.contiguous(), weight.contiguous()
        before = None if before is None else before.contiguous()
        B, T, D = x.shape
        W = weight.shape[1]
        C = D // heads if heads else min(CHANNELS, D)
        ctx.sizes = {
            "T": T, "D": D, "C": C, "W": W, "BT": min(TOKENS, triton.next_power_of_2(T)),
            "BC": triton.next_power_of_2(C), "BEFORE": before is not None, "PACKED": packing is not None,
        }  # fmt: skip
        ctx.packing = packing
        ctx.form = {"SILU": silu, "UNIT": bool(heads), "BIAS": bias is not None}
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            count, *where = _blocks(packing, T, ctx.sizes["BT"])
            _forward_kernel[(count, ceiling(D, C), B)](x, weight, before, bias, y, *where, **ctx.sizes, **ctx.form)
        ctx.save_for_backward(x, weight, before, bias)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, before, bias = ctx.saved_tensors
        B, T, D = x.shape
        W, C, BT = ctx.sizes["W"], ctx.sizes["C"], ctx.sizes["BT"]
        count, *where = _blocks(ctx.packing, T, BT)
        later_count, *later = _blocks(ctx.packing, T, BT, W - 1)
        dz, dx = torch.empty_like(x), torch.empty_like(x)
        dbefore = torch.empty_like(before) if before is not None and ctx.needs_input_grad[2] else None
        dweight = torch.empty(B * count, W + 1, D, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _slope_kernel[(count, ceiling(D, C), B)](
                x, weight, before, bias, dy.contiguous(), dz, dweight, *where, **ctx.sizes, **ctx.form
            )
            _input_kernel[(later_count, ceiling(D, C), B)](
                dz, weight, dx, dbefore, *later,
                T=T, D=D, C=C, W=W, BT=BT, BC=ctx.sizes["BC"], STATE=dbefore is not None,
                PACKED=ctx.sizes["PACKED"],
            )  # fmt: skip
        total = dweight.sum(0)
        dbias = None if bias is None else total[W].to(bias.dtype)
        return dx, total[:W].t().to(weight.dtype), dbefore, dbias, None, None, None


def _blocks(packing: Packing | None, T: int, size: int, more: int = 0) -> tuple[int, Tensor | None, Tensor | None]:
    """How many blocks of `size` tokens a row longer by `more` has; of packed texts all have, and where each is."""
    if packing is None:
        return ceiling(T + more, size), None, None
    index_N2 = packing.pieces(size, more).index_N2
    return len(index_N2), index_N2, packing.starts


@triton.jit
def _place(blocks, starts, T, BT: tl.constexpr, PACKED: tl.constexpr):
    """This program's text, the place of the text's first token in x, that of the first after it, and this program's
    first token in its text."""
    if PACKED:
        row = tl.load(blocks + 2 * tl.program_id(0))
        first = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int32) * BT
        start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    else:
        row = tl.program_id(2).to(tl.int64)
        first = tl.program_id(0) * BT
        start, stop = row * T, (row + 1) * T
    return row, start, stop, first


@triton.jit
def _convolve(
    x, weight, before, bias, tokens, channels, row, start, T, D: tl.constexpr, W: tl.constexpr, inside,
    BEFORE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    b_z = tl.zeros(inside.shape, dtype=tl.float32)
    for j in tl.static_range(W):
        b_x = _input(x, before, tokens + (j - W + 1), channels, row, start, T, D, W, inside, BEFORE)
        b_w = tl.load(weight + channels * W + j, mask=channels < D, other=0).to(tl.float32)
        b_z += b_x * b_w[None, :]
    if BIAS:
        b_z += tl.load(bias + channels, mask=channels < D, other=0).to(tl.float32)[None, :]
    return b_z


@triton.jit
def _input(
    x, before, tokens, channels, row, start, T, D: tl.constexpr, W: tl.constexpr, inside, BEFORE: tl.constexpr
):  # fmt: skip
    here = inside & (tokens[:, None] >= 0) & (tokens[:, None] < T)
    b_x = tl.load(x + (start + tokens)[:, None] * D + channels[None, :], mask=here, other=0).to(tl.float32)
    if BEFORE:
        earlier = inside & (tokens[:, None] < 0) & (tokens[:, None] > -W)
        at = (row * (W - 1) + tokens + W - 1)[:, None] * D + channels[None, :]
        b_x += tl.load(before + at, mask=earlier, other=0).to(tl.float32)
    return b_x


@triton.jit
def _forward_kernel(
    x, weight, before, bias, y, blocks, starts, T, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, start, stop, first = _place(blocks, starts, T, BT, PACKED)
    if PACKED:
        T = (stop - start).to(tl.int32)
    tokens = first + tl.arange(0, BT)
    local = tl.arange(0, BC)
    channels = tl.program_id(1) * C + local
    inside = (tokens[:, None] < T) & (local[None, :] < C) & (channels[None, :] < D)
    b_y = _convolve(x, weight, before, bias, tokens, channels, row, start, T, D, W, inside, BEFORE, BIAS)
    if SILU:
        b_y *= tl.sigmoid(b_y)
    if UNIT:
        b_y = tl.where(inside, b_y, 0)
        b_y *= (1 / tl.sqrt(tl.sum(b_y * b_y, 1) + 1e-6))[:, None]
    at = (start + tokens)[:, None] * D + channels[None, :]
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _slope_kernel(
    x, weight, before, bias, dy, dz, dweight, blocks, starts, T, D: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr,
    SILU: tl.constexpr, UNIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, start, stop, first = _place(blocks, starts, T, BT, PACKED)
    if PACKED:
        T = (stop - start).to(tl.int32)
    tokens = first + tl.arange(0, BT)
    local = tl.arange(0, BC)
    channels = tl.program_id(1) * C + local
    inside = (tokens[:, None] < T) & (local[None, :] < C) & (channels[None, :] < D)
    at = (start + tokens)[:, None] * D + channels[None, :]
    b_z = _convolve(x, weight, before, bias, tokens, channels, row, start, T, D, W, inside, BEFORE, BIAS)
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
    block = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    share = dweight + block * (W + 1) * D + channels
    kept = (local < C) & (channels < D)
    for j in tl.static_range(W):
        b_x = _input(x, before, tokens + (j - W + 1), channels, row, start, T, D, W, inside, BEFORE)
        tl.store(share + j * D, tl.sum(b_dz * b_x, 0), mask=kept)
    tl.store(share + W * D, tl.sum(b_dz, 0), mask=kept)


@triton.jit
def _input_kernel(
    dz, weight, dx, dbefore, blocks, starts, T, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row, start, stop, first = _place(blocks, starts, T, BT, PACKED)
    if PACKED:
        T = (stop - start).to(tl.int32)
    tokens = first + tl.arange(0, BT) - (W - 1)
    local = tl.arange(0, BC)
    channels = tl.program_id(1) * C + local
    inside = (local[None, :] < C) & (channels[None, :] < D)
    b_dx = tl.zeros([BT, BC], dtype=tl.float32)
    for j in tl.static_range(W):
        later = tokens + (W - 1 - j)
        there = inside & (later[:, None] >= 0) & (later[:, None] < T)
        b_dz = tl.load(dz + (start + later)[:, None] * D + channels[None, :], mask=there, other=0).to(tl.float32)
        b_w = tl.load(weight + channels * W + j, mask=channels < D, other=0).to(tl.float32)
        b_dx += b_dz * b_w[None, :]
    here = inside & (tokens[:, None] >= 0) & (tokens[:, None] < T)
    at = (start + tokens)[:, None] * D + channels[None, :]
    tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=here)
    if STATE:
        earlier = inside & (tokens[:, None] < 0)
        at = (row * (W - 1) + tokens + W - 1)[:, None] * D + channels[None, :]
        tl.store(dbefore + at, b_dx.to(dbefore.dtype.element_ty), mask=earlier)
