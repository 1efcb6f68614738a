"""The operations of fast-weight models: each with a plain meaning, and a fast way to compute it.

One folder per operation: `reference.py` says in plain torch what it means, the other files compute
the same faster, and the folder's `__init__.py` is its only public name. `choose.py` decides which
runs. Nothing here knows of models, training or evaluation.
"""

from refine_kernels.delta_rule import DeltaRule, delta_rule, delta_state, delta_step
from refine_kernels.fork_attention import fork_attention
from refine_kernels.lact import LaCT, lact
from refine_kernels.lact_step import lact_step
from refine_kernels.linear_head import Known, linear_head
from refine_kernels.linears import linears
from refine_kernels.lookup import Lookup, Tap, tapped
from refine_kernels.normed_heads import add_normed_heads
from refine_kernels.packing import Packing, picked, placed
from refine_kernels.rms_norm import add_rms_norm, gated_rms_norm, rms_norm
from refine_kernels.rotary import Turns, rotary
from refine_kernels.shared_qkv import SharedQKV, shared_qkv
from refine_kernels.short_conv import last_inputs, short_conv, short_conv_step
from refine_kernels.swiglu import swiglu, swiglu_linear
from refine_kernels.thin_linear import thin_linear, thin_linears, thin_swiglu
from refine_kernels.window_attention import window_attention
from refine_kernels.window_step import window_step

__all__ = [
    "DeltaRule",
    "Known",
    "LaCT",
    "Lookup",
    "Packing",
    "SharedQKV",
    "Tap",
    "Turns",
    "add_normed_heads",
    "add_rms_norm",
    "delta_rule",
    "delta_state",
    "delta_step",
    "fork_attention",
    "gated_rms_norm",
    "lact",
    "lact_step",
    "last_inputs",
    "linear_head",
    "linears",
    "picked",
    "placed",
    "rms_norm",
    "rotary",
    "shared_qkv",
    "short_conv",
    "short_conv_step",
    "swiglu",
    "swiglu_linear",
    "tapped",
    "thin_linear",
    "thin_linears",
    "thin_swiglu",
    "window_attention",
    "window_step",
]
