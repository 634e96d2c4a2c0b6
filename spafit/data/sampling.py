"""Draws of training items by label, and the weights that make classes count alike."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from spafit.errors import UsageError
from spafit.runtime import generator


def stratified_subset(frame: pd.DataFrame, n: int, seed: int, label: str = "label") -> pd.DataFrame:
    """Draw exactly ``n`` rows with the label's distribution; rows keep their order, index and ``attrs``.

    Classes get their share of ``n`` by largest remainder; one whose share is less than one row may get none. A
    float label is cut into ten bins (or ``n``, if smaller) of equal counts by rank. The draw depends on ``seed`` and
    the labels only.

    A frame without the column is drawn from evenly.

    Raises:
        UsageError: ``n`` is not from 1 to the number of rows, or a label is missing.
    """
    return frame.iloc[_drawn(frame, n, seed, label)]


def hold_out(
    frame: pd.DataFrame, share: float, *, seed: int, most: int | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split the training items into those trained on and ``share`` of them held out to select on: (kept, held out).

    With ``most``, only so many are used in all. Both draws keep the shares of the labels.
    """
    if most is not None and most < len(frame):
        frame = stratified_subset(frame, most, seed)
    n = round(share * len(frame))
    if n == 0:
        return frame, frame.iloc[:0]
    held = _drawn(frame, n, seed)
    return frame.iloc[np.setdiff1d(np.arange(len(frame)), held)], frame.iloc[held]  # by place: an index may repeat


def _drawn(frame: pd.DataFrame, n: int, seed: int, label: str = "label") -> NDArray[np.int64]:
    """The places of the rows of :func:`stratified_subset`."""
    if not 1 <= n <= len(frame):
        raise UsageError(f"A subset of {n} rows cannot be drawn from {len(frame)}. Use 1 to {len(frame)}.")
    if label not in frame:  # one stratum: items without labels
        return np.sort(generator(seed, "stratified subset").permutation(len(frame))[:n])
    values = frame[label]
    if values.isna().any():
        raise UsageError(f"{int(values.isna().sum())} of {len(frame)} labels are missing. Draw from a labelled split.")
    if pd.api.types.is_float_dtype(values):
        rank = values.rank(method="first").to_numpy() - 1
        strata = np.floor(rank * min(10, n) / len(frame)).astype(np.int64)
    else:
        strata = np.unique(values.to_numpy(), return_inverse=True)[1]
    counts = np.bincount(strata)
    exact = counts * n / len(frame)
    take = np.floor(exact).astype(np.int64)
    take[np.argsort(take - exact, kind="stable")[: n - take.sum()]] += 1
    rng = generator(seed, "stratified subset")
    chosen = [rng.permutation(np.flatnonzero(strata == s))[:k] for s, k in enumerate(take)]
    return np.sort(np.concatenate(chosen))


def class_weights(labels: ArrayLike, *, n_classes: int | None = None) -> NDArray[np.float64]:
    """Weight per class code, n / (classes · count): every class then weighs the same in a loss (King & Zeng 2001).

    Args:
        labels: class codes from 0.
        n_classes: how many there are; default the highest code and one.

    Raises:
        UsageError: no labels, a label that is missing or no class, or a class that does not occur, whose
            weight would be infinite.
    """
    values = pd.to_numeric(pd.Series(labels)).to_numpy(dtype=np.float64, na_value=np.nan)
    size = n_classes or int(np.nanmax(values, initial=0)) + 1
    if not len(values) or not np.isin(values, np.arange(size)).all():
        raise UsageError(f"Class weights need at least one label, and codes from 0 to {size - 1} only.")
    codes = values.astype(np.int64)
    counts = np.bincount(codes, minlength=size)
    if not counts.all():
        raise UsageError(f"Class {int(np.argmin(counts))} does not occur, so it has no weight. Leave it out.")
    return len(codes) / (len(counts) * counts.astype(np.float64))
