"""The linear head with logits for a few thousand rows at a time: matrix products by the library, the rest one pass.

The forward keeps, per row, only the log-normaliser. The backward makes a piece's logits again and turns them, in
place, into their own gradient g (onehot - p), which two matrix products carry to the hidden states and the weight.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.linear_head.reference import Ahead, Known, ahead_of, attached, own
from refine_kernels.runtime import ceiling, compute_dtype, why_no_triton

LOGITS = 1 << 27
"""Logits in memory at once: 256 MiB in bfloat16."""
BLOCK = 4096
"""Logits that a program holds at once."""


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    return why_no_triton(x)


def linear_head(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, known: Known | None = None, ahead_M: Tensor | None = None
) -> Known:
    """See `refine_kernels.linear_head.linear_head`."""
    dtype, learned = compute_dtype(hidden_MD), weight_VD.requires_grad
    hidden_MD, weight_VD, labels_M = hidden_MD.to(dtype).contiguous(), weight_VD.to(dtype), labels_M.contiguous()
    ahead = ahead_of(hidden_MD, weight_VD, ahead_M, learned)
    return attached(_LinearHead, _rated, hidden_MD, weight_VD, labels_M, known, ahead)


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, labels_M, known):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(hidden_MD, weight_VD, labels_M, known.normalisers)
        return own(ctx, known)

    @staticmethod
    def backward(ctx, grad_M, _entropy, _normaliser):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_MD, weight_VD, labels_M, normaliser_M = ctx.saved_tensors
        grad_M = grad_M.float().contiguous()
        made = Ahead(grad_M, torch.empty_like(hidden_MD), torch.zeros_like(weight_VD, dtype=torch.float32))
        for rows in _pieces(hidden_MD, weight_VD):
            _carry(made, rows, _logits(hidden_MD[rows], weight_VD), hidden_MD, weight_VD, labels_M, normaliser_M)
        assert made.weight_VD is not None
        return made.hidden_MD, made.weight_VD.to(weight_VD.dtype), None, None


def _rated(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, ahead: Ahead | None) -> Known:
    logprob_M = torch.empty(hidden_MD.shape[0], dtype=torch.float32, device=hidden_MD.device)
    entropy_M, normaliser_M = torch.empty_like(logprob_M), torch.empty_like(logprob_M)
    for rows in _pieces(hidden_MD, weight_VD):
        logits_RV = _logits(hidden_MD[rows], weight_VD)
        R, V = logits_RV.shape
        with torch.cuda.device_of(hidden_MD):
            _linear_head_kernel[(R,)](
                logits_RV, labels_M[rows], logprob_M[rows], entropy_M[rows], normaliser_M[rows], V,
                BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=8,
            )  # fmt: skip
        if ahead is not None:
            _carry(ahead, rows, logits_RV, hidden_MD, weight_VD, labels_M, normaliser_M)
    return Known(logprob_M, entropy_M, normaliser_M, ahead)


def _carry(
    into: Ahead,
    rows: slice,
    logits_RV: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    normaliser_M: Tensor,
) -> None:
    """The gradients of a piece; its logits are overwritten."""
    R, V = logits_RV.shape
    block = min(BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits_RV):
        _linear_head_back_kernel[(R, ceiling(V, block))](
            logits_RV, labels_M[rows], into.of_M[rows], normaliser_M[rows], V, BLOCK=block, num_warps=8
        )
    torch.mm(logits_RV, weight_VD, out=into.hidden_MD[rows])
    if into.weight_VD is not None:
        # Pieces are summed in float32, so that their number does not matter.
        into.weight_VD.add_(logits_RV.t() @ hidden_MD[rows])


def _logits(hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
    with torch.autocast(hidden_RD.device.type, enabled=False):
        return F.linear(hidden_RD, weight_VD)


def _pieces(hidden_MD: Tensor, weight_VD: Tensor):
    size = max(1, LOGITS // weight_VD.shape[0])
    size -= size % 128 if size > 128 else 0  # rows of a tile of the product
    return (slice(start, start + size) for start in range(0, hidden_MD.shape[0], size))


@triton.jit
def _linear_head_kernel(logits, labels, logprob, entropy, normaliser, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    # Per lane, so that rows are reduced once: the largest logit so far, sum e^(z - top) and sum z e^(z - top).
    top = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    weight = tl.zeros([BLOCK], dtype=tl.float32)
    moment = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + at < V
        z = tl.load(logits + row * V + start + at, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, z)
        shrink = tl.where(inside, tl.exp(top - higher), 1)
        share = tl.where(inside, tl.exp(z - higher), 0)
        weight = weight * shrink + share
        moment = moment * shrink + tl.where(inside, z * share, 0)
        top = tl.where(inside, higher, top)
    peak = tl.max(top, 0)
    scale = tl.exp(top - peak)
    total = tl.sum(weight * scale, 0)
    lse = peak + tl.log(total)
    z_label = tl.load(logits + row * V + tl.load(labels + row)).to(tl.float32)
    tl.store(normaliser + row, lse)
    tl.store(logprob + row, z_label - lse)
    tl.store(entropy + row, lse - tl.sum(moment * scale, 0) / total)


@triton.jit
def _linear_head_back_kernel(logits, labels, grad, normaliser, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    z = tl.load(logits + row * V + at, mask=inside, other=0).to(tl.float32)
    slope = tl.where(at == tl.load(labels + row), 1.0, 0.0) - tl.exp(z - tl.load(normaliser + row))
    slope *= tl.load(grad + row)
    tl.store(logits + row * V + at, slope.to(logits.dtype.element_ty), mask=inside)
