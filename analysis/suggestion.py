"""From layer curves to strata: which criterion places the boundaries, why, and the plan that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
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
from analysis.boundary_choice import MAX_STRATA
from analysis.placed_strata import on_model, placed_strata
from analysis.segmentation import SegmentationTest
from analysis.strata_suggestion import StrataSuggestion
from probing.curves import LayerCurve
from spafit.errors import UsageError
from spafit.presets import scaled_boundaries
from spafit.strata import LoraOptions, StrataConfig

if TYPE_CHECKING:
    pass

#: An interval wider than this share of the depth makes the evidence weak.
WIDEST_INTERVAL = 1 / 3
#: SPAFIT's methods from the first block up.
SPAFIT = ("freeze", "bitfit", "lora+bitfit")
_LABELS = {"segmentation": "segmentation", "holding": "holding rule"}
_NUMBERS = {2: "Two", 3: "Three", 4: "Four", 5: "Five"}
SMOOTH_SENTENCE = "The depth profile is smooth: no strata in the evidence, boundaries are a budget choice."


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
    strata: Sequence[str] = SPAFIT,
    budget: int | None = None,
    count: Callable[[StrataConfig], int] | None = None,
) -> StrataSuggestion:
    """Place the boundaries between strata from probing evidence alone; SPAFIT's two, unless told otherwise.

    Two criteria are computed. *Segmentation*: three segments of the tasks' standardised depth profiles (hidden 1…L);
    it places the boundaries when it predicts left-out tasks better than smooth profiles do
    (:func:`analysis.segmentation.segmentation_test`). Otherwise the *holding rule* does: s1 is the first hidden state
    at which the basic levels hold ``share`` of their largest bits, s2 the same for the other levels, at least s1
    (:func:`analysis.holding.held_from`); a hidden index is a block start, because hidden h is what blocks [0, h) made.
    It leaves out tasks that are never above their control, and the reason names a boundary that one task places.
    Where neither applies, or an interval of the criterion that would decide spans more than a third of the depth,
    ``spafit-scaled`` is written with the reason.

    Two, four or five strata are placed by as many segments where these beat the smooth profiles, and else at equal
    shares of the depth, with the reason; one has no boundary.

    With a ``budget`` the boundaries move by as few blocks as keep it (of equal ones to fewer parameters).

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
        lora: rank, alpha, dropout; default rank 64. With ``strata`` of your own, write ranks there.
        strata: one to five methods from the first block up, such as ``("freeze", "bitfit", "lora+bitfit:16")``.
        budget: most trainable parameters; needs ``count``.
        count: number of parameters that a plan trains on the model.

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
    methods = on_model(strata, bias_roles)
    if not 1 <= len(methods) <= MAX_STRATA:
        raise UsageError(f"{len(methods)} strata are named; from one to {MAX_STRATA} can be placed.")
    segments_wanted = len(methods)
    tested: tuple[SegmentationTest, BoundaryEstimate] | str = "one stratum has no boundary"
    if segments_wanted > 1:
        tested = by_segmentation(used, draws, num_blocks=num_blocks, segments=segments_wanted)
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
    three = segments_wanted == 3
    if not three:
        holding, sensitivity = None, {}
        notes["holding"] = "it is a rule for three strata"
    estimate = holding
    if null_test is None:
        evidence = "untested" if holding else "none"
        reasons.append(f"Whether depth falls into strata was not tested: {notes['segmentation']}.")
    elif null_test.beats_null:
        evidence, estimate = "strata", segments
        number = _NUMBERS[segments_wanted]
        reasons.append(f"{number} segments predict left-out tasks better than any smooth depth profile.")
    else:
        evidence = "smooth" if holding else "none"
        reasons.append(SMOOTH_SENTENCE)
    fallback = f"spafit-scaled-{adapter_type}"
    other = "one method for all blocks" if segments_wanted == 1 else "equal shares of the depth"
    if estimate is None and not three:
        reasons.append("The boundaries are at equal shares of the depth." if segments_wanted > 1 else "")
    elif estimate is None:
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
    if estimate is not None:
        boundaries = estimate.boundaries
    elif three:
        boundaries = scaled_boundaries(num_blocks)
    else:
        boundaries = tuple(round(i * num_blocks / segments_wanted) for i in range(1, segments_wanted))
    if three and boundaries[0] == num_blocks:
        reasons.append("No block is left to train: what the tasks ask for still grows at the last hidden state.")
    elif three and boundaries[1] == num_blocks:
        reasons.append("No block is left for the third stratum: the later tasks' bits still grow at the end.")
    place = _Place(stack, num_blocks, methods, tuple(strata) == SPAFIT, adapter_type, lora, bias_roles, model_id)
    moved = ""
    if budget is not None:
        kept = place.within(boundaries, budget, count)
        if kept != boundaries:
            moved = f"Moved from {boundaries} to {kept} to train at most {budget:,} parameters."
            boundaries = kept
    reason = " ".join(filter(None, reasons))
    tasks = _by_level(used)
    config = place.plan(
        boundaries,
        {
            "source": "probing evidence" if estimate else f"preset {fallback}" if three else other,
            "criterion": _LABELS[estimate.criterion] if estimate else "none" if three else other,
            "tested": False,
            "evidence": evidence,
            "reason": f"{reason} {moved}".strip(),
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
        estimate.criterion if estimate else "none" if three else "even",
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
        moved=moved,
    )


@dataclass(frozen=True)
class _Place:
    """What plans at all boundaries share; arguments as in :func:`suggest_strata`."""

    stack: str
    num_blocks: int
    methods: tuple[str, ...]
    spafit: bool
    adapter_type: Literal["I", "II"]
    lora: LoraOptions | None
    bias_roles: Collection[str] | None
    model_id: str

    def plan(self, boundaries: Sequence[int], provenance: dict[str, Any]) -> StrataConfig:
        """The plan at these boundaries."""
        if self.spafit:
            s1, s2 = boundaries
            return StrataConfig.from_boundaries(
                {self.stack: (s1, s2)}, blocks={self.stack: self.num_blocks}, adapter_type=self.adapter_type,
                lora=self.lora, bias_roles=None if self.bias_roles is None else {self.stack: self.bias_roles},
                model_id=self.model_id, provenance=provenance,
            )  # fmt: skip
        return placed_strata(
            self.methods, boundaries, stack=self.stack, num_blocks=self.num_blocks, bias_roles=self.bias_roles,
            adapter_type=self.adapter_type, model_id=self.model_id, provenance=provenance,
        )  # fmt: skip

    def within(
        self, boundaries: tuple[int, ...], budget: int, count: Callable[[StrataConfig], int] | None
    ) -> tuple[int, ...]:
        """The nearest boundaries that keep the budget.

        Raises:
            UsageError: nothing to count with, or no placement keeps it (says the smallest that does).
        """
        if count is None:
            raise UsageError("A budget needs the model, to count what a plan trains. Give count.")
        every = combinations_with_replacement(range(self.num_blocks + 1), len(boundaries))
        order = sorted(every, key=lambda b: sum(abs(x - y) for x, y in zip(b, boundaries, strict=True)))
        sizes: dict[tuple[int, ...], int] = {}
        nearest = None
        for candidate in order:
            distance = sum(abs(x - y) for x, y in zip(candidate, boundaries, strict=True))
            if nearest is not None and distance > nearest:
                break
            sizes[candidate] = count(self.plan(candidate, {}))
            if sizes[candidate] <= budget:
                nearest = distance
        fitting = {c: n for c, n in sizes.items() if n <= budget}
        if not fitting:
            raise UsageError(
                f"A budget of {budget:,} parameters is less than the smallest plan of these strata trains: "
                f"{min(sizes.values()):,}. Give at least that."
            )
        return min(fitting, key=lambda c: (fitting[c], c))


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
