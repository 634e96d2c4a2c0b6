"""What the trainer needs to know of a task, whatever its items are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from spafit.data.training import TrainData
from spafit.heads import Head, HeadedModel, load_with_head

if TYPE_CHECKING:
    import torch

    from spafit.batches import EncodedTexts
    from spafit.settings import TrainSettings

#: Batches of items; see :class:`spafit.batches.Collator`.
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, "torch.Tensor"]]


@dataclass(frozen=True)
class TaskKind(ABC):
    """How one kind of task is encoded, trained and scored.

    What scoring needs of an item is a row of numbers, its *summary* (a classifier's logits, a language model's bits),
    so that evaluation keeps no states or vocabularies in memory.

    Attributes:
        data: the task.
    """

    data: TrainData

    #: Columns that frames of this kind have.
    columns: ClassVar[tuple[str, ...]] = ()
    #: Whether the model's own head is kept as it was trained before, unless the plan says otherwise.
    keeps_head: ClassVar[bool] = False

    @abstractmethod
    def check(self, settings: TrainSettings) -> None:
        """Refuse settings, metrics and rows that do not go with this kind, in one sentence."""

    @abstractmethod
    def head(self, reference: str | None, *, revision: str | None, offline: bool) -> Head:
        """The head that a model needs."""

    def load(
        self, reference: str | None, *, seed: int, revision: str | None, offline: bool, allow_pickle: bool
    ) -> HeadedModel:
        """The model with its head; what the checkpoint lacks is drawn from ``seed``."""
        return load_with_head(
            reference, head=self.head(reference, revision=revision, offline=offline), labels=self.data.labels,
            regression=self.data.regression, seed=seed, revision=revision, offline=offline, allow_pickle=allow_pickle,
        )  # fmt: skip

    @abstractmethod
    def encode(self, frame: pd.DataFrame, headed: HeadedModel, *, max_length: int) -> EncodedTexts:
        """Items of a frame; what was cut is counted."""

    @abstractmethod
    def collator(self, headed: HeadedModel) -> Collate:
        """What makes a batch of items."""

    @abstractmethod
    def loss(
        self, model: Any, inputs: dict[str, Any], *, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss of a batch, and each item's summary, shape (items, k).

        Args:
            model: called with what it needs of ``inputs``.
            inputs: a batch, without ``index``.
            weights: of classes, where there are some.
        """

    def units(self, batch: Mapping[str, Any]) -> int:
        """Over how many units the mean loss of a batch was taken: items, or tokens that are predicted."""
        return len(batch["index"])

    @abstractmethod
    def score(self, summaries: np.ndarray, items: EncodedTexts) -> dict[str, float]:
        """Metrics of items, with ``headline`` (larger is better) and ``loss`` (smaller is better).

        Args:
            summaries: shape (items, k), in the order of the items.
            items: the encoded items.
        """

    def generated(
        self, model: Any, headed: HeadedModel, frame: pd.DataFrame, settings: TrainSettings
    ) -> tuple[dict[str, float], pd.DataFrame | None]:
        """Metrics of what the model writes for a frame, and the texts; nothing for kinds that write nothing.

        The texts' index holds the items' places in the frame, which may be some of them.
        """
        return {}, None

    @abstractmethod
    def write(self, stem: Path, frame: pd.DataFrame, summaries: np.ndarray, texts: pd.DataFrame | None) -> None:
        """Write one row per item to ``stem``.parquet and .csv."""
