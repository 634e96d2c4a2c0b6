"""The same texts encoded again and again with a model whose weights change: states in memory, nothing on disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from probing.batching import plan_extraction, word_rows
from probing.shard_runs import shard_runner
from probing.shared_prefix import Bottom, Top, attached
from probing.tasks.base import Task, Text
from probing.teacher_forcing import reads_encoder

if TYPE_CHECKING:
    from spafit.models import LoadedModel


class RepeatedStates:
    """Pooled states of fixed texts, by the model as it is at each call of :meth:`read`.

    Texts are tokenised and laid out once. The model is the same object each time; its weights change in place. Where
    its first blocks stay as they are, their outputs are kept from the first reading on, and later readings begin above
    them: token states of all texts at one depth, and states up to there, are held in memory.

    Args:
        loaded: the model.
        texts: what to encode; few, since all states are held in memory.
        pooling: how tokens become one state, of words and of sentences.
        stack: which stack; None takes the first.
        device: where the model is.
        unchanged: hidden states, from the embeddings on, that never change.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        texts: Sequence[Text],
        *,
        pooling: str = "mean",
        stack: str | None = None,
        device: str = "cpu",
        unchanged: int = 0,
    ):
        self.plan = plan_extraction(
            loaded, texts, word_pooling=(pooling,), sentence_pooling=(pooling,), stack=stack
        )  # fmt: skip
        self.device, self.pooling = device, pooling
        self._words, self._sentences, self._offsets, _ = word_rows(self.plan)
        depth = min(unchanged, self.plan.stack.num_blocks) - 1  # blocks whose outputs are kept
        if reads_encoder(self.plan.stack):
            depth = 0
        self._bottom = Bottom(self.plan, [depth], device) if depth > 0 else None
        self._top = Top(self.plan, max(depth, 0), device)
        self._kept: dict[str, np.ndarray] = {}

    def read(self) -> dict[str, np.ndarray]:
        """States by unit (``words``, ``sentences``), each of shape (hidden, rows, width), float32."""
        again = bool(self._kept)
        if self._bottom is not None and again and not self._bottom.fits(self._top):
            self._bottom = None  # more than hidden states goes from block to block
        bottom = self._bottom
        parts: dict[str, list[np.ndarray]] = {}

        def around(rows: tuple[int, int]) -> AbstractContextManager[None]:
            assert bottom is not None
            return attached(bottom, self._top)(rows) if again else bottom.recorded(rows)

        with shard_runner(self.plan, self.device, None, around=None if bottom is None else around) as run:
            for shard in range(self.plan.shards):
                memory, _ = run(shard)
                for key, states in self.plan.layout.tensors(shard, memory).items():
                    unit = next(s.unit for s in self.plan.layout.series if s.key == key)
                    parts.setdefault(unit, []).append(states.float().numpy().copy())
        found = {unit: np.concatenate(arrays, axis=1) for unit, arrays in parts.items()}
        if bottom is not None:
            if again:
                for unit, kept in self._kept.items():
                    found[unit][: len(kept)] = kept
            else:
                self._kept = {unit: kept[: self._top.depth + 1].copy() for unit, kept in found.items()}
        return found

    def rows(self, task: Task, items: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the states of a task's items lie.

        Args:
            task: the task; each of its items has one span, or is one text.
            items: positions in ``task.items``.
            texts: of each item, which of this object's texts is its own.

        Returns:
            Rows of the array of the task's unit, and whether each item has a state; both of shape (items,).
        """
        if not task.span_columns:
            return self._sentences[texts], np.ones(len(items), dtype=bool)
        rows = self._words[self._offsets[texts] + task.items["span"].to_numpy()[items]]
        return rows, rows >= 0
