"""Tuned choices reach fla's kernels, and what was chosen can be written and read again."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from refine_kernels import fla
from refine_kernels.choose import ImplementationError

KERNEL = "fla.ops.common.chunk_o.chunk_fwd_kernel_o"


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Made-Up 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_every_shipped_file_is_complete():
    files = sorted(fla.SHIPPED.glob("*.json"))
    assert files
    for path in files:
        tree = json.loads(path.read_text())
        assert {"gpu", "capability", "triton", "kernels"} == set(tree)
        for entries in tree["kernels"].values():
            assert all(set(entry) == {"key", "config", "warps", "stages"} for entry in entries)


def test_which_files_hold_choices_for_this_gpu(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REFINE_TUNED", raising=False)
    alike = fla.tuned_files()
    assert alike and all(json.loads(path.read_text())["capability"] == [9, 0] for path in alike)
    own = fla.user_folder() / "nvidia-made-up-9000.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert fla.tuned_files() == [own, *alike]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert fla.tuned_files()[0] == fla.SHIPPED / "nvidia-h200.json" and sorted(fla.tuned_files()) == sorted(alike)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (1, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Made-Up 1")
    assert fla.tuned_files() == []
    monkeypatch.setenv("REFINE_TUNED", str(own))
    assert fla.tuned_files() == [own]
    monkeypatch.setenv("REFINE_TUNED", str(tmp_path / "typo.json"))
    with pytest.raises(ImplementationError, match=r"typo\.json, which is no file"):
        fla.tuned_files()


def entry(n: int, stages: int) -> dict[str, object]:
    return {"key": [n], "config": {}, "warps": 4, "stages": stages}


def test_a_shape_that_no_choice_fits_is_searched_among_all(monkeypatch, tmp_path):
    """A Triton autotuner over a kernel whose choices need shared memory by their stages and the size of their input."""
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources

    ran: list[tuple[int, int]] = []

    class Kernel:
        @staticmethod
        def fn(n: int) -> None: ...

        def run(self, n: int, num_stages: int, **_: object) -> None:
            if n * num_stages > 8:
                raise OutOfResources(n * num_stages, 8, "shared memory")
            ran.append((n, num_stages))

    def bench(call, quantiles):
        call()
        return [1.0 / ran.pop()[1]] * 3  # more stages are faster

    every = [triton.Config({}, num_stages=stages) for stages in (1, 2, 3, 4)]
    tuner = Autotuner(Kernel(), ["n"], every, ["n"], None, None, do_bench=bench)
    monkeypatch.setattr(fla, "autotuners", lambda: iter([("kernel", tuner)]))

    def load(*entries: dict[str, object]) -> None:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps({"kernels": {"kernel": list(entries)}}))
        monkeypatch.setenv("REFINE_TUNED", str(file))
        assert fla.load_tuned() == 1

    def stages(n: int) -> int:
        tuner.run(n=n)
        assert ran[-1][0] == n
        return ran[-1][1]

    load(entry(2, 3))
    assert stages(2) == 3 and stages(1) == 3  # the only choice is taken, where it fits
    assert stages(4) == 2  # where it does not, the fastest of all that fit
    assert stages(2) == 3  # what a file says stays
    load(entry(2, 3), entry(1, 4))
    assert stages(3) == 2 and stages(4) == 2
    with pytest.raises(OutOfResources):
        tuner.run(n=9)
    assert stages(8) == 1


def test_choices_are_loaded_written_and_loaded_again(fake_gpu, tmp_path):
    """In a process of its own, because fla's kernels are shared by all tests of this one."""
    code = f"""
import json, torch
torch.cuda.get_device_name = lambda *_: "NVIDIA Made-Up 9000"
torch.cuda.get_device_capability = lambda *_: (9, 0)
from pathlib import Path
import fla.ops.common.chunk_o
from refine_kernels import fla as door
out = Path({str(tmp_path / "choices.json")!r})
kernel = {KERNEL!r}
assert door.load_tuned() >= 3
tuner = dict(door.autotuners())[kernel]
entries = [entry for path in reversed(door.tuned_files()) for entry in json.loads(path.read_text())["kernels"][kernel]]
entries = {{tuple(entry["key"]): entry for entry in entries}}
assert len(tuner.configs) <= len(entries)
assert all(tuner.cache[key].kwargs == entry["config"] for key, entry in entries.items())
door.save_tuned(out)
assert {{tuple(entry["key"]): entry for entry in json.loads(out.read_text())["kernels"][kernel]}} == entries
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_search_compiles_all_choices_before_it_tries_one(tmp_path):
    """Without a GPU: Triton compiles for one that is named, and there is no launch, whose lack ends the search."""
    code = f"""
import os
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path)!r}
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from refine_kernels.tune import compiled_together

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_benchmarker(self): return lambda call, **_: call()

triton.runtime.driver.set_active(Driver())
sizes = (16, 32, 64)

@triton.autotune(configs=[triton.Config({{"BLOCK": size}}) for size in sizes], key=["n"])
@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, at, mask=at < n)

def search(n):
    try:
        kernel[(1,)](torch.zeros(n, dtype=torch.int32), n=n)
    except AttributeError as error:
        assert "launcher" in str(error)
    return len(kernel.fn.device_caches[0][0])

with compiled_together():
    assert search(64) == len(sizes)
assert search(65) == len(sizes) + 1
"""
    script = tmp_path / "search.py"  # Triton reads the source of its kernels
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
