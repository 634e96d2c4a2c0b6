"""Suggested strata with their evidence, in words, tables and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.boundaries import BoundaryEstimate
from analysis.boundary_choice import BoundaryChoice
from analysis.segmentation import SegmentationTest
from spafit.runtime import provenance
from spafit.strata import StrataConfig

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class StrataSuggestion:
    """Suggested strata, with the evidence behind each boundary. Untested: no training has compared them with others.

    Attributes:
        config: the plan; its provenance repeats what stands here.
        criterion: what placed the boundaries: ``pilot``, ``segmentation``, ``holding``, ``even`` (equal shares of the
            depth) or ``none`` (SPAFIT's, scaled).
        evidence: ``strata`` (segments beat the smooth profiles; with a pilot, their place gains more than strata of the
            same sizes anywhere), ``smooth`` (they do not), ``untested`` (the segmentation could not be run),
            ``weak`` (an interval is too wide), ``none`` (no criterion applies).
        reason: why, in sentences.
        segmentation: estimate by segmentation, or None with the reason in ``notes``.
        holding: estimate by the holding rule, or None with the reason in ``notes``.
        null_test: leave-one-task-out errors of segments and smooth profiles, where the segmentation was run.
        notes: why a criterion was not run, which tasks were left out, by criterion.
        sensitivity: (s1, s2) of the holding rule at other shares q.
        tasks: names of the tasks used, by level.
        share: q of the holding rule.
        basic_levels: the levels that place s1.
        choice: all placements by the pilot, where there was one.
        moved: why the criterion's boundaries were moved to keep a budget; empty where they were not.
    """

    config: StrataConfig
    criterion: Literal["pilot", "segmentation", "holding", "even", "none"]
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
    choice: BoundaryChoice | None = None
    moved: str = ""

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
        lines = [self.reason, _in_words(self.config, self.stack), *filter(None, [self.moved])]
        if self.choice is not None:
            lines += choice_sentences(self.choice)
        chosen = {"segmentation": self.segmentation, "holding": self.holding}.get(self.criterion)
        if chosen is not None:
            lines.append(_placed(chosen, self.share, self.basic_levels))
        if self.null_test is not None:
            lines.append(_null_sentence(self.null_test))
        for name, estimate in (("segmentation", self.segmentation), ("holding", self.holding)):
            label = _LABELS[name]
            if estimate is None:
                if name not in self.notes:
                    continue
                lines.append(f"The {label} gave no boundaries: {self.notes[name]}.")
            elif name != self.criterion:
                lines.append(f"The {label} would put them at {_pair(estimate)}.")
        if self.sensitivity:
            changes = ", ".join(f"({a}, {b}) at q = {q:g}" for q, (a, b) in self.sensitivity.items())
            lines.append(f"What would change it: the holding rule gives {changes}; it uses q = {self.share:g}.")
        if self.null_test is not None:
            other = "a smooth profile predicts" if self.null_test.beats_null else "segments predict"
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

        rows: list[tuple[Any, ...]] = []
        if self.choice is not None:
            shares = self.choice.probabilities()
            for i, block in enumerate(self.choice.boundaries):
                inside = np.flatnonzero((shares[i].cumsum() > 0.025) & (shares[i][::-1].cumsum()[::-1] > 0.025))
                ends = min(int(inside[0]), block), max(int(inside[-1]), block)
                rows.append(("pilot", f"s{i + 1}", block, *ends, True, shares[i, block]))
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
        With a pilot and three strata it is the triangle of all pairs instead.
        """
        if self.choice is not None and len(self.choice.strata) == 3:
            return self.choice.plot(ax)
        from spafit.plotting import MODEL_COLORS, new_figure, style

        shown = self.segmentation if self.criterion == "segmentation" else self.holding or self.segmentation
        blocks = np.arange(self.num_blocks + 1)
        with style():
            if ax is None:
                ax = new_figure(width=6.0, height=3.0).subplots()
            for i, (block, color) in enumerate(zip(self.boundaries, MODEL_COLORS[:2], strict=True)):
                shift = (i - 0.5) * 0.4
                if shown is not None and i < len(shown.boundaries):
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


def _pair(estimate: BoundaryEstimate) -> str:
    return " and ".join(
        f"s{i + 1} = {b} (interval {low} to {high})"
        for i, (b, (low, high)) in enumerate(zip(estimate.boundaries, estimate.intervals, strict=True))
    )


def _in_words(config: StrataConfig, stack: str) -> str:
    named = {"freeze": "frozen", "bitfit": "bias-only", "bias-added": "added biases only", "norm": "norms only",
             "lora+bitfit": "low-rank", "lora+bias-added": "low-rank", "lora+norm": "low-rank",
             "lora": "low-rank"}  # fmt: skip
    own = sorted((s for s in config.strata if s.stack == stack), key=lambda s: s.blocks)
    ranks = {s.lora.rank for s in own if s.lora is not None}
    parts = []
    for stratum in own:
        a, b = stratum.blocks
        rank = f" of rank {stratum.lora.rank}" if stratum.lora is not None and len(ranks) > 1 else ""
        words = named.get(stratum.method, stratum.method) + rank
        parts.append(f"blocks {a} to {b - 1} {words}" if b - a > 1 else f"block {a} {words}")
    return f"Of {config.blocks[stack]} blocks: {', '.join(parts)}."


def choice_sentences(choice: BoundaryChoice) -> list[str]:
    """What a pilot says of its choice: gain, forgetting and parameters, support, alternatives, what would change it."""
    table, evidence = choice.table, choice.evidence
    row = table.iloc[choice.chosen]
    limits = [f"at most {choice.budget:,} parameters"] if choice.budget is not None else []
    limits += [f"at most {choice.tolerance:.3g} {evidence.unit} forgotten"] if choice.tolerance is not None else []
    within = f" within {' and '.join(limits)}" if limits else ""
    region = int(table["in_region"].sum())
    lines = [
        f"By the pilot, of {len(table)} placements{within}, {_at(choice, choice.chosen)} trains the fewest parameters "
        f"({int(row['parameters']):,}) among the {region} whose gain is within one standard error of the largest; it "
        f"is the best in {row['p_optimal']:.0%} of draws (regret {row['regret']:.3f}).",
        f"Expected: {row['gain']:.0%} of the gain of training all blocks with {choice.strata[-1]} "
        f"({row['gain_low']:.0%} to {row['gain_high']:.0%}), and {row['forgetting']:.3f} {evidence.unit} forgotten "
        f"({row['forgetting_low']:.3f} to {row['forgetting_high']:.3f}), the mean over {len(evidence.tasks)} task(s).",
    ]  # fmt: skip
    mean, low, high = choice.null
    lines.append(
        f"Beyond strata of the same sizes anywhere in the depth it gains {mean:+.2f} ({low:+.2f} to {high:+.2f})"
        + ("." if choice.beats_null else ": no strata in the evidence, boundaries are a budget choice.")
    )
    others = [p for p in choice.short_list(4) if p != choice.boundaries]
    if others:
        lines.append("Alternatives: " + "; ".join(_alternative(choice, p) for p in others) + ".")
    safer = table[table["feasible"] & (table["forgetting"] <= max(0.0, float(row["forgetting"])) / 2)]
    if row["forgetting"] > 0 and len(safer):
        best = int(safer.index.to_numpy()[safer["gain"].to_numpy().argmax()])
        lines.append(
            f"What would change it: to forget at most half as much, {_at(choice, best)}, with "
            f"{table['gain'].iloc[best]:.0%} of the gain."
        )
    return lines


def _at(choice: BoundaryChoice, position: int) -> str:
    names = ", ".join(f"s{i + 1}" for i in range(len(choice.strata) - 1))
    return f"({names}) = ({', '.join(map(str, choice.at(position)))})"


def _alternative(choice: BoundaryChoice, pair: tuple[int, ...]) -> str:
    columns = [f"s{i + 1}" for i in range(len(pair))]
    row = choice.table[(choice.table[columns] == list(pair)).all(axis=1)].iloc[0]
    return f"({', '.join(map(str, pair))}), the best in {row['p_optimal']:.0%}, regret {row['regret']:.3f}"


def _placed(estimate: BoundaryEstimate, share: float, basic_levels: tuple[str, ...]) -> str:
    if estimate.criterion == "segmentation":
        return f"The segmentation puts the steps of the depth profile at {_pair(estimate)}."
    s1, s2 = estimate.boundaries
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
    words = {2: "two", 3: "three", 4: "four", 5: "five"}[len(test.cuts) + 1]
    few = " With so few blocks, steps that differ between tasks are missed about half of the time."
    total = test.n_tasks * test.num_blocks
    smooth = test.best_smooth
    return (
        f"Leave-one-task-out error on {test.n_tasks} tasks (of {total} for no prediction): {words} segments "
        f"{test.errors['segments']:.1f}, best smooth profile ({smooth}) {test.errors[smooth]:.1f}."
        + (few if test.num_blocks < 12 and not test.beats_null else "")
    )
