"""A two-layer DeltaNet, short documents, and settings to train one on the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from refine_harness.config import Algorithm, Batching, MidConfig, Optim, PostConfig, TestTimeConfig
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.types import Batch

VOCABULARY = 64


class Lab:
    """What the tests of this folder are made of."""

    algorithm = Algorithm(chunks=2, rollout_length=3)
    optim = Optim(lr=1e-3)

    def model(self, dtype: torch.dtype = torch.float64) -> DeltaNetForCausalLM:
        torch.manual_seed(0)
        config = DeltaNetConfig(hidden_size=32, num_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY)
        return DeltaNetForCausalLM(config).type(dtype)

    def mid(self, *, steps: int = 4, sequences: int = 4, per_batch: int = 2, micro: int = 1, **changes) -> MidConfig:
        algorithm = self.algorithm.model_copy(update=changes)
        return MidConfig(
            steps=steps,
            batch=Batching(sequences=sequences, steps=per_batch, micro=micro),
            algorithm=algorithm,
            optim=self.optim,
            checkpoint_every=2,
        )

    def post(self, *, steps: int = 4, nested: bool = True, **changes) -> PostConfig:
        return PostConfig(
            steps=steps,
            batch=Batching(sequences=4, steps=2),
            algorithm=self.algorithm.model_copy(update=changes),
            optim=self.optim,
            nested=nested,
        )

    def testtime(self, **changes) -> TestTimeConfig:
        settings = {
            "steps": 2,
            "batch": Batching(sequences=4, steps=2),
            "algorithm": self.algorithm,
            "optim": self.optim,
        }
        return TestTimeConfig(**{**settings, **changes})

    def batch(self, number: int, rows: int = 4) -> Batch:
        """Batch `number` of an endless sequence: documents of 33 to 40 tokens."""
        rng = torch.Generator().manual_seed(number)
        lengths_B = torch.randint(33, 41, (rows,), generator=rng)
        lengths_B[0] = 40
        tokens_BT = torch.randint(3, VOCABULARY, (rows, 40), generator=rng)
        return Batch(tokens_BT, lengths_B)

    def batches(self, first: int = 0, count: int = 100, rows: int = 4) -> list[Batch]:
        return [self.batch(number, rows) for number in range(first, count)]

    def prompt(self, number: int, tokens: int = 30) -> list[int]:
        rng = torch.Generator().manual_seed(1000 + number)
        return torch.randint(3, VOCABULARY, (tokens,), generator=rng).tolist()

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def furthest(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        """Largest absolute difference between two sets of tensors with the same names."""
        assert one.keys() == other.keys()
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    def same(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        """Whether they are equal bit for bit."""
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
