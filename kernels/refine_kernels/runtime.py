"""When Triton kernels can run: on a CUDA device, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU and is meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_triton(x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """Why kernels cannot run on tensors like `x`, or None."""
    if x.device.type != "cuda" and not interpreted():
        return f"the tensor is on {x.device.type}, not on cuda"
    if x.dtype not in dtypes:
        return f"the tensor is {x.dtype}; the kernels take {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of results for inputs like `x`: autocast's where it is on, else that of `x`."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def ceiling(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
