from __future__ import annotations

import numpy as np
import pytest

from refine_harness.data.stream import Mixture, Order, epoch_order, rank_positions
from refine_harness.errors import ConfigError


def test_every_epoch_is_a_permutation_of_its_own():
    first, second = epoch_order(50, 3, 0), epoch_order(50, 3, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, epoch_order(50, 3, 0))
    assert not np.array_equal(first, epoch_order(50, 4, 0))
    assert np.array_equal(epoch_order(5, -1, 0), epoch_order(5, -1, 0))


def test_an_order_can_be_entered_anywhere():
    walked = [Order(7, 1).example_index(i) for i in range(30)]
    order = Order(7, 1)
    assert [order.example_index(i) for i in (29, 0, 13, 14, 6)] == [walked[i] for i in (29, 0, 13, 14, 6)]
    assert [epoch for epoch, _ in walked] == [i // 7 for i in range(30)]
    assert sorted(index for _, index in walked[7:14]) == list(range(7))


def test_a_mixture_numbers_each_sources_documents_without_gaps():
    mixture = Mixture([1, 3], seed=5)
    picks = [mixture.pick(i) for i in range(9000)]  # more than two blocks
    for source in (0, 1):
        numbers = [nth for chosen, nth in picks if chosen == source]
        assert numbers == list(range(len(numbers)))
    assert abs(np.mean([source for source, _ in picks]) - 0.75) < 0.02
    assert [Mixture([1, 3], seed=5).pick(i) for i in (8999, 4096, 4095, 0)] == [picks[i] for i in (8999, 4096, 4095, 0)]
    for n in (0, 1, 4096, 5000):
        assert mixture.counts(n) == [sum(source == which for source, _ in picks[:n]) for which in (0, 1)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_optimizer_step_has_the_same_documents_for_any_number_of_processes(world_size: int):
    shares = [rank_positions(2, sequences=16, steps=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    size = 8 // world_size
    for step in range(2):
        together = [position for share in shares for position in share[step * size : (step + 1) * size]]
        assert together == list(range(32 + 8 * step, 40 + 8 * step))


def test_a_step_that_cannot_be_shared():
    with pytest.raises(ConfigError, match="4 documents per optimizer step cannot be shared by 3 processes"):
        rank_positions(0, sequences=8, steps=2, rank=0, world_size=3)
