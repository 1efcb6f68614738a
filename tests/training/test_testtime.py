from __future__ import annotations

import pytest
import torch

from refine_harness.config import Algorithm, Batching
from refine_harness.errors import ConfigError, RunError
from refine_harness.training import trainer as trainer_module
from refine_harness.training.testtime import TestTimeTrainer, fit
from refine_harness.training.trainer import Trainer


class Answered(Exception):
    pass


@pytest.mark.parametrize("rollouts_from", ["batch", "step"])
def test_weights_and_optimizer_are_put_back(lab, rollouts_from):
    model = lab.model().eval()
    algorithm = lab.algorithm.model_copy(update={"rollouts_from": rollouts_from})
    trainer = TestTimeTrainer(model, lab.testtime(algorithm=algorithm))
    before, state = lab.weights(model), trainer.state
    for number in range(2):
        with trainer.adapted([lab.prompt(number)]) as adaptation:
            assert lab.furthest(before, lab.weights(model)) > 1e-4
        assert lab.same(before, lab.weights(model))
        assert trainer.state == state
        assert [report.step for report in adaptation.steps] == [1, 2]
        assert adaptation.tokens == 60
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_are_put_back_after_an_exception_inside(lab):
    model = lab.model().eval()
    trainer = TestTimeTrainer(model, lab.testtime())
    before, state = lab.weights(model), trainer.state
    with pytest.raises(Answered), trainer.adapted([lab.prompt(0)]):
        raise Answered
    assert lab.same(before, lab.weights(model))
    assert trainer.state == state


def test_weights_are_put_back_when_adapting_itself_fails(lab):
    model = lab.model().eval()
    trainer = TestTimeTrainer(model, lab.testtime())
    before = lab.weights(model)
    calls = []
    hook = model.lm_head.weight.register_hook(
        lambda gradient: calls.append(1) or (gradient * torch.inf if len(calls) > 1 else gradient)
    )
    with pytest.raises(RunError, match="optimizer step 2"), trainer.adapted([lab.prompt(0)]):
        raise AssertionError("answered with weights that failed to adapt")
    hook.remove()
    assert lab.same(before, lab.weights(model))
    assert not model.training
    with trainer.adapted([lab.prompt(0)]) as adaptation:
        assert len(adaptation.steps) == 2


def test_an_answer_does_not_depend_on_earlier_prompts(lab):
    def adapted(*numbers):
        model = lab.model().eval()
        trainer = TestTimeTrainer(model, lab.testtime())
        for number in numbers:
            with trainer.adapted([lab.prompt(number)]):
                inside = lab.weights(model)
        return inside

    assert lab.same(adapted(0, 1, 2), adapted(2))


def test_inside_is_evaluation_and_outside_is_as_before(lab):
    model = lab.model().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    frozen = model.lm_head.weight.clone()
    trainer = TestTimeTrainer(model, lab.testtime())
    assert [module.training for module in model.modules()] == modes
    with trainer.adapted([lab.prompt(0)]):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert torch.equal(model.lm_head.weight, frozen)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_model_loaded_for_evaluation_adapts_where_gradients_are_off(lab, guard):
    model = lab.model().eval().requires_grad_(False)
    trainer = TestTimeTrainer(model, lab.testtime())
    before = lab.weights(model)
    with guard(), trainer.adapted([lab.prompt(0)]):
        assert not any(parameter.requires_grad for parameter in model.parameters() if torch.is_grad_enabled())
        assert lab.furthest(before, lab.weights(model)) > 1e-4
    assert lab.same(before, lab.weights(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_carrying_over_keeps_weights_and_optimizer(lab):
    config = lab.testtime(restore="never")
    prompts = [lab.prompt(number, 25 + number) for number in range(4)]
    model = lab.model().eval()
    trainer = TestTimeTrainer(model, config)
    before = lab.weights(model)
    with trainer.adapted(prompts) as adaptation:
        inside = lab.weights(model)
    assert [report.tokens for report in adaptation.steps] == [25 + 26, 27 + 28]
    assert lab.furthest(before, inside) > 1e-4
    assert lab.same(inside, lab.weights(model))
    assert trainer.state.steps == 2
    assert float(trainer.state.optimizer["lm_head.weight:step"]) == 2.0
    with pytest.raises(Answered), trainer.adapted(prompts[:1]):  # the last prompts of a task may be few
        raise Answered
    assert trainer.state.steps == 3
    assert lab.furthest(inside, lab.weights(model)) > 1e-5


def test_next_token_prediction_at_test_time_is_the_same_loop(lab):
    model = lab.model()
    trainer = TestTimeTrainer(model.eval(), lab.testtime(algorithm=Algorithm(lambda_rl=0.0)))
    with trainer.adapted([lab.prompt(0)]) as adaptation:
        inside = lab.weights(model)
    twin = lab.model().train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.01)
    tokens_BT = torch.tensor([lab.prompt(0)])
    for _ in range(2):
        logits_TV = twin.logits(twin.read(tokens_BT).hidden)[0, :-1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_TV, tokens_BT[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    assert lab.furthest(inside, lab.weights(twin)) < 1e-10
    assert adaptation.facts["without_rollouts"] == 0  # none were wanted


def test_fresh_rollouts_differ_from_step_to_step_and_kept_ones_do_not(lab):
    rewards = {}
    for rollouts_from in ("step", "batch"):
        algorithm = lab.algorithm.model_copy(update={"rollouts_from": rollouts_from})
        trainer = TestTimeTrainer(lab.model().eval(), lab.testtime(algorithm=algorithm))
        with trainer.adapted([lab.prompt(0)]) as adaptation:
            rewards[rollouts_from] = [report.facts["reward"] for report in adaptation.steps]
    assert rewards["step"][0] != rewards["step"][1]
    assert rewards["batch"][0] == rewards["batch"][1]
    assert rewards["step"][0] == rewards["batch"][0]


def test_kept_rollouts_are_those_of_the_first_step_and_ask_for_no_forward_of_their_own(lab, monkeypatch):
    collected = []
    usual = trainer_module.collect
    monkeypatch.setattr(trainer_module, "collect", lambda *given: collected.append(1) or usual(*given))
    trainer = TestTimeTrainer(lab.model().eval(), lab.testtime())
    with trainer.adapted([lab.prompt(0)]) as adaptation:
        inside = lab.weights(trainer.model)
    assert not collected
    assert [report.facts["ratio"] == pytest.approx(1.0, abs=1e-12) for report in adaptation.steps] == [True, False]
    twin = Trainer(lab.model(), lab.testtime(), alone=True)
    pieces = twin.collect(trainer._pieces([lab.prompt(0)]))
    for _ in adaptation.steps:
        twin.optimizer_step(pieces)
    assert lab.furthest(inside, lab.weights(twin.model)) < 1e-10


def test_short_prompts_are_counted(lab):
    algorithm = Algorithm(chunks=4, rollout_length=3)
    model = lab.model().eval()
    trainer = TestTimeTrainer(model, lab.testtime(restore="never", algorithm=algorithm))
    with trainer.adapted([lab.prompt(number, tokens) for number, tokens in enumerate((7, 6, 4, 1))]) as adaptation:
        pass
    counts = {name: adaptation.facts[name] for name in ("prompts", "fewer_chunks", "without_rollouts", "skipped")}
    assert counts == {"prompts": 4, "fewer_chunks": 1, "without_rollouts": 1, "skipped": 1}
    with trainer.adapted([[]]) as adaptation:
        assert adaptation.steps == ()
    assert trainer.totals["skipped"] == 2
    assert trainer.totals["prompts"] == 5
    assert trainer.totals["tokens"] == 17


def test_a_prompt_too_short_to_learn_from_leaves_the_model_as_it_is(lab):
    model = lab.model().eval()
    trainer = TestTimeTrainer(model, lab.testtime())
    before = lab.weights(model)
    with trainer.adapted([[5]]) as adaptation:
        assert lab.same(before, lab.weights(model))
    assert adaptation.skipped == 1


@pytest.mark.parametrize(
    ("tokens", "chunks", "lambda_rl"),
    [(100, 8, 0.4), (13, 8, 0.4), (12, 7, 0.4), (7, 2, 0.4), (6, 8, 0.0), (2, 8, 0.0)],
)
def test_as_many_chunks_as_fit(tokens, chunks, lambda_rl):
    fitted = fit(Algorithm(lambda_rl=0.4), tokens)
    assert (fitted.chunks, fitted.lambda_rl) == (chunks, lambda_rl)


def test_one_chunk_is_enough_when_its_rollouts_compare_with_each_other():
    assert fit(Algorithm(rollouts=2, group="position"), 6).chunks == 1


def test_numbers_of_prompts_that_the_setting_does_not_take_are_refused(lab):
    trainer = TestTimeTrainer(lab.model().eval(), lab.testtime())
    for prompts in ([], [lab.prompt(0), lab.prompt(1)]):
        with pytest.raises(ValueError, match="adapts on 1 to 1"), trainer.adapted(prompts):
            pass


def test_a_schedule_without_an_end_is_refused(lab):
    optim = lab.optim.model_copy(update={"schedule": "cosine"})
    trainer = TestTimeTrainer(lab.model().eval(), lab.testtime(restore="never", optim=optim))
    with pytest.raises(ConfigError, match=r"optim\.schedule=constant"), trainer.adapted([lab.prompt(0)]):
        pass
    trainer = TestTimeTrainer(lab.model().eval(), lab.testtime(optim=optim, batch=Batching(sequences=1, steps=1)))
    with trainer.adapted([lab.prompt(0)]) as adaptation:
        assert adaptation.steps[-1].learning_rate == pytest.approx(1e-4)
