"""Attention to a fork's window in plain torch: the window is looked up, and a mask says who sees what."""

from __future__ import annotations

import torch
from torch import Tensor


def fork_attention(
    q_FQHD: Tensor,
    k_FQHD: Tensor,
    v_FQHD: Tensor,
    keys_BTHD: Tensor,
    values_BTHD: Tensor,
    positions_BC: Tensor,
    *,
    length: int,
    window: int,
) -> Tensor:
    """See `refine_kernels.fork_attention.fork_attention`."""
    (F, Q, _, D), (B, C), T = q_FQHD.shape, positions_BC.shape, keys_BTHD.shape[1]
    P, device = min(window - 1, T), q_FQHD.device
    at_FP = positions_BC.reshape(F, 1) + torch.arange(1 - P, 1, device=device)
    rows_F1 = torch.arange(B, device=device).repeat_interleave(C)[:, None]
    # Keys: the P places up to the fork, then the continuations' own Q.
    place_P, place_Q = torch.arange(-P, 0, device=device), torch.arange(Q, device=device) % length
    past_FQP = (at_FP >= 0)[:, None] & (place_P > place_Q[:, None] - window)
    same_QQ = torch.arange(Q, device=device)[:, None] // length == torch.arange(Q, device=device) // length
    ahead_QQ = place_Q[:, None] - place_Q
    own_QQ = same_QQ & (ahead_QQ >= 0) & (ahead_QQ < window)
    seen_FQS = torch.cat((past_FQP, own_QQ.expand(F, -1, -1)), 2)
    wide = torch.float64 if q_FQHD.dtype == torch.float64 else torch.float32
    with torch.autocast(device.type, enabled=False):
        real_FP11 = (at_FP >= 0)[..., None, None]  # what lies outside the text may be anything, which 0 · x is not

        def window_and_own(text_BTHD: Tensor, own_FQHD: Tensor) -> Tensor:
            found_FPHD = text_BTHD[rows_F1, at_FP.clamp(min=0)].masked_fill(~real_FP11, 0)
            return torch.cat((found_FPHD, own_FQHD.to(found_FPHD.dtype)), 1).to(wide)

        k_FSHD, v_FSHD = window_and_own(keys_BTHD, k_FQHD), window_and_own(values_BTHD, v_FQHD)
        scores_FHQS = torch.einsum("fqhd,fshd->fhqs", q_FQHD.to(wide) * D**-0.5, k_FSHD)
        shares_FHQS = scores_FHQS.masked_fill(~seen_FQS[:, None], float("-inf")).softmax(-1)
        return torch.einsum("fhqs,fshd->fqhd", shares_FHQS, v_FSHD).to(v_FQHD.dtype)
