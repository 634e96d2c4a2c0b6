"""Tiny models and texts for the tests of extraction and its store."""

from __future__ import annotations

import numpy as np

from probing.tasks.base import Text
from spafit.models import LoadedModel, load_model
from tests.tiny import DECODERS, tiny, tiny_tokenizer

WORDS = ["the", "cat", "dog", "sees", "a", "big", "and", "runs", "old", "xyz", "dogs", "running", "q", "walked", "."]


def tiny_loaded(name: str = "bert", **changes) -> LoadedModel:
    return load_model((tiny(name, **changes), tiny_tokenizer(decoder=name in DECODERS)))


def some_texts(count: int = 12, *, seed: int = 0, longest: int = 9) -> list[Text]:
    generator = np.random.default_rng(seed)
    return [
        Text.from_words([WORDS[i] for i in generator.integers(0, len(WORDS), generator.integers(1, longest + 1))])
        for _ in range(count)
    ]


def shard_files(folder) -> dict[str, bytes]:
    """Name and bytes of everything that a store holds, apart from locks."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}
