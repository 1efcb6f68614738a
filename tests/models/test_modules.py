"""When the operations for a few tokens compute a linear layer; whoever adapts or watches it is not passed by."""

from typing import Any

import pytest
import torch
from torch import nn

from refine_harness.models import modules
from refine_harness.models.modules import ALONE, FEW, GatedMLP, Linear, plain, thin


class Sizes:
    hidden_size, intermediate_size, hidden_ratio = 6, 10, None


@pytest.fixture
def called(monkeypatch):
    """Which of the operations for a few tokens ran, in order."""
    names: list[str] = []

    def watch(name):
        run = getattr(modules, name)

        def watched(*args):
            names.append(name)
            return run(*args)

        monkeypatch.setattr(modules, name, watched)

    for name in ("thin_linear", "thin_swiglu"):
        watch(name)
    return names


@pytest.mark.parametrize("bias", (True, False))
def test_a_linear_layer_is_torchs_bit_for_bit(bias, called):
    torch.manual_seed(0)
    ours = Linear(6, 4, bias=bias)
    theirs = nn.Linear(6, 4, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    for rows in (1, ALONE, ALONE + 1, FEW + 1):
        x = torch.randn(1, rows, 6)
        assert torch.equal(ours(x), theirs(x))
        assert not called
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x))
        assert called == ["thin_linear"] * (rows <= ALONE)
        called.clear()


def test_a_few_tokens_of_another_dtype_are_torchs(called):
    layer, x = Linear(6, 4), torch.randn(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not called
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(x.double())


def test_what_is_plain():
    assert plain(Linear(2, 2)) and plain(nn.Linear(2, 2))
    assert not plain(nn.Sequential(Linear(2, 2)))
    assert not plain(nn.utils.parametrizations.weight_norm(Linear(2, 2)))
    for watch in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        layer = Linear(2, 2)
        handle = getattr(layer, watch)(lambda *_: None)
        assert not plain(layer)
        handle.remove()
        assert plain(layer)


def test_a_gated_mlp_of_a_few_tokens_is_one_of_many(called):
    torch.manual_seed(0)
    mlp: Any = GatedMLP(Sizes).double()
    with torch.no_grad():
        for rows, names in ((ALONE, ["thin_swiglu", "thin_linear"]), (FEW, ["thin_swiglu"])):
            x = torch.randn(rows, 6, dtype=torch.float64)
            with torch.enable_grad():
                want = mlp(x)
            called.clear()
            assert torch.equal(mlp(x), want)
            assert called == names
        mlp.up_proj = nn.Sequential(mlp.up_proj)  # as an adapter would stand there
        assert not thin(x, mlp.gate_proj, mlp.up_proj)
        assert torch.equal(mlp(x), want)
        mlp.down_proj = nn.Sequential(mlp.down_proj)
        assert torch.equal(mlp(x), want)
