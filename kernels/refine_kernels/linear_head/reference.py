"""The linear head a few rows at a time, forward and backward, so that M × V logits are never stored.

With p = softmax(z) and g the gradient of the label's log-probability, dL/dz = g (onehot - p): the backward
needs the logits again, and recomputes them from the saved log-normaliser.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 1 << 24
"""Logits in memory at once: 64 MiB in float32."""


Known = tuple[Tensor, Tensor, Tensor]
"""Log-probabilities, entropies and log-normalisers."""


def linear_head(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, known: Known | None = None) -> Known:
    """See `refine_kernels.linear_head.linear_head`."""
    device = hidden_MD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
    return _LinearHead.apply(hidden_MD, weight_VD, labels_M, known)  # pyright: ignore[reportReturnType]


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, known: Known | None) -> Known:  # pyright: ignore[reportIncompatibleMethodOverride]
        logprob_M, entropy_M, normaliser_M = _rated(hidden_MD, weight_VD, labels_M) if known is None else copies(known)
        ctx.save_for_backward(hidden_MD, weight_VD, labels_M, normaliser_M)
        ctx.mark_non_differentiable(entropy_M, normaliser_M)
        return logprob_M, entropy_M, normaliser_M

    @staticmethod
    def backward(ctx, grad_M: Tensor, _entropy: Tensor, _normaliser: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_MD, weight_VD, labels_M, normaliser_M = ctx.saved_tensors
        wide = normaliser_M.dtype
        grad_hidden = torch.empty_like(hidden_MD)
        grad_weight = torch.zeros_like(weight_VD, dtype=wide)
        for rows in _pieces(hidden_MD.shape[0], weight_VD.shape[0]):
            logits_RV = F.linear(hidden_MD[rows], weight_VD).to(wide)
            slope_RV = (logits_RV - normaliser_M[rows, None]).exp_().mul_(-grad_M[rows, None])
            slope_RV.scatter_add_(1, labels_M[rows, None], grad_M[rows, None])
            slope_RV = slope_RV.to(hidden_MD.dtype)
            grad_hidden[rows] = slope_RV @ weight_VD
            grad_weight += (slope_RV.t() @ hidden_MD[rows]).to(wide)
        return grad_hidden, grad_weight.to(weight_VD.dtype), None, None


def _rated(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Known:
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
    return logprob_M, entropy_M, normaliser_M


def copies(known: Known) -> Known:
    """Outputs of their own: autograd marks what a function returns."""
    logprob_M, entropy_M, normaliser_M = (x.clone() for x in known)
    return logprob_M, entropy_M, normaliser_M


def _pieces(rows: int, vocabulary: int):
    size = max(1, LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))
