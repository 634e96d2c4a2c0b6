"""The scores of a task's predictions by its kind, with bootstrap replicates.

=============  ==========================================================================================
``accuracy``   share of items whose prediction is right; with several labels: whose whole set is right
``macro_f1``   F1 averaged over classes
``micro_f1``   with several labels: F1 of all item-label pairs together
``r2``         1 − squared error / squared deviation from the scored items' mean; a mean guess is at about 0
``spearman``   rank correlation of predicted and right numbers; 0 where the prediction does not vary
``uuas``       share of a dependency tree's edges in the spanning tree of predicted distances, and the other scores of
               trees (:mod:`probing.tree_scores`)
``bits``       bits saved per item (:meth:`probing.targets.Answers.score`)
=============  ==========================================================================================

Where a score is no mean over items (``micro_f1``, ``r2``) its replicates pool the sums behind it over the drawn seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from probing.tasks.base import Kind

if TYPE_CHECKING:
    from probing.fitting import ControlFits, TaskFit
    from spafit.stats import BootstrapDraw

#: Metrics of each kind of task, in the order of the tables; the first is the one that tables and figures show.
METRICS: dict[Kind, tuple[str, ...]] = {
    "classes": ("accuracy", "macro_f1", "bits"),
    "multilabel": ("micro_f1", "accuracy", "bits"),
    "number": ("r2", "spearman", "bits"),
}
#: Metrics whose difference from a control is given.
PAIRED = ("accuracy", "micro_f1", "r2", "bits")


def primary_metric(kind: Kind) -> str:
    """The metric that tables and figures show for a kind of task."""
    return METRICS[kind][0]


def shown_metric(metrics: Iterable[str]) -> str:
    """The primary metric of the kind of task that has these metrics."""
    found = set(metrics)
    return next((m for m in ("r2", "micro_f1", "uuas") if m in found), "accuracy")


def points(metric: str, fit: TaskFit, fits: ControlFits, chosen: np.ndarray) -> np.ndarray:
    """The metric on the chosen items of each seed and hidden state, (seeds, hidden)."""
    if metric == "macro_f1":
        return _macro_f1(fits.labels[0, chosen], fits.predictions[:, :, chosen])
    if metric == "spearman":
        return _spearman(fits.labels[:, chosen], fits.predictions[:, :, chosen])
    return _combine(metric, [part.mean(-1) for part in _parts(metric, fit, fits, chosen)])


def replicates(
    metric: str, fit: TaskFit, fits: ControlFits, chosen: np.ndarray, draw: BootstrapDraw, *, seed: int | None = None
) -> np.ndarray:
    """Bootstrap replicates of the metric, (replicates, hidden).

    Args:
        metric: a metric of the task's kind.
        fit: the task's fits.
        fits: those of one control.
        chosen: bool, which test items.
        draw: resamples of the chosen items' clusters, crossed with seeds.
        seed: position of the only seed; None takes all. A single fit stands beside each of the draw's seeds.
    """
    if seed is not None:
        one = slice(seed, seed + 1)
        fits = replace(fits, seeds=fits.seeds[one], predictions=fits.predictions[one], labels=fits.labels[one],
                       bits=fits.bits[one])  # fmt: skip
    times = draw.n_seeds if len(fits.seeds) == 1 else 1
    if metric == "macro_f1":
        guesses = np.repeat(fits.predictions[:, :, chosen], times, 0)
        return draw.macro_f1(fits.labels[0, chosen], guesses, n_classes=len(fit.names))
    if metric == "spearman":
        both = (np.repeat(v[..., chosen], times, 0) for v in (fits.labels, fits.predictions))
        return draw.spearman(*both)
    return _combine(metric, [draw.means(np.repeat(part, times, 0)) for part in _parts(metric, fit, fits, chosen)])


def majority_score(fit: TaskFit, fits: ControlFits, chosen: np.ndarray) -> np.ndarray:
    """The primary metric of answering without a look at the states, (seeds,): chance."""
    same = np.broadcast_to(fits.majority[:, None, None], (len(fits.seeds), 1, fits.predictions.shape[2]))
    return points(primary_metric(fit.kind), fit, replace(fits, predictions=same), chosen)[:, 0]


def _parts(metric: str, fit: TaskFit, fits: ControlFits, chosen: np.ndarray) -> list[np.ndarray]:
    """What the metric is made of, item by item: arrays (seeds, hidden or 1, items)."""
    if metric == "bits":
        return [fits.bits[:, :, chosen].astype(np.float64)]
    labels, predictions = fits.labels[:, None, chosen], fits.predictions[:, :, chosen]
    if metric == "accuracy":
        return [(predictions == labels).astype(np.float64)]
    if metric == "r2":
        centre = labels.mean()  # squares of numbers far from zero would lose their difference
        return [(predictions - labels) ** 2, (labels - centre) ** 2, labels - centre]
    assert metric == "micro_f1"
    assert fit.members is not None
    sizes = fit.members.sum(1)
    both = np.empty(predictions.shape)
    for s, k in np.ndindex(predictions.shape[:2]):
        both[s, k] = (fit.members[predictions[s, k]] & fit.members[labels[s, 0]]).sum(1)
    return [2 * both, (sizes[predictions] + sizes[labels]).astype(np.float64)]


def _combine(metric: str, means: list[np.ndarray]) -> np.ndarray:
    if metric == "r2":
        error, square, mean = means
        variance = np.broadcast_to(square - mean**2, error.shape)
        return 1 - np.divide(error, variance, out=np.full_like(error, np.nan), where=variance > 0)
    if metric == "micro_f1":
        return np.divide(means[0], means[1], out=np.zeros_like(means[0]), where=means[1] > 0)
    return means[0]


def _macro_f1(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """F1 averaged over the classes that occur among labels or predictions, shape (seeds, hidden)."""
    from sklearn.metrics import f1_score

    return np.array([[f1_score(labels, g, average="macro", zero_division=0.0) for g in seed] for seed in predictions])


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    a, b = rankdata(labels, axis=-1)[:, None], rankdata(predictions, axis=-1)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    size = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    product = (a * b).sum(-1)
    return np.divide(product, size, out=np.zeros_like(product), where=size > 0)
