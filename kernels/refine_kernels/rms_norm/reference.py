"""The root-mean-square norms in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `refine_kernels.rms_norm.rms_norm`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.rms_norm(x.to(wide), weight_D.shape, weight_D.to(wide), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `refine_kernels.rms_norm.add_rms_norm`."""
    total = residual + x
    return rms_norm(total, weight_D, eps), total


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, eps: float, *, activation: str = "silu") -> Tensor:
    """See `refine_kernels.rms_norm.gated_rms_norm`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = F.rms_norm(x.to(wide), weight_D.shape, weight_D.to(wide), eps)
    return (normed * GATES[activation](gate.to(wide))).to(x.dtype)
