"""The chunked delta rule means what its one-line definition says, gradients included, at awkward lengths."""

import pytest
import torch
from refine_kernels import delta_rule
from refine_kernels.choose import ImplementationError
from refine_kernels.testing import assert_close, poisoned
from torch.autograd import gradcheck

LENGTHS = (1, 2, 63, 64, 65, 100, 200)


def token_by_token(q, k, v, beta, state, scale):
    """The definition: one write and one read per token."""
    outputs, states = [], [state]
    for t in range(q.shape[1]):
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t] * beta[:, t, :, None], error)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        states.append(state)
    return torch.stack(outputs, 1), states


def inputs(T, *, B=2, H=2, K=8, V=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k = (torch.nn.functional.normalize(draw(B, T, H, K), dim=-1) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, draw(B, T, H, V), draw(B, T, H).sigmoid(), draw(B, H, K, V))]


@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_is_token_by_token_with_all_gradients(T):
    args = inputs(T)
    got = delta_rule(*args)
    want, states = token_by_token(*args, scale=8**-0.5)
    assert_close(got.outputs_BTHV, want)
    assert_close(got.state_BHKV, states[-1])
    weights = torch.randn_like(want), torch.randn_like(states[-1])

    def loss(outputs, state):
        return (outputs * weights[0]).sum() + (state * weights[1]).sum()

    got_grads = torch.autograd.grad(loss(got.outputs_BTHV, got.state_BHKV), args)
    want_grads = torch.autograd.grad(loss(want, states[-1]), args)
    for name, a, b in zip(["q", "k", "v", "beta", "state"], got_grads, want_grads, strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("T", (1, 64, 150))
def test_boundaries_are_the_states_on_the_grid(T):
    args = inputs(T)
    rule = delta_rule(*args, boundaries=True)
    _, states = token_by_token(*args, scale=1.0)
    grid = rule.boundaries_BGHKV
    assert grid is not None
    for g in range(grid.shape[1]):
        assert_close(grid[:, g], states[min(g * rule.stride, T)])


def test_gradcheck():
    args = inputs(5, B=1, H=1, K=3, V=2)
    assert gradcheck(lambda *x: tuple(part for part in delta_rule(*x, boundaries=True)[:3] if part is not None), args)


def test_a_pad_of_strength_zero_writes_nothing_whatever_it_holds():
    q, k, v, beta, state = inputs(100)
    rest = torch.ones(100, dtype=torch.bool)
    rest[70:] = False
    masked = delta_rule(q, k, v, beta * rest[None, :, None], state)
    alone = delta_rule(q[:, :70], k[:, :70], v[:, :70], beta[:, :70], state)
    assert_close(masked.state_BHKV, alone.state_BHKV)
    assert_close(masked.outputs_BTHV[:, :70], alone.outputs_BTHV)


def test_nothing_is_read_from_memory_that_was_not_written():
    args = inputs(100)
    want = delta_rule(*args)
    with poisoned():
        got = delta_rule(*args)
    assert torch.equal(got.outputs_BTHV, want.outputs_BTHV)


def test_bfloat16_inputs_keep_a_float32_state():
    args = [x.detach().bfloat16() for x in inputs(100)[:4]]
    rule = delta_rule(*args)
    assert rule.outputs_BTHV.dtype == torch.bfloat16
    assert rule.state_BHKV.dtype == torch.float32
    wide = delta_rule(*(x.double() for x in args))
    assert_close(rule.outputs_BTHV, wide.outputs_BTHV)


def test_a_forced_implementation_that_cannot_run_says_so(monkeypatch):
    args = inputs(3)
    with pytest.raises(ImplementationError, match="cannot run"):
        delta_rule(*args, impl="fused")
    monkeypatch.setenv("REFINE_KERNELS", "fused")
    with pytest.raises(ImplementationError, match="cannot run"):
        delta_rule(*args)
    monkeypatch.setenv("REFINE_KERNELS", "fast")
    with pytest.raises(ImplementationError, match="expected auto, reference or fused"):
        delta_rule(*args)
