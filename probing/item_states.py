"""The states of a task's items in a store: one span, two spans side by side, a text, or the features of two texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.edge_span import EdgeAttention
from probing.probes.families import NamedFamily, parse_probe, reads_words, suits
from probing.probes.span_words import SpanWords
from probing.tasks.base import Task

if TYPE_CHECKING:
    from probing.planning import ProbePlan
    from probing.store import ActivationStore


def rows_of_items(
    plan: ProbePlan, task: Task, store: ActivationStore, *, family: NamedFamily | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in a store of each of a task's items, and whether there is a state for it.

    Args:
        plan: says what is encoded, and which families the run fits.
        task: one of the plan's.
        store: states of the texts that the plan needs of the task's corpus.
        family: the one that the rows are for; by default one that reads a single state per part.

    Returns:
        Rows of shape (items, parts), where an item has one part, or two (two spans of its text, or two texts); for a
        family that reads words half-open rows of each part's words, (items, parts, 2). And a mask of shape (items,),
        True where all parts have a state, and each of their words, where some family of the run reads words.
    """
    needed = plan.needed[task.corpus.name]
    texts = texts_of_items(plan, task)
    encoded = np.all(texts >= 0, axis=1)
    if not task.span_columns:
        return texts, encoded
    text, span = task.items["text"].to_numpy()[:, None], task.items[list(task.span_columns)].to_numpy()
    rows = store.word_offsets[texts] + needed.span_of(text, span)
    usable = store.word_valid[np.where(encoded[:, None], rows, 0)].all(1) & encoded
    if not any(reads_words(f) and suits(f, task) for f in map(parse_probe, plan.settings.probe)):
        return rows, usable
    words = store.word_offsets[texts][..., None] + needed.words_of(text, span)
    begin, end = np.moveaxis(np.where(encoded[:, None, None], words, 0), -1, 0)
    invalid = np.concatenate([[0], np.cumsum(~store.word_valid)])
    usable &= ((begin < end) & (invalid[begin] == invalid[end])).all(1)
    return (rows if family is None or not reads_words(family) else words), usable


def texts_of_items(plan: ProbePlan, task: Task) -> np.ndarray:
    """Positions of each item's texts among those that the plan encodes, -1 for others, (items, one or two)."""
    return plan.needed[task.corpus.name].position[task.items[list(task.text_columns)].to_numpy()]


def item_states(
    task: Task,
    store: ActivationStore,
    rows: np.ndarray,
    *,
    pooling: str,
    hidden: int,
    site: str = "block",
    each: Callable[[np.ndarray], np.ndarray] = lambda states: states,
) -> np.ndarray:
    """What a probe reads for items.

    Args:
        task: decides how parts are joined: the states of two spans stand side by side, [u; v] (2 × width); those of
            two texts that were encoded alone become [u; v; |u − v|; u · v] (4 × width), the last element by element
            (Conneau et al. 2017, InferSent).
        store: the states.
        rows: some rows of what :func:`rows_of_items` gives, (items, parts).
        pooling: how tokens were reduced.
        hidden: hidden index.
        site: where in the blocks.
        each: applied to the states of each part, (items, width), before they are joined.

    Returns:
        float32, (items, features).
    """
    read = store.words if task.span_columns else store.sentences
    parts = [each(read(pooling, hidden=hidden, site=site, rows=rows[:, i])) for i in range(rows.shape[1])]
    if len(task.text_columns) == 2:
        u, v = parts
        parts += [np.abs(u - v), u * v]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def family_states(
    family: NamedFamily,
    task: Task,
    store: ActivationStore,
    rows: np.ndarray,
    *,
    pooling: str,
    hidden: int,
    site: str = "block",
    each: Callable[[np.ndarray], np.ndarray] = lambda states: states,
) -> np.ndarray | SpanWords:
    """What a probe of one family reads for items: :func:`item_states`, or what it makes of the words of their spans.

    Args:
        family: the family.
        task: the task.
        store: the states.
        rows: some rows of what :func:`rows_of_items` gives for the family.
        pooling: how tokens were reduced, within a word where words are read.
        hidden: hidden index.
        site: where in the blocks.
        each: applied to the states of each part, or of words, before they are joined.

    Returns:
        float32, (items, features); the words themselves for attention.
    """
    if not reads_words(family):
        return item_states(task, store, rows, pooling=pooling, hidden=hidden, site=site, each=each)
    lengths = (rows[..., 1] - rows[..., 0]).ravel()
    starts = np.repeat(rows[..., 0].ravel() - (np.cumsum(lengths) - lengths), lengths)
    used = np.unique(starts + np.arange(lengths.sum()))  # spans share words
    first = np.searchsorted(used, rows[..., 0])
    states = each(store.words(pooling, hidden=hidden, site=site, rows=used))
    words = SpanWords(states, np.stack([first, first + rows[..., 1] - rows[..., 0]], axis=-1))
    return words if isinstance(family, EdgeAttention) else words.means()
