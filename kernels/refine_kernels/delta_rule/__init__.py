"""The delta rule: write to a key-value memory what it does not yet say, and read it out.

S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T        o_t = scale * S_t^T q_t
"""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.delta_rule.reference import DeltaRule

__all__ = ["DeltaRule", "delta_rule"]


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    *,
    scale: float | None = None,
    boundaries: bool = False,
    impl: Impl = "auto",
) -> DeltaRule:
    """Outputs for every token, the final state and, on request, the states at a fixed grid of positions.

    Args:
        q_BTHK, k_BTHK: queries and keys, normalised by the caller, any float dtype.
        v_BTHV: values, same dtype.
        beta_BTH: writing strengths in [0, 1] (or [0, 2]). 0 leaves the state as it is: that is how padding is read.
        state_BHKV: the state to start from; None for zeros. float32, or float64 for float64 inputs.
        scale: of the outputs; None for K**-0.5.
        boundaries: whether to return the states on the grid.
        impl: see `refine_kernels.choose`.

    Returns `DeltaRule`: outputs in the dtype of v, states in float32 (float64 for float64 inputs). All of it
    carries gradients to all inputs.
    """
    ops = choose(__name__, impl, q_BTHK)
    return ops.delta_rule(q_BTHK, k_BTHK, v_BTHV, beta_BTH, state_BHKV, scale=scale, boundaries=boundaries)
