"""Checkpoints travel both ways between here and flash-linear-attention, every name, shape and number; its other models
come through the adapter; and neither package minds the other."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from refine_kernels import fla_models as door

from refine_harness.models import adapter
from refine_harness.models.load import MODELS

fla_models: Any = pytest.importorskip("fla.models")

SIZES = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 32}
HYBRID = {"attn": {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "window_size": 8}}
FAMILIES = [
    ("delta_net", {}),
    ("delta_net", {"use_gate": True, **HYBRID}),
    ("gated_deltanet", {"head_dim": 16}),
    ("gated_deltanet", {"head_dim": 16, "expand_v": 1.0, "num_v_heads": 4, "tie_word_embeddings": True}),
]
families = pytest.mark.parametrize(("kind", "options"), FAMILIES)


def load(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.state_dict()


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def build(config: Any, model: Any, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(config(**SIZES, **options))


def theirs(kind):
    return door.causal_lms()[kind]  # with an attention layer that can be built without flash-attn


@families
def test_what_is_saved_here_loads_in_fla(kind, options, tmp_path):
    ours = build(*MODELS[kind], options)
    ours.save_pretrained(tmp_path)
    same(load(theirs(kind)[1], tmp_path), ours.state_dict())


@families
def test_what_fla_saves_loads_here(kind, options, tmp_path):
    stock = build(*theirs(kind), options)
    stock.save_pretrained(tmp_path)
    same(load(MODELS[kind][1], tmp_path), stock.state_dict())


def test_every_causal_model_of_fla_is_native_or_adapted():
    known = door.causal_lms()
    exported = {name for name in fla_models.__all__ if name.endswith("ForCausalLM")}
    assert {model.__name__ for _, model in known.values()} == exported
    assert {"delta_net", "gated_deltanet"} == set(MODELS) & set(known)
    assert adapter.CONTINUED.issubset(set(known) - set(MODELS))
    for kind, (config, model) in known.items():
        assert adapter.adapted_classes(kind)[0] is config
        assert issubclass(adapter.adapted_classes(kind)[1], model)


@pytest.mark.parametrize("kind", ("gla", "kda", "mamba2", "rwkv7"))
def test_an_adapted_model_is_saved_as_flas_own(kind, tmp_path):
    config, model = adapter.adapted_classes(kind)
    made = build(config, model, {"head_dim": 16, "expand": 1})
    assert isinstance(made, adapter.ContinuingLM)
    made.save_pretrained(tmp_path)
    same(load(theirs(kind)[1], tmp_path), made.state_dict())
    same(load(model, tmp_path), made.state_dict())


CHECK = """
from transformers import AutoConfig, AutoModelForCausalLM
from refine_harness.models.load import MODELS
import fla.models
sizes = dict(hidden_size=32, num_heads=2, num_hidden_layers=1, vocab_size=50, head_dim=16)
for kind, (config, model) in MODELS.items():
    assert type(AutoConfig.for_model(kind)) is config, kind
for config, model in (
    (fla.models.DeltaNetConfig, fla.models.DeltaNetForCausalLM),
    (fla.models.GatedDeltaNetConfig, fla.models.GatedDeltaNetForCausalLM),
    (fla.models.GLAConfig, fla.models.GLAForCausalLM),
    MODELS["delta_net"],
):
    assert type(AutoModelForCausalLM.from_config(config(**sizes))) is model, model
assert type(AutoConfig.for_model("gla")) is fla.models.GLAConfig
"""


def test_both_work_when_ours_is_imported_first():
    exec(CHECK, {})  # as at the head of this file


def test_both_work_when_fla_is_imported_first():
    code = f"import fla.models, refine_harness\n{CHECK}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
