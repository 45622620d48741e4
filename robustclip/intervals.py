"""Uncertainty of accuracies from exact counts: intervals and paired tests."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
FEW = 10  # correct or misclassified samples below which the bootstrap is too narrow; see test_intervals.py
DRAWS = 10_000  # a 2.5 % quantile then has 250 draws beyond it; its error is about a tenth of the half width

Interval = tuple[float, float]
"""Lower and upper limit, in [0, 1]."""

NOTHING: Interval = (math.nan, math.nan)


class Difference(NamedTuple):
    """Difference of two accuracies with its confidence interval.

    Attributes:
        value: difference in [-1, 1].
        low: lower limit of the interval.
        high: upper limit of the interval.
    """

    value: float
    low: float
    high: float


def wilson(correct: int, n: int, level: float = LEVEL) -> Interval:
    """Computes Wilson's score interval of an accuracy (https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        correct: number of correctly classified samples.
        n: number of samples; 0 gives nan.
        level: nominal coverage in (0, 1).

    Raises:
        ValueError: the counts are impossible, or the level is outside (0, 1).
    """
    _check(level, n, correct)
    if n == 0:
        return NOTHING
    interval = stats.binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(
    counts: Sequence[tuple[int, int]], level: float = LEVEL, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Computes the percentile bootstrap interval of the unweighted mean of the tasks' accuracies.

    The tasks are fixed and their samples are redrawn. Drawing n of n outcomes that are 0 or 1, with replacement, gives
    a sum that is binomial (n, accuracy). One such draw per task is the bootstrap itself, not an approximation.

    The interval has no width if all tasks are at 0 or at 1, and is too narrow near there. At a level of 95 % it covers
    93 % or more if at least ten correct and ten misclassified samples are expected over tasks of one size. One task of
    100 samples is covered in 87 % at an accuracy of 0.02 and in 63 % at 0.01. A small task among large ones has most of
    the variance, and must meet the condition alone. `wilson` keeps its level for one task.

    Args:
        counts: per task the number of correct samples and of all; no task, or a task without samples, gives nan.
        level: nominal coverage in (0, 1).
        draws: number of draws.
        seed: seed of the draws; equal arguments give equal limits.

    Raises:
        ValueError: the counts are impossible, or the level is outside (0, 1).
    """
    for correct, n in counts:
        _check(level, n, correct)
    if not counts or any(n == 0 for _, n in counts):
        return NOTHING
    random = np.random.default_rng(seed)
    means = np.mean([random.binomial(n, correct / n, draws) / n for correct, n in counts], axis=0)
    return _percentiles(means, level)


def mean_interval(counts: Sequence[tuple[int, int]], level: float = LEVEL) -> Interval:
    """Computes an interval of the unweighted mean of the tasks' accuracies that also holds near 0 and 1.

    The result is `bootstrap_mean`, unless there are fewer than ten correct or ten misclassified samples, for which that
    is too narrow. Then it is Wilson's interval of the mean as one accuracy, with the number of samples that has the
    mean's variance. This is exact for tasks that are alike, else too wide.

    Args:
        counts: per task the number of correct samples and of all; no task, or a task without samples, gives nan.
        level: nominal coverage in (0, 1).

    Raises:
        ValueError: the counts are impossible, or the level is outside (0, 1).
    """
    correct, total = sum(count for count, _ in counts), sum(n for _, n in counts)
    if min(correct, total - correct) >= FEW or any(n == 0 for _, n in counts) or not counts:
        return bootstrap_mean(counts, level)
    mean = float(np.mean([count / n for count, n in counts]))
    size = len(counts) ** 2 / sum(1 / n for _, n in counts)
    z = float(stats.norm.ppf((1 + level) / 2))
    middle, half = mean + z**2 / (2 * size), z * math.sqrt(mean * (1 - mean) / size + z**2 / (4 * size**2))
    return max(0.0, (middle - half) / (1 + z**2 / size)), min(1.0, (middle + half) / (1 + z**2 / size))


def bootstrap_mean_difference(
    counts: Sequence[tuple[int, int, int]], level: float = LEVEL, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Computes the mean over tasks of the paired difference of accuracies, with its percentile bootstrap.

    Pairs of outcomes are redrawn as in `bootstrap_mean`: the numbers of pairs in which one alone is correct are
    multinomial. The interval has no width if there is no such pair, and is too narrow if there are few; the tasks' own
    intervals are not.

    Args:
        counts: per task the numbers of samples that A alone and B alone classifies correctly, and of all.
        level: nominal coverage in (0, 1).
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        Accuracy of A minus accuracy of B; nan without tasks or with a task without samples.

    Raises:
        ValueError: the counts are impossible, or the level is outside (0, 1).
    """
    for only_a, only_b, n in counts:
        _check(level, n, only_a, only_b)
    if not counts or any(n == 0 for *_, n in counts):
        return Difference(math.nan, *NOTHING)
    random = np.random.default_rng(seed)
    shares = [random.multinomial(n, [a / n, b / n, (n - a - b) / n], draws) / n for a, b, n in counts]
    value = sum((a - b) / n for a, b, n in counts) / len(counts)
    return Difference(value, *_percentiles(np.mean([share[:, 0] - share[:, 1] for share in shares], axis=0), level))


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Difference:
    """Computes accuracy of A minus accuracy of B on the same samples, with Newcombe's interval for paired proportions.

    Method 10 of Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C):
    Wilson's limits of both accuracies, combined by their correlation; it never has width 0 and is within [-1, 1].

    Args:
        a: ``(N,)``, whether A classifies each sample correctly.
        b: ``(N,)``, whether B does, in the same order.
        level: nominal coverage in (0, 1).

    Raises:
        ValueError: the numbers of samples differ, or the level is outside (0, 1).
    """
    correct_a, correct_b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if correct_a.shape != correct_b.shape or correct_a.ndim != 1:
        raise ValueError(
            f"paired outcomes must be two lists of one length, got {correct_a.shape} and {correct_b.shape}"
        )
    both, only_a = int((correct_a & correct_b).sum()), int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    return newcombe(both, only_a, only_b, correct_a.size - both - only_a - only_b, level=level)


def newcombe(both: int, only_a: int, only_b: int, neither: int, *, level: float = LEVEL) -> Difference:
    """Computes `paired_difference` from counts of samples.

    Args:
        both: samples that both classify correctly.
        only_a: samples that A alone classifies correctly.
        only_b: samples that B alone classifies correctly.
        neither: samples that both misclassify.
        level: nominal coverage in (0, 1).
    """
    n = both + only_a + only_b + neither
    _check(level, n, both, only_a, only_b, neither)
    if n == 0:
        return Difference(math.nan, *NOTHING)
    p, q = (both + only_a) / n, (both + only_b) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + only_a, n, level), wilson(both + only_b, n, level)
    phi = _correlation(both, only_a, only_b, neither)
    below = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    # The maximum with 0 is needed, since equal terms with phi = 1 may round to slightly less.
    low, high = (p - q) - math.sqrt(max(below, 0)), (p - q) + math.sqrt(max(above, 0))
    return Difference((only_a - only_b) / n, low, high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Computes the exact two-sided p-value of McNemar's test (https://doi.org/10.1007/BF02295996).

    Args:
        only_a: samples that A alone classifies correctly.
        only_b: samples that B alone classifies correctly.

    Returns:
        Probability in (0, 1] of a split at least as uneven if both were equally likely; 1 without samples.
    """
    _check(LEVEL, only_a + only_b, only_a, only_b)
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's step-down adjustment for several tests (https://www.jstor.org/stable/4615733).

    Args:
        p_values: p-values in any order, none of them nan.

    Returns:
        Adjusted values in the same order; rejecting those up to 0.05 keeps the probability of any false one below 0.05.

    Raises:
        ValueError: a value is outside [0, 1].
    """
    values = np.asarray(p_values, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values must be in [0, 1], got {list(p_values)}")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1)
    return [float(value) for value in adjusted]


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Computes Newcombe's phi: 0 with an empty margin; if positive, n / 2 is subtracted in the numerator."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_a * only_b
    n = both + only_a + only_b + neither
    return (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins)


def _percentiles(values: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(level: float, n: int, *parts: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}; 0.95 is usual")
    if n < 0 or any(part < 0 for part in parts) or sum(parts) > n:
        raise ValueError(f"counts must be at least 0 and at most the number of samples, got {parts} of {n}")
