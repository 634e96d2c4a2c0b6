from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from spafit.errors import NumericalError, UsageError
from spafit.trend import jonckheere_terpstra


def brute_force(values, levels, alternative="increasing"):
    """Every distinct assignment of the labels, one by one."""

    def statistic(assigned):
        return sum(
            (values[j] > values[i]) + 0.5 * (values[j] == values[i])
            for i in range(len(values))
            for j in range(len(values))
            if assigned[i] < assigned[j]
        )

    seen = statistic(levels)
    null = np.array([statistic(a) for a in set(itertools.permutations(levels))])
    tails = {"increasing": (null >= seen).mean(), "decreasing": (null <= seen).mean()}
    smallest = {"increasing": (null == null.max()).mean(), "decreasing": (null == null.min()).mean()}
    if alternative == "two-sided":
        return seen, min(1, 2 * min(tails.values())), min(1, 2 * min(smallest.values())), len(null)
    return seen, tails[alternative], smallest[alternative], len(null)


@pytest.mark.parametrize("alternative", ["increasing", "decreasing", "two-sided"])
@pytest.mark.parametrize("tied", [False, True])
def test_p_equals_listing_every_assignment(alternative, tied):
    random = np.random.default_rng(3)
    for levels in ([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2, 2], [5, 9, 9, 5, 9, 9, 5]):
        values = random.integers(0, 4, len(levels)) if tied else random.normal(size=len(levels))
        got = jonckheere_terpstra(values, levels, alternative=alternative)
        statistic, p, smallest, n = brute_force(list(values), levels, alternative)
        assert got.statistic == statistic
        assert got.p == pytest.approx(p, abs=1e-12)
        assert got.smallest_p == pytest.approx(smallest, abs=1e-12)
        assert (got.n_assignments, got.method) == (n, "exact")


def test_two_levels_equal_scipys_exact_mann_whitney():
    random = np.random.default_rng(0)
    for _ in range(20):
        a, b = random.normal(size=7), random.normal(0.5, size=9)
        ours = jonckheere_terpstra(np.r_[a, b], [0] * 7 + [1] * 9)
        theirs = scipy_stats.mannwhitneyu(b, a, alternative="greater", method="exact")
        assert ours.statistic == theirs.statistic
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)


@pytest.mark.parametrize(("counts", "assignments"), [((2, 3, 5), 2520), ((4, 4, 4), 34650)])
def test_smallest_reachable_p_is_one_over_the_number_of_assignments(counts, assignments):
    levels = np.repeat([0, 1, 2], counts)
    perfect = jonckheere_terpstra(np.arange(len(levels)), levels)
    assert perfect.n_assignments == assignments
    assert perfect.p == perfect.smallest_p == pytest.approx(1 / assignments)
    reverse = jonckheere_terpstra(-np.arange(len(levels)), levels)
    assert reverse.p == pytest.approx(1)
    assert reverse.smallest_p == pytest.approx(1 / assignments)


def test_large_designs_agree_with_the_normal_approximation():
    random = np.random.default_rng(1)
    sizes = np.array([20, 20, 20])
    levels = np.repeat([0, 1, 2], sizes)
    values = random.normal(0.25 * levels)
    result = jonckheere_terpstra(values, levels)
    n = sizes.sum()
    mean = (n**2 - (sizes**2).sum()) / 4
    variance = (n**2 * (2 * n + 3) - (sizes**2 * (2 * sizes + 3)).sum()) / 72
    approximate = scipy_stats.norm.sf((result.statistic - 0.5 - mean) / math.sqrt(variance))
    assert result.method == "exact"
    assert result.p == pytest.approx(approximate, rel=0.05)


def test_beyond_exact_counting_draws_are_made_and_named():
    random = np.random.default_rng(2)
    levels = np.repeat(np.arange(8), 4)
    values = random.normal(0.15 * levels)
    result = jonckheere_terpstra(values, levels, n_monte_carlo=1999)
    assert (result.method, result.n_assignments, result.smallest_p) == ("monte-carlo", 1999, 1 / 2000)
    assert 0 < result.p < 0.5
    assert jonckheere_terpstra(values, levels, n_monte_carlo=1999) == result


def test_p_is_valid_under_the_null_and_small_under_a_trend():
    random = np.random.default_rng(4)
    levels = np.repeat([0, 1, 2], [2, 3, 5])
    null = np.array([jonckheere_terpstra(random.normal(size=10), levels).p for _ in range(2000)])
    trend = np.array([jonckheere_terpstra(random.normal(2 * levels), levels).p for _ in range(200)])
    assert (null <= 0.05).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert (trend <= 0.05).mean() > 0.9


def test_all_equal_values_give_p_one():
    result = jonckheere_terpstra(np.zeros(6), [0, 0, 1, 1, 2, 2])
    assert result.p == result.smallest_p == 1


def test_bad_input_is_named():
    with pytest.raises(UsageError, match="at least two levels"):
        jonckheere_terpstra([1, 2], [0, 0])
    with pytest.raises(UsageError, match="equal length"):
        jonckheere_terpstra([1, 2], [0, 1, 1])
    with pytest.raises(NumericalError, match="NaN"):
        jonckheere_terpstra([1, np.nan], [0, 1])
