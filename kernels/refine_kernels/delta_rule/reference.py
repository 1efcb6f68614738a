"""The delta rule in plain torch, a chunk of tokens at a time (Yang et al., arXiv 2406.06484, section 3).

Within a chunk that starts from state S, the correction u_t that token t writes depends on the corrections
before it only through a unit lower triangular system, so all of them are one solve:

    u = (I + tril(beta k k^T, -1))^-1 (beta v - beta k S) = U - W S
    o = scale (q S + tril(q k^T) u)            S' = S + k^T u

U, W and tril(q k^T) need no state and are computed for all chunks at once; only S' = S + k^T (U - W S)
runs from chunk to chunk: two matrix products for each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


class DeltaRule(NamedTuple):
    """What the delta rule gives for a piece of text."""

    outputs_BTHV: Tensor
    state_BHKV: Tensor
    """After the last token."""
    boundaries_BGHKV: Tensor | None
    """States after 0, stride, 2·stride, ... tokens; the last entry is the final state."""
    stride: int
    """Tokens between two boundaries."""


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    *,
    scale: float | None = None,
    boundaries: bool = False,
) -> DeltaRule:
    """See `refine_kernels.delta_rule.delta_rule`."""
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    if T == 1 and not boundaries:
        return _one_token(q_BTHK, k_BTHK, v_BTHV, beta_BTH, state_BHKV, scale)
    wide = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    scaled = K**-0.5 if scale is None else scale
    L = min(CHUNK, T)
    G = -(-T // L)

    def chunked(x_BTH_: Tensor) -> Tensor:
        """[B, T, H, X] -> [B·H, G, L, X]; the tail is padded with zeros, and beta = 0 writes nothing."""
        x = F.pad(x_BTH_.to(wide), (0, 0, 0, 0, 0, G * L - T))
        return x.view(B, G, L, H, -1).permute(0, 3, 1, 2, 4).reshape(B * H, G, L, -1)

    with torch.autocast(q_BTHK.device.type, enabled=False):
        q, k, v, beta = chunked(q_BTHK), chunked(k_BTHK), chunked(v_BTHV), chunked(beta_BTH[..., None])
        k_beta, v_beta = k * beta, v * beta
        if L > 1:
            lower = torch.tril(k_beta @ k.transpose(-1, -2), -1)
            solved = torch.linalg.solve_triangular(
                lower, torch.cat((v_beta, k_beta), -1), upper=False, unitriangular=True
            )
            U, W = solved.split((V, K), -1)
        else:
            U, W = v_beta, k_beta

        S = q.new_zeros(B * H, K, V) if state_BHKV is None else state_BHKV.to(wide).reshape(B * H, K, V)
        before, written = [], []
        for U_g, W_g, k_g in zip(U.unbind(1), W.unbind(1), k.unbind(1), strict=True):
            u_g = torch.baddbmm(U_g, W_g, S, alpha=-1)
            before.append(S)
            written.append(u_g)
            S = torch.baddbmm(S, k_g.transpose(-1, -2), u_g)

        inside = torch.tril(q @ k.transpose(-1, -2))
        o = scaled * (q @ torch.stack(before, 1) + inside @ torch.stack(written, 1))
        o_BTHV = o.view(B, H, G * L, V).transpose(1, 2)[:, :T].to(v_BTHV.dtype)
        grid = torch.stack((*before, S), 1).view(B, H, G + 1, K, V).transpose(1, 2) if boundaries else None
    return DeltaRule(o_BTHV, S.view(B, H, K, V), grid, L)


def _one_token(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, beta_B1H: Tensor, state_BHKV: Tensor | None, scale: float | None
) -> DeltaRule:
    """The definition itself, for decoding."""
    B, _, H, K = k_B1HK.shape
    V = v_B1HV.shape[-1]
    wide = torch.float64 if q_B1HK.dtype == torch.float64 else torch.float32
    with torch.autocast(q_B1HK.device.type, enabled=False):
        q, k, v = (x.to(wide).reshape(B * H, 1, -1) for x in (q_B1HK, k_B1HK, v_B1HV))
        S = q.new_zeros(B * H, K, V) if state_BHKV is None else state_BHKV.to(wide).reshape(B * H, K, V)
        u = torch.baddbmm(v, k, S, alpha=-1) * beta_B1H.to(wide).reshape(B * H, 1, 1)
        S = torch.baddbmm(S, k.transpose(1, 2), u)
        o_B1HV = (q @ S * (K**-0.5 if scale is None else scale)).view(B, 1, H, V).to(v_B1HV.dtype)
    return DeltaRule(o_B1HV, S.view(B, H, K, V), None, 1)
