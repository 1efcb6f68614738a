"""The step is the paper's: one reading with forks gives what re-reading every prefix gives."""

import pytest
import torch
from refine_kernels.testing import assert_close

from refine_harness.algorithm import collect, refine_step
from refine_harness.algorithm.rereading import refine_step_by_rereading
from refine_harness.algorithm.step import next_token
from refine_harness.config import Algorithm
from refine_harness.errors import DataError
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, branches
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


def test_activations_made_again_change_nothing(model, batch):
    kept = gradients(model, refine_step(model, batch, Algorithm(rollouts=2), rng()), Algorithm())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        again = gradients(model, refine_step(model, batch, Algorithm(rollouts=2), rng()), Algorithm())
    finally:
        model.gradient_checkpointing_disable()
    for name, want in kept.items():
        assert_close(again[name], want, name)


VARIANTS = [
    Algorithm(),
    Algorithm(reward="exact", chunks=4, rollout_length=3, lambda_rl=0.4),
    Algorithm(reward="hybrid", rollouts=3, group="position", temperature=0.7),
    Algorithm(rollouts=2, scale="none", positions="uniform", top_p=0.8, dual_clip=None),
    Algorithm(positions="argmax", rollout_length=1),
    Algorithm(positions="argmin", rollout_length=6, suppress_end=False),
    Algorithm(loss="dr_grpo", top_k=5, top_p=0.9, temperature=0.8),
    Algorithm(loss="gspo", rollouts=2),
    Algorithm(loss="cispo", kl_weight=0.3, temperature=1.3),
]
LOSSES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")


def nearby(model, by):
    """Another model, whose weights are `by` times as large."""
    other = DeltaNetForCausalLM(model.config).double()
    other.load_state_dict({name: x * by for name, x in model.state_dict().items()})
    return other


@pytest.mark.parametrize("algorithm", VARIANTS)
def test_forked_step_is_the_rereading_step(model, batch, algorithm):
    frozen = nearby(model, 0.95)
    losses = refine_step(model, batch, algorithm, rng(), reference=frozen)
    got = gradients(model, losses, algorithm)
    rollouts = collect(model, batch, algorithm, rng(), frozen).rollouts
    reference = refine_step_by_rereading(model, batch, algorithm, rollouts, reference=frozen)
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

    def cut(tokens, state=None, **options):
        return read(tokens, None if state is None else state.detach(), **options)

    model.read = cut
    try:
        severed = gradients(model, refine_step(model, batch, algorithm, rng()), algorithm)
    finally:
        del model.read
    name = "model.layers.0.attn.b_proj.weight"
    assert float((whole[name] - severed[name]).norm() / whole[name].norm()) > 0.05


@pytest.mark.parametrize("loss", LOSSES)
def test_off_policy_rollouts_clip_and_match_the_reference(model, batch, loss):
    algorithm = Algorithm(clip_low=0.01, clip_high=0.02, rollouts=2, loss=loss, kl_weight=0.1)
    frozen = nearby(model, 0.95)
    experience = collect(model, batch, algorithm, rng(), frozen)
    moved = nearby(model, 1.05)
    losses = refine_step(moved, batch, algorithm, rng(), experience)
    assert losses.facts["clipped"] > 0.1 and losses.facts["ratio_max"] > 1.02 and losses.facts["kl_old"] > 1e-4
    reference = refine_step_by_rereading(
        moved, batch, algorithm, experience.rollouts, experience.advantages_BCN, frozen
    )
    assert_close(losses.policy_sum, reference.policy_sum)
    got, want = gradients(moved, losses, algorithm), gradients(moved, reference, algorithm)
    for name in got:
        assert_close(got[name], want[name], name)
    rows = [refine_step(moved, batch.rows(b, b + 1), algorithm, rng(1), experience.rows(b, b + 1)) for b in range(3)]
    assert_close(torch.stack([row.policy_sum for row in rows]).sum(), losses.policy_sum)


def test_objectives_are_one_exactly_where_they_must_be(model, batch):
    """Off-policy, from the same rollouts and advantages: equal lengths make dapo and dr_grpo grpo."""
    experience = collect(model, batch, Algorithm(), rng())
    moved = nearby(model, 1.05)
    sums = {
        loss: refine_step(moved, batch, Algorithm(loss=loss), rng(), experience).policy_sum.item() for loss in LOSSES
    }
    assert sums["grpo"] == sums["dapo"] == sums["dr_grpo"]
    assert len({round(value, 6) for value in sums.values()}) == 3


def test_top_k_changes_the_tokens_and_not_how_they_are_counted(model, batch):
    """With one token to choose from, rollouts are greedy; their log-probabilities are still the model's."""
    greedy = collect(model, batch, Algorithm(top_k=1, suppress_end=False), rng()).rollouts
    for b, position in enumerate(greedy.positions_BC[:, 0].tolist()):
        text = batch.tokens_BT[b : b + 1, : position + 1]
        for token, logprob in zip(greedy.tokens_BCNK[b, 0, 0], greedy.logprobs_BCNK[b, 0, 0], strict=True):
            predicted = model(text).logits[0, -1].log_softmax(-1)
            assert token == predicted.argmax() and logprob < 0
            assert_close(logprob, predicted[token])
            text = torch.cat((text, token.view(1, 1)), 1)


def test_kl_adds_its_gradient_and_is_reported(model, batch):
    frozen = nearby(model, 0.95)
    plain, weighed = Algorithm(lambda_ntp=0.0), Algorithm(lambda_ntp=0.0, kl_weight=2.0)
    without = refine_step(model, batch, plain, rng())
    losses = refine_step(model, batch, weighed, rng(), reference=frozen)
    assert "kl" not in without.facts and losses.facts["kl"] > 0
    added = (losses.policy_sum - without.policy_sum) / losses.policy_count
    assert added.item() == pytest.approx(2.0 * losses.facts["kl"], abs=1e-12)
    one, other = gradients(model, without, plain), gradients(model, losses, weighed)
    assert any((one[name] - other[name]).abs().max() > 1e-3 for name in one)
    assert all(parameter.grad is None for parameter in frozen.parameters())

    itself = refine_step(model, batch, weighed, rng(), reference=nearby(model, 1.0))
    assert itself.facts["kl"] == pytest.approx(0.0, abs=1e-15)
    assert all((one[n] - g).abs().max() < 1e-12 for n, g in gradients(model, itself, weighed).items())
    with pytest.raises(ValueError, match="needs the reference model"):
        refine_step(model, batch, weighed, rng())


def test_a_step_says_what_it_did(model, batch):
    algorithm = Algorithm(reward="hybrid", rollouts=2, top_k=7, temperature=0.7)
    experience = collect(model, batch, algorithm, rng())
    facts = refine_step(model, batch, algorithm, rng()).facts
    assert facts.keys() == {
        *("entropy", "entropy_chosen", "reward", "reward_std", "reward_cosine", "reward_cosine_std"),
        *("reward_exact", "reward_exact_std", "spreadless", "sampling_gap"),
        *("ratio", "ratio_max", "clipped", "kl_old"),
    }
    assert facts["reward"] == pytest.approx(facts["reward_cosine"] + facts["reward_exact"])
    assert facts["reward"] == pytest.approx(experience.rewards_BCN.mean().item())
    assert facts["reward_std"] == pytest.approx(experience.rewards_BCN.std().item())
    assert facts["sampling_gap"] < 1e-12
    assert (facts["clipped"], facts["kl_old"]) == (0.0, 0.0)
    assert facts["ratio"] == facts["ratio_max"] == 1.0


def test_the_sampling_gap_shows_a_decoder_that_went_astray(model, batch, monkeypatch):
    monkeypatch.setattr(branches.Decoder, "step", lambda self, tokens_R: torch.zeros(len(tokens_R), 16).double())
    assert refine_step(model, batch, Algorithm(), rng()).facts["sampling_gap"] > 0.1


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


def test_the_head_rates_what_has_a_label_and_nothing_else(model, batch, monkeypatch):
    rated, rate = [], model.label_logprobs

    def count(hidden_MD, labels_M, *options):
        rated.append(len(hidden_MD))
        return rate(hidden_MD, labels_M, *options)

    monkeypatch.setattr(model, "label_logprobs", count)
    spoiled = Batch(batch.tokens_BT.masked_fill(~batch.real_BT, 39), batch.lengths_B)
    parts = next_token(model, model.read(batch.tokens_BT, lengths=batch.padded_B), batch)
    again = next_token(model, model.read(spoiled.tokens_BT, lengths=spoiled.padded_B), spoiled, parts)
    assert rated == [149 + 100 + 63] * 2
    for part, same in zip(parts[:3], again[:3], strict=True):
        assert part.shape == (3, 149) and torch.equal(part, same)
    for b, length in enumerate(batch.lengths):
        row = batch.rows(b, b + 1)
        alone = next_token(model, model.read(row.tokens_BT), row)
        for part, own in zip(parts[:3], alone[:3], strict=True):
            assert_close(part[b : b + 1, : length - 1], own)
            assert not part[b, length - 1 :].any()
    assert rated[2:] == [149, 100, 63]


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
