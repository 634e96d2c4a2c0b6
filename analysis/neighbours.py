"""Mutual nearest neighbours: do the same items lie close to each other before and after?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats as scipy_stats

from analysis.cka import CONSTANT, Estimate
from analysis.hsic import Shift, Variant
from analysis.sentences import Layout, as_states, usable_items
from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator
from spafit.stats import jackknife

#: Queries whose similarities to all items are held at one time.
_CHUNK = 512


def mutual_knn(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    k: int = 10,
    variant: Variant = "raw",
    max_queries: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Share of an item's k nearest neighbours (cosine) that it has on both sides, averaged over items.

    Huh et al. 2024 (arXiv 2405.07987, section 2.1), with one change: items of the query's own sentence are never its
    neighbours, on either side. Unrelated states share by chance the mean of k / (n − m_i) of them, n items in all and
    m_i in the item's sentence. Padding and copied sentences are left out (see
    :func:`analysis.sentences.usable_items`).

    The raw variant changes with a shift of the states (cosines are taken from the origin) and not with a rotation;
    z-scores the other way round. Do not trust it where many states are equal (hidden 0 of a model that adds positions
    later): which of them are nearest is then arbitrary. The interval is of the queries' sentences, with all items
    fixed as candidates.

    Args:
        x: shape (items, d).
        y: shape (items, e), the same items in the same order.
        groups: sentence label of each item.
        k: neighbours per item.
        variant: ``z-scored`` standardises every column first.
        max_queries: whole sentences are drawn as queries until their items reach this number; all items stay
            candidates.
        level: coverage of the jackknife interval over the queries' sentences.
        seed: chooses the queries.

    Returns:
        An estimate with ``chance`` as stated and ``n`` the sentences of all candidates; NaN with the reason where a
        side does not vary or an item has fewer than k candidates.

    Raises:
        UsageError: shapes do not fit, or k or max_queries below 1.
        NumericalError: a state is not finite.
    """
    x, y = as_states(x, y)
    groups = np.asarray(groups)
    keep = usable_items(x, y, groups)
    return knn_of_items(
        x[keep],
        y[keep],
        Layout.make(groups[keep]),
        k=k,
        variant=variant,
        max_queries=max_queries,
        level=level,
        seed=seed,
    )


def knn_of_items(
    x: np.ndarray,
    y: np.ndarray,
    layout: Layout,
    *,
    k: int,
    variant: Variant,
    max_queries: int,
    level: float,
    seed: int,
) -> Estimate:
    """:func:`mutual_knn` of states that all count."""
    if k < 1 or max_queries < 1:
        raise UsageError(f"k and max_queries must be at least 1; got {k} and {max_queries}.")
    n_items = len(layout.codes)
    if layout.n < 2 or n_items - layout.sizes.max() < k:
        return Estimate(math.nan, layout.n, reason=f"an item has fewer than {k} neighbours outside its sentence")
    sides = [_directions(side, layout, variant) for side in (x, y)]
    directions = [side for side in sides if side is not None]
    if len(directions) < 2:
        return Estimate(math.nan, layout.n, reason=CONSTANT)
    drawn = np.arange(layout.n)
    if n_items > max_queries:
        drawn = generator(seed, "neighbour queries").permutation(layout.n)
        drawn = np.sort(drawn[: max(2, int(np.searchsorted(layout.sizes[drawn].cumsum(), max_queries, "right")))])
    queries = np.flatnonzero(np.isin(layout.codes, drawn))
    shared = np.empty(len(queries))
    for start in range(0, len(queries), _CHUNK):
        rows = queries[start : start + _CHUNK]
        own = layout.codes[rows][:, None] == layout.codes[None, :]
        near = []
        for side in directions:
            closeness = side[rows] @ side.T
            closeness[own] = -np.inf
            near.append(np.argpartition(closeness, n_items - k, axis=1)[:, n_items - k :])
        shared[start : start + _CHUNK] = (near[0][:, :, None] == near[1][:, None, :]).sum(axis=(1, 2)) / k
    codes = layout.codes[queries]
    chance = float((k / (n_items - layout.sizes[codes])).mean())
    error, left_out = jackknife(shared[None], codes)
    half = float(scipy_stats.t.ppf((1 + level) / 2, len(left_out) - 1) * error[0])
    value = float(shared.mean())
    return Estimate(value, layout.n, value - half, value + half, math.nan, chance)


def _directions(states: np.ndarray, layout: Layout, variant: Variant) -> np.ndarray | None:
    """Ordered states of length 1 (a zero state stays zero); None where they do not vary."""
    if not np.isfinite(states).all():
        raise NumericalError("States hold NaN or infinite values; extract them in float32.")
    scaled = states[layout.order] / states.dtype.type(np.abs(states).max() or 1)
    shift = Shift.of(scaled, variant)
    centred = shift.apply(scaled)
    if shift.is_constant(float(np.einsum("ij,ij->", centred, centred)) / len(centred)):
        return None
    chosen = scaled if variant == "raw" else centred
    norms = np.linalg.norm(chosen, axis=1, keepdims=True)
    return chosen / np.where(norms > 0, norms, 1)
