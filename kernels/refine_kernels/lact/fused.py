"""LaCT's fast weights with matrix products in torch and everything between them in Triton.

Texts that begin here go through two autograd functions that keep little: `_Updates` makes the weights of every chunk,
one chunk after another; `_Read` reads all queries with them at once. Both make the products of tokens and weights again
in the backward. `_Updates` keeps its inputs, the weights and momenta before each chunk, which forks need too, and what
each of Newton-Schulz's steps starts from. The weights of all chunks are one tensor, a stack [B, H, N, 3, M, M] of packs
(see `kernels`), and the gradients of readings and of forks meet there, each at its chunk.

Rows may end different numbers of chunks. Rows that make an update make it together; one that makes none is not touched,
and of its stack nothing after its last chunk is written or read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact import kernels
from refine_kernels.lact.chunks import Reader
from refine_kernels.lact.newton_schulz import STEPS, orthogonal, orthogonal_back
from refine_kernels.lact.reference import Chunk, FastWeights, Fresh, Weights, apply
from refine_kernels.packing import neighbours
from refine_kernels.replay import replayed
from refine_kernels.runtime import why_no_triton

__all__ = ["apply", "sweep", "update", "why_not"]

LARGEST_HEAD = 4096


def why_not(x: Tensor, *, prenorm: bool, joint: bool, square: bool, scalar: bool) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if prenorm:
        return "the kernels do not step the weights before their norm is restored"
    if joint:
        return "the kernels do not orthogonalise two steps as one matrix"
    if not square:
        return "the three fast weights are not square matrices of one size"
    if not scalar:
        return "learning rates differ between channels"
    if x.shape[-1] > LARGEST_HEAD:
        return f"heads have {x.shape[-1]} channels; the kernels take at most {LARGEST_HEAD}"
    return why_no_triton(x)


def update(fast: FastWeights, chunk: Chunk, *, muon: bool, joint: bool) -> FastWeights:
    """See `refine_kernels.lact.reference.update`."""
    assert not joint
    start = _start_of(fast)
    B, L = chunk.k_BLHK.shape[:2]
    stacks = _updates(start, chunk, L=L, ends=(1,) * B, muon=muon)
    return _fast_weights(stacks, start, (1,) * B)


def sweep(
    q_BTHK: Tensor,
    tokens: Chunk,
    fast: FastWeights | Fresh,
    *,
    L: int,
    held: int,
    ends: Sequence[int],
    lengths: Sequence[int],
    muon: bool,
) -> tuple[Tensor, FastWeights, Any]:
    """All chunks of a piece: outputs, the weights at the end, and those after any number of updates.

    tokens: from the start of the first chunk; the first `held` of them, at most L, were read before and have no query.
    ends: how many chunks end in each row, each with an update.
    lengths: real queries of each row; outputs of the others have no meaning.

    The last result is `chunks.Boundaries`.
    """
    start = _start_of(fast)
    stacks = _updates(start, tokens, L=L, ends=ends, muon=muon)
    weights, narrow, _ = stacks
    first = int(held == L)  # then no query is of the first chunk
    if first:
        weights, narrow, held = weights[:, :, 1:], narrow[:, :, 1:].contiguous(), 0
    runs = _runs([n + 1 - first for n in ends], lengths)
    outputs_BTHV: Any = _Read.apply(q_BTHK, weights, narrow, L, held, runs)
    return outputs_BTHV, _fast_weights(stacks, start, ends), _Boundaries(stacks, start)


Stacks = tuple[Tensor, Tensor, Tensor | None]
"""Weights before each chunk and after the last, the same in the dtype of keys, and momenta; [B, H, N, 3, M, M]."""


class _Start(NamedTuple):
    """What a piece starts from, as packs [B, H, 3, M, M]; any strides."""

    pack: Tensor
    momentum: Tensor | None
    norms_BH3M: Tensor


_ORDER = (0, 2, 1)
"""Of the weights in a pack: w0 and w2, which meet the same tokens, are neighbours."""


def _start_of(fast: FastWeights | Fresh) -> _Start:
    if isinstance(fast, FastWeights):
        momentum = None if fast.momentum is None else _pack(fast.momentum)
        return _Start(_pack(fast.weights), momentum, _pack(fast.norms).squeeze(-1))
    pack_1H3MM = torch.stack([fast.weights[i] for i in _ORDER], 1)[None]
    norms_1H3M = torch.linalg.vector_norm(pack_1H3MM, dim=-1, dtype=torch.float32)
    pack = pack_1H3MM.expand(fast.rows, -1, -1, -1, -1)
    return _Start(pack, torch.zeros_like(pack) if fast.momentum else None, norms_1H3M.expand(fast.rows, -1, -1, -1))


def _pack(weights: Weights) -> Tensor:
    return torch.stack([weights[i] for i in _ORDER], 2)


def _unpacked(pack_BH3MM: Tensor) -> Weights:
    """Each in memory of its own."""
    w0, w2, w1 = (w.clone(memory_format=torch.contiguous_format) for w in pack_BH3MM.unbind(2))
    return w0, w1, w2


def _updates(start: _Start, tokens: Chunk, *, L: int, ends: Sequence[int], muon: bool) -> Stacks:
    k_BTHK, v_BTHV, rates_BTH3, momentum_BTH = tokens
    updates, momentum, keep_UN = max(ends), None, None
    if start.momentum is not None and momentum_BTH is not None:
        momentum = start.momentum
        used_BULH = momentum_BTH[:, : updates * L].float().unflatten(1, (updates, L))
        keep_UN = used_BULH.mean(2).transpose(0, 1).flatten(1).contiguous()
    inputs = start.pack, momentum, start.norms_BH3M, k_BTHK, v_BTHV, rates_BTH3, keep_UN
    made: Any = _Updates.apply(*inputs, L, tuple(ends), muon, torch.is_grad_enabled())
    weights, narrow, momenta = made
    return weights, weights if narrow is None else narrow, momenta


def _fast_weights(stacks: Stacks, start: _Start, ends: Sequence[int]) -> FastWeights:
    weights, _, momenta = stacks
    momentum = start.momentum if momenta is None else _last(momenta, ends)
    norms = _unpacked(start.norms_BH3M[..., None])
    return FastWeights(_unpacked(_last(weights, ends)), None, None if momentum is None else _unpacked(momentum), norms)


def _last(stack: Tensor, ends: Sequence[int]) -> Tensor:
    """Of each row the pack after all its updates, [B, H, 3, M, M]."""
    if min(ends) == max(ends):
        return stack[:, :, ends[0]]
    return torch.stack([row[:, n] for row, n in zip(stack.unbind(), ends, strict=True)])


class _Run(NamedTuple):
    """Neighbouring rows that have as many chunks."""

    rows: slice
    chunks: int
    tokens: int
    """Queries of the longest of them."""


def _runs(chunks: Sequence[int], lengths: Sequence[int]) -> tuple[_Run, ...]:
    return tuple(_Run(rows, count, max(lengths[rows])) for rows, count in neighbours(chunks))


def _together(ends: Sequence[int]) -> list[tuple[slice, slice]]:
    """Rows and the updates that they make together, in order.

    Rows that all make as many make them as one piece of work. Else pieces are 1, 2, 4, .. updates of the rows that make
    them, so that a few recordings serve texts of any lengths.
    """
    if min(ends) == max(ends):
        return [(slice(0, len(ends)), slice(0, ends[0]))] if ends[0] else []
    made, start = [], 0
    for stop in sorted(set(ends) - {0}):
        rows = [of for of, makes in neighbours([n >= stop for n in ends]) if makes]
        for size in (1 << i for i in reversed(range(stop.bit_length()))):
            if (stop - start) & size:
                made += [(of, slice(start, start + size)) for of in rows]
                start += size
    return made


@dataclass(frozen=True)
class _Boundaries:
    """See `chunks.Boundaries`."""

    stacks: Stacks
    start: _Start

    def after(self, updates_BC: Tensor) -> FastWeights:
        (weights, _, momenta), start = self.stacks, self.start
        B, C = updates_BC.shape
        rows_B1 = torch.arange(B, device=updates_BC.device)[:, None]

        def chosen(stack: Tensor) -> Weights:
            return _unpacked(stack[rows_B1, :, updates_BC].flatten(0, 1))

        def repeated(pack: Tensor) -> Weights:
            return _unpacked(pack.repeat_interleave(C, 0))

        momentum = None if start.momentum is None else repeated(start.momentum)
        if momenta is not None:
            momentum = chosen(momenta)
        return FastWeights(chosen(weights), None, momentum, repeated(start.norms_BH3M[..., None]))

    def reader(self, updates_BC: Tensor) -> Reader:
        weights, narrow, _ = self.stacks
        packs: Any = _Chosen.apply(weights, narrow, updates_BC)
        return Reader((packs,), _read_packs)


def _read_packs(packs: tuple[Tensor, ...], q_FQHK: Tensor) -> Tensor:
    """All queries of a row with its one pack."""
    return _Read.apply(q_FQHK, packs[0], packs[0], q_FQHK.shape[1])  # pyright: ignore[reportReturnType]


class _Updates(torch.autograd.Function):
    """The weights and momenta before each chunk and after the last: stacks, the initial ones first."""

    @staticmethod
    def forward(ctx, pack, momentum, norms, k, v, rates, keep, L, ends, muon, learn):  # pyright: ignore[reportIncompatibleMethodOverride]
        B, H, _, M, _ = pack.shape
        N, updates, dtype, device = B * H, max(ends), k.dtype, k.device
        weights = pack.new_empty(B, H, updates + 1, 3, M, M)
        weights[:, :, 0] = pack
        narrow = None if pack.dtype == dtype else torch.empty_like(weights, dtype=dtype)
        if narrow is not None:
            narrow[:, :, 0] = pack
        momenta = None
        if momentum is not None:
            momenta = torch.empty_like(weights, dtype=momentum.dtype)
            momenta[:, :, 0] = momentum
        found = squares = starts = None
        if learn:
            shares = kernels.shares(M)
            found = torch.empty(updates, N, 3, M, dtype=torch.float32, device=device)
            squares = found.new_empty(updates, N, 3, shares) if muon or momentum is not None else None
            starts = k.new_empty(updates, STEPS, 3 * N, M, M) if muon else None
        for rows, at in _together(ends):
            given = weights[rows, :, at.start], None if momenta is None else momenta[rows, :, at.start], norms[rows]
            used = _used(k, v, rates, keep, rows, at, L)
            made = tuple(x if x is None else x[rows, :, at.start + 1 : at.stop + 1] for x in (weights, narrow, momenta))
            kept = _kept(found, squares, starts, rows, at, H)
            replayed(_all_updates, (*given, *used), (*made, *kept), muon=muon, learn=learn, L=L)
        ctx.save_for_backward(norms, k, v, rates, keep, weights, narrow, momenta, found, squares, starts)
        ctx.sizes = L, ends, muon
        ctx.set_materialize_grads(False)
        if narrow is not None:
            ctx.mark_non_differentiable(narrow)
        return weights, narrow, momenta

    @staticmethod
    def backward(ctx, dweights, _, dmomenta):  # pyright: ignore[reportIncompatibleMethodOverride]
        norms, k, v, rates, keep, weights, narrow, momenta, found, squares, starts = ctx.saved_tensors
        L, ends, muon = ctx.sizes
        H = weights.shape[1]
        dk, dv, drates = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, rates))
        for dx in (dk, dv, drates):
            dx[:, min(ends) * L :] = 0
        dkeep = None if keep is None else torch.zeros_like(keep)
        dnorms = torch.zeros_like(norms, dtype=torch.float32)
        dpack = _last_gradient(dweights, weights, ends)
        dmomentum = None if momenta is None else _last_gradient(dmomenta, momenta, ends)
        for rows, at in reversed(_together(ends)):
            stacks = (x if x is None else x[rows, :, at.start : at.stop + 1] for x in (weights, narrow, momenta))
            incoming = (x if x is None else x[rows, :, at] for x in (dweights, dmomenta))
            after = dpack[rows], None if dmomentum is None else dmomentum[rows]
            used = _used(k, v, rates, keep, rows, at, L)
            given = norms[rows], *used, *stacks, *_kept(found, squares, starts, rows, at, H), *after, *incoming
            share = torch.empty_like(dnorms[rows])
            into = *_used(dk, dv, drates, dkeep, rows, at, L), *after, share
            replayed(_all_updates_back, given, into, muon=muon, L=L)
            dnorms[rows] += share
        dpack = dpack.to(weights.dtype)
        if momenta is not None and dmomentum is not None:
            dmomentum = dmomentum.to(momenta.dtype)
        return dpack, dmomentum, dnorms, dk, dv, drates, dkeep, None, None, None, None


def _used(
    k: Tensor, v: Tensor, rates: Tensor, keep_UN: Tensor | None, rows: slice, at: slice, L: int
) -> tuple[Tensor | None, ...]:
    """Views of what some rows' updates use: keys and values [B, H, S, M], rates [B, S, H, 3], and how much to keep."""
    tokens, heads = slice(at.start * L, at.stop * L), k.shape[2]
    of_rows = slice(rows.start * heads, rows.stop * heads)
    by_head = (x[rows, tokens].transpose(1, 2) for x in (k, v))
    return *by_head, rates[rows, tokens], None if keep_UN is None else keep_UN[at, of_rows]


def _kept(
    found: Tensor | None, squares: Tensor | None, starts: Tensor | None, rows: slice, at: slice, H: int
) -> tuple[Tensor | None, ...]:
    """Views of what some rows' updates keep for the backward."""
    of_rows = slice(rows.start * H, rows.stop * H)
    of_packs = slice(3 * of_rows.start, 3 * of_rows.stop)
    in_rows = (x if x is None else x[at, of_rows] for x in (found, squares))
    return *in_rows, None if starts is None else starts[at, :, of_packs]


def _last_gradient(dstack: Tensor | None, stack: Tensor, ends: Sequence[int]) -> Tensor:
    """`_last` of a stack's gradient, in float32 and memory of its own."""
    if dstack is None:
        return stack.new_zeros(stack[:, :, 0].shape, dtype=torch.float32)
    return stack.new_empty(stack[:, :, 0].shape, dtype=torch.float32).copy_(_last(dstack, ends))


def _all_updates(
    pack: Tensor,
    momentum: Tensor | None,
    norms_BH3M: Tensor,
    k_BHSM: Tensor,
    v_BHSM: Tensor,
    rates_BSH3: Tensor,
    keep_UN: Tensor | None,
    *,
    L: int,
    muon: bool,
    learn: bool,
) -> tuple[Tensor | None, ...]:
    """One update after another, S / L of them.

    Returns the stacks without the initial weights (in their own dtype, in that of keys where it is another, momenta),
    and for the backward what each update found the row norms and squares of steps to be, and Newton-Schulz's starts.
    """
    B, H, S, M = k_BHSM.shape
    N, updates, dtype = B * H, S // L, k_BHSM.dtype
    k, v, rates = k_BHSM.flatten(0, 1), v_BHSM.flatten(0, 1), rates_BSH3.contiguous()
    norms = norms_BH3M.flatten(0, 1).contiguous()  # rows that share a start share the memory, too
    weights = pack.new_empty(N, updates, 3, M, M)
    narrow = weights if pack.dtype == dtype else torch.empty_like(weights, dtype=dtype)
    momenta = None if momentum is None else torch.empty_like(weights, dtype=momentum.dtype)
    starts = k.new_empty(updates if learn else 1, STEPS, 3 * N, M, M) if muon else None
    all_found, all_squares = [], []
    before = pack.flatten(0, 1).contiguous()
    before_narrow = before.to(dtype)
    last = None if momentum is None else momentum.flatten(0, 1).contiguous()
    for g in range(updates):
        at = slice(g * L, (g + 1) * L)
        step = _step(before_narrow, k[:, at], v[:, at], rates, g * L)
        squares = None
        if muon or last is not None:
            into = None if momenta is None else momenta[:, g]
            squares = kernels.momentum(step, last, None if keep_UN is None else keep_UN[g], into)
            last = into
        if last is not None:
            step = last
        if starts is not None and squares is not None:
            from_here = starts[g if learn else 0]
            kernels.scaled_to_one(step, squares, from_here[0])
            step = orthogonal(from_here.unbind()).view(N, 3, M, M)
        all_found.append(kernels.restored(before, step, norms, weights[:, g], narrow[:, g]))
        all_squares.append(squares)
        before, before_narrow = weights[:, g], narrow[:, g]

    def by_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(0, (B, H))

    made = by_row(weights), None if narrow is weights else by_row(narrow), by_row(momenta)
    if not learn:
        return *made, None, None, None
    return *made, torch.stack(all_found), None if all_squares[0] is None else torch.stack(all_squares), starts


def _all_updates_back(
    norms_BH3M: Tensor,
    k_BHSM: Tensor,
    v_BHSM: Tensor,
    rates_BSH3: Tensor,
    keep_UN: Tensor | None,
    weights: Tensor,
    narrow: Tensor | None,
    momenta: Tensor | None,
    found: Tensor,
    all_squares: Tensor | None,
    starts: Tensor | None,
    dlast: Tensor,
    dlast_momentum: Tensor | None,
    dweights: Tensor | None,
    dmomenta: Tensor | None,
    *,
    L: int,
    muon: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, rates, keep, the initial weights and momenta, and norms.

    From those of the last weights and momenta, in float32, and those of the stacks' others, each in its place.
    """
    B, H, S, M = k_BHSM.shape
    N, updates, dtype = B * H, S // L, k_BHSM.dtype
    k, v, rates = k_BHSM.flatten(0, 1), v_BHSM.flatten(0, 1), rates_BSH3.contiguous()
    norms = norms_BH3M.flatten(0, 1).contiguous()  # rows that share a start share the memory, too

    def in_one(x: Tensor | None) -> Any:
        return None if x is None else x.contiguous().view(N, -1, 3, M, M)

    weights, momenta, dweights, dmomenta = (in_one(x) for x in (weights, momenta, dweights, dmomenta))
    narrow = weights if narrow is None else in_one(narrow)
    assert narrow is not None
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    drates = torch.empty_like(rates, dtype=torch.float32)
    dnorms = torch.zeros(N, 3, M, dtype=torch.float32, device=k.device)
    carried = dlast.flatten(0, 1).clone()
    carried_momentum = None if dlast_momentum is None else dlast_momentum.flatten(0, 1).clone()
    direct, dkeep = None, []
    for g in reversed(range(updates)):
        at = slice(g * L, (g + 1) * L)
        of_weights, of_momentum = (None if x is None or g + 1 == updates else x[:, g + 1] for x in (dweights, dmomenta))
        dstep = narrow.new_empty(N, 3, M, M)
        kernels.restored_back(carried, direct, of_weights, weights[:, g + 1], norms, found[g], dnorms, dstep)
        unit = along = None
        if starts is not None:
            dstep = orthogonal_back(starts[g].unbind(), dstep.view(3 * N, M, M)).view(N, 3, M, M)
            unit = starts[g, 0]
            along = kernels.inner_products(dstep, unit)
        if muon or momenta is not None:
            dstep, share = kernels.momentum_back(
                dstep, unit, None if all_squares is None else all_squares[g], along,
                None if momenta is None else momenta[:, g], None if keep_UN is None else keep_UN[g],
                of_momentum, carried_momentum, dtype,
            )  # fmt: skip
            dkeep.insert(0, share)
        direct = _step_back(narrow[:, g], k[:, at], v[:, at], rates, g * L, dstep, dk[:, at], dv[:, at], drates)
    assert direct is not None  # there is at least one update
    dpack, dmomentum = carried + direct, carried_momentum
    if dweights is not None:
        dpack += dweights[:, 0]
    if dmomentum is not None and dmomenta is not None:
        dmomentum = dmomentum + dmomenta[:, 0]
    return (
        dk.unflatten(0, (B, H)),
        dv.unflatten(0, (B, H)),
        drates,
        None if keep_UN is None else torch.stack(dkeep).sum((2, 3)),
        dpack.unflatten(0, (B, H)),
        None if dmomentum is None else dmomentum.unflatten(0, (B, H)),
        dnorms.unflatten(0, (B, H)),
    )


def _step(pack: Tensor, k: Tensor, v: Tensor, rates: Tensor, start: int) -> Tensor:
    """`reference.directions` of one chunk, as a pack; k and v are [B·H, L, M]."""
    M = k.shape[-1]
    w02, w1 = pack[:, :2].flatten(1, 2), pack[:, 2]
    for_02, for_1 = kernels.terms(torch.bmm(k, w02.mT), torch.bmm(v, w1), rates, start)
    step = torch.empty_like(pack, memory_format=torch.contiguous_format)
    torch.bmm(for_02.mT, k, out=step.view(-1, 3 * M, M)[:, : 2 * M])
    torch.bmm(v.mT, for_1, out=step[:, 2])
    return step


def _step_back(
    pack: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    start: int,
    dstep: Tensor,
    dk: Tensor,
    dv: Tensor,
    drates: Tensor,
) -> Tensor:
    """The backward of `_step`: fills dk, dv and the chunk's part of drates; returns the gradient of the pack."""
    M = k.shape[-1]
    w02, w1 = pack[:, :2].flatten(1, 2), pack[:, 2]
    dstep02, dstep1 = dstep[:, :2].flatten(1, 2), dstep[:, 2]
    both, back = torch.bmm(k, w02.mT), torch.bmm(v, w1)
    dboth, dback = torch.bmm(k, dstep02.mT), torch.bmm(v, dstep1)
    kernels.term_slopes(both, back, dboth, dback, rates, drates, start)
    torch.bmm(both, dstep02, out=dk).baddbmm_(dboth, w02)
    torch.bmm(back, dstep1.mT, out=dv).baddbmm_(dback, w1.mT)
    dpack = torch.empty_like(dstep)
    torch.bmm(dboth.mT, k, out=dpack.view(-1, 3 * M, M)[:, : 2 * M])
    torch.bmm(v.mT, dback, out=dpack[:, 2])
    return dpack


class _Read(torch.autograd.Function):
    """Every token's query read with its chunk's weights; the first chunk has `held` tokens before the first query."""

    @staticmethod
    def forward(ctx, q, weights, narrow, L, held=0, runs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        (B, T, H, M), chunks = q.shape, narrow.shape[2]
        ctx.save_for_backward(q, narrow)
        ctx.sizes, ctx.dtype = (L, held, runs or (_Run(slice(0, B), chunks, T),)), weights.dtype
        outputs = []
        for run in ctx.sizes[-1]:
            q_run = _filled(_of_run(q, run), L, held, run.chunks)
            out = torch.empty_like(q_run)
            for q_g, pack, out_g in _in_chunks(narrow[run.rows, :, : run.chunks], L, held, q_run, out):
                torch.bmm(kernels.inner(torch.bmm(q_g, pack[:, : 2 * M].mT)), pack[:, 2 * M :].mT, out=out_g)
            outputs.append(_unfilled(out, run.tokens, L, held, run.chunks))
        return _as_rows(outputs, T, H)

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, narrow = ctx.saved_tensors
        (_, T, H, M), (L, held, runs) = q.shape, ctx.sizes
        dqs, dweights = [], None if len(runs) == 1 else torch.zeros_like(narrow)
        for run in runs:
            packs = narrow[run.rows, :, : run.chunks]
            q_run, dout_run = (_filled(_of_run(x, run), L, held, run.chunks) for x in (q, dout))
            dq, dpacks = torch.empty_like(q_run), torch.empty_like(packs, memory_format=torch.contiguous_format)
            pieces = zip(_in_chunks(packs, L, held, q_run, dout_run), _in_chunks(dpacks, L, held, dq, dq), strict=True)
            for (q_g, pack, dout_g), (dq_g, dpack, _) in pieces:
                w02, w1 = pack[:, : 2 * M], pack[:, 2 * M :]
                inner = torch.bmm(dout_g, w1)
                dboth = kernels.inner_slopes(torch.bmm(q_g, w02.mT), inner)  # the product itself is now in `inner`
                torch.bmm(dboth, w02, out=dq_g)
                torch.bmm(dboth.mT, q_g, out=dpack[:, : 2 * M])
                torch.bmm(dout_g.mT, inner, out=dpack[:, 2 * M :])
            dqs.append(_unfilled(dq, run.tokens, L, held, run.chunks))
            if dweights is None:
                dweights = dpacks
            else:
                dweights[run.rows, :, : run.chunks] = dpacks
        assert dweights is not None
        return _as_rows(dqs, T, H), dweights.to(ctx.dtype), None, None, None, None


def _of_run(x_BTHM: Tensor, run: _Run) -> Tensor:
    """The run's tokens by row and head, [N, T, M]."""
    return x_BTHM[run.rows, : run.tokens].transpose(1, 2).flatten(0, 1)


def _as_rows(of_runs: Sequence[Tensor], T: int, H: int) -> Tensor:
    """The inverse of `_of_run` for all runs: [B, T, H, M], zeros after the tokens of each."""
    ended = [F.pad(x, (0, 0, 0, T - x.shape[1])) if x.shape[1] < T else x for x in of_runs]
    whole = ended[0] if len(ended) == 1 else torch.cat(ended)
    return whole.unflatten(0, (-1, H)).transpose(1, 2)


class _Chosen(torch.autograd.Function):
    """The packs after updates_BC[b, c] updates of row b, [B·C, H, 1, 3, M, M], in the dtype of keys."""

    @staticmethod
    def forward(ctx, weights, narrow, updates_BC):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(updates_BC)
        ctx.shape, ctx.dtype = weights.shape, weights.dtype
        rows_B1 = torch.arange(len(updates_BC), device=updates_BC.device)[:, None]
        return narrow[rows_B1, :, updates_BC].flatten(0, 1).unsqueeze(2)

    @staticmethod
    def backward(ctx, dpacks):  # pyright: ignore[reportIncompatibleMethodOverride]
        (updates_BC,) = ctx.saved_tensors
        (B, H, N), C = ctx.shape[:3], updates_BC.shape[1]
        # As a product, whose sums of the forks of one chunk always come out the same.
        here_BNC = (updates_BC[:, None] == torch.arange(N, device=updates_BC.device)[:, None]).to(dpacks.dtype)
        summed_BNX = torch.bmm(here_BNC, dpacks.reshape(B, C, -1))
        return summed_BNX.view(B, N, H, *ctx.shape[3:]).transpose(1, 2).to(ctx.dtype), None, None


FEW = 2
"""Up to so many chunks are read one by one; more are filled up with zeros, so that all are read at once."""


def _filled(x_NTM: Tensor, L: int, held: int, chunks: int) -> Tensor:
    """Many chunks made full, whatever is after the last cut off; few as they are. Contiguous."""
    after = chunks * L - held - x_NTM.shape[1]
    if chunks > FEW and (held or after):
        x_NTM = F.pad(x_NTM, (0, 0, held, after))
    return x_NTM.contiguous()


def _unfilled(x_NSM: Tensor, T: int, L: int, held: int, chunks: int) -> Tensor:
    """The inverse of `_filled`; zeros where it cut."""
    if chunks <= FEW:
        return x_NSM
    missing = held + T - chunks * L
    return F.pad(x_NSM[:, held:], (0, 0, 0, missing)) if missing > 0 else x_NSM[:, held : held + T]


def _in_chunks(stack: Tensor, L: int, held: int, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens [n, L, M] of x, their weights [n, 3 M, M], the same tokens of y: all chunks at once if all are full."""
    (N, T, M), chunks = x.shape, stack.shape[2]
    if chunks > FEW or (not held and chunks * L == T):
        yield x.view(-1, L, M), stack.reshape(-1, 3 * M, M), y.view(-1, L, M)
        return
    packs = stack.reshape(N, chunks, 3 * M, M)
    for g in range(chunks):
        at = slice(max(g * L - held, 0), (g + 1) * L - held if g + 1 < chunks else T)
        yield x[:, at], packs[:, g], y[:, at]
