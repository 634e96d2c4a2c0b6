"""Images to train on: classes, texts that belong to them, captions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd

from spafit.data.images import read_images, reading_notes
from spafit.data.sampling import hold_out
from spafit.data.training import TrainData
from spafit.errors import DataError

#: The images' splits, as training calls them.
_SPLITS = {"": "train", "train": "train", "dev": "validation", "test": "test"}


def image_data(
    path: str | Path,
    *,
    kind: Literal["images", "matching", "captions"] = "images",
    image: str = "",
    label: str = "",
    split: str = "",
    name: str | None = None,
    seed: int = 0,
) -> TrainData:
    """A task of images; those that cannot be read are left out, counted and named in ``notes``.

    Args:
        path: a folder with a sub-folder per class (under ``train``, ``val``, ``test`` or not), a table, or a saved data
            set; see :func:`spafit.data.images.read_images`.
        kind: ``images`` learns the labels as classes, ``matching`` to find an image's text and a text's image,
            ``captions`` to write the texts.
        image: column of the images, of a table.
        label: column of the labels or texts, of a table.
        split: column of a table that tells the split.
        name: short name; by default the path's.
        seed: of the split into train and validation, 80/20, where the source has none.

    Raises:
        DataError: nothing can be read, columns are mixed up, one class only, a class without a training image.
    """
    found = read_images(path, image=image, label=label, split=split)
    notes = tuple(reading_notes(found))
    place = found["split"].map(lambda s: _SPLITS.get(s, s))
    frames = {s: found[place == s].reset_index(drop=True) for s in dict.fromkeys(place)}
    if "train" not in frames:
        raise DataError(
            f"{path}: no training images; the splits are {', '.join(frames)}. Name a train folder or split."
        )
    labels: tuple[str, ...] | None = None
    if kind == "images":
        labels = tuple(sorted(frames["train"]["label"].unique()))
        if len(labels) < 2:
            raise DataError(f"{path}: one class only ({', '.join(labels)}); two or more are needed.")
        for s, frame in frames.items():
            unknown = sorted(set(frame["label"]) - set(labels))
            if unknown:
                raise DataError(f"{path}, {s}: class {unknown[0]!r} has no training image. Add some, or leave it out.")
        codes = {c: i for i, c in enumerate(labels)}
        frames = {s: f.assign(label=f["label"].map(codes)) for s, f in frames.items()}
    else:
        column = "text" if kind == "matching" else "answer"
        frames = {s: f.rename(columns={"label": column}) for s, f in frames.items()}
    if set(frames) == {"train"}:
        kept, held = hold_out(frames["train"], 0.2, seed=seed)
        frames = {"train": kept.reset_index(drop=True), "validation": held.reset_index(drop=True)}
    frames = {s: pd.DataFrame(f) for s, f in frames.items()}
    return TrainData(
        name or Path(path).stem, frames, labels, ("accuracy",) if labels else (), source=Path(path).name, kind=kind,
        notes=notes,
    )  # fmt: skip
