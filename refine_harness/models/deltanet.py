"""DeltaNet (Yang et al., arXiv 2406.06484) with flash-linear-attention's parameter and config names.

Checkpoints made by fla load unchanged, and what is saved here loads in fla. The ops come from `refine_kernels`,
so the same file runs on a laptop and on a GPU. Options of fla's config that are not built yet raise a ModelError.

    D hidden size   H heads   K, V key and value size of a head   W taps of the short convolution
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from refine_kernels import delta_rule, last_inputs, short_conv
from torch import Tensor, nn
from transformers import PretrainedConfig

from refine_harness.errors import ModelError
from refine_harness.models.base import FastWeightLayer, Rows, Tape
from refine_harness.models.modules import CausalLM, GatedMLP, RMSNorm, ShortConvolution


class DeltaNetConfig(PretrainedConfig):
    """fla's DeltaNet settings, names and defaults. Options of fla's own fused kernels are kept, without effect."""

    model_type = "delta_net"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        attn_mode: str = "chunk",
        hidden_size: int = 2048,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        use_gate: bool = False,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        use_beta: bool = True,
        use_output_norm: bool = True,
        num_heads: int = 16,
        qk_norm: str = "l2",
        qk_activation: str = "silu",
        max_position_embeddings: int = 2048,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        num_hidden_layers: int = 24,
        norm_eps: float = 1e-6,
        attn: dict[str, Any] | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        fuse_linear_cross_entropy: bool = False,
        use_l2warp: bool = False,
        vocab_size: int = 32000,
        attnres_block_size: int | None = None,
        **kwargs: Any,
    ):
        self.attn_mode = attn_mode
        self.hidden_size = hidden_size
        self.expand_k = expand_k
        self.expand_v = expand_v
        self.use_gate = use_gate
        self.use_short_conv = use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        self.conv_size = conv_size
        self.use_beta = use_beta
        self.use_output_norm = use_output_norm
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.qk_activation = qk_activation
        self.max_position_embeddings = max_position_embeddings
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.num_hidden_layers = num_hidden_layers
        self.norm_eps = norm_eps
        self.attn = attn
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        self.fuse_norm = fuse_norm
        self.fuse_swiglu = fuse_swiglu
        self.fuse_cross_entropy = fuse_cross_entropy
        self.fuse_linear_cross_entropy = fuse_linear_cross_entropy
        self.use_l2warp = use_l2warp
        self.vocab_size = vocab_size
        self.attnres_block_size = attnres_block_size
        super().__init__(
            **{
                "pad_token_id": pad_token_id,
                "bos_token_id": bos_token_id,
                "eos_token_id": eos_token_id,
                "tie_word_embeddings": tie_word_embeddings,
                **kwargs,
            }
        )


_BUILT: dict[str, tuple[Any, ...]] = {
    "attn_mode": ("chunk", "fused_recurrent"),
    "use_gate": (False,),
    "use_short_conv": (True,),
    "use_beta": (True,),
    "use_output_norm": (True,),
    "qk_norm": ("l2",),
    "qk_activation": ("silu",),
    "hidden_act": ("swish", "silu"),
    "attn": (None,),
    "tie_word_embeddings": (False,),
    "attnres_block_size": (None,),
    "use_l2warp": (False,),
}
"""Options that change what is computed, and the values that are built."""


def check_config(config: DeltaNetConfig) -> None:
    """Raise ModelError for an option that is not built or a size that does not divide."""
    for option, built in _BUILT.items():
        value = getattr(config, option)
        if value not in built:
            allowed = " or ".join(repr(x) for x in built)
            raise ModelError(f"the model's config has {option}={value!r}; this version supports {allowed}.")
    for option, size in (("expand_k", config.expand_k), ("expand_v", config.expand_v)):
        width = config.hidden_size * size
        if width != int(width) or int(width) % config.num_heads:
            raise ModelError(
                f"the model's config has hidden_size={config.hidden_size}, {option}={size} and num_heads="
                f"{config.num_heads}; hidden_size times {option} must be a multiple of num_heads."
            )


class DeltaNet(nn.Module):
    """The token mixer: q, k, v through short convolutions, the delta rule, a norm per head."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_heads
        keys, values = int(D * config.expand_k), int(D * config.expand_v)
        self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
        self.taps = config.conv_size
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, values, bias=False)
        self.b_proj = nn.Linear(D, self.heads, bias=False)
        self.q_conv1d = ShortConvolution(keys, config.conv_size)
        self.k_conv1d = ShortConvolution(keys, config.conv_size)
        self.v_conv1d = ShortConvolution(values, config.conv_size)
        self.o_norm = RMSNorm(values // self.heads, config.norm_eps)
        self.o_proj = nn.Linear(values, D, bias=False)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        """See `FastWeightLayer.forward`. State: `memory` [B, H, K, V] and the last inputs of each convolution."""
        B, T, _ = x_BTD.shape
        before = state or {}
        inputs = {"q": self.q_proj(x_BTD), "k": self.k_proj(x_BTD), "v": self.v_proj(x_BTD)}
        convs = {"q": self.q_conv1d, "k": self.k_conv1d, "v": self.v_conv1d}
        q, k, v = (
            short_conv(
                inputs[name],
                convs[name].weight[:, 0],
                before.get(f"{name}_inputs"),
                unit_heads=None if name == "v" else self.heads,
            ).view(B, T, self.heads, -1)
            for name in "qkv"
        )
        beta_BTH = self.b_proj(x_BTD).sigmoid() * self.beta_scale
        if rows.real_BT is not None:  # a pad writes with strength zero
            beta_BTH = beta_BTH * rows.real_BT[..., None]
        rule = delta_rule(q, k, v, beta_BTH, before.get("memory"), boundaries=forkable)
        y_BTD = self.o_proj(self.o_norm(rule.outputs_BTHV).reshape(B, T, -1))
        after = {"memory": rule.state_BHKV, **self._inputs_at(inputs, before, rows.ends_B1)}
        if not forkable:
            return y_BTD, after, None
        return y_BTD, after, {"k": k, "v": v, "beta": beta_BTH, "rule": rule, "inputs": inputs, "before": before}

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The grid state at or before each position, and the delta rule over the few tokens since."""
        k_BTHK, v_BTHV, beta_BTH, rule = tape["k"], tape["v"], tape["beta"], tape["rule"]
        B, T = k_BTHK.shape[:2]
        read_BC = positions_BC + 1
        rows_B1 = torch.arange(B, device=k_BTHK.device)[:, None]
        grid_BC = read_BC // rule.stride
        memory_RHKV = rule.boundaries_BGHKV[rows_B1, grid_BC].flatten(0, 1)
        offsets_L = torch.arange(min(rule.stride, T), device=k_BTHK.device)
        at_BCL = grid_BC[..., None] * rule.stride + offsets_L
        since_BCL = at_BCL < read_BC[..., None]
        at_BCL = at_BCL.clamp(max=T - 1)
        rows_B11 = rows_B1[..., None]
        k_RLHK = k_BTHK[rows_B11, at_BCL].flatten(0, 1)
        v_RLHV = v_BTHV[rows_B11, at_BCL].flatten(0, 1)
        beta_RLH = (beta_BTH[rows_B11, at_BCL] * since_BCL[..., None]).flatten(0, 1)
        replay = delta_rule(k_RLHK, k_RLHK, v_RLHV, beta_RLH, memory_RHKV)
        return {"memory": replay.state_BHKV, **self._inputs_at(tape["inputs"], tape["before"], positions_BC)}

    def _inputs_at(
        self, inputs: dict[str, Tensor], before: dict[str, Tensor], positions_BC: Tensor
    ) -> dict[str, Tensor]:
        """The state of each convolution at those positions."""
        return {
            f"{name}_inputs": last_inputs(x_BTD, before.get(f"{name}_inputs"), positions_BC, self.taps)
            for name, x_BTD in inputs.items()
        }


class DeltaNetBlock(FastWeightLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = DeltaNet(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        y_BTD, after, tape = self.attn(self.attn_norm(x_BTD), state, rows, forkable)
        y_BTD, x_BTD = self.mlp_norm(y_BTD, x_BTD)
        return x_BTD + self.mlp(y_BTD), after, tape

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        return self.attn.fork(tape, positions_BC)


class DeltaNetForCausalLM(CausalLM):
    """DeltaNet with a language-model head."""

    config_class = DeltaNetConfig
    _no_split_modules: ClassVar = ["DeltaNetBlock"]

    def __init__(self, config: DeltaNetConfig):
        check_config(config)
        super().__init__(config)

    def make_block(self, config: DeltaNetConfig, index: int) -> FastWeightLayer:
        return DeltaNetBlock(config)
