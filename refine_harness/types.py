"""The values that travel between rooms, and the letters that name their shapes.

    B  documents (rows) in a batch          K  tokens of a rollout
    T  tokens of a document, padded          D  hidden size
    C  positions (chunks) per document       V  vocabulary
    N  rollouts per position                 R  B·C·N rollout rows, row-major

A trailing group of capitals in a name is its shape: `advantages_BCN`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Documents of one micro-batch, right-padded."""

    tokens_BT: Tensor
    """int64 token ids."""
    lengths_B: Tensor
    """int64, real tokens of each row; pads lie to their right."""
    loss_from_B: Tensor | None = None
    """int64, first token of each row that is a label of next-token prediction (post-training: where
    the answer starts). None: every token after the first."""

    @property
    def real_BT(self) -> Tensor:
        """bool, True where the token is not padding."""
        steps_T = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        return steps_T[None, :] < self.lengths_B[:, None]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """`lengths_B` on the host; asking waits for the device, unless the batch came from the host."""
        return tuple(self.lengths_B.tolist())

    @cached_property
    def labels(self) -> int:
        """How many tokens are labels of next-token prediction; kept like `lengths`."""
        starts = (1,) * len(self) if self.loss_from_B is None else self.loss_from_B.tolist()
        return sum(max(0, n - max(start, 1)) for n, start in zip(self.lengths, starts, strict=True))

    @property
    def padded_B(self) -> Tensor | None:
        """`lengths_B` on the host, or None when no row is padded."""
        return None if min(self.lengths) == self.tokens_BT.shape[1] else torch.tensor(self.lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device, without waiting for it."""
        there = Batch(
            upload(self.tokens_BT, device),
            upload(self.lengths_B, device),
            None if self.loss_from_B is None else upload(self.loss_from_B, device),
        )
        there.__dict__.update(lengths=self.lengths, labels=self.labels)
        return there

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, cut to the longest of them."""
        return Batch(
            self.tokens_BT[start:stop, : max(self.lengths[start:stop])],
            self.lengths_B[start:stop],
            None if self.loss_from_B is None else self.loss_from_B[start:stop],
        )

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    @property
    def tokens(self) -> int:
        """Real tokens in the batch."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Rollouts:
    """What the model said next at the chosen positions (PAPER: step 3), detached from the graph."""

    positions_BC: Tensor
    """int64, index of the last document token each rollout has read."""
    tokens_BCNK: Tensor
    """int64, the sampled continuations."""
    logprobs_BCNK: Tensor
    """float32 or wider, log-probability of each sampled token under the policy that sampled it."""


@dataclass(frozen=True)
class Experience:
    """Rollouts and how good they were, all detached."""

    rollouts: Rollouts
    rewards_BCN: Tensor
    advantages_BCN: Tensor
    reference_BCNK: Tensor | None
    """Log-probability of each sampled token under the frozen reference; None without a KL term."""
    told: dict[str, Tensor]
    """What the step report says of them: scalars on the device."""

    def rows(self, start: int, stop: int) -> Experience:
        """The part of it that belongs to some documents."""
        some = slice(start, stop)
        rollouts = Rollouts(
            self.rollouts.positions_BC[some], self.rollouts.tokens_BCNK[some], self.rollouts.logprobs_BCNK[some]
        )
        reference_BCNK = None if self.reference_BCNK is None else self.reference_BCNK[some]
        return Experience(rollouts, self.rewards_BCN[some], self.advantages_BCN[some], reference_BCNK, self.told)


@dataclass(frozen=True)
class Losses:
    """The two objectives of one micro-batch as sums, each with the count it is normalised by.

    Sums and counts, because a mean over micro-batches of means would weigh short documents more.
    """

    ntp_sum: Tensor
    ntp_count: int
    policy_sum: Tensor
    policy_count: int
    told: dict[str, Tensor] = field(default_factory=dict)
    """What the step report says of this micro-batch (means over the micro-batch): scalars on the device."""
    experience: Experience | None = None
    """What the policy learned from, for steps that meet it again."""

    def detach(self) -> Losses:
        """The same numbers without their graphs."""
        return replace(self, ntp_sum=self.ntp_sum.detach(), policy_sum=self.policy_sum.detach())

    @cached_property
    def facts(self) -> dict[str, float]:
        """`told` on the host; asking waits for the device, once."""
        if not self.told:
            return {}
        return dict(
            zip(self.told, torch.stack([x.detach().double() for x in self.told.values()]).tolist(), strict=True)
        )


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on a device, copied from the host without waiting for what the device is doing."""
    to_cuda = x.device.type == "cpu" and torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if to_cuda else x.to(device)


class Download:
    """Numbers on their way to the host, while the device goes on."""

    def __init__(self, x: Tensor) -> None:
        self.later = x.is_cuda
        """Whether they are on their way; else they were on the host."""
        self._x = x.to("cpu", non_blocking=True)
        if self.later:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(x.device))  # of its own device, not of the current one

    def tolist(self) -> list:
        """Waits until they are here."""
        if self.later:
            self._there.synchronize()
        return self._x.tolist()


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Optimizer steps done, this one included."""
    steps: int
    """Optimizer steps of the whole run."""
    tokens: int
    """Real document tokens this step learned from."""
    seconds: float
    loss: float
    ntp_loss: float
    policy_loss: float
    gradient_norm: float
    learning_rate: float
    facts: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict, compare=False)
    """Of this process: seconds_reading, seconds_backward and so on, tokens_per_second, and on a GPU memory_gib (the
    most in use) and share_of_peak (6 · parameters · tokens per second over what its matrix units can do)."""
