"""The short convolution is torch's causal depthwise convolution followed by silu."""

import pytest
import torch
import torch.nn.functional as F
from refine_kernels import short_conv
from refine_kernels.testing import assert_close


@pytest.mark.parametrize("T", (1, 2, 3, 10))
@pytest.mark.parametrize("W", (1, 2, 4))
def test_it_is_a_causal_depthwise_convolution(T, W):
    x = torch.randn(2, T, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, W, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, W - 1, 5, dtype=torch.float64, requires_grad=True)
    got, inputs = short_conv(x, weight, before)
    padded = torch.cat((before, x), 1).transpose(1, 2)
    want = F.silu(F.conv1d(padded, weight[:, None], groups=5)).transpose(1, 2)
    assert_close(got, want)
    assert_close(inputs, torch.cat((before, x), 1))
    slope = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * slope).sum(), (x, weight, before), allow_unused=True),
        torch.autograd.grad((want * slope).sum(), (x, weight, before), allow_unused=True),
        strict=True,
    ):
        assert_close(a, b)
