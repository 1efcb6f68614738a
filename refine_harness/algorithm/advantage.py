"""Relative to whom a rollout is good: group-relative advantages (PAPER: step 5; GRPO)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

EPSILON = 1e-6


def group_advantages(
    rewards_BCN: Tensor,
    *,
    over: Literal["document", "position"] = "document",
    scale: Literal["std", "none"] = "std",
) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group, unbiased std; [B, C, N].

    A group is all rollouts of a document, or the rollouts of one position. A group without spread has advantage 0.
    """
    groups = rewards_BCN.flatten(1) if over == "document" else rewards_BCN
    centred = groups - groups.mean(-1, keepdim=True)
    if scale == "std":
        centred = centred / (groups.std(-1, keepdim=True) + EPSILON)
    return centred.view_as(rewards_BCN)


def spreadless_share(rewards_BCN: Tensor, over: Literal["document", "position"]) -> Tensor:
    """Share of groups whose rewards are all alike, from which nothing can be learned; a scalar."""
    groups = rewards_BCN.flatten(1) if over == "document" else rewards_BCN
    return (groups == groups[..., :1]).all(-1).to(rewards_BCN.dtype).mean()
