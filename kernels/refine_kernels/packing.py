"""Texts of different lengths one after another in one row, so that nothing is computed for padding.

B texts   T tokens of a padded row   M real tokens of all texts together
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

Kind = TypeVar("Kind", bound=Hashable)


def neighbours(kinds: Sequence[Kind]) -> Iterator[tuple[slice, Kind]]:
    """Rows that stand side by side and are of one kind, and the kind."""
    row = 0
    for kind, group in groupby(kinds):
        rows = slice(row, row + len(list(group)))
        yield rows, kind
        row = rows.stop


class Pieces(NamedTuple):
    """Every text cut into pieces of one size, each text's last one perhaps shorter; N pieces in all."""

    index_N2: Tensor
    """int64, of each piece its text and its number in that text."""
    starts: Tensor
    """int64 [B + 1], pieces before each text; at the end, N."""


@dataclass(frozen=True)
class Packing:
    """Where B texts stand when they lie one after another in one row of M tokens, and when they are padded rows of T.

    Sizes are known on the host, so that making and using one never waits for a device.
    """

    lengths: tuple[int, ...]
    """Tokens of each text."""
    lengths_B: Tensor
    """int64, the same where the tokens are."""
    T: int
    """Tokens of a padded row."""
    _pieces: dict[tuple[int, int], Pieces] = field(default_factory=dict, compare=False)
    _made: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def starts(self) -> Tensor:
        """int64 [B + 1], tokens before each text; at the end, M. What fla calls cu_seqlens."""
        if "starts" not in self._made:
            self._made["starts"] = F.pad(self.lengths_B.cumsum(0), (1, 0))
        return self._made["starts"]

    @property
    def places_M(self) -> Tensor:
        """int64, where each token stands among the B·T of padded rows."""
        if "places" not in self._made:
            text_M, token_M = _counted(self.lengths_B, self.starts, sum(self.lengths))
            self._made["places"] = text_M * self.T + token_M
        return self._made["places"]

    def pieces(self, size: int, more: int = 0) -> Pieces:
        """The texts, each longer by `more` tokens, in pieces of so many tokens."""
        if (size, more) not in self._pieces:
            count_B = (self.lengths_B + (more + size - 1)) // size
            starts = F.pad(count_B.cumsum(0), (1, 0))
            total = sum(-(-(length + more) // size) for length in self.lengths)
            self._pieces[size, more] = Pieces(torch.stack(_counted(count_B, starts, total), 1), starts)
        return self._pieces[size, more]

    def pack(self, x_BTX: Tensor) -> Tensor:
        """The real tokens of padded rows, [1, M, X]. Differentiable."""
        return picked(x_BTX.flatten(0, 1), self.places_M)[None]

    def spread(self, x_1MX: Tensor) -> Tensor:
        """The tokens as padded rows, [B, T, X], zeros where there is no token. Differentiable."""
        B = len(self.lengths)
        return placed(x_1MX[0], self.places_M, B * self.T).unflatten(0, (B, self.T))


def picked(x_NX: Tensor, places_M: Tensor) -> Tensor:
    """The rows at different places, [M, X]; as indexing, but its gradient is written once instead of added up."""
    return _Picked.apply(x_NX, places_M)  # pyright: ignore[reportReturnType]


def placed(x_MX: Tensor, places_M: Tensor, rows: int) -> Tensor:
    """So many rows of zeros with those of x at different places among them, [N, X]: the adjoint of `picked`."""
    return _Placed.apply(x_MX, places_M, rows)  # pyright: ignore[reportReturnType]


class _Picked(Function):
    @staticmethod
    def forward(ctx, x_NX, places_M):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.places_M, ctx.rows = places_M, x_NX.shape[0]
        return x_NX.index_select(0, places_M)

    @staticmethod
    def backward(ctx, gradient_MX):  # pyright: ignore[reportIncompatibleMethodOverride]
        return placed(gradient_MX, ctx.places_M, ctx.rows), None


class _Placed(Function):
    @staticmethod
    def forward(ctx, x_MX, places_M, rows):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.places_M = places_M
        return x_MX.new_zeros(rows, *x_MX.shape[1:]).index_copy_(0, places_M, x_MX)

    @staticmethod
    def backward(ctx, gradient_NX):  # pyright: ignore[reportIncompatibleMethodOverride]
        return picked(gradient_NX, ctx.places_M), None, None


def _counted(count_B: Tensor, starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For things that each of B has some of, one after another: whose each is, and its number, both [total]."""
    whose = torch.arange(len(count_B), device=count_B.device).repeat_interleave(count_B, output_size=total)
    return whose, torch.arange(total, device=count_B.device) - starts[whose]
