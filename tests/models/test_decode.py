"""A decoder's own memory: rows that share a start, rows that are filled up, kinds of steps; without a CUDA graph.

Steps that stand for recorded ones read the memory and write into it, as those do, and know of the rows only what was
known when they were recorded. `test_decode_gpu.py` has the real ones.
"""

from typing import Any

import pytest
import torch
from refine_kernels.testing import assert_close

from refine_harness.models import decode
from refine_harness.models.decode import Decoder

from .checks import same_states
from .tiny import MODELS, build, tokens


class Replayed:
    """What a recording of a step does when it is replayed."""

    def __init__(self, graph: Any, model: Any, kind: Any, in_place: bool):
        self._graph, self._model, self._kind, self._in_place = graph, model, kind, in_place
        self.hidden_RD = torch.zeros(len(graph.state), model.config.hidden_size, dtype=torch.float64)

    def replay(self) -> None:
        state = self._graph.state
        state.assume_seen(self._model.place_of(self._kind, len(state)))
        reading = self._model.read(self._graph._tokens_R1, state, forkable=False, in_place=self._in_place)
        for new, old in decode._pairs(reading.state, self._graph._memory):
            if new is not old:
                old.copy_(new)
        self.hidden_RD.copy_(reading.hidden[:, 0])


@pytest.fixture
def recorded(monkeypatch):
    """How many steps of each model were recorded."""
    made: list[Any] = []

    def record(self, model, kind, *, in_place):
        made.append(kind)
        step = Replayed(self, model, kind, in_place)
        return step, step.hidden_RD

    monkeypatch.setattr(decode._Graph, "_record", record)
    monkeypatch.setattr(decode, "_recordable", lambda model, state: model.fixed_state and not torch.is_grad_enabled())
    return made


@torch.no_grad()
@pytest.mark.parametrize("times", (1, 2))
@pytest.mark.parametrize("before", ([14, 14, 14], [14, 33, 5]), ids=("together", "apart"))
@pytest.mark.parametrize("name", MODELS)
def test_steps_in_a_decoders_memory_are_one_reading(name, before, times, recorded):
    model = build(name)
    for seed in range(3):  # a step of another kind is met, recorded, replayed
        state = model.read(tokens(3, 33, seed=seed), lengths=torch.tensor(before), forkable=False).state
        text = tokens(3 * times, 6, seed=seed + 10)
        decoder = Decoder(model, state, times)
        got = torch.stack([decoder.step(tokens_R).clone() for tokens_R in text.unbind(1)], 1)
        wanted = model.read(text, state.repeat(times), forkable=False)
        assert_close(got, wanted.hidden)
        same_states(decoder.state, wanted.state)
    assert bool(recorded) == model.fixed_state
