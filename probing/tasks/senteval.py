"""SentEval's probing format: ``tr|va|te``, a tab, the label, a tab, the sentence; one file per task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from probing.tasks.base import Corpus, Level, Task, Text
from probing.tasks.reading import licence_of, overlap_notes, safe_name, sorted_labels
from spafit.data.tables import read_lines
from spafit.errors import DataError, TaskError, UnknownTaskError, did_you_mean

#: Levels of the ten tasks of Conneau et al. (2018), by file name; any other task is filed under ``other``.
LEVELS: dict[str, Level] = {
    "sentence_length": "surface",
    "word_content": "surface",
    "tree_depth": "syntax",
    "top_constituents": "syntax",
    "bigram_shift": "syntax",
    "past_present": "semantics",
    "subj_number": "semantics",
    "obj_number": "semantics",
    "odd_man_out": "semantics",
    "coordination_inversion": "semantics",
}
_DESCRIPTIONS = {
    "sentence_length": "Number of words in the sentence, binned.",
    "word_content": "Which one of a list of mid-frequency words the sentence holds.",
    "tree_depth": "Depth of the sentence's constituency tree.",
    "top_constituents": "Sequence of constituents right below the sentence node.",
    "bigram_shift": "Whether two neighbouring words of the sentence were swapped.",
    "past_present": "Tense of the main verb.",
    "subj_number": "Number of the main clause's subject.",
    "obj_number": "Number of the main clause's object.",
    "odd_man_out": "Whether a noun or verb of the sentence was replaced by another.",
    "coordination_inversion": "Whether the order of two coordinated clauses was inverted.",
}
_SPLITS = {"tr": "train", "va": "dev", "te": "test"}
_NOT_TASKS = re.compile(r"(?i)(readme|licen[cs]e|copying|citation)")


def senteval_tasks(path: Path, names: Sequence[str] | None = None) -> list[Task]:
    """Read one task file, or every ``*.txt`` of a folder as one task each.

    All tasks of a folder point into one corpus, built from all of its files whichever are asked for, so that a
    sentence is encoded once and a task's numbers do not depend on its company. README and LICENSE files are
    passed over.

    Args:
        path: a task file or a folder of them.
        names: file names without ``.txt`` to keep, in this order; None keeps all, sorted.

    Returns:
        Sentence tasks named ``<folder>.<file>``. Sentences with equal strings share a text and a ``group``. Lines with
        an empty sentence are dropped and counted in the notes, as are test sentences that also occur in training
        (those are kept).

    Raises:
        DataError: a missing path, or a malformed line (names file and line).
        TaskError: a name that the folder does not have, or a task that cannot be probed.
    """
    if path.is_dir():
        files = sorted(f for f in path.glob("*.txt") if not _NOT_TASKS.match(f.name))
        if not files:
            raise DataError(f"{path}: holds no .txt task file.")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: no such file or folder. Name a SentEval task file or a folder of them.")
    stems = [f.stem for f in files]
    for name in names or ():
        if name not in stems:
            raise UnknownTaskError(
                f"{path}: has no task {name!r}.{did_you_mean(name, stems)} It has {', '.join(stems)}."
            )
    folder = files[0].resolve().parent
    name = safe_name(folder.name) or "senteval"
    rows = {file.stem: _read(file) for file in files}
    position: dict[str, int] = {}
    for _, _, sentences in rows.values():
        for sentence in sentences:
            if sentence:
                position.setdefault(sentence, len(position))
    corpus = Corpus(name if path.is_dir() else f"{name}.{path.stem}", tuple(Text(s) for s in position))
    licence = licence_of(folder)
    return [_task(f"{name}.{stem}", stem, folder, corpus, position, rows[stem], licence) for stem in names or stems]


def _read(file: Path) -> tuple[list[str], list[str], list[str]]:
    """Splits, labels and stripped sentences of one file, line by line."""
    splits, labels, sentences = [], [], []
    for number, line in enumerate(read_lines(file), start=1):
        cells = line.split("\t")
        if len(cells) != 3:
            raise DataError(f"{file}:{number}: {len(cells)} cell(s) where the format has 3: split, label, sentence.")
        if cells[0] not in _SPLITS:
            raise DataError(f"{file}:{number}: split {cells[0]!r} is not one of {', '.join(_SPLITS)}.")
        if not cells[1]:
            raise DataError(f"{file}:{number}: the label is empty.")
        splits.append(_SPLITS[cells[0]])
        labels.append(cells[1])
        sentences.append(cells[2].strip())
    if not splits:
        raise DataError(f"{file}: holds no lines.")
    return splits, labels, sentences


def _task(
    name: str,
    stem: str,
    folder: Path,
    corpus: Corpus,
    position: dict[str, int],
    rows: tuple[list[str], list[str], list[str]],
    licence: str,
) -> Task:
    splits, labels, sentences = rows
    keep = [i for i, sentence in enumerate(sentences) if sentence]
    if not keep:
        raise TaskError(f"Task {name!r}: every sentence is empty.")
    classes = sorted_labels(labels[i] for i in keep)
    index = {label: i for i, label in enumerate(classes)}
    text = [position[sentences[i]] for i in keep]
    items = pd.DataFrame(
        {
            "item": [f"{stem}:{i + 1}" for i in keep],
            "text": text,
            "span": -1,
            "label": [index[labels[i]] for i in keep],
            "split": [splits[i] for i in keep],
            "group": [f"text-{t}" for t in text],
            "control": "",
        }
    )
    notes = []
    if len(keep) < len(sentences):
        notes.append(f"{len(sentences) - len(keep)} empty sentence(s) dropped.")
    notes += overlap_notes(items, "sentence(s)")
    return Task(
        name=name,
        level=LEVELS.get(stem, "other"),
        unit="sentence",
        labels=classes,
        corpus=corpus,
        items=items,
        description=_DESCRIPTIONS.get(stem, f"Label of the sentence in {stem}.txt."),
        source=f"{folder.name}/{stem}.txt, in SentEval's format",
        licence=licence,
        citation="conneau2018cram (the task format and definitions)" if stem in LEVELS else "see the data's source",
        notes=tuple(notes),
    ).validate()
