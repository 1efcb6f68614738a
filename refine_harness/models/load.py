"""A folder, an embedded name or a hub id becomes a model and its tokenizer, or one clear sentence.

Only safetensors are read and no code from a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, logging
from transformers.utils.hub import cached_file

from refine_harness.errors import ModelError, RunError, suggest
from refine_harness.models.adapter import adapted_classes, check_device
from refine_harness.models.base import FastWeightLM
from refine_harness.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine_harness.models.lact import LaCTForCausalLM, LaCTSWIGLUConfig

EMBEDDED = "refine-tiny"
"""The base checkpoint in the package."""

MODELS: dict[str, tuple[type[PretrainedConfig], type[FastWeightLM]]] = {
    DeltaNetConfig.model_type: (DeltaNetConfig, DeltaNetForCausalLM),
    GatedDeltaNetConfig.model_type: (GatedDeltaNetConfig, GatedDeltaNetForCausalLM),
    LaCTSWIGLUConfig.model_type: (LaCTSWIGLUConfig, LaCTForCausalLM),
}
"""model_type in a config.json -> our classes."""


def resolve_model(name: str | Path) -> str:
    """A folder's path as it is, the embedded model's folder for its name, anything else as a hub id.

    Raises ModelError for a path that does not exist, before anything is loaded.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json. Give a Hugging Face model folder.")
        return str(path)
    if str(name) == EMBEDDED:
        return str(Path(__file__).resolve().parent.parent / "assets" / EMBEDDED)
    text = str(name)
    if path.exists():
        raise ModelError(f"{name} is a file. Give the model folder that holds config.json.")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        hint = suggest(text, [EMBEDDED]) or (
            f" Give a model folder, the embedded {EMBEDDED}, or a hub id such as fla-hub/delta_net-1.3B-100B."
        )
        raise ModelError(f"no model folder at {name}.{hint}")
    return text


def load_config(name: str | Path) -> PretrainedConfig:
    """The config of a model, native here or flash-linear-attention's. Raises ModelError."""
    source = resolve_model(name)
    try:
        path = cached_file(source, CONFIG_NAME)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} is neither a model folder here nor a hub id that can be reached ({_first_line(error)})."
        ) from None
    kind = read_json(Path(str(path))).get("model_type")
    settings, _ = _family(name, kind)
    try:
        return settings.from_json_file(str(path))
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json of {name} does not describe a {kind} model ({_first_line(error)}).") from None


def _family(name: str | Path, kind: Any) -> tuple[type[PretrainedConfig], type[FastWeightLM]]:
    """Our classes for a model_type, or flash-linear-attention's under our contract. Raises ModelError."""
    if kind in MODELS:
        return MODELS[kind]
    try:
        return adapted_classes(kind)
    except ModelError as error:
        raise ModelError(
            f"{name} is of model_type {kind!r}; this version reads {', '.join(MODELS)} itself, and {error}"
        ) from None


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or in a folder of its own. Raises ModelError."""
    source = str(name) if Path(name).is_dir() else resolve_model(name)
    try:
        with _silence():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raise many kinds for one cause: the files are not a tokenizer
        raise ModelError(
            f"{name} has no tokenizer that can be read ({_first_line(error)}). "
            "Put tokenizer.json and tokenizer_config.json beside the model."
        ) from None


def load_model(
    name: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32"
) -> tuple[FastWeightLM, PreTrainedTokenizerBase]:
    """Model in eval mode and tokenizer.

    Args:
        name: a Hugging Face model folder, an embedded name, or a hub id.
        device: a torch device; `auto` is CUDA where there is one.
        dtype: float32, bfloat16, float64, or `auto` (bfloat16 on CUDA, float32 on a CPU).

    Raises ModelError: nothing there, a corrupt file, weights that do not fit the config, a tokenizer with more
    tokens than the model has embeddings.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    config = load_config(name)
    if config.model_type not in MODELS:
        check_device(config.model_type, device)
    tokenizer = load_tokenizer(name)
    _check_tokenizer(name, config, tokenizer)
    model = _load_weights(name, config, dtype)
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ModelError for a device that is not there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device} was asked for, and torch sees no GPU here. Use device=auto or device=cpu.")
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere. Raises ModelError for a name that is no float type."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(f"dtype {dtype} is not known. Use float32, bfloat16, float64 or auto.")
    return chosen


def _load_weights(name: str | Path, config: PretrainedConfig, dtype: torch.dtype) -> FastWeightLM:
    source = resolve_model(name)
    _, kind = _family(name, config.model_type)
    try:
        with _silence():
            loaded: Any = kind.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, in one sentence
                output_loading_info=True,
            )
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    except ImportError as error:  # of flash-linear-attention's models, some need more than it brings
        raise ModelError(f"{name} needs a package that is not installed here ({_first_line(error)}).") from None
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:  # the cause for the user is one
        raise ModelError(
            f"the weights of {name} cannot be read ({_first_line(error)}). Copy the checkpoint again."
        ) from None
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in info.get(what) or ()):
            raise ModelError(
                f"the weights of {name} do not fit its config.json: {what.replace('_', ' ')} {keys[0]}"
                f"{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}. Use the config "
                "that the weights were saved with."
            )
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """transformers' bars and reports kept off the terminal: what matters of them is raised here as one sentence."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_tokenizer(name: str | Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens and the model {config.vocab_size} embeddings. "
            "Use the tokenizer that the model was trained with."
        )
    for role in ("bos", "eos", "pad"):
        ours, theirs = getattr(config, f"{role}_token_id"), getattr(tokenizer, f"{role}_token_id")
        if ours is not None and theirs is not None and ours != theirs:
            raise ModelError(
                f"the tokenizer of {name} has {role} token {theirs} and config.json says {ours}. "
                "Use the tokenizer that the model was trained with."
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({_first_line(error)}). Give a model's config.json.") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds a {type(tree).__name__}; expected an object. Give a model's config.json.")
    return tree


def create_model(config: str | Path, tokenizer: str | Path, out: str | Path, *, seed: int = 0) -> Path:
    """A folder with random float32 weights for `config` (a config.json) and a copy of the tokenizer.

    Raises ModelError for a config or tokenizer that cannot be used, and RunError when `out` cannot be written.
    """
    kind = read_json(Path(config)).get("model_type")
    settings, family = _family(config, kind)
    try:
        described = settings.from_json_file(str(config))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{config} does not describe a {kind} model ({_first_line(error)}).") from None
    words = load_tokenizer(tokenizer)
    _check_tokenizer(tokenizer, described, words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(described)
    out = Path(out)
    draft = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        with _silence():
            model.save_pretrained(draft)
            words.save_pretrained(draft)
        os.replace(draft, out)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}). Choose another --out.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out
