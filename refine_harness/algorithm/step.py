"""The paper's box: one step of reinforced next-sequence prediction.

The document is read once. That one pass gives the cross-entropy, the entropies that choose the positions, the true
hidden states that rollouts are compared with, and the states that the rollouts start from. Rollouts are sampled from
detached forks and then read once more from attached ones, so that the policy gradient flows through the forked state
into the document, exactly as if each truncated prefix had been read again (`rereading.py` does that, and the tests
hold this file to it).

    B documents   T tokens   C chunks   N rollouts per position   K rollout length   R = B·C·N   D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from refine_kernels import Known, Packing
from torch import Tensor

from refine_harness.algorithm.advantage import group_advantages, spreadless_share
from refine_harness.algorithm.loss import importance_ratio, kl_estimate, label_mask, policy_loss
from refine_harness.algorithm.positions import draw_uniforms, pick_positions
from refine_harness.algorithm.reward import PARTS, rewards_of
from refine_harness.algorithm.rollout import continue_from
from refine_harness.config import Algorithm
from refine_harness.models.base import FastWeightLM, Reading
from refine_harness.models.branches import Branches, branch
from refine_harness.types import Batch, Experience, Losses, Rollouts, upload


def refine_step(
    model: FastWeightLM,
    batch: Batch,
    algorithm: Algorithm,
    rng: Sequence[torch.Generator],
    experience: Experience | None = None,
    reference: FastWeightLM | None = None,
    mark: Callable[[str], None] = lambda part: None,
) -> Losses:
    """Read the document, pick where it is surprising, continue from there, score, learn.

    Args:
        batch: B documents.
        rng: one CPU generator per document; not used when there is nothing to sample.
        experience: rollouts sampled earlier by `collect`; None samples them here, from the policy that learns.
        reference: the model as it was when training started, for rollouts sampled here; needed when kl_weight > 0.
        mark: called with the name of each part when it is done, for a stopwatch.

    Returns both losses as sums, attached; the KL term is part of the policy loss. With lambda_rl = 0 this is next-token
    prediction and nothing else.
    """
    learns = algorithm.lambda_rl > 0
    reading = model.read(batch.tokens_BT, lengths=batch.padded_B, forkable=learns)
    labels_BT = label_mask(batch.lengths_B, batch.loss_from_B, batch.tokens_BT.shape[1])
    ahead_BT = labels_BT if torch.is_grad_enabled() else None  # the gradient of the cross-entropy, but for a factor
    with torch.set_grad_enabled(torch.is_grad_enabled() and not learns):
        predicted = next_token(model, reading, batch, ahead_BT=ahead_BT)
    entropy_BT = predicted.entropies
    told = {"entropy": _mean(entropy_BT, labels_BT)}
    mark("reading")
    if not learns:
        ntp = -(predicted.logprobs * labels_BT).sum()
        return Losses(ntp, batch.labels, torch.zeros_like(ntp), 0, told)

    if experience is None:
        rollouts, branches = sample_rollouts(model, reading, entropy_BT, batch, algorithm, rng)
    else:
        rollouts = experience.rollouts
        branches = branch_for(reading, rollouts)
    mark("sampling")
    logprobs_BCNK, hidden_BCNKD = read_rollouts(model, reading, rollouts, branches, algorithm)
    if experience is None:
        experience = judge(batch, reading, rollouts, logprobs_BCNK, hidden_BCNKD, algorithm, reference)

    old_BCNK = experience.rollouts.logprobs_BCNK
    losses_BCNK = policy_loss(
        logprobs_BCNK,
        old_BCNK,
        experience.advantages_BCN,
        loss=algorithm.loss,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
    )
    told["entropy_chosen"] = entropy_BT.gather(1, rollouts.positions_BC).mean()
    told |= experience.told | _drift(logprobs_BCNK.detach(), old_BCNK, algorithm)
    if experience.reference_BCNK is not None:
        kl_BCNK = kl_estimate(logprobs_BCNK, experience.reference_BCNK)
        losses_BCNK = losses_BCNK + algorithm.kl_weight * kl_BCNK
        told["kl"] = kl_BCNK.detach().mean()
    ntp = -(next_token(model, reading, batch, predicted).logprobs * labels_BT).sum()
    mark("rollouts")
    return Losses(ntp, batch.labels, losses_BCNK.sum(), losses_BCNK.numel(), told, experience)


@torch.no_grad()
def collect(
    model: FastWeightLM,
    batch: Batch,
    algorithm: Algorithm,
    rng: Sequence[torch.Generator],
    reference: FastWeightLM | None = None,
) -> Experience:
    """The front half of a step without gradients: rollouts for several optimizer steps to learn from."""
    reading = model.read(batch.tokens_BT, lengths=batch.padded_B)
    entropy_BT = next_token(model, reading, batch).entropies
    rollouts, branches = sample_rollouts(model, reading, entropy_BT, batch, algorithm, rng)
    logprobs_BCNK, hidden_BCNKD = read_rollouts(model, reading, rollouts, branches, algorithm)
    return judge(batch, reading, rollouts, logprobs_BCNK, hidden_BCNKD, algorithm, reference)


def next_token(
    model: FastWeightLM,
    reading: Reading,
    batch: Batch,
    known: Known | None = None,
    ahead_BT: Tensor | None = None,
) -> Known:
    """Log-probability of every next token, entropy and log-normaliser of every prediction, each [B, T - 1], in nats.

    Where a row is padded, what would be predicted from or to padding is not computed, and is zero.

    known: what an earlier call without gradients returned; the log-probabilities are now attached.
    ahead_BT: what the gradient of the log-probabilities will be, up to one factor.
    """
    B, T = batch.tokens_BT.shape
    real = None
    if batch.padded_B is not None:
        real = Packing(tuple(n - 1 for n in batch.lengths), batch.lengths_B - 1, T - 1)

    def packed(x_BTX: Tensor) -> Tensor:
        return x_BTX.flatten(0, 1) if real is None else real.pack(x_BTX)[0]

    def spread(x_M: Tensor) -> Tensor:
        return x_M.view(B, T - 1) if real is None else real.spread(x_M[None])

    def each(change: Callable[[Tensor], Tensor], of: Known) -> Known:
        return Known(change(of.logprobs), change(of.entropies), change(of.normalisers), of.ahead)

    found = model.label_logprobs(
        packed(reading.hidden[:, :-1]),
        packed(batch.tokens_BT[:, 1:]),
        None if known is None else each(packed, known),
        None if ahead_BT is None else packed(ahead_BT),
    )
    return each(spread, found)


def sample_rollouts(
    model: FastWeightLM,
    reading: Reading,
    entropy_BT: Tensor,
    batch: Batch,
    algorithm: Algorithm,
    rng: Sequence[torch.Generator],
) -> tuple[Rollouts, Branches]:
    """Rollouts, with the log-probabilities of their decoding, and the branches of the reading that they are."""
    C, N, K = algorithm.chunks, algorithm.rollouts, algorithm.rollout_length
    positions_BC = pick_positions(entropy_BT, batch.lengths, chunks=C, length=K, rule=algorithm.positions, rng=rng)
    uniforms_RK = upload(draw_uniforms(rng, C * N * K).view(-1, K), entropy_BT.device)
    branches = branch(reading, positions_BC, rollouts=N, length=K)
    hidden_RD = reading.at(positions_BC).flatten(0, 1).repeat_interleave(N, 0)
    tokens_RK, sampled_RK = continue_from(model, branches, hidden_RD.detach(), uniforms_RK, algorithm)
    return Rollouts(positions_BC, tokens_RK.view(-1, C, N, K), sampled_RK.view(-1, C, N, K)), branches


def branch_for(reading: Reading, rollouts: Rollouts) -> Branches:
    """The branches that rollouts sampled earlier are of this reading."""
    N, K = rollouts.tokens_BCNK.shape[2:]
    return branch(reading, rollouts.positions_BC, rollouts=N, length=K)


def read_rollouts(
    model: FastWeightLM, reading: Reading, rollouts: Rollouts, branches: Branches, algorithm: Algorithm
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, C, N, K] at the sampling temperature and hidden states [B, C, N, K, D], attached.

    The first token's probability comes from the document's own hidden state at the position.
    """
    positions_BC, tokens_BCNK = rollouts.positions_BC, rollouts.tokens_BCNK
    tokens_RK = tokens_BCNK.flatten(0, 2)
    first_RD = reading.at(positions_BC).flatten(0, 1).repeat_interleave(tokens_BCNK.shape[2], 0)
    hidden_RKD = branches.hidden(tokens_RK)
    before_RKD = torch.cat((first_RD[:, None], hidden_RKD[:, :-1]), 1)
    before_MD = before_RKD.flatten(0, 1) / algorithm.temperature
    logprobs_M = model.label_logprobs(before_MD, tokens_RK.flatten()).logprobs
    return logprobs_M.view(tokens_BCNK.shape), hidden_RKD.view(*tokens_BCNK.shape, -1)


@torch.no_grad()
def judge(
    batch: Batch,
    reading: Reading,
    rollouts: Rollouts,
    logprobs_BCNK: Tensor,
    hidden_BCNKD: Tensor,
    algorithm: Algorithm,
    reference: FastWeightLM | None,
) -> Experience:
    """Compare each rollout with what the document says at the same place, relative to its group; no gradients.

    logprobs_BCNK: of the rollouts read as a whole. Later steps compare with these, not with those of the decoding,
    since that is how they compute theirs.
    """
    positions_BC, tokens_BCNK = rollouts.positions_BC, rollouts.tokens_BCNK
    B, C, _, K = tokens_BCNK.shape
    after_BM = (positions_BC[..., None] + torch.arange(1, K + 1, device=positions_BC.device)).flatten(1)
    true_BCK = batch.tokens_BT.gather(1, after_BM).view(B, C, K)
    true_BCKD = reading.at(after_BM).view(B, C, K, -1)
    views = (tokens_BCNK, true_BCK, hidden_BCNKD, true_BCKD)
    rewards_BCN = rewards_of(algorithm.reward, *views)
    advantages_BCN = group_advantages(rewards_BCN, over=algorithm.group, scale=algorithm.advantage_scale)
    reference_BCNK = reference_logprobs(reference, batch, rollouts, algorithm) if algorithm.kl_weight > 0 else None
    told = _spread("reward", rewards_BCN)
    for part in PARTS.get(algorithm.reward, ()):
        told |= _spread(f"reward_{part}", rewards_of(part, *views))
    told["spreadless"] = spreadless_share(rewards_BCN, algorithm.group)
    told["sampling_gap"] = (rollouts.logprobs_BCNK - logprobs_BCNK).abs().max()
    rollouts = replace(rollouts, logprobs_BCNK=logprobs_BCNK.detach())
    return Experience(rollouts, rewards_BCN, advantages_BCN, reference_BCNK, told)


@torch.no_grad()
def reference_logprobs(
    reference: FastWeightLM | None, batch: Batch, rollouts: Rollouts, algorithm: Algorithm
) -> Tensor:
    """Log-probabilities [B, C, N, K] of the rollouts under another model, from its own reading and its own forks."""
    if reference is None:
        raise ValueError("kl_weight is above 0, so the step needs the reference model")
    reading = reference.read(batch.tokens_BT, lengths=batch.padded_B)
    return read_rollouts(reference, reading, rollouts, branch_for(reading, rollouts), algorithm)[0]


# What a step says of itself: scalars that stay on the device until `Losses.facts` fetches all of them at once.


def _drift(logprobs_BCNK: Tensor, old_BCNK: Tensor, algorithm: Algorithm) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled."""
    ratios_BCNK = importance_ratio(logprobs_BCNK, old_BCNK, algorithm.loss)
    clipped_BCNK = (ratios_BCNK < 1 - algorithm.clip_low) | (ratios_BCNK > 1 + algorithm.clip_high)
    return {
        "ratio": ratios_BCNK.mean(),
        "ratio_max": ratios_BCNK.max(),
        "clipped": clipped_BCNK.double().mean(),
        "kl_old": kl_estimate(old_BCNK, logprobs_BCNK).mean(),  # the tokens are samples of the old policy
    }


def _spread(name: str, x_BCN: Tensor) -> dict[str, Tensor]:
    spread = x_BCN.std() if x_BCN.numel() > 1 else torch.zeros_like(x_BCN.sum())
    return {name: x_BCN.mean(), f"{name}_std": spread}


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)
