"""One step of windowed attention as two Triton kernels that read every key and value once and write it once.

A window is cut into blocks, so that a single row keeps the whole GPU busy. The first kernel's programs each have one
head of one block: they hold it whole, attend to it, and put it back one place to the left. The first entry of a block
would land in the block before, which another program may not have read yet; it is laid aside. The second kernel joins
what the blocks gave with the own token, and puts the entries laid aside and the own token into the gaps.
"""

# Triton is not everywhere, and a kernel's launch has no types.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels.runtime import ceiling, why_no_triton

ELEMENTS = 8192
"""Of the keys that one program holds."""
PLACES = 64
"""At most so many of them."""
JOINED = 32
"""Blocks that are joined at a time."""
LARGEST_HEAD = 512


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like `x`, or None."""
    if x.shape[-1] > LARGEST_HEAD:
        return f"heads have {x.shape[-1]} channels; the kernels take at most {LARGEST_HEAD}"
    return why_no_triton(x)


def window_step(
    q_BHD: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    keys_BPC: Tensor,
    values_BPC: Tensor,
    seen_B: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """See `refine_kernels.window_step.window_step`."""
    B, H, D = q_BHD.shape
    P = keys_BPC.shape[1]
    q, k, v = (x.contiguous() for x in (q_BHD, k_BHD, v_BHD))
    BD = triton.next_power_of_2(D)
    BP = min(PLACES, ELEMENTS // BD, triton.next_power_of_2(max(P, 1)))
    N = ceiling(P, BP)
    BN = triton.next_power_of_2(max(N, 1))
    out = torch.empty_like(v)
    parts = torch.empty(B, H, N, D, dtype=torch.float32, device=q.device)
    sums = torch.empty(B, H, N, 2, dtype=torch.float32, device=q.device)
    aside_keys, aside_values = (torch.empty(B, H, N, D, dtype=x.dtype, device=x.device) for x in (keys_BPC, values_BPC))
    scale = D**-0.5 if scale is None else scale
    windows = keys_BPC, values_BPC, aside_keys, aside_values
    strides = *keys_BPC.stride(), *values_BPC.stride()
    with torch.cuda.device_of(q):
        if N:
            _block_kernel[(N, H, B)](q, *windows, seen_B, parts, sums, P, scale, *strides, H=H, D=D, BP=BP, BD=BD)
        _join_kernel[(H, B)](
            q, k, v, *windows, parts, sums, out, P, N, scale, *strides,
            H=H, D=D, BP=BP, BD=BD, BN=BN, BJ=min(JOINED, BN),
        )  # fmt: skip
    return out


@triton.jit
def _block_kernel(
    q, keys, values, aside_keys, aside_values, seen, parts, sums, P, scale,
    KEYS_B, KEYS_P, KEYS_C, VALUES_B, VALUES_P, VALUES_C,
    H: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    places = n * BP + tl.arange(0, BP)
    channels = tl.arange(0, BD)
    inside = (places[:, None] < P) & (channels[None, :] < D)
    at_keys = keys + b * KEYS_B + places[:, None].to(tl.int64) * KEYS_P + (h * D + channels)[None, :] * KEYS_C
    at_values = values + b * VALUES_B + places[:, None].to(tl.int64) * VALUES_P + (h * D + channels)[None, :] * VALUES_C
    b_keys = tl.load(at_keys, mask=inside, other=0)
    b_values = tl.load(at_values, mask=inside, other=0)
    tl.debug_barrier()  # before anything is overwritten, all threads have read
    moved = inside & (places[:, None] > n * BP)
    tl.store(at_keys - KEYS_P, b_keys, mask=moved)
    tl.store(at_values - VALUES_P, b_values, mask=moved)
    own = (b * H + h) * tl.num_programs(0) + n
    first = inside & (places[:, None] == n * BP)
    at_first = own * D + channels[None, :] + 0 * places[:, None]
    tl.store(aside_keys + at_first, b_keys, mask=first)
    tl.store(aside_values + at_first, b_values, mask=first)
    b_q = tl.load(q + (b * H + h) * D + channels, mask=channels < D, other=0).to(tl.float32) * scale
    real = (places < P) & (places >= P - tl.load(seen + b))
    b_scores = tl.where(real, tl.sum(b_keys.to(tl.float32) * b_q[None, :], 1), float("-inf"))
    top = tl.max(b_scores, 0)
    b_p = tl.where(real, tl.exp(b_scores - tl.where(top > float("-inf"), top, 0.0)), 0.0)
    tl.store(parts + own * D + channels, tl.sum(b_p[:, None] * b_values.to(tl.float32), 0), mask=channels < D)
    tl.store(sums + own * 2, top)
    tl.store(sums + own * 2 + 1, tl.sum(b_p, 0))


@triton.jit
def _join_kernel(
    q, k, v, keys, values, aside_keys, aside_values, parts, sums, out, P, N, scale,
    KEYS_B, KEYS_P, KEYS_C, VALUES_B, VALUES_P, VALUES_C,
    H: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BD)
    here = channels < D
    token = (b * H + h) * D + channels
    b_k, b_v = tl.load(k + token, mask=here, other=0), tl.load(v + token, mask=here, other=0)
    b_q = tl.load(q + token, mask=here, other=0).to(tl.float32) * scale
    own = tl.sum(b_q * b_k.to(tl.float32), 0)
    blocks = (b * H + h) * N
    every = tl.arange(0, BN)
    b_top = tl.load(sums + (blocks + every) * 2, mask=every < N, other=float("-inf"))
    b_sum = tl.load(sums + (blocks + every) * 2 + 1, mask=every < N, other=0)
    top = tl.maximum(tl.max(b_top, 0), own)
    weight = tl.exp(own - top)
    total = tl.sum(b_sum * tl.exp(b_top - top), 0) + weight
    b_out = weight * b_v.to(tl.float32)
    to_keys = keys + b * KEYS_B + (h * D + channels) * KEYS_C
    to_values = values + b * VALUES_B + (h * D + channels) * VALUES_C
    for start in range(0, N, BJ):
        n = start + tl.arange(0, BJ)
        inside = (n[:, None] < N) & here[None, :]
        at = (blocks + n)[:, None] * D + channels[None, :]
        b_weight = tl.exp(tl.load(sums + (blocks + n) * 2, mask=n < N, other=float("-inf")) - top)
        b_out += tl.sum(b_weight[:, None] * tl.load(parts + at, mask=inside, other=0), 0)
        moved = inside & (n[:, None] > 0)
        gaps = (n * BP - 1).to(tl.int64)[:, None]
        tl.store(to_keys[None, :] + gaps * KEYS_P, tl.load(aside_keys + at, mask=moved, other=0), mask=moved)
        tl.store(to_values[None, :] + gaps * VALUES_P, tl.load(aside_values + at, mask=moved, other=0), mask=moved)
    tl.store(out + token, (b_out / total).to(out.dtype.element_ty), mask=here)
    last = 0 * b + P - 1  # as wide as b
    any_place = here & (P > 0)
    tl.store(to_keys + last * KEYS_P, b_k.to(keys.dtype.element_ty), mask=any_place)
    tl.store(to_values + last * VALUES_P, b_v.to(values.dtype.element_ty), mask=any_place)
