"""DeltaNet (Yang et al., arXiv 2406.06484) with flash-linear-attention's parameter and config names.

Checkpoints made by fla load unchanged, and what is saved here loads in fla. The ops come from `refine_kernels`,
so the same file runs on a laptop and on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from refine_kernels import short_conv
from torch import Tensor

from refine_harness.errors import ModelError
from refine_harness.models.delta import Around, DeltaConfig, DeltaLM, DeltaMixer, Heads, Options, check_options, whole
from refine_harness.models.modules import Linear


class DeltaNetConfig(DeltaConfig):
    """fla's DeltaNet settings, names and defaults. `use_output_norm` is kept without effect, as in fla."""

    model_type = "delta_net"

    def __init__(
        self,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        use_gate: bool = False,
        use_beta: bool = True,
        use_output_norm: bool = True,
        num_heads: int = 16,
        qk_norm: str = "l2",
        qk_activation: str = "silu",
        **kwargs: Any,
    ):
        self.expand_k = expand_k
        self.expand_v = expand_v
        self.use_gate = use_gate
        self.use_beta = use_beta
        self.use_output_norm = use_output_norm
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.qk_activation = qk_activation
        super().__init__(**kwargs)


_BUILT: Options = {"qk_norm": ("l2", "sum"), "qk_activation": ("silu", "relu", "elu", "identity")}


class DeltaNet(DeltaMixer):
    """A memory that never fades, written with the strength of a sigmoid or always fully."""

    def __init__(self, config: DeltaNetConfig):
        H = config.num_heads
        keys = whole(config.hidden_size * config.expand_k, "hidden_size times expand_k")
        values = whole(config.hidden_size * config.expand_v, "hidden_size times expand_v")
        for option, width in (("expand_k", keys), ("expand_v", values)):
            if width % H:
                raise ModelError(
                    f"the model's config has num_heads={H} and hidden_size times {option} = {width}, "
                    "which must be a multiple of num_heads."
                )
        super().__init__(config, Heads(H, H, keys // H, values // H), "silu" if config.use_gate else None)
        self.qk_norm, self.qk_activation = config.qk_norm, config.qk_activation
        self.use_beta = config.use_beta
        if config.use_beta:
            self.b_proj = Linear(config.hidden_size, H, bias=False)
            self.controls = "b"

    def strengths(self, said: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        if not self.use_beta:
            v_BTX = said["v"]
            return v_BTX.new_full((*v_BTX.shape[:2], self.heads.values), self.beta_scale), None
        return said["b"].sigmoid() * self.beta_scale, None

    def query_or_key(self, name: str, x_BTD: Tensor, around: Around) -> Tensor:
        """silu belongs to the convolution; the other activations follow it, and the norm follows them."""
        heads, silu = self.heads.keys, self.qk_activation == "silu"
        in_one_pass = self.qk_norm == "l2" and self.qk_activation in ("silu", "identity")
        y_BTD = self.mixed(name, x_BTD, around, silu=silu, unit_heads=heads if in_one_pass else None)
        if self.qk_activation == "relu":
            y_BTD = y_BTD.relu()
        elif self.qk_activation == "elu":
            wide = torch.float64 if y_BTD.dtype == torch.float64 else torch.float32
            y_BTD = (F.elu(y_BTD.to(wide)) + 1).to(y_BTD.dtype)
        if self.qk_norm == "l2" and not in_one_pass:
            y_BTD = short_conv(y_BTD, y_BTD.new_ones(y_BTD.shape[-1], 1), silu=False, unit_heads=heads)
        y_BTHK = y_BTD.unflatten(-1, (heads, -1))
        return F.normalize(y_BTHK, p=1, dim=-1, eps=1e-6) if self.qk_norm == "sum" else y_BTHK


class DeltaNetForCausalLM(DeltaLM):
    """DeltaNet with a language-model head."""

    config_class = DeltaNetConfig

    def __init__(self, config: DeltaNetConfig):
        check_options(config, _BUILT)
        super().__init__(config)

    def make_mixer(self, config: DeltaNetConfig) -> DeltaMixer:
        return DeltaNet(config)
