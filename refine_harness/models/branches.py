"""Branches of a reading: short continuations that start inside a text, are looked at and thrown away.

The plain way is to fork the state, repeat it for every rollout and read on. A model whose state is large, next to the
few tokens that are read from it, can say that it reads branches from the tape instead (`FastWeightLM.reads_branches`):
each layer then looks up what its new tokens ask of the text, and no state is made. Such a branch keeps nothing between
tokens: sampling reads its few tokens again for each, which is cheaper than memory for what may not be needed.

    B texts   C positions of each   N rollouts per position   F = B·C forks   R = F·N rows   K tokens of a rollout
"""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from refine_harness.models.base import Branch, FastWeightLM, Reading, Rows
from refine_harness.models.decode import Decoder
from refine_harness.models.recorded import autocast_without_cache, setting_of
from refine_harness.models.state import State
from refine_harness.types import Download

Step = Callable[[Tensor], Tensor]
"""Reads one more token of each row: int64 [R] -> hidden states [R, D], valid until the next call."""


class Branches(ABC):
    """R rows, N for each position in row-major order, that go on from a reading."""

    @abstractmethod
    def hidden(self, tokens_RK: Tensor) -> Tensor:
        """Hidden states [R, K, D] of tokens read from the positions; attached to the reading."""

    @abstractmethod
    def samplers(self) -> Iterator[tuple[Tensor | None, Step]]:
        """Reading token by token, without gradients: for which rows (None: all), and how.

        What a later pair says of a row replaces what an earlier one said. Take the next when the last is used up.
        """

    def expect(self, tokens_RK: Tensor) -> None:  # noqa: B027
        """Said between two pairs: `hidden` will be asked for next, of these tokens unless a later pair changes them."""


def branch(reading: Reading, positions_BC: Tensor, *, rollouts: int, length: int) -> Branches:
    """Branches after those positions, to be continued by at most `length` tokens.

    Raises RuntimeError when the reading was made with forkable=False.
    """
    model, tapes = reading.model, reading.tapes
    lean_BC = None if tapes is None else model.reads_branches(tapes, positions_BC, length)
    if lean_BC is None:
        return _Forked(model, reading.states_at(positions_BC, once=True), rollouts)
    return _FromTape(reading, positions_BC, rollouts, length, lean_BC)


class _Forked(Branches):
    """From states of their own, one for each position."""

    def __init__(self, model: FastWeightLM, states: State, rollouts: int, few: bool = False):
        self._model, self._states, self._rollouts, self._few = model, states, rollouts, few

    def hidden(self, tokens_RK: Tensor) -> Tensor:
        return self._model.continued(tokens_RK, self._states)

    def samplers(self) -> Iterator[tuple[Tensor | None, Step]]:
        yield None, self.sampler()

    def sampler(self) -> Step:
        if not self._few:
            return Decoder(self._model, self._states.detach(), self._rollouts).step
        state = self._states.detach().repeat(self._rollouts)

        @torch.no_grad()
        def step(tokens_R: Tensor) -> Tensor:  # how many they are changes with every step: nothing to record
            nonlocal state
            reading = self._model.read(tokens_R[:, None], state, forkable=False)
            state = reading.state
            return reading.hidden[:, 0]

        return step


class _Lean:
    """Reading from the tape, whether or not it says all that is needed."""

    def __init__(self, model: FastWeightLM, read_R: Tensor, layers: Sequence[Branch], length: int, shape: torch.Size):
        self.model, self.length, self.shape = model, length, shape
        self._read_R, self._layers = read_R, layers

    @classmethod
    def of(cls, reading: Reading, positions_BC: Tensor, rollouts: int, length: int) -> _Lean:
        model, tapes = reading.model, reading.tapes
        assert tapes is not None
        read_R = (reading.seen_B[:, None] + positions_BC + 1).flatten().repeat_interleave(rollouts)
        layers = [layer.branch(tape, positions_BC) for layer, tape in zip(model.layers, tapes, strict=True)]
        return cls(model, read_R, layers, length, positions_BC.shape)

    @property
    def reads(self) -> tuple[Tensor, Sequence[Branch]]:
        """What it reads besides the model's parameters: how far each row has read, and the layers' tapes."""
        return self._read_R, self._layers

    @property
    def rows(self) -> int:
        return len(self._read_R)

    @property
    def device(self) -> torch.device:
        return self._read_R.device

    def hidden(self, tokens_RK: Tensor) -> Tensor:
        R, K = tokens_RK.shape
        rows = Rows(K, None, self._read_R, lengths=(K,) * R)
        x_RKD = self.model.embed(tokens_RK)
        for layer in self._layers:
            x_RKD = layer(x_RKD, rows)
        return self.model.final_norm(x_RKD)

    def sampler(self) -> Step:
        recording = _recorded(self)
        if recording is not None:
            recording.load(self)
            return recording.step
        so_far: list[Tensor] = []

        @torch.no_grad()
        def step(tokens_R: Tensor) -> Tensor:
            so_far.append(tokens_R)
            return self.hidden(torch.stack(so_far, 1))[:, -1]

        return step

    def stand_in(self) -> _Lean:
        """The same with what it reads in memory of its own, without gradients."""
        layers = [layer.stand_in() for layer in self._layers]
        return _Lean(self.model, self._read_R.clone(), layers, self.length, self.shape)


class _Sampling:
    """Reading the first token, the first two, .. of R rows: a CUDA graph each, over memory that is loaded before."""

    @torch.no_grad()
    def __init__(self, lean: _Lean):
        stand_in = lean.stand_in()
        # Not the stand-in itself: a model must not be kept alive by its recordings.
        self._read_R, self._layers = stand_in.reads
        R, device = lean.rows, lean.device
        self._tokens_RK = torch.zeros(R, lean.length - 1, dtype=torch.int64, device=device)
        self._graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        self._read = 0
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        with autocast_without_cache(device.type):
            for k in range(1, lean.length):
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    stand_in.hidden(self._tokens_RK[:, :k])  # compiles and loads kernels
                torch.cuda.current_stream(device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    hidden_RD = stand_in.hidden(self._tokens_RK[:, :k])[:, -1].clone()
                self._graphs.append((graph, hidden_RD))

    def load(self, lean: _Lean) -> None:
        """Read from other texts next, which must live until that is done."""
        read_R, layers = lean.reads
        self._read_R.copy_(read_R)
        for own, layer in zip(self._layers, layers, strict=True):
            own.load(layer)
        self._read = 0

    @torch.no_grad()
    def step(self, tokens_R: Tensor) -> Tensor:
        """Read one more token of each row; hidden states [R, D], valid until the next load."""
        self._tokens_RK[:, self._read].copy_(tokens_R)
        graph, hidden_RD = self._graphs[self._read]
        graph.replay()
        self._read += 1
        return hidden_RD


_SAMPLINGS: weakref.WeakKeyDictionary[Any, OrderedDict[Hashable, _Sampling | None]] = weakref.WeakKeyDictionary()
KEPT = 2
"""Recorded samplings per model; the one used longest ago goes first."""

_log = logging.getLogger("refine_harness")


def _recorded(lean: _Lean) -> _Sampling | None:
    """A recording that can read what `lean` reads; None where nothing can be recorded."""
    if lean.device.type != "cuda" or lean.length < 2 or torch.cuda.is_current_stream_capturing():
        return None
    setting = setting_of(lean.model, lean.device.type)
    if setting is None:
        return None
    kept = _SAMPLINGS.setdefault(lean.model, OrderedDict())
    key = (lean.shape, lean.rows, lean.length, setting)
    if key not in kept:
        try:
            kept[key] = _Sampling(lean)
        except (RuntimeError, ValueError) as error:
            _log.warning("sampling without a CUDA graph: %s", str(error).splitlines()[0])
            kept[key] = None
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


class _FromTape(Branches):
    """From the tape where it says all that is needed, and the few other rows from states of their own.

    Which those are depends on the positions, and so on numbers that a GPU may not have come to yet. Sampling does not
    wait for them: it reads every row from the tape, and reads the others again.
    """

    def __init__(self, reading: Reading, positions_BC: Tensor, rollouts: int, length: int, lean_BC: Tensor):
        self._reading, self._positions_BC, self._rollouts = reading, positions_BC, rollouts
        self._lean = _Lean.of(reading, positions_BC, rollouts, length)
        self._flags = Download(lean_BC)
        self._expected: Tensor | None = None

    def expect(self, tokens_RK: Tensor) -> None:
        # Launched before anybody waits for the flags, so that the device goes on; rows do not depend on each other.
        with torch.set_grad_enabled(self._reading.hidden.requires_grad):
            self._expected = self._lean.hidden(tokens_RK)

    def hidden(self, tokens_RK: Tensor) -> Tensor:
        expected_RKD, self._expected = self._expected, None
        if self._others is None:
            return self._lean.hidden(tokens_RK) if expected_RKD is None else expected_RKD
        rows_X, forked = self._others
        if len(rows_X) == len(tokens_RK):
            return forked.hidden(tokens_RK)
        lean_RKD = self._lean.hidden(tokens_RK) if expected_RKD is None else expected_RKD
        return lean_RKD.index_copy(0, rows_X, forked.hidden(tokens_RK[rows_X]))

    def samplers(self) -> Iterator[tuple[Tensor | None, Step]]:
        yield None, self._lean.sampler()
        if self._others is not None:
            rows_X, forked = self._others
            yield rows_X, forked.sampler()

    @cached_property
    def _others(self) -> tuple[Tensor, _Forked] | None:
        """Rows that the tape is not enough for, and the same from their states."""
        C, N, device = self._positions_BC.shape[1], self._rollouts, self._positions_BC.device
        places = [[c for c, lean in enumerate(row) if not lean] for row in self._flags.tolist()]
        widest = max(map(len, places))
        if not widest:
            return None
        # Every text forks as often as the one that forks most.
        picked_BX = torch.tensor([row + [0] * (widest - len(row)) for row in places], device=device)
        states = self._reading.states_at(self._positions_BC.gather(1, picked_BX))
        forks = states.select([b * widest + i for b, row in enumerate(places) for i in range(len(row))])
        rows = [(b * C + c) * N + n for b, row in enumerate(places) for c in row for n in range(N)]
        return torch.tensor(rows, device=device), _Forked(self._reading.model, forks, N, few=True)
