"""What an optimizer step costs: seconds of each part, memory, tokens a second, share of what the GPU could do."""

from __future__ import annotations

import time
from typing import Any

import torch

PEAK = {"NVIDIA H200": 790e12, "NVIDIA H100": 790e12}
"""Measured rate of large bfloat16 matrix products, in FLOP/s, by the start of a GPU's name."""


class Stopwatch:
    """Seconds between marks, summed by name. On a GPU the marks are events in its queue, so that nobody waits."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.mark("")

    def mark(self, name: str) -> None:
        """What was done since the last mark is called `name`."""
        if self._device.type != "cuda":
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((name, event))

    def costs(self, tokens: int, parameters: int) -> dict[str, float]:
        """Of everything marked; waits for the device. So many `tokens` were learned from, by so many `parameters`."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            self._marks[-1][1].synchronize()
        costs: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            spent = before.elapsed_time(after) / 1e3 if on_gpu else after - before
            costs[f"seconds_{name}"] = costs.get(f"seconds_{name}", 0.0) + spent
        seconds = sum(costs.values())
        if seconds > 0:
            costs["tokens_per_second"] = tokens / seconds
        if on_gpu:
            costs["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            if (peak := peak_rate(self._device)) and seconds > 0:
                costs["share_of_peak"] = 6 * parameters * tokens / seconds / peak
        return costs


def peak_rate(device: torch.device) -> float | None:
    """Bfloat16 matrix products of a GPU in FLOP/s; None where nobody measured."""
    name = torch.cuda.get_device_name(device)
    return next((rate for start, rate in PEAK.items() if name.startswith(start)), None)
