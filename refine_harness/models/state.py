"""The state of a fast-weight model as a value: it can be repeated, selected, detached, moved, saved and read on from.

A state holds one dictionary of tensors per layer; the first dimension of every tensor is the row (one row per
text that was read). What the tensors are is the layer's business, but for one thing: where rows of one model can have
tensors of different size, it is the second dimension that differs, and it is a history aligned to the right: the last
entry belongs to the last token read, and zeros in front are room that the row has not filled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from refine_harness.errors import DataError


@dataclass(frozen=True)
class State:
    """All that a model remembers of R texts."""

    layers: tuple[dict[str, Tensor], ...]
    """Per layer: named tensors whose first dimension is R."""
    seen_R: Tensor
    """int64, tokens read so far."""

    def __len__(self) -> int:
        return self.seen_R.shape[0]

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """`seen_R` on the host; asking waits for the device."""
        return tuple(self.seen_R.tolist())

    def assume_seen(self, seen: tuple[int, ...]) -> None:
        """Tell what `seen` is, so that nobody asks the device."""
        self.__dict__["seen"] = seen

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        return State(
            tuple({name: change(x) for name, x in layer.items()} for layer in self.layers), change(self.seen_R)
        )

    def repeat(self, n: int) -> State:
        """Each row n times, copies side by side: rows a, b become a, a, b, b for n = 2. Carries gradients."""
        return self if n == 1 else self._map(lambda x: x.repeat_interleave(n, 0))

    def select(self, rows: Tensor | Sequence[int] | slice) -> State:
        """Some rows, in the order given; a row may be asked for more than once. Carries gradients."""
        if isinstance(rows, slice):
            return self._map(lambda x: x[rows])
        index = torch.as_tensor(rows, device=self.seen_R.device)
        return self._map(lambda x: x[index])

    def detach(self) -> State:
        """The same values, cut from the graph."""
        return self._map(Tensor.detach)

    def clone(self) -> State:
        """The same values in memory of their own."""
        copy = self._map(Tensor.clone)
        if "seen" in self.__dict__:  # on the host already
            copy.assume_seen(self.seen)
        return copy

    def to(self, device: torch.device | str) -> State:
        """The same values on another device."""
        return self._map(lambda x: x.to(device))

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """The rows of several states of one model, one after another; shorter histories get zeros in front."""
        first = states[0]
        layers = tuple(
            {name: _cat([s.layers[i][name] for s in states]) for name in layer} for i, layer in enumerate(first.layers)
        )
        return State(layers, torch.cat([s.seen_R for s in states]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [x for layer in self.layers for x in layer.values()]
        return sum(x.numel() * x.element_size() for x in (*tensors, self.seen_R))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.items()}
        tensors["seen"] = self.seen_R
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, partial)
        os.replace(partial, path)

    @staticmethod
    def load(path: str | Path) -> State:
        """Read what `save` wrote. Raises DataError for anything else."""
        try:
            tensors = load_file(path)
            seen_R = tensors.pop("seen")
            layers: list[dict[str, Tensor]] = []
            for key in sorted(tensors, key=lambda key: int(key.split(".")[0])):
                index, name = key.split(".", 1)
                while len(layers) <= int(index):
                    layers.append({})
                layers[int(index)][name] = tensors[key]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is not a saved state ({error}). Give a file that State.save wrote.") from None
        return State(tuple(layers), seen_R)


def _cat(tensors: list[Tensor]) -> Tensor:
    if len({x.shape[1:] for x in tensors}) > 1:
        longest = max(x.shape[1] for x in tensors)
        tensors = [F.pad(x, (0, 0) * (x.dim() - 2) + (longest - x.shape[1], 0)) for x in tensors]
    return torch.cat(tensors)
