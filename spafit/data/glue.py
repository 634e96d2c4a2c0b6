"""Read the GLUE benchmark's tasks (:data:`~spafit.data.glue_tasks.GLUE_TASKS`) from its files or from the hub."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spafit.data.glue_tasks import GlueTask, glue_task
from spafit.data.hub import ask_for_data_set
from spafit.data.tables import read_lines, read_table_file, table_suffix
from spafit.errors import DataError, HubError, UsageError, did_you_mean

#: Data set on the hub that holds every task as a configuration.
HUB_NAME = "nyu-mll/glue"

_IDX = ("index", "idx", "id")


def read_glue(
    task: str | GlueTask,
    source: str | os.PathLike[str],
    *,
    files: Mapping[str, str] | None = None,
    splits: Sequence[str] | None = None,
    on_bad_rows: Literal["error", "skip"] = "error",
    offline: bool = False,
) -> dict[str, pd.DataFrame]:
    r"""Read a task's splits.

    Text files are read as the benchmark wrote them: UTF-8, cells between tabs, every quote mark a character
    (``csv.QUOTE_NONE``). CoLA's and the original STS benchmark's files have no header and are known by their cells.
    MRPC's original training file is divided by the benchmark's list of development pairs (``mrpc_dev_ids.tsv`` or
    ``dev_ids.tsv`` beside it).

    Args:
        task: a name of :data:`GLUE_TASKS`.
        source: a folder that holds the task's files or a folder of them by its usual name (``CoLA``, ``STS-B``, …);
            ``hub``; or ``hub:NAME`` for another data set, or local folder, that ``datasets.load_dataset`` reads and
            that has the task as a configuration.
        files: split to file name, relative to the task's folder, for other names (``{"train": "train.rebuilt.tsv"}``);
            also ``.csv``, ``.jsonl`` and ``.parquet``, where whole numbers are class codes.
        splits: the splits to read. Default: all, of which a test split may be missing.
        on_bad_rows: what to do about lines of a tab-separated file with too few or too many cells (the official QQP has
            some). ``skip`` leaves them out and counts them in the frame's ``attrs``. Other formats are always strict.
        offline: use what ``datasets`` has in its cache and never ask the hub.

    Returns:
        Split (``train``, ``validation``, ``test``; for MNLI ``validation_matched``, …) to a frame with columns
        ``text``, ``text2`` (pairs only), ``label`` (``Int64`` code, or ``float64`` for STS-B; missing where hidden) and
        ``idx`` (the file's own index or id, else the row's number from 0, malformed rows counted). ``attrs`` holds
        ``bad_rows`` (how many were skipped) and ``bad_lines`` (their line numbers).

    Raises:
        DataError: a file is missing or does not follow its format; names file, line, what was got and is allowed.
        HubError: the hub does not answer, or does not have the data set; ``datasets`` is not installed.
        UsageError: unknown task or split.
    """
    task = glue_task(task)
    files = dict(files or {})
    for split in (*files, *(splits or ())):
        if split not in task.splits:
            hint = did_you_mean(split, task.splits)
            raise UsageError(f"{task.name} has no split {split!r}.{hint} It has {', '.join(task.splits)}.")
    wanted = tuple(splits) if splits is not None else tuple(task.splits)
    required = {s for s in wanted if splits is not None or s in files or s not in task.predictions or task.name == "ax"}
    place = os.fspath(source)
    if place == "hub" or place.startswith("hub:"):
        if files:
            raise UsageError("files= names files in a folder. Leave it out to read from the hub.")
        return _from_hub(task, place.partition(":")[2] or HUB_NAME, wanted, required, offline)
    roots = _roots(task, Path(place).expanduser())
    frames = {}
    for split in wanted:
        path = _find(task, split, roots, files.get(split))
        if path is not None:
            table, bad = _read_file(task, path, on_bad_rows)
            frames[split] = _frame(task, split, table, str(path), bad)
        elif task.name == "mrpc" and split != "test" and (raw := _raw_mrpc(roots)):
            table, bad = _read_file(task, raw[0], on_bad_rows)
            held = _held_out(table, *raw)
            frames[split] = _frame(task, split, table[held == (split == "validation")], str(raw[0]), bad)
        elif split in required:
            raise DataError(_missing(task, split, roots))
    return frames


# ---------------------------------------------------------------- folders


def _roots(task: GlueTask, folder: Path) -> list[Path]:
    """Folders in which the task's files may lie, the most particular first."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give a folder of GLUE files, or 'hub'.")
    inside = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    return [*(inside[name] for name in task.folders if name in inside), folder]


def _find(task: GlueTask, split: str, roots: list[Path], given: str | None) -> Path | None:
    for name in (given,) if given else task.splits[split]:
        for root in roots:
            if (root / name).is_file():
                return root / name
    if given:
        raise DataError(f"{roots[0] / given}: no such file (the {split} split of {task.name}).")
    return None


def _missing(task: GlueTask, split: str, roots: list[Path]) -> str:
    present = sorted(p.name for p in roots[0].iterdir() if p.is_file())
    more = ""
    if task.name == "mrpc" and split != "test":
        more = " The original msr_paraphrase_train.txt needs mrpc_dev_ids.tsv, as it holds the development pairs too."
    return (
        f"{roots[0]}: no file for the {split} split of {task.name} ({' or '.join(task.splits[split])}). It holds "
        f"{', '.join(present[:8]) or 'no files'}. Name the file with files={{{split!r}: '…'}}.{more}"
    )


def _raw_mrpc(roots: list[Path]) -> tuple[Path, set[tuple[str, str]]] | None:
    """The original training file and the pairs of ids that the benchmark holds out of it."""
    for root in roots:
        for name in ("mrpc_dev_ids.tsv", "dev_ids.tsv"):
            raw = root / "msr_paraphrase_train.txt"
            if raw.is_file() and (root / name).is_file():
                cells = [line.strip().split("\t") for line in read_lines(root / name) if line.strip()]
                return raw, {(c[0], c[-1]) for c in cells}
    return None


def _held_out(table: pd.DataFrame, path: Path, pairs: set[tuple[str, str]]) -> NDArray[np.bool_]:
    """Which rows are development pairs; every pair of the list must be there."""
    if not {"#1 id", "#2 id"} <= set(table.columns):
        raise DataError(f"{path}: no columns '#1 ID' and '#2 ID', by which the development pairs are known.")
    held = np.array([pair in pairs for pair in zip(table["#1 id"], table["#2 id"], strict=True)], dtype=bool)
    if held.sum() != len(pairs):
        raise DataError(f"{path}: holds {held.sum()} of the {len(pairs)} development pairs listed beside it.")
    return held


def _read_file(task: GlueTask, path: Path, on_bad_rows: str) -> tuple[pd.DataFrame, list[int]]:
    """Cells by lower-case column name, indexed by line; and the lines that were left out."""
    if table_suffix(path) in (".csv", ".jsonl", ".ndjson", ".parquet"):
        table = read_table_file(path)
        return table.rename(columns=lambda c: str(c).strip().lower()), []
    lines = read_lines(path)
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path}: holds no rows.")
    first = [c.strip().lower() for c in lines[0].split("\t")]
    needed = max((task.bare.index(c) for names in task.text for c in names if c in task.bare), default=0) + 1
    header = all(set(names) & set(first) for names in task.text)
    if not header and needed <= len(first) <= len(task.bare):
        columns, start, low = list(task.bare), 0, needed
    else:
        columns, start, low = first, 1, len(first)
    good, bad, rows = [], [], []
    for number, line in enumerate(lines[start:], start=start + 1):
        cells = line.split("\t")
        if low <= len(cells) <= len(columns):
            good.append(number)
            rows.append(cells + [""] * (len(columns) - len(cells)))
        else:
            bad.append(number)
    if bad and on_bad_rows != "skip":
        got = len(lines[bad[0] - 1].split("\t"))
        allowed = str(low) if low == len(columns) else f"{low} to {len(columns)}"
        raise DataError(
            f"{path}:{bad[0]}: {got} cell(s) where there must be {allowed} ({len(bad)} such line(s) in the file). "
            "Mend the file, or leave these lines out with on_bad_rows='skip' (--skip-bad-rows)."
        )
    if not rows:
        raise DataError(f"{path}: holds no rows.")
    index = pd.Index(good, name="line")
    # The row's number is what the benchmark goes by where a file has no index of its own.
    return pd.DataFrame(rows, columns=columns, index=index, dtype=object).assign(
        **{"row number": index - start - 1}
    ), bad


def _column(names: Sequence[str], table: pd.DataFrame) -> str | None:
    return next((name for name in names if name in table.columns), None)


def _frame(task: GlueTask, split: str, table: pd.DataFrame, where: str, bad: list[int]) -> pd.DataFrame:
    """The project's columns from a table with the columns of the file; checks every cell."""
    read = {*_IDX, *task.label, *(name for names in task.text for name in names)}
    if twice := [c for c in table.columns[table.columns.duplicated()] if c in read]:
        raise DataError(f"{where}: column name {twice[0]!r} occurs twice in the header.")
    content: dict[str, Any] = {}
    shown = [c for c in table.columns if c != "row number"]
    for key, names in zip(("text", "text2"), task.text, strict=False):
        column = _column(names, table)
        if column is None:
            raise DataError(f"{where}: no column {names[0]!r}. It has {', '.join(map(repr, shown))}.")
        content[key] = table[column].to_numpy(dtype=object)
        for line, value in zip(table.index, content[key], strict=True):
            if not isinstance(value, str):
                raise DataError(f"{where}:{line}: column {column!r} holds {value!r}, not a text.")
    hidden = split in task.predictions
    column = _column(task.label, table)
    if column is None and not hidden:
        raise DataError(f"{where}: no label column {task.label[0]!r}. It has {', '.join(map(repr, shown))}.")
    values = [None] * len(table) if column is None else table[column].tolist()
    parse = _score if task.regression else _code
    labels = [parse(task, v, f"{where}:{line}", hidden) for line, v in zip(table.index, values, strict=True)]
    content["label"] = pd.array(labels, dtype="Int64") if not task.regression else np.array(labels, dtype=np.float64)
    column = _column(_IDX, table) or "row number"
    numbers = table[column] if column in table else range(len(table))
    try:
        content["idx"] = np.array([int(v) for v in numbers], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: column {column!r} must hold whole numbers ({error}).") from error
    frame = pd.DataFrame(content)
    frame.attrs.update(bad_rows=len(bad), bad_lines=list(bad))
    return frame


def _is_hidden(value: Any) -> bool:
    """Whether a test split's label is withheld: nothing, or the -1 of the ``datasets`` library."""
    return value is None or value != value or value in (-1, "-1", "-1.0")


def _code(task: GlueTask, value: Any, where: str, hidden: bool) -> int | None:
    if hidden and _is_hidden(value):
        return None
    written = task.labels if task.words else [str(i) for i in range(len(task.labels))]
    if isinstance(value, str):
        if value in written:
            return list(written).index(value)
    elif value in range(len(task.labels)):  # whole numbers come from formats with types of their own
        return int(value)
    raise DataError(f"{where}: label {value!r} is not one of {', '.join(written)}.")


def _score(task: GlueTask, value: Any, where: str, hidden: bool) -> float:
    assert task.limits is not None
    if hidden and _is_hidden(value):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not task.limits[0] <= number <= task.limits[1]:
        raise DataError(f"{where}: score {value!r} is not a number from {task.limits[0]:g} to {task.limits[1]:g}.")
    return number


# ---------------------------------------------------------------- the hub


def _from_hub(
    task: GlueTask, name: str, wanted: Sequence[str], required: set[str], offline: bool
) -> dict[str, pd.DataFrame]:
    try:
        import datasets
    except ImportError as error:
        raise HubError("Reading GLUE from the hub needs datasets: pip install 'spafit[datasets]'.") from error
    remedy = "Give a folder of GLUE files, or run once with the hub at hand and then offline."
    try:
        with _offline(offline):
            if not Path(name).is_dir() and not datasets.config.HF_HUB_OFFLINE:
                ask_for_data_set(name, remedy=remedy)
            content = datasets.load_dataset(name, task.name)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubError(f"Data set {name!r} ({task.name}) cannot be had: {reason} {remedy}") from error
    frames = {}
    for split in wanted:
        where = f"{name} ({task.name}, {split})"
        if split not in content:
            if split in required:
                raise DataError(f"{where}: no such split. It has {', '.join(map(str, content))}.")
            continue
        for column, feature in content[split].features.items():
            names = tuple(getattr(feature, "names", None) or ())
            if column in task.label and names and names != task.labels:
                raise DataError(
                    f"{where}: its classes are {', '.join(names)} and {', '.join(task.labels)} is GLUE's order."
                )
        table = content[split].to_pandas()
        table.index = pd.RangeIndex(1, len(table) + 1, name="row")
        frames[split] = _frame(task, split, table, where, [])
    return frames


@contextlib.contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Inside the block, ``datasets`` asks nobody; its own switch is read only when it is imported."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
