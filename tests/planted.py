"""Representations with a known truth: label information enters at one block and stays."""

from __future__ import annotations

import numpy as np


def planted_states(
    block: int, *, blocks: int = 6, items: int = 1200, width: int = 16, signal: float = 2.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """States (blocks + 1, items, width) and binary labels; hidden ``block`` + 1 is the first that tells the labels.

    Every hidden state is noise of its own around a shared part that says nothing about the labels.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, items)
    shared = rng.standard_normal((items, width))
    direction = rng.standard_normal(width)
    direction /= np.linalg.norm(direction)
    states = np.stack([shared + 0.3 * rng.standard_normal((items, width)) for _ in range(blocks + 1)])
    states[block + 1 :] += signal * (2 * labels - 1)[None, :, None] * direction
    return states.astype(np.float32), labels
