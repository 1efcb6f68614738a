"""The delta rule through flash-linear-attention's Triton kernels.

The public kernel returns only the last state, so a grid of states is had by cutting the text at fixed
places, each piece starting from the state that the piece before it left; the kernel passes gradients through
both ends of a piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refine_kernels.delta_rule.reference import DeltaRule

STRIDE = 1024


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if x.device.type != "cuda":
        return f"the tensor is on {x.device.type}, not on cuda"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the tensor is {x.dtype}; the kernels take bfloat16 or float16"
    try:
        import fla.ops.delta_rule  # noqa: F401
    except ImportError as error:
        return f"flash-linear-attention cannot be imported ({error})"
    return None


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    *,
    scale: float | None = None,
    boundaries: bool = False,
) -> DeltaRule:
    """See `refine_kernels.delta_rule.delta_rule`."""
    from fla.ops.delta_rule import chunk_delta_rule

    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    stride = STRIDE if boundaries else max(T, 1)
    state = state_BHKV
    if state is None:
        state = torch.zeros(B, H, K, V, dtype=torch.float32, device=q_BTHK.device)
    outputs, grid = [], [state]
    for start in range(0, T, stride):
        q, k, v, beta = (x[:, start : start + stride].contiguous() for x in (q_BTHK, k_BTHK, v_BTHV, beta_BTH))
        o, state = chunk_delta_rule(
            q, k, v, beta.to(q.dtype), scale=scale, initial_state=state, output_final_state=True
        )
        outputs.append(o)
        grid.append(state)
    o_BTHV = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return DeltaRule(o_BTHV, state, torch.stack(grid, 1) if boundaries else None, stride)
