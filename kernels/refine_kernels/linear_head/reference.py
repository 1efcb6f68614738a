"""The linear head a few rows at a time, forward and backward, so that M × V logits are never stored.

With p = softmax(z) and g the gradient of the label's log-probability, dL/dz = g (onehot - p): the backward
needs the logits again, and recomputes them from the saved log-normaliser. Where g is known up to a factor when the
logits are there, the gradients are made at once (`Ahead`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 24
"""Logits in memory at once: 64 MiB in float32."""


class Ahead(NamedTuple):
    """Gradients of hidden states and weight, made for one gradient of the log-probabilities."""

    of_M: Tensor
    hidden_MD: Tensor
    weight_VD: Tensor | None
    """In float32 or wider; None where the weight is not learned."""

    def scaled(self, grad_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for a gradient that is a multiple of `of_M`; not a number for any other."""
        of_M = self.of_M.to(grad_M.dtype)
        scale = torch.dot(grad_M, of_M) / torch.dot(of_M, of_M).clamp(min=torch.finfo(of_M.dtype).tiny)
        off = (grad_M - scale * of_M).abs().max()
        scale = torch.where(off <= 1e-4 * grad_M.abs().max(), scale, torch.nan)
        scale_1 = scale[None]  # of one dimension, so that it is not rounded to a narrower dtype
        weight_VD = None if self.weight_VD is None else self.weight_VD * scale_1
        return (self.hidden_MD * scale_1).to(self.hidden_MD.dtype), weight_VD


class Known(NamedTuple):
    """What a call found out of M rows: tensors [M], or spread over padded rows [B, T]."""

    logprobs: Tensor
    entropies: Tensor
    normalisers: Tensor
    ahead: Ahead | None = None


def linear_head(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, known: Known | None = None, ahead_M: Tensor | None = None
) -> Known:
    """See `refine_kernels.linear_head.linear_head`."""
    device, learned = hidden_MD.device.type, weight_VD.requires_grad
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
    ahead = ahead_of(hidden_MD, weight_VD, ahead_M, learned)
    return attached(_LinearHead, _rated, hidden_MD, weight_VD, labels_M, known, ahead)


def attached(
    head: Any,
    rated: Callable[..., Known],
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    known: Known | None,
    ahead: Ahead | None,
) -> Known:
    """What is known, or is found out now, between its inputs and whatever is made of it.

    head: the autograd function whose backward makes the gradients where they were not made ahead.
    """
    if known is None:
        with torch.no_grad():
            known = rated(hidden_MD, weight_VD, labels_M, ahead)
    if known.ahead is None:
        return Known(*head.apply(hidden_MD, weight_VD, labels_M, known))
    outputs: Any = _MadeAhead.apply(hidden_MD, weight_VD, known)
    return Known(*outputs, ahead=known.ahead)


class _MadeAhead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD: Tensor, weight_VD: Tensor, known: Known) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ahead, ctx.dtype = known.ahead, weight_VD.dtype
        return own(ctx, known)

    @staticmethod
    def backward(ctx, grad_M: Tensor, _entropy: Tensor, _normaliser: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.ahead.scaled(grad_M)
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.dtype), None


def own(ctx: Any, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of an autograd function, which marks what it returns."""
    logprob_M, entropy_M, normaliser_M = (x.clone() for x in known[:3])
    ctx.mark_non_differentiable(entropy_M, normaliser_M)
    return logprob_M, entropy_M, normaliser_M


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, known: Known) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(hidden_MD, weight_VD, labels_M, known.normalisers)
        return own(ctx, known)

    @staticmethod
    def backward(ctx, grad_M: Tensor, _entropy: Tensor, _normaliser: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_MD, weight_VD, labels_M, normaliser_M = ctx.saved_tensors
        wide = normaliser_M.dtype
        made = Ahead(grad_M, torch.empty_like(hidden_MD), torch.zeros_like(weight_VD, dtype=wide))
        for rows in _pieces(hidden_MD.shape[0], weight_VD.shape[0]):
            logits_RV = F.linear(hidden_MD[rows], weight_VD).to(wide)
            probs_RV = (logits_RV - normaliser_M[rows, None]).exp_()
            _carry(made, rows, probs_RV, hidden_MD, weight_VD, labels_M)
        assert made.weight_VD is not None
        return made.hidden_MD, made.weight_VD.to(weight_VD.dtype), None, None


def _carry(into: Ahead, rows: slice, probs_RV: Tensor, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> None:
    """The gradients of a piece, by g (onehot - p), which is written over its probabilities."""
    grad_R1 = into.of_M[rows, None]
    slope_RV = probs_RV.mul_(-grad_R1).scatter_add_(1, labels_M[rows, None], grad_R1).to(hidden_MD.dtype)
    into.hidden_MD[rows] = slope_RV @ weight_VD
    if into.weight_VD is not None:
        into.weight_VD.add_(slope_RV.t() @ hidden_MD[rows])


def _rated(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, ahead: Ahead | None) -> Known:
    wide = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
    M = hidden_MD.shape[0]
    logprob_M = torch.empty(M, dtype=wide, device=hidden_MD.device)
    entropy_M, normaliser_M = torch.empty_like(logprob_M), torch.empty_like(logprob_M)
    for rows in _pieces(M, weight_VD.shape[0]):
        logits_RV = F.linear(hidden_MD[rows], weight_VD).to(wide)
        normaliser_R = logits_RV.logsumexp(-1)
        logprob_M[rows] = logits_RV.gather(1, labels_M[rows, None])[:, 0] - normaliser_R
        probs_RV = (logits_RV - normaliser_R[:, None]).exp_()
        entropy_M[rows] = normaliser_R - torch.linalg.vecdot(probs_RV, logits_RV)
        normaliser_M[rows] = normaliser_R
        if ahead is not None:
            _carry(ahead, rows, probs_RV, hidden_MD, weight_VD, labels_M)
    return Known(logprob_M, entropy_M, normaliser_M, ahead)


def ahead_of(hidden_MD: Tensor, weight_VD: Tensor, of_M: Tensor | None, learned: bool) -> Ahead | None:
    """Room for what is made ahead, with zeros for a weight that is learned."""
    if of_M is None:
        return None
    wide = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
    weight = weight_VD.new_zeros(weight_VD.shape, dtype=wide) if learned else None
    return Ahead(of_M.to(wide).contiguous(), torch.empty_like(hidden_MD), weight)


def _pieces(rows: int, vocabulary: int):
    size = max(1, LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))
