"""What a trained model says about texts: logits, predicted classes or values, and a table of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit import io

if TYPE_CHECKING:
    from spafit.batches import EncodedTexts


def predict_logits(model: Any, encoded: EncodedTexts, tokenizer: Any, *, batch_size: int = 64) -> np.ndarray:
    """Logits of every item in eval mode, shape (items, outputs), float32; batches of similar length."""
    import torch

    from spafit.batches import Collator

    collate, device = Collator(tokenizer), next(model.parameters()).device
    order = np.argsort(encoded.lengths, kind="stable")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = collate([encoded[int(i)] for i in order[start : start + batch_size]])
            inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "index")}
            rows.append(model(**inputs).logits.float().cpu().numpy())
    for module, mode in modes:
        module.training = mode
    found = np.concatenate(rows)
    logits = np.empty_like(found)
    logits[order] = found
    return logits


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
