"""A long row of small kernels as one launch: recorded as a CUDA graph, and replayed on copies of its inputs.

LaCT's chunks must be worked through one after another, dozens of kernels each, forward and backward. Launched one by
one from Python they take longer to launch than to run. Where nothing can be recorded (no GPU, inside another recording,
too much to copy) the work simply runs; the numbers are the same.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT = 16
"""Recordings in all; the one used longest ago goes first."""
LARGEST = 2**30
"""Bytes of inputs above which nothing is recorded: so much work keeps a GPU busy for longer than it takes to launch."""

Tensors = Sequence[Tensor | None]
Work = Callable[..., Tensors]

_log = logging.getLogger("refine_harness")


def replayed(work: Work, inputs: Tensors, into: Tensors, **settings: Hashable) -> None:
    """Write what work(*inputs, **settings) returns into the tensors of `into`, each in its place; None is left out.

    Args:
        work: does the same operations for all inputs of the same shapes, waits for the device nowhere, and overwrites
            none of its inputs. Gradients must be off.
        inputs: copied where a recording is used, and contiguous then; any strides.
        into: of the shapes of the results, any strides.

    Work of shapes that were met before is recorded. It runs on the current stream either way.
    """
    assert not torch.is_grad_enabled()
    recording = _find(work, inputs, settings)
    outputs = work(*inputs, **settings) if recording is None else recording.run(inputs)
    for target, x in zip(into, outputs, strict=True):
        if target is not None and x is not None:
            _copy(x, target)


def _copy(x: Tensor, target: Tensor) -> None:
    """target.copy_(x); between other strides, where torch moves one element at a time, 16 bytes instead."""
    if x.dtype == target.dtype and not (x.is_contiguous() and target.is_contiguous()):
        wide, wide_target = _in_sixteens(x), _in_sixteens(target)
        if wide is not None and wide_target is not None:
            x, target = wide, wide_target
    target.copy_(x)


def _in_sixteens(x: Tensor) -> Tensor | None:
    """The same memory as elements of 16 bytes; None where rows are not made of them."""
    n = 16 // x.element_size()
    sizes = (x.shape[-1:].numel(), x.storage_offset(), *x.stride()[:-1])
    if x.dim() == 0 or x.stride(-1) != 1 or any(size % n for size in sizes):
        return None
    return x.view(torch.complex128)


class _Recording:
    def __init__(self, work: Work, inputs: Tensors, settings: dict[str, Hashable]):
        self._inputs = [
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
        ]
        self._load(inputs)
        self.device = device = next(x.device for x in inputs if x is not None)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            work(*self._inputs, **settings)  # compiles and loads kernels, which a recording must not do
            # Other threads and streams may go on with what they do.
            self._graph.capture_begin(pool=_pool(device), capture_error_mode="thread_local")
            try:
                self._outputs = work(*self._inputs, **settings)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def run(self, inputs: Tensors) -> Tensors:
        """The results, in memory that the next run overwrites."""
        self._load(inputs)
        self._graph.replay()
        return self._outputs

    def _load(self, inputs: Tensors) -> None:
        for own, x in zip(self._inputs, inputs, strict=True):
            if own is not None and x is not None:
                _copy(x, own)


def _pool(device: torch.device) -> Any:
    """Memory for what lies between inputs and outputs, shared by all recordings; it goes with the last of them."""
    others = (other for other in _RECORDINGS.values() if other is not None and other.device == device)
    other = next(others, None)
    return torch.cuda.graph_pool_handle() if other is None else other.pool


_RECORDINGS: OrderedDict[Hashable, _Recording | None] = OrderedDict()
"""By work, settings, shapes and stream; None of what was met once, or cannot be recorded."""
_REFUSED: set[Hashable] = set()


def _find(work: Work, inputs: Tensors, settings: dict[str, Hashable]) -> _Recording | None:
    given = [x for x in inputs if x is not None]
    device = given[0].device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    if sum(x.numel() * x.element_size() for x in given) > LARGEST:
        return None
    key = (
        work,
        tuple(settings.items()),
        tuple(None if x is None else (x.shape, x.dtype) for x in inputs),
        device,
        torch.cuda.current_stream(device).cuda_stream,
    )
    if key not in _RECORDINGS:
        _RECORDINGS[key] = None  # met for the first time, and perhaps for the last
        while len(_RECORDINGS) > 2 * KEPT:
            _RECORDINGS.popitem(last=False)
        return None
    _RECORDINGS.move_to_end(key)
    if _RECORDINGS[key] is None and key not in _REFUSED:
        recorded = [other for other, recording in _RECORDINGS.items() if recording is not None]
        for other in recorded[: max(0, len(recorded) - KEPT + 1)]:
            del _RECORDINGS[other]
        try:
            _RECORDINGS[key] = _Recording(work, inputs, settings)
        except RuntimeError as error:
            _log.warning("%s runs without a CUDA graph: %s", work.__name__, str(error).splitlines()[0])
            _REFUSED.add(key)
    return _RECORDINGS[key]
