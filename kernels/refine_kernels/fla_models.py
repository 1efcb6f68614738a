"""flash-linear-attention's own causal language models and the cache they share, imported only when one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from refine_kernels.choose import ImplementationError
from refine_kernels.runtime import interpreted
from refine_kernels.window_attention import window_attention


@cache
def causal_lms() -> Mapping[str, tuple[type[Any], type[Any]]]:
    """model_type -> (config class, model class) of every causal language model in the installed fla.

    Raises ImplementationError with the reason when fla cannot be imported (no Triton, most often).
    """
    try:
        models = importlib.import_module("fla.models")
    except Exception as error:  # fla looks at the machine while it is imported: many kinds, one cause
        raise ImplementationError(f"flash-linear-attention cannot be imported ({error})") from error
    _supply_attention()
    classes = [getattr(models, name) for name in models.__all__ if name.endswith("ForCausalLM")]
    return {kind.config_class.model_type: (kind.config_class, kind) for kind in classes}


def _supply_attention() -> None:
    """Let fla's attention layers, which insist on flash-attn, compute with ours where it is not installed."""
    layers: Any = importlib.import_module("fla.layers.attn")
    if layers.flash_attn_func is None:
        layers.flash_attn_func = _flash_attn_func


def _flash_attn_func(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, causal: bool = True, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """What flash-attn's function of this name computes for fla: the last query meets the last key."""
    window = None if window_size[0] < 0 else window_size[0] + 1
    return window_attention(q_BTHD, k_BSGD, v_BSGD, window=window)


def has_mamba_kernels() -> bool:
    """Whether mamba_ssm is installed, whose kernels fla's Mamba layers then prefer."""
    return find_spec("mamba_ssm") is not None


def why_not(device: torch.device) -> str | None:
    """Why fla's models cannot compute on `device`, or None."""
    if device.type in ("cuda", "xpu", "npu") or interpreted():
        return None
    return "their Triton kernels need a GPU"


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
