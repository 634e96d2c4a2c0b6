"""The linear probe: multinomial logistic regression on standardised features, for many layers and labellings together.

Features are standardised on the training rows (population standard deviation; columns that do not vary get scale 1 and
weight 0). With W the weights on standardised features and b the intercepts, one column per class for every K >= 2,
a fit minimises

    mean log loss in nats + l2/2 · ‖W‖²

with the intercept unpenalised. In scikit-learn's ``LogisticRegression(C=…)`` on the same standardised features this is
C = 1 / (l2 · n) for three classes and more. For two classes scikit-learn has one column, the difference of ours, whose
penalty is a quarter of ‖W‖²: the same predictions come from C = 2 / (l2 · n).

A class without a training item has no finite optimum. It takes no part in the fit; ``log_probabilities`` then gives
it half a pseudo-item's share, ½ / (n + ½ · absent classes), and scales the other classes down to match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.standardise import chunks, moments, standardised_rows
from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator

if TYPE_CHECKING:
    import torch

#: Penalties that are tried by default. On 40,000 words (UD EWT, MiniLM) the choice is the second, on sentence tasks of
#: 2,000 items the third to the fifth; the last is chosen where the representation says next to nothing of the label.
DEFAULT_L2 = (3e-4, 1.5e-3, 1e-2, 7e-2, 5e-1)
#: Bits per item: a fit stops once its estimated distance from the minimum is below this, after one more step.
DEFAULT_TOLERANCE = 0.004
#: Coefficients of the fits that run together, at most: the solver keeps about thirty arrays of that size.
BATCH_COEFFICIENTS = 2**22
#: A warm start leaves out features whose mean or spread moved by more than this many of their former spread.
FAR = 1e3
#: Rows that are scored at a time.
SCORED_ROWS = 8192

_LN2 = float(np.log(2))


@dataclass(frozen=True)
class LinearProbeFit:
    """Linear probes of B representations × M label sets × P penalties, trained on the same n items.

    Attributes:
        weights: float32, (B, M, P, width, classes), on standardised features; zero for absent classes.
        bias: float32, (B, M, P, classes).
        mean: float32, (B, width): subtracted from the features.
        scale: float32, (B, width): divides them afterwards.
        l2: the penalties, (P,); (B, 1) from :func:`fit_selected`, where each representation has its own.
        converged: bool, (B, M, P): whether the estimated distance from the minimum fell below the tolerance.
        gap: float64, (B, M, P): that estimate in bits per item, before the fit's last step. It takes the objective
            for a parabola with an approximate Hessian: right within a factor of about two near the minimum.
        iterations: passes over all training rows, (B, M, P).
        present: bool, (M, classes): which classes have training items.
        n_items: training items.
    """

    weights: np.ndarray = field(repr=False)
    bias: np.ndarray = field(repr=False)
    mean: np.ndarray = field(repr=False)
    scale: np.ndarray = field(repr=False)
    l2: np.ndarray
    converged: np.ndarray
    gap: np.ndarray = field(repr=False)
    iterations: np.ndarray = field(repr=False)
    present: np.ndarray = field(repr=False)
    n_items: int

    def only(self, position: int) -> LinearProbeFit:
        """The fit of one representation, B = 1."""
        at = slice(position, position + 1)
        names = ("weights", "bias", "mean", "scale", "l2", "converged", "gap", "iterations")
        return replace(self, **{name: getattr(self, name)[at] for name in names})

    def log_probabilities(self, x: np.ndarray | torch.Tensor, *, label_set: int | None = None) -> np.ndarray:
        """Natural logarithms of the class probabilities (divide by ln 2 for bits).

        Args:
            x: features, (B, n, width), in the units of the training features.
            label_set: one of the M label sets; all of them by default.

        Returns:
            float32, (B, M, P, n, classes), or (B, P, n, classes) for one label set. This is large for many classes:
            score part of the representations or of the rows at a time where memory is short.

        Raises:
            UsageError: ``x`` has another shape.
            NumericalError: ``x`` is not finite.
        """
        representations, width = self.mean.shape
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (representations, width):
            raise UsageError(
                f"The probe was fitted on {representations} representation(s) of width {width}; x has shape "
                f"{tuple(x.shape)}, and ({representations}, items, {width}) is needed."
            )
        sets = range(len(self.present)) if label_set is None else [label_set]
        penalties, classes = self.weights.shape[2], self.weights.shape[4]
        out = np.empty((representations, len(sets), penalties, x.shape[1], classes), dtype=np.float32)
        for b in range(representations):
            for rows, features in standardised_rows(x[b], self.mean[b], self.scale[b], b):
                for i, m in enumerate(sets):
                    for p in range(penalties):
                        out[b, i, p, rows] = self._log_probabilities(features, b, m, p)
        return out if label_set is None else out[:, 0]

    def _log_probabilities(self, features: torch.Tensor, b: int, m: int, p: int) -> torch.Tensor:
        import torch

        logits = torch.from_numpy(self.bias[b, m, p]) + features @ torch.from_numpy(self.weights[b, m, p])
        return log_softmax_with_absent(logits, self.present[m], self.n_items)


def log_softmax_with_absent(logits: torch.Tensor, present: np.ndarray, n_items: int) -> torch.Tensor:
    """Natural log probabilities, (n, classes), with half a pseudo-item's share for classes without training items."""
    import torch

    if present.all():
        return torch.log_softmax(logits, 1)
    there = torch.from_numpy(present)
    absent = int((~there).sum())
    share = 0.5 / (n_items + 0.5 * absent)
    log_p = torch.log_softmax(logits.masked_fill(~there, -torch.inf), 1) + float(np.log1p(-absent * share))
    return log_p.masked_fill(~there, float(np.log(share)))


def fit_linear_probes(
    x: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    *,
    n_classes: int,
    l2: Sequence[float] = DEFAULT_L2,
    device: str = "cpu",
    max_iterations: int = 200,
    tolerance: float = DEFAULT_TOLERANCE,
    warm_start: LinearProbeFit | None = None,
) -> LinearProbeFit:
    """Fit every representation × label set × penalty.

    Representations are fitted one after the other: a representation's numbers do not depend on which others are in the
    call, and only one is copied at a time. Label sets and penalties share the products with the features; which others
    there are changes a fit by rounding, so within the tolerance. The same call gives the same bytes on one machine
    with one number of threads.

    Args:
        x: training features, (B, n, width), any float type.
        labels: integers from 0 to ``n_classes`` - 1, (M, n) or (n,).
        n_classes: number of classes, at least two.
        l2: penalties (see the module's text for the scale), all positive.
        device: torch device for the products; one with float64.
        max_iterations: passes over all rows after which a fit is given up; ``converged`` is then False.
        tolerance: bits per item, see :data:`DEFAULT_TOLERANCE`.
        warm_start: a fit to start from, such as that of another draw of the training items; of the same shape, but
            it may hold fewer label sets: those after them start from zero.

    Raises:
        UsageError: shapes, labels or penalties that do not fit together.
        NumericalError: features that are not finite; names the representation.
    """
    problem = ProbeProblem(x, labels, n_classes, l2, device, max_iterations, tolerance)
    shape = (len(x), len(problem.labels), len(problem.l2))
    if warm_start is not None:
        given = warm_start.weights.shape
        if (given[0], *given[2:]) != (shape[0], shape[2], x.shape[2], n_classes) or given[1] > shape[1]:
            raise UsageError(
                f"warm_start holds weights of shape {given}; this call fits {(*shape, x.shape[2], n_classes)}, and "
                "only the number of label sets may be smaller."
            )
    sets, penalties = (i.ravel() for i in np.indices(shape[1:]))
    layers = []
    for b in range(len(x)):
        layer = Layer(problem, b)
        layers.append(layer.fit(sets, problem.l2[penalties], start=warm_start))
    return _assemble(problem, layers, shape, problem.l2)


def fit_selected(
    x_train: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    x_dev: np.ndarray | torch.Tensor,
    labels_dev: np.ndarray,
    *,
    n_classes: int,
    l2_grid: Sequence[float] = DEFAULT_L2,
    task_sets: int = 1,
    device: str = "cpu",
    max_iterations: int = 200,
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[LinearProbeFit, np.ndarray]:
    """Choose the penalty of each representation on dev and fit all label sets at it.

    The first label set is the task: it is fitted at every penalty, and the one with the lowest log loss on dev is kept.
    The others (control tasks) are fitted at that penalty only, since selectivity compares probes of the same settings.

    Args:
        x_train: training features, (B, n, width).
        labels: training labels, (M, n) or (n,).
        x_dev: dev features, (B, n_dev, width).
        labels_dev: dev labels, shaped like ``labels``; only those of the task are read.
        n_classes: number of classes.
        l2_grid: penalties to choose from; equal losses go to the first.
        task_sets: leading label sets that make up the task, such as one per label where items have several; the
            penalty has the lowest sum of their log losses.
        device: torch device for the products; one with float64.
        max_iterations: see :func:`fit_linear_probes`.
        tolerance: see :func:`fit_linear_probes`.

    Returns:
        The fit, with P = 1, and the chosen penalties, (B,).

    Raises:
        UsageError: as :func:`fit_linear_probes`.
        NumericalError: as :func:`fit_linear_probes`.
    """
    problem = ProbeProblem(x_train, labels, n_classes, l2_grid, device, max_iterations, tolerance)
    dev = np.atleast_2d(np.asarray(labels_dev))[:task_sets]
    if x_dev.ndim != 3 or x_dev.shape != (len(x_train), dev.shape[1], x_train.shape[2]):
        raise UsageError(
            f"x_dev has shape {tuple(x_dev.shape)}; with {dev.shape[1]} dev labels it must be "
            f"{(len(x_train), dev.shape[1], x_train.shape[2])}."
        )
    check_labels(dev, n_classes)
    grid, controls = len(problem.l2), np.arange(task_sets, len(problem.labels))
    layers, chosen = [], np.empty(len(x_train))
    for b in range(len(x_train)):
        layer = Layer(problem, b)
        path = layer.fit(np.repeat(np.arange(task_sets), grid), np.tile(problem.l2, task_sets))
        scored = _assemble(problem, [path], (1, task_sets, grid), problem.l2)
        best = int(np.argmin(_mean_bits(scored, x_dev[b : b + 1], dev)))
        chosen[b] = problem.l2[best]
        kept = path.take(np.arange(task_sets) * grid + best)
        layers.append(kept.join(layer.fit(controls, np.full(len(controls), chosen[b]))))
    return _assemble(problem, layers, (len(x_train), len(problem.labels), 1), chosen[:, None]), chosen


def _mean_bits(fit: LinearProbeFit, x: np.ndarray | torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Mean log loss in bits of a single representation, summed over the label sets (sets, items), (P,)."""
    total, items = np.zeros(fit.weights.shape[2]), labels.shape[1]
    for start in range(0, items, SCORED_ROWS):
        rows = slice(start, start + SCORED_ROWS)
        log_p = fit.log_probabilities(x[:, rows])[0]
        total -= np.take_along_axis(log_p, labels[:, None, rows, None], 3).sum((0, 2, 3), dtype=np.float64)
    return total / (items * _LN2)


class ProbeProblem:
    """Checked arguments, and what all representations share.

    Attributes:
        labels: (label sets, n), as given.
        present: bool, (label sets, classes): which classes have training items.
        order: (label sets, classes): position of each class in the solver, where the first class must be present.
        place: (n,): where each row goes, so that prefixes are random samples, in whatever order the items came.
        shuffled: int64, (label sets, n): the solver's labels in the order of the shuffled rows, on the device.
    """

    def __init__(
        self,
        x: np.ndarray | torch.Tensor,
        labels: np.ndarray,
        n_classes: int,
        l2: Sequence[float],
        device: str,
        max_iterations: int,
        tolerance: float,
    ):
        import torch

        self.labels = np.atleast_2d(np.asarray(labels))
        self.l2 = np.asarray(l2, dtype=np.float64)
        if x.ndim != 3 or 0 in x.shape or self.labels.ndim != 2 or self.labels.shape[1] != x.shape[1]:
            raise UsageError(
                f"x has shape {tuple(x.shape)} and labels {self.labels.shape}; they must be (representations, items, "
                "width), none of them zero, and (label sets, items)."
            )
        if n_classes < 2:
            raise UsageError(f"n_classes is {n_classes}; a probe needs at least two classes.")
        if self.l2.ndim != 1 or not len(self.l2) or not (np.isfinite(self.l2) & (self.l2 > 0)).all():
            raise UsageError(f"The penalties l2 are {list(l2)}; give one or more positive numbers.")
        if max_iterations < 1 or not tolerance > 0:
            raise UsageError(
                f"max_iterations is {max_iterations} and tolerance {tolerance}; at least 1 and above 0 are needed."
            )
        if torch.device(device).type == "mps":
            raise UsageError("The probe solver sums losses in float64, which 'mps' does not have. Use device='cpu'.")
        check_labels(self.labels, n_classes)
        self.x, self.classes, self.device = x, n_classes, device
        self.max_iterations, self.tolerance = max_iterations, tolerance
        self.n, self.width = x.shape[1], x.shape[2]
        self.present = np.stack([np.bincount(row, minlength=n_classes) > 0 for row in self.labels])
        # The solver's first class must be present: swap the first class that is into its place (and back by the same).
        first = self.present.argmax(1)
        self.order = np.tile(np.arange(n_classes), (len(first), 1))
        self.order[np.arange(len(first)), first] = 0
        self.order[:, 0] = first
        # One shuffle for all representations: prefixes are then random samples, in whatever order the items came.
        self.place = torch.from_numpy(generator(0, "probe rows", self.n).permutation(self.n))
        shuffled = torch.empty(self.labels.shape, dtype=torch.int64)
        shuffled[:, self.place] = torch.from_numpy(np.take_along_axis(self.order, self.labels.astype(np.int64), 1))
        self.shuffled = shuffled.to(device)


def check_labels(labels: np.ndarray, n_classes: int) -> None:
    """Raise UsageError unless the labels are integers from 0 to ``n_classes`` - 1."""
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= n_classes:
        raise UsageError(
            f"Labels must be integers from 0 to {n_classes - 1}; got {labels.dtype} from {labels.min()} to "
            f"{labels.max()}."
        )


@dataclass(frozen=True)
class _Fitted:
    """Fits of one representation; the first axis of all but ``mean`` and ``scale`` counts fits."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    gap: np.ndarray
    iterations: np.ndarray

    def take(self, index: Sequence[int] | np.ndarray) -> _Fitted:
        return _Fitted(
            self.mean, self.scale, self.weights[index], self.bias[index], self.gap[index], self.iterations[index]
        )

    def join(self, other: _Fitted) -> _Fitted:
        pairs = ((getattr(self, k), getattr(other, k)) for k in ("weights", "bias", "gap", "iterations"))
        return _Fitted(self.mean, self.scale, *(np.concatenate(pair) for pair in pairs))


def _assemble(
    problem: ProbeProblem, layers: Sequence[_Fitted], shape: tuple[int, int, int], l2: np.ndarray
) -> LinearProbeFit:
    def stack(name: str) -> np.ndarray:
        values = np.stack([getattr(layer, name) for layer in layers])
        return values.reshape(*shape, *values.shape[2:])

    gap = stack("gap")
    return LinearProbeFit(
        weights=stack("weights"),
        bias=stack("bias"),
        mean=np.stack([layer.mean for layer in layers]),
        scale=np.stack([layer.scale for layer in layers]),
        l2=l2,
        converged=gap < problem.tolerance,
        gap=gap,
        iterations=stack("iterations"),
        present=problem.present[: shape[1]],
        n_items=problem.n,
    )


class Layer:
    """One representation, standardised, shuffled and ready to be fitted."""

    def __init__(self, problem: ProbeProblem, b: int):
        import torch

        from probing.probes.solver import Gram

        self.problem, self.b = problem, b
        self.mean, self.scale, constant = moments(problem.x[b], b)
        self.constant = torch.from_numpy(constant)
        # A column that holds rounding only must not be read: zero features get zero weights.
        factor = (1 / torch.from_numpy(self.scale)).masked_fill_(self.constant, 0.0)
        centre = torch.from_numpy(self.mean)
        rows = torch.ones(problem.n, problem.width + 1)
        for part, values in chunks(problem.x[b]):
            rows[problem.place[part], :-1] = (values - centre).mul_(factor)
        self.rows = rows.to(problem.device)
        self.gram = Gram(self.rows)

    def fit(self, sets: np.ndarray, l2: np.ndarray, *, start: LinearProbeFit | None = None) -> _Fitted:
        """Fit label set ``sets[i]`` with penalty ``l2[i]`` for every i."""
        size = max(1, BATCH_COEFFICIENTS // (self.problem.classes * (self.problem.width + 1)))
        weights = np.empty((len(sets), self.problem.width, self.problem.classes), dtype=np.float32)
        bias = np.empty((len(sets), self.problem.classes), dtype=np.float32)
        gap, iterations = np.empty(len(sets)), np.empty(len(sets), dtype=np.int64)
        for first in range(0, len(sets), size):
            part = slice(first, first + size)
            weights[part], bias[part], gap[part], iterations[part] = self._fit_together(
                sets[part], l2[part], *self._start(start, sets[part], part)
            )
        return _Fitted(self.mean, self.scale, weights, bias, gap, iterations)

    def _start(
        self, earlier: LinearProbeFit | None, sets: np.ndarray, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients to start from, and for which fits they come from ``earlier`` (standardised in its own way)."""
        import torch

        start = torch.zeros(len(sets), self.problem.classes, self.problem.width + 1)
        warm = torch.zeros(len(sets), dtype=torch.bool)
        if earlier is not None:
            ratio = (self.scale / earlier.scale[self.b])[:, None]
            shift = (self.mean - earlier.mean[self.b]) / earlier.scale[self.b]
            # A feature that hardly varied before and moved since would begin with an enormous coefficient.
            far = (ratio[:, 0] > FAR) | (np.abs(shift) > FAR)
            ratio, shift = np.where(far[:, None], 0.0, ratio), np.where(far, 0.0, shift)
            weights = earlier.weights[self.b].reshape(-1, self.problem.width, self.problem.classes)[part]
            bias = earlier.bias[self.b].reshape(-1, self.problem.classes)[part]
            bias = bias + np.einsum("d,fdk->fk", shift, weights)
            both = np.concatenate([weights * ratio, bias[:, None]], 1).transpose(0, 2, 1)
            warm[: len(both)] = True
            start[: len(both)] = torch.from_numpy(both.astype(np.float32))
        return start, warm

    def _fit_together(
        self, sets: np.ndarray, l2: np.ndarray, start: torch.Tensor, warm: torch.Tensor
    ) -> tuple[np.ndarray, ...]:
        import torch

        from probing.probes.solver import Fits, solve

        problem = self.problem
        index = torch.from_numpy(sets).to(problem.device)
        swap = torch.from_numpy(problem.order)[sets][:, :, None].expand(start.shape)
        present = torch.from_numpy(np.take_along_axis(problem.present, problem.order, 1)[sets])
        penalties = torch.from_numpy(l2.astype(np.float32)).to(problem.device)
        fits = Fits(self.rows, problem.shuffled, index, penalties, present.to(problem.device), gram=self.gram)
        found = solve(
            fits,
            start=start.gather(1, swap).to(problem.device),
            warm=warm.to(problem.device),
            tolerance=problem.tolerance * _LN2,
            max_iterations=problem.max_iterations,
        )
        gap = (found.gap / _LN2).cpu().numpy()
        plain = found.coefficients.cpu().masked_fill(~present[:, :, None], 0.0).gather(1, swap)
        weights = plain[..., :-1].masked_fill(self.constant, 0.0).transpose(1, 2)
        if not (torch.isfinite(plain).all() and np.isfinite(gap).all()):
            raise NumericalError(
                f"Representation {self.b}: a fit is not finite although its features are. Look for extreme values."
            )
        return weights.numpy(), plain[..., -1].numpy(), gap, found.passes.cpu().numpy()
