"""Labelled images from a folder, a table that names files, or a data set of ``datasets``; an unreadable one is named.

What is returned is a table of addresses with a digest of each image's bytes; pixels are decoded when they are needed.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pandas as pd

from spafit.data.tables import read_table_file, table_suffix
from spafit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

#: Columns of :func:`read_images`.
COLUMNS = ("image", "label", "idx", "name", "split", "digest")

#: Names of sub-folders, and cells of a split column, and the split that they mean.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHOWN = 5


@dataclass(frozen=True)
class _Found:
    """One image before it is opened: a path or bytes, or why there is none."""

    image: str | bytes
    name: str
    label: str
    split: str
    missing: str = ""


def read_images(
    path: str | Path,
    *,
    image: str = "",
    label: str = "",
    split: str = "",
    measure: Callable[[Image], Mapping[str, Any]] | None = None,
) -> pd.DataFrame:
    """Read a list of labelled images, opening each once to see that it can be read.

    ``path`` is one of

    * a folder with one sub-folder per class, or with such folders under ``train``, ``val`` (or ``dev``) and ``test``;
      files whose name does not end like an image's are passed over;
    * a table (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``) with columns for the image files, relative to the table's
      folder, and the labels;
    * a folder that ``datasets`` saved (``save_to_disk``), with a column of images.

    Args:
        path: where they are.
        image: column of the images; needed for tables, found by its type in a data set.
        label: column of the labels (or captions); needed for tables, found by its type in a data set.
        split: column of a table that tells the split.
        measure: called with every image that could be read; what it returns becomes further columns.

    Returns:
        A frame with the columns ``image`` (absolute path, or the bytes where a data set holds them), ``label``
        (string), ``idx`` (position, from 0), ``name`` (path relative to the folder, or row), ``split`` (``train``,
        ``dev``, ``test``, or empty) and ``digest`` (SHA-256 of the image's bytes). ``attrs["unreadable"]`` maps the
        names of images that could not be read to the reason, ``attrs["unlabelled"]`` counts rows without a label and
        ``attrs["passed_over"]`` files of a folder that are no images.

    Raises:
        DataError: nothing is there, no image can be read, a column is missing, or the column of images holds texts.
    """
    where = Path(path).expanduser()
    imaging()  # a missing package is found out before any folder is walked
    passed_over = 0
    if where.is_dir() and ((where / "dataset_dict.json").is_file() or (where / "state.json").is_file()):
        found = _of_dataset(where, image=image, label=label)
    elif where.is_dir():
        if image or label or split:
            raise DataError(
                f"{where}: is a folder of images, whose labels are its sub-folders; columns ({image or label or split})"
                " are for tables. Name the table, or leave the columns out."
            )
        found, passed_over = _of_folder(where)
    elif table_suffix(where):
        found = _of_table(where, image=image, label=label, split=split)
    else:
        what = "is no table" if where.is_file() else "no such file or folder"
        raise DataError(f"{where}: {what}. Name a folder of images, a table of image files, or a saved data set.")
    rows: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    unlabelled = 0
    for one in found:
        if not one.label:
            unlabelled += 1
            continue
        try:
            if one.missing:
                raise DataError(one.missing)
            data = one.image if isinstance(one.image, bytes) else Path(one.image).read_bytes()
            opened = open_image(data)
            more = {} if measure is None else measure(opened)
        except DataError as error:
            unreadable[one.name] = str(error)
            continue
        except OSError as error:
            unreadable[one.name] = error.strerror or str(error)
            continue
        digest = hashlib.sha256(data).hexdigest()
        own = {"image": one.image, "label": one.label, "idx": len(rows), "name": one.name, "split": one.split}
        rows.append({**own, "digest": digest, **more})
    if not rows:
        reasons = "; ".join(f"{n}: {why}" for n, why in list(unreadable.items())[:_SHOWN])
        raise DataError(f"{where}: holds no image that can be read with a label.{f' {reasons}.' if reasons else ''}")
    frame = pd.DataFrame(rows)
    frame.attrs.update(unreadable=unreadable, unlabelled=unlabelled, passed_over=passed_over)
    return frame


def reading_notes(frame: pd.DataFrame) -> list[str]:
    """What a report must say of the images that :func:`read_images` left out."""
    unreadable, notes = frame.attrs.get("unreadable", {}), []
    if unreadable:
        named = "; ".join(f"{n} ({why})" for n, why in list(unreadable.items())[:_SHOWN])
        more = f"; and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
        notes.append(f"{len(unreadable)} image(s) could not be read and were left out: {named}{more}.")
    if count := frame.attrs.get("unlabelled", 0):
        notes.append(f"{count} row(s) without a label dropped.")
    if count := frame.attrs.get("passed_over", 0):
        notes.append(f"{count} file(s) that are no images were passed over.")
    return notes


def imaging() -> ModuleType:
    """Pillow's ``Image`` module.

    Raises:
        DataError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError('Reading images needs Pillow. Run pip install "spafit[images]".') from error
    return Image


def open_image(image: str | Path | bytes, *, channels: int | None = None) -> Image:
    """Decode one image, turned upright as its EXIF data say.

    Args:
        image: path or encoded bytes.
        channels: 1 gives grey values, 3 colours; None leaves the image's own mode.

    Raises:
        DataError: it cannot be read.
    """
    module = imaging()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata and of size; whether it can be read is what counts
            with module.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                opened.load()
                upright = ImageOps.exif_transpose(opened)
    except module.UnidentifiedImageError as error:
        raise DataError("no image in a known format") from error
    except Exception as error:  # decoders of damaged files raise whatever they come upon
        raise DataError(f"{next(iter(str(error).splitlines()), '') or type(error).__name__}") from error
    if channels is None:
        return upright
    if upright.mode.startswith(("I;16", "I")):  # 16 bits to a value; Pillow would clip them at 255
        import numpy as np

        upright = module.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return upright.convert("L" if channels == 1 else "RGB")


# ---------------------------------------------------------------- sources


def _of_folder(folder: Path) -> tuple[list[_Found], int]:
    suffixes = set(imaging().registered_extensions())
    tops = [f for f in sorted(folder.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    if not tops:
        files = [f for f in folder.iterdir() if f.suffix.lower() in suffixes]
        what = f"holds {len(files)} image(s) but no sub-folders" if files else "holds no sub-folders of images"
        raise DataError(
            f"{folder}: {what}. Give a folder with one sub-folder per class, or a table with the columns of image "
            "files and labels."
        )
    by_split = any(SPLITS.get(t.name.lower()) == "train" for t in tops) and all(t.name.lower() in SPLITS for t in tops)
    classes = (
        [(SPLITS[t.name.lower()], c) for t in tops for c in sorted(t.iterdir()) if c.is_dir()]
        if by_split
        else [("", t) for t in tops]
    )
    found, passed_over = [], 0
    for split, place in classes:
        for file in sorted(p for p in place.rglob("*") if p.is_file()):
            if file.suffix.lower() not in suffixes:
                passed_over += 1
                continue
            name = file.relative_to(folder).as_posix()
            found.append(_Found(str(file.resolve()), name, place.name, split))
    if not found:
        raise DataError(
            f"{folder}: its {len(classes)} class folder(s) hold no image files "
            f"({passed_over} other file(s)). Texts are read with table: instead."
        )
    return found, passed_over


def _of_table(table: Path, *, image: str, label: str, split: str) -> list[_Found]:
    frame = read_table_file(table)
    names = [str(c) for c in frame.columns]
    if not image or not label:
        raise DataError(f"{table}: name the columns of image files and labels (image=, label=). It has {names}.")
    for option, column in (("image", image), ("label", label), ("split", split)):
        if column and column not in names:
            raise DataError(
                f"{table}: has no column {column!r} ({option}=).{did_you_mean(column, names)} "
                f"It has {', '.join(names)}."
            )
    _check_names_files(table, frame, image)
    found = []
    cells = frame[[image, label, *([split] if split else [])]].astype(object).to_numpy().tolist()
    for line, row in zip(frame.index, cells, strict=True):
        value, target = row[0], row[1]
        given = str(row[2]).strip().lower() if split else ""
        if split and given not in SPLITS:
            raise DataError(f"{table}:{line}: split {row[2]!r} is not one of {', '.join(SPLITS)}.")
        file = _file(table, value)
        missing = "" if file is not None else f"no such file, named in line {line} of {table.name}"
        name = str(value).strip() or f"line {line}"
        found.append(_Found(str(file or ""), name, _label(target), SPLITS.get(given, ""), missing))
    return found


def _file(table: Path, value: Any) -> Path | None:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return None
    try:
        file = (table.parent / Path(value.strip()).expanduser()).resolve()
        return file if file.is_file() else None
    except (OSError, RuntimeError):  # a text that is too long to be a file's name
        return None


def _check_names_files(table: Path, frame: pd.DataFrame, image: str) -> None:
    """The column must name files in some row; if none of the first rows does, it is another column, or texts."""
    first = frame.head(200)
    if any(_file(table, value) is not None for value in first[image]):
        return
    value = str(first[image].iloc[0])
    other = [str(c) for c in frame.columns if c != image and any(_file(table, v) is not None for v in first[c])]
    hint = f"Image files are in column {other[0]!r}: give image={other[0]}." if other else "Paths are relative to it."
    raise DataError(
        f"{table}: column {image!r} holds {value[:60]!r} and the like, and no image file beside the table has that "
        f"name. {hint}"
    )


def _label(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return str(value).strip()


def _of_dataset(folder: Path, *, image: str, label: str) -> list[_Found]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{folder} is a data set of datasets: pip install 'spafit[datasets]'.") from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: is no readable data set ({error}).") from error
    parts = loaded.items() if isinstance(loaded, datasets.DatasetDict) else [("", loaded)]
    found: list[_Found] = []
    for name, part in parts:
        features = part.features
        images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
        classes = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        column = _only(folder, "image", image, images, list(features))
        target = _only(folder, "label", label, classes, list(features))
        if column not in images:
            raise DataError(
                f"{folder}: column {column!r} holds {features[column]}, not images.{did_you_mean(column, images)} "
                f"Columns of images: {', '.join(images) or 'none'}."
            )
        names = features[target].names if target in classes else None
        raw = part.cast_column(column, datasets.Image(decode=False)).select_columns([column, target])
        split = SPLITS.get(name.lower(), "test_" + name if name else "")
        found += list(_rows_of(raw, column, target, names, prefix=f"{name}:" if name else "", split=split))
    return found


def _rows_of(part: Any, column: str, target: str, names: Any, *, prefix: str, split: str) -> Iterator[_Found]:
    for i, row in enumerate(part):
        cell = row[column] or {}
        inner, value = Path(cell.get("path") or "").name, row[target]
        data = cell.get("bytes")
        label = "" if value is None or (names and value < 0) else names[value] if names else _label(value)
        there = data or cell.get("path") or ""
        name = f"{prefix}{i}" + (f" ({inner})" if inner else "")
        yield _Found(there, name, label, split, "" if there else "the row holds no image")


def _only(folder: Path, option: str, given: str, typed: list[str], names: list[str]) -> str:
    if given and given not in names:
        raise DataError(
            f"{folder}: has no column {given!r} ({option}=).{did_you_mean(given, names)} It has {', '.join(names)}."
        )
    if given:
        return given
    if len(typed) != 1:
        found = f"several: {', '.join(typed)}" if typed else f"none among {', '.join(names)}"
        raise DataError(f"{folder}: name the column with {option}=; by type there are {found}.")
    return typed[0]
