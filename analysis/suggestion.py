"""From layer curves to strata: which criterion places the boundaries, why, and the plan that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.boundaries import (
    CONFIDENCE,
    BoundaryEstimate,
    bootstrap_curves,
    by_holding,
    by_segmentation,
    holding_caveats,
    holding_pair,
)
from analysis.segmentation import SegmentationTest
from probing.curves import LayerCurve
from spafit.errors import UsageError
from spafit.presets import scaled_boundaries
from spafit.runtime import provenance
from spafit.strata import LoraOptions, StrataConfig

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

#: An interval wider than this share of the depth makes the evidence weak.
WIDEST_INTERVAL = 1 / 3
SMOOTH_SENTENCE = "The depth profile is smooth: no strata in the evidence, boundaries are a budget choice."


@dataclass(frozen=True)
class StrataSuggestion:
    """Suggested strata, with the evidence behind each boundary. Untested: nothing was trained.

    Attributes:
        config: the plan; its provenance repeats what stands here.
        criterion: what placed the boundaries: ``segmentation``, ``holding``, or ``none`` (SPAFIT's, scaled).
        evidence: ``strata`` (segments beat the smooth profiles), ``smooth`` (they do not), ``untested`` (the
            segmentation could not be run), ``weak`` (an interval is too wide), ``none`` (no criterion applies).
        reason: why, in sentences.
        segmentation: estimate by segmentation, or None with the reason in ``notes``.
        holding: estimate by the holding rule, or None with the reason in ``notes``.
        null_test: leave-one-task-out errors of segments and smooth profiles, where the segmentation was run.
        notes: why a criterion was not run, which tasks were left out, by criterion.
        sensitivity: (s1, s2) of the holding rule at other shares q.
        tasks: names of the tasks used, by level.
        share: q of the holding rule.
        basic_levels: the levels that place s1.
    """

    config: StrataConfig
    criterion: Literal["segmentation", "holding", "none"]
    evidence: Literal["strata", "smooth", "untested", "weak", "none"]
    reason: str
    segmentation: BoundaryEstimate | None
    holding: BoundaryEstimate | None
    null_test: SegmentationTest | None
    notes: dict[str, str]
    sensitivity: dict[float, tuple[int, int]]
    tasks: dict[str, tuple[str, ...]]
    share: float
    basic_levels: tuple[str, ...]

    @property
    def stack(self) -> str:
        """The stack that the plan is for."""
        return next(iter(self.config.blocks))

    @property
    def num_blocks(self) -> int:
        """Number of blocks L."""
        return self.config.blocks[self.stack]

    @property
    def boundaries(self) -> tuple[int, int]:
        """(s1, s2) of the plan."""
        return self.config.boundaries(self.stack)

    def explain(self) -> str:
        """Sentences for a reader: what placed each boundary, the evidence, the alternative, what would change it."""
        s1, s2 = self.boundaries
        lines = [self.reason, _in_words(s1, s2, self.num_blocks)]
        chosen = {"segmentation": self.segmentation, "holding": self.holding}.get(self.criterion)
        if chosen is not None:
            lines.append(_placed(chosen, self.share, self.basic_levels))
        if self.null_test is not None:
            lines.append(_null_sentence(self.null_test))
        for name, estimate in (("segmentation", self.segmentation), ("holding", self.holding)):
            label = _LABELS[name]
            if estimate is None:
                lines.append(f"The {label} gave no boundaries: {self.notes[name]}.")
            elif name != self.criterion:
                lines.append(f"The {label} would put them at {_pair(estimate)}.")
        if self.sensitivity:
            changes = ", ".join(f"({a}, {b}) at q = {q:g}" for q, (a, b) in self.sensitivity.items())
            lines.append(f"What would change it: the holding rule gives {changes}; it uses q = {self.share:g}.")
        if self.null_test is not None:
            other = "a smooth profile predicts" if self.null_test.beats_null else "three segments predict"
            lines.append(f"What would change it: tasks on which {other} left-out tasks better.")
        if self.evidence == "weak":
            lines.append("What would change it: more tasks per level or more test items, which narrow the intervals.")
        if "tasks" in self.notes:
            lines.append(self.notes["tasks"])
        lines.append("Untested: no training run has compared these strata with others.")
        return "\n".join(lines)

    def to_pandas(self) -> pd.DataFrame:
        """One row per (criterion, boundary): block, ci_low, ci_high, chosen, probability of that block."""
        import pandas as pd

        rows = []
        for estimate in (self.segmentation, self.holding):
            if estimate is None:
                continue
            probability = estimate.probabilities(self.num_blocks)
            for i, block in enumerate(estimate.boundaries):
                low, high = estimate.intervals[i]
                rows.append(
                    (
                        estimate.criterion,
                        f"s{i + 1}",
                        block,
                        low,
                        high,
                        estimate.criterion == self.criterion,
                        probability[i, block],
                    )
                )
        columns = ["criterion", "boundary", "block", "ci_low", "ci_high", "chosen", "probability"]
        return pd.DataFrame(rows, columns=columns)

    def save(self, path: str | Path) -> Path:
        """Write the plan (YAML, or JSON by suffix), stamped with time and versions. Returns the path."""
        stamp = provenance()
        return self.config.with_provenance({k: stamp[k] for k in ("created_at", "versions")}).save(path)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of bootstrap draws that put s1 and s2 at each block; dashed lines mark the plan's boundaries.

        Shows the criterion that placed them (without one, whichever gave an estimate; without any, the lines alone).
        """
        from spafit.plotting import MODEL_COLORS, new_figure, style

        shown = self.segmentation if self.criterion == "segmentation" else self.holding or self.segmentation
        blocks = np.arange(self.num_blocks + 1)
        with style():
            if ax is None:
                ax = new_figure(width=6.0, height=3.0).subplots()
            for i, (block, color) in enumerate(zip(self.boundaries, MODEL_COLORS[:2], strict=True)):
                shift = (i - 0.5) * 0.4
                if shown is not None:
                    label = f"s{i + 1} ({_LABELS[shown.criterion]})"
                    shares = shown.probabilities(self.num_blocks)[i]
                    ax.bar(blocks + shift, shares, width=0.4, color=color, label=label)
                ax.axvline(block + shift, color=color, linestyle="--", linewidth=1)
            ax.set(xlabel="first block of the stratum", ylabel="share of bootstrap draws", ylim=(0, 1))
            ax.set_xticks(blocks[:: max(1, len(blocks) // 13)])
            if shown is not None:
                ax.legend(frameon=False)
        return ax

    def _repr_html_(self) -> str:
        sentences = "".join(f"<p>{escape(line)}</p>" for line in self.explain().splitlines())
        return f"{self.config._repr_html_()}{sentences}"


_LABELS = {"segmentation": "segmentation", "holding": "holding rule"}


def suggest_strata(
    curves: Sequence[LayerCurve],
    *,
    num_blocks: int,
    stack: str = "encoder",
    model_id: str = "unnamed",
    bias_roles: Collection[str] | None = None,
    share: float = 0.95,
    basic_levels: Sequence[str] = ("surface", "syntax"),
    n_boot: int = 1000,
    seed: int = 0,
    adapter_type: Literal["I", "II"] = "I",
    lora: LoraOptions | None = None,
) -> StrataSuggestion:
    """Place SPAFIT's two boundaries from probing evidence alone.

    Two criteria are computed. *Segmentation*: three segments of the tasks' standardised depth profiles (hidden 1…L);
    it places the boundaries when it predicts left-out tasks better than smooth profiles do
    (:func:`analysis.segmentation.segmentation_test`). Otherwise the *holding rule* does: s1 is the first hidden state
    at which the basic levels hold ``share`` of their largest bits, s2 the same for the other levels, at least s1
    (:func:`analysis.holding.held_from`); a hidden index is a block start, because hidden h is what blocks [0, h) made.
    It leaves out tasks that are never above their control, and the reason names a boundary that one task places.
    Where neither applies, or an interval of the criterion that would decide spans more than a third of the depth,
    ``spafit-scaled`` is written with the reason.

    Intervals: each bootstrap draw resamples the tasks within each level and takes, for each drawn task, one of its
    curve's replicates (items and seeds); percentiles, widened to hold the estimate where resampling moves the whole
    distribution. A level with one task contributes no variation between tasks.

    Probing shows what a linear reader can find, not what fine-tuning needs: the result is untested until it has been
    trained against baselines.

    Args:
        curves: one curve per task, control-adjusted bits, all on the same hidden states.
        num_blocks: L.
        stack: name of the stack that the curves come from.
        model_id: the model's reference, for people.
        bias_roles: roles whose sub-layers have a bias; None means all, an empty collection none (then ``norm``).
        share: q of the holding rule.
        basic_levels: levels that place s1; all others place s2.
        n_boot: bootstrap draws.
        seed: seed of the bootstrap.
        adapter_type: SPAFIT type I (query, key, value) or II (also the attention's output).
        lora: rank, alpha, dropout; default rank 64.

    Raises:
        UsageError: curves of different hidden states, metrics or with fewer than two replicates, hidden states
            beyond the model's, a task named twice, or an option out of range.
    """
    _check(curves, num_blocks, share, n_boot)
    usable = [np.isfinite(c.values).all() and np.isfinite(c.replicates).all() for c in curves]
    used = [c for c, ok in zip(curves, usable, strict=True) if ok]
    notes: dict[str, str] = {}
    if len(used) < len(curves):
        dropped = ", ".join(c.task for c, ok in zip(curves, usable, strict=True) if not ok)
        notes["tasks"] = f"Left out because their curves are not finite: {dropped}."
    draws = bootstrap_curves(used, n_boot=n_boot, seed=seed)
    tested = by_segmentation(used, draws, num_blocks=num_blocks)
    null_test, segments = (None, None) if isinstance(tested, str) else tested
    held = by_holding(used, num_blocks=num_blocks, share=share, basic_levels=basic_levels, n_boot=n_boot, seed=seed)
    holding = None if isinstance(held, str) else held
    notes |= {k: v for k, v in (("segmentation", tested), ("holding", held)) if isinstance(v, str)}
    sensitivity = {}
    if holding is not None:
        others = sorted({0.9, 0.95, 0.99} - {share})
        sensitivity = {q: holding_pair(used, share=q, basic_levels=basic_levels) for q in others}

    evidence: Literal["strata", "smooth", "untested", "weak", "none"]
    reasons = []
    estimate = holding
    if null_test is None:
        evidence = "untested" if holding else "none"
        reasons.append(f"Whether depth falls into strata was not tested: {notes['segmentation']}.")
    elif null_test.beats_null:
        evidence, estimate = "strata", segments
        reasons.append("Three segments predict left-out tasks better than any smooth depth profile.")
    else:
        evidence = "smooth" if holding else "none"
        reasons.append(SMOOTH_SENTENCE)
    fallback = f"spafit-scaled-{adapter_type}"
    if estimate is None:
        reasons.append(f"The holding rule gives no boundaries: {notes['holding']}. {fallback} is written instead.")
    else:
        name, (low, high) = estimate.widest()
        if high - low > WIDEST_INTERVAL * num_blocks:
            evidence = "weak"
            reasons.append(
                f"The evidence is weak: by the {_LABELS[estimate.criterion]}, {name} lies between {low} and {high}, "
                f"more than a third of the {num_blocks} blocks. {fallback} is written instead."
            )
            estimate = None
        elif evidence != "strata":
            reasons += ["The holding rule places them.", *filter(None, [holding_caveats(used, basic_levels)])]
    boundaries = estimate.boundaries if estimate else scaled_boundaries(num_blocks)
    if boundaries[0] == num_blocks:
        reasons.append("No block is left to train: what the tasks ask for still grows at the last hidden state.")
    elif boundaries[1] == num_blocks:
        reasons.append("No block is left for the third stratum: the later tasks' bits still grow at the end.")
    reason = " ".join(reasons)
    tasks = _by_level(used)
    config = StrataConfig.from_boundaries(
        {stack: boundaries},
        blocks={stack: num_blocks},
        adapter_type=adapter_type,
        lora=lora,
        bias_roles=None if bias_roles is None else {stack: bias_roles},
        model_id=model_id,
        provenance={
            "source": "probing evidence" if estimate else f"preset {fallback}",
            "criterion": _LABELS[estimate.criterion] if estimate else "none",
            "tested": False,
            "evidence": evidence,
            "reason": reason,
            "intervals": _intervals(estimate) if estimate else None,
            "estimates": {_LABELS[e.criterion]: _record(e) for e in (segments, holding) if e},
            "confidence": CONFIDENCE,
            "null_errors": {k: round(v, 4) for k, v in null_test.errors.items()} if null_test else None,
            "holding_share": share,
            "basic_levels": list(basic_levels),
            "metric": used[0].metric if used else None,
            "adjusted_by": sorted({c.adjusted_by for c in used}),
            "tasks": {level: list(names) for level, names in tasks.items()},
        },
    )
    return StrataSuggestion(
        config,
        estimate.criterion if estimate else "none",
        evidence,
        reason,
        segments,
        holding,
        null_test,
        notes,
        sensitivity,
        tasks,
        share,
        tuple(basic_levels),
    )


def _check(curves: Sequence[LayerCurve], num_blocks: int, share: float, n_boot: int) -> None:
    if num_blocks < 1:
        raise UsageError(f"num_blocks is {num_blocks}; a stack has at least one block.")
    if not 0 < share <= 1:
        raise UsageError(f"The holding share q is {share}; it must be above 0 and at most 1.")
    if n_boot < 20:
        raise UsageError(f"n_boot is {n_boot}; intervals need at least 20 draws (1000 is the default).")
    repeated = [task for task, n in Counter(c.task for c in curves).items() if n > 1]
    if repeated:
        raise UsageError(f"Task {repeated[0]!r} has several curves. Give one per task: one pooling, site and probe.")
    if len({c.metric for c in curves}) > 1:
        raise UsageError(f"The curves mix metrics ({', '.join(sorted({c.metric for c in curves}))}). Give bits only.")
    for curve in curves:
        if not np.array_equal(curve.hidden, curves[0].hidden):
            raise UsageError(f"Tasks {curves[0].task!r} and {curve.task!r} were probed at different hidden states.")
        if curve.replicates.ndim != 2 or len(curve.replicates) < 2:
            raise UsageError(
                f"The curve of task {curve.task!r} has no bootstrap replicates, so no interval is possible."
            )
    if curves and (curves[0].hidden.min() < 0 or curves[0].hidden.max() > num_blocks):
        raise UsageError(
            f"The curves speak of hidden {curves[0].hidden.min()} to {curves[0].hidden.max()}, but {num_blocks} blocks "
            f"have hidden 0 to {num_blocks}. Check num_blocks."
        )


def _by_level(curves: Sequence[LayerCurve]) -> dict[str, tuple[str, ...]]:
    levels: dict[str, list[str]] = {}
    for curve in curves:
        levels.setdefault(curve.level, []).append(curve.task)
    return {level: tuple(names) for level, names in levels.items()}


def _intervals(estimate: BoundaryEstimate) -> dict[str, Any]:
    return {f"s{i + 1}": interval for i, interval in enumerate(estimate.intervals)}


def _record(estimate: BoundaryEstimate) -> dict[str, Any]:
    return {"boundaries": estimate.boundaries, "intervals": _intervals(estimate)}


def _pair(estimate: BoundaryEstimate) -> str:
    return " and ".join(
        f"s{i + 1} = {b} (interval {low} to {high})"
        for i, (b, (low, high)) in enumerate(zip(estimate.boundaries, estimate.intervals, strict=True))
    )


def _in_words(s1: int, s2: int, num_blocks: int) -> str:
    parts = [
        f"blocks {a} to {b - 1} {words}" if b - a > 1 else f"block {a} {words}"
        for a, b, words in ((0, s1, "frozen"), (s1, s2, "bias-only"), (s2, num_blocks, "low-rank"))
        if b > a
    ]
    return f"Of {num_blocks} blocks: {', '.join(parts)}."


def _placed(estimate: BoundaryEstimate, share: float, basic_levels: tuple[str, ...]) -> str:
    s1, s2 = estimate.boundaries
    if estimate.criterion == "segmentation":
        return f"The segmentation puts the steps of the depth profile at {_pair(estimate)}."
    held = f"hold {share:.0%} of their largest bits"
    second = f"s2 = {s2} because the other tasks do so at hidden {s2}"
    if s2 == s1:
        second = f"s2 = {s2} because the other tasks do so no later"
    (low1, high1), (low2, high2) = estimate.intervals
    return (
        f"By the holding rule, s1 = {s1} (interval {low1} to {high1}) because the basic tasks "
        f"({', '.join(basic_levels)}) {held} at hidden {s1}, and {second} (interval {low2} to {high2})."
    )


def _null_sentence(test: SegmentationTest) -> str:
    few = " With so few blocks, steps that differ between tasks are missed about half of the time."
    total = test.n_tasks * test.num_blocks
    smooth = test.best_smooth
    return (
        f"Leave-one-task-out error on {test.n_tasks} tasks (of {total} for no prediction): three segments "
        f"{test.errors['segments']:.1f}, best smooth profile ({smooth}) {test.errors[smooth]:.1f}."
        + (few if test.num_blocks < 12 and not test.beats_null else "")
    )
