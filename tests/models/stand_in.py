"""A model with flash-linear-attention's conventions in plain torch, so that the adapter can be held to its contract on
a CPU in float64: fla's own cache class, states that a step without gradients overwrites, layers that count tokens.

`mixers` names a layer's kind: `linear` (decayed linear attention behind a short convolution), `attention` (all that
was read, with positions) or `window` (the last five tokens). Every layer ends in a token-shifted MLP.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

TAPS, WINDOW = 3, 5


@cache
def cache_class() -> type[Any]:
    """fla's cache, read from its file: importing the package would ask for Triton."""
    package = importlib.util.find_spec("fla")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "models" / "cache_utils.py"
    spec = importlib.util.spec_from_file_location("fla_cache_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Cache


class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

    def __init__(
        self, mixers=("linear", "linear"), hidden_size=8, num_heads=2, vocab_size=40, limits=(0.0, math.inf), **kwargs
    ):
        self.mixers, self.limits = list(mixers), limits
        self.hidden_size, self.num_heads, self.vocab_size = hidden_size, num_heads, vocab_size
        super().__init__(**{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True, **kwargs})


class Linear(nn.Module):
    """S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, on silu of a short convolution."""

    def __init__(self, config: Any, index: int):
        super().__init__()
        D = config.hidden_size
        self.index, self.heads = index, config.num_heads
        self.one_token_steps = config.model_type.startswith("mamba")
        self.qkv_proj, self.o_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.a_proj = nn.Linear(D, config.num_heads)
        self.conv_weight = nn.Parameter(torch.randn(3 * D, TAPS))

    def forward(self, x_BTD, past):
        B, T, _ = x_BTD.shape
        last = past[self.index] if past is not None and len(past) > self.index else None
        if last is not None and self.one_token_steps and T > 1:
            raise ValueError("cached decoding only supports a single new token per step")
        u_BTE = self.qkv_proj(x_BTD)
        conv_BEW = u_BTE.new_zeros(B, u_BTE.shape[-1], TAPS) if last is None else last["conv_state"][0]
        inputs_BES = torch.cat((conv_BEW, u_BTE.transpose(1, 2)), -1)
        windows_BETW = inputs_BES[..., 1:].unfold(-1, TAPS, 1)
        mixed_BET = F.silu((windows_BETW * self.conv_weight[:, None]).sum(-1))
        q, k, v = mixed_BET.transpose(1, 2).view(B, T, 3, self.heads, -1).unbind(2)
        decay_BTH = torch.sigmoid(self.a_proj(x_BTD) + 1)
        state_BHKV = q.new_zeros(B, self.heads, *2 * [q.shape[-1]]) if last is None else last["recurrent_state"]
        out = []
        for t in range(T):
            state_BHKV = state_BHKV * decay_BTH[:, t, :, None, None] + k[:, t, :, :, None] * v[:, t, :, None]
            out.append(torch.einsum("bhkv,bhk->bhv", state_BHKV, q[:, t]))
        after_BEW = inputs_BES[..., -TAPS:]
        if last is not None and T == 1 and not torch.is_grad_enabled():  # fla's kernels then write where they read
            after_BEW, state_BHKV = conv_BEW.copy_(after_BEW), last["recurrent_state"].copy_(state_BHKV)
        if past is not None:
            past.update(recurrent_state=state_BHKV, conv_state=(after_BEW,), layer_idx=self.index, offset=T)
        return self.o_proj(torch.stack(out, 1).flatten(2))


class Attention(nn.Module):
    """One head; the score of a key fades with its distance, which it can know by counting only."""

    def __init__(self, config: Any, index: int, window: int | None):
        super().__init__()
        D = config.hidden_size
        self.index, self.window = index, window
        self.qkv_proj, self.o_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x_BTD, past):
        T, before = x_BTD.shape[1], 0 if past is None else past.get_seq_length(self.index)
        places_T = torch.arange(before, before + T, dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = self.qkv_proj(x_BTD).chunk(3, -1)
        q, k = q * torch.cos(places_T / 7)[:, None], k * torch.cos(places_T / 7)[:, None]
        keys, values = k, v
        if past is not None:
            if before:
                keys, values = (torch.cat(pair, 1) for pair in zip(past[self.index]["attn_state"], (k, v), strict=True))
            settings = {"window_size": self.window}
            past.update(attn_state=(k, v), layer_idx=self.index, offset=T, cache_kwargs=settings)
        S = keys.shape[1]
        distance_TS = torch.arange(S - T, S)[:, None] - torch.arange(S)
        seen_TS = (distance_TS >= 0) & (distance_TS < (self.window or S))
        scores_BTS = (q @ keys.transpose(1, 2)).masked_fill(~seen_TS, -torch.inf)
        return self.o_proj(scores_BTS.softmax(-1) @ values)


class Block(nn.Module):
    def __init__(self, config: Any, index: int):
        super().__init__()
        D, kind = config.hidden_size, config.mixers[index]
        window = WINDOW if kind == "window" else None
        self.index = index
        self.attn = Linear(config, index) if kind == "linear" else Attention(config, index, window)
        self.norm, self.ffn_norm = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.up_proj, self.down_proj = nn.Linear(2 * D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x_BTD, past):
        x_BTD = x_BTD + self.attn(self.norm(x_BTD), past)
        y_BTD = self.ffn_norm(x_BTD)
        kept = None if past is None else past[self.index]["ffn_state"]
        first_B1D = torch.zeros_like(y_BTD[:, :1]) if kept is None else kept[:, None]
        if past is not None:
            past.update(ffn_state=y_BTD[:, -1], layer_idx=self.index, offset=0)
        shifted_BTD = torch.cat((first_B1D, y_BTD[:, :-1]), 1)
        return x_BTD + self.down_proj(F.silu(self.up_proj(torch.cat((y_BTD, shifted_BTD), -1))))


class StandInModel(PreTrainedModel):
    config_class = StandInConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, i) for i in range(len(config.mixers))])
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.5)

    def forward(self, input_ids, past_key_values=None, use_cache=None, return_dict=True, **_):
        assert return_dict and (past_key_values is None) == (not use_cache)
        x_BTD = self.embeddings(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings


class StandInForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = StandInConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = StandInModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    _init_weights = StandInModel._init_weights

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("the adapter asks the decoder, not the head")

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@cache
def family(kind: str) -> type[StandInForCausalLM]:
    """The model class for a model_type, as fla would export it."""
    body = {"model_type": kind, "__module__": __name__, "__init__": StandInConfig.__init__}  # else they get a new one
    config = type("StandInConfig", (StandInConfig,), body)
    return type("StandInForCausalLM", (StandInForCausalLM,), {"config_class": config, "__module__": __name__})
