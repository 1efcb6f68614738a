"""Each part of the step against tiny closed forms."""

import math

import pytest
import torch

from refine_harness.algorithm.advantage import group_advantages, spreadless_share
from refine_harness.algorithm.loss import OBJECTIVES, importance_ratio, kl_estimate, policy_loss
from refine_harness.algorithm.positions import pick_positions, pooled_entropy
from refine_harness.algorithm.reward import REWARDS, find_reward, rewards_of
from refine_harness.algorithm.rollout import sample
from refine_harness.config import REWARD_NAMES, Algorithm, MidConfig, load
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
        (row,) = pick_positions(entropy, [103], chunks=8, length=5, rule=rule, rng=rng(seed)).tolist()
        edges = [i * 98 // 8 for i in range(9)]
        assert all(a <= p < b for p, a, b in zip(row, edges, edges[1:], strict=False))
        assert row[-1] + 5 <= 102


def test_argmax_and_argmin_find_the_extremes():
    entropy = torch.zeros(1, 40)
    entropy[0, 7], entropy[0, 30] = 9.0, -9.0
    high = pick_positions(entropy, [40], chunks=1, length=1, rule="argmax", rng=rng())
    low = pick_positions(entropy, [40], chunks=1, length=1, rule="argmin", rng=rng())
    assert (high.item(), low.item()) == (7, 30)


def test_entropy_positions_follow_the_softmax():
    entropy = torch.tensor([[0.0, 2.0, 1.0, 0.0]])
    drawn = [pick_positions(entropy, [4], chunks=1, length=1, rule="entropy", rng=rng(s)).item() for s in range(4000)]
    want = torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    got = torch.bincount(torch.tensor(drawn), minlength=3) / 4000
    assert (got - want).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_the_last_usable_position_can_be_drawn():
    drawn = {
        pick_positions(torch.zeros(1, 23), [23], chunks=4, length=3, rule="uniform", rng=rng(s))[0, -1].item()
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
    cold = torch.bincount(sample(logits / 0.5, uniforms), minlength=4)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert (cold / 1000 - squares / squares.sum()).abs().max() < 2e-3


def test_top_k_keeps_exactly_so_many_and_the_nucleus_is_of_what_is_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(1000, 1)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def counts(logits=logits, **settings):
        return torch.bincount(sample(logits, uniforms, **settings), minlength=4).tolist()

    assert counts(top_k=1) == [1000, 0, 0, 0]
    assert counts(top_k=2) == [571, 429, 0, 0]
    assert counts(top_k=9) == counts(top_k=0) == counts()
    assert counts(top_p=0.5) == [571, 429, 0, 0]
    assert counts(top_k=2, top_p=0.5) == [1000, 0, 0, 0]  # 0.4 is 0.57 of the two that are left
    assert sum(count > 0 for count in counts(torch.zeros(1000, 4), top_k=3)) == 3  # equals do not slip in


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


BOUNDS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}


def off_policy(K=4, spread=0.4):
    """Log-probabilities that take a gradient, those of an older policy, advantages of both signs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(2, 3, 2, K).abs()
    return (old + spread * normal(2, 3, 2, K)).requires_grad_(), old, normal(2, 3, 2)


def loss_and_gradient(name, logprobs, old, advantages, **bounds):
    losses = policy_loss(logprobs, old, advantages, loss=name, **{**BOUNDS, **bounds})
    assert losses.shape == logprobs.shape
    return losses.detach(), torch.autograd.grad(losses.sum(), logprobs)[0]


def same(one, other):
    return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(one, other, strict=True))


def test_with_rollouts_of_one_length_three_objectives_are_one():
    views = off_policy()
    grpo = loss_and_gradient("grpo", *views)
    assert same(grpo, loss_and_gradient("dapo", *views))
    assert same(grpo, loss_and_gradient("dr_grpo", *views))


def test_off_policy_the_others_differ():
    views = off_policy()
    gradients = [loss_and_gradient(name, *views)[1] for name in ("grpo", "gspo", "cispo")]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(gradients) for b in gradients[:i])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_every_objective_has_the_gradient_of_the_plain_policy_loss(name):
    logprobs, old, advantages = off_policy(spread=0.0)
    _, gradient = loss_and_gradient(name, logprobs, old, advantages)
    assert same([gradient], [-advantages[..., None].expand_as(old)])


def test_gspo_of_one_token_is_grpo():
    views = off_policy(K=1)
    assert same(loss_and_gradient("gspo", *views), loss_and_gradient("grpo", *views))


def test_gspo_by_hand():
    logprobs, old, advantages = off_policy(spread=1.0)
    losses, gradient = loss_and_gradient("gspo", logprobs, old, advantages, dual_clip=1.5)
    ratios = []
    for b, c, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        s, a = math.exp((logprobs - old)[b, c, n].mean().item()), advantages[b, c, n].item()
        want = max(-a * s, -a * min(max(s, 0.8), 1.3))
        want, free = (min(want, -a * 1.5), s < 1.5) if a < 0 else (want, True)
        clipped = (a > 0 and s > 1.3) or (a < 0 and s < 0.8) or not free
        assert losses[b, c, n].tolist() == pytest.approx([want] * 4)  # its sum over tokens / 4 is the rollout's loss
        assert gradient[b, c, n].tolist() == pytest.approx([0.0 if clipped else -a * s] * 4)
        ratios.append(s)
    assert importance_ratio(logprobs, old, "gspo")[..., 0].flatten().tolist() == pytest.approx(ratios)


def test_cispo_clips_the_weight_and_keeps_every_gradient():
    logprobs, old, advantages = off_policy(spread=1.0)
    weights = (logprobs - old).exp().clamp(0.8, 1.3).detach()
    losses, gradient = loss_and_gradient("cispo", logprobs, old, advantages)
    assert same([losses, gradient], [-advantages[..., None] * weights * logprobs, -advantages[..., None] * weights])
    grpo = loss_and_gradient("grpo", logprobs, old, advantages)[1]
    assert (grpo == 0).any() and not (gradient == 0).any()
    unbounded_below = loss_and_gradient("cispo", logprobs, old, advantages, clip_low=1.0)[1]
    assert same([unbounded_below], [-advantages[..., None] * (logprobs - old).exp().clamp(max=1.3)])


def test_dr_grpo_alone_leaves_the_spread_in_the_advantage():
    scales = {name: Algorithm.model_validate({"loss": name}).advantage_scale for name in OBJECTIVES}
    assert scales == {**dict.fromkeys(OBJECTIVES, "std"), "dr_grpo": "none"}


def test_kl_estimate_is_unbiased_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    policy, other = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    estimates = kl_estimate(policy, other)  # of each possible token
    assert (estimates >= 0).all()
    assert (policy.exp() * estimates).sum() == pytest.approx((policy.exp() * (policy - other)).sum().item())
    assert kl_estimate(policy, policy).abs().max() == 0


@pytest.fixture
def rewards_module(tmp_path, monkeypatch):
    """A module of the user's; each test imports it under the same path, so what was found before is forgotten."""
    (tmp_path / "my_rewards.py").write_text(
        "def first(tokens, true, hidden, true_hidden):\n"
        "    return (tokens == true[:, :, None])[..., 0]\n"
        "def per_token(tokens, true, hidden, true_hidden):\n"
        "    return tokens == true[:, :, None]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    find_reward.cache_clear()
    yield
    find_reward.cache_clear()


@pytest.mark.parametrize("path", ("my_rewards:first", "my_rewards.first"))
def test_a_reward_may_be_the_users(rewards_module, path):
    algorithm = load(MidConfig, None, [f"algorithm.reward={path}"]).algorithm
    true, rollouts = torch.tensor([[[5, 6]]]), torch.tensor([[[[5, 0], [0, 6]]]])
    hidden = torch.randn(1, 1, 2, 2, 4)
    assert rewards_of(algorithm.reward, rollouts, true, hidden, hidden[:, :, 0]).tolist() == [[[1.0, 0.0]]]
    with pytest.raises(ConfigError, match=r"returned a tensor of shape \(1, 1, 2, 2\).* shape \(1, 1, 2\)\.$"):
        rewards_of("my_rewards:per_token", rollouts, true, hidden, hidden[:, :, 0])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("my_rewards:second", "my_rewards has no function second. Give package.module:function."),
        ("my_rewards.number", "my_rewards has no function number"),
        ("no_such_module.parts:first", "no_such_module.parts cannot be imported (No module named 'no_such_module')"),
    ],
)
def test_a_path_without_a_reward_is_one_sentence(rewards_module, path, sentence):
    with pytest.raises(ConfigError) as caught:
        find_reward(Algorithm(reward=path).reward)
    assert str(caught.value).startswith(f"algorithm.reward is {path}, but {sentence}")


@pytest.mark.parametrize(
    "name", ("cosin", "../rewards.py", "rewards:", ":first", "a:b:c", "rewards.py:my first", "a..b")
)
def test_what_is_no_path_is_refused_with_the_settings(name):
    with pytest.raises(ConfigError, match="is no reward; expected cosine, exact, hybrid, or a function of yours"):
        load(MidConfig, None, [f"algorithm.reward='{name}'"])


def test_settings_and_code_know_the_same_names():
    assert tuple(REWARDS) == REWARD_NAMES
    losses = Algorithm.model_json_schema()["properties"]["loss"]["enum"]
    assert tuple(OBJECTIVES) == tuple(losses)
