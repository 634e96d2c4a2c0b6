"""CoNLL-U files (Universal Dependencies), read strictly: a malformed line is named, never skipped."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spafit.data.tables import read_lines
from spafit.errors import DataError

_RANGE = re.compile(r"([1-9][0-9]*)-([1-9][0-9]*)")
_EMPTY = re.compile(r"(?:0|[1-9][0-9]*)\.[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One annotated sentence; word ``i`` (from 0) is the token the file numbers ``i + 1``.

    Attributes:
        id: ``sent_id``, made unique in the treebank.
        split: ``train``, ``dev`` or ``test``.
        document: ``newdoc id``; empty where the file marks no documents.
        genre: from a ``genre`` comment or the document's name (see :func:`read_treebank`); may be empty.
        words: the FORM column of the syntactic words.
        upos: UPOS column, ``_`` where unspecified.
        xpos: XPOS column, ``_`` where unspecified.
        feats: FEATS column as written, ``_`` where empty.
        heads: HEAD per word, 0 for a root, -1 where unspecified.
        deprels: DEPREL column.
        depth: number of words on the longest path from a root down; 0 where a head is unspecified.
        spaces: whether white space follows each word (``SpaceAfter``; within a range, such as ``don't``, none does).
    """

    id: str
    split: str
    document: str
    genre: str
    words: tuple[str, ...]
    upos: tuple[str, ...]
    xpos: tuple[str, ...]
    feats: tuple[str, ...]
    heads: tuple[int, ...]
    deprels: tuple[str, ...]
    depth: int
    spaces: tuple[bool, ...]

    def text(self, kept: Collection[int] | None = None) -> str:
        """The sentence as it was written, or some of its words, by position from 0, in their order.

        The words of a contraction are run together, which is how English writes it (``do`` + ``n't``) and French does
        not (``de`` + ``le``). Where words were left out, a space stands, save before punctuation that had none.
        """
        chosen = range(len(self.words)) if kept is None else sorted(kept)
        parts = []
        for i, after in zip(chosen, [*chosen[1:], None], strict=True):
            parts.append(self.words[i])
            if after is not None:
                word = after != i + 1 and self.upos[after] != "PUNCT"
                parts.append(" " if self.spaces[after - 1] or word else "")
        return "".join(parts)


def _malformed(path: Path, line: int, what: str) -> DataError:
    return DataError(f"{path}:{line}: {what}")


@dataclass
class _Block:
    """What has been read of one sentence: its words' cells and their line numbers, and its last range."""

    rows: list[list[str]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    covered: int = 0
    spaceless: set[int] = field(default_factory=set)
    sent_id: str = ""


def read_sentences(path: Path, split: str = "") -> Iterator[Sentence]:
    """The sentences of a CoNLL-U file, in its order.

    Ranges (``3-4``) and empty nodes (``5.1``) are checked and skipped: the words are the syntactic words.

    Args:
        path: the file; may end in ``.gz``.
        split: put into every sentence.

    Raises:
        DataError: the file cannot be read, or a line is malformed (names file and line).
    """
    block = _Block()
    document = genre = ""
    documents = 0
    for number, line in enumerate(read_lines(path), start=1):
        if not line or line.isspace():
            if block.rows:
                yield _sentence(path, block, split, document, genre)
            block = _Block()
        elif line[0] == "#":
            if block.rows:
                raise _malformed(path, number, "a comment inside a sentence; a blank line must end the sentence first.")
            key, _, value = line[1:].partition("=")
            key, value = key.strip(), value.strip()
            if key == "sent_id":
                block.sent_id = value
            elif key in ("newdoc id", "newdoc"):
                documents += 1
                document, genre = value or f"document {documents}", ""
            elif key in ("genre", "meta::genre"):
                genre = value
        else:
            _add_line(path, number, line, block)
    if block.rows:
        yield _sentence(path, block, split, document, genre)


def _add_line(path: Path, number: int, line: str, block: _Block) -> None:
    """Check one token line and add it to ``block`` if it is a syntactic word."""
    cells = line.split("\t")
    if len(cells) != 10:
        spaces = " (cells must be separated by tabs, not spaces)" if len(line.split()) == 10 else ""
        raise _malformed(path, number, f"{len(cells)} column(s) where CoNLL-U has 10{spaces}.")
    token, done = cells[0], len(block.rows)
    if token == str(done + 1):
        if not cells[1]:
            raise _malformed(path, number, "the word form is empty.")
        block.rows.append(cells)
        block.lines.append(number)
        if _is_spaceless(cells[9]) and done + 1 > block.covered:
            block.spaceless.add(done + 1)
    elif span := _RANGE.fullmatch(token):
        start, end = int(span[1]), int(span[2])
        if start != done + 1 or end < start or start <= block.covered:
            raise _malformed(path, number, f"token range {token!r} does not start at the next free word, {done + 1}.")
        block.covered = end
        block.spaceless |= {*range(start, end), *([end] if _is_spaceless(cells[9]) else [])}
    elif _EMPTY.fullmatch(token):
        if int(token.partition(".")[0]) != done:
            raise _malformed(path, number, f"empty node {token!r} does not follow word {done}.")
    elif token == "1" and done:
        raise _malformed(path, number, f"expected word id {done + 1}, got 1. Is a blank line missing before it?")
    else:
        raise _malformed(path, number, f"bad word id {token!r}; expected {done + 1}.")


def _sentence(path: Path, block: _Block, split: str, document: str, genre: str) -> Sentence:
    n = len(block.rows)
    if block.covered > n:
        raise _malformed(
            path, block.lines[-1], f"a token range ends at word {block.covered}, but the sentence has {n} words."
        )
    _, words, _, upos, xpos, feats, head_cells, deprels, _, _ = zip(*block.rows, strict=True)
    heads = []
    for i, cell in enumerate(head_cells, start=1):
        head = int(cell) if cell.isdecimal() else -1
        if head > n or (head < 0 and cell != "_"):
            what = f"word {i} has head {cell!r}; allowed are 0 to {n}, or '_' for none."
            raise _malformed(path, block.lines[i - 1], what)
        if head == i:
            raise _malformed(path, block.lines[i - 1], f"word {i} is its own head.")
        heads.append(head)
    depths = word_depths(heads)
    complete = min(heads) >= 0
    if complete and 0 in depths:
        i = depths.index(0)
        raise _malformed(path, block.lines[i], f"the heads form a cycle: no root is above word {i + 1}.")
    depth = max(depths) if complete else 0
    spaces = tuple(i not in block.spaceless for i in range(1, n + 1))
    return Sentence(
        block.sent_id, split, document, genre, words, upos, xpos, feats, tuple(heads), deprels, depth, spaces
    )  # fmt: skip


def _is_spaceless(misc: str) -> bool:
    return "SpaceAfter=No" in misc.split("|")


def word_depths(heads: Sequence[int]) -> list[int]:
    """Depth of each word: 1 for a word whose head is 0, one more per step down.

    A word on a cycle, or below one, gets 0, as does a word below an unspecified head (-1).
    """
    depths: list[int | None] = [None] * len(heads)
    for start in range(len(heads)):
        path, word = [], start
        while depths[word] is None:
            depths[word] = 0  # stays so if the walk comes back here, or ends without a root
            path.append(word)
            if heads[word] <= 0:
                break
            word = heads[word] - 1
        if path:
            head = heads[path[-1]]
            base = 0 if head == 0 else depths[head - 1] if head > 0 else None
            if head == 0 or base:
                for step, node in enumerate(reversed(path), start=1):
                    depths[node] = (base or 0) + step
    return [depth or 0 for depth in depths]
