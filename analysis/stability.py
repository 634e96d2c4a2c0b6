"""Condition L4 of localization: the order has one sign over seeds, poolings and probes, and is no random encoder's.

The order of a setting is the mean depth of the last level's tasks minus that of the first's. It must have the same sign
for each training seed alone, at two poolings or more, for linear probes and for MLPs; and the same test on the curves
of the random-weight encoders by themselves must not support the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.hypothesis import HypothesisFile
from analysis.localization import Condition, date_curve, localization_test
from probing.curves import LayerCurve

if TYPE_CHECKING:
    from probing.results import ProbeResults

#: What must vary: training seeds, poolings.
SEEDS, POOLINGS = 3, 2


def stability(results: ProbeResults, claim: HypothesisFile, *, n_boot: int = 1000) -> Condition:
    """Condition L4 of one run.

    Do not take it for a claim about a training method: seeds of a run redraw training items of probes, not the model.

    Args:
        results: a run; its block site is read.
        claim: levels, tasks and statistic.
        n_boot: bootstrap replicates behind each depth.

    Returns:
        The condition; ``number`` is the share of settings in which the last level lies deeper than the first. Not
        tested where something does not vary, or a setting has too few tasks that can be dated; the sentence says which.
    """
    tasks = results.tasks_with_bits
    scores = results.scores[results.scores["task"].isin(tasks) & (results.scores["site"] == "block")]
    poolings, probes = (list(dict.fromkeys(scores[c].astype(str))) for c in ("pooling", "probe"))
    own = {t: results.items(t) for t in tasks}
    seeds = min((i.loc[i["control"] == "none", "seed"].nunique() for i in own.values()), default=0)
    missing = [f"{seeds} of {SEEDS} seeds with training draws of their own"] if seeds < SEEDS else []
    missing += [f"{len(poolings)} of {POOLINGS} poolings"] if len(poolings) < POOLINGS else []
    kinds = {p.partition(":")[0] for p in probes}
    missing += [f"no {kind} probe" for kind in ("linear", "mlp") if kind not in kinds]
    missing += [] if (scores["control"] == "random-encoder").any() else ["no random encoder"]
    if missing:
        return Condition("L4", False, f"Not tested: stability needs more than this run has: {', '.join(missing)}.")
    found: dict[str, float] = {}
    for pooling in poolings:
        for probe in probes:
            for seed, curves in _by_seed(results, own, pooling, probe, n_boot):
                found[f"{pooling}, {probe}, seed {seed}"] = order(curves, claim)
    undated = [name for name, difference in found.items() if not np.isfinite(difference)]
    if undated:
        few = f"{len(undated)} of {len(found)} settings ({undated[0]}{', …' if len(undated) > 1 else ''})"
        return Condition("L4", False, f"Not tested: too few tasks can be dated in {few}.")
    signs = np.sign(list(found.values()))
    share = float((signs > 0).mean())
    random = _random(results, own, poolings[0], probes[0], claim, n_boot)
    stable = share == 1.0 and random != "supported"
    words = f"The last level lies deeper than the first in {int((signs > 0).sum())} of {len(found)} settings"
    words += f" ({seeds} seeds, {len(poolings)} poolings, {len(probes)} probes)"
    words += f"; in random encoders the order is {random}. " + ("Stable." if stable else "Not stable.")
    return Condition("L4", True, words, number=share)


def is_stable(condition: Condition) -> bool:
    """Whether a tested L4 holds."""
    return condition.tested and condition.sentence.endswith(" Stable.")


def order(curves: Sequence[LayerCurve], claim: HypothesisFile) -> float:
    """Mean depth of the last level minus that of the first, in hidden states; NaN with too few dated tasks."""
    hypothesis = claim.hypothesis
    dated = [date_curve(claim.file_curve(c), hypothesis) for c in curves]
    depths = [[t.depth for t in dated if t.used and t.level == level] for level in hypothesis.levels]
    if min(len(depths[0]), len(depths[-1])) < hypothesis.min_tasks:
        return float("nan")
    return float(np.mean(depths[-1]) - np.mean(depths[0]))


def _by_seed(
    results: ProbeResults, own: dict[str, pd.DataFrame], pooling: str, probe: str, n_boot: int
) -> Iterator[tuple[int, list[LayerCurve]]]:
    for seed in results.run["seeds"]:
        tables = {t: items[items["seed"] == seed] for t, items in own.items()}
        one = replace(results, item_tables=tables)
        yield int(seed), [one.curve(t, pooling=pooling, probe=probe, n_boot=n_boot) for t in own]


def _random(
    results: ProbeResults, own: dict[str, pd.DataFrame], pooling: str, probe: str, claim: HypothesisFile, n_boot: int
) -> str:
    """The verdict on curves of the random encoders by themselves."""
    tables = {}
    for task, items in own.items():
        rows = items[items["control"] == "random-encoder"]
        tables[task] = rows.assign(control="none")
    one = replace(results, item_tables=tables)
    curves = [one.curve(t, adjusted_by=None, pooling=pooling, probe=probe, n_boot=n_boot) for t in own]
    filed = [claim.file_curve(c) for c in curves]
    return localization_test(filed, claim.hypothesis, num_blocks=int(results.run["model"]["blocks"])).verdict
