"""The one place that decides which implementation of an operation runs.

`auto` takes the first implementation that can run on the tensor at hand; naming one forces it, and
raises where it cannot run, because a silent fallback turns a benchmark into a lie. The environment
variable REFINE_KERNELS (auto, reference, fused) sets what `auto` means for a whole process.
Implementations are imported only when chosen, so a CPU machine never imports Triton.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "fused"]

_log = logging.getLogger("refine_kernels")
_said: set[tuple[str, str]] = set()


class ImplementationError(RuntimeError):
    """A forced implementation cannot run here."""


def choose(package: str, impl: Impl, x: Tensor, **asked_for: bool) -> ModuleType:
    """The module of `package` (`reference` or `fused`) that computes the operation for tensors like `x`.

    A `fused` module has `why_not(x, **asked_for) -> str | None`: the reason why it cannot run, or None. `asked_for`
    names what else the call needs that not every implementation has.
    Raises ImplementationError when `fused` is asked for by name and cannot run.
    """
    asked = impl if impl != "auto" else os.environ.get("REFINE_KERNELS", "auto")
    if asked not in ("auto", "reference", "fused"):
        raise ImplementationError(f"REFINE_KERNELS is {asked!r}; expected auto, reference or fused")
    if asked == "reference" or (asked == "auto" and (x.device.type == "cpu" or x.dtype == torch.float64)):
        chosen = "reference"
    else:
        reason = _why_not_fused(package, x, asked_for)
        if reason is not None and asked == "fused":
            raise ImplementationError(f"{package}: the fused implementation cannot run: {reason}")
        chosen = "reference" if reason is not None else "fused"
    if (package, chosen) not in _said:
        _said.add((package, chosen))
        _log.info("%s: %s", package, chosen)
    return importlib.import_module(f"{package}.{chosen}")


def _why_not_fused(package: str, x: Tensor, asked_for: dict[str, bool]) -> str | None:
    try:
        fused = importlib.import_module(f"{package}.fused")
    except ImportError as error:
        return str(error)
    return fused.why_not(x, **asked_for)
