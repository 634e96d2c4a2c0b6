"""The states of a task's items in a store: one span, two spans side by side, a text, or the features of two texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from probing.tasks.base import Task

if TYPE_CHECKING:
    from probing.planning import ProbePlan
    from probing.store import ActivationStore


def rows_of_items(plan: ProbePlan, task: Task, store: ActivationStore) -> tuple[np.ndarray, np.ndarray]:
    """Rows in a store of each of a task's items, and whether there is a state for it.

    Returns:
        Rows of shape (items, parts), where an item has one part, or two (two spans of its text, or two texts); and a
        mask of shape (items,), True where all parts have a state.
    """
    needed = plan.needed[task.corpus.name]
    texts = texts_of_items(plan, task)
    encoded = np.all(texts >= 0, axis=1)
    if not task.span_columns:
        return texts, encoded
    spans = needed.span_of(task.items["text"].to_numpy()[:, None], task.items[list(task.span_columns)].to_numpy())
    rows = store.word_offsets[texts] + spans
    return rows, store.word_valid[np.where(encoded[:, None], rows, 0)].all(1) & encoded


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
