"""The frozen reference of the KL term, over a whole run."""

from dataclasses import replace

import pytest
import torch

from refine_harness.config import Algorithm, Batching, MidConfig, Optim
from refine_harness.errors import ConfigError, RunError
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.training.trainer import Trainer
from refine_harness.types import Batch


def model():
    torch.manual_seed(0)
    return DeltaNetForCausalLM(DeltaNetConfig(hidden_size=16, num_heads=2, num_hidden_layers=1, vocab_size=40)).double()


def config(**algorithm):
    settings = Algorithm(**{"chunks": 2, "rollout_length": 3, "kl_weight": 1.0, **algorithm})
    return MidConfig(steps=4, batch=Batching(sequences=4, steps=2), algorithm=settings, optim=Optim(lr=1e-2))


def batches(first=0):
    for number in range(first, 2):
        generator = torch.Generator().manual_seed(number)
        yield Batch(torch.randint(3, 40, (4, 20), generator=generator), torch.tensor([20, 17, 20, 15]))


def timeless(reports):
    return [replace(report, seconds=0.0) for report in reports]


@pytest.mark.parametrize("rollouts_from", ["batch", "step"])
def test_kl_is_measured_from_the_weights_that_training_started_from(rollouts_from):
    trainer = Trainer(model(), config(rollouts_from=rollouts_from))
    reports = list(trainer.run(batches()))
    kl = [report.facts["kl"] for report in reports]
    assert kl[0] == pytest.approx(0.0, abs=1e-14) and kl[-1] > 1e-6
    assert trainer.reference is not None
    start = model().state_dict()
    assert all(torch.equal(weight, start[name]) for name, weight in trainer.reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in trainer.reference.parameters())
    assert len(list(trainer.objective.parameters())) == len(list(trainer.model.parameters()))


def test_a_copy_is_made_only_where_it_is_wanted():
    assert Trainer(model(), config(kl_weight=0.0)).reference is None
    assert Trainer(model(), config(lambda_rl=0.0)).reference is None


def test_a_resumed_run_measures_from_the_same_weights():
    whole = Trainer(model(), config())
    reports = list(whole.run(batches()))
    first = Trainer(model(), config())
    assert first.state().optimizer == {}  # nothing learned: the weights are the reference
    list(zip(range(2), first.run(batches()), strict=False))
    second = Trainer(first.model, config())
    second.load(first.state())
    assert timeless(second.run(batches(first=1))) == timeless(reports[2:])
    assert second.state().optimizer.keys() == whole.state().optimizer.keys()


def test_a_state_without_the_reference_cannot_be_resumed_with_a_kl():
    plain = Trainer(model(), config(kl_weight=0.0))
    list(zip(range(2), plain.run(batches()), strict=False))
    with pytest.raises(RunError, match=r"no weights of .* to measure the KL from"):
        Trainer(plain.model, config()).load(plain.state())


def test_a_reward_that_does_not_exist_stops_the_run_before_it_starts():
    with pytest.raises(ConfigError, match="cannot be imported"):
        Trainer(model(), config(reward="no_such_module:reward"))
