"""Checkpoints travel both ways between here and flash-linear-attention, every name, shape and number."""

import warnings

import pytest
import torch

from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM

fla_models = pytest.importorskip("fla.models")


def load(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.state_dict()


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_saved_here_loads_in_fla(tmp_path):
    ours = DeltaNetForCausalLM(DeltaNetConfig(hidden_size=32, num_heads=2, num_hidden_layers=2, vocab_size=50))
    ours.save_pretrained(tmp_path)
    same(load(fla_models.DeltaNetForCausalLM, tmp_path), ours.state_dict())


def test_what_fla_saves_loads_here(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = fla_models.DeltaNetForCausalLM(
            fla_models.DeltaNetConfig(hidden_size=32, num_heads=2, num_hidden_layers=2, vocab_size=50)
        )
    theirs.save_pretrained(tmp_path)
    same(load(DeltaNetForCausalLM, tmp_path), theirs.state_dict())
