"""The holding rule: the lowest hidden state that already holds nearly all of what a group of tasks ever reaches."""

from __future__ import annotations

import numpy as np


def held_from(bits: np.ndarray, *, share: float = 0.95) -> np.ndarray:
    """First position at which a group of tasks holds ``share`` of its largest bits.

    Each task's curve is replaced by its running maximum (from 0 up: a score below its control holds nothing), the
    running maxima are averaged over tasks, and the first position that reaches ``share`` of the average's last value
    is returned. In bits, so that tasks with more to know weigh more. What is held at hidden h is held by blocks
    [0, h): a stratum that starts at block h leaves them as they are.

    A running maximum is biased upward by noise: on noisy curves the position comes out too high.

    Args:
        bits: control-adjusted bits, shape (..., tasks, hidden), hidden states ascending.
        share: q of the rule, above 0 and at most 1.

    Returns:
        Positions along the last axis, shape (...); -1 where no task exceeds its control anywhere.
    """
    held = np.maximum.accumulate(np.maximum(bits, 0.0), axis=-1).mean(axis=-2)
    largest = held[..., -1:]
    # The comparison allows for rounding, so that a share of exactly 1 is reached at the largest value.
    first = (held >= share * largest * (1 - 1e-12)).argmax(axis=-1)
    return np.where(largest[..., 0] > 0, first, -1)
