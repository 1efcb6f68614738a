"""The linear head in plain torch, all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.linear_head.reference import Known


def linear_head(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Known:
    """See `refine_kernels.linear_head.linear_head`."""
    logits_MV = F.linear(hidden_MD, weight_VD)
    wide = torch.float64 if logits_MV.dtype == torch.float64 else torch.float32
    logprobs_MV = logits_MV.to(wide).log_softmax(-1)
    normaliser_M = logits_MV.detach().to(wide).logsumexp(-1)
    entropy_M = -(logprobs_MV.exp() * logprobs_MV).sum(-1).detach()
    return Known(logprobs_MV.gather(1, labels_M[:, None])[:, 0], entropy_M, normaliser_M)
