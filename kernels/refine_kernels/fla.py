"""The door to flash-linear-attention's kernels: imported when first used, with tuned choices where we have them.

Each of fla's kernels tries dozens of tile sizes the first time it meets a shape, minutes in all on a fresh machine.
`refine_kernels/tuned/` holds the choices that were made on the GPUs we could measure; they are put into the kernels'
own caches here. Kernels and shapes that are not in the file are tuned as fla would.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from refine_kernels.choose import ImplementationError

SHIPPED = Path(__file__).resolve().parent / "tuned"
searching = False
"""Whether kernels are to search for themselves, among all their choices: for making a new file."""

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
    if not searching:
        load_tuned()
    return module


def tuned_files() -> list[Path]:
    """Where choices for this GPU are, those that come first being preferred.

    REFINE_TUNED names the only file. Without it: the user's own, the shipped one for this very GPU, and those shipped
    for other GPUs of the same architecture, whose choices are good ones too. Raises ImplementationError where
    REFINE_TUNED names no file.
    """
    if named := os.environ.get("REFINE_TUNED"):
        if not Path(named).is_file():
            raise ImplementationError(
                f"REFINE_TUNED names {named}, which is no file: name one that `refine kernels tune` wrote, or unset it"
            )
        return [Path(named)]
    own = [folder / file_name() for folder in (user_folder(), SHIPPED)]
    capability = list(torch.cuda.get_device_capability())
    alike = [path for path in sorted(SHIPPED.glob("*.json")) if _read(path)["capability"] == capability]
    return [path for path in dict.fromkeys([*own, *alike]) if path.is_file()]


def file_name() -> str:
    """The name of the file for this GPU."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") + ".json"


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


def load_tuned() -> int:
    """Put tuned choices into the kernels imported so far; how many kernels have one."""
    import triton

    files = [_read(path)["kernels"] for path in tuned_files()]
    found = 0
    for name, tuner in autotuners():
        choices: dict[str, Any] = {}
        for entry in (entry for file in files for entry in file.get(name, [])):
            config = triton.Config(entry["config"], num_warps=entry["warps"], num_stages=entry["stages"])
            tuner.cache.setdefault(tuple(entry["key"]), config)
            choices.setdefault(str(config), copy(config))
        if choices:
            _search_among(tuner, list(choices.values()))
            found += 1
    return found


def _search_among(tuner: Any, configs: list[Any]) -> None:
    """A shape that is not in a file chooses among what was best for others; among all, should none of those fit it."""
    from triton.runtime.errors import OutOfResources

    if "run" not in vars(tuner):
        every, run = tuner.configs, tuner.run

        def run_one_that_fits(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except OutOfResources:
                if tuner.configs is every:
                    raise
                tuner.configs = every
                # What it tried in vain; the choices that came from a file are other objects.
                tuner.cache = {key: config for key, config in tuner.cache.items() if config is not tuner.best_config}
                return run(*args, **kwargs)

        tuner.run = run_one_that_fits
    tuner.configs = configs


@cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def save_tuned(path: Path) -> int:
    """Write the choices that this process has made or loaded; how many kernels have one."""
    import triton

    kernels: dict[str, list[str]] = {}
    for name, tuner in autotuners():
        entries = [
            {"key": list(key), "config": config.kwargs, "warps": config.num_warps, "stages": config.num_stages}
            for key, config in tuner.cache.items()
        ]
        if entries:
            kernels[name] = sorted(json.dumps(entry) for entry in entries)
    # One line per choice: a few hundred of them, to be read and compared.
    lists = (f"  {json.dumps(name)}: [\n   " + ",\n   ".join(kernels[name]) + "\n  ]" for name in sorted(kernels))
    head = {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "triton": triton.__version__,
    }
    facts = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    text = "{\n" + ",\n".join([*facts, ' "kernels": {\n' + ",\n".join(lists) + "\n }"]) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return len(kernels)
