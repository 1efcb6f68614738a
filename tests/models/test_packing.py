"""Texts that differ in length, read together: each is itself alone, and padding costs nothing and reaches nothing."""

import pytest
import torch
from refine_kernels.delta_rule import reference
from refine_kernels.testing import assert_close
from torch import nn

from refine_harness.models import State

from .checks import gradients, probe, same_gradients, same_states
from .tiny import MODELS, build, tokens

LENGTHS = (70, 1, 130, 64)
T = 133
each_model = pytest.mark.parametrize("model", MODELS, indirect=True)
of_each_family = pytest.mark.parametrize("model", ("delta_net", "delta_net_hybrid", "lact_muon"), indirect=True)


@pytest.fixture
def model(request):
    return build(request.param)


def padded(*, pad=0):
    batch = tokens(4, T)
    for row, n in zip(batch, LENGTHS, strict=True):
        row[n:] = pad
    return batch


def alone(batch):
    return [batch[b : b + 1, :n] for b, n in enumerate(LENGTHS)]


def forks():
    """Places of every text, its end and the state before it among them."""
    return torch.tensor([[n - 1, n // 2, -1] for n in LENGTHS])


@each_model
def test_each_text_forks_and_goes_on_as_if_it_had_been_alone(model):
    begun, batch, rollout = tokens(4, 21, seed=5), padded(), tokens(12, 4, seed=7)
    together = model.read(batch, model.read(begun).state, torch.tensor(LENGTHS))
    got = [together.hidden[b, :n] for b, n in enumerate(LENGTHS)]
    got += [*model.read(rollout, together.states_at(forks())).hidden]
    got += [*model.read(rollout[:4], together.state).hidden]
    hidden, forked, after, states = [], [], [], []
    for b, text in enumerate(alone(batch)):
        reading = model.read(text, model.read(begun[b : b + 1]).state)
        hidden.append(reading.hidden[0])
        forked += [*model.read(rollout[3 * b : 3 * b + 3], reading.states_at(forks()[b : b + 1])).hidden]
        after.append(model.read(rollout[b : b + 1], reading.state).hidden[0])
        states.append(reading.state)
    want = [*hidden, *forked, *after]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"text {i}")
    same_states(together.state, State.cat(states))
    losses = (sum(probe(x, seed) for seed, x in enumerate(each)) for each in (got, want))
    same_gradients(model, *losses)


@pytest.mark.parametrize("model", [name for name in MODELS if "delta" in name], indirect=True)
def test_each_text_forks_where_few_states_are_kept(model, monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 1)
    test_each_text_forks_and_goes_on_as_if_it_had_been_alone(model)


@each_model
def test_padding_is_computed_nowhere_and_reaches_nothing(model):
    """The embedding of the padding token is not a number; every linear map sees the real tokens and no more."""
    real, rows = sum(LENGTHS), []

    def count(_, inputs, output):
        rows.append(output.numel() // output.shape[-1])

    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(count)
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        want = model.read(padded(pad=1), lengths=lengths).hidden
        model.get_input_embeddings().weight[0] = torch.nan
    got = model.read(padded(pad=0), lengths=lengths, forkable=False).hidden
    assert torch.equal(got, want)
    assert rows and set(rows) == {real}
    if not model.config.tie_word_embeddings:
        found = gradients(model, probe(got))
        assert all(x.isfinite().all() for x in found.values())
        assert not found["model.embeddings.weight"][0].any()


@of_each_family
def test_activations_made_again_change_nothing(model):
    model.train()
    batch, lengths, rollout = padded(), torch.tensor(LENGTHS), tokens(12, 4, seed=7)

    def loss():
        reading = model.read(batch, lengths=lengths)
        return probe(reading.hidden) + probe(model.read(rollout, reading.states_at(forks())).hidden)

    want = gradients(model, loss())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(model, loss())
    for name, x in want.items():
        assert_close(got[name], x, name)


@of_each_family
def test_under_autocast_each_text_is_itself_alone(model):
    nn.Module.to(model, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together = model.read(padded(), lengths=torch.tensor(LENGTHS))
        for b, text in enumerate(alone(padded())):
            assert_close(together.hidden[b, : LENGTHS[b]].bfloat16(), model.read(text).hidden[0].bfloat16())


@of_each_family
@pytest.mark.parametrize("lengths", ((T,) * 4, (50,) * 4), ids=str)
def test_texts_of_one_length_are_one_batch(model, lengths):
    batch, length = tokens(4, T), lengths[0]
    with torch.no_grad():
        got, want = model.read(batch, lengths=torch.tensor(lengths)), model.read(batch[:, :length])
    assert_close(got.hidden[:, :length], want.hidden)
    same_states(got.state, want.state)


def test_without_padding_nothing_is_packed(monkeypatch):
    """Lengths that fill their rows make the very same operations as no lengths."""
    monkeypatch.setattr("refine_harness.models.base.Packing", None)
    model, text = build("delta_net"), tokens(2, 40)
    assert torch.equal(model.read(text).hidden, model.read(text, lengths=torch.tensor([40, 40])).hidden)
