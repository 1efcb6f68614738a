"""Log-probability of each row's label and entropy of each row's distribution under a linear head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from refine_kernels.choose import choose
from refine_kernels.linear_head.reference import Known

__all__ = ["Known", "linear_head"]


def linear_head(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    *,
    known: Known | None = None,
    ahead_M: Tensor | None = None,
    impl: Literal["auto", "reference", "plain", "fused"] = "auto",
) -> Known:
    """log softmax(hidden @ weight^T)[label] and the entropy of softmax(hidden @ weight^T), in nats.

    Args:
        hidden_MD: M rows of hidden states, after the final norm.
        weight_VD: the output embedding.
        labels_M: int64, one label per row.
        known: what a call for the same rows returned that was made without gradients; it is returned again, attached,
            and nothing is computed. So a caller decides when autograd meets this operation: it goes backward from
            the last operation to the first.
        ahead_M: what the gradient of the log-probabilities will be, up to one factor. Gradients are then made together
            with the outputs, from the same logits, which spares making those again. They are not a number where
            autograd brings something else.
        impl: see `refine_kernels.choose`; `plain` is a third one, which stores the M × V logits that the others
            never do and says in five lines what they mean.

    Returns log-probabilities [M] (differentiable), entropies and log-normalisers [M] (no gradient), float32, or float64
    for float64; and what was made ahead.
    """
    if impl == "plain":
        from refine_kernels.linear_head import plain

        return plain.linear_head(hidden_MD, weight_VD, labels_M)
    return choose(__name__, impl, hidden_MD).linear_head(hidden_MD, weight_VD, labels_M, known, ahead_M)
