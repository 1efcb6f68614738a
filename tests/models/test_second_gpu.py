"""A model on a GPU that is not the current one computes what it computes on the first, recordings included."""

import pytest
import torch
from refine_kernels.testing import relative_error

from refine_harness.algorithm import refine_step
from refine_harness.config import Algorithm
from refine_harness.evaluation.answers import Answerer, Decoding
from refine_harness.models.decode import Decoder
from refine_harness.types import Batch

from ..evaluation.test_answers import Letters, words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DEVICES = ("cuda:0", "cuda:1")


@pytest.fixture(params=("DeltaNet", "LaCT"))
def on(request, wide_model):
    return {device: torch.nn.Module.to(wide_model(request.param), device, torch.bfloat16) for device in DEVICES}


def alike(found):
    first, second = (found[device].double().cpu() for device in DEVICES)
    assert first.norm() > 0
    assert relative_error(second, first) < 0.02


@torch.no_grad()
def test_decoding(on):
    text = torch.randint(3, 300, (2, 150), generator=torch.Generator().manual_seed(0))
    found = {}
    for device, model in on.items():
        state = model.eval().read(text[:, :100].to(device), forkable=False).state
        decoder = Decoder(model, state)
        found[device] = torch.stack([decoder.step(text[:, 100 + k].to(device)).clone() for k in range(50)])
    assert torch.cuda.current_device() == 0
    alike(found)


def test_answers(on):
    prompts = [words(n, n) for n in (150, 90, 120)]
    found = {}
    for device, model in on.items():
        model.config.eos_token_id = None
        answers = Answerer(model.eval(), Letters(), piece=128).generate(prompts, [Decoding(max_tokens=40)] * 3)
        found[device] = [answer.text for answer in answers]
    assert len(set(found["cuda:0"])) == 3
    assert found["cuda:1"] == found["cuda:0"]


def test_training(on):
    text = torch.randint(3, 300, (2, 700), generator=torch.Generator().manual_seed(0))
    algorithm = Algorithm(rollouts_from="step", rollouts=2, group="position", lambda_rl=1.0)
    found = {}
    for device, model in on.items():
        batch = Batch(text, torch.full((2,), 700)).to(device)
        for _ in range(3):  # met, recorded, replayed
            model.train().zero_grad()
            losses = refine_step(model, batch, algorithm, [torch.Generator().manual_seed(row) for row in range(2)])
            (losses.ntp_sum / losses.ntp_count).backward()
        found[device] = torch.cat([p.grad.flatten().float() for p in model.parameters()])
        assert losses.told["sampling_gap"] < 0.1
    assert torch.cuda.current_device() == 0
    alike(found)
