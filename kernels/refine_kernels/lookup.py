"""Looking up a few rows of a tensor long after it was used, at the price of those rows.

Indexing would do, but its gradient is a tensor as large as the one indexed, zero but for a few rows; with one for every
layer of a model, all of them waiting until the backward pass arrives there, that is a third more memory. Here the rows'
gradients wait as rows, and are added to the gradient of the whole tensor in the place where that is computed.

A `Tap` stands for the tensor. Its anchor is a scalar output of whatever made the tensor: every lookup depends on it, so
autograd runs the lookups' backward first, and finds the rows' gradients in `waiting` when it comes to the maker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class Lookup:
    """Which rows, counted over the first two dimensions of a tensor; the same for every layer of a model."""

    rows_M: Tensor
    """int64, at least 0; may repeat."""

    @cached_property
    def firsts_M(self) -> Tensor:
        """int64 [M], for each entry the first one that asks for the same row."""
        return (self.rows_M[:, None] == self.rows_M[None]).long().argmax(1)

    def add(self, gradient_MX: Tensor, to_NX: Tensor) -> None:
        """Add the gradient of each entry to its row, in place; in a fixed order, so that results repeat."""
        to_NX.index_put_((self.rows_M,), gradient_MX.to(to_NX.dtype), accumulate=True)

    def summed(self, gradient_MX: Tensor) -> Tensor:
        """The gradients of entries that ask for one row, summed at the first of them; zeros at the others."""
        sums_MX = torch.zeros_like(gradient_MX)
        return sums_MX.index_put_((self.firsts_M,), gradient_MX, accumulate=True)


Waiting = list[tuple[Lookup, Tensor]]
"""Gradients of looked-up rows that are not yet part of the gradient of the whole."""


@dataclass(frozen=True)
class Tap:
    """A tensor that can be looked up."""

    value: Tensor
    """Detached; rows are counted over its first two dimensions."""
    anchor: Tensor | None = None
    """None where no gradient is wanted."""
    waiting: Waiting | None = None

    def pick(self, lookup: Lookup) -> Tensor:
        """The rows [M, ...] in the dtype of the tensor. Differentiable."""
        return self.join(lookup, self.value.flatten(0, 1).index_select(0, lookup.rows_M))

    def join(self, lookup: Lookup, rows: Tensor) -> Tensor:
        """Rows [M, ...] that were come by in another way, made differentiable as if they had been picked."""
        if self.anchor is None or not torch.is_grad_enabled():
            return rows
        return _Join.apply(self.anchor, rows.detach(), self.waiting, lookup)  # pyright: ignore[reportReturnType]


def tapped(x: Tensor) -> tuple[Tensor, Tap]:
    """The same tensor, to be used instead of `x` (and `x` nowhere else), and a tap of it."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, Tap(x.detach())
    waiting: Waiting = []
    y, anchor = _Tapped.apply(x, waiting)  # pyright: ignore[reportGeneralTypeIssues]
    return y, Tap(x.detach(), anchor, waiting)


def anchor_like(x: Tensor) -> Tensor:
    """An output that carries no value, only the order of the backward pass."""
    return x.new_zeros(())


class _Tapped(Function):
    @staticmethod
    def forward(ctx, x, waiting):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.waiting, ctx.like = waiting, (x.shape, x.dtype, x.device)
        ctx.set_materialize_grads(False)
        return x.view_as(x), anchor_like(x)

    @staticmethod
    def backward(ctx, dx, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype, device = ctx.like
        waiting, whole = list(ctx.waiting), dx
        ctx.waiting.clear()
        if whole is None:
            whole = torch.zeros(shape, dtype=dtype, device=device)
        elif waiting and not (whole.is_contiguous() and whole._base is None):
            whole = whole.clone(memory_format=torch.contiguous_format)  # only what is ours may be added to
        for lookup, gradient in waiting:
            lookup.add(gradient, whole.view(-1, *shape[2:]))
        return whole, None


class _Join(Function):
    @staticmethod
    def forward(ctx, anchor, rows, waiting, lookup):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.waiting, ctx.lookup = waiting, lookup
        ctx.zero = torch.zeros_like(anchor)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.waiting.append((ctx.lookup, gradient))
        return ctx.zero, None, None, None
