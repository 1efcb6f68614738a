"""What the tests of each model family check in the same way."""

from __future__ import annotations

import copy
import json
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from refine_kernels.testing import assert_close

from refine_harness.models import State

from . import naive
from .tiny import tokens


def gradients(model, loss):
    """Of every parameter; zeros where the loss does not depend on it."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def same_gradients(model, got, want):
    """Two losses have the same gradient of every parameter."""
    a, b = gradients(model, got), gradients(model, want)
    for name in a:
        assert_close(a[name], b[name], name)


def same_states(got, want):
    """Equal row by row, whatever room their histories have."""
    both, n = State.cat([got, want]), len(got)
    for i, layer in enumerate(both.layers):
        for name, x in layer.items():
            assert_close(x[:n], x[n:], f"layer {i} {name}")
    assert both.seen_R[:n].tolist() == both.seen_R[n:].tolist()


def probe(hidden, seed=1):
    """A loss that no symmetry makes blind."""
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=hidden.dtype)
    weights = weights.to(hidden.device)
    return (hidden * weights).sum() + (hidden**3 * weights.flip(-1)).sum()


def reading_is_the_definition(model, T):
    """Hidden states and the gradient of every parameter, against `naive`."""
    row = tokens(1, T)
    hidden, want = model.read(row).hidden, naive.hidden(model, row[0])[None]
    assert_close(hidden, want)
    same_gradients(model, probe(model.logits(hidden)), probe(F.linear(want, model.lm_head.weight)))


def narrow_dtypes_stay_near_float64(model, dtype):
    """The model in a narrow dtype, against float64 on the same rounded weights."""
    narrow = copy.deepcopy(model).to(dtype)
    wide = copy.deepcopy(narrow).double()
    text = tokens(1, 130)
    with torch.no_grad():
        got, want = narrow.read(text).hidden, wide.read(text).hidden
    assert got.dtype == dtype
    allowed = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]  # several layers of rounding, not one op
    assert float((got.double() - want).norm() / want.norm()) < allowed


def nothing_is_asked_of_the_device(model, T, monkeypatch):
    """Tensors without values would raise where Python needs one; going on and forking included."""
    monkeypatch.setenv("REFINE_KERNELS", "reference")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for such tensors
    torch.nn.Module.to(model, "meta")
    first = model.read(tokens(2, 30).to("meta"))
    reading = model.read(tokens(2, T).to("meta"), first.state, torch.tensor([1, T]))
    model.read(tokens(2, 3).to("meta"), reading.states_at(torch.zeros(2, 1, dtype=torch.int64, device="meta")))


def survives_saving(model, folder):
    """Every parameter and the config, through save_pretrained and from_pretrained."""
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.config.tie_word_embeddings == (loaded.lm_head.weight is loaded.model.embeddings.weight)
    got, want = loaded.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    text = tokens(1, 10)
    assert_close(loaded.read(text).hidden, model.read(text).hidden)


def same_names_and_settings_as_fla(kind, config, monkeypatch):
    """Parameters by name and shape, and config.json read by either side, for the class of the same name in fla."""
    pytest.importorskip("triton")
    import fla.layers.attn
    import fla.models

    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", "there")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(fla.models, kind.__name__)
        settings = theirs.config_class.from_dict(json.loads(config.to_json_string(use_diff=False)))
        built = theirs(settings)
    ours = kind(config)
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (ours, built)]
    assert shapes[0] == shapes[1]
    assert ours.state_dict().keys() == built.state_dict().keys()
    saved = json.loads(settings.to_json_string(use_diff=False))
    read = json.loads(kind.config_class.from_dict(saved).to_json_string(use_diff=False))
    assert {name: read.get(name) for name in saved} == saved
    kind(kind.config_class.from_dict(saved))
