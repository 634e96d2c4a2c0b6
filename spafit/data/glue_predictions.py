"""Predictions of a GLUE test set as the benchmark's server takes them; it alone has the hidden labels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from spafit.data.glue_tasks import GlueTask, glue_task
from spafit.errors import NumericalError, UsageError
from spafit.io import write_text


def write_predictions(
    task: str | GlueTask, split: str, frame_idx: ArrayLike, predictions: ArrayLike, folder: str | os.PathLike[str]
) -> Path:
    r"""Write one file of a submission: ``index\tprediction``, rows in the order of their index.

    Class names for MNLI, QNLI, RTE and AX, codes for the others; STS-B's scores are clipped to 0…5 and have three
    decimals. The benchmark takes a submission only with all eleven files, each with every row of its test set.

    Args:
        task: a name of :data:`GLUE_TASKS`.
        split: ``test``, or ``test_matched`` and ``test_mismatched`` for MNLI.
        frame_idx: the column ``idx`` of the split's frame.
        predictions: class codes, or scores for STS-B, one per row.
        folder: where the file goes, under the benchmark's name (``CoLA.tsv``, …).

    Returns:
        The file's path; it was written atomically.

    Raises:
        UsageError: a split without a file in the submission, lengths that differ, an index that occurs twice, a code
            that is no class.
        NumericalError: scores that are not finite.
    """
    task = glue_task(task)
    if split not in task.predictions:
        raise UsageError(f"Predictions of {task.name} are for {', '.join(task.predictions)}; got {split!r}.")
    idx, values = np.asarray(frame_idx, dtype=np.int64), np.asarray(predictions, dtype=np.float64)
    if idx.ndim != 1 or idx.shape != values.shape:
        raise UsageError(f"{values.shape} predictions for {idx.shape} rows. Give one prediction per row of the split.")
    if len(np.unique(idx)) != len(idx):
        raise UsageError(f"An index occurs twice among the {len(idx)} rows. Give the rows of one split, each once.")
    if not np.all(np.isfinite(values)):
        raise NumericalError(f"Predictions of {task.name} are not finite. Nothing was written.")
    if task.limits is not None:
        written = [f"{v:.3f}" for v in np.clip(values, *task.limits)]
    else:
        wrong = values[~np.isin(values, np.arange(len(task.labels)))]
        if len(wrong):
            raise UsageError(
                f"Prediction {wrong[0]:g} is no class of {task.name}: codes go from 0 to {len(task.labels) - 1}."
            )
        written = [task.labels[int(v)] if task.words else str(int(v)) for v in values]
    rows = "".join(f"{idx[i]}\t{written[i]}\n" for i in np.argsort(idx))
    path = Path(folder) / task.predictions[split]
    write_text(path, "index\tprediction\n" + rows)
    return path
