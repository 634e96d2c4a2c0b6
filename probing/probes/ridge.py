"""Linear regression with an L2 penalty, for many layers, targets and penalties together, in closed form.

Features are standardised on the training rows as for the linear probe, targets too. With w the weights on standardised
features, a fit minimises

    half the mean squared error in standard deviations of the training targets + l2/2 · ‖w‖²

which is scikit-learn's ``Ridge(alpha=l2 * n)`` on the same standardised arrays. One eigendecomposition of the features'
Gram matrix solves every penalty and every target; the penalty with the smallest squared error on dev is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.fitted import FamilyFit, FittedProbe
from probing.probes.standardise import chunks, moments, standardised_rows
from spafit.errors import NumericalError, UsageError

if TYPE_CHECKING:
    import torch

#: Penalties tried by default: from next to none to one that leaves nothing of a feature. All cost one solve.
RIDGE_L2 = tuple(float(f"{v:.3g}") for v in np.logspace(-4, 3, 15))
#: Smallest deviation of residuals that is believed, in standard deviations of the training targets.
SMALLEST_DEVIATION = 1e-6


def fit_ridge_probes(
    x_train: np.ndarray | torch.Tensor,
    targets: np.ndarray,
    x_dev: np.ndarray | torch.Tensor,
    targets_dev: np.ndarray,
    *,
    l2_grid: Sequence[float] = RIDGE_L2,
    device: str = "cpu",
) -> FamilyFit:
    """Choose the penalty of each representation on dev and fit all target sets at it.

    Target set 0 is the task, whose squared error on dev decides; the others (control tasks) are fitted at the same
    penalty. The residuals' deviation, which makes a Gaussian of each prediction, is taken on dev for every set.

    Args:
        x_train: training features, (B, n, width).
        targets: finite numbers, (M, n) or (n,).
        x_dev: dev features, (B, n_dev, width).
        targets_dev: dev targets, shaped like ``targets``.
        l2_grid: penalties to choose from.
        device: torch device for the products.

    Returns:
        The probes; always converged.

    Raises:
        UsageError: shapes that do not fit together, or targets that do not vary.
        NumericalError: features or targets that are not finite.
    """
    y, y_dev = checked_targets(targets, len_x=x_train.shape[1]), checked_targets(targets_dev, len_x=x_dev.shape[1])
    grid = np.asarray(l2_grid, dtype=np.float64)
    mean, spread = y.mean(1), y.std(1)
    if (spread == 0).any():
        raise UsageError(f"Every training target of set {int(spread.argmin())} is the same; a regression needs others.")
    standard = (y - mean[:, None]) / spread[:, None]
    probes, chosen = [], np.empty(len(x_train))
    for b in range(len(x_train)):
        centre, scale, constant = moments(x_train[b], b)
        gram, cross = _products(x_train[b], centre, scale, constant, standard, device)
        values, vectors = np.linalg.eigh(gram)
        inside = vectors.T @ cross  # (width, M): the targets' part along each eigenvector
        path = inside[:, 0, None] / (values.clip(0)[:, None] + grid)  # (width, P)
        dev = _features(x_dev[b], centre, scale, constant, b)
        errors = ((dev @ (vectors @ path) - _in_units(y_dev[0], mean[0], spread[0])[:, None]) ** 2).mean(0)
        chosen[b] = grid[int(errors.argmin())]
        weights = (vectors @ (inside / (values.clip(0) + chosen[b])[:, None])).astype(np.float32)
        weights[constant] = 0.0
        row = []
        for m in range(len(y)):
            residual = dev @ weights[:, m].astype(np.float64) - _in_units(y_dev[m], mean[m], spread[m])
            row.append(number_probe(
                {"mean": centre, "scale": scale, "weight": weights[:, m : m + 1], "bias": np.zeros(1)},
                residual, mean=mean[m], spread=spread[m], n_items=y.shape[1],
            ))  # fmt: skip
        probes.append(row)
    return FamilyFit(probes, np.ones((len(probes), len(y)), dtype=bool), np.repeat(chosen[:, None], len(y), 1))


def number_probe(
    parameters: dict[str, np.ndarray], residual: np.ndarray, *, mean: float, spread: float, n_items: int
) -> FittedProbe:
    """A probe of numbers in the target's own unit, from one of standardised targets and its residuals on dev."""
    deviation = max(float(np.sqrt(np.mean(np.square(residual, dtype=np.float64)))), SMALLEST_DEVIATION) * spread
    own = {
        **parameters,
        "weight": parameters["weight"] * spread,
        "bias": parameters["bias"] * spread + mean,
        "deviation": np.array([deviation]),
    }
    return FittedProbe({k: np.ascontiguousarray(v, dtype=np.float32) for k, v in own.items()}, "number", None, n_items)


def checked_targets(targets: np.ndarray, *, len_x: int) -> np.ndarray:
    """Targets as float64, (sets, items).

    Raises:
        UsageError: another number of items than the features have.
        NumericalError: a target is not finite.
    """
    y = np.atleast_2d(np.asarray(targets, dtype=np.float64))
    if y.ndim != 2 or y.shape[1] != len_x:
        raise UsageError(f"The targets have shape {y.shape}; (sets, {len_x}) is needed for features of {len_x} items.")
    if not np.isfinite(y).all():
        m, i = np.argwhere(~np.isfinite(y))[0]
        raise NumericalError(f"Target {i} of set {m} is missing or not finite. Leave that item out.")
    return y


def _in_units(y: np.ndarray, mean: float, spread: float) -> np.ndarray:
    return (y - mean) / spread


def _features(
    x: np.ndarray | torch.Tensor, mean: np.ndarray, scale: np.ndarray, constant: np.ndarray, b: int
) -> np.ndarray:
    parts = [rows.double().numpy() for _, rows in standardised_rows(x, mean, scale, b)]
    features = np.concatenate(parts)
    features[:, constant] = 0.0
    return features


def _products(
    x: np.ndarray | torch.Tensor,
    mean: np.ndarray,
    scale: np.ndarray,
    constant: np.ndarray,
    targets: np.ndarray,
    device: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix (width, width) and products with the targets (width, M), both means over items, float64."""
    import torch

    factor = (1 / torch.from_numpy(scale)).masked_fill_(torch.from_numpy(constant), 0.0)
    y = torch.from_numpy(targets.T.astype(np.float32)).to(device)
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for part, values in chunks(x):
        rows = ((values - torch.from_numpy(mean)) * factor).to(device)
        gram += (rows.T @ rows).double().cpu()
        cross += (rows.T @ y[part]).double().cpu()
    return (gram / len(x)).numpy(), (cross / len(x)).numpy()
