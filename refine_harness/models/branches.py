"""Branches of a reading: short continuations that start inside a text, are looked at and thrown away.

The plain way is to fork the state, repeat it for every rollout and read on. A model whose state is large, next to the
few tokens that are read from it, can say that it reads branches from the tape instead (`FastWeightLM.reads_branches`):
each layer then looks up what its new tokens ask of the text, and no state is made. Such a branch keeps nothing between
tokens: sampling reads its few tokens again for each, which is cheaper than memory for what may not be needed.

    B texts   C positions of each   N rollouts per position   F = B·C forks   R = F·N rows   K tokens of a rollout
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from refine_harness.models.base import Branch, FastWeightLM, Reading, Rows
from refine_harness.models.decode import Decoder
from refine_harness.models.state import State

Step = Callable[[Tensor], Tensor]
"""Reads one more token of each row: int64 [R] -> hidden states [R, D], valid until the next call."""


class Branches(ABC):
    """R rows, N for each position in row-major order, that go on from a reading."""

    @abstractmethod
    def hidden(self, tokens_RK: Tensor) -> Tensor:
        """Hidden states [R, K, D] of tokens read from the positions; attached to the reading."""

    @abstractmethod
    def sampler(self) -> Step:
        """Reading token by token, without gradients."""


def branch(reading: Reading, positions_BC: Tensor, *, rollouts: int, length: int) -> Branches:
    """Branches after those positions, to be continued by at most `length` tokens.

    Raises RuntimeError when the reading was made with forkable=False.
    """
    tapes, F = reading.tapes, positions_BC.numel()
    lean = None if tapes is None else reading.model.reads_branches(tapes, positions_BC, length)
    if lean is None or tapes is None or not any(lean):
        return _Forked(reading.model, reading.states_at(positions_BC, once=True).repeat(rollouts))
    read_from_tape = _Lean(reading.model, reading, positions_BC, rollouts)
    if all(lean):
        return read_from_tape
    # The few that need a state of their own: every row forks as often as the row that forks most.
    C = positions_BC.shape[1]
    dense = [f for f in range(F) if not lean[f]]
    places = [[f % C for f in dense if f // C == b] for b in range(len(positions_BC))]
    widest = max(map(len, places))
    device = positions_BC.device
    picked_BX = torch.tensor([row + [0] * (widest - len(row)) for row in places], device=device)
    states = reading.states_at(positions_BC.gather(1, picked_BX))
    forks = states.select([b * widest + i for b, row in enumerate(places) for i in range(len(row))])
    rows = torch.tensor([f * rollouts + n for f in dense for n in range(rollouts)], device=device)
    return _Mixed(read_from_tape, _Forked(reading.model, forks.repeat(rollouts), few=True), rows)


class _Forked(Branches):
    """From states of their own."""

    def __init__(self, model: FastWeightLM, states: State, few: bool = False):
        self._model, self._states, self._few = model, states, few

    def hidden(self, tokens_RK: Tensor) -> Tensor:
        return self._model.continued(tokens_RK, self._states)

    def sampler(self) -> Step:
        if not self._few:
            return Decoder(self._model, self._states.detach()).step
        state = self._states.detach()

        @torch.no_grad()
        def step(tokens_R: Tensor) -> Tensor:  # how many they are changes with every step: nothing to record
            nonlocal state
            reading = self._model.read(tokens_R[:, None], state, forkable=False)
            state = reading.state
            return reading.hidden[:, 0]

        return step


class _Lean(Branches):
    """From the tape."""

    def __init__(self, model: FastWeightLM, reading: Reading, positions_BC: Tensor, rollouts: int):
        assert reading.tapes is not None
        self._model = model
        self._read_R = (reading.seen_B[:, None] + positions_BC + 1).flatten().repeat_interleave(rollouts)
        self._layers: list[Branch] = [
            layer.branch(tape, positions_BC) for layer, tape in zip(model.layers, reading.tapes, strict=True)
        ]

    def hidden(self, tokens_RK: Tensor) -> Tensor:
        R, K = tokens_RK.shape
        rows = Rows(K, None, self._read_R, lengths=(K,) * R)
        x_RKD = self._model.embed(tokens_RK)
        for layer in self._layers:
            x_RKD = layer(x_RKD, rows)
        return self._model.final_norm(x_RKD)

    def sampler(self) -> Step:
        so_far: list[Tensor] = []

        @torch.no_grad()
        def step(tokens_R: Tensor) -> Tensor:
            so_far.append(tokens_R)
            return self.hidden(torch.stack(so_far, 1))[:, -1]

        return step


class _Mixed(Branches):
    """Most rows from the tape; what it says of the others is replaced."""

    def __init__(self, lean: Branches, forked: Branches, rows_X: Tensor):
        self._lean, self._forked, self._rows_X = lean, forked, rows_X

    def hidden(self, tokens_RK: Tensor) -> Tensor:
        return self._lean.hidden(tokens_RK).index_copy(0, self._rows_X, self._forked.hidden(tokens_RK[self._rows_X]))

    def sampler(self) -> Step:
        lean, forked = self._lean.sampler(), self._forked.sampler()
        return lambda tokens_R: lean(tokens_R).index_copy(0, self._rows_X, forked(tokens_R[self._rows_X]))
