"""The localization test: does each type of knowledge sit in layers of its own? Supported, refuted, or not known.

"Type k lives in range R_k" needs four conditions. L1: tasks of later types emerge deeper. L2: intervening on R_k harms
type k's tasks more than intervening elsewhere does. L3: every pair of types is doubly dissociated. L4: the order keeps
its sign over seeds, poolings and probes, and a random encoder does not show it. Each is tested where there is evidence
for it, and said to be not tested where there is none.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.block_effects import BlockEffects
from analysis.hypothesis import Hypothesis, Statistic, default_hypothesis
from analysis.judging import Shares, judge_interventions, judge_order, judge_types, prepare_shares
from analysis.power import Plan, plan
from analysis.stability import Reading, stability
from analysis.verdicts import Condition, TypeVerdict, Verdict, decide, listed
from probing.curves import LayerCurve
from probing.summaries import emergence, expected_layer_robust, never_above_control
from spafit import io
from spafit.errors import DataError, UsageError
from spafit.stats import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What the test speaks about, for a reader.
TESTED = "order of emergence (L1) only"
NOTHING_TESTED = "nothing: too few tasks"
_CONDITIONS = {
    "L1": "order of emergence (L1)",
    "L2": "effects by range (L2)",
    "L3": "double dissociation (L3)",
    "L4": "stability (L4)",
}


@dataclass(frozen=True)
class TaskDepth:
    """Where one task emerges, and whether it took part.

    Attributes:
        task: the task's name.
        level: the type that the hypothesis files it under; its own level where it names none.
        depth: emergence, or what the hypothesis names, a hidden index; NaN where it cannot be dated.
        ci_low: lower end of its 95 % interval; NaN for a published curve, which has no items behind it.
        ci_high: upper end.
        used: whether the task is a unit of the order test.
        note: why it was left out, or how it should be read; empty otherwise.
    """

    task: str
    level: str
    depth: float
    ci_low: float
    ci_high: float
    used: bool
    note: str = ""


@dataclass(frozen=True)
class TaskShares:
    """How the effect of an intervention on one task is shared between blocks.

    Attributes:
        task: the task's name.
        level: its type.
        kind: kind of intervention.
        shares: of each block: effect / Σ|effect|.
    """

    task: str
    level: str
    kind: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class LocalizationTest:
    """Result of :func:`localization_test`.

    Attributes:
        verdict: ``supported``, ``refuted`` or ``inconclusive``, about what ``tested`` names.
        sentence: the verdict in words for a reader.
        tested: what was tested, in words; ``nothing: too few tasks`` where no condition could be.
        conditions: L1 to L4.
        types: a verdict on each type.
        tasks: every task that was given, with its depth or why it was left out.
        hypothesis: what was claimed.
        num_blocks: depth of the model in blocks.
        planned_power: power for the numbers of tasks used, before looking at any score; see
            :class:`analysis.power.Plan`.
        shares: of each task that L2 and L3 were tested on.
    """

    verdict: Verdict
    sentence: str
    tested: str
    conditions: tuple[Condition, ...]
    types: tuple[TypeVerdict, ...]
    tasks: tuple[TaskDepth, ...]
    hypothesis: Hypothesis
    num_blocks: int
    planned_power: tuple[dict[str, float | str], ...] = ()
    shares: tuple[TaskShares, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Content of ``verdict.json``: plain objects, missing numbers as None."""
        content = asdict(self)
        content |= {
            "schema_version": io.SCHEMA_VERSION,
            "alpha": self.hypothesis.alpha,
            "delta": self.hypothesis.delta,
            "hypothesis": self.hypothesis.to_dict(),
            "hypothesis_digest": self.hypothesis.digest,
        }
        return io.plain(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LocalizationTest:
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: an earlier version of this package wrote it.
        """
        if "types" not in content:
            raise DataError(
                "This verdict was written before hypothesis files. Write it again with spafit report FOLDER."
            )
        missing = dict.fromkeys(("depth", "ci_low", "ci_high"), math.nan)
        tasks = tuple(
            TaskDepth(**{**t, **{k: v for k, v in missing.items() if t[k] is None}}) for t in content["tasks"]
        )
        return cls(
            verdict=content["verdict"],
            sentence=content["sentence"],
            tested=content["tested"],
            conditions=tuple(map(Condition.from_dict, content["conditions"])),
            types=tuple(map(TypeVerdict.from_dict, content["types"])),
            tasks=tasks,
            hypothesis=Hypothesis.from_dict(content["hypothesis"]),
            num_blocks=content["num_blocks"],
            planned_power=tuple(content["planned_power"]),
            shares=tuple(TaskShares(**{**s, "shares": tuple(s["shares"])}) for s in content["shares"]),
        )

    def save(self, directory: Path) -> Path:
        """Write ``verdict.json`` into ``directory`` and return its path."""
        path = Path(directory) / "verdict.json"
        io.write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, directory: Path) -> LocalizationTest:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(io.read_json(Path(directory) / "verdict.json"))

    def to_pandas(self) -> pd.DataFrame:
        """One row per task: task, level, depth, ci_low, ci_high, used, note."""
        return pd.DataFrame([asdict(t) for t in self.tasks], columns=list(TaskDepth.__dataclass_fields__))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each dated task's depth with its interval, grouped by level; tasks that were left out are hollow."""
        from spafit.plotting import level_color, new_figure

        dated = [t for level in self.hypothesis.levels for t in self.tasks if t.level == level and t.depth == t.depth]
        if ax is None:
            ax = new_figure(width=6.0, height=1.2 + 0.28 * len(dated)).add_subplot()
        for row, task in enumerate(dated):
            color = level_color(task.level)
            ax.plot([task.ci_low, task.ci_high], [row, row], color=color)
            ax.plot(task.depth, row, "o", color=color, markerfacecolor=color if task.used else "none")
        ax.set_yticks(range(len(dated)), [f"{t.task} ({t.level})" for t in dated])
        ax.set_ylim(len(dated) - 0.5, -0.5)
        ax.set_xlim(0, self.num_blocks)
        ax.set_xlabel("emergence, hidden state (0 = embeddings)")
        return ax

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{c.name}</td><td>{'' if c.tested else 'not '}tested</td><td>{html.escape(c.sentence)}</td></tr>"
            for c in self.conditions
        )
        return (
            f"<p><b>{self.verdict}</b> ({html.escape(self.tested)}). {html.escape(self.sentence)}</p>"
            f"<table><tbody>{rows}</tbody></table>"
        )


def localization_test(
    curves: Sequence[LayerCurve],
    hypothesis: Hypothesis | None = None,
    *,
    num_blocks: int | None = None,
    effects: BlockEffects | None = None,
    readings: Sequence[Reading] = (),
    seed: int = 0,
) -> LocalizationTest:
    """Test a claim on the evidence that there is, with tasks as units.

    L1 needs curves. It holds where the exact one-sided trend test (Jonckheere–Terpstra over all assignments of types
    to tasks) has p ≤ alpha and the last type lies deeper than the first. L2 and L3 need interventions
    (:mod:`analysis.conditions` has the rules), L4 several readings. Supported: every condition that was tested holds.
    Refuted: a bound excludes delta in one of them. Inconclusive: anything else, and always where no data could have
    reached alpha (:func:`analysis.verdicts.decide`).

    Tasks, not test items, are the units: a test over items finds differences between types about half of the time
    when tasks differ for no reason that has to do with their type. L1 has been simulated: "supported" came up in .04
    of 1,000 worlds with shuffled levels, and in .06 where all levels emerge at one early depth but the late ones gain
    five times less (the correction does not remove all bias of weak curves); at a true difference of exactly delta
    "refuted" comes up in about alpha of them for normal, uniform and heavy-tailed task depths. Both assume that tasks
    spread alike in all types: where one type spreads twice as much as the others, "supported" rose to .07 without a
    difference in mean and "refuted" to .13 (that type having the fewest tasks).

    When not to trust it. The claim is about this checkpoint; a claim about a training method needs five or more
    trained models. Which task belongs to which type is an assumption, and tasks chosen for a type may share what has
    nothing to do with it (their unit, their number of classes). Pooling and probe family move curves. That a probe can
    read something does not show that the model uses it, nor where to tune. Curves that are not adjusted by a control
    also show what any untrained network would. Tasks whose information is already in the embeddings have no emergence
    and are left out, which is stated. Effects of single blocks are added up over a range: interactions are not seen.

    Args:
        curves: one curve per task; tasks that no type names are listed and left out. Curves without replicates, such
            as published ones, are dated without correction. None at all leaves L1 out.
        hypothesis: the claim; by default the shipped one, surface below syntax below semantics.
        num_blocks: depth of the model; by default the largest hidden index of the curves, or that of the effects.
        effects: interventional effects by task and block, for L2 and L3.
        readings: for L4, from :func:`analysis.stability.readings_of`.
        seed: chooses the draws of the emergence correction.

    Returns:
        The verdict with its numbers.

    Raises:
        UsageError: no evidence, a task given twice, or effects of a model of another depth.
    """
    claim = default_hypothesis() if hypothesis is None else hypothesis
    names = [c.task for c in curves]
    if not names and effects is None:
        raise UsageError("The localization test got no layer curves and no effects; probe at least one task first.")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UsageError(
            f"The localization test takes one curve per task; got several of {', '.join(twice)}. "
            "Choose one stack, site, pooling and probe."
        )
    known = [int(c.hidden.max()) for c in curves] + ([] if effects is None else [effects.num_blocks])
    depth = max(known) if num_blocks is None else num_blocks
    if effects is not None and effects.num_blocks != depth:
        raise UsageError(
            f"{effects.source} has effects of {effects.num_blocks} blocks and the curves are of a model of {depth}. "
            "Give evidence of one model."
        )
    tasks = tuple(_date(c, claim, seed) for c in curves)
    types = {t.task: t.level for t in tasks}
    depths = {t.task: t.depth for t in tasks if t.used}
    left_out = [t.task for t in tasks if not t.used and t.level in claim.levels]
    l1, order = judge_order(depths, types, claim, num_blocks=depth, left_out=left_out)
    shares = None if effects is None else prepare_shares(effects, claim)
    l2, l3, ranges, pairs = judge_interventions(shares, claim)
    l4 = stability(readings, types, claim)
    verdict, conditions = decide((l1, l2, l3, l4), alpha=claim.alpha)
    by_type = judge_types(
        claim, depths, types, num_blocks=depth, order=order, shares=shares, ranges=ranges, pairs=pairs,
        contradicted=l4.outcome == "fails",
    )  # fmt: skip
    adjustments = sorted({c.adjusted_by for c in curves if types[c.task] in claim.levels})
    caution = "It speaks about this checkpoint, these tasks and their assignment to levels"
    if adjustments == ["none"]:
        caution += ", on scores that no control was subtracted from"
    if not l2.tested:
        caution += "; whether the model uses what the probes find was not tested"
    return LocalizationTest(
        verdict, f"{in_words(verdict, conditions, claim)} {caution}.", tested_words(conditions), conditions, by_type,
        tasks, claim, depth, power_rows(conditions, depths, types, claim, depth), _task_shares(shares, claim),
    )  # fmt: skip


def in_words(verdict: Verdict, conditions: Sequence[Condition], claim: Hypothesis) -> str:
    """The verdict in words, with the sentence of each condition that was tested or contradicts it."""
    first, last, every = claim.levels[0], claim.levels[-1], listed(claim.levels)
    by_name = {c.name: c for c in conditions}
    only_order = not (by_name["L2"].tested or by_name["L3"].tested)
    emerges = claim.statistic == "emergence_cog"
    what, verb = ("emergence", "emerge") if emerges else ("the best hidden state", "can be read best")
    if verdict == "supported":
        words = f"This supports that the depth of {what} rises from {first} to {last}."
        if not only_order:
            words = f"This supports that {every} sit in layers of their own."
    elif verdict == "refuted":
        words = f"This refutes that {every} {verb} at depths that differ enough to matter."
        if not only_order:
            out = [_CONDITIONS[c.name] for c in conditions if c.outcome == "refuted"]
            words = f"This refutes that {every} sit in layers of their own: {listed(out)}."
    else:
        words = f"Whether {every} {verb} in this order of depth is not known."
        if not only_order:
            words = f"Whether {every} sit in layers of their own is not known."
    counts = [c.outcome == "fails" and by_name["L1"].outcome == "holds" for c in conditions]
    said = [c.sentence for c, n in zip(conditions, counts, strict=True) if c.tested or c.name == "L1" or n]
    return " ".join([words, *said])


def tested_words(conditions: Sequence[Condition]) -> str:
    """What was tested, for a reader."""
    tested = [c.name for c in conditions if c.tested]
    if not set(tested) & {"L1", "L2", "L3"}:
        return NOTHING_TESTED
    return TESTED if tested == ["L1"] else listed([_CONDITIONS[n] for n in tested])


def power_rows(
    conditions: Sequence[Condition], depths: dict[str, float], types: dict[str, str], claim: Hypothesis, num_blocks: int
) -> tuple[dict[str, float | str], ...]:
    """Power planned for the tasks of L1; L2 and L3 have that of their own tasks in the plan before the run."""
    if not conditions[0].tested:
        return ()
    counts = [sum(types[t] == level for t in depths) for level in claim.levels]
    found: Plan = plan(claim, counts, num_blocks, interventions=False)
    return found.power


def date_curve(
    curve: LayerCurve, *, statistic: Statistic = "emergence_cog", seed: int = 0
) -> tuple[float, tuple[float, float], str]:
    """Depth of one curve, its 95 % interval, and why it is missing.

    Emergence is corrected for bias where the curve has replicates; without them it is the plain number and there is no
    interval.
    """
    if statistic == "best":
        if len(curve.replicates) and never_above_control(curve):
            return math.nan, (math.nan, math.nan), f"never above its control ({curve.adjusted_by}) by more than noise"
        drawn = curve.hidden[curve.replicates.argmax(axis=1)] if len(curve.replicates) else np.full(2, np.nan)
        low, high = interval(drawn)
        return float(curve.hidden[np.argmax(curve.values)]), (float(low), float(high)), ""
    if len(curve.replicates):
        found = emergence(curve, seed=seed)
        return found.value, found.ci, found.note
    value = expected_layer_robust(curve.values, curve.hidden)
    note = "no items behind it: dated without correction"
    if math.isnan(value):
        note = "it does not gain more than noise" if curve.values.max() > curve.values[0] else "it never rises"
    return value, (math.nan, math.nan), note


def _date(curve: LayerCurve, claim: Hypothesis, seed: int) -> TaskDepth:
    own = claim.type_of(curve.task, curve.level)
    if own is None:
        nothing = (math.nan, math.nan, math.nan)
        return TaskDepth(curve.task, curve.level, *nothing, used=False, note="no type of the hypothesis names it")
    value, ci, note = date_curve(curve, statistic=claim.statistic, seed=seed)
    return TaskDepth(curve.task, own, value, *ci, used=math.isfinite(value), note=note)


def _task_shares(shares: Shares | str | None, claim: Hypothesis) -> tuple[TaskShares, ...]:
    if not isinstance(shares, Shares):
        return ()
    rows = np.asarray(shares.shares).tolist()
    return tuple(
        TaskShares(t, claim.levels[k], shares.kind, tuple(row))
        for t, k, row in zip(shares.tasks, shares.ranks, rows, strict=True)
    )
