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
from refine_kernels import (
    Lookup,
    Packing,
    Tap,
    delta_rule,
    delta_state,
    delta_step,
    last_inputs,
    short_conv,
    short_conv_step,
    tapped,
)
from torch import Tensor
from transformers import PretrainedConfig

from refine_harness.errors import ModelError
from refine_harness.models.attention import Attention, attention_specs
from refine_harness.models.base import FastWeightLayer, Rows, Tape
from refine_harness.models.modules import Block, CausalLM, GatedRMSNorm, Linear, RMSNorm, ShortConvolution, each, plain
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

    controls: str = ""
    """Which projections, besides those of queries, keys and values, say how a token writes."""

    def strengths(self, said: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """How strongly each token writes, beta [B, T, H], and the log decay before it, [B, T, H]; None for no decay.

        said: what the projections say of the tokens, `controls` and values at least.
        """
        raise NotImplementedError

    def query_or_key(self, name: str, x_BTD: Tensor, around: Around) -> Tensor:
        """The projected queries ("q") or keys ("k") as the delta rule takes them, [B, T, G, K]."""
        y_BTD = self.mixed(name, x_BTD, around, unit_heads=self.heads.keys)
        return y_BTD.unflatten(-1, (self.heads.keys, -1))

    def mixed(
        self, name: str, x_BTD: Tensor, around: Around, *, silu: bool = True, unit_heads: int | None = None
    ) -> Tensor:
        """Convolution, activation and norm in one pass; a layer without convolution has one of one tap, which is 1."""
        started = around.before.get(f"{name}_inputs")
        if self.use_short_conv:
            weight_DW, packing = getattr(self, f"{name}_conv1d").weight[:, 0], around.packing
            if around.moves_on:
                assert started is not None
                return short_conv_step(x_BTD[:, 0], weight_DW, started, silu=silu, unit_heads=unit_heads)[:, None]
        else:  # no token meets another, so where texts end does not matter
            weight_DW, packing = x_BTD.new_ones(x_BTD.shape[-1], 1), None
        return short_conv(
            x_BTD, weight_DW, started, silu=silu, unit_heads=unit_heads, packing=packing, leading=around.leading
        )

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        before = state or {}
        tap = None
        if forkable:
            x_BTD, tap = tapped(x_BTD)
        said = self._projected(x_BTD, "qkv" + self.controls + ("g" if self.gated else ""))
        if rows.in_place and rows.T == 1 and state is not None:
            return self._spoken(self._step(said, state), said), state, None
        packing = rows.packing
        around = Around(before, packing)
        q_BTGK, k_BTGK = (self.query_or_key(name, said[name], around) for name in "qk")
        v_BTHV = self._values(said["v"], around)
        beta_BTH, g_BTH = self.strengths(said)
        memory_BHKV = before.get("memory")
        rule = delta_rule(
            q_BTGK, k_BTGK, v_BTHV, beta_BTH, memory_BHKV, g_BTH=g_BTH, boundaries=forkable, packing=packing
        )
        y_BTD = self._spoken(rule.outputs_BTHV, said)
        after = {"memory": rule.state_BHKV}
        if self.use_short_conv:
            for name in "qkv":
                started = before.get(f"{name}_inputs")
                after[f"{name}_inputs"] = last_inputs(said[name], started, None, self.taps, packing)
        if not forkable:
            return y_BTD, after, None
        kept = {"states": rule.boundaries, "stride": rule.stride, "chunk": rule.chunk}
        return y_BTD, after, {"x": tap, "rows": rows, "before": before, **kept}

    def _step(self, said: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        """What one more token of each row reads, [B, 1, H, V]; the state is written over."""
        around = Around(state, None, moves_on=True)
        q_BGK, k_BGK = (self.query_or_key(name, said[name], around)[:, 0] for name in "qk")
        v_BHV = self._values(said["v"], around)[:, 0]
        beta_BTH, g_BTH = self.strengths(said)
        g_BH = None if g_BTH is None else g_BTH[:, 0]
        return delta_step(q_BGK, k_BGK, v_BHV, beta_BTH[:, 0], state["memory"], g_BH=g_BH)[:, None]

    def _spoken(self, o_BTHV: Tensor, said: dict[str, Tensor]) -> Tensor:
        """The layer's outputs from what was read."""
        o_BTHV = self.o_norm(o_BTHV, said["g"].view_as(o_BTHV)) if self.gated else self.o_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(2))

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The memory before each position's chunk, and the few tokens since, read again from the layer's own inputs."""
        spots = self.spots(tape, positions_BC)
        return self.replay(spots.since.masks, *self.pieces(tape, spots))

    def spots(self, tape: Tape, positions_BC: Tensor) -> Spots:
        """Where forks at these positions find what they need; the same for all layers."""
        return _spots(tape["rows"], positions_BC, tape["stride"], tape["chunk"], self.taps - 1)

    def pieces(self, tape: Tape, spots: Spots) -> tuple[Tensor, Tensor, *tuple[Tensor | None, ...]]:
        """What `replay` needs of this layer: its inputs, the memory before them, and the convolutions' first inputs.

        Where not every chunk's memory was kept it is read again from one that was, which needs no gradient: that of the
        fork joins the reading's own at the chunk.
        """
        started = [tape["before"].get(f"{name}_inputs") for name in "qkv"]
        started = [None if x is None else x.index_select(0, spots.rows_R) for x in started]
        with torch.no_grad():
            memory_RHKV = tape["states"].pick(spots.kept)
            if spots.way is not None:
                x_RMD, P = spots.way.of(tape["x"]), self.taps - 1
                x_RMD[:, :P] *= spots.way.masks.inside_RM[:, :P, None]  # before a text's first token there is nothing
                memory_RHKV = self._write(spots.way.masks, x_RMD, memory_RHKV, *started[1:])[0].to(memory_RHKV.dtype)
        return spots.since.of(tape["x"]), tape["states"].join(spots.chunks, memory_RHKV), *started

    def replay(
        self, masks: Masks, x_RMD: Tensor, memory_RHKV: Tensor, *started_RPX: Tensor | None
    ) -> dict[str, Tensor]:
        """The state after each fork's real tokens.

        started_RPX: for queries, keys and values, the inputs of the convolution before the text's first token; None for
            a text that began there.
        """
        x_RMD = x_RMD * masks.inside_RM[..., None]  # before a text's first token there is nothing
        memory_RHKV, said = self._write(masks, x_RMD, memory_RHKV, *started_RPX[1:])
        after = {"memory": memory_RHKV}
        if self.taps == 1:
            return after
        last_RP1 = masks.last_RP[..., None]
        # No query is asked here: those few are projected that the convolution will ask for.
        x_RPD = x_RMD.gather(1, last_RP1.expand(-1, -1, x_RMD.shape[-1]))
        q_RPX, earlier_RPX = self.q_proj(x_RPD), started_RPX[0]
        if earlier_RPX is not None:
            first_RP1 = last_RP1.clamp(max=self.taps - 2)
            earlier_RPX = earlier_RPX.gather(1, first_RP1.expand(-1, -1, earlier_RPX.shape[-1]))
        if self._begins("q", earlier_RPX):
            q_RPX = _begun(q_RPX, masks.inside_RM.gather(1, masks.last_RP), earlier_RPX)
        after["q_inputs"] = q_RPX
        for name in "kv":
            x_RMX = said[name]
            after[f"{name}_inputs"] = x_RMX.gather(1, last_RP1.expand(-1, -1, x_RMX.shape[-1]))
        return after

    def _write(
        self, masks: Masks, x_RMD: Tensor, memory_RHKV: Tensor, *started_RPX: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The memory after each row's real tokens, and what the projections say, [R, M, X]."""
        P = self.taps - 1
        said = self._projected(x_RMD, "kv" + self.controls)
        for name, earlier_RPX in zip("kv", started_RPX, strict=True):
            if P and self._begins(name, earlier_RPX):
                said[name] = _begun(said[name], masks.inside_RM[:, :P], earlier_RPX)
        around = Around({}, None, leading=True)
        k_RLGK, v_RLHV = self.query_or_key("k", said["k"], around), self._values(said["v"], around)
        beta_RLH, g_RLH = self.strengths({name: x_RMX[:, P:] for name, x_RMX in said.items()})
        # Beyond the real tokens nothing is written and nothing forgotten.
        beta_RLH = beta_RLH * masks.real_RL[..., None]
        g_RLH = None if g_RLH is None else g_RLH * masks.real_RL[..., None]
        return delta_state(k_RLGK, v_RLHV, beta_RLH, memory_RHKV, g_BTH=g_RLH), said

    def _begins(self, name: str, earlier_RPX: Tensor | None) -> bool:
        """Whether what a projection makes of nothing is not what was there before the text."""
        return earlier_RPX is not None or not plain(getattr(self, f"{name}_proj"))

    def _projected(self, x_BTD: Tensor, names: str) -> dict[str, Tensor]:
        """What the projections of these names say: queries ("q"), keys, values, the output's gate ("g"), controls."""
        return dict(zip(names, each(x_BTD, *(getattr(self, f"{name}_proj") for name in names)), strict=True))

    def _values(self, input_BTX: Tensor, around: Around) -> Tensor:
        """Values [B, T, H, V]."""
        return self.mixed("v", input_BTX, around).unflatten(-1, (self.heads.values, -1))


class Around(NamedTuple):
    """What the convolutions meet before the first of the tokens, and where texts end."""

    before: dict[str, Tensor]
    """Their last inputs before, by name; none for texts that begin."""
    packing: Packing | None
    leading: bool = False
    """Whether the inputs before are the first of those that they get, and give no outputs."""
    moves_on: bool = False
    """Whether one token is read and `before` written over with the inputs before the next."""


class Masks(NamedTuple):
    """Of the tokens that R forks read again: M = P + L of each, the P before a chunk and L from there on."""

    inside_RM: Tensor
    """bool, whether there is such a token; what stands for others has no meaning."""
    real_RL: Tensor
    """bool, whether a token is among those to be read."""
    last_RP: Tensor
    """int64, which of the M tokens are the last P of those."""


@dataclass(frozen=True)
class Stretch:
    """Tokens that forks read again."""

    tokens: Lookup
    """The M tokens of each fork."""
    masks: Masks

    def of(self, x: Tap) -> Tensor:
        """The layer's inputs [R, M, D] there."""
        return x.pick(self.tokens).view(*self.masks.inside_RM.shape, -1)


@dataclass(frozen=True)
class Spots:
    """Where forks find what they need; the same for all layers."""

    kept: Lookup
    """The last memory before the position that was kept."""
    way: Stretch | None
    """From there to the position's chunk; None where the memory before every chunk was kept."""
    chunks: Lookup
    """The position's chunk."""
    since: Stretch
    """From its start to the position."""
    rows_R: Tensor
    """int64, row of the batch."""


def _spots(rows: Rows, positions_BC: Tensor, stride: int, chunk: int, P: int) -> Spots:
    """For forks at these positions of a reading; made once for all layers.

    stride, chunk: tokens between two memories that were kept, and between two that gradients can join.
    """
    known = rows.memo.get("spots")
    if known is not None and known[0] is positions_BC and known[1:4] == (stride, chunk, P):
        return known[4]
    device, (B, C) = positions_BC.device, positions_BC.shape
    stop_R = (positions_BC + 1).reshape(-1)
    rows_R = torch.arange(B, device=device).repeat_interleave(C)
    kept_R, chunk_R = ((stop_R - 1).clamp(min=0) // each for each in (stride, chunk))
    last_R1 = rows.ends_B1[rows_R]
    packing = rows.packing
    first_R = rows_R * rows.T if packing is None else packing.starts[rows_R]

    def counted(place_R: Tensor, each: int) -> Lookup:
        """Places of one text after those of another."""
        before_R = rows_R * -(-rows.T // each) if packing is None else packing.pieces(each).starts[rows_R]
        return Lookup(before_R + place_R)

    def stretch(start_R: Tensor, stop_R: Tensor, L: int) -> Stretch:
        at_RM = start_R[:, None] + torch.arange(-P, L, device=device)
        tokens_RM = first_R[:, None] + at_RM.clamp(min=0).minimum(last_R1)
        last_RP = (stop_R - start_R)[:, None] + torch.arange(P, device=device)
        inside_RM = (at_RM >= 0) & (at_RM <= last_R1)
        return Stretch(Lookup(tokens_RM.flatten()), Masks(inside_RM, at_RM[:, P:] < stop_R[:, None], last_RP))

    spots = Spots(
        counted(kept_R, stride),
        None if stride == chunk else stretch(kept_R * stride, chunk_R * chunk, stride - chunk),
        counted(chunk_R, chunk),
        stretch(chunk_R * chunk, stop_R, min(chunk, rows.T)),
        rows_R,
    )
    rows.memo["spots"] = (positions_BC, stride, chunk, P, spots)
    return spots


def _begun(x_RMX: Tensor, inside_RP: Tensor, earlier_RPX: Tensor | None) -> Tensor:
    """Inputs of a convolution; the first P are, where they lie before the text, what the reading started from."""
    P = inside_RP.shape[1]
    if earlier_RPX is None:
        first_RPX = x_RMX[:, :P] * inside_RP[..., None]
    else:
        first_RPX = torch.where(inside_RP[..., None], x_RMX[:, :P], earlier_RPX.to(x_RMX))
    return torch.cat((first_RPX, x_RMX[:, P:]), 1)


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
        states = iter(recorded(self, "forks", replay_all, [*spots.since.masks, *flat]))
        names = ["memory", *(f"{name}_inputs" for name in "qkv" if mixers[0].taps > 1)]
        return tuple({name: next(states) for name in names} for _ in mixers)

    def make_block(self, config: DeltaConfig, index: int) -> FastWeightLayer:
        spec = attention_specs(config).get(index)
        return Block(config, self.make_mixer(config) if spec is None else Attention(config.hidden_size, spec))
