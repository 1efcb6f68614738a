from __future__ import annotations

import pytest
import torch
from torch import nn

from refine_harness.config import Optim
from refine_harness.errors import ConfigError, RunError
from refine_harness.training.optim import (
    load_optimizer_tensors,
    lr_at,
    make_optimizer,
    moved_share,
    optimizer_tensors,
    trained_parameters,
)


def test_the_rate_is_constant_by_default():
    assert {lr_at(step, Optim(lr=3e-6), 400) for step in range(400)} == {3e-6}


def test_warm_up_is_a_line_from_zero_that_skips_zero():
    rates = [lr_at(step, Optim(lr=1.0, warmup_steps=4), 400) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_falls_from_the_full_rate_to_the_smallest_at_the_last_step():
    optim = Optim(lr=2.0, schedule="cosine", min_lr_ratio=0.1, warmup_steps=2)
    rates = [lr_at(step, optim, 11) for step in range(11)]
    assert rates[2] == pytest.approx(2.0)
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[-1] == pytest.approx(0.2)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_steps_that_a_dtype_loses_are_counted():
    weights = torch.tensor([0.02, -0.5, 1e-5, 0.0])
    assert moved_share([weights], 1e-6) == 1
    assert moved_share([weights.bfloat16()], 1e-6) == 0.5
    assert moved_share([weights.bfloat16(), weights[:2].bfloat16()], 1e-2) == 1
    assert moved_share([], 1e-6) == 0


def test_cosine_without_an_end_is_refused():
    with pytest.raises(ConfigError, match=r"schedule=constant"):
        lr_at(0, Optim(schedule="cosine"), None)


def _stepped(seed: int = 0) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model.parameters(), Optim(lr=0.1))
    model(torch.ones(3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_optimizer_with_loaded_state_takes_the_same_next_step():
    model, optimizer = _stepped()
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    fresh = make_optimizer(twin.parameters(), Optim(lr=0.1))
    load_optimizer_tensors(fresh, trained_parameters(twin), optimizer_tensors(optimizer, trained_parameters(model)))
    for layer, its_optimizer in ((model, optimizer), (twin, fresh)):
        layer.zero_grad()
        layer(torch.tensor([1.0, -2.0, 0.5])).square().sum().backward()
        its_optimizer.step()
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)


def test_saved_state_does_not_move_with_the_optimizer():
    model, optimizer = _stepped()
    saved = optimizer_tensors(optimizer, trained_parameters(model))
    before = saved["weight:exp_avg"].clone()
    optimizer.step()
    assert torch.equal(saved["weight:exp_avg"], before)


def test_state_of_another_model_is_refused():
    model, optimizer = _stepped()
    saved = optimizer_tensors(optimizer, trained_parameters(model))
    for other in (nn.Linear(4, 2), nn.Sequential(nn.Linear(3, 2)), nn.Bilinear(1, 3, 2)):
        names = trained_parameters(other)
        with pytest.raises(RunError, match="optimizer state"):
            load_optimizer_tensors(make_optimizer(names.values(), Optim()), names, saved)


def test_state_with_a_hole_is_refused():
    model, optimizer = _stepped()
    saved = optimizer_tensors(optimizer, trained_parameters(model))
    part = {name: tensor for name, tensor in saved.items() if name.startswith("weight")}
    with pytest.raises(RunError, match="nothing for bias"):
        load_optimizer_tensors(optimizer, trained_parameters(model), part)
