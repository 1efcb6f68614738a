"""LaCT (Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884) with the published parameter and config names.

A layer adds two readings of the same queries, keys and values: attention to a sliding window, and fast weights that
change once per chunk of tokens. Checkpoints of the published code load unchanged, and what is saved here loads there.

    D hidden size   A attention heads, I channels of each   H fast-weight heads, K channels of each
    L tokens of a chunk   W window of attention   X learning rates of a token and head
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from refine_kernels import (
    SharedQKV,
    add_normed_heads,
    fork_attention,
    lact_step,
    last_inputs,
    shared_qkv,
    window_attention,
    window_step,
)
from refine_kernels.fork_attention import Elsewhere
from refine_kernels.lact import Chunk, FastWeights, Fresh, LaCT, Place, Reader, Weights, lact
from torch import Tensor, nn
from transformers import PretrainedConfig

from refine_harness.errors import ModelError
from refine_harness.models.base import Branch, FastWeightLayer, Rows, Tape
from refine_harness.models.modules import Block, CausalLM, Linear, RMSNorm, each, hooked, plain, turns

HEAD_NORM_EPS = 1e-5
"""Of the norms inside a layer: fla's default, which the published code leaves as it is."""
RATE_BIAS = 0.001 + math.log(-math.expm1(-0.001))
"""softplus of it is 0.001, the learning rate of a projection that says nothing."""


class LaCTSWIGLUConfig(PretrainedConfig):
    """The published settings, names and defaults. Options of fused kernels are kept; what they change is said."""

    model_type = "lact_swiglu"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attn_heads: int = 32,
        num_lact_heads: int = 4,
        inter_multi: float = 1,
        qkv_bias: bool = False,
        attn_qk_norm: bool = False,
        lact_chunk_size: int = 2048,
        use_muon: bool = False,
        lr_dim: int = 1,
        qkv_silu: bool = True,
        no_v_silu: bool = False,
        lr_parameterization: str = "mamba",
        learnable_ttt_scale: bool = True,
        use_momentum: bool = True,
        ttt_loss_type: str = "dot_product",
        ttt_prenorm: bool = False,
        ttt_nope: bool = False,
        w0_w2_low_rank: int = -1,
        window_size: int = 2048,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 2048,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        initializer_range: float = 0.006,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        tie_word_embeddings: bool = False,
        fuse_norm: bool = True,
        last_layer_fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        vocab_size: int = 32000,
        fw_init_gain: float = 0.5,
        use_fused_kernel: bool = False,
        fp32_states: bool = False,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attn_heads = num_attn_heads
        self.num_lact_heads = num_lact_heads
        self.inter_multi = inter_multi
        self.qkv_bias = qkv_bias
        self.attn_qk_norm = attn_qk_norm
        self.lact_chunk_size = lact_chunk_size
        self.use_muon = use_muon
        self.lr_dim = lr_dim
        self.qkv_silu = qkv_silu
        self.no_v_silu = no_v_silu
        self.lr_parameterization = lr_parameterization
        self.learnable_ttt_scale = learnable_ttt_scale
        self.use_momentum = use_momentum
        self.ttt_loss_type = ttt_loss_type
        self.ttt_prenorm = ttt_prenorm
        self.ttt_nope = ttt_nope
        self.w0_w2_low_rank = w0_w2_low_rank
        self.window_size = window_size
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.elementwise_affine = elementwise_affine
        self.norm_eps = norm_eps
        self.use_cache = use_cache
        self.fuse_norm = fuse_norm
        self.last_layer_fuse_norm = last_layer_fuse_norm
        self.fuse_swiglu = fuse_swiglu
        self.fuse_cross_entropy = fuse_cross_entropy
        self.vocab_size = vocab_size
        self.fw_init_gain = fw_init_gain
        self.use_fused_kernel = use_fused_kernel
        self.fp32_states = fp32_states
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
    "lr_parameterization": ("mamba",),
    "ttt_loss_type": ("dot_product",),
    "hidden_act": ("swish", "silu"),
    "elementwise_affine": (True,),
}
"""Options that change what is computed, and the values that are known."""


def check_config(config: LaCTSWIGLUConfig) -> None:
    """Raise ModelError for an option whose meaning is not known or a size that does not divide."""
    for option, built in _BUILT.items():
        value = getattr(config, option)
        if value not in built:
            allowed = " or ".join(repr(x) for x in built)
            raise ModelError(f"the model's config has {option}={value!r}; this version supports {allowed}.")
    for option in ("lact_chunk_size", "window_size"):
        value = getattr(config, option)
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"the model's config has {option}={value!r}; expected a whole number of tokens, 1 or more."
            )
    D = config.hidden_size
    for option, channels in (("num_attn_heads", "an even number of"), ("num_lact_heads", "the same number of")):
        heads = getattr(config, option)
        if heads < 1 or D % heads or (option == "num_attn_heads" and D // heads % 2):
            raise ModelError(
                f"the model's config has hidden_size={D} and {option}={heads}; each head must have {channels} channels."
            )
    K = D // config.num_lact_heads
    inner = int(K * config.inter_multi)
    if config.lr_dim != 1 and not config.lr_dim == inner == K:
        raise ModelError(
            f"the model's config has lr_dim={config.lr_dim}; this version supports 1 learning rate per head"
            f"{f' or {K}, one per channel' if inner == K else ''}."
        )


class LowRank(nn.Module):
    """An initial fast weight per head: a product of two thin matrices, and half the identity."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float):
        super().__init__()
        self.gain = gain
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: each factor normal, with a deviation of gain over the root of its own columns' count."""
        nn.init.normal_(self.w_left, std=self.gain * self.w_left.shape[-1] ** -0.5)
        nn.init.normal_(self.w_right, std=self.gain * self.w_right.shape[-1] ** -0.5)

    def forward(self) -> Tensor:
        """[H, rows, columns]."""
        w = self.w_left @ self.w_right
        return w + 0.5 * torch.eye(*w.shape[-2:], device=w.device, dtype=w.dtype)


class Controls(NamedTuple):
    """What each token says of how its chunk is learned and how loud the fast weights are."""

    rates_BTX: Tensor
    """Learning rates of all heads before softplus, X = H · 3 or H · 3 K."""
    momentum_BTH: Tensor | None
    gate_BTH: Tensor | None
    """Before silu."""
    raw: bool
    """Whether momentum is what the projection gives; else it has gone through the sigmoid."""


class LaCTMixer(FastWeightLayer):
    """The token mixer: attention to a window plus a reading of the fast weights."""

    def __init__(self, config: LaCTSWIGLUConfig):
        super().__init__()
        self.config = config
        D, H = config.hidden_size, config.num_lact_heads
        K = D // H
        M, rank = int(K * config.inter_multi), config.w0_w2_low_rank
        self.qkv = Linear(D, 3 * D, bias=config.qkv_bias)
        if config.attn_qk_norm:
            self.q_norm = RMSNorm(D, HEAD_NORM_EPS)
            self.k_norm = RMSNorm(D, HEAD_NORM_EPS)
        self.o_proj = Linear(D, D, bias=False)
        if rank > 0:
            self.w0 = LowRank(H, M, K, rank, config.fw_init_gain)
            self.w2 = LowRank(H, M, K, rank, config.fw_init_gain)
        else:
            self.w0 = nn.Parameter(torch.empty(H, M, K))
            self.w2 = nn.Parameter(torch.empty(H, M, K))
        self.w1 = nn.Parameter(torch.empty(H, K, M))
        self.lr_proj = Linear(D, 3 * config.lr_dim * H)
        self.qk_scale = nn.Parameter(torch.empty(D, 2))
        self.qk_offset = nn.Parameter(torch.empty(D, 2))
        if config.learnable_ttt_scale:
            self.ttt_scale_proj = Linear(D, H)
        self.ttt_norm = RMSNorm(K, HEAD_NORM_EPS)
        if config.use_momentum:
            self.momentum_proj = nn.Sequential(Linear(D, H), nn.Sigmoid())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What no submodule initialises: the fast weights, and scales and offsets that do nothing."""
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        for w in (self.w0, self.w1, self.w2):
            if isinstance(w, nn.Parameter):
                nn.init.normal_(w, std=w.shape[-1] ** -0.5)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        """See `FastWeightLayer.forward`.

        State: the fast weights and what their updates carry along, the unfinished chunk in buffers of L tokens, and
        the last W - 1 keys and values of attention, right-aligned. Its shapes are the same after any text.
        """
        qkv_BTX, said = self._linear(x_BTD)
        read_by = self.used_twice(qkv_BTX, rows)
        attended_BTD, window, tape = self._attend(read_by, state, rows)
        if "place" not in rows.memo:
            assert rows.seen is not None
            rows.memo["place"] = Place(rows.seen_B, rows.seen, rows.lengths_B, rows.lengths)
        place: Place = rows.memo["place"]
        goes_on = rows.T == 1 and not any(place.ends(self.config.lact_chunk_size))
        if state is not None and rows.in_place and goes_on and said.raw:
            outputs_BTHV, after = self._step(read_by, said, state, place), state | window
        else:
            read = self._read_fast_weights(read_by, said, state, rows, place, forkable)
            outputs_BTHV, after = read.outputs_BTHV, {**_as_tensors(read.fast, read.unfinished), **window}
            tape = {"read": read, "before": state, **tape}
        norm = self.ttt_norm
        y_BTD = add_normed_heads(attended_BTD, rows.packed(outputs_BTHV), norm.weight, said.gate_BTH, norm.eps)
        return self.o_proj(y_BTD), after, tape if forkable else None

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The weights of the chunks completed so far, the tokens since, and the window: all of it is on the tape."""
        read: LaCT = tape["read"]
        return {**_as_tensors(*read.state_at(positions_BC)), **self._window_at(tape, tape["before"], positions_BC)}

    def branch(self, tape: Tape, positions_BC: Tensor) -> Branch:
        """Only each position's fast weights are copied; its rows share them, and the window stays where it is."""
        keys_BTAI, values_BTAI = (
            tape[name].unflatten(-1, (self.config.num_attn_heads, -1)) for name in ("window_keys", "window_values")
        )
        return _MixerBranch(self, tape["read"].reader_at(positions_BC), keys_BTAI, values_BTAI, positions_BC)

    def _linear(self, x_BTD: Tensor) -> tuple[Tensor, Controls]:
        """Queries, keys and values side by side, and what the small projections say."""
        scaled, kept = self.config.learnable_ttt_scale, self.config.use_momentum
        small = [self.lr_proj, *([self.ttt_scale_proj] if scaled else ()), *([self.momentum_proj[0]] if kept else ())]
        if (kept and hooked(self.momentum_proj)) or not all(map(plain, small)):
            momentum_BTH = self.momentum_proj(x_BTD) if kept else None
            gate_BTH = self.ttt_scale_proj(x_BTD) if scaled else None
            return self.qkv(x_BTD), Controls(self.lr_proj(x_BTD), momentum_BTH, gate_BTH, raw=not kept)
        qkv_BTX, *said = each(x_BTD, self.qkv, *small)
        return qkv_BTX, Controls(said[0], said[-1] if kept else None, said[1] if scaled else None, raw=True)

    def used_twice(self, qkv_BTX: Tensor, rows: Rows) -> SharedQKV:
        """Queries, keys and values for attention and for the fast weights, as they come: in rows, or packed."""
        config = self.config
        qkv_BT3D = qkv_BTX.unflatten(-1, (3, -1))
        if config.attn_qk_norm:
            q_BTD, k_BTD, v_BTD = qkv_BT3D.unbind(2)
            qkv_BT3D = torch.stack((self.q_norm(q_BTD), self.k_norm(k_BTD), v_BTD), 2)
        return shared_qkv(
            qkv_BT3D,
            self.qk_scale,
            self.qk_offset,
            turns(rows, config.hidden_size // config.num_attn_heads, config.rope_theta, qkv_BT3D),
            fast_heads=config.num_lact_heads,
            silu=config.qkv_silu,
            silu_values=config.qkv_silu and not config.no_v_silu,
            turn_fast=not config.ttt_nope,
        )

    def _attend(
        self, read_by: SharedQKV, state: dict[str, Tensor] | None, rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Outputs as they come, the window after the real tokens, and this reading's own keys and values in rows."""
        W = self.config.window_size
        q_BTAI, k_BTAI, v_BTD = read_by[:3]
        own = {"window_keys": rows.spread(k_BTAI.flatten(2)), "window_values": rows.spread(v_BTD)}
        if state is not None and rows.T == 1 and rows.in_place:
            window = {name: state[name] for name in own}
            q_BAI, k_BAI, v_BAI = (x[:, 0] for x in (q_BTAI, k_BTAI, v_BTD.view_as(k_BTAI)))
            o_BAI = window_step(q_BAI, k_BAI, v_BAI, *window.values(), seen_B=rows.seen_B)
            return o_BAI.flatten(1)[:, None], window, own
        if state is None:
            o_BTAI = window_attention(q_BTAI, k_BTAI, v_BTD.view_as(k_BTAI), window=W, packing=rows.packing)
        else:
            past = {name: torch.cat((state[name], x), 1) for name, x in own.items()}
            k_BSAI, v_BSAI = (x.unflatten(-1, q_BTAI.shape[2:]) for x in past.values())
            assert rows.seen is not None
            # One token is read by the same operations wherever the rows stand, so that it can be recorded as a graph.
            real = [min(n, W - 1) for n in rows.seen]
            past_B = None if rows.T > 1 and min(real) == W - 1 else rows.seen_B.clamp(max=W - 1)
            o_BTAI = rows.packed(window_attention(rows.spread(q_BTAI), k_BSAI, v_BSAI, past_B, past=real, window=W))
            if rows.T == 1:
                return o_BTAI.flatten(2), {name: x[:, 1:] for name, x in past.items()}, own
        after = self._window_at(own, state, None if rows.lengths_B is None else rows.ends_B1)
        return o_BTAI.flatten(2), after, own

    def _window_at(self, own: Tape, before: dict[str, Tensor] | None, positions_BC: Tensor | None) -> dict[str, Tensor]:
        """The last W - 1 keys and values up to each position, zeros before the text's start; B·C rows.

        Positions None: up to the last token of each row.
        """
        return {
            name: last_inputs(
                own[name], None if before is None else before[name], positions_BC, self.config.window_size
            )
            for name in ("window_keys", "window_values")
        }

    def _read_fast_weights(
        self,
        read_by: SharedQKV,
        said: Controls,
        state: dict[str, Tensor] | None,
        rows: Rows,
        place: Place,
        forkable: bool,
    ) -> LaCT:
        """Each token's chunk read with the fast weights that the chunks before it left."""
        config = self.config
        rates_BTX = rows.spread(F.softplus(_wide(said.rates_BTX) + RATE_BIAS))
        rates_BTHX = rates_BTX.unflatten(-1, (config.num_lact_heads, -1))
        momentum_BTH = said.momentum_BTH
        if momentum_BTH is not None:
            momentum_BTH = rows.spread(momentum_BTH.sigmoid() if said.raw else momentum_BTH)
        return lact(
            rows.spread(read_by.fast_q_BTHK),
            Chunk(rows.spread(read_by.fast_k_BTHK), rows.spread(read_by.fast_v_BTHK), rates_BTHX, momentum_BTH),
            self._initial(len(rows.lengths)) if state is None else _fast_weights(state),
            None if state is None else _unfinished(state),
            place,
            chunk_size=config.lact_chunk_size,
            muon=config.use_muon,
            joint=config.use_fused_kernel,
            boundaries=forkable,
            in_place=rows.in_place,
        )

    def _step(self, read_by: SharedQKV, said: Controls, state: dict[str, Tensor], place: Place) -> Tensor:
        """Outputs [B, 1, H, V] of one token that ends no row's chunk, which is put into the chunk of the state."""
        q_BHK, k_BHK, v_BHV = (x[:, 0] for x in read_by[3:])
        rates_BHX = said.rates_BTX[:, 0].unflatten(-1, (self.config.num_lact_heads, -1))
        momentum_BH = None if said.momentum_BTH is None else said.momentum_BTH[:, 0]
        outputs_BHV = lact_step(
            q_BHK, k_BHK, v_BHV, rates_BHX, momentum_BH, _fast_weights(state).weights, _unfinished(state),
            place.held_B(self.config.lact_chunk_size), rate_bias=RATE_BIAS,
        )  # fmt: skip
        return outputs_BHV[:, None]

    def _initial(self, B: int) -> Fresh:
        """The fast weights of B texts that begin here."""
        config = self.config
        with torch.autocast(self.w1.device.type, enabled=False):
            w0, w1, w2 = (w() if isinstance(w, LowRank) else w for w in (self.w0, self.w1, self.w2))
            if config.fp32_states:
                w0, w1, w2 = _wide(w0), _wide(w1), _wide(w2)
        return Fresh((w0, w1, w2), B, momentum=config.use_momentum, prenorm=config.ttt_prenorm)


@dataclass(frozen=True)
class _MixerBranch(Branch):
    mixer: LaCTMixer
    fast_weights: Reader
    keys_BTAI: Tensor | Elsewhere
    values_BTAI: Tensor | Elsewhere
    positions_BC: Tensor

    def __call__(self, x_RKD: Tensor, rows: Rows) -> Tensor:
        F, mixer, config = self.positions_BC.numel(), self.mixer, self.mixer.config

        def by_fork(x_RKX: Tensor) -> Tensor:
            return x_RKX.reshape(F, -1, *x_RKX.shape[2:])

        q_RKAI, k_RKAI, v_RKD, fast_q_RKHE = mixer.used_twice(mixer.qkv(x_RKD), rows)[:4]
        attended_FQAI = fork_attention(
            by_fork(q_RKAI), by_fork(k_RKAI), by_fork(v_RKD.view_as(k_RKAI)), self.keys_BTAI, self.values_BTAI,
            self.positions_BC, length=rows.T, window=config.window_size,
        )  # fmt: skip
        read_FQHE = self.fast_weights(by_fork(fast_q_RKHE))
        gate_FQH = by_fork(mixer.ttt_scale_proj(x_RKD)) if config.learnable_ttt_scale else None
        norm = mixer.ttt_norm
        y_FQD = add_normed_heads(attended_FQAI.flatten(2), read_FQHE, norm.weight, gate_FQH, norm.eps)
        return mixer.o_proj(y_FQD.view_as(x_RKD))

    def stand_in(self) -> Branch:
        keys_BTAI, values_BTAI = self._window
        return replace(
            self,
            fast_weights=self.fast_weights.stand_in(),
            keys_BTAI=Elsewhere.like(keys_BTAI),
            values_BTAI=Elsewhere.like(values_BTAI),
            positions_BC=self.positions_BC.clone(),
        )

    def load(self, other: Branch) -> None:
        assert isinstance(other, _MixerBranch)
        assert isinstance(self.keys_BTAI, Elsewhere) and isinstance(self.values_BTAI, Elsewhere)
        keys_BTAI, values_BTAI = other._window
        self.keys_BTAI.point_to(keys_BTAI)
        self.values_BTAI.point_to(values_BTAI)
        self.fast_weights.load(other.fast_weights)
        self.positions_BC.copy_(other.positions_BC)

    @property
    def _window(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.keys_BTAI, Tensor) and isinstance(self.values_BTAI, Tensor)
        return self.keys_BTAI.detach(), self.values_BTAI.detach()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


_PARTS = {"weights": "w", "main": "main", "momentum": "momentum", "norms": "norm"}
"""Field of FastWeights -> start of the names of its three tensors in a state."""
_TOKENS = ("keys", "values", "rates", "momenta")
"""Names of the fields of Chunk in a state."""


def _as_tensors(fast: FastWeights, unfinished: Chunk) -> dict[str, Tensor]:
    """Both as the named tensors of a state."""
    parts = zip(_PARTS.values(), fast, strict=True)
    weights = {f"{name}{i}": w for name, part in parts if part is not None for i, w in enumerate(part)}
    return weights | {name: x for name, x in zip(_TOKENS, unfinished, strict=True) if x is not None}


def _fast_weights(state: dict[str, Tensor]) -> FastWeights:
    def part(name: str) -> Weights:
        return state[f"{name}0"], state[f"{name}1"], state[f"{name}2"]

    return FastWeights(
        part("w"),
        part("main") if "main0" in state else None,
        part("momentum") if "momentum0" in state else None,
        part("norm"),
    )


def _unfinished(state: dict[str, Tensor]) -> Chunk:
    return Chunk(state["keys"], state["values"], state["rates"], state.get("momenta"))


class LaCTForCausalLM(CausalLM):
    """LaCT with a language-model head."""

    config_class = LaCTSWIGLUConfig
    host_rows = True

    def __init__(self, config: LaCTSWIGLUConfig):
        check_config(config)
        super().__init__(config)
        self.alike_every = config.lact_chunk_size

    def make_block(self, config: LaCTSWIGLUConfig, index: int) -> FastWeightLayer:
        return Block(config, LaCTMixer(config))

    def reads_branches(self, tapes: Sequence[Tape], positions_BC: Tensor, length: int) -> Tensor | None:
        """Within a chunk that goes on, of texts that begin with the reading."""
        tape = tapes[0]  # chunks end at the same places in every layer
        if tape["before"] is not None:
            return None
        return tape["read"].chunk_goes_on(positions_BC, length)

    def step_kind(self, seen: Sequence[int]) -> Hashable | None:
        """How many rows' chunks are full, if it is none or all."""
        full = sum(n > 0 and n % self.config.lact_chunk_size == 0 for n in seen)
        return full if full in (0, len(seen)) else None

    def place_of(self, kind: Hashable, rows: int) -> tuple[int, ...]:
        return (self.config.lact_chunk_size if kind else 0,) * rows

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LaCTMixer | LowRank):
            module.reset_parameters()
