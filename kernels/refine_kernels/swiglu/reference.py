"""The gated activation in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `refine_kernels.swiglu.swiglu`."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(wide)) * up.to(wide)).to(up.dtype)


def swiglu_linear(gate: Tensor, up: Tensor, weight_DI: Tensor) -> Tensor:
    """See `refine_kernels.swiglu.swiglu_linear`."""
    return F.linear(swiglu(gate, up), weight_DI)
