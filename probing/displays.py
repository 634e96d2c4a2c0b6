"""Figures from score tables: layer curves with bands and strata, task × layer heat map.

Every figure states its unit, what its bands are, and the number of test items. Nothing is pooled over tasks: a
mean over tasks would need an interval that the score table does not hold.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from probing.panels import (
    X_LABEL,
    X_WORDS,
    as_shares,
    caption,
    curve_legend,
    hidden_axis,
    line_styles,
    metric_words,
    number_range,
    select,
    share_words,
    variant_name,
)
from probing.tables import (
    VARIANT,
    curve_rows,
    html_table,
    level_order,
    markdown_table,
    ordered_tasks,
    overview,
    primary_split,
    short_names,
    sparkline,
    variants,
)
from spafit import plotting
from spafit.errors import UsageError, check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Metric",
    "html_table",
    "layer_curves",
    "markdown_table",
    "overview",
    "sparkline",
    "task_layer_heatmap",
]

Metric = Literal[
    "primary", "accuracy", "macro_f1", "micro_f1", "r2", "spearman", "uuas", "dspr", "nspr", "root_accuracy", "bits"
]

_MARKERS = dict(zip("osD^vP*", "●■◆▲▼✚★", strict=True))


def layer_curves(
    scores: pd.DataFrame,
    *,
    metric: Metric = "accuracy",
    layout: Literal["tasks", "levels"] = "tasks",
    strata: Sequence[plotting.StratumLike] | None = None,
    stack: str | None = None,
    site: str | None = None,
    tasks: Sequence[str] | None = None,
    scale: Literal["metric", "share"] = "metric",
    ax: Axes | None = None,
) -> Figure:
    """Scores over hidden states with their intervals, of one stack and site.

    Layout ``tasks`` gives each task a panel, in rows by level: its curve with a band, test items with unseen word types
    as a thin line, random encoder (dashed grey), word-type control task (dash-dotted grey) and chance (dotted); several
    poolings or probes are lines of one panel. Layout ``levels`` gives each level a panel in which its tasks can be
    compared: in ``bits``, or as shares of each task's best, which shows *where* and hides how much.

    Args:
        scores: table of scores (DESIGN section 5).
        metric: which score; ``primary`` is accuracy, or what takes its place for a task of numbers (R²) or of several
            labels (micro-averaged F1).
        layout: one panel per task or per level.
        strata: strata to shade behind the curves; those of other stacks are skipped.
        stack: needed where the table has several.
        site: needed where the table has several.
        tasks: draw these only.
        scale: ``share`` divides (score − chance) by the task's largest (score − chance), band and control included.
        ax: draw a single task into these axes instead of a new figure.

    Returns:
        The figure; it is not registered with pyplot.

    Raises:
        UsageError: nothing to draw for this choice, or a choice among stacks, sites or tasks is missing; lists them.
    """
    check_choice("layout", layout, ("tasks", "levels"))
    check_choice("scale", scale, ("metric", "share"))
    chosen = select(scores, metric=metric, stack=stack, site=site, tasks=tasks)
    if scale == "share":
        chosen = as_shares(chosen, metric=metric)
    unit = metric_words(chosen, metric) if scale == "metric" else share_words(metric)
    stack = str(chosen["stack"].iloc[0])
    shown = tuple(strata or ())
    with plotting.style():
        if ax is not None:
            names = ordered_tasks(chosen)
            if len(names) != 1:
                raise UsageError(
                    f"Axes were given for {len(names)} tasks, but axes hold one. Name it with tasks=[...], or leave "
                    f"out ax for a figure of all. Tasks: {', '.join(t for _, t in names)}."
                )
            plotting.shade_strata(ax, shown, stack=stack)
            _task_panel(ax, chosen, names[0][1], metric=metric, lines=line_styles(chosen))
            ax.set(title=names[0][1], xlabel=f"{X_LABEL} (0 = embeddings)", ylabel=unit)
            return ax.get_figure(root=True)  # type: ignore[return-value]
        draw = _by_task if layout == "tasks" else _by_level
        figure = draw(chosen, metric=metric, unit=unit, strata=[s for s in shown if s.stack == stack], stack=stack)
        return plotting.freeze_layout(figure)


def _by_task(
    rows: pd.DataFrame, *, metric: str, unit: str, strata: Sequence[plotting.StratumLike], stack: str
) -> Figure:
    names = short_names([t for _, t in ordered_tasks(rows)])
    levels: dict[str, list[str]] = {}
    for level, task in ordered_tasks(rows):
        levels.setdefault(level, []).append(task)
    columns = min(4, max(len(t) for t in levels.values()))
    grid = [(level, tasks[i : i + columns]) for level, tasks in levels.items() for i in range(0, len(tasks), columns)]
    figure = plotting.new_figure(width=max(2.55 * columns + 0.5, 5.6), height=1.75 * len(grid) + 1.2)
    axes = figure.subplots(len(grid), columns, squeeze=False, sharex=True)
    lines = line_styles(rows)
    kinds: set[str] = set()
    for r, (level, tasks) in enumerate(grid):
        for c in range(columns):
            ax = axes[r, c]
            if c >= len(tasks):
                ax.remove()
                continue
            plotting.shade_strata(ax, strata, stack=stack, labels=False)
            kinds |= _task_panel(ax, rows, tasks[c], metric=metric, lines=lines)
            n = int(rows.loc[rows["task"] == tasks[c], "n"].max())
            ax.set_title(
                names[tasks[c]].replace("_", " "), loc="left", color=plotting.level_color(level), fontweight="bold",
                fontsize=9,
            )  # fmt: skip
            shown = plotting.METRIC_LABELS[str(rows.loc[rows["task"] == tasks[c], "shown"].iloc[0])]
            count = f"{shown} · n = {n:,}" if unit == "score" else f"n = {n:,}"
            ax.set_title(count, loc="right", color=plotting.MUTED, fontsize=7.5)
            if not (grid[r + 1 :] and c < len(grid[r + 1][1])):
                ax.tick_params(labelbottom=True)
                ax.set_xlabel(X_LABEL)
        axes[r, 0].set_ylabel(f"{level}\n{unit}")
    curve_legend(figure, kinds, lines, metric=metric, words=caption(rows, unit), strata=strata)
    return figure


def _task_panel(ax: Axes, rows: pd.DataFrame, task: str, *, metric: str, lines: Mapping[str, Any]) -> set[str]:
    """Draw one task's curves; return the kinds of line drawn, for the legend."""
    part = rows[rows["task"] == task]
    color = plotting.level_color(str(part["level"].iloc[0]))
    split, kinds = primary_split(part, task), {"own"}
    found = variants(part, task)
    for variant in found:

        def line(control: str, which: str, *, variant: Sequence[str] = variant) -> pd.DataFrame:
            return curve_rows(part, task=task, variant=variant, control=control, metric=metric, split=which)

        own, name = line("none", split), variant_name(rows, variant)
        x, y = own["hidden"].to_numpy(), own["value"].to_numpy(float)
        plotting.band(ax, x, own["ci_low"].to_numpy(float), own["ci_high"].to_numpy(float), color=color)
        ax.plot(
            x, y, color=color, linestyle=lines[name], marker="o" if len(x) <= 14 else None, markersize=3,
            label=name or "task", zorder=3,
        )  # fmt: skip
        controls: dict[str, Any] = {"random-encoder": (0, (4, 2))}
        if len(found) == 1:
            controls["word-type"] = (0, (3, 1.5, 1, 1.5))
            for extra in sorted(set(part["split"]) - {split, "dev"}):
                other = line("none", extra)
                if len(other):
                    ax.plot(
                        other["hidden"], other["value"], color=color, linewidth=1.0, linestyle=(0, (1.5, 1)),
                        label=extra, zorder=2.5,
                    )  # fmt: skip
                    kinds.add(extra)
        for control, dashes in controls.items():
            base = line(control, split)
            if len(base):
                ax.plot(
                    base["hidden"], base["value"], color=plotting.MUTED, linewidth=1.1, linestyle=dashes, label=control,
                    zorder=2,
                )  # fmt: skip
                low, high = base["ci_low"].to_numpy(float), base["ci_high"].to_numpy(float)
                plotting.band(ax, base["hidden"].to_numpy(), low, high, color=plotting.MUTED, alpha=0.15)
                kinds.add(control)
    chance = 0.0 if metric == "bits" else float(part.loc[part["split"] == split, "chance"].iloc[0])
    if np.isfinite(chance):
        ax.axhline(chance, color=plotting.MUTED, linewidth=0.9, linestyle=":", label="chance", zorder=1.8)
        kinds.add("linear chain" if (part["shown"] == "uuas").all() else "chance")
    hidden_axis(ax, part, most=7 if len(rows["task"].unique()) > 1 else 13)
    return kinds


def _by_level(
    rows: pd.DataFrame, *, metric: str, unit: str, strata: Sequence[plotting.StratumLike], stack: str
) -> Figure:
    names = short_names([t for _, t in ordered_tasks(rows)])
    levels = sorted(dict.fromkeys(rows["level"].astype(str)), key=level_order)
    figure = plotting.new_figure(width=max(3.45 * len(levels) + 0.4, 6.0), height=4.0)
    share = unit not in plotting.METRIC_LABELS.values()
    axes = figure.subplots(1, len(levels), squeeze=False, sharey=share)[0]
    lines = line_styles(rows)
    labels: list[tuple[Axes, list[tuple[float, str, str]]]] = []
    kinds: set[str] = {"own"}
    for ax, level in zip(axes, levels, strict=True):
        color, ends = plotting.level_color(level), []
        plotting.shade_strata(ax, strata, stack=stack)
        tasks = [t for found, t in ordered_tasks(rows) if found == level]
        for i, task in enumerate(tasks):
            marker, glyph = list(_MARKERS.items())[i % len(_MARKERS)]
            part = rows[rows["task"] == task]
            split, name = primary_split(part, task), f"{glyph} {names[task].replace('_', ' ')}"
            for k, variant in enumerate(variants(part, task)):
                own = curve_rows(part, task=task, variant=variant, control="none", metric=metric, split=split)
                base = curve_rows(
                    part, task=task, variant=variant, control="random-encoder", metric=metric, split=split
                )
                if len(base):
                    ax.plot(
                        base["hidden"], base["value"], color=plotting.MUTED, linewidth=0.8, linestyle=(0, (4, 2)),
                        alpha=0.7, label="random-encoder", zorder=2,
                    )  # fmt: skip
                    kinds.add("random-encoder")
                if own.empty:
                    continue
                x, y = own["hidden"].to_numpy(), own["value"].to_numpy(float)
                plotting.band(
                    ax, x, own["ci_low"].to_numpy(float), own["ci_high"].to_numpy(float), color=color, alpha=0.15
                )
                ax.plot(
                    x, y, color=color, linestyle=lines[variant_name(rows, variant)], marker=marker,
                    markersize=4.5, markeredgecolor=plotting.PAPER, markeredgewidth=0.5,
                    markevery=1 if len(x) <= 14 else max(1, len(x) // 8), label=name, zorder=3,
                )  # fmt: skip
                if k == 0 and np.isfinite(y).any():
                    ends.append((float(y[np.isfinite(y)][-1]), name, color))
        if metric == "bits" or share:
            ax.axhline(0, color=plotting.MUTED, linewidth=0.9, linestyle=":", label="chance", zorder=1.8)
            kinds.add("chance")
        ax.set_title(level, loc="left", color=color, fontweight="bold", fontsize=11)
        ax.set_xlabel(X_LABEL)
        hidden_axis(ax, rows, most=9)
        labels.append((ax, ends))
    for ax in axes[:1] if share else axes:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + (0.08 * (high - low) if strata else 0))  # room for the strata's names
        if share:
            ax.set_yticks([t for t in ax.get_yticks() if low <= t <= 1.001])
    axes[0].set_ylabel(unit)
    curve_legend(figure, kinds, lines, metric=metric, words=caption(rows, unit), strata=strata)
    plotting.lay_out(figure)
    for ax, ends in labels:
        plotting.label_line_ends(ax, ends, x=float(rows["hidden"].max()))
    plotting.fit_stratum_labels(figure)
    return figure


def task_layer_heatmap(
    scores: pd.DataFrame, *, metric: Metric = "accuracy", stack: str | None = None, site: str | None = None
) -> Figure:
    """Tasks (rows, by level) × hidden states: the score as a number, its share of the row's best gain as colour.

    Colour is (score − chance) / (best score of the row − chance), with chance 0 for bits and for macro-F1, so it shows
    *where* a task is readable and not how hard it is; values below chance get the lowest colour. A box marks the best
    hidden state. Cells carry no interval; the caption gives the typical half-width.

    Args:
        scores: table of scores.
        metric: which score.
        stack: needed where the table has several.
        site: needed where the table has several.

    Raises:
        UsageError: as :func:`layer_curves`.
    """
    rows = select(scores, metric=metric, stack=stack, site=site)
    names = short_names([t for _, t in ordered_tasks(rows)])
    numbers, shares, labels, colors, halves = [], [], [], [], []
    hidden = sorted(int(h) for h in rows["hidden"].unique())
    for level, task in ordered_tasks(rows):
        split = primary_split(rows, task)
        for variant in variants(rows, task):
            own = curve_rows(rows, task=task, variant=variant, control="none", metric=metric, split=split)
            values = own.set_index("hidden")["value"].reindex(hidden).to_numpy(float)
            if not np.isfinite(values).any():
                continue
            chance = 0.0 if metric == "bits" or not np.isfinite(own["chance"].iloc[0]) else float(own["chance"].iloc[0])
            top = float(np.nanmax(values)) - chance
            numbers.append(values)
            shares.append((values - chance) / top if top > 0 else np.zeros_like(values))
            several = [
                v for c, v in zip(VARIANT, variant, strict=True) if rows.loc[rows["task"] == task, c].nunique() > 1
            ]
            labels.append(" · ".join([names[task].replace("_", " "), *several]))
            colors.append(plotting.level_color(level))
            halves.append(((own["ci_high"] - own["ci_low"]) / 2).median())
    if not numbers:
        raise UsageError(f"The table has no finite value of {metric!r}; there is nothing to draw.")
    items, known = number_range(rows["n"]), np.array(halves)[np.isfinite(halves)]
    doubt = f"half-width of the 95 % interval: about {np.median(known):.3f}" if known.size else "no intervals"
    return _heatmap(
        np.array(numbers), np.array(shares), labels, colors, hidden, metric=metric, words=metric_words(rows, metric),
        caption=f"{doubt}; n = {items} test items per task; {X_WORDS}; box: best",
    )  # fmt: skip


def _heatmap(
    numbers: np.ndarray,
    shares: np.ndarray,
    labels: list[str],
    colors: list[str],
    hidden: list[int],
    *,
    metric: str,
    words: str,
    caption: str,
) -> Figure:
    import seaborn as sns
    from matplotlib.patches import Rectangle

    percent = metric != "bits"
    text = np.array(
        [
            [
                "" if np.isnan(v) else f"{100 * v:.0f}" if percent else f"{v + 0.0:.2f}".replace("-0.00", "0.00")
                for v in row
            ]
            for row in numbers
        ]
    )
    cell = 0.46 if len(hidden) <= 14 else 0.36
    width, height = cell * len(hidden) + 3.0, 0.3 * len(labels) + 1.5
    label = textwrap.fill("share of the task's best gain over chance", max(12, 6 * len(labels)))  # as long as the bar
    with plotting.style():
        figure = plotting.new_figure(width=max(width, 5.2), height=height)
        ax = figure.subplots()
        sns.heatmap(
            pd.DataFrame(shares, index=labels, columns=hidden), ax=ax, annot=text, fmt="", cmap="crest", vmin=0, vmax=1,
            linewidths=0.6, linecolor=plotting.PAPER, annot_kws={"fontsize": 7.5 if percent else 6.5},
            cbar_kws={"label": label, "ticks": (0, 0.5, 1), "shrink": 0.9, "aspect": 28, "pad": 0.015},
        )  # fmt: skip
        bar = ax.collections[0].colorbar
        assert bar is not None
        bar.outline.set_visible(False)
        bar.ax.yaxis.label.set_fontsize(7.5)
        for row, values in enumerate(numbers):
            best = int(np.nanargmax(values))
            ax.add_patch(Rectangle((best + 0.03, row + 0.04), 0.94, 0.92, fill=False, edgecolor="white", linewidth=1.5))
        for tick, color in zip(ax.get_yticklabels(), colors, strict=True):
            tick.set_color(color)
        ax.tick_params(length=0)
        ax.set_xticklabels(ax.get_xticklabels(), rotation=0)
        ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
        unit = f"{words}, %" if percent else words
        ax.set_title(f"{unit} on test items", loc="left")
        ax.set_xlabel(f"{X_LABEL}\n{textwrap.fill(caption, max(48, int(cell * len(hidden) * 18)))}", fontsize=8)
    return plotting.freeze_layout(figure)
