"""Scores of a classifier on fixed items, call after call, with paired intervals of what an intervention changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spafit.batches import EncodedTexts
from spafit.errors import UsageError
from spafit.metrics import compute_metrics, headline, mean_loss
from spafit.predictions import predict_logits, predicted
from spafit.runtime import generator
from spafit.stats import interval

BATCH = 64


class TaskScore:
    """What ``analysis.causal.effect`` calls as its metric: a classifier's score on items that stay the same.

    Gives ``score``, the task's one number (the mean of its metrics), and for classes ``loss_bits``, the cross-entropy
    per item in bits. The logits of every call are kept, so that differences get a paired interval over items.

    Attributes:
        calls: logits in the order of the task's classes, one array (items, classes) per call since :meth:`restart`.
        n: number of items.
    """

    def __init__(
        self,
        encoded: EncodedTexts,
        tokenizer: Any,
        *,
        metrics: Sequence[str],
        order: Sequence[int],
        regression: bool,
        equal_lengths: bool = False,
        n_boot: int = 1000,
    ):
        """Fix the items.

        Args:
            encoded: items with labels.
            tokenizer: pads them.
            metrics: names of :data:`spafit.metrics.METRICS`.
            order: which of the outputs belongs to each class.
            regression: the labels are numbers.
            equal_lengths: only batches without padding, of at least two items; items that share their length with
                none are left out. Swapping states between items needs that.
            n_boot: bootstrap replicates over items.

        Raises:
            UsageError: no items, or with ``equal_lengths`` none that share a length.
        """
        if encoded.labels is None or not len(encoded):
            raise UsageError("There are no labelled items to score. Choose a split that has labels.")
        lengths = encoded.lengths
        groups = (
            [np.flatnonzero(lengths == n) for n in np.unique(lengths)] if equal_lengths else [np.arange(len(lengths))]
        )
        groups = [g for g in groups if len(g) > 1 or not equal_lengths]
        if not groups:
            raise UsageError(f"No two of the {len(lengths)} items have the same number of tokens. Take more items.")
        cut = [part for g in groups for part in np.array_split(g, max(1, len(g) // BATCH))] if equal_lengths else groups
        self._parts = [
            EncodedTexts(tuple(encoded.items[i] for i in part), encoded.labels[part], 0, encoded.window) for part in cut
        ]
        self._batch = int(max(len(p) for p in self._parts)) if equal_lengths else BATCH
        self._tokenizer, self._metrics, self._order, self._regression = (
            tokenizer,
            tuple(metrics),
            list(order),
            regression,
        )
        self._labels = np.concatenate([p.labels for p in self._parts if p.labels is not None])
        self.n = len(self._labels)
        self._draws = generator(0, "items of the task").integers(self.n, size=(n_boot, self.n))
        self.calls: list[np.ndarray] = []

    def __call__(self, model: Any) -> dict[str, float]:
        """Score a model as it is now."""
        logits = [predict_logits(model, p, self._tokenizer, batch_size=self._batch) for p in self._parts]
        self.calls.append(np.concatenate(logits)[:, self._order])
        return self.of(self.calls[-1])

    def of(self, logits: np.ndarray) -> dict[str, float]:
        """``score``, and ``loss_bits`` of a classifier, from logits of shape (items, classes)."""
        found = compute_metrics(self._metrics, predicted(logits, regression=self._regression), self._labels)
        scores = {"score": headline(found, self._metrics)}
        if not self._regression:
            scores["loss_bits"] = mean_loss(logits, self._labels, regression=False) / np.log(2)
        return scores

    def restart(self) -> TaskScore:
        """Forget earlier calls."""
        self.calls.clear()
        return self

    def with_intervals(self, table: pd.DataFrame) -> pd.DataFrame:
        """Add ``ci_low``, ``ci_high`` and ``n`` to what ``effect`` gave for the calls since :meth:`restart`.

        The interval is of ``effect``: items are resampled, the same ones with and without the intervention.
        """
        replicates = [self._replicates(logits) for logits in self.calls]
        names = list(replicates[0])
        ends = np.array(
            [interval(replicates[1 + i // len(names)][m] - replicates[0][m]) for i, m in enumerate(table["metric"])]
        ).reshape(-1, 2)
        return table.assign(ci_low=ends[:, 0], ci_high=ends[:, 1], n=self.n)

    def _replicates(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        guesses, labels = predicted(logits, regression=self._regression)[self._draws], self._labels[self._draws]
        drawn = {"score": np.mean([resampled_metric(m, guesses, labels) for m in self._metrics], axis=0)}
        if not self._regression:
            top = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
            log_p = top - np.log(np.exp(top).sum(axis=1, keepdims=True))
            bits = -log_p[np.arange(self.n), self._labels.astype(np.int64)] / np.log(2)
            drawn["loss_bits"] = bits[self._draws].mean(axis=1)
        return drawn


def resampled_metric(name: str, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A metric of :data:`spafit.metrics.METRICS` on many resamples at once; both of shape (resamples, items).

    Equal to :func:`spafit.metrics.compute_metrics` row by row, degenerate rows included.

    Returns:
        Shape (resamples,), float64.
    """
    return _RESAMPLED[name](predictions, labels)


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray((predictions == labels).mean(axis=1), dtype=np.float64)


def _f1_of(predictions: np.ndarray, labels: np.ndarray, one: int) -> np.ndarray:
    hit = ((predictions == one) & (labels == one)).sum(axis=1)
    all_of = (predictions == one).sum(axis=1) + (labels == one).sum(axis=1)
    return np.divide(2.0 * hit, all_of, out=np.zeros(len(hit)), where=all_of > 0)


def _macro_f1(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    total, classes = np.zeros(len(labels)), np.zeros(len(labels))
    for one in np.unique(np.concatenate([np.unique(predictions), np.unique(labels)])):
        occurs = ((predictions == one) | (labels == one)).any(axis=1)
        total += np.where(occurs, _f1_of(predictions, labels, one), 0.0)
        classes += occurs
    return total / classes


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    n, k = labels.shape[1], int(max(predictions.max(), labels.max())) + 1
    guessed = np.stack([(predictions == c).sum(axis=1) for c in range(k)], axis=1).astype(np.float64)
    true = np.stack([(labels == c).sum(axis=1) for c in range(k)], axis=1).astype(np.float64)
    right = (predictions == labels).sum(axis=1)
    above = right * n - (guessed * true).sum(axis=1)
    below = np.sqrt((n**2 - (guessed**2).sum(axis=1)) * (n**2 - (true**2).sum(axis=1)))
    return np.divide(above, below, out=np.zeros(len(right)), where=below > 0)


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    x, y = (v.astype(np.float64) - v.mean(axis=1, keepdims=True, dtype=np.float64) for v in (predictions, labels))
    below = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), below, out=np.full(len(x), np.nan), where=below > 0)


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return _pearson(rankdata(predictions, axis=1), rankdata(labels, axis=1))


_RESAMPLED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "f1": lambda p, y: _f1_of(p, y, 1),
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
