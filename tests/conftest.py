"""What all tests share: tiny models, seeds, no network, and GPU tests that skip themselves and say so."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

# Before anything imports a hub client: a test that would reach for a network must fail at once, everywhere alike.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On tiny tensors threads cost more than they save: several times the whole suite where the machine has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

if TYPE_CHECKING:
    import torch

    from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, FastWeightLM


@pytest.fixture
def group_of_two() -> tuple[dict[str, str], dict[str, str]]:
    """The environment of each of two processes that work together on a CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alike = {**os.environ, **group, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    alike["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return {**alike, "RANK": "0", "LOCAL_RANK": "0"}, {**alike, "RANK": "1", "LOCAL_RANK": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def tiny_config() -> Callable[..., DeltaNetConfig]:
    """Makes the configuration of a two-layer DeltaNet that a laptop trains in milliseconds."""

    def make(**changes: object) -> DeltaNetConfig:
        from refine_harness.models import DeltaNetConfig

        tiny = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "conv_size": 4}
        return DeltaNetConfig(**{**tiny, **changes})

    return make


@pytest.fixture
def tiny_model(tiny_config: Callable[..., DeltaNetConfig]) -> Callable[..., DeltaNetForCausalLM]:
    """Makes such a model, in eval mode and with the same weights each time."""

    def make(dtype: torch.dtype | None = None, **changes: object) -> DeltaNetForCausalLM:
        import torch

        from refine_harness.models import DeltaNetForCausalLM

        torch.manual_seed(0)
        model = DeltaNetForCausalLM(tiny_config(**changes)).eval()
        torch.nn.Module.to(model, dtype or torch.float64)
        return model

    return make


@pytest.fixture(scope="session")
def wide_model() -> Callable[..., FastWeightLM]:
    """Makes a two-layer model with heads as wide as fused kernels want them, of a kind: "DeltaNet" or "LaCT"."""

    def make(kind: str, vocab_size: int = 300) -> FastWeightLM:
        import torch

        from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, LaCTForCausalLM, LaCTSWIGLUConfig

        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 2, "vocab_size": vocab_size, "intermediate_size": 256, "initializer_range": 0.1}
        if kind == "DeltaNet":
            return DeltaNetForCausalLM(DeltaNetConfig(hidden_size=256, num_heads=2, **sizes))
        heads = {"num_attn_heads": 2, "num_lact_heads": 1}
        chunks = {"lact_chunk_size": 64, "window_size": 40, "use_muon": True}
        return LaCTForCausalLM(LaCTSWIGLUConfig(hidden_size=128, **heads, **chunks, **sizes))

    return make
