"""The short convolution is torch's causal depthwise convolution, its activation and the norm of each head."""

import pytest
import torch
import torch.nn.functional as F
from refine_kernels import Packing, last_inputs, short_conv
from refine_kernels.testing import assert_close


@pytest.mark.parametrize("T", (1, 2, 3, 10))
@pytest.mark.parametrize("W", (1, 2, 4))
@pytest.mark.parametrize(("silu", "unit_heads", "biased"), [(True, None, False), (False, 2, True), (True, 3, True)])
def test_it_is_a_causal_depthwise_convolution(T, W, silu, unit_heads, biased):
    x = torch.randn(2, T, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, W, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, W - 1, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True) if biased else None
    got = short_conv(x, weight, before, bias_D=bias, silu=silu, unit_heads=unit_heads)
    padded = torch.cat((before, x), 1).transpose(1, 2)
    want = F.conv1d(padded, weight[:, None], bias, groups=6).transpose(1, 2)
    want = F.silu(want) if silu else want
    if unit_heads is not None:
        heads = want.unflatten(-1, (unit_heads, -1))
        want = (heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)
    assert_close(got, want)
    slope = torch.randn_like(want)
    inputs = [x, weight, before, *([bias] if biased else [])]
    for a, b in zip(
        torch.autograd.grad((got * slope).sum(), inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((want * slope).sum(), inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("W", (1, 2, 4))
@pytest.mark.parametrize("T", (1, 2, 9))
def test_its_state_at_a_position_continues_the_text(W, T):
    x, before = torch.randn(2, T, 3, dtype=torch.float64), torch.randn(2, W - 1, 3, dtype=torch.float64)
    whole = torch.cat((before, x), 1)
    positions = torch.tensor([[-1, 0, T - 1], [T // 2, T - 1, 0]])
    for given, text in ((before, whole), (None, torch.cat((torch.zeros_like(before), x), 1))):
        got = last_inputs(x, given, positions, W).view(2, 3, W - 1, 3)
        for b in range(2):
            for c, p in enumerate(positions[b].tolist()):
                assert torch.equal(got[b, c], text[b, p + 1 : p + W])


@pytest.mark.parametrize("W", (1, 2, 4))
@pytest.mark.parametrize("started", (False, True))
def test_packed_texts_are_each_text_alone(W, started):
    lengths = (9, 1, 2, 5)
    texts = [torch.randn(1, T, 6, dtype=torch.float64) for T in lengths]
    x = torch.cat(texts, 1)
    weight, before = torch.randn(6, W, dtype=torch.float64), torch.randn(4, W - 1, 6, dtype=torch.float64)
    packing = Packing(lengths, torch.tensor(lengths), 9)
    positions = torch.tensor([[-1, 8, 4], [0, -1, 0], [1, 0, 1], [4, 3, 2]])
    given = [before[b : b + 1] if started else None for b in range(4)]
    whole = before if started else None
    got = short_conv(x, weight, whole, unit_heads=2, packing=packing)
    assert_close(got, torch.cat([short_conv(t, weight, g, unit_heads=2) for t, g in zip(texts, given, strict=True)], 1))
    for at in (positions, None):
        alone = [last_inputs(text, given[b], None if at is None else at[b : b + 1], W) for b, text in enumerate(texts)]
        assert torch.equal(last_inputs(x, whole, at, W, packing), torch.cat(alone))
