"""The optimizer: AdamW over the trained parameters, its rate at every step, and its state as named tensors.

Clipping is the trainer's: it is of all gradients together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from refine_harness.config import Optim
from refine_harness.errors import ConfigError, RunError

NamedParameters = Mapping[str, nn.Parameter]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name; a shared one once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(parameters: Iterable[nn.Parameter], optim: Optim) -> AdamW:
    """AdamW with one rate and one weight decay for every parameter, norms and biases included, as the paper's code."""
    return AdamW(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)


def lr_at(step: int, optim: Optim, total_steps: int | None) -> float:
    """The rate of the optimizer step that follows `step` finished ones.

    Warm-up is a line from 0 that skips 0 itself (such a step would learn nothing) and is at full rate
    at step `warmup_steps`. Cosine then falls to `min_lr_ratio` of it at the last of `total_steps`.
    Raises ConfigError for a cosine whose end is not known (`total_steps` is None).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    if total_steps is None:
        raise ConfigError(
            "optim.schedule is cosine, but training that carries over from prompt to prompt has no last step. "
            "Set optim.schedule=constant."
        )
    falling = max(1, total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / falling)
    height = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * height)


def moved_share(parameters: Iterable[Tensor], rate: float) -> float:
    """The share of weights that a change of `rate` does not leave as they are.

    That is about what AdamW's steps change a weight by, and in a narrow dtype it may round to nothing.
    """
    moved = total = 0
    for weights in parameters:
        moved += int((weights.detach() + rate != weights.detach()).sum())
        total += weights.numel()
    return moved / max(total, 1)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Optimizer, parameters: NamedParameters) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>:<state name>` tensors: independent copies on the CPU.

    Empty before the first step.
    """
    return {
        f"{name}:{key}": value.detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, parameters: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; an empty mapping makes the optimizer as new.

    Raises RunError when the tensors belong to other parameters than these.
    """
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters.get(name)
        count = key == "step"  # AdamW keeps its step count on the CPU, and the rest beside the parameter
        if parameter is None or (not count and tensor.shape != parameter.shape):
            raise RunError(
                f"the saved optimizer state has {full_name} of shape {tuple(tensor.shape)}, which fits no trained "
                "parameter of this model. Resume with the model that was being trained, or start in another folder."
            )
        device = torch.device("cpu") if count else parameter.device
        state.setdefault(parameter, {})[key] = tensor.detach().to(device, copy=True)
    if state and (missing := [name for name, parameter in parameters.items() if parameter not in state]):
        raise RunError(
            f"the saved optimizer state has nothing for {missing[0]} ({len(missing)} such parameters). "
            "Resume with the model that was being trained, or start in another folder."
        )
    optimizer.state.clear()
    for parameter, tensors_of_it in state.items():
        optimizer.state[parameter] = tensors_of_it
