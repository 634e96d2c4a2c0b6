"""Logistic regression whose weights have a small rank, for many layers and labellings together.

The weights on standardised features are W = V U with V (width, rank) and U (rank, classes): the probe reads ``rank``
directions of a state and nothing else. A fit minimises the linear probe's objective,

    mean loss in nats + l2/2 · ‖V U‖²,

with half that penalty where items have several labels. With a rank of the classes less one, or of the labels, it is the
linear probe itself (Hewitt & Liang 2019 constrain a probe's capacity in this way). The objective is not convex. A fit
starts from the linear probe at the same penalty, projected on the ``rank`` directions of its logits with the largest
spread over the training items, and L-BFGS takes it to the nearest minimum: the best one in the checks of this package,
which is no proof for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.fitted import FamilyFit, FittedProbe
from probing.probes.linear import DEFAULT_L2, Layer, ProbeProblem
from probing.probes.outputs import absent_outputs, fixed_log_odds, loss_and_residual
from probing.probes.standardise import standardised_rows
from probing.tasks.base import Kind

if TYPE_CHECKING:
    from torch import Tensor

#: Nats per item: a fit stops once its estimated distance from the minimum has been below this twice in a row.
TOLERANCE = 5e-5
#: Evaluations on all rows after which a fit is given up; ``converged`` is then False.
MOST_PASSES = 400
#: Outputs computed at a time (fits × outputs × rows).
BLOCK = 2**21
#: Shorter steps tried in a row before a fit is left where it is.
REFUSALS = 12
#: Added to the features' eigenvalues times the mean curvature of a softmax: the scale on which steps are taken.
CURVATURE, DAMPING = 0.15, 0.01


def fit_low_rank_probes(
    x_train: np.ndarray | Tensor,
    targets: np.ndarray,
    x_dev: np.ndarray | Tensor,
    targets_dev: np.ndarray,
    *,
    rank: int,
    kind: Kind,
    n_classes: int,
    l2_grid: Sequence[float] = DEFAULT_L2,
    device: str = "cpu",
) -> FamilyFit:
    """Choose the penalty of each representation on dev and fit all label sets at it.

    Label set 0 is the task, fitted at every penalty; the others (control tasks) are fitted at the one that it chose.
    A representation's numbers do not depend on which others are in the call.

    Args:
        x_train: training features, (B, n, width).
        targets: (M, n) class positions, or bool (M, n, labels).
        x_dev: dev features, (B, n_dev, width).
        targets_dev: dev targets, shaped like ``targets``.
        rank: rank of the weights, at most the width and the number of outputs.
        kind: ``classes`` or ``multilabel``.
        n_classes: classes or labels.
        l2_grid: penalties to choose from.
        device: torch device of the products.

    Raises:
        UsageError: shapes, labels or penalties that do not fit together.
        NumericalError: features that are not finite.
    """
    sets = targets if kind == "classes" else targets.transpose(0, 2, 1).reshape(-1, targets.shape[1]).astype(np.int64)
    problem = ProbeProblem(x_train, sets, n_classes if kind == "classes" else 2, l2_grid, device, 200, 0.004)
    absent = absent_outputs(targets, n_classes, kind=kind)
    grid, n_sets = problem.l2, len(targets)
    probes, converged, chosen = [], np.empty((len(x_train), n_sets), dtype=bool), np.empty(len(x_train))
    for b in range(len(x_train)):
        layer = _Rotated(Layer(problem, b))

        def fit(which: np.ndarray, l2: np.ndarray, layer: _Rotated = layer) -> _Fits:
            return _fit(layer, targets, absent, which, l2, rank=rank, kind=kind, n_classes=n_classes)

        path = fit(np.zeros(len(grid), dtype=np.int64), grid)
        best = int(np.argmin(_dev_losses(path, layer.layer, x_dev[b], targets_dev[0], absent[0], kind, b)))
        chosen[b] = grid[best]
        rest = fit(np.arange(1, n_sets), np.full(n_sets - 1, chosen[b])) if n_sets > 1 else None
        row = []
        for m in range(n_sets):
            fits, i = (path, best) if m == 0 or rest is None else (rest, m - 1)
            converged[b, m] = fits.converged[i]
            weight, bias = fits.weight[i], fits.bias[i]
            if kind == "multilabel":
                weight = np.where(absent[m], 0.0, weight).astype(np.float32)
                bias = np.where(absent[m], fixed_log_odds(targets[m, 0], problem.n), bias).astype(np.float32)
            row.append(FittedProbe(
                {"factor": fits.factor[i], "weight": weight, "bias": bias, "mean": layer.layer.mean,
                 "scale": layer.layer.scale},
                kind, absent[m] if kind == "classes" else None, problem.n,
            ))  # fmt: skip
        probes.append(row)
    return FamilyFit(probes, converged, np.repeat(chosen[:, None], n_sets, 1))


@dataclass(frozen=True)
class _Fits:
    """Fits of one representation, on standardised features; the first axis counts fits."""

    factor: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    converged: np.ndarray


class _Rotated:
    """A layer's training rows in the eigenbasis of its Gram matrix, each direction scaled so that steps suit it."""

    def __init__(self, layer: Layer):
        self.layer = layer
        spectrum = layer.gram.spectrum[:-1]
        self.spread = spectrum.sqrt()
        self.scale = (CURVATURE * spectrum + DAMPING).rsqrt()
        self.rows = layer.rows[:, :-1] @ (layer.gram.vectors * self.scale)

    def leave(self, factor: Tensor) -> np.ndarray:
        """Factors (fits, width, rank) of these rows -> of the standardised features."""
        vectors = self.layer.gram.vectors * self.scale
        found = (vectors @ factor).cpu()
        return np.ascontiguousarray(found.masked_fill(self.layer.constant[:, None], 0.0).numpy())


def _start(
    layer: _Rotated, which: np.ndarray, l2: np.ndarray, *, rank: int, kind: Kind, n_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (fits, width, rank), (fits, rank, outputs) and biases (fits, outputs) from the linear probes."""
    import torch

    device = layer.rows.device
    if kind == "multilabel":
        columns = (which[:, None] * n_classes + np.arange(n_classes)).ravel()
        linear = layer.layer.fit(columns, np.repeat(l2, n_classes))
        weight = (linear.weights[:, :, 1] - linear.weights[:, :, 0]).reshape(len(which), n_classes, -1)
        weight, bias = weight.transpose(0, 2, 1), (linear.bias[:, 1] - linear.bias[:, 0]).reshape(len(which), -1)
    else:
        linear = layer.layer.fit(which, l2)
        weight, bias = linear.weights, linear.bias
    w = layer.layer.gram.vectors.T @ torch.from_numpy(np.ascontiguousarray(weight)).to(device)  # in the eigenbasis
    logits = (layer.spread[:, None] * w).double().cpu()
    right = torch.linalg.svd(logits, full_matrices=False)[2][:, :rank].to(w)  # (fits, rank, outputs)
    left = (w @ right.transpose(1, 2)) / layer.scale[:, None]
    if right.shape[1] < rank:  # narrower than the rank: the other directions start, and stay, at nothing
        missing = rank - right.shape[1]
        right = torch.cat([right, right.new_zeros(len(w), missing, right.shape[2])], 1)
        left = torch.cat([left, left.new_zeros(len(w), left.shape[1], missing)], 2)
    size = left.norm(dim=1).clamp_min(1e-12).sqrt()  # (fits, rank): factors of equal size make one step suit both
    return left / size[:, None], size[..., None] * right, torch.from_numpy(bias).to(device)


class _Objective:
    """Losses of all fits as functions of their flattened factors and biases, (fits, 1, parameters)."""

    def __init__(
        self,
        layer: _Rotated,
        targets: Tensor,
        absent: Tensor | None,
        l2: Tensor,
        *,
        rank: int,
        outputs: int,
        kind: Kind,
    ):
        self.layer, self.targets, self.absent, self.l2, self.kind = layer, targets, absent, l2, kind
        self.shape = (layer.rows.shape[1], rank, outputs)

    def take(self, index: Tensor) -> _Objective:
        """The fits at ``index``."""
        _, rank, outputs = self.shape
        absent = None if self.absent is None else self.absent[index]
        return _Objective(
            self.layer, self.targets[index], absent, self.l2[index], rank=rank, outputs=outputs, kind=self.kind
        )

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors and biases."""
        width, rank, outputs = self.shape
        a, b = width * rank, width * rank + rank * outputs
        own = flat[:, 0]
        return own[:, :a].view(-1, width, rank), own[:, a:b].view(-1, rank, outputs), own[:, b:]

    def evaluate(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Objective in nats per item, float64 (fits,), and its gradient."""
        import torch

        (v, u, bias), rows = self.split(flat), self.layer.rows
        fits, n = len(flat), len(rows)
        width, rank, outputs = self.shape
        stacked = v.transpose(0, 1).reshape(width, fits * rank)
        total = torch.zeros(fits, dtype=torch.float64, device=rows.device)
        to_v, to_u, to_bias = torch.zeros_like(stacked), torch.zeros_like(u), torch.zeros_like(bias)
        step = max(1024, BLOCK // (fits * outputs))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            inner = (rows[part] @ stacked).view(-1, fits, rank).transpose(0, 1)  # (fits, rows, rank)
            scores = torch.baddbmm(bias[:, None], inner, u)
            loss, residual = loss_and_residual(scores, self.targets[:, part], kind=self.kind, absent=self.absent)
            total += loss.sum(1, dtype=torch.float64)
            to_u += inner.transpose(1, 2) @ residual
            to_bias += residual.sum(1)
            back = (residual @ u.transpose(1, 2)).transpose(0, 1).reshape(-1, fits * rank)
            to_v.addmm_(rows[part].T, back)
        # ‖D V U‖² with D the rows' scale, by products of rank × rank.
        scaled = self.layer.scale.square()[:, None] * v
        inside, outside = v.transpose(1, 2) @ scaled, u @ u.transpose(1, 2)
        penalty = self.l2[:, None, None]
        value = total / n + 0.5 * self.l2.double() * (inside * outside).sum((1, 2), dtype=torch.float64)
        to_v = to_v.view(width, fits, rank).transpose(0, 1) / n + penalty * (scaled @ outside)
        to_u = to_u / n + penalty * (inside @ u)
        return value, torch.cat([to_v.flatten(1), to_u.flatten(1), to_bias / n], 1)[:, None]


class _Identity:
    """No preconditioner: the rows' scale has done its work."""

    def apply(self, v: Tensor) -> Tensor:
        return v


def _fit(
    layer: _Rotated,
    targets: np.ndarray,
    absent: np.ndarray,
    which: np.ndarray,
    l2: np.ndarray,
    *,
    rank: int,
    kind: Kind,
    n_classes: int,
) -> _Fits:
    """Fit label set ``which[i]`` with penalty ``l2[i]`` for every i."""
    import torch

    device = layer.rows.device
    v, u, bias = _start(layer, which, l2, rank=rank, kind=kind, n_classes=n_classes)
    order = torch.argsort(layer.layer.problem.place)  # the rows are shuffled; row i of the layer is item order[i]
    own = torch.from_numpy(targets[which][:, order.numpy()]).to(device)
    some = torch.from_numpy(absent[which][:, None]).to(device) if absent.any() else None
    # The linear probe has two columns per label, of opposite sign: its penalty is half of that on their difference.
    penalty = torch.from_numpy((l2 if kind == "classes" else 0.5 * l2).astype(np.float32)).to(device)
    objective = _Objective(layer, own, some, penalty, rank=rank, outputs=n_classes, kind=kind)
    found, converged = _minimise(objective, torch.cat([v.flatten(1), u.flatten(1), bias], 1)[:, None])
    v, u, bias = objective.split(found)
    return _Fits(layer.leave(v), u.cpu().numpy().copy(), bias.cpu().numpy().copy(), converged.cpu().numpy())


def _minimise(objective: _Objective, start: Tensor) -> tuple[Tensor, Tensor]:
    """L-BFGS on all fits at once, each with its own steps; returns where they stopped, and whether at a minimum."""
    import torch

    from probing.probes.lbfgs import History

    solution, met = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
    active, history, inverse = torch.arange(len(start), device=start.device), History(), _Identity()
    place, (value, gradient) = start, objective.evaluate(start)
    refused, close = torch.zeros_like(active), torch.zeros_like(active)
    direction, length = torch.zeros_like(start), torch.ones_like(value)
    for count in range(1, MOST_PASSES + 1):
        again = refused > 0
        fresh = history.direction(gradient, inverse)
        if count == 1:  # nothing is known of the curvature yet: a short step
            fresh = fresh / gradient.norm(dim=2, keepdim=True).clamp_min(1.0)
        direction = torch.where(again[:, None, None], direction, fresh)
        slope = (gradient * direction).sum((1, 2), dtype=torch.float64)
        length = torch.where(again, 0.3 * length, torch.ones_like(length))
        near = (slope > -2 * TOLERANCE) & (count > 1)
        close = torch.where(again, close, torch.where(near, close + 1, 0))
        still = gradient.abs().amax((1, 2)) < 1e-7  # a stationary start, such as that of features that tell nothing
        done = (close > 1) | (refused > REFUSALS) | still
        if bool(done.any()) or count == MOST_PASSES:
            if count == MOST_PASSES:
                done = torch.ones_like(done)
            stopped = active[done]
            solution[stopped], met[stopped] = place[done], (near | (close > 0) | still)[done]
            keep = (~done).nonzero().squeeze(1)
            if not len(keep):
                break
            objective = objective.take(keep)
            history.take(keep)
            active, place, value, gradient, refused, close, direction, slope, length = (
                t[keep] for t in (active, place, value, gradient, refused, close, direction, slope, length)
            )
        step = (length[:, None, None] * direction).to(place.dtype)
        trial, trial_gradient = objective.evaluate(place + step)
        accepted = trial <= value + 1e-4 * length * slope + 1e-7 * (1 + value)
        history.push(step, trial_gradient - gradient, accepted)
        wide = accepted[:, None, None]
        place, gradient = torch.where(wide, place + step, place), torch.where(wide, trial_gradient, gradient)
        value, refused = torch.where(accepted, trial, value), torch.where(accepted, 0, refused + 1)
    return solution, met


def _dev_losses(
    fits: _Fits, layer: Layer, x: np.ndarray | Tensor, targets: np.ndarray, absent: np.ndarray, kind: Kind, b: int
) -> np.ndarray:
    """Mean loss of each fit on dev, (fits,)."""
    import torch

    v, u, bias = (torch.from_numpy(a) for a in (fits.factor, fits.weight, fits.bias))
    gold, total = torch.from_numpy(targets), torch.zeros(len(v), dtype=torch.float64)
    mask = torch.from_numpy(absent) if absent.any() and kind == "multilabel" else None
    for rows, features in standardised_rows(x, layer.mean, layer.scale, b):
        scores = torch.baddbmm(bias[:, None], features @ v, u)
        wanted = gold[rows].expand(len(v), *gold[rows].shape)
        total += loss_and_residual(scores, wanted, kind=kind, absent=mask)[0].sum(1, dtype=torch.float64)
    return (total / len(targets)).numpy()
