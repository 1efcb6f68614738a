"""What is optimised: clipped policy loss on the rollouts, cross-entropy on the document (PAPER: step 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs_BCNK: Tensor,
    old_BCNK: Tensor,
    advantages_BCN: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    """PPO's clipped loss of every rollout token, [B, C, N, K].

    With ratio w = exp(logprob - old): max(-A w, -A clip(w, 1 - clip_low, 1 + clip_high)); for A < 0 at most
    -A · dual_clip (Ye et al., arXiv 1912.09729), so that a token that became much likelier cannot dominate.
    """
    ratio = (logprobs_BCNK - old_BCNK).exp()
    gain = -advantages_BCN[..., None]
    loss = torch.maximum(gain * ratio, gain * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(gain > 0, torch.minimum(loss, gain * dual_clip), loss)
    return loss


def label_mask(lengths_B: Tensor, loss_from_B: Tensor | None, T: int) -> Tensor:
    """bool [B, T - 1]: whether the prediction made at token t (of token t + 1) is trained on."""
    next_T = torch.arange(1, T, device=lengths_B.device)
    mask_BT = next_T < lengths_B[:, None]
    return mask_BT if loss_from_B is None else mask_BT & (next_T >= loss_from_B[:, None])
