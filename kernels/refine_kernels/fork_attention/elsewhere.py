"""A tensor whose place in memory is itself in memory: for kernels that are recorded once and read another each time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elsewhere:
    """Stands for a tensor [B, T, H, D] in rows that is told later, for any T; only kernels can look it up."""

    place_3: Tensor
    """int64 on the device: the address, T, and how far one token is from the next."""
    shape: tuple[int, int, int]
    """B, H and D."""
    dtype: torch.dtype

    @classmethod
    def like(cls, x_BTHD: Tensor) -> Elsewhere:
        """For tensors like this one, and for this one so far."""
        B, _, H, D = x_BTHD.shape
        there = cls(torch.zeros(3, dtype=torch.int64, device=x_BTHD.device), (B, H, D), x_BTHD.dtype)
        there.point_to(x_BTHD)
        return there

    def point_to(self, x_BTHD: Tensor) -> None:
        """From now on it is this one, which must live as long as what reads it. Waits for nothing."""
        B, T, H, D = x_BTHD.shape
        if self.shape != (B, H, D) or x_BTHD.dtype != self.dtype or not in_rows(x_BTHD):
            raise ValueError(f"expected a {self.dtype} tensor of {self.shape} in rows, got {tuple(x_BTHD.shape)}")
        for i, number in enumerate((x_BTHD.data_ptr(), T, x_BTHD.stride(1))):
            self.place_3[i].fill_(number)


def in_rows(x_BTHD: Tensor) -> bool:
    """Whether the heads of a token lie side by side and all tokens at one distance, as in a slice of a projection."""
    T, D = x_BTHD.shape[1], x_BTHD.shape[3]
    return x_BTHD.stride() == (T * x_BTHD.stride(1), x_BTHD.stride(1), D, 1)
