"""Tasks about spans of words: sentences with labelled spans become texts whose spans are shared by all tasks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probing.tasks.base import Corpus, Kind, Level, Task, Text, Unit
from probing.tasks.reading import licence_of, overlap_notes, safe_name, sorted_labels
from probing.tasks.splits import with_all_splits
from spafit.data.tables import read_lines
from spafit.errors import DataError, TaskError

#: Share of the test items whose words must occur in training, as the same span, for a task to have a control task.
RECURRING = 1 / 3

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "valid", "validation", "val"), "dev"),
    "test": "test",
}

#: Half-open range of words of one sentence.
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Target:
    """One span, or two, of a sentence with its label or labels."""

    ranges: tuple[Range, ...]
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its words, counted from 1, such as ``4`` or ``4|5-7``; part of the item's id."""
        return "|".join(str(a + 1) if b == a + 1 else f"{a + 1}-{b}" for a, b in self.ranges)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence and its targets by the short name of the task that they belong to."""

    id: str
    split: str
    words: tuple[str, ...]
    targets: Mapping[str, tuple[Target, ...]]


@dataclass(frozen=True)
class SpanSource:
    """The sentences of one folder or file, with the corpus that all tasks derived from them share.

    Attributes:
        name: begins the tasks' names, and is that of the corpus.
        sentences: with unique ids and complete splits.
        source: for the tasks' ``source``.
        licence: first line of the licence file, or advice.
        notes: what was done while reading, by the short name of the task that it matters to; ``""`` is all.
    """

    name: str
    sentences: tuple[Sentence, ...]
    source: str
    licence: str
    notes: Mapping[str, Sequence[str]]

    @cached_property
    def _indexed(self) -> tuple[Corpus, np.ndarray, list[dict[Range, int]]]:
        """Corpus, text of each sentence, and the position of each range of words in its text's spans."""
        position: dict[tuple[str, ...], int] = {}
        where = np.array([position.setdefault(s.words, len(position)) for s in self.sentences], dtype=np.int64)
        ranges: list[set[Range]] = [set() for _ in position]
        for sentence, text in zip(self.sentences, where.tolist(), strict=True):
            ranges[text].update(r for targets in sentence.targets.values() for t in targets for r in t.ranges)
        texts, places = [], []
        for words, wanted in zip(position, ranges, strict=True):
            ordered = sorted(wanted)
            of_words = Text.from_words(words)
            spans = tuple((of_words.spans[a][0], of_words.spans[b - 1][1]) for a, b in ordered)
            texts.append(replace(of_words, spans=spans))
            places.append({r: i for i, r in enumerate(ordered)})
        return Corpus(self.name, tuple(texts)), where, places

    @property
    def corpus(self) -> Corpus:
        """Every distinct sentence once, with the spans of all tasks; the same whichever tasks are derived."""
        return self._indexed[0]

    def task(
        self, short: str, *, level: Level, description: str, unit: Unit = "span", kind: Kind = "classes", name: str = ""
    ) -> Task:
        """Derive the task whose targets stand under ``short``.

        A label that never occurs in training is dropped from dev and test, and with it the item where items have one
        class; that is counted in the notes. Each type of the control task is the lower-cased word or words of the
        span (of both spans). Where fewer than :data:`RECURRING` of the test items have words that training has too,
        there is no control task: the labels of unseen types cannot be known by any probe, so its accuracy would be
        chance by construction.

        Raises:
            TaskError: no targets, or a task that cannot be probed.
        """
        full_name = name or f"{self.name}.{short}"
        corpus, text_of, places = self._indexed
        rows: list[tuple[Any, ...]] = []
        labels: list[tuple[str, ...]] = []
        for sentence, text in zip(self.sentences, text_of.tolist(), strict=True):
            for target in sentence.targets.get(short, ()):
                spans = [places[text][r] for r in target.ranges]
                control = "|".join(" ".join(sentence.words[a:b]) for a, b in target.ranges).lower()
                item = f"{sentence.id}:{target.name}"
                rows.append((item, text, spans[0], "", sentence.split, sentence.id, control, spans[-1]))
                labels.append(target.labels)
        if not rows:
            raise TaskError(f"Task {full_name!r} has no items: {self.source} marks no {short}.")
        items = pd.DataFrame(rows, columns=["item", "text", "span", "label", "split", "group", "control", "span2"])
        classes, items, notes = _labelled(items, labels, kind)
        notes = [*self.notes.get("", ()), *self.notes.get(short, ()), *notes, *overlap_notes(items, "sentence(s)")]
        if not _types_recur(items):
            items = items.assign(control="")
            notes.append("No word-type control task: the words of most test items never occur in training.")
        return Task(
            name=full_name,
            level=level,
            unit=unit,
            labels=classes,
            corpus=corpus,
            items=items if unit == "span-pair" else items.drop(columns="span2"),
            description=description,
            source=self.source,
            licence=self.licence,
            citation="see the data's source",
            notes=tuple(notes),
            kind=kind,
        ).validate()


def _labelled(
    items: pd.DataFrame, labels: Sequence[tuple[str, ...]], kind: Kind
) -> tuple[tuple[str, ...], pd.DataFrame, list[str]]:
    """Classes of the training split, the items with positions in them as labels, and notes on what was dropped."""
    train = (items["split"] == "train").to_numpy()
    classes = sorted_labels(label for labels_of, here in zip(labels, train, strict=True) if here for label in labels_of)
    index = {label: i for i, label in enumerate(classes)}
    unseen = Counter(label for labels_of in labels for label in labels_of if label not in index)
    shown = ", ".join(f"{label} {count}" for label, count in unseen.most_common(5))
    notes = []
    if kind == "multilabel":
        values = [",".join(map(str, sorted(index[x] for x in labels_of if x in index))) for labels_of in labels]
        if unseen:
            notes.append(f"{unseen.total()} label(s) of dev or test items dropped: they are not in training ({shown}).")
        return classes, items.assign(label=values), notes
    known = np.array([labels_of[0] in index for labels_of in labels])
    if unseen:
        notes.append(f"{unseen.total()} dev or test item(s) dropped: their label is not in training ({shown}).")
    items = items.assign(label=np.array([index.get(labels_of[0], -1) for labels_of in labels], dtype=np.int64))
    return classes, items[known].reset_index(drop=True), notes


def _types_recur(items: pd.DataFrame) -> bool:
    trained = set(items.loc[items["split"] == "train", "control"])
    tested = items.loc[~items["split"].isin(["train", "dev"]), "control"]
    return bool(len(tested)) and bool(tested.isin(trained).mean() >= RECURRING)


# ---------------------------------------------------------------- files


def split_files(path: Path, suffixes: Sequence[str], what: str) -> dict[str, Path]:
    """The files that ``path`` means, by split; a single file has the split ``""``.

    In a folder a file counts by a split's name in its own (``en_ewt-ud-train.iob2``, ``development.json``). Where
    several do, the one that is called just so is meant.

    Args:
        path: a file, or a folder with a training file and at best a dev and a test file.
        suffixes: endings of the files' names, each also followed by ``.gz``.
        what: what the files hold, for messages.

    Raises:
        DataError: no such path, no training file, or several files of one split.
    """
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder. Name {what}, or the folder of its train, dev and test files.")
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        stem = file.name.removesuffix(".gz")
        ending = next((s for s in suffixes if stem.lower().endswith(s)), "")
        pieces = re.split(r"[-_.]", stem.lower().removesuffix(ending)) if ending and file.is_file() else []
        for split in dict.fromkeys(_SPLIT_NAMES[p] for p in pieces if p in _SPLIT_NAMES):
            found.setdefault(split, []).append(file)
    for split, files in found.items():
        if len(files) > 1:
            files = [f for f in files if f.name.lower().partition(".")[0] in _SPLIT_NAMES] or files
        if len(files) > 1:
            names = ", ".join(f.name for f in files[:4])
            raise DataError(f"{path}: several {split} files ({names}). Name one file, or give each set its own folder.")
        found[split] = files
    if "train" not in found:
        raise DataError(
            f"{path}: has no training file (train{', train'.join(suffixes)}). Name one file to have it split 80/10/10."
        )
    return {split: found[split][0] for split in ("train", "dev", "test") if split in found}


def span_source(
    path: Path, sentences: Sequence[Sentence], notes: Mapping[str, Sequence[str]], *, what: str
) -> SpanSource:
    """Give the sentences unique ids and all three splits, and the source a name.

    Missing splits are carved from training by text (10 % each), deterministically and such that no label leaves
    training; with train and dev only, dev becomes the test split.

    Raises:
        DataError: there are no sentences.
    """
    if not sentences:
        raise DataError(f"{path}: holds no sentences with words.")
    position: dict[tuple[str, ...], int] = {}
    texts = [position.setdefault(s.words, len(position)) for s in sentences]
    labels = [
        sorted({f"{short}={label}" for short, targets in s.targets.items() for t in targets for label in t.labels})
        for s in sentences
    ]
    splits, made = with_all_splits([s.split for s in sentences], texts, labels, stratify=False)
    folder = path if path.is_dir() else path.parent
    stem = path.name.removesuffix(".gz").rpartition(".")[0] if path.is_file() else path.resolve().name
    if path.is_file() and stem.lower() in _SPLIT_NAMES:
        stem = folder.resolve().name
    named = [
        Sentence(name, split, s.words, s.targets)
        for s, split, name in zip(sentences, splits, _unique([s.id for s in sentences]), strict=True)
    ]
    return SpanSource(
        name=safe_name(stem or path.name),
        sentences=tuple(named),
        source=f"{what} {folder.resolve().name}" + ("" if path.is_dir() else f"/{path.name}"),
        licence=licence_of(folder),
        notes={**notes, "": [*notes.get("", ()), *made]},
    )


def _unique(ids: Sequence[str]) -> Iterator[str]:
    """Ids with a repeated one as ``id~2`` and a missing one as ``sentence-<position>``."""
    taken: set[str] = set()
    for position, given in enumerate(ids, start=1):
        first = name = given or f"sentence-{position}"
        repeat = 1
        while name in taken:
            repeat += 1
            name = f"{first}~{repeat}"
        taken.add(name)
        yield name


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:line`` and the object of each line of a JSON-lines file; empty lines are passed over.

    Raises:
        DataError: a line that is not one JSON object, or with half of a surrogate pair, which no tokenizer can encode.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            hint = " The file must hold one JSON object per line." if number == 1 else ""
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}).{hint}") from error
        if not isinstance(content, dict):
            raise DataError(f"{where}: holds a {type(content).__name__}; each line must be one JSON object.")
        if re.search(r"(?i)\\ud[89a-f]", line) and re.search(
            "[\ud800-\udfff]", json.dumps(content, ensure_ascii=False)
        ):
            raise DataError(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.")
        yield where, content


def word_list(value: Any, where: str) -> tuple[str, ...]:
    """The words of a sentence.

    Raises:
        DataError: not a list of strings, or an empty word.
    """
    if not isinstance(value, list) or not all(isinstance(w, str) for w in value):
        raise DataError(f"{where}: 'words' must be a list of strings.")
    empty = next((i for i, w in enumerate(value) if not w.strip()), None)
    if empty is not None:
        raise DataError(f"{where}: word {empty} (from 0) is empty; a word must have a character that is not a space.")
    return tuple(value)


def word_range(value: Any, words: int, name: str, where: str) -> Range:
    """A half-open range of words, checked.

    Raises:
        DataError: not two whole numbers, empty, reversed, or outside the sentence.
    """
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(v) is not int for v in value):
        raise DataError(f"{where}: {name} is {value!r}; it must be [start, end), two whole numbers counted from 0.")
    start, end = value
    shown = f"{name} [{start}, {end}]"
    if start == end:
        raise DataError(f"{where}: {shown} is empty; ends are exclusive, so one word is [{start}, {start + 1}].")
    if end < start:
        raise DataError(f"{where}: {shown} ends before it starts; it must be [start, end) with start < end.")
    if start < 0 or end > words:
        raise DataError(f"{where}: {shown} reaches outside the {words} word(s); ends are exclusive, 0 to {words}.")
    return start, end
