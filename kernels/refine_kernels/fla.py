"""The door to flash-linear-attention's kernels: imported when first used, with tuned choices where we have them.

Each of fla's kernels tries dozens of tile sizes the first time it meets a shape, minutes in all on a fresh machine.
`refine_kernels/tuned/` holds the choices that were made on the GPUs we could measure; they are put into the kernels'
own caches here. Kernels and shapes that are not in the file are tuned as fla would.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SHIPPED = Path(__file__).resolve().parent / "tuned"
WRONG_ON_HOPPER = ((3, 4), (3, 7, 1))
"""From which Triton and before which one a kernel of the decayed backward is compiled wrongly on Hopper (fla's issue
640); fla refuses to run it."""


@cache
def why_not() -> str | None:
    """Why fla's kernels cannot run here, or None."""
    try:
        importlib.import_module("fla.ops.gated_delta_rule")
    except (ImportError, RuntimeError) as error:
        return f"flash-linear-attention cannot be imported: {error}"
    return None


@cache
def why_no_decay() -> str | None:
    """Why fla's kernels for a memory that fades cannot be trained here, or None."""
    if (reason := why_not()) is not None:
        return reason
    import triton

    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    first, fixed = WRONG_ON_HOPPER
    if torch.cuda.get_device_capability()[0] == 9 and first <= version < fixed:
        return f"Triton {triton.__version__} compiles their backward wrongly on Hopper; Triton 3.7.1 does not"
    return None


@cache
def ops(name: str) -> ModuleType:
    """The module `fla.ops.<name>`, its kernels with their tuned choices."""
    module = importlib.import_module(f"fla.ops.{name}")
    load_tuned()
    return module


def tuned_file(gpu: str | None = None) -> Path:
    """Where the choices for a GPU are: REFINE_TUNED, the user's own, or the shipped ones; it need not exist."""
    if named := os.environ.get("REFINE_TUNED"):
        return Path(named)
    name = re.sub(r"[^a-z0-9]+", "-", (gpu or torch.cuda.get_device_name()).lower()).strip("-") + ".json"
    own = user_folder() / name
    return own if own.is_file() else SHIPPED / name


def user_folder() -> Path:
    """Where `refine kernels tune` writes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refine-harness" / "tuned"


def autotuners() -> Iterator[tuple[str, Any]]:
    """Name and autotuner of every kernel of fla that has been imported."""
    from triton.runtime.autotuner import Autotuner

    seen: set[int] = set()
    for module_name, module in sorted(sys.modules.items()):
        if module is None or not (module_name == "fla" or module_name.startswith("fla.")):
            continue
        for name, kernel in list(vars(module).items()):
            while kernel is not None and not isinstance(kernel, Autotuner):
                kernel = getattr(kernel, "fn", None) if type(kernel).__module__.startswith("triton.") else None
            if kernel is not None and id(kernel) not in seen:
                seen.add(id(kernel))
                yield f"{kernel.base_fn.__module__}.{name}", kernel


def load_tuned(path: Path | None = None) -> int:
    """Put tuned choices into the kernels imported so far; how many kernels have one."""
    path = path or tuned_file()
    choices = _read(path)
    import triton

    found = 0
    for name, tuner in autotuners():
        entries = choices.get(name, [])
        if not entries:
            continue
        configs = [triton.Config(e["config"], num_warps=e["warps"], num_stages=e["stages"]) for e in entries]
        for entry, config in zip(entries, configs, strict=True):
            tuner.cache.setdefault(tuple(entry["key"]), config)
        # A shape that is not in the file chooses among what was best for other shapes.
        distinct = {str(config): config for config in configs}
        tuner.configs = list(distinct.values())
        found += 1
    return found


@cache
def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["kernels"]


def save_tuned(path: Path) -> int:
    """Write the choices that this process has made or loaded; how many kernels have one."""
    import triton

    kernels = {}
    for name, tuner in autotuners():
        entries = [
            {"key": list(key), "config": config.kwargs, "warps": config.num_warps, "stages": config.num_stages}
            for key, config in tuner.cache.items()
        ]
        if entries:
            kernels[name] = sorted(entries, key=str)
    tree = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "kernels": kernels}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return len(kernels)
