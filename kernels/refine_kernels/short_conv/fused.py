"""The short convolution as Triton kernels: convolution, bias, activation and the norm of each head in one pass.

With z the convolution and y = unit(silu(z)), the backward first makes dz from dy (z is computed again from x, so only
x is stored). Then dx[t] = sum_j weight[j] · dz[t + W - 1 - j], and from the same dz
dweight[j] = sum_t x[t] · dz[t + W - 1 - j].

A program has a block of one text's tokens; where texts are packed, `blocks` says which. Blocks are small: the backward
holds half a dozen numbers for each of their elements, and what does not fit in registers costs more than all the rest.
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

CHANNELS = 128
"""Of one program at most; where heads are normed, a program holds one whole head."""
TOKENS = 64
"""Of one program at most."""
ELEMENTS = 2048
"""Of one program, where heads are no larger."""
WALK = 256
"""Tokens that one program of the last kernel walks over, so that its share of the filters' gradient is summed once."""
ROWS = 16
"""Of them at a time."""


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
    leading: bool = False,
) -> Tensor:
    """See `refine_kernels.short_conv.short_conv`."""
    heads = unit_heads or 0
    return _ShortConv.apply(x_BTD, weight_DW, before_BPD, bias_D, silu, heads, packing, leading)  # pyright: ignore[reportReturnType]


def short_conv_step(
    x_BD: Tensor, weight_DW: Tensor, before_BPD: Tensor, *, silu: bool = True, unit_heads: int | None = None
) -> Tensor:
    """See `refine_kernels.short_conv.short_conv_step`."""
    assert before_BPD.is_contiguous()
    x, weight = x_BD.contiguous(), weight_DW.contiguous()
    B, D = x.shape
    W = weight.shape[1]
    C = D // unit_heads if unit_heads else min(CHANNELS, D)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _short_conv_step_kernel[(ceiling(D, C), B)](
            x, weight, before_BPD, y, D=D, C=C, W=W, WP=triton.next_power_of_2(W), BC=triton.next_power_of_2(C),
            SILU=silu, UNIT=bool(unit_heads), num_warps=2,
        )  # fmt: skip
    return y


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, before, bias, silu, heads, packing, leading):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = x.contiguous(), weight.contiguous()
        before = None if before is None else before.contiguous()
        B, S, D = x.shape
        W = weight.shape[1]
        T = S - (W - 1) if leading else S
        C = D // heads if heads else min(CHANNELS, D)
        BC = triton.next_power_of_2(C)
        BT = min(TOKENS, max(1, ELEMENTS // BC), triton.next_power_of_2(T))
        ctx.sizes = {
            "T": T, "D": D, "C": C, "W": W, "BT": BT, "BC": BC,
            "BEFORE": before is not None, "PACKED": packing is not None, "LEAD": W - 1 if leading else 0,
        }  # fmt: skip
        ctx.packing = packing
        ctx.form = {"SILU": silu, "UNIT": bool(heads), "BIAS": bias is not None}
        y = x.new_empty(B, T, D)
        with torch.cuda.device_of(x):
            count, *where = _blocks(packing, T, BT)
            _short_conv_kernel[(count, ceiling(D, C), B)](x, weight, before, bias, y, *where, **ctx.sizes, **ctx.form)
        ctx.save_for_backward(x, weight, before, bias)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, before, bias = ctx.saved_tensors
        sizes = ctx.sizes
        B, T, D = dy.shape
        W = weight.shape[1]
        dz, dx = torch.empty_like(dy), torch.empty_like(x)
        dbefore = torch.empty_like(before) if before is not None and ctx.needs_input_grad[2] else None
        with torch.cuda.device_of(x):
            count, *where = _blocks(ctx.packing, T, sizes["BT"])
            _short_conv_slope_kernel[(count, ceiling(D, sizes["C"]), B)](
                x, weight, before, bias, dy.contiguous(), dz, *where, **sizes, **ctx.form
            )
            BC = triton.next_power_of_2(min(CHANNELS, D))
            BT = min(WALK, triton.next_power_of_2(T + W - 1))
            count, *where = _blocks(ctx.packing, T, BT, W - 1)
            dweight = torch.empty(B * count, W + (bias is not None), D, dtype=torch.float32, device=x.device)
            _short_conv_input_kernel[(count, ceiling(D, BC), B)](
                dz, x, weight, before, dx, dbefore, dweight, *where, T=T, D=D, W=W, WP=triton.next_power_of_2(W),
                BT=BT, BR=min(ROWS, BT), BC=BC, BEFORE=sizes["BEFORE"], PACKED=sizes["PACKED"], LEAD=sizes["LEAD"],
                STATE=dbefore is not None, BIAS=bias is not None,
            )  # fmt: skip
        total = dweight.sum(0)
        dbias = None if bias is None else total[W].to(bias.dtype)
        return dx, total[:W].t().to(weight.dtype), dbefore, dbias, None, None, None, None


def _blocks(packing: Packing | None, T: int, size: int, more: int = 0) -> tuple[int, Tensor | None, Tensor | None]:
    """How many blocks of `size` tokens a row longer by `more` has; of packed texts all have, and where each is."""
    if packing is None:
        return ceiling(T + more, size), None, None
    index_N2 = packing.pieces(size, more).index_N2
    return len(index_N2), index_N2, packing.starts


@triton.jit
def _place(blocks, starts, T, BT: tl.constexpr, PACKED: tl.constexpr):
    """This program's text, the place of the text's first output, that of the first after it, and this program's first
    token in its text. Where x begins with what is only looked at, the text's first input lies `_led` further on."""
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
def _led(row, LEAD: tl.constexpr):
    return (row + 1) * LEAD if LEAD else 0


@triton.jit
def _convolve(
    x, weight, before, bias, tokens, channels, row, start, T, D: tl.constexpr, W: tl.constexpr, inside,
    BEFORE: tl.constexpr, BIAS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    b_z = tl.zeros(inside.shape, dtype=tl.float32)
    for j in tl.static_range(W):
        b_x = _input(x, before, tokens + (j - W + 1), channels, row, start, T, D, W, inside, BEFORE, LEAD)
        b_w = tl.load(weight + channels * W + j, mask=channels < D, other=0).to(tl.float32)
        b_z += b_x * b_w[None, :]
    if BIAS:
        b_z += tl.load(bias + channels, mask=channels < D, other=0).to(tl.float32)[None, :]
    return b_z


@triton.jit
def _input(
    x, before, tokens, channels, row, start, T, D: tl.constexpr, W: tl.constexpr, inside, BEFORE: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    here = inside & (tokens[:, None] >= -LEAD) & (tokens[:, None] < T)
    at = (start + _led(row, LEAD) + tokens)[:, None] * D + channels[None, :]
    b_x = tl.load(x + at, mask=here, other=0).to(tl.float32)
    if BEFORE:
        earlier = inside & (tokens[:, None] < 0) & (tokens[:, None] > -W)
        at = (row * (W - 1) + tokens + W - 1)[:, None] * D + channels[None, :]
        b_x += tl.load(before + at, mask=earlier, other=0).to(tl.float32)
    return b_x


@triton.jit
def _short_conv_kernel(
    x, weight, before, bias, y, blocks, starts, T, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, LEAD: tl.constexpr,
    SILU: tl.constexpr, UNIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, start, stop, first = _place(blocks, starts, T, BT, PACKED)
    if PACKED:
        T = (stop - start).to(tl.int32)
    tokens = first + tl.arange(0, BT)
    local = tl.arange(0, BC)
    channels = tl.program_id(1) * C + local
    inside = (tokens[:, None] < T) & (local[None, :] < C) & (channels[None, :] < D)
    b_y = _convolve(x, weight, before, bias, tokens, channels, row, start, T, D, W, inside, BEFORE, BIAS, LEAD)
    if SILU:
        b_y *= tl.sigmoid(b_y)
    if UNIT:
        b_y = tl.where(inside, b_y, 0)
        b_y *= (1 / tl.sqrt(tl.sum(b_y * b_y, 1) + 1e-6))[:, None]
    at = (start + tokens)[:, None] * D + channels[None, :]
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _short_conv_slope_kernel(
    x, weight, before, bias, dy, dz, blocks, starts, T, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, LEAD: tl.constexpr,
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
    b_z = _convolve(x, weight, before, bias, tokens, channels, row, start, T, D, W, inside, BEFORE, BIAS, LEAD)
    b_dz = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    b_s = tl.sigmoid(b_z)
    if UNIT:
        b_a = tl.where(inside, b_z * b_s if SILU else b_z, 0)
        b_rstd = (1 / tl.sqrt(tl.sum(b_a * b_a, 1) + 1e-6))[:, None]
        b_a *= b_rstd
        b_dz = (b_dz - b_a * tl.sum(b_dz * b_a, 1)[:, None]) * b_rstd
    if SILU:
        b_dz *= b_s * (1 + b_z * (1 - b_s))
    tl.store(dz + at, b_dz.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _short_conv_input_kernel(
    dz, x, weight, before, dx, dbefore, dweight, blocks, starts, T, D: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BEFORE: tl.constexpr,
    PACKED: tl.constexpr, LEAD: tl.constexpr, STATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row, start, stop, first = _place(blocks, starts, T, BT, PACKED)
    if PACKED:
        T = (stop - start).to(tl.int32)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    kept = channels < D
    taps = tl.arange(0, WP)
    at_w = channels[None, :] * W + taps[:, None]
    b_w = tl.load(weight + at_w, mask=kept[None, :] & (taps[:, None] < W), other=0).to(tl.float32)
    b_dw = tl.zeros([WP, BR, BC], dtype=tl.float32)
    b_db = tl.zeros([BR, BC], dtype=tl.float32)
    for step in range(0, BT, BR):
        tokens = first + step + tl.arange(0, BR) - (W - 1)
        inside = (tokens[:, None] < T) & kept[None, :]
        b_x = _input(x, before, tokens, channels, row, start, T, D, W, inside, BEFORE, LEAD)
        later = tokens[None, :] + (W - 1) - taps[:, None]
        real = (taps[:, None] < W) & (later >= 0) & (later < T)
        at_dz = (start + later)[:, :, None] * D + channels[None, None, :]
        b_dz = tl.load(dz + at_dz, mask=real[:, :, None] & kept[None, None, :], other=0).to(tl.float32)
        b_dw += b_dz * b_x[None, :, :]
        if BIAS:  # every token of the text is once the last that an input meets
            b_db += tl.sum(tl.where(taps[:, None, None] == 0, b_dz, 0), 0)
        b_dx = tl.sum(b_dz * b_w[:, None, :], 0)
        at = (start + _led(row, LEAD) + tokens)[:, None] * D + channels[None, :]
        tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=inside & (tokens[:, None] >= -LEAD))
        if STATE:
            at = (row * (W - 1) + tokens + W - 1)[:, None] * D + channels[None, :]
            tl.store(dbefore + at, b_dx.to(dbefore.dtype.element_ty), mask=inside & (tokens[:, None] < 0))
    block = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    share = dweight + block * (W + BIAS) * D
    tl.store(share + taps[:, None] * D + channels[None, :], tl.sum(b_dw, 1), mask=kept[None, :] & (taps[:, None] < W))
    if BIAS:
        tl.store(share + W * D + channels, tl.sum(b_db, 0), mask=kept)


@triton.jit
def _short_conv_step_kernel(
    x, weight, before, y, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BC: tl.constexpr,
    SILU: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    taps, local = tl.arange(0, WP)[:, None], tl.arange(0, BC)
    channels = tl.program_id(0) * C + local
    kept = (local < C) & (channels < D)
    state = before + row * (W - 1) * D + channels[None, :]
    b_x = tl.load(state + taps * D, mask=kept[None, :] & (taps < W - 1), other=0).to(tl.float32)
    b_x += tl.load(x + row * D + channels[None, :] + taps * 0, mask=kept[None, :] & (taps == W - 1), other=0).to(
        tl.float32
    )
    b_w = tl.load(weight + channels[None, :] * W + taps, mask=kept[None, :] & (taps < W), other=0).to(tl.float32)
    b_y = tl.sum(b_x * b_w, 0)
    if SILU:
        b_y *= tl.sigmoid(b_y)
    if UNIT:
        b_y *= 1 / tl.sqrt(tl.sum(b_y * b_y, 0) + 1e-6)
    tl.store(y + row * D + channels, b_y.to(y.dtype.element_ty), mask=kept)
    tl.debug_barrier()  # every input has been read before one is written over
    moved = kept[None, :] & (taps > 0) & (taps < W)
    tl.store(state + (taps - 1) * D, b_x.to(before.dtype.element_ty), mask=moved)
