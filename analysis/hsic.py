"""HSIC1 in feature space over sentences: the terms of debiased CKA, with and without each sentence.

HSIC1 is the unbiased estimator of Song et al. 2012 (JMLR 13, eq. 5) with linear kernels, a U-statistic over four
different items. Here the four are different *sentences*: "draw one token from each sentence, average the terms over
draws" has a closed form over all draws, so nothing is drawn. Nothing of size items × items is formed, except within a
sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.sentences import Layout
from spafit.errors import NumericalError, UsageError

Variant = Literal["raw", "z-scored"]

#: Rows whose products are summed in the states' own precision; sums over chunks are float64.
CHUNK = 4096
#: Most numbers in a batch of within-sentence products.
_BATCH = 4_000_000


@dataclass(frozen=True)
class Shift:
    """Centring, and with z-scores scaling, of columns.

    Attributes:
        mean: column means, float64, shape (width,).
        factor: what centred columns are multiplied by, shape (width,); None for the raw variant.
        rounding: mean squared norm that rounding alone could leave after centring.
    """

    mean: np.ndarray
    factor: np.ndarray | None
    rounding: float

    @classmethod
    def of(cls, states: np.ndarray, variant: Variant) -> Shift:
        """The shift of ``states`` (items, width).

        Raises:
            UsageError: an unknown variant.
        """
        if variant not in ("raw", "z-scored"):
            raise UsageError(f"The variant must be 'raw' or 'z-scored'; got {variant!r}.")
        eps = 8 * float(np.finfo(states.dtype).eps)
        mean = states.mean(axis=0, dtype=np.float64)
        if variant == "raw":
            return cls(mean, None, eps**2 * float(mean @ mean))
        deviation = states.std(axis=0, dtype=np.float64)
        varies = deviation > eps * np.abs(mean)
        return cls(mean, np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0), 0.0)

    def apply(self, states: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
        """A centred copy in the same precision, in ``out`` if given."""
        centred = np.subtract(states, self.mean.astype(states.dtype), out=out)
        if self.factor is not None:
            centred *= self.factor.astype(states.dtype)
        return centred

    def is_constant(self, spread: float) -> bool:
        """Whether states with this mean squared norm after the shift are all the same."""
        return spread <= self.rounding


def row_dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product of each row of ``a`` with the same row of ``b``, float64, shape (rows,)."""
    return np.einsum("ij,ij->i", a, b).astype(np.float64)


def summed_products(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Sum over rows of w² · aᵀb, float64, shape (width of a, width of b); ``weights`` w has shape (rows,)."""
    total = np.zeros((a.shape[1], b.shape[1]))
    for start in range(0, len(a), CHUNK):
        rows = slice(start, start + CHUNK)
        left = a[rows] if weights is None else a[rows] * weights[rows, None].astype(a.dtype)
        if b is a:
            right = left  # NumPy then computes half of the symmetric product
        else:
            right = b[rows] if weights is None else b[rows] * weights[rows, None].astype(b.dtype)
        total += left.T @ right
    return total


@dataclass(frozen=True)
class Side:
    """States of one side, centred on the mean of the sentence means and ordered by sentence; see :func:`make_side`.

    Attributes:
        states: shape (items, width).
        means: sentence means, shape (sentences, width); the same array as ``states`` where each has one item.
        own: product of each state with its sentence's mean, float64, shape (items,).
        constant: whether all states are the same.
    """

    states: np.ndarray
    means: np.ndarray
    own: np.ndarray
    constant: bool


def make_side(states: np.ndarray, layout: Layout, *, variant: Variant = "raw") -> Side:
    """Prepare one side, once for all pairs that it is part of.

    The unit becomes that of the largest state, which no ratio of HSIC1 values sees.

    Args:
        states: shape (items, width), in the order of the labels that made ``layout``.
        layout: the sentences.
        variant: ``z-scored`` divides every column by its standard deviation over items.

    Raises:
        NumericalError: a state is not finite.
        UsageError: an unknown variant.
    """
    largest = float(np.abs(states).max(initial=0))
    if not np.isfinite(largest):
        raise NumericalError("States hold NaN or infinite values; extract them in float32.")
    ordered = states[layout.order] / states.dtype.type(largest or 1.0)
    shift = Shift.of(ordered, variant)
    centred = shift.apply(ordered)
    means = centred
    if not layout.single:
        by_sentence = layout.sentence_means(centred)
        centre = by_sentence.mean(axis=0)  # HSIC1 does not change with a shift; now the sentence means sum to 0
        centred -= centre.astype(centred.dtype)
        means = (by_sentence - centre).astype(centred.dtype)
    own = row_dots(centred, means if layout.single else means[layout.codes])
    spread = float(row_dots(centred, centred).sum()) / max(len(states), 1)
    return Side(centred, means, own, shift.is_constant(spread))


@dataclass(frozen=True)
class Terms:
    """HSIC1 of two sides.

    Attributes:
        value: HSIC1.
        leading: the size of its leading term, to judge rounding by.
        without: HSIC1 without each sentence, shape (sentences,); empty where it was not asked for.
    """

    value: float
    leading: float
    without: np.ndarray


def hsic1(a: Side, b: Side, layout: Layout, *, leave_one_out: bool = False) -> Terms:
    """HSIC1 over sentences, averaged over all draws of one item per sentence.

    With C = Σᵢ meanₐ xᵢₐyᵢₐᵀ and D = Σᵢ x̄ᵢȳᵢᵀ, the sums over pairs, triples and quadruples of different sentences are
    ‖C‖² − Σ‖Cᵢ‖², 2Σeᵢ − ⟨C, D⟩ and (Σk̄)(Σl̄) − 6k̄ᵀl̄ + 2‖D‖², where eᵢ = ⟨Cᵢ, x̄ᵢȳᵢᵀ⟩, k̄ᵢ = ‖x̄ᵢ‖², l̄ᵢ = ‖ȳᵢ‖².
    Without sentence s, each loses the tuples that s is part of, which are linear in s: one more product.

    Args:
        a: one side.
        b: the other; ``b is a`` saves half of the product.
        layout: their sentences, at least 4, and 5 for ``leave_one_out``.
        leave_one_out: whether to compute HSIC1 without each sentence.
    """
    n, single = layout.n, layout.single
    weights = (1 / layout.sizes)[layout.codes]
    c = summed_products(a.states, b.states, None if single else np.sqrt(weights))
    d = c if single else summed_products(a.means, b.means)
    ka, kb = (row_dots(s.means, s.means) for s in (a, b))
    e = layout.sentence_means(a.own * b.own)
    own = e if single else _within(a.states, b.states, layout)
    t2 = np.vdot(c, c) - own.sum()
    t3 = 2 * e.sum() - np.vdot(c, d)
    t4 = ka.sum() * kb.sum() - 6 * (ka @ kb) + 2 * np.vdot(d, d)
    value = float(t2 / (n * (n - 1)) - 2 * t3 / (n * (n - 1) * (n - 2)) + t4 / (n * (n - 1) * (n - 2) * (n - 3)))
    size = float(np.vdot(c, c)) / (n * (n - 3))
    if not leave_one_out:
        return Terms(value, size, np.empty(0))
    n2 = (n - 1.0) * (n - 2)
    n3, n4 = n2 * (n - 3), n2 * (n - 3) * (n - 4)
    by_item, by_mean = -2 * c / n2 - 2 * d / n3, -4 * c / n3 - 8 * d / n4
    if single:
        linear = _bilinear(a.states, by_item + by_mean, b.states)
    else:
        linear = layout.sentence_means(_bilinear(a.states, by_item, b.states))
        linear += _bilinear(a.means, by_mean, b.means)
    f = a.means @ ((weights * b.own).astype(a.states.dtype) @ a.states)
    g = b.means @ ((weights * a.own).astype(b.states.dtype) @ b.states)
    h = a.means @ (kb.astype(a.means.dtype) @ a.means)
    q = b.means @ (ka.astype(b.means.dtype) @ b.means)
    rest = (t2 + 2 * own) / n2 - 2 * (t3 - 6 * e + f + g) / n3
    rest += (t4 - 2 * (kb.sum() * ka + ka.sum() * kb - 12 * ka * kb + 2 * h + 2 * q)) / n4
    return Terms(value, size, rest + linear)


def _within(a: np.ndarray, b: np.ndarray, layout: Layout) -> np.ndarray:
    """Squared norm of each sentence's mean of xyᵀ, shape (sentences,), from its items' products."""
    out = np.empty(layout.n)
    for size in np.unique(layout.sizes):
        of_size = np.flatnonzero(layout.sizes == size)
        batch = max(1, int(_BATCH // (size * max(size, a.shape[1], b.shape[1]))))
        for start in range(0, len(of_size), batch):
            chosen = of_size[start : start + batch]
            rows = layout.starts[chosen][:, None] + np.arange(size)
            x, y = a[rows], b[rows]
            gram_x, gram_y = x @ x.transpose(0, 2, 1), y @ y.transpose(0, 2, 1)
            out[chosen] = np.einsum("sij,sij->s", gram_x, gram_y) / float(size) ** 2
    return out


def _bilinear(a: np.ndarray, form: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x·form·y for each row, float64, shape (rows,)."""
    form = form.astype(a.dtype)
    out = np.empty(len(a))
    for start in range(0, len(a), CHUNK):
        rows = slice(start, start + CHUNK)
        out[rows] = row_dots(a[rows] @ form, b[rows])
    return out
