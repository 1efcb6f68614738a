"""Errors, intervals and p-values against closed forms, enumeration and simulation."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest

from refine_harness.evaluation import statistics
from refine_harness.evaluation.statistics import Estimate, Resampled, Stratum, combined, holm, mean, sign_flip


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def difference(a, b, *, runs=1, seed=3, resamples=10_000, **options) -> Any:
    """Of columns of runs `b` against columns of runs `a`, one task."""
    scores_NS = np.column_stack([*([a] * runs), *([b] * runs)]).astype(float)
    return statistics.compare([Resampled.of(Stratum(scores_NS, seed), resamples)], scores_NS.shape[1] // 2, **options)


# One score


def test_the_error_of_a_share_is_that_of_a_bernoulli_variable():
    scores = [1.0] * 30 + [0.0] * 70
    assert statistics.percent(scores).value == 30.0
    assert statistics.percent(scores).stderr == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 99), rel=1e-12)


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_n():
    scores = rng().normal(size=50).tolist()
    assert mean(scores).stderr == pytest.approx(np.std(scores, ddof=1) / math.sqrt(50), rel=1e-12)
    assert mean(scores) == mean(scores[::-1]), "to the last bit"


def test_one_example_has_no_error():
    assert mean([0.5]) == Estimate(0.5, None)
    assert statistics.bootstrap_error(max, [1.0]) is None
    assert combined([Estimate(1.0, 0.1), Estimate(2.0, None)]) == Estimate(1.5, None)


def test_a_group_has_the_error_of_its_tasks_alike_or_by_size():
    parts = [Estimate(10.0, 3.0), Estimate(40.0, 4.0)]
    assert combined(parts) == Estimate(25.0, 2.5)
    assert combined(parts, [300, 100]) == (17.5, pytest.approx(math.hypot(0.75 * 3, 0.25 * 4)))


def test_a_group_weighted_by_size_with_equal_tasks_is_the_mean_of_all_examples():
    left, right = rng(1).integers(0, 2, 4000).tolist(), rng(2).integers(0, 2, 6000).tolist()
    whole = mean([*left, *right])
    group = combined([mean(left), mean(right)], [4000, 6000])
    assert group.value == pytest.approx(whole.value, rel=1e-12)
    assert group.stderr == pytest.approx(whole.stderr, rel=1e-3)


def test_errors_of_means_and_groups_are_those_of_repeated_draws():
    draws = rng(5).random((4000, 2, 40)) ** 2
    groups = [combined([mean(a), mean(b)]) for a, b in draws.tolist()]
    true = np.std([group.value for group in groups])
    assert math.sqrt(np.mean([(group.stderr or 0) ** 2 for group in groups])) == pytest.approx(true, rel=0.03)


def test_the_bootstrap_error_of_a_mean_is_its_closed_form():
    scores = rng().normal(size=12).tolist()
    bootstrapped = statistics.bootstrap_error(np.mean, scores, resamples=20_000)
    assert bootstrapped == pytest.approx(mean(scores).stderr, rel=0.02)


def test_aggregations_that_are_no_mean_are_bootstrapped_with_a_fixed_seed():
    def perplexity(items):
        return math.exp(-sum(items) / len(items))

    scores = rng().normal(-2, 0.3, size=200).tolist()
    value, stderr = statistics.aggregated(scores, perplexity)
    assert value == perplexity(scores)
    assert stderr == pytest.approx(value * (mean(scores).stderr or 0), rel=0.1), "the delta method"
    assert statistics.aggregated(scores, perplexity) == (value, stderr)
    assert statistics.aggregated(scores, np.mean) == mean(scores)
    pairs = [(1.0, 2.0), (3.0, 2.0), (2.0, 5.0)]
    assert statistics.aggregated(pairs, lambda items: sum(a for a, _ in items) / sum(b for _, b in items)).stderr


def test_resamples_without_a_value_do_not_count():
    def correlation(items):
        return float(np.corrcoef(np.array(items).T)[0, 1])

    stderr = statistics.bootstrap_error(correlation, [(0, 0), (0, 1), (1, 1), (1, 1)])
    assert stderr is not None
    assert math.isfinite(stderr)


# The sign-flip test


def enumerated(values) -> float:
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(s >= abs(sum(values)) - 1e-9 for s in sums) / len(sums)


@pytest.mark.parametrize("values", [[1.0], [1, 2, 3], [1, 1, 1, -1], [0.5, -0.25, 3, 1.5, 0, 0.7], [1, 1, 2, 2, -3]])
def test_small_tests_are_enumerated(values):
    assert sign_flip(np.array(values, dtype=float), rng()) == (pytest.approx(enumerated(values), abs=1e-12), True)


def test_known_p_values():
    assert sign_flip(np.full(6, 2.0), rng()) == (2 / 64, True)
    # McNemar's exact test: 15 won, 5 lost, any number alike.
    wins = np.array([1.0] * 15 + [-1.0] * 5 + [0.0] * 1000)
    tail = sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    assert sign_flip(wins, rng()) == (pytest.approx(2 * tail, rel=1e-12), True)
    assert sign_flip(np.zeros(9), rng()) == (1.0, True)


def test_many_examples_of_few_scores_are_exact_too():
    wins = np.array([1.0] * 5200 + [-1.0] * 4800) / 10_000
    p, exact = sign_flip(wins, rng())
    assert exact
    # The normal approximation of a fair coin, with the continuity correction.
    assert p == pytest.approx(math.erfc((400 - 1) / 100 / math.sqrt(2)), rel=5e-3)


def test_drawn_p_values_are_near_the_exact_ones(monkeypatch):
    for values in (rng(4).normal(0.4, 1, size=16), np.array([1.0] * 30 + [-1.0] * 12 + [2.0] * 3)):
        monkeypatch.undo()
        exact, _ = sign_flip(values, rng())
        monkeypatch.setattr(statistics, "_STATES", 1)
        drawn, counted = sign_flip(values, rng(), resamples=40_000)
        assert not counted
        assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000))


def test_p_values_without_a_difference_are_uniform():
    draws = rng(7).normal(size=(1500, 9))
    p = np.array([sign_flip(values, rng())[0] for values in draws])
    for level in (0.05, 0.25, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=0.035)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# Two sides


def test_identical_runs_have_no_difference_and_p_1():
    scores = rng().random(100)
    same = difference(scores, scores)
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_means_are_the_closed_forms_and_pairing_narrows_the_interval():
    easy = rng(1).random(300) * 100
    a, b = easy, easy + rng(2).normal(2, 1, size=300)
    paired, unpaired = difference(a, b), difference(a, rng(3).permutation(b))
    assert paired.first == pytest.approx(a.mean())
    assert paired.second == pytest.approx(b.mean())
    assert paired.difference == pytest.approx(unpaired.difference) == pytest.approx((b - a).mean())
    half = 1.968 * float(np.std(b - a, ddof=1)) / math.sqrt(300)
    assert paired.low == pytest.approx(paired.difference - half, abs=0.06 * half)
    assert paired.high == pytest.approx(paired.difference + half, abs=0.06 * half)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 5
    assert paired.p < 0.001 < unpaired.p


def test_the_order_of_examples_changes_nothing():
    for a, b in ((rng(1).random(60), rng(2).random(60)), (rng(1).integers(0, 2, 500), rng(2).integers(0, 2, 500))):
        order = rng(3).permutation(len(a))
        one, other = difference(a, b), difference(a[order], b[order])
        for name in ("difference", "low", "high", "p"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-12)


def test_one_example_gives_no_interval():
    one = difference([1.0], [0.0])
    assert (one.low, one.high, one.p) == (None, None, 1.0)


@pytest.mark.parametrize(("n", "draw"), [(10, "normal"), (40, "normal"), (60, "shares")])
def test_intervals_cover_the_truth_as_often_as_they_say(n, draw):
    covered, generator, times = 0, rng(3), 600
    for time_ in range(times):
        if draw == "normal":
            a, b = np.zeros(n), generator.normal(1.0, 1.0, size=n)
            truth = 1.0
        else:
            a, b = generator.random(n) < 0.3, generator.random(n) < 0.6
            truth = 0.3
        found = difference(a, b, seed=time_, resamples=2000)
        covered += found.low <= truth <= found.high
    assert covered / times == pytest.approx(0.95, abs=0.025)


def test_intervals_over_seeds_cover_the_truth_where_seeds_alone_decide():
    covered, generator, times = 0, rng(12), 300
    for time_ in range(times):
        seeds = np.concatenate([generator.normal(0, 3, size=3), generator.normal(2, 3, size=3)])
        scores_NS = seeds + generator.normal(0, 1, size=(50, 6))
        found: Any = statistics.compare([Resampled.of(Stratum(scores_NS, time_), 600)], 3, seed=time_)
        covered += found.low <= 2 <= found.high
    assert covered / times > 0.9


def test_false_alarms_over_seeds_are_as_rare_as_they_should_be():
    alarms, generator, times = 0, rng(13), 300
    for time_ in range(times):
        scores_NS = generator.normal(0, 3, size=6) + generator.normal(0, 1, size=(50, 6))
        part = Resampled.of(Stratum(scores_NS, time_), 600)
        alarms += statistics.compare([part], 3, seed=time_).p < 0.05
    assert alarms / times < 0.09


def test_seeds_that_score_alike_are_as_one():
    for a, b in (
        (rng(1).random(80), rng(2).random(80) + 0.1),
        (rng(1).integers(0, 2, 300), rng(2).integers(0, 2, 300)),
    ):
        one, three = difference(a, b), difference(a, b, runs=3)
        for name in ("first", "second", "difference", "low", "high", "p"):
            assert getattr(one, name) == pytest.approx(getattr(three, name), abs=1e-9), name


def test_seeds_that_differ_widen_the_interval_and_raise_the_p_value():
    a, b = rng(1).random(400), rng(1).random(400) + 0.05
    shifts = np.array([-0.2, 0.0, 0.2])
    scores_NS = np.column_stack([*(a + s for s in shifts), *(b + s for s in shifts)])
    found: Any = statistics.compare([Resampled.of(Stratum(scores_NS, 0))], 3)
    alike = difference(a, b, runs=3)
    assert found.difference == pytest.approx(alike.difference)
    assert found.high - found.low > 10 * (alike.high - alike.low)
    assert alike.p < 0.001
    assert found.p > 0.3


def test_a_group_is_the_mean_of_its_tasks_however_many_examples_they_have():
    parts = [
        Resampled.of(Stratum(np.column_stack([np.zeros(n), rng(n).normal(shift, 1, size=n)]), n))
        for n, shift in ((40, 1.0), (400, 3.0))
    ]
    alone: list[Any] = [statistics.compare([part], 1) for part in parts]
    group: Any = statistics.compare(parts, 1)
    assert group.difference == pytest.approx((alone[0].difference + alone[1].difference) / 2)
    halves = [(found.high - found.low) / 2 for found in alone]
    assert (group.high - group.low) / 2 == pytest.approx(math.hypot(*halves) / 2, rel=0.05)
    assert group.n == 440
    by_size = statistics.compare(parts, 1, weights=[40, 400])
    assert by_size.difference == pytest.approx((alone[0].difference + 10 * alone[1].difference) / 11)


def test_ten_thousand_examples_take_less_than_two_seconds():
    scores = rng().random((10_000, 2))
    started = time.process_time()
    difference(*scores.T)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 10, 2.22814), (0.95, 4, 2.13185), (0.975, math.inf, 1.95996)],
)
def test_student_quantiles_are_those_of_the_tables(probability, freedom, value):
    assert statistics.student_quantile(probability, freedom) == pytest.approx(value, rel=1e-4)
