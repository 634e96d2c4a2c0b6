"""Metrics of the GLUE tasks, with a stated value for every degenerate input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spafit.errors import NumericalError, UsageError, did_you_mean

#: A spread below this share of the mean is rounding: a correlation with it would be noise.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kind: whether predictions are class codes or real numbers.
        low: smallest possible value.
        high: largest possible value.
        greater_is_better: the direction in which to select.
        function: takes predictions and labels, both checked and one-dimensional, and returns the value.
    """

    kind: Literal["classification", "regression"]
    low: float
    high: float
    greater_is_better: bool
    function: Callable[[NDArray[Any], NDArray[Any]], float]


def _matthews(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import f1_score

    other = sorted({int(v) for v in (*np.unique(predictions), *np.unique(labels))} - {0, 1})
    if other:
        raise UsageError(f"f1 is for the classes 0 and 1, and there is class {other[0]}. Use macro_f1.")
    return float(f1_score(labels, predictions, pos_label=1, zero_division=0.0))


def _macro_f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def _pearson(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from scipy.stats import pearsonr

    if any(np.ptp(values) <= _ROUNDING * abs(values.mean()) for values in (predictions, labels)):
        return math.nan
    return float(pearsonr(predictions, labels).statistic)


def _spearman(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(predictions), rankdata(labels))


#: Name to metric.
METRICS: dict[str, Metric] = {
    "matthews": Metric("classification", -1.0, 1.0, True, _matthews),
    "accuracy": Metric("classification", 0.0, 1.0, True, _accuracy),
    "f1": Metric("classification", 0.0, 1.0, True, _f1),
    "macro_f1": Metric("classification", 0.0, 1.0, True, _macro_f1),
    "pearson": Metric("regression", -1.0, 1.0, True, _pearson),
    "spearman": Metric("regression", -1.0, 1.0, True, _spearman),
}


def compute_metrics(names: str | Sequence[str], predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score ``predictions`` against ``labels``.

    ======== =====================================================================================================
    matthews phi for two classes, R_K for more (Gorodkin 2004); 0 when predictions or labels are of one class only
    accuracy share of equal codes
    f1       of class 1 against class 0; 0 when class 1 occurs neither in the predictions nor in the labels
    macro_f1 unweighted mean of the F1 of every class that occurs in predictions or labels
    pearson  **NaN, undefined**, when predictions or labels are constant (up to 1e-12 of their mean)
    spearman Pearson's on mid-ranks; NaN when predictions or labels are constant
    ======== =====================================================================================================

    A NaN says that the model predicts one value for all, or that the labels do not differ. It is neither 0 nor worse
    than a negative value: keep it out of averages, and never select a model by it. Values on a few dozen items
    (WNLI's 71) move by several points with a single item.

    Args:
        names: a key of :data:`METRICS`, or several.
        predictions: one per item: integer class codes for classification, real numbers for regression.
        labels: likewise.

    Returns:
        Each name with its value, in the order of ``names``; shares and correlations, not per cent.

    Raises:
        UsageError: unknown name, no items, different lengths, not one value per item, labels that are missing, codes
            that are not whole numbers, or ``f1`` on more than two classes.
        NumericalError: predictions that are not finite.
    """
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        if name not in METRICS:
            raise UsageError(f"Unknown metric {name!r}.{did_you_mean(name, METRICS)} Use one of {', '.join(METRICS)}.")
    got, wanted = _numbers(predictions, "predictions"), _numbers(labels, "labels")
    if len(got) != len(wanted):
        raise UsageError(f"There are {len(got)} predictions for {len(wanted)} labels. Give one prediction per label.")
    if not len(got):
        raise UsageError("There are no items to score. Choose a split that has labels.")
    if hidden := int(np.count_nonzero(~np.isfinite(wanted))):
        raise UsageError(f"{hidden} of {len(wanted)} labels are missing or not finite. Score a split that has labels.")
    if broken := int(np.count_nonzero(~np.isfinite(got))):
        raise NumericalError(
            f"{broken} of {len(got)} predictions are not finite. The training diverged: lower the learning rate, or "
            "use float32."
        )
    for what, values in (("predictions", got), ("labels", wanted)):
        whole = bool(np.all(values == np.round(values)))
        if not whole and any(METRICS[n].kind == "classification" for n in chosen):
            name = next(n for n in chosen if METRICS[n].kind == "classification")
            raise UsageError(f"{name} needs class codes, and the {what} are not whole numbers. Take the argmax first.")
    result = {}
    for name in chosen:
        kind = np.int64 if METRICS[name].kind == "classification" else np.float64
        result[name] = METRICS[name].function(got.astype(kind), wanted.astype(kind))
    return result


def mean_loss(logits: NDArray[Any], labels: NDArray[Any], *, regression: bool) -> float:
    """Mean negative log-likelihood in nats, or mean squared error of a regression.

    Args:
        logits: shape (items, classes), or (items, 1) of a regression.
        labels: codes or values, shape (items,).
        regression: which of the two.
    """
    from scipy.special import log_softmax

    values = np.asarray(logits, dtype=np.float64)
    if regression:
        return float(np.mean((values.reshape(-1) - labels) ** 2))
    shares = log_softmax(values, axis=1)
    return float(-np.mean(shares[np.arange(len(shares)), np.asarray(labels).astype(np.int64)]))


def headline(metrics: Mapping[str, float], names: Sequence[str]) -> float:
    """Return the task's one number: the mean of its metrics, as the GLUE benchmark averages them (Wang et al. 2019).

    MRPC and QQP average accuracy and F1, STS-B Pearson and Spearman, the others have one metric. MNLI's two test sets
    are scored apart and averaged by the caller. NaN when one of the metrics is undefined.

    Raises:
        UsageError: ``names`` is empty, or ``metrics`` lacks one of them.
    """
    if not names:
        raise UsageError("A headline needs the name of at least one metric.")
    for name in names:
        if name not in metrics:
            raise UsageError(f"The metrics lack {name!r}. They hold {', '.join(metrics) or 'nothing'}.")
    return math.fsum(metrics[name] for name in names) / len(names)


def _numbers(values: ArrayLike, what: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The {what} are not numbers ({error}). Give class codes or real numbers.") from error
    if array.ndim != 1:
        raise UsageError(
            f"The {what} have the shape {array.shape}. Give one value per item: the argmax of class scores, or the "
            "single output of a regression."
        )
    return array
