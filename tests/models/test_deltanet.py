"""DeltaNet, every option of it, and hybrids with softmax attention: the published definition, names and settings."""

import json

import pytest
import torch
from refine_kernels.testing import assert_close

from refine_harness.errors import ModelError
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, State

from .checks import (
    narrow_dtypes_stay_near_float64,
    nothing_is_asked_of_the_device,
    reading_is_the_definition,
    same_names_and_settings_as_fla,
    survives_saving,
)
from .tiny import HYBRID, SMALL, tokens

OPTIONS = {
    "defaults": {},
    "wide keys": {"expand_k": 1.5, "expand_v": 2.0},
    "output gate": {"use_gate": True},
    "always full strength": {"use_beta": False},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "negative eigenvalues at full strength": {"allow_neg_eigval": True, "use_beta": False},
    "sum norm": {"qk_norm": "sum"},
    "relu": {"qk_activation": "relu"},
    "elu": {"qk_activation": "elu"},
    "identity": {"qk_activation": "identity"},
    "elu and sum norm": {"qk_activation": "elu", "qk_norm": "sum"},
    "two taps": {"conv_size": 2},
    "one tap": {"conv_size": 1},
    "no convolution": {"use_short_conv": False},
    "no convolution, relu": {"use_short_conv": False, "qk_activation": "relu"},
    "no output norm, which fla ignores": {"use_output_norm": False},
    "tied": {"tie_word_embeddings": True},
    "hybrid": HYBRID,
    "hybrid in one entry": {"attn": {"layers": [1], "num_heads": 4, "window_size": 5}},
    "a window of one": {"attn": {"layers": [0, 1], "num_heads": 2, "window_size": 1}},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def config(**changes):
    return DeltaNetConfig(**{**SMALL, "num_heads": 2, **changes})


def build(**changes):
    return DeltaNetForCausalLM(config(**changes)).double()


@each_option
@pytest.mark.parametrize("T", (1, 70))
def test_reading_is_the_published_definition(options, T):
    reading_is_the_definition(build(**options), T)


@pytest.mark.parametrize("options", ({}, {"use_gate": True, "qk_activation": "elu"}, HYBRID), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_dtypes_stay_near_float64(options, dtype):
    narrow_dtypes_stay_near_float64(build(**options), dtype)


@pytest.mark.parametrize("options", ({}, {"use_short_conv": False}, HYBRID), ids=str)
@pytest.mark.parametrize("T", (1, 70))
def test_a_reading_waits_for_no_number_from_the_device(options, T, monkeypatch):
    nothing_is_asked_of_the_device(build(**options), T, monkeypatch)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attn_mode", "fused_chunk"),
        ("hidden_act", "powlu"),
        ("qk_norm", "l1"),
        ("qk_activation", "gelu"),
        ("attnres_block_size", 2),
        ("use_l2warp", True),
        ("num_heads", 3),
        ("expand_k", 0.3),
        ("expand_v", 0.9375),
    ],
)
def test_options_that_cannot_be_built_are_refused_by_name(option, value):
    with pytest.raises(ModelError, match=option) as error:
        build(**{option: value})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


GOOD = {"layers": [0], "num_heads": 2}


@pytest.mark.parametrize(
    ("attn", "said"),
    [
        ({"num_heads": 2}, "needs a list of layers and num_heads"),
        ({"layers": [0]}, "needs a list of layers and num_heads"),
        ("all", "needs a list of layers and num_heads"),
        ({**GOOD, "qk_norm": True}, "qk_norm is not a setting"),
        ({**GOOD, "layers": [2]}, "the model's layers are 0 to 1"),
        ({**GOOD, "layers": [0, 0]}, "layer 0 is named twice"),
        ([GOOD, GOOD], "layer 0 is named twice"),
        ({**GOOD, "num_heads": 0}, "num_heads must be a positive number"),
        ({**GOOD, "num_heads": 16}, "even multiple of num_heads"),
        ({**GOOD, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({**GOOD, "window_size": 0}, "window_size must be a positive number"),
        ({**GOOD, "rope_theta": None}, "rope_theta must be a positive number"),
    ],
)
def test_attention_that_cannot_be_built_is_refused(attn, said):
    with pytest.raises(ModelError, match=said) as error:
        build(attn=attn)
    assert "attn=" in str(error.value)


def test_a_window_bounds_the_state_and_full_attention_grows_with_the_text():
    model = build(**HYBRID)
    states = [model.read(tokens(1, T)).state for T in (7, 70)]
    assert [state.layers[0]["keys"].shape for state in states] == [(1, 19, 2, 4)] * 2
    assert [state.layers[2]["values"].shape for state in states] == [(1, 7, 1, 8), (1, 70, 1, 8)]
    assert states[0].layers[0]["keys"][:, :12].eq(0).all()
    windows_only = build(attn={"layers": [0], "num_heads": 2, "window_size": 5})
    assert (build().fixed_state, windows_only.fixed_state, model.fixed_state) == (True, True, False)


def test_states_of_texts_of_any_length_go_on_together():
    model = build(**HYBRID)
    texts, after = [tokens(1, T, seed=T) for T in (3, 80, 25)], tokens(3, 30, seed=1)
    apart = [model.read(text).state for text in texts]
    together = model.read(after, State.cat(apart), lengths=torch.tensor([30, 4, 11]))
    for row, (state, length) in enumerate(zip(apart, (30, 4, 11), strict=True)):
        want = model.read(after[row : row + 1, :length], state)
        assert_close(together.hidden[row : row + 1, :length], want.hidden)
        more = tokens(1, 5, seed=2)
        got = model.read(more, together.state.select([row])).hidden
        assert_close(got, model.read(more, want.state).hidden)


@pytest.mark.parametrize("options", ({}, {"tie_word_embeddings": True}, HYBRID), ids=str)
def test_what_is_saved_loads_again(options, tmp_path):
    survives_saving(build(**options), tmp_path)


def test_saved_names_and_config_are_flas(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "delta_net" and saved["architectures"] == ["DeltaNetForCausalLM"]
    assert "lm_head.weight" in model.state_dict()
    assert model.state_dict()["model.layers.0.attn.k_conv1d.weight"].shape == (16, 1, 4)


@each_option
def test_names_shapes_and_settings_are_flas(options, monkeypatch):
    same_names_and_settings_as_fla(DeltaNetForCausalLM, config(**options), monkeypatch)
