"""Where the time and the memory of a step go: what to look at where a goal is missed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch
from report import Row, settle
from torch.profiler import ProfilerActivity, profile

FAMILIES = {
    "attention": "flash|fmha|attention",
    "matrix products": "gemm|nvjet|cutlass|xmma|cublas|addmm|::b?mm",
    "copies": "memcpy|memset|copy_|clone|contiguous|direct_copy",
    "torch's own, pointwise and sums": "elementwise|reduce|index|cat|fill|scatter|gather|sort|scan|multi_tensor|aten::",
}
"""What names of kernels are of one kind, the first that fits; others, most of them Triton's, stand for themselves."""


def memory(marked: Callable[[Callable[[str], None]], object]) -> list[Row]:
    """The most memory in use during each part of a step, over what was in use before the step.

    marked: a step that calls what it is given with the name of each part when that is done; the rest is its backward.
    """
    settle()
    before, rows = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()

    def mark(part: str) -> None:
        settle()
        rows.append(Row(f"peak memory, {part}", (torch.cuda.max_memory_allocated() - before) / 2**30, "GiB", 1))
        rows.append(Row(f"memory after {part}", (torch.cuda.memory_allocated() - before) / 2**30, "GiB", 1))
        torch.cuda.reset_peak_memory_stats()

    marked(mark)
    mark("backward")
    return rows


def kernels(name: str, run: Callable[[], object], most: int = 12) -> list[Row]:
    """Milliseconds of a call in each family of kernels, the largest first; n says how many ran."""
    on_gpu = torch.cuda.is_available()
    run()
    settle()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        settle()
    spent: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if took:  # what launches kernels is listed, too
            kind = next((kind for kind, names in FAMILIES.items() if re.search(names, event.key, re.I)), event.key)
            spent[kind] += took / 1e3
            times[kind] += event.count
    rows = [Row(f"{name}, all kernels", sum(spent.values()), "ms", sum(times.values()))]
    return rows + [Row(f"{name}, {kind[:60]}", value, "ms", times[kind]) for kind, value in spent.most_common(most)]
