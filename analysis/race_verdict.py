"""What a confirmation says: paired differences over items and seeds, and the verdict in a word and a sentence."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.race_result import COMPARISON_COLUMNS, Verdict
from analysis.task_scores import resampled_metric
from spafit.runtime import generator
from spafit.stats import interval


def compare_confirmed(
    suggestion: str,
    confirmed: Mapping[str, Mapping[int, pd.DataFrame]],
    metrics: Sequence[str],
    *,
    beyond: Collection[str] = (),
    n_boot: int = 2000,
) -> pd.DataFrame:
    """The suggestion's headline less that of each other plan, with paired intervals over items crossed with seeds.

    Args:
        suggestion: its name.
        confirmed: name -> seed -> scored items with the columns idx, label and prediction.
        metrics: the headline is the mean of them; an undefined one (a constant prediction's correlation) counts 0.
        beyond: plans that forget more than is tolerated.
        n_boot: bootstrap draws.

    Returns:
        Columns :data:`analysis.race_result.COMPARISON_COLUMNS`.
    """
    seeds = sorted(confirmed[suggestion])
    first = confirmed[suggestion][seeds[0]]
    n = len(first)
    random = generator(0, "race", n, len(seeds))
    draws = random.integers(n, size=(n_boot, n))
    weights = np.full((n_boot, len(seeds)), 1 / len(seeds))
    if len(seeds) > 1:
        weights = random.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=n_boot) / len(seeds)
    labels = first["label"].to_numpy()

    def scores(table: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
        guesses = table["prediction"].to_numpy()[rows]
        return np.asarray(np.mean([np.nan_to_num(resampled_metric(m, guesses, labels[rows])) for m in metrics], axis=0))

    every = np.arange(n)[None]
    point: dict[str, float] = {}
    drawn: dict[str, np.ndarray] = {}
    for name, by_seed in confirmed.items():
        point[name] = float(np.mean([scores(by_seed[s], every)[0] for s in seeds]))
        drawn[name] = (np.stack([scores(by_seed[s], draws) for s in seeds], axis=1) * weights).sum(1)
    rows = []
    for name in confirmed:
        if name != suggestion:
            low, high = interval(drawn[suggestion] - drawn[name])
            numbers = (point[suggestion] - point[name], float(low), float(high), point[suggestion], point[name])
            rows.append((suggestion, name, *numbers, len(seeds), n, name not in beyond))
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def verdict_of(comparison: pd.DataFrame, *, suggestion_keeps: bool = True) -> Verdict:
    """``yes`` above every baseline that keeps the tolerance, ``no`` below one of them or beyond the tolerance itself.

    An intersection-union test: each single interval is at its own level, and the claim of beating all keeps it.
    """
    if comparison.empty:
        return "untested"
    if not suggestion_keeps:
        return "no"
    rivals = comparison[comparison["keeps_tolerance"]]
    if (rivals["ci_low"] > 0).all():
        return "yes"
    return "no" if (rivals["ci_high"] < 0).any() else "within noise"


def sentence_of(
    verdict: Verdict, suggestion: str | None, comparison: pd.DataFrame, missing: str, *, suggestion_keeps: bool = True
) -> str:
    """The verdict in words, against the best of the baselines that keep the tolerance."""
    if verdict == "untested":
        return " ".join(["Suggestion beats the baselines: untested.", missing]).strip()
    if not suggestion_keeps:
        return f"Suggestion beats the baselines: no. {suggestion} forgets more than the tolerance allows."
    over = [str(b) for b in comparison.loc[~comparison["keeps_tolerance"].astype(bool), "baseline"]]
    beyond = f" Beyond the tolerance: {', '.join(over)}." if over else ""
    if len(over) == len(comparison):
        return f"Suggestion beats the baselines: yes. {suggestion} alone keeps the tolerance.{beyond}"
    rivals = comparison[comparison["keeps_tolerance"].astype(bool)]
    row = rivals.iloc[int(rivals["baseline_score"].to_numpy().argmax())]
    return (
        f"Suggestion beats the baselines: {verdict}. {suggestion} less the best of them, {row['baseline']}: "
        f"{row['difference']:+.3f} ({row['ci_low']:+.3f} to {row['ci_high']:+.3f}), {row['seeds']} fresh seeds, "
        f"{row['items']} items that chose nothing.{beyond}{' ' + missing if missing else ''}"
    )
