"""Forgetting by layer, split: lost, moved, re-encoded.

Lost is what a probe can no longer read, moved what a rigid map brings back, re-encoded what only a new probe reads.

P is a probe fitted before training, H0 and H1 the hidden states before and after, R the rigid map from H1 to H0
(:mod:`analysis.alignment`), s a score minus the control task's score in the same reading:

    pre = s(P, H0)   transfer = s(P, H1)   aligned = s(P, R H1)   recoverable = s(probe fitted on H1, H1)
    lost = pre - recoverable   moved = aligned - transfer   re-encoded = recoverable - aligned

so pre - transfer = lost + moved + re-encoded. No term is clipped: sampling makes some of them negative, and a negative
``lost`` is new knowledge. "Lost" means that a probe of this family cannot read it, no more.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spafit.errors import UsageError
from spafit.stats import BootstrapDraw, interval, max_t, paired_cluster_test

READINGS = ("pre", "transfer", "aligned", "recoverable")
#: Differences of readings: the minuend and the subtrahend.
DIFFERENCES = {
    "lost": ("pre", "recoverable"),
    "moved": ("aligned", "transfer"),
    "re-encoded": ("recoverable", "aligned"),
    "total": ("pre", "transfer"),
}
COLUMNS = (
    "hidden", "block", "term", "value", "ci_low", "ci_high", "p", "p_layers", "n", "n_groups", "n_seeds", "reason",
)  # fmt: skip


def forgetting_table(
    readings: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    hidden: Sequence[int],
    control: np.ndarray | None = None,
    random: np.ndarray | None = None,
    reasons: Sequence[str] | None = None,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Readings and their differences at every hidden state, with paired intervals and tests.

    Items are resampled by group and crossed with seeds, the same draw for all readings and hidden states.

    Do not read ``lost`` of one hidden state as a loss of the model: what one layer no longer shows may stand in the
    next. Few groups (below about 30) make the intervals too short.

    Args:
        readings: scores of items (right or not, or bits), shape (4, seeds, hidden, items), in the order of
            :data:`READINGS`. A reading that does not exist at a hidden state is NaN for all its items.
        groups: sentence of each item.
        hidden: the hidden indices.
        control: the control task's scores in the same readings, subtracted from them; None subtracts nothing.
        random: the task's scores with random-weight encoders, shape (seeds, hidden, items); gives the share forgotten,
            lost / (pre - random encoder), of the task's own scores without the control.
        reasons: why readings are missing, for each hidden state.
        n_boot: bootstrap replicates.
        level: coverage of the intervals.
        seed: chooses the draw and the flips.

    Returns:
        Columns :data:`COLUMNS`, for each hidden state the terms ``pre``, ``transfer``, ``aligned``, ``recoverable``,
        ``lost``, ``moved``, ``re-encoded``, ``total`` (pre - transfer) and, with ``random``, ``share_forgotten``
        (NaN where the interval of its denominator touches 0). ``p`` is the two-sided sign-flip test of a difference,
        whole groups flipped; ``p_layers`` the same question adjusted over hidden states by step-down max-T.

    Raises:
        UsageError: shapes that do not fit.
        NumericalError: readings that are partly NaN.
    """
    readings = np.asarray(readings, dtype=np.float64)
    if readings.ndim != 4 or readings.shape[0] != 4 or readings.shape[2] != len(hidden):
        raise UsageError(f"Readings have shape {readings.shape}; expected (4, seeds, hidden={len(hidden)}, items).")
    for name, other, shape in (("control", control, readings.shape), ("random", random, readings.shape[1:])):
        if other is not None and np.shape(other) != shape:
            raise UsageError(f"{name} has shape {np.shape(other)}; the readings want {shape}.")
    adjusted = readings if control is None else readings - np.asarray(control, dtype=np.float64)
    _, n_seeds, n_hidden, n_items = readings.shape
    draw = BootstrapDraw.make(groups, n_seeds=n_seeds, n_boot=n_boot, seed=seed)
    codes = np.asarray(groups)
    missing = np.isnan(adjusted).all(axis=(1, 3))  # (4, hidden)
    # means() refuses NaN, so that a half-missing reading is an error and not a number
    filled = np.where(missing[:, None, :, None], 0.0, adjusted)
    replicates = np.stack([draw.means(r) for r in filled])  # (4, n_boot, hidden)
    points = filled.mean(axis=(1, 3))
    at = {name: i for i, name in enumerate(READINGS)}
    reasons = [""] * n_hidden if reasons is None else list(reasons)
    table: list[dict[str, Any]] = []
    shared = {"n": n_items, "n_groups": len(draw.sizes), "n_seeds": n_seeds}

    def add(term: str, value: np.ndarray, drawn: np.ndarray, gone: np.ndarray, tests: tuple[np.ndarray, ...]) -> None:
        low, high = interval(drawn, level)
        for k, h in enumerate(hidden):
            numbers = (value[k], low[k], high[k], *(t[k] for t in tests))
            row = [math.nan] * 5 if gone[k] else [float(v) for v in numbers]
            table.append(
                {"hidden": h, "block": h - 1, "term": term, **shared, "reason": reasons[k] if gone[k] else ""}
                | dict(zip(("value", "ci_low", "ci_high", "p", "p_layers"), row, strict=True))
            )

    untested = np.full(n_hidden, math.nan), np.full(n_hidden, math.nan)
    for name, i in at.items():
        add(name, points[i], replicates[i], missing[i], untested)
    over_seeds = filled.mean(axis=1)  # (4, hidden, items)
    curves = np.concatenate([over_seeds[at[a]] - over_seeds[at[b]] for a, b in DIFFERENCES.values()])
    tests = paired_cluster_test(curves, codes, seed=seed).reshape(len(DIFFERENCES), n_hidden)
    for p, (name, (first, second)) in zip(tests, DIFFERENCES.items(), strict=True):
        a, b = at[first], at[second]
        gone, value, drawn = missing[a] | missing[b], points[a] - points[b], replicates[a] - replicates[b]
        p_layers = np.full(n_hidden, math.nan)
        if not gone.all():
            p_layers[~gone] = max_t(value[~gone], drawn[:, ~gone], level=level)[0]
        add(name, value, drawn, gone, (p, p_layers))
    if random is not None:
        _add_share(add, draw, readings[at["pre"]], readings[at["recoverable"]], np.asarray(random), level, reasons)
    return pd.DataFrame(table, columns=list(COLUMNS)).sort_values("hidden", kind="stable", ignore_index=True)


def _add_share(
    add: Any,
    draw: BootstrapDraw,
    pre: np.ndarray,
    recoverable: np.ndarray,
    random: np.ndarray,
    level: float,
    reasons: list[str],
) -> None:
    gone = np.isnan(recoverable).all(axis=(0, 2)) | np.isnan(random).all(axis=(0, 2))
    values = [np.where(gone[:, None], 0.0, v) for v in (pre - recoverable, pre - random)]
    lost, known = (draw.means(v) for v in values)
    low, high = interval(known, level)
    undefined = (low <= 0) & (high >= 0)
    for k in np.flatnonzero(undefined & ~gone):
        reasons[k] = "before training this hidden state is not above the random-weight encoder"
    points = [v.mean(axis=(0, 2)) for v in values]
    denied = gone | undefined
    share = points[0] / np.where(denied, 1.0, points[1])
    drawn = lost / np.where(denied | (known == 0), 1.0, known)
    nothing = np.full(len(share), math.nan)
    add("share_forgotten", share, drawn, denied, (nothing, nothing))
