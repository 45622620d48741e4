"""Intervals and tests against closed formulas, sums written out, published examples, and their coverage."""

import math
import re

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from robustclip.intervals import (
    Difference,
    bootstrap_mean,
    bootstrap_mean_difference,
    holm,
    mcnemar,
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


@pytest.mark.parametrize(("n", "least"), [(50, 0.92), (100, 0.92), (200, 0.93)])
def test_the_bootstrap_keeps_its_level_where_ten_are_right_and_ten_wrong(n: int, least: float) -> None:
    limits = [bootstrap_mean([(correct, n)], draws=4000) for correct in range(n + 1)]
    accuracies = np.linspace(0.005, 0.995, 199)
    coverage = np.array([covered(limits, p) for p in accuracies])
    expected = n * np.minimum(accuracies, 1 - accuracies)
    assert coverage[expected >= 10].min() >= least


@pytest.mark.parametrize(("p", "documented"), [(0.02, 0.87), (0.01, 0.63)])
def test_the_bootstrap_covers_too_little_near_0_as_documented(p: float, documented: float) -> None:
    text = " ".join((bootstrap_mean.__doc__ or "").split())
    assert re.search(rf"{round(100 * documented)} % at (an accuracy of )?{p}", text)
    limits = [bootstrap_mean([(correct, 100)], draws=4000) for correct in range(101)]
    assert covered(limits, p) == pytest.approx(documented, abs=0.01)
    assert covered([wilson(correct, 100) for correct in range(101)], p) > 0.92


@pytest.mark.parametrize(
    ("sizes", "accuracies"),
    [
        ([100] * 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ([200] * 3, [0.05, 0.05, 0.05]),
        ([100, 400, 1000], [0.5, 0.2, 0.8]),
    ],
)
def test_the_bootstrap_of_the_mean_keeps_its_level(sizes: list[int], accuracies: list[float]) -> None:
    """500 simulated tests; 0.92 is three standard errors below 0.95."""
    correct = np.random.default_rng(0).binomial(sizes, accuracies, (500, len(sizes)))
    truth = float(np.mean(accuracies))
    limits = [
        bootstrap_mean([(int(k), n) for k, n in zip(row, sizes, strict=True)], draws=1000, seed=number)
        for number, row in enumerate(correct)
    ]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in limits]) <= 0.98


def test_the_bootstrap_equals_one_that_redraws_samples() -> None:
    counts = [(30, 40), (5, 60)]
    random = np.random.default_rng(1)
    tasks = [np.repeat([1, 0], [correct, n - correct]) for correct, n in counts]
    means = np.mean([random.choice(task, (20_000, len(task))).mean(1) for task in tasks], axis=0)
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_mean(counts, draws=20_000) == pytest.approx(expected, abs=0.005)  # steps of the mean: 0.004


def test_the_bootstrap_is_a_function_of_its_seed() -> None:
    counts = [(300, 1000), (5, 600)]
    assert bootstrap_mean(counts) == bootstrap_mean(counts)
    assert bootstrap_mean(counts) != bootstrap_mean(counts, seed=1)


def test_the_bootstrap_of_a_difference_equals_one_that_redraws_pairs() -> None:
    counts = [(10, 4, 50), (2, 12, 80)]
    random = np.random.default_rng(1)
    tasks = [np.repeat([1, -1, 0], [a, b, n - a - b]) for a, b, n in counts]
    means = np.mean([random.choice(task, (20_000, len(task))).mean(1) for task in tasks], axis=0)
    found = bootstrap_mean_difference(counts, draws=20_000)
    assert found.value == pytest.approx((6 / 50 - 10 / 80) / 2)
    assert found[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


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
    assert np.isnan(bootstrap_mean([])).all()
    assert np.isnan(bootstrap_mean([(1, 2), (0, 0)])).all()
    assert np.isnan(paired_difference([], [])).all()
    assert np.isnan(bootstrap_mean_difference([])).all()
    assert np.isnan(bootstrap_mean_difference([(0, 0, 0)])).all()


def test_one_value_has_an_interval_with_a_width() -> None:
    assert isinstance(newcombe(1, 0, 0, 0), Difference)
    assert newcombe(1, 0, 0, 0).low < newcombe(1, 0, 0, 0).high


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the number of samples"):
        wilson(3, 2)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        wilson(1, 2, 95)
    with pytest.raises(ValueError, match="at least 0"):
        bootstrap_mean([(-1, 2)])
    with pytest.raises(ValueError, match="at least 0"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.5, math.nan])


def test_the_interval_of_a_mean_of_equal_tasks_near_zero_or_one_is_wilsons_of_all_samples() -> None:
    for counts in ([(0, 200)] * 4, [(200, 200)] * 4, [(1, 50), (3, 50)], [(49, 50), (50, 50), (48, 50)]):
        right, total = (sum(column) for column in zip(*counts, strict=True))
        assert mean_interval(counts) == pytest.approx(wilson(right, total), abs=1e-9)
    assert mean_interval([(20, 200)] * 4) == bootstrap_mean([(20, 200)] * 4)
    small, large = mean_interval([(0, 50), (0, 1000)]), mean_interval([(0, 1000), (0, 1000)])
    assert small[1] > large[1]


@pytest.mark.parametrize("accuracy", [0.001, 0.003, 0.01, 0.04])
def test_the_interval_of_a_mean_holds_near_zero(accuracy: float) -> None:
    random = np.random.default_rng(3)
    counts = random.binomial(200, accuracy, size=(400, 8))
    limits = np.array([mean_interval([(int(k), 200) for k in row]) for row in counts])
    covered = ((limits[:, 0] <= accuracy) & (accuracy <= limits[:, 1])).mean()
    assert covered >= 0.93, "400 repeats: the standard error is 0.011"
