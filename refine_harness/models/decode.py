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

    def __init__(self, model: FastWeightLM, state: State):
        self._model = model
        self._rows = len(state)
        self._graph = None
        if _recordable(model, state):
            full = _filled(state, 1 << (len(state) - 1).bit_length())
            self._graph = _recorded(model, full)
            if self._graph is not None:
                state = full
                self._graph.load(full)
        self._seen = list(state.seen) if model.host_rows else [0] * len(state)
        self._plain = None if self._graph is not None else state

    def step(self, tokens_R: Tensor) -> Tensor:
        """Read one token per row; hidden states [R, D] after the final norm, valid until the next step."""
        ordinary = self._model.ordinary_step(self._seen)
        self._seen = [n + 1 for n in self._seen]
        if self._graph is None:
            reading = self._model.read(tokens_R[:, None], self._plain, forkable=False)
            self._plain = reading.state
            return reading.hidden[:, 0]
        if len(self._seen) > self._rows:
            tokens_R = torch.cat((tokens_R, tokens_R[-1:].expand(len(self._seen) - self._rows)))
        if ordinary:
            return self._graph.step(tokens_R)[: self._rows]
        reading = self._model.read(tokens_R[:, None], self._graph.state, forkable=False)
        self._graph.load(reading.state)
        return reading.hidden[: self._rows, 0]

    @property
    def state(self) -> State:
        """The states now. With a graph they are the decoder's own memory: `clone` what must outlive the next step."""
        if self._graph is None:
            assert self._plain is not None
            return self._plain
        full = self._graph.state
        return full if len(full) == self._rows else full.select(slice(self._rows))


class _Graph:
    """A recorded step for R rows, and the memory that it reads and writes."""

    def __init__(self, model: FastWeightLM, state: State):
        self._memory = state.detach().clone()
        self._tokens_R1 = torch.zeros(len(state), 1, dtype=torch.int64, device=state.seen_R.device)
        # What is recorded is the ordinary step, wherever the rows stand now; what it overwrites is loaded later.
        place = model.ordinary_place(len(state))
        self._memory.assume_seen(place)
        self._memory.seen_R.copy_(torch.tensor(place))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                model.read(self._tokens_R1, self._memory, forkable=False, in_place=True)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            reading = model.read(self._tokens_R1, self._memory, forkable=False, in_place=True)
            _copy(reading.state, self._memory)
            self._hidden_RD = reading.hidden[:, 0]

    @property
    def state(self) -> State:
        """The memory, without what the host once knew of it."""
        return State(self._memory.layers, self._memory.seen_R)

    def load(self, state: State) -> None:
        """Go on from other states of the same shapes."""
        _copy(state.detach(), self._memory)

    def step(self, tokens_R: Tensor) -> Tensor:
        self._tokens_R1.copy_(tokens_R[:, None])
        self._graph.replay()
        return self._hidden_RD


def _copy(source: State, target: State) -> None:
    for new, old in zip(source.layers, target.layers, strict=True):
        for name, x in new.items():
            if x is not old[name]:
                old[name].copy_(x)
    target.seen_R.copy_(source.seen_R)


def _filled(state: State, rows: int) -> State:
    """So many rows: those there are, and the last one again and again, which goes on as it does and is not heard."""
    n = len(state)
    return state if n == rows else state.select([*range(n), *[n - 1] * (rows - n)])


_DECODERS: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, _Graph]] = weakref.WeakKeyDictionary()


def _recordable(model: FastWeightLM, state: State) -> bool:
    return state.seen_R.device.type == "cuda" and model.fixed_state and not torch.is_grad_enabled()


def _recorded(model: FastWeightLM, state: State) -> _Graph | None:
    """A graph for these rows, recorded now or before; None where it cannot be recorded."""
    setting = setting_of(model, state.seen_R.device.type)
    if setting is None:
        return None
    kept = _DECODERS.setdefault(model, OrderedDict())
    shapes = tuple((name, x.shape, x.dtype) for layer in state.layers for name, x in layer.items())
    key = (hash(shapes), setting)
    if key not in kept:
        try:
            with autocast_without_cache(state.seen_R.device.type):
                kept[key] = _Graph(model, state)
        except RuntimeError as error:
            _log.warning("decoding without a CUDA graph: %s", str(error).splitlines()[0])
            return None
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
