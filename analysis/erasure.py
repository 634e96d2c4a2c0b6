"""Erase what a label adds to representations, with least change (LEACE), and two controls that erase something else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator

#: Directions of the states whose standard deviation is below this share of the largest are taken as absent.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Eraser:
    """x ↦ x - (x - mean) · left · rightᵀ, an affine projection that removes ``rank`` directions.

    Attributes:
        mean: shape (width,).
        left: shape (width, rank).
        right: shape (width, rank).
    """

    mean: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def rank(self) -> int:
        """Number of directions removed."""
        return int(self.left.shape[1])

    def apply(self, states: np.ndarray) -> np.ndarray:
        """States without what was erased, shape (items, width); the same dtype comes back."""
        states = np.asarray(states)
        removed = ((states - self.mean) @ self.left) @ self.right.T
        return (states - removed).astype(states.dtype)

    def removed_variance(self, states: np.ndarray) -> float:
        """Mean squared length of what is taken away from the states."""
        return float(
            (((np.asarray(states, dtype=np.float64) - self.mean) @ self.left @ self.right.T) ** 2).sum(1).mean()
        )


def fit_leace(states: np.ndarray, labels: np.ndarray) -> Eraser:
    """The least-squares smallest affine change after which no linear classifier beats the constant.

    P = W⁺ P_{W Σ_xz} W with W the whitening of the states and Σ_xz their cross-covariance with the one-hot labels
    (Belrose et al. 2023, arXiv 2306.03819, theorem 4.3), in float64. It is exact on the items that it was fitted on;
    on others it holds as far as their covariances agree, so fit it on many items. It removes no nonlinear trace.

    Args:
        states: shape (items, width).
        labels: class codes, shape (items,).

    Raises:
        UsageError: shapes that do not fit, or fewer than two classes.
        NumericalError: a state is not finite.
    """
    x, codes = _checked(states, labels)
    classes = np.unique(codes)
    mean = x.mean(axis=0)
    x = x - mean
    z = (codes[:, None] == classes).astype(np.float64)
    z -= z.mean(axis=0)
    values, vectors, present = _spectrum(x)
    root = np.sqrt(values[present])
    whiten, colour = vectors[:, present] / root, vectors[:, present] * root
    cross = whiten.T @ (x.T @ z) / len(x)
    u, s, _ = np.linalg.svd(cross, full_matrices=False)
    u = u[:, s > 1e-10 * max(float(s.max(initial=0.0)), 1e-300)]
    return Eraser(mean, whiten @ u, colour @ u)


def random_eraser(states: np.ndarray, *, rank: int, seed: int = 0) -> Eraser:
    """Control of equal rank: a random subspace is removed, whitened like LEACE's.

    A label's directions are drawn to where the states vary less than a random subspace's, or more; so this control
    removes the same number of directions but not the same variance. See :func:`variance_matched_eraser`.
    """
    x, _ = _checked(states, np.arange(len(states)) % 2)
    mean = x.mean(axis=0)
    values, vectors, present = _spectrum(x - mean)
    if not 0 < rank <= present.sum():
        raise UsageError(f"rank must be from 1 to {int(present.sum())}; got {rank}.")
    root = np.sqrt(values[present])
    u = np.linalg.qr(generator(seed, "random subspace").standard_normal((int(present.sum()), rank)))[0]
    return Eraser(mean, (vectors[:, present] / root) @ u, (vectors[:, present] * root) @ u)


def variance_matched_eraser(states: np.ndarray, *, rank: int, variance: float, seed: int = 0) -> Eraser:
    """Control of equal rank and equal removed variance.

    Orthogonal random directions are turned towards the states' leading or trailing principal directions until the
    variance that they carry is the one asked for: x ↦ x - (x - mean) V Vᵀ with V = orth((1 - t) R + t E). The smallest
    such t is found by bisection.

    Raises:
        UsageError: no ``rank`` directions of the states carry that variance.
    """
    x, _ = _checked(states, np.arange(len(states)) % 2)
    mean = x.mean(axis=0)
    values, vectors, present = _spectrum(x - mean)
    order = np.argsort(-values[present])
    vectors, values = vectors[:, present][:, order], values[present][order]
    most, least = float(values[:rank].sum()), float(values[-rank:].sum())
    if not 0 < rank <= len(values) or not least * (1 - 1e-9) <= variance <= most * (1 + 1e-9):
        raise UsageError(
            f"{rank} directions of these states carry a variance from {least:.4g} to {most:.4g}; got {variance:.4g}."
        )
    covariance = (vectors * values) @ vectors.T
    start = vectors @ np.linalg.qr(generator(seed, "random subspace").standard_normal((len(values), rank)))[0]

    def subspace(t: float, end: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.linalg.qr((1 - t) * start + t * end)[0]
        return found

    def carried(v: np.ndarray) -> float:
        return float(np.trace(v.T @ covariance @ v))

    end = vectors[:, :rank] if carried(subspace(0.0, start)) < variance else vectors[:, -rank:]
    rising = carried(end) > carried(subspace(0.0, end))
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if (carried(subspace(middle, end)) < variance) == rising:
            low = middle
        else:
            high = middle
    v = subspace((low + high) / 2, end)
    return Eraser(mean, v, v)


def _spectrum(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues and vectors of the covariance of centred states, and which of them are there."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return values, vectors, values > (TOLERANCE**2) * max(float(values.max(initial=0.0)), 1e-300)


def _checked(states: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, codes = np.asarray(states, dtype=np.float64), np.asarray(labels)
    if x.ndim != 2 or codes.shape != (len(x),):
        raise UsageError(f"States (items, width) and labels (items,) are needed; got {x.shape} and {codes.shape}.")
    if not np.isfinite(x).all():
        raise NumericalError("States to erase from hold NaN or infinite values; extract them in float32.")
    if len(np.unique(codes)) < 2:
        raise UsageError("Erasing needs at least two classes among the labels.")
    return x, codes
