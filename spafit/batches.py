"""Texts to padded batches: tokens once per run, padding per batch, each item with its position for caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit.runtime import generator

if TYPE_CHECKING:
    import torch

#: Batches whose items are sorted by length among themselves, then drawn in random order.
_BATCHES_SORTED_TOGETHER = 50


@dataclass(frozen=True)
class EncodedTexts:
    """Tokenised items; a map-style dataset for torch's loaders.

    Attributes:
        items: what the tokenizer gave for each item (``input_ids``, ``attention_mask``, …), unpadded.
        labels: codes (int) or values (float), shape (items,); None without labels.
        truncated: number of items that were cut at the window.
        window: tokens kept of an item, at most.
    """

    items: tuple[Mapping[str, list[int]], ...]
    labels: np.ndarray | None
    truncated: int
    window: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item: dict[str, Any] = {**self.items[position], "index": position}
        if self.labels is not None:
            item["labels"] = self.labels[position]
        return item

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each item, shape (items,); 1 of items without texts."""
        return np.array([len(i.get("input_ids") or i.get("labels") or (0,)) for i in self.items])


def encode(frame: pd.DataFrame, tokenizer: Any, *, max_length: int, regression: bool) -> EncodedTexts:
    """Tokenise the texts of a frame with the columns ``text``, optionally ``text2``, and ``label``.

    Pairs are cut at the longer text first. ``max_length`` is lowered to the tokenizer's own window.
    """
    window = min(max_length, getattr(tokenizer, "model_max_length", max_length) or max_length)
    texts = [frame["text"].tolist()]
    if "text2" in frame:
        texts.append(frame["text2"].tolist())
    if not len(frame):
        return EncodedTexts((), None, 0, window)
    settings = {"return_attention_mask": True, "return_token_type_ids": None}
    encoded = tokenizer(*texts, truncation=True, max_length=window, **settings)
    keys = [k for k in encoded if k in tokenizer.model_input_names or k in ("input_ids", "attention_mask")]
    items = tuple({k: list(encoded[k][i]) for k in keys} for i in range(len(frame)))
    full = [i for i, item in enumerate(items) if len(item["input_ids"]) >= window]
    cut = 0
    if full:
        again = tokenizer(*[[column[i] for i in full] for column in texts], truncation=False, verbose=False)
        cut = sum(len(ids) > window for ids in again["input_ids"])
    labels = None
    if frame["label"].notna().all():
        labels = frame["label"].to_numpy(dtype=np.float32 if regression else np.int64)
    return EncodedTexts(items, labels, cut, window)


class EpochOrder:
    """The order of the items in each epoch, from the seed and the epoch's number alone; a sampler for torch's loaders.

    A resumed run therefore sees what an uninterrupted one does, and so does every process of several.

    Args:
        lengths: tokens of each item, shape (items,).
        batch_size: items per step of the optimiser, over all processes.
        seed: of the orders.
        grouped: put items of similar length into the same step, and the steps into random order, so that little is
            padded; False draws at random.
    """

    def __init__(self, lengths: np.ndarray, *, batch_size: int, seed: int, grouped: bool):
        self.lengths, self.batch_size, self.seed, self.grouped = lengths, batch_size, seed, grouped
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = generator(self.seed, "order of items", self.epoch)
        order = draw.permutation(len(self.lengths))
        if self.grouped:
            size = self.batch_size
            together = size * _BATCHES_SORTED_TOGETHER
            # What is left over comes last, where a loader expects a short batch, and is drawn before any sorting:
            # otherwise the longest texts would share the short step.
            order, left_over = np.split(order, [len(order) // size * size])
            parts = [order[i : i + together] for i in range(0, len(order), together)]
            order = np.concatenate([p[np.argsort(self.lengths[p], kind="stable")] for p in parts] or [order])
            steps = draw.permutation(order.reshape(-1, size))
            order = np.concatenate([steps.ravel(), left_over])
        return iter(order.tolist())


@dataclass(frozen=True)
class Collator:
    """Pads items to the longest of a batch, on the right; keeps their positions under ``index``."""

    tokenizer: Any

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: what the tokenizer gives, ``labels`` where there are some, and ``index`` (items,)."""
        import torch

        kept = [{k: v for k, v in item.items() if k not in ("labels", "index")} for item in items]
        batch = dict(self.tokenizer.pad(kept, padding=True, padding_side="right", return_tensors="pt"))
        if "labels" in items[0]:
            batch["labels"] = torch.as_tensor(np.array([item["labels"] for item in items]))
        batch["index"] = torch.as_tensor([item["index"] for item in items])
        return batch
