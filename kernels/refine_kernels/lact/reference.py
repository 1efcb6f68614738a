"""LaCT's fast weights in plain torch (Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884).

The memory is a small network, f(x) = w1 (silu(w0 x) · (w2 x)) per head. A chunk of tokens is read with the weights
that the chunks before it left; then one step, for all of the chunk at once, makes f(k) more like v.

    K size of keys   M inner size   V size of values   L tokens of a chunk   X learning rates of a token: 3 or 3 K
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor]
"""w0 [..., H, M, K], w1 [..., H, V, M] and w2 [..., H, M, K], or something of each one's shape."""

NORM_EPS = 1e-5
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients of the published five steps."""


class FastWeights(NamedTuple):
    """The weights of f for B rows, and what their updates carry along; float32, or the dtype of the parameters."""

    weights: Weights
    main: Weights | None
    """Sum of the initial weights and all steps (pre-norm); None where the normalised weights are stepped themselves."""
    momentum: Weights | None
    """The step before, ahead of Newton-Schulz; None without momentum."""
    norms: Weights
    """Row norms of the initial weights, [B, H, M, 1], [B, H, V, 1], [B, H, M, 1]: every update restores them."""


@dataclass(frozen=True)
class Fresh:
    """The fast weights of texts that begin here: the same in every row."""

    weights: Weights
    """Of each head: [H, M, K], [H, V, M], [H, M, K]."""
    rows: int
    momentum: bool
    prenorm: bool = False

    def expanded(self) -> FastWeights:
        """For each row, in memory of its own: a state must not change when the parameters do."""

        def rows(weights: Weights) -> Weights:
            return _three(w.repeat(self.rows, 1, 1, 1) for w in weights)

        start = rows(self.weights)
        zeros = _three(w.new_zeros(w.shape) for w in start) if self.momentum else None
        return FastWeights(start, rows(self.weights) if self.prenorm else None, zeros, rows(row_norms(self.weights)))


class Chunk(NamedTuple):
    """What tokens leave for an update."""

    k_BLHK: Tensor
    v_BLHV: Tensor
    rates_BLHX: Tensor
    """Learning rates for w0, w1 and w2, one after another: one number each, or one for each of K = M channels."""
    momentum_BLH: Tensor | None
    """How much of the step before each token keeps."""


def map_chunk(change: Callable[..., Tensor], first: Chunk, *others: Chunk) -> Chunk:
    """The change of each tensor with those in its place."""

    def each(i: int) -> Tensor:
        return change(first[i], *(chunk[i] for chunk in others))

    return Chunk(each(0), each(1), each(2), None if first.momentum_BLH is None else each(3))


def map_weights(change: Callable[..., Tensor], first: FastWeights, *others: FastWeights) -> FastWeights:
    """The change of each tensor with those in its place."""

    def each(i: int) -> Weights:
        return _three(
            change(*tensors) for tensors in zip(first[i] or (), *(fast[i] or () for fast in others), strict=True)
        )

    return FastWeights(
        each(0), None if first.main is None else each(1), None if first.momentum is None else each(2), each(3)
    )


def apply(weights: Weights, x_BTHK: Tensor) -> Tensor:
    """f(x) for every token, [B, T, H, V] in the dtype of x."""
    w0, w1, w2 = (w.to(x_BTHK.dtype) for w in weights)
    x_BHTK = x_BTHK.transpose(1, 2)
    inner_BHTM = F.silu(x_BHTK @ w0.mT) * (x_BHTK @ w2.mT)
    return (inner_BHTM @ w1.mT).transpose(1, 2)


def update(fast: FastWeights, chunk: Chunk, *, muon: bool, joint: bool) -> FastWeights:
    """The weights after a chunk.

    Args:
        fast: before the chunk.
        chunk: its tokens.
        muon: whether steps are orthogonalised.
        joint: w0 and w2 are orthogonalised as one matrix, their rows stacked.
    """
    steps = directions(fast.weights, chunk)
    momentum = None
    if fast.momentum is not None and chunk.momentum_BLH is not None:
        keep_BH11 = chunk.momentum_BLH.mean(1)[..., None, None]
        momentum = _three((d + keep_BH11 * last).to(last.dtype) for d, last in zip(steps, fast.momentum, strict=True))
        steps = momentum
    if muon:
        steps = _orthogonal(_three(d.to(chunk.k_BLHK.dtype) for d in steps), joint)
    base = fast.weights if fast.main is None else fast.main
    moved = _three(w + d.to(w.dtype) for w, d in zip(base, steps, strict=True))
    weights = _three(_with_norms(w, n) for w, n in zip(moved, fast.norms, strict=True))
    return FastWeights(weights, None if fast.main is None else moved, momentum, fast.norms)


def directions(weights: Weights, chunk: Chunk) -> Weights:
    """The gradient of sum_t <f(k_t), v_t> for each weight, each token's part times its learning rate for it."""
    k, v, rates = (x.transpose(1, 2) for x in chunk[:3])
    dtype = k.dtype
    w0, w1, w2 = (w.to(dtype) for w in weights)
    rate0, rate1, rate2 = rates.chunk(3, -1)
    gate, up = k @ w0.mT, k @ w2.mT
    sigma = gate.sigmoid()
    act = gate * sigma
    d_inner = v @ w1
    d_gate = d_inner * up * (sigma * (1 + gate - act))
    return (
        d_gate.mT @ (k * rate0).to(dtype),
        v.mT @ (act * up * rate1).to(dtype),
        (d_inner * act).mT @ (k * rate2).to(dtype),
    )


def newton_schulz(x: Tensor) -> Tensor:
    """The nearest matrix [..., M, K] whose singular values are all about 1, by five odd polynomials (Muon)."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def row_norms(weights: Weights) -> Weights:
    """Norm of each row, in float32 or wider."""
    return _three(torch.linalg.vector_norm(_wide(w), dim=-1, keepdim=True) for w in weights)


def _orthogonal(steps: Weights, joint: bool) -> Weights:
    d0, d1, d2 = steps
    if joint:
        d0, d2 = newton_schulz(torch.cat((d0, d2), -2)).split((d0.shape[-2], d2.shape[-2]), -2)
        return d0, newton_schulz(d1), d2
    return newton_schulz(d0), newton_schulz(d1), newton_schulz(d2)


def _with_norms(w: Tensor, norms: Tensor) -> Tensor:
    wide = _wide(w)
    return (wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + NORM_EPS) * norms).to(w.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _three(tensors: Iterable[Tensor]) -> Weights:
    w0, w1, w2 = tensors
    return w0, w1, w2
