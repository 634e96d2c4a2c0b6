"""The conditions of a localization claim as tests over tasks: arrays in, numbers out.

Units are tasks. A test over items finds differences between types about half of the time when tasks differ for no
reason that has to do with their type. All p-values are one-sided and come from all assignments of the type labels to
the tasks (or, where there are too many, from :data:`DRAWN` of them), so they hold whatever tasks are like. "Refuted"
needs a bound: the difference lies below the margin, by Student's t with a spread that is pooled over types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy import stats as scipy_stats

from spafit.runtime import generator
from spafit.stats import holm, max_t
from spafit.trend import jonckheere_terpstra

#: Above this many assignments of labels, :data:`DRAWN` random ones stand for all.
MOST_EXACT = 20_000
DRAWN = 9_999


@dataclass(frozen=True)
class Difference:
    """A difference of two means over tasks.

    Attributes:
        value: the second mean minus the first, or what the function says.
        interval: of level 1 - 2·alpha, so that each end is a one-sided bound of level 1 - alpha.
        p_refuted: one-sided p of "the difference is at least the margin": small where it is excluded.
    """

    value: float
    interval: tuple[float, float]
    p_refuted: float


@dataclass(frozen=True)
class OrderTest:
    """L1: are tasks of later types deeper?

    Attributes:
        difference: mean depth of the last type minus that of the first, as a fraction of the depth.
        p: exact one-sided p of the trend (Jonckheere–Terpstra over all assignments of labels).
        smallest_p: the smallest p that these numbers of tasks can give.
        spread: standard deviation of depths within types, in the unit of the depths.
        pair_p: exact p of each pair of types, shape (types, types), upper triangle; NaN elsewhere.
        pair_differences: of each pair (i, j), i < j.
    """

    difference: Difference
    p: float
    smallest_p: float
    spread: float
    pair_p: np.ndarray
    pair_differences: dict[tuple[int, int], Difference]


@dataclass(frozen=True)
class RangeTest:
    """L2 for one type: does intervening on its range harm its tasks more than elsewhere, and more than other tasks?

    Attributes:
        share: mean share of the effect on the type's tasks that falls in its range.
        difference: that share minus the same of all other tasks.
        p: max-T p over all ranges of the same length of the label permutation, tasks as units.
        smallest_p: the smallest p that these numbers of tasks can give.
        best: the range of this length with the largest share for the type's tasks.
        beats_ranges: no range that begins more than the margin away has as large a share.
        beats_random: share of random sets of as many blocks that have a smaller share.
    """

    share: float
    difference: Difference
    p: float
    smallest_p: float
    best: tuple[int, int]
    beats_ranges: bool
    beats_random: float


@dataclass(frozen=True)
class DissociationTest:
    """L3 for one pair of types: is each harmed more by its own range than the other type is, in both directions?

    Attributes:
        p: the larger p of both directions (intersection–union), each over all assignments of the two labels.
        smallest_p: the smallest p that these numbers of tasks can give.
        difference: the smaller of both differences, with the interval of that direction; ``p_refuted`` is twice the
            smaller one of both.
        directions: both differences: the first type's tasks in its range less the second's there, and the reverse.
    """

    p: float
    smallest_p: float
    difference: Difference
    directions: tuple[Difference, Difference]


def pooled_spread(groups: Sequence[np.ndarray]) -> float:
    """Standard deviation within groups, pooled; in the unit of the values. NaN with no more values than groups."""
    squares, freedom = sum(float(((g - g.mean()) ** 2).sum()) for g in groups), sum(map(len, groups)) - len(groups)
    return math.sqrt(squares / freedom) if freedom > 0 else math.nan


def difference(
    first: np.ndarray, second: np.ndarray, *, spread: float, freedom: int, alpha: float, margin: float
) -> Difference:
    """Mean of ``second`` minus mean of ``first``, with Student's t bounds from a pooled spread.

    Args:
        first: values of one group of tasks.
        second: values of the other.
        spread: standard deviation within groups.
        freedom: degrees of freedom behind it.
        alpha: level of each one-sided bound.
        margin: smallest difference that matters.
    """
    value = float(second.mean() - first.mean())
    error = spread * math.sqrt(1 / len(first) + 1 / len(second))
    half = float(scipy_stats.t.ppf(1 - alpha, freedom)) * error
    distance = value - margin
    p = float(scipy_stats.t.cdf(distance / error, freedom)) if error > 0 else float(distance >= 0)
    return Difference(value, (value - half, value + half), p)


@lru_cache(maxsize=64)
def assignments(n: int, k: int, *, seed: int = 0) -> np.ndarray:
    """Which ``k`` of ``n`` tasks get a label, one row per assignment: all, or the drawn ones; shape (rows, n), bool.

    The observed assignment is not added to drawn ones: p is (1 + hits) / (1 + rows) then.
    """
    total = math.comb(n, k)
    rows = np.zeros((min(total, DRAWN) if total > MOST_EXACT else total, n), dtype=bool)
    if total > MOST_EXACT:
        order = generator(seed, "assignments", n, k).random(rows.shape).argsort(axis=1)
        np.put_along_axis(rows, order[:, :k], True, axis=1)
    else:
        for i, chosen in enumerate(combinations(range(n), k)):
            rows[i, list(chosen)] = True
    rows.setflags(write=False)
    return rows


def smallest_p(n: int, k: int) -> float:
    """The smallest one-sided p of a test over all assignments of one label to ``k`` of ``n`` tasks."""
    total = math.comb(n, k)
    return 1 / total if total <= MOST_EXACT else 1 / (1 + DRAWN)


def permuted_differences(values: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Mean of own tasks minus mean of the others, as observed and for assignments of the label.

    Args:
        values: shape (tasks, curves).
        own: which tasks have the label, shape (tasks,).

    Returns:
        ``(observed, permuted, complete)``: shapes (curves,) and (assignments, curves), and whether these are all
        assignments, the observed one among them.
    """
    n, k = len(own), int(own.sum())
    weights = np.where(assignments(n, k), 1 / k, -1 / (n - k))
    return np.where(own, 1 / k, -1 / (n - k)) @ values, weights @ values, math.comb(n, k) <= MOST_EXACT


def exact_p(values: np.ndarray, own: np.ndarray) -> float:
    """One-sided p that own tasks have larger values than the others, over all assignments of the label."""
    observed, permuted, complete = permuted_differences(values[:, None], own)
    hits = int((permuted >= observed - 1e-12 * np.abs(values).max(initial=0.0)).sum())
    return hits / len(permuted) if complete else (1 + hits) / (1 + len(permuted))


def order_test(
    depths: np.ndarray, ranks: np.ndarray, *, num_blocks: float, alpha: float = 0.05, delta: float = 0.1
) -> OrderTest:
    """L1 from the depth of each task.

    Args:
        depths: emergence of each task in hidden indices, shape (tasks,).
        ranks: rank of each task's type, shape (tasks,): 0, 1, …; more tasks than types.
        num_blocks: depth of the model.
        alpha: level of the bounds.
        delta: smallest difference between the first and the last type that matters, as a fraction of the depth; for
            other pairs in proportion to their ranks.
    """
    trend = jonckheere_terpstra(depths, ranks)
    found = np.unique(ranks)
    groups = [depths[ranks == r] for r in found]
    spread, freedom = pooled_spread(groups), len(depths) - len(groups)
    n = len(found)
    pair_p, pairs = np.full((n, n), np.nan), {}
    for i, j in combinations(range(n), 2):
        margin = delta * num_blocks * (j - i) / (n - 1)
        found_difference = difference(groups[i], groups[j], spread=spread, freedom=freedom, alpha=alpha, margin=margin)
        pairs[i, j] = Difference(
            found_difference.value / num_blocks,
            (found_difference.interval[0] / num_blocks, found_difference.interval[1] / num_blocks),
            found_difference.p_refuted,
        )
        both = np.concatenate([groups[j], groups[i]])
        pair_p[i, j] = exact_p(both, np.arange(len(both)) < len(groups[j]))
    return OrderTest(pairs[0, n - 1], trend.p, trend.smallest_p, spread, pair_p, pairs)


def effect_shares(effects: np.ndarray) -> np.ndarray:
    """Share of each block in a task's whole effect: effect / Σ|effect| over blocks; NaN where nothing has an effect.

    Nothing is clipped: where effects of both signs cancel, as noise does, shares of any range are near 0.

    Args:
        effects: harm of intervening on each block, shape (tasks, blocks).
    """
    whole = np.abs(effects).sum(axis=-1, keepdims=True)
    return np.divide(effects, whole, out=np.full(effects.shape, np.nan), where=whole > 0)


def window_sums(shares: np.ndarray, length: int) -> np.ndarray:
    """Sum over every range of ``length`` blocks, by its start; shape (tasks, blocks - length + 1)."""
    total = np.concatenate([np.zeros((len(shares), 1)), np.cumsum(shares, axis=1)], axis=1)
    return total[:, length:] - total[:, :-length]


def range_test(
    shares: np.ndarray, own: np.ndarray, claimed: tuple[int, int], *, alpha: float = 0.05, delta: float = 0.1
) -> RangeTest:
    """L2 for one type.

    The test asks whether own tasks have more of their effect in the range than other tasks have, adjusted over all
    ranges of the same length by max-T. Two controls restrict it further without entering p: no range of the same
    length that begins more than ``delta`` of the depth away may have as large a share, and not more than ``alpha`` of
    the random sets of as many blocks.

    Args:
        shares: of each task and block, shape (tasks, blocks).
        own: which tasks are of the type.
        claimed: the range, half-open.
        alpha: level of the bounds, and share of the random sets.
        delta: smallest difference of shares that matters, and of depths.
    """
    start, stop = claimed
    length, depth = stop - start, shares.shape[1]
    sums = window_sums(shares, length)
    observed, permuted, complete = permuted_differences(sums, own)
    rounding = 1e-12 * np.abs(sums).max(initial=0.0)
    p = float(max_t(observed - rounding, permuted, alternative="greater")[0][start])
    if complete:  # the observed assignment is one of them, and is counted once
        p = ((1 + len(permuted)) * p - 1) / len(permuted)
    means = sums[own].mean(axis=0)
    far = np.abs(np.arange(len(means)) - start) > delta * depth
    best = int(np.argmax(means))
    beats = bool((means[far] < means[start]).all())
    groups = [sums[~own, start], sums[own, start]]
    found = difference(
        groups[0], groups[1], spread=pooled_spread(groups), freedom=len(own) - 2, alpha=alpha, margin=delta
    )
    return RangeTest(
        float(means[start]), found, p, smallest_p(len(own), int(own.sum())), (best, best + length), beats,
        _beaten_random_sets(shares[own].mean(axis=0), claimed),
    )  # fmt: skip


def _beaten_random_sets(profile: np.ndarray, claimed: tuple[int, int]) -> float:
    """Share of the other sets of as many blocks whose sum is smaller than the range's."""
    depth, length = len(profile), claimed[1] - claimed[0]
    own = np.zeros(depth, dtype=bool)
    own[slice(*claimed)] = True
    sets = assignments(depth, length)
    if math.comb(depth, length) <= MOST_EXACT:
        sets = sets[(sets != own).any(axis=1)]
    if not len(sets):
        return 0.0
    seen = profile[own].sum()
    return float((sets @ profile < seen - 1e-12 * np.abs(profile).sum()).mean())


def dissociation_test(
    in_ranges: np.ndarray, first: np.ndarray, second: np.ndarray, pair: tuple[int, int], *, alpha: float, delta: float
) -> DissociationTest:
    """L3 for one pair of types.

    Args:
        in_ranges: share of each task's effect that falls in each type's range, shape (tasks, types).
        first: which tasks are of the first type.
        second: which are of the second.
        pair: columns of the two types' ranges.
        alpha: level of the bounds.
        delta: smallest difference of shares that matters.
    """
    p, found = [], []
    for own, other, column in ((first, second, pair[0]), (second, first, pair[1])):
        a, b = in_ranges[other, column], in_ranges[own, column]
        both = np.concatenate([b, a])
        p.append(exact_p(both, np.arange(len(both)) < len(b)))
        freedom = len(both) - 2
        found.append(difference(a, b, spread=pooled_spread([a, b]), freedom=freedom, alpha=alpha, margin=delta))
    worse = min(found, key=lambda d: d.value)
    refuted = min(1.0, 2 * min(d.p_refuted for d in found))
    a, b = int(first.sum()), int(second.sum())
    smaller = Difference(worse.value, worse.interval, refuted)
    return DissociationTest(max(p), smallest_p(a + b, a), smaller, (found[0], found[1]))


def dissociations(
    in_ranges: np.ndarray, ranks: np.ndarray, *, alpha: float, delta: float
) -> tuple[dict[tuple[int, int], DissociationTest], dict[tuple[int, int], float]]:
    """L3 for every pair of types, and its p adjusted over pairs by Holm."""
    n = in_ranges.shape[1]
    tests = {
        pair: dissociation_test(in_ranges, ranks == pair[0], ranks == pair[1], pair, alpha=alpha, delta=delta)
        for pair in combinations(range(n), 2)
    }
    adjusted = holm(np.array([t.p for t in tests.values()]))
    return tests, dict(zip(tests, map(float, adjusted), strict=True))


def choose_ranges(shares: np.ndarray, ranks: np.ndarray, n_types: int) -> tuple[tuple[int, int], ...]:
    """The range of 1/types of the depth in which each type's tasks have most more of their effect than the others.

    Args:
        shares: of each task and block, of the half of the evidence that is not tested on.
        ranks: rank of each task's type, shape (tasks,).
        n_types: number of types.
    """
    length = max(1, math.floor(shares.shape[1] / n_types + 0.5))
    sums = window_sums(shares, length)
    starts = [int(np.argmax(sums[ranks == k].mean(0) - sums[ranks != k].mean(0))) for k in range(n_types)]
    return tuple((s, s + length) for s in starts)
