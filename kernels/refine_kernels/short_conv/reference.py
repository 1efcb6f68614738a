"""The short convolution in plain torch: a sum of W shifted copies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(x_BTD: Tensor, weight_DW: Tensor, before_BPD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """silu(sum_j weight[:, j] · x[t - W + 1 + j]), causal, one filter per channel.

    Args:
        x_BTD: inputs, any float dtype; the sum runs in float32 (float64 for float64).
        weight_DW: filters; the last tap meets the current token.
        before_BPD: the P = W - 1 inputs before the first; None for zeros.

    Returns outputs [B, T, D] in the dtype of x, and the inputs with those before them, [B, P + T, D], also in the
    dtype of x: rows p + 1 .. p + P of it are the state after token p.
    """
    B, T, D = x_BTD.shape
    W = weight_DW.shape[1]
    if before_BPD is None:
        before_BPD = x_BTD.new_zeros(B, W - 1, D)
    inputs_BSD = torch.cat((before_BPD.to(x_BTD.dtype), x_BTD), 1)
    wide = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    taps_WD = weight_DW.to(wide).t()
    y_BTD = inputs_BSD[:, :T].to(wide) * taps_WD[0]
    for j in range(1, W):
        y_BTD = torch.addcmul(y_BTD, inputs_BSD[:, j : j + T].to(wide), taps_WD[j])
    return F.silu(y_BTD).to(x_BTD.dtype), inputs_BSD
