"""The same step the way the paper's flow computes it: every truncated prefix is read again from its start.

Slow and plain, for one purpose: given the same positions and the same sampled tokens, `step.refine_step` must give
the same loss and the same gradients. No state is forked here and no batch is shared between rollouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refine_harness.algorithm.advantage import group_advantages
from refine_harness.algorithm.loss import kl_estimate, policy_loss
from refine_harness.algorithm.reward import find_reward
from refine_harness.config import Algorithm
from refine_harness.models.base import FastWeightLM
from refine_harness.types import Batch, Losses, Rollouts


def refine_step_by_rereading(
    model: FastWeightLM,
    batch: Batch,
    algorithm: Algorithm,
    rollouts: Rollouts,
    advantages_BCN: Tensor | None = None,
    reference: FastWeightLM | None = None,
) -> Losses:
    """Losses of `refine_step` for rollouts that were sampled before; their stored log-probabilities are the old ones.

    advantages_BCN: of rollouts that were judged before, too; None judges them with the model as it is.
    reference: the frozen model of the KL term; it, too, reads every prefix again.
    """
    K = algorithm.rollout_length
    ntp, count, policy, tokens = [], 0, [], 0
    for b, length in enumerate(batch.lengths_B.tolist()):
        document_T = batch.tokens_BT[b, :length]
        hidden_TD = model.read(document_T[None]).hidden[0]
        start = 1 if batch.loss_from_B is None else max(1, int(batch.loss_from_B[b]))
        logprobs_TV = model.logits(hidden_TD).log_softmax(-1)
        ntp.append(-logprobs_TV[torch.arange(start - 1, length - 1), document_T[start:]].sum())
        count += length - start
        rewards, logprobs, references = [], [], []
        for c, position in enumerate(rollouts.positions_BC[b].tolist()):
            true_K = document_T[position + 1 : position + 1 + K]
            true_KD = hidden_TD[position + 1 : position + 1 + K].detach()
            for tokens_K in rollouts.tokens_BCNK[b, c]:
                reread_T = torch.cat((document_T[: position + 1], tokens_K))
                reread_TD = model.read(reread_T[None]).hidden[0]
                logprobs.append(_logprobs(model, reread_TD[position:-1], tokens_K, algorithm))
                if algorithm.kl_weight > 0:
                    assert reference is not None
                    with torch.no_grad():
                        other_TD = reference.read(reread_T[None]).hidden[0]
                        references.append(_logprobs(reference, other_TD[position:-1], tokens_K, algorithm))
                own_KD = reread_TD[position + 1 :].detach()
                rewards.append(
                    find_reward(algorithm.reward)(
                        tokens_K[None, None, None], true_K[None, None], own_KD[None, None, None], true_KD[None, None]
                    ).squeeze()
                )
        shape = rollouts.tokens_BCNK.shape[1:]
        judged_1CN = group_advantages(
            torch.stack(rewards).view(1, *shape[:2]), over=algorithm.group, scale=algorithm.advantage_scale
        )
        logprobs_1CNK = torch.stack(logprobs).view(1, *shape)
        losses = policy_loss(
            logprobs_1CNK,
            rollouts.logprobs_BCNK[b : b + 1],
            judged_1CN if advantages_BCN is None else advantages_BCN[b : b + 1],
            loss=algorithm.loss,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        if references:
            references_1CNK = torch.stack(references).view(1, *shape)
            losses = losses + algorithm.kl_weight * kl_estimate(logprobs_1CNK, references_1CNK)
        policy.append(losses.sum())
        tokens += losses.numel()
    return Losses(torch.stack(ntp).sum(), count, torch.stack(policy).sum(), tokens)


def _logprobs(model: FastWeightLM, before_KD: Tensor, tokens_K: Tensor, algorithm: Algorithm) -> Tensor:
    predicted_KV = (model.logits(before_KD) / algorithm.temperature).log_softmax(-1)
    return predicted_KV[torch.arange(len(tokens_K)), tokens_K]
