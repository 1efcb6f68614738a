"""The operations of fast-weight models: each with a plain meaning, and a fast way to compute it.

One folder per operation: `reference.py` says in plain torch what it means, the other files compute
the same faster, and the folder's `__init__.py` is its only public name. `choose.py` decides which
runs. Nothing here knows of models, training or evaluation.
"""

from refine_kernels.delta_rule import DeltaRule, delta_rule
from refine_kernels.linear_head import linear_head
from refine_kernels.short_conv import short_conv

__all__ = ["DeltaRule", "delta_rule", "linear_head", "short_conv"]
