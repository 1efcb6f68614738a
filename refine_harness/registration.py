"""Make transformers and lm-eval know our classes as soon as they are imported, without importing them ourselves.

Both keep registries that hold classes or names, and both are slow to import, so `import refine_harness` cannot
simply call them. Instead it watches imports: a finder at the front of `sys.meta_path` lets the normal machinery
find each module of the families below, and calls us back when it has been executed.

- transformers: `AutoConfig` and `AutoModelForCausalLM` get our classes once the *outermost* import of the family
  is over. Earlier would be too early: the auto classes are first imported from the middle of other transformers
  modules, which our model files need whole. flash-linear-attention registers its own class under the same
  `model_type`; it belongs to the family so that ours is registered again after it. Its classes stay registered
  under its own config class, so both load.
- lm-eval: `refine` and `refine-ttt` are added when `lm_eval.models` has filled the registry. Earlier would leave
  a registry that is not empty, which lm-eval takes for one that is complete. The targets are strings, so
  our backend is imported only when it is asked for.

The price: importing transformers' auto classes after this package also imports our model files.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

BACKENDS = {
    "refine": "refine_harness.evaluation.lm:RefineLM",
    "refine-ttt": "refine_harness.evaluation.lm:RefineTTTLM",
}
"""lm-eval model names and the classes behind them; `pyproject.toml` names the same pair as entry points."""

_FAMILY = ("transformers", "fla", "refine_harness.models")
_AUTO = "transformers.models.auto.configuration_auto"
_LM_EVAL = "lm_eval.models"
_EXECUTE = "exec_module"


def install() -> None:
    """Register now with what is already imported, and from now on with what will be. Idempotent."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if _LM_EVAL in sys.modules:
        register_backends()
    if _AUTO in sys.modules:
        register_models()


def register_models() -> None:
    """Our configurations and models in transformers' auto classes, in front of any other of the same type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from refine_harness.models.load import MODELS

    for kind, (config, model) in MODELS.items():
        AutoConfig.register(kind, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def register_backends() -> None:
    """Our backends in lm-eval's registry; names that are taken (by an entry point, say) stay as they are."""
    from lm_eval.api.registry import model_registry

    for name, target in BACKENDS.items():
        if name not in model_registry:
            model_registry.register(name, target=target)


class _Watcher(MetaPathFinder):
    """Finds nothing itself: passes on what the other finders find, with a call back after execution."""

    def __init__(self) -> None:
        self._nesting = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        family = any(fullname == name or fullname.startswith(name + ".") for name in _FAMILY)
        if not family and fullname != _LM_EVAL:
            return None
        spec = _ordinary_spec(fullname, path, target)
        loader = None if spec is None else spec.loader
        execute = getattr(loader, _EXECUTE, None)
        if execute is None:
            return spec

        def execute_and_register(module: ModuleType) -> None:
            delattr(loader, _EXECUTE)  # the loader is itself again from here on
            if family:
                self._execute_family(execute, module)
            else:
                execute(module)
                register_backends()

        setattr(loader, _EXECUTE, execute_and_register)
        return spec

    def _execute_family(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self._nesting.depth = getattr(self._nesting, "depth", 0) + 1
        try:
            execute(module)
        finally:
            self._nesting.depth -= 1
        if self._nesting.depth == 0 and _AUTO in sys.modules:
            register_models()


def _ordinary_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        if finder is _FINDER or find_spec is None:
            continue
        if (spec := find_spec(fullname, path, target)) is not None:
            return spec
    return None


_FINDER = _Watcher()
