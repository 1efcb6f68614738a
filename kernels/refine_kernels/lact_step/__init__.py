"""One more token of each row of LaCT that ends no chunk: fast weights are read, and the token is laid by in place."""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.lact.reference import Chunk, Weights

__all__ = ["lact_step"]


def lact_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    rates_BHX: Tensor,
    momentum_BH: Tensor | None,
    weights: Weights,
    unfinished: Chunk,
    held_B: Tensor,
    *,
    rate_bias: float,
    impl: Impl = "auto",
) -> Tensor:
    """f(q) = w1 (silu(w0 q) · (w2 q)) in each head; [B, H, V] in the dtype of q. There are no gradients.

    Into place held_B of `unfinished` goes what the token leaves for the chunk's update: its key and value, its learning
    rates softplus(rates + rate_bias) and its momentum sigmoid(momentum). Nothing else of it is touched.

    Args:
        q_BHK: any float dtype, to which the weights are rounded; sums are in float32 (float64 for float64).
        k_BHK, v_BHV: the token's key and value.
        rates_BHX, momentum_BH: what the token says before the activations, which are computed in float32 (float64 for
            float64); momentum is None where the buffer's is.
        weights: w0 [B, H, M, K], w1 [B, H, V, M] and w2 [B, H, M, K], which are read.
        unfinished: buffers of L tokens, which are written at one place of each row, in their own dtypes; any strides.
        held_B: int64, how many tokens each row's chunk has, from 0 to L - 1.
        rate_bias: added to the learning rates.
        impl: see `refine_kernels.choose`.
    """
    ops = choose(__name__, impl, q_BHK)
    given = q_BHK, k_BHK, v_BHV, rates_BHX, momentum_BH
    return ops.lact_step(*given, weights, unfinished, held_B, rate_bias=rate_bias)
