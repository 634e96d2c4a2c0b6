"""A CoNLL-U treebank: strict reading, document-wise splits, and what its README says about licence and citation."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from probing.tasks.base import Corpus, Text
from probing.tasks.reading import licence_of, safe_name
from spafit.data.conllu import Sentence, read_sentences
from spafit.errors import DataError
from spafit.runtime import generator

#: Documents a file must have before it is split by document rather than by sentence.
MIN_DOCUMENTS = 10
#: Share of the sentences that dev and test get where the treebank does not bring them.
HELD_OUT = 0.1

_SPLIT = re.compile(r"(?:^|[-_.])(train|dev|test)(?:[-_.]|$)")


@dataclass(frozen=True)
class Treebank:
    """The sentences of one treebank, train before dev before test, with their shared corpus."""

    name: str
    sentences: tuple[Sentence, ...]
    source: str
    licence: str
    citation: str
    notes: tuple[str, ...]

    @cached_property
    def _indexed(self) -> tuple[Corpus, np.ndarray]:
        position: dict[tuple[str, ...], int] = {}
        where = np.array([position.setdefault(s.words, len(position)) for s in self.sentences], dtype=np.int64)
        return Corpus(self.name, tuple(Text.from_words(words) for words in position)), where

    @property
    def corpus(self) -> Corpus:
        """Every distinct sentence once, with one span per word; the same whichever tasks are derived."""
        return self._indexed[0]

    @property
    def text_of(self) -> np.ndarray:
        """Position in ``corpus.texts`` of each sentence, shape (sentences,)."""
        return self._indexed[1]


def read_treebank(path: Path) -> Treebank:
    """Read a treebank folder (``*-train*.conllu``, ``*-dev*``, ``*-test*``) or a single CoNLL-U file.

    Ranges (``3-4``) and empty nodes (``5.1``) are checked and skipped: the words are the syntactic words. A missing
    dev or test split is carved off, deterministically, 10 % each: by document where at least
    :data:`MIN_DOCUMENTS` documents are marked, else by sentence; a single file is always split so. With train and dev
    only, dev becomes the test split. ``Treebank.notes`` says what was done.

    The genre of a sentence is its ``genre`` (or ``meta::genre``) comment, which holds until the next document; without
    any such comment it is the part before the first ``-`` of the document id (else of the ``sent_id``), as in English
    EWT, provided that this gives between 2 and 20 values which are not the split names. Otherwise it is empty.

    Raises:
        DataError: the path is missing or holds no CoNLL-U file, the folder mixes treebanks, or a line is malformed
            (names file and line).
    """
    files = _split_files(path)
    by_split = {split: [s for f in found for s in read_sentences(f, split)] for split, found in files.items()}
    if not any(by_split.values()):
        raise DataError(f"{path}: holds no sentences.")
    sentences, notes = _with_all_splits(by_split)
    sentences = _with_genres(_with_unique_ids(sentences))
    train = {s.words for s in sentences if s.split == "train"}
    repeated = sum(s.split == "test" and s.words in train for s in sentences)
    if repeated:
        notes.append(f"{repeated} test sentence(s) also occur, word for word, in training; they are kept.")
    folder = path if path.is_dir() else path.parent
    return Treebank(
        name=_name(path, files),
        sentences=tuple(sentences),
        source=f"CoNLL-U treebank {folder.resolve().name}" + ("" if path.is_dir() else f", file {path.name}"),
        licence=_licence(folder),
        citation=_citation(folder),
        notes=tuple(notes),
    )


def _split_files(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        return {"": [path]}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder. Name a treebank folder or a CoNLL-U file.")
    found = sorted(f for f in path.iterdir() if f.name.endswith((".conllu", ".conllu.gz")))
    if not found:
        raise DataError(f"{path}: holds no .conllu file. Name the folder that has the *-train.conllu file.")
    by_split: dict[str, list[Path]] = {}
    codes = set()
    for file in found:
        match = _SPLIT.search(_stem(file))
        by_split.setdefault(match[1] if match else "", []).append(file)
        codes.add(_stem(file)[: match.start()] if match else "")
    if len(codes) > 1:
        names = ", ".join(f.name for f in found[:4])
        raise DataError(f"{path}: holds several treebanks ({names}). Name one file, or put each into its own folder.")
    return by_split


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".conllu")


def _name(path: Path, files: dict[str, list[Path]]) -> str:
    if path.is_file():
        name = _stem(path)
    else:
        first = next(iter(files.values()))[0]
        match = _SPLIT.search(_stem(first))
        name = (_stem(first)[: match.start()] if match else "").removesuffix("-ud") or path.resolve().name
    return safe_name(name)


def _with_all_splits(by_split: dict[str, list[Sentence]]) -> tuple[list[Sentence], list[str]]:
    """Sentences in the order train, dev, test, with what was carved off where."""
    train, dev, test = (by_split.get(split, []) for split in ("train", "dev", "test"))
    notes = []
    if not train:  # one file, or a folder without a training file
        pool = by_split.get("", []) + dev + test
        test, rest, unit = _carve(pool, HELD_OUT, "test")
        dev, train, _ = _carve(rest, HELD_OUT / (1 - HELD_OUT), "dev")
        notes.append(f"The data bring no training split: split 80/10/10 by {unit}, deterministically.")
    else:
        if not test and dev:
            test, dev = dev, []
            notes.append("The treebank has no test file: its dev file is the test split.")
        share = HELD_OUT
        if not test:
            test, train, unit = _carve(train, HELD_OUT, "test")
            share = HELD_OUT / (1 - HELD_OUT)
            notes.append(f"10 % of the training file, by {unit}, are the test split: the treebank has none.")
        if not dev:
            dev, train, unit = _carve(train, share, "dev")
            notes.append(f"10 % of the training file, by {unit}, are the dev split.")
    parts = (("train", train), ("dev", dev), ("test", test))
    return [s if s.split == split else replace(s, split=split) for split, part in parts for s in part], notes


def _carve(sentences: list[Sentence], share: float, what: str) -> tuple[list[Sentence], list[Sentence], str]:
    """A random ``share`` of the sentences (whole documents if there are enough), the others, and the unit used."""
    documents = {s.document for s in sentences}
    by_document = len(documents) >= MIN_DOCUMENTS
    keys: list[object] = [s.document if by_document else i for i, s in enumerate(sentences)]
    sizes: dict[object, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    units = list(sizes)
    target = max(1.0, share * len(sentences))
    taken: set[object] = set()
    count = 0
    for i in generator(0, "treebank split", what, len(sentences)).permutation(len(units)):
        if count + sizes[units[i]] <= 1.05 * target or not taken:
            taken.add(units[i])
            count += sizes[units[i]]
        if count >= target:
            break
    inside = [s for s, key in zip(sentences, keys, strict=True) if key in taken]
    outside = [s for s, key in zip(sentences, keys, strict=True) if key not in taken]
    return inside, outside, "document" if by_document else "sentence"


def _with_unique_ids(sentences: list[Sentence]) -> list[Sentence]:
    """Sentences whose ids are unique: a repeated one becomes ``id~2``, a missing one ``sentence-<position>``."""
    taken: set[str] = set()
    found = []
    for position, sentence in enumerate(sentences, start=1):
        first = name = sentence.id or f"sentence-{position}"
        repeat = 1
        while name in taken:
            repeat += 1
            name = f"{first}~{repeat}"
        taken.add(name)
        found.append(sentence if sentence.id == name else replace(sentence, id=name))
    return found


def _with_genres(sentences: list[Sentence]) -> list[Sentence]:
    if any(s.genre for s in sentences):
        return sentences
    guesses = [_prefix(s.document) or _prefix(s.id) for s in sentences]
    values = set(guesses)
    if not 2 <= len(values) <= 20 or values & {"", "train", "dev", "test"}:
        return sentences
    return [replace(s, genre=genre) for s, genre in zip(sentences, guesses, strict=True)]


def _prefix(name: str) -> str:
    head, dash, _ = name.partition("-")
    return head if dash else ""


def _readme(folder: Path) -> str:
    for name in ("README.md", "README.txt", "README"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8", errors="replace")
    return ""


def _licence(folder: Path) -> str:
    found = re.search(r"^License:\s*(\S.*?)\s*$", _readme(folder), re.MULTILINE)
    return found[1] if found else licence_of(folder)


def _citation(folder: Path) -> str:
    """The README's first BibTeX entry on one line."""
    text = _readme(folder)
    start = re.search(r"@[A-Za-z]+\{[^\s,{}]+,", text)
    if not start:
        return "see the data's source"
    depth = 0
    for end in range(start.start(), len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if text[end] == "}" and depth == 0:
            return " ".join(text[start.start() : end + 1].split())
    return "see the data's source"
