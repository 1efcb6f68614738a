"""The step is the paper's: one reading with forks gives what re-reading every prefix gives."""

import pytest
import torch
from refine_kernels.testing import assert_close

from refine_harness.algorithm import collect, refine_step
from refine_harness.algorithm.rereading import refine_step_by_rereading
from refine_harness.config import Algorithm
from refine_harness.errors import DataError
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.types import Batch


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DeltaNetConfig(
        hidden_size=16, num_heads=2, num_hidden_layers=2, vocab_size=40, intermediate_size=24, initializer_range=0.4
    )
    return DeltaNetForCausalLM(config).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randint(3, 40, (3, 150), generator=generator), torch.tensor([150, 101, 64]))


def rng(rows=3):
    return [torch.Generator().manual_seed(row) for row in range(rows)]


def gradients(model, losses, algorithm):
    model.zero_grad()
    loss = algorithm.lambda_ntp * losses.ntp_sum / losses.ntp_count
    if algorithm.lambda_rl:
        loss = loss + algorithm.lambda_rl * losses.policy_sum / losses.policy_count
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


VARIANTS = [
    Algorithm(),
    Algorithm(reward="exact", chunks=4, rollout_length=3, lambda_rl=0.4),
    Algorithm(reward="hybrid", rollouts=3, group="position", temperature=0.7),
    Algorithm(rollouts=2, scale="none", positions="uniform", top_p=0.8, dual_clip=None),
    Algorithm(positions="argmax", rollout_length=1),
    Algorithm(positions="argmin", rollout_length=6, suppress_end=False),
]


@pytest.mark.parametrize("algorithm", VARIANTS)
def test_forked_step_is_the_rereading_step(model, batch, algorithm):
    losses = refine_step(model, batch, algorithm, rng())
    got = gradients(model, losses, algorithm)
    rollouts = collect(model, batch, algorithm, rng()).rollouts
    reference = refine_step_by_rereading(model, batch, algorithm, rollouts)
    want = gradients(model, reference, algorithm)
    assert (losses.ntp_count, losses.policy_count) == (reference.ntp_count, reference.policy_count)
    assert_close(losses.ntp_sum, reference.ntp_sum)
    assert abs(losses.policy_sum - reference.policy_sum) < 1e-9
    for name in got:
        assert_close(got[name], want[name], name)


def test_the_policy_gradient_reaches_the_document_through_the_fork(model, batch):
    """Cutting the fork changes the gradient of parameters that only write the memory."""
    algorithm = Algorithm(lambda_ntp=0.0)
    whole = gradients(model, refine_step(model, batch, algorithm, rng()), algorithm)
    read = model.read

    def cut(tokens, state=None, lengths=None, forkable=True):
        return read(tokens, None if state is None else state.detach(), lengths, forkable)

    model.read = cut
    try:
        severed = gradients(model, refine_step(model, batch, algorithm, rng()), algorithm)
    finally:
        del model.read
    name = "model.layers.0.attn.b_proj.weight"
    assert float((whole[name] - severed[name]).norm() / whole[name].norm()) > 0.05


def test_off_policy_rollouts_clip_and_match_the_reference(model, batch):
    algorithm = Algorithm(clip_low=0.01, clip_high=0.02, rollouts=2)
    experience = collect(model, batch, algorithm, rng())
    moved = DeltaNetForCausalLM(model.config).double()
    moved.load_state_dict({name: x * 1.05 for name, x in model.state_dict().items()})
    losses = refine_step(moved, batch, algorithm, rng(), experience)
    assert losses.facts["clipped"] > 0.1 and losses.facts["ratio_max"] > 1.02
    reference = refine_step_by_rereading(moved, batch, algorithm, experience.rollouts, experience.advantages_BCN)
    assert_close(losses.policy_sum, reference.policy_sum)
    got, want = gradients(moved, losses, algorithm), gradients(moved, reference, algorithm)
    for name in got:
        assert_close(got[name], want[name], name)
    rows = [refine_step(moved, batch.rows(b, b + 1), algorithm, rng(1), experience.rows(b, b + 1)) for b in range(3)]
    assert_close(torch.stack([row.policy_sum for row in rows]).sum(), losses.policy_sum)


def test_lambda_zero_is_next_token_prediction_and_draws_nothing(model, batch):
    algorithm = Algorithm(lambda_rl=0.0)
    generators = rng()
    before = [g.get_state() for g in generators]
    losses = refine_step(model, batch, algorithm, generators)
    got = gradients(model, losses, algorithm)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, generators, strict=True))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, length in enumerate(batch.lengths_B.tolist()):
        logits = model(batch.tokens_BT[b : b + 1, :length]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, batch.tokens_BT[b, 1:length], reduction="sum")
        count += length - 1
    model.zero_grad()
    (total / count).backward()
    assert losses.ntp_count == count and losses.policy_count == 0
    for name, p in model.named_parameters():
        assert_close(got[name], p.grad, name)


def test_a_document_draws_the_same_in_any_company(model, batch):
    together = collect(model, batch, Algorithm(), rng())
    for b in range(3):
        alone = collect(model, batch.rows(b, b + 1), Algorithm(), [torch.Generator().manual_seed(b)])
        assert torch.equal(alone.rollouts.positions_BC, together.rollouts.positions_BC[b : b + 1])
        assert torch.equal(alone.rollouts.tokens_BCNK, together.rollouts.tokens_BCNK[b : b + 1])
        assert_close(alone.advantages_BCN, together.advantages_BCN[b : b + 1])


def test_answer_labels_leave_the_prompt_out(model, batch):
    answers = Batch(batch.tokens_BT, batch.lengths_B, torch.tensor([140, 100, 60]))
    losses = refine_step(model, answers, Algorithm(lambda_rl=0.0), rng())
    assert losses.ntp_count == 10 + 1 + 4


def test_a_document_without_room_is_named(model):
    short = Batch(torch.full((1, 12), 5), torch.tensor([12]))
    with pytest.raises(DataError, match="12 tokens has no room for 8 chunks and rollouts of 5 tokens; it needs 13"):
        refine_step(model, short, Algorithm(), rng(1))
    refine_step(model, Batch(torch.full((1, 13), 5), torch.tensor([13])), Algorithm(), rng(1))
