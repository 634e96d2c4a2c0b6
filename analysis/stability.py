"""L4: does the order keep its sign over seeds, poolings and probe families, and is it absent in a random encoder?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from analysis.hypothesis import Hypothesis, Statistic
from analysis.verdicts import Condition, Outcome, listed, p_text
from probing.curves import LayerCurve
from probing.results import ProbeResults
from probing.summaries import emergence, never_above_control
from spafit.trend import jonckheere_terpstra

Kind = Literal["seed", "pooling", "probe", "random-encoder"]
#: Bootstrap replicates and correction draws of a reading: only the sign of a mean over tasks is taken from it.
_DRAWS = 200


@dataclass(frozen=True)
class Reading:
    """The order as one seed, pooling or probe family shows it, or as a random encoder does.

    Attributes:
        kind: what was varied.
        name: which one.
        depths: emergence of each task that can be dated.
    """

    kind: Kind
    name: str
    depths: Mapping[str, float]


def readings_of(
    results: ProbeResults, *, statistic: Statistic = "emergence_cog", without: Collection[str] = (), seed: int = 0
) -> tuple[Reading, ...]:  # fmt: skip
    """Every reading of the order that a probing run allows, each like the run's first one but for one thing.

    Args:
        results: the run; tasks without bits are left out.
        statistic: the depth of one task, as in the hypothesis.
        without: tasks that are left out, such as unstable ones.
        seed: chooses the draws of the emergence correction.
    """
    scores = results.scores
    sites = list(dict.fromkeys(scores["site"].astype(str)))
    site = "block" if "block" in sites else sites[0]
    poolings = list(dict.fromkeys(scores["pooling"].astype(str)))
    probes = list(dict.fromkeys(scores["probe"].astype(str)))
    found: dict[tuple[Kind, str], dict[str, float]] = {}
    for task in (t for t in results.tasks_with_bits if t not in without):
        items = results.items(task)
        items = items[items["site"] == site]
        if items.empty:
            continue
        first = {c: items[c].iloc[0] for c in ("pooling", "probe")}
        has_random = (items["control"] == "random-encoder").any()
        main = items[(items["pooling"] == first["pooling"]) & (items["probe"] == first["probe"])]
        parts: list[tuple[Kind, str, pd.DataFrame]] = []
        fitted = main.loc[main["control"] == "none", "seed"].unique()  # one where all seeds train on the same items
        parts += [("seed", str(s), main[main["seed"] == s]) for s in fitted]
        for column, names in (("pooling", poolings), ("probe", probes)):
            other = "probe" if column == "pooling" else "pooling"
            rows = items[items[other] == first[other]]
            parts += [(column, n, rows[rows[column] == n]) for n in names]  # type: ignore[misc]
        if has_random:
            parts.append(("random-encoder", "", main[main["control"] == "random-encoder"].assign(control="none")))
        for kind, name, rows in parts:
            if rows.empty:
                continue
            own = replace(results, item_tables={task: rows})
            curve = own.curve(task, adjusted_by="random-encoder", site=site, n_boot=_DRAWS)
            depth = _depth(curve, statistic, seed)
            found.setdefault((kind, name), {})
            if math.isfinite(depth):
                found[kind, name][task] = depth
    return tuple(Reading(kind, name, depths) for (kind, name), depths in found.items())


def _depth(curve: LayerCurve, statistic: Statistic, seed: int) -> float:
    if statistic == "best":
        return math.nan if never_above_control(curve) else float(curve.hidden[np.argmax(curve.values)])
    return emergence(curve, n_draws=_DRAWS, seed=seed).value


def stability(readings: Sequence[Reading], types: Mapping[str, str], claim: Hypothesis) -> Condition:
    """L4 from readings of the order.

    Tested only where all four parts can be looked at. A part that contradicts the claim counts even where others are
    missing: then the outcome is ``fails``.

    Args:
        readings: from :func:`readings_of`.
        types: type of each task that the hypothesis names.
        claim: the hypothesis, which says how many seeds and poolings and which probe families are needed.
    """
    if not readings:
        return Condition(
            "L4", False, "Not tested: stability needs the same sign over three or more seeds, two poolings and two "
            "probe families, and no such order in a random encoder.",
        )  # fmt: skip
    said, missing, wrong, signs = [], [], False, []
    for kind, plural in (("seed", "seeds"), ("pooling", "poolings"), ("probe", "probe families")):
        own = [r for r in readings if r.kind == kind]
        gaps = {r.name: _difference(r, types, claim) for r in own}
        dated = {n: g for n, g in gaps.items() if g is not None}
        deeper = [n for n, g in dated.items() if g > 0]
        lacking = _lacking(kind, list(dated), claim)
        if lacking:
            missing.append(lacking)
        if len(dated) > 1 or not lacking:
            said.append(f"{len(deeper)} of {len(dated)} {plural}")
            signs += [g > 0 for g in dated.values()]
            wrong = wrong or len(deeper) < len(dated)
    last, first = claim.levels[-1], claim.levels[0]
    words = [f"{last.capitalize()} is deeper than {first} in {listed(said)}."] if said else []
    random = next((r for r in readings if r.kind == "random-encoder"), None)
    if random is None:
        missing.append("a random encoder")
    else:
        there, sentence = _in_random(random, types, claim)
        words.append(sentence)
        wrong = wrong or there
    number = float(np.mean(signs)) if signs else None
    if missing:
        words.append(f"{'Not looked at' if wrong else 'Needed, too'}: {listed(missing)}.")
        words.insert(0, "Contradicted." if wrong else "Not tested in full.")
    outcome: Outcome = "fails" if wrong else "not tested" if missing else "holds"
    return Condition("L4", not missing, " ".join(words), outcome, number)


def _lacking(kind: str, dated: Sequence[str], claim: Hypothesis) -> str:
    """What is missing for one part, in words; empty where nothing is."""
    if kind == "probe":
        families = {n.split(":")[0] for n in dated}
        absent = [p for p in claim.probes if p not in families]
        return f"probes of the family {listed(absent)}" if absent else ""
    need = claim.seeds if kind == "seed" else claim.poolings
    return f"{need} {kind}s instead of {len(dated)}" if len(dated) < need else ""


def _difference(reading: Reading, types: Mapping[str, str], claim: Hypothesis) -> float | None:
    """Mean depth of the last type less that of the first; None where too few tasks of either can be dated."""
    names = claim.levels[0], claim.levels[-1]
    ends = [[d for t, d in reading.depths.items() if types.get(t) == name] for name in names]
    return None if min(map(len, ends)) < claim.min_tasks else float(np.mean(ends[1]) - np.mean(ends[0]))


def _in_random(reading: Reading, types: Mapping[str, str], claim: Hypothesis) -> tuple[bool, str]:
    """Whether a random encoder shows the order, too, and a sentence."""
    used = {t: d for t, d in reading.depths.items() if types.get(t) in claim.levels}
    ranks = np.array([claim.levels.index(types[t]) for t in used], dtype=np.int64)
    counts = np.bincount(ranks, minlength=len(claim.levels))
    if counts.min() < claim.min_tasks:
        every = len([t for t in types.values() if t in claim.levels])
        return False, f"A random encoder lets only {len(used)} of {every} tasks be dated, so it shows no order."
    p = jonckheere_terpstra(np.array(list(used.values())), ranks).p
    there = p <= claim.alpha
    return there, f"A random encoder shows {'the same' if there else 'no such'} order (p = {p_text(p)})."
