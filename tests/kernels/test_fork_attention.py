"""Attention of continuations to the window of their fork is windowed attention of each, gradients included."""

import pytest
import torch
from refine_kernels import fork_attention, window_attention
from refine_kernels.testing import assert_close, poisoned
from torch.autograd import gradcheck


def inputs(positions, N, K, *, T=20, H=2, D=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T + N)
    F, B = positions.numel(), len(positions)
    shapes = [(F, N * K, H, D)] * 3 + [(B, T, H, D)] * 2
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def continued(args, positions, **options):
    q, k, v, keys, values = args
    return fork_attention(q, k, v, keys, values, positions, **options)


def each_alone(args, positions, *, length, window):
    """Every continuation as a text of its own, read whole."""
    q, k, v, keys, values = args
    C, outputs = positions.shape[1], []
    for f, position in enumerate(positions.flatten().tolist()):
        text = slice(0, position + 1)
        for start in range(0, q.shape[1], length):
            own = slice(start, start + length)
            k_own = torch.cat((keys[f // C, text], k[f, own]))[None]
            v_own = torch.cat((values[f // C, text], v[f, own]))[None]
            outputs.append(window_attention(q[f : f + 1, own], k_own, v_own, window=window)[0])
    return torch.cat(outputs).view_as(q)


POSITIONS = torch.tensor([[-1, 0, 7, 7], [6, 19, 11, 3]])


@pytest.mark.parametrize("window", (1, 2, 6, 100))
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 5), (3, 4)])
def test_each_continuation_sees_its_window(N, K, window):
    args = inputs(POSITIONS, N, K)
    got = continued(args, POSITIONS, length=K, window=window)
    want = each_alone(args, POSITIONS, length=K, window=window)
    assert_close(got, want)
    slope = torch.randn_like(want)
    got_grads = torch.autograd.grad((got * slope).sum(), args)
    for name, a, b in zip("qkvKV", got_grads, torch.autograd.grad((want * slope).sum(), args), strict=True):
        assert_close(a, b, name)


def test_gradcheck():
    positions = torch.tensor([[0, 2]])
    args = inputs(positions, 2, 2, T=4, H=1, D=2)
    assert gradcheck(lambda *x: continued(x, positions, length=2, window=3), args)


def test_what_comes_after_the_fork_is_not_looked_at():
    positions = torch.tensor([[3, 9]])
    q, k, v, keys, values = (x.detach() for x in inputs(positions, 1, 3))
    want = fork_attention(q, k, v, keys, values, positions, length=3, window=6)
    keys[:, 10:], values[:, 10:] = torch.nan, torch.nan
    with poisoned():
        assert torch.equal(fork_attention(q, k, v, keys, values, positions, length=3, window=6), want)
