"""Folds of the training split: stratified by label, texts that repeat kept together, numbers by bins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from spafit.data.training import TrainData
from spafit.errors import UsageError

#: Bins of a regression's labels.
BINS = 10


def folds(data: TrainData, k: int, *, seed: int = 0) -> list[TrainData]:
    """Cut the training split into ``k`` pairs of training and scored items; the official splits are left out.

    Items with the same text (or the same pair) are in one fold, so that no text is scored that was trained on. Folds
    have the labels' shares as nearly as that allows (scikit-learn's StratifiedGroupKFold); a regression is cut into
    ten bins of equal counts.

    Args:
        data: the task.
        k: number of folds, at least 2.
        seed: of the shuffle.

    Returns:
        ``k`` tasks with the splits ``train`` and ``fold``.

    Raises:
        UsageError: fewer than 2 folds, or fewer different texts than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    frame = data.frames["train"]
    texts = frame["text"].astype(str)
    if "text2" in frame:
        texts = texts + "\x1f" + frame["text2"].astype(str)
    groups = pd.factorize(texts)[0]
    if k < 2 or len(set(groups)) < k:
        raise UsageError(f"{k} folds of {len(set(groups))} different texts: give at least 2, and no more than texts.")
    labels = frame["label"].to_numpy()
    if data.regression:
        rank = pd.Series(labels).rank(method="first").to_numpy() - 1
        labels = np.floor(rank * min(BINS, len(frame) // k) / len(frame)).astype(np.int64)
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # its items are spread as they can be
        split = list(StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(frame, labels, groups))
    pairs = ((frame.iloc[train], frame.iloc[held]) for train, held in split)
    return [replace(data, frames={"train": train, "fold": held}, digests={}) for train, held in pairs]
