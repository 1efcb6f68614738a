"""What only a CUDA device runs: the delta rule and window attention against their references, forks included."""

from typing import Any

import pytest
import torch
from refine_kernels import Lookup, Packing, delta_rule, fla, window_attention
from refine_kernels.testing import assert_close, poisoned

pytestmark = pytest.mark.gpu


def draw(*shape, seed=0, dtype=torch.bfloat16):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.to("cuda", dtype)


def delta_inputs(B, T, G, H, K, V, decay) -> list[Any]:
    q, k = (torch.nn.functional.normalize(draw(B, T, G, K, seed=s).float(), dim=-1).bfloat16() for s in (0, 1))
    v, state = draw(B, T, H, V, seed=2), draw(B, H, K, V, seed=3, dtype=torch.float32) * 0.1
    beta = draw(B, T, H, seed=4).sigmoid()
    g = -draw(B, T, H, seed=5, dtype=torch.float32).abs() * 0.1 if decay else None
    return [x if x is None else x.requires_grad_() for x in (q, k, v, beta, state, g)]


@pytest.mark.parametrize("T", (1, 5, 63, 64, 100, 2000))
@pytest.mark.parametrize(("G", "H", "K", "V", "decay"), [(2, 2, 128, 128, False), (2, 4, 64, 128, True)])
def test_delta_rule(T, G, H, K, V, decay):
    args = delta_inputs(2, T, G, H, K, V, decay)
    if reason := fla.why_no_decay() if decay else fla.why_not():
        pytest.skip(reason)
    q, k, v, beta, state, g = args
    with poisoned():
        got = delta_rule(q, k, v, beta, state, g_BTH=g, boundaries=True, impl="fused")
    exact: list[Any] = [x if x is None else x.detach().double().requires_grad_() for x in args]
    want = delta_rule(*exact[:5], g_BTH=exact[5], boundaries=True, impl="reference")
    assert got.boundaries is not None and want.boundaries is not None
    # Gradients join at the last chunk, and twice at the first.
    chunks = Lookup(torch.tensor([0, 2 * want.boundaries.value.shape[1] - 1, 0], device="cuda"))
    start = draw(3, H, K, V, seed=7)
    pairs = [
        (got.outputs_BTHV, want.outputs_BTHV),
        (got.state_BHKV, want.state_BHKV),
        (got.boundaries.join(chunks, start), want.boundaries.join(chunks, start.double())),
        (got.boundaries.value, want.boundaries.value[:, :: got.stride // want.stride]),
    ]
    loss: Any = 0
    exact_loss: Any = 0
    for seed, (a, b) in enumerate(pairs):
        assert_close(a.bfloat16(), b, f"output {seed}")
        slope = draw(*a.shape, seed=seed)
        loss, exact_loss = loss + (a * slope).sum(), exact_loss + (b * slope.double()).sum()
    leaves, exact_leaves = [x for x in args if x is not None], [x for x in exact if x is not None]
    with poisoned():
        grads = torch.autograd.grad(loss, leaves)
    for name, a, b in zip(
        ["q", "k", "v", "beta", "state", "g"], grads, torch.autograd.grad(exact_loss, exact_leaves), strict=False
    ):
        assert_close(a.bfloat16(), b, f"gradient of {name}")


@pytest.mark.parametrize("lengths", [(1000, 1, 64, 129), (7, 20)], ids=str)
@pytest.mark.parametrize(("G", "H", "K", "V", "decay"), [(2, 2, 128, 128, False), (2, 4, 64, 128, True)])
def test_delta_rule_of_packed_texts_is_each_text_alone(lengths, G, H, K, V, decay):
    if reason := fla.why_no_decay() if decay else fla.why_not():
        pytest.skip(reason)
    packing = Packing(lengths, torch.tensor(lengths, device="cuda"), max(lengths))
    q, k, v, beta, _, g = delta_inputs(1, sum(lengths), G, H, K, V, decay)
    state = (draw(len(lengths), H, K, V, seed=3, dtype=torch.float32) * 0.1).requires_grad_()
    at_tokens = [q, k, v, beta, *([g] if decay else [])]
    starts = [draw(-(-n // 64), H, K, V, seed=7 + n) for n in lengths]  # a fork of every chunk

    def results(texts: list[Any]) -> list[Any]:
        parts = []
        for b, (rows, packing) in enumerate(texts):
            started = state if packing is not None else state[b : b + 1]
            q, k, v, beta, *g = rows
            g_BTH = g[0] if decay else None
            rule = delta_rule(q, k, v, beta, started, g_BTH=g_BTH, boundaries=True, packing=packing, impl="fused")
            assert rule.boundaries is not None
            start = torch.cat(starts) if packing is not None else starts[b]
            forks = rule.boundaries.join(Lookup(torch.arange(len(start), device="cuda")), start)
            parts.append((rule.outputs_BTHV[0], rule.state_BHKV, forks, rule.boundaries.value[0]))
        outputs = [torch.cat(part) for part in zip(*parts, strict=True)]
        loss: Any = sum((x * draw(*x.shape, seed=i)).sum() for i, x in enumerate(outputs))
        with poisoned():
            return [*outputs, *torch.autograd.grad(loss, [*at_tokens, state])]

    with poisoned():
        got = results([(at_tokens, packing)])
        pieces = zip(*(x.split(lengths, 1) for x in at_tokens), strict=True)
        want = results([(rows, None) for rows in pieces])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a.bfloat16(), b.bfloat16(), f"result {i}")


def test_a_few_tokens_without_gradient():
    *inputs, _ = delta_inputs(3, 7, 2, 2, 64, 64, False)
    with torch.no_grad():
        got, want = delta_rule(*inputs, impl="fused"), delta_rule(*(x.double() for x in inputs), impl="reference")
    assert_close(got.outputs_BTHV, want.outputs_BTHV)
    assert_close(got.state_BHKV, want.state_BHKV.float())


def held_to_the_reference(args: list[Any], **settings: Any) -> None:
    """Window attention, outputs and gradients, against the reference in float64."""
    got = window_attention(*args, **settings, impl="fused")
    exact = [x.detach().double().requires_grad_() for x in args]
    want = window_attention(*exact, **settings, impl="reference")
    assert_close(got, want)
    slope = draw(*got.shape, seed=9)
    grads = torch.autograd.grad((got * slope).sum(), args)
    wants = torch.autograd.grad((want * slope.double()).sum(), exact)
    for name, a, b in zip("qkv", grads, wants, strict=True):
        assert_close(a, b, f"gradient of {name}")


@pytest.mark.parametrize("window", (None, 16, 300))
@pytest.mark.parametrize(
    ("T", "S", "past"),
    [(1, 40, (3, 39)), (50, 70, (0, 20)), (200, 200, None), (333, 400, None), (200, 250, (50, 7)), (100, 300, (9, 9))],
)
@pytest.mark.parametrize("on_host", (False, True))
def test_window_attention(T, S, past, window, on_host):
    q, k, v = draw(2, T, 4, 64), draw(2, S, 2, 64, seed=1), draw(2, S, 2, 64, seed=2)
    args: list[Any] = [x.requires_grad_() for x in (q, k, v)]
    past_B = None if past is None else torch.tensor(past, device="cuda")
    held_to_the_reference(args, past_B=past_B, past=past if on_host else None, window=window)


@pytest.mark.parametrize("window", (None, 16, 300))
def test_window_attention_of_packed_texts(window):
    lengths = (1000, 1, 64, 129)
    M = sum(lengths)
    args: list[Any] = [draw(1, M, heads, 64, seed=i).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    packing = Packing(lengths, torch.tensor(lengths, device="cuda"), max(lengths) + 3)
    held_to_the_reference(args, window=window, packing=packing)
