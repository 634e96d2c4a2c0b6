"""Texts that begin alike, packed so that a causal model runs what they share once.

A row holds the tokens of several texts as a tree: a token sees the tokens on the way from the root to itself, and its
position is their number. To the model each text then looks as if it stood alone. Minimal pairs share most of what comes
before the word that differs, and rows filled with several texts need little padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenTree:
    """One row of tokens.

    Attributes:
        ids: token ids, each after the token that it follows.
        parents: place in the row of the token that each follows; -1 where a text begins.
        paths: for each text in the row, its number and the places of its tokens, from first to last.
    """

    ids: Sequence[int]
    parents: Sequence[int]
    paths: Sequence[tuple[int, Sequence[int]]]


def one_text(number: int, ids: Sequence[int]) -> TokenTree:
    """A row of one text."""
    return TokenTree(ids, range(-1, len(ids) - 1), [(number, range(len(ids)))])


def pack(texts: Sequence[Sequence[int]], *, size: int) -> Iterator[TokenTree]:
    """Rows of at most ``size`` tokens, filled with texts in alphabetical order of their ids.

    A text shares with the one before it in its row whatever both begin with, and costs nothing where it repeats it. A
    text of more than ``size`` tokens is a row by itself.
    """
    ids: list[int] = []
    parents: list[int] = []
    paths: list[tuple[int, Sequence[int]]] = []
    for i in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        text = texts[i]
        if len(text) > size:
            yield one_text(i, text)
            continue
        before = paths[-1][1] if paths else []
        shared = _shared([ids[k] for k in before], text)
        if len(ids) + len(text) - shared > size:
            yield TokenTree(ids, parents, paths)
            ids, parents, paths, before, shared = [], [], [], [], 0
        path = [*before[:shared], *range(len(ids), len(ids) + len(text) - shared)]
        parents += [-1, *path][shared : len(text)]
        ids += text[shared:]
        paths.append((i, path))
    if paths:
        yield TokenTree(ids, parents, paths)


def visible(parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens each token of a row sees (boolean, shape (tokens, tokens)), and its position, shape (tokens,)."""
    sees = np.eye(len(parents), dtype=bool)
    for k, parent in enumerate(parents):
        if parent >= 0:
            sees[k] |= sees[parent]
    return sees, sees.sum(axis=1) - 1


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
