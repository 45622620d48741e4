"""Uncertainty of accuracies from exact counts: intervals and paired tests."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95

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
    """Computes Wilson's score interval of a share (https://doi.org/10.1080/01621459.1927.10502953).

    Its mean coverage is the level. Near 0 and 1 single shares are covered less, down to 84 %; `mean_interval` is not.

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


def upper_bound(count: int, n: int, level: float = LEVEL) -> float:
    """Computes the one-sided upper limit of a share by Clopper and Pearson (https://doi.org/10.1093/biomet/26.4.404).

    Args:
        count: number of cases.
        n: number of samples; 0 gives 1.
        level: confidence in (0, 1).

    Raises:
        ValueError: the counts are impossible, or the level is outside (0, 1).
    """
    _check(level, n, count)
    return 1.0 if count == n else float(stats.beta.ppf(level, count + 1, n - count))


def mean_interval(
    counts: Sequence[tuple[int, int]], level: float = LEVEL, images: Sequence[Hashable] | None = None
) -> Interval:
    """Computes an interval of the unweighted mean of the tasks' accuracies.

    The tasks are fixed, and their samples are drawn. The interval is that of Agresti and Coull
    (https://doi.org/10.1080/00031305.1998.10480550), which adds z^2 / 2 correct and as many misclassified samples. Here
    the tasks share these in proportion to 1 / n. For one task it is the published interval. It has a width at 0 and 1,
    and covers at least 93 % at its level of 95 % for every accuracy, from 50 samples on; see test_intervals.py.

    Args:
        counts: per task the number of correct samples and of all; no task, or a task without samples, gives nan.
        level: nominal coverage in (0, 1).
        images: per task the name of its images; tasks with the same images are taken as fully dependent, so that the
            interval holds for any dependence. None for tasks with images of their own.

    Raises:
        ValueError: the counts are impossible, or the level is outside (0, 1).
    """
    for correct, n in counts:
        _check(level, n, correct)
    if not counts or any(n == 0 for _, n in counts):
        return NOTHING
    correct, n = np.array(counts, dtype=float).T
    z = float(stats.norm.ppf((1 + level) / 2))
    added = z**2 * _shares(n)
    shares = (correct + added / 2) / (n + added)
    half = z * math.sqrt(_summed(shares * (1 - shares) / (n + added), images)) / len(n)
    return max(0.0, float(shares.mean()) - half), min(1.0, float(shares.mean()) + half)


def clustered_interval(shares: Sequence[float], level: float = LEVEL) -> Interval:
    """Computes an interval of the mean over images, each of which has a share of correct answers to several questions.

    It is `mean_interval` of one task with the variance of the shares; for shares of 0 and 1, both are equal.

    Args:
        shares: per image, in [0, 1]; no image gives nan.
        level: nominal coverage in (0, 1).

    Raises:
        ValueError: a share is outside [0, 1], or the level is outside (0, 1).
    """
    values = np.asarray(shares, dtype=float)
    _check(level, len(values))
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"shares must be in [0, 1], got {values.min():.3g} to {values.max():.3g}")
    if not len(values):
        return NOTHING
    z = float(stats.norm.ppf((1 + level) / 2))
    values, weights = np.append(values, (0.0, 1.0)), np.append(np.ones(len(values)), (z**2 / 2, z**2 / 2))
    mean = float((weights * values).sum() / weights.sum())
    half = z * math.sqrt(float((weights * (values - mean) ** 2).sum())) / float(weights.sum())
    return max(0.0, mean - half), min(1.0, mean + half)


def mean_difference(
    counts: Sequence[tuple[int, int, int]], level: float = LEVEL, images: Sequence[Hashable] | None = None
) -> Difference:
    """Computes the mean over tasks of the paired difference of accuracies, with an interval that holds for rare pairs.

    The interval is that of Bonett and Price (https://doi.org/10.3102/1076998611411915), which adds one sample that A
    alone classifies correctly, and one for B. Here the tasks share these in proportion to 1 / n. It has a width without
    any such sample, and covers at least 93 % at its level of 95 %, from 50 samples on; see test_intervals.py.

    Args:
        counts: per task the numbers of samples that A alone and B alone classifies correctly, and of all.
        level: nominal coverage in (0, 1).
        images: see `mean_interval`.

    Returns:
        Accuracy of A minus accuracy of B; nan without tasks or with a task without samples.

    Raises:
        ValueError: the counts are impossible, or the level is outside (0, 1).
    """
    for only_a, only_b, n in counts:
        _check(level, n, only_a, only_b)
    if not counts or any(n == 0 for *_, n in counts):
        return Difference(math.nan, *NOTHING)
    a, b, n = np.array(counts, dtype=float).T
    added = _shares(n)
    of_a, of_b = (a + added) / (n + 2 * added), (b + added) / (n + 2 * added)
    variances = (of_a + of_b - (of_a - of_b) ** 2) / (n + 2 * added)
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(_summed(variances, images)) / len(n)
    middle, value = float((of_a - of_b).mean()), sum((x - y) / n for x, y, n in counts) / len(counts)
    return Difference(value, max(-1.0, middle - half), min(1.0, middle + half))


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


def _summed(variances: NDArray[np.float64], images: Sequence[Hashable] | None) -> float:
    """Computes the variance of a sum; terms of the same images add up like their deviations, the largest possible."""
    if images is None:
        return float(variances.sum())
    deviations: dict[Hashable, float] = {}
    for name, variance in zip(images, variances, strict=True):
        deviations[name] = deviations.get(name, 0.0) + math.sqrt(variance)
    return sum(deviation**2 for deviation in deviations.values())


def _shares(n: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes each task's share of the added samples: small tasks, which have most of the variance, get more."""
    shares: NDArray[np.float64] = (1 / n) / (1 / n).sum()
    return shares


def _check(level: float, n: int, *parts: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}; 0.95 is usual")
    if n < 0 or any(part < 0 for part in parts) or sum(parts) > n:
        raise ValueError(f"counts must be at least 0 and at most the number of samples, got {parts} of {n}")
