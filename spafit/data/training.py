"""What a model is trained on and scored with: frames of texts and labels, whatever file they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from spafit import io
from spafit.class_names import are_placeholders, places_of
from spafit.data.glue import read_glue
from spafit.data.glue_tasks import GLUE_TASKS
from spafit.data.sampling import hold_out, stratified_subset
from spafit.data.tables import read_table_file
from spafit.errors import DataError, UsageError, did_you_mean


@dataclass(frozen=True)
class TrainData:
    """One task to train on.

    Attributes:
        name: short name.
        frames: split -> frame with the columns ``text``, ``text2`` (second text of a pair; absent for single texts),
            ``label`` (code, or value for regression; missing where hidden) and ``idx`` (the source's own row number).
            ``train`` is needed for training. Other kinds of tasks have columns of their own.
        labels: names of the classes in the order of their codes; None for regression and where there are no classes.
        metrics: names of :data:`spafit.metrics.METRICS`; the mean of them is what is selected on. Kinds that write
            text, or match images with texts, have their own and leave this empty.
        source: where the rows came from, for the record.
        kind: one of :data:`spafit.kinds.KINDS`: ``classification`` (of texts, or values), ``text`` (running text, the
            column ``text``), ``answers`` (``prompt`` and ``answer``), ``images`` (classes; ``image`` and ``label``),
            ``matching`` (``image`` and ``text``), ``captions`` (``image`` and ``answer``).
        notes: what a report must say of the data.
    """

    name: str
    frames: Mapping[str, pd.DataFrame]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    source: str = ""
    kind: str = "classification"
    notes: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return self.labels is None and self.kind == "classification"

    @property
    def paired(self) -> bool:
        """Whether items have two texts."""
        return all("text2" in frame for frame in self.frames.values())

    @property
    def scored_splits(self) -> tuple[str, ...]:
        """Splits other than the training one that have labels, or need none."""
        return tuple(
            s
            for s, f in self.frames.items()
            if s != "train" and len(f) and ("label" not in f or f["label"].notna().all())
        )

    @property
    def digest(self) -> str:
        """SHA-256 over names, texts and labels of every split."""
        if "all" not in self.digests:
            parts: list[object] = [self.name, self.labels, self.metrics]
            parts += [] if self.kind == "classification" else [self.kind]
            for split, frame in self.frames.items():
                columns = [c for c in ("text", "text2", "prompt", "answer", "label", "idx", "digest") if c in frame]
                parts += [split, *(frame[c].astype(str).str.cat(sep="\x1f") for c in columns)]
            self.digests["all"] = io.content_digest(parts)
        return self.digests["all"]

    def limited(self, n: int, *, seed: int = 0, split: str = "train") -> TrainData:
        """The same task with ``n`` items of ``split``, in the shares of the labels (of ten bins, for regression)."""
        frame = self.frames[split]
        if n >= len(frame):
            return self
        frames = {**self.frames, split: stratified_subset(frame, n, seed)}
        return replace(self, frames=frames, digests={})

    def output_order(self, labels: Sequence[str] | None) -> list[int]:
        """Which of a model's outputs belongs to each class of this task: ``logits[:, order]`` are in the task's order.

        The outputs are put in the task's order rather than the labels in the model's, since F1 is of the task's
        second class.

        Args:
            labels: names of the model's classes in the order of its outputs, None for a regression. Names that say
                nothing (``LABEL_0``, ``LABEL_1``, …) are taken to be in the task's order.

        Raises:
            DataError: the model has other classes, or one of the two is a regression.
        """
        order: list[int] | None
        if labels is None or self.labels is None:
            order = [0] if labels is None and self.labels is None else None
        elif are_placeholders(labels) and len(labels) == len(self.labels):
            order = list(range(len(labels)))
        else:
            order = places_of(self.labels, labels)
        if order is None:
            needed, got = (f"the classes {', '.join(c)}" if c is not None else "a value" for c in (self.labels, labels))
            raise DataError(
                f"{self.name} needs a model that predicts {needed} (in any order), and this one predicts {got}. Use "
                "data with the model's labels, or a model that was trained on this task."
            )
        return order


def glue_data(
    task: str,
    source: str | Path,
    *,
    files: Mapping[str, str] | None = None,
    on_bad_rows: Literal["error", "skip"] = "error",
    offline: bool = False,
) -> TrainData:
    """One of GLUE's tasks, from a folder of its files or from the hub; see :func:`spafit.data.glue.read_glue`.

    How many malformed lines ``on_bad_rows="skip"`` left out is said in ``source``.

    Raises:
        DataError: the files are missing or malformed.
        UsageError: GLUE has no such task.
    """
    if task not in GLUE_TASKS:
        raise UsageError(f"GLUE has no task {task!r}. Tasks: {', '.join(GLUE_TASKS)}.{did_you_mean(task, GLUE_TASKS)}")
    known = GLUE_TASKS[task]
    frames = read_glue(task, source, files=files, on_bad_rows=on_bad_rows, offline=offline)
    labels = None if known.regression else known.labels
    skipped = [f"{f.attrs['bad_rows']} of {split}" for split, f in frames.items() if f.attrs["bad_rows"]]
    left_out = f" (malformed lines left out: {', '.join(skipped)})" if skipped else ""
    return TrainData(task, frames, labels, known.metrics, source=f"GLUE {task}{left_out}")


def table_data(
    files: Mapping[str, str | Path],
    *,
    text: str,
    label: str | None,
    text2: str | None = None,
    regression: bool = False,
    header: bool = True,
    labels: tuple[str, ...] | None = None,
    metrics: tuple[str, ...] | None = None,
    name: str = "table",
    seed: int = 0,
) -> TrainData:
    """Any table: TSV, CSV, JSON lines or parquet, one file per split.

    Args:
        files: split -> file; ``train`` alone is split 80/20 into train and validation, stratified by label.
        text: column of the text (a number for files without a header).
        label: column of the label; None where there is none (prediction).
        text2: column of the second text of a pair.
        regression: labels are numbers to predict.
        header: whether text files name their columns in the first line.
        labels: names of the classes in the order of their codes; by default those of the training split, sorted.
        metrics: what to score with; by default accuracy and macro-F1, or Pearson and Spearman.
        name: short name.
        seed: of the split.

    Raises:
        DataError: a column or label that the file does not have, a label outside the training split's classes.
    """
    frames = {s: _columns(Path(f), text=text, text2=text2, label=label, header=header) for s, f in files.items()}
    if regression:
        frames = {s: _numbers(f, files[s]) for s, f in frames.items()}
        classes = None
    else:
        source = frames.get("train", next(iter(frames.values())))["label"].dropna()
        classes = labels or tuple(sorted(source.astype(str).unique()))
        if label is not None and len(classes) < 2:
            raise DataError(f"{next(iter(files.values()))}: one class only ({', '.join(classes)}); two or more needed.")
        frames = {s: _codes(f, classes, files[s]) for s, f in frames.items()}
    if set(frames) == {"train"} and label is not None:
        kept, held = hold_out(frames["train"], 0.2, seed=seed)
        frames = {"train": kept.reset_index(drop=True), "validation": held.reset_index(drop=True)}
    used = metrics or (("pearson", "spearman") if regression else ("accuracy", "macro_f1"))
    return TrainData(name, frames, classes, used, source=", ".join(Path(f).name for f in files.values()))


def _columns(path: Path, *, text: str, text2: str | None, label: str | None, header: bool) -> pd.DataFrame:
    table = read_table_file(path, header=header)
    wanted = {"text": text, "text2": text2, "label": label}
    for field_name, column in wanted.items():
        if column is not None and column not in table:
            raise DataError(
                f"{path}: no column {column!r} for {field_name}. Columns: {', '.join(map(str, table.columns))}."
                f"{did_you_mean(column, map(str, table.columns))}"
            )
    frame = pd.DataFrame({k: table[c].to_numpy() for k, c in wanted.items() if c is not None})
    for column in ("text", "text2"):
        if column in frame:
            frame[column] = frame[column].astype(str)
    if label is None:
        frame["label"] = np.nan
    frame["idx"] = np.arange(len(frame))
    empty = frame["text"].str.strip() == ""
    if empty.any():
        raise DataError(f"{path}:{table.index[int(np.flatnonzero(empty)[0])]}: the text is empty.")
    return frame


def _numbers(frame: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    values = pd.to_numeric(frame["label"], errors="coerce")
    bad = np.flatnonzero(values.isna() & frame["label"].notna())
    if len(bad):
        raise DataError(f"{path}: row {bad[0] + 1}: label {frame['label'].iloc[bad[0]]!r} is not a number.")
    return frame.assign(label=values.astype(float))


def _codes(frame: pd.DataFrame, classes: tuple[str, ...], path: str | Path) -> pd.DataFrame:
    if frame["label"].isna().all():
        return frame
    codes = {c: i for i, c in enumerate(classes)}
    got = frame["label"].astype(str)
    unknown = np.flatnonzero(~got.isin(list(codes)))
    if len(unknown):
        raise DataError(
            f"{path}: row {unknown[0] + 1}: label {got.iloc[unknown[0]]!r} is not a class of the training split. "
            f"Classes: {', '.join(classes[:20])}."
        )
    return frame.assign(label=got.map(codes).astype(int))
