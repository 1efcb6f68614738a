"""On two GPUs, with the real command: processes that share the work learn and score what one does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from refine_harness.models.load import load_tokenizer
from refine_harness.records import read_records
from refine_harness.resources import resource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SETTINGS = [
    "steps=4",
    "batch.sequences=8",
    "batch.steps=2",
    "batch.micro=2",
    "data.window=600",
    "algorithm.rollouts=2",
    "optim.lr=0.0001",
]
TASKS = ["--tasks", "niah_single_1", "--lengths", "1024", "--limit", "6"]


@pytest.fixture(scope="module", params=("DeltaNet", "LaCT"))
def model(request, wide_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = load_tokenizer("refine-tiny")
    made = wide_model(request.param, vocab_size=len(tokenizer))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(processes, arguments):
    """In so many processes, each with a GPU of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "refine_harness", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "without a CUDA graph" not in done.stderr
    return done


@pytest.mark.parametrize(("autocast", "furthest"), (("no", 1e-3), ("bf16", 0.05)))
def test_two_processes_train_and_score_what_one_does(model, tmp_path, autocast, furthest):
    texts = resource("configs") / "quickstart" / "data" / "mid"
    facts, weights = {}, {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        where = ["--stage", "mid", "--model", str(model), "--out", str(out), f"data.path={texts}"]
        run(processes, ["train", *where, f"autocast={autocast}", *SETTINGS, *TASKS])
        facts[processes] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        weights[processes] = load_file(out / "final" / "model.safetensors")
    assert len(facts[1]) == len(facts[2]) == 4
    for one, two in zip(facts[1], facts[2], strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["ntp_loss"] == pytest.approx(one["ntp_loss"], rel=furthest)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=furthest)
    start = load_file(model / "model.safetensors")
    moved = {n: torch.cat([(w[k] - start[k]).flatten() for k in sorted(start)]) for n, w in weights.items()}
    assert moved[1].norm() > 0
    if autocast == "no":  # of narrower sums AdamW's first steps take the signs, small as they are
        assert (moved[2] - moved[1]).norm() < 0.1 * moved[1].norm()
    [one], [two] = (read_records(tmp_path / str(n) / "records") for n in (1, 2))
    assert [(score.task, score.n) for score in two.scores] == [(score.task, score.n) for score in one.scores]
