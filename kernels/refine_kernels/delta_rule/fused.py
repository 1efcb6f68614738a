"""The delta rule on a GPU: flash-linear-attention's kernels within chunks, our own from chunk to chunk.

Forward: the chunks' triangular systems, then the states from chunk to chunk (`states`), then the outputs. The state at
the start of every chunk is written in the dtype of the inputs, as rounded as what every token of the chunk reads. A few
of those are kept; the others can be read again from them. Where nobody reads only the last state is written.

Backward: a fork's gradient arrives at the start of a chunk and must join the recurrence there (`state_gradients`).

Both recurrences hold a whole column of keys of a few values, and all their matrix products go from there into there.
One token at a time is a kernel of its own (`delta_step`).

Packed texts go through the same kernels: each text has chunks and a recurrence of its own.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels import fla
from refine_kernels.delta_rule.reference import DeltaRule, kept, stride_of
from refine_kernels.lookup import Lookup, Tap, Waiting, anchor_like
from refine_kernels.packing import Packing
from refine_kernels.runtime import ceiling, why_no_triton

CHUNK = 64
LARGEST_KEY = 256
EVERY = 2
"""Of the states before each chunk at most every second is kept for forks: half the memory where texts are short."""
FEW = 32
"""Up to so many tokens are read one after another where no gradient is wanted: faster than a padded chunk."""
HOPPER = 132, 227 * 1024
"""Processors and bytes of shared memory that a program can have: of a GPU that is not asked."""
WIDTHS = 16, 32, 64
"""Value channels that a program of the recurrences can have."""
LOG2_E = 1.4426950408889634

Arrivals = tuple[Lookup, Tensor]


def why_not(x: Tensor, decay: bool = False) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if x.device.type != "cuda":
        return f"the tensor is on {x.device.type}, not on cuda"
    if x.shape[-1] > LARGEST_KEY:
        return f"heads have {x.shape[-1]} key channels; the kernels take at most {LARGEST_KEY}"
    back = torch.is_grad_enabled() and x.requires_grad
    taken, shared = _bytes(max(16, triton.next_power_of_2(x.shape[-1])), WIDTHS[0], 2, back), _gpu(x.device)[1]
    if taken > shared:
        return f"tiles of {x.shape[-1]} key channels take {taken} bytes of shared memory; this GPU has {shared}"
    return why_no_triton(x, (torch.bfloat16, torch.float16)) or (fla.why_no_decay() if decay else fla.why_not())


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
    scale = q_BTGK.shape[-1] ** -0.5 if scale is None else scale
    inputs = _inputs(q_BTGK, k_BTGK, v_BTHV, beta_BTH, g_BTH, state_BHKV)
    longest = q_BTGK.shape[1] if packing is None else packing.T
    if not boundaries and _few(longest, inputs):
        return DeltaRule(*_token_by_token(inputs, scale, packing), None, 1, 1)
    waiting: Waiting = []
    stride = stride_of(CHUNK, longest, EVERY) if boundaries else None
    outputs, after, grid, anchor = _chunked(inputs, scale, stride, packing, waiting)
    if stride is None:
        return DeltaRule(outputs, after, None, CHUNK, CHUNK)
    return DeltaRule(outputs, after, Tap(grid, anchor if outputs.requires_grad else None, waiting), stride, CHUNK)


def delta_state(
    k_BTGK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None = None, *, g_BTH: Tensor | None = None
) -> Tensor:
    """See `refine_kernels.delta_rule.delta_state`."""
    inputs = _inputs(None, k_BTGK, v_BTHV, beta_BTH, g_BTH, state_BHKV)
    if _few(k_BTGK.shape[1], inputs):
        return _token_by_token(inputs, 1.0, None)[1]
    return _chunked(inputs, 1.0, None, None, [])[1]


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
    q, k, v, beta = (x.contiguous() for x in (q_BGK, k_BGK, v_BHV, beta_BH))
    g = None if g_BH is None else g_BH.contiguous()
    assert state_BHKV.is_contiguous()
    B, H, K, V = state_BHKV.shape
    out = torch.empty_like(v)
    BK, BV = triton.next_power_of_2(K), min(32, triton.next_power_of_2(V))
    with torch.cuda.device_of(q):
        _step_kernel[(ceiling(V, BV), B * H)](
            q, k, v, beta, g, state_BHKV, out, K**-0.5, G=q.shape[1], H=H, K=K, V=V, BK=BK, BV=BV,
            DECAY=g is not None, num_warps=8 if BK * BV > 4096 else 4,
        )  # fmt: skip
    return out


Inputs = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Queries (None where nobody reads), keys, values, beta, g and the first state, as the kernels take them."""


def _inputs(q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None) -> Inputs:
    q, g, state = (None if x is None else x.contiguous() for x in (q, _float(g), _float(state)))
    return q, k.contiguous(), v.contiguous(), beta.to(k.dtype).contiguous(), g, state


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _few(longest: int, inputs: Inputs) -> bool:
    """Whether tokens are read one after another."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return longest <= FEW and not wanted


def _token_by_token(inputs: Inputs, scale: float, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Outputs and the last state."""
    q, k, v, beta, g, state = inputs
    starts = None if packing is None else packing.starts
    with torch.cuda.device_of(k):
        return fla.ops("gated_delta_rule.fused_recurrent").fused_recurrent_gated_delta_rule_fwd(
            q=k if q is None else q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=state,
            output_final_state=True, cu_seqlens=starts,
        )  # fmt: skip


def _chunked(inputs: Inputs, scale: float, stride: int | None, packing: Packing | None, waiting: Waiting) -> Any:
    """Outputs, the last state, the states that are kept and what ties forks to them. Backward is on the right device
    already."""
    with torch.cuda.device_of(inputs[1]):
        return _Chunked.apply(*inputs, scale, stride, packing, waiting)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, state, scale, stride, packing, waiting):  # pyright: ignore[reportIncompatibleMethodOverride]
        texts = _texts(packing)
        if g is not None:
            g = fla.ops("utils.cumsum").chunk_local_cumsum(g, chunk_size=CHUNK, scale=LOG2_E, **texts)
        w, u, A = fla.ops("gated_delta_rule.chunk_fwd").chunk_gated_delta_rule_fwd_intra(
            k=k, v=v, g=g, beta=beta, **texts
        )
        h, written, after = states(k, w, u, g, state, q is not None, packing)
        o = None
        if q is not None:
            o = fla.ops("common.chunk_o").chunk_fwd_o(q=q, k=k, v=written, h=h, g=g, scale=scale, **texts)
        ctx.save_for_backward(q, k, v, beta, g, A, state)
        ctx.scale, ctx.packing, ctx.waiting = scale, packing, waiting
        ctx.set_materialize_grads(False)
        if stride is None:
            return o, after, None, None
        grid = kept(h, CHUNK, stride, packing)
        ctx.mark_non_differentiable(grid)
        return o, after, grid, anchor_like(grid)

    @staticmethod
    def backward(ctx, do, dafter, _grid, _anchor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, beta, g, A, state = ctx.saved_tensors
        scale, packing = ctx.scale, ctx.packing
        texts = _texts(packing)
        asked, q = q is not None, k if q is None else q
        unread = do is None
        do = torch.zeros_like(v) if unread else do.contiguous()
        wy, chunk_o = fla.ops("gated_delta_rule.wy_fast"), fla.ops("common.chunk_o")
        w, u = wy.recompute_w_u_fwd(k=k, v=v, beta=beta, A=A, g=g, **texts)
        h, written, _ = states(k, w, u, g, state, True, packing)
        dwritten = do if unread else chunk_o.chunk_bwd_dv_local(q=q, k=k, do=do, g=g, scale=scale, **texts)
        forks = _arrivals(ctx.waiting)
        dh, dstate, dwritten = state_gradients(
            q, k, w, do, dwritten, g, dafter, forks, scale, state is not None, packing
        )
        dq, dk, dw, dg = chunk_o.chunk_bwd_dqkwg(
            q=q, k=k, v=written, w=w, g=g, h=h, dv=dwritten, do=do, dh=dh, scale=scale, **texts
        )
        dk2, dv, dbeta, dg2 = wy.prepare_wy_repr_bwd(k=k, v=v, beta=beta, g=g, A=A, dw=dw, du=dwritten, **texts)
        dk.add_(dk2)
        if g is not None:
            dg = fla.ops("utils.cumsum").chunk_local_cumsum(dg.add_(dg2), chunk_size=CHUNK, reverse=True, **texts)
        inputs = dq.to(q.dtype) if asked else None, dk.to(k.dtype), dv.to(v.dtype), dbeta.to(beta.dtype), dg, dstate
        return *inputs, None, None, None, None


def _texts(packing: Packing | None) -> dict[str, Tensor]:
    """What fla's kernels ask for where texts are packed."""
    return {} if packing is None else {"cu_seqlens": packing.starts, "chunk_indices": packing.pieces(CHUNK).index_N2}


def _arrivals(waiting: Waiting) -> Arrivals | None:
    """What forks bring, one entry for each state that was forked."""
    if not waiting:
        return None
    if len(waiting) == 1:
        lookup, gradient = waiting[0]
    else:
        lookup = Lookup(torch.cat([each.rows_M for each, _ in waiting]))
        gradient = torch.cat([gradient for _, gradient in waiting])
    waiting.clear()
    return lookup, lookup.summed(gradient)


def states(
    k_BTGK: Tensor,
    w_BTHK: Tensor,
    u_BTHV: Tensor,
    g_BTH: Tensor | None,
    state_BHKV: Tensor | None,
    told: bool,
    packing: Packing | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The states from the first chunk to the last.

    With S the state before a chunk and L its last token, of the chunks' solved systems U and W:

        written = U - W S        S_after = exp2(g_L) S + k^T (exp2(g_L - g) written)

    Args:
        g_BTH: base-2 log decay summed within each chunk, float32.
        state_BHKV: the first state, float32; None for zeros.
        told: whether more is wanted than the last state.
        packing: as in `delta_rule`.

    Returns S before each chunk [B, N, H, K, V] and what was written [B, T, H, V], both in the dtype of k and None where
    nobody wants them, and the last state (float32).
    """
    B, T, G, K = k_BTGK.shape
    H, V = u_BTHV.shape[2:]
    N, texts, starts, chunk_starts = _chunks(B, T, packing)
    h = k_BTGK.new_empty(B, N, H, K, V) if told else None
    written = torch.empty_like(u_BTHV) if told else None
    after = torch.empty(texts, H, K, V, dtype=torch.float32, device=k_BTGK.device)
    tile = _tile(k_BTGK, texts * H, V, packing, back=False)
    with torch.cuda.device_of(k_BTGK):
        _states_kernel[(ceiling(V, tile["BV"]), texts * H)](
            k_BTGK, w_BTHK, u_BTHV, g_BTH, state_BHKV, h, written, after, starts, chunk_starts, T,
            G=G, H=H, K=K, V=V, **tile,
            DECAY=g_BTH is not None, STATE=state_BHKV is not None, TOLD=told, PACKED=packing is not None,
        )  # fmt: skip
    return h, written, after


def _tile(x_BTGK: Tensor, sequences: int, V: int, packing: Packing | None, *, back: bool) -> dict[str, Any]:
    """How the recurrences are cut: tokens of a chunk, channels of a program, its warps, and what is fetched ahead.

    A program goes through one of so many sequences with so few value channels that as many processors as there are
    have work. The numbers were measured on an H100.
    """
    T, K = x_BTGK.shape[1], x_BTGK.shape[-1]
    processors, shared = _gpu(x_BTGK.device)
    BK, most = (max(16, triton.next_power_of_2(size)) for size in (K, min(V, 32 if back or K <= 128 else 64)))
    wanted = next(BV for BV in WIDTHS if most <= BV or sequences * ceiling(V, BV) <= processors)
    ahead = 3 if BK <= 128 and sequences * ceiling(V, wanted) <= processors else 2
    choices = [(BV, stages) for stages in (ahead, 2) for BV in reversed(WIDTHS) if wanted >= BV]
    BV, stages = next((each for each in choices if _bytes(BK, *each, back) <= shared), choices[-1])
    # One short piece of text needs no more of a chunk than that.
    L = CHUNK if packing is not None else min(CHUNK, max(16, triton.next_power_of_2(T)))
    return {"L": L, "BK": BK, "BV": BV, "num_warps": 8 if BK * BV > 8192 else 4, "num_stages": stages}


def _bytes(BK: int, BV: int, stages: int, back: bool) -> int:
    """Shared memory that a program takes, at most: what is fetched ahead of each token, and the state as an operand."""
    of_token = 3 * BK + 2 * BV if back else 2 * BK + BV
    return 2 * stages * CHUNK * of_token + BK * BV * (3 if back else 5) // 2 + 1024


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Its processors, and the bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return HOPPER
    of = torch.cuda.get_device_properties(device)
    return of.multi_processor_count, of.shared_memory_per_block_optin


def _chunks(B: int, T: int, packing: Packing | None) -> tuple[int, int, Tensor | None, Tensor | None]:
    """Chunks of a row, how many texts there are, and where tokens and chunks of each start where they are packed."""
    if packing is None:
        return ceiling(T, CHUNK), B, None, None
    chunks = packing.pieces(CHUNK)
    return len(chunks.index_N2), len(packing.lengths), packing.starts, chunks.starts


def state_gradients(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    w_BTHK: Tensor,
    do_BTHV: Tensor,
    dv_BTHV: Tensor,
    g_BTH: Tensor | None,
    dafter_BHKV: Tensor | None,
    forks: Arrivals | None,
    scale: float,
    wants_start: bool,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradient with respect to every state, from the last chunk to the first.

    With dS the gradient of the state after a chunk, s the chunk's own and L its last token:

        dv' = dv + exp2(g_L - g) (k dS)       dS_before = exp2(g_L) dS + scale (exp2(g) q)^T do - w^T dv' + forks'

    Args:
        w_BTHK: the W of the chunks' solved systems.
        dv_BTHV: gradient of what was written, through the outputs of the same chunk.
        g_BTH: base-2 log decay summed within each chunk, float32.
        dafter_BHKV: gradient of the last state.
        forks: which states at the starts of chunks were forked, counted over rows and their chunks, and the gradients
            [M, H, K, V] that they bring, all but zeros at the first of equal entries.
        wants_start: whether the gradient of the first state is asked for.
        packing: as in `delta_rule`.

    Returns dS after each chunk [B, N, H, K, V] in the dtype of q, of the first state (float32) and dv'.
    """
    B, T, G, K = q_BTGK.shape
    H, V = do_BTHV.shape[2:]
    N, texts, starts, chunk_starts = _chunks(B, T, packing)
    dh = q_BTGK.new_empty(B, N, H, K, V)
    dstart = torch.empty(texts, H, K, V, dtype=torch.float32, device=q_BTGK.device) if wants_start else None
    dv2 = torch.empty_like(dv_BTHV)
    tile = _tile(q_BTGK, texts * H, V, packing, back=True)
    entry_BN, dforks_MHKV = None, None
    if forks is not None:
        lookup, dforks_MHKV = forks
        entry_BN = torch.full((B * N,), -1, dtype=torch.int64, device=q_BTGK.device)
        entry_BN[lookup.rows_M] = lookup.firsts_M
        dforks_MHKV = dforks_MHKV.contiguous()
    with torch.cuda.device_of(q_BTGK):
        _state_gradients_kernel[(ceiling(V, tile["BV"]), texts * H)](
            q_BTGK, k_BTGK, w_BTHK, do_BTHV, dv_BTHV, g_BTH,
            None if dafter_BHKV is None else dafter_BHKV.contiguous(),
            entry_BN, dforks_MHKV, dh, dstart, dv2, starts, chunk_starts, scale, T,
            G=G, H=H, K=K, V=V, **tile,
            DECAY=g_BTH is not None, AFTER=dafter_BHKV is not None, FORKS=forks is not None,
            START=wants_start, PACKED=packing is not None,
        )  # fmt: skip
    return dh, dstart, dv2


@triton.jit
def _text(starts, chunk_starts, row, T, L: tl.constexpr, PACKED: tl.constexpr):
    """Tokens and chunks of a text, its first token and its first chunk."""
    if PACKED:
        start = tl.load(starts + row)
        T = (tl.load(starts + row + 1) - start).to(tl.int32)
        return T, tl.cdiv(T, L), start, tl.load(chunk_starts + row)
    else:
        N = tl.cdiv(T, L)
        return T, N, row * T, row * N


@triton.jit
def _states_kernel(
    k, w, u, g, state, h, written, after, starts, chunk_starts, T,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, STATE: tl.constexpr, TOLD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    group = head // (H // G)
    keys = tl.arange(0, BK)
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    of_state = keys[:, None] * V + values[None, :]
    in_state = (keys[:, None] < K) & (values[None, :] < V)
    T, N, start, chunk_start = _text(starts, chunk_starts, row, T, L, PACKED)
    b_h = tl.zeros([BK, BV], dtype=tl.float32)
    if STATE:
        b_h += tl.load(state + (row * H + head) * K * V + of_state, mask=in_state, other=0).to(tl.float32)
    for n in range(N):
        if TOLD:
            chunk = ((chunk_start + n) * H + head) * K * V
            tl.store(h + chunk + of_state, b_h.to(h.dtype.element_ty), mask=in_state)
        tokens = n * L + tl.arange(0, L)
        real = tokens < T
        at = start + tokens
        in_k = real[:, None] & (keys[None, :] < K)
        vs = (at[:, None] * H + head) * V + values[None, :]
        in_vs = real[:, None] & (values[None, :] < V)
        b_w = tl.load(w + (at[:, None] * H + head) * K + keys[None, :], mask=in_k, other=0)
        b_k = tl.load(k + (at[:, None] * G + group) * K + keys[None, :], mask=in_k, other=0)
        b_v = tl.load(u + vs, mask=in_vs, other=0).to(tl.float32) - tl.dot(b_w, b_h.to(b_w.dtype))
        if TOLD:
            tl.store(written + vs, b_v.to(written.dtype.element_ty), mask=in_vs)
        if DECAY:
            b_g = tl.load(g + at * H + head, mask=real, other=0)
            g_last = tl.load(g + (start + tl.minimum((n + 1) * L, T) - 1) * H + head)
            b_v *= tl.where(real, tl.exp2(g_last - b_g), 0)[:, None]
            b_h *= tl.exp2(g_last)
        b_h = tl.dot(tl.trans(b_k), b_v.to(b_k.dtype), b_h)
    tl.store(after + (row * H + head) * K * V + of_state, b_h, mask=in_state)


@triton.jit
def _state_gradients_kernel(
    q, k, w, do, dv, g, dafter, entries, dforks, dh, dstart, dv2, starts, chunk_starts, scale, T,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, AFTER: tl.constexpr, FORKS: tl.constexpr, START: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    group = head // (H // G)
    keys = tl.arange(0, BK)
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    of_state = keys[:, None] * V + values[None, :]
    in_state = (keys[:, None] < K) & (values[None, :] < V)
    T, N, start, chunk_start = _text(starts, chunk_starts, row, T, L, PACKED)
    b_dh = tl.zeros([BK, BV], dtype=tl.float32)
    if AFTER:
        b_dh += tl.load(dafter + (row * H + head) * K * V + of_state, mask=in_state, other=0).to(tl.float32)
    for back in range(N):
        n = N - 1 - back
        chunk = ((chunk_start + n) * H + head) * K * V
        tl.store(dh + chunk + of_state, b_dh.to(dh.dtype.element_ty), mask=in_state)
        tokens = n * L + tl.arange(0, L)
        real = tokens < T
        at = start + tokens
        qk = (at[:, None] * G + group) * K + keys[None, :]
        in_qk = real[:, None] & (keys[None, :] < K)
        vs = (at[:, None] * H + head) * V + values[None, :]
        in_vs = real[:, None] & (values[None, :] < V)
        b_q = tl.load(q + qk, mask=in_qk, other=0)
        b_k = tl.load(k + qk, mask=in_qk, other=0)
        b_w = tl.load(w + (at[:, None] * H + head) * K + keys[None, :], mask=in_qk, other=0)
        b_do = tl.load(do + vs, mask=in_vs, other=0) * scale
        b_brought = tl.dot(b_k, b_dh.to(b_k.dtype))
        if DECAY:
            b_g = tl.load(g + at * H + head, mask=real, other=0)
            g_last = tl.load(g + (start + tl.minimum((n + 1) * L, T) - 1) * H + head)
            b_brought *= tl.where(real, tl.exp2(g_last - b_g), 0)[:, None]
            b_dh *= tl.exp2(g_last)
            b_do *= tl.exp2(b_g)[:, None]  # in place of the queries, which are larger
        # Not as a sum with the product: what is loaded would become the product's start, and not be fetched ahead.
        b_less = -tl.load(dv + vs, mask=in_vs, other=0).to(tl.float32) - b_brought
        tl.store(dv2 + vs, (-b_less).to(dv2.dtype.element_ty), mask=in_vs)
        b_dh = tl.dot(tl.trans(b_q), b_do.to(b_q.dtype), b_dh)
        b_dh = tl.dot(tl.trans(b_w), b_less.to(b_w.dtype), b_dh)
        if FORKS:
            entry = tl.load(entries + chunk_start + n)
            fork = (tl.maximum(entry, 0) * H + head) * K * V
            b_dh += tl.load(dforks + fork + of_state, mask=in_state & (entry >= 0), other=0).to(tl.float32)
    if START:
        tl.store(dstart + (row * H + head) * K * V + of_state, b_dh, mask=in_state)


@triton.jit
def _step_kernel(
    q, k, v, beta, g, state, out, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr,
):  # fmt: skip
    memory = tl.program_id(1).to(tl.int64)  # of a row and a head
    row, head = memory // H, memory % H
    keys = tl.arange(0, BK)
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    qk = (row * G + head // (H // G)) * K + keys
    of_state = memory * K * V + keys[:, None] * V + values[None, :]
    in_state = (keys[:, None] < K) & (values[None, :] < V)
    b_s = tl.load(state + of_state, mask=in_state, other=0)
    b_q = tl.load(q + qk, mask=keys < K, other=0).to(tl.float32)
    b_k = tl.load(k + qk, mask=keys < K, other=0).to(tl.float32)
    b_v = tl.load(v + memory * V + values, mask=values < V, other=0).to(tl.float32)
    if DECAY:
        b_s *= tl.exp(tl.load(g + memory).to(tl.float32))
    b_u = tl.load(beta + memory).to(tl.float32) * (b_v - tl.sum(b_k[:, None] * b_s, 0))
    b_s += b_k[:, None] * b_u[None, :]
    tl.store(state + of_state, b_s, mask=in_state)
    b_o = tl.sum(b_q[:, None] * b_s, 0) * scale
    tl.store(out + memory * V + values, b_o.to(out.dtype.element_ty), mask=values < V)
