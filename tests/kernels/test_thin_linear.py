"""Linear maps of a few rows are torch's, alone, together and gated; the Triton kernel computes the same on any size.

On a CUDA device the kernel runs there; elsewhere in Triton's interpreter, where Triton is installed.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from refine_kernels import thin_linear, thin_linears, thin_swiglu
from refine_kernels.choose import ImplementationError
from refine_kernels.testing import assert_close, poisoned, run_interpreted

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU and not INTERPRETED else "cpu"


def draw(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return x.to(DEVICE, dtype)


def test_a_thin_linear_map_is_a_linear_map():
    x, weight, bias = draw(2, 3, 7), draw(5, 7), draw(5)
    assert torch.equal(thin_linear(x, weight, impl="reference"), F.linear(x, weight))
    assert torch.equal(thin_linear(x, weight, bias, impl="reference"), F.linear(x, weight, bias))
    both = thin_linears(x, [(weight, None), (weight[:2], bias[:2])], impl="reference")
    assert torch.equal(both[0], F.linear(x, weight)) and torch.equal(both[1], F.linear(x, weight[:2], bias[:2]))


def test_a_thin_gated_map_multiplies_one_product_by_silu_of_the_other():
    x, gate, up = draw(3, 7), draw(5, 7), draw(5, 7, seed=1)
    assert_close(thin_swiglu(x, gate, up, impl="reference"), F.silu(x @ gate.T) * (x @ up.T))


if not (ON_GPU or INTERPRETED):

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_interpreted(__file__)

else:
    pytest.importorskip("triton")
    from refine_kernels.thin_linear import fused
    from refine_kernels.thin_linear.fused import Tile

    # The interpreter multiplies no matrices of bfloat16.
    dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16 if ON_GPU else torch.float16), ids=str)

    def given(*shape, dtype):
        """Rows with more memory behind them, which is not a number."""
        more = draw(shape[0] + 3, *shape[1:], dtype=dtype)
        more[shape[0] :] = torch.nan
        return more[: shape[0]]

    def exact(maps):
        return [(weight.double(), None if bias is None else bias.double()) for weight, bias in maps]

    def check(x, maps, tile=None):
        with poisoned():
            got = thin_linears(x, maps, impl="fused") if tile is None else fused.thin_linears(x, maps, _tile=tile)
        wants = thin_linears(x.double(), exact(maps), impl="reference")
        assert len(got) == len(maps)
        for i, (a, b) in enumerate(zip(got, wants, strict=True)):
            assert a.dtype == x.dtype and a.is_contiguous()
            assert_close(a, b, f"output {i}")

    @dtypes
    @pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 16))
    @pytest.mark.parametrize(("D", "N"), [(1, 1), (7, 5), (48, 33), (520, 16), (1024, 3)])
    def test_every_shape(dtype, rows, D, N):
        check(given(rows, D, dtype=dtype), [(given(N, D, dtype=dtype), None)])
        check(given(rows, D, dtype=dtype), [(given(N, D, dtype=dtype), given(N, dtype=dtype))])

    @dtypes
    @pytest.mark.parametrize("sizes", [(19, 3), (1, 40, 1), (5, 5, 5, 5), (17, 4, 4, 12, 9, 30)], ids=str)
    @pytest.mark.parametrize("biased", (0b001001, 0b110110))
    def test_several_maps_of_the_same_rows(dtype, sizes, biased):
        maps = [
            (draw(N, 24, dtype=dtype, seed=i), draw(N, dtype=dtype, seed=i) if biased >> i & 1 else None)
            for i, N in enumerate(sizes)
        ]
        for rows in (1, 6):
            check(given(rows, 24, dtype=dtype), maps)

    TILES = (
        Tile(4, 16, 0, 4, False),
        Tile(8, 32, 0, 2, False),
        Tile(16, 16, 3, 4, False),
        Tile(8, 16, 2, 4, True),
        Tile(16, 64, 4, 2, True),
    )

    @dtypes
    @pytest.mark.parametrize("tile", TILES, ids=str)
    @pytest.mark.parametrize("D", (64, 50))
    def test_every_way_to_cut_the_work(dtype, tile, D):
        for rows in (1, 2, 3, 7) if tile.dot else (1, 2, 3, 4):
            x = given(rows, D, dtype=dtype)
            check(x, [(given(21, D, dtype=dtype), given(21, dtype=dtype)), (draw(6, D, dtype=dtype), None)], tile)
            gate, up = given(13, D, dtype=dtype), draw(13, D, dtype=dtype, seed=1)
            with poisoned():
                got = fused.thin_swiglu(x, gate, up, _tile=tile)
            assert_close(got, thin_swiglu(x.double(), gate.double(), up.double(), impl="reference"))

    @dtypes
    @pytest.mark.parametrize("rows", (1, 2, 4, 9))
    @pytest.mark.parametrize(("D", "N"), [(7, 1), (48, 33), (600, 9)])
    def test_gated_maps(dtype, rows, D, N):
        x, gate, up = given(rows, D, dtype=dtype), given(N, D, dtype=dtype), draw(N, D, dtype=dtype, seed=1)
        with poisoned():
            got = thin_swiglu(x, gate, up, impl="fused")
        assert got.dtype == dtype
        # Both factors are rounded, and a single output has no others to make up for it.
        assert_close(got, thin_swiglu(x.double(), gate.double(), up.double(), impl="reference"), wider=2)

    def test_any_strides_and_leading_dimensions():
        x, weight = draw(3, 2, 40, dtype=torch.float32).transpose(0, 1)[..., ::2], draw(20, 6, dtype=torch.float32).t()
        got = thin_linear(x, weight, impl="fused")
        assert got.shape == (2, 3, 6)
        assert_close(got, F.linear(x.double(), weight.double()))

    def test_what_the_kernel_cannot_do_is_said():
        weight = draw(4, 8, dtype=torch.float32)
        with pytest.raises(ImplementationError, match="17 rows"):
            thin_linear(draw(17, 8, dtype=torch.float32), weight, impl="fused")
        with pytest.raises(ImplementationError, match="different dtypes"):
            thin_linear(draw(2, 8, dtype=torch.float32), weight.half(), impl="fused")
        with pytest.raises(ImplementationError, match="float64"):
            thin_linear(draw(2, 8), weight.double(), impl="fused")

    @pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 16))
    @pytest.mark.parametrize(("outputs", "channels"), [(1, 1), (1536, 1536), (4628, 1536), (8192, 1536), (1536, 4096)])
    def test_tiles_fill_the_gpu_where_there_is_enough_work(rows, outputs, channels):
        tile = fused.tile_for(rows, outputs, channels)
        assert -(-outputs // tile.outputs) >= min(fused.PROGRAMS, -(-outputs // (8 if tile.dot else 4)))
        assert tile.stages or -(-channels // tile.channels) <= fused.UNROLLED
        assert tile.dot == (rows > fused.BY_ELEMENT)
