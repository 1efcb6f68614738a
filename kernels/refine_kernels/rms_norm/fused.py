"""The root-mean-square norms as one Triton kernel forward and one backward.

A program of the forward holds a few whole rows. A program of the backward walks over rows a fixed stride apart and
keeps its share of the weight's gradient in registers, so that the shares are few and their sum needs no atomics.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.runtime import ceiling, compute_dtype, why_no_triton

ELEMENTS = 4096
"""Of one program's tile of rows."""
PROGRAMS = 1024
"""Of the backward, at most: about eight for each of a large GPU's processors."""
LARGEST = 16384


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if x.shape[-1] > LARGEST:
        return f"rows have {x.shape[-1]} channels; the kernels take at most {LARGEST}"
    return why_no_triton(x)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `refine_kernels.rms_norm.rms_norm`."""
    return _Norm.apply(x, None, None, weight_D, eps, "", compute_dtype(x))[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `refine_kernels.rms_norm.add_rms_norm`."""
    return _Norm.apply(x, residual, None, weight_D, eps, "", compute_dtype(x))


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, *, activation: str = "silu") -> Tensor:
    """See `refine_kernels.rms_norm.gated_rms_norm`."""
    return _Norm.apply(x, None, gate, weight_D, eps, activation, compute_dtype(x))[0]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gate, weight_D, eps, activation, dtype):  # pyright: ignore[reportIncompatibleMethodOverride]
        D = x.shape[-1]
        x_MD = x.contiguous().view(-1, D)
        M = x_MD.shape[0]
        y_MD = torch.empty(M, D, dtype=dtype, device=x.device)
        rstd_M = torch.empty(M, dtype=torch.float32, device=x.device)
        gate_MD = None if gate is None else gate.contiguous().view(M, D)
        total_MD = residual_MD = None
        if residual is not None:
            residual_MD = residual.contiguous().view(M, D)
            total_MD = torch.empty(M, D, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
        BD = triton.next_power_of_2(D)
        BM = max(1, ELEMENTS // BD)
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(ceiling(M, BM),)](
                x_MD, residual_MD, gate_MD, weight_D, y_MD, total_MD, rstd_M, M, eps,
                D=D, BM=BM, BD=BD, ADD=residual is not None, GATE=activation, num_warps=_warps(BM * BD),
            )  # fmt: skip
        ctx.save_for_backward(x_MD if total_MD is None else total_MD, gate_MD, weight_D, rstd_M)
        ctx.activation, ctx.shape, ctx.tile = activation, x.shape, (BM, BD)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y_MD.view(x.shape), None if total_MD is None else total_MD.view(x.shape)

    @staticmethod
    def backward(ctx, dy, dtotal):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, gate_MD, weight_D, rstd_M = ctx.saved_tensors
        M, D = x_MD.shape
        BM, BD = ctx.tile
        dy_MD = x_MD.new_zeros(M, D) if dy is None else dy.contiguous().view(M, D)
        more_MD = None if dtotal is None else dtotal.contiguous().view(M, D)
        dx_MD = torch.empty_like(x_MD)
        dgate_MD = None if gate_MD is None else torch.empty_like(gate_MD)
        P = min(ceiling(M, BM), PROGRAMS)
        dweight_PD = torch.empty(P, D, dtype=torch.float32, device=x_MD.device)
        with torch.cuda.device_of(x_MD):
            _rms_norm_back_kernel[(P,)](
                x_MD, gate_MD, weight_D, rstd_M, dy_MD, more_MD, dx_MD, dgate_MD, dweight_PD, M, P,
                D=D, BM=BM, BD=BD, ADD=more_MD is not None, GATE=ctx.activation, num_warps=_warps(BM * BD),
            )  # fmt: skip
        dx = dx_MD.view(ctx.shape)
        own, other = ctx.dtypes
        dgate = None if dgate_MD is None else dgate_MD.view(ctx.shape)
        dresidual = None if other is None else dx.to(other)
        return dx.to(own), dresidual, dgate, dweight_PD.sum(0).to(weight_D.dtype), None, None, None


def _warps(elements: int) -> int:
    return 4 if elements <= 4096 else 8 if elements <= 8192 else 16


@triton.jit
def _activation(gate, GATE: tl.constexpr):
    s = tl.sigmoid(gate)
    return gate * s if GATE == "silu" else s


@triton.jit
def _slope(gate, GATE: tl.constexpr):
    s = tl.sigmoid(gate)
    return s * (1 + gate * (1 - s)) if GATE == "silu" else s * (1 - s)


@triton.jit
def _rms_norm_kernel(
    x, residual, gate, weight, y, total, rstd, M, eps,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    channels = tl.arange(0, BD)
    at = rows[:, None] * D + channels[None, :]
    inside = (rows[:, None] < M) & (channels[None, :] < D)
    b_x = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if ADD:
        b_x += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        # What is normed is the sum as it is stored, which is all that the backward sees.
        b_x = b_x.to(total.dtype.element_ty)
        tl.store(total + at, b_x, mask=inside)
        b_x = b_x.to(tl.float32)
    b_rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps)
    tl.store(rstd + rows, b_rstd, mask=rows < M)
    b_w = tl.load(weight + channels, mask=channels < D, other=0).to(tl.float32)
    b_y = b_x * b_rstd[:, None] * b_w[None, :]
    if GATE != "":
        b_y *= _activation(tl.load(gate + at, mask=inside, other=0).to(tl.float32), GATE)
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_back_kernel(
    x, gate, weight, rstd, dy, more, dx, dgate, dweight, M, P,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channels = tl.arange(0, BD)
    b_w = tl.load(weight + channels, mask=channels < D, other=0).to(tl.float32)
    b_dw = tl.zeros([BM, BD], dtype=tl.float32)
    for block in range(program, tl.cdiv(M, BM), P):
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        at = rows[:, None] * D + channels[None, :]
        inside = (rows[:, None] < M) & (channels[None, :] < D)
        b_rstd = tl.load(rstd + rows, mask=rows < M, other=0)
        b_unit = tl.load(x + at, mask=inside, other=0).to(tl.float32) * b_rstd[:, None]
        b_dy = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
        if GATE != "":
            b_gate = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
            b_dgate = b_dy * b_unit * b_w[None, :] * _slope(b_gate, GATE)
            tl.store(dgate + at, b_dgate.to(dgate.dtype.element_ty), mask=inside)
            b_dy *= _activation(b_gate, GATE)
        b_dw += b_dy * b_unit
        b_dunit = b_dy * b_w[None, :]
        b_dx = (b_dunit - b_unit * (tl.sum(b_dunit * b_unit, 1) / D)[:, None]) * b_rstd[:, None]
        if ADD:
            b_dx += tl.load(more + at, mask=inside, other=0).to(tl.float32)
        tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + program * D + channels, tl.sum(b_dw, 0), mask=channels < D)
