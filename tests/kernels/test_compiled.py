"""What a training step launches at the published shapes fits a Hopper GPU, as compiled for one; none is needed here.

A kernel that keeps more numbers than there are registers is right, and several times slower; one whose tiles need more
shared memory than there is fails when it is launched.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refine_kernels import Lookup
from refine_kernels.runtime import interpreted
from torch import Tensor

triton = pytest.importorskip("triton")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = [
    pytest.mark.skipif(not TOOL.is_file(), reason="this build of Triton has no tools for CUDA"),
    pytest.mark.skipif(interpreted(), reason="nothing is compiled in Triton's interpreter"),
]

SPILLED = 64
"""Bytes of a thread's numbers that may lie outside of its registers."""
SHARED = 227 * 1024
"""Bytes of shared memory that a program can have on a Hopper GPU."""
OTHERS = {"A100": (108, 163 * 1024), "RTX 4090": (128, 99 * 1024)}
"""Processors and bytes of shared memory of other GPUs."""
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Watched:
    """Stands for a kernel: notes how it would be launched, and launches nothing."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any], dict[str, int]]]):
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
            arguments = dict(zip(self._kernel.arg_names, given, strict=False)) | constants
            self._launches.append((self._kernel, arguments, {"num_warps": num_warps, "num_stages": num_stages}))

        return launch


@pytest.fixture
def launches(monkeypatch):
    """What would be launched by the operations whose kernels are watched."""
    from refine_kernels.delta_rule import fused as delta_rule
    from refine_kernels.linear_head import fused as linear_head
    from refine_kernels.normed_heads import fused as normed_heads
    from refine_kernels.rms_norm import fused as rms_norm
    from refine_kernels.shared_qkv import fused as shared_qkv
    from refine_kernels.short_conv import fused as short_conv
    from refine_kernels.swiglu import fused as swiglu

    made: list[Any] = []
    for module in (delta_rule, linear_head, normed_heads, rms_norm, shared_qkv, short_conv, swiglu):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Watched(kernel, made))
    return made


def fits(launches: list[Any], shared: int = SHARED) -> list[int]:
    """Compile each for a Hopper GPU and look at what it takes; returns the bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert launches
    taken = []
    for kernel, arguments, options in launches:
        signature, constants, aligned = {}, {}, {}
        for i, (name, of) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            value = arguments[name]
            if of.is_constexpr or value is None or value is True or value is False:
                signature[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], aligned[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
                if isinstance(value, int) and value % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        taken.append(compiled.metadata.shared)
        assert taken[-1] <= shared, (kernel.__name__, options, taken[-1])
        assert spilled(compiled.asm["cubin"]) <= SPILLED, (kernel.__name__, options)
    return taken


def spilled(binary: bytes) -> int:
    """Bytes of each thread that a compiled kernel keeps outside of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([str(TOOL), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", said.stdout + said.stderr)
    assert found is not None, said
    return int(found[1])


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


def backward(outputs: Any) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None and x.requires_grad]
    torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])


T = 256


@pytest.mark.parametrize(("D", "heads"), [(1536, 6), (3072, None), (2048, 16), (2048, None)])
def test_short_convolutions(launches, D, heads):
    from refine_kernels.short_conv import fused

    backward(fused.short_conv(draw(2, T, D), draw(D, 4), unit_heads=heads))
    with torch.no_grad():
        fused.short_conv_step(draw(4, D), draw(D, 4), draw(4, 3, D), unit_heads=heads)
    fits(launches)


def recurrences(rows: int, tokens: int, H: int, K: int, V: int, *, decay: bool, back: bool = True) -> None:
    from refine_kernels.delta_rule import fused

    q, k, w = (draw(rows, tokens, H, K) for _ in range(3))
    u, do, dv = (draw(rows, tokens, H, V) for _ in range(3))
    state = draw(rows, H, K, V, dtype=torch.float32)
    g = draw(rows, tokens, H, dtype=torch.float32) if decay else None
    for told in (True, False):
        fused.states(k, w, u, g, state, told)
    if back:
        forks = Lookup(torch.zeros(3, dtype=torch.int64)), draw(3, H, K, V)
        for arrived in (None, forks):
            fused.state_gradients(q, k, w, do, dv, g, state, arrived, 0.1, True)


@pytest.mark.parametrize(("rows", "tokens"), [(2, T), (1, T), (16, 64), (16, 5)], ids=str)
@pytest.mark.parametrize(("H", "K", "V", "decay"), [(6, 256, 512, True), (16, 128, 128, False)])
@torch.no_grad()
def test_states_and_their_gradients(launches, rows, tokens, H, K, V, decay):
    from refine_kernels.delta_rule import fused

    recurrences(rows, tokens, H, K, V, decay=decay)
    taken = fits(launches)
    for (_, of, options), used in zip(launches, taken, strict=True):  # what the choice of tiles goes by
        assert used <= fused._bytes(of["BK"], of["BV"], options["num_stages"], "dh" in of)


@pytest.mark.parametrize("rows", (1, 2, 16))
@pytest.mark.parametrize(
    ("gpu", "K", "V", "back"),
    [("A100", 128, 128, True), ("A100", 256, 512, False), ("RTX 4090", 64, 64, True), ("RTX 4090", 128, 128, False)],
)
@torch.no_grad()
def test_smaller_gpus_get_tiles_that_fit_them(launches, monkeypatch, gpu, K, V, back, rows):
    from refine_kernels.delta_rule import fused

    monkeypatch.setattr(fused, "_gpu", lambda device: OTHERS[gpu])
    recurrences(rows, T, 8, K, V, decay=True, back=back)
    fits(launches, OTHERS[gpu][1])


def test_a_tile_that_no_choice_makes_small_enough_is_refused(monkeypatch):
    from refine_kernels.delta_rule import fused

    monkeypatch.setattr(fused, "_gpu", lambda device: OTHERS["A100"])
    x = draw(1, 1, 1, 256)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), shape=x.shape, dtype=x.dtype, requires_grad=True)
    assert "shared memory; this GPU has 166912" in str(fused.why_not(on_gpu))
    with torch.no_grad():
        assert "shared memory" not in str(fused.why_not(on_gpu))


@torch.no_grad()
@pytest.mark.parametrize(("H", "K", "V"), [(6, 256, 512), (16, 128, 128)])
def test_one_token(launches, H, K, V):
    from refine_kernels.delta_rule import fused

    state, scalars = draw(4, H, K, V, dtype=torch.float32), [draw(4, H, dtype=torch.float32) for _ in range(2)]
    fused.delta_step(draw(4, H, K), draw(4, H, K), draw(4, H, V), scalars[0], state, g_BH=scalars[1])
    fits(launches)


@pytest.mark.parametrize("D", (1536, 2048))
def test_norms(launches, D):
    from refine_kernels.rms_norm import fused

    backward(fused.add_rms_norm(draw(2, T, D), draw(2, T, D), draw(D), 1e-6))
    fits(launches)


@pytest.mark.parametrize(("H", "V"), [(6, 512), (16, 128)])
def test_gated_norms(launches, H, V):
    from refine_kernels.rms_norm import fused

    backward(fused.gated_rms_norm(draw(2, T, H, V), draw(2, T, H, V), draw(V), 1e-6))
    fits(launches)


def test_gates_and_head(launches):
    from refine_kernels.linear_head import fused as head
    from refine_kernels.swiglu import fused as swiglu

    backward(swiglu.swiglu(draw(2, T, 5632), draw(2, T, 5632)))
    known = head.linear_head(draw(64, 32), draw(32000, 32), torch.zeros(64, dtype=torch.int64))
    backward(known.logprobs)
    fits(launches)


def test_lact(launches):
    from refine_kernels.normed_heads import fused as normed_heads
    from refine_kernels.rotary import Turns
    from refine_kernels.shared_qkv import fused as shared_qkv

    x = draw(2, 4, T, 384).transpose(1, 2)
    backward(normed_heads.add_normed_heads(draw(2, T, 1536), x, draw(384), draw(2, T, 4), 1e-5))
    angles = torch.zeros(2, T, 32)
    backward(
        shared_qkv.shared_qkv(draw(2, T, 3, 1536), draw(1536, 2), draw(1536, 2), Turns(angles, angles), fast_heads=4)
    )
    fits(launches)
