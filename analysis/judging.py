"""From depths and shares of effects to conditions with their sentences, and to a verdict on each type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis.block_effects import BlockEffects, halves_of_tasks
from analysis.conditions import (
    DissociationTest,
    OrderTest,
    RangeTest,
    choose_ranges,
    dissociations,
    effect_shares,
    order_test,
    pooled_spread,
    range_test,
)
from analysis.hypothesis import Hypothesis
from analysis.power import share_powers
from analysis.verdicts import Condition, Outcome, TypeVerdict, Verdict, listed, p_text, percent
from spafit.stats import holm
from spafit.trend import trend_power

_BY = {
    "blocks": "Interventions on single blocks",
    "erasure": "Erasing a task's label, less erasing something else,",
    "training": "What each block adds to the loss through training (all blocks at once, so weak evidence)",
}
_NEEDS = {
    "L2": "whether intervening on a range of layers harms its own kind of knowledge more than on any other range of "
    "the same length needs interventions on the model.",
    "L3": "a double dissociation for every pair of types needs interventions on the model.",
}


@dataclass(frozen=True)
class Shares:
    """Shares of an intervention's effect, of the tasks that are tested.

    Attributes:
        tasks: names.
        ranks: rank of each task's type, shape (tasks,).
        shares: of each task and block, shape (tasks, blocks).
        ranges: the range of each type, in blocks.
        kind: kind of intervention.
        notes: how ranges were chosen, which tasks were left out.
    """

    tasks: tuple[str, ...]
    ranks: np.ndarray
    shares: np.ndarray
    ranges: tuple[tuple[int, int], ...]
    kind: str
    notes: str = ""


def prepare_shares(effects: BlockEffects, claim: Hypothesis) -> Shares | str:
    """Shares of the tasks to test and the ranges to test them on; or why that cannot be done.

    Where ranges are chosen, the tasks or items that they are chosen on are not among those returned.
    """
    types = [claim.type_of(t, level) for t, level in zip(effects.tasks, effects.levels, strict=True)]
    shares = effect_shares(effects.harm)
    usable = np.array([t is not None for t in types]) & np.isfinite(shares).all(axis=(0, 2))
    without = [n for n, t, u in zip(effects.tasks, types, usable, strict=True) if t is not None and not u]
    notes = f" Left out because nothing has an effect on them: {', '.join(without)}." if without else ""
    names = tuple(np.asarray(effects.tasks, dtype=object)[usable])
    ranks = np.array([claim.levels.index(t) for t, u in zip(types, usable, strict=True) if u], dtype=np.int64)
    shares = shares[:, usable]
    least = claim.min_tasks * (2 if claim.held_out == "tasks" else 1)
    counts = np.bincount(ranks, minlength=len(claim.types))
    if counts.min() < least:
        said = listed([f"{n or 'no'} {t}" for t, n in zip(claim.levels, counts, strict=True)])
        return f"it needs {least} tasks of each type with an effect, and there are {said} tasks."
    if claim.held_out == "none":
        ranges = claim.ranges(effects.num_blocks)
        if ranges is None:
            return "the hypothesis claims no range for every type. Add range, or held_out: tasks to choose ranges."
        return Shares(names, ranks, shares.mean(axis=0), ranges, effects.kind, notes)
    if claim.held_out == "items":
        if len(shares) < 2:
            return (
                "ranges are to be chosen on one half of the items, and effects were not measured on two halves (a "
                "column half). Use held_out: tasks."
            )
        ranges = choose_ranges(shares[0], ranks, len(claim.types))
        notes = f" Ranges chosen on the other half of the items.{notes}"
        return Shares(names, ranks, shares[1], ranges, effects.kind, notes)
    first = halves_of_tasks(names, ranks.tolist(), seed=claim.split_seed)
    mean = shares.mean(axis=0)
    ranges = choose_ranges(mean[first], ranks[first], len(claim.types))
    chosen_on = ", ".join(n for n, f in zip(names, first, strict=True) if f)
    notes = f" Ranges chosen on other tasks ({chosen_on}).{notes}"
    kept = tuple(n for n, f in zip(names, first, strict=True) if not f)
    return Shares(kept, ranks[~first], mean[~first], ranges, effects.kind, notes)


def judge_order(
    depths: Mapping[str, float],
    types: Mapping[str, str],
    claim: Hypothesis,
    *,
    num_blocks: float,
    left_out: Sequence[str] = (),
    pooled: bool = False,
) -> tuple[Condition, OrderTest | None]:
    """L1 with its sentence.

    Args:
        depths: of each usable task, in hidden indices, or as fractions of the depth where runs are pooled.
        types: type of each task.
        claim: the hypothesis.
        num_blocks: depth of the model; 1 where runs are pooled.
        left_out: tasks that cannot be dated.
        pooled: whether depths are means over runs.
    """
    without = f" Left out because they cannot be dated: {', '.join(left_out)}." if left_out else ""
    counts = [sum(types[t] == level for t in depths) for level in claim.levels]
    if not types:
        return Condition("L1", False, "The order was not tested: there are no layer curves."), None
    if min(counts) < claim.min_tasks:
        usable = listed([f"{n or 'no'} {level}" for level, n in zip(claim.levels, counts, strict=True)])
        sentence = (
            f"The order was not tested: it needs {claim.min_tasks} usable tasks of each level, and there are {usable} "
            f"tasks.{without}"
        )
        return Condition("L1", False, sentence), None
    values = np.array(list(depths.values()))
    ranks = np.array([claim.levels.index(types[t]) for t in depths])
    test = order_test(values, ranks, num_blocks=num_blocks, alpha=claim.alpha, delta=claim.delta)
    groups = [values[ranks == r] for r in range(len(claim.levels))]
    power = trend_power(counts, step=claim.delta * num_blocks, sd=test.spread, alpha=claim.alpha)
    found = test.difference
    holds = test.p <= claim.alpha and found.value > 0
    refuted = found.p_refuted <= claim.alpha
    unit = "as shares of the depth, means over runs" if pooled else f"in hidden states, of {num_blocks:g} blocks"
    digits = 2 if pooled else 1
    means = ", ".join(f"{level} {g.mean():.{digits}f}" for level, g in zip(claim.levels, groups, strict=True))
    layers = "" if pooled else f"{found.value * num_blocks:.1f} layers, "
    what = "emergence" if claim.statistic == "emergence_cog" else "best hidden state"
    where = unit.replace("in hidden states, ", "") if claim.statistic == "best" else unit
    words = (
        f"Mean {what} of {len(values)} tasks {where}: {means}. {claim.levels[-1].capitalize()} minus "
        f"{claim.levels[0]}: {layers}{percent(found.value)} % of the depth ({100 * (1 - 2 * claim.alpha):g} % interval "
        f"{percent(found.interval[0])} to {percent(found.interval[1])} %). Exact trend test over tasks: p = "
        f"{p_text(test.p)}, smallest reachable {p_text(test.smallest_p)}."
    )
    if holds and not refuted and (np.diff([g.mean() for g in groups]) < 0).any():
        words += " The levels between them are not all in the claimed order."
    if refuted:
        words += f" The difference is below the margin of {100 * claim.delta:g} % of the depth"
        words += ", although the order itself is there." if holds else "."
    elif not holds:
        if test.smallest_p > claim.alpha:
            words += f" So few tasks cannot reach {claim.alpha:g}: add tasks."
        words += (
            f" A difference of {100 * claim.delta:g} % of the depth between neighbouring levels would have been found "
            f"with probability {power:.2f}."
        )
    outcome: Outcome = "holds" if holds else "open"
    return Condition(
        "L1", True, words + without, outcome, found.value, found.interval, test.p, test.smallest_p, power,
        found.p_refuted,
    ), test  # fmt: skip


def judge_interventions(
    shares: Shares | str | None, claim: Hypothesis
) -> tuple[Condition, Condition, list[RangeTest], dict[tuple[int, int], tuple[DissociationTest, float]]]:
    """L2 and L3 with their sentences, and the tests behind them by type and by pair.

    Args:
        shares: what :func:`prepare_shares` gave; None without interventions.
        claim: the hypothesis.
    """
    if shares is None or isinstance(shares, str):
        why = {c: f"Not tested: {_NEEDS[c] if shares is None else shares}" for c in ("L2", "L3")}
        return Condition("L2", False, why["L2"]), Condition("L3", False, why["L3"]), [], {}
    names, n = claim.levels, len(claim.types)
    counts = np.bincount(shares.ranks, minlength=n).tolist()
    depth = shares.shares.shape[1]
    ranges = [
        range_test(shares.shares, shares.ranks == k, r, alpha=claim.alpha, delta=claim.delta)
        for k, r in enumerate(shares.ranges)
    ]
    in_ranges = np.stack([shares.shares[:, a:b].sum(axis=1) for a, b in shares.ranges], axis=1)
    tests, adjusted = dissociations(in_ranges, shares.ranks, alpha=claim.alpha, delta=claim.delta)
    spread = float(np.mean([pooled_spread([in_ranges[shares.ranks == k, c] for k in range(n)]) for c in range(n)]))
    power = share_powers(counts, shares.ranges, depth, gap=claim.delta, sd=spread, alpha=claim.alpha, delta=claim.delta)
    worst = min(ranges, key=lambda r: r.difference.value)
    said = []
    for name, (start, stop), r in zip(names, shares.ranges, ranges, strict=True):
        gap = r.difference.value
        text = f"{name} {percent(r.share)} % in blocks [{start}, {stop}), {percent(abs(gap))} points "
        text += f"{'more' if gap >= 0 else 'less'} than other tasks (p = {p_text(r.p)})"
        if not r.beats_ranges:
            text += f", but more in [{r.best[0]}, {r.best[1]})"
        elif r.beats_random < 1 - claim.alpha:
            text += f", but only more than {percent(r.beats_random)} % of random sets of as many blocks"
        said.append(text)
    holds = all(r.p <= claim.alpha and r.beats_ranges and r.beats_random >= 1 - claim.alpha for r in ranges)
    smallest = max(r.smallest_p for r in ranges)
    two = Condition(
        "L2", True, f"{_BY[shares.kind]}: of all absolute effects on a type's tasks, {'; '.join(said)}. Smallest "
        f"reachable p {p_text(smallest)}.{shares.notes}",
        "holds" if holds else "open", worst.difference.value, worst.difference.interval, max(r.p for r in ranges),
        smallest, power[0],
        float(holm(np.array([r.difference.p_refuted for r in ranges])).min()),
    )  # fmt: skip
    lowest = min(tests.values(), key=lambda t: t.difference.value)
    pairs = "; ".join(
        f"{names[i]} and {names[j]} p = {p_text(adjusted[i, j])}, smaller difference "
        f"{percent(t.difference.value)} points" for (i, j), t in tests.items()
    )  # fmt: skip
    reach = _reachable([t.smallest_p for t in tests.values()])
    short = f" So few tasks cannot reach {claim.alpha:g}: add tasks." if reach > claim.alpha else ""
    three = Condition(
        "L3", True, f"Each type harmed more by its own range than the other type is, both ways, adjusted over pairs by "
        f"Holm: {pairs}. Smallest reachable p {p_text(reach)}.{short}",
        "holds" if max(adjusted.values()) <= claim.alpha else "open", lowest.difference.value,
        lowest.difference.interval, max(adjusted.values()), reach, power[1],
        float(holm(np.array([t.difference.p_refuted for t in tests.values()])).min()),
    )  # fmt: skip
    return two, three, ranges, {pair: (t, adjusted[pair]) for pair, t in tests.items()}


def _reachable(smallest: Sequence[float]) -> float:
    """The smallest value that the largest of Holm's adjusted p-values can take."""
    return min(1.0, float(holm(np.array(smallest)).max()))


def judge_types(
    claim: Hypothesis,
    depths: Mapping[str, float],
    types: Mapping[str, str],
    *,
    num_blocks: float,
    order: OrderTest | None,
    shares: Shares | str | None,
    ranges: Sequence[RangeTest],
    pairs: Mapping[tuple[int, int], tuple[DissociationTest, float]],
    contradicted: bool,
) -> tuple[TypeVerdict, ...]:
    """A verdict on each type, from its own part of the conditions.

    A type is supported where every tested condition holds for it against every other type (L1 and L3 adjusted over
    all pairs, L2 over types) and L4 does not contradict the order; refuted where a bound excludes the margin in one of
    them (in L3: of its own range), adjusted over pairs or types and over the tested conditions.
    """
    n = len(claim.types)
    order_p: dict[tuple[int, int], float] = {}
    refuted_pairs: dict[tuple[int, int], float] = {}
    if order is not None:
        keys = list(combinations(range(n), 2))
        order_p = dict(zip(keys, holm(np.array([order.pair_p[k] for k in keys])).tolist(), strict=True))
        bounds = holm(np.array([order.pair_differences[k].p_refuted for k in keys]))
        refuted_pairs = dict(zip(keys, bounds.tolist(), strict=True))
    range_p = holm(np.array([r.p for r in ranges])).tolist() if ranges else []
    range_refuted = holm(np.array([r.difference.p_refuted for r in ranges])).tolist() if ranges else []
    own_ways = [(pair[i], t.directions[i].p_refuted) for pair, (t, _) in pairs.items() for i in (0, 1)]
    bounds = holm(np.array([p for _, p in own_ways])) if own_ways else np.empty(0)
    apart = {k: min(b for (own, _), b in zip(own_ways, bounds, strict=True) if own == k) for k in range(n) if own_ways}
    tested = (order is not None) + 2 * bool(ranges)
    found = []
    for k, claimed in enumerate(claim.types):
        own = [depths[t] for t in depths if types[t] == claimed.name]
        depth = float(np.mean(own)) / num_blocks if own else math.nan
        mine = [p for p in combinations(range(n), 2) if k in p]
        l1 = max(order_p[p] for p in mine) if order_p else None
        l2 = range_p[k] if ranges else None
        l3 = max(pairs[p][1] for p in mine) if pairs else None
        excluded = [min(refuted_pairs[p] for p in mine)] if refuted_pairs else []
        excluded += [range_refuted[k], apart[k]] if ranges else []
        passed = [p <= claim.alpha for p in (l1, l2, l3) if p is not None]
        if ranges:
            passed.append(ranges[k].beats_ranges and ranges[k].beats_random >= 1 - claim.alpha)
        verdict: Verdict = "inconclusive"
        if excluded and min(excluded) * tested <= claim.alpha:
            verdict = "refuted"
        elif passed and all(passed) and not contradicted:
            verdict = "supported"
        blocks = shares.ranges[k] if isinstance(shares, Shares) else None
        share = ranges[k].share if ranges else None
        found.append(
            TypeVerdict(
                claimed.name, verdict, len(own), depth, _type_words(claimed.range, depth, l1, l2, l3, share, blocks),
                blocks, l1, l2, l3, share,
            )
        )  # fmt: skip
    return tuple(found)


def _type_words(
    claimed: tuple[float, float] | None,
    depth: float,
    l1: float | None,
    l2: float | None,
    l3: float | None,
    share: float | None,
    blocks: tuple[int, int] | None,
) -> str:
    words = []
    if depth == depth:
        text = f"At {percent(depth)} % of the depth on average"
        if claimed is not None:
            inside = claimed[0] <= depth <= claimed[1]
            text += (
                f", {'inside' if inside else 'outside'} the claimed {percent(claimed[0])} to {percent(claimed[1])} %"
            )
        words.append(text + ".")
    if l1 is not None:
        words.append(f"In order with every other type: p = {p_text(l1)} at most, adjusted over pairs.")
    if l2 is not None and share is not None and blocks is not None:
        words.append(f"{percent(share)} % of the effect on it in blocks [{blocks[0]}, {blocks[1]}): p = {p_text(l2)}.")
    if l3 is not None:
        words.append(f"Dissociated from every other type: p = {p_text(l3)} at most.")
    return " ".join(words) or "Nothing could be tested."
