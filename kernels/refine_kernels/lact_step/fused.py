"""One token of LaCT as two Triton kernels, one for each of the two products that follow one another.

A program has a few rows of a head's weights, fetched at once. What the token leaves for the update is put into the
buffers by programs of the first kernel that multiply nothing, so that no product waits for it. The inner activations
stay in float32 between the two.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.lact.reference import Chunk, Weights
from refine_kernels.runtime import ceiling, why_no_triton

ROWS = 8
"""Of a head's weights that one program has."""
COLUMNS = 128
"""Of them that are multiplied at a time."""


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    return why_no_triton(x)


def lact_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    rates_BHX: Tensor,
    momentum_BH: Tensor | None,
    weights: Weights,
    unfinished: Chunk,
    held_B: Tensor,
    *,
    rate_bias: float,
    _rows: int = ROWS,
    _columns: int = COLUMNS,
) -> Tensor:
    """See `refine_kernels.lact_step.lact_step`. `_rows` and `_columns` are for measuring."""
    q, k, v, rates = (x.contiguous() for x in (q_BHK, k_BHK, v_BHV, rates_BHX))
    w0, w1, w2 = (w.contiguous() for w in weights)
    B, H, V, M = w1.shape
    K, X = q.shape[-1], rates.shape[-1]
    momentum, momenta = momentum_BH, unfinished.momentum_BLH
    kept = momentum is not None and momenta is not None
    if momentum is None or momenta is None:  # the kernel's arguments must be something
        momentum, momenta = rates, unfinished.rates_BLHX
    buffers = unfinished.k_BLHK, unfinished.v_BLHV, unfinished.rates_BLHX
    inner = torch.empty(B, H, M, dtype=torch.float32, device=q.device)
    out = torch.empty(B, H, V, dtype=q.dtype, device=q.device)
    sizes = {"H": H, "M": M, "V": V, "BR": _rows}
    with torch.cuda.device_of(q):
        _lact_step_inner_kernel[(ceiling(M, _rows) + 1, H, B)](
            q, k, v, rates, momentum.contiguous(), w0, w2, inner, *buffers, momenta, held_B, rate_bias,
            *(stride for x in buffers for stride in x.stride()), *momenta.stride()[:3],
            **sizes, K=K, X=X, BK=min(_columns, triton.next_power_of_2(K)), BX=triton.next_power_of_2(max(K, V, X)),
            MOMENTUM=kept,
        )  # fmt: skip
        _lact_step_outer_kernel[(ceiling(V, _rows), H, B)](
            inner, w1, out, **sizes, BK=min(_columns, triton.next_power_of_2(M))
        )  # fmt: skip
    return out


@triton.jit
def _product(w, x, rows, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """Of a head's weights [., K], rounded to a dtype, and x [K]: [BR] in float32."""
    sums = tl.zeros([BR, BK], dtype=tl.float32)
    for start in tl.static_range(0, K, BK):
        columns = start + tl.arange(0, BK)
        at_w = w + rows[:, None] * K + columns[None, :]
        at_x = x + tl.broadcast_to(columns[None, :], [BR, BK])  # by every row for itself: see thin_linear/fused.py
        if K % BK == 0:
            b_w, b_x = tl.load(at_w), tl.load(at_x)
        else:
            b_w = tl.load(at_w, mask=columns[None, :] < K, other=0)
            b_x = tl.load(at_x, mask=columns[None, :] < K, other=0)
        sums += b_w.to(DTYPE).to(tl.float32) * b_x.to(tl.float32)
    return tl.sum(sums, 1)


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(-|x|), as 2 artanh(e / (2 + e)), which is exact for a small e, too.

    The series' argument is at most 1/3, so what follows its seventh term is below 1e-8.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    z = s * s
    series = 1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z / 13)))))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def _lact_step_inner_kernel(
    q, k, v, rates, momentum, w0, w2, inner, keys, values, all_rates, momenta, held, rate_bias,
    KB, KL, KH, KC, VB, VL, VH, VC, RB, RL, RH, RC, MB, ML, MH,
    H: tl.constexpr, M: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, K: tl.constexpr,
    X: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    if tile * BR < M:
        rows = tile * BR + tl.arange(0, BR)
        known = tl.minimum(rows, M - 1)  # beyond the last: the last one again, which is not kept
        gate = _product(w0 + head * M * K, q + head * K, known, K, BR, BK, q.dtype.element_ty)
        up = _product(w2 + head * M * K, q + head * K, known, K, BR, BK, q.dtype.element_ty)
        tl.store(inner + head * M + rows, gate * tl.sigmoid(gate) * up, mask=rows < M)
    else:
        at = tl.load(held + b)
        channels = tl.arange(0, BX)
        b_k = tl.load(k + head * K + channels, mask=channels < K, other=0)
        to_keys = keys + b * KB + at * KL + h * KH + channels * KC
        tl.store(to_keys, b_k.to(keys.dtype.element_ty), mask=channels < K)
        b_v = tl.load(v + head * V + channels, mask=channels < V, other=0)
        to_values = values + b * VB + at * VL + h * VH + channels * VC
        tl.store(to_values, b_v.to(values.dtype.element_ty), mask=channels < V)
        b_rates = tl.load(rates + head * X + channels, mask=channels < X, other=0).to(tl.float32)
        to_rates = all_rates + b * RB + at * RL + h * RH + channels * RC
        tl.store(to_rates, _softplus(b_rates + rate_bias).to(all_rates.dtype.element_ty), mask=channels < X)
        if MOMENTUM:
            kept = tl.sigmoid(tl.load(momentum + head).to(tl.float32))
            tl.store(momenta + b * MB + at * ML + h * MH, kept.to(momenta.dtype.element_ty))


@triton.jit
def _lact_step_outer_kernel(
    inner, w1, out,
    H: tl.constexpr, M: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * H + h
    rows = tile * BR + tl.arange(0, BR)
    known = tl.minimum(rows, V - 1)
    sums = _product(w1 + head * V * M, inner + head * M, known, M, BR, BK, out.dtype.element_ty)
    tl.store(out + head * V + rows, sums.to(out.dtype.element_ty), mask=rows < V)
