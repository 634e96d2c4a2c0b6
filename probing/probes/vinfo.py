"""V-information: how many bits per item a linear probe reads of the labels, alone or beyond another hidden state.

An item's *pointwise* V-information is log2 of the probability that the probe gives its label, minus log2 of the label's
share in training; the mean over the scored items is the label entropy minus the probe's cross-entropy, where label
entropy is the cross-entropy of the training shares on the same items (Xu et al. 2020, "A theory of usable information
under computational constraints", definition 2; Ethayarajh et al. 2022, "Understanding dataset difficulty with
V-usable information", definition 3.1). Beyond a base state it is the log2 probability by a probe on [base; state] minus
that by a probe on the base alone, item by item (Hewitt et al. 2021, "Conditional probing").

Both are estimates from below of what the family can read. A probe that was fitted on few items overfits, and one with
more features does so more, so values below zero occur; a penalty costs something, too (on planted Gaussians of 4,000
training items and 0.91 bits the smallest default penalty costs 0.010 bits), and so does the fits' tolerance. Intervals
resample test items: they speak about the fitted probes, not about another draw of the training items. Conditional
values add up over hidden states only where each is conditioned on all before it; on the first, or on the one below,
they do not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from probing.probes.linear import DEFAULT_L2, DEFAULT_TOLERANCE, SCORED_ROWS, check_labels, fit_selected
from spafit.errors import UsageError
from spafit.stats import BootstrapDraw, interval

if TYPE_CHECKING:
    import pandas as pd

#: What a value is beyond: the label shares alone, hidden state 0, or the hidden state below.
Base = Literal["labels", "first", "below"]


@dataclass(frozen=True)
class ProbeSplits:
    """The same items' states and labels in three splits.

    Attributes:
        x: features of train, dev and test, each (B, items of the split, width).
        labels: integers of each split, (M, items of the split) or (items of the split,): the task, and control tasks
            after it. Penalties are chosen by the task's log loss on dev.
        n_classes: number of classes K, at least two.
    """

    x: tuple[np.ndarray, np.ndarray, np.ndarray] = field(repr=False)
    labels: tuple[np.ndarray, np.ndarray, np.ndarray] = field(repr=False)
    n_classes: int

    def __post_init__(self) -> None:
        """Check what is not checked by the fits.

        Raises:
            UsageError: test labels and features that do not fit together, or labels outside the classes.
        """
        labels = tuple(np.atleast_2d(np.asarray(y)) for y in self.labels)
        object.__setattr__(self, "labels", labels)
        train, test = self.x[0], self.x[2]
        fits = (len(train), labels[2].shape[1], train.shape[2])
        if test.shape != fits or len(labels[2]) != len(labels[0]) or not labels[2].size:
            raise UsageError(
                f"Test features have shape {test.shape} and test labels {labels[2].shape}; with training features "
                f"{train.shape} and labels {labels[0].shape} they must be {fits} and ({len(labels[0])}, test items)."
            )
        for y in labels:
            check_labels(y, self.n_classes)


@dataclass(frozen=True)
class VInformation:
    """V-information of H hidden states on M label sets.

    Attributes:
        items: float64, (H, M, n): pointwise V-information of each test item in bits.
        hidden: (H,): position of each hidden state in the call.
        base: what the bits are beyond.
        label_entropy: float64, (M,): cross-entropy of the training shares on the test items, in bits.
        low: float64, (H, M): lower end of the interval of the mean.
        high: float64, (H, M): its upper end.
        l2: float64, (H,): penalty of each hidden state's probe, with its base where there is one.
        converged: bool, (H, M).
        n_groups: clusters of test items that were resampled.
    """

    items: np.ndarray = field(repr=False)
    hidden: np.ndarray
    base: Base
    label_entropy: np.ndarray
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    l2: np.ndarray = field(repr=False)
    converged: np.ndarray = field(repr=False)
    n_groups: int

    @property
    def bits(self) -> np.ndarray:
        """Mean over test items, (H, M)."""
        return self.items.mean(2)

    def to_pandas(self) -> pd.DataFrame:
        """One row per hidden state and label set.

        Columns: ``hidden``, ``label_set``, ``base``, ``bits``, ``ci_low``, ``ci_high``, ``label_entropy``, ``n_items``,
        ``n_groups``, ``l2``, ``converged``.
        """
        import pandas as pd

        row, label_set = (i.ravel() for i in np.indices(self.low.shape))
        return pd.DataFrame(
            {
                "hidden": self.hidden[row],
                "label_set": label_set,
                "base": self.base,
                "bits": self.bits.ravel(),
                "ci_low": self.low.ravel(),
                "ci_high": self.high.ravel(),
                "label_entropy": self.label_entropy[label_set],
                "n_items": self.items.shape[2],
                "n_groups": self.n_groups,
                "l2": self.l2[row],
                "converged": self.converged.ravel(),
            }
        )


def log2_shares(train: np.ndarray, scored: np.ndarray, *, n_classes: int) -> np.ndarray:
    """log2 of each scored label's share of the training labels, half an item for labels that training never has.

    Args:
        train: (M, n).
        scored: (M, items).
        n_classes: number of classes.

    Returns:
        float64, (M, items).
    """
    counts = np.stack([np.bincount(row, minlength=n_classes) for row in train])
    shares = np.log2(np.maximum(counts, 0.5) / train.shape[1])
    return np.asarray(np.take_along_axis(shares, scored, 1))


def v_information(
    splits: ProbeSplits,
    groups: Sequence[Hashable] | np.ndarray,
    *,
    base: Base = "labels",
    l2_grid: Sequence[float] = DEFAULT_L2,
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    max_iterations: int = 200,
    tolerance: float = DEFAULT_TOLERANCE,
) -> VInformation:
    """V-information of every hidden state on every label set, with paired intervals over groups of test items.

    With base ``first`` or ``below`` there is a value for each hidden state but the first. Hidden states are fitted one
    after the other, and one pair is copied at a time. All values share one resample, so the same ``seed`` and groups
    make the intervals of another call's differences paired, too: see ``items``.

    Args:
        splits: states and labels.
        groups: cluster of each test item, such as its sentence, (n,).
        base: what the bits are beyond.
        l2_grid: penalties to choose from on dev, for each probe on its own.
        level: of the intervals.
        n_boot: replicates of the intervals.
        seed: of the replicates.
        device: torch device for the products; one with float64.
        max_iterations: see :func:`~probing.probes.linear.fit_linear_probes`.
        tolerance: see :func:`~probing.probes.linear.fit_linear_probes`.

    Raises:
        UsageError: arrays that do not fit together, or one hidden state alone with a base among hidden states.
        NumericalError: features that are not finite.
    """
    n_hidden = len(splits.x[0])
    if base not in ("labels", "first", "below"):
        raise UsageError(f"base is {base!r}; it can be 'labels', 'first' or 'below'.")
    if base != "labels" and n_hidden < 2:
        raise UsageError(f"base {base!r} needs at least two hidden states; there is {n_hidden}. Use base='labels'.")
    if len(groups) != splits.x[2].shape[1]:
        raise UsageError(f"groups name {len(groups)} items; there are {splits.x[2].shape[1]} test items.")
    draw = BootstrapDraw.make(groups, 1, n_boot=n_boot, seed=seed)
    reference = log2_shares(splits.labels[0], splits.labels[2], n_classes=splits.n_classes)

    def log2_p(*states: int) -> tuple[np.ndarray, float, np.ndarray]:
        return _log2_probabilities(splits, states, l2_grid, device, max_iterations, tolerance)

    hidden = np.arange(n_hidden) if base == "labels" else np.arange(1, n_hidden)
    beyond, beyond_converged = reference, np.ones(len(reference), dtype=bool)
    if base == "first":
        beyond, _, beyond_converged = log2_p(0)
    items, penalties, converged = [], [], []
    for b in hidden.tolist():
        if base == "below":
            beyond, _, beyond_converged = log2_p(b - 1)
        own, penalty, own_converged = log2_p(b) if base == "labels" else log2_p(0 if base == "first" else b - 1, b)
        items.append(own - beyond)
        penalties.append(penalty)
        converged.append(own_converged & beyond_converged)
    values = np.stack(items)
    replicates = draw.means(values.reshape(1, -1, values.shape[2]))
    low, high = interval(replicates, level).reshape(2, *values.shape[:2])
    return VInformation(
        items=values, hidden=hidden, base=base, label_entropy=-reference.mean(1), low=low, high=high,
        l2=np.array(penalties), converged=np.stack(converged), n_groups=len(draw.sizes),
    )  # fmt: skip


def _log2_probabilities(
    splits: ProbeSplits,
    states: Sequence[int],
    l2_grid: Sequence[float],
    device: str,
    max_iterations: int,
    tolerance: float,
) -> tuple[np.ndarray, float, np.ndarray]:
    """log2 probability of each test item's label by a probe on these states side by side, float64 (M, n).

    Also the penalty, and which label sets' fits converged, (M,).
    """
    train, dev, test = (np.concatenate([np.asarray(x[b]) for b in states], axis=1)[None] for x in splits.x)
    fit, chosen = fit_selected(
        train, splits.labels[0], dev, splits.labels[1], n_classes=splits.n_classes, l2_grid=l2_grid, device=device,
        max_iterations=max_iterations, tolerance=tolerance,
    )  # fmt: skip
    right = splits.labels[2].astype(np.int64)
    found = np.empty(right.shape)
    for start in range(0, right.shape[1], SCORED_ROWS):
        rows = slice(start, start + SCORED_ROWS)
        log_p = fit.log_probabilities(test[:, rows])[0, :, 0]
        found[:, rows] = np.take_along_axis(log_p, right[:, rows, None], 2)[..., 0] / np.log(2)
    return found, float(chosen[0]), fit.converged[0, :, 0]
