"""What is optimised: a policy loss on the rollouts, cross-entropy on the document (PAPER: step 6).

Every objective gives a loss per rollout token, whose sum is divided by the number of rollout tokens. Names are those
of TRL's `loss_type` (for gspo, of its sequence-level ratio). A new objective is a function and a line in `OBJECTIVES`.

    w = exp(logprob - old logprob)   A advantage of the rollout   ε_low, ε_high the clip bounds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """How far a probability ratio counts: within [1 - low, 1 + high]."""

    low: float
    high: float
    dual: float | None
    """For A < 0 the loss is at most -A · dual (Ye et al., arXiv 1912.09729), so that a token that became much
    likelier cannot dominate. None for no such bound."""


def grpo(logprobs_BCNK: Tensor, old_BCNK: Tensor, advantages_BCN: Tensor, clip: Clip) -> Tensor:
    """max(-A w, -A clip(w, 1 - ε_low, 1 + ε_high)) per token, averaged over a rollout and then over rollouts.

    Shao et al., arXiv 2402.03300; the clip is PPO's (Schulman et al., arXiv 1707.06347). All rollouts have K tokens,
    so the mean over rollouts of their means is the mean over tokens.
    """
    return _clipped(token_ratio(logprobs_BCNK, old_BCNK), advantages_BCN, clip)


def dapo(logprobs_BCNK: Tensor, old_BCNK: Tensor, advantages_BCN: Tensor, clip: Clip) -> Tensor:
    """As grpo, averaged over the tokens of all rollouts (Yu et al., arXiv 2503.14476).

    With K tokens in every rollout the two averages are one, so this is grpo; what else is DAPO's are settings: a
    clip_high above clip_low (0.28 and 0.2 in the paper) and no dual clip.
    """
    return grpo(logprobs_BCNK, old_BCNK, advantages_BCN, clip)


def dr_grpo(logprobs_BCNK: Tensor, old_BCNK: Tensor, advantages_BCN: Tensor, clip: Clip) -> Tensor:
    """As grpo, summed over tokens and divided by a constant, rollouts x rollout length (Liu et al., arXiv 2503.20783).

    With K tokens in every rollout that constant is the number of tokens. What then differs from grpo is the advantage
    alone: r - mean, not divided by the group's standard deviation (`Algorithm.advantage_scale`).
    """
    return grpo(logprobs_BCNK, old_BCNK, advantages_BCN, clip)


def gspo(logprobs_BCNK: Tensor, old_BCNK: Tensor, advantages_BCN: Tensor, clip: Clip) -> Tensor:
    """grpo's clipped loss with one ratio per rollout: s = exp(mean over its tokens of (logprob - old logprob)).

    Zheng et al., arXiv 2507.18071. A rollout is clipped as a whole; the gradient of s reaches each of its tokens with
    weight s / K. Each token carries the loss of its rollout, so that the mean over tokens is that over rollouts.
    The paper's bounds are much narrower than PPO's: 3e-4 and 4e-4.
    """
    return _clipped(sequence_ratio(logprobs_BCNK, old_BCNK), advantages_BCN, clip)


def cispo(logprobs_BCNK: Tensor, old_BCNK: Tensor, advantages_BCN: Tensor, clip: Clip) -> Tensor:
    """-A · stop_gradient(clip(w, 1 - ε_low, 1 + ε_high)) · logprob (MiniMax, arXiv 2506.13585).

    The importance weight is clipped, not the update, so that no token loses its gradient. With clip_low >= 1 there
    is no lower bound, as in the paper's runs. The dual clip has no meaning here.
    """
    weight_BCNK = token_ratio(logprobs_BCNK, old_BCNK).detach().clamp(1 - clip.low, 1 + clip.high)
    return -advantages_BCN[..., None] * weight_BCNK * logprobs_BCNK


Objective = Callable[[Tensor, Tensor, Tensor, Clip], Tensor]
"""(log-probabilities [B, C, N, K], those of the policy that sampled [B, C, N, K], advantages [B, C, N], bounds) ->
losses [B, C, N, K]."""

OBJECTIVES: dict[str, Objective] = {"grpo": grpo, "dapo": dapo, "dr_grpo": dr_grpo, "gspo": gspo, "cispo": cispo}


def policy_loss(
    logprobs_BCNK: Tensor,
    old_BCNK: Tensor,
    advantages_BCN: Tensor,
    *,
    loss: str = "grpo",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    """The loss of every rollout token under the objective of that name, [B, C, N, K]."""
    return OBJECTIVES[loss](logprobs_BCNK, old_BCNK, advantages_BCN, Clip(clip_low, clip_high, dual_clip))


def importance_ratio(logprobs_BCNK: Tensor, old_BCNK: Tensor, loss: str) -> Tensor:
    """The ratio that the objective of that name clips, [B, C, N, K]."""
    return sequence_ratio(logprobs_BCNK, old_BCNK) if loss == "gspo" else token_ratio(logprobs_BCNK, old_BCNK)


def token_ratio(logprobs_BCNK: Tensor, old_BCNK: Tensor) -> Tensor:
    """How much likelier each token is than when it was sampled, [B, C, N, K]."""
    return (logprobs_BCNK - old_BCNK).exp()


def sequence_ratio(logprobs_BCNK: Tensor, old_BCNK: Tensor) -> Tensor:
    """The geometric mean of a rollout's token ratios, at each of its tokens, [B, C, N, K]."""
    return (logprobs_BCNK - old_BCNK).mean(-1, keepdim=True).exp().expand_as(logprobs_BCNK)


def kl_estimate(logprobs_BCNK: Tensor, other_BCNK: Tensor) -> Tensor:
    """KL(policy || other) from each token sampled by the policy, [B, C, N, K].

    exp(d) - d - 1 with d = other - logprob: Schulman's k3, unbiased and never negative (joschu.net/blog/kl-approx).
    """
    gap_BCNK = other_BCNK - logprobs_BCNK
    return gap_BCNK.expm1() - gap_BCNK


def label_mask(lengths_B: Tensor, loss_from_B: Tensor | None, T: int) -> Tensor:
    """bool [B, T - 1]: whether the prediction made at token t (of token t + 1) is trained on."""
    next_T = torch.arange(1, T, device=lengths_B.device)
    mask_BT = next_T < lengths_B[:, None]
    return mask_BT if loss_from_B is None else mask_BT & (next_T >= loss_from_B[:, None])


def _clipped(ratio_BCNK: Tensor, advantages_BCN: Tensor, clip: Clip) -> Tensor:
    """PPO's pessimistic choice between a ratio and its clipped self, and the dual clip."""
    gain = -advantages_BCN[..., None]
    loss_BCNK = torch.maximum(gain * ratio_BCNK, gain * ratio_BCNK.clamp(1 - clip.low, 1 + clip.high))
    if clip.dual is not None:
        loss_BCNK = torch.where(gain > 0, torch.minimum(loss_BCNK, gain * clip.dual), loss_BCNK)
    return loss_BCNK
