"""How good a rollout is: how close it comes to what the text really says next (PAPER: step 4).

Every reward sees the same four tensors and returns one number per rollout. A new reward is a function and a line
in `REWARDS`, or a function in any module that Python can import, named by its path in the settings.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_harness.errors import ConfigError

Reward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rollout tokens [B, C, N, K], true tokens [B, C, K], rollout hidden states [B, C, N, K, D], true hidden states
[B, C, K, D]) -> rewards [B, C, N]. Hidden states are those after reading the token, after the final norm."""


def cosine(tokens_BCNK: Tensor, true_BCK: Tensor, hidden_BCNKD: Tensor, true_BCKD: Tensor) -> Tensor:
    """Mean over k of the cosine similarity between the model's states after its own token and after the true one."""
    wide = torch.float64 if hidden_BCNKD.dtype == torch.float64 else torch.float32
    return F.cosine_similarity(hidden_BCNKD.to(wide), true_BCKD[:, :, None].to(wide), dim=-1).mean(-1)


def exact(tokens_BCNK: Tensor, true_BCK: Tensor, hidden_BCNKD: Tensor, true_BCKD: Tensor) -> Tensor:
    """Share of the k tokens that are the true ones (the paper's binary reward)."""
    wide = torch.float64 if hidden_BCNKD.dtype == torch.float64 else torch.float32
    return (tokens_BCNK == true_BCK[:, :, None]).to(wide).mean(-1)


def hybrid(tokens_BCNK: Tensor, true_BCK: Tensor, hidden_BCNKD: Tensor, true_BCKD: Tensor) -> Tensor:
    """The sum of both."""
    views = (tokens_BCNK, true_BCK, hidden_BCNKD, true_BCKD)
    return cosine(*views) + exact(*views)


REWARDS: dict[str, Reward] = {"cosine": cosine, "exact": exact, "hybrid": hybrid}
PARTS: dict[str, tuple[str, ...]] = {"hybrid": ("cosine", "exact")}
"""Rewards that are sums of others, which a step's report names one by one."""


@functools.cache
def find_reward(name: str) -> Reward:
    """The reward of that name, or the function at `package.module:function` or `package.module.function`.

    Imports the module, which runs it: names come from the user's settings, never from data. Raises ConfigError when
    there is no such function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(":" if ":" in name else ".")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ConfigError(
            f"algorithm.reward is {name}, but {module or name} cannot be imported ({error}). Install it, or put its "
            f"folder on PYTHONPATH."
        ) from None
    if not callable(found):
        raise ConfigError(
            f"algorithm.reward is {name}, but {module} has no function {function}. Give package.module:function."
        )
    return cast(Reward, found)


def rewards_of(name: str, tokens_BCNK: Tensor, true_BCK: Tensor, hidden_BCNKD: Tensor, true_BCKD: Tensor) -> Tensor:
    """What the reward of that name gives each rollout, [B, C, N]. Raises ConfigError when it gives something else."""
    rewards = find_reward(name)(tokens_BCNK, true_BCK, hidden_BCNKD, true_BCKD)
    shape = tuple(tokens_BCNK.shape[:3])
    if not isinstance(rewards, Tensor) or tuple(rewards.shape) != shape:
        found = f"a tensor of shape {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ConfigError(
            f"the reward {name} returned {found} for rollouts of shape {tuple(tokens_BCNK.shape)}; it must return one "
            f"number per rollout, a tensor of shape {shape}."
        )
    return rewards if rewards.is_floating_point() else rewards.to(torch.float32)
