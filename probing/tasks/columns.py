"""Tasks from the columns of a table: sentence, pair, and token classification.

References that read GLUE's files as they come (columns of files without a header are numbered from 0):

* CoLA: ``table:CoLA,train=cola_public/raw/in_domain_train.tsv,dev=dev.tsv,text=3,label=1``
* RTE: ``table:RTE,text=sentence1,text2=sentence2,label=label``
* SST-2: ``table:SST-2,test=test-labeled.tsv,text=sentence,label=label``
* WNLI: ``table:WNLI,train=train.rebuilt.tsv,dev=dev.tsv,text=sentence1,text2=sentence2,label=label``
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd

from probing.tasks.base import Corpus, Level, Task, Text, Unit
from probing.tasks.reading import licence_of, overlap_notes, safe_name, sorted_labels
from probing.tasks.splits import with_all_splits
from probing.tasks.table_options import HUB_ONLY, Options, parse_options
from spafit.data.tables import Quoting, read_table_file, table_suffix
from spafit.errors import DataError, TaskError, UnknownTaskError, did_you_mean

#: Distinct decimal numbers above which labels are taken for measurements rather than classes.
MAX_DECIMALS = 20

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("dev", "validation", "valid", "val", "va"), "dev"),
    **dict.fromkeys(("test", "te"), "test"),
}
_FILE_STEMS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
#: A cell that could be the name of a column.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*( [A-Za-z0-9_.-]+)?")


@dataclass(frozen=True)
class Part:
    """One table of a task: the split it holds (empty: decided by a column, or still to be made), and its address."""

    split: str
    where: str
    frame: pd.DataFrame
    optional: bool = False  # found by its name alone: passed over if it has no labels


def table_tasks(body: str, *, base: Path) -> list[Task]:
    """Read the task of a reference ``table:PATH,text=…,label=…`` (``body`` is what follows the prefix).

    ``PATH`` is a folder with ``train``, ``dev`` (or ``validation``, ``valid``, ``val``) and ``test`` files, or one
    file with a ``split=`` column, or one file that is split 80/10/10; ``train=``, ``dev=`` and ``test=`` name files
    relative to the folder, and then only the ones named, plus ``train`` by its usual name, are read. With a file as
    ``PATH`` and ``dev=`` or ``test=``, the file is the training split.

    A missing dev split is carved from training (10 % of the texts, stratified by label); where only dev exists beside
    training, dev is the test split. Empty texts and missing labels are dropped. All of that is in the task's notes.

    Raises:
        DataError: a malformed file or cell (names file and line).
        TaskError: the reference or the task does not hold together.
    """
    reference = f"table:{body}"
    target, options = parse_options(reference, body, forbidden=HUB_ONLY)
    path = base / Path(target).expanduser()
    header = options.header != "no"
    if not options.header:
        header = not all(column.isdecimal() for column in options.columns.values())
    parts = [
        Part(split, str(file), read_table_file(file, header=header, quoting=cast(Quoting, options.quoting)), optional)
        for split, file, optional in _files(reference, path, options)
    ]
    folder = path if path.is_dir() else path.parent
    stem = path.name[: path.name.index(table_suffix(path))] if path.is_file() else path.resolve().name
    if path.is_file() and stem.lower() in SPLIT_NAMES:
        stem = folder.resolve().name
    task = task_from_parts(
        parts,
        options,
        name=options.name or safe_name(stem).lower(),
        source=f"{folder.resolve().name}/{path.name}" if path.is_file() else path.resolve().name,
        licence=licence_of(folder),
    )
    headers = [_header_note(part, options) for part in parts if not header and options.label in part.frame.columns]
    return [replace(task, notes=(*filter(None, headers), *task.notes))]


def _files(reference: str, path: Path, options: Options) -> list[tuple[str, Path, bool]]:
    """Split, file, and whether it was merely found, for each file that ``reference`` means."""
    given = options.files
    if path.is_file():
        if not given:
            return [("", path, False)]
        if "train" in given:
            raise TaskError(f"{reference!r}: the path is the training file already; drop train= or name the folder.")
        return [("train", path, False), *((s, path.parent / f, False) for s, f in given.items())]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder.")
    if options.split:
        raise TaskError(f"{reference!r}: split= needs one file, and {path} is a folder.")
    files = [(split, path / name, False) for split, name in given.items()]
    for split, stems in _FILE_STEMS.items():
        if split in given or (given and split != "train"):
            continue
        found = [f for f in sorted(path.iterdir()) if table_suffix(f) and f.name.partition(".")[0].lower() in stems]
        found = [f for f in found if f.name.removesuffix(".gz").count(".") == 1]
        if len(found) > 1:
            names = ", ".join(f.name for f in found)
            raise TaskError(f"{reference!r}: several {split} files ({names}). Choose with {split}=FILE.")
        files += [(split, found[0], split == "test")] if found else []
    if not any(split == "train" for split, _, _ in files):
        raise DataError(f"{path}: has no training file (train.tsv, .csv, .jsonl, .parquet). Name one with train=FILE.")
    return sorted(files, key=lambda f: list(_FILE_STEMS).index(f[0]))


@dataclass
class _Rows:
    """Kept rows in reading order, and counts of the dropped ones."""

    split: list[str] = field(default_factory=list)
    item: list[str] = field(default_factory=list)
    text: list[Text] = field(default_factory=list)
    labels: list[list[str]] = field(default_factory=list)  # one label, or one per word ("" where a word has none)
    group: list[str] = field(default_factory=list)
    kept: list[tuple[Any, ...]] = field(default_factory=list)
    empty: int = 0
    unlabelled: int = 0


def task_from_parts(parts: Sequence[Part], options: Options, *, name: str, source: str, licence: str) -> Task:
    """Build the task that ``options`` describe from tables that have been read (see :func:`table_tasks`)."""
    notes: list[str] = []
    used = []
    for part in parts:
        if part.optional and _unlabelled(part, options.label):
            notes.append(f"{Path(part.where).name} has no labels and is not used.")
            continue
        _check_columns(part, options.columns)
        used.append(part)
    unit = _unit(used[0], options)
    rows = _Rows()
    for part in used:
        before = len(rows.text), rows.empty
        _read_rows(part, options, unit, rows)
        if len(rows.text) == before[0]:
            why = "every text is empty" if rows.empty > before[1] else "no row has a label"
            raise TaskError(f"Task {name!r} gets no items from {part.where}: {why}.")
    if rows.empty:
        notes.append(f"{rows.empty} row(s) with an empty text dropped.")
    if rows.unlabelled:
        notes.append(f"{rows.unlabelled} row(s) without a label dropped.")
    numbers = options.kind == "number"
    classes = () if numbers else sorted_labels(label for labels in rows.labels for label in labels if label)
    _refuse_measurements(name, options.label, classes)
    position: dict[Text, int] = {}
    texts = [position.setdefault(text, len(position)) for text in rows.text]
    alike = [[options.label]] * len(texts) if numbers else rows.labels  # no number must stay in training
    splits, made = with_all_splits(rows.split, texts, alike, stratify=unit != "word")
    notes += made
    index = {label: i for i, label in enumerate(classes)}
    items = pd.DataFrame(
        [
            (
                f"{item}:{span + 1}" if unit == "word" else item,
                text,
                span if unit == "word" else -1,
                float(label) if numbers else index[label],
                split,
                group or f"text-{text}",
                rows_text.words[span].lower() if unit == "word" else "",
            )
            for item, text, rows_text, labels, split, group in zip(
                rows.item, texts, rows.text, rows.labels, splits, rows.group, strict=True
            )
            for span, label in enumerate(labels)
            if label
        ],
        columns=["item", "text", "span", "label", "split", "group", "control"],
    )
    if options.kept:
        own = [i for i, labels in enumerate(rows.labels) for label in labels if label]
        for k, column in enumerate(options.kept):
            items[column] = _metadata([rows.kept[i][k] for i in own])
    notes += overlap_notes(items, "text(s)")
    corpus = Corpus(name, tuple(position))
    if options.pairs == "features":
        corpus, items = _texts_alone(corpus, items)
    what = {"word": "Label of a word", "sentence": "Label of a text", "pair": "Label of a pair of texts"}[unit]
    return Task(
        name=name,
        level=cast(Level, options.level),
        unit=unit,
        labels=classes,
        corpus=corpus,
        items=items,
        description=f"{what} (column {options.label!r} of {source}).",
        source=source,
        licence=licence,
        citation="see the data's source",
        notes=tuple(notes),
        kind="number" if numbers else "classes",
    ).validate()


def _texts_alone(pairs: Corpus, items: pd.DataFrame) -> tuple[Corpus, pd.DataFrame]:
    """The corpus of the single texts of some pairs, and the items with the columns ``text`` and ``text2``."""
    position: dict[str, int] = {}
    first = [position.setdefault(t.string, len(position)) for t in pairs.texts]
    second = [position.setdefault(cast(str, t.second), len(position)) for t in pairs.texts]
    items = items.assign(text=[first[i] for i in items["text"]], text2=[second[i] for i in items["text"]])
    return Corpus(pairs.name, tuple(Text(string) for string in position)), items


def _metadata(cells: Sequence[Any]) -> pd.Series:
    """A kept column: numbers where every cell is one, else text."""
    numbers = pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce")
    return numbers.astype(float) if numbers.notna().all() else pd.Series([str(c) for c in cells])


def _unlabelled(part: Part, column: str) -> bool:
    return column not in part.frame.columns or all(_missing(v) or v == "" for v in part.frame[column])


def _check_columns(part: Part, columns: Mapping[str, str]) -> None:
    names = [str(c) for c in part.frame.columns]
    cells = ", ".join(repr(str(cell)[:30]) for cell in part.frame.iloc[0])
    first_line = f" It was read without a header; line 1 is {cells}." if all(map(str.isdecimal, names)) else ""
    for option, column in columns.items():
        if column not in names:
            raise UnknownTaskError(
                f"{part.where}: has no column {column!r} ({option}=).{did_you_mean(column, names)} "
                f"It has {', '.join(names)}.{first_line}"
            )


def _header_note(part: Part, options: Options) -> str:
    """A note if the first row of a table without a header looks like names: short words, a label found nowhere else."""
    first, labels = part.frame.iloc[0], part.frame[options.label].tolist()
    if len(labels) < 2 or labels[0] in labels[1:] or not all(_NAME.fullmatch(str(cell)) for cell in first):
        return ""
    return (
        f"{Path(part.where).name}: line 1 ({', '.join(map(str, first))}) looks like a header but was read as "
        "data, because the columns are given by number. If it is one, give the columns by name."
    )


def _unit(part: Part, options: Options) -> Unit:
    lists = part.frame[options.label].map(lambda v: isinstance(v, list)).any()
    implied: Unit = "word" if lists or options.unit == "word" else "pair" if options.text2 else "sentence"
    if options.unit and options.unit != implied:
        hint = "pair tasks need text2=" if options.unit == "pair" else "the columns hold something else"
        raise TaskError(f"{part.where}: unit={options.unit} does not fit a {implied} task: {hint}.")
    if implied == "word" and options.text2:
        raise TaskError(f"{part.where}: token classification takes one text; drop text2=.")
    return implied


def _read_rows(part: Part, options: Options, unit: Unit, rows: _Rows) -> None:
    frame = part.frame
    origin = part.split or "row"
    columns = {option: frame[column].tolist() for option, column in options.columns.items()}
    for i, line in enumerate(frame.index):
        where = f"{part.where}:{line}"
        cell = {option: values[i] for option, values in columns.items()}
        first = _words(cell["text"], where) if unit == "word" else _string(cell["text"], where, options.text)
        second = _string(cell["text2"], where, options.text2) if "text2" in cell else None
        if not first or second == "":
            rows.empty += 1
            continue
        labels = _word_labels(cell["label"], first, where) if unit == "word" else [_label(cell["label"], where)]
        if not any(labels):
            rows.unlabelled += 1
            continue
        if options.kind == "number":
            _check_numbers(labels, where)
        rows.split.append(_split(cell["split"], where) if "split" in cell else part.split)
        rows.item.append(f"{origin}:{line}")
        rows.kept.append(tuple(cell[f"keep {c}"] for c in options.kept))
        rows.text.append(Text.from_words(first) if unit == "word" else _text(cast(str, first), second, options))
        rows.labels.append(labels)
        rows.group.append(str(cell["group"]) if "group" in cell else "")


def _text(first: str, second: str | None, options: Options) -> Text:
    return Text(first, target=second) if options.pairs == "target" else Text(first, second=second)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _string(value: Any, where: str, column: str) -> str:
    if _missing(value):
        return ""
    if isinstance(value, list) and all(isinstance(w, str) for w in value):
        value = " ".join(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}; a text must be a string.")
    return value.strip()


def _words(value: Any, where: str) -> list[str]:
    words = [] if _missing(value) else value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
        raise DataError(f"{where}: the words must be a list of non-empty strings, or one string with spaces.")
    return words


def _word_labels(value: Any, words: Sequence[str], where: str) -> list[str]:
    labels = [] if _missing(value) else value.split() if isinstance(value, str) else value
    if not isinstance(labels, list):
        raise DataError(f"{where}: the labels must be a list with one label per word.")
    if labels and len(labels) != len(words):
        raise DataError(f"{where}: {len(labels)} label(s) for {len(words)} word(s).")
    return [_label(label, where) for label in labels]


def _label(value: Any, where: str) -> str:
    """A label as text; empty where it is missing."""
    if _missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}: a label is a {type(value).__name__}; labels must be strings or whole numbers.")
    return str(value).strip()


def _check_numbers(labels: Sequence[str], where: str) -> None:
    for label in filter(None, labels):
        try:
            finite = math.isfinite(float(label))
        except ValueError:
            finite = False
        if not finite:
            raise DataError(
                f"{where}: {label!r} is no finite number. Correct or remove it; kind=number reads numbers only."
            )


def _split(value: Any, where: str) -> str:
    name = str(value).strip().lower()
    split = SPLIT_NAMES.get(name, name)
    if split in ("train", "dev") or re.fullmatch(r"test([_-].+)?|seen|unseen", split):
        return split
    raise DataError(f"{where}: split {value!r} is not one of {', '.join(SPLIT_NAMES)}, test_<name>, seen, unseen.")


def _refuse_measurements(name: str, column: str, classes: Sequence[str]) -> None:
    decimals = [c for c in classes if re.fullmatch(r"-?[0-9]*\.[0-9]+(e-?[0-9]+)?", c)]
    numbers = [c for c in classes if re.fullmatch(r"-?[0-9]+", c)]
    if len(decimals) > MAX_DECIMALS and len(decimals) + len(numbers) == len(classes):
        raise TaskError(
            f"Task {name!r}: column {column!r} holds {len(classes)} different decimal numbers, which are "
            "measurements rather than classes. Give kind=number to probe them by regression, or bin them first."
        )
