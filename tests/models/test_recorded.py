"""A checkpoint made by other people's code computes what that code computed on it, in float64.

Not shipped, because of its size. REFINE_RECORDED_CHECKPOINT names a model folder, REFINE_RECORDED_VALUES an .npz with,
for lengths T, `tokens_T`, `hidden_last_T`, `logits_last_T`, `nll_T`, `entropy_T`, `loss_T`, `gradnorm_T/<parameter>`
and `gradprobe_T/<parameter>` (at most 16 entries of the gradient, evenly spaced).
"""

import os

import numpy as np
import pytest
import torch

from refine_harness.models import load_model

CHECKPOINT, VALUES = os.environ.get("REFINE_RECORDED_CHECKPOINT"), os.environ.get("REFINE_RECORDED_VALUES")
pytestmark = pytest.mark.skipif(
    not (CHECKPOINT and VALUES), reason="REFINE_RECORDED_CHECKPOINT and REFINE_RECORDED_VALUES name no recorded values"
)


ROUNDED = {"lact_swiglu": ("lr_proj", "momentum_proj")}
"""By model type, modules whose outputs the recorded code rounds to float32 in whatever precision it runs."""


def off(got, want):
    """Largest difference over the largest value."""
    got, want = np.asarray(got.detach()), np.asarray(want)
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def test_recorded_values_are_reproduced():
    assert CHECKPOINT is not None
    assert VALUES is not None
    model, _ = load_model(CHECKPOINT, dtype="float64")
    for name, module in model.named_modules():
        if name.endswith(ROUNDED.get(model.config.model_type, ())):
            module.register_forward_hook(lambda _, __, output: output.float())
    recorded = np.load(VALUES, allow_pickle=False)
    parameters = dict(model.named_parameters())
    checked = set()
    for T in sorted(int(key.removeprefix("tokens_")) for key in recorded.files if key.startswith("tokens_")):
        tokens_1T = torch.tensor(recorded[f"tokens_{T}"])[None]
        hidden_TD = model.read(tokens_1T).hidden[0]
        assert off(hidden_TD[-min(T, 3) :], recorded[f"hidden_last_{T}"]) < 1e-8
        assert off(model.logits(hidden_TD[-1]), recorded[f"logits_last_{T}"]) < 1e-8
        if T == 1:
            continue
        logprobs_T, entropy_T, *_ = model.label_logprobs(hidden_TD[:-1], tokens_1T[0, 1:])
        assert off(-logprobs_T, recorded[f"nll_{T}"]) < 1e-8
        assert off(entropy_T, recorded[f"entropy_{T}"]) < 1e-8
        assert off(-logprobs_T.mean(), recorded[f"loss_{T}"]) < 1e-8
        names = [key.split("/", 1)[1] for key in recorded.files if key.startswith(f"gradprobe_{T}/")]
        if names:
            model.zero_grad()
            (-logprobs_T.mean()).backward()
        for name in names:
            gradient = parameters[name].grad
            assert gradient is not None
            step = max(1, gradient.numel() // 16)
            assert off(gradient.flatten()[::step][:16], recorded[f"gradprobe_{T}/{name}"]) < 1e-8
            assert off(gradient.norm(), recorded[f"gradnorm_{T}/{name}"]) < 1e-8
            checked.add(name)
    assert checked == set(parameters)
