"""A step of windowed attention is attention to the longer window, and leaves the window one token further on."""

import pytest
import torch
from refine_kernels import window_step
from refine_kernels.testing import assert_close, poisoned


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(P, B=3, H=2, D=4):
    own = [draw(B, H, D, seed=i) for i in range(3)]
    return own, [draw(B, P, H * D, seed=3 + i) for i in range(2)]


@pytest.mark.parametrize("P", (0, 1, 5))
def test_a_step_is_a_softmax_over_the_real_window_and_the_token_itself(P):
    (q, k, v), (keys, values) = inputs(P)
    seen = (0, 3, 100)
    want = torch.empty_like(q)
    for b, n in enumerate(seen):
        for h in range(2):
            at = slice(4 * h, 4 * h + 4)
            all_k = torch.cat((keys[b, max(P - n, 0) :, at], k[b, h][None]))
            all_v = torch.cat((values[b, max(P - n, 0) :, at], v[b, h][None]))
            want[b, h] = (all_k @ q[b, h] / 2).softmax(0) @ all_v
    with poisoned():
        assert_close(window_step(q, k, v, keys, values, torch.tensor(seen)), want)


def test_the_window_moves_on_in_place():
    (q, k, v), (keys, values) = inputs(5)
    before = keys.clone(), values.clone()
    window_step(q, k, v, keys, values, torch.tensor((0, 3, 100)))
    for got, was, own in zip((keys, values), before, (k, v), strict=True):
        assert torch.equal(got, torch.cat((was[:, 1:], own.flatten(1)[:, None]), 1))


def test_scale_is_of_the_scores():
    (q, k, v), (keys, values) = inputs(5)
    seen, again = torch.tensor((5, 5, 5)), (keys.clone(), values.clone())
    assert_close(window_step(q, k, v, keys, values, seen, scale=1.0), window_step(2 * q, k, v, *again, seen))
