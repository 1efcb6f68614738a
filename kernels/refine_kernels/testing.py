"""What tests of kernels share: one table of tolerances, memory that is poisoned before use, Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
"""Largest ‖got - want‖ / ‖want‖, by the narrower of the two dtypes. CI and GPU runs use this one table."""

MODEL_TOLERANCE: dict[str, dict[str, float]] = {
    "bfloat16": {"hidden": 3e-2, "logits": 3e-2, "loss": 2e-3, "gradient": 5e-2, "worst gradient": 1e-1},
    "bfloat16, Muon": {"hidden": 0.15, "logits": 0.15, "loss": 2e-3, "gradient": 0.3},
    "float32": {"hidden": 1e-3, "logits": 1e-3, "loss": 1e-4, "gradient": 2e-2, "worst gradient": 1e-1},
}
"""The same for a whole model, where every layer adds its rounding: final hidden states, logits, mean loss, all
gradients as one vector, and the parameter whose gradient is farthest off. Newton-Schulz lifts small singular values
together with their rounding errors, so that two ways through Muon in bfloat16, as published, differ by that much."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ in float64; ‖got‖ where want is zero; infinite where either is not finite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    scale = want.norm()
    return float((got - want).norm() / scale) if scale > 0 else float(got.norm())


def assert_close(got: Tensor, want: Tensor, name: str = "result", *, wider: float = 1.0) -> None:
    """Raise AssertionError unless `got` is `want` within the table, whose tolerance is multiplied by `wider`."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    narrow = min((got.dtype, want.dtype), key=lambda dtype: -TOLERANCE[dtype])
    error, allowed = relative_error(got, want), TOLERANCE[narrow] * wider
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.0e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory from torch.empty with NaN, so that reading what nothing wrote shows."""
    filling: Any = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]


def run_interpreted(path: str) -> None:
    """Run a file's tests in Triton's interpreter; raise AssertionError with their output where one fails.

    They run in a process of their own, because the variable must be set before Triton is imported.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
