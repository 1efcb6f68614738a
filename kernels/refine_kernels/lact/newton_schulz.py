"""Newton-Schulz's iteration on many matrices at once, and its backward.

A step is y = a x + P x, P = b S + c S S, S = x xᵀ. Its backward, with E = dy xᵀ + x dyᵀ:

    dx = a dy + P dy + (b E + c (S E + E S)) x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refine_kernels.lact.kernels import product
from refine_kernels.lact.reference import NEWTON_SCHULZ

STEPS = len(NEWTON_SCHULZ)


def orthogonal(starts: Sequence[Tensor]) -> Tensor:
    """The result for the matrices in starts[0], [n, M, M]; what each step starts from is written to `starts`."""
    gram, p, result = (torch.empty_like(starts[0]) for _ in range(3))
    for x, y, (a, b, c) in zip(starts, (*starts[1:], result), NEWTON_SCHULZ, strict=True):
        product(x, x, transposed=True, out=gram)
        product(gram, gram, scale=c, plus=(b, gram), out=p)
        product(p, x, plus=(a, x), out=y)
    return result


def orthogonal_back(starts: Sequence[Tensor], dy: Tensor) -> Tensor:
    """The gradient of starts[0], [n, M, M], from that of the result, which is overwritten."""
    gram, p, both, q, dx = (torch.empty_like(dy) for _ in range(5))
    for x, (a, b, c) in zip(reversed(starts), reversed(NEWTON_SCHULZ), strict=True):
        product(x, x, transposed=True, out=gram)
        product(x, dy, dy, x, transposed=True, out=both)
        product(gram, gram, scale=c, plus=(b, gram), out=p)
        product(gram, both, both, gram, scale=c, plus=(b, both), out=q)
        product(p, dy, q, x, plus=(a, dy), out=dx)
        dy, dx = dx, dy
    return dy
