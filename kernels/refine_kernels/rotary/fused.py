"""Rotary position embedding as one Triton kernel; the backward is the same kernel turning the other way."""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.rotary import Turns
from refine_kernels.runtime import ceiling, why_no_triton

PAIRS = 2048
"""Of one program."""


def why_not(x: Tensor) -> str | None:
    """Why the kernel cannot run on tensors like `x`, or None."""
    return why_no_triton(x)


def rotary(x_BTHI: Tensor, by: Turns) -> Tensor:
    """See `refine_kernels.rotary.rotary`."""
    return _Rotary.apply(x_BTHI, by.cos_BTP, by.sin_BTP)  # pyright: ignore[reportReturnType]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _turned(dy, *ctx.saved_tensors, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    B, T, H, size = x.shape
    y = torch.empty_like(x)
    BP = min(triton.next_power_of_2(H * size // 2), PAIRS)
    BT = max(1, PAIRS // BP)
    with torch.cuda.device_of(x):
        _turn_kernel[(ceiling(B * T, BT), ceiling(H * size // 2, BP))](
            x, cos, sin, y, B * T, PAIRS=H * size // 2, HALF=size // 2, BT=BT, BP=BP, BACK=back
        )
    return y


@triton.jit
def _turn_kernel(
    x, cos, sin, y, M, PAIRS: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BACK: tl.constexpr
):
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    pairs = tl.program_id(1) * BP + tl.arange(0, BP)
    inside = (tokens[:, None] < M) & (pairs[None, :] < PAIRS)
    at = tokens[:, None] * (2 * PAIRS) + (pairs // HALF * (2 * HALF) + pairs % HALF)[None, :]
    angle = tokens[:, None] * HALF + (pairs % HALF)[None, :]
    b_cos = tl.load(cos + angle, mask=inside, other=0)
    b_sin = tl.load(sin + angle, mask=inside, other=0)
    if BACK:
        b_sin = -b_sin
    b_1 = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    b_2 = tl.load(x + at + HALF, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, (b_1 * b_cos - b_2 * b_sin).to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + HALF, (b_1 * b_sin + b_2 * b_cos).to(y.dtype.element_ty), mask=inside)
