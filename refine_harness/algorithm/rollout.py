"""How to continue: k tokens sampled from each forked state, all forks as one batch (PAPER: step 3).

Sampling is by inverse transform from uniform numbers that are drawn beforehand, so that the tokens depend neither on
the device nor on which documents share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refine_harness.config import Algorithm
from refine_harness.models.base import FastWeightLM
from refine_harness.models.decode import Decoder
from refine_harness.models.state import State


@torch.no_grad()
def continue_from(
    model: FastWeightLM, states: State, hidden_RD: Tensor, uniforms_RK: Tensor, algorithm: Algorithm
) -> Tensor:
    """Sample K tokens from each of R states.

    Args:
        states: R forks.
        hidden_RD: the final hidden state at each fork, from which the first token is sampled.
        uniforms_RK: in [0, 1), one per token to sample.

    Returns int64 [R, K].
    """
    decoder = Decoder(model, states)
    tokens: list[Tensor] = []
    for uniforms_R in uniforms_RK.unbind(1):
        if tokens:
            hidden_RD = decoder.step(tokens[-1])
        logits_RV = model.logits(hidden_RD)
        if algorithm.suppress_end and model.config.eos_token_id is not None:
            logits_RV = logits_RV.index_fill(1, _ends(model, logits_RV.device), -torch.inf)
        tokens.append(sample(logits_RV, uniforms_R, algorithm.temperature, algorithm.top_p))
    return torch.stack(tokens, 1)


def sample(logits_RV: Tensor, uniforms_R: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """One token per row by inverse transform: the first whose cumulative probability exceeds the uniform number."""
    wide = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    probs_RV = (logits_RV.to(wide) / temperature).softmax(-1)
    if top_p < 1:
        probs_RV = _nucleus(probs_RV, top_p)
    ladder_RV = probs_RV.cumsum(-1)
    targets_R1 = uniforms_R[:, None].to(ladder_RV) * ladder_RV[:, -1:]
    tokens_R = torch.searchsorted(ladder_RV, targets_R1, right=True)[:, 0]
    # Rounding can carry a target to the very end of the ladder, past the last token that has any probability.
    return torch.minimum(tokens_R, (ladder_RV < ladder_RV[:, -1:]).sum(-1))


def _nucleus(probs_RV: Tensor, top_p: float) -> Tensor:
    """Zero outside the smallest set of likeliest tokens that together reach top_p; not renormalised."""
    sorted_RV, order_RV = probs_RV.sort(-1, descending=True)
    outside_RV = sorted_RV.cumsum(-1) - sorted_RV >= top_p
    return probs_RV.masked_fill(torch.zeros_like(outside_RV).scatter(1, order_RV, outside_RV), 0)


def _ends(model: FastWeightLM, device: torch.device) -> Tensor:
    ends = model.config.eos_token_id
    return torch.as_tensor(ends if isinstance(ends, list) else [ends], device=device)


def draw_uniforms(rng: Sequence[torch.Generator], count: int) -> Tensor:
    """[B, count] uniform numbers, row b from generator b."""
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in rng])
