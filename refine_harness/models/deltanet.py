"""DeltaNet (Yang et al., arXiv 2406.06484) with flash-linear-attention's parameter and config names.

Checkpoints made by fla load unchanged, and what is saved here loads in fla. The ops come from `refine_kernels`,
so the same file runs on a laptop and on a GPU. Options of fla's config that are not built yet raise a ModelError.

    D hidden size   H heads   K, V key and value size of a head   W taps of the short convolution
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from refine_kernels import delta_rule, short_conv
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig

from refine_harness.errors import ModelError
from refine_harness.models.base import FastWeightLayer, FastWeightLM, Tape


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


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in float32 or wider."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class ShortConvolution(nn.Module):
    """Holder of one filter per channel, [D, 1, W], as fla stores it."""

    def __init__(self, size: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, taps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own default for a depthwise convolution: uniform within 1 / sqrt(W)."""
        nn.init.uniform_(self.weight, -(self.weight.shape[-1] ** -0.5), self.weight.shape[-1] ** -0.5)


class DeltaNet(nn.Module):
    """The token mixer: q, k, v through short convolutions, the delta rule, a norm per head."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_heads
        keys, values = int(D * config.expand_k), int(D * config.expand_v)
        self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
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
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, lengths_B: Tensor | None, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        """See `FastWeightLayer.forward`. State: `memory` [B, H, K, V] and the last inputs of each convolution."""
        B, T, _ = x_BTD.shape
        before = state or {}
        inputs: dict[str, Tensor] = {}
        mixed: dict[str, Tensor] = {}
        for name, project, conv in (
            ("q", self.q_proj, self.q_conv1d),
            ("k", self.k_proj, self.k_conv1d),
            ("v", self.v_proj, self.v_conv1d),
        ):
            y, inputs[f"{name}_inputs"] = short_conv(project(x_BTD), conv.weight[:, 0], before.get(f"{name}_inputs"))
            mixed[name] = y.view(B, T, self.heads, -1)
        q, k, v = unit(mixed["q"]), unit(mixed["k"]), mixed["v"]
        beta_BTH = self.b_proj(x_BTD).sigmoid() * self.beta_scale
        if lengths_B is not None:  # a pad writes with strength zero
            real_BT = torch.arange(T, device=x_BTD.device) < lengths_B[:, None]
            beta_BTH = beta_BTH * real_BT[..., None]
        rule = delta_rule(q, k, v, beta_BTH, before.get("memory"), boundaries=forkable)
        y_BTD = self.o_proj(self.o_norm(rule.outputs_BTHV).reshape(B, T, -1))

        if lengths_B is None:
            last = {name: inputs_BSD[:, T:] for name, inputs_BSD in inputs.items()}
        else:
            last = _last_inputs(inputs, lengths_B[:, None] - 1, T)
        after = {"memory": rule.state_BHKV, **last}
        if not forkable:
            return y_BTD, after, None
        return y_BTD, after, {"k": k, "v": v, "beta": beta_BTH, "rule": rule, "inputs": inputs}

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
        return {"memory": replay.state_BHKV, **_last_inputs(tape["inputs"], positions_BC, T)}


def unit(x: Tensor) -> Tensor:
    """x over its Euclidean norm along the last dimension, with fla's epsilon; float32 or wider inside."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _last_inputs(inputs: dict[str, Tensor], positions_BC: Tensor, T: int) -> dict[str, Tensor]:
    """The W - 1 inputs of each convolution up to each position, [B·C, W - 1, D]."""
    out: dict[str, Tensor] = {}
    for name, inputs_BSD in inputs.items():
        P = inputs_BSD.shape[1] - T
        at_BCP = positions_BC[..., None] + 1 + torch.arange(P, device=positions_BC.device)
        rows_B11 = torch.arange(positions_BC.shape[0], device=positions_BC.device)[:, None, None]
        out[name] = inputs_BSD[rows_B11, at_BCP].flatten(0, 1)
    return out


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)); the inner size is fla's: 2/3 of hidden_ratio times D, rounded up to 256."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        D = config.hidden_size
        size = config.intermediate_size
        if size is None:
            size = -(-int(D * (config.hidden_ratio or 4) * 2 / 3) // 256) * 256
        self.gate_proj = nn.Linear(D, size, bias=False)
        self.up_proj = nn.Linear(D, size, bias=False)
        self.down_proj = nn.Linear(size, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeltaNetBlock(FastWeightLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = DeltaNet(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, lengths_B: Tensor | None, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        y_BTD, after, tape = self.attn(self.attn_norm(x_BTD), state, lengths_B, forkable)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), after, tape

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        return self.attn.fork(tape, positions_BC)


class DeltaNetPreTrainedModel(FastWeightLM):
    """What transformers needs to know of both classes below."""

    config_class = DeltaNetConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["DeltaNetBlock"]
    _input_embed_layer = "embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class DeltaNetModel(nn.Module):
    """Embeddings, blocks and final norm: the parameters under `model.`."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeltaNetBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class DeltaNetForCausalLM(DeltaNetPreTrainedModel, GenerationMixin):
    """DeltaNet with a language-model head."""

    def __init__(self, config: DeltaNetConfig):
        check_config(config)
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def layers(self) -> Sequence[FastWeightLayer]:
        return cast(Sequence[FastWeightLayer], self.model.layers)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return self.model.embeddings(tokens_BT)

    def final_norm(self, x_BTD: Tensor) -> Tensor:
        return self.model.norm(x_BTD)

    @property
    def head_weight(self) -> Tensor:
        return cast(Tensor, self.lm_head.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings
