"""What a localization test could find with so many tasks: smallest reachable p and power, before any score is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis.conditions import assignments, smallest_p
from analysis.hypothesis import Hypothesis
from spafit.runtime import generator
from spafit.trend import jonckheere_terpstra, trend_power

#: Simulated data sets behind each power.
SIMULATIONS = 400
#: Largest array of a simulation, in numbers.
_MOST = 10_000_000


@dataclass(frozen=True)
class Plan:
    """What can be found.

    Attributes:
        counts: tasks of each type, in the hypothesis's order.
        smallest_p: the smallest p that each condition can reach, by its name, adjusted over pairs where it will be;
            conditions that cannot be tested are missing.
        power: rows of condition, difference, sd, unit (``layers``, or ``share`` of an intervention's effect), power:
            the probability that the condition holds if successive types (L1) or any two types (L2, L3) differ by
            ``difference`` and tasks of one type scatter by ``sd``.
    """

    counts: tuple[int, ...]
    smallest_p: dict[str, float]
    power: tuple[dict[str, float | str], ...]

    def lines(self, claim: Hypothesis) -> list[str]:
        """The plan in words, one line per condition."""
        tasks = ", ".join(f"{n} {t}" for n, t in zip(self.counts, claim.levels, strict=True))
        found = [f"Tasks: {tasks}. Tests with tasks as units, alpha = {claim.alpha:g}."]
        if not self.smallest_p:
            found.append(f"No condition can be tested: {claim.min_tasks} tasks of each type are needed.")
        for name, smallest in self.smallest_p.items():
            rows = [r for r in self.power if r["condition"] == name]
            said = "; ".join(
                f"{r['difference']:g} {'layers' if r['unit'] == 'layers' else 'of the effect'}, sd {r['sd']:g}: "
                f"{r['power']:.2f}" for r in rows
            )  # fmt: skip
            short = "" if smallest <= claim.alpha else f"; above {claim.alpha:g}, so it cannot hold: add tasks"
            found.append(f"{name}: smallest reachable p {smallest:.2g}{short}. Power at a difference of {said}.")
        return found


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
    power: list[dict[str, float | str]] = []
    if min(counts) < claim.min_tasks:
        return Plan(tuple(counts), {}, ())
    if depths:
        ranks = np.repeat(np.arange(len(counts)), counts)
        smallest["L1"] = jonckheere_terpstra(np.arange(len(ranks)), ranks).smallest_p
        power += [
            {"condition": "L1", "difference": step, "sd": sd, "unit": "layers",
             "power": trend_power(counts, step=step, sd=sd, alpha=claim.alpha)}
            for step in (1.0, 2.0) for sd in (1.0, 2.0)
        ]  # fmt: skip
    if interventions:
        tested = tuple(n // 2 for n in counts) if claim.held_out == "tasks" else tuple(counts)
        if min(tested) < claim.min_tasks:
            return Plan(tuple(counts), smallest, tuple(power))
        total, pairs = sum(tested), list(combinations(tested, 2))
        smallest["L2"] = max(smallest_p(total, n) for n in tested)
        adjusted = sorted(smallest_p(a + b, a) for a, b in pairs)
        smallest["L3"] = min(1.0, max(p * (len(pairs) - i) for i, p in enumerate(adjusted)))
        ranges = claim.ranges(num_blocks)
        length = max(1, math.floor(num_blocks / len(counts) + 0.5))
        spread = [round(i * (num_blocks - length) / (len(counts) - 1)) for i in range(len(counts))]
        chosen = ranges or tuple((s, s + length) for s in spread)
        for gap in (0.2, 0.4):
            for sd in (0.1, 0.2):
                own: dict[str, float | str] = {"difference": gap, "sd": sd, "unit": "share"}
                two = range_power(tested, chosen, num_blocks, gap=gap, sd=sd, alpha=claim.alpha, delta=claim.delta)
                three = dissociation_power(tested, gap=gap, sd=sd, alpha=claim.alpha)
                power += [{"condition": "L2", **own, "power": two}, {"condition": "L3", **own, "power": three}]
    order = sorted(power, key=lambda r: str(r["condition"]))
    return Plan(tuple(counts), smallest, tuple(order))


def dissociation_power(
    counts: Sequence[int], *, gap: float, sd: float, alpha: float = 0.05, simulations: int = SIMULATIONS, seed: int = 0
) -> float:
    """Probability that L3 holds for every pair: both directions significant, adjusted over pairs by Holm.

    Args:
        counts: tasks of each type.
        gap: how much more of the effect falls in a type's own range than in the same range for another type.
        sd: standard deviation of that share over tasks of one type; shares are normal and independent.
        alpha: level.
        simulations: number of simulated data sets.
        seed: chooses them.
    """
    n = len(counts)
    ranks = np.repeat(np.arange(n), counts)
    random = generator(seed, "dissociation power")
    shares = gap * (ranks[:, None] == np.arange(n)) + sd * random.standard_normal((simulations, len(ranks), n))
    p = []
    for i, j in combinations(range(n), 2):
        directions = []
        for own, other in ((i, j), (j, i)):
            both = np.concatenate([shares[:, ranks == own, own], shares[:, ranks == other, own]], axis=1)
            directions.append(_p_values(both, counts[own]))
        p.append(np.maximum(*directions))
    ordered = np.sort(np.array(p), axis=0)
    factors = np.arange(len(ordered), 0, -1)[:, None]
    return float(((factors * ordered).max(axis=0) <= alpha + 1e-12).mean())


def range_power(
    counts: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    num_blocks: int,
    *,
    gap: float,
    sd: float,
    alpha: float = 0.05,
    delta: float = 0.1,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> float:
    """Probability that L2 holds for every type, by single-step max-T over ranges, its random sets left out.

    Args:
        counts: tasks of each type.
        ranges: of each type, in blocks.
        num_blocks: depth of the model.
        gap: how much more of the effect falls in a type's own range than elsewhere in equal parts.
        sd: standard deviation over tasks of one type of the share in its range; noise of blocks is independent.
        alpha: level.
        delta: ranges that begin no further away, as a fraction of the depth, may have as large a share.
        simulations: number of simulated data sets.
        seed: chooses them.
    """
    ranks = np.repeat(np.arange(len(counts)), counts)
    random = generator(seed, "range power")
    truth = np.full((len(ranks), num_blocks), 1 / num_blocks)
    noise = np.empty(len(ranks))
    for k, (start, stop) in enumerate(ranges):
        inside = (np.arange(num_blocks) >= start) & (np.arange(num_blocks) < stop)
        truth[ranks == k] += np.where(inside, gap / (stop - start), -gap / max(1, num_blocks - (stop - start)))
        noise[ranks == k] = sd / math.sqrt(stop - start)
    blocks = truth + noise[:, None] * random.standard_normal((simulations, *truth.shape))
    holds = np.ones(simulations, dtype=bool)
    for k, (start, stop) in enumerate(ranges):
        total = np.concatenate([np.zeros((*blocks.shape[:2], 1)), np.cumsum(blocks, axis=2)], axis=2)
        sums = total[..., stop - start :] - total[..., : -(stop - start)]
        own = ranks == k
        means = sums[:, own].mean(axis=1)
        far = np.abs(np.arange(means.shape[1]) - start) > delta * num_blocks
        holds &= (means[:, far] < means[:, start, None]).all(axis=1)
        rows = assignments(len(own), int(own.sum()))
        weights = np.where(rows, 1 / own.sum(), -1 / (~own).sum())
        step = max(1, _MOST // (len(rows) * sums.shape[2]))
        for begin in range(0, simulations, step):
            part = sums[begin : begin + step]
            drawn = np.einsum("an,snw->saw", weights, part, optimize=True)
            seen = part[:, own].mean(axis=1) - part[:, ~own].mean(axis=1)
            errors = drawn.std(axis=1, ddof=1)
            errors = np.where(errors > 0, errors, np.inf)
            largest = (drawn / errors[:, None]).max(axis=2)
            p = (largest >= (seen / errors)[:, start, None] - 1e-9).mean(axis=1)
            holds[begin : begin + step] &= p <= alpha + 1e-12
    return float(holds.mean())


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
