"""What the model files share: norms, MLP, convolution, rotary positions, and the frame of a causal language model.

Names and shapes of parameters are flash-linear-attention's, which the published LaCT code shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from refine_kernels import (
    Turns,
    add_rms_norm,
    gated_rms_norm,
    linears,
    rms_norm,
    swiglu,
    swiglu_linear,
    thin_linear,
    thin_linears,
    thin_swiglu,
)
from refine_kernels.rotary import turns as angles
from refine_kernels.runtime import compute_dtype
from refine_kernels.thin_linear import ALONE, FEW
from torch import Tensor, nn
from transformers import GenerationMixin

from refine_harness.models.base import Branch, FastWeightLayer, FastWeightLM, Rows, Tape


class Linear(nn.Linear):
    """torch's linear map, with kernels of our own where it reads a few tokens without gradients."""

    def forward(self, input: Tensor) -> Tensor:
        return thin_linear(input, self.weight, self.bias) if thin(input, self) else super().forward(input)


def plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear map and nothing else, so that its weights tell all of it.

    An adapter in its place is none, nor is a layer whose calls someone watches or changes by a hook.
    """
    return type(layer) in (Linear, nn.Linear) and not hooked(layer)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks)


def thin(x: Tensor, *layers: nn.Module) -> bool:
    """Whether `thin_linear` computes what these layers make of x: they are plain, and there are few rows, fewer for one
    layer than for several at once, no gradients and one dtype."""
    if torch.is_grad_enabled() or x.numel() > (FEW if len(layers) > 1 else ALONE) * x.shape[-1]:
        return False
    return compute_dtype(x) == x.dtype and all(plain(of) and _weight(of).dtype == x.dtype for of in layers)


def each(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of several layers makes of the same x; of plain linear maps in fewer passes over x and its gradient."""
    maps = [(of.weight, of.bias) for of in cast(Sequence[nn.Linear], layers)] if all(map(plain, layers)) else []
    if len(maps) < 2:
        return [of(x) for of in layers]
    if thin(x, *layers):
        return list(thin_linears(x, maps))
    return linears(x, maps)


def _weight(layer: nn.Module) -> Tensor:
    return cast(nn.Linear, layer).weight


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension; with a residual, of their sum, which is returned too."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """rms_norm(x) · activation(gate); activation is silu (also called swish) or sigmoid."""

    def __init__(self, size: int, eps: float, activation: str = "silu"):
        super().__init__(size, eps)
        self.activation = "silu" if activation == "swish" else activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gated_rms_norm(x, gate, self.weight, self.eps, activation=self.activation)


class ShortConvolution(nn.Module):
    """Holder of one filter per channel, [D, 1, W], as fla stores it."""

    def __init__(self, size: int, taps: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, taps))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own default for a depthwise convolution: uniform within 1 / sqrt(W)."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)); the inner size is fla's: 2/3 of hidden_ratio times D, rounded up to 256."""

    def __init__(self, config: Any):
        super().__init__()
        D = config.hidden_size
        size = config.intermediate_size
        if size is None:
            size = -(-int(D * (config.hidden_ratio or 4) * 2 / 3) // 256) * 256
        self.gate_proj = Linear(D, size, bias=False)
        self.up_proj = Linear(D, size, bias=False)
        self.down_proj = Linear(size, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if thin(x, self.gate_proj, self.up_proj):
            return self.down_proj(thin_swiglu(x, self.gate_proj.weight, self.up_proj.weight))
        gate, up = each(x, self.gate_proj, self.up_proj)
        if plain(self.down_proj):
            return swiglu_linear(gate, up, self.down_proj.weight)
        return self.down_proj(swiglu(gate, up))  # an adapter stands in its place


def turns(rows: Rows, size: int, theta: float, x: Tensor) -> Turns:
    """Angles of rotary position embedding for heads of that size, for tensors like `x`, of tokens as layers get them.

    Made once for all layers.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    name = f"turns {size} {theta} {wide}"
    if name not in rows.memo:
        rows.memo[name] = angles(rows.packed(rows.positions_BT), size, theta, wide)
    return rows.memo[name]


class Block(FastWeightLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)). The mixer is what differs between models, and has the state."""

    def __init__(self, config: Any, mixer: FastWeightLayer):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = mixer
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        y_BTD, after, tape = self.attn(self.attn_norm(x_BTD), state, rows, forkable)
        return self.with_mlp(y_BTD, x_BTD), after, tape

    def with_mlp(self, y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """The block's output from its mixer's and its input."""
        y_BTD, x_BTD = self.mlp_norm(y_BTD, x_BTD)
        return x_BTD + self.mlp(y_BTD)

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        return self.attn.fork(tape, positions_BC)

    def branch(self, tape: Tape, positions_BC: Tensor) -> Branch:
        return _BlockBranch(self, self.attn.branch(tape, positions_BC))


@dataclass(frozen=True)
class _BlockBranch(Branch):
    block: Block
    mixer: Branch

    def __call__(self, x_RKD: Tensor, rows: Rows) -> Tensor:
        block = self.block
        return block.with_mlp(self.mixer(block.attn_norm(x_RKD), rows), x_RKD)

    def stand_in(self) -> Branch:
        return _BlockBranch(self.block, self.mixer.stand_in())

    def load(self, other: Branch) -> None:
        assert isinstance(other, _BlockBranch)
        self.mixer.load(other.mixer)


class Backbone(nn.Module):
    """Embeddings, blocks and final norm: the parameters under `model.`."""

    def __init__(self, config: Any, blocks: Sequence[FastWeightLayer]):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class CausalLM(FastWeightLM, GenerationMixin):
    """Embeddings, a stack of blocks, a norm and a head: the frame of every model here."""

    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["Block"]
    _input_embed_layer = "embeddings"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = Backbone(config, [self.make_block(config, i) for i in range(config.num_hidden_layers)])
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def make_block(self, config: Any, index: int) -> FastWeightLayer:
        """Layer `index` of the stack."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

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
        self.lm_head = cast(nn.Linear, new_embeddings)
