"""The linear head without stored logits gives what the plain one gives."""

import pytest
import torch
from refine_kernels import linear_head
from refine_kernels.linear_head import reference
from refine_kernels.testing import assert_close, poisoned


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64).requires_grad_()
    return hidden, weight, torch.randint(50, (37,), generator=generator)


@pytest.mark.parametrize("logits", (1, 50, 333, 1 << 24))
def test_reference_is_plain_whatever_the_size_of_a_piece(tensors, monkeypatch, logits):
    monkeypatch.setattr(reference, "LOGITS", logits)
    hidden, weight, labels = tensors
    slope = torch.randn(37, dtype=torch.float64)
    with poisoned():
        got, entropy, _ = linear_head(hidden, weight, labels, impl="reference")
        grads = torch.autograd.grad((got * slope).sum(), (hidden, weight))
    want, want_entropy, _ = linear_head(hidden, weight, labels, impl="plain")
    want_grads = torch.autograd.grad((want * slope).sum(), (hidden, weight))
    assert_close(got, want)
    assert_close(entropy, want_entropy)
    for a, b in zip(grads, want_grads, strict=True):
        assert_close(a, b)
    assert not entropy.requires_grad


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
    _, entropy, _ = linear_head(torch.zeros(3, 4), torch.randn(16, 4), torch.zeros(3, dtype=torch.int64))
    assert_close(entropy, torch.full((3,), 16.0).log())
