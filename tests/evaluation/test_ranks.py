"""Two processes answer as one does, and so does one that goes on where two were killed: to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM

from . import ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    train_tokenizer([request.args[0] for request in ranks.requests()["loglikelihood_rolling"]], 300, path)
    torch.manual_seed(0)
    config = DeltaNetConfig(
        hidden_size=64, num_heads=2, num_hidden_layers=2, vocab_size=300, pad_token_id=0, initializer_range=0.2
    )
    DeltaNetForCausalLM(config).save_pretrained(path)
    return path


def test_two_processes_killed_under_way_and_one_that_goes_on_give_the_scores_of_one_bit_for_bit(
    folder, tmp_path, group_of_two
):
    workers = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(folder), str(tmp_path)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in group_of_two
    ]
    alone, uninterrupted = ranks.answer(folder, ranks.KINDS)
    try:
        said = workers[0].communicate(timeout=120)[1]
    finally:
        for worker in workers:
            worker.kill()
    workers[1].communicate()
    assert workers[0].returncode == -signal.SIGKILL, said

    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    reads = [answers.pop("reads") for answers in found]
    assert min(reads) >= 3, "both had work to do"
    for rank, answers in enumerate(found):
        assert answers.pop("ranks") == [rank, 2]
        assert answers.pop("truncated") == uninterrupted.truncated != {}
        assert answers == {ranks.KINDS[0]: alone[ranks.KINDS[0]]}

    again, resumed = ranks.answer(folder, ranks.KINDS, cache_dir=tmp_path)
    assert again == alone
    kept = uninterrupted.answerer.tokens.asked - resumed.answerer.tokens.asked
    assert kept > 0, "what was kept is not answered again"
    assert resumed.answerer.tokens.asked > 0, "and not everything was kept"
    assert resumed.get_model_info()["truncated"] == uninterrupted.truncated
