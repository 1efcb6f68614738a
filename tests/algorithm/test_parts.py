"""Each part of the step against tiny closed forms."""

import math

import pytest
import torch

from refine_harness.algorithm.advantage import group_advantages, spreadless_share
from refine_harness.algorithm.loss import policy_loss
from refine_harness.algorithm.positions import pick_positions, pooled_entropy
from refine_harness.algorithm.reward import REWARDS
from refine_harness.algorithm.rollout import sample
from refine_harness.config import Algorithm, MidConfig, load
from refine_harness.errors import ConfigError


def rng(seed=0):
    return [torch.Generator().manual_seed(seed)]


def test_pooling_averages_what_exists():
    entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0, 99.0]])
    pooled = pooled_entropy(entropy, torch.tensor([5]), window=3)  # predictions 0..3 are real
    assert pooled[0, :4].tolist() == [1.5, 2.0, 3.0, 3.5]
    assert torch.equal(pooled, pooled_entropy(entropy, torch.tensor([5]), window=2))


@pytest.mark.parametrize("rule", ("entropy", "uniform", "argmax", "argmin"))
def test_each_chunk_gives_one_position_with_k_tokens_after_it(rule):
    entropy = torch.rand(1, 103)
    for seed in range(20):
        (row,) = pick_positions(entropy, torch.tensor([103]), chunks=8, length=5, rule=rule, rng=rng(seed)).tolist()
        edges = [i * 98 // 8 for i in range(9)]
        assert all(a <= p < b for p, a, b in zip(row, edges, edges[1:], strict=False))
        assert row[-1] + 5 <= 102


def test_argmax_and_argmin_find_the_extremes():
    entropy = torch.zeros(1, 40)
    entropy[0, 7], entropy[0, 30] = 9.0, -9.0
    high = pick_positions(entropy, torch.tensor([40]), chunks=1, length=1, rule="argmax", rng=rng())
    low = pick_positions(entropy, torch.tensor([40]), chunks=1, length=1, rule="argmin", rng=rng())
    assert (high.item(), low.item()) == (7, 30)


def test_entropy_positions_follow_the_softmax():
    entropy = torch.tensor([[0.0, 2.0, 1.0, 0.0]])
    drawn = [
        pick_positions(entropy, torch.tensor([4]), chunks=1, length=1, rule="entropy", rng=rng(s)).item()
        for s in range(4000)
    ]
    want = torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    got = torch.bincount(torch.tensor(drawn), minlength=3) / 4000
    assert (got - want).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_the_last_usable_position_can_be_drawn():
    drawn = {
        pick_positions(torch.zeros(1, 23), torch.tensor([23]), chunks=4, length=3, rule="uniform", rng=rng(s))[
            0, -1
        ].item()
        for s in range(200)
    }
    assert max(drawn) == 19


def test_sampling_follows_the_distribution_and_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(1000, 1)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(sample(logits, uniforms), minlength=4)
    assert counts.tolist() == [500, 300, 150, 50]
    inside = torch.bincount(sample(logits, uniforms, top_p=0.75), minlength=4)
    assert inside.tolist() == [625, 375, 0, 0]
    cold = torch.bincount(sample(logits, uniforms, temperature=0.5), minlength=4)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert (cold / 1000 - squares / squares.sum()).abs().max() < 2e-3


def test_sampling_never_leaves_the_support():
    logits = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    assert sample(logits, torch.tensor([1.0 - 1e-17], dtype=torch.float64)).item() == 1


def test_exact_reward_is_one_for_the_true_continuation():
    true = torch.tensor([[[5, 6, 7]]])
    hidden = torch.randn(1, 1, 2, 3, 4)
    rollouts = torch.tensor([[[[5, 6, 7], [5, 6, 0]]]])
    assert REWARDS["exact"](rollouts, true, hidden, hidden[:, :, 0]).tolist() == [[[1.0, pytest.approx(2 / 3)]]]
    cosine = REWARDS["cosine"](rollouts, true, hidden, hidden[:, :, 0])
    assert cosine[0, 0, 0].item() == pytest.approx(1.0)
    assert cosine[0, 0, 1].item() < 1.0
    both = REWARDS["hybrid"](rollouts, true, hidden, hidden[:, :, 0])
    assert both[0, 0, 0].item() == pytest.approx(2.0)


@pytest.mark.parametrize("over", ("document", "position"))
def test_advantages_in_a_group_sum_to_zero_with_unit_spread(over):
    rewards = torch.rand(3, 4, 5, dtype=torch.float64)
    advantages = group_advantages(rewards, over=over)
    groups = advantages.flatten(1) if over == "document" else advantages
    assert groups.sum(-1).abs().max() < 1e-9
    assert (groups.std(-1) - 1).abs().max() < 1e-4
    plain = group_advantages(rewards, over=over, scale="none")
    assert (
        plain + (rewards.flatten(1) if over == "document" else rewards).mean(-1).view(3, -1, 1) - rewards
    ).abs().max() < 1e-12


def test_a_group_without_spread_teaches_nothing_and_is_counted():
    rewards = torch.tensor([[[0.2, 0.2], [0.2, 0.3]]])
    assert group_advantages(rewards, over="position")[0, 0].tolist() == [0.0, 0.0]
    assert spreadless_share(rewards, "position").item() == 0.5
    assert spreadless_share(rewards, "document").item() == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "want"),
    [
        (1.0, 1.0, -1.0),
        (1.5, 1.0, -1.2),  # no more gain above 1 + clip_high
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.8),  # no more gain below 1 - clip_low
        (2.0, -1.0, 2.0),
        (9.0, -1.0, 3.0),  # dual clip bounds the loss
    ],
)
def test_policy_loss_clips_as_ppo_does(ratio, advantage, want):
    logprobs = torch.tensor([[[[math.log(ratio)]]]], requires_grad=True)
    loss = policy_loss(
        logprobs, torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), advantage), clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    assert loss.item() == pytest.approx(want)
    loss.sum().backward()
    clipped = want in (-1.2, 0.8, 3.0)
    assert logprobs.grad is not None
    assert (logprobs.grad.item() == 0.0) == clipped


@pytest.mark.parametrize("settings", ({"group": "position"}, {"chunks": 1}))
def test_groups_of_one_are_refused(settings):
    with pytest.raises(ConfigError, match="no spread to learn from"):
        load(MidConfig, None, [f"algorithm.{key}={value}" for key, value in settings.items()])
    assert Algorithm(lambda_rl=0.0, **settings)
