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
from refine_kernels import Lookup, delta_rule, last_inputs, short_conv, tapped
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
        tap = None
        if forkable:
            x_BTD, tap = tapped(x_BTD)
        inputs = self._inputs(x_BTD)
        q_BTGK, k_BTGK = (self.query_or_key(name, inputs[name], before) for name in "qk")
        v_BTHV = self._values(inputs["v"], before)
        beta_BTH, g_BTH = self._strengths(x_BTD, rows.real_BT)
        rule = delta_rule(q_BTGK, k_BTGK, v_BTHV, beta_BTH, before.get("memory"), g_BTH=g_BTH, boundaries=forkable)
        o_BTHV = rule.outputs_BTHV
        o_BTHV = self.o_norm(o_BTHV, self.g_proj(x_BTD).view_as(o_BTHV)) if self.gated else self.o_norm(o_BTHV)
        after = {"memory": rule.state_BHKV}
        if self.use_short_conv:
            for name, input_BTX in inputs.items():
                name = f"{name}_inputs"
                after[name] = last_inputs(input_BTX, before.get(name), rows.ends_B1, self.taps)
        tape = {"x": tap, "grid": rule.boundaries, "stride": rule.stride, "rows": rows, "before": before}
        return self.o_proj(o_BTHV.flatten(2)), after, tape if forkable else None

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The memory before each position's chunk, and the few tokens since, read again from the layer's own inputs."""
        P = self.taps - 1
        spots = _spots(tape["rows"], positions_BC, tape["stride"], P)
        x_RMD = tape["x"].pick(spots.tokens).view(len(spots.real_RL), -1, tape["x"].value.shape[-1])
        inputs = self._inputs(x_RMD)
        if P:  # what stands before the text's first token is not its tokens but the state that it started from
            inputs = {
                name: self._started(x_RMX, tape["before"].get(f"{name}_inputs"), spots)
                for name, x_RMX in inputs.items()
            }
        before = {f"{name}_inputs": x_RMX[:, :P] for name, x_RMX in inputs.items()} if P else {}
        k_RLGK = self.query_or_key("k", inputs["k"][:, P:], before)
        v_RLHV = self._values(inputs["v"][:, P:], before)
        beta_RLH, g_RLH = self._strengths(x_RMD[:, P:], spots.real_RL)
        rule = delta_rule(k_RLGK, k_RLGK, v_RLHV, beta_RLH, tape["grid"].pick(spots.grid).to(_wide(x_RMD)), g_BTH=g_RLH)
        after = {"memory": rule.state_BHKV}
        for name, x_RMX in inputs.items() if P else ():
            at_RPX = spots.last_RP[..., None].expand(-1, -1, x_RMX.shape[-1])
            after[f"{name}_inputs"] = x_RMX.gather(1, at_RPX)
        return after

    def _inputs(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """What the convolutions read."""
        return {"q": self.q_proj(x_BTD), "k": self.k_proj(x_BTD), "v": self.v_proj(x_BTD)}

    def _values(self, input_BTX: Tensor, before: dict[str, Tensor]) -> Tensor:
        """Values [B, T, H, V]."""
        return self.mixed("v", input_BTX, before).unflatten(-1, (self.heads.values, -1))

    def _strengths(self, x_BTD: Tensor, real_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `strengths`, but a pad writes with strength zero and forgets nothing."""
        beta_BTH, g_BTH = self.strengths(x_BTD)
        if real_BT is None:
            return beta_BTH, g_BTH
        return beta_BTH * real_BT[..., None], None if g_BTH is None else g_BTH * real_BT[..., None]

    def _started(self, x_RMX: Tensor, before_BPX: Tensor | None, spots: _Spots) -> Tensor:
        """The inputs of a fork's tokens, those before the text's start from the state that the reading started from."""
        if before_BPX is None:
            return x_RMX * spots.inside_RM[..., None]
        earlier_RPX = before_BPX.to(x_RMX.dtype)[spots.rows_R]
        P = earlier_RPX.shape[1]
        # A fork in the text's first chunk starts where the text does; all others have P tokens before them.
        first_RPX = torch.where(spots.inside_RM[:, :P, None], x_RMX[:, :P], earlier_RPX)
        return torch.cat((first_RPX, x_RMX[:, P:]), 1)


@dataclass(frozen=True)
class _Spots:
    """Where forks find what they need; the same for all layers. R = B·C forks, M = P + L tokens of each."""

    grid: Lookup
    """The state before the position's chunk."""
    tokens: Lookup
    """The P tokens before the chunk, and its own L; others stand for those that do not exist."""
    inside_RM: Tensor
    """bool, whether there is such a token."""
    real_RL: Tensor
    """bool, whether a token of the chunk is at or before the position."""
    last_RP: Tensor
    """int64, which of the M tokens are the last P up to the position."""
    rows_R: Tensor
    """int64, row of the batch."""


def _spots(rows: Rows, positions_BC: Tensor, stride: int, P: int) -> _Spots:
    """For forks at these positions of a reading; made once for all layers."""
    kept = rows.memo.get("spots")
    if kept is not None and kept[0] is positions_BC and kept[1:3] == (stride, P):
        return kept[3]
    device, (B, C) = positions_BC.device, positions_BC.shape
    read_R = (positions_BC + 1).reshape(-1)
    rows_R = torch.arange(B, device=device).repeat_interleave(C)
    chunk_R = (read_R - 1).clamp(min=0) // stride
    at_RM = (chunk_R * stride)[:, None] + torch.arange(-P, min(stride, rows.T), device=device)
    inside_RM = (at_RM >= 0) & (at_RM < rows.T)
    tokens_RM = rows_R[:, None] * rows.T + at_RM.clamp(min=0, max=rows.T - 1)
    since_R1 = (read_R - chunk_R * stride)[:, None]
    spots = _Spots(
        Lookup(rows_R * -(-rows.T // stride) + chunk_R),
        Lookup(tokens_RM.flatten()),
        inside_RM,
        at_RM[:, P:] < read_R[:, None],
        since_R1 + torch.arange(P, device=device),
        rows_R,
    )
    rows.memo["spots"] = (positions_BC, stride, P, spots)
    return spots


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
