"""Edge probing's format (Tenney et al. 2019): JSON lines with a text and targets of one or two labelled spans of words.

A line is ``{"text": "Ian ate ice cream", "targets": [{"span1": [1, 2], "span2": [2, 4], "label": "ARG1"}]}``. Words are
what white space separates in ``text``; spans count words from 0 with exclusive ends; other keys are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probing.tasks.base import Task
from probing.tasks.spans import Sentence, Target, json_objects, span_source, split_files, word_range
from spafit.errors import DataError

SUFFIXES = (".jsonl", ".json")


@dataclass
class _Found:
    """What the lines so far tell about the task."""

    pairs: bool | None = None  # whether targets have two spans
    several: bool = False  # whether a label is a list, or one span has several labels
    without: int = 0  # lines without targets
    repeated: int = 0  # targets that repeat another one of their line
    together: int = 0  # spans whose labels come from several targets


def edge_tasks(path: Path) -> list[Task]:
    """Read the task of an edge-probing file, or of a folder with train, dev (or development) and test files.

    Targets with two spans make a task of span pairs. If some label is a list, or several targets of a line have the
    same span or spans, items have several labels (``kind`` is ``multilabel``); otherwise one class. Target order within
    a line does not matter, and ids are made from split, line and span, so that none can occur twice. Each line is a
    group for the intervals.

    Raises:
        DataError: a malformed line, a span that is empty, reversed or outside its text, targets with one and with two
            spans in one file, a label that is empty or no string; names file and line.
        TaskError: the task cannot be probed.
    """
    found = _Found()
    sentences = [
        sentence
        for split, file in split_files(path, SUFFIXES, "an edge-probing file (.jsonl)").items()
        for sentence in _read(file, split, found)
    ]
    if not sentences:
        raise DataError(f"{path}: holds no targets. Each line needs 'text' and 'targets' (see probing.tasks.edges).")
    notes = [f"{found.without} line(s) without targets are not used."] if found.without else []
    if found.repeated:
        notes.append(f"{found.repeated} target(s) that repeat another one of their line dropped.")
    if found.together:
        notes.append(f"{found.together} span(s) have labels from several targets: they are items with several labels.")
    source = span_source(path, sentences, {"": notes}, what="edge-probing data")
    what = "two spans of words of a text" if found.pairs else "a span of words"
    return [
        source.task(
            "targets",
            name=source.name,
            level="other",
            description=f"Label{'s' * found.several} of {what}, in edge probing's format.",
            unit="span-pair" if found.pairs else "span",
            kind="multilabel" if found.several else "classes",
        )
    ]


def _read(file: Path, split: str, found: _Found) -> Iterator[Sentence]:
    for where, row in json_objects(file):
        text, targets = row.get("text"), row.get("targets")
        if not isinstance(text, str) or not isinstance(targets, list):
            raise DataError(f"{where}: a line needs 'text', a string, and 'targets', a list.")
        words = tuple(text.split())
        labels: dict[tuple[tuple[int, int], ...], list[str]] = {}
        for number, target in enumerate(targets):
            ranges, own = _target(target, len(words), f"{where}: target {number}", found)
            before = labels.get(ranges)
            if before is None:
                labels[ranges] = own
            elif set(own) <= set(before):
                found.repeated += 1
            else:
                found.several, found.together = True, found.together + 1
                before += [label for label in own if label not in before]
        if labels:
            line = where.rpartition(":")[2]
            merged = tuple(Target(ranges, tuple(own)) for ranges, own in sorted(labels.items()))
            yield Sentence(f"{split or 'line'}:{line}", split, words, {"targets": merged})
        else:
            found.without += 1


def _target(target: Any, words: int, where: str, found: _Found) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    if not isinstance(target, dict) or "span1" not in target or "label" not in target:
        raise DataError(f"{where} must be an object with 'span1', 'label' and, for pairs of spans, 'span2'.")
    ranges = [word_range(target["span1"], words, "span1", where)]
    pair = target.get("span2") is not None
    if pair:
        ranges.append(word_range(target["span2"], words, "span2", where))
    if found.pairs is None:
        found.pairs = pair
    if found.pairs != pair:
        raise DataError(
            f"{where} has {'two spans' if pair else 'one span'}, and earlier targets have "
            f"{'one' if pair else 'two'}; all targets of a task need the same number."
        )
    value = target["label"]
    labels = value if isinstance(value, list) else [value]
    found.several |= isinstance(value, list)
    if not all(isinstance(label, str) and label.strip() for label in labels):
        raise DataError(f"{where}: label {value!r} must be a non-empty string, or a list of them.")
    twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
    if twice is not None:
        raise DataError(f"{where}: label {twice!r} stands twice in one list; remove one.")
    return tuple(ranges), list(labels)
