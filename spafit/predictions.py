"""What a trained model says about texts: logits, predicted classes or values, and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit import io

if TYPE_CHECKING:
    import torch

    from spafit.batches import EncodedTexts


def predict_logits(model: Any, encoded: EncodedTexts, tokenizer: Any, *, batch_size: int = 64) -> np.ndarray:
    """Logits of every item in eval mode, shape (items, outputs), float32; batches of similar length."""
    from spafit.batches import Collator

    def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits

    return summarise(model, encoded, Collator(tokenizer), logits, batch_size=batch_size)


def summarise(
    model: Any,
    encoded: EncodedTexts,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
    read: Callable[[Any, dict[str, Any]], torch.Tensor],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """What ``read`` gives of every item in eval mode, shape (items, k), float32; batches of similar length.

    Args:
        model: in any mode, which is put back.
        encoded: the items.
        collate: makes a batch.
        read: model and batch (without ``index``) to a tensor of shape (items of the batch, k).
        batch_size: items at a time.
    """
    import torch

    device = next(model.parameters()).device
    order = np.argsort(encoded.lengths, kind="stable")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = collate([encoded[int(i)] for i in order[start : start + batch_size]])
            inputs = {k: v.to(device) for k, v in batch.items() if k != "index"}
            rows.append(read(model, inputs).float().cpu().numpy())
    for module, mode in modes:
        module.training = mode
    found = np.concatenate(rows)
    ordered = np.empty_like(found)
    ordered[order] = found
    return ordered


def predicted(logits: np.ndarray, *, regression: bool) -> np.ndarray:
    """Predicted values (regression) or class codes, from logits of shape (items, outputs)."""
    return logits.reshape(len(logits)) if regression else logits.argmax(axis=1)


def write_scores(
    stem: Path, frame: pd.DataFrame, logits: np.ndarray, *, labels: tuple[str, ...] | None
) -> pd.DataFrame:
    """Write one row per item: idx, label (where known), prediction, and the class and each class's probability.

    Args:
        stem: of the parquet and the CSV file.
        frame: the items, with the columns ``idx`` and ``label``.
        logits: shape (items, outputs).
        labels: names of the classes in the order of their codes; None for regression.
    """
    columns: dict[str, Any] = {"idx": frame["idx"].to_numpy()}
    if frame["label"].notna().all():
        columns["label"] = frame["label"].to_numpy()
    columns["prediction"] = predicted(logits, regression=labels is None)
    if labels is not None:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        columns["class"] = [labels[c] for c in columns["prediction"]]
        columns |= {f"p({c})": probabilities[:, i] for i, c in enumerate(labels)}
    table = pd.DataFrame(columns)
    io.write_table(stem, table)
    return table
