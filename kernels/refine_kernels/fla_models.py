"""flash-linear-attention's own causal language models and the cache they share, imported only when one is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from refine_kernels.choose import ImplementationError


@cache
def causal_lms() -> Mapping[str, tuple[type[Any], type[Any]]]:
    """model_type -> (config class, model class) of every causal language model in the installed fla.

    Raises ImplementationError with the reason when fla cannot be imported (no Triton, most often).
    """
    try:
        models = importlib.import_module("fla.models")
    except Exception as error:  # fla looks at the machine while it is imported: many kinds, one cause
        raise ImplementationError(f"flash-linear-attention cannot be imported ({error})") from error
    classes = [getattr(models, name) for name in models.__all__ if name.endswith("ForCausalLM")]
    return {kind.config_class.model_type: (kind.config_class, kind) for kind in classes}


def why_not(device: torch.device) -> str | None:
    """Why fla's models cannot compute on `device`, or None."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "their Triton kernels need a GPU"
    return None


def new_cache(layers: Sequence[dict[str, Any] | None], seen: int) -> Any:
    """fla's cache holding these layer states (the dictionaries that it indexes to) after `seen` tokens.

    Its `asked` becomes True when a layer asks for the number of tokens seen: where one does, rows that have seen
    different numbers cannot share a pass. Layers may change the tensors in place.
    """
    return _counting_cache(cache_class()).from_legacy_cache(tuple(layers), seen_tokens=seen)


def cache_class() -> type[Any]:
    """fla's cache class."""
    return importlib.import_module("fla.models.utils").Cache


@cache
def _counting_cache(base: type[Any]) -> type[Any]:
    class CountingCache(base):
        asked = False

        def get_seq_length(self, *arguments: Any, **named: Any) -> int:
            self.asked = True
            return super().get_seq_length(*arguments, **named)

    return CountingCache
