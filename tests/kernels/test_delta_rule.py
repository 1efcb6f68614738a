"""The chunked delta rule means what its one-line definition says, gradients included, at awkward lengths."""

import pytest
import torch
from refine_kernels import Lookup, Packing, delta_rule
from refine_kernels.choose import ImplementationError
from refine_kernels.delta_rule import reference
from refine_kernels.testing import assert_close, poisoned
from torch.autograd import gradcheck

LENGTHS = (1, 2, 63, 64, 65, 100, 200)
NAMES = ("q", "k", "v", "beta", "state", "g")
KINDS = {"plain": {}, "fading": {"fading": True}, "grouped": {"fading": True, "H": 4}, "grouped plain": {"H": 4}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def token_by_token(q, k, v, beta, state, g=None, *, scale=1.0):
    """The definition: forget, one write and one read per token."""
    outputs, states = [], [state]
    groups = v.shape[2] // k.shape[2]
    q, k = (torch.stack([x[:, :, h // groups] for h in range(v.shape[2])], 2) for x in (q, k))
    for t in range(q.shape[1]):
        if g is not None:
            state = g[:, t, :, None, None].exp() * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t] * beta[:, t, :, None], error)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        states.append(state)
    return torch.stack(outputs, 1), states


def inputs(T, *, B=2, G=2, H=2, K=8, V=6, fading=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k = (torch.nn.functional.normalize(draw(B, T, G, K), dim=-1) for _ in range(2))
    made = [q, k, draw(B, T, H, V), draw(B, T, H).sigmoid(), draw(B, H, K, V)]
    if fading:
        made.append(-torch.nn.functional.softplus(draw(B, T, H)))
    return [x.requires_grad_() for x in made]


def run(args, **settings):
    return delta_rule(*args[:5], g_BTH=args[5] if len(args) > 5 else None, **settings)


@each_kind
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_is_token_by_token_with_all_gradients(T, kind):
    args = inputs(T, **KINDS[kind])
    got = run(args)
    want, states = token_by_token(*args, scale=8**-0.5)
    assert_close(got.outputs_BTHV, want)
    assert_close(got.state_BHKV, states[-1])
    weights = torch.randn_like(want), torch.randn_like(states[-1])

    def loss(outputs, state):
        return (outputs * weights[0]).sum() + (state * weights[1]).sum()

    got_grads = torch.autograd.grad(loss(got.outputs_BTHV, got.state_BHKV), args)
    want_grads = torch.autograd.grad(loss(want, states[-1]), args)
    for name, a, b in zip(NAMES, got_grads, want_grads, strict=False):
        assert_close(a, b, name)


@each_kind
@pytest.mark.parametrize("T", (1, 64, 150))
def test_boundaries_are_the_states_on_the_grid(T, kind):
    args = inputs(T, **KINDS[kind])
    rule = run(args, boundaries=True)
    _, states = token_by_token(*args)
    assert rule.boundaries is not None
    grid = rule.boundaries.value
    for n in range(grid.shape[1]):
        assert_close(grid[:, n], states[min(n * rule.stride, T)])


@each_kind
@pytest.mark.parametrize(("T", "stride"), [(64, 64), (150, 128), (300, 192)])
def test_few_states_are_kept_of_long_texts_and_gradients_join_at_every_chunk(T, stride, kind, monkeypatch):
    args = inputs(T, **KINDS[kind])
    whole = run(args, boundaries=True)
    monkeypatch.setattr(reference, "KEPT", 2)
    rule = run(args, boundaries=True)
    every, few = whole.boundaries, rule.boundaries
    assert every is not None and few is not None and (rule.stride, rule.chunk) == (stride, 64)
    assert torch.equal(few.value, every.value[:, :: stride // 64])
    chunks = Lookup(torch.arange(every.value.shape[:2].numel()))
    want = every.pick(chunks)
    got = few.join(chunks, want.detach())
    slope = torch.randn_like(want)
    grads, wants = (
        torch.autograd.grad((x * slope).sum() + each.outputs_BTHV.sum(), args)
        for x, each in ((got, rule), (want, whole))
    )
    for name, a, b in zip(NAMES, grads, wants, strict=False):
        assert torch.equal(a, b), name


@each_kind
def test_gradcheck(kind):
    args = inputs(5, **{"B": 1, "G": 1, "K": 3, "V": 2, **KINDS[kind], "H": 2})
    twice = Lookup(torch.tensor([0, 0]))

    def outputs(*x):
        rule = run(x, boundaries=True)
        assert rule.boundaries is not None
        return rule.outputs_BTHV, rule.state_BHKV, rule.boundaries.pick(twice)

    assert gradcheck(outputs, args)


def test_no_decay_is_a_decay_of_one():
    args = inputs(100)
    got, want = delta_rule(*args, g_BTH=torch.zeros(2, 100, 2, dtype=torch.float64)), delta_rule(*args)
    assert_close(got.outputs_BTHV, want.outputs_BTHV)
    assert_close(got.state_BHKV, want.state_BHKV)


@pytest.mark.parametrize("g", (-20.0, -1e4))
def test_a_memory_that_fades_at_once_overflows_nowhere(g):
    """Over a chunk the log decays add up to far below what an exponential can hold, in either direction."""
    args = inputs(130, fading=True, dtype=torch.float32)
    args[5] = torch.full_like(args[5], g).requires_grad_()
    got = run(args, boundaries=True)
    wide = [x.detach().double().requires_grad_() for x in args]
    want, states = token_by_token(*wide, scale=8**-0.5)
    assert_close(got.outputs_BTHV, want)
    assert_close(got.state_BHKV, states[-1])
    grads = torch.autograd.grad(got.outputs_BTHV.square().sum() + got.state_BHKV.sum(), args)
    want_grads = torch.autograd.grad(want.square().sum() + states[-1].sum(), wide)
    for name, a, b in zip(NAMES[:4], grads, want_grads, strict=False):
        assert_close(a, b, name)
    assert all(x.isfinite().all() for x in grads)


@each_kind
def test_a_pad_of_strength_zero_writes_nothing_whatever_it_holds(kind):
    args = inputs(100, **KINDS[kind])
    rest = torch.ones(100, 1, dtype=torch.bool)
    rest[70:] = False
    masked = run([*args[:3], args[3] * rest, args[4], *(g * rest for g in args[5:])])
    alone = run([*(x[:, :70] for x in args[:4]), args[4], *(g[:, :70] for g in args[5:])])
    assert_close(masked.state_BHKV, alone.state_BHKV)
    assert_close(masked.outputs_BTHV[:, :70], alone.outputs_BTHV)


@each_kind
@pytest.mark.parametrize("lengths", [(100, 1, 64, 130), (3, 1), (40, 40)], ids=str)
def test_packed_texts_are_each_text_alone(lengths, kind):
    texts = [inputs(T, **{**KINDS[kind], "B": 1}) for T in lengths]
    at_tokens = [torch.cat([text[i] for text in texts], 1).detach().requires_grad_() for i in (0, 1, 2, 3)]
    states = torch.cat([text[4] for text in texts]).detach().requires_grad_()
    decays = [torch.cat([text[5] for text in texts], 1).detach().requires_grad_()] if len(texts[0]) > 5 else []
    packing = Packing(lengths, torch.tensor(lengths), max(lengths) + 2)
    whole = [*at_tokens, states, *decays]
    got = run(whole, boundaries=True, packing=packing)
    want = [run(text, boundaries=True) for text in texts]
    alone = [rule.boundaries for rule in want if rule.boundaries is not None]
    grid = torch.cat([tap.value for tap in alone], 1)
    assert got.boundaries is not None and len(alone) == len(texts)
    assert got.boundaries.value.shape == grid.shape and len(packing.pieces(got.stride).index_N2) == grid.shape[1]
    # Every state of the grid is asked for, the first one twice.
    every = torch.tensor([*range(grid.shape[1]), 0])
    picked = [tap.pick(Lookup(torch.arange(tap.value.shape[1]))) for tap in alone]
    pairs = [
        (got.outputs_BTHV, torch.cat([rule.outputs_BTHV for rule in want], 1)),
        (got.state_BHKV, torch.cat([rule.state_BHKV for rule in want])),
        (got.boundaries.pick(Lookup(every)), torch.cat([*picked, picked[0][:1]])),
    ]
    losses = [torch.zeros((), dtype=torch.float64)] * 2
    for a, b in pairs:
        assert_close(a, b)
        slope = torch.randn_like(a)
        losses = [loss + (x * slope).sum() for loss, x in zip(losses, (a, b), strict=True)]
    grads = torch.autograd.grad(losses[0], whole)
    wants = torch.autograd.grad(losses[1], [x for text in texts for x in text])
    for i, (name, grad) in enumerate(zip(NAMES, grads, strict=False)):
        assert_close(grad, torch.cat(wants[i :: len(whole)], 0 if name == "state" else 1), name)


@each_kind
def test_nothing_is_read_from_memory_that_was_not_written(kind):
    args = inputs(100, **KINDS[kind])
    want = run(args)
    with poisoned():
        got = run(args)
    assert torch.equal(got.outputs_BTHV, want.outputs_BTHV)


@each_kind
@pytest.mark.parametrize("T", (1, 100))
def test_bfloat16_inputs_keep_a_float32_state(T, kind):
    args = [x.detach().bfloat16() for x in inputs(T, **KINDS[kind])]
    args[4:] = [x.float() for x in args[4:]]
    rule = run(args)
    assert rule.outputs_BTHV.dtype == torch.bfloat16
    assert rule.state_BHKV.dtype == torch.float32
    wide = run([x.double() for x in args])
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
