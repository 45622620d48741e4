"""Intervals and tests against closed formulas, sums written out, published examples, and their coverage."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from robustclip.intervals import (
    Difference,
    clustered_interval,
    holm,
    mcnemar,
    mean_difference,
    mean_interval,
    newcombe,
    paired_difference,
    wilson,
)

ROUNDING = 1e-12
Z = 1.959963984540054  # the normal quantile of 0.975


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (81, 263), (1, 10_000)])
def test_wilson_equals_its_closed_formula(correct: int, n: int) -> None:
    p, z2 = correct / n, Z**2
    middle, half = (p + z2 / (2 * n)), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    expected = [(middle + sign * half) / (1 + z2 / n) for sign in (-1, 1)]
    assert wilson(correct, n) == pytest.approx(expected, abs=1e-9)


def test_wilson_equals_the_published_example() -> None:
    """81 of 263, the first example of Newcombe, Statistics in Medicine 17, 857-872 (1998)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def covered(limits: list[tuple[float, float]], p: float) -> float:
    """Exact coverage: the binomial probability of the counts whose interval holds p."""
    low, high = np.array(limits).T
    holds = (low <= p + ROUNDING) & (p <= high + ROUNDING)
    return float(stats.binom.pmf(np.arange(len(limits)), len(limits) - 1, p)[holds].sum())


@pytest.mark.parametrize("n", [20, 50, 100, 200])
def test_wilson_keeps_its_level(n: int) -> None:
    """Exact, over 199 accuracies: the mean is the level; single values swing since counts are whole numbers."""
    limits = [wilson(correct, n) for correct in range(n + 1)]
    accuracies = np.linspace(0.005, 0.995, 199)
    coverage = np.array([covered(limits, p) for p in accuracies])
    expected = n * np.minimum(accuracies, 1 - accuracies)
    assert 0.945 <= coverage.mean() <= 0.96
    assert coverage[expected >= 5].min() >= 0.92
    assert coverage.min() >= 0.84


@pytest.mark.parametrize(("correct", "n"), [(0, 50), (7, 50), (200, 200), (81, 263)])
def test_the_interval_of_one_task_is_that_of_agresti_and_coull(correct: int, n: int) -> None:
    middle, size = (correct + Z**2 / 2) / (n + Z**2), n + Z**2
    half = Z * math.sqrt(middle * (1 - middle) / size)
    assert mean_interval([(correct, n)]) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)


def test_the_interval_of_the_mean_equals_the_formula_written_out() -> None:
    """Weights of 1 / 40 and 1 / 160: the small task gets four fifths of the added samples."""
    added = [0.8 * Z**2, 0.2 * Z**2]
    p, q = (30 + added[0] / 2) / (40 + added[0]), (5 + added[1] / 2) / (160 + added[1])
    half = Z * math.sqrt(p * (1 - p) / (40 + added[0]) + q * (1 - q) / (160 + added[1])) / 2
    assert mean_interval([(30, 40), (5, 160)]) == pytest.approx(((p + q) / 2 - half, (p + q) / 2 + half), abs=1e-9)


def test_the_interval_of_one_paired_difference_is_that_of_bonett_and_price() -> None:
    a, b, n = 2 / 23, 8 / 23, 23
    half = Z * math.sqrt((a + b - (a - b) ** 2) / n)
    found = mean_difference([(1, 7, 21)])
    assert found == pytest.approx((-6 / 21, a - b - half, a - b + half), abs=1e-9)
    mirrored = mean_difference([(7, 1, 21)])
    assert mirrored == pytest.approx((-found.value, -found.high, -found.low))


def test_the_interval_of_a_mean_difference_equals_the_formula_written_out() -> None:
    counts, added = [(10, 4, 50), (2, 12, 200)], (0.8, 0.2)
    parts = [
        ((a + c) / (n + 2 * c), (b + c) / (n + 2 * c), n + 2 * c) for (a, b, n), c in zip(counts, added, strict=True)
    ]
    middle = sum(p - q for p, q, _ in parts) / 2
    half = Z * math.sqrt(sum((p + q - (p - q) ** 2) / n for p, q, n in parts)) / 2
    value = (6 / 50 - 10 / 200) / 2
    assert mean_difference(counts) == pytest.approx((value, middle - half, middle + half), abs=1e-9)


def test_intervals_of_means_have_a_width_without_any_event() -> None:
    assert mean_interval([(0, 200)] * 4)[1] > mean_interval([(0, 200)] * 8)[1] > 0
    assert mean_interval([(0, 50), (0, 1000)])[1] > mean_interval([(0, 1000), (0, 1000)])[1]
    nothing = mean_difference([(0, 0, 200)] * 4)
    assert nothing.low == pytest.approx(-nothing.high)
    assert 0 < nothing.high < mean_difference([(0, 0, 200)] * 2).high


# Coverage. Counts are whole numbers, so that rare events are covered more often than the level says, never less.

LOWEST, HIGHEST, ENOUGH = 0.93, 0.97, 20  # events, from which on the coverage is also at most `HIGHEST`


@pytest.mark.parametrize("n", [50, 100, 200, 500, 1000])
def test_the_interval_of_an_accuracy_keeps_its_level_everywhere(n: int) -> None:
    limits = [mean_interval([(correct, n)]) for correct in range(n + 1)]
    accuracies = np.concatenate([np.linspace(0.0005, 0.05, 60), np.linspace(0.05, 0.5, 40)])
    coverage = np.array([covered(limits, p) for p in accuracies])
    assert coverage.min() >= LOWEST
    assert coverage[accuracies * n >= ENOUGH].max(initial=0) <= HIGHEST


def coverage_of(
    sizes: list[int], only_a: list[float], only_b: list[float], repeats: int, seed: int
) -> tuple[float, float]:
    """Simulates the shares of repeats whose intervals hold the mean accuracy, which is A's, and the mean difference."""
    random = np.random.default_rng(seed)
    draws = [random.multinomial(n, [a, b, 1 - a - b], repeats) for n, a, b in zip(sizes, only_a, only_b, strict=True)]
    mean, difference = float(np.mean(only_a)), float(np.mean(only_a) - np.mean(only_b))
    held = np.zeros(2)
    for row in np.stack(draws, 1):
        pairs = [(int(a), int(b), n) for (a, b, _), n in zip(row, sizes, strict=True)]
        limits = mean_interval([(a, n) for a, _, n in pairs]), mean_difference(pairs)[1:]
        truths = mean, difference
        held += [low - ROUNDING <= x <= high + ROUNDING for x, (low, high) in zip(truths, limits, strict=True)]
    return float(held[0] / repeats), float(held[1] / repeats)


def events(sizes: list[int], shares: list[float]) -> float:
    """Number of equal events with the relative variance of the weighted sum, which small tasks dominate."""
    n, p = np.array(sizes), np.array(shares)
    return float((p / n).sum() ** 2 / (p / n**3).sum())


@pytest.mark.parametrize(
    ("sizes", "only_a", "only_b"),
    [
        ([50, 50], [0.01, 0.01], [0.01, 0.01]),
        ([50, 1000], [0.1, 0.1], [0.02, 0.02]),
        ([100] * 5, [0.1, 0.3, 0.5, 0.7, 0.8], [0.1, 0.05, 0.1, 0.1, 0.1]),
        ([200] * 15, [0.002] * 15, [0.001] * 15),
    ],
    ids=["rare", "unlike sizes", "common", "rare in many tasks"],
)
def test_intervals_of_means_keep_their_level(sizes: list[int], only_a: list[float], only_b: list[float]) -> None:
    """600 simulated tests: a standard error is 0.009."""
    found = coverage_of(sizes, only_a, only_b, 600, 0)
    assert min(found) >= LOWEST - 0.01
    if events(sizes, only_a) >= ENOUGH:
        assert max(found) <= HIGHEST + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2, 3, 5, 8, 15])
def test_intervals_of_means_keep_their_level_in_random_settings(tasks: int) -> None:
    """40 settings, equal or unlike sizes of 50 to 1,000, shares of 0.1 % to 30 %: 2,000 tests each."""
    random = np.random.default_rng(tasks)
    for number in range(40):
        sizes = [int(n) for n in random.choice([50, 100, 200, 500, 1000], 1 if number % 2 else tasks)]
        sizes = sizes * tasks if number % 2 else sizes
        rate = np.exp(random.uniform(math.log(0.001), math.log(0.3)))
        q = np.minimum(rate * np.exp(random.normal(0, random.choice([0.0, 0.5, 1.0]), tasks)), 0.45)
        only_a = q * random.uniform(0, 1, tasks)
        only_b = q - only_a
        held = coverage_of(sizes, only_a.tolist(), only_b.tolist(), 2000, number)
        assert min(held) >= LOWEST - 0.006, (sizes, only_a, only_b)
        for share, parts in zip(held, (only_a, q), strict=True):
            if events(sizes, parts.tolist()) >= ENOUGH:
                assert share <= HIGHEST + 0.006, (sizes, only_a, only_b)


@pytest.mark.slow
def test_the_paired_interval_of_one_task_keeps_its_level() -> None:
    """40 settings: 50 and 200 samples, 0.5 % to 30 % discordant, of which half to all favour A."""
    random = np.random.default_rng(0)
    for n, rate, favour, base in itertools.product((50, 200), (0.005, 0.02, 0.05, 0.1, 0.3), (0.5, 1), (0.1, 0.8)):
        table = [base * (1 - rate), rate * favour, rate * (1 - favour), (1 - base) * (1 - rate)]
        rows, counts = np.unique(random.multinomial(n, table, 2000), axis=0, return_counts=True)
        limits = [newcombe(*map(int, row)) for row in rows]
        truth = table[1] - table[2]
        holds = [limit.low - ROUNDING <= truth <= limit.high + ROUNDING for limit in limits]
        assert float(counts @ holds) / 2000 >= LOWEST - 0.006, (n, table)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 7), (5, 5), (3, 17), (40, 20)])
def test_mcnemar_equals_the_exact_binomial_sum(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert mcnemar(only_a, only_b) == pytest.approx(min(1, 2 * tail), rel=1e-9)
    assert mcnemar(only_a, only_b) == pytest.approx(stats.binomtest(only_b, n, 0.5).pvalue)
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)


def test_mcnemar_of_equal_outcomes_is_one() -> None:
    assert mcnemar(0, 0) == 1


def test_newcombe_equals_the_published_example() -> None:
    """Fagerland, Lydersen and Laake, Statistics in Medicine 33, 2850-2875 (2014), table V: 1, 1, 7, 12."""
    found = newcombe(1, 1, 7, 12)
    assert found == pytest.approx((-6 / 21, -0.507, -0.026), abs=5e-4)
    mirrored = newcombe(1, 7, 1, 12)
    assert mirrored == pytest.approx((-found.value, -found.high, -found.low))


def test_a_paired_difference_counts_pairs() -> None:
    a, b = [1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]
    assert paired_difference(a, b) == newcombe(2, 2, 1, 1)
    assert paired_difference(a, a).value == 0
    assert paired_difference(a, a).low < 0 < paired_difference(a, a).high


@pytest.mark.parametrize(
    ("table", "least"),
    [
        ((0.25, 0.25, 0.25, 0.25), 0.92),
        ((0.45, 0.15, 0.05, 0.35), 0.92),
        ((0.84, 0.06, 0.01, 0.09), 0.92),
        ((0.02, 0.03, 0.0, 0.95), 0.92),
    ],
)
def test_newcombe_keeps_its_level(table: tuple[float, ...], least: float) -> None:
    """1000 simulated pairs of tests with 50 samples; highly correlated ones are covered more often than asked."""
    draws: NDArray[np.int64] = np.random.default_rng(0).multinomial(50, table, 1000)
    found, counts = np.unique(draws, axis=0, return_counts=True)
    limits = [newcombe(*map(int, row)) for row in found]
    holds = [limit.low <= table[1] - table[2] <= limit.high for limit in limits]
    assert float(counts @ holds) / 1000 >= least


def test_holm_equals_the_published_rule() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_holm_is_monotone_and_lies_between_the_value_and_bonferroni() -> None:
    values = np.random.default_rng(0).uniform(size=(50, 20)) ** 3
    for row in values:
        adjusted = np.array(holm(list(row)))
        assert (np.diff(adjusted[np.argsort(row)]) >= 0).all()
        assert (adjusted >= row).all()
        assert (adjusted <= np.minimum(1, 20 * row) + ROUNDING).all()


def test_no_samples_give_nan() -> None:
    assert np.isnan(wilson(0, 0)).all()
    assert np.isnan(mean_interval([])).all()
    assert np.isnan(mean_interval([(1, 2), (0, 0)])).all()
    assert np.isnan(paired_difference([], [])).all()
    assert np.isnan(mean_difference([])).all()
    assert np.isnan(mean_difference([(0, 0, 0)])).all()


def test_one_value_has_an_interval_with_a_width() -> None:
    assert isinstance(newcombe(1, 0, 0, 0), Difference)
    assert newcombe(1, 0, 0, 0).low < newcombe(1, 0, 0, 0).high


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the number of samples"):
        wilson(3, 2)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        wilson(1, 2, 95)
    with pytest.raises(ValueError, match="at least 0"):
        mean_interval([(-1, 2)])
    with pytest.raises(ValueError, match="at least 0"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.5, math.nan])


def test_shares_of_zero_and_one_give_the_interval_of_one_task() -> None:
    assert clustered_interval([1.0] * 7 + [0.0] * 43) == pytest.approx(mean_interval([(7, 50)]), abs=1e-12)
    assert all(math.isnan(limit) for limit in clustered_interval([]))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        clustered_interval([0.5, 1.5])


def test_the_interval_of_shares_keeps_its_level() -> None:
    """Images of unlike difficulty, each with fifteen answers: simulated coverage at 95 %."""
    random = np.random.default_rng(0)
    for a, b in ((2, 2), (0.3, 1.5), (8, 0.5)):
        difficulty = random.beta(a, b, (1500, 80))
        limits = np.array([clustered_interval(row) for row in random.binomial(15, difficulty) / 15])
        coverage = ((limits[:, 0] <= a / (a + b)) & (a / (a + b) <= limits[:, 1])).mean()
        assert 0.93 <= coverage <= 0.975


def test_tasks_with_the_same_images_count_as_one() -> None:
    assert mean_interval([(30, 40), (30, 40)], images=["x", "x"]) == pytest.approx(_of_shared(30, 40), abs=1e-9)
    own = mean_interval([(30, 40), (5, 160)])
    assert mean_interval([(30, 40), (5, 160)], images=["x", "y"]) == own
    shared = mean_difference([(1, 7, 21), (2, 5, 21)], images=["x", "x"])
    apart = mean_difference([(1, 7, 21), (2, 5, 21)])
    assert shared.value == apart.value
    assert apart.high - apart.low < shared.high - shared.low <= math.sqrt(2) * (apart.high - apart.low) + 1e-12


def _of_shared(correct: int, n: int) -> tuple[float, float]:
    """Two equal tasks, between which the added samples are shared; their mean varies as one of them."""
    p, size = (correct + Z**2 / 4) / (n + Z**2 / 2), n + Z**2 / 2
    half = Z * math.sqrt(p * (1 - p) / size)
    return p - half, p + half
