"""How to continue: k tokens sampled from each fork, all forks as one batch (PAPER: step 3).

Sampling is by inverse transform from uniform numbers that are drawn beforehand, so that the tokens depend neither on
the device nor on which documents share a batch.

Suppressing the end, top-k and top-p choose among tokens; they change no log-probability. Those stay of the whole
distribution at the sampling temperature, here as in the update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refine_harness.config import Algorithm
from refine_harness.models.base import FastWeightLM
from refine_harness.models.branches import Branches, Step


@torch.no_grad()
def continue_from(
    model: FastWeightLM, branches: Branches, hidden_RD: Tensor, uniforms_RK: Tensor, algorithm: Algorithm
) -> tuple[Tensor, Tensor]:
    """Sample K tokens for each of R branches.

    Args:
        branches: of the model's reading.
        hidden_RD: the final hidden state where each branch starts, from which the first token is sampled.
        uniforms_RK: in [0, 1), one per token to sample.

    Returns the tokens, int64 [R, K], and their log-probabilities, float32 or wider, [R, K].
    """
    tokens_RK = torch.empty(uniforms_RK.shape, dtype=torch.int64, device=uniforms_RK.device)
    logprobs_RK = _wide(hidden_RD.new_empty(tokens_RK.shape))
    for rows, read_next in branches.samplers():
        some = slice(None) if rows is None else rows
        tokens_RK[some], logprobs_RK[some] = _continued(model, read_next, hidden_RD[some], uniforms_RK[some], algorithm)
        if rows is None:
            branches.expect(tokens_RK.clone())  # some may change below
    return tokens_RK, logprobs_RK


def _continued(
    model: FastWeightLM, read_next: Step, hidden_RD: Tensor, uniforms_RK: Tensor, algorithm: Algorithm
) -> tuple[Tensor, Tensor]:
    """One token after another."""
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    for uniforms_R in uniforms_RK.unbind(1):
        if tokens:
            hidden_RD = read_next(tokens[-1])
        scaled_RV = _wide(model.logits(hidden_RD)) / algorithm.temperature
        allowed_RV = scaled_RV
        if algorithm.suppress_end and model.config.eos_token_id is not None:
            allowed_RV = scaled_RV.clone()
            for end in _ends(model):
                allowed_RV[:, end] = -torch.inf
        tokens.append(sample(allowed_RV, uniforms_R, top_k=algorithm.top_k, top_p=algorithm.top_p))
        logprobs.append(scaled_RV.gather(1, tokens[-1][:, None])[:, 0] - scaled_RV.logsumexp(-1))
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


def sample(logits_RV: Tensor, uniforms_R: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token per row by inverse transform: the first whose cumulative probability exceeds the uniform number.

    Only the top_k likeliest tokens can be drawn (0: all), and of them only the nucleus that holds a share top_p.
    """
    probs_RV = _wide(logits_RV).softmax(-1)
    if top_k:
        probs_RV = _likeliest(probs_RV, top_k)
    if top_p < 1:
        probs_RV = _nucleus(probs_RV, top_p)
    ladder_RV = probs_RV.cumsum(-1)
    targets_R1 = uniforms_R[:, None].to(ladder_RV) * ladder_RV[:, -1:]
    tokens_R = torch.searchsorted(ladder_RV, targets_R1, right=True)[:, 0]
    # Rounding can carry a target to the very end of the ladder, past the last token that has any probability.
    return torch.minimum(tokens_R, (ladder_RV < ladder_RV[:, -1:]).sum(-1))


def _wide(logits_RV: Tensor) -> Tensor:
    return logits_RV.to(torch.float64 if logits_RV.dtype == torch.float64 else torch.float32)


def _likeliest(probs_RV: Tensor, top_k: int) -> Tensor:
    """Zero outside exactly top_k tokens of each row, renormalised."""
    kept_RK, tokens_RK = probs_RV.topk(min(top_k, probs_RV.shape[-1]))
    return torch.zeros_like(probs_RV).scatter(1, tokens_RK, kept_RK / kept_RK.sum(-1, keepdim=True))


def _nucleus(probs_RV: Tensor, top_p: float) -> Tensor:
    """Zero outside the smallest set of likeliest tokens that together reach top_p; not renormalised."""
    sorted_RV, order_RV = probs_RV.sort(-1, descending=True)
    outside_RV = sorted_RV.cumsum(-1) - sorted_RV >= top_p
    return probs_RV.masked_fill(torch.zeros_like(outside_RV).scatter(1, order_RV, outside_RV), 0)


def _ends(model: FastWeightLM) -> list[int]:
    ends = model.config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
