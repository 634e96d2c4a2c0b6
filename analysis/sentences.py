"""Items that come in sentences: which of them count, and which sentence each belongs to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from spafit.errors import UsageError


def as_states(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays (items, width) of the same items and precision: float32, or float64 where one of them is.

    Raises:
        UsageError: they are not two-dimensional or differ in items.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise UsageError(f"Two arrays of the same items (items, width) are needed; got shapes {x.shape} and {y.shape}.")
    small = all(a.dtype in (np.float16, np.float32) for a in (x, y))
    dtype = np.float32 if small else np.float64
    return x.astype(dtype, copy=False), y.astype(dtype, copy=False)


def sentence_codes(groups: Sequence[Hashable] | np.ndarray, items: int) -> np.ndarray:
    """Position of each item's sentence, shape (items,).

    Raises:
        UsageError: not one label per item.
    """
    labels = np.asarray(groups)
    if labels.shape != (items,):
        raise UsageError(f"One sentence label per item is needed: {items} items, labels of shape {labels.shape}.")
    return np.unique(labels, return_inverse=True)[1]


def usable_items(x: np.ndarray, y: np.ndarray, groups: Sequence[Hashable] | np.ndarray | None = None) -> np.ndarray:
    """Which items count: no padding (rows zero on both sides), and one of each set of copied sentences.

    A copied sentence has, on both sides, bitwise the same rows in the same order as an earlier one. Copies raise CKA
    between unrelated states just as tokens of one sentence do.

    Args:
        x: shape (items, d).
        y: shape (items, e).
        groups: sentence label of each item; None makes each item its own sentence.

    Returns:
        Boolean, shape (items,).
    """
    keep = np.ones(len(x), dtype=bool)
    for i in np.flatnonzero((x[:, :1] == 0).all(axis=1) & (y[:, :1] == 0).all(axis=1)):
        keep[i] = x[i].any() or y[i].any()
    codes = np.arange(len(x)) if groups is None else sentence_codes(groups, len(x))
    order = np.flatnonzero(keep)[np.argsort(codes[keep], kind="stable")]
    if len(order) == 0:
        return keep
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    # only sentences whose first number occurs more than once can be copies
    _, inverse, counts = np.unique(x[order[starts], 0], return_inverse=True, return_counts=True)
    seen: set[bytes] = set()
    stops = np.append(starts[1:], len(order))
    first = np.argsort(order[starts], kind="stable")  # in the order of their first item
    for s in first[counts[inverse[first]] > 1]:
        rows = order[starts[s] : stops[s]]
        content = x[rows].tobytes() + y[rows].tobytes()
        if content in seen:
            keep[rows] = False
        seen.add(content)
    return keep


@dataclass(frozen=True)
class Layout:
    """Which item belongs to which sentence.

    Attributes:
        order: item positions, sentence by sentence, shape (items,).
        codes: sentence of each ordered item, shape (items,).
        starts: first ordered item of each sentence, shape (sentences,).
        sizes: items per sentence, shape (sentences,).
    """

    order: np.ndarray
    codes: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def make(cls, groups: Sequence[Hashable] | np.ndarray) -> Layout:
        """Order the items of ``groups`` (one label per item)."""
        codes = sentence_codes(groups, len(groups))
        order = np.argsort(codes, kind="stable")
        sizes = np.bincount(codes)
        return cls(order, codes[order], np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)

    @property
    def n(self) -> int:
        """Number of sentences."""
        return len(self.sizes)

    @property
    def single(self) -> bool:
        """Whether each sentence has one item."""
        return self.n == len(self.codes)

    def sentence_means(self, values: np.ndarray) -> np.ndarray:
        """Mean of ordered ``values`` (items, …) over each sentence, float64."""
        if self.single:
            return values.astype(np.float64, copy=False)
        sums = np.add.reduceat(values, self.starts, axis=0, dtype=np.float64)
        return sums / self.sizes.reshape(-1, *[1] * (values.ndim - 1))
