"""The published shapes that benchmarks measure, with random weights: what the text says does not change the cost."""

from __future__ import annotations

from typing import Any

DELTANET_1B: dict[str, Any] = {
    "model_type": "delta_net",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 16,
    "vocab_size": 32000,
}
"""fla-hub/delta_net-1.3B-100B."""

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
