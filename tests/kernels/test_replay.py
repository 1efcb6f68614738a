"""Work that is recorded and replayed gives what running it gives, and its results go where they are asked for."""

import pytest
import torch
from refine_kernels import replay
from refine_kernels.replay import replayed
from refine_kernels.testing import assert_close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def work(a, b, bias, *, times):
    """Products one after another, and a sum that only some calls want."""
    x = a
    for _ in range(times):
        x = torch.tanh(x @ b) + (0 if bias is None else bias)
    return x, x.sum(-1), None


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(replay, "_RECORDINGS", type(replay._RECORDINGS)())


def given(seed, device, bias=True):
    a, b = (torch.randn(6, 6, generator=torch.Generator().manual_seed(seed + i)).to(device) for i in (0, 1))
    return a, b.t(), a[0] if bias else None


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", (True, False))
def test_replayed_is_run(device, bias):
    for seed in range(4):  # met, recorded, replayed twice
        inputs = given(seed, device, bias)
        before = [None if x is None else x.clone() for x in inputs]
        rows = torch.full((6, 12), torch.nan, device=device)
        sums = torch.full((6,), torch.nan, device=device)
        replayed(work, inputs, (rows[:, ::2], sums, None), times=3)
        want = work(*inputs, times=3)
        # A recording's inputs are contiguous, for which products may sum in another order.
        assert_close(rows[:, ::2], want[0])
        assert_close(sums, want[1])
        assert rows[:, 1::2].isnan().all()
        pairs = zip(inputs, before, strict=True)
        assert all(torch.equal(x, y) for x, y in pairs if x is not None and y is not None)
    recorded = [recording is not None for recording in replay._RECORDINGS.values()]
    assert recorded == ([True] if device == "cuda" else [])


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_other_settings_are_other_work(device):
    a, b, bias = given(0, device)
    for times in (1, 2, 1, 2, 1, 2):
        out = torch.empty(6, 6, device=device)
        replayed(work, (a, b, bias), (out, None, None), times=times)
        assert_close(out, work(a, b, bias, times=times)[0])


@torch.no_grad()
@pytest.mark.gpu
def test_what_was_used_longest_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(replay, "KEPT", 2)
    for _ in range(3):
        for n in range(1, 5):
            out = torch.empty(n, 6, device="cuda")
            a, b, _ = given(n, "cuda")
            replayed(work, (a[:n], b, None), (out, None, None), times=2)
            assert_close(out, work(a[:n], b, None, times=2)[0])
    assert sum(recording is not None for recording in replay._RECORDINGS.values()) <= 2


@torch.no_grad()
@pytest.mark.gpu
def test_large_work_is_not_recorded(monkeypatch):
    monkeypatch.setattr(replay, "LARGEST", 4 * 6 * 6)
    a, b, _ = given(0, "cuda")
    for _ in range(3):
        replayed(work, (a, b, None), (None, None, None), times=2)
    assert not replay._RECORDINGS


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("rows", (slice(0, 6), slice(1, 4)))
@pytest.mark.parametrize("M", (8, 12, 7))
def test_copies_between_any_strides(device, dtype, rows, M):
    x = torch.randn(2, 6, 3, M, dtype=dtype, device=device)
    x[0, 2, 1, 3] = torch.nan
    target = torch.zeros(2, 3, 9, M, dtype=dtype, device=device)
    replay._copy(x[:, rows].transpose(1, 2), target[:, :, rows])
    wanted = torch.zeros_like(target)
    wanted[:, :, rows] = x[:, rows].transpose(1, 2)
    assert torch.equal(target.view(torch.uint8), wanted.view(torch.uint8))
