"""A layer curve: one task's score at every hidden state, with bootstrap replicates that carry its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class LayerCurve:
    """Scores of one task over the hidden states of one stack.

    Attributes:
        task: the task's name.
        level: ``surface``, ``syntax``, ``semantics`` or ``other``.
        hidden: hidden indices, ascending (0 = embeddings), shape (hidden,).
        values: score per hidden state, shape (hidden,); the unit is ``metric``'s (``bits`` per item by default).
        replicates: bootstrap replicates of ``values``, items (by cluster) crossed with seeds, (replicates, hidden).
            Within one replicate all hidden states share the resample: differences along the curve are paired. None,
            (0, hidden), where there are no items behind the curve, such as for published ones.
        metric: ``bits`` (bits saved per item), ``accuracy`` or another score column.
        adjusted_by: the control subtracted at each hidden state (``random-encoder``, ``word-type``) or ``none``.
        n_items: number of distinct test items behind the curve.
        n_seeds: number of distinct fits per point.
    """

    task: str
    level: str
    hidden: np.ndarray
    values: np.ndarray
    replicates: np.ndarray = field(repr=False)
    metric: str = "bits"
    adjusted_by: str = "none"
    n_items: int = 0
    n_seeds: int = 1

    @property
    def standard_errors(self) -> np.ndarray:
        """Bootstrap standard error per hidden state, shape (hidden,)."""
        return self.replicates.std(axis=0, ddof=1)
