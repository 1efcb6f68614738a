"""Window attention through torch's flash attention, which takes windows: rows with as much history at a time. A few
queries go through its masked attention instead, all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.packing import Packing, neighbours
from refine_kernels.window_attention import reference

FEW = 64
"""Up to so many queries, a mask of queries × keys costs nothing worth avoiding."""
LARGEST_HEAD = 256


def why_not(x: Tensor) -> str | None:
    """Why flash attention cannot run on tensors like `x`, or None."""
    if x.device.type != "cuda":
        return f"the tensor is on {x.device.type}, not on cuda"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the tensor is {x.dtype}; flash attention takes bfloat16 or float16"
    if x.shape[-1] > LARGEST_HEAD:
        return f"heads have {x.shape[-1]} channels; flash attention takes at most {LARGEST_HEAD}"
    if torch.cuda.get_device_capability(x.device)[0] < 8:
        return "the GPU is older than flash attention supports"
    return None


def window_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    past_B: Tensor | None = None,
    *,
    past: Sequence[int] | None = None,
    window: int | None,
    scale: float | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """See `refine_kernels.window_attention.window_attention`."""
    T, S = q_BTHD.shape[1], k_BSGD.shape[1]
    if past_B is None:
        left, starts, longest = -1 if window is None else window - 1, None, (T, S)
        if packing is not None:
            starts, longest = packing.starts.to(torch.int32), (max(packing.lengths),) * 2
            q_BTHD, k_BSGD, v_BSGD = q_BTHD[0], k_BSGD[0], v_BSGD[0]
        out = torch.ops.aten._flash_attention_forward(
            q_BTHD, k_BSGD, v_BSGD, starts, starts, *longest, 0.0, True, False,
            scale=scale, window_size_left=left, window_size_right=0,
        )[0]  # fmt: skip
        return out if packing is None else out[None]
    if T > FEW and past is not None:
        parts = []
        for rows, real in neighbours(past):
            q, k, v = q_BTHD[rows], k_BSGD[rows, S - T - real :], v_BSGD[rows, S - T - real :]
            parts.append(window_attention(q, k, v, window=window, scale=scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if T > FEW:
        return reference.window_attention(q_BTHD, k_BSGD, v_BSGD, past_B, window=window, scale=scale)
    # Query t is key S - T + t; of the keys, those before S - T - past are not real.
    keys_S = torch.arange(S, device=q_BTHD.device)
    own_T1 = (S - T + torch.arange(T, device=q_BTHD.device))[:, None]
    seen_TS = keys_S <= own_T1
    if window is not None:
        seen_TS = seen_TS & (keys_S > own_T1 - window)
    seen_B1TS = seen_TS & (keys_S >= S - T - past_B[:, None, None, None])
    o_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2), seen_B1TS,
        scale=scale, enable_gqa=q_BTHD.shape[2] != k_BSGD.shape[2],
    )  # fmt: skip
    return o_BHTD.transpose(1, 2)
