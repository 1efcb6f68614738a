"""Windowed attention is a softmax over the visible keys, for every query by itself; gradients included."""

import pytest
import torch
from refine_kernels import Packing, window_attention
from refine_kernels.testing import assert_close, poisoned
from refine_kernels.window_attention import reference
from torch.autograd import gradcheck


def one_by_one(q, k, v, past, window, scale):
    """The definition, query by query."""
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    rows = []
    for b in range(B):
        first = 0 if past is None else S - T - int(past[b])
        for t in range(T):
            own = S - T + t
            seen = range(max(first, 0 if window is None else own - window + 1), own + 1)
            for h in range(H):
                g = h // (H // G)
                scores = torch.stack([q[b, t, h] @ k[b, s, g] for s in seen]) * scale
                rows.append(sum(p * v[b, s, g] for p, s in zip(scores.softmax(0), seen, strict=True)))
    return torch.stack(rows).view(B, T, H, -1)


def inputs(T, past=0, *, B=2, H=4, G=2, D=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T + past)
    shapes = (B, T, H, D), (B, past + T, G, D), (B, past + T, G, D)
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", (None, 1, 3, 100))
@pytest.mark.parametrize(
    ("T", "past", "real"), [(1, 0, None), (5, 0, None), (1, 4, (0, 3)), (7, 4, None), (7, 4, (4, 1))]
)
def test_each_query_sees_its_window(T, past, real, window, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 3)
    q, k, v = args = inputs(T, past)
    real_B = None if real is None else torch.tensor(real)
    got = window_attention(q, k, v, real_B, window=window)
    want = one_by_one(q, k, v, real_B, window, 0.5)
    assert_close(got, want)
    slope = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * slope).sum(), args)
    for name, a, b in zip("qkv", got_grads, torch.autograd.grad((want * slope).sum(), args), strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("window", (None, 3))
def test_packed_texts_are_each_text_alone(window):
    lengths = (5, 1, 9)
    args = inputs(sum(lengths), B=1)
    packing = Packing(lengths, torch.tensor(lengths), max(lengths))
    got = window_attention(*args, window=window, packing=packing)
    texts = zip(*(x.split(lengths, 1) for x in args), strict=True)
    want = torch.cat([one_by_one(q, k, v, None, window, 0.5) for q, k, v in texts], 1)
    assert_close(got, want)
    slope = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * slope).sum(), args)
    for name, a, b in zip("qkv", got_grads, torch.autograd.grad((want * slope).sum(), args), strict=True):
        assert_close(a, b, name)


def test_scale_is_of_the_scores():
    q, k, v = inputs(5)
    assert_close(window_attention(q, k, v, window=None, scale=2.0), one_by_one(q, k, v, None, None, 2.0))


def test_gradcheck():
    args = inputs(3, 2, B=1, H=2, G=1, D=2)
    assert gradcheck(lambda q, k, v: window_attention(q, k, v, torch.tensor([1]), window=2), args)


def test_history_that_is_not_real_does_not_matter():
    q, k, v = (x.detach() for x in inputs(4, 6))
    real_B = torch.tensor([2, 0])
    want = window_attention(q, k, v, real_B, window=8)
    for x in (k, v):
        x[0, :4], x[1, :6] = 1e6, -1e6
    assert torch.equal(window_attention(q, k, v, real_B, window=8), want)


def test_nothing_is_read_from_memory_that_was_not_written():
    args = inputs(300, 10)
    want = window_attention(*args, window=20)
    with poisoned():
        assert torch.equal(window_attention(*args, window=20), want)


def test_bfloat16_is_rounded_once():
    args = [x.detach().bfloat16() for x in inputs(40)]
    got = window_attention(*args, window=9)
    assert got.dtype == torch.bfloat16
    assert_close(got, window_attention(*(x.double() for x in args), window=9))
