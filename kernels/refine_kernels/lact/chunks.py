"""Which token belongs to which chunk: reading rows that stand at different places of their chunks, and forking them.

Tokens of a row are counted from the start of its unfinished chunk: the `held` tokens of the buffer, then the T new
ones. The g-th chunk of every row is then the places g·L .. g·L + L - 1 of that count, and the rows go through their
updates together; a row that does not reach the end of its g-th chunk keeps its weights. How many updates there are is
known on the host, so that none is computed where no row reaches an end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact.reference import Chunk, FastWeights, Fresh, Weights, map_chunk, map_weights
from refine_kernels.packing import neighbours


@dataclass(frozen=True)
class Place:
    """Where each row stands: tokens that were read before, and real tokens of this piece; on device and host."""

    seen_B: Tensor
    seen: Sequence[int]
    lengths_B: Tensor | None
    """None: T of each row."""
    lengths: Sequence[int]
    _held: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def held_B(self, L: int) -> Tensor:
        """How many tokens each row's unfinished chunk has; worked out once for all layers."""
        if L not in self._held:
            self._held[L] = self.seen_B - _updates(self.seen_B, L) * L
        return self._held[L]

    def held(self, L: int) -> list[int]:
        """The same, on the host."""
        return [n - _host_updates(n, L) * L for n in self.seen]

    def of(self, rows: slice) -> Place:
        """Where some of the rows stand."""
        lengths_B = None if self.lengths_B is None else self.lengths_B[rows]
        return Place(self.seen_B[rows], self.seen[rows], lengths_B, self.lengths[rows])

    def ends(self, L: int) -> list[int]:
        """How many chunks end in each row of this piece, each with an update; on the host."""
        return [_host_updates(h + n, L) for h, n in zip(self.held(L), self.lengths, strict=True)]


@dataclass(frozen=True)
class Reader:
    """f of F rows' weights: queries [F, Q, H, K] -> outputs [F, Q, H, V]."""

    weights: tuple[Tensor, ...]
    read: Callable[[tuple[Tensor, ...], Tensor], Tensor]

    def __call__(self, q_FQHK: Tensor) -> Tensor:
        with torch.autocast(q_FQHK.device.type, enabled=False):
            return self.read(self.weights, q_FQHK)

    def stand_in(self) -> Reader:
        """The same in memory of its own, without gradients."""
        return Reader(tuple(w.detach().clone() for w in self.weights), self.read)

    def load(self, other: Reader) -> None:
        """Copy another's weights, of the same shapes, into a stand-in's memory."""
        for own, w in zip(self.weights, other.weights, strict=True):
            own.copy_(w.detach())


class Boundaries(Protocol):
    """The weights of B rows before and after every update of a piece."""

    def after(self, updates_BC: Tensor) -> FastWeights:
        """Of row b after updates_BC[b, c] updates, for B·C rows; differentiable, in memory of their own."""
        ...

    def reader(self, updates_BC: Tensor) -> Reader:
        """f of those weights, for B·C rows."""
        ...


@dataclass(frozen=True)
class _Listed:
    """Boundaries as they came."""

    weights: Sequence[FastWeights]
    apply: Callable[..., Tensor]

    def after(self, updates_BC: Tensor) -> FastWeights:
        return map_weights(partial(_chosen, updates_BC), *self.weights)

    def reader(self, updates_BC: Tensor) -> Reader:
        each_of = zip(*(fast.weights for fast in self.weights), strict=True)
        return Reader(tuple(_chosen(updates_BC, *each) for each in each_of), self.apply)


@dataclass(frozen=True)
class LaCT:
    """What reading a piece of text gives."""

    outputs_BTHV: Tensor
    fast: FastWeights
    """After each row's last real token."""
    unfinished: Chunk
    """The tokens since the last update."""
    boundaries: Boundaries | None
    """The weights after each of the updates that this piece made."""
    _tokens: Chunk
    _before: Chunk | None
    _held_B: Tensor
    _end_B: Tensor
    """Tokens that were held before and those of the piece."""
    _L: int

    def state_at(self, positions_BC: Tensor) -> tuple[FastWeights, Chunk]:
        """The state after token positions_BC[b, c], from -1 (before the piece), for B·C rows, row-major.

        Nothing is computed again: the weights are those that the updates so far left, and the tokens since are
        looked up. Differentiable. Needs a reading with `boundaries`.
        """
        assert self.boundaries is not None
        updates_BC = _updates(self._held_B[:, None] + positions_BC + 1, self._L)
        unfinished = _unfinished(self._before, self._tokens, self._held_B, positions_BC, self._L)
        return self.boundaries.after(updates_BC), unfinished

    def reader_at(self, positions_BC: Tensor) -> Reader:
        """How queries of tokens read after those positions, F = B·C rows, are read as long as `chunk_goes_on`.

        Differentiable. Needs a reading with `boundaries`.
        """
        assert self.boundaries is not None
        updates_BC = (self._held_B[:, None] + positions_BC + 1) // self._L
        return self.boundaries.reader(updates_BC.minimum(_updates(self._end_B, self._L)[:, None]))

    def chunk_goes_on(self, positions_BC: Tensor, length: int) -> Tensor:
        """bool [B, C]: whether the next `length` tokens after each position are read with weights that are there."""
        first_BC = self._held_B[:, None] + positions_BC + 1
        made_BC = first_BC // self._L
        return (made_BC == (first_BC + length - 1) // self._L) & (made_BC <= _updates(self._end_B, self._L)[:, None])


def read(
    ops: ModuleType,
    q_BTHK: Tensor,
    tokens: Chunk,
    fast: FastWeights | Fresh,
    unfinished: Chunk | None,
    place: Place,
    *,
    L: int,
    muon: bool,
    joint: bool,
    boundaries: bool,
    in_place: bool = False,
) -> LaCT:
    """See `refine_kernels.lact.lact`. `ops` has `apply` and `update`; `sweep`, if any, takes rows that hold as many."""
    T = q_BTHK.shape[1]
    held, held_B, ends = place.held(L), place.held_B(L), place.ends(L)
    end_B = held_B + (T if place.lengths_B is None else place.lengths_B)
    if hasattr(ops, "sweep") and not boundaries and T >= L and min(held) < max(held):
        alike = partial(read, ops, L=L, muon=muon, joint=joint, boundaries=False)
        outputs_BTHV, after, rest = _in_runs(alike, q_BTHK, tokens, fast, unfinished, place, held)
        return LaCT(outputs_BTHV, after, rest, None, tokens, unfinished, held_B, end_B, L)
    sweeps = hasattr(ops, "sweep") and T > 1 and min(held) == max(held) and (held[0] == 0 or max(ends) > 0)
    whole = tokens
    if sweeps and held[0] and unfinished is not None:
        whole = map_chunk(lambda x, old: torch.cat((old[:, : held[0]].to(x.dtype), x), 1), tokens, unfinished)
    with torch.autocast(q_BTHK.device.type, enabled=False):
        if sweeps:
            outputs_BTHV, after, between = ops.sweep(
                q_BTHK, whole, fast, L=L, held=held[0], ends=ends, lengths=place.lengths, muon=muon
            )
        else:
            each = fast.expanded() if isinstance(fast, Fresh) else fast
            outputs_BTHV, after, between = _one_by_one(
                ops, q_BTHK, tokens, each, unfinished, place, held, held_B, ends, L,
                muon=muon, joint=joint, boundaries=boundaries,
            )  # fmt: skip
    if T == 1 and unfinished is not None and max(ends) == 0:
        rest = (_put if in_place else _appended)(unfinished, tokens, held_B)
    elif place.lengths_B is None and (sweeps or not any(held)):
        rest = map_chunk(lambda x: _padded(x[:, max(ends) * L :], L), whole)
    else:
        last_B = torch.full_like(held_B, T - 1) if place.lengths_B is None else place.lengths_B - 1
        rest = _unfinished(unfinished, tokens, held_B, last_B[:, None], L)
    return LaCT(outputs_BTHV, after, rest, between if boundaries else None, tokens, unfinished, held_B, end_B, L)


def _in_runs(
    read_rows: Callable[..., LaCT],
    q_BTHK: Tensor,
    tokens: Chunk,
    fast: FastWeights | Fresh,
    unfinished: Chunk | None,
    place: Place,
    held: Sequence[int],
) -> tuple[Tensor, FastWeights, Chunk]:
    """Neighbouring rows that hold as many tokens read together, and the others after them."""
    assert isinstance(fast, FastWeights) and unfinished is not None  # texts that begin all hold none
    parts = []
    for rows, _ in neighbours(held):
        some = itemgetter(rows)
        given = some(q_BTHK), map_chunk(some, tokens), map_weights(some, fast), map_chunk(some, unfinished)
        parts.append(read_rows(*given, place.of(rows)))

    def whole(*each: Tensor) -> Tensor:
        return torch.cat(each)

    outputs_BTHV = whole(*(part.outputs_BTHV for part in parts))
    return (
        outputs_BTHV,
        map_weights(whole, *(part.fast for part in parts)),
        map_chunk(whole, *(part.unfinished for part in parts)),
    )


def _one_by_one(
    ops: ModuleType,
    q_BTHK: Tensor,
    tokens: Chunk,
    fast: FastWeights,
    unfinished: Chunk | None,
    place: Place,
    held: Sequence[int],
    held_B: Tensor,
    ends: Sequence[int],
    L: int,
    *,
    muon: bool,
    joint: bool,
    boundaries: bool,
) -> tuple[Tensor, FastWeights, Boundaries]:
    """Outputs, the weights at the end, and `LaCT.boundaries`, chunk by chunk, wherever the rows stand.

    Only rows that have tokens of a chunk read it, and only rows that end it are updated.
    """

    def update(fast: FastWeights, chunk: Chunk) -> FastWeights:
        return ops.update(fast, chunk, muon=muon, joint=joint)

    T = q_BTHK.shape[1]
    weights, pieces = [fast], []
    for g in range(max(ends) + 1):
        start, stop = max(g * L - max(held), 0), T if g == max(ends) else max((g + 1) * L - min(held), 0)
        if stop > start:
            reach = [h + n > g * L for h, n in zip(held, place.lengths, strict=True)]
            pieces.append((g, start, _applied(ops.apply, fast.weights, q_BTHK[:, start:stop], reach)))
        if g == max(ends):
            break
        chunk = _chunk(unfinished, tokens, held, held_B, g, L)
        fast = _updated(update, fast, chunk, [n > g for n in ends])
        if boundaries:
            weights.append(fast)
    return _together(pieces, held, held_B, T, L), fast, _Listed(weights, ops.apply)


def _applied(apply: Callable[..., Tensor], weights: Weights, q_BTHK: Tensor, which: Sequence[bool]) -> Tensor:
    """f of the queries of some rows; zeros for the others."""
    if all(which):
        return apply(weights, q_BTHK)
    rows = _rows(which, q_BTHK)
    o_RTHV = apply(tuple(w[rows] for w in weights), q_BTHK[rows])
    return o_RTHV.new_zeros(len(which), *o_RTHV.shape[1:]).index_copy(0, rows, o_RTHV)


def _updated(update: Callable[..., FastWeights], fast: FastWeights, chunk: Chunk, which: Sequence[bool]) -> FastWeights:
    """The weights of some rows after a chunk, and those of the others as they were."""
    if all(which):
        return update(fast, chunk)
    rows = _rows(which, chunk.k_BLHK)
    after = update(map_weights(lambda x: x[rows], fast), map_chunk(lambda x: x[rows], chunk))
    return map_weights(lambda old, new: old.index_copy(0, rows, new), fast, after)


def _rows(which: Sequence[bool], x: Tensor) -> Tensor:
    """Indices, where x is."""
    return torch.tensor([row for row, here in enumerate(which) if here], device=x.device)


def _host_updates(tokens: int, L: int) -> int:
    return max(tokens - 1, 0) // L


def _updates(tokens: Tensor, L: int) -> Tensor:
    """How many updates have been made after so many tokens."""
    return (tokens - 1).clamp(min=0) // L


def _chunk(before: Chunk | None, tokens: Chunk, held: Sequence[int], held_B: Tensor, g: int, L: int) -> Chunk:
    """The g-th chunk of every row, [B, L, ...]; tokens without meaning in rows that do not reach its end."""
    if min(held) < max(held):
        starts_B1 = torch.full_like(held_B, g * L)[:, None]
        return map_chunk(lambda x: x.squeeze(1), _lookup(before, tokens, held_B, starts_B1, L))
    start = g * L - held[0]
    if start >= 0 or before is None:
        return map_chunk(lambda x: x[:, start : start + L], tokens)
    return map_chunk(lambda x, old: torch.cat((old[:, : held[0]], x[:, : start + L]), 1), tokens, before)


def _unfinished(before: Chunk | None, tokens: Chunk, held_B: Tensor, positions_BC: Tensor, L: int) -> Chunk:
    """The tokens that no update has used after each position, from the start of a buffer of L, then zeros; B·C rows."""
    places_BC = held_B[:, None] + positions_BC + 1
    starts_BC = _updates(places_BC, L) * L
    held_BCL = torch.arange(L, device=held_B.device) < (places_BC - starts_BC)[..., None]
    found = _lookup(before, tokens, held_B, starts_BC, L)
    return map_chunk(lambda x: x.masked_fill(~_like(held_BCL, x), 0).flatten(0, 1), found)


def _padded(x: Tensor, L: int) -> Tensor:
    """x and then zeros, [B, L, ...], in memory of its own."""
    rest = x.new_zeros(x.shape[0], L - x.shape[1], *x.shape[2:])
    return torch.cat((x, rest), 1) if rest.numel() else x.clone(memory_format=torch.contiguous_format)


def _lookup(before: Chunk | None, tokens: Chunk, held_B: Tensor, starts_BC: Tensor, L: int) -> Chunk:
    """The L places of each row from each start on, a multiple of L: [B, C, L, ...]."""
    index_BCL = starts_BC[..., None] + torch.arange(L, device=held_B.device) - held_B[:, None, None]
    rows_B11 = torch.arange(held_B.shape[0], device=held_B.device)[:, None, None]
    T = tokens.k_BLHK.shape[1]
    new = map_chunk(lambda x: x[rows_B11, index_BCL.clamp(0, T - 1)], tokens)
    if before is None:
        return new
    # A place in the buffer is the same place counted from the start, which is then 0.
    return map_chunk(lambda x, old: torch.where(_like(index_BCL < 0, x), old[:, None].to(x.dtype), x), new, before)


def _appended(before: Chunk, token: Chunk, held_B: Tensor) -> Chunk:
    """The buffer with one more token in each row, which no row's chunk ends before; one operation per tensor."""
    here_BL = torch.arange(before.k_BLHK.shape[1], device=held_B.device) == held_B[:, None]
    return map_chunk(lambda old, x: torch.where(_like(here_BL, old), x.to(old.dtype), old), before, token)


def _put(into: Chunk, token: Chunk, held_B: Tensor) -> Chunk:
    """`_appended` in the memory of the buffer."""

    def put(old: Tensor, x: Tensor) -> Tensor:
        return old.scatter_(1, _like(held_B, x).expand_as(x), x.to(old.dtype))

    return map_chunk(put, into, token)


def _together(pieces: Sequence[tuple[int, int, Tensor]], held: Sequence[int], held_B: Tensor, T: int, L: int) -> Tensor:
    """Outputs of all tokens from those with each chunk's weights: (chunk, first token, outputs)."""
    if min(held) == max(held):
        return pieces[0][2] if len(pieces) == 1 else torch.cat([o for _, _, o in pieces], 1)
    chunk_BT = (held_B[:, None] + torch.arange(T, device=held_B.device)) // L
    outputs_BTHV = None
    for g, start, o in pieces:
        stop = start + o.shape[1]
        o_BTHV = F.pad(o, (0, 0, 0, 0, start, T - stop))
        outputs_BTHV = o_BTHV if outputs_BTHV is None else torch.where(_like(chunk_BT >= g, o), o_BTHV, outputs_BTHV)
    assert outputs_BTHV is not None
    return outputs_BTHV


def _chosen(updates_BC: Tensor, *boundaries: Tensor) -> Tensor:
    """That of row b after updates_BC[b, c] updates, for B·C rows."""
    rows_B1 = torch.arange(updates_BC.shape[0], device=updates_BC.device)[:, None]
    return torch.stack(boundaries)[updates_BC, rows_B1].flatten(0, 1)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """The mask with as many dimensions as x."""
    return mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
