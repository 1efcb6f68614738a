"""A branch read from the tape is one read from a state: outputs, samples and gradients; and it copies no window."""

import pytest
import torch
from refine_kernels.testing import assert_close
from torch.autograd.graph import saved_tensors_hooks

from refine_harness.algorithm import collect, refine_step
from refine_harness.algorithm.rereading import refine_step_by_rereading
from refine_harness.config import Algorithm
from refine_harness.models.branches import Branches, branch
from refine_harness.types import Batch

from .checks import probe, same_gradients
from .tiny import MODELS, build, tokens

K = 5
CHUNK = 16
WITHIN = torch.tensor([[0, 9, 10, 15], [31, 42, 16, 26]])
"""Five tokens after each are of one chunk: also right after its end (15, 31), and up to the next (10, 26, 42)."""
ACROSS = torch.tensor([[0, 11, 13, 15], [31, 42, 30, 26]])
"""Three meet the end of a chunk on their way."""

each_lact = pytest.mark.parametrize("model", [name for name in MODELS if name.startswith("lact")], indirect=True)


@pytest.fixture
def model(request):
    return build(request.param)


def read_token_by_token(branches: Branches, tokens_RK: torch.Tensor) -> torch.Tensor:
    hidden = torch.empty(0)
    for rows, step in branches.samplers():
        some = slice(None) if rows is None else rows
        read = torch.stack([step(tokens_R).clone() for tokens_R in tokens_RK[some].unbind(1)], 1)
        hidden = read if rows is None else hidden.index_copy(0, rows, read)
    return hidden


@each_lact
@pytest.mark.parametrize("N", (1, 3))
@pytest.mark.parametrize(("positions", "within"), [(WITHIN, True), (ACROSS, False)])
def test_from_the_tape_is_from_a_state(model, positions, within, N):
    text, rollout = tokens(2, 60), tokens(8 * N, K, seed=2)
    reading = model.read(text)
    branches = branch(reading, positions, rollouts=N, length=K)
    assert len(list(branches.samplers())) == (1 if within else 2)
    got = branches.hidden(rollout)
    want = model.read(rollout, model.read(text).states_at(positions).repeat(N)).hidden
    assert_close(got, want)
    assert_close(read_token_by_token(branches, rollout), want)
    same_gradients(model, probe(model.logits(got)), probe(model.logits(want)))


@each_lact
def test_padded_rows_and_ends_of_rows(model):
    """The last tokens of a row: its chunk may be full, and no update made that the reading could know."""
    text, rollout, lengths = tokens(2, 49), tokens(6, K, seed=2), torch.tensor([32, 49])
    positions = torch.tensor([[31, 30, 5], [47, 48, -1]])
    branches = branch(model.read(text, lengths=lengths), positions, rollouts=1, length=K)
    got = branches.hidden(rollout)
    want = model.read(rollout, model.read(text, lengths=lengths).states_at(positions)).hidden
    assert_close(got, want)
    same_gradients(model, probe(model.logits(got)), probe(model.logits(want)))


@each_lact
def test_going_on_from_a_state(model):
    text, rollout, positions = tokens(2, 40), tokens(4, K, seed=2), torch.tensor([[-1, 9], [3, 20]])

    def reading():
        return model.read(text[:, 11:], model.read(text[:, :11]).state)

    got = branch(reading(), positions, rollouts=1, length=K).hidden(rollout)
    want = model.read(rollout, reading().states_at(positions)).hidden
    assert_close(got, want)
    same_gradients(model, probe(model.logits(got)), probe(model.logits(want)))


@each_lact
@pytest.mark.parametrize("algorithm", [Algorithm(), Algorithm(chunks=4, rollouts=3, positions="uniform")])
def test_a_step_is_the_rereading_step(model, algorithm):
    batch = Batch(tokens(2, 150), torch.tensor([150, 101]))
    rng = [torch.Generator().manual_seed(row) for row in range(2)]
    experience = collect(model, batch, algorithm, rng)
    losses = refine_step(model, batch, algorithm, rng, experience)
    want = refine_step_by_rereading(model, batch, algorithm, experience.rollouts)
    assert losses.facts["sampling_gap"] < 1e-9
    assert_close(losses.ntp_sum, want.ntp_sum)
    assert (losses.policy_sum - want.policy_sum).abs() < 1e-9
    same_gradients(model, losses.ntp_sum + 50 * losses.policy_sum, want.ntp_sum + 50 * want.policy_sum)


def test_what_is_kept_does_not_grow_with_the_window():
    model, text, rollout = build("lact_muon"), tokens(2, 60), tokens(24, K, seed=2)
    reading = model.read(text)
    known = {x.untyped_storage().data_ptr() for tape in reading.tapes or () for x in _tensors(tape)}
    kept = []

    def keep(x):
        if x.untyped_storage().data_ptr() not in known:
            kept.append(x.numel())
        return x

    branches = branch(reading, WITHIN, rollouts=3, length=K)
    with saved_tensors_hooks(keep, lambda x: x):
        branches.hidden(rollout)
    assert max(kept) <= 24 * K * max(model.config.hidden_size * 4, 256) * 3


def _tensors(tape):
    for x in tape.values():
        if isinstance(x, torch.Tensor):
            yield x


@pytest.mark.parametrize("model", ["delta_net", "gated_deltanet"], indirect=True)
def test_other_models_fork_states(model):
    text, rollout = tokens(2, 60), tokens(16, K, seed=2)
    branches = branch(model.read(text), WITHIN, rollouts=2, length=K)
    assert type(branches).__name__ == "_Forked"
    want = model.read(rollout, model.read(text).states_at(WITHIN).repeat(2)).hidden
    assert_close(branches.hidden(rollout), want)
