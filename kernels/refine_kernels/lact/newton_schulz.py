"""Newton-Schulz's iteration and its backward as one launch each.

They are fifteen and twenty-five products of small matrices, once per chunk and layer, which take longer to launch one
by one than to run. Here they are recorded as CUDA graphs in memory of their own and replayed. Where nothing can be
recorded (in Triton's interpreter, inside another recording) the same products run one by one.

A step is y = a x + P x, P = b S + c S S, S = x xᵀ. Its backward, with E = dy xᵀ + x dyᵀ:

    dx = a dy + P dy + (b E + c (S E + E S)) x
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from refine_kernels.lact.kernels import product
from refine_kernels.lact.reference import NEWTON_SCHULZ

KEPT = 4
"""Shapes whose memory and recordings are kept; the one used longest ago goes first."""

_log = logging.getLogger("refine_harness")


class NewtonSchulz:
    """The iteration on n matrices [n, M, M], and its memory, which the next use on the same stream overwrites."""

    def __init__(self, n: int, M: int, dtype: torch.dtype, device: torch.device):
        def memory(count: int) -> Tensor:
            return torch.empty(count, n, M, M, dtype=dtype, device=device)

        self.x_SNMM = memory(len(NEWTON_SCHULZ) + 1)
        """What each step starts from, and the result. Fill in the first before `forward`, all but the last before
        `backward`."""
        self._dx_2NMM, self._scratch_4NMM = memory(2), memory(4)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._records = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    @property
    def dy_NMM(self) -> Tensor:
        """To be filled in with the gradient of the result before `backward`."""
        return self._dx_2NMM[0]

    def forward(self) -> Tensor:
        """The result, [n, M, M]."""
        self._run("forward", self._forward)
        return self.x_SNMM[-1]

    def backward(self) -> Tensor:
        """The gradient of the first x, [n, M, M]."""
        self._run("backward", self._backward)
        return self._dx_2NMM[len(NEWTON_SCHULZ) % 2]

    def _forward(self) -> None:
        gram, p = self._scratch_4NMM[:2]
        for x, y, (a, b, c) in zip(self.x_SNMM, self.x_SNMM[1:], NEWTON_SCHULZ, strict=False):
            product(x, x, transposed=True, out=gram)
            product(gram, gram, scale=c, plus=(b, gram), out=p)
            product(p, x, plus=(a, x), out=y)

    def _backward(self) -> None:
        gram, p, both, q = self._scratch_4NMM
        dy, dx = self._dx_2NMM
        for x, (a, b, c) in zip(reversed(self.x_SNMM[:-1].unbind()), reversed(NEWTON_SCHULZ), strict=True):
            product(x, x, transposed=True, out=gram)
            product(x, dy, dy, x, transposed=True, out=both)
            product(gram, gram, scale=c, plus=(b, gram), out=p)
            product(gram, both, both, gram, scale=c, plus=(b, both), out=q)
            product(p, dy, q, x, plus=(a, dy), out=dx)
            dy, dx = dx, dy

    def _run(self, name: str, products: Callable[[], None]) -> None:
        if name in self._graphs:
            self._graphs[name].replay()
            return
        products()  # also compiles and loads the kernels, which a recording must not do
        if not self._records:
            return
        # Nothing is allocated while recording, so other threads and streams may go on with what they do.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.x_SNMM.device)
        stream.wait_stream(torch.cuda.current_stream(self.x_SNMM.device))
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    products()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            _log.warning("Newton-Schulz runs without a CUDA graph: %s", str(error).splitlines()[0])
            self._records = False
            return
        torch.cuda.current_stream(self.x_SNMM.device).wait_stream(stream)
        self._graphs[name] = graph


_KEPT: OrderedDict[tuple, NewtonSchulz] = OrderedDict()


def newton_schulz(n: int, M: int, dtype: torch.dtype, device: torch.device) -> NewtonSchulz:
    """Memory to use now, on the current stream: that of an earlier use where there is one."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return NewtonSchulz(n, M, dtype, device)  # inside another recording the memory belongs to that
    key = (n, M, dtype, device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _KEPT:
        _KEPT[key] = NewtonSchulz(n, M, dtype, device)
        while len(_KEPT) > KEPT:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key]
