"""Softmax attention for hybrid models: the layers that a config's `attn` names in place of a fast-weight layer.

Parameters have the names and shapes of flash-linear-attention's `Attention`. With a window the state has a fixed
size; without one it holds the keys and values of the whole text and grows with it.

    D hidden size   H query heads   G key and value heads   S tokens that a state has room for
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from refine_kernels import last_inputs, rotary, window_attention
from torch import Tensor

from refine_harness.errors import ModelError
from refine_harness.models.base import FastWeightLayer, Rows, Tape
from refine_harness.models.modules import Linear, each, turns


@dataclass(frozen=True)
class AttentionSpec:
    """One entry of a config's `attn`, without its list of layers; fla's names and defaults."""

    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and values; None for as many as queries."""
    qkv_bias: bool = False
    window_size: int | None = None
    """Tokens that a token sees, itself included; None for all before it."""
    rope_theta: float = 10000.0


def attention_specs(config: Any) -> dict[int, AttentionSpec]:
    """Index of each layer that is softmax attention -> what its config says.

    `config.attn` is None, one entry or a list of entries. Raises ModelError for one that cannot be built; a key that
    is not known is refused, because leaving it out would compute something else than was asked for.
    """
    entries = [] if config.attn is None else config.attn if isinstance(config.attn, list) else [config.attn]
    specs: dict[int, AttentionSpec] = {}
    for entry in entries:
        layers, spec = _parsed(entry, config)
        for layer in layers:
            if not isinstance(layer, int) or not 0 <= layer < config.num_hidden_layers:
                raise _refused(
                    entry, f"layers holds {layer!r}; the model's layers are 0 to {config.num_hidden_layers - 1}"
                )
            if layer in specs:
                raise _refused(entry, f"layer {layer} is named twice; name it once")
            specs[layer] = spec
    return specs


def _parsed(entry: Any, config: Any) -> tuple[list[int], AttentionSpec]:
    known = {field.name for field in fields(AttentionSpec)}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("layers"), list | tuple) or "num_heads" not in entry:
        raise _refused(entry, "each entry needs a list of layers and num_heads")
    if unknown := sorted(set(entry) - known - {"layers"}):
        raise _refused(entry, f"{unknown[0]} is not a setting of these layers; known are {', '.join(sorted(known))}")
    spec = AttentionSpec(**{name: value for name, value in entry.items() if name != "layers"})
    for name in ("num_heads", "num_kv_heads", "window_size"):
        value = getattr(spec, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise _refused(entry, f"{name} must be a positive number")
    if config.hidden_size % (2 * spec.num_heads):
        raise _refused(entry, f"hidden_size={config.hidden_size} must be an even multiple of num_heads")
    if spec.num_heads % (spec.num_kv_heads or spec.num_heads):
        raise _refused(entry, "num_heads must be a multiple of num_kv_heads")
    if not isinstance(spec.rope_theta, int | float) or not 0 < spec.rope_theta < math.inf:
        raise _refused(entry, "rope_theta must be a positive number")
    return list(entry["layers"]), spec


def _refused(entry: Any, why: str) -> ModelError:
    return ModelError(f"the model's config has attn={entry!r}; {why}.")


class Attention(FastWeightLayer):
    """Causal softmax attention with rotary positions.

    State: `keys` (turned by their positions) and `values`, [R, S, G, D / H], aligned to the right with zeros in
    front. S is window - 1 where there is a window; else it is the most tokens that any row can have read.
    """

    def __init__(self, size: int, spec: AttentionSpec):
        super().__init__()
        self.heads, self.groups = spec.num_heads, spec.num_kv_heads or spec.num_heads
        self.window, self.theta = spec.window_size, spec.rope_theta
        narrow = size // self.heads * self.groups
        self.q_proj = Linear(size, size, bias=spec.qkv_bias)
        self.k_proj = Linear(size, narrow, bias=spec.qkv_bias)
        self.v_proj = Linear(size, narrow, bias=spec.qkv_bias)
        self.o_proj = Linear(size, size, bias=False)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        q_BTD, *kv = each(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTHD = q_BTD.unflatten(-1, (self.heads, -1))
        k_BTGD, v_BTGD = (x_BTX.unflatten(-1, (self.groups, -1)) for x_BTX in kv)
        by = turns(rows, q_BTHD.shape[-1], self.theta, q_BTHD)
        q_BTHD, k_BTGD = rotary(q_BTHD, by), rotary(k_BTGD, by)
        history, past = {"keys": rows.spread(k_BTGD), "values": rows.spread(v_BTGD)}, 0
        if state is None:
            o_BTHD = window_attention(q_BTHD, k_BTGD, v_BTGD, window=self.window, packing=rows.packing)
        else:
            past = state["keys"].shape[1]
            past_B = rows.seen_B.clamp(max=past)
            history = {name: torch.cat((state[name].to(x.dtype), x), 1) for name, x in history.items()}
            o_BTHD = window_attention(rows.spread(q_BTHD), *history.values(), past_B, window=self.window)
            o_BTHD = rows.packed(o_BTHD)
        tape = {"history": history, "past": past}
        whole = self.window is None and rows.lengths_B is None
        after = dict(history) if whole else self.fork(tape, rows.ends_B1)
        return self.o_proj(o_BTHD.flatten(2)), after, tape if forkable else None

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The keys and values up to each position, as many as a later token can see."""
        return {name: self._up_to(positions_BC + tape["past"], x_BSGD) for name, x_BSGD in tape["history"].items()}

    def _up_to(self, last_BC: Tensor, x_BSGD: Tensor) -> Tensor:
        """The entries of a history up to index last_BC[b, c], right-aligned, [B·C, S, G, D / H]."""
        room = x_BSGD.shape[1] if self.window is None else self.window - 1
        return last_inputs(x_BSGD.flatten(2), None, last_BC, room + 1).unflatten(-1, x_BSGD.shape[2:])
