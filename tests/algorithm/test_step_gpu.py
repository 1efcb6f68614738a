"""On a GPU: what is recorded and replayed gives what runs without a recording; bit for bit, where what runs repeats."""

import pytest
import torch
from refine_kernels import replay
from refine_kernels.delta_rule import reference
from refine_kernels.testing import MODEL_TOLERANCE, relative_error

from refine_harness.algorithm import refine_step
from refine_harness.config import Algorithm
from refine_harness.models import LaCTForCausalLM, branches, decode, recorded
from refine_harness.types import Batch

pytestmark = pytest.mark.gpu
ALGORITHM = Algorithm(rollouts_from="step", rollouts=2, group="position")


each_kind = pytest.mark.parametrize("kind", ("DeltaNet", "LaCT"))


@pytest.fixture(scope="module", params=("DeltaNet", "LaCT"))
def model(request, wide_model):
    return torch.nn.Module.to(wide_model(request.param), "cuda", torch.bfloat16).train()


def document(seed):
    text = torch.randint(3, 300, (2, 700), generator=torch.Generator().manual_seed(seed))
    return Batch(text, torch.full((2,), 700)).to("cuda")


def loss(model, seed):
    losses = refine_step(model, document(seed), ALGORITHM, [torch.Generator().manual_seed(row) for row in range(2)])
    return losses.ntp_sum / losses.ntp_count + losses.policy_sum / losses.policy_count


def gradients(model, *losses):
    model.zero_grad()
    for each in losses:
        each.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(model, got, want):
    if isinstance(model, LaCTForCausalLM):  # torch's flash attention adds up the gradients of queries in any order
        flat, wanted = (torch.cat([grads[name].flatten().float() for name in want]) for grads in (got, want))
        assert relative_error(flat, wanted) < 0.02
        return
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kept", (32, 2))
def test_replayed_is_run(model, kept, monkeypatch):
    monkeypatch.setattr(reference, "KEPT", kept)
    loss(model, 0).backward()
    got = [gradients(model, loss(model, seed)) for seed in (1, 2)]  # replays, of other texts at other positions
    made = branches._SAMPLINGS if isinstance(model, LaCTForCausalLM) else recorded._RECORDINGS
    assert any(kept for kept in made[model].values())
    monkeypatch.setattr(recorded, "_find", lambda *_: None)
    monkeypatch.setattr(replay, "_find", lambda *_: None)
    monkeypatch.setattr(branches, "_recorded", lambda *_: None)
    monkeypatch.setattr(decode, "_recordable", lambda *_: False)
    for seed, grads in zip((1, 2), got, strict=True):
        same(model, grads, gradients(model, loss(model, seed)))


def test_documents_of_different_length_are_each_alone(model):
    """The third time, which replays what the second one recorded."""
    text, lengths = document(5).tokens_BT, torch.tensor([700, 190])
    together = Batch(text, lengths.to("cuda"))
    alone = [Batch(text[b : b + 1, :n], torch.tensor([n], device="cuda")) for b, n in enumerate(lengths.tolist())]

    def next_token_gradients(*batches):
        return gradients(model, *(refine_step(model, batch, Algorithm(lambda_rl=0.0), []).ntp_sum for batch in batches))

    for _ in range(3):
        got = next_token_gradients(together)
    want = next_token_gradients(*alone)
    flat, wanted = (torch.cat([grads[name].flatten().float() for name in want]) for grads in (got, want))
    table = "bfloat16, Muon" if isinstance(model, LaCTForCausalLM) else "bfloat16"
    assert relative_error(flat, wanted) < MODEL_TOLERANCE[table]["gradient"]


def test_a_step_before_the_backward_of_another_runs_without_the_recording(model):
    together = gradients(model, loss(model, 1), loss(model, 2))
    model.zero_grad()
    for seed in (1, 2):
        loss(model, seed).backward()
    same(model, together, {name: p.grad for name, p in model.named_parameters()})


@each_kind
def test_recordings_read_the_weights_as_they_are_under_autocast(kind, wide_model):
    """What was sampled, from recordings, and what is learned, without, are one policy, however the weights change."""
    model = wide_model(kind).to("cuda").train()
    for seed in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            rng = [torch.Generator().manual_seed(row) for row in range(2)]
            losses = refine_step(model, document(seed), ALGORITHM, rng)
        assert losses.told["sampling_gap"] < 0.1
        model.zero_grad()
        (losses.ntp_sum / losses.ntp_count).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.abs().mean() * torch.randn_like(p))
