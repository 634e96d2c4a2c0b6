"""What a localization test could find with so many tasks: smallest reachable p and power, before any score is seen.

Every power is the share of simulated worlds in which the rules of :mod:`analysis.conditions` and
:func:`analysis.verdicts.decide` give that outcome. Depths of a type's tasks are normal around its own depth. Of the
effect on a type's tasks, ``gap`` falls in its own range on average and the rest evenly on all blocks, so that a range's
share is ``gap`` larger for its own tasks than for others where ranges do not overlap. Shares are positive and sum to 1:
they have a Dirichlet distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy import stats as scipy_stats

from analysis.conditions import assignments, smallest_p, window_sums
from analysis.hypothesis import Hypothesis
from spafit.runtime import generator
from spafit.trend import jonckheere_terpstra, trend_p_values

#: Simulated worlds behind each power of a plan: its standard error is .011 at most.
SIMULATIONS = 2000
#: Behind the power at an observed spread, which is computed anew for each verdict: .025 at most.
FEWER = 400
#: Differences and standard deviations that are printed: of depths in layers, and of shares of an effect.
LAYERS = ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0))
SHARES = ((0.2, 0.1), (0.2, 0.2), (0.4, 0.1), (0.4, 0.2))
#: Assignments of labels, and random sets of blocks, that stand for all of them in a simulation.
_ROWS = 500
#: Smallest sum of parameters of a Dirichlet distribution: below it nearly all of a task's effect is on one block.
_LEAST = 0.5
#: Largest array of a simulation, in numbers.
_MOST = 4_000_000


@dataclass(frozen=True)
class Plan:
    """What can be found.

    Attributes:
        counts: tasks of each type, in the hypothesis's order.
        smallest_p: the smallest p that each condition can reach, by its name, adjusted over pairs where it will be;
            conditions that cannot be tested are missing.
        power: rows of condition, difference, sd, unit (``layers``, or ``share`` of an intervention's effect), power:
            the probability that the condition holds if successive types (L1) or any two types (L2, L3) differ by
            ``difference`` and tasks of one type scatter by ``sd``. The condition ``supported`` is the verdict: L1, L2
            and L3, as far as they will be tested, all hold in one world and none is refuted. Where all are tested,
            its rows have the difference of shares and their scatter as ``share`` and ``share_sd`` beside those of
            depths; L1 is then taken to be independent of the others. L4 does not enter.
    """

    counts: tuple[int, ...]
    smallest_p: dict[str, float]
    power: tuple[dict[str, float | str], ...]

    def lines(self, claim: Hypothesis) -> list[str]:
        """The plan in words, one line per condition and one for the verdict."""
        tasks = ", ".join(f"{n} {t}" for n, t in zip(self.counts, claim.levels, strict=True))
        found = [f"Tasks: {tasks}. Tests with tasks as units, alpha = {claim.alpha:g}."]
        if not self.smallest_p:
            found.append(f"No condition can be tested: {claim.min_tasks} tasks of each type are needed.")
            return found
        for name, smallest in self.smallest_p.items():
            short = "" if smallest <= claim.alpha else f"; above {claim.alpha:g}, so it cannot hold: add tasks"
            said = self._powers(name)
            found.append(f"{name}: smallest reachable p {smallest:.2g}{short}. Power at a difference of {said}.")
        names = list(self.smallest_p)
        which = f"{names[0]} holds" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} all hold"
        found.append(
            f"Verdict supported ({which}, nothing refuted; L4 aside): power at a difference of "
            f"{self._powers('supported')}."
        )
        return found

    def _powers(self, condition: str) -> str:
        said = []
        for r in self.power:
            if r["condition"] == condition:
                unit = "layers" if r["unit"] == "layers" else "of the effect"
                shares = f" with {r['share']:g} of the effect, sd {r['share_sd']:g}" if "share" in r else ""
                said.append(f"{r['difference']:g} {unit}, sd {r['sd']:g}{shares}: {r['power']:.2f}")
        return "; ".join(said)


@dataclass(frozen=True)
class Outcomes:
    """What a condition gives in each simulated world.

    Attributes:
        holds: shape (worlds,).
        p_refuted: of "the difference is at least the margin", as the condition states it, shape (worlds,).
    """

    holds: np.ndarray
    p_refuted: np.ndarray


def plan(
    claim: Hypothesis, counts: Sequence[int], num_blocks: int, *, interventions: bool, depths: bool = True
) -> Plan:
    """Power and smallest p from the numbers of tasks alone.

    Args:
        claim: the hypothesis.
        counts: tasks of each type.
        num_blocks: depth of the model.
        interventions: whether L2 and L3 will be tested.
        depths: whether L1 will be.
    """
    smallest: dict[str, float] = {}
    rows: list[dict[str, float | str]] = []
    if min(counts) < claim.min_tasks:
        return Plan(tuple(counts), {}, ())
    orders: list[tuple[dict[str, float | str], Outcomes]] = []
    shared: list[tuple[dict[str, float | str], tuple[Outcomes, Outcomes]]] = []
    if depths:
        ranks = np.repeat(np.arange(len(counts)), counts)
        smallest["L1"] = jonckheere_terpstra(np.arange(len(ranks)), ranks).smallest_p
        for step, sd in LAYERS:
            found = order_outcomes(counts, step=step, sd=sd, num_blocks=num_blocks, claim=claim)
            orders.append(({"difference": step, "sd": sd, "unit": "layers"}, found))
            rows.append({"condition": "L1", **orders[-1][0], "power": float(found.holds.mean())})
    tested = tuple(n // 2 for n in counts) if claim.held_out == "tasks" else tuple(counts)
    if interventions and min(tested) >= claim.min_tasks:
        total, pairs = sum(tested), list(combinations(tested, 2))
        smallest["L2"] = max(smallest_p(total, n) for n in tested)
        adjusted = sorted(smallest_p(a + b, a) for a, b in pairs)
        smallest["L3"] = min(1.0, max(p * (len(pairs) - i) for i, p in enumerate(adjusted)))
        ranges = claim.ranges(num_blocks) or _spread_ranges(len(counts), num_blocks)
        for gap, sd in SHARES:
            both = _planned(tested, ranges, num_blocks, gap, sd, claim.alpha, claim.delta)
            shared.append(({"difference": gap, "sd": sd, "unit": "share"}, both))
            rows += [{"condition": n, **shared[-1][0], "power": float(o.holds.mean())}
                     for n, o in zip(("L2", "L3"), both, strict=True)]  # fmt: skip
    rows.sort(key=lambda r: str(r["condition"]))
    if orders and shared:
        for (own, order), (other, both) in zip(orders, shared, strict=True):
            sizes = {**own, "share": other["difference"], "share_sd": other["sd"]}
            rows.append({"condition": "supported", **sizes, "power": supported_power((order, *both), claim.alpha)})
    else:
        alone: list[tuple[dict[str, float | str], tuple[Outcomes, ...]]] = [(own, (order,)) for own, order in orders]
        for sizes, conditions in [*alone, *shared]:
            rows.append({"condition": "supported", **sizes, "power": supported_power(conditions, claim.alpha)})
    return Plan(tuple(counts), smallest, tuple(rows))


def supported_power(conditions: Sequence[Outcomes], alpha: float) -> float:
    """Share of worlds in which every condition holds and none is refuted, adjusted over them by Holm."""
    holds = np.logical_and.reduce([o.holds for o in conditions])
    refuted = len(conditions) * np.minimum.reduce([o.p_refuted for o in conditions]) <= alpha
    return float((holds & ~refuted).mean())


def order_outcomes(
    counts: Sequence[int],
    *,
    step: float,
    sd: float,
    num_blocks: float,
    claim: Hypothesis,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> Outcomes:
    """L1 in simulated worlds.

    Args:
        counts: tasks of each type.
        step: difference between the depths of successive types, in layers.
        sd: standard deviation of depths within a type, in layers.
        num_blocks: depth of the model: the margin is a share of it.
        claim: level and margin.
        simulations: number of simulated worlds.
        seed: chooses them.
    """
    ranks = np.repeat(np.arange(len(counts)), counts)
    random = generator(seed, "order power")
    depths = step * ranks + sd * random.standard_normal((simulations, len(ranks)))
    groups = [depths[:, ranks == r] for r in range(len(counts))]
    apart, p = _bounds(groups, claim.delta * num_blocks)
    return Outcomes((trend_p_values(depths, counts) <= claim.alpha) & (apart > 0), p)


def simulated_shares(
    counts: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    num_blocks: int,
    *,
    gap: float,
    sd: float,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> np.ndarray:
    """Shares of an effect by block in simulated worlds, shape (worlds, tasks, blocks).

    Args:
        counts: tasks of each type.
        ranges: of each type, in blocks.
        num_blocks: depth of the model.
        gap: how much of the effect falls in a type's own range beside what falls evenly on all blocks.
        sd: standard deviation over tasks of one type of the share in a range, root mean square of tasks whose own it is
            and of others; more than such shares can have is held at its largest.
        simulations: number of simulated worlds.
        seed: chooses them.
    """
    ranks, at = np.repeat(np.arange(len(counts)), counts), np.arange(num_blocks)
    own = np.array([(at >= start) & (at < stop) for start, stop in ranges])
    length = own.sum(axis=1, keepdims=True)
    mean = (1 - gap) / num_blocks + gap * own / length
    low = (1 - gap) * length / num_blocks
    variance = ((low + gap) * (1 - low - gap) + low * (1 - low)) / 2
    whole = np.maximum(variance / max(sd, 1e-6) ** 2 - 1, _LEAST)  # of a Dirichlet distribution with that spread
    harm = generator(seed, "share power").gamma((whole * mean)[ranks], size=(simulations, len(ranks), num_blocks))
    return harm / harm.sum(axis=-1, keepdims=True)


def share_outcomes(
    shares: np.ndarray, counts: Sequence[int], ranges: Sequence[tuple[int, int]], *, alpha: float, delta: float
) -> tuple[Outcomes, Outcomes]:
    """L2 and L3 in the same simulated worlds.

    Where a condition has more than 500 assignments of labels or sets of blocks, as many random ones stand for them.

    Args:
        shares: from :func:`simulated_shares`.
        counts: tasks of each type.
        ranges: of each type, in blocks.
        alpha: level.
        delta: margin of shares and, as a fraction of the depth, of ranges that count as the same.
    """
    n, ranks = len(counts), np.repeat(np.arange(len(counts)), counts)
    in_ranges = np.stack([shares[..., a:b].sum(axis=-1) for a, b in ranges], axis=-1)
    excluded = np.ones(len(shares))
    holds = np.ones(len(shares), dtype=bool)
    for k, claimed in enumerate(ranges):
        own = ranks == k
        groups = [in_ranges[:, ~own, k], in_ranges[:, own, k]]
        excluded = np.minimum(excluded, _bounds(groups, delta)[1])
        left = np.flatnonzero(holds)
        holds[left] = _range_holds(shares[left], own, claimed, alpha=alpha, delta=delta)
    two = Outcomes(holds, np.minimum(1.0, n * excluded))
    pairs = list(combinations(range(n), 2))
    excluded = np.ones(len(shares))
    for i, j in pairs:
        for own_type, other in ((i, j), (j, i)):
            groups = [in_ranges[:, ranks == other, own_type], in_ranges[:, ranks == own_type, own_type]]
            excluded = np.minimum(excluded, 2 * _bounds(groups, delta)[1])
    three = Outcomes(_dissociated(in_ranges, ranks, alpha=alpha), np.minimum(1.0, len(pairs) * excluded))
    return two, three


def share_powers(
    counts: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    num_blocks: int,
    *,
    gap: float,
    sd: float,
    alpha: float = 0.05,
    delta: float = 0.1,
    simulations: int = FEWER,
    seed: int = 0,
) -> tuple[float, float]:
    """Probability that L2 holds for every type, and that L3 holds for every pair.

    Args:
        counts: tasks of each type.
        ranges: of each type, in blocks.
        num_blocks: depth of the model.
        gap: as in :func:`simulated_shares`.
        sd: as there.
        alpha: level.
        delta: ranges that begin no further away, as a fraction of the depth, may have as large a share.
        simulations: number of simulated worlds.
        seed: chooses them.
    """
    shares = simulated_shares(counts, ranges, num_blocks, gap=gap, sd=sd, simulations=simulations, seed=seed)
    two, three = share_outcomes(shares, counts, ranges, alpha=alpha, delta=delta)
    return float(two.holds.mean()), float(three.holds.mean())


@lru_cache(maxsize=64)
def _planned(
    counts: tuple[int, ...], ranges: tuple[tuple[int, int], ...], num_blocks: int, gap: float, sd: float,
    alpha: float, delta: float,
) -> tuple[Outcomes, Outcomes]:  # fmt: skip
    """L2 and L3 of a plan: several runs have the same numbers of tasks."""
    shares = simulated_shares(counts, ranges, num_blocks, gap=gap, sd=sd)
    return share_outcomes(shares, counts, ranges, alpha=alpha, delta=delta)


def _spread_ranges(n: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """Ranges of 1/n of the depth, evenly placed: where none are claimed."""
    length = max(1, math.floor(num_blocks / n + 0.5))
    starts = [round(i * (num_blocks - length) / (n - 1)) for i in range(n)]
    return tuple((s, s + length) for s in starts)


def _bounds(groups: Sequence[np.ndarray], margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the last group minus that of the first in each world, and p of "at least the margin", spread pooled."""
    first, second = groups[0], groups[-1]
    squares = sum(((g - g.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) for g in groups)
    freedom = sum(g.shape[1] for g in groups) - len(groups)
    error = np.sqrt(squares / freedom * (1 / first.shape[1] + 1 / second.shape[1]))
    apart = second.mean(axis=1) - first.mean(axis=1)
    return apart, scipy_stats.t.cdf((apart - margin) / error, freedom)


def _some(rows: np.ndarray) -> np.ndarray:
    """The rows, or :data:`_ROWS` random ones."""
    if len(rows) <= _ROWS:
        return rows
    return rows[generator(0, "some assignments", *rows.shape).choice(len(rows), _ROWS, replace=False)]


def _range_holds(
    shares: np.ndarray, own: np.ndarray, claimed: tuple[int, int], *, alpha: float, delta: float
) -> np.ndarray:
    """L2 of one type in each world, as :func:`analysis.conditions.range_test` tests it; shape (worlds,)."""
    start, length, depth = claimed[0], claimed[1] - claimed[0], shares.shape[2]
    sums = window_sums(shares.reshape(-1, depth), length).reshape(*shares.shape[:2], depth - length + 1)
    means, profile = sums[:, own].mean(axis=1), shares[:, own].mean(axis=1)
    far = np.abs(np.arange(means.shape[1]) - start) > delta * depth
    holds = (means[:, far] < means[:, start, None]).all(axis=1)
    every = assignments(depth, length)
    sets = _some(every)
    others = len(sets) - (len(sets) == len(every))  # the range itself is one of them
    beaten = (profile @ sets.T < means[:, start, None] - 1e-12).sum(axis=1)
    holds &= beaten >= max(1, (1 - alpha) * others)
    n, k = len(own), int(own.sum())
    rows = _some(assignments(n, k))
    weights = np.where(rows, 1 / k, -1 / (n - k))
    left = np.flatnonzero(holds)
    step = max(1, _MOST // (len(rows) * sums.shape[2]))
    for part in (left[i : i + step] for i in range(0, len(left), step)):
        values = sums[part]
        # the spread over all assignments is known: that of a sample without replacement
        errors = np.sqrt(values.var(axis=1, ddof=1) * n / (k * (n - k)))
        seen = (values[:, own].mean(axis=1) - values[:, ~own].mean(axis=1)) / errors
        drawn = np.tensordot(values, weights, axes=(1, 1)) / errors[:, :, None]  # worlds, ranges, assignments
        order = np.argsort(-seen, axis=1)
        drawn = np.take_along_axis(drawn, order[:, :, None], axis=1)
        successive = np.maximum.accumulate(drawn[:, ::-1], axis=1)[:, ::-1]
        p = (successive >= np.take_along_axis(seen, order, axis=1)[:, :, None] - 1e-9).mean(axis=2)
        rank = (order == start).argmax(axis=1)
        holds[part] = np.maximum.accumulate(p, axis=1)[np.arange(len(part)), rank] <= alpha + 1e-12
    return holds


def _dissociated(in_ranges: np.ndarray, ranks: np.ndarray, *, alpha: float) -> np.ndarray:
    """L3 of all pairs in each world; ``in_ranges`` has shape (worlds, tasks, types)."""
    p = []
    for i, j in combinations(range(in_ranges.shape[2]), 2):
        directions = []
        for own, other in ((i, j), (j, i)):
            both = np.concatenate([in_ranges[:, ranks == own, own], in_ranges[:, ranks == other, own]], axis=1)
            directions.append(_p_values(both, int((ranks == own).sum())))
        p.append(np.maximum(*directions))
    ordered = np.sort(np.array(p), axis=0)
    factors = np.arange(len(ordered), 0, -1)[:, None]
    return (factors * ordered).max(axis=0) <= alpha + 1e-12


def _p_values(values: np.ndarray, k: int) -> np.ndarray:
    """One-sided p of the first ``k`` tasks against the others, of each row; shape (rows,)."""
    n = values.shape[1]
    rows = assignments(n, k)
    weights = np.where(rows, 1 / k, -1 / (n - k))
    seen = values[:, :k].mean(axis=1) - values[:, k:].mean(axis=1)
    found = [
        (values[i : i + 64] @ weights.T >= seen[i : i + 64, None] - 1e-12).mean(axis=1)
        for i in range(0, len(values), 64)
    ]
    return np.concatenate(found)
