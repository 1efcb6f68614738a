"""Packing: the real tokens of padded rows in one row and back, and pieces of each text; with its gradients."""

import pytest
import torch
from refine_kernels import Packing, picked, placed
from refine_kernels.packing import neighbours
from refine_kernels.testing import assert_close
from torch.autograd import gradcheck

LENGTHS = (3, 1, 5, 0, 4)


@pytest.fixture
def packing():
    return Packing(LENGTHS, torch.tensor(LENGTHS), 6)


@pytest.mark.parametrize("trailing", ((), (2,), (2, 3)), ids=str)
def test_packed_are_the_real_tokens_and_spread_puts_them_back(packing, trailing):
    x = torch.randn(5, 6, *trailing)
    want = torch.cat([row[:n] for row, n in zip(x, LENGTHS, strict=True)])[None]
    got = packing.pack(x)
    assert torch.equal(got, want)
    rows = packing.spread(got)
    assert rows.shape == x.shape
    for row, original, n in zip(rows, x, LENGTHS, strict=True):
        assert torch.equal(row[:n], original[:n]) and not row[n:].any()


def test_padding_is_not_looked_at(packing):
    x = torch.full((5, 6, 2), torch.nan)
    x[0, :3] = x[1, :1] = x[2, :5] = x[4, :4] = 1.0
    assert (packing.pack(x) == 1).all()


def test_each_is_the_gradient_of_the_other(packing):
    x = torch.randn(5, 6, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 13, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(packing.pack, (x,)) and gradcheck(packing.spread, (y,))
    assert_close((packing.pack(x) * y).sum(), (x * packing.spread(y)).sum())
    places = torch.tensor([4, 0, 2])
    rows = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(picked(rows, places), rows[places])
    assert torch.equal(placed(rows[places], places, 5)[places], rows[places])


@pytest.mark.parametrize(("size", "more"), [(2, 0), (64, 0), (1, 0), (2, 3)])
def test_pieces_cover_each_text_in_order(packing, size, more):
    pieces = packing.pieces(size, more)
    want = [[b, n] for b, length in enumerate(LENGTHS) for n in range(-(-(length + more) // size))]
    assert pieces.index_N2.tolist() == want
    assert pieces.starts.tolist() == [sum(text < b for text, _ in want) for b in range(6)]


def test_nothing_is_asked_of_the_device():
    """Tensors without values would raise where Python needs one."""
    packing = Packing(LENGTHS, torch.tensor(LENGTHS, device="meta"), 6)
    x = torch.empty(5, 6, 2, device="meta")
    assert packing.spread(packing.pack(x)).shape == x.shape
    assert packing.pieces(2).index_N2.shape == (8, 2)


def test_neighbours_are_rows_of_one_kind_side_by_side():
    assert list(neighbours([5, 5, 3, 5])) == [(slice(0, 2), 5), (slice(2, 3), 3), (slice(3, 4), 5)]
    assert list(neighbours([])) == []
