"""Reading one token per row, over and over: on a GPU as one CUDA graph, so that no time goes into launching operations.

A decoder owns memory for the state of R rows and a graph that reads a token of each into it. Recording the graph costs
about as much as a few plain steps, so decoders are kept with the model and used again for any R rows; and rows are
filled up to a power of two, so that a handful of graphs serves every number of them. Where a graph cannot be used (no
GPU, a state that grows with the text) every step is a plain `read` of just the rows that there are.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from refine_harness.models.base import FastWeightLM
from refine_harness.models.recorded import autocast_without_cache, setting_of
from refine_harness.models.state import State

KEPT = 8
"""Recorded decoders per model; the one used longest ago goes first."""
WARM_UP = 2
"""Plain steps before recording, in which kernels are compiled and libraries take their workspaces."""

_log = logging.getLogger("refine_harness")


class Decoder:
    """R states that go on token by token."""

    def __init__(self, model: FastWeightLM, state: State, times: int = 1):
        """times: how many rows, side by side, go on from each row of `state`."""
        self._model = model
        self._rows = len(state) * times
        self._graph = None
        seen = [n for n in state.seen for _ in range(times)] if model.host_rows else [0] * self._rows
        if _recordable(model, state):
            rows = 1 << (self._rows - 1).bit_length()
            self._graph = _recorded(model, state, rows)
            if self._graph is not None:
                self._graph.load(state, times)
                seen += [seen[-1]] * (rows - self._rows)
        self._seen = seen
        self._plain = None
        if self._graph is None:  # in memory of its own, since steps may write into it
            self._plain = state.clone() if times == 1 else state.repeat(times)

    def step(self, tokens_R: Tensor) -> Tensor:
        """Read one token per row; hidden states [R, D] after the final norm, valid until the next step."""
        kind = self._model.step_kind(self._seen)
        self._seen = [n + 1 for n in self._seen]
        if self._graph is None:
            # The same operations as of a recorded step.
            in_place = not torch.is_grad_enabled()
            reading = self._model.read(tokens_R[:, None], self._plain, forkable=False, in_place=in_place)
            self._plain = reading.state
            return reading.hidden[:, 0]
        if len(self._seen) > self._rows:
            tokens_R = torch.cat((tokens_R, tokens_R[-1:].expand(len(self._seen) - self._rows)))
        return self._graph.step(self._model, tokens_R, kind)[: self._rows]

    @property
    def state(self) -> State:
        """The states now, in the decoder's own memory: `clone` what must outlive the next step."""
        if self._graph is None:
            assert self._plain is not None
            return self._plain
        full = self._graph.state
        return full if len(full) == self._rows else full.select(slice(self._rows))


class _Graph:
    """Recorded steps for R rows, one for each kind, and the memory that they read and write."""

    def __init__(self, model: FastWeightLM, state: State, rows: int):
        self._memory = state.detach().select([0] * rows)
        self._tokens_R1 = torch.zeros(rows, 1, dtype=torch.int64, device=state.seen_R.device)
        self._recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        """None of kinds that were met once, or cannot be recorded."""
        self._refused: set[Hashable] = set()
        # Most steps are of this kind, wherever the rows stand now; what recording it overwrites is loaded later.
        self._memory.seen_R.zero_()
        self._recordings[0] = self._record(model, 0, in_place=True)

    def _record(self, model: FastWeightLM, kind: Hashable, *, in_place: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step of that kind. In place, what is in the memory is lost."""
        state = self.state
        state.assume_seen(model.place_of(kind, len(state)))
        device = state.seen_R.device
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with autocast_without_cache(device.type):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    model.read(self._tokens_R1, state, forkable=False, in_place=in_place)
            torch.cuda.current_stream(device).wait_stream(stream)
            # On the model's device, which need not be the current one, and whatever other threads do.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                reading = model.read(self._tokens_R1, state, forkable=False, in_place=in_place)
                for new, old in _pairs(reading.state, self._memory):
                    if new is not old:
                        old.copy_(new)
                hidden_RD = reading.hidden[:, 0]
        return graph, hidden_RD

    def _recording(self, model: FastWeightLM, kind: Hashable) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        if kind is None:
            return None
        if kind not in self._recordings:
            self._recordings[kind] = None  # met for the first time, and perhaps for the last
        elif self._recordings[kind] is None and kind not in self._refused:
            try:
                self._recordings[kind] = self._record(model, kind, in_place=False)
            except RuntimeError as error:
                _log.warning("a step without a CUDA graph: %s", str(error).splitlines()[0])
                self._refused.add(kind)
        return self._recordings[kind]

    @property
    def state(self) -> State:
        """The memory, without what the host once knew of it."""
        return State(self._memory.layers, self._memory.seen_R)

    def load(self, state: State, times: int = 1) -> None:
        """Go on from other states, each in so many rows; rows that are left go on as the last and are not heard."""
        for new, old in _pairs(state.detach(), self._memory):
            n = len(new) * times
            old[:n].unflatten(0, (len(new), times)).copy_(new[:, None])
            old[n:].copy_(new[-1:])

    def step(self, model: FastWeightLM, tokens_R: Tensor, kind: Hashable) -> Tensor:
        """Hidden states [R, D] after one more token of each row, which is a step of that kind."""
        recording = self._recording(model, kind)
        if recording is None:
            reading = model.read(tokens_R[:, None], self.state, forkable=False)
            self.load(reading.state)
            return reading.hidden[:, 0]
        graph, hidden_RD = recording
        self._tokens_R1.copy_(tokens_R[:, None])
        graph.replay()
        return hidden_RD


def _pairs(a: State, b: State) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of the same name."""
    for of_a, of_b in zip(a.layers, b.layers, strict=True):
        for name, x in of_a.items():
            yield x, of_b[name]
    yield a.seen_R, b.seen_R


_DECODERS: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, _Graph]] = weakref.WeakKeyDictionary()


def _recordable(model: FastWeightLM, state: State) -> bool:
    return state.seen_R.device.type == "cuda" and model.fixed_state and not torch.is_grad_enabled()


def _recorded(model: FastWeightLM, state: State, rows: int) -> _Graph | None:
    """A graph for so many rows of such a state, recorded now or before; None where it cannot be recorded."""
    setting = setting_of(model, state.seen_R.device.type)
    if setting is None:
        return None
    kept = _DECODERS.setdefault(model, OrderedDict())
    shapes = tuple((name, rows, x.shape[1:], x.dtype) for layer in state.layers for name, x in layer.items())
    key = (hash(shapes), setting)
    if key not in kept:
        try:
            kept[key] = _Graph(model, state, rows)
        except RuntimeError as error:
            _log.warning("decoding without a CUDA graph: %s", str(error).splitlines()[0])
            return None
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
