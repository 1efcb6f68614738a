"""Attention to a fork's window as Triton kernels that read the text's keys and values where they lie.

One program takes one head of a few whole continuations of one fork: their own tokens first, as one tile, then the
window block by block. Backward, a program of the same shape gives the gradients of the continuations; the gradients of
a block of the text's tokens are made by one program, which goes through the forks that see them. So nothing is added
from two sides, and results repeat.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.fork_attention.elsewhere import Elsewhere, in_rows
from refine_kernels.runtime import ceiling, why_no_triton

KEYS = 64
"""Tokens of the text in a tile."""
QUERIES = 64
"""Tokens of continuations in a tile, at most."""
LARGEST_HEAD = 128


def why_not(x: Tensor, *, short: bool) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if not short:
        return f"continuations are longer than {QUERIES} tokens"
    if x.shape[-1] > LARGEST_HEAD:
        return f"heads have {x.shape[-1]} channels; the kernels take at most {LARGEST_HEAD}"
    return why_no_triton(x)


def fork_attention(
    q_FQHD: Tensor,
    k_FQHD: Tensor,
    v_FQHD: Tensor,
    keys_BTHD: Tensor | Elsewhere,
    values_BTHD: Tensor | Elsewhere,
    positions_BC: Tensor,
    *,
    length: int,
    window: int,
) -> Tensor:
    """See `refine_kernels.fork_attention.fork_attention`."""
    if isinstance(keys_BTHD, Elsewhere) and isinstance(values_BTHD, Elsewhere):
        assert keys_BTHD.dtype == values_BTHD.dtype == q_FQHD.dtype and not torch.is_grad_enabled()
        own = (x.contiguous() for x in (q_FQHD, k_FQHD, v_FQHD))
        places = keys_BTHD.place_3, values_BTHD.place_3
        return _attend(*own, *places, positions_BC.contiguous(), None, length, window)[0]
    return _ForkAttention.apply(q_FQHD, k_FQHD, v_FQHD, keys_BTHD, values_BTHD, positions_BC, length, window)  # pyright: ignore[reportReturnType]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, T: int | None, K: int, W: int
) -> tuple[Tensor, Tensor, tuple[int, int, int], dict[str, int]]:
    """Outputs and log-normalisers; the grid and the sizes of tiles. T None: keys and values say where they are."""
    F, Q, H, D = q.shape
    most = min(QUERIES, max(16, triton.next_power_of_2(Q)))
    together = most // K * K
    grid = (ceiling(Q, together), H, F)
    tile = {
        "H": H, "D": D, "K": K, "W": W, "QUERIES": most, "TOGETHER": together, "KEYS": KEYS,
        "CHANNELS": max(16, triton.next_power_of_2(D)),
    }  # fmt: skip
    o, lse = torch.empty_like(v), torch.empty(F, H, Q, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _fork_attention_kernel[grid](
            q, k, v, keys, values, positions, o, lse, Q, T or 0, positions.shape[1],
            0 if T is None else keys.stride(1), 0 if T is None else values.stride(1), D**-0.5,
            **tile, ELSEWHERE=T is None,
        )  # fmt: skip
    return o, lse, grid, tile


class _ForkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, keys, values, positions, length, window):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, positions = (x.contiguous() for x in (q, k, v, positions))
        keys, values = (x if in_rows(x) else x.contiguous() for x in (keys, values))
        o, lse, ctx.grid, ctx.tile = _attend(q, k, v, keys, values, positions, keys.shape[1], length, window)
        ctx.save_for_backward(q, k, v, keys, values, positions, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, keys, values, positions, o, lse = ctx.saved_tensors
        (_, Q, H, D), (B, T), C = q.shape, keys.shape[:2], positions.shape[1]
        do = do.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dkeys, dvalues = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (keys, values))
        strides = keys.stride(1), values.stride(1)
        delta = torch.empty_like(lse)
        with torch.cuda.device_of(q):
            _fork_attention_back_kernel[ctx.grid](
                q, k, v, keys, values, positions, o, lse, do, dq, dk, dv, delta, Q, T, C, *strides, D**-0.5, **ctx.tile
            )
            _text_kernel[(ceiling(T, KEYS), H, B)](
                q, keys, values, positions, lse, do, delta, dkeys, dvalues, Q, T, C, *strides, D**-0.5, **ctx.tile
            )
        return dq, dk, dv, dkeys, dvalues, None, None, None


@triton.jit
def _own(x, tokens, f, h, Q, count, H: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile of a continuation's tokens; zeros outside."""
    channels = tl.arange(0, CHANNELS)
    inside = (tokens < count)[:, None] & (channels < D)[None, :]
    return tl.load(x + ((f * Q + tokens[:, None]) * H + h) * D + channels[None, :], mask=inside, other=0)


@triton.jit
def _text(x, places, h, count, STRIDE, D: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile of a text's tokens; zeros from `count` on."""
    channels = tl.arange(0, CHANNELS)
    inside = (places < count)[:, None] & (channels < D)[None, :]
    return tl.load(x + places[:, None].to(tl.int64) * STRIDE + h * D + channels[None, :], mask=inside, other=0)


@triton.jit
def _put(x, y, tokens, f, h, Q, count, H: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    channels = tl.arange(0, CHANNELS)
    inside = (tokens < count)[:, None] & (channels < D)[None, :]
    at = ((f * Q + tokens[:, None]) * H + h) * D + channels[None, :]
    tl.store(x + at, y.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _own_scores(b_q, b_k, tokens, count, scale, K: tl.constexpr, W: tl.constexpr):
    """Scores of continuations with themselves; -inf where a token is not seen. A row of padding sees itself."""
    ahead = tokens[:, None] - tokens[None, :]
    seen = (tokens[:, None] // K == tokens[None, :] // K) & (ahead >= 0) & (ahead < W)
    return tl.where(seen, tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale, float("-inf"))


@triton.jit
def _fork_attention_kernel(
    q, k, v, keys, values, positions, o, lse, Q, T, C, KEYS_T, VALUES_T, scale,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr,
    TOGETHER: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, ELSEWHERE: tl.constexpr,
):  # fmt: skip
    f, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    if ELSEWHERE:
        T, KEYS_T, VALUES_T = tl.load(keys + 1), tl.load(keys + 2), tl.load(values + 2)
        keys = tl.load(keys).to(tl.pointer_type(q.dtype.element_ty))
        values = tl.load(values).to(tl.pointer_type(q.dtype.element_ty))
    start = tl.program_id(0) * TOGETHER
    tokens, count = start + tl.arange(0, QUERIES), tl.minimum(Q, start + TOGETHER)
    b_q = _own(q, tokens, f, h, Q, count, H, D, CHANNELS)
    b_k = _own(k, tokens, f, h, Q, count, H, D, CHANNELS)
    b_v = _own(v, tokens, f, h, Q, count, H, D, CHANNELS)
    own_scores = _own_scores(b_q, b_k, tokens, count, scale, K, W)
    top = tl.max(own_scores, 1)
    own_shares = tl.exp(own_scores - top[:, None])
    total = tl.sum(own_shares, 1)
    b_o = tl.dot(own_shares.to(b_v.dtype), b_v, input_precision="ieee")
    position = tl.load(positions + f)
    text = f // C * T
    for block in range(tl.maximum(position - W + 2, 0) // KEYS, (position + KEYS) // KEYS):
        places = block * KEYS + tl.arange(0, KEYS)
        b_keys = _text(keys + text * KEYS_T, places, h, position + 1, KEYS_T, D, CHANNELS)
        b_values = _text(values + text * VALUES_T, places, h, position + 1, VALUES_T, D, CHANNELS)
        seen = (places <= position)[None, :] & (places[None, :] > position + 1 + (tokens % K)[:, None] - W)
        scores = tl.dot(b_q, tl.trans(b_keys), input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp(scores - higher[:, None])
        kept = tl.exp(top - higher)
        total = total * kept + tl.sum(shares, 1)
        b_o = b_o * kept[:, None] + tl.dot(shares.to(b_values.dtype), b_values, input_precision="ieee")
        top = higher
    _put(o, b_o / total[:, None], tokens, f, h, Q, count, H, D, CHANNELS)
    tl.store(lse + (f * H + h) * Q + tokens, top + tl.log(total), mask=tokens < count)


@triton.jit
def _fork_attention_back_kernel(
    q, k, v, keys, values, positions, o, lse, do, dq, dk, dv, delta, Q, T, C, KEYS_T, VALUES_T, scale,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr,
    TOGETHER: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    f, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    start = tl.program_id(0) * TOGETHER
    tokens, count = start + tl.arange(0, QUERIES), tl.minimum(Q, start + TOGETHER)
    b_q = _own(q, tokens, f, h, Q, count, H, D, CHANNELS)
    b_k = _own(k, tokens, f, h, Q, count, H, D, CHANNELS)
    b_v = _own(v, tokens, f, h, Q, count, H, D, CHANNELS)
    b_o = _own(o, tokens, f, h, Q, count, H, D, CHANNELS)
    b_do = _own(do, tokens, f, h, Q, count, H, D, CHANNELS)
    b_lse = tl.load(lse + (f * H + h) * Q + tokens, mask=tokens < count, other=float("inf"))
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + (f * H + h) * Q + tokens, b_delta, mask=tokens < count)

    own_shares = tl.exp(_own_scores(b_q, b_k, tokens, count, scale, K, W) - b_lse[:, None])
    own_slopes = own_shares * (tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None]) * scale
    _put(
        dv, tl.dot(tl.trans(own_shares).to(b_do.dtype), b_do, input_precision="ieee"),
        tokens, f, h, Q, count, H, D, CHANNELS,
    )  # fmt: skip
    _put(
        dk, tl.dot(tl.trans(own_slopes).to(b_q.dtype), b_q, input_precision="ieee"),
        tokens, f, h, Q, count, H, D, CHANNELS,
    )  # fmt: skip
    b_dq = tl.dot(own_slopes.to(b_k.dtype), b_k, input_precision="ieee")
    position = tl.load(positions + f)
    text = f // C * T
    for block in range(tl.maximum(position - W + 2, 0) // KEYS, (position + KEYS) // KEYS):
        places = block * KEYS + tl.arange(0, KEYS)
        b_keys = _text(keys + text * KEYS_T, places, h, position + 1, KEYS_T, D, CHANNELS)
        b_values = _text(values + text * VALUES_T, places, h, position + 1, VALUES_T, D, CHANNELS)
        seen = (places <= position)[None, :] & (places[None, :] > position + 1 + (tokens % K)[:, None] - W)
        scores = tl.dot(b_q, tl.trans(b_keys), input_precision="ieee") * scale
        shares = tl.where(seen, tl.exp(scores - b_lse[:, None]), 0)
        slopes = shares * (tl.dot(b_do, tl.trans(b_values), input_precision="ieee") - b_delta[:, None]) * scale
        b_dq += tl.dot(slopes.to(b_keys.dtype), b_keys, input_precision="ieee")
    _put(dq, b_dq, tokens, f, h, Q, count, H, D, CHANNELS)


@triton.jit
def _text_kernel(
    q, keys, values, positions, lse, do, delta, dkeys, dvalues, Q, T, C, KEYS_T, VALUES_T, scale,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr,
    TOGETHER: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    places = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    first, last = tl.program_id(0) * KEYS, tl.program_id(0) * KEYS + KEYS - 1
    b_keys = _text(keys + b * T * KEYS_T, places, h, T, KEYS_T, D, CHANNELS)
    b_values = _text(values + b * T * VALUES_T, places, h, T, VALUES_T, D, CHANNELS)
    b_dkeys = tl.zeros([KEYS, CHANNELS], dtype=tl.float32)
    b_dvalues = tl.zeros([KEYS, CHANNELS], dtype=tl.float32)
    for c in range(C):
        f = b * C + c
        position = tl.load(positions + f)
        if (first <= position) & (last >= position - W + 2):
            for start in range(0, Q, TOGETHER):
                tokens, count = start + tl.arange(0, QUERIES), tl.minimum(Q, start + TOGETHER)
                b_q = _own(q, tokens, f, h, Q, count, H, D, CHANNELS)
                b_do = _own(do, tokens, f, h, Q, count, H, D, CHANNELS)
                b_lse = tl.load(lse + (f * H + h) * Q + tokens, mask=tokens < count, other=float("inf"))
                b_delta = tl.load(delta + (f * H + h) * Q + tokens, mask=tokens < count, other=0)
                seen = (places <= position)[:, None] & (places[:, None] > position + 1 + (tokens % K)[None, :] - W)
                scores = tl.dot(b_keys, tl.trans(b_q), input_precision="ieee") * scale
                shares = tl.where(seen, tl.exp(scores - b_lse[None, :]), 0)
                b_dvalues += tl.dot(shares.to(b_do.dtype), b_do, input_precision="ieee")
                slopes = tl.dot(b_values, tl.trans(b_do), input_precision="ieee") - b_delta[None, :]
                slopes = tl.where(seen, shares * slopes * scale, 0)  # what is not seen may be anything
                b_dkeys += tl.dot(slopes.to(b_q.dtype), b_q, input_precision="ieee")
    _put(dkeys + b * T * H * D, b_dkeys, places, 0, h, 0, T, H, D, CHANNELS)
    _put(dvalues + b * T * H * D, b_dvalues, places, 0, h, 0, T, H, D, CHANNELS)
