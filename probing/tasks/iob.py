"""Named entities and other chunks in IOB2: one word and its tag per line, an empty line after each sentence.

``B-TYPE`` begins a chunk, ``I-TYPE`` goes on with it, ``O`` is outside. The columns are separated by tabs, or by spaces
in files without tabs. If the first column numbers the words (as in Universal NER's files), the word is in the second
and the tag in the third; otherwise the word is in the first and the tag in the last (as in CoNLL-2003's files).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from probing.tasks.base import Task
from probing.tasks.spans import Sentence, SpanSource, Target, span_source, split_files
from spafit.data.tables import read_lines
from spafit.errors import DataError, UnknownTaskError, did_you_mean

SUFFIXES = (".iob2", ".iob", ".bio", ".conll")
#: Names that may follow ``#`` in an ``iob:`` reference; all by default.
DERIVATIONS = ("spans", "tags")

_TAG = re.compile(r"O|[BI]-\S+")
_SKIPPED_ID = re.compile(r"[0-9]+[-.][0-9]+")  # ranges and empty nodes of CoNLL-U


@dataclass
class _IllFormed:
    """Tags ``I-TYPE`` that continue nothing: how many, and where the first stands."""

    count: int = 0
    first: str = ""


def read_iob(path: Path) -> SpanSource:
    """Read an IOB2 file, or a folder with train, dev and test files.

    A tag ``I-TYPE`` after ``O``, after another type or at the start of a sentence is ill-formed. It is read as the
    beginning of a chunk, as conlleval reads it, and reported in the notes with its count and the first place (so
    ``spafit tasks validate`` shows it): published corpora hold some, and files in the older IOB1 have them everywhere,
    where this reading is the right one; refusing them would cost the task and mend nothing.

    Raises:
        DataError: a line without a tag, a tag that is not of the scheme, or word numbers with a gap; names file and
            line.
    """
    ill = _IllFormed()
    files = split_files(path, SUFFIXES, "an IOB2 file (.iob2, .conll)")
    sentences = [sentence for split, file in files.items() for sentence in _read(file, split, ill)]
    notes = []
    if ill.count:
        notes.append(
            f"{ill.count} ill-formed tag(s): I- without a chunk of its type before it, the first at {ill.first}; "
            "each is read as the beginning of a chunk."
        )
    return span_source(path, sentences, {"": notes}, what="IOB2 files")


def iob_tasks(source: SpanSource, names: Sequence[str] | None = None) -> list[Task]:
    """Derive tasks from IOB2 files.

    Args:
        source: what :func:`read_iob` read.
        names: of :data:`DERIVATIONS`; all by default. ``spans`` asks for the type of each marked chunk (its limits are
            given), ``tags`` for the tag of each word, with ill-formed ones mended.

    Returns:
        Tasks ``<source>.<name>``, filed under semantics, which is an assumption that fits entities.

    Raises:
        UnknownTaskError: an unknown name.
        TaskError: a task that cannot be probed.
    """
    tasks = []
    for name in dict.fromkeys(DERIVATIONS if names is None else names):
        if name == "spans":
            what = "Type of a marked span of words, such as a named entity; its limits are given."
            tasks.append(source.task(name, level="semantics", description=what))
        elif name == "tags":
            what = "IOB2 tag of a word: outside, or beginning or inside a span of some type."
            tasks.append(source.task(name, level="semantics", description=what, unit="word"))
        else:
            raise UnknownTaskError(
                f"IOB2 files give no task {name!r}.{did_you_mean(name, DERIVATIONS)} Use {', '.join(DERIVATIONS)}."
            )
    return tasks


def _read(file: Path, split: str, ill: _IllFormed) -> Iterator[Sentence]:
    lines = read_lines(file)
    tabs = any("\t" in line for line in lines)
    rows: list[list[str]] = []
    numbers: list[int] = []
    name = ""
    for number, line in enumerate([*lines, ""], start=1):
        cells = line.split("\t") if tabs else line.split()
        if not line.strip() or cells[0] == "-DOCSTART-":
            if rows:
                yield _sentence(file, rows, numbers, split, name, ill)
            rows, numbers, name = [], [], ""
        elif line[0] == "#" and (len(cells) == 1 if tabs else not _TAG.fullmatch(cells[-1])):
            key, _, value = line[1:].partition("=")
            name = value.strip() if key.strip() == "sent_id" else name
        else:
            if len(cells) < 2:
                raise DataError(f"{file}:{number}: {line[:40]!r} has one column; a word and its tag are needed.")
            rows.append(cells)
            numbers.append(number)


def _sentence(
    file: Path, rows: list[list[str]], numbers: list[int], split: str, name: str, ill: _IllFormed
) -> Sentence:
    if rows[0][0] == "1" and len(rows[0]) > 2:
        kept = [i for i, cells in enumerate(rows) if not _SKIPPED_ID.fullmatch(cells[0])]
        rows, numbers = [rows[i] for i in kept], [numbers[i] for i in kept]
        for i, cells in enumerate(rows):
            if cells[0] != str(i + 1):
                raise DataError(
                    f"{file}:{numbers[i]}: word number {cells[0]!r} where {i + 1} is expected. Is an empty line "
                    "missing before it?"
                )
        columns = [(cells[1], cells[2] if len(cells) > 2 else "") for cells in rows]
    else:
        columns = [(cells[0], cells[-1]) for cells in rows]
    words, tags = [], []
    previous = "O"
    for (word, tag), number in zip(columns, numbers, strict=True):
        if not word.strip():
            raise DataError(f"{file}:{number}: the word is empty.")
        if not _TAG.fullmatch(tag):
            raise DataError(f"{file}:{number}: tag {tag!r} of {word!r} is not O, B-TYPE or I-TYPE.")
        if tag[0] == "I" and previous[2:] != tag[2:]:
            ill.count, ill.first = ill.count + 1, ill.first or f"{file.name}:{number}"
            tag = f"B{tag[1:]}"
        words.append(word)
        tags.append(tag)
        previous = tag
    of_words = tuple(Target(((i, i + 1),), (tag,)) for i, tag in enumerate(tags))
    return Sentence(name, split, tuple(words), {"spans": tuple(chunks(tags)), "tags": of_words})


def chunks(tags: Sequence[str]) -> Iterator[Target]:
    """The spans that a well-formed sequence of tags marks, each with its type."""
    starts = [i for i, tag in enumerate(tags) if tag[0] == "B"]
    for start in starts:
        end = start + 1
        while end < len(tags) and tags[end][0] == "I":
            end += 1
        yield Target(((start, end),), (tags[start][2:],))
