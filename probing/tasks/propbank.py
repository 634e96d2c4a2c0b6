"""Constituents and semantic roles from JSON lines of sentences with parse bits and PropBank predicates.

A line is ``{"sent_id": …, "words": […], "parse": […], "predicates": [{"index": 1, "args": [["ARG0", 0, 1], …]}]}``.
``parse`` has one bit per word as in CoNLL-2012: the brackets that open before the word, ``*``, and those that close
after it. ``index`` is the predicate's word; arguments are half-open ranges of words, all counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from probing.tasks.base import Task
from probing.tasks.spans import (
    Range,
    Sentence,
    SpanSource,
    Target,
    json_objects,
    span_source,
    split_files,
    word_list,
    word_range,
)  # fmt: skip
from spafit.errors import DataError, UnknownTaskError, did_you_mean

SUFFIXES = (".jsonl", ".json")
#: Names that may follow ``#`` in a ``propbank:`` reference; all by default.
DERIVATIONS = ("constituents", "roles")
#: Labels of the whole tree, which say nothing, and of the predicate itself, which is given.
ROOTS, PREDICATE = ("TOP", "ROOT", ""), ("V", "C-V")

_BIT = re.compile(r"((?:\([^()*\s]*)*)\*(\)*)")


@dataclass
class _Counts:
    chains: int = 0
    unparsed: int = 0


def read_propbank(path: Path) -> SpanSource:
    """Read a file of sentences, or a folder with train, dev and test files.

    Raises:
        DataError: a malformed line, brackets that do not match, a predicate or argument outside its sentence, or two
            arguments of one predicate that overlap; names file and line.
    """
    counts = _Counts()
    sentences = [
        sentence
        for split, file in split_files(path, SUFFIXES, "a file of sentences with predicates (.jsonl)").items()
        for sentence in _read(file, split, counts)
    ]
    notes = []
    if counts.chains:
        notes.append(
            f"{counts.chains} time(s) a span is phrases of several types, one within the other; the innermost counts."
        )
    if counts.unparsed:
        notes.append(f"{counts.unparsed} sentence(s) have no parse.")
    return span_source(path, sentences, {"constituents": notes}, what="PropBank data")


def propbank_tasks(source: SpanSource, names: Sequence[str] | None = None) -> list[Task]:
    """Derive tasks from sentences with constituents and predicates.

    Args:
        source: what :func:`read_propbank` read.
        names: of :data:`DERIVATIONS`; all by default. ``constituents`` asks for the type of each phrase of at least two
            words (single words are what part-of-speech tasks are for), at every depth of the tree but its root. Where
            one span is several phrases, such as an S that is nothing but a VP, the innermost counts: it is the type
            that the words themselves have. ``roles`` asks for the role of an argument, given its predicate: pairs
            of spans, the words marked V first. Both take the spans as given; there are no negative examples.

    Returns:
        Tasks ``<source>.<name>``; constituents are filed under syntax and roles under semantics, an assumption.

    Raises:
        UnknownTaskError: an unknown name.
        TaskError: a task that cannot be probed.
    """
    tasks = []
    for name in dict.fromkeys(DERIVATIONS if names is None else names):
        if name == "constituents":
            what = "Type of a phrase of at least two words, at any depth of the tree; its limits are given."
            tasks.append(source.task(name, level="syntax", description=what))
        elif name == "roles":
            what = "PropBank role of an argument of a predicate; the spans of both are given."
            tasks.append(source.task(name, level="semantics", description=what, unit="span-pair"))
        else:
            raise UnknownTaskError(
                f"PropBank data give no task {name!r}.{did_you_mean(name, DERIVATIONS)} Use {', '.join(DERIVATIONS)}."
            )
    return tasks


def _read(file: Path, split: str, counts: _Counts) -> Iterator[Sentence]:
    for where, row in json_objects(file):
        words = word_list(row.get("words"), where)
        if not words:
            continue
        bits = row.get("parse")
        constituents = () if bits is None else tuple(_constituents(bits, len(words), where, counts))
        counts.unparsed += bits is None
        roles = tuple(_roles(row.get("predicates", []), len(words), where))
        name = row.get("sent_id", "")
        if not isinstance(name, str):
            raise DataError(f"{where}: 'sent_id' is {name!r}; it must be a string.")
        yield Sentence(name, split, words, {"constituents": constituents, "roles": roles})


def _constituents(bits: Any, words: int, where: str, counts: _Counts) -> Iterator[Target]:
    """Phrases of two words and more; of those with one span the innermost."""
    found: dict[Range, str] = {}
    for label, start, end in brackets(bits, words, where):
        if label in ROOTS or end < start + 2:
            continue
        counts.chains += (start, end) in found
        found.setdefault((start, end), label)  # inner brackets close first
    for span, label in sorted(found.items()):
        yield Target((span,), (label,))


def brackets(bits: Any, words: int, where: str) -> Iterator[tuple[str, int, int]]:
    """Label, start and exclusive end of every bracket, in the order in which they close.

    Raises:
        DataError: not one bit per word, a bit of another form, or brackets that do not match.
    """
    if not isinstance(bits, list) or len(bits) != words or not all(isinstance(b, str) for b in bits):
        size = f"a list of {len(bits)}" if isinstance(bits, list) else f"a {type(bits).__name__}"
        raise DataError(f"{where}: 'parse' is {size}; it must be a list of one string per word, {words}.")
    stack: list[tuple[str, int]] = []
    for i, bit in enumerate(bits):
        match = _BIT.fullmatch(bit)
        if not match:
            raise DataError(f"{where}: parse bit {bit!r} of word {i} is not of the form (NP(NP*)).")
        stack += [(label, i) for label in match[1].split("(")[1:]]
        for _ in match[2]:
            if not stack:
                raise DataError(f"{where}: a bracket closes after word {i} that none opens.")
            label, start = stack.pop()
            yield label, start, i + 1
    if stack:
        raise DataError(f"{where}: the bracket ({stack[-1][0]} before word {stack[-1][1]} is never closed.")


def _roles(predicates: Any, words: int, where: str) -> Iterator[Target]:
    if not isinstance(predicates, list):
        raise DataError(f"{where}: 'predicates' is a {type(predicates).__name__}; it must be a list.")
    seen: set[Range] = set()
    for number, predicate in enumerate(predicates):
        here = f"{where}: predicate {number}"
        if not isinstance(predicate, dict) or not isinstance(predicate.get("args"), list):
            raise DataError(f"{here} must be an object with 'index' and 'args'.")
        index = predicate.get("index")
        if type(index) is not int or not 0 <= index < words:
            raise DataError(f"{here} has index {index!r}; it must be a word, 0 to {words - 1}.")
        arguments = [_argument(a, words, here) for a in predicate["args"]]
        _refuse_overlaps(arguments, here)
        verb = next((r for role, r in arguments if role == "V" and r[0] <= index < r[1]), (index, index + 1))
        if verb in seen:
            raise DataError(f"{here} stands at words [{verb[0]}, {verb[1]}], where another one stands; merge them.")
        seen.add(verb)
        for role, span in arguments:
            if role not in PREDICATE:
                yield Target((verb, span), (role,))


def _argument(value: Any, words: int, where: str) -> tuple[str, Range]:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str) or not value[0]:
        raise DataError(f"{where}: argument {value!r} must be [role, start, end].")
    return value[0], word_range(value[1:], words, value[0], where)


def _refuse_overlaps(arguments: Sequence[tuple[str, Range]], where: str) -> None:
    ordered = sorted(arguments, key=lambda a: a[1])
    for (one, a), (two, b) in pairwise(ordered):
        if b[0] < a[1]:
            raise DataError(
                f"{where}: {one} [{a[0]}, {a[1]}] and {two} [{b[0]}, {b[1]}] overlap; a word has one role at most."
            )
