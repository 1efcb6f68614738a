"""Linear maps of a few rows as one Triton kernel that streams every weight once.

A program has a few outputs of one map and walks over all input channels, so sums need neither atomics nor a second
kernel and come out the same each time. One to four rows are multiplied element by element into sums that are as wide as
the tile and are added up across threads once, at the end; more rows go through the tensor cores, filled up to 16.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.runtime import ceiling, why_no_triton
from refine_kernels.thin_linear import FEW

PROGRAMS = 256
"""There should be about so many, two for each processor of the GPU, before their tiles grow."""
UNROLLED = 16
"""Pieces of the input channels that are written out one after another, so that all of them are fetched at once."""
MOST_MAPS = 4
"""In one launch; more are launched in turn."""
BY_ELEMENT = 4
"""Rows that are multiplied element by element."""


class Tile(NamedTuple):
    """How the work is cut: of a program, or of one step of its walk over input channels."""

    outputs: int
    """With `thin_swiglu`, half of them gate's and half up's."""
    channels: int
    stages: int
    """Steps whose weights are fetched ahead; 0: the walk is unrolled."""
    warps: int
    dot: bool
    """Whether rows go through the tensor cores."""


def why_not(x: Tensor, *, one_dtype: bool) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if x.numel() > FEW * x.shape[-1]:
        return f"there are {x.numel() // x.shape[-1]} rows; the kernels take at most {FEW}"
    if not one_dtype:
        return "weights and inputs have different dtypes"
    return why_no_triton(x)


def thin_linears(
    x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], *, _tile: Tile | None = None
) -> tuple[Tensor, ...]:
    """See `refine_kernels.thin_linear.thin_linears`. `_tile` is for measuring."""
    outputs = []
    for start in range(0, len(maps), MOST_MAPS):
        weights, biases = zip(*maps[start : start + MOST_MAPS], strict=True)
        outputs += _launched(x, weights, biases, False, _tile)
    return tuple(outputs)


def thin_swiglu(x: Tensor, gate_ID: Tensor, up_ID: Tensor, *, _tile: Tile | None = None) -> Tensor:
    """See `refine_kernels.thin_linear.thin_swiglu`. `_tile` is for measuring."""
    return _launched(x, (gate_ID, up_ID), (None, None), True, _tile)[0]


def tile_for(rows: int, outputs: int, channels: int) -> Tile:
    """By shape: the most outputs to a program that leave enough programs, and steps of about as many weights each."""
    dot = rows > BY_ELEMENT
    fewest = 8 if dot else 4
    of_program = 16 if dot or rows <= 2 else 8  # of more, the sums would not fit the registers
    while of_program > fewest and ceiling(outputs, of_program) < PROGRAMS:
        of_program //= 2
    step = 256 if dot or of_program == 16 or rows > 2 else 512
    step = min(step, max(triton.next_power_of_2(channels), 16))
    stages = 4 if dot or ceiling(channels, step) > UNROLLED else 0
    return Tile(of_program, step, stages, 4, dot)


def _launched(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], swiglu: bool, tile: Tile | None
) -> list[Tensor]:
    D, sizes = x.shape[-1], [len(w) for w in weights]
    rows = x.numel() // D
    tile = tile or tile_for(rows, sum(sizes), D)
    x, weights = x.contiguous(), [w.contiguous() for w in weights]
    outputs = [x.new_empty(*x.shape[:-1], N) for N in (sizes[:1] if swiglu else sizes)]
    # The first program of each map after the first; maps that are not there begin after the last program.
    *firsts, programs = accumulate(ceiling(y.shape[-1], tile.outputs // (1 + swiglu)) for y in outputs)
    firsts += [programs] * (MOST_MAPS - 1 - len(firsts))

    def four(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [*tensors, *[tensors[-1]] * (MOST_MAPS - len(tensors))]

    with torch.cuda.device_of(x):
        _thin_linear_kernel[(programs,)](
            x, *four(weights), *four([weights[0] if b is None else b.contiguous() for b in biases]), *four(outputs),
            *[*sizes, *[0] * (MOST_MAPS - len(sizes))], *firsts, rows,
            D=D, BIASED=sum((b is not None) << i for i, b in enumerate(biases)), SWIGLU=swiglu,
            BM=max(triton.next_power_of_2(rows), FEW if tile.dot else 1), BN=tile.outputs, BK=tile.channels,
            STAGES=tile.stages, DOT=tile.dot, num_warps=tile.warps,
        )  # fmt: skip
    return outputs


@triton.jit
def _added(sums, b_w, x, row: tl.constexpr, rows, channels, D: tl.constexpr, EVEN: tl.constexpr):
    # Every output fetches the row for itself, from a cache. Fetched once it would be dealt out to threads in another
    # way than the weights are, and the way from one to the other is a barrier that later fetches wait for.
    at = x + row * D + tl.broadcast_to(channels[None, :], sums.shape)
    b_x = tl.load(at) if EVEN and row == 0 else tl.load(at, mask=(channels[None, :] < D) & (rows > row), other=0)
    return sums + b_w.to(tl.float32) * b_x.to(tl.float32)


@triton.jit
def _weights(starts, channels, D: tl.constexpr, EVEN: tl.constexpr):
    at = starts[:, None] + channels[None, :]
    b_w = tl.load(at) if EVEN else tl.load(at, mask=channels[None, :] < D, other=0)
    return b_w


@triton.jit
def _step(
    sums_0, sums_1, sums_2, sums_3, x, starts, rows, channels, D: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr
):
    b_w = _weights(starts, channels, D, EVEN)
    sums_0 = _added(sums_0, b_w, x, 0, rows, channels, D, EVEN)
    if BM > 1:
        sums_1 = _added(sums_1, b_w, x, 1, rows, channels, D, EVEN)
    if BM > 2:
        sums_2 = _added(sums_2, b_w, x, 2, rows, channels, D, EVEN)
        sums_3 = _added(sums_3, b_w, x, 3, rows, channels, D, EVEN)
    return sums_0, sums_1, sums_2, sums_3


@triton.jit
def _products(
    x, starts, rows, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Of all rows of x and the weights [BN, D] that start there, [BM, BN] in float32."""
    EVEN: tl.constexpr = D % BK == 0
    if DOT:
        each = tl.arange(0, BM)
        sums = tl.zeros([BM, BN], dtype=tl.float32)
        for start in tl.range(0, D, BK, num_stages=STAGES):
            channels = start + tl.arange(0, BK)
            inside = (each[:, None] < rows) & (channels[None, :] < D)
            b_x = tl.load(x + each[:, None] * D + channels[None, :], mask=inside, other=0)
            b_w = _weights(starts, channels, D, EVEN)
            sums = tl.dot(b_x, tl.trans(b_w), sums, input_precision="ieee")
    else:
        sums_0 = tl.zeros([BN, BK], dtype=tl.float32)
        sums_1, sums_2, sums_3 = sums_0, sums_0, sums_0  # nothing is kept of those without a row
        if STAGES == 0:
            for start in tl.static_range(0, D, BK):
                sums_0, sums_1, sums_2, sums_3 = _step(
                    sums_0, sums_1, sums_2, sums_3, x, starts, rows, start + tl.arange(0, BK), D, BM, EVEN
                )
        else:
            for start in tl.range(0, D, BK, num_stages=STAGES):
                sums_0, sums_1, sums_2, sums_3 = _step(
                    sums_0, sums_1, sums_2, sums_3, x, starts, rows, start + tl.arange(0, BK), D, BM, EVEN
                )
        each = tl.arange(0, BM)[:, None]
        sums = tl.sum(sums_0, 1)[None, :] + tl.zeros([BM, BN], dtype=tl.float32)
        if BM > 1:
            sums = tl.where(each == 1, tl.sum(sums_1, 1)[None, :], sums)
        if BM > 2:
            sums = tl.where(each == 2, tl.sum(sums_2, 1)[None, :], sums)
            sums = tl.where(each == 3, tl.sum(sums_3, 1)[None, :], sums)
    return sums


@triton.jit(do_not_specialize=["N0", "N1", "N2", "N3", "first_1", "first_2", "first_3", "rows"])
def _thin_linear_kernel(
    x, w0, w1, w2, w3, bias_0, bias_1, bias_2, bias_3, y0, y1, y2, y3,
    N0, N1, N2, N3, first_1, first_2, first_3, rows,
    D: tl.constexpr, BIASED: tl.constexpr, SWIGLU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    w, bias, y = w0, bias_0, y0
    N, first, biased = N0, 0 * N0, 0 * N0 + BIASED % 2
    if program >= first_1:
        w, bias, y = w1, bias_1, y1
        N, first, biased = N1, first_1, 0 * N1 + BIASED // 2 % 2
    if program >= first_2:
        w, bias, y = w2, bias_2, y2
        N, first, biased = N2, first_2, 0 * N2 + BIASED // 4 % 2
    if program >= first_3:
        w, bias, y = w3, bias_3, y3
        N, first, biased = N3, first_3, 0 * N3 + BIASED // 8
    each = tl.arange(0, BM)[:, None]
    of_tile = tl.arange(0, BN)
    if SWIGLU:  # the tile has every output of gate beside that of up
        outputs = program * (BN // 2) + of_tile // 2
        w_of = tl.where(of_tile % 2 == 1, w1, w0)
    else:
        outputs = (program - first) * BN + of_tile
        w_of = w + 0 * of_tile
    # Beyond the last output: the last one again, which is not kept.
    starts = w_of + tl.minimum(outputs, N - 1).to(tl.int64) * D
    sums = _products(x, starts, rows, D, BM, BN, BK, STAGES, DOT)
    if BIASED != 0:
        here = (outputs < N) & (biased == 1)
        sums += tl.load(bias + outputs, mask=here, other=0).to(tl.float32)[None, :]
    if SWIGLU:
        both = sums.to(x.dtype.element_ty).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, [BM, BN // 2, 2]))
        sums = gate * tl.sigmoid(gate) * up
        outputs = program * (BN // 2) + tl.arange(0, BN // 2)
    inside = (each < rows) & (outputs[None, :] < N)
    tl.store(y + each * N + outputs[None, :], sums.to(y.dtype.element_ty), mask=inside)
