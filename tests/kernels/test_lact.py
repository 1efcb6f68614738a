"""LaCT means what its formulas say for each row by itself, wherever the rows stand in their chunks; and so do forks."""

import sys

import pytest
import torch
import torch.nn.functional as F
from refine_kernels.choose import ImplementationError
from refine_kernels.lact import Chunk, FastWeights, Place, lact, row_norms
from refine_kernels.lact.reference import apply, directions, map_chunk, map_weights, newton_schulz, update
from refine_kernels.testing import assert_close, poisoned
from torch.autograd import gradcheck

B, H, K, M, L = 3, 2, 4, 6, 5
LENGTHS = (1, 4, 5, 6, 11, 23)
OPTIONS = {
    "plain": {},
    "muon": {"muon": True},
    "joint": {"muon": True, "joint": True},
    "prenorm": {"main": True},
    "bare": {"momentum": False},
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three(make):
    return make(0), make(1), make(2)


def start(rows=B, *, main=False, momentum=True, **_):
    """The same initial weights in every row, as leaves."""
    w = three(lambda i: draw(1, H, *((K, M) if i == 1 else (M, K)), seed=i).requires_grad_())
    rows_w = three(lambda i: w[i].expand(rows, -1, -1, -1))
    all_norms = row_norms(w)
    norms = three(lambda i: all_norms[i].expand(rows, -1, -1, -1))
    zeros = three(lambda i: torch.zeros_like(rows_w[i]))
    return w, FastWeights(rows_w, rows_w if main else None, zeros if momentum else None, norms)


def text(T, rows=B, *, momentum=True, **_):
    """Queries and tokens, as leaves."""
    q, k = (F.normalize(draw(rows, T, H, K, seed=seed), dim=-1) for seed in (3, 4))
    kept = draw(rows, T, H, seed=7).sigmoid() if momentum else None
    tokens = Chunk(k, draw(rows, T, H, K, seed=5), draw(rows, T, H, 3, seed=6).exp(), kept)
    return q.requires_grad_(), map_chunk(torch.Tensor.requires_grad_, tokens)


def read(q, tokens, fast, unfinished=None, seen=(0,) * B, lengths=None, *, muon=False, joint=False, **_):
    place = Place(
        torch.tensor(seen),
        seen,
        None if lengths is None else torch.tensor(lengths),
        (q.shape[1],) * len(seen) if lengths is None else lengths,
    )
    return lact(q, tokens, fast, unfinished, place, chunk_size=L, muon=muon, joint=joint, boundaries=True)


def by_the_formulas(q, tokens, w, *, main=False, momentum=True, muon=False, joint=False):
    """One row and head of the definition: outputs [T, V] and the weights at the end."""
    norms = [x.norm(dim=1, keepdim=True) for x in w]
    used, held, last = list(w), list(w), [torch.zeros_like(x) for x in w]
    outputs = []
    for t in range(len(q)):
        if t and t % L == 0:
            steps = [torch.zeros_like(x) for x in w]
            for s in range(t - L, t):
                k, v, rate = tokens.k_BLHK[s], tokens.v_BLHV[s], tokens.rates_BLHX[s]
                loss = (used[1] @ (F.silu(used[0] @ k) * (used[2] @ k))) @ v
                slopes = torch.autograd.grad(loss, used, create_graph=True)
                steps = [d + r * slope for d, r, slope in zip(steps, rate, slopes, strict=True)]
            if momentum:
                kept = tokens.momentum_BLH[t - L : t].mean()
                last = steps = [d + kept * m for d, m in zip(steps, last, strict=True)]
            if muon and joint:
                both = newton_schulz(torch.cat((steps[0], steps[2])))
                steps = [both[:M], newton_schulz(steps[1]), both[M:]]
            elif muon:
                steps = [newton_schulz(d) for d in steps]
            held = [x + d for x, d in zip(held if main else used, steps, strict=True)]
            used = [x / (x.norm(dim=1, keepdim=True) + 1e-5) * n for x, n in zip(held, norms, strict=True)]
        outputs.append(used[1] @ (F.silu(used[0] @ q[t]) * (used[2] @ q[t])))
    return torch.stack(outputs), used


def naive(q, tokens, w, lengths=None, **options):
    """Outputs and final weights of every row and head."""
    outputs, weights = [], []
    for b in range(q.shape[0]):
        n = q.shape[1] if lengths is None else lengths[b]
        for h in range(H):
            mine = map_chunk(lambda x, b=b, n=n, h=h: x[b, :n, h], tokens)
            o, used = by_the_formulas(q[b, :n, h], mine, [x[0, h] for x in w], **options)
            outputs.append(F.pad(o, (0, 0, 0, q.shape[1] - n)))
            weights.append(used)
    o = torch.stack(outputs).unflatten(0, (-1, H)).transpose(1, 2)
    return o, tuple(torch.stack([x[i] for x in weights]).unflatten(0, (-1, H)) for i in range(3))


def leaves(q, tokens, w):
    return [q, *(x for x in tokens if x is not None), *w]


def same_with_gradients(got, want, inputs):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"result {i}")
    slopes = [draw(*x.shape, seed=20 + i) for i, x in enumerate(want)]
    grads = []
    for results in (got, want):
        loss = torch.stack([(x * slope).sum() for x, slope in zip(results, slopes, strict=True)]).sum()
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True, retain_graph=True))
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_close(a, b, f"gradient {i}")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_are_the_formulas_with_all_gradients(T, options):
    w, fast = start(**options)
    q, tokens = text(T, **options)
    got = read(q, tokens, fast, **options)
    o, weights = naive(q, tokens, w, **options)
    same_with_gradients((got.outputs_BTHV, *got.fast.weights), (o, *weights), leaves(q, tokens, w))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_at_different_places_of_their_chunks_are_rows_alone(options):
    first, second = (3, 5, 12), (9, 4, 13)
    w, fast = start(**options)
    q, tokens = text(max(f + s for f, s in zip(first, second, strict=True)), **options)
    total = tuple(f + s for f, s in zip(first, second, strict=True))
    half = read(q, tokens, fast, lengths=first, **options)

    def rest(x):
        places_BT = torch.tensor(first)[:, None] + torch.arange(max(second))
        return x[torch.arange(B)[:, None], places_BT.clamp(max=x.shape[1] - 1)]

    later = map_chunk(rest, tokens)
    got = read(rest(q), later, half.fast, half.unfinished, first, lengths=second, **options)
    o, weights = naive(q, tokens, w, total, **options)
    outputs = [[got.outputs_BTHV[b, :s], o[b, f : f + s]] for b, (f, s) in enumerate(zip(first, second, strict=True))]
    same_with_gradients(
        (*(a for a, _ in outputs), *got.fast.weights), (*(b for _, b in outputs), *weights), leaves(q, tokens, w)
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_state_at_any_position_is_the_state_after_reading_so_far(options):
    seen, T = (0, 4, 5), 12
    _, fast = start(**options)
    q, tokens = text(5 + T, **options)
    before = read(q, tokens, fast, lengths=(1, 4, 5), **options)
    begun_B = torch.tensor(seen) > 0
    unfinished = map_chunk(lambda x: x * begun_B.view(B, *[1] * (x.dim() - 1)), before.unfinished)
    q, tokens = q[:, 5:], map_chunk(lambda x: x[:, 5:], tokens)
    reading = read(q, tokens, fast, unfinished, seen, **options)
    weights, rest = reading.state_at(torch.arange(-1, T).expand(B, -1))
    for p in range(-1, T):
        want_fast, want_rest = fast, unfinished
        if p >= 0:
            prefix = read(q, tokens, fast, unfinished, seen, (p + 1,) * B, **options)
            want_fast, want_rest = prefix.fast, prefix.unfinished
        rows = torch.arange(B) * (T + 1) + p + 1
        for got_part, want_part in zip(weights, want_fast, strict=True):
            for a, b in zip(got_part or (), want_part or (), strict=True):
                assert_close(a[rows], b)
        for a, b in zip(rest, want_rest, strict=True):
            if a is None or b is None:
                assert a is b
            else:
                assert_close(a[rows], b)


def test_directions_are_the_gradient_of_the_inner_product_with_the_values():
    w, fast = start(rows=1)
    _, tokens = text(L, rows=1)
    ones = tokens._replace(rates_BLHX=torch.ones(1, L, H, 3, dtype=torch.float64))
    want = torch.autograd.grad((apply(fast.weights, tokens.k_BLHK) * tokens.v_BLHV).sum(), w)
    for got, d in zip(directions(fast.weights, ones), want, strict=True):
        assert_close(got, d)


def test_learning_rates_may_differ_between_channels():
    w = three(lambda i: draw(1, H, K, K, seed=i))
    _, tokens = text(L, rows=1)
    rates = draw(1, L, H, 3 * K, seed=9).exp()
    wide = tokens._replace(rates_BLHX=rates)
    d0, d1, d2 = directions(w, wide)
    for channel in range(K):  # one rate for all channels gives each channel's column
        one = tokens._replace(rates_BLHX=rates.unflatten(-1, (3, K))[..., channel])
        for got, want in zip((d0, d1, d2), directions(w, one), strict=True):
            assert_close(got[..., channel], want[..., channel])


@pytest.mark.parametrize("shape", ((6, 6), (4, 9), (9, 4)))
def test_newton_schulz_keeps_directions_and_makes_singular_values_about_one(shape):
    x = draw(3, *shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    y = newton_schulz(x)
    after = torch.linalg.svdvals(y)
    large = s > 0.003 * torch.linalg.matrix_norm(x)[:, None]
    assert large.sum() > 10
    assert float(after[large].min()) > 0.97 and float(after.max()) < 1.15
    turned = u.mT @ y @ vh.mT
    assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)))
    assert float((newton_schulz(5 * x) - y).abs().max()) < 1e-6  # a small number guards against zeros


@pytest.mark.parametrize("joint", (False, True))
@torch.no_grad()
def test_every_update_keeps_the_norms_of_rows(joint):
    _, fast = start()
    _, tokens = text(L)
    after = update(fast, tokens, muon=True, joint=joint)
    for got, want in zip(row_norms(after.weights), fast.norms, strict=True):
        assert float((got / want - 1).abs().max()) < 1e-4  # but for the published epsilon


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    _, fast = start(1, **options)
    q, tokens = text(L + 2, 1, **options)
    fast = map_weights(torch.Tensor.detach, fast)
    w = three(lambda i: fast.weights[i].clone().requires_grad_())

    def outputs(q, w0, w1, w2, k, v, rates, kept=None):
        started = fast._replace(weights=(w0, w1, w2), main=None if fast.main is None else (w0, w1, w2))
        return read(q, Chunk(k, v, rates, kept), started, seen=(0,), **options).outputs_BTHV

    assert gradcheck(outputs, (q, *w, *(x for x in tokens if x is not None)), fast_mode=True)


def test_padding_of_any_content_changes_nothing():
    _, fast = start()
    q, tokens = text(13)
    lengths = (13, 6, 5)
    want = read(q, tokens, fast, lengths=lengths)
    padding = torch.arange(13) >= torch.tensor(lengths)[:, None]
    noisy = map_chunk(lambda x: torch.where(padding.view(B, 13, *[1] * (x.dim() - 2)), 1e3, x), tokens)
    got = read(q, noisy, fast, lengths=lengths)
    for a, b in zip((*got.fast.weights, *got.unfinished), (*want.fast.weights, *want.unfinished), strict=True):
        assert a is not None and b is not None
        assert torch.equal(a, b)


def test_no_update_is_computed_where_no_chunk_ends(monkeypatch):
    _, fast = start()
    q, tokens = text(L)
    before = read(q, tokens, fast)
    monkeypatch.setattr(sys.modules["refine_kernels.lact.reference"], "update", None)
    one = map_chunk(lambda x: x[:, :1], tokens)
    read(q, tokens, fast)
    read(q[:, :1], one, fast, before.unfinished, (6, 8, 9))
    with pytest.raises(TypeError):
        read(q[:, :1], one, fast, before.unfinished, (6, 8, 10))


def test_nothing_is_read_from_memory_that_was_not_written():
    _, fast = start()
    q, tokens = text(13)
    want = read(q, tokens, fast, lengths=(13, 6, 5), muon=True)
    with poisoned():
        got = read(q, tokens, fast, lengths=(13, 6, 5), muon=True)
    assert torch.equal(got.outputs_BTHV[0], want.outputs_BTHV[0])


@torch.no_grad()
def test_bfloat16_tokens_may_meet_float32_weights():
    _, fast = start()
    q, tokens = text(13)
    wide = read(q, tokens, fast)
    narrow = map_weights(torch.Tensor.float, fast)
    bf16 = map_chunk(torch.Tensor.bfloat16, tokens)._replace(rates_BLHX=tokens.rates_BLHX.float())
    got = read(q.bfloat16(), bf16, narrow)
    assert got.outputs_BTHV.dtype == torch.bfloat16
    assert got.fast.weights[0].dtype == torch.float32
    error = (got.outputs_BTHV.double() - wide.outputs_BTHV).norm() / wide.outputs_BTHV.norm()
    assert float(error) < 3e-2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"main": True}, "before their norm is restored"),
        ({"muon": True, "joint": True}, "as one matrix"),
        ({}, "not square"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_where_they_are_forced(options, why, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("REFINE_KERNELS", "fused")
    _, fast = start(**options)
    q, tokens = text(L, **options)
    with pytest.raises(ImplementationError, match=why):
        read(q, tokens, fast, **options)


def test_no_row_is_computed_for_the_sake_of_another(monkeypatch):
    _, fast = start()
    q, tokens = text(13)
    applied, updated = [], []
    ops = sys.modules["refine_kernels.lact.reference"]
    monkeypatch.setattr(ops, "apply", lambda weights, x: applied.append(x.shape[:2].numel()) or apply(weights, x))
    monkeypatch.setattr(
        ops, "update", lambda fast, *rest, **how: updated.append(len(fast.norms[0])) or update(fast, *rest, **how)
    )
    read(q, tokens, fast, lengths=(13, 6, 5))
    assert updated == [2, 1]
    assert applied == [3 * L, 2 * L, 3]
