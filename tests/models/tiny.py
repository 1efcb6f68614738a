"""One tiny float64 model of every kind that is native here, for tests that hold for all of them.

Weights are large enough that nothing is hidden by near-linearity. Lengths worth testing lie around the multiples of
each model's chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, FastWeightLM

VOCABULARY = 40
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "intermediate_size": 24,
    "initializer_range": 0.4,
}


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny model, and the text lengths at which it is worth testing."""

    make: Callable[[], FastWeightLM]
    lengths: tuple[int, ...] = (1, 2, 63, 64, 65, 100, 300)


def delta_net(**changes: object) -> Callable[[], FastWeightLM]:
    return lambda: DeltaNetForCausalLM(DeltaNetConfig(**{**SMALL, "num_heads": 2, **changes}))


MODELS: dict[str, Tiny] = {
    "delta_net": Tiny(delta_net()),
}


def build(name: str) -> FastWeightLM:
    """The model by name, in float64, with the same weights each time."""
    torch.manual_seed(0)
    model = MODELS[name].make()
    torch.nn.Module.to(model, torch.float64)
    return model


def tokens(rows: int, T: int, seed: int = 0) -> torch.Tensor:
    """Random text without special tokens, [rows, T]."""
    return torch.randint(3, VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(seed))
