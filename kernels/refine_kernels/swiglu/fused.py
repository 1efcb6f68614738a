"""The gated activation as one Triton kernel forward and one backward.

`swiglu_linear` keeps gate and up, which the backward needs in any case, and makes their product again instead of
keeping it: an extra pass over the inner size costs far less than the memory.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.runtime import ceiling, compute_dtype, why_no_triton

BLOCK = 2048
"""Elements of one program."""


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    return why_no_triton(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `refine_kernels.swiglu.swiglu`."""
    return _SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]


def swiglu_linear(gate: Tensor, up: Tensor, weight_DI: Tensor) -> Tensor:
    """See `refine_kernels.swiglu.swiglu_linear`."""
    return _SwiGLULinear.apply(gate, up, weight_DI.to(compute_dtype(gate)))  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        return _slopes(gate, up, dy.contiguous().clone())[:2]


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight_DI):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, weight_DI)
        with torch.autocast(gate.device.type, enabled=False):
            return F.linear(_product(gate, up), weight_DI)

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up, weight_DI = ctx.saved_tensors
        dgate, dup, y = _slopes(gate, up, dout @ weight_DI)
        return dgate, dup, dout.flatten(0, -2).t() @ y.flatten(0, -2)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(up)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[(ceiling(gate.numel(), BLOCK),)](gate, up, y, gate.numel(), BLOCK=BLOCK)
    return y


def _slopes(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the product, which is written over `dy`."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        _swiglu_back_kernel[(ceiling(gate.numel(), BLOCK),)](gate, up, dy, dgate, dup, gate.numel(), BLOCK=BLOCK)
    return dgate, dup, dy


@triton.jit
def _swiglu_kernel(gate, up, y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_gate = tl.load(gate + at, mask=at < N, other=0).to(tl.float32)
    b_up = tl.load(up + at, mask=at < N, other=0).to(tl.float32)
    tl.store(y + at, (b_gate * tl.sigmoid(b_gate) * b_up).to(y.dtype.element_ty), mask=at < N)


@triton.jit
def _swiglu_back_kernel(gate, up, dy, dgate, dup, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_gate = tl.load(gate + at, mask=at < N, other=0).to(tl.float32)
    b_up = tl.load(up + at, mask=at < N, other=0).to(tl.float32)
    b_dy = tl.load(dy + at, mask=at < N, other=0).to(tl.float32)
    s = tl.sigmoid(b_gate)
    tl.store(dgate + at, (b_dy * b_up * s * (1 + b_gate * (1 - s))).to(dgate.dtype.element_ty), mask=at < N)
    tl.store(dup + at, (b_dy * b_gate * s).to(dup.dtype.element_ty), mask=at < N)
    tl.store(dy + at, (b_gate * s * b_up).to(dy.dtype.element_ty), mask=at < N)
