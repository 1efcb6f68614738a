"""One tiny float64 model of every kind that is native here, for tests that hold for all of them.

Weights are large enough that nothing is hidden by near-linearity. Lengths worth testing lie around the multiples of
each model's chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from refine_harness.models import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    FastWeightLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    LaCTForCausalLM,
    LaCTSWIGLUConfig,
)

VOCABULARY = 40
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "intermediate_size": 24,
    "initializer_range": 0.4,
}


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny model, and the text lengths at which it is worth testing."""

    make: Callable[[], FastWeightLM]
    lengths: tuple[int, ...] = (1, 2, 63, 64, 65, 100, 300)


def delta_net(**changes: object) -> Callable[[], FastWeightLM]:
    return lambda: DeltaNetForCausalLM(DeltaNetConfig(**{**SMALL, "num_heads": 2, **changes}))


def gated_deltanet(**changes: object) -> Callable[[], FastWeightLM]:
    sizes = {"num_heads": 2, "head_dim": 6, "expand_v": 1.5}
    return lambda: GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**{**SMALL, **sizes, **changes}))


def lact(stir: bool = True, **changes: object) -> Callable[[], FastWeightLM]:
    heads = {"num_attn_heads": 4, "num_lact_heads": 2, "lact_chunk_size": 16, "window_size": 12}

    def make() -> FastWeightLM:
        model = LaCTForCausalLM(LaCTSWIGLUConfig(**{**SMALL, **heads, **changes}))
        return _stirred(model) if stir else model

    return make


def _stirred(model: FastWeightLM) -> FastWeightLM:
    """Scales, offsets and biases that do something, and learning rates that move the fast weights in a short text."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".bias", "qk_scale", "qk_offset")):
                p.add_(0.3 * torch.randn_like(p))
            if name.endswith("lr_proj.bias"):
                p.add_(5.0)
    return model


FEW = (1, 64, 65, 130)
"""Enough for options that leave the chunks as they are."""

HYBRID = {
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
    "attn": [
        {"layers": [0], "num_heads": 4, "num_kv_heads": 2, "window_size": 20, "qkv_bias": True},
        {"layers": [2], "num_heads": 2, "num_kv_heads": 1, "rope_theta": 100.0},
    ],
}
"""A window, the family's own layer, and all that was read."""

DELTA_NET_OPTIONS = {
    "gated": {"use_gate": True, "qk_norm": "sum", "qk_activation": "elu", "allow_neg_eigval": True, "expand_v": 2.0},
    "bare": {"use_beta": False, "use_short_conv": False, "qk_activation": "relu", "expand_k": 0.5},
}
GATED_DELTANET_OPTIONS = {
    "ungated": {"use_gate": False, "num_v_heads": 4, "allow_neg_eigval": True, "conv_size": 2},
    "bare": {"output_gate_activation": "sigmoid", "use_short_conv": False, "num_v_heads": 4},
}
LACT_OPTIONS = {
    "muon": {"use_muon": True, "w0_w2_low_rank": 3},
    "prenorm": {"ttt_prenorm": True, "learnable_ttt_scale": False, "inter_multi": 1.5, "window_size": 1},
    "plain": {
        "ttt_nope": True,
        "use_momentum": False,
        "lr_dim": 8,
        "qkv_bias": True,
        "attn_qk_norm": True,
        "no_v_silu": True,
        "tie_word_embeddings": True,
    },
    "joint": {"use_fused_kernel": True, "use_muon": True, "ttt_prenorm": True, "fp32_states": True, "qkv_silu": False},
}

MODELS: dict[str, Tiny] = {
    "delta_net": Tiny(delta_net()),
    **{f"delta_net_{name}": Tiny(delta_net(**changes), FEW) for name, changes in DELTA_NET_OPTIONS.items()},
    "delta_net_hybrid": Tiny(delta_net(**HYBRID), (1, 19, 20, 65, 130)),
    "gated_deltanet": Tiny(gated_deltanet()),
    **{
        f"gated_deltanet_{name}": Tiny(gated_deltanet(**changes), FEW)
        for name, changes in GATED_DELTANET_OPTIONS.items()
    },
    **{f"lact_{name}": Tiny(lact(**changes), (1, 15, 16, 17, 33, 100)) for name, changes in LACT_OPTIONS.items()},
}


def build(name: str) -> FastWeightLM:
    """The model by name, in float64, with the same weights each time."""
    torch.manual_seed(0)
    model = MODELS[name].make()
    torch.nn.Module.to(model, torch.float64)
    return model


def tokens(rows: int, T: int, seed: int = 0) -> torch.Tensor:
    """Random text without special tokens, [rows, T]."""
    return torch.randint(3, VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(seed))
