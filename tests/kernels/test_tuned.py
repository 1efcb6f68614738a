"""Tuned choices reach fla's kernels, and what was chosen can be written and read again."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from refine_kernels import fla

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


def test_a_gpu_without_a_file_takes_that_of_its_architecture(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REFINE_TUNED", raising=False)
    assert fla.tuned_file().parent == fla.SHIPPED and fla.tuned_file().is_file()
    own = fla.user_folder() / "nvidia-made-up-9000.json"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert fla.tuned_file() == own
    monkeypatch.setenv("REFINE_TUNED", str(tmp_path / "named.json"))
    assert fla.tuned_file() == tmp_path / "named.json"
    monkeypatch.delenv("REFINE_TUNED")
    own.unlink()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (1, 0))
    assert not fla.tuned_file().exists()


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
entries = json.loads(door.tuned_file().read_text())["kernels"][kernel]
assert len(tuner.configs) <= len(entries)
assert all(tuner.cache[tuple(entry["key"])].kwargs == entry["config"] for entry in entries)
door.save_tuned(out)
assert json.loads(out.read_text())["kernels"][kernel] == entries
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
