"""Tile sizes for a GPU that has no tuned file: run the kernels once at the shapes that matter, keep the choices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels import fla
from refine_kernels.choose import ImplementationError
from refine_kernels.delta_rule import delta_rule
from refine_kernels.lookup import Lookup

TOKENS = 8192
WARM_UP, REPEATS = 5, 25
"""Milliseconds of one choice: its kernel takes some tenths of one, and there are many to try."""


class Shape(NamedTuple):
    """Heads of a delta rule, and whether its memory fades."""

    heads: int
    keys: int
    values: int
    decay: bool

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.keys} × {self.values}{', with decay' if self.decay else ''}"


COMMON = (
    Shape(16, 128, 128, False),
    Shape(2, 128, 128, False),
    Shape(16, 64, 64, False),
    Shape(6, 256, 512, True),
    Shape(16, 128, 128, True),
)
"""DeltaNet-1.3B, the embedded model, small heads; Gated DeltaNet-1.3B and its kin."""


def tune(shapes: tuple[Shape, ...] = COMMON, path: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Tune, and write the file that later processes read; its path.

    Raises ImplementationError when the kernels cannot run here.
    """
    reason = fla.why_not() if torch.cuda.is_available() else "torch sees no GPU here"
    if reason is not None:
        raise ImplementationError(
            f"there is nothing to tune: {reason}. Run it on the machine whose GPU you want to use"
        )
    path = path or fla.user_folder() / fla.file_name()
    fla.searching = True
    for number, shape in enumerate(shapes, start=1):
        if shape.decay and (reason := fla.why_no_decay()) is not None:
            say(f"{shape}: left out: {reason}")
            continue
        say(f"{number}/{len(shapes)}: {shape}")
        with compiled_together():
            _run(shape)
        fla.save_tuned(path)
    return path


@contextmanager
def compiled_together() -> Iterator[None]:
    """While it lasts, a kernel that searches compiles all its choices on all cores, and then times each for a moment.

    Compiled one after another they would keep one core busy. Without Triton's asynchronous compilation nothing changes.
    """
    import triton  # pyright: ignore[reportMissingImports]
    from triton.runtime.autotuner import Autotuner  # pyright: ignore[reportMissingImports]

    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        yield
        return
    prune = Autotuner.prune_configs

    def compiled(self: Any, kwargs: dict[str, Any]) -> Any:
        choices = prune(self, kwargs)
        if self._do_bench is None:
            self.do_bench = partial(triton.runtime.driver.active.get_benchmarker(), warmup=WARM_UP, rep=REPEATS)
        given = {name: x for name, x in kwargs.items() if name != "warmup"}
        # What does not compile is met again, and left out, when it is tried.
        with mode(pool, ignore_errors=True):
            for choice in choices:
                self.fn.warmup(*self.nargs.values(), **given, **choice.all_kwargs())
        return choices

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        Autotuner.prune_configs = compiled
        try:
            yield
        finally:
            Autotuner.prune_configs = prune


def _run(shape: Shape) -> None:
    """A forward and a backward, with forks and from a state."""
    B, T, H = 1, TOKENS, shape.heads
    q, k = (F.normalize(torch.randn(B, T, H, shape.keys, device="cuda"), dim=-1).bfloat16() for _ in range(2))
    v = torch.randn(B, T, H, shape.values, device="cuda", dtype=torch.bfloat16)
    beta = torch.rand(B, T, H, device="cuda", dtype=torch.bfloat16)
    g = -torch.rand(B, T, H, device="cuda") * 0.1 if shape.decay else None
    for x in (q, k, v, beta):
        x.requires_grad_()
    start = torch.zeros(B, H, shape.keys, shape.values, device="cuda").requires_grad_()
    for state in (None, start):
        rule = delta_rule(q, k, v, beta, state, g_BTH=g, boundaries=True, impl="fused")
        assert rule.boundaries is not None
        forked = rule.boundaries.pick(Lookup(torch.zeros(1, dtype=torch.int64, device=q.device)))
        (rule.outputs_BTHV.float().sum() + rule.state_BHKV.sum() + forked.float().sum()).backward()
