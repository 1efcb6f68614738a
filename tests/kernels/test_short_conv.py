"""The short convolution is torch's causal depthwise convolution, its activation and the norm of each head."""

import pytest
import torch
import torch.nn.functional as F
from refine_kernels import last_inputs, short_conv
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
