"""Gated DeltaNet, every option of it: the published definition, names, settings and where its decay starts."""

import pytest
import torch
import torch.nn.functional as F

from refine_harness.errors import ModelError
from refine_harness.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

from .checks import (
    narrow_dtypes_stay_near_float64,
    nothing_is_asked_of_the_device,
    reading_is_the_definition,
    same_names_and_settings_as_fla,
    survives_saving,
)
from .tiny import HYBRID, SMALL

OPTIONS = {
    "defaults": {},
    "no output gate": {"use_gate": False},
    "sigmoid gate": {"output_gate_activation": "sigmoid"},
    "silu gate": {"output_gate_activation": "silu"},
    "grouped values": {"num_v_heads": 6},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "no convolution": {"use_short_conv": False},
    "two taps": {"conv_size": 2},
    "small values": {"expand_v": 0.5},
    "hybrid": HYBRID,
    "grouped, tied, sigmoid": {"num_v_heads": 4, "tie_word_embeddings": True, "output_gate_activation": "sigmoid"},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def config(**changes):
    return GatedDeltaNetConfig(**{**SMALL, "num_heads": 2, "head_dim": 6, "expand_v": 1.5, **changes})


def build(**changes):
    return GatedDeltaNetForCausalLM(config(**changes)).double()


@each_option
@pytest.mark.parametrize("T", (1, 70))
def test_reading_is_the_published_definition(options, T):
    reading_is_the_definition(build(**options), T)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_dtypes_stay_near_float64(dtype):
    narrow_dtypes_stay_near_float64(build(num_v_heads=4), dtype)


@pytest.mark.parametrize("T", (1, 70))
def test_a_reading_waits_for_no_number_from_the_device(T, monkeypatch):
    nothing_is_asked_of_the_device(build(num_v_heads=4), T, monkeypatch)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_decay_starts_where_fla_starts_it(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = GatedDeltaNetForCausalLM(config(num_heads=1, num_v_heads=4000, head_dim=2, num_hidden_layers=1))
    finally:
        torch.set_default_dtype(before)
    A_log, dt_bias = (model.state_dict()[f"model.layers.0.attn.{name}"] for name in ("A_log", "dt_bias"))
    assert A_log.dtype == dt_bias.dtype == dtype
    assert bool(A_log.isfinite().all())
    rate, step = A_log.double().exp(), F.softplus(dt_bias.double())
    assert 0 < rate.min() < 0.1 and 15.8 < rate.max() < 16.2 and abs(rate.mean() - 8) < 0.3
    assert 0.00098 < step.min() < 0.0011 and 0.09 < step.max() < 0.102
    assert abs(step.log().mean() - torch.tensor((0.001 * 0.1) ** 0.5).log()) < 0.1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("output_gate_activation", "relu"),
        ("num_v_heads", 3),
        ("expand_v", 1.4),
        ("attn_mode", "parallel"),
        ("hidden_act", "powlu"),
        ("attnres_block_size", 2),
        ("use_l2warp", True),
        ("attn", {"layers": [5], "num_heads": 2}),
    ],
)
def test_options_that_cannot_be_built_are_refused_by_name(option, value):
    with pytest.raises(ModelError, match=option) as error:
        build(**{option: value})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("options", ({}, HYBRID), ids=str)
def test_what_is_saved_loads_again(options, tmp_path):
    survives_saving(build(**options), tmp_path)


def test_weights_that_are_missing_start_as_new_and_the_others_as_saved(tmp_path):
    from safetensors.torch import load_file, save_file

    build().float().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.attn.dt_bias"
    gone = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = GatedDeltaNetForCausalLM.from_pretrained(tmp_path).state_dict()
    assert not torch.equal(loaded.pop(name), gone)
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)


@each_option
def test_names_shapes_and_settings_are_flas(options, monkeypatch):
    same_names_and_settings_as_fla(GatedDeltaNetForCausalLM, config(**options), monkeypatch)
