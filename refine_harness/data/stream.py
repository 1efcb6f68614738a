"""Which example comes when: a seeded order that any process can enter anywhere.

Everything is a function of the seed and a position (the number of examples consumed so far), so a
position is all that a run must remember in order to go on, and the global order is the same
for every number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_harness.errors import ConfigError

# Separates the random numbers of this file's two uses of one seed.
_ORDER, _MIXTURE = 1, 2
_BLOCK = 4096


def random_numbers(use: int, seed: int, position: int) -> np.random.Generator:
    """The generator of one `use` of `seed` at one position; independent of every other."""
    return np.random.default_rng([use, seed % (1 << 64), position])


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n], the order in which epoch `epoch` visits examples 0..n-1: a fresh permutation every epoch."""
    return random_numbers(_ORDER, seed, epoch).permutation(n)


class Order:
    """The endless sequence of examples 0..n-1: every epoch visits each of them once, in its own order."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def example_index(self, i: int) -> tuple[int, int]:
        """(epoch, index) of the i-th example of the sequence."""
        epoch, place = divmod(i, self.n)
        if epoch != self._epoch:
            self._order, self._epoch = epoch_order(self.n, self.seed, epoch), epoch
        return epoch, int(self._order[place])


class Mixture:
    """Which source the i-th document comes from: independent draws with fixed weights."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self._shares = np.cumsum(np.asarray(weights, dtype=np.float64)) / np.sum(weights)
        self._shares[-1] = 1.0
        # Documents of each source before block b; grows as later blocks are asked for.
        self._before = [np.zeros(len(weights), dtype=np.int64)]
        self._cached: tuple[int, np.ndarray] | None = None

    def pick(self, i: int) -> tuple[int, int]:
        """(source, nth): document i comes from `source` and is the nth (from 0) document taken from it."""
        block, place = divmod(i, _BLOCK)
        while len(self._before) <= block:
            counts = np.bincount(self._block(len(self._before) - 1), minlength=len(self._shares))
            self._before.append(self._before[-1] + counts)
        sources = self._block(block)
        source = int(sources[place])
        return source, int(self._before[block][source] + np.count_nonzero(sources[:place] == source))

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` documents come from each source."""
        block, place = divmod(n, _BLOCK)
        self.pick(n)
        counts = self._before[block] + np.bincount(self._block(block)[:place], minlength=len(self._shares))
        return counts.tolist()

    def _block(self, block: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != block:
            draws = random_numbers(_MIXTURE, self.seed, block).random(_BLOCK)
            self._cached = block, np.searchsorted(self._shares, draws, side="right")
        return self._cached[1]


def rank_positions(batch: int, *, sequences: int, steps: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """Positions in the global order that process `rank` reads for batch number `batch`, in training order.

    A batch of `sequences` examples is cut into `steps` optimizer steps, and every step's examples into
    `world_size` equal shares, so the examples of an optimizer step do not depend on the number of
    processes. Raises ConfigError when a step cannot be shared equally.
    """
    per_step = sequences // steps
    if per_step % world_size:
        raise ConfigError(
            f"batch.sequences / batch.steps = {per_step} documents per optimizer step cannot be shared by "
            f"{world_size} processes. Make it a multiple of {world_size}."
        )
    share = per_step // world_size
    first = batch * sequences + rank * share
    return [first + step * per_step + j for step in range(steps) for j in range(share)]
