"""A few items of probing tasks, drawn once, whose texts are encoded again and again by a model that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probing.registry import load_tasks
from probing.repeated import RepeatedStates
from probing.tasks.base import Task, Text
from spafit.errors import TaskError, UsageError
from spafit.runtime import generator


@dataclass(frozen=True)
class DrawnItems:
    """A task and the positions of its drawn items, by split."""

    task: Task
    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray

    @classmethod
    def make(cls, task: Task, train_items: int, test_items: int, seed: int) -> DrawnItems:
        """Draw training items, half as many dev items, and items of the first test split; tasks share texts."""
        split, text = task.items["split"].to_numpy(), task.items["text"].to_numpy()
        # Texts in an order of the corpus, as for training items, so that tasks share them.
        order = generator(seed, "watched texts", task.corpus.digest).permutation(len(task.corpus.texts))

        def first(name: str, n: int) -> np.ndarray:
            rows = np.flatnonzero(split == name)
            return np.sort(rows[np.argsort(order[text[rows]], kind="stable")][:n])

        return cls(
            task, task.training_draw(seed, train_items), first("dev", max(2, train_items // 2)),
            first(task.test_splits[0], test_items),
        )  # fmt: skip


def texts_of(draws: Sequence[DrawnItems], *splits: str) -> tuple[list[Text], dict[tuple[str, int], int]]:
    """The texts of these splits' items, and where each text of a corpus (digest, position) stands among them."""
    place: dict[tuple[str, int], int] = {}
    texts: list[Text] = []
    for draw in draws:
        corpus = draw.task.corpus
        for t in draw.task.items["text"].to_numpy()[np.concatenate([getattr(draw, s) for s in splits])]:
            if place.setdefault((corpus.digest, int(t)), len(texts)) == len(texts):
                texts.append(corpus.texts[t])
    return texts, place


def rows_of(states: RepeatedStates, task: Task, items: np.ndarray, place: dict[tuple[str, int], int]) -> np.ndarray:
    """Row of each item's state, -1 where it has none."""
    digest = task.corpus.digest
    texts = np.array([place[digest, int(t)] for t in task.items["text"].to_numpy()[items]], dtype=np.int64)
    rows, usable = states.rows(task, items, texts)
    return np.where(usable, rows, -1)


def check_watchable(tasks: Sequence[str | Task]) -> dict[str, Task]:
    """Tasks by name, from references or tasks; each with one class per word, span, sentence or pair of sentences.

    Raises:
        SpafitError: a task that does not exist or cannot be watched, or none.
    """
    given = {t.name: t.validate() for t in tasks if isinstance(t, Task)}
    found = {t.name: t for t in load_tasks([t for t in tasks if isinstance(t, str)])} | given
    if not found:
        raise UsageError("No task to watch. Name at least one, such as core.tense.")
    for task in found.values():
        if task.kind != "classes" or len(task.span_columns) > 1 or len(task.text_columns) > 1:
            raise TaskError(
                f"Task {task.name!r} ({task.kind}, {task.unit}) cannot be watched: only tasks with one class per word, "
                "span, sentence or pair of sentences can. Read it before and after training, with spafit compare."
            )
    return found
