"""The Triton kernels of the fast weights, and what launches them.

Three matrices of one shape, in the order w0, w2, w1, lie side by side: a "pack" is [N, 3, M, M] with one stride from
one row-and-head n to the next, so that a pack may be a slice of a stack of packs. Everything is computed in float32.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.lact.reference import NORM_EPS
from refine_kernels.runtime import ceiling

ELEMENTS = 4096
"""Of one program's tile of rows."""
TILES = ((128, 64, 8, 3), (128, 32, 8, 3))
"""Of a product and of the sum of two: rows and columns that one program makes, inner channels at a time, warps, stages.
The sum loads twice as much; with fewer channels at a time two programs still share a processor."""
ORTHOGONAL_EPS = 1e-7
"""Added to the Frobenius norm before Newton-Schulz, as published."""


def _power(n: int) -> int:
    """The power of two that is not less."""
    return 1 << (n - 1).bit_length()


def product(
    a: Tensor,
    b: Tensor,
    *more: Tensor,
    transposed: bool = False,
    scale: float = 1.0,
    plus: tuple[float, Tensor] | None = None,
    out: Tensor,
) -> Tensor:
    """scale · (a @ b + more[0] @ more[1]) + plus[0] · plus[1] for square matrices [N, M, M], written to `out`.

    transposed: the second factor of each product is transposed. All are contiguous and of one dtype.
    """
    N, M, _ = a.shape
    rows, inner, warps, stages = TILES[bool(more)]
    size = max(16, _power(M))
    rows, inner = min(rows, size), min(inner, size)
    stages = stages if a.element_size() == 2 else 2  # twice as wide
    with torch.cuda.device_of(a):
        _product_kernel[(ceiling(M, rows), ceiling(M, rows), N)](
            a, b, *(more or (a, b)), out if plus is None else plus[1], out, scale, 0.0 if plus is None else plus[0],
            M=M, BM=rows, BK=inner, TWO=bool(more), TRANSPOSED=transposed, PLUS=plus is not None,
            PRECISION="ieee" if a.dtype == torch.float32 else "tf32", num_warps=warps if rows > 64 else 4,
            num_stages=stages,
        )  # fmt: skip
    return out


@triton.jit
def _product_kernel(
    a, b, a2, b2, plus, out, scale, plus_scale,
    M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr, TRANSPOSED: tl.constexpr,
    PLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(2).to(tl.int64) * M * M
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BM + tl.arange(0, BM)
    inner = tl.arange(0, BK)
    total = tl.zeros([BM, BM], dtype=tl.float32)
    for start in range(0, M, BK):
        i = start + inner
        at_a = base + rows[:, None] * M + i[None, :]
        in_a = (rows[:, None] < M) & (i[None, :] < M)
        if TRANSPOSED:
            at_b = base + columns[:, None] * M + i[None, :]
            in_b = (columns[:, None] < M) & (i[None, :] < M)
        else:
            at_b = base + i[:, None] * M + columns[None, :]
            in_b = (i[:, None] < M) & (columns[None, :] < M)
        t_a = tl.load(a + at_a, mask=in_a, other=0)
        t_b = tl.load(b + at_b, mask=in_b, other=0)
        if TRANSPOSED:
            t_b = tl.trans(t_b)
        total = tl.dot(t_a, t_b, total, input_precision=PRECISION)
        if TWO:
            t_a = tl.load(a2 + at_a, mask=in_a, other=0)
            t_b = tl.load(b2 + at_b, mask=in_b, other=0)
            if TRANSPOSED:
                t_b = tl.trans(t_b)
            total = tl.dot(t_a, t_b, total, input_precision=PRECISION)
    total *= scale
    at = base + rows[:, None] * M + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    if PLUS:
        total += plus_scale * tl.load(plus + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def _tokens(M: int, L: int) -> tuple[int, int]:
    """Tokens of one program's tile, and its channels."""
    channels = _power(M)
    return min(max(1, ELEMENTS // 2 // channels), _power(L)), channels


def inner(both: Tensor) -> Tensor:
    """silu(gate) · up for [..., 2 M], gate and up side by side."""
    out = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    M, n = out.shape[-1], out.numel() // out.shape[-1]
    BT, BM = _tokens(M, n)
    with torch.cuda.device_of(both):
        _inner_kernel[(ceiling(n, BT),)](both, out, n, M=M, BT=BT, BM=BM)
    return out


def inner_slopes(both: Tensor, dout: Tensor) -> Tensor:
    """The gradient of gate and up, written over `both`; silu(gate) · up is written over `dout`."""
    M, n = dout.shape[-1], dout.numel() // dout.shape[-1]
    BT, BM = _tokens(M, n)
    with torch.cuda.device_of(both):
        _inner_slopes_kernel[(ceiling(n, BT),)](both, dout, n, M=M, BT=BT, BM=BM)
    return both


@triton.jit
def _inner_kernel(both, out, n, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    channels = tl.arange(0, BM)[None, :]
    inside = (tokens < n) & (channels < M)
    gate = tl.load(both + tokens * (2 * M) + channels, mask=inside, other=0).to(tl.float32)
    up = tl.load(both + tokens * (2 * M) + M + channels, mask=inside, other=0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + tokens * M + channels, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _inner_slopes_kernel(both, dout, n, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    channels = tl.arange(0, BM)[None, :]
    inside = (tokens < n) & (channels < M)
    at = tokens * (2 * M) + channels
    gate = tl.load(both + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(both + at + M, mask=inside, other=0).to(tl.float32)
    d = tl.load(dout + tokens * M + channels, mask=inside, other=0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(both + at, (d * up * s * (1 + gate * (1 - s))).to(both.dtype.element_ty), mask=inside)
    tl.store(both + at + M, (d * gate * s).to(both.dtype.element_ty), mask=inside)
    tl.store(dout + tokens * M + channels, (gate * s * up).to(dout.dtype.element_ty), mask=inside)


def terms(both: Tensor, back: Tensor, rates_BTH3: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What the tokens of a chunk leave for the three steps, each with its learning rate.

    both: gate and up, [B·H, L, 2 M]. back: v @ w1, [B·H, L, M]. start: the chunk's first token in `rates_BTH3`.
    Written over them: back · up · silu'(gate) and back · silu(gate) over `both`, silu(gate) · up over `back`.
    """
    (N, L, M), (T, H) = back.shape, rates_BTH3.shape[1:3]
    BT, BM = _tokens(M, L)
    with torch.cuda.device_of(both):
        _terms_kernel[(ceiling(L, BT), N)](both, back, rates_BTH3, start, L, T, H=H, M=M, BT=BT, BM=BM)
    return both, back


def term_slopes(
    both: Tensor, back: Tensor, dboth: Tensor, dback: Tensor, rates_BTH3: Tensor, drates_BTH3: Tensor, start: int
) -> None:
    """The backward of `terms`.

    Takes its inputs and the gradients of its results. Writes those results over `both` and `back`, the gradients of
    its inputs over `dboth` and `dback`, and those of the rates into `drates_BTH3`.
    """
    (N, L, M), (T, H) = back.shape, rates_BTH3.shape[1:3]
    BT, BM = _tokens(M, L)
    with torch.cuda.device_of(both):
        _term_slopes_kernel[(ceiling(L, BT), N)](
            both, back, dboth, dback, rates_BTH3, drates_BTH3, start, L, T, H=H, M=M, BT=BT, BM=BM
        )


@triton.jit
def _terms_kernel(both, back, rates, start, L, T, H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr):
    n = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    channels = tl.arange(0, BM)[None, :]
    inside = (tokens[:, None] < L) & (channels < M)
    at_back = (n * L + tokens)[:, None] * M + channels
    at = (n * L + tokens)[:, None] * (2 * M) + channels
    gate = tl.load(both + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(both + at + M, mask=inside, other=0).to(tl.float32)
    e = tl.load(back + at_back, mask=inside, other=0).to(tl.float32)
    rate = rates + ((n // H * T + start + tokens) * H + n % H) * 3
    r_0 = tl.load(rate, mask=tokens < L, other=0).to(tl.float32)[:, None]
    r_1 = tl.load(rate + 1, mask=tokens < L, other=0).to(tl.float32)[:, None]
    r_2 = tl.load(rate + 2, mask=tokens < L, other=0).to(tl.float32)[:, None]
    s = tl.sigmoid(gate)
    act = gate * s
    tl.store(both + at, (r_0 * e * up * (s * (1 + gate - act))).to(both.dtype.element_ty), mask=inside)
    tl.store(both + at + M, (r_2 * e * act).to(both.dtype.element_ty), mask=inside)
    tl.store(back + at_back, (r_1 * act * up).to(back.dtype.element_ty), mask=inside)


@triton.jit
def _term_slopes_kernel(
    both, back, dboth, dback, rates, drates, start, L, T,
    H: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    channels = tl.arange(0, BM)[None, :]
    inside = (tokens[:, None] < L) & (channels < M)
    at_back = (n * L + tokens)[:, None] * M + channels
    at = (n * L + tokens)[:, None] * (2 * M) + channels
    gate = tl.load(both + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(both + at + M, mask=inside, other=0).to(tl.float32)
    e = tl.load(back + at_back, mask=inside, other=0).to(tl.float32)
    d_0 = tl.load(dboth + at, mask=inside, other=0).to(tl.float32)
    d_2 = tl.load(dboth + at + M, mask=inside, other=0).to(tl.float32)
    d_1 = tl.load(dback + at_back, mask=inside, other=0).to(tl.float32)
    at_rate = ((n // H * T + start + tokens) * H + n % H) * 3
    kept = tokens < L
    r_0 = tl.load(rates + at_rate, mask=kept, other=0).to(tl.float32)[:, None]
    r_1 = tl.load(rates + at_rate + 1, mask=kept, other=0).to(tl.float32)[:, None]
    r_2 = tl.load(rates + at_rate + 2, mask=kept, other=0).to(tl.float32)[:, None]
    s = tl.sigmoid(gate)
    act = gate * s
    slope = s * (1 + gate - act)
    tl.store(both + at, (r_0 * e * up * slope).to(both.dtype.element_ty), mask=inside)
    tl.store(both + at + M, (r_2 * e * act).to(both.dtype.element_ty), mask=inside)
    tl.store(back + at_back, (r_1 * act * up).to(back.dtype.element_ty), mask=inside)
    tl.store(drates + at_rate, tl.sum(d_0 * e * up * slope, 1), mask=kept)
    tl.store(drates + at_rate + 1, tl.sum(d_1 * act * up, 1), mask=kept)
    tl.store(drates + at_rate + 2, tl.sum(d_2 * e * act, 1), mask=kept)
    d_0 *= r_0
    d_1 *= r_1
    d_2 *= r_2
    curve = s * (1 - s) * (2 + gate * (1 - 2 * s))
    dgate = d_0 * e * up * curve + (d_2 * e + d_1 * up) * slope
    tl.store(dboth + at, dgate.to(dboth.dtype.element_ty), mask=inside)
    tl.store(dboth + at + M, (d_0 * e * slope + d_1 * act).to(dboth.dtype.element_ty), mask=inside)
    tl.store(dback + at_back, (d_0 * up * slope + d_2 * act).to(dback.dtype.element_ty), mask=inside)


def _rows(M: int) -> dict[str, int]:
    channels = _power(M)
    return {"M": M, "BR": min(max(1, ELEMENTS // channels), channels), "BM": channels}


def shares(M: int) -> int:
    """P, how many parts a sum over one matrix comes in."""
    return ceiling(M, _rows(M)["BR"])


def momentum(step: Tensor, last: Tensor | None, keep_N: Tensor | None, after: Tensor | None) -> Tensor:
    """step + keep · last, into `after`; and shares of its squared norm.

    Without `last`, only the squares of `step`. Returns [N, 3, P].
    """
    N, M = step.shape[0], step.shape[-1]
    size = _rows(M)
    P = shares(M)
    squares = torch.empty(N, 3, P, dtype=torch.float32, device=step.device)
    with torch.cuda.device_of(step):
        _momentum_kernel[(P, 3, N)](
            step, last, keep_N, after, squares,
            0 if last is None else last.stride(0), 0 if after is None else after.stride(0),
            **size, LAST=last is not None,
        )  # fmt: skip
    return squares


def scaled_to_one(step: Tensor, squares: Tensor, out: Tensor) -> None:
    """Each matrix of a pack over its Frobenius norm, written to 3 N contiguous matrices."""
    N, M = step.shape[0], step.shape[-1]
    size = _rows(M)
    with torch.cuda.device_of(step):
        _scale_kernel[(ceiling(M, size["BR"]), 3, N)](
            step, squares, out, step.stride(0), P=squares.shape[-1], BP=_power(squares.shape[-1]),
            **size, EPS=ORTHOGONAL_EPS,
        )  # fmt: skip


def restored(before: Tensor, step: Tensor, norms_N3M: Tensor, after: Tensor, narrow: Tensor) -> Tensor:
    """before + step with each row's norm made what it was, into the packs `after` and `narrow` (which may be one).

    Returns the norms before that, [N, 3, M].
    """
    N, M = before.shape[0], before.shape[-1]
    size = _rows(M)
    found = torch.empty(N, 3, M, dtype=torch.float32, device=before.device)
    with torch.cuda.device_of(before):
        _restore_kernel[(ceiling(M, size["BR"]), 3, N)](
            before, step, norms_N3M, after, narrow, found,
            before.stride(0), step.stride(0), after.stride(0), narrow.stride(0),
            **size, EPS=NORM_EPS, NARROW=narrow is not after,
        )  # fmt: skip
    return found


@triton.jit
def _momentum_kernel(
    step, last, keep, after, squares, LAST_N, AFTER_N,
    M: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    n, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BM)
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    at = (which * M + rows)[:, None] * M + columns[None, :]
    b_step = tl.load(step + n * (3 * M * M) + at, mask=inside, other=0).to(tl.float32)
    if LAST:
        b_last = tl.load(last + n * LAST_N + at, mask=inside, other=0).to(tl.float32)
        b_step = (b_step + tl.load(keep + n) * b_last).to(after.dtype.element_ty).to(tl.float32)
        tl.store(after + n * AFTER_N + at, b_step.to(after.dtype.element_ty), mask=inside)
    share = (n * 3 + which) * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + share, tl.sum(tl.sum(b_step * b_step, 1), 0))


@triton.jit
def _scale_kernel(
    step, squares, out, STEP_N,
    P: tl.constexpr, BP: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    n, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BM)
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    at = (which * M + rows)[:, None] * M + columns[None, :]
    shares = tl.arange(0, BP)
    norm = tl.sqrt(tl.sum(tl.load(squares + (n * 3 + which) * P + shares, mask=shares < P, other=0), 0))
    b_step = tl.load(step + n * STEP_N + at, mask=inside, other=0).to(tl.float32) / (norm + EPS)
    tl.store(out + n * (3 * M * M) + at, b_step.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _restore_kernel(
    before, step, norms, after, narrow, found, BEFORE_N, STEP_N, AFTER_N, NARROW_N,
    M: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    n, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BM)
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    at = (which * M + rows)[:, None] * M + columns[None, :]
    b_before = tl.load(before + n * BEFORE_N + at, mask=inside, other=0).to(tl.float32)
    b_moved = b_before + tl.load(step + n * STEP_N + at, mask=inside, other=0).to(tl.float32)
    b_found = tl.sqrt(tl.sum(b_moved * b_moved, 1))
    at_row = (n * 3 + which) * M + rows
    tl.store(found + at_row, b_found, mask=rows < M)
    b_norm = tl.load(norms + at_row, mask=rows < M, other=0).to(tl.float32)
    b_after = b_moved * (b_norm / (b_found + EPS))[:, None]
    tl.store(after + n * AFTER_N + at, b_after.to(after.dtype.element_ty), mask=inside)
    if NARROW:
        tl.store(narrow + n * NARROW_N + at, b_after.to(narrow.dtype.element_ty), mask=inside)


def restored_back(
    carried: Tensor,
    direct: Tensor | None,
    incoming: Tensor | None,
    after: Tensor,
    norms_N3M: Tensor,
    found_N3M: Tensor,
    dnorms_N3M: Tensor,
    dstep: Tensor,
) -> None:
    """The backward of `restored`. The gradient of `after` is carried + direct + incoming; that of `before` is written
    over `carried`, that of the step to `dstep`, and that of the norms is added to `dnorms_N3M`.
    """
    N, M = carried.shape[0], carried.shape[-1]
    size = _rows(M)
    with torch.cuda.device_of(carried):
        _restore_back_kernel[(ceiling(M, size["BR"]), 3, N)](
            carried, direct, incoming, after, norms_N3M, found_N3M, dnorms_N3M, dstep,
            0 if incoming is None else incoming.stride(0), after.stride(0),
            **size, EPS=NORM_EPS, DIRECT=direct is not None, INCOMING=incoming is not None,
        )  # fmt: skip


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Shares [N, 3, P] of ⟨a, b⟩ for the matrices of two contiguous packs."""
    N, M = a.shape[0], a.shape[-1]
    size = _rows(M)
    P = shares(M)
    out = torch.empty(N, 3, P, dtype=torch.float32, device=a.device)
    with torch.cuda.device_of(a):
        _inner_products_kernel[(P, 3, N)](a, b, out, **size)
    return out


def momentum_back(
    dunit: Tensor,
    unit: Tensor | None,
    squares: Tensor | None,
    along: Tensor | None,
    last: Tensor | None,
    keep_N: Tensor | None,
    incoming: Tensor | None,
    carried: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The backward of `scaled_to_one` and `momentum`: the gradient of the step, and shares [N, 3, P] of that of `keep`.

    unit, squares, along: what `scaled_to_one` made, what it was given, and ⟨unit, dunit⟩; None where there was none.
    incoming, carried: gradients of the momentum; that of the last one is written over `carried`.
    """
    N, M = dunit.shape[0], dunit.shape[-1]
    size = _rows(M)
    P = shares(M)
    dstep = torch.empty(N, 3, M, M, dtype=dtype, device=dunit.device)
    dkeep = None if last is None else torch.empty(N, 3, P, dtype=torch.float32, device=dunit.device)
    with torch.cuda.device_of(dunit):
        _momentum_back_kernel[(P, 3, N)](
            dunit, unit, squares, along, last, keep_N, incoming, carried, dstep, dkeep,
            0 if last is None else last.stride(0), 0 if incoming is None else incoming.stride(0),
            P=P, BP=_power(P), **size, EPS=ORTHOGONAL_EPS, UNIT=unit is not None,
            LAST=last is not None, INCOMING=incoming is not None,
        )  # fmt: skip
    return dstep, dkeep


@triton.jit
def _restore_back_kernel(
    carried, direct, incoming, after, norms, found, dnorms, dstep, INCOMING_N, AFTER_N,
    M: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr, DIRECT: tl.constexpr,
    INCOMING: tl.constexpr,
):  # fmt: skip
    n, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BM)
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    at = (which * M + rows)[:, None] * M + columns[None, :]
    own = n * (3 * M * M) + at
    b_d = tl.load(carried + own, mask=inside, other=0)
    if DIRECT:
        b_d += tl.load(direct + own, mask=inside, other=0).to(tl.float32)
    if INCOMING:
        b_d += tl.load(incoming + n * INCOMING_N + at, mask=inside, other=0).to(tl.float32)
    at_row = (n * 3 + which) * M + rows
    kept = rows < M
    b_norm = tl.load(norms + at_row, mask=kept, other=0).to(tl.float32)
    b_found = tl.load(found + at_row, mask=kept, other=0)
    b_unit = tl.load(after + n * AFTER_N + at, mask=inside, other=0).to(tl.float32)
    b_unit *= tl.where(b_norm != 0, 1 / tl.where(b_norm != 0, b_norm, 1), 0)[:, None]
    b_along = tl.sum(b_d * b_unit, 1)
    b_rest = b_along * tl.where(b_found > 0, (b_found + EPS) / tl.where(b_found > 0, b_found, 1), 0)
    b_moved = (b_d - b_unit * b_rest[:, None]) * (b_norm / (b_found + EPS))[:, None]
    b_dnorm = tl.load(dnorms + at_row, mask=kept, other=0) + b_along
    tl.store(dnorms + at_row, b_dnorm, mask=kept)
    tl.store(carried + own, b_moved, mask=inside)
    tl.store(dstep + own, b_moved.to(dstep.dtype.element_ty), mask=inside)


@triton.jit
def _inner_products_kernel(a, b, out, M: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr):
    n, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BM)
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    at = n * (3 * M * M) + (which * M + rows)[:, None] * M + columns[None, :]
    b_a = tl.load(a + at, mask=inside, other=0).to(tl.float32)
    b_a *= tl.load(b + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + (n * 3 + which) * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(b_a, 1), 0))


@triton.jit
def _momentum_back_kernel(
    dunit, unit, squares, along, last, keep, incoming, carried, dstep, dkeep, LAST_N, INCOMING_N,
    P: tl.constexpr, BP: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, EPS: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, INCOMING: tl.constexpr,
):  # fmt: skip
    n, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BM)
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    at = (which * M + rows)[:, None] * M + columns[None, :]
    own = n * (3 * M * M) + at
    b_d = tl.load(dunit + own, mask=inside, other=0).to(tl.float32)
    if UNIT:
        shares = tl.arange(0, BP)
        at_share = (n * 3 + which) * P + shares
        norm = tl.sqrt(tl.sum(tl.load(squares + at_share, mask=shares < P, other=0), 0))
        b_along = tl.sum(tl.load(along + at_share, mask=shares < P, other=0), 0)
        b_along = tl.where(norm > 0, b_along * (norm + EPS) / tl.where(norm > 0, norm, 1), 0)
        b_d = (b_d - tl.load(unit + own, mask=inside, other=0).to(tl.float32) * b_along) / (norm + EPS)
    if LAST:
        b_all = tl.load(carried + own, mask=inside, other=0)
        if INCOMING:
            b_all += tl.load(incoming + n * INCOMING_N + at, mask=inside, other=0).to(tl.float32)
        b_d += b_all
        b_keep = tl.load(keep + n)
        b_back = b_d * b_keep
        b_last = tl.load(last + n * LAST_N + at, mask=inside, other=0).to(tl.float32)
        b_dkeep = tl.sum(tl.sum(b_d * b_last, 1), 0)
        tl.store(carried + own, b_back, mask=inside)
        tl.store(dkeep + (n * 3 + which) * tl.num_programs(0) + tl.program_id(0), b_dkeep)
    tl.store(dstep + own, b_d.to(dstep.dtype.element_ty), mask=inside)
