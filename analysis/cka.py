"""Debiased linear CKA: for independent rows, and for items in sentences with an interval and a permutation test.

CKA is the ratio of HSIC terms (Kornblith et al. 2019, eq. 4); the debiased form takes the unbiased HSIC1 of Song et al.
2012 for each of them (Nguyen et al. 2021, eq. 3). The terms are in :mod:`analysis.hsic`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from analysis.hsic import Shift, Side, Terms, Variant, hsic1, make_side, row_dots
from analysis.sentences import Layout, as_states, usable_items
from spafit.errors import NumericalError
from spafit.runtime import generator

#: Rows that :func:`debiased_cka` centres at once, in memory that it writes again and again.
PLAIN_CHUNK = 2048
#: Most sentences that the permutation test uses (it holds two matrices of sentences × sentences).
MOST_PERMUTED = 1000

TOO_FEW = "fewer than 4 different sentences"
CONSTANT = "all states of one side are the same"
NEGATIVE = "HSIC1 of one side with itself is not above zero"


@dataclass(frozen=True)
class Estimate:
    """One similarity of two sets of states.

    Attributes:
        value: the estimate; NaN where it is not defined, and then ``reason`` says why.
        n: sentences that it is based on, after copies and padding were left out.
        ci_low: lower end of the jackknife interval over sentences; NaN where none was asked for or it is not defined.
        ci_high: upper end.
        p: one-sided permutation p-value; NaN where none was asked for.
        chance: expected value for unrelated states.
        reason: why ``value`` is NaN, or why the interval is; empty otherwise.
    """

    value: float
    n: int
    ci_low: float = math.nan
    ci_high: float = math.nan
    p: float = math.nan
    chance: float = 0.0
    reason: str = ""


def debiased_cka(x: np.ndarray, y: np.ndarray, *, variant: Variant = "raw") -> Estimate:
    """Debiased linear CKA of two sets of states whose rows are independent (one row per sentence).

    HSIC1(X,Y) / √(HSIC1(X,X)·HSIC1(Y,Y)), with columns centred, k_i = ‖x_i‖², l_i = ‖y_i‖² and HSIC1 =
    [‖YᵀX‖² − n/(n−2)·kᵀl + (1ᵀk)(1ᵀl)/((n−1)(n−2))] / (n(n−3)), in O(n·d·e). Products run in the states' precision
    (float32 or float64), sums in float64. Rows that are zero on both sides (padding) are left out; rows that copy an
    earlier row on both sides count once. The value can lie slightly below 0 or above 1.

    Do not trust it for tokens (use :func:`cluster_cka`), nor the raw variant where :func:`outlier_dimensions` finds
    any: one shared dimension of ten standard deviations gives .93 between independent states of width 768. It does
    not measure forgetting: it stays at .96 when exactly the labels of a task are erased.

    Args:
        x: shape (n, d).
        y: shape (n, e), the same items in the same order.
        variant: ``z-scored`` divides every column by its standard deviation first (constant columns become 0).

    Returns:
        ``value``, ``n`` and ``reason``: NaN for fewer than 4 rows, a side without variation, or a self-similarity
        HSIC1 that is not positive (two negative ones never make a number).

    Raises:
        UsageError: the arrays are not two-dimensional or differ in rows.
        NumericalError: a state is not finite.
    """
    x, y = as_states(x, y)
    keep = usable_items(x, y)
    if not keep.all():
        x, y = x[keep], y[keep]
    n = len(x)
    if n < 4:
        return Estimate(math.nan, n, reason=TOO_FEW)
    terms = _plain_terms(x, y, variant)
    if terms is None:  # beyond what float32 products can hold
        terms = _plain_terms(x.astype(np.float64), y.astype(np.float64), variant)
        if terms is None:
            raise NumericalError("States hold NaN, infinite or absurdly large values; extract them in float32.")
    if isinstance(terms, str):
        return Estimate(math.nan, n, reason=terms)
    return _ratio(*terms, dtype=x.dtype, n=n)


def _plain_terms(x: np.ndarray, y: np.ndarray, variant: Variant) -> tuple[np.ndarray, np.ndarray] | str | None:
    """HSIC1 of (xy, xx, yy), times n(n-3), and their leading terms; a reason; None where squares over- or underflow."""
    n = len(x)
    products = [np.zeros((s.shape[1], t.shape[1])) for s, t in ((y, x), (x, x), (y, y))]
    norms = np.empty((2, n))
    with np.errstate(over="ignore", invalid="ignore"):
        shifts = [Shift.of(side, variant) for side in (x, y)]
        room = [np.empty((min(n, PLAIN_CHUNK), side.shape[1]), side.dtype) for side in (x, y)]
        for start in range(0, n, PLAIN_CHUNK):
            rows = slice(start, min(start + PLAIN_CHUNK, n))
            a, b = (
                shift.apply(side[rows], out=out[: rows.stop - start])
                for shift, side, out in zip(shifts, (x, y), room, strict=True)
            )
            norms[:, rows] = row_dots(a, a), row_dots(b, b)
            for product, left, right in zip(products, (b, a, b), (a, a, b), strict=True):
                product += left.T @ right
        leading = np.array([np.vdot(p, p) for p in products])
        totals = norms.sum(axis=1)
    if not np.isfinite(leading).all():
        return None
    if x.dtype == np.float32 and ((totals > 0) & (totals < n * 1e-18)).any():
        return None
    if any(shift.is_constant(total / n) for shift, total in zip(shifts, totals, strict=True)):
        return CONSTANT
    pairs = ((0, 1), (0, 0), (1, 1))
    dots = np.array([norms[i] @ norms[j] for i, j in pairs])
    sums = np.array([totals[i] * totals[j] for i, j in pairs])
    return leading - n / (n - 2) * dots + sums / ((n - 1) * (n - 2)), leading


def _ratio(terms: np.ndarray, leading: np.ndarray, *, dtype: np.dtype, n: int) -> Estimate:
    """CKA from HSIC1 of (xy, xx, yy); what rounding of the leading terms could have made is not above zero."""
    floor = 16 * np.finfo(dtype).eps * leading[1:]
    if (terms[1:] <= floor).any():
        return Estimate(math.nan, n, reason=NEGATIVE)
    return Estimate(float(terms[0] / math.sqrt(terms[1]) / math.sqrt(terms[2])), n)


def outlier_dimensions(x: np.ndarray, y: np.ndarray, *, threshold: float = 4.0) -> tuple[int, ...]:
    """Columns whose standard deviation exceeds ``threshold`` × the median column's on both sides, widest first.

    One such column shared by otherwise independent states of width 768 gives a raw CKA of about .25 at 4 times the
    others' deviation and .93 at 10 times. Arrays of different width share no dimension.
    """
    return shared_outliers(relative_deviation(x), relative_deviation(y), threshold=threshold)


def relative_deviation(states: np.ndarray) -> np.ndarray:
    """Standard deviation of each column over the median of those that vary, shape (width,)."""
    deviation = states.std(axis=0, dtype=np.float64) if len(states) else np.zeros(states.shape[1])
    moving = deviation[deviation > 0]
    return deviation / np.median(moving) if len(moving) else deviation


def shared_outliers(x: np.ndarray, y: np.ndarray, *, threshold: float = 4.0) -> tuple[int, ...]:
    """:func:`outlier_dimensions` from the columns' relative deviations."""
    if x.shape != y.shape:
        return ()
    shared = np.minimum(x, y)
    found = np.flatnonzero(shared > threshold)
    return tuple(int(i) for i in found[np.argsort(-shared[found], kind="stable")])


def cluster_cka(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    variant: Variant = "raw",
    level: float = 0.95,
    n_permutations: int = 0,
    seed: int = 0,
) -> Estimate:
    """Debiased linear CKA of states whose items come in sentences, with a jackknife interval over sentences.

    Tokens of one sentence are not independent: taken as if they were, two independent geometries of width 64 reach
    .30 (25 sentences × 12 tokens). Here every term runs over different sentences; each sentence has the same weight,
    whatever its length. With one item per sentence the value is that of :func:`debiased_cka`. The interval is value ±
    t · (delete-one-sentence jackknife standard error), computed in closed form; a plain bootstrap would repeat
    sentences and report similarity between independent states. Padding and copied sentences are left out (see
    :func:`usable_items`).

    Do not trust the interval with fewer than about 30 sentences or very close to 0 or 1, where the estimate is skewed.
    What is said at :func:`debiased_cka` about outliers and forgetting holds here too.

    Args:
        x: shape (items, d).
        y: shape (items, e), the same items in the same order.
        groups: sentence label of each item.
        variant: ``z-scored`` divides every column by its standard deviation over items.
        level: coverage of the interval.
        n_permutations: how often the sentences of one side are shuffled for ``p`` (0: no test); see
            :func:`permutation_p`.
        seed: chooses the shuffles.

    Returns:
        An estimate; its interval is NaN, with the reason, below 5 sentences or where leaving a sentence out makes a
        self-similarity negative.

    Raises:
        UsageError: shapes do not fit.
        NumericalError: a state is not finite.
    """
    x, y = as_states(x, y)
    groups = np.asarray(groups)
    keep = usable_items(x, y, groups)
    layout = Layout.make(groups[keep])
    if layout.n < 4:
        return Estimate(math.nan, layout.n, reason=TOO_FEW)
    a, b = (make_side(side[keep], layout, variant=variant) for side in (x, y))
    return cka_of_sides(a, b, layout, level=level, n_permutations=n_permutations, seed=seed)


def cka_of_sides(
    a: Side,
    b: Side,
    layout: Layout,
    *,
    level: float | None = 0.95,
    n_permutations: int = 0,
    seed: int = 0,
    selves: tuple[tuple[float, float], tuple[float, float]] | None = None,
) -> Estimate:
    """:func:`cluster_cka` of prepared sides of the same sentences.

    Args:
        a: one side.
        b: the other.
        layout: their sentences.
        level: coverage of the interval; None leaves it out.
        n_permutations: shuffles for p.
        seed: chooses the shuffles.
        selves: value and leading term of HSIC1 of each side with itself, if known and no interval is asked for.
    """
    n = layout.n
    if n < 4:
        return Estimate(math.nan, n, reason=TOO_FEW)
    if a.constant or b.constant:
        return Estimate(math.nan, n, reason=CONSTANT)
    jackknifed = level is not None and n > 4
    found = [hsic1(a, b, layout, leave_one_out=jackknifed)]
    if selves is None or jackknifed:
        found += [hsic1(side, side, layout, leave_one_out=jackknifed) for side in (a, b)]
    else:
        found += [Terms(*known, np.empty(0)) for known in selves]
    terms, leading = np.array([f.value for f in found]), np.array([f.leading for f in found])
    estimate = _ratio(terms, leading, dtype=a.states.dtype, n=n)
    if estimate.reason:
        return estimate
    low = high = math.nan
    reason = ""
    if level is not None and jackknifed:
        xy, xx, yy = (f.without for f in found)
        if min(xx.min(), yy.min()) <= 0:
            reason = "no interval: leaving out one sentence makes HSIC1 of one side with itself negative"
        else:
            low, high = jackknife_interval(estimate.value, xy / np.sqrt(xx) / np.sqrt(yy), level=level)
    elif level is not None:
        reason = "no interval: fewer than 5 sentences"
    p = permutation_p(a, b, layout, n_permutations=n_permutations, seed=seed) if n_permutations else math.nan
    return Estimate(estimate.value, n, low, high, p, 0.0, reason)


def jackknife_interval(value: float, without: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """``value`` ± t · (delete-one jackknife standard error), from the statistic ``without`` each of n sentences."""
    n = len(without)
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    half = float(scipy_stats.t.ppf((1 + level) / 2, n - 1)) * error
    return value - half, value + half


def permutation_p(a: Side, b: Side, layout: Layout, *, n_permutations: int = 199, seed: int = 0) -> float:
    """One-sided p that two sides are unrelated, from shuffling the sentences of one of them.

    One item is drawn from each sentence, and at most :data:`MOST_PERMUTED` sentences; HSIC1 of the draw is compared
    with HSIC1 after shuffling (the denominators of CKA do not change). p = (1 + hits) / (1 + n_permutations), so its
    smallest value is set by ``n_permutations``. A small p says that the sides are related, not how closely; and it
    rests on one draw, so near 0 it can disagree with a value that uses all items.
    """
    random = generator(seed, "permutation of sentences")
    chosen = np.arange(layout.n)
    if layout.n > MOST_PERMUTED:
        chosen = np.sort(random.choice(layout.n, size=MOST_PERMUTED, replace=False))
    rows = layout.starts[chosen] + random.integers(layout.sizes[chosen])
    gram_a, gram_b = (_u_centred(side.states[rows]) for side in (a, b))
    seen = float(np.vdot(gram_a, gram_b))
    slack = 1e-6 * abs(seen)
    hits = 0
    for _ in range(n_permutations):
        order = random.permutation(len(rows))
        hits += float(np.vdot(gram_a, gram_b[order][:, order])) >= seen - slack
    return (1 + hits) / (1 + n_permutations)


def _u_centred(states: np.ndarray) -> np.ndarray:
    """Products of all rows, with zero diagonal and every row sum zero (Székely & Rizzo 2014, eq. 2.3)."""
    n = len(states)
    centred = states - states.mean(axis=0, dtype=np.float64).astype(states.dtype)
    gram = centred @ centred.T
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=1, dtype=np.float64)
    gram -= ((rows[:, None] + rows[None, :]) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))).astype(gram.dtype)
    np.fill_diagonal(gram, 0)
    return gram
