"""The joint space of a dual encoder (CLIP): each tower's embeddings, and retrieval from every hidden state of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.extraction import extract
from probing.forward import pick_stack
from probing.retrieval import retrieval_table
from probing.tasks.base import Image, Text
from spafit.errors import ModelError, UsageError

if TYPE_CHECKING:
    from probing.store import ActivationStore
    from spafit.models import LoadedModel

#: The token that a tower's embedding is made of, and the module that projects it into the joint space.
_TOWERS = {"vision": ("first", "visual_projection"), "text": ("last", "text_projection")}


def tower_embeddings(loaded: LoadedModel, stack: str, states: np.ndarray) -> np.ndarray:
    """Put pooled states of a tower's last block through its final norm and projection.

    Args:
        loaded: a dual encoder with ``visual_projection`` and ``text_projection``, as CLIP has.
        stack: ``vision`` or ``text``.
        states: of the last block: of [CLS] (``first``) for images, of the end token (``last``) for texts, (n, width).

    Returns:
        float32, (n, joint width): what ``get_image_features`` and ``get_text_features`` give, not normalised.

    Raises:
        ModelError: the model has no such projection.
    """
    import torch

    norm, projection = _projection(loaded, stack)
    first = next(projection.parameters())
    x = torch.from_numpy(np.ascontiguousarray(states)).to(first.device, first.dtype)
    with torch.no_grad():
        return np.asarray(projection(x if norm is None else norm(x)).float().cpu().numpy())


def _projection(loaded: LoadedModel, stack: str) -> tuple[Any, Any]:
    if stack not in _TOWERS:
        raise UsageError(f"A dual encoder's towers are {' and '.join(_TOWERS)}; got {stack!r}.")
    tower, name = pick_stack(loaded, stack), _TOWERS[stack][1]
    projection = getattr(loaded.model, name, None)
    if projection is None or next(projection.parameters(), None) is None:
        raise ModelError(
            f"{loaded.name} has no {name}, so its towers have no joint space that is known here. Embed the pairs "
            "yourself and call probing.retrieval.retrieval_table."
        )
    return None if tower.final_norm is None else loaded.model.get_submodule(tower.final_norm), projection


def tower_retrieval(
    loaded: LoadedModel,
    images: Sequence[Image],
    texts: Sequence[Text],
    *,
    split: Sequence[str] | np.ndarray,
    at: Sequence[int] = (1, 5),
    n_boot: int = 1000,
    seed: int = 0,
    device: str | None = None,
    cache_dir: Path | None = None,
) -> pd.DataFrame:
    """Retrieval accuracy from every hidden state of both towers, each against the other tower's embeddings.

    Args:
        loaded: a dual encoder with its tokenizer and image processor.
        images: one image per pair.
        texts: its caption. Equal captions, and equal images, are one candidate.
        split: ``train``, ``dev`` or ``test`` for each pair; see :func:`probing.retrieval.retrieval_table`.
        at: the values of k.
        n_boot: bootstrap replicates.
        seed: of the resample.
        device: torch device.
        cache_dir: where states are cached.

    Returns:
        The table of :func:`probing.retrieval.retrieval_table` with the column ``tower`` (``vision`` or ``text``) first.

    Raises:
        ModelError: the model is no dual encoder with a joint space.
        UsageError: the lists differ in length.
    """
    if not len(images) == len(texts) == len(split):
        raise UsageError(f"Pairs need one of each: {len(images)} images, {len(texts)} texts, {len(split)} splits.")
    stores: dict[str, ActivationStore] = {}
    finals: dict[str, np.ndarray] = {}
    for stack, given in (("vision", images), ("text", texts)):
        _projection(loaded, stack)
        pooling = _TOWERS[stack][0]
        stores[stack] = extract(
            loaded, given, stack=stack, sentence_pooling=[pooling], word_pooling=(), device=device, cache_dir=cache_dir
        )
        last = stores[stack].num_hidden - 1
        finals[stack] = tower_embeddings(loaded, stack, stores[stack].sentences(pooling, hidden=last))
    same = {"vision": np.array([i.digest for i in images]), "text": np.array([t.string for t in texts])}
    kinds = {"vision": "image", "text": "text"}
    tables = []
    for stack, other in (("vision", "text"), ("text", "vision")):
        store, pooling = stores[stack], _TOWERS[stack][0]
        states = {h: store.sentences(pooling, hidden=h) for h in range(store.num_hidden)}
        table = retrieval_table(
            states, finals[other], split=split, own={store.num_hidden - 1: finals[stack]},
            names=(kinds[stack], kinds[other]), items=same[stack], others=same[other], at=at, n_boot=n_boot, seed=seed,
        )  # fmt: skip
        table.insert(0, "tower", stack)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
