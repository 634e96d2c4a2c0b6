"""Exact trend test across ordered groups (Jonckheere 1954, Terpstra 1952), by permutation of the labels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator

Trend = Literal["increasing", "decreasing", "two-sided"]

#: Above this many (counts per level so far) states the exact recursion would take more than about two seconds.
_MAX_STATES = 20_000


@dataclass(frozen=True)
class TrendTest:
    """Result of :func:`jonckheere_terpstra`.

    Attributes:
        statistic: number of pairs (one item from a lower level, one from a higher) in increasing order, ties ½.
        p: share of label assignments at least as extreme.
        smallest_p: the p that the most extreme assignment of these values would get; no data can go below it.
        n_assignments: number of distinct label assignments behind p (drawn ones for ``monte-carlo``).
        method: ``exact`` (all assignments counted) or ``monte-carlo``.
    """

    statistic: float
    p: float
    smallest_p: float
    n_assignments: int
    method: Literal["exact", "monte-carlo"]


def jonckheere_terpstra(
    values: Sequence[float] | np.ndarray,
    levels: Sequence[int] | np.ndarray,
    *,
    alternative: Trend = "increasing",
    n_monte_carlo: int = 99_999,
    seed: int = 0,
) -> TrendTest:
    """Test whether values rise with the level, exactly, over all assignments of the level labels to the values.

    The null distribution is counted by a recursion over the sorted values (ties as blocks), which gives the same
    numbers as listing every assignment (2,520 for 2, 3 and 5 items; 34,650 for 4, 4 and 4) without listing them. Only
    where the recursion would need too many states are ``n_monte_carlo`` assignments drawn instead; the result says so.

    The units are what is exchangeable under the null. Do not feed it test items when the claim is about tasks: items
    of one task share its peculiarities, and the test then finds differences that have no general reason.

    Args:
        values: one number per unit, shape (units,).
        levels: rank of each unit's level, shape (units,); only the order of the ranks counts.
        alternative: ``increasing``, ``decreasing`` or ``two-sided`` (twice the smaller tail, at most 1).
        n_monte_carlo: number of assignments drawn where exact counting is out of reach.
        seed: chooses those draws.

    Returns:
        The statistic with its p-value and the smallest p that could be reached.

    Raises:
        UsageError: shapes differ, or fewer than two distinct levels.
        NumericalError: a value is not finite.
    """
    x, ranks = np.asarray(values, dtype=np.float64), np.asarray(levels)
    if x.ndim != 1 or x.shape != ranks.shape:
        raise UsageError(f"Values and levels must be lists of equal length; got shapes {x.shape} and {ranks.shape}.")
    if not np.isfinite(x).all():
        raise NumericalError("The trend test got NaN or infinite values; leave those units out.")
    found, codes, counts = np.unique(ranks, return_inverse=True, return_counts=True)
    if len(found) < 2:
        raise UsageError(f"The trend test needs at least two levels; got {len(found)}.")
    doubled = _doubled_statistic(x, codes)
    sizes = tuple(int(c) for c in counts)
    ties = tuple(int(c) for c in np.unique(x, return_counts=True)[1])
    if math.prod(n + 1 for n in sizes) <= _MAX_STATES:
        null = _null_distribution(sizes, ties)
        upper, lower = null[doubled:].sum(), null[: doubled + 1].sum()
        reachable = np.flatnonzero(null)
        best_upper, best_lower = null[reachable[-1]], null[reachable[0]]
        n_assignments, method = _multinomial(sizes), "exact"
    else:
        random = generator(seed, "trend test")
        drawn = np.array([_doubled_statistic(x, random.permutation(codes)) for _ in range(n_monte_carlo)])
        upper = (1 + (drawn >= doubled).sum()) / (1 + n_monte_carlo)
        lower = (1 + (drawn <= doubled).sum()) / (1 + n_monte_carlo)
        best_upper = best_lower = 1 / (1 + n_monte_carlo)
        n_assignments, method = n_monte_carlo, "monte-carlo"
    if alternative == "increasing":
        p, smallest = upper, best_upper
    elif alternative == "decreasing":
        p, smallest = lower, best_lower
    else:
        p, smallest = 2 * min(upper, lower), 2 * min(best_upper, best_lower)
    return TrendTest(doubled / 2, min(1.0, float(p)), min(1.0, float(smallest)), n_assignments, method)  # type: ignore[arg-type]


def trend_power(
    counts: Sequence[int], *, step: float, sd: float, alpha: float = 0.05, n_simulations: int = 2000, seed: int = 0
) -> float:
    """Simulated power of the one-sided (increasing) trend test.

    Args:
        counts: number of units per level, lowest level first.
        step: difference between the means of successive levels.
        sd: standard deviation of units within a level, in the same unit; values are normal.
        alpha: level of the test.
        n_simulations: number of simulated data sets; the result's standard error is at most 0.5 / sqrt of it.
        seed: chooses them.

    Returns:
        The share of data sets with p at or below ``alpha``; 0 if no data could reach it.
    """
    codes = np.repeat(np.arange(len(counts)), counts)
    random = generator(seed, "trend power")
    values = step * codes + sd * random.standard_normal((n_simulations, len(codes)))
    return float((trend_p_values(values, counts, seed=seed) <= alpha + 1e-12).mean())


def trend_p_values(
    values: np.ndarray, counts: Sequence[int], *, n_monte_carlo: int = 9_999, seed: int = 0
) -> np.ndarray:
    """One-sided (increasing) p of the trend test for many data sets at once, none of which has equal values.

    The same numbers as :func:`jonckheere_terpstra` gives one by one; where the null distribution cannot be counted, it
    is drawn once for all of them.

    Args:
        values: shape (data sets, units); units of the lowest level first. Of equal values none counts as larger.
        counts: number of units per level, lowest level first.
        n_monte_carlo: draws of the null distribution where it cannot be counted.
        seed: chooses them.

    Returns:
        Shape (data sets,).
    """
    sizes = tuple(int(c) for c in counts)
    codes = np.repeat(np.arange(len(sizes)), sizes)

    def doubled(x: np.ndarray) -> np.ndarray:
        found = np.zeros(len(x), dtype=np.int64)
        for i in range(len(codes)):  # by unit, so that memory stays at data sets × units
            found += 2 * (x[:, codes > codes[i]] > x[:, i, None]).sum(axis=1)
        return found

    if math.prod(n + 1 for n in sizes) <= _MAX_STATES:
        tail = np.cumsum(_null_distribution(sizes, (1,) * len(codes))[::-1])[::-1]
    else:
        null = np.bincount(doubled(generator(seed, "trend null").random((n_monte_carlo, len(codes)))))
        tail = np.append((1 + np.cumsum(null[::-1])[::-1]) / (1 + n_monte_carlo), 1 / (1 + n_monte_carlo))
    return tail[np.minimum(doubled(values), len(tail) - 1)]


def _doubled_statistic(x: np.ndarray, codes: np.ndarray) -> int:
    """Twice the statistic, so that ties (one half each) stay integers."""
    lower_level = codes[:, None] < codes[None, :]
    return int((lower_level * (np.sign(x[None, :] - x[:, None]) + 1)).sum())


def _multinomial(parts: Sequence[int]) -> int:
    total, ways = 0, 1
    for part in parts:
        total += part
        ways *= math.comb(total, part)
    return ways


def _splits(block: int, room: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All ways to give ``block`` equal values to levels with ``room`` places left."""
    if len(room) == 1:
        if block <= room[0]:
            yield (block,)
        return
    for first in range(min(block, room[0]) + 1):
        for rest in _splits(block - first, room[1:]):
            yield (first, *rest)


@lru_cache(maxsize=256)
def _null_distribution(sizes: tuple[int, ...], ties: tuple[int, ...]) -> np.ndarray:
    """Probability of each doubled statistic 0, 1, … over all label assignments.

    Sorted values are placed block by block; a state is how many units each level has received. Placing ``a`` units
    in the levels adds, for each, the units already placed in lower levels (pairs in increasing order), plus one half
    for each pair within the block.
    """
    top = 2 * sum(sizes[i] * sizes[j] for i in range(len(sizes)) for j in range(i))
    states = {(0,) * len(sizes): (0, np.ones(1))}
    for block in ties:
        grown: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(top + 1))
        for placed, (start, ways) in states.items():
            room = tuple(n - k for n, k in zip(sizes, placed, strict=True))
            for taken in _splits(block, room):
                gain, below, within = 0, 0, 0
                for before, now in zip(placed, taken, strict=True):
                    gain += 2 * below * now + within * now
                    below, within = below + before, within + now
                target = grown[tuple(k + a for k, a in zip(placed, taken, strict=True))]
                target[start + gain : start + gain + len(ways)] += _multinomial(taken) * ways
        states = {}
        for placed, full in grown.items():
            used = np.flatnonzero(full)
            states[placed] = (int(used[0]), full[used[0] : used[-1] + 1])
        # a common factor per step keeps the counts of large designs within floating range
        largest = max(ways.max() for _, ways in states.values())
        states = {placed: (start, ways / largest) for placed, (start, ways) in states.items()}
    ((start, ways),) = states.values()
    null = np.zeros(top + 1)
    null[start : start + len(ways)] = ways / ways.sum()
    null.setflags(write=False)
    return null
