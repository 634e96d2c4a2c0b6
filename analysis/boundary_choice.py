"""Which boundaries: every placement of the strata, by gain, forgetting and parameters, with a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from analysis.block_evidence import BlockEvidence
from spafit.errors import UsageError, did_you_mean
from spafit.stats import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_STRATA = 5


@dataclass(frozen=True)
class BoundaryChoice:
    """All placements of the strata, and the one that is suggested.

    Attributes:
        evidence: the arrays behind it.
        strata: methods from the first block up, such as ``("freeze", "bitfit", "lora+bitfit:64")``.
        table: one row per placement: ``s1`` … (first blocks of the second and further strata), parameters, gain (share
            of training all blocks by the last method) and forgetting, each with ci_low and ci_high; feasible (by the
            estimates), p_feasible and p_optimal (shares of draws), regret (mean gain short of the draw's best),
            in_region (gain within one paired standard error of the best one), pareto.
        chosen: position in the table of the placement with the fewest parameters in the region.
        best: position of the feasible placement with the largest gain.
        budget: most parameters, or None.
        tolerance: most forgetting, or None.
        null: gain of the choice less what strata of the same sizes gain on average over all places in the depth: mean,
            ci_low, ci_high; chosen on one half of the batches and measured on the other. Where it is not above 0 the
            depth at which a method stands makes no difference, and there are no strata in the evidence.
    """

    evidence: BlockEvidence = field(repr=False)
    strata: tuple[str, ...]
    table: pd.DataFrame = field(repr=False)
    chosen: int
    best: int
    budget: int | None
    tolerance: float | None
    null: tuple[float, float, float]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """First blocks of the second and further strata."""
        return self.at(self.chosen)

    def at(self, position: int) -> tuple[int, ...]:
        """Boundaries of a row of the table."""
        return tuple(int(self.table[f"s{i + 1}"].iloc[position]) for i in range(len(self.strata) - 1))

    @property
    def beats_null(self) -> bool:
        """Whether the place of the strata gains more than strata of the same sizes anywhere, by more than noise."""
        return self.null[1] > 0

    def probabilities(self) -> np.ndarray:
        """Share of draws whose best placement has each boundary at each block, shape (boundaries, L + 1)."""
        found = np.zeros((len(self.strata) - 1, self.evidence.num_blocks + 1))
        for i, own in enumerate(found):
            np.add.at(own, self.table[f"s{i + 1}"].to_numpy(), self.table["p_optimal"].to_numpy())
        return found

    def short_list(self, n: int = 4) -> list[tuple[int, ...]]:
        """The choice, then placements that are most often optimal, then those of least regret; ``n`` in all."""
        feasible = self.table[self.table["feasible"]]
        order = feasible.sort_values(["p_optimal", "regret", "parameters"], ascending=[False, True, True]).index
        found = dict.fromkeys([self.boundaries, *(self.at(int(i)) for i in order)])
        return list(found)[:n]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The triangle of all pairs (s1, s2) with the regret of each; only for three strata."""
        from analysis.boundary_displays import plot_triangle

        return plot_triangle(self, ax=ax)


def choose_boundaries(
    evidence: BlockEvidence,
    *,
    strata: Sequence[str] = (),
    budget: int | None = None,
    tolerance: float | None = None,
) -> BoundaryChoice:
    """Enumerate every placement and choose: most gain within the limits, ties to fewer parameters.

    All 0 ≤ s1 ≤ s2 ≤ … ≤ L are enumerated, empty strata included. Gain adds up over blocks; forgetting adds up over
    strata: with F(s) what is forgotten when blocks from s on keep what the method keeps, a stratum [a, b) adds
    F(a) - F(b). The region holds the feasible placements whose gain is short of the best one's by no more than one
    standard error of the paired difference; the one with the fewest parameters is chosen (of equal ones the one with
    more gain).

    Do not take gain for score: squared gradients at the start say which blocks would move first.

    Args:
        evidence: see :class:`BlockEvidence`.
        strata: two to five methods from the first block up; ``freeze`` and the evidence's methods. By default freeze
            and then all methods in the evidence's order.
        budget: most trainable parameters, those outside the blocks included.
        tolerance: most forgetting, in the evidence's unit.

    Raises:
        UsageError: an unknown method, fewer than two or more than five strata, or limits that no placement keeps
            (says the smallest that one does).
    """
    names = tuple(strata) or ("freeze", *evidence.methods)
    _check(names, evidence, budget, tolerance)
    cuts = np.array(list(combinations_with_replacement(range(evidence.num_blocks + 1), len(names) - 1)))
    parameters, gain, lost = _totals(evidence, names, cuts)
    gains, losses = _drawn(evidence, names, cuts)
    size = np.round(parameters + evidence.outside).astype(np.int64)
    affordable = np.ones(len(cuts), dtype=bool) if budget is None else size <= budget
    tolerable = np.ones(len(cuts), dtype=bool) if tolerance is None else lost <= tolerance + 1e-12
    feasible = affordable & tolerable
    if not feasible.any():
        raise _infeasible(size, lost, affordable, budget, tolerance, evidence)
    kept = affordable & (np.ones_like(losses, dtype=bool) if tolerance is None else losses <= tolerance + 1e-12)
    # A draw in which nothing is tolerable takes what forgets least of what is affordable.
    least = np.where(affordable, losses, np.inf)
    usable = np.where(kept.any(1, keepdims=True), kept, least == least.min(1, keepdims=True))
    masked = np.where(usable, gains, -np.inf)
    order = np.lexsort((-gain, size))  # of equal gains the smaller plan is the best one
    winner = order[masked[:, order].argmax(1)]
    top = masked[np.arange(len(masked)), winner]
    best = int(order[np.where(feasible, gain, -np.inf)[order].argmax()])
    short, spread = gain[best] - gain, (gains[:, [best]] - gains).std(axis=0, ddof=1)
    region = feasible & (short <= spread + 1e-12)
    chosen = int(order[np.flatnonzero(region[order])[0]])
    ends = {"gain": interval(gains), "forgetting": interval(losses)}
    table = pd.DataFrame({f"s{i + 1}": cuts[:, i] for i in range(cuts.shape[1])})
    table["parameters"] = size
    for name, point in (("gain", gain), ("forgetting", lost)):
        table[name], table[f"{name}_low"], table[f"{name}_high"] = point, ends[name][0], ends[name][1]
    table["feasible"], table["p_feasible"] = feasible, kept.mean(0)
    table["p_optimal"] = np.bincount(winner, minlength=len(cuts)) / len(winner)
    table["regret"] = (top[:, None] - gains).mean(0)
    table["in_region"], table["pareto"] = region, _pareto(gain, lost, size)
    null = _against_anywhere(evidence, names, cuts, feasible)
    return BoundaryChoice(evidence, names, table, chosen, best, budget, tolerance, null)


def _check(names: Sequence[str], evidence: BlockEvidence, budget: int | None, tolerance: float | None) -> None:
    if not 2 <= len(names) <= MAX_STRATA:
        raise UsageError(f"{len(names)} strata are named; from two to {MAX_STRATA} can be placed.")
    for name in names:
        if name != "freeze" and name not in evidence.methods:
            raise UsageError(
                f"The pilot did not measure {name!r}. Strata: freeze, {', '.join(evidence.methods)}."
                f"{did_you_mean(name, evidence.methods)}"
            )
    if budget is not None and budget < 0:
        raise UsageError(f"The budget is {budget} parameters; it must not be negative.")
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"The tolerance is {tolerance} {evidence.unit}; it must not be negative.")


def _stops(cuts: np.ndarray, num_blocks: int) -> np.ndarray:
    """Starts and the end of every stratum, shape (placements, strata + 1)."""
    zero = np.zeros((len(cuts), 1), dtype=np.int64)
    return np.concatenate([zero, cuts, zero + num_blocks], axis=1)


def _along(values: np.ndarray, evidence: BlockEvidence, names: Sequence[str], cuts: np.ndarray) -> np.ndarray:
    """Sum over blocks of each one's value under its stratum's method; values (…, M, L) to (…, placements)."""
    ends = _stops(cuts, evidence.num_blocks)
    start = np.zeros((*values.shape[:-1], 1))
    summed = np.concatenate([start, values.cumsum(axis=-1)], axis=-1)
    total = np.zeros((*values.shape[:-2], len(cuts)))
    for i, name in enumerate(names):
        if name != "freeze":
            own = summed[..., evidence.methods.index(name), :]
            total += own[..., ends[:, i + 1]] - own[..., ends[:, i]]
    return total


def _lost(values: np.ndarray, evidence: BlockEvidence, names: Sequence[str], cuts: np.ndarray) -> np.ndarray:
    """Forgetting of every placement from (…, K, L + 1)."""
    ends = _stops(cuts, evidence.num_blocks)
    total = np.zeros((*values.shape[:-2], len(cuts)))
    for i, name in enumerate(names):
        if name != "freeze":
            own = values[..., evidence.kept_by(name), :]
            total += own[..., ends[:, i]] - own[..., ends[:, i + 1]]
    return total


def _totals(
    evidence: BlockEvidence, names: Sequence[str], cuts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        _along(evidence.parameters, evidence, names, cuts), _along(evidence.gain, evidence, names, cuts),
        _lost(evidence.forgetting, evidence, names, cuts),
    )  # fmt: skip


def _drawn(evidence: BlockEvidence, names: Sequence[str], cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (
        _along(evidence.gain_draws, evidence, names, cuts), _lost(evidence.forgetting_draws, evidence, names, cuts),
    )  # fmt: skip


def _pareto(gain: np.ndarray, lost: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Placements that no other one beats: at least as good in gain, forgetting and parameters, and better in one."""
    values = np.stack([-gain, lost, size.astype(float)], axis=1)
    front: list[int] = []
    # Whatever beats a placement comes before it in this order, and is on the front or beaten by one that is.
    for i in np.lexsort(values.T[::-1]).tolist():
        known = values[front]
        if not ((known <= values[i]).all(1) & (known < values[i]).any(1)).any():
            front.append(i)
    return np.isin(np.arange(len(values)), front)


def _against_anywhere(
    evidence: BlockEvidence, names: Sequence[str], cuts: np.ndarray, feasible: np.ndarray
) -> tuple[float, float, float]:
    """Gain beyond strata of the same sizes at random places, chosen on half of the batches, measured on the others."""
    units = evidence.gain_units
    ends = _stops(cuts, evidence.num_blocks)
    half = np.arange(len(units)) % 2 == 0
    found = []
    for own in (half, ~half):
        here, there = (_along(units[h], evidence, names, cuts) for h in (own, ~own))
        best = int(np.where(feasible, here.mean(0), -np.inf).argmax())
        anywhere = np.zeros(len(there))
        for i, name in enumerate(names):
            if name != "freeze":
                mean = units[~own][:, evidence.methods.index(name)].mean(-1)
                anywhere += (ends[best, i + 1] - ends[best, i]) * mean
        found.append(there[:, best] - anywhere)
    both = np.concatenate(found)
    half_width = stats.t.ppf(0.975, len(both) - 1) * both.std(ddof=1) / np.sqrt(len(both))
    return float(both.mean()), float(both.mean() - half_width), float(both.mean() + half_width)


def _infeasible(
    size: np.ndarray, lost: np.ndarray, affordable: np.ndarray, budget: int | None, tolerance: float | None,
    evidence: BlockEvidence,
) -> UsageError:  # fmt: skip
    if not affordable.any():
        return UsageError(
            f"A budget of {budget:,} parameters is less than the smallest plan trains: {int(size.min()):,} (the head "
            f"and what goes with it outside the blocks are {evidence.outside:,}). Give at least that."
        )
    least = float(lost[affordable].min())
    within = "" if budget is None else f" within {budget:,} parameters"
    return UsageError(
        f"No placement{within} forgets at most {tolerance:g} {evidence.unit}; the least is {least:.4g}. Raise the "
        "tolerance or the budget."
    )
