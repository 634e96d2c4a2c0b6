"""Where the two criteria put SPAFIT's boundaries, each with a bootstrap over tasks, items and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from analysis.holding import held_from
from analysis.segmentation import MIN_BLOCKS, SegmentationTest, segment, segmentation_test, standardise
from probing.curves import LayerCurve
from probing.summaries import never_above_control
from spafit.runtime import generator

CONFIDENCE = 0.95
Criterion = Literal["segmentation", "holding"]


@dataclass(frozen=True)
class BoundaryEstimate:
    """What one criterion says of the two boundaries.

    Attributes:
        criterion: ``segmentation`` or ``holding``.
        boundaries: first blocks of the second and further strata; (s1, s2) of three.
        intervals: bootstrap interval of each, inclusive ends, at :data:`CONFIDENCE`.
        draws: boundaries in each bootstrap draw, shape (draws, boundaries).
    """

    criterion: Criterion
    boundaries: tuple[int, ...]
    intervals: tuple[tuple[int, int], ...]
    draws: np.ndarray = field(repr=False)

    def probabilities(self, num_blocks: int) -> np.ndarray:
        """Share of bootstrap draws that put each boundary at each block, shape (boundaries, num_blocks + 1)."""
        return np.stack([np.bincount(d, minlength=num_blocks + 1) / len(d) for d in self.draws.T])

    def widest(self) -> tuple[str, tuple[int, int]]:
        """Name and interval of the less certain boundary."""
        i = int(np.argmax([high - low for low, high in self.intervals]))
        return f"s{i + 1}", self.intervals[i]


def bootstrap_curves(curves: Sequence[LayerCurve], *, n_boot: int, seed: int) -> np.ndarray:
    """Draw curves: tasks resampled within each level, and for each drawn task one of its curve's replicates.

    Returns:
        Shape (n_boot, tasks, hidden); row t of a draw has the level of ``curves[t]``.
    """
    if not curves:
        return np.zeros((n_boot, 0, 0))
    rng = generator(seed, "strata suggestion", *sorted(c.task for c in curves))
    levels = np.array([c.level for c in curves])
    chosen = np.empty((n_boot, len(curves)), dtype=np.int64)
    for level in sorted(set(levels)):
        own = np.flatnonzero(levels == level)
        chosen[:, own] = own[rng.integers(len(own), size=(n_boot, len(own)))]
    uniform = rng.random(chosen.shape)
    draws = np.empty((*chosen.shape, len(curves[0].hidden)))
    for t, curve in enumerate(curves):
        here = chosen == t
        draws[here] = curve.replicates[(uniform[here] * len(curve.replicates)).astype(np.int64)]
    return draws


def _estimate(criterion: Criterion, boundaries: tuple[int, ...], draws: np.ndarray) -> BoundaryEstimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0, method="inverted_cdf").astype(int)
    ends = tuple((int(min(low[i], b)), int(max(high[i], b))) for i, b in enumerate(boundaries))
    return BoundaryEstimate(criterion, boundaries, ends, draws)


def by_segmentation(
    curves: Sequence[LayerCurve], draws: np.ndarray, *, num_blocks: int, segments: int = 3
) -> tuple[SegmentationTest, BoundaryEstimate] | str:
    """Test segments against smooth profiles and cut; or the reason why that cannot be done.

    Args:
        curves: one per task.
        draws: from :func:`bootstrap_curves`, shape (draws, tasks, hidden).
        num_blocks: L; every hidden state from 1 to L is needed.
        segments: number of strata, at least two.
    """
    if len(curves) < 2:
        return f"it needs at least two tasks, got {len(curves)}"
    if num_blocks < MIN_BLOCKS:
        return f"it needs at least {MIN_BLOCKS} blocks, got {num_blocks}"
    inner = curves[0].hidden > 0
    if not np.array_equal(curves[0].hidden[inner], np.arange(1, num_blocks + 1)):
        return f"it needs every hidden state from 1 to {num_blocks}, and some were not probed"
    profiles = np.stack([c.values for c in curves])[:, inner]
    varying = int((standardise(profiles) != 0).any(axis=1).sum())
    if varying < 2:
        return f"it needs at least two tasks whose score varies over depth, got {varying}"
    test = segmentation_test(profiles, segments=segments)
    cuts = segment(standardise(draws[..., inner]), segments=segments)
    return test, _estimate("segmentation", test.cuts, cuts)


def by_holding(
    curves: Sequence[LayerCurve],
    *,
    num_blocks: int,
    share: float,
    basic_levels: Sequence[str],
    n_boot: int,
    seed: int,
) -> BoundaryEstimate | str:
    """Boundaries by the holding rule; or the reason why it gives none.

    Tasks that are never above their control by more than noise are left out: they hold nothing that the model learnt.
    A task that is known from the embeddings on is not: it is held at hidden 0.

    Args:
        curves: one per task.
        num_blocks: L; every hidden state from 0 to L is needed.
        share: q.
        basic_levels: levels that place s1; the others place s2.
        n_boot: bootstrap draws.
        seed: seed of the bootstrap.
    """
    if not curves:
        return "there is no usable curve"
    if not np.array_equal(curves[0].hidden, np.arange(num_blocks + 1)):
        return f"it needs every hidden state from 0 to {num_blocks}, and some were not probed"
    given, groups = holding_groups(curves, basic_levels), holding_groups(above_control(curves), basic_levels)
    names = f"the basic levels ({', '.join(basic_levels)})", "the other levels"
    for words, all_own, own in zip(names, given, groups, strict=True):
        if not all_own:
            return f"no task belongs to {words}"
        if not own or held_from(np.stack([c.values for c in own]), share=share) < 0:
            return f"no task of {words} exceeds its control at any hidden state by more than noise"
    hidden, used = curves[0].hidden, above_control(curves)
    draws = bootstrap_curves(used, n_boot=n_boot, seed=seed)
    basic = np.array([c.level in basic_levels for c in used], dtype=bool)
    # A draw in which a group holds nothing says that its knowledge may be nowhere: position -1, held at the very end.
    s1, other = (hidden[held_from(draws[:, own], share=share)] for own in (basic, ~basic))
    drawn = np.stack([s1, np.maximum(s1, other)], axis=1)
    return _estimate("holding", holding_pair(curves, share=share, basic_levels=basic_levels), drawn)


def above_control(curves: Sequence[LayerCurve]) -> list[LayerCurve]:
    """The curves that the holding rule uses."""
    return [c for c in curves if not never_above_control(c)]


def holding_groups(
    curves: Sequence[LayerCurve], basic_levels: Sequence[str]
) -> tuple[list[LayerCurve], list[LayerCurve]]:
    """The curves that place s1 and those that place s2."""
    return [c for c in curves if c.level in basic_levels], [c for c in curves if c.level not in basic_levels]


def holding_pair(curves: Sequence[LayerCurve], *, share: float, basic_levels: Sequence[str]) -> tuple[int, int]:
    """(s1, s2) of the holding rule on the curves as they are; both groups must hold something."""
    hidden, groups = curves[0].hidden, holding_groups(above_control(curves), basic_levels)
    s1, other = (int(hidden[held_from(np.stack([c.values for c in own]), share=share)]) for own in groups)
    return s1, max(s1, other)


def holding_caveats(curves: Sequence[LayerCurve], basic_levels: Sequence[str]) -> str:
    """What to know about the tasks behind the holding rule: boundaries of a single task, and tasks left out."""
    used = above_control(curves)
    words = [
        f"{name} rests on a single task ({own[0].task})."
        for name, own in zip(("s1", "s2"), holding_groups(used, basic_levels), strict=True)
        if len(own) == 1
    ]
    left_out = [c.task for c in curves if never_above_control(c)]
    if left_out:
        words.append(f"Never above their control and not used for it: {', '.join(left_out)}.")
    return " ".join(words)
