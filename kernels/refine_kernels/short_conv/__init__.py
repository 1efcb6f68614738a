"""A causal depthwise convolution over the last few tokens, its activation, and the norm of each head after it."""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.packing import Packing

__all__ = ["last_inputs", "short_conv", "short_conv_step"]


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    before_BPD: Tensor | None = None,
    *,
    bias_D: Tensor | None = None,
    silu: bool = True,
    unit_heads: int | None = None,
    packing: Packing | None = None,
    leading: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """silu(bias + sum_j weight[:, j] · x[t - W + 1 + j]), causal, one filter per channel; [B, T, D] in the dtype of x.

    Args:
        x_BTD: inputs, any float dtype; everything is computed in float32 (float64 for float64).
        weight_DW: filters of at most 8 taps; the last tap meets the current token.
        before_BPD: the P = W - 1 inputs before the first; None for zeros.
        silu: whether the activation is applied.
        unit_heads: split the channels into so many heads and give each Euclidean norm 1, as fla's `l2norm` does:
            y / sqrt(sum(y²) + 1e-6); None leaves them as they are.
        packing: where several texts lie one after another in the one row of x; None for a text in each row. There is
            then one row of `before` for each text.
        leading: whether the W - 1 inputs before the first are the first of x itself; there are so many outputs fewer.
        impl: see `refine_kernels.choose`.
    """
    assert not (leading and (before_BPD is not None or packing is not None))
    ops = choose(__name__, impl, x_BTD)
    settings = {"bias_D": bias_D, "silu": silu, "unit_heads": unit_heads, "packing": packing, "leading": leading}
    return ops.short_conv(x_BTD, weight_DW, before_BPD, **settings)


def short_conv_step(
    x_BD: Tensor,
    weight_DW: Tensor,
    before_BPD: Tensor,
    *,
    silu: bool = True,
    unit_heads: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """One more token of each row, [B, D] in the dtype of x; see `short_conv`. There are no gradients.

    before_BPD is written over with the last P inputs including the token.
    """
    ops = choose(__name__, impl, x_BD)
    return ops.short_conv_step(x_BD, weight_DW, before_BPD, silu=silu, unit_heads=unit_heads)


def last_inputs(
    x_BTD: Tensor,
    before_BPD: Tensor | None,
    positions_BC: Tensor | None,
    taps: int,
    packing: Packing | None = None,
) -> Tensor:
    """The state of the convolution after token positions_BC[b, c]: the W - 1 inputs up to it, [B·C, W - 1, D].

    Positions run from -1 (the state before the first token) to the last; None is the last of every row. In memory of
    its own. Differentiable. packing: as in `short_conv`; positions are then those in each text.
    """
    from refine_kernels.short_conv.reference import last_inputs

    return last_inputs(x_BTD, before_BPD, positions_BC, taps, packing)
