"""Resampling intervals and tests: arrays in, numbers out.

Two rules hold everywhere. Items of one cluster (the words of a sentence) are resampled together, since they are not
independent. And whatever is compared is resampled together: all layers, controls and metrics of a task share one
:class:`BootstrapDraw`, so differences are paired. The exact trend test is in :mod:`spafit.trend`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from scipy import stats as scipy_stats

from spafit.errors import NumericalError, UsageError, check_choice
from spafit.runtime import generator

Alternative = Literal["two-sided", "greater", "less"]

#: Replicates whose cluster counts are held as floats at one time (bounds memory at this many × clusters × 8 bytes).
_CHUNK = 128


@dataclass(frozen=True)
class BootstrapDraw:
    """One resample of clusters crossed with seeds, which can be applied to any number of score arrays.

    Clusters are drawn with replacement, as many as there are; independently, seeds are drawn with replacement where
    there are two or more. The replicate of a mean is the mean over the drawn seeds of (sum of scores over the drawn
    clusters) / (items in the drawn clusters): a ratio, because clusters differ in size (Sellam et al. 2022, "The
    MultiBERTs", call this crossing the multi-bootstrap).

    Do not trust the seed part with fewer than about five seeds: resampling S seeds understates their variance by the
    factor (S - 1) / S. With one seed the interval speaks about that fit alone.

    Attributes:
        codes: position of each item's cluster, shape (items,).
        sizes: items per cluster, shape (groups,).
        cluster_counts: how often each cluster was drawn, shape (n_boot, groups).
        seed_counts: how often each seed was drawn, shape (n_boot, seeds).
    """

    codes: np.ndarray = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    cluster_counts: np.ndarray = field(repr=False)
    seed_counts: np.ndarray = field(repr=False)

    @classmethod
    def make(
        cls, groups: Sequence[Hashable] | np.ndarray, n_seeds: int, *, n_boot: int = 1000, seed: int = 0
    ) -> BootstrapDraw:
        """Draw ``n_boot`` resamples of the clusters in ``groups`` (one label per item) and of ``n_seeds`` seeds.

        The draw depends on the order-free set of labels, ``n_seeds``, ``n_boot`` and ``seed`` alone.

        Raises:
            UsageError: no items, no seeds, or fewer than two replicates.
        """
        codes, sizes = _clusters(groups)
        if n_seeds < 1 or n_boot < 2:
            raise UsageError(f"A bootstrap needs n_seeds >= 1 and n_boot >= 2; got n_seeds={n_seeds}, n_boot={n_boot}.")
        random = generator(seed, "crossed bootstrap")
        n_groups = len(sizes)
        # A byte is enough: a count above 255 needs more than 255 clusters, and then has probability below 1e-300.
        counts = np.empty((n_boot, n_groups), dtype=np.uint8)
        for b in range(n_boot):
            counts[b] = np.bincount(random.integers(n_groups, size=n_groups), minlength=n_groups)
        seeds = np.ones((n_boot, n_seeds), dtype=np.int64)
        if n_seeds > 1:
            seeds = random.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_boot)
        return cls(codes, sizes, counts, seeds)

    @property
    def n_boot(self) -> int:
        """Number of replicates."""
        return len(self.cluster_counts)

    @property
    def n_seeds(self) -> int:
        """Number of seeds that were resampled."""
        return self.seed_counts.shape[1]

    def means(self, values: np.ndarray) -> np.ndarray:
        """Replicates of the mean score of every curve.

        Args:
            values: shape (seeds, curves, items); any real or boolean scores.

        Returns:
            float64 array of shape (n_boot, curves).

        Raises:
            UsageError: the shape does not fit the draw.
            NumericalError: a score is not finite.
        """
        values = self._checked(values)
        if not np.isfinite(values).all():
            raise NumericalError("Scores to resample hold NaN or infinite values; drop those items from all curves.")
        n_seeds, n_curves, _ = values.shape
        sums = np.empty((len(self.sizes), n_seeds, n_curves))
        for s in range(n_seeds):
            sums[:, s] = _group_sums(values[s], self.codes, len(self.sizes))
        flat = sums.reshape(len(self.sizes), -1)
        out = np.empty((self.n_boot, n_curves))
        for rows in self._chunks():
            counts = self.cluster_counts[rows].astype(np.float64)
            means = (counts @ flat) / (counts @ self.sizes)[:, None]
            out[rows] = self._over_seeds(means.reshape(-1, n_seeds, n_curves), rows)
        return out

    def macro_f1(self, labels: np.ndarray, predictions: np.ndarray, *, n_classes: int) -> np.ndarray:
        """Replicates of macro-averaged F1 of every curve.

        Within a replicate the average runs over the classes that occur in the resampled labels or predictions, as
        scikit-learn's ``f1_score(average="macro")`` does; a class that is never right counts 0.

        Args:
            labels: class positions, shape (items,).
            predictions: class positions, shape (seeds, curves, items).
            n_classes: number of classes K; positions lie in [0, K).

        Returns:
            float64 array of shape (n_boot, curves).

        Raises:
            UsageError: shapes do not fit the draw or a class lies outside [0, K).
        """
        predictions = self._checked(predictions)
        labels = np.asarray(labels)
        if labels.shape != self.codes.shape:
            raise UsageError(f"labels have shape {labels.shape}; the draw has {len(self.codes)} items.")
        for name, classes in (("labels", labels), ("predictions", predictions)):
            if classes.min() < 0 or classes.max() >= n_classes:
                raise UsageError(
                    f"{name} hold class {classes.min()} to {classes.max()}; allowed are 0 to {n_classes - 1}."
                )
        n_groups, n_seeds, n_curves = len(self.sizes), *predictions.shape[:2]
        cells = n_groups * n_classes

        def table(classes: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
            # float32 holds these integers exactly (below 2^24) and halves the cost of the products
            flat = np.bincount(self.codes[chosen] * n_classes + classes[chosen], minlength=cells)
            return flat.reshape(n_groups, n_classes).astype(np.float32)

        support = table(labels)
        out = np.empty((self.n_boot, n_curves))
        per_seed = np.empty((self.n_boot, n_seeds, n_curves))
        for s in range(n_seeds):
            for c in range(n_curves):
                predicted = predictions[s, c]
                both = np.hstack([table(predicted) + support, table(labels, predicted == labels)])
                for rows in self._chunks():
                    counted = self.cluster_counts[rows].astype(np.float32) @ both
                    per_seed[rows, s, c] = _macro_f1(counted[:, :n_classes], counted[:, n_classes:])
        for rows in self._chunks():
            out[rows] = self._over_seeds(per_seed[rows], rows)
        return out

    def spearman(self, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
        """Replicates of Spearman's rank correlation of every curve, ranked anew in each resample (ties share a rank).

        Args:
            labels: right numbers, shape (seeds, items).
            predictions: predicted numbers, shape (seeds, curves, items).

        Returns:
            float64 array of shape (n_boot, curves); 0 where labels or predictions of a resample do not vary.

        Raises:
            UsageError: shapes do not fit the draw.
        """
        predictions = self._checked(predictions)
        labels = self._checked(np.asarray(labels)[:, None])[:, 0]
        per_seed = np.empty((self.n_boot, *predictions.shape[:2]))
        ties = [(_Ties(labels[s]), [_Ties(curve) for curve in predictions[s]]) for s in range(self.n_seeds)]
        for rows in self._chunks():
            weights = self.cluster_counts[rows][:, self.codes].astype(np.float64)
            for s, (own, curves) in enumerate(ties):
                right = own.ranks(weights)
                for c, curve in enumerate(curves):
                    per_seed[rows, s, c] = _weighted_correlation(right, curve.ranks(weights), weights)
        out = np.empty((self.n_boot, predictions.shape[1]))
        for rows in self._chunks():
            out[rows] = self._over_seeds(per_seed[rows], rows)
        return out

    def _checked(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        expected = (self.n_seeds, len(self.codes))
        if values.ndim != 3 or (values.shape[0], values.shape[2]) != expected:
            raise UsageError(
                f"Scores to resample have shape {values.shape}; the draw wants (seeds={expected[0]}, curves, "
                f"items={expected[1]})."
            )
        return values

    def _chunks(self) -> list[slice]:
        return [slice(i, min(i + _CHUNK, self.n_boot)) for i in range(0, self.n_boot, _CHUNK)]

    def _over_seeds(self, scores: np.ndarray, rows: slice) -> np.ndarray:
        return np.einsum("bsc,bs->bc", scores, self.seed_counts[rows] / self.n_seeds)


def crossed_bootstrap(
    values: np.ndarray, groups: Sequence[Hashable] | np.ndarray, *, n_boot: int = 1000, seed: int = 0
) -> np.ndarray:
    """Bootstrap replicates of mean scores, clusters crossed with seeds; see :class:`BootstrapDraw`.

    Args:
        values: shape (seeds, curves, items). All curves share the resample, so their differences are paired.
        groups: cluster label of each item, shape (items,).
        n_boot: number of replicates.
        seed: chooses the draw.

    Returns:
        float64 array of shape (n_boot, curves).

    Raises:
        UsageError: shapes do not fit.
        NumericalError: a score is not finite.
    """
    values = np.asarray(values)
    return BootstrapDraw.make(groups, values.shape[0], n_boot=n_boot, seed=seed).means(values)


def interval(replicates: np.ndarray, level: float = 0.95, *, axis: int = 0) -> np.ndarray:
    """Percentile interval: the central ``level`` of the replicates along ``axis``; shape (2, …), low then high.

    Do not trust it for skewed statistics of few clusters (use :func:`bca_interval`) or for maxima, which are biased.
    """
    tail = 50 * (1 - level)
    return np.percentile(replicates, [tail, 100 - tail], axis=axis)


def bca_interval(
    replicates: np.ndarray, estimate: np.ndarray | float, *, leave_one_out: np.ndarray, level: float = 0.95
) -> np.ndarray:
    """Bias-corrected and accelerated interval (Efron 1987).

    Args:
        replicates: shape (n_boot, …).
        estimate: the statistic on the full sample, shape (…).
        leave_one_out: the statistic without each cluster, shape (groups, …); see :func:`jackknife`.
        level: nominal coverage.

    Returns:
        Array of shape (2, …), low then high.
    """
    replicates, estimate = np.asarray(replicates, float), np.asarray(estimate, float)
    n_boot = len(replicates)
    # half of the ties count as below, so that a discrete statistic does not look biased
    below = ((replicates < estimate).sum(axis=0) + 0.5 * (replicates == estimate).sum(axis=0)) / n_boot
    z0 = scipy_stats.norm.ppf(np.clip(below, 0.5 / n_boot, 1 - 0.5 / n_boot))
    spread = leave_one_out.mean(axis=0) - leave_one_out
    cubes, squares = (spread**3).sum(axis=0), (spread**2).sum(axis=0)
    acceleration = np.divide(cubes, 6 * squares**1.5, out=np.zeros_like(squares), where=squares > 0)
    z = scipy_stats.norm.ppf(np.array([(1 - level) / 2, (1 + level) / 2])).reshape(-1, *[1] * estimate.ndim)
    share = scipy_stats.norm.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))
    ordered = np.sort(replicates, axis=0)
    position = share * (n_boot - 1)
    lower = np.floor(position).astype(int)
    upper = np.minimum(lower + 1, n_boot - 1)
    low, high = np.take_along_axis(ordered, lower, axis=0), np.take_along_axis(ordered, upper, axis=0)
    return low + (position - lower) * (high - low)


def jackknife(values: np.ndarray, groups: Sequence[Hashable] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Delete-a-group jackknife of mean scores.

    Args:
        values: shape (curves, items).
        groups: cluster label of each item, shape (items,).

    Returns:
        ``(standard_error, leave_one_out)`` of shapes (curves,) and (groups, curves). With clusters of equal size the
        standard error is exactly sd(cluster means) / sqrt(groups).

    Raises:
        UsageError: fewer than two clusters, or shapes do not fit.
    """
    codes, sizes = _clusters(groups)
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] != len(codes):
        raise UsageError(f"Scores have shape {values.shape}; expected (curves, items={len(codes)}).")
    if len(sizes) < 2:
        raise UsageError("A jackknife needs at least two clusters; all items carry the same group label.")
    sums = _group_sums(values, codes, len(sizes))
    left_out = (sums.sum(axis=0) - sums) / (sizes.sum() - sizes)[:, None]
    n = len(sizes)
    return np.sqrt((n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)), left_out


def paired_cluster_test(
    differences: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    alternative: Alternative = "two-sided",
    n_flips: int = 9999,
    seed: int = 0,
) -> np.ndarray:
    """Sign-flip test that paired score differences have mean zero, whole clusters flipped together.

    All curves share the flips. With at most 13 clusters every flip is enumerated and p is exact; otherwise
    ``n_flips`` random ones are drawn and p = (1 + hits) / (1 + n_flips).

    Do not trust it where differences are strongly skewed and clusters few: under the null each cluster's total is
    taken to be symmetric about zero.

    Args:
        differences: one score minus the other, item by item, shape (curves, items).
        groups: cluster label of each item, shape (items,).
        alternative: ``greater`` asks whether the mean difference is above zero.
        n_flips: number of random flips when there are too many to enumerate.
        seed: chooses the random flips.

    Returns:
        p-values, shape (curves,).

    Raises:
        UsageError: another alternative.
    """
    check_choice("alternative", alternative, get_args(Alternative))
    codes, sizes = _clusters(groups)
    sums = _group_sums(np.atleast_2d(np.asarray(differences, dtype=np.float64)), codes, len(sizes))
    n_groups = len(sizes)
    sign = {"two-sided": 0, "greater": 1, "less": -1}[alternative]

    def hits(flips: np.ndarray) -> np.ndarray:
        drawn, seen = flips @ sums, sums.sum(axis=0)
        tolerance = 1e-12 * np.abs(sums).sum(axis=0)
        if sign == 0:
            return (np.abs(drawn) >= np.abs(seen) - tolerance).sum(axis=0)
        return (sign * drawn >= sign * seen - tolerance).sum(axis=0)

    if n_groups <= 13:
        bits = (np.arange(2**n_groups)[:, None] >> np.arange(n_groups)) & 1
        return hits(1.0 - 2.0 * bits) / 2**n_groups
    random = generator(seed, "sign flips")
    total = np.zeros(sums.shape[1])
    for start in range(0, n_flips, _CHUNK):
        flips = random.integers(0, 2, size=(min(_CHUNK, n_flips - start), n_groups), dtype=np.int8)
        total += hits(1.0 - 2.0 * flips)
    return (1 + total) / (1 + n_flips)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values (family-wise error), in the order given; NaN entries are not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(p, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted


def max_t(
    estimates: np.ndarray, replicates: np.ndarray, *, alternative: Alternative = "two-sided", level: float = 0.95
) -> tuple[np.ndarray, float]:
    """Step-down max-T adjusted p-values from bootstrap replicates (Westfall & Young 1993).

    The replicates, centred on their estimate, stand for the null; each is divided by its bootstrap standard error.
    Correlation between curves (neighbouring layers) makes this less strict than Holm.

    Args:
        estimates: differences from the null value, shape (curves,).
        replicates: their bootstrap replicates, shape (n_boot, curves), paired over curves.
        alternative: ``greater`` asks whether an estimate is above zero.
        level: coverage of the simultaneous band.

    Returns:
        ``(p, critical)``: family-wise adjusted p-values, shape (curves,), and the number of standard errors that a
        simultaneous band of the given level extends around the estimates. A curve that never varies gets p = 1 if
        it is zero and the smallest p otherwise.

    Raises:
        UsageError: another alternative.
    """
    check_choice("alternative", alternative, get_args(Alternative))
    estimates, replicates = np.asarray(estimates, float), np.asarray(replicates, float)
    errors = replicates.std(axis=0, ddof=1)
    varies = errors > 1e-12 * np.abs(replicates).max(axis=0)  # rounding alone does not count
    safe = np.where(varies, errors, 1.0)
    fixed = np.select([estimates > 0, estimates < 0], [np.inf, -np.inf], 0.0)
    seen = np.where(varies, estimates / safe, fixed)
    null = (replicates - replicates.mean(axis=0)) / safe
    if alternative == "two-sided":
        seen, null = np.abs(seen), np.abs(null)
    elif alternative == "less":
        seen, null = -seen, -null
    order = np.argsort(-seen, kind="stable")
    # maximum over the curve itself and all weaker ones: step-down
    successive = np.maximum.accumulate(null[:, order[::-1]], axis=1)[:, ::-1]
    p = (1 + (successive >= seen[order]).sum(axis=0)) / (1 + len(null))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p)
    return np.minimum(adjusted, 1.0), float(np.quantile(null.max(axis=1), level))


def _clusters(groups: Sequence[Hashable] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cluster position per item and items per cluster."""
    labels = np.asarray(groups)
    if labels.ndim != 1 or len(labels) == 0:
        raise UsageError(f"Cluster labels must be a list with one label per item; got shape {labels.shape}.")
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return codes.astype(np.int64), sizes.astype(np.float64)


def _group_sums(values: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum (curves, items) over clusters into (groups, curves), in float64."""
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(n_groups))
    return np.add.reduceat(values[:, order], starts, axis=1, dtype=np.float64).T


def _macro_f1(marginals: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Macro F1 from (support + predicted) and true-positive counts, both (…, classes)."""
    present = marginals > 0
    f1 = np.divide(2 * right, marginals, out=np.zeros_like(right), where=present)
    return f1.sum(axis=-1, dtype=np.float64) / present.sum(axis=-1)


class _Ties:
    """The order of some numbers, with equal ones together."""

    def __init__(self, values: np.ndarray):
        self.order = np.argsort(values, kind="stable")
        found, self.group = np.unique(values, return_inverse=True)
        self.last = np.searchsorted(values[self.order], found, side="right") - 1

    def ranks(self, weights: np.ndarray) -> np.ndarray:
        """Middle ranks where each number occurs as often as its weight says; (replicates, items), up to a constant."""
        upper = np.cumsum(weights[:, self.order], axis=1)[:, self.last]
        middle = upper - 0.5 * np.diff(upper, axis=1, prepend=0)
        return middle[:, self.group.ravel()]


def _weighted_correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis, 0 where one side does not vary."""
    total = weights.sum(1, keepdims=True)
    a, b = (v - (weights * v).sum(1, keepdims=True) / total for v in (a, b))
    size = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    product = (weights * a * b).sum(1)
    return np.divide(product, size, out=np.zeros_like(product), where=size > 1e-9)
