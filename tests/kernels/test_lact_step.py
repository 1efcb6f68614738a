"""A step of LaCT reads what `lact` reads and leaves the token where `lact` leaves it, in place; so do its kernels.

On a CUDA device the kernels run there; elsewhere in Triton's interpreter, where Triton is installed.
"""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refine_kernels import lact_step
from refine_kernels.lact import Chunk, FastWeights, Place, lact, row_norms
from refine_kernels.lact.reference import map_chunk
from refine_kernels.testing import assert_close, poisoned, run_interpreted

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU and not INTERPRETED else "cpu"

B, H, L, BIAS = 4, 2, 5, -6.9
HELD = (0, 1, 3, 4)
SIZES = {
    # K, M, V, X
    "square": (8, 8, 8, 3),
    "wide": (20, 33, 20, 3),
    "narrow": (12, 5, 12, 36),
    "one": (1, 1, 1, 3),
    "several pieces": (130, 140, 130, 3),
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
with_and_without_momentum = pytest.mark.parametrize("momentum", (True, False))


def draw(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return x.to(DEVICE, dtype)


def inputs(sizes, momentum, dtype=torch.float64, weight_dtype=None) -> Any:
    """What `lact_step` takes, in its order; learning rates from next to none to what softplus leaves as it is."""
    K, M, V, X = sizes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    of = weight_dtype or dtype
    q, k = (F.normalize(draw(B, H, K, seed=i), dim=-1).to(dtype) for i in range(2))
    rates = (draw(B, H, X, seed=2) * 10).to(dtype)
    weights = tuple(draw(B, H, *shape, dtype=of, seed=3) for shape in ((M, K), (V, M), (M, K)))
    buffers = Chunk(
        draw(B, L, H, K, dtype=dtype, seed=4),
        draw(B, L, H, V, dtype=dtype, seed=5),
        draw(B, L, H, X, dtype=wide, seed=6),
        draw(B, L, H, dtype=dtype, seed=7) if momentum else None,
    )
    kept = draw(B, H, dtype=dtype, seed=8) if momentum else None
    held = torch.tensor(HELD, device=DEVICE)
    return [q, k, draw(B, H, V, dtype=dtype, seed=9), rates, kept, weights, buffers, held]


def copied(buffers):
    return map_chunk(torch.clone, buffers)


@each_size
@with_and_without_momentum
def test_a_step_is_a_reading_of_one_token(sizes, momentum):
    q, k, v, rates, kept, weights, buffers, _ = inputs(sizes, momentum)
    tokens = Chunk(
        k[:, None], v[:, None], F.softplus(rates + BIAS)[:, None], None if kept is None else kept.sigmoid()[:, None]
    )
    fast = FastWeights(weights, None, weights if momentum else None, row_norms(weights))
    # Some rows have had chunks before this one, whose place a token has to open.
    seen = tuple(n + L if n else 0 for n in HELD)
    place = Place(torch.tensor(seen, device=DEVICE), seen, None, (1,) * B)
    assert not any(place.ends(L))
    want = lact(q[:, None], tokens, fast, buffers, place, chunk_size=L)
    ours = copied(buffers)
    got = lact_step(q, k, v, rates, kept, weights, ours, place.held_B(L), rate_bias=BIAS)
    assert_close(got, want.outputs_BTHV[:, 0])
    pairs: Any = zip(ours, want.unfinished, strict=True)
    for a, b in pairs:
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_a_step_writes_one_place_of_each_row():
    given = inputs(SIZES["square"], True)
    buffers, held = given[6:]
    before: Any = copied(buffers)
    lact_step(*given, rate_bias=BIAS)
    there = torch.arange(L, device=DEVICE) == held[:, None]
    for was, now in zip(before, buffers, strict=True):
        assert torch.equal((was != now).flatten(2).any(2), there)
        assert torch.equal(was[~there], now[~there])


def test_which_rows_end_a_chunk_is_known_on_the_host():
    seen = (0, 1, L, L + 1, 2 * L - 1, 2 * L, 3 * L)
    place = Place(torch.tensor(seen), seen, None, (1,) * len(seen))
    assert place.held(L) == place.held_B(L).tolist() == [0, 1, L, 1, L - 1, L, L]
    assert place.ends(L) == [0, 0, 1, 0, 0, 1, 1]
    assert Place(torch.tensor([3]), [3], None, [2 * L]).ends(L) == [2]


if not (ON_GPU or INTERPRETED):

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_interpreted(__file__)

else:
    pytest.importorskip("triton")
    # The interpreter cuts numbers off where it should round them to bfloat16.
    NARROW = torch.bfloat16 if ON_GPU else torch.float16
    DTYPES = (torch.float32, torch.float32), (NARROW, NARROW), (NARROW, torch.float32)

    def check(given):
        """Outputs and buffers of the kernels against the reference in float64 on weights rounded to the dtype of q."""
        q, k, v, rates, kept, weights, buffers, held = given
        wanted: Any = map_chunk(torch.Tensor.double, copied(buffers))
        exact: Any = [x if x is None else x.double() for x in (q, k, v, rates, kept)]
        exact += [tuple(w.to(q.dtype).double() for w in weights), wanted, held]
        want = lact_step(*exact, rate_bias=BIAS, impl="reference")
        before = copied(buffers)
        with poisoned():
            got = lact_step(q, k, v, rates, kept, weights, buffers, held, rate_bias=BIAS, impl="fused")
        assert got.dtype == q.dtype
        assert_close(got, want)
        own = torch.arange(L, device=held.device) == held[:, None]
        each_of: Any = zip(buffers, wanted, before, strict=True)
        for i, (a, b, was) in enumerate(each_of):
            if a is not None:
                assert torch.equal(a[~own], was[~own]), i
                # Each entry by itself: small learning rates are beside large ones.
                worst = ((a[own].double() - b[own]).abs() / b[own].abs().clamp(min=1e-30)).max()
                assert worst < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[a.dtype], (i, worst)

    @each_size
    @with_and_without_momentum
    @pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=str)
    def test_the_kernels(sizes, momentum, dtype, weight_dtype):
        check(inputs(sizes, momentum, dtype, weight_dtype))

    @with_and_without_momentum
    def test_buffers_and_tokens_in_any_memory_order(momentum):
        """As the kernels of a reading leave them, head by head, and as a decoder copies them."""
        q, k, v, rates, kept, weights, buffers, held = inputs(SIZES["wide"], momentum, torch.float32)

        def by_head(x):
            return x.transpose(1, 2).contiguous().transpose(1, 2)

        q, k, v, rates = (by_head(x[:, None].expand(-1, 3, -1, -1))[:, 1] for x in (q, k, v, rates))
        buffers = map_chunk(by_head, buffers)
        assert not buffers.k_BLHK.is_contiguous()
        check([q, k, v, rates, kept, weights, buffers, held])

    def test_wide_weights_are_rounded_to_the_dtype_of_the_queries():
        given = inputs(SIZES["wide"], True, NARROW, torch.float32)
        wide = lact_step(*given, rate_bias=BIAS, impl="fused")
        given[5] = tuple(w.to(NARROW) for w in given[5])
        assert torch.equal(lact_step(*given, rate_bias=BIAS, impl="fused"), wide)

    def test_softplus_is_exact_for_every_learning_rate():
        given = inputs((4, 4, 4, 384), False, torch.float32)
        given[3] = torch.linspace(-60, 40, given[3].numel(), device=DEVICE).view_as(given[3])
        check(given)
