"""What DeltaNet and Gated DeltaNet share: settings, the layer around the delta rule, the block, the hybrid stack.

A model file adds its own settings, how strongly a token writes and forgets, and whatever it does otherwise to queries
and keys.

    D hidden size   G heads of queries and keys   H heads of values, one memory each   K, V size of a key and a value
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from refine_kernels import delta_rule, last_inputs, short_conv
from torch import Tensor, nn
from transformers import PretrainedConfig

from refine_harness.errors import ModelError
from refine_harness.models.attention import Attention, attention_specs
from refine_harness.models.base import FastWeightLayer, Rows, Tape
from refine_harness.models.modules import Block, CausalLM, GatedRMSNorm, RMSNorm, ShortConvolution


class DeltaConfig(PretrainedConfig):
    """The settings that both families have, with fla's names and defaults.

    `attn_mode`, `max_position_embeddings` and the `fuse_...` options choose among fla's own kernels: they are kept
    and saved, and change nothing here.
    """

    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        *,
        attn_mode: str = "chunk",
        hidden_size: int = 2048,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        max_position_embeddings: int = 2048,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        num_hidden_layers: int = 24,
        norm_eps: float = 1e-6,
        attn: dict[str, Any] | list[dict[str, Any]] | None = None,
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
        self.use_short_conv = use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        self.conv_size = conv_size
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


Options = dict[str, tuple[Any, ...]]

_BUILT: Options = {
    "attn_mode": ("chunk", "fused_recurrent"),
    "hidden_act": ("swish", "silu"),
    "attnres_block_size": (None,),
    "use_l2warp": (False,),
}
"""Options that change what is computed, and the values that are built."""

_HINTS = {
    "use_l2warp": " It adds a penalty to fla's training loss and changes nothing else: set it to false in config.json.",
    "attnres_block_size": " Use fla itself for this model.",
}


def check_options(config: DeltaConfig, built: Options) -> None:
    """Raise ModelError for an option whose value is not among those that are built."""
    for option, values in built.items():
        value = getattr(config, option)
        if value not in values:
            allowed = " or ".join(repr(x) for x in values)
            hint = _HINTS.get(option, "")
            raise ModelError(f"the model's config has {option}={value!r}; this version supports {allowed}.{hint}")


def whole(size: float, of: str) -> int:
    """`size` as an integer. Raises ModelError where it is none; `of` says what it is the size of."""
    if not math.isclose(size, round(size), rel_tol=1e-5) or round(size) < 1:
        raise ModelError(f"the model's config makes {of} {size:g}; it must be a positive whole number.")
    return round(size)


@dataclass(frozen=True)
class Heads:
    """How many heads there are and how large they are."""

    keys: int
    """G, heads of queries and keys; divides H."""
    values: int
    """H, heads of values."""
    key_size: int
    """K."""
    value_size: int
    """V."""


class DeltaMixer(FastWeightLayer):
    """The token mixer: q, k, v through short convolutions, the delta rule, a norm of each head, perhaps gated.

    State: `memory` [R, H, K, V], float32 or wider, and the last inputs of each convolution, if there is one.
    """

    def __init__(self, config: DeltaConfig, heads: Heads, gate: str | None):
        """gate: the activation of the output gate; None for an output without gate."""
        super().__init__()
        D, self.heads = config.hidden_size, heads
        keys, values = heads.keys * heads.key_size, heads.values * heads.value_size
        self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, values, bias=False)
        self.taps = config.conv_size if config.use_short_conv else 1
        self.use_short_conv = config.use_short_conv
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size)
            self.k_conv1d = ShortConvolution(keys, config.conv_size)
            self.v_conv1d = ShortConvolution(values, config.conv_size)
        self.gated = gate is not None
        if gate is None:
            self.o_norm = RMSNorm(heads.value_size, config.norm_eps)
        else:
            self.g_proj = nn.Linear(D, values, bias=False)
            self.o_norm = GatedRMSNorm(heads.value_size, config.norm_eps, gate)
        self.o_proj = nn.Linear(values, D, bias=False)

    def strengths(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """How strongly each token writes, beta [B, T, H], and the log decay before it, [B, T, H]; None for no decay."""
        raise NotImplementedError

    def query_or_key(self, name: str, x_BTD: Tensor, before: dict[str, Tensor]) -> Tensor:
        """The projected queries ("q") or keys ("k") as the delta rule takes them, [B, T, G, K]."""
        return self.mixed(name, x_BTD, before, unit_heads=self.heads.keys).unflatten(-1, (self.heads.keys, -1))

    def mixed(
        self,
        name: str,
        x_BTD: Tensor,
        before: dict[str, Tensor],
        *,
        silu: bool = True,
        unit_heads: int | None = None,
    ) -> Tensor:
        """Convolution, activation and norm in one pass; a layer without convolution has one of one tap, which is 1."""
        if self.use_short_conv:
            weight_DW = getattr(self, f"{name}_conv1d").weight[:, 0]
        else:
            weight_DW = x_BTD.new_ones(x_BTD.shape[-1], 1)
        return short_conv(x_BTD, weight_DW, before.get(f"{name}_inputs"), silu=silu, unit_heads=unit_heads)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        before = state or {}
        inputs = {"q": self.q_proj(x_BTD), "k": self.k_proj(x_BTD), "v": self.v_proj(x_BTD)}
        q_BTGK, k_BTGK = (self.query_or_key(name, inputs[name], before) for name in "qk")
        v_BTHV = self.mixed("v", inputs["v"], before).unflatten(-1, (self.heads.values, -1))
        beta_BTH, g_BTH = self.strengths(x_BTD)
        if rows.real_BT is not None:  # a pad writes with strength zero and forgets nothing
            beta_BTH = beta_BTH * rows.real_BT[..., None]
            g_BTH = None if g_BTH is None else g_BTH * rows.real_BT[..., None]
        rule = delta_rule(q_BTGK, k_BTGK, v_BTHV, beta_BTH, before.get("memory"), g_BTH=g_BTH, boundaries=forkable)
        o_BTHV = rule.outputs_BTHV
        o_BTHV = self.o_norm(o_BTHV, self.g_proj(x_BTD).view_as(o_BTHV)) if self.gated else self.o_norm(o_BTHV)
        after = {"memory": rule.state_BHKV, **self._inputs_at(inputs, before, rows.ends_B1)}
        tape = {
            "k": k_BTGK,
            "v": v_BTHV,
            "beta": beta_BTH,
            "g": g_BTH,
            "rule": rule,
            "inputs": inputs,
            "before": before,
        }
        return self.o_proj(o_BTHV.flatten(2)), after, tape if forkable else None

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The grid state before each position's chunk, and the delta rule over the few tokens since."""
        B, T = tape["beta"].shape[:2]
        rule, device = tape["rule"], positions_BC.device
        read_BC = positions_BC + 1
        rows_B1 = torch.arange(B, device=device)[:, None]
        grid_BC = (read_BC - 1).clamp(min=0) // rule.stride
        memory_RHKV = rule.boundaries_BNHKV[rows_B1, grid_BC].flatten(0, 1)
        at_BCL = grid_BC[..., None] * rule.stride + torch.arange(min(rule.stride, T), device=device)
        since_RL1 = (at_BCL < read_BC[..., None]).flatten(0, 1)[..., None]
        at_BCL = at_BCL.clamp(max=T - 1)

        def piece(name: str) -> Tensor:
            """The tokens after the grid state and some more, [R, L, ...]."""
            return tape[name][rows_B1[..., None], at_BCL].flatten(0, 1)

        k_RLGK, beta_RLH = piece("k"), piece("beta") * since_RL1
        g_RLH = None if tape["g"] is None else piece("g") * since_RL1
        replay = delta_rule(k_RLGK, k_RLGK, piece("v"), beta_RLH, memory_RHKV, g_BTH=g_RLH)
        return {"memory": replay.state_BHKV, **self._inputs_at(tape["inputs"], tape["before"], positions_BC)}

    def _inputs_at(
        self, inputs: dict[str, Tensor], before: dict[str, Tensor], positions_BC: Tensor
    ) -> dict[str, Tensor]:
        """The state of each convolution at those positions."""
        if self.taps == 1:
            return {}
        return {
            f"{name}_inputs": last_inputs(x_BTD, before.get(f"{name}_inputs"), positions_BC, self.taps)
            for name, x_BTD in inputs.items()
        }


class DeltaLM(CausalLM):
    """A stack of such blocks with a language-model head."""

    def __init__(self, config: DeltaConfig):
        check_options(config, _BUILT)
        super().__init__(config)
        self.fixed_state = all(spec.window_size is not None for spec in attention_specs(config).values())

    def make_mixer(self, config: Any) -> DeltaMixer:
        """The layer that `attn` does not replace."""
        raise NotImplementedError

    def make_block(self, config: DeltaConfig, index: int) -> FastWeightLayer:
        spec = attention_specs(config).get(index)
        return Block(config, self.make_mixer(config) if spec is None else Attention(config.hidden_size, spec))
