"""How good a rollout is: how close it comes to what the text really says next (PAPER: step 4).

Every reward sees the same four tensors and returns one number per rollout. A new reward is a function and a line
in `REWARDS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
