"""The delta rule in plain torch, a chunk of tokens at a time (Yang et al., arXiv 2406.06484 section 3, 2412.06464).

Within a chunk that starts from state S, let a_t be the sum of the log decays up to token t and D the lower triangular
matrix exp(a_t - a_s), s <= t. The correction u_t that token t writes depends on the corrections before it only
through a unit lower triangular system, so all of them are one solve:

    u = (I + tril(beta k k^T * D, -1))^-1 (beta v - beta exp(a) k S) = U - W S
    o = scale (exp(a) q S + (q k^T * D) u)          S' = exp(a_L) S + (exp(a_L - a) k)^T u

U, W and q k^T * D need no state and are computed for all chunks at once; only S' runs from chunk to chunk: two matrix
products for each. Every exponent is a decay from an earlier token to a later one, hence at most 0: nothing overflows,
however fast the memory fades. Without decay every exponential is 1 and is left out.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from refine_kernels.lookup import Tap, tapped
from refine_kernels.packing import Packing

CHUNK = 64
KEPT = 32
"""States of each text that are kept for forks, at most: however long it is, they take the memory of so many."""


class DeltaRule(NamedTuple):
    """What the delta rule gives for a piece of text."""

    outputs_BTHV: Tensor
    state_BHKV: Tensor
    """After the last token."""
    boundaries: Tap | None
    """States [B, N, H, K, V] after 0, stride, 2·stride, ... tokens, all before the last. Of packed texts
    [1, N, H, K, V], those of one text after another (`Packing.pieces(stride)`). Gradients join (`Tap.join`) after 0,
    chunk, 2·chunk, ... tokens, counted in the same way; where stride is chunk, `Tap.pick` does both."""
    stride: int
    """Tokens between two states that are kept, a multiple of chunk."""
    chunk: int
    """Tokens between two states that gradients can join."""


def stride_of(chunk: int, longest: int, least: int = 1) -> int:
    """Tokens between two states that are kept of texts of which the longest has so many tokens.

    least: chunks between two of them, where there are as many.
    """
    chunks = -(-longest // chunk)
    return chunk * max(min(least, chunks), -(-chunks // KEPT))


def kept(states_BNHKV: Tensor, chunk: int, stride: int, packing: Packing | None) -> Tensor:
    """A copy of those that are kept of the states before every chunk."""
    if packing is None:
        return states_BNHKV[:, :: stride // chunk].clone()
    text, place = packing.pieces(stride).index_N2.unbind(1)
    return states_BNHKV[:, packing.pieces(chunk).starts[text] + stride // chunk * place]


class _Decay(NamedTuple):
    """How much of what is in a memory is left, for every chunk of L tokens; [..., L, 1] but where named."""

    into: Tensor
    """From the chunk's start to each token."""
    within_LL: Tensor
    """From each token (column) to each token not before it (row); above the diagonal without meaning."""
    out: Tensor
    """From each token to the chunk's end."""
    through: Tensor
    """From the chunk's start to its end, [..., 1, 1]."""


def delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    *,
    g_BTH: Tensor | None = None,
    scale: float | None = None,
    boundaries: bool = False,
    packing: Packing | None = None,
) -> DeltaRule:
    """See `refine_kernels.delta_rule.delta_rule`."""
    H = v_BTHV.shape[2]
    inputs = _each_head(q_BTGK, H), _each_head(k_BTGK, H), v_BTHV, beta_BTH, g_BTH
    if v_BTHV.shape[1] == 1 and not boundaries:
        return _one_token(*inputs, state_BHKV, scale)
    if packing is None:
        L = min(CHUNK, v_BTHV.shape[1])
        o_BTHV, after_BHKV, grid_BNHKV = _in_chunks(*inputs, state_BHKV, scale, L)
    else:
        L = min(CHUNK, packing.T)
        o_BTHV, after_BHKV, grid_BNHKV = _packed(inputs, state_BHKV, scale, L, packing)
    if not boundaries:
        return DeltaRule(o_BTHV, after_BHKV, None, L, L)
    _, tap = tapped(grid_BNHKV)
    stride = stride_of(L, v_BTHV.shape[1] if packing is None else packing.T)
    if stride > L:
        tap = Tap(kept(tap.value, L, stride, packing), tap.anchor, tap.waiting)
    return DeltaRule(o_BTHV, after_BHKV, tap, stride, L)


def delta_state(
    k_BTGK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None, *, g_BTH: Tensor | None = None
) -> Tensor:
    """See `refine_kernels.delta_rule.delta_state`."""
    return delta_rule(k_BTGK, k_BTGK, v_BTHV, beta_BTH, state_BHKV, g_BTH=g_BTH).state_BHKV


def delta_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    g_BH: Tensor | None = None,
) -> Tensor:
    """See `refine_kernels.delta_rule.delta_step`."""
    token = [None if x is None else x[:, None] for x in (q_BGK, k_BGK, v_BHV, beta_BH, g_BH)]
    q_B1GK, k_B1GK, v_B1HV, beta_B1H, g_B1H = cast(Inputs, token)
    rule = delta_rule(q_B1GK, k_B1GK, v_B1HV, beta_B1H, state_BHKV, g_BTH=g_B1H)
    state_BHKV.copy_(rule.state_BHKV)
    return rule.outputs_BTHV[:, 0]


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys, values, beta and g, all with as many heads."""


def _packed(
    inputs: Inputs, state_BHKV: Tensor | None, scale: float | None, L: int, packing: Packing
) -> tuple[Tensor, Tensor, Tensor]:
    """Texts that have as many chunks as rows, made full with beta = g = 0, which changes nothing."""
    of_count: dict[int, list[int]] = {}
    for text, length in enumerate(packing.lengths):
        of_count.setdefault(-(-length // L), []).append(text)
    texts = [None if x is None else x[0].split(packing.lengths) for x in inputs]
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for group in of_count.values():
        rows = [None if x is None else pad_sequence([x[text] for text in group], batch_first=True) for x in texts]
        started = None if state_BHKV is None else torch.stack([state_BHKV[text] for text in group])
        made = _in_chunks(*cast(Inputs, rows), started, scale, L)
        for text, o_THV, after_HKV, grid_NHKV in zip(group, *made, strict=True):
            parts[text] = o_THV[: packing.lengths[text]], after_HKV, grid_NHKV
    outputs, after, grids = zip(*(parts[text] for text in range(len(parts))), strict=True)
    return torch.cat(outputs)[None], torch.stack(after), torch.cat(grids)[None]


def _in_chunks(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g_BTH: Tensor | None,
    state_BHKV: Tensor | None,
    scale: float | None,
    L: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the state at the end, and the states before each chunk, [B, N, H, K, V]."""
    B, T, H, V = v_BTHV.shape
    K = k_BTHK.shape[-1]
    wide = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    scaled = K**-0.5 if scale is None else scale
    N = -(-T // L)

    def chunked(x_BTH_: Tensor) -> Tensor:
        """[B, T, H, X] -> [B·H, N, L, X]; the tail is padded with zeros, and beta = g = 0 changes nothing."""
        x = F.pad(x_BTH_.to(wide), (0, 0, 0, 0, 0, N * L - T))
        return x.view(B, N, L, H, -1).permute(0, 3, 1, 2, 4).reshape(B * H, N, L, -1)

    with torch.autocast(q_BTHK.device.type, enabled=False):
        q, k, v, beta = chunked(q_BTHK), chunked(k_BTHK), chunked(v_BTHV), chunked(beta_BTH[..., None])
        decay = None if g_BTH is None else _decay(chunked(g_BTH[..., None]))
        k_beta, v_beta = k * beta, v * beta
        inside, lower = q @ k.transpose(-1, -2), k_beta @ k.transpose(-1, -2)
        k_out = k
        if decay is not None:
            inside, lower = inside * decay.within_LL, lower * decay.within_LL
            q, k_beta, k_out = q * decay.into, k_beta * decay.into, k * decay.out
        if L > 1:
            solved = torch.linalg.solve_triangular(
                torch.tril(lower, -1), torch.cat((v_beta, k_beta), -1), upper=False, unitriangular=True
            )
            U, W = solved.split((V, K), -1)
        else:
            U, W = v_beta, k_beta

        S = q.new_zeros(B * H, K, V) if state_BHKV is None else state_BHKV.to(wide).reshape(B * H, K, V)
        before, written = [], []
        through = [None] * N if decay is None else decay.through.unbind(1)
        for U_n, W_n, k_n, through_n in zip(U.unbind(1), W.unbind(1), k_out.unbind(1), through, strict=True):
            u_n = torch.baddbmm(U_n, W_n, S, alpha=-1)
            before.append(S)
            written.append(u_n)
            S = torch.baddbmm(S if through_n is None else S * through_n, k_n.transpose(-1, -2), u_n)

        states = torch.stack(before, 1)
        o = scaled * (q @ states + torch.tril(inside) @ torch.stack(written, 1))
        o_BTHV = o.view(B, H, N * L, V).transpose(1, 2)[:, :T].to(v_BTHV.dtype)
    return o_BTHV, S.view(B, H, K, V), states.view(B, H, N, K, V).transpose(1, 2)


def _decay(g: Tensor) -> _Decay:
    """Of the log decays [..., L, 1]."""
    total = g.cumsum(-2)
    last = total[..., -1:, :]
    # tril before exp: above the diagonal the differences are positive, and their exponential may overflow
    within = torch.tril(total - total.transpose(-1, -2)).exp()
    return _Decay(total.exp(), within, (last - total).exp(), last.exp())


def _each_head(x_BTGK: Tensor, heads: int) -> Tensor:
    """Head h of `heads` gets head h // (heads // G)."""
    G = x_BTGK.shape[2]
    return x_BTGK if heads == G else x_BTGK.repeat_interleave(heads // G, 2)


def _one_token(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    beta_B1H: Tensor,
    g_B1H: Tensor | None,
    state_BHKV: Tensor | None,
    scale: float | None,
) -> DeltaRule:
    """The definition itself, for decoding."""
    B, _, H, K = k_B1HK.shape
    V = v_B1HV.shape[-1]
    wide = torch.float64 if q_B1HK.dtype == torch.float64 else torch.float32
    with torch.autocast(q_B1HK.device.type, enabled=False):
        q, k, v = (x.to(wide).reshape(B * H, 1, -1) for x in (q_B1HK, k_B1HK, v_B1HV))
        S = q.new_zeros(B * H, K, V) if state_BHKV is None else state_BHKV.to(wide).reshape(B * H, K, V)
        if g_B1H is not None:
            S = S * g_B1H.to(wide).reshape(B * H, 1, 1).exp()
        u = torch.baddbmm(v, k, S, alpha=-1) * beta_B1H.to(wide).reshape(B * H, 1, 1)
        S = torch.baddbmm(S, k.transpose(1, 2), u)
        o_B1HV = (q @ S * (K**-0.5 if scale is None else scale)).view(B, 1, H, V).to(v_B1HV.dtype)
    return DeltaRule(o_B1HV, S.view(B, H, K, V), None, 1, 1)
