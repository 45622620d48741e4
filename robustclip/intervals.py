"""Uncertainty of accuracies, from exact counts: intervals, paired tests, and how many samples they need."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
FEW = 10  # right or wrong samples, below which the bootstrap is too narrow; see test_statistics.py
DRAWS = 10_000  # the quantiles of 2.5 % then rest on 250 draws; their own error is about a tenth of the half width

Interval = tuple[float, float]
NOTHING: Interval = (math.nan, math.nan)


class Difference(NamedTuple):
    """A difference of two accuracies and its interval, all in [-1, 1]."""

    value: float
    low: float
    high: float


def wilson(correct: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of an accuracy (https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        correct: samples that were right.
        n: samples; 0 gives nan.
        level: nominal coverage in (0, 1).

    Returns:
        Both limits, in [0, 1].

    Raises:
        ValueError: counts that cannot be, or no level.
    """
    _check(level, n, correct)
    if n == 0:
        return NOTHING
    found = stats.binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_mean(
    counts: Sequence[tuple[int, int]], level: float = LEVEL, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the unweighted mean of the tasks' accuracies.

    The tasks are given, their samples are redrawn. Drawing n of n outcomes that are 0 or 1, with replacement, gives a
    sum that is binomial (n, accuracy): one such draw per task is the bootstrap itself and no approximation.

    The interval has no width where all tasks are at 0 or at 1, and is too narrow near there. At a level of 95 % it
    covers 93 % or more where at least ten right and ten wrong samples are expected over tasks of one size; one task of
    100 samples and an accuracy of 0.02 is covered in 87 %, of 0.01 in 63 %. A small task among large ones has most of
    the variance, and must meet this alone. `wilson` keeps its level for one task.

    Args:
        counts: right samples and samples of each task; none, or a task without samples, gives nan.
        level: nominal coverage in (0, 1).
        draws: of the bootstrap.
        seed: of the draws; equal arguments give equal limits.

    Returns:
        Both limits, in [0, 1].

    Raises:
        ValueError: counts that cannot be, or no level.
    """
    for correct, n in counts:
        _check(level, n, correct)
    if not counts or any(n == 0 for _, n in counts):
        return NOTHING
    random = np.random.default_rng(seed)
    means = np.mean([random.binomial(n, correct / n, draws) / n for correct, n in counts], axis=0)
    return _percentiles(means, level)


def mean_interval(counts: Sequence[tuple[int, int]], level: float = LEVEL) -> Interval:
    """Interval of the unweighted mean of the tasks' accuracies that also holds near 0 and 1.

    `bootstrap_mean`, but where it is too narrow, with fewer than ten right or ten wrong samples: Wilson's interval of
    the mean as one accuracy of as many samples as give its variance, which is exact for tasks that are alike and else
    too wide.

    Args:
        counts: right samples and samples of each task; none, or a task without samples, gives nan.
        level: nominal coverage in (0, 1).

    Raises:
        ValueError: counts that cannot be, or no level.
    """
    right, total = sum(correct for correct, _ in counts), sum(n for _, n in counts)
    if min(right, total - right) >= FEW or any(n == 0 for _, n in counts) or not counts:
        return bootstrap_mean(counts, level)
    mean = float(np.mean([correct / n for correct, n in counts]))
    size = len(counts) ** 2 / sum(1 / n for _, n in counts)
    z = float(stats.norm.ppf((1 + level) / 2))
    middle, half = mean + z**2 / (2 * size), z * math.sqrt(mean * (1 - mean) / size + z**2 / (4 * size**2))
    return max(0.0, (middle - half) / (1 + z**2 / size)), min(1.0, (middle + half) / (1 + z**2 / size))


def bootstrap_mean_difference(
    counts: Sequence[tuple[int, int, int]], level: float = LEVEL, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Unweighted mean over tasks of the paired difference of accuracies, with its percentile bootstrap.

    As `bootstrap_mean`, with pairs redrawn: the numbers of pairs right in one alone are multinomial. It has no width
    where no pair is right in one alone, and is too narrow where few are; the tasks' own intervals are not.

    Args:
        counts: of each task the samples right in A alone, right in B alone, and all.
        level: nominal coverage in (0, 1).
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        Accuracy of A minus accuracy of B; nan without tasks or with a task without samples.

    Raises:
        ValueError: counts that cannot be, or no level.
    """
    for only_a, only_b, n in counts:
        _check(level, n, only_a, only_b)
    if not counts or any(n == 0 for *_, n in counts):
        return Difference(math.nan, *NOTHING)
    random = np.random.default_rng(seed)
    drawn = [random.multinomial(n, [a / n, b / n, (n - a - b) / n], draws) / n for a, b, n in counts]
    value = sum((a - b) / n for a, b, n in counts) / len(counts)
    return Difference(value, *_percentiles(np.mean([each[:, 0] - each[:, 1] for each in drawn], axis=0), level))


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Difference:
    """Accuracy of A minus accuracy of B on the same samples, with Newcombe's interval for paired proportions.

    Method 10 of Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C):
    Wilson's limits of both accuracies, joined by their correlation; it has no zero width and does not leave [-1, 1].

    Args:
        a: ``(N,)`` whether each sample is right in A.
        b: ``(N,)`` the same of B, in the same order.
        level: nominal coverage in (0, 1).

    Raises:
        ValueError: another number of samples in B, or no level.
    """
    right_a, right_b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if right_a.shape != right_b.shape or right_a.ndim != 1:
        raise ValueError(f"paired outcomes must be two lists of one length, got {right_a.shape} and {right_b.shape}")
    both, only_a = int((right_a & right_b).sum()), int((right_a & ~right_b).sum())
    only_b = int((right_b & ~right_a).sum())
    return newcombe(both, only_a, only_b, right_a.size - both - only_a - only_b, level=level)


def newcombe(both: int, only_a: int, only_b: int, neither: int, *, level: float = LEVEL) -> Difference:
    """`paired_difference` from the four counts of right samples."""
    n = both + only_a + only_b + neither
    _check(level, n, both, only_a, only_b, neither)
    if n == 0:
        return Difference(math.nan, *NOTHING)
    p, q = (both + only_a) / n, (both + only_b) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + only_a, n, level), wilson(both + only_b, n, level)
    phi = _correlation(both, only_a, only_b, neither)
    below = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    # Equal terms with phi = 1 round to a hair below 0.
    low, high = (p - q) - math.sqrt(max(below, 0)), (p - q) + math.sqrt(max(above, 0))
    return Difference((only_a - only_b) / n, low, high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (https://doi.org/10.1007/BF02295996): is one right alone more often?

    Args:
        only_a: samples right in A alone.
        only_b: samples right in B alone.

    Returns:
        Probability in (0, 1] of a split as uneven under a fair coin; 1 if there is nothing to split.
    """
    _check(LEVEL, only_a + only_b, only_a, only_b)
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several tests (https://www.jstor.org/stable/4615733).

    Args:
        p_values: in any order, none of them nan.

    Returns:
        Adjusted values in the same order; rejecting those up to 0.05 keeps the chance of any false one below 0.05.

    Raises:
        ValueError: a value outside [0, 1].
    """
    values = np.asarray(p_values, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values must be in [0, 1], got {list(p_values)}")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1)
    return [float(value) for value in adjusted]


def samples_needed(half_width: float = 0.01, p: float = 0.5, *, level: float = LEVEL) -> int:
    """Samples whose accuracy is known to ± half_width, by the normal approximation ``z² p (1 - p) / half_width²``.

    Args:
        half_width: of the interval, in (0, 1).
        p: expected accuracy; 0.5 is the worst case.
        level: of the interval.

    Raises:
        ValueError: an argument outside its range.
    """
    _check(level, 0)
    if not 0 < half_width < 1 or not 0 <= p <= 1:
        raise ValueError(f"half_width must be in (0, 1) and p in [0, 1], got {half_width} and {p}")
    z = float(stats.norm.ppf((1 + level) / 2))
    return math.ceil(z**2 * p * (1 - p) / half_width**2)


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Newcombe's phi: 0 with an empty margin, and shrunk by n / 2 in the numerator if it is positive."""
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
