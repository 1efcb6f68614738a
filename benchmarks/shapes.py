"""The published shapes that benchmarks measure, with random weights: what the text says does not change the cost."""

from __future__ import annotations

from typing import Any

import torch

from refine_harness.models import FastWeightLM
from refine_harness.models.load import MODELS

DELTANET_1B: dict[str, Any] = {
    "model_type": "delta_net",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 16,
    "vocab_size": 32000,
}
"""fla-hub/delta_net-1.3B-100B."""

GATED_1B: dict[str, Any] = {
    "model_type": "gated_deltanet",
    "hidden_size": 2048,
    "num_hidden_layers": 21,
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2,
    "vocab_size": 32000,
}
"""fla's Gated DeltaNet of 1.3B parameters."""

LACT_760M: dict[str, Any] = {
    "model_type": "lact_swiglu",
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attn_heads": 24,
    "num_lact_heads": 4,
    "lact_chunk_size": 2048,
    "window_size": 2048,
    "use_muon": True,
    "use_momentum": True,
    "w0_w2_low_rank": 32,
    "rope_theta": 1000000,
    "vocab_size": 32000,
}
"""The 760M model of YunjinZhang/lact_llm."""

SHAPES: dict[str, dict[str, Any]] = {
    "deltanet-1b": DELTANET_1B,
    "gated-deltanet-1b": GATED_1B,
    "lact-760m": LACT_760M,
}


def build(shape: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> FastWeightLM:
    """A model of that shape with random weights, on the GPU where there is one."""
    settings, family = MODELS[shape["model_type"]]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = family(settings(**{key: value for key, value in shape.items() if key != "model_type"}))
    torch.nn.Module.to(model, dtype)
    return model
