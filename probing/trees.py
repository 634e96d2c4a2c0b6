"""Dependency trees as numbers: who is above whom, how deep words lie, and how many edges lie between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from spafit.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd

    from spafit.data.conllu import Sentence

#: The universal part of speech whose words are left out of edge scores.
PUNCTUATION = "PUNCT"


@dataclass(frozen=True)
class Tree:
    """The dependency tree of one sentence of n words.

    Attributes:
        name: names the sentence in messages.
        heads: int64, (n,): number of each word's head, counted from 1; 0 for the root.
        punctuation: bool, (n,): words that edge scores and root accuracy leave out.
        depths: int16, (n,): edges between a word and the root, which has 0 (``Sentence.depth`` counts words instead).
        distances: int16, (n, n): edges on the path between two words.
    """

    name: str
    heads: np.ndarray = field(repr=False)
    punctuation: np.ndarray = field(repr=False)
    depths: np.ndarray = field(repr=False)
    distances: np.ndarray = field(repr=False)

    @classmethod
    def from_heads(
        cls, heads: Sequence[int] | np.ndarray, *, name: str, punctuation: Sequence[bool] | np.ndarray | None = None
    ) -> Tree:
        """Check the heads of a sentence and measure its tree.

        Args:
            heads: head of each word, counted from 1, with 0 for the root.
            name: names the sentence in messages.
            punctuation: which words are punctuation; none by default.

        Raises:
            DataError: no words, a head out of range, two roots, or a cycle; names the sentence.
            UsageError: ``punctuation`` has another length.
        """
        above = ancestors(heads, name=name)
        n = len(above)
        left_out = np.zeros(n, dtype=bool) if punctuation is None else np.asarray(punctuation, dtype=bool)
        if left_out.shape != (n,):
            raise UsageError(
                f"Sentence {name!r} has {n} word(s) and punctuation marks of shape {left_out.shape}; give one per word."
            )
        # Rows of ``above`` differ exactly in the words on the path, less the topmost: one per edge.
        common = above.astype(np.float32) @ above.T.astype(np.float32)
        counts = np.diagonal(common)
        distances = (counts[:, None] + counts - 2 * common).astype(np.int16)
        depths = (counts - 1).astype(np.int16)
        return cls(name, np.asarray(heads, dtype=np.int64), left_out, depths, distances)

    def __len__(self) -> int:
        """Number of words."""
        return len(self.heads)

    @property
    def root(self) -> int:
        """Position of the root, counted from 0."""
        return int(np.flatnonzero(self.heads == 0)[0])


def ancestors(heads: Sequence[int] | np.ndarray, *, name: str) -> np.ndarray:
    """Which words lie on the way from each word up to the root.

    The squared Euclidean distance of two rows is the number of edges between the two words.

    Args:
        heads: head of each word, counted from 1, with 0 for the root.
        name: names the sentence in messages.

    Returns:
        bool, (n, n): row = word, column = the word itself or a word above it.

    Raises:
        DataError: no words, a head out of range, two roots, or a cycle.
    """
    given = np.asarray(heads, dtype=np.int64)
    n = len(given)
    if not n:
        raise DataError(f"Sentence {name!r} is empty; a tree needs at least one word. Leave the sentence out.")
    wrong = np.flatnonzero((given < 0) | (given > n))
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"Sentence {name!r}: word {i + 1} has head {given[i]}; allowed are 0 (root) to {n}, the number of words."
        )
    roots = np.flatnonzero(given == 0) + 1
    if len(roots) > 1:
        shown = ", ".join(map(str, roots[:5]))
        raise DataError(f"Sentence {name!r} has {len(roots)} roots (words {shown}); a tree has one word with head 0.")
    above = np.eye(n, dtype=bool)
    word, top = np.arange(n), given - 1
    for _ in range(n):  # one step up for all words that have not reached the root
        word, top = word[top >= 0], top[top >= 0]
        if not len(word):
            return above
        above[word, top] = True
        top = given[top] - 1
    word = word[top >= 0]
    if len(word):
        raise DataError(
            f"Sentence {name!r}: the heads form a cycle; no root is above word {word[0] + 1}. Correct its heads."
        )
    return above


def treebank_trees(sentences: Sequence[Sentence]) -> list[Tree]:
    """Trees of treebank sentences (:class:`probing.tasks.treebank.Sentence`); UPOS ``PUNCT`` marks punctuation.

    Raises:
        DataError: a sentence whose heads are not one tree (some word without a head, or two roots).
    """
    return [Tree.from_heads(s.heads, name=s.id, punctuation=[tag == PUNCTUATION for tag in s.upos]) for s in sentences]


def item_trees(items: pd.DataFrame) -> list[Tree]:
    """Trees of a task of trees, in the order of its items (:class:`probing.tasks.base.Task`, kind ``tree``).

    Args:
        items: rows with the columns ``group``, ``label`` (heads) and ``punctuation``; a sentence's rows stand together.

    Raises:
        DataError: a sentence whose rows are apart, or whose heads are not one tree.
    """
    groups = items["group"].astype(str).to_numpy()
    heads, punctuation = items["label"].to_numpy(dtype=np.int64), items["punctuation"].to_numpy(dtype=bool)
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    names = groups[starts]
    seen: set[str] = set()
    twice = next((n for n in names if n in seen or seen.add(n)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise DataError(f"Sentence {twice!r} stands in two places among the items; its words must stand together.")
    ends = [*starts[1:], len(groups)]
    return [
        Tree.from_heads(heads[a:b], name=name, punctuation=punctuation[a:b])
        for a, b, name in zip(starts, ends, names, strict=True)
    ]


def length_groups(lengths: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each distinct length, ascending, with the positions of the sentences that have it."""
    lengths = np.asarray(lengths)
    for n in np.unique(lengths):
        yield int(n), np.flatnonzero(lengths == n)
