"""Small pieces of work with gradients as CUDA graphs, forward and backward, so that no time goes into launching them.

A ReFINE step forks a few states and reads a few tokens from each: thousands of kernels of a few microseconds, which
take longer to launch than to run. Here such a piece is recorded once for its shapes and then replayed, through
torch's own `make_graphed_callables`. Where a graph cannot be used the piece simply runs; the numbers are the same.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 4
"""Recordings per model; the one used longest ago goes first."""
WARM_UP = 3
"""Plain runs before recording, in which kernels are compiled and libraries take their workspaces."""

Piece = Callable[..., tuple[Tensor, ...]]

_log = logging.getLogger("refine_harness")


def recorded(model: nn.Module, name: str, piece: Piece, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """piece(*inputs), attached to the inputs and to the model's parameters.

    What it returns is the recording's own memory, and so is what its backward needs: valid until the piece is asked
    for again after its backward has run. Asked for again before, it runs without a recording.

    Args:
        name: of the piece; with it, the shapes of the inputs and where the parameters lie, it is found again.
        piece: a function of tensors alone that does the same operations whatever their values are, and waits for none.
    """
    recording = _find(model, name, piece, inputs)
    if recording is None or recording.busy:
        return piece(*inputs)
    return recording.run(inputs)


def setting_of(model: nn.Module, device: str) -> Hashable | None:
    """What a recording of the model depends on besides its inputs; None where it cannot be recorded."""
    parameters = list(model.parameters())
    if any(type(p) not in (nn.Parameter, Tensor) for p in parameters):  # sharded ones come and go
        return None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return hash(tuple((id(p), p.data_ptr(), p.requires_grad) for p in parameters)), model.training, autocast


def autocast_without_cache(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is now, but weights are cast by each recording for itself: what is cached is freed and made again,
    elsewhere and of other weights, behind a recording's back."""
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False)


@contextmanager
def _recorded_on(device: torch.device) -> Iterator[None]:
    """Where torch records: else on the current device, and on a stream of whichever device was the first."""
    usual, torch.cuda.graph.default_capture_stream = torch.cuda.graph.default_capture_stream, None
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.cuda.graph.default_capture_stream = usual


class _Run:
    """Lives as long as the graph of one run."""


class _Recording:
    def __init__(self, model: nn.Module, piece: Piece, inputs: Sequence[Tensor]):
        self._owner: weakref.ref[_Run] | None = None
        # Recorded with stand-ins for the parameters, in the same memory: the parameters' own gradient nodes may belong
        # to a graph that is alive, and to the stream of that graph, which must not meet the stream of the recording.
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        names = [f"model.{name}" for name, p in model.named_parameters() if p.requires_grad]
        stand_ins = [p.detach().requires_grad_() for p in self._parameters]
        samples = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        of_model = _Piece(model, piece)

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            given, parameters = tensors[: len(samples)], tensors[len(samples) :]
            return torch.func.functional_call(of_model, dict(zip(names, parameters, strict=True)), given)

        device = inputs[0].device
        with autocast_without_cache(device.type), _recorded_on(device), warnings.catch_warnings():
            # torch keeps its last plain run while it records on another stream; nothing is accumulated on either.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match", UserWarning)
            self._call: Any = torch.cuda.make_graphed_callables(
                call, (*samples, *stand_ins), num_warmup_iters=WARM_UP, allow_unused_input=True
            )

    @property
    def busy(self) -> bool:
        """Whether a run waits for its backward."""
        return self._owner is not None and self._owner() is not None

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outputs = self._call(*inputs, *self._parameters)
        node = outputs[0].grad_fn
        if node is not None:
            run = _Run()
            node.metadata["run"] = run
            self._owner = weakref.ref(run)
            outputs[0].register_hook(self._release)
        return outputs

    def _release(self, _: Tensor) -> None:
        self._owner = None


class _Piece(nn.Module):
    """The piece as a module, whose parameters can be replaced for a call."""

    def __init__(self, model: nn.Module, piece: Piece):
        super().__init__()
        self.model = model
        self._piece = piece

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._piece(*inputs)


_RECORDINGS: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, _Recording | None]] = weakref.WeakKeyDictionary()


def _find(model: nn.Module, name: str, piece: Piece, inputs: Sequence[Tensor]) -> _Recording | None:
    if inputs[0].device.type != "cuda" or not torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
        return None
    setting = setting_of(model, inputs[0].device.type)
    if setting is None:
        return None
    kept = _RECORDINGS.setdefault(model, OrderedDict())
    key = (name, tuple((x.shape, x.dtype, x.requires_grad) for x in inputs), setting)
    if key not in kept:
        try:
            kept[key] = _Recording(model, piece, inputs)
        except RuntimeError as error:
            _log.warning("%s runs without a CUDA graph: %s", name, str(error).splitlines()[0])
            kept[key] = None
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
