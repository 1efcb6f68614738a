"""How sure a score is: every standard error, interval and p-value of this package, and why each is what it is.

*One score.* A task's value is the mean of its n examples' scores (F1, ROUGE-L, shares of needles found, right or
wrong alike); its standard error is their deviation (with n - 1) / sqrt(n), in closed form. The only other values are
lm-eval's aggregations that are no mean (perplexity, corpus BLEU, ...): their error is a bootstrap's over examples.

*A group.* The mean over tasks, each task counting alike or by its examples, as in lm-eval's groups, LongBench-E's
buckets and LongBench's average. Tasks have different examples, so their errors are independent: with weights w that
sum to 1 the group's error is sqrt(sum (w e)^2), in closed form. A part without an error (one example) leaves none.

*Two runs on the same examples.* Differences are taken example by example, which removes what makes an example hard for
everyone. The interval comes from a bootstrap: examples are drawn with replacement within each task, and, where a side
is several training runs, so are the runs, independently of the examples, which all runs share (crossed, not nested).
Resampling n things gives a variance that is (n - 1) / n too small, and percentiles forget that it is estimated: draws
are spread by sqrt(n / (n - 1)) and percentiles by the ratio of Student's quantile to the normal one, with
Satterthwaite's degrees of freedom (the expanded percentile interval of Hesterberg, The American Statistician 69, 2015).

The p-value is of a sign-flip test: if the two sides are exchangeable, every example's difference could as well have had
the other sign. It is exact wherever the distribution can be enumerated (a few examples, or scores that are only right
or wrong), else drawn. With several runs a side, what the choice of runs adds (the centred bootstrap of their means) is
added to each flipped sum; with runs that all score alike this adds nothing, and the result is that of one run a side.

Everything is seeded and does not depend on the order of examples. Where runs and examples come from is `compare`'s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""Letters of shapes: N examples, S runs (those of the first side, then the second's), R resamples."""

RESAMPLES = 10_000
"""Of a comparison."""
CONFIDENCE = 0.95
ERROR_RESAMPLES = 1_000
"""Of the standard error of an aggregation that is no mean; its own uncertainty is then about 2%."""
SLOW_RESAMPLES = 100
"""For the corpus scores that take seconds each; as lm-eval does."""
_SLOW = ("bleu", "chrf", "chrfpp", "ter")

_STATES = 2**20
"""Outcomes of a sign-flip test that are enumerated; with more of them it is drawn."""
_CELLS = 2**22
"""Random numbers in memory at once."""
_SAME = 1e-9
"""Sums within this share of the largest possible one are ties, whatever rounding says."""


# --- One score --------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    value: float
    stderr: float | None
    """One standard error; None where one example cannot tell."""


def mean(scores: Sequence[float]) -> Estimate:
    """The mean of independent examples' scores. Both numbers are the same in any order of examples."""
    return Estimate(fmean(scores), stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None)


def percent(shares: Sequence[float]) -> Estimate:
    """The mean of scores from 0 to 1, on the scale from 0 to 100."""
    return mean([100.0 * float(share) for share in shares])


def aggregated(items: Sequence[Any], aggregate: Callable[[Sequence[Any]], Any] | None) -> Estimate:
    """An aggregation of examples' items, whatever they are; None or one that is their mean has the closed form."""
    if all(isinstance(item, Real) for item in items):
        plain = mean([float(item) for item in items])
        if aggregate is None or math.isclose(float(aggregate(items)), plain.value, rel_tol=1e-9, abs_tol=1e-12):
            return plain
    elif aggregate is None:
        raise TypeError("items that are no numbers need an aggregation")
    return Estimate(float(aggregate(items)), bootstrap_error(aggregate, items))


def bootstrap_error(
    aggregate: Callable[[Sequence[Any]], Any], items: Sequence[Any], *, resamples: int | None = None, seed: int = 0
) -> float | None:
    """Standard error of `aggregate(items)` by resampling items, spread by sqrt(n / (n - 1)).

    Resamples for which the aggregation is not finite (a correlation of one class, say) do not count. None for fewer
    than two items or finite resamples.
    """
    n = len(items)
    if n < 2:
        return None
    if resamples is None:
        resamples = SLOW_RESAMPLES if getattr(aggregate, "__name__", "") in _SLOW else ERROR_RESAMPLES
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        values = [float(aggregate([items[i] for i in rng.integers(n, size=n)])) for _ in range(resamples)]
    finite = [value for value in values if math.isfinite(value)]
    return stdev(finite) * math.sqrt(n / (n - 1)) if len(finite) > 1 else None


def combined(parts: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """The mean of a group's parts, each counting alike, or by `weights`."""
    weights = [1.0] * len(parts) if weights is None else weights
    total = math.fsum(weights)
    value = math.fsum(weight * part.value for weight, part in zip(weights, parts, strict=True)) / total
    errors = [part.stderr for part in parts if part.stderr is not None]
    if len(errors) < len(parts):
        return Estimate(value, None)
    squares = ((weight * error) ** 2 for weight, error in zip(weights, errors, strict=True))
    return Estimate(value, math.sqrt(math.fsum(squares)) / total)


# --- Two sides --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stratum:
    """The examples of one task that every run answered."""

    scores_NS: Array
    seed: int
    """Of its resamples: a task's own, so that its numbers do not depend on what else is compared."""


@dataclass(frozen=True)
class Difference:
    """The second side against the first."""

    first: float
    second: float
    difference: float
    """Second minus first."""
    low: float | None
    """Ends of the interval; None where one example cannot tell."""
    high: float | None
    p: float
    """Two-sided."""
    exact: bool
    """Whether `p` was enumerated; else it was drawn."""
    n: int


@dataclass(frozen=True)
class Resampled:
    """A stratum and what resampling makes of it: done once, and used for its task and for every group it is in."""

    stratum: Stratum
    means_S: Array
    means_RS: Array
    """Means of every run over the same resampled examples."""

    @classmethod
    def of(cls, stratum: Stratum, resamples: int = RESAMPLES) -> Resampled:
        means_RS = resampled_means(stratum.scores_NS, resamples, np.random.default_rng([stratum.seed, 0]))
        return cls(stratum, stratum.scores_NS.mean(axis=0), means_RS)

    @property
    def n(self) -> int:
        return len(self.stratum.scores_NS)


def compare(
    parts: Sequence[Resampled],
    firsts: int,
    *,
    weights: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Difference:
    """The weighted mean over `parts` of the second side against that of the first.

    Args:
        parts: one for a task, several for a group; all with the same runs and resamples.
        firsts: how many of the runs are the first side's.
        weights: of the parts; None: all alike.
        seed: of the resamples of runs, which are the same for every task.
    """
    share = np.ones(len(parts)) if weights is None else np.asarray(weights, dtype=float)
    share = share / share.sum()
    runs = parts[0].stratum.scores_NS.shape[1]
    contrast_S = np.concatenate([np.full(firsts, -1 / firsts), np.full(runs - firsts, 1 / (runs - firsts))])
    means_S = sum((w * part.means_S for w, part in zip(share, parts, strict=True)), np.zeros(runs))
    difference = float(contrast_S @ means_S)
    flips_N = np.concatenate([w * (p.stratum.scores_NS @ contrast_S) / p.n for w, p in zip(share, parts, strict=True)])

    resamples = len(parts[0].means_RS)
    weights_RS = _run_weights(firsts, runs, resamples, np.random.default_rng([seed, 1]))
    choice_R = (weights_RS - contrast_S) @ means_S
    variances = [_variance(part, contrast_S, w) for part, w in zip(parts, share, strict=True)]
    run_variances = [_run_variance(means_S[:firsts]), _run_variance(means_S[firsts:])]

    low = high = None
    if all(part.n > 1 for part in parts):
        draws_RS = sum((w * _spread(part) for w, part in zip(share, parts, strict=True)), np.zeros((resamples, runs)))
        draws_R = (weights_RS * draws_RS).sum(axis=1) - difference
        freedom = _freedom([*variances, *run_variances])
        ends = np.quantile(draws_R, [(1 - confidence) / 2, (1 + confidence) / 2]) * _widening(freedom, confidence)
        low, high = float(difference + ends[0]), float(difference + ends[1])
    noise_R = choice_R * _widening(_freedom(run_variances), confidence)
    flip_rng = np.random.default_rng([*(part.stratum.seed for part in parts), seed, 2])
    p, exact = sign_flip(flips_N, flip_rng, resamples=resamples, noise_R=noise_R)
    return Difference(
        first=float(means_S[:firsts].mean()),
        second=float(means_S[firsts:].mean()),
        difference=difference,
        low=low,
        high=high,
        p=p,
        exact=exact,
        n=sum(part.n for part in parts),
    )


def resampled_means(scores_NS: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Means [R, S] of examples drawn with replacement, the same ones for every run.

    How often each *different* row is drawn has a multinomial distribution, so that where scores take few values it
    costs nothing to have many examples.
    """
    rows_KS, counts_K = np.unique(scores_NS, axis=0, return_counts=True)
    n, kinds = len(scores_NS), len(rows_KS)
    if kinds == 1:
        return np.repeat(rows_KS, resamples, axis=0)
    if kinds * 10 <= n or kinds == 2:
        return rng.multinomial(n, counts_K / n, size=resamples) @ rows_KS / n
    sorted_NS = np.repeat(rows_KS, counts_K, axis=0)  # in the order of scores, not of examples
    out_RS = np.empty((resamples, scores_NS.shape[1]))
    step = max(1, _CELLS // n)
    columns = [np.ascontiguousarray(column_N) for column_N in sorted_NS.T]
    for start in range(0, resamples, step):
        drawn_RN = rng.integers(n, size=(min(step, resamples - start), n))
        for s, column_N in enumerate(columns):
            out_RS[start : start + step, s] = column_N.take(drawn_RN).mean(axis=1)
    return out_RS


def sign_flip(
    values_N: Array, rng: np.random.Generator, *, resamples: int = RESAMPLES, noise_R: Array | None = None
) -> tuple[float, bool]:
    """Two-sided p-value of the sum of `values_N` when every sign is a fair coin, and whether it is exact.

    `noise_R`: drawn sums of whatever else is random under the hypothesis, added to the flipped ones.
    """
    total = float(np.abs(values_N).sum())
    noisy = noise_R is not None and float(np.abs(noise_R).max()) > _SAME * max(total, _SAME)
    if not total and not noisy:
        return 1.0, True
    # Differences that are equal but for rounding are one magnitude.
    unit = total / len(values_N) or 1.0
    magnitudes_K, counts_K = np.unique((np.abs(values_N) / unit).round(11), return_counts=True)
    magnitudes_K, counts_K = unit * magnitudes_K[magnitudes_K > 0], counts_K[magnitudes_K > 0]
    bound = abs(float(values_N.sum())) - _SAME * total
    if not noisy and math.prod(int(count) + 1 for count in counts_K) <= _STATES:
        sums, chances = np.zeros(1), np.ones(1)
        for magnitude, count in zip(magnitudes_K, counts_K, strict=True):
            steps = magnitude * (2.0 * np.arange(count + 1) - count)
            sums = np.add.outer(sums, steps).ravel()
            chances = np.multiply.outer(chances, _coins(int(count))).ravel()
        return min(1.0, float(chances[np.abs(sums) >= bound].sum())), True
    sums_R = _flipped(magnitudes_K, counts_K, resamples, rng)
    if noise_R is not None:
        sums_R = sums_R + noise_R
    return (1 + int((np.abs(sums_R) >= bound).sum())) / (1 + resamples), False


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for as many tests at once (Holm, 1979), in the order given: the chance of any false alarm is kept."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t with `freedom` >= 1 degrees of freedom, whole or not; the normal one for infinity.

    With t = sqrt(freedom) tan(angle), the angle has a density proportional to cos(angle)^(freedom - 1).
    """
    if freedom > 1e6:
        return NormalDist().inv_cdf(probability)
    angles = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.clip(np.cos(angles), 0, None) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(probability, area / area[-1], angles)))


def _spread(part: Resampled) -> Array:
    """Resampled means [R, S], as far from the mean as the variance with n - 1 has it."""
    return part.means_S + math.sqrt(part.n / (part.n - 1)) * (part.means_RS - part.means_S)


def _run_weights(firsts: int, runs: int, resamples: int, rng: np.random.Generator) -> Array:
    """Contrasts [R, S] between the sides with runs drawn with replacement on either side, spread likewise.

    One run a side stays as it is: nothing is known of how much another one would have differed.
    """
    sides = []
    for count, sign in ((firsts, -1.0), (runs - firsts, 1.0)):
        drawn_RS = rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        spread = math.sqrt(count / (count - 1)) if count > 1 else 1.0
        sides.append(sign * (1 / count + spread * (drawn_RS - 1 / count)))
    return np.concatenate(sides, axis=1)


def _variance(part: Resampled, contrast_S: Array, weight: float) -> tuple[float, int]:
    """Squared error of the part's difference that is due to its examples, and its degrees of freedom."""
    if part.n < 2:
        return 0.0, 0
    return weight**2 * float(np.var(part.stratum.scores_NS @ contrast_S, ddof=1)) / part.n, part.n - 1


def _run_variance(means_S: Array) -> tuple[float, int]:
    if len(means_S) < 2:
        return 0.0, 0
    return float(np.var(means_S, ddof=1)) / len(means_S), len(means_S) - 1


def _freedom(variances: Sequence[tuple[float, int]]) -> float:
    """Satterthwaite's degrees of freedom of a sum of independent errors."""
    parts = [(variance, freedom) for variance, freedom in variances if freedom and variance > 1e-18]
    if not parts:
        return math.inf
    return sum(variance for variance, _ in parts) ** 2 / sum(variance**2 / freedom for variance, freedom in parts)


def _widening(freedom: float, confidence: float) -> float:
    upper = (1 + confidence) / 2
    return student_quantile(upper, max(1.0, freedom)) / NormalDist().inv_cdf(upper)


def _coins(count: int) -> Array:
    """Chances [count + 1] of each number of heads."""
    if count <= 1000:
        return np.array([math.comb(count, heads) / 2**count for heads in range(count + 1)])
    logs = np.array([math.lgamma(heads + 1) for heads in range(count + 1)])
    return np.exp(logs[-1] - logs - logs[::-1] - count * math.log(2))


def _flipped(magnitudes_K: Array, counts_K: NDArray[np.int64], resamples: int, rng: np.random.Generator) -> Array:
    """Sums [R] of all values with fair signs."""
    if not len(magnitudes_K):
        return np.zeros(resamples)
    total = float(magnitudes_K @ counts_K)
    if len(magnitudes_K) * 16 <= counts_K.sum():
        heads_RK = np.stack([rng.binomial(count, 0.5, size=resamples) for count in counts_K], axis=1)
        return 2.0 * heads_RK @ magnitudes_K - total
    values_N = np.repeat(magnitudes_K, counts_K)
    width = -(-len(values_N) // 8)
    sums_R = np.empty(resamples)
    step = max(1, _CELLS // (8 * width))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        heads_RN = np.unpackbits(rng.integers(256, size=(rows, width), dtype=np.uint8), axis=1, count=len(values_N))
        sums_R[start : start + rows] = 2.0 * (heads_RN @ values_N) - total
    return sums_R
