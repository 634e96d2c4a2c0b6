"""Classes or values of texts and pairs of texts, by a head on the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from spafit.errors import UsageError, did_you_mean
from spafit.heads import Head, HeadedModel
from spafit.kinds.base import Collate, TaskKind
from spafit.metrics import METRICS, compute_metrics, headline, mean_loss
from spafit.predictions import predicted, write_scores

if TYPE_CHECKING:
    import torch

    from spafit.batches import EncodedTexts
    from spafit.settings import TrainSettings


@dataclass(frozen=True)
class Classification(TaskKind):
    """Classes or values (regression); a summary is the item's logits."""

    columns: ClassVar[tuple[str, ...]] = ("text", "label")

    def check(self, settings: TrainSettings) -> None:
        """Metrics and settings that go with the labels.

        Raises:
            UsageError: a metric that does not go with the labels, or class weights of a regression.
        """
        data = self.data
        kind = "regression" if data.regression else "classification"
        for name in data.metrics:
            if name in METRICS and METRICS[name].kind != kind:
                raise UsageError(f"{name} is not a metric of {kind}. Use {_metrics_of(kind)}.")
            if name not in METRICS or (name == "f1" and len(data.labels or ()) != 2):
                raise UsageError(
                    f"The metric {name!r} is not known for {len(data.labels or ())} classes. Use {_metrics_of(kind)}."
                    f"{did_you_mean(name, METRICS)}"
                )
        if settings.class_weights and data.regression:
            raise UsageError("class_weights are for classes, and this is a regression. Leave them off.")

    def head(self, reference: str | None, *, revision: str | None, offline: bool) -> Head:
        """A classifier of sequences."""
        return "sequence-classification"

    def encode(self, frame: pd.DataFrame, headed: HeadedModel, *, max_length: int) -> EncodedTexts:
        """Texts and pairs as the tokenizer puts them."""
        from spafit.batches import encode

        return encode(frame, headed.tokenizer, max_length=max_length, regression=self.data.regression)

    def collator(self, headed: HeadedModel) -> Collate:
        """Padding on the right."""
        from spafit.batches import Collator

        return Collator(headed.tokenizer)

    def loss(
        self, model: Any, inputs: dict[str, Any], *, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy or squared error; logits."""
        return classification_loss(model, inputs, weights=weights)

    def score(self, summaries: np.ndarray, items: EncodedTexts) -> dict[str, float]:
        """The task's metrics."""
        data = self.data
        assert items.labels is not None
        found = compute_metrics(data.metrics, predicted(summaries, regression=data.regression), items.labels)
        loss = mean_loss(summaries, items.labels, regression=data.regression)
        return {**found, "headline": headline(found, data.metrics), "loss": loss}

    def write(self, stem: Path, frame: pd.DataFrame, summaries: np.ndarray, texts: pd.DataFrame | None) -> None:
        """See :func:`spafit.predictions.write_scores`."""
        write_scores(stem, frame, summaries, labels=self.data.labels)


def classification_loss(
    model: Any, inputs: dict[str, Any], *, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's own loss, or cross-entropy with weights of classes; and the logits, shape (items, outputs)."""
    import torch

    labels = inputs.get("labels")
    if weights is None or labels is None:
        outputs = model(**inputs)
        return outputs.loss, outputs.logits
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    # Divided by the number of items, not by the batch's sum of weights, so that how items are spread over batches
    # and processes makes no difference.
    loss = torch.nn.functional.cross_entropy(logits, labels, weight=weights.to(logits), reduction="sum")
    return loss / len(labels), logits


def _metrics_of(kind: str) -> str:
    return ", ".join(n for n, m in METRICS.items() if m.kind == kind)
