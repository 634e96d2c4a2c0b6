"""Kinds of training tasks: what an item is, which head a model needs, the loss, and how outputs are scored."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spafit.errors import check_choice

if TYPE_CHECKING:
    from spafit.data.training import TrainData
    from spafit.kinds.base import TaskKind

#: Kind -> module and class, loaded on first use.
KINDS = {
    "classification": ("spafit.kinds.classification", "Classification"),
    "text": ("spafit.kinds.language", "RunningText"),
    "answers": ("spafit.kinds.language", "Answers"),
    "images": ("spafit.kinds.images", "ImageClassification"),
    "matching": ("spafit.kinds.images", "Matching"),
    "captions": ("spafit.kinds.images", "Captions"),
}


def kind_of(data: TrainData) -> TaskKind:
    """The kind of a task.

    Raises:
        UsageError: there is no such kind.
    """
    check_choice("The kind of a task", data.kind, KINDS)
    module, name = KINDS[data.kind]
    made: Any = getattr(importlib.import_module(module), name)
    return made(data)
