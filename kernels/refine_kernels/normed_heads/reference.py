"""The sum of a branch and normed, gated heads in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from refine_kernels.rms_norm.reference import rms_norm


def add_normed_heads(base_BTD: Tensor, x_BTHK: Tensor, weight_K: Tensor, gate_BTH: Tensor | None, eps: float) -> Tensor:
    """See `refine_kernels.normed_heads.add_normed_heads`."""
    heads_BTHK = rms_norm(x_BTHK, weight_K, eps)
    if gate_BTH is not None:
        heads_BTHK = heads_BTHK * F.silu(gate_BTH)[..., None]
    return (base_BTD + heads_BTHK.flatten(2)).to(base_BTD.dtype)
