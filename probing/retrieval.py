"""Retrieval between two spaces by layer: does an image's state find its caption, and the caption its image?

Arrays in, tables out. States of the last layer that a tower itself projects into the joint space are compared as they
are; those of an inner layer through a ridge map onto the other tower's embeddings, fitted on training pairs and scored
on held-out ones. A map that is fitted finds what a linear map can find: compare it with that of a random encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import pandas as pd

from probing.probes.ridge import RIDGE_L2
from spafit.errors import DataError, NumericalError, UsageError
from spafit.stats import crossed_bootstrap, interval

#: Columns of :func:`retrieval_table`.
COLUMNS = ("hidden", "map", "query", "gallery", "at", "value", "ci_low", "ci_high", "chance", "n", "candidates", "l2")

_ROWS = 1024  # queries compared at a time


@dataclass(frozen=True)
class RidgeMap:
    """A linear map between spaces, fitted on standardised features and centred targets.

    Attributes:
        mean: of the training features, (width,).
        scale: their standard deviation, 1 where a feature does not vary, (width,).
        weight: (width, target width).
        bias: (target width,).
        l2: the penalty that was chosen.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    l2: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Map features, (n, width), into the target space."""
        return np.asarray((x - self.mean) / self.scale @ self.weight + self.bias)


def fit_ridge_map(
    x: np.ndarray, targets: np.ndarray, *, x_dev: np.ndarray, targets_dev: np.ndarray,
    l2_grid: Sequence[float] = RIDGE_L2,
) -> RidgeMap:  # fmt: skip
    """Least squares with a penalty, ``Ridge(alpha=l2 * n)`` of scikit-learn on standardised features.

    Args:
        x: training features, (n, width).
        targets: their points in the other space, (n, target width).
        x_dev: features of other pairs, on which the penalty with the largest mean cosine is chosen.
        targets_dev: their points.
        l2_grid: penalties to choose from.

    Raises:
        NumericalError: features or targets that are not finite.
    """
    x, y, x_dev, y_dev = (np.asarray(a, dtype=np.float64) for a in (x, targets, x_dev, targets_dev))
    if not all(np.isfinite(a).all() for a in (x, y, x_dev, y_dev)):
        raise NumericalError("States or embeddings are NaN or infinite. Leave those pairs out.")
    mean, scale, bias = x.mean(0), x.std(0), y.mean(0)
    scale[scale <= 1e-7 * (1 + np.abs(mean))] = 1.0
    features, dev = (x - mean) / scale, (x_dev - mean) / scale
    values, vectors = np.linalg.eigh(features.T @ features / len(x))
    inside = vectors.T @ (features.T @ (y - bias) / len(x))
    fits = [RidgeMap(mean, scale, vectors @ (inside / (values.clip(0) + p)[:, None]), bias, float(p)) for p in l2_grid]
    wanted = _unit(y_dev)
    return max(fits, key=lambda fit: float((_unit(dev @ fit.weight + bias) * wanted).sum(1).mean()))


def recall_hits(
    queries: np.ndarray, gallery: np.ndarray, right: np.ndarray, *, at: Sequence[int] = (1, 5)
) -> tuple[np.ndarray, np.ndarray]:
    """Which queries have a right candidate among their nearest ``k`` by cosine, and how often chance has.

    A wrong candidate that is exactly as near counts as nearer, so that equal embeddings earn nothing.

    Args:
        queries: (queries, width).
        gallery: (candidates, width).
        right: which candidates are right for which query, bool, (queries, candidates); one at least for each.
        at: the values of k.

    Returns:
        Hits, bool, (len(at), queries), and chance, (len(at), queries): the probability that k candidates drawn at
        random hold a right one.
    """
    if right.shape != (len(queries), len(gallery)) or not right.any(1).all():
        raise UsageError("Every query needs a right candidate, and right must be (queries, candidates).")
    unit, ranks = _unit(gallery), np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        nearness = _unit(queries[rows]) @ unit.T
        best = np.where(right[rows], nearness, -np.inf).max(1, keepdims=True)
        ranks[rows] = 1 + ((nearness >= best) & ~right[rows]).sum(1)
    count, total = right.sum(1), len(gallery)
    chance = {
        (k, m): 1 - comb(total - m, min(k, total)) / comb(total, min(k, total)) for k in at for m in set(count.tolist())
    }
    return (
        np.stack([ranks <= k for k in at]),
        np.array([[chance[k, m] for m in count.tolist()] for k in at]),
    )


def retrieval_table(
    states: Mapping[int, np.ndarray],
    embeddings: np.ndarray,
    *,
    split: Sequence[str] | np.ndarray,
    own: Mapping[int, np.ndarray] | None = None,
    names: tuple[str, str] = ("image", "text"),
    items: np.ndarray | None = None,
    others: np.ndarray | None = None,
    at: Sequence[int] = (1, 5),
    l2_grid: Sequence[float] = RIDGE_L2,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Recall of held-out pairs by hidden state, in both directions, with intervals and the chance level.

    Args:
        states: by hidden index, one tower's states of each pair, (pairs, width).
        embeddings: the other tower's embeddings in the joint space, (pairs, joint width).
        split: part of each pair: the map is fitted on ``train``, its penalty chosen on ``dev``, scored on ``test``.
        own: states that the tower itself projects into the joint space, by hidden index; no map is fitted for them.
        names: what the two sides are called, that of ``states`` first.
        items: which pairs show the same thing on the side of ``states`` (equal values); None: all differ.
        others: the same on the side of ``embeddings``, such as the captions themselves. Candidates are distinct, and
            every one that some test pair joins to a query is right.
        at: the values of k in recall at k.
        l2_grid: penalties of the map.
        n_boot: bootstrap replicates.
        seed: chooses the resample.

    Returns:
        One row per (hidden, map, query, at) with :data:`COLUMNS`: ``map`` is ``ridge`` or ``own``, ``n`` the number of
        queries and ``candidates`` that of the gallery. Intervals resample queries; the gallery stays as it is, so they
        speak about other queries to the same gallery.

    Raises:
        UsageError: lengths that do not fit together, or fewer than two pairs of a split.
        NumericalError: states or embeddings that are not finite.
        DataError: a held-out gallery of one candidate only.
    """
    part = np.asarray(split)
    items = np.arange(len(part)) if items is None else np.asarray(items)
    others = np.arange(len(part)) if others is None else np.asarray(others)
    given = [(f"states[{h}]", s) for h, s in states.items()] + [(f"own[{h}]", s) for h, s in (own or {}).items()]
    for name, array in (*given, ("embeddings", embeddings), ("items", items), ("others", others)):
        if len(array) != len(part):
            raise UsageError(f"{len(part)} pairs have a split, but {name} has {len(array)}.")
    train, dev, test = (part == p for p in ("train", "dev", "test"))
    for name, mask in (("train", train), ("dev", dev), ("test", test)):
        if mask.sum() < 2 and (name == "test" or states):
            raise UsageError(f"Retrieval needs two pairs or more of split {name!r}; there are {int(mask.sum())}.")
    shown, item_at = np.unique(items[test], return_index=True)
    told, other_at = np.unique(others[test], return_index=True)
    if len(shown) < 2 or len(told) < 2:
        raise DataError(f"Held-out pairs hold {len(shown)} {names[0]}(s) and {len(told)} {names[1]}(s): no choice.")
    right = np.zeros((len(shown), len(told)), dtype=bool)
    right[np.searchsorted(shown, items[test]), np.searchsorted(told, others[test])] = True
    rows = []
    target = np.asarray(embeddings, dtype=np.float64)
    for how, by_hidden in (("ridge", states), ("own", own or {})):
        for hidden, array in sorted(by_hidden.items()):
            penalty, points = float("nan"), np.asarray(array, dtype=np.float64)
            if how == "ridge":
                fit = fit_ridge_map(
                    points[train], target[train], x_dev=points[dev], targets_dev=target[dev], l2_grid=l2_grid
                )
                points, penalty = fit(points), fit.l2
            sides = points[test][item_at], target[test][other_at]
            if not all(np.isfinite(s).all() for s in sides):
                raise NumericalError(f"States of hidden state {hidden}, or embeddings, are NaN or infinite.")
            for a, b in ((0, 1), (1, 0)):
                hits, chance = recall_hits(sides[a], sides[b], right if a == 0 else right.T, at=at)
                replicates = crossed_bootstrap(
                    hits[None].astype(np.float64), np.arange(hits.shape[1]), n_boot=n_boot, seed=seed
                )
                low, high = interval(replicates)
                for i, k in enumerate(at):
                    rows.append((
                        hidden, how, names[a], names[b], k, hits[i].mean(), low[i], high[i], chance[i].mean(),
                        hits.shape[1], len(sides[b]), penalty,
                    ))  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _unit(x: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(size == 0, 1, size))
