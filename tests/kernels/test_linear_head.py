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
        got, entropy, *_ = linear_head(hidden, weight, labels, impl="reference")
        grads = torch.autograd.grad((got * slope).sum(), (hidden, weight))
    want, want_entropy, *_ = linear_head(hidden, weight, labels, impl="plain")
    want_grads = torch.autograd.grad((want * slope).sum(), (hidden, weight))
    assert_close(got, want)
    assert_close(entropy, want_entropy)
    for a, b in zip(grads, want_grads, strict=True):
        assert_close(a, b)
    assert not entropy.requires_grad


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
    known = linear_head(torch.zeros(3, 4), torch.randn(16, 4), torch.zeros(3, dtype=torch.int64))
    assert_close(known.entropies, torch.full((3,), 16.0).log())


@pytest.mark.parametrize("logits", (333, 1 << 24))
@pytest.mark.parametrize("later", (False, True), ids=("at once", "attached later"))
def test_gradients_made_ahead_are_those_of_any_multiple(tensors, monkeypatch, logits, later):
    monkeypatch.setattr(reference, "LOGITS", logits)
    hidden, weight, labels = tensors
    ahead = torch.arange(37) % 3 > 0
    with poisoned(), torch.set_grad_enabled(not later):
        known = linear_head(hidden, weight, labels, ahead_M=ahead)
    if later:
        assert not known.logprobs.requires_grad
        known = linear_head(hidden, weight, labels, known=known)
    want = linear_head(hidden, weight, labels, impl="plain")
    for a, b in zip(known[:3], want[:3], strict=True):
        assert_close(a, b)
    monkeypatch.setattr(reference.F, "linear", None)  # no logits are made again
    for factor in (-0.3, 0.0):
        losses = ((x.logprobs * ahead).sum() * factor for x in (known, want))
        grads, want_grads = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in losses)
        for a, b in zip(grads, want_grads, strict=True):
            assert_close(a, b)


def test_gradients_made_ahead_for_something_else_are_not_a_number(tensors):
    hidden, weight, labels = tensors
    known = linear_head(hidden, weight, labels, ahead_M=torch.ones(37))
    grads = torch.autograd.grad((known.logprobs[:36]).sum(), (hidden, weight))
    assert all(x.isnan().all() for x in grads)


def test_gradients_made_ahead_reach_parameters_wider_than_autocast(tensors):
    hidden, weight, labels = (x.detach().float() if x.is_floating_point() else x for x in tensors)
    grads = []
    for ahead in (torch.ones(37), None):
        a, b = (x.clone().requires_grad_() for x in (hidden, weight))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                known = linear_head(a, b, labels, ahead_M=ahead)
            known = linear_head(a, b, labels, known=known)
        grads.append(torch.autograd.grad(known.logprobs.sum() / 37, (a, b)))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        assert_close(a.bfloat16(), b)


def test_a_frozen_head_gets_no_gradient(tensors):
    hidden, weight, labels = tensors
    known = linear_head(hidden, weight.detach(), labels, ahead_M=torch.ones(37))
    assert known.ahead is not None and known.ahead.weight_VD is None
    (got,) = torch.autograd.grad(known.logprobs.sum(), hidden)
    (want,) = torch.autograd.grad(linear_head(hidden, weight, labels, impl="plain").logprobs.sum(), hidden)
    assert_close(got, want)
