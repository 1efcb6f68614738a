"""The values that travel between rooms, and the letters that name their shapes.

    B  documents (rows) in a batch          K  tokens of a rollout
    T  tokens of a document, padded          D  hidden size
    C  positions (chunks) per document       V  vocabulary
    N  rollouts per position                 R  B·C·N rollout rows, row-major

A trailing group of capitals in a name is its shape: `advantages_BCN`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.tokens_BT.to(device),
            self.lengths_B.to(device),
            None if self.loss_from_B is None else self.loss_from_B.to(device),
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, cut to the longest of them."""
        lengths_B = self.lengths_B[start:stop]
        longest = int(lengths_B.max())
        return Batch(
            self.tokens_BT[start:stop, :longest],
            lengths_B,
            None if self.loss_from_B is None else self.loss_from_B[start:stop],
        )

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    @property
    def tokens(self) -> int:
        """Real tokens in the batch."""
        return int(self.lengths_B.sum())


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
class Losses:
    """The two objectives of one micro-batch as sums, each with the count it is normalised by.

    Sums and counts, because a mean over micro-batches of means would weigh short documents more.
    """

    ntp_sum: Tensor
    ntp_count: int
    policy_sum: Tensor
    policy_count: int
    facts: dict[str, float] = field(default_factory=dict)
    """What the step report says of this micro-batch (means over the micro-batch)."""


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
