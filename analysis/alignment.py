"""The rigid map from the states after training onto the states before it: a rotation or reflection, and a shift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spafit.errors import NumericalError, UsageError


@dataclass(frozen=True)
class Alignment:
    """x ↦ (x − mean_after) · rotation + mean_before.

    Attributes:
        mean_before: float64, shape (width,).
        mean_after: float64, shape (width,).
        rotation: orthogonal (a reflection is allowed, a change of scale is not), float64, shape (width, width).
    """

    mean_before: np.ndarray
    mean_after: np.ndarray
    rotation: np.ndarray

    @classmethod
    def identity(cls, width: int) -> Alignment:
        """The map that changes nothing, for hidden states that are bitwise equal before and after."""
        return cls(np.zeros(width), np.zeros(width), np.eye(width))

    def apply(self, states: np.ndarray) -> np.ndarray:
        """Map raw states after training, shape (items, width), into the space before it; the same dtype comes back.

        Raises:
            UsageError: another width than the map's.
        """
        states = np.asarray(states)
        if states.ndim != 2 or states.shape[1] != len(self.mean_after):
            raise UsageError(
                f"The alignment maps states of shape (items, {len(self.mean_after)}); got shape {states.shape}."
            )
        dtype = states.dtype if states.dtype in (np.float32, np.float64) else np.dtype(np.float64)
        moved = (states - self.mean_after.astype(dtype)) @ self.rotation.astype(dtype)
        return moved + self.mean_before.astype(dtype)


def fit_alignment(after: np.ndarray, before: np.ndarray) -> Alignment:
    """Least-squares rigid map of ``after`` onto ``before`` (orthogonal Procrustes with a shift, no scaling).

    The rotation is U·Vᵀ of the singular value decomposition of (after − mean)ᵀ(before − mean), in float64 (Schönemann
    1966). Fit it on sentences that are used for nothing else: with few items it fits their noise, and a mere rotation
    then looks like re-encoding (.30 at 32 items for 64 dimensions), hence the lower limit of two items per dimension.
    Tokens of one sentence count less than independent items; the limit does not know that.

    Args:
        after: states after training, shape (items, width).
        before: states of the same items before training, same shape and order.

    Raises:
        UsageError: shapes differ, or fewer than 2 × width items.
        NumericalError: a state is not finite.
    """
    after, before = np.asarray(after), np.asarray(before)
    if after.ndim != 2 or after.shape != before.shape:
        raise UsageError(
            f"An alignment needs two arrays of the same shape (items, width); got {after.shape} and {before.shape}."
        )
    items, width = after.shape
    if items < 2 * width or width == 0:
        raise UsageError(
            f"An alignment of {width} dimensions needs at least {2 * width} items; got {items}. Give more sentences."
        )
    after, before = after.astype(np.float64), before.astype(np.float64)
    if not (np.isfinite(after).all() and np.isfinite(before).all()):
        raise NumericalError("States to align hold NaN or infinite values; extract them in float32.")
    mean_after, mean_before = after.mean(axis=0), before.mean(axis=0)
    after -= mean_after
    before -= mean_before
    left, _, right = np.linalg.svd(after.T @ before)
    return Alignment(mean_before, mean_after, left @ right)
