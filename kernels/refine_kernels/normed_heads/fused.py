"""The sum of a branch and normed, gated heads as one Triton kernel forward and one backward.

Only the heads and the gates are kept for the backward. Its programs walk over tokens a fixed stride apart, so that the
shares of the weight's gradient are few and their sum needs no atomics.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.runtime import ceiling, why_no_triton

ELEMENTS = 4096
"""Of one program's tile."""
PROGRAMS = 1024
"""Of the backward, about."""
LARGEST_HEAD = 4096


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if x.shape[-1] > LARGEST_HEAD:
        return f"heads have {x.shape[-1]} channels; the kernels take at most {LARGEST_HEAD}"
    return why_no_triton(x)


def add_normed_heads(base_BTD: Tensor, x_BTHK: Tensor, weight_K: Tensor, gate_BTH: Tensor | None, eps: float) -> Tensor:
    """See `refine_kernels.normed_heads.add_normed_heads`."""
    return _AddNormedHeads.apply(base_BTD, x_BTHK, weight_K, gate_BTH, eps)  # pyright: ignore[reportReturnType]


class _AddNormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, x, weight, gate, eps):  # pyright: ignore[reportIncompatibleMethodOverride]
        base = base.contiguous()
        x = x if x.stride(-1) == 1 else x.contiguous()
        gate = None if gate is None else gate.contiguous()
        B, T, H, K = x.shape
        y = torch.empty_like(base)
        BK = triton.next_power_of_2(K)
        BT = min(max(1, ELEMENTS // BK), triton.next_power_of_2(T))
        ctx.tile = {"H": H, "K": K, "BT": BT, "BK": BK, "GATE": gate is not None}
        ctx.eps, ctx.base_dtype = eps, base.dtype
        with torch.cuda.device_of(x):
            _normed_heads_kernel[(ceiling(T, BT), H, B)](base, x, weight, gate, y, T, eps, *x.stride()[:3], **ctx.tile)
        ctx.save_for_backward(x, weight, gate)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, gate = ctx.saved_tensors
        B, T, H, K = x.shape
        dx = torch.empty_like(x)  # in the memory order of x, where x is dense
        dgate = None if gate is None else torch.empty_like(gate)
        P = min(ceiling(T, ctx.tile["BT"]), ceiling(PROGRAMS, B * H))
        dweight = torch.empty(B * H * P, K, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _normed_heads_back_kernel[(P, H, B)](
                x, weight, gate, dy.contiguous(), dx, dgate, dweight, T, ctx.eps, *x.stride()[:3], *dx.stride()[:3],
                **ctx.tile,
            )  # fmt: skip
        return dy.to(ctx.base_dtype), dx, dweight.sum(0).to(weight.dtype), dgate, None


@triton.jit
def _normed_heads_kernel(
    base, x, weight, gate, y, T, eps, XB, XT, XH,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    channels = tl.arange(0, BK)
    inside = (tokens[:, None] < T) & (channels[None, :] < K)
    b_x = tl.load(x + b * XB + h * XH + tokens[:, None] * XT + channels[None, :], mask=inside, other=0).to(tl.float32)
    b_w = tl.load(weight + channels, mask=channels < K, other=0).to(tl.float32)
    b_y = b_x * (1 / tl.sqrt(tl.sum(b_x * b_x, 1) / K + eps))[:, None] * b_w[None, :]
    if GATE:
        b_gate = tl.load(gate + (b * T + tokens) * H + h, mask=tokens < T, other=0).to(tl.float32)
        b_y *= (b_gate * tl.sigmoid(b_gate))[:, None]
    at = ((b * T + tokens) * H + h)[:, None] * K + channels[None, :]
    b_y += tl.load(base + at, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normed_heads_back_kernel(
    x, weight, gate, dy, dx, dgate, dweight, T, eps, XB, XT, XH, DB, DT, DH,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channels = tl.arange(0, BK)
    b_w = tl.load(weight + channels, mask=channels < K, other=0).to(tl.float32)
    b_dw = tl.zeros([BT, BK], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        tokens = (block * BT + tl.arange(0, BT)).to(tl.int64)
        inside = (tokens[:, None] < T) & (channels[None, :] < K)
        own = x + b * XB + h * XH + tokens[:, None] * XT + channels[None, :]
        b_x = tl.load(own, mask=inside, other=0).to(tl.float32)
        b_rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / K + eps)
        b_unit = b_x * b_rstd[:, None]
        b_dy = tl.load(dy + ((b * T + tokens) * H + h)[:, None] * K + channels[None, :], mask=inside, other=0)
        b_dy = b_dy.to(tl.float32)
        if GATE:
            at = (b * T + tokens) * H + h
            b_gate = tl.load(gate + at, mask=tokens < T, other=0).to(tl.float32)
            s = tl.sigmoid(b_gate)
            b_dgate = tl.sum(b_dy * b_unit * b_w[None, :], 1) * s * (1 + b_gate * (1 - s))
            tl.store(dgate + at, b_dgate.to(dgate.dtype.element_ty), mask=tokens < T)
            b_dy *= (b_gate * s)[:, None]
        b_dw += b_dy * b_unit
        b_dunit = b_dy * b_w[None, :]
        b_dx = (b_dunit - b_unit * (tl.sum(b_dunit * b_unit, 1) / K)[:, None]) * b_rstd[:, None]
        to = dx + b * DB + h * DH + tokens[:, None] * DT + channels[None, :]
        tl.store(to, b_dx.to(dx.dtype.element_ty), mask=inside)
    share = (b * H + h) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dweight + share * K + channels, tl.sum(b_dw, 0), mask=channels < K)
