"""The delta rule: write to a key-value memory what it does not yet say, and read it out; with decay, forget first.

S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = scale * S_t^T q_t
"""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.delta_rule.reference import DeltaRule
from refine_kernels.packing import Packing

__all__ = ["DeltaRule", "delta_rule", "delta_state", "delta_step"]


def delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    *,
    g_BTH: Tensor | None = None,
    scale: float | None = None,
    boundaries: bool = False,
    packing: Packing | None = None,
    impl: Impl = "auto",
) -> DeltaRule:
    """Outputs for every token, the final state and, on request, a few states on the way, from which forks can start.

    Args:
        q_BTGK, k_BTGK: queries and keys, normalised by the caller, any float dtype. G divides H: memory h is written
            and read with the key and query of head h // (H // G).
        v_BTHV: values, same dtype.
        beta_BTH: writing strengths in [0, 1] (or [0, 2]). 0 leaves the state as it is: with g = 0 that is how
            padding is read.
        state_BHKV: the state to start from; None for zeros. float32, or float64 for float64 inputs.
        g_BTH: log of the decay, at most 0, float32 or wider; None for a memory that never fades.
        scale: of the outputs; None for K**-0.5.
        boundaries: whether to return the states on the way, at most `KEPT` of each text, to be looked up.
        packing: where several texts lie one after another in one row; None for a text in each row. Everything but the
            states then has one row of M tokens, and the states one for each text.
        impl: see `refine_kernels.choose`.

    Returns `DeltaRule`: outputs in the dtype of v, states in float32 (float64 for float64 inputs). All of it
    carries gradients to all inputs.
    """
    ops = choose(__name__, impl, q_BTGK, decay=g_BTH is not None)
    return ops.delta_rule(
        q_BTGK, k_BTGK, v_BTHV, beta_BTH, state_BHKV, g_BTH=g_BTH, scale=scale, boundaries=boundaries, packing=packing
    )


def delta_state(
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    *,
    g_BTH: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The state [B, H, K, V] after the last token, where nobody reads the memory on the way; see `delta_rule`."""
    ops = choose(__name__, impl, k_BTGK, decay=g_BTH is not None)
    return ops.delta_state(k_BTGK, v_BTHV, beta_BTH, state_BHKV, g_BTH=g_BTH)


def delta_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    beta_BH: Tensor,
    state_BHKV: Tensor,
    *,
    g_BH: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """One more token of each row: outputs [B, H, V] in the dtype of v. There are no gradients.

    The state is written over with the one after the token. See `delta_rule` for everything else.
    """
    ops = choose(__name__, impl, q_BGK, decay=g_BH is not None)
    return ops.delta_step(q_BGK, k_BGK, v_BHV, beta_BH, state_BHKV, g_BH=g_BH)
