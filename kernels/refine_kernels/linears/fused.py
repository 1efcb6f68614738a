"""Several linear maps of the same rows, whose gradients with respect to the rows meet inside the matrix products.

Autograd adds such gradients up with operations of their own: each reads two tensors as large as the rows and writes a
third. A matrix product that adds to what is there saves two of the three.

Maps with few outputs cost as much as reading the rows, once for each: they become one product, with outputs filled up
to a number that matrix units take.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.linears.reference import Map
from refine_kernels.runtime import compute_dtype

SMALL = 64
"""Maps with fewer outputs are joined."""
ALIGNED = 8
"""Outputs of a matrix product come in multiples of so many: 16 bytes of a narrow dtype."""


def why_not(x: Tensor) -> str | None:
    """They run anywhere."""
    return None


def linears(x: Tensor, maps: Sequence[Map]) -> list[Tensor]:
    """See `refine_kernels.linears.linears`."""
    dtype = compute_dtype(x)
    x, maps = x.to(dtype), [(weight.to(dtype), None if bias is None else bias.to(dtype)) for weight, bias in maps]
    small = [i for i, (weight, _) in enumerate(maps) if len(weight) < SMALL]
    large = [i for i in range(len(maps)) if i not in small]
    if not small:
        return _each(x, maps)
    *outputs, told = _each(x, [*(maps[i] for i in large), _joined([maps[i] for i in small])])
    sizes = [len(maps[i][0]) for i in small]
    *parts, _ = told.split([*sizes, told.shape[-1] - sum(sizes)], -1)  # the last part is what filled up
    found = dict(zip((*large, *small), (*outputs, *parts), strict=True))
    return [found[i] for i in range(len(maps))]


def _joined(maps: Sequence[Map]) -> Map:
    """One map with all outputs, and some that are zero."""
    weights = [weight for weight, _ in maps]
    fill = -sum(map(len, weights)) % ALIGNED
    weight_ND = torch.cat([*weights, weights[0].new_zeros(fill, weights[0].shape[1])])
    if all(bias is None for _, bias in maps):
        return weight_ND, None
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in maps]
    return weight_ND, torch.cat([*biases, weight_ND.new_zeros(fill)])


def _each(x: Tensor, maps: Sequence[Map]) -> list[Tensor]:
    weights, biases = zip(*maps, strict=True)
    return list(_Linears.apply(x, *weights, *biases))  # pyright: ignore[reportArgumentType]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights_and_biases):
        n = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:n], weights_and_biases[n:]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        with torch.autocast(x.device.type, enabled=False):
            return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        n = len(weights)
        x_MD, dx_MD = x.flatten(0, -2), None
        dweights: list[Tensor | None] = [None] * n
        dbiases: list[Tensor | None] = [None] * n
        for i, (weight, dy) in enumerate(zip(weights, dys, strict=True)):
            if dy is None:
                continue
            dy_MN = dy.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                dx_MD = dy_MN @ weight if dx_MD is None else dx_MD.addmm_(dy_MN, weight)
            if ctx.needs_input_grad[1 + i]:
                dweights[i] = dy_MN.t() @ x_MD
            if ctx.needs_input_grad[1 + n + i]:
                dbiases[i] = dy_MN.sum(0)
        return None if dx_MD is None else dx_MD.view(x.shape), *dweights, *dbiases
