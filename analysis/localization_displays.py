"""A localization verdict for reading: a page of Markdown and a figure of where each type emerges in each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.hypothesis import Hypothesis
from analysis.localization_runs import LocalizationRuns
from analysis.power import Plan
from analysis.verdicts import Condition, TypeVerdict, p_text, percent
from spafit import plotting
from spafit.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAUTIONS = (
    "With one trained model per run the claim is about that checkpoint. Five or more trainings bear a claim about a "
    "method.",
    "Pooling and seed move layer curves (Niu et al. 2022): that is what L4 looks at.",
    "What a probe can read is not what a model uses (Elazar et al. 2021): that is what L2 and L3 look at.",
    "Where knowledge sits does not tell where to edit or tune (Hase et al. 2023): strata are justified by what tuning "
    "them gives.",
    "Which task belongs to which type is an assumption of the hypothesis file.",
)


def plan_lines(plans: Sequence[tuple[str, Plan]], claim: Hypothesis) -> list[str]:
    """What can be found, before anything is looked at; runs with the same numbers of tasks share their lines."""
    found = [f"Hypothesis {claim.name}, digest {claim.digest[:16]}."]
    said: dict[tuple[str, ...], list[str]] = {}
    for name, plan in plans:
        said.setdefault(tuple(plan.lines(claim)), []).append(name)
    for lines, names in said.items():
        found += [f"Before looking, {'; '.join(names)}:", *(f"  {line}" for line in lines)]
    return found


def verdict_lines(found: LocalizationRuns) -> list[str]:
    """The verdicts for a terminal."""
    lines = [f"{run.name}: {run.test.verdict}. {run.test.sentence}" for run in found.runs]
    if found.pooled is not None:
        lines.append(f"Pooled: {found.pooled.verdict}. {found.pooled.sentence}")
    return lines


def localization_markdown(found: LocalizationRuns, plans: Sequence[tuple[str, Plan]]) -> str:
    """The whole page: the claim, what could be found, each verdict with its conditions, the pooled one, cautions."""
    claim = found.hypothesis
    lines = [f"# Localization: {claim.name}", ""]
    if claim.description:
        lines += [claim.description, ""]
    lines += [
        f"Digest of the hypothesis: `{claim.digest}`. Level {claim.alpha:g}, margin {claim.delta:g}, held out: "
        f"{claim.held_out}.", "", "| type | tasks | claimed range |", "|---|---|---|",
    ]  # fmt: skip
    for t in claim.types:
        claimed = "none" if t.range is None else f"{percent(t.range[0])} to {percent(t.range[1])} % of the blocks"
        lines.append(f"| {t.name} | {_cell(', '.join(t.tasks))} | {claimed} |")
    lines += ["", "## What could be found", "", "Computed from the numbers of tasks, before any score was read.", ""]
    lines += [f"    {line}" for line in plan_lines(plans, claim)[1:]]
    if len(found.runs) > 1:
        lines += ["", "## Runs", "", *_runs_table(found)]
    if found.pooled is not None:
        pooled = found.pooled
        lines += ["", f"## Pooled: {pooled.verdict}", "", pooled.sentence, "", *_condition_table(pooled.conditions)]
        lines += ["", *_type_table(pooled.types)]
    for run in found.runs:
        lines += ["", f"## {run.name}: {run.test.verdict}", "", f"From `{run.source}`. Tested: {run.test.tested}.", ""]
        lines += [run.test.sentence, *(f"\n{note}" for note in run.notes), ""]
        lines += [*_condition_table(run.test.conditions), "", *_type_table(run.test.types)]
        if run.test.tasks:
            lines += ["", "| task | type | emergence (hidden state) | used | note |", "|---|---|--:|---|---|"]
            lines += [
                f"| {_cell(t.task)} | {t.level} | {_number(t.depth, 2)} | {'yes' if t.used else 'no'} | "
                f"{_cell(t.note)} |" for t in run.test.tasks
            ]  # fmt: skip
    return "\n".join([*lines, "", "## When not to trust it", "", *(f"- {c}" for c in _CAUTIONS), ""])


def plot_runs(found: LocalizationRuns, ax: Axes | None = None) -> Axes:
    """Where each type emerges in each run, over relative depth; claimed ranges are shaded above the rows.

    A dot is the mean over a type's tasks, small dots are the tasks. Verdicts stand at the right.

    Raises:
        DataError: no task of any run could be dated.
    """
    claim, runs = found.hypothesis, found.runs
    if not any(t.used for r in runs for t in r.test.tasks):
        raise DataError("No task could be dated, so there is nothing to draw.")
    if ax is None:
        ax = plotting.new_figure(width=7.2, height=1.5 + 0.44 * len(runs)).add_subplot()
    colors = _colors(claim)
    for k, t in enumerate(claim.types):
        if t.range is not None:
            ax.axvspan(100 * t.range[0], 100 * t.range[1], color=colors[t.name], alpha=0.1, linewidth=0)
        offset = 0.2 * (k - (len(claim.types) - 1) / 2)
        for row, run in enumerate(runs):
            depths = np.array([d.depth for d in run.test.tasks if d.used and d.level == t.name]) / run.test.num_blocks
            if len(depths):
                at = np.full(len(depths), row + offset)
                ax.plot(100 * depths, at, "o", color=colors[t.name], markersize=3, alpha=0.5, clip_on=False)
                ax.plot(100 * depths.mean(), row + offset, "D", color=colors[t.name], markersize=6)
        ax.plot([], [], "D", color=colors[t.name], markersize=6, label=t.name)
    for row, run in enumerate(runs):
        ax.text(102, row, run.test.verdict, va="center", fontsize=8, color=plotting.INK)
    ax.set_yticks(range(len(runs)), [r.name for r in runs])
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_xlim(0, 100)
    what = "emergence" if claim.statistic == "emergence_cog" else "best hidden state"
    ax.set_xlabel(f"{what}, % of the depth (shaded: claimed range)")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(claim.types))
    return ax


def _colors(claim: Hypothesis) -> dict[str, str]:
    """Colours of the levels where all types are levels, else those of models in order."""
    if set(claim.levels) <= set(plotting.LEVEL_COLORS):
        return {name: plotting.level_color(name) for name in claim.levels}
    palette = plotting.MODEL_COLORS
    return {name: palette[i % len(palette)] for i, name in enumerate(claim.levels)}


def _runs_table(found: LocalizationRuns) -> list[str]:
    lines = [
        "| run | verdict | last − first, % of the depth | p | smallest p | L1 | L2 | L3 | L4 |",
        "|---|---|---|--:|--:|---|---|---|---|",
    ]
    for r in found.to_pandas().astype(object).to_dict("records"):
        gap = "–"
        if r["difference"] is not None and r["difference"] == r["difference"]:
            gap = f"{percent(r['difference'])} [{percent(r['ci_low'])} {percent(r['ci_high'])}]"
        numbers = [_p(r["p"]), _p(r["smallest_p"])]
        lines.append(
            f"| {' | '.join([_cell(r['run']), r['verdict'], gap, *numbers, *(r[f'L{i}'] for i in range(1, 5))])} |"
        )
    return lines


def _condition_table(conditions: Sequence[Condition]) -> list[str]:
    lines = [
        "| condition | outcome | number | interval | p | smallest p | power | in words |",
        "|---|---|--:|---|--:|--:|--:|---|",
    ]
    for c in conditions:
        ends = "–" if c.interval is None else f"[{c.interval[0]:.2f} {c.interval[1]:.2f}]"
        numbers = [_number(c.number, 2), ends, _p(c.p), _p(c.smallest_p), _number(c.power, 2)]
        lines.append(f"| {c.name} | {c.outcome} | {' | '.join(numbers)} | {_cell(c.sentence)} |")
    return lines


def _type_table(types: Sequence[TypeVerdict]) -> list[str]:
    lines = ["| type | verdict | tasks | in words |", "|---|---|--:|---|"]
    return [*lines, *(f"| {t.type} | {t.verdict} | {t.n_tasks} | {_cell(t.sentence)} |" for t in types)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or value != value else f"{value + 0.0:.{digits}f}"


def _p(value: float | None) -> str:
    return "–" if value is None or value != value else p_text(value)
