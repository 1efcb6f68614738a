"""The adapter over flash-linear-attention's own models, with their kernels: forks, padding and decoding in bfloat16."""

import copy
import inspect
import warnings
from typing import Any, cast

import pytest
import torch
from refine_kernels import fla_models
from refine_kernels.testing import relative_error

from refine_harness.models.adapter import adapted_classes

from .checks import gradients, probe
from .tiny import tokens

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 64,
    "vocab_size": 40,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
KINDS = {
    # A layer of attention, so that histories of different lengths are continued too.
    "gla": {"attn": {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "window_size": 50}, "use_short_conv": True},
    "rwkv7": {},
    "mamba2": {"num_heads": 4, "state_size": 32, "chunk_size": 64},
    "kda": {},
}
NEAR = 3e-2
"""Of hidden states: layers of rounding to bfloat16, in chunks that lie elsewhere."""
GRADIENTS_NEAR, GRADIENT_NEAR = 5e-2, 0.2
"""Of all parameters together, and of each."""


@pytest.fixture(autouse=True, scope="module")
def one_choice_each():
    """Which tiles fla's kernels use changes no result, and trying them all takes minutes for each model."""
    from triton.runtime.autotuner import Autotuner

    patch = pytest.MonkeyPatch()
    all_of_them = Autotuner.prune_configs
    patch.setattr(Autotuner, "prune_configs", lambda self, kwargs: all_of_them(self, kwargs)[:1])
    yield
    patch.undo()


def build(kind: str) -> Any:
    """The model in bfloat16 with weights that no start-up zero makes blind."""
    config, model = cast(tuple[Any, Any], adapted_classes(kind))
    known = inspect.signature(config.__init__).parameters
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model(config(**{**{k: v for k, v in SIZES.items() if k in known}, **KINDS[kind]}))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return made.to(DEVICE, DTYPE).eval()


def text(rows, T, seed=0):
    return tokens(rows, T, seed).to(DEVICE)


def near(got, want, what, allowed=NEAR):
    error = relative_error(got, want)
    assert error <= allowed, f"{what}: relative error {error:.1e}, allowed {allowed:.0e}"


def same_gradients(model, got, want):
    a, b = gradients(model, got), gradients(model, want)
    flat_a, flat_b = (torch.cat([x.flatten().float() for x in grads.values()]) for grads in (a, b))
    near(flat_a, flat_b, "all gradients", GRADIENTS_NEAR)
    for name, x in b.items():
        if x.float().norm() > 1e-3 * flat_b.norm():  # what is smaller is rounding of what is larger
            near(a[name], x, name, GRADIENT_NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_holds(kind, tmp_path):
    if (reason := fla_models.why_not(torch.device(DEVICE))) is not None:
        pytest.skip(reason)
    model = build(kind)
    T = 150
    document, rollouts = text(2, T), text(4, 5, seed=2)
    positions = torch.tensor([[T - 2, 20], [70, 63]], device=DEVICE)

    reading = model.read(document)
    forked = model.read(rollouts, reading.states_at(positions)).hidden
    places = [(b, p) for b in range(2) for p in positions[b].tolist()]
    reread = torch.cat([
        model.read(torch.cat((document[b, : p + 1], rollout))[None]).hidden[:, p + 1 :]
        for (b, p), rollout in zip(places, rollouts, strict=True)
    ])  # fmt: skip
    near(forked, reread, "forked")
    same_gradients(model, probe(forked.float()), probe(reread.float()))

    with torch.no_grad():
        padded = model.read(document, lengths=torch.tensor([90, T], device=DEVICE))
        alone = model.read(document[:1, :90])
        near(padded.hidden[:1, :90], alone.hidden, "padded")
        near(
            model.read(rollouts[:1], padded.state.select([0])).hidden, model.read(rollouts[:1], alone.state).hidden, ""
        )

        before = copy.deepcopy(alone.state)
        state, decoded = alone.state, []
        for t in range(90, 96):
            step = model.read(document[:1, t : t + 1], state, forkable=False)
            state = step.state
            decoded.append(step.hidden)
        near(torch.cat(decoded, 1), reading.hidden[:1, 90:96], "decoded")
        for layer, other in zip(alone.state.layers, before.layers, strict=True):
            assert all(torch.equal(x, other[name]) for name, x in layer.items()), "a state was changed by reading on"

    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=DTYPE)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    got, want = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(got[name], x.cpu()) for name, x in want.items())
