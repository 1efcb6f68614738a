"""Gated DeltaNet (Yang et al., arXiv 2412.06464) with flash-linear-attention's parameter and config names.

DeltaNet whose memories fade: before a token writes, head h keeps exp(g) of what it knows, with
g = -exp(A_log) · softplus(a_proj(x) + dt_bias). Several heads of values may share a query and a key.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from refine_harness.errors import ModelError
from refine_harness.models.delta import DeltaConfig, DeltaLM, DeltaMixer, Heads, Options, check_options, whole
from refine_harness.models.modules import Linear


class GatedDeltaNetConfig(DeltaConfig):
    """fla's Gated DeltaNet settings, names and defaults."""

    model_type = "gated_deltanet"

    def __init__(
        self,
        *,
        expand_v: float = 2.0,
        use_gate: bool = True,
        output_gate_activation: str = "swish",
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        num_hidden_layers: int = 21,
        **kwargs: Any,
    ):
        self.expand_v = expand_v
        self.use_gate = use_gate
        self.output_gate_activation = output_gate_activation
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        super().__init__(num_hidden_layers=num_hidden_layers, **kwargs)


_BUILT: Options = {"output_gate_activation": ("swish", "silu", "sigmoid")}


class GatedDeltaNet(DeltaMixer):
    """A memory that fades at a rate of each head and each token."""

    controls = "ab"

    def __init__(self, config: GatedDeltaNetConfig):
        G, H = config.num_heads, config.num_v_heads or config.num_heads
        if H % G:
            raise ModelError(f"the model's config has num_v_heads={H}; it must be a multiple of num_heads={G}.")
        value_size = whole(config.head_dim * config.expand_v, "head_dim times expand_v")
        gate = config.output_gate_activation if config.use_gate else None
        super().__init__(config, Heads(G, H, config.head_dim, value_size), gate)
        self.a_proj = Linear(config.hidden_size, H, bias=False)
        self.b_proj = Linear(config.hidden_size, H, bias=False)
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.reset_decay()

    def reset_decay(self) -> None:
        """fla's start: exp(A_log) uniform in [0, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        # Drawn in float32: a narrow dtype would hit 0, whose logarithm no training recovers from.
        rate_H = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(0, 16)
        step_H = torch.empty_like(rate_H).uniform_(math.log(0.001), math.log(0.1)).exp()
        initialization.copy_(self.A_log, rate_H.log())
        initialization.copy_(self.dt_bias, step_H.expm1().log())

    def strengths(self, said: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        wide = torch.float64 if said["b"].dtype == torch.float64 else torch.float32
        beta_BTH = said["b"].to(wide).sigmoid() * self.beta_scale
        rate_H, dt_bias_H = self.A_log.to(wide).exp(), self.dt_bias.to(wide)
        return beta_BTH, -rate_H * F.softplus(said["a"].to(wide) + dt_bias_H)


class GatedDeltaNetForCausalLM(DeltaLM):
    """Gated DeltaNet with a language-model head."""

    config_class = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig):
        check_options(config, _BUILT)
        super().__init__(config)

    def make_mixer(self, config: GatedDeltaNetConfig) -> DeltaMixer:
        return GatedDeltaNet(config)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GatedDeltaNet):
            module.reset_decay()
        else:
            super()._init_weights(module)
