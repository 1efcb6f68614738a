"""The paper's box: one step of reinforced next-sequence prediction.

The document is read once. That one pass gives the cross-entropy, the entropies that choose the positions, the true
hidden states that rollouts are compared with, and the states that the rollouts start from. Rollouts are sampled from
detached forks and then read once more from attached ones, so that the policy gradient flows through the forked state
into the document, exactly as if each truncated prefix had been read again (`rereading.py` does that, and the tests
hold this file to it).

    B documents   T tokens   C chunks   N rollouts per position   K rollout length   R = B·C·N   D hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_harness.algorithm.advantage import group_advantages, spreadless_share
from refine_harness.algorithm.loss import label_mask, policy_loss
from refine_harness.algorithm.positions import pick_positions
from refine_harness.algorithm.reward import REWARDS
from refine_harness.algorithm.rollout import continue_from, draw_uniforms
from refine_harness.config import Algorithm
from refine_harness.models.base import FastWeightLM, Reading
from refine_harness.models.state import State
from refine_harness.types import Batch, Losses, Rollouts


@dataclass(frozen=True)
class Experience:
    """Rollouts and how good they were, all detached."""

    rollouts: Rollouts
    rewards_BCN: Tensor
    advantages_BCN: Tensor
    facts: dict[str, float]

    def rows(self, start: int, stop: int) -> Experience:
        """The part of it that belongs to some documents."""
        some = slice(start, stop)
        rollouts = Rollouts(
            self.rollouts.positions_BC[some], self.rollouts.tokens_BCNK[some], self.rollouts.logprobs_BCNK[some]
        )
        return Experience(rollouts, self.rewards_BCN[some], self.advantages_BCN[some], self.facts)


def refine_step(
    model: FastWeightLM,
    batch: Batch,
    algorithm: Algorithm,
    rng: Sequence[torch.Generator],
    experience: Experience | None = None,
) -> Losses:
    """Read the document, pick where it is surprising, continue from there, score, learn.

    Args:
        batch: B documents.
        rng: one CPU generator per document; not used when there is nothing to sample.
        experience: rollouts sampled earlier by `collect`; None samples them here, from the policy that learns.

    Returns both losses as sums, attached. With lambda_rl = 0 this is next-token prediction and nothing else.
    """
    reading = model.read(batch.tokens_BT, lengths=batch.lengths_B, forkable=algorithm.lambda_rl > 0)
    logprobs_BT, entropy_BT = next_token(model, reading, batch)
    labels_BT = label_mask(batch.lengths_B, batch.loss_from_B, batch.tokens_BT.shape[1])
    ntp = -(logprobs_BT * labels_BT).sum()
    count = int(labels_BT.sum())
    if algorithm.lambda_rl == 0:
        return Losses(ntp, count, torch.zeros_like(ntp), 0, {"entropy": _mean(entropy_BT, labels_BT)})

    if experience is None:
        positions_BC, tokens_BCNK, states = sample_rollouts(model, reading, entropy_BT, batch, algorithm, rng)
    else:
        positions_BC, tokens_BCNK = experience.rollouts.positions_BC, experience.rollouts.tokens_BCNK
        states = reading.states_at(positions_BC).repeat(tokens_BCNK.shape[2])
    logprobs_BCNK, hidden_BCNKD = read_rollouts(model, reading, positions_BC, tokens_BCNK, states, algorithm)
    if experience is None:
        experience = judge(batch, reading, positions_BC, tokens_BCNK, logprobs_BCNK, hidden_BCNKD, algorithm)

    losses_BCNK = policy_loss(
        logprobs_BCNK,
        experience.rollouts.logprobs_BCNK,
        experience.advantages_BCN,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
    )
    ratios_BCNK = (logprobs_BCNK.detach() - experience.rollouts.logprobs_BCNK).exp()
    clipped_BCNK = (ratios_BCNK < 1 - algorithm.clip_low) | (ratios_BCNK > 1 + algorithm.clip_high)
    facts = {
        **experience.facts,
        "entropy": _mean(entropy_BT, labels_BT),
        "entropy_chosen": entropy_BT.gather(1, positions_BC).mean().item(),
        "ratio": ratios_BCNK.mean().item(),
        "ratio_max": ratios_BCNK.max().item(),
        "clipped": clipped_BCNK.double().mean().item(),
    }
    return Losses(ntp, count, losses_BCNK.sum(), losses_BCNK.numel(), facts)


@torch.no_grad()
def collect(model: FastWeightLM, batch: Batch, algorithm: Algorithm, rng: Sequence[torch.Generator]) -> Experience:
    """The front half of a step without gradients: rollouts for several optimizer steps to learn from."""
    reading = model.read(batch.tokens_BT, lengths=batch.lengths_B)
    _, entropy_BT = next_token(model, reading, batch)
    positions_BC, tokens_BCNK, states = sample_rollouts(model, reading, entropy_BT, batch, algorithm, rng)
    logprobs_BCNK, hidden_BCNKD = read_rollouts(model, reading, positions_BC, tokens_BCNK, states, algorithm)
    return judge(batch, reading, positions_BC, tokens_BCNK, logprobs_BCNK, hidden_BCNKD, algorithm)


def next_token(model: FastWeightLM, reading: Reading, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every next token (attached) and entropy of every prediction, both [B, T - 1], in nats."""
    B, T = batch.tokens_BT.shape
    hidden_MD, labels_M = reading.hidden[:, :-1].flatten(0, 1), batch.tokens_BT[:, 1:].flatten()
    logprobs_M, entropy_M = model.label_logprobs(hidden_MD, labels_M)
    return logprobs_M.view(B, T - 1), entropy_M.view(B, T - 1)


def sample_rollouts(
    model: FastWeightLM,
    reading: Reading,
    entropy_BT: Tensor,
    batch: Batch,
    algorithm: Algorithm,
    rng: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor, State]:
    """Positions [B, C], sampled tokens [B, C, N, K], and the attached states they start from (R rows)."""
    C, N, K = algorithm.chunks, algorithm.rollouts, algorithm.rollout_length
    positions_BC = pick_positions(entropy_BT, batch.lengths_B, chunks=C, length=K, rule=algorithm.positions, rng=rng)
    uniforms_RK = draw_uniforms(rng, C * N * K).view(-1, K).to(entropy_BT.device)
    states = reading.states_at(positions_BC).repeat(N)
    hidden_RD = reading.at(positions_BC).flatten(0, 1).repeat_interleave(N, 0)
    tokens_RK = continue_from(model, states.detach(), hidden_RD.detach(), uniforms_RK, algorithm)
    return positions_BC, tokens_RK.view(-1, C, N, K), states


def read_rollouts(
    model: FastWeightLM,
    reading: Reading,
    positions_BC: Tensor,
    tokens_BCNK: Tensor,
    states: State,
    algorithm: Algorithm,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, C, N, K] at the sampling temperature and hidden states [B, C, N, K, D], attached.

    The first token's probability comes from the document's own hidden state at the position.
    """
    tokens_RK = tokens_BCNK.flatten(0, 2)
    first_RD = reading.at(positions_BC).flatten(0, 1).repeat_interleave(tokens_BCNK.shape[2], 0)
    hidden_RKD = model.read(tokens_RK, states, forkable=False).hidden
    before_RKD = torch.cat((first_RD[:, None], hidden_RKD[:, :-1]), 1)
    logprobs_M, _ = model.label_logprobs(before_RKD.flatten(0, 1) / algorithm.temperature, tokens_RK.flatten())
    return logprobs_M.view(tokens_BCNK.shape), hidden_RKD.view(*tokens_BCNK.shape, -1)


@torch.no_grad()
def judge(
    batch: Batch,
    reading: Reading,
    positions_BC: Tensor,
    tokens_BCNK: Tensor,
    logprobs_BCNK: Tensor,
    hidden_BCNKD: Tensor,
    algorithm: Algorithm,
) -> Experience:
    """Compare each rollout with what the document says at the same place, relative to its group; no gradients."""
    B, C, _, K = tokens_BCNK.shape
    after_BM = (positions_BC[..., None] + torch.arange(1, K + 1, device=positions_BC.device)).flatten(1)
    true_BCK = batch.tokens_BT.gather(1, after_BM).view(B, C, K)
    true_BCKD = reading.at(after_BM).view(B, C, K, -1)
    rewards_BCN = REWARDS[algorithm.reward](tokens_BCNK, true_BCK, hidden_BCNKD, true_BCKD)
    advantages_BCN = group_advantages(rewards_BCN, over=algorithm.group, scale=algorithm.scale)
    facts = {
        "reward": rewards_BCN.mean().item(),
        "reward_std": rewards_BCN.std().item() if rewards_BCN.numel() > 1 else 0.0,
        "spreadless": spreadless_share(rewards_BCN, algorithm.group).item(),
    }
    return Experience(Rollouts(positions_BC, tokens_BCNK, logprobs_BCNK.detach()), rewards_BCN, advantages_BCN, facts)


def _mean(x: Tensor, mask: Tensor) -> float:
    return ((x * mask).sum() / mask.sum().clamp(min=1)).item()
