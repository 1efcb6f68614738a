from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from refine_harness.algorithm import refine_step
from refine_harness.config import Batching
from refine_harness.errors import ConfigError, DataError, RunError
from refine_harness.training import trainer as trainer_module
from refine_harness.training.trainer import Trainer, row_generators
from refine_harness.types import Batch


@dataclass(frozen=True)
class Pair:
    prompts: Batch
    answers: Batch


def pair(lab, number: int) -> Pair:
    """Prompts of 33 to 40 tokens; their answers are the last five tokens of the same rows, each with two more."""
    prompts = lab.batch(number)
    more = torch.randint(3, 64, (4, 2), generator=torch.Generator().manual_seed(number))
    tokens_BT = torch.cat((prompts.tokens_BT, torch.zeros(4, 2, dtype=torch.int64)), 1)
    for row, length in enumerate(prompts.lengths_B.tolist()):
        tokens_BT[row, length : length + 2] = more[row]
    return Pair(prompts, Batch(tokens_BT, prompts.lengths_B + 2, prompts.lengths_B))


@pytest.mark.parametrize("rollouts_from", ["batch", "step"])
def test_resumed_run_matches_uninterrupted_run(lab, rollouts_from):
    config = lab.mid(steps=6, rollouts_from=rollouts_from)
    whole = Trainer(lab.model(), config)
    reports = list(whole.run(lab.batches()))

    first = Trainer(lab.model(), config)
    loop = first.run(lab.batches())
    early = [next(loop), next(loop)]
    assert first.at_boundary
    weights, state = lab.weights(first.model), first.state()
    next(loop)  # what the interrupted run did after its checkpoint must leave no trace

    model = lab.model()
    model.load_state_dict(weights)
    second = Trainer(model, config)
    second.load(state)
    late = list(second.run(lab.batches(first=second.done.batches)))

    assert lab.same(lab.weights(whole.model), lab.weights(second.model))
    assert lab.same(whole.state().optimizer, second.state().optimizer)
    timeless = [replace(report, seconds=0.0) for report in reports]
    assert timeless == [replace(report, seconds=0.0) for report in early + late]
    assert replace(whole.done, seconds=0.0) == replace(second.done, seconds=0.0)


@pytest.mark.parametrize("rollouts_from", ["batch", "step"])
def test_micro_batch_size_changes_nothing(lab, rollouts_from):
    results = []
    for micro in (1, 2, 3, 4):
        trainer = Trainer(lab.model(), lab.mid(steps=2, sequences=8, micro=micro, rollouts_from=rollouts_from))
        reports = list(trainer.run(lab.batches(rows=8)))
        results.append((lab.weights(trainer.model), reports))
    for weights, reports in results[1:]:
        assert lab.furthest(weights, results[0][0]) < 1e-10
        for report, alone in zip(reports, results[0][1], strict=True):
            assert report.loss == pytest.approx(alone.loss, abs=1e-12)
            assert report.gradient_norm == pytest.approx(alone.gradient_norm, abs=1e-12)
            assert report.facts["reward"] == pytest.approx(alone.facts["reward"], abs=1e-12)
            assert report.facts["ratio_max"] == pytest.approx(alone.facts["ratio_max"], abs=1e-12)


def test_lambda_rl_zero_is_next_token_prediction(lab):
    trainer = Trainer(lab.model(), lab.mid(steps=4, lambda_rl=0.0, micro=2))
    reports = list(trainer.run(lab.batches()))

    model = lab.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for number in range(2):
        for first in (0, 2):
            batch = lab.batch(number).rows(first, first + 2)
            logits_BTV = model.logits(model.read(batch.tokens_BT, lengths=batch.lengths_B).hidden)
            labels_BT = batch.tokens_BT.masked_fill(~batch.real_BT, -100)
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())

    assert [report.loss for report in reports] == pytest.approx(losses, abs=1e-12)
    assert lab.furthest(lab.weights(trainer.model), lab.weights(model)) < 1e-11


def test_lambda_rl_zero_samples_nothing_and_adds_nothing(lab, monkeypatch):
    def forbidden(*_):
        raise AssertionError("next-token prediction sampled rollouts")

    monkeypatch.setattr(trainer_module, "collect", forbidden)
    config = lab.mid(steps=2, lambda_rl=0.0)
    trainer = Trainer(lab.model(), config)
    reports = list(trainer.run(lab.batches()))

    # The same code by hand, micro-batch by micro-batch: equal to the last bit.
    model = lab.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for first in (0, 2):
        rows = [lab.batch(0).rows(row, row + 1) for row in (first, first + 1)]
        labels = sum(row.tokens - 1 for row in rows)
        optimizer.zero_grad()
        for row in rows:
            (refine_step(model, row, config.algorithm, []).ntp_sum / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert lab.same(lab.weights(trainer.model), lab.weights(model))
    assert {report.policy_loss for report in reports} == {0.0}

    other_seed = Trainer(lab.model(), config.model_copy(update={"seed": 1}))
    list(other_seed.run(lab.batches()))
    assert lab.same(lab.weights(trainer.model), lab.weights(other_seed.model))


def test_rollouts_of_a_batch_are_sampled_before_its_first_step(lab):
    once = list(Trainer(lab.model(), lab.mid(steps=2)).run(lab.batches()))
    anew = list(Trainer(lab.model(), lab.mid(steps=2, rollouts_from="step")).run(lab.batches()))
    assert once[0].facts["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert abs(once[1].facts["ratio"] - 1.0) > 1e-6  # off-policy: the weights moved since
    assert [report.facts["ratio"] for report in anew] == pytest.approx([1.0, 1.0], abs=1e-12)


def test_the_first_step_of_a_batch_samples_as_it_reads(lab, monkeypatch):
    collected = []
    usual = trainer_module.collect
    monkeypatch.setattr(trainer_module, "collect", lambda *given: collected.append(1) or usual(*given))
    trainer = Trainer(lab.model(), lab.mid(steps=4, micro=2))
    reports = list(trainer.run(lab.batches()))
    assert len(collected) == 2, "in two batches of two steps, for the second of each"
    ahead = Trainer(lab.model(), lab.mid(steps=4, micro=2))
    monkeypatch.setattr(ahead, "with_rollouts", lambda steps: [ahead.collect(pieces) for pieces in steps])
    for report, expected in zip(reports, ahead.run(lab.batches()), strict=True):
        assert report.facts == pytest.approx(expected.facts, abs=1e-10)
    assert len(collected) == 2 + 4
    assert lab.furthest(lab.weights(trainer.model), lab.weights(ahead.model)) < 1e-10


def test_on_the_first_step_both_flows_are_one(lab):
    models = []
    for rollouts_from in ("batch", "step"):
        trainer = Trainer(lab.model(), lab.mid(steps=1, rollouts_from=rollouts_from))
        list(trainer.run(lab.batches()))
        models.append(lab.weights(trainer.model))
    assert lab.furthest(*models) < 1e-10


def test_seed_changes_the_rollouts(lab):
    config = lab.mid(steps=1)
    rewards = [
        next(Trainer(lab.model(), config.model_copy(update={"seed": seed})).run(lab.batches())).facts["reward"]
        for seed in (0, 1)
    ]
    assert rewards[0] != rewards[1]


def test_nested_learns_prompts_then_answers_with_one_optimizer(lab):
    trainer = Trainer(lab.model(), lab.post(lambda_rl=0.0))
    boundaries = []
    reports = []
    for report in trainer.run_nested(pair(lab, number) for number in range(9)):
        reports.append(report)
        boundaries.append(trainer.at_boundary)
    assert ["answer_step" in report.facts for report in reports] == [False, False, True] * 2
    assert boundaries == [False, False, True] * 2
    assert [(report.step, report.steps) for report in reports] == [(step, 6) for step in range(1, 7)]
    assert (trainer.done.steps, trainer.done.answer_steps, trainer.done.batches) == (4, 2, 2)

    # The same by hand.
    model = lab.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    plain = lab.algorithm.model_copy(update={"lambda_rl": 0.0})
    for number in range(2):
        both = pair(lab, number)
        for rows in (both.prompts.rows(0, 2), both.prompts.rows(2, 4), both.answers):
            losses = refine_step(model, rows, plain, [])
            optimizer.zero_grad()
            (losses.ntp_sum / losses.ntp_count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert lab.furthest(lab.weights(trainer.model), lab.weights(model)) < 1e-10


def test_resumed_nested_run_matches_uninterrupted_run(lab):
    config = lab.post(steps=4).model_copy(update={"optim": lab.optim.model_copy(update={"schedule": "cosine"})})
    whole = Trainer(lab.model(), config)
    reports = list(whole.run_nested(pair(lab, number) for number in range(2)))
    first = Trainer(lab.model(), config)
    list(zip(range(3), first.run_nested([pair(lab, 0)]), strict=False))
    second = Trainer(first.model, config)
    second.load(first.state())
    later = list(second.run_nested([pair(lab, 1)]))
    assert [replace(report, seconds=0.0) for report in later] == [replace(r, seconds=0.0) for r in reports[3:]]
    assert lab.same(lab.weights(whole.model), lab.weights(second.model))


def test_answer_step_is_cross_entropy_on_the_answer_alone(lab):
    trainer = Trainer(lab.model(), lab.post(steps=2, nested=False, lambda_ntp=0.5))
    (report,) = list(trainer.run_nested([pair(lab, 0)]))
    answers = pair(lab, 0).answers
    model = lab.model()
    logits_BTV = model.logits(model.read(answers.tokens_BT, lengths=answers.lengths_B).hidden)
    per_token = [
        F.cross_entropy(logits_BTV[row, length - 3 : length - 1], answers.tokens_BT[row, length - 2 : length])
        for row, length in enumerate(answers.lengths_B.tolist())
    ]
    assert report.loss == pytest.approx(torch.stack(per_token).mean().item(), abs=1e-12)
    assert report.facts["answer_step"] == 1.0
    assert (report.step, report.steps) == (1, 1)


def test_nested_reinforcement_reports_rewards_of_prompts_only(lab):
    trainer = Trainer(lab.model(), lab.post(steps=2, reward="hybrid"))
    reports = list(trainer.run_nested([pair(lab, 0)]))
    assert ["reward" in report.facts for report in reports] == [True, True, False]


def test_a_run_may_end_inside_a_batch(lab):
    trainer = Trainer(lab.model(), lab.mid(steps=3))
    assert [report.step for report in trainer.run(lab.batches())] == [1, 2, 3]
    assert trainer.finished
    assert trainer.checkpoint_due
    assert list(trainer.run(lab.batches())) == []


def test_checkpoints_fall_on_boundaries_only(lab):
    config = lab.mid(steps=9, per_batch=3, sequences=3, lambda_rl=0.0).model_copy(update={"checkpoint_every": 4})
    trainer = Trainer(lab.model(), config)
    due = [report.step for report in trainer.run(lab.batches(rows=3)) if trainer.checkpoint_due]
    assert due == [6, 9]
    assert trainer.state().batches == 3

    trainer = Trainer(lab.model(), config)
    next(trainer.run(lab.batches(rows=3)))
    with pytest.raises(RuntimeError, match="half done"):
        trainer.state()


def test_reports_count_tokens_rates_and_time(lab):
    config = lab.mid(steps=2, lambda_rl=0.0)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"warmup_steps": 3})})
    trainer = Trainer(lab.model(), config)
    reports = list(trainer.run(lab.batches()))
    assert [report.learning_rate for report in reports] == pytest.approx([0.00025, 0.0005])
    assert [report.tokens for report in reports] == [lab.batch(0).rows(0, 2).tokens, lab.batch(0).rows(2, 4).tokens]
    assert trainer.done.tokens == lab.batch(0).tokens
    assert trainer.done.seconds == pytest.approx(sum(report.seconds for report in reports))


@pytest.mark.parametrize("lambda_rl", [0.0, 0.2])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(lab, lambda_rl):
    model = lab.model()
    trainer = Trainer(model, lab.mid(steps=4, lambda_rl=lambda_rl, rollouts_from="step"))
    loop = trainer.run(lab.batches())
    next(loop)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    before = lab.weights(model)
    with pytest.raises(RunError, match=r"loss of optimizer step 2 is nan.*checkpoint is intact"):
        next(loop)
    assert all(torch.equal(new.nan_to_num(), before[name].nan_to_num()) for name, new in lab.weights(model).items())
    assert trainer.done.steps == 1


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(lab):
    model = lab.model()
    trainer = Trainer(model, lab.mid(steps=4, lambda_rl=0.0))
    model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = lab.weights(model)
    with pytest.raises(RunError, match="gradient norm of optimizer step 1"):
        next(trainer.run(lab.batches()))
    assert lab.same(before, lab.weights(model))


def test_data_that_ends_early_is_said(lab):
    trainer = Trainer(lab.model(), lab.mid(steps=4, lambda_rl=0.0))
    with pytest.raises(DataError, match=r"after 1 batches of 4 documents; the run needs 2"):
        list(trainer.run(lab.batches(count=1)))


def test_frozen_weights_stay(lab):
    model = lab.model()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = lab.weights(model)
    trainer = Trainer(model, lab.mid(steps=1))
    list(trainer.run(lab.batches()))
    after = lab.weights(model)
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {"model.embeddings.weight"}
    assert not any(name.startswith("model.embeddings") for name in trainer.state().optimizer)


def test_autocast_leaves_weights_and_optimizer_wide(lab):
    config = lab.mid(steps=1).model_copy(update={"autocast": "bf16"})
    trainer = Trainer(lab.model(torch.float32), config)
    (report,) = list(trainer.run(lab.batches()))
    assert report.loss == pytest.approx(4.2, abs=0.3)
    assert {weight.dtype for weight in lab.weights(trainer.model).values()} == {torch.float32}
    assert {tensor.dtype for tensor in trainer.state().optimizer.values()} == {torch.float32}


def test_documents_draw_alike_in_any_company():
    def draw(generators):
        return [torch.rand(3, generator=generator).tolist() for generator in generators]

    together = draw(row_generators(0, 7, range(4)))
    assert together == [draw(row_generators(0, 7, [document]))[0] for document in range(4)]
    assert len({tuple(row) for row in together}) == 4
    assert draw(row_generators(0, 8, range(4))) != together
    assert draw(row_generators(1, 7, range(4))) != together


def test_processes_that_cannot_share_a_step_are_refused(lab, monkeypatch):
    monkeypatch.setattr(trainer_module.Accelerator, "num_processes", 3)
    config = lab.mid().model_copy(update={"batch": Batching(sequences=8, steps=2)})
    with pytest.raises(ConfigError, match="4 documents per optimizer step cannot be shared"):
        Trainer(lab.model(), config)


def test_weights_are_not_cut_between_processes(lab, monkeypatch):
    monkeypatch.setattr(trainer_module.Accelerator, "distributed_type", trainer_module.DistributedType.FSDP)
    with pytest.raises(ConfigError, match=r"cut the weights between processes \(FSDP\); each must have all of them"):
        Trainer(lab.model(), lab.mid())
    assert Trainer(lab.model(), lab.mid(), alone=True).world_size == 1
