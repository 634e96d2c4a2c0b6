"""How far representations moved in training: similarity of hidden states before and after, by layer.

This is drift, not forgetting: CKA stays at .96 while exactly the labels of a task are erased, and a rotation that a
refitted probe does not notice lowers nothing here. Weights are in :mod:`analysis.weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from analysis.alignment import fit_alignment
from analysis.cka import (
    CONSTANT,
    Estimate,
    cka_of_sides,
    cluster_cka,
    debiased_cka,
    jackknife_interval,
    outlier_dimensions,
    relative_deviation,
    shared_outliers,
)
from analysis.hsic import Shift, Variant, hsic1, make_side
from analysis.neighbours import knn_of_items, mutual_knn
from analysis.sentences import Layout, as_states, sentence_codes, usable_items
from spafit.errors import NumericalError, UsageError, did_you_mean
from spafit.runtime import generator

__all__ = [
    "COLUMNS",
    "MEASURES",
    "Estimate",
    "cka_heat_map",
    "cluster_cka",
    "debiased_cka",
    "drift_table",
    "mutual_knn",
    "outlier_dimensions",
    "procrustes_r2",
]

Measure = Literal["cka", "procrustes_r2", "mutual_knn"]
#: States as one array (hidden, items, width), or a function of the hidden index that returns (items, width).
States = np.ndarray | Callable[[int], np.ndarray]

MEASURES: tuple[Measure, ...] = ("cka", "procrustes_r2", "mutual_knn")
VARIANTS: tuple[Variant, ...] = ("raw", "z-scored")
COLUMNS = (
    "hidden",
    "hidden2",
    "measure",
    "variant",
    "value",
    "ci_low",
    "ci_high",
    "p",
    "chance",
    "n",
    "outlier_dimensions",
    "reason",
)
UNCHANGED = "unchanged: bitwise equal before and after"


def procrustes_r2(
    after: np.ndarray,
    before: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    variant: Variant = "raw",
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """How much of the states before a rigid map of the states after explains, on sentences it was not fitted on.

    The map of :func:`analysis.alignment.fit_alignment` is fitted on a random half of the sentences; R² =
    1 − Σ‖before − R(after)‖² / Σ‖before − mean‖² on the others, where mean is theirs. 1 for a rotation, reflection or
    shift; at or below 0 for unrelated states. It can be far below 0: the map cannot shrink. The interval is the
    delete-one-sentence jackknife over the scored sentences, with the map fixed: it leaves out how the map would vary.

    Args:
        after: shape (items, width).
        before: shape (items, width), the same items in the same order.
        groups: sentence label of each item.
        variant: ``z-scored`` standardises the columns of each side with the fitting half's mean and deviation.
        level: coverage of the interval.
        seed: chooses the halves.

    Returns:
        An estimate; ``n`` counts the sentences of both halves. NaN with the reason where the widths differ, the
        fitting half has fewer than 2 × width items, or the scored states are all the same.

    Raises:
        UsageError: shapes do not fit.
        NumericalError: a state is not finite.
    """
    after, before = as_states(after, before)
    groups = np.asarray(groups)
    keep = usable_items(after, before, groups)
    return _procrustes(after[keep], before[keep], groups[keep], variant=variant, level=level, seed=seed)


def _procrustes(
    after: np.ndarray, before: np.ndarray, groups: np.ndarray, *, variant: Variant, level: float, seed: int
) -> Estimate:
    """:func:`procrustes_r2` of items that all count."""
    codes = sentence_codes(groups, len(after))
    n = int(codes.max(initial=-1)) + 1
    if after.shape[1] != before.shape[1]:
        return Estimate(math.nan, n, reason="the widths differ: no rotation maps one onto the other")
    fitting = np.isin(codes, generator(seed, "halves of sentences").permutation(n)[: n // 2])
    if fitting.sum() < 2 * after.shape[1]:
        needed = 2 * after.shape[1]
        return Estimate(
            math.nan,
            n,
            reason=f"the fitting half has {int(fitting.sum())} items; the map needs {needed} (2 per column)",
        )
    if not (np.isfinite(after).all() and np.isfinite(before).all()):
        raise NumericalError("States hold NaN or infinite values; extract them in float32.")
    after, before = after.astype(np.float64), before.astype(np.float64)
    if variant == "z-scored":
        after, before = (Shift.of(side[fitting], variant).apply(side) for side in (after, before))
    shift = Shift.of(before[~fitting], "raw")
    centred = shift.apply(before[~fitting])
    if shift.is_constant(float(np.vdot(centred, centred)) / len(centred)):
        return Estimate(math.nan, n, reason=CONSTANT)
    missed = ((before[~fitting] - fit_alignment(after[fitting], before[fitting]).apply(after[~fitting])) ** 2).sum(1)
    total = (centred**2).sum(axis=1)
    value = 1 - float(missed.sum() / total.sum())
    layout = Layout.make(codes[~fitting])
    if layout.n < 2:
        return Estimate(value, n, reason="no interval: one sentence was scored")
    sizes = layout.sizes.astype(np.float64)
    sums = layout.sentence_means(centred[layout.order]) * sizes[:, None]
    missed, total = (layout.sentence_means(v[layout.order]) * sizes for v in (missed, total))
    # without a sentence the mean moves by sum / (remaining items)
    rest = total.sum() - total - (sums**2).sum(axis=1) / (sizes.sum() - sizes)
    if rest.min() <= 0:
        return Estimate(value, n, reason="no interval: without one sentence the scored states are all the same")
    return Estimate(value, n, *jackknife_interval(value, 1 - (missed.sum() - missed) / rest, level=level))


def drift_table(
    before: States,
    after: States,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    hidden: Sequence[int] | None = None,
    measures: Sequence[Measure] = MEASURES,
    variants: Sequence[Variant] = VARIANTS,
    k: int = 10,
    level: float = 0.95,
    n_permutations: int = 199,
    seed: int = 0,
) -> pd.DataFrame:
    """Similarity of every hidden state before and after, one row per (hidden, measure, variant).

    Padding and copied sentences, judged by the last hidden state, are left out everywhere. Hidden states that are
    bitwise equal get value 1 with the interval (1, 1) and are not computed.

    Do not read it as forgetting (see the module), nor CKA's raw variant where ``outlier_dimensions`` names any: then
    those few columns decide it.

    Args:
        before: array (hidden, items, width), or a function from the hidden index to (items, width).
        after: the same items after training; its width may differ, which leaves ``procrustes_r2`` undefined.
        groups: sentence label of each item; pooled states have one item per sentence.
        hidden: hidden indices to compare (0 = embeddings); needed where states come from functions. With arrays, the
            index of the first axis, and all by default.
        measures: of ``cka`` (:func:`cluster_cka`), ``procrustes_r2`` (:func:`procrustes_r2`) and ``mutual_knn``
            (:func:`mutual_knn`).
        variants: of ``raw`` and ``z-scored``.
        k: neighbours for ``mutual_knn``.
        level: coverage of the intervals.
        n_permutations: shuffles behind the p of ``cka``; 0 leaves it out.
        seed: chooses halves, shuffles and queries.

    Returns:
        Columns :data:`COLUMNS`: ``hidden`` and ``hidden2`` (before and after; equal here), ``measure``, ``variant``,
        ``value``, ``ci_low`` and ``ci_high`` (jackknife over sentences), ``p`` (one-sided permutation test, ``cka``
        only), ``chance`` (value for unrelated states), ``n`` (sentences), ``outlier_dimensions`` (columns of large
        deviation shared by both sides, widest first, with commas; empty where there are none) and ``reason`` (why the
        value or its interval is NaN, or that nothing changed; otherwise empty).

    Raises:
        UsageError: shapes, measures or variants that do not fit, or functions without ``hidden``.
        NumericalError: a state is not finite.
    """
    _check_names("measures", measures, MEASURES)
    _check_names("variants", variants, VARIANTS)
    indices = _indices(before, after, hidden)
    keep, kept_groups, layout = _kept(before, after, groups, indices)
    rows: list[dict[str, object]] = []
    for h in indices:
        x, y = (side[keep] for side in as_states(_state(before, h), _state(after, h)))
        outliers = ",".join(map(str, outlier_dimensions(x, y)))
        same = np.array_equal(x, y)
        for variant in variants:
            for measure in measures:
                if same and _varies(x):
                    found = Estimate(1.0, layout.n, 1.0, 1.0, math.nan, math.nan, UNCHANGED)
                elif measure == "cka":
                    a, b = (make_side(side, layout, variant=variant) for side in (x, y))
                    found = cka_of_sides(a, b, layout, level=level, n_permutations=n_permutations, seed=seed)
                elif measure == "procrustes_r2":
                    found = _procrustes(y, x, kept_groups, variant=variant, level=level, seed=seed)
                else:
                    found = knn_of_items(x, y, layout, k=k, variant=variant, max_queries=2000, level=level, seed=seed)
                rows.append(_row(h, h, measure, variant, found, outliers))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def cka_heat_map(
    before: States,
    after: States,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    hidden: Sequence[int] | None = None,
    variant: Variant = "raw",
) -> pd.DataFrame:
    """Debiased CKA of every hidden state before with every hidden state after, without intervals.

    The cost is one product items × width × width for each pair: give a few thousand items, not all.

    Args:
        before: array (hidden, items, width), or a function from the hidden index to (items, width).
        after: the same items after training.
        groups: sentence label of each item.
        hidden: hidden indices of both sides; see :func:`drift_table`.
        variant: ``raw`` or ``z-scored``.

    Returns:
        Columns :data:`COLUMNS`, one row per pair: ``hidden`` before, ``hidden2`` after; intervals and p are NaN.
        ``table.pivot(index="hidden", columns="hidden2", values="value")`` gives the square.

    Raises:
        UsageError: shapes that do not fit.
        NumericalError: a state is not finite.
    """
    indices = _indices(before, after, hidden)
    keep, _, layout = _kept(before, after, groups, indices)
    rows: list[dict[str, object]] = []
    # one pass over each side for what does not depend on the other: HSIC1 with itself, and the columns' deviations
    selves: list[dict[int, tuple[float, float]]] = [{}, {}]
    deviations: list[dict[int, np.ndarray]] = [{}, {}]
    for s, states in enumerate((before, after)):
        for h in indices:
            state = _state(states, h)[keep]
            deviations[s][h] = relative_deviation(state)
            side = make_side(state, layout, variant=variant)
            terms = hsic1(side, side, layout) if layout.n >= 4 else None
            selves[s][h] = (terms.value, terms.leading) if terms else (math.nan, math.nan)
    for i in indices:
        a = make_side(_state(before, i)[keep], layout, variant=variant)
        for j in indices:
            b = make_side(_state(after, j)[keep], layout, variant=variant)
            found = cka_of_sides(a, b, layout, level=None, selves=(selves[0][i], selves[1][j]))
            outliers = shared_outliers(deviations[0][i], deviations[1][j])
            rows.append(_row(i, j, "cka", variant, found, ",".join(map(str, outliers))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _state(states: States, hidden: int) -> np.ndarray:
    """One hidden state, (items, width), float32 or float64."""
    return as_states(state := states(hidden) if callable(states) else states[hidden], state)[0]


def _indices(before: States, after: States, hidden: Sequence[int] | None) -> list[int]:
    """The hidden indices to compare."""
    lengths = [len(side) for side in (before, after) if not callable(side)]
    if hidden is None:
        if len(lengths) < 2:
            raise UsageError("States that come from functions need the hidden indices to compare; give hidden=[0, …].")
        hidden = range(lengths[0])
        if len(set(lengths)) > 1:
            raise UsageError(f"Before has {lengths[0]} hidden states and after {lengths[1]}; name the shared ones.")
    if len(hidden) == 0 or min(hidden) < 0 or any(max(hidden) >= length for length in lengths):
        raise UsageError(f"The hidden indices {list(hidden)} do not fit arrays of {lengths} hidden states.")
    return list(hidden)


def _kept(
    before: States, after: States, groups: Sequence[Hashable] | np.ndarray, indices: list[int]
) -> tuple[np.ndarray, np.ndarray, Layout]:
    """Which items count, judged by the last hidden state, their labels, and their sentences."""
    x, y = as_states(_state(before, indices[-1]), _state(after, indices[-1]))
    labels = np.asarray(groups)
    keep = usable_items(x, y, labels)
    return keep, labels[keep], Layout.make(labels[keep])


def _varies(states: np.ndarray) -> bool:
    shift = Shift.of(states, "raw")
    centred = shift.apply(states)
    return len(states) > 1 and not shift.is_constant(float(np.vdot(centred, centred)) / len(states))


def _check_names(what: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            raise UsageError(f"Unknown {what} {name!r}; allowed: {', '.join(allowed)}.{did_you_mean(name, allowed)}")


def _row(
    hidden: int, hidden2: int, measure: Measure, variant: Variant, found: Estimate, outliers: str
) -> dict[str, object]:
    values = (hidden, hidden2, measure, variant, found.value, found.ci_low, found.ci_high, found.p, found.chance)
    return dict(zip(COLUMNS, (*values, found.n, outliers, found.reason), strict=True))
