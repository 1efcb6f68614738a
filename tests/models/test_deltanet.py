"""The contract of a reading: forked = re-read, cached = full, padded = alone, pieces = whole; outputs and gradients."""

import json

import pytest
import torch
import torch.nn.functional as F
from refine_kernels.testing import assert_close

from refine_harness.errors import DataError, ModelError
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, State

LENGTHS = (1, 2, 63, 64, 65, 100, 1000)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DeltaNetConfig(
        hidden_size=16, num_heads=2, num_hidden_layers=2, vocab_size=40, intermediate_size=24, initializer_range=0.4
    )
    return DeltaNetForCausalLM(config).double()


def tokens(rows, T, seed=0):
    return torch.randint(3, 40, (rows, T), generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(model, got, want):
    a, b = gradients(model, got), gradients(model, want)
    assert a.keys() == b.keys() == {name for name, _ in model.named_parameters()}
    for name in a:
        assert_close(a[name], b[name], name)


def probe(hidden, seed=1):
    """A loss that no symmetry makes blind."""
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=hidden.dtype)
    return (hidden * weights).sum() + (hidden**3 * weights.flip(-1)).sum()


def naive_hidden(model, tokens_T):
    """The model token by token from its published definition, independent of every op in refine_kernels."""
    config = model.config
    H, eps = config.num_heads, config.norm_eps
    x_TD = model.model.embeddings.weight[tokens_T]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    for block in model.model.layers:
        attn, y_TD = block.attn, norm(x_TD, block.attn_norm.weight)
        mixed = []
        for project, conv in (
            (attn.q_proj, attn.q_conv1d),
            (attn.k_proj, attn.k_conv1d),
            (attn.v_proj, attn.v_conv1d),
        ):
            z = F.conv1d(F.pad((y_TD @ project.weight.T).T[None], (3, 0)), conv.weight, groups=conv.weight.shape[0])
            mixed.append(F.silu(z[0].T).view(len(y_TD), H, -1))
        q, k, v = mixed
        q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
        beta = torch.sigmoid(y_TD @ attn.b_proj.weight.T)
        S = torch.zeros(H, k.shape[-1], v.shape[-1], dtype=x_TD.dtype)
        out = []
        for t in range(len(y_TD)):
            error = v[t] - torch.einsum("hkv,hk->hv", S, k[t])
            S = S + torch.einsum("h,hk,hv->hkv", beta[t], k[t], error)
            out.append(torch.einsum("hkv,hk->hv", S, q[t]) * q.shape[-1] ** -0.5)
        o = norm(torch.stack(out), attn.o_norm.weight).flatten(1)
        x_TD = x_TD + o @ attn.o_proj.weight.T
        y_TD = norm(x_TD, block.mlp_norm.weight)
        inner = F.silu(y_TD @ block.mlp.gate_proj.weight.T) * (y_TD @ block.mlp.up_proj.weight.T)
        x_TD = x_TD + inner @ block.mlp.down_proj.weight.T
    return norm(x_TD, model.model.norm.weight)


@pytest.mark.parametrize("T", (1, 2, 65, 100))
def test_reading_is_the_published_definition(model, T):
    row = tokens(1, T)
    hidden = model.read(row).hidden
    want = naive_hidden(model, row[0])[None]
    assert_close(hidden, want)
    got = probe(model.logits(hidden))
    same_gradients(model, got, probe(F.linear(want, model.lm_head.weight)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_dtypes_stay_near_float64(model, dtype):
    narrow = DeltaNetForCausalLM(model.config).to(dtype)
    narrow.load_state_dict(model.state_dict())
    wide = DeltaNetForCausalLM(model.config).double()
    wide.load_state_dict(narrow.state_dict())
    text = tokens(1, 130)
    with torch.no_grad():
        got, want = narrow.read(text).hidden, wide.read(text).hidden
    assert got.dtype == dtype
    allowed = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]  # several layers of rounding, not one op
    assert float((got.double() - want).norm() / want.norm()) < allowed


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_gate", True),
        ("use_beta", False),
        ("qk_norm", "sum"),
        ("qk_activation", "relu"),
        ("use_short_conv", False),
        ("tie_word_embeddings", True),
        ("attn", {"layers": [0], "num_heads": 2}),
        ("num_heads", 3),
    ],
)
def test_options_that_are_not_built_are_refused_by_name(option, value):
    config = DeltaNetConfig(hidden_size=16, num_heads=2, num_hidden_layers=1, vocab_size=40)
    setattr(config, option, value)
    with pytest.raises(ModelError, match=option):
        DeltaNetForCausalLM(config)


def test_saved_names_and_config_are_flas(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "delta_net" and config["architectures"] == ["DeltaNetForCausalLM"]
    names = set(model.state_dict())
    assert "model.layers.0.attn.q_conv1d.weight" in names and "lm_head.weight" in names
    assert model.model.layers[0].attn.k_conv1d.weight.shape == (16, 1, 4)
