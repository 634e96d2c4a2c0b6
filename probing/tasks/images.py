"""Tasks from labelled images: what the pixels say (surface), where a patch lies (surface), and the class (semantics).

References: ``images:FOLDER``, ``images:FOLDER#class,intensity``, ``images:TABLE.csv,image=file,label=kind#class``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probing.tasks.base import Corpus, Image, Level, Task, Unit
from probing.tasks.pixels import (
    GRID,
    PixelFacts,
    brightness_bins,
    cell_types,
    dominant_channels,
    image_types,
    ink_quadrants,
    pixel_facts,
)
from probing.tasks.reading import licence_of, overlap_notes, safe_name, sorted_labels
from probing.tasks.splits import with_all_splits
from spafit.data.images import read_images, reading_notes
from spafit.errors import TaskError, UnknownTaskError, did_you_mean
from spafit.runtime import generator

#: Tasks of one source, in their order.
NAMES = ("intensity", "colour", "quadrant", "patch_position", "class")
_OPTIONS = ("image", "label", "split", "name")
_OPTION = re.compile(r",([A-Za-z0-9_]+)=")


def image_tasks(body: str, *, base: Path) -> list[Task]:
    """Read the tasks of a reference ``images:PATH…`` (``body`` is what follows the prefix).

    ``PATH`` is a folder with a sub-folder per class (or with such folders under ``train``, ``val`` and ``test``), a
    table with ``image=`` and ``label=`` columns (and ``split=``), or a folder that ``datasets`` saved; see
    :func:`spafit.data.images.read_images`. ``name=`` names the source. The tasks, ``<source>.<task>``, share a corpus:

    * ``intensity`` (surface): quarter of the training images' mean brightness;
    * ``colour`` (surface; left out where all images are grey): the channel with the largest mean;
    * ``quadrant`` (surface): where the centre of mass of the ink lies, about its median place in training;
    * ``patch_position`` (surface, unit word): which cell of a 4 × 4 grid the patch of one cell per image lies in;
    * ``class`` (semantics): the label.

    Their control types are looks that recur (:func:`probing.tasks.pixels.image_types`). Images that cannot be read are
    left out, named and counted in the notes. Splits that the data lack are carved as for tables.

    Raises:
        DataError: nothing can be read, or columns are mixed up.
        TaskError: an option or the data do not hold together.
    """
    target, wanted = _names(body, base)
    path, options = _options(target, base)
    facts: list[PixelFacts] = []
    frame = read_images(
        path, image=options.get("image", ""), label=options.get("label", ""), split=options.get("split", ""),
        measure=lambda opened: _keep(facts, opened),
    )  # fmt: skip
    stem = options.get("name") or path.resolve().name.partition(".")[0]
    return _tasks(frame, facts, name=safe_name(stem).lower() or "images", path=path, wanted=wanted)


def _keep(facts: list[PixelFacts], opened: Any) -> dict[str, Any]:
    mode = "L" if opened.mode in ("L", "1", "LA") else "RGB"
    facts.append(pixel_facts(np.asarray(opened.convert(mode))))
    return {}


def _names(body: str, base: Path) -> tuple[str, list[str] | None]:
    """What stands before ``#``, and the tasks named after it; a path that exists as a whole may itself hold a ``#``."""
    target, mark, fragment = body.rpartition("#")
    if not mark or (base / Path(body).expanduser()).exists():
        return body, None
    names = [n.strip() for n in fragment.split(",")]
    for name in names:
        if name not in NAMES:
            raise UnknownTaskError(
                f"images:{body}: there is no task {name!r} of images.{did_you_mean(name, NAMES)} "
                f"Use {', '.join(NAMES)}."
            )
    return target, names


def _options(target: str, base: Path) -> tuple[Path, dict[str, str]]:
    place, *rest = _OPTION.split(target)
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    for key, value in given.items():
        if key not in _OPTIONS:
            raise TaskError(
                f"images:{target}: unknown option {key!r}.{did_you_mean(key, _OPTIONS)} Use {', '.join(_OPTIONS)}."
            )
        if not value:
            raise TaskError(f"images:{target}: option {key!r} has no value.")
    return base / Path(place).expanduser(), given


@dataclass(frozen=True)
class _Source:
    """Everything that the tasks of one source share."""

    name: str
    where: str
    licence: str
    corpus: Corpus
    items: pd.DataFrame
    notes: tuple[str, ...]

    def task(
        self, short: str, level: Level, labels: tuple[str, ...], label: np.ndarray, control: np.ndarray, what: str,
        unit: Unit = "sentence",
    ) -> Task:  # fmt: skip
        span = 0 if unit == "word" else -1
        items = self.items.assign(span=span, label=label, control=control)[
            ["item", "text", "span", "label", "split", "group", "control"]
        ]
        dropped = int((items["label"] < 0).sum())
        notes = (*self.notes, f"{dropped} image(s) of a class that training lacks dropped.") if dropped else self.notes
        return Task(
            name=f"{self.name}.{short}", level=level, unit=unit, labels=labels, corpus=self.corpus,
            items=items[items["label"] >= 0].reset_index(drop=True), description=what, source=self.where,
            licence=self.licence, citation="see the data's source", notes=notes,
        ).validate()  # fmt: skip


def _tasks(
    frame: pd.DataFrame, facts: Sequence[PixelFacts], *, name: str, path: Path, wanted: Sequence[str] | None
) -> list[Task]:
    position: dict[str, int] = {}
    text = np.array([position.setdefault(d, len(position)) for d in frame["digest"]])
    first = frame.drop_duplicates("digest")
    # One cell of each image, every cell as often as the others, whatever the order of the images.
    order = sorted(range(len(first)), key=lambda i: first["digest"].iloc[i])
    cell = np.empty(len(first), dtype=np.int64)
    cell[order] = generator(0, "cells of images", name).permutation(len(first)) % GRID**2
    corpus = Corpus(
        name,
        tuple(
            Image(string=str(n), spans=((int(c), int(c) + 1),), source=source, digest=digest, grid=GRID)
            for n, source, digest, c in zip(first["name"], first["image"], first["digest"], cell, strict=True)
        ),
    )
    labels = [str(v) for v in frame["label"]]
    splits, made = with_all_splits(list(frame["split"]), list(text), [[v] for v in labels], stratify=True)
    items = pd.DataFrame(
        {"item": _unique(frame["name"]), "text": text, "split": splits, "group": [f"image-{t}" for t in text]}
    )
    notes = (*reading_notes(frame), *made, *overlap_notes(items, "image(s)"))
    folder = path if path.is_dir() else path.parent
    source = _Source(name, path.resolve().name, licence_of(folder), corpus, items, notes)
    train = (items["split"] == "train").to_numpy()
    cells = np.stack([f.cells for f in facts])
    types = image_types(cells, train)
    makers: dict[str, Callable[[], Task | None]] = {
        "intensity": lambda: _made(
            source, "intensity", brightness_bins(np.array([f.intensity for f in facts]), train), types,
            "Quarter of the training images' mean brightness that an image falls into.",
        ),
        "colour": lambda: None if all(f.grey for f in facts) else _made(
            source, "colour", dominant_channels(np.stack([f.colour for f in facts]), train), types,
            "Channel with the largest mean over an image.",
        ),
        "quadrant": lambda: _made(
            source, "quadrant", ink_quadrants(np.array([f.centre for f in facts]), train), types,
            "Where the centre of mass of an image's ink lies, about its median place in training.",
        ),
        "patch_position": lambda: source.task(
            "patch_position", "surface", tuple(f"row {i // GRID + 1} column {i % GRID + 1}" for i in range(GRID**2)),
            cell[text], cell_types(cells, cell[text], train),
            f"Cell of a {GRID} × {GRID} grid that a patch lies in, asked of the patch's own state.", "word",
        ),
        "class": lambda: _class(source, labels, train, types),
    }  # fmt: skip
    tasks = []
    for short in wanted or NAMES:
        task = makers[short]()
        if task is not None:
            tasks.append(task)
        elif wanted:
            raise TaskError(f"Task '{name}.{short}' has one class only: it cannot be asked of these images.")
    return tasks


def _made(
    source: _Source, short: str, found: tuple[np.ndarray, tuple[str, ...]], types: np.ndarray, what: str
) -> Task | None:
    """A surface task, or None where training has one class only."""
    label, labels = found
    return source.task(short, "surface", labels, label, types, what) if len(labels) > 1 else None


def _class(source: _Source, labels: Sequence[str], train: np.ndarray, types: np.ndarray) -> Task:
    classes = sorted_labels(v for v, t in zip(labels, train, strict=True) if t)
    index = {c: i for i, c in enumerate(classes)}
    at = np.array([index.get(v, -1) for v in labels])
    return source.task("class", "semantics", classes, at, types, f"Class of an image of {source.where}.")


def _unique(names: pd.Series) -> list[str]:
    """Item ids: the images' names, numbered where one is listed several times."""
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        ids.append(str(name) if seen[name] == 1 else f"{name} ({seen[name]})")
    return ids
