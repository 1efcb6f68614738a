"""What DeltaNet and Gated DeltaNet share: settings, the layer around the delta rule, the block, the hybrid stack.

A model file adds its own settings, how strongly a token writes and forgets, and whatever it does otherwise to queries
and keys.

    D hidden size   G heads of queries and keys   H heads of values, one memory each   K, V size of a key and a value
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from refine_kernels import Lookup, Packing, delta_rule, last_inputs, short_conv, tapped
from torch import Tensor
from transformers import PretrainedConfig

from refine_harness.errors import ModelError
from refine_harness.models.attention import Attention, attention_specs
from refine_harness.models.base import FastWeightLayer, Rows, Tape
from refine_harness.models.modules import Block, CausalLM, GatedRMSNorm, Linear, RMSNorm, ShortConvolution
from refine_harness.models.recorded import recorded


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
        self.q_proj = Linear(D, keys, bias=False)
        self.k_proj = Linear(D, keys, bias=False)
        self.v_proj = Linear(D, values, bias=False)
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
            self.g_proj = Linear(D, values, bias=False)
            self.o_norm = GatedRMSNorm(heads.value_size, config.norm_eps, gate)
        self.o_proj = Linear(values, D, bias=False)

    def strengths(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """How strongly each token writes, beta [B, T, H], and the log decay before it, [B, T, H]; None for no decay."""
        raise NotImplementedError

    def query_or_key(
        self, name: str, x_BTD: Tensor, before: dict[str, Tensor], packing: Packing | None = None
    ) -> Tensor:
        """The projected queries ("q") or keys ("k") as the delta rule takes them, [B, T, G, K]."""
        y_BTD = self.mixed(name, x_BTD, before, packing, unit_heads=self.heads.keys)
        return y_BTD.unflatten(-1, (self.heads.keys, -1))

    def mixed(
        self,
        name: str,
        x_BTD: Tensor,
        before: dict[str, Tensor],
        packing: Packing | None = None,
        *,
        silu: bool = True,
        unit_heads: int | None = None,
    ) -> Tensor:
        """Convolution, activation and norm in one pass; a layer without convolution has one of one tap, which is 1."""
        if self.use_short_conv:
            weight_DW = getattr(self, f"{name}_conv1d").weight[:, 0]
        else:  # no token meets another, so where texts end does not matter
            weight_DW, packing = x_BTD.new_ones(x_BTD.shape[-1], 1), None
        started = before.get(f"{name}_inputs")
        return short_conv(x_BTD, weight_DW, started, silu=silu, unit_heads=unit_heads, packing=packing)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        before = state or {}
        tap = None
        if forkable:
            x_BTD, tap = tapped(x_BTD)
        inputs = self._inputs(x_BTD)
        packing = rows.packing
        q_BTGK, k_BTGK = (self.query_or_key(name, inputs[name], before, packing) for name in "qk")
        v_BTHV = self._values(inputs["v"], before, packing)
        beta_BTH, g_BTH = self.strengths(x_BTD)
        memory_BHKV = before.get("memory")
        rule = delta_rule(
            q_BTGK, k_BTGK, v_BTHV, beta_BTH, memory_BHKV, g_BTH=g_BTH, boundaries=forkable, packing=packing
        )
        o_BTHV = rule.outputs_BTHV
        o_BTHV = self.o_norm(o_BTHV, self.g_proj(x_BTD).view_as(o_BTHV)) if self.gated else self.o_norm(o_BTHV)
        after = {"memory": rule.state_BHKV}
        if self.use_short_conv:
            for name, input_BTX in inputs.items():
                name = f"{name}_inputs"
                after[name] = last_inputs(input_BTX, before.get(name), None, self.taps, packing)
        tape = {"x": tap, "grid": rule.boundaries, "stride": rule.stride, "rows": rows, "before": before}
        return self.o_proj(o_BTHV.flatten(2)), after, tape if forkable else None

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The memory before each position's chunk, and the few tokens since, read again from the layer's own inputs."""
        spots = self.spots(tape, positions_BC)
        return self.replay(spots.masks, *self.pieces(tape, spots))

    def spots(self, tape: Tape, positions_BC: Tensor) -> Spots:
        """Where forks at these positions find what they need; the same for all layers."""
        return _spots(tape["rows"], positions_BC, tape["stride"], self.taps - 1)

    def pieces(self, tape: Tape, spots: Spots) -> tuple[Tensor, Tensor, *tuple[Tensor | None, ...]]:
        """What `replay` needs of this layer: its inputs, the memory before them, and the convolutions' first inputs."""
        x_RMD = tape["x"].pick(spots.tokens).view(*spots.masks.inside_RM.shape, -1)
        memory_RHKV = tape["grid"].pick(spots.grid).to(_wide(x_RMD))
        started = (tape["before"].get(f"{name}_inputs") for name in "qkv")
        return x_RMD, memory_RHKV, *(None if x is None else x.index_select(0, spots.rows_R) for x in started)

    def replay(
        self, masks: Masks, x_RMD: Tensor, memory_RHKV: Tensor, *started_RPX: Tensor | None
    ) -> dict[str, Tensor]:
        """The state after each fork's real tokens.

        started_RPX: for queries, keys and values, the inputs of the convolution before the text's first token; None for
            a text that began there.
        """
        P = self.taps - 1
        inputs = self._inputs(x_RMD)
        if P:  # in front of the text's first token stands the state that the reading started from
            inputs = {
                name: x_RMX * masks.inside_RM[..., None]
                if earlier_RPX is None
                else torch.cat(
                    (torch.where(masks.inside_RM[:, :P, None], x_RMX[:, :P], earlier_RPX.to(x_RMX)), x_RMX[:, P:]), 1
                )
                for (name, x_RMX), earlier_RPX in zip(inputs.items(), started_RPX, strict=True)
            }
        before = {f"{name}_inputs": x_RMX[:, :P] for name, x_RMX in inputs.items()} if P else {}
        k_RLGK = self.query_or_key("k", inputs["k"][:, P:], before)
        v_RLHV = self._values(inputs["v"][:, P:], before)
        beta_RLH, g_RLH = self.strengths(x_RMD[:, P:])
        # Beyond the position nothing is written and nothing forgotten.
        beta_RLH = beta_RLH * masks.real_RL[..., None]
        g_RLH = None if g_RLH is None else g_RLH * masks.real_RL[..., None]
        after = {"memory": delta_rule(k_RLGK, k_RLGK, v_RLHV, beta_RLH, memory_RHKV, g_BTH=g_RLH).state_BHKV}
        for name, x_RMX in inputs.items() if P else ():
            after[f"{name}_inputs"] = x_RMX.gather(1, masks.last_RP[..., None].expand(-1, -1, x_RMX.shape[-1]))
        return after

    def _inputs(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """What the convolutions read."""
        return {"q": self.q_proj(x_BTD), "k": self.k_proj(x_BTD), "v": self.v_proj(x_BTD)}

    def _values(self, input_BTX: Tensor, before: dict[str, Tensor], packing: Packing | None = None) -> Tensor:
        """Values [B, T, H, V]."""
        return self.mixed("v", input_BTX, before, packing).unflatten(-1, (self.heads.values, -1))


class Masks(NamedTuple):
    """Of the tokens that R forks read again: M = P + L of each, the P before a chunk and its own L."""

    inside_RM: Tensor
    """bool, whether there is such a token; what stands for others has no meaning."""
    real_RL: Tensor
    """bool, whether a token of the chunk is at or before the position."""
    last_RP: Tensor
    """int64, which of the M tokens are the last P up to the position."""


@dataclass(frozen=True)
class Spots:
    """Where forks find what they need; the same for all layers."""

    grid: Lookup
    """The state before the position's chunk."""
    tokens: Lookup
    """The M tokens of each fork."""
    rows_R: Tensor
    """int64, row of the batch."""
    masks: Masks


def _spots(rows: Rows, positions_BC: Tensor, stride: int, P: int) -> Spots:
    """For forks at these positions of a reading; made once for all layers."""
    kept = rows.memo.get("spots")
    if kept is not None and kept[0] is positions_BC and kept[1:3] == (stride, P):
        return kept[3]
    device, (B, C) = positions_BC.device, positions_BC.shape
    read_R = (positions_BC + 1).reshape(-1)
    rows_R = torch.arange(B, device=device).repeat_interleave(C)
    chunk_R = (read_R - 1).clamp(min=0) // stride
    at_RM = (chunk_R * stride)[:, None] + torch.arange(-P, min(stride, rows.T), device=device)
    last_R1 = rows.ends_B1[rows_R]
    inside_RM = (at_RM >= 0) & (at_RM <= last_R1)
    if rows.packing is None:
        first_R, first_chunk_R = rows_R * rows.T, rows_R * -(-rows.T // stride)
    else:
        first_R, first_chunk_R = rows.packing.starts[rows_R], rows.packing.pieces(stride).starts[rows_R]
    tokens_RM = first_R[:, None] + at_RM.clamp(min=0).minimum(last_R1)
    since_R1 = (read_R - chunk_R * stride)[:, None]
    spots = Spots(
        Lookup(first_chunk_R + chunk_R),
        Lookup(tokens_RM.flatten()),
        rows_R,
        Masks(inside_RM, at_RM[:, P:] < read_R[:, None], since_R1 + torch.arange(P, device=device)),
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
        self.recordable = not attention_specs(config)
        self.fixed_state = all(spec.window_size is not None for spec in attention_specs(config).values())

    def make_mixer(self, config: Any) -> DeltaMixer:
        """The layer that `attn` does not replace."""
        raise NotImplementedError

    def fork_layers(self, tapes: Sequence[Tape], positions_BC: Tensor, *, once: bool) -> tuple[dict[str, Tensor], ...]:
        if not (once and self.recordable):
            return super().fork_layers(tapes, positions_BC, once=once)
        mixers = [cast(DeltaMixer, cast(Block, layer).attn) for layer in self.layers]
        spots = mixers[0].spots(tapes[0], positions_BC)
        pieces = [mixer.pieces(tape, spots) for mixer, tape in zip(mixers, tapes, strict=True)]
        there = [[x is not None for x in of_layer] for of_layer in pieces]

        def replay_all(inside_RM: Tensor, real_RL: Tensor, last_RP: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            supply, masks = iter(tensors), Masks(inside_RM, real_RL, last_RP)
            after = []
            for mixer, given in zip(mixers, there, strict=True):
                x_RMD, memory_RHKV, *started = (next(supply) if given_here else None for given_here in given)
                assert x_RMD is not None and memory_RHKV is not None
                after.append(mixer.replay(masks, x_RMD, memory_RHKV, *started))
            return tuple(x for layer in after for x in layer.values())

        flat = [x for of_layer in pieces for x in of_layer if x is not None]
        states = iter(recorded(self, "forks", replay_all, [*spots.masks, *flat]))
        names = ["memory", *(f"{name}_inputs" for name in "qkv" if mixers[0].taps > 1)]
        return tuple({name: next(states) for name in names} for _ in mixers)

    def make_block(self, config: DeltaConfig, index: int) -> FastWeightLayer:
        spec = attention_specs(config).get(index)
        return Block(config, self.make_mixer(config) if spec is None else Attention(config.hidden_size, spec))
