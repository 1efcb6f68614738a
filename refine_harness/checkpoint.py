"""Checkpoints as Hugging Face folders, and the folder of a run that holds them.

    <run>/run.json                     what this run is; another run is refused
    <run>/step-000400/                 the last resumable checkpoint
    <run>/final/                       the trained model
      config.json, *.safetensors, tokenizer files    as transformers writes them
      training_config.json                           resolved settings, stage, parent, progress
      train_state.json, train_state.safetensors      resumable checkpoints only

A folder appears under its name whole or not at all. Weights and optimizer are safetensors, never pickles.
Which process saves, and when, is the caller's; it must have all weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refine_harness.config import STAGES, TrainConfig
from refine_harness.errors import ModelError, RunError
from refine_harness.training.trainer import TrainState

FINAL = "final"
RUN = "run.json"
_STEP = re.compile(r"step-(\d+)")
_UNFINISHED = ".tmp-"
_STATE = "train_state.json"
_TENSORS = "train_state.safetensors"


def step_folder(run: str | Path, optimizer_steps: int) -> Path:
    """Where a run's resumable checkpoint after so many optimizer steps belongs."""
    return Path(run) / f"step-{optimizer_steps:06d}"


def final_checkpoint(run: str | Path) -> Path | None:
    """The finished model of a run, or None."""
    folder = Path(run) / FINAL
    return folder if (folder / "training_config.json").is_file() else None


def latest_checkpoint(run: str | Path) -> Path | None:
    """The resumable checkpoint of a run that is furthest on, or None."""
    found = _step_folders(Path(run))
    return found[-1] if found else None


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    state: TrainState,
    *,
    parent: str | None = None,
    chain: Sequence[str] = (),
    data_sha256: str | None = None,
    resumable: bool = True,
) -> Path:
    """Write a checkpoint; on return it is on disk, and until then `folder` is what it was.

    Args:
        state: of the trainer, at the same moment as the weights.
        parent: `weights_sha256` of the checkpoint that training started from.
        chain: the stages that led here, this one last.
        data_sha256: of the training data.
        resumable: keep the optimizer too (twice the size of the weights in their dtype).

    Raises RunError when the folder cannot be written.
    """
    folder = Path(folder)
    stage = next((name for name, kind in STAGES.items() if type(config) is kind), None)
    progress = asdict(replace(state, optimizer={}))
    del progress["optimizer"]
    about = {
        "stage": stage,
        "chain": list(chain),
        "parent_sha256": parent,
        "data_sha256": data_sha256,
        "progress": progress,
        "config": config.model_dump(mode="json"),
    }
    try:
        with _whole_folder(folder) as draft:
            model.save_pretrained(draft, safe_serialization=True)
            tokenizer.save_pretrained(draft)
            _write_json(draft / "training_config.json", about)
            if resumable:
                save_file(state.optimizer, draft / _TENSORS)
                _write_json(draft / _STATE, progress)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the checkpoint {folder} cannot be written ({_reason(error)}). Make room, or choose another --out."
        ) from None
    return folder


def load_train_state(folder: str | Path) -> TrainState:
    """What `save_checkpoint(resumable=True)` kept besides the weights. Raises RunError when it is not all there."""
    folder = Path(folder)
    try:
        progress = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return TrainState(**progress, optimizer=load_file(folder / _TENSORS))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{folder} cannot be resumed from: its training state is missing or damaged ({_reason(error)}). "
            "Delete that folder, and start again."
        ) from None


def prune(run: str | Path, *, keep_last: bool = True) -> None:
    """Delete what a run no longer needs: resumable checkpoints (but the last, if `keep_last`), and what interrupted
    saves left."""
    run = Path(run)
    folders = _step_folders(run)
    for folder in folders[:-1] if keep_last else folders:
        # Out of sight first: a deletion that is interrupted must not leave part of a checkpoint under its name.
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}{_UNFINISHED}{os.getpid()}")))
    for left in run.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def weights_sha256(source: str | Path | PreTrainedModel) -> str:
    """A hash of the weights themselves: every tensor's name, dtype, shape and bytes, in order of name.

    The same for a model, for its saved folder, and however the folder is cut into files. A tensor that is tied to
    another counts once, under the name that is saved. Raises ModelError for a folder without readable safetensors.
    """
    digest = hashlib.sha256()
    tensors = _in_memory(source) if isinstance(source, PreTrainedModel) else _in_folder(Path(source))
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def claim_run_folder(run: str | Path, fingerprint: dict[str, Any]) -> bool:
    """Make `run` the folder of the run that `fingerprint` describes; True when it already was, so that it goes on.

    fingerprint: JSON values that decide the run's outcome. Raises RunError when the folder holds another run or
    files of something else, or cannot be written.
    """
    run = Path(run)
    wanted = json.loads(json.dumps(fingerprint))
    try:
        run.mkdir(parents=True, exist_ok=True)
        there = sorted(entry.name for entry in run.iterdir() if _UNFINISHED not in entry.name)
        if there and RUN not in there:
            raise RunError(
                f"{run} holds other files ({there[0]}) and no run. Choose another --out, or empty the folder."
            )
        draft = run / f"{RUN}{_UNFINISHED}{os.getpid()}"
        _write_json(draft, {"fingerprint": wanted})
        try:
            if RUN not in there and _named_first(draft, run / RUN):
                return False
        finally:
            draft.unlink(missing_ok=True)
        _require_same(run, wanted)
        return True
    except OSError as error:
        raise RunError(f"{run} cannot be written ({_reason(error)}). Choose another --out.") from None


def _named_first(draft: Path, path: Path) -> bool:
    """Give a file its name, unless another process has given it to one of its own."""
    try:
        os.link(draft, path)  # which fails where there is one, unlike renaming
    except FileExistsError:
        return False
    except OSError:  # a file system where files have no second names
        os.replace(draft, path)
    return True


def _require_same(run: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads((run / RUN).read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{run / RUN} is not readable as a run. Choose another --out, or delete {run}.") from None
    theirs, ours = _flat(found), _flat(wanted)
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differing:
        key = differing[0]
        more = f" and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise RunError(
            f"{run} holds another run: {key} is {theirs.get(key)!r} there and {ours.get(key)!r} here{more}. "
            "Choose another --out, or delete the folder."
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {path: leaf for key, value in tree.items() for path, leaf in _flat(value, f"{prefix}{key}.").items()}


def _step_folders(run: Path) -> list[Path]:
    """Whole resumable checkpoints, in order of steps."""
    if not run.is_dir():
        return []
    numbered = [(int(match[1]), entry) for entry in run.iterdir() if (match := _STEP.fullmatch(entry.name))]
    return [entry for _, entry in sorted(numbered) if (entry / _STATE).is_file()]


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A draft beside `folder` that takes its name when the block ends, and is gone if it ends by an exception."""
    draft = folder.with_name(f"{folder.name}{_UNFINISHED}{os.getpid()}")
    old = folder.with_name(f"{folder.name}{_UNFINISHED}{os.getpid()}-old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        yield draft
        for path in draft.rglob("*"):
            _to_disk(path)
        _to_disk(draft)
        try:
            if folder.exists():
                folder.rename(old)
            draft.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        _to_disk(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    draft = path.with_name(f"{path.name}{_UNFINISHED}{os.getpid()}")
    draft.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _in_memory(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for name in sorted(weights):
        yield name, weights[name].detach().cpu()


def _in_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        files = _weight_files(folder)
        for name in sorted(files):
            with safe_open(files[name], framework="pt") as reader:
                yield name, reader.get_tensor(name)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} has no readable safetensors weights ({_reason(error)}). Give a Hugging Face model folder."
        ) from None


def _weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        whole = folder / "model.safetensors"
        with safe_open(whole, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), whole)
    # Only the file's own name is taken: an index must not point outside its folder.
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {name: folder / Path(shard).name for name, shard in shards.items()}


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
