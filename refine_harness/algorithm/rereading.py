"""The same step the way the paper's flow computes it: every truncated prefix is read again from its start.

Slow and plain, for one purpose: given the same positions and the same sampled tokens, `step.refine_step` must give
the same loss and the same gradients. No state is forked here and no batch is shared between rollouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refine_harness.algorithm.advantage import group_advantages
from refine_harness.algorithm.loss import policy_loss
from refine_harness.algorithm.reward import REWARDS
from refine_harness.config import Algorithm
from refine_harness.models.base import FastWeightLM
from refine_harness.types import Batch, Losses, Rollouts


def refine_step_by_rereading(
    model: FastWeightLM,
    batch: Batch,
    algorithm: Algorithm,
    rollouts: Rollouts,
    advantages_BCN: Tensor | None = None,
) -> Losses:
    """Losses of `refine_step` for rollouts that were sampled before; their stored log-probabilities are the old ones.

    advantages_BCN: of rollouts that were judged before, too; None judges them with the model as it is.
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
        rewards, logprobs = [], []
        for c, position in enumerate(rollouts.positions_BC[b].tolist()):
            true_K = document_T[position + 1 : position + 1 + K]
            true_KD = hidden_TD[position + 1 : position + 1 + K].detach()
            for tokens_K in rollouts.tokens_BCNK[b, c]:
                reread_T = torch.cat((document_T[: position + 1], tokens_K))
                reread_TD = model.read(reread_T[None]).hidden[0]
                predicted_KV = (model.logits(reread_TD[position:-1]) / algorithm.temperature).log_softmax(-1)
                logprobs.append(predicted_KV[torch.arange(K), tokens_K])
                own_KD = reread_TD[position + 1 :].detach()
                rewards.append(
                    REWARDS[algorithm.reward](
                        tokens_K[None, None, None], true_K[None, None], own_KD[None, None, None], true_KD[None, None]
                    ).squeeze()
                )
        shape = rollouts.tokens_BCNK.shape[1:]
        judged_1CN = group_advantages(
            torch.stack(rewards).view(1, *shape[:2]), over=algorithm.group, scale=algorithm.scale
        )
        losses = policy_loss(
            torch.stack(logprobs).view(1, *shape),
            rollouts.logprobs_BCNK[b : b + 1],
            judged_1CN if advantages_BCN is None else advantages_BCN[b : b + 1],
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        policy.append(losses.sum())
        tokens += losses.numel()
    return Losses(torch.stack(ntp).sum(), count, torch.stack(policy).sum(), tokens)
