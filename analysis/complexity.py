"""Selectivity at several complexities: how task and control task gain from a stronger probe or from more items.

A probe that is strong enough, or has items enough, learns control labels by heart. A task that is read from the state
is already read by a weak probe that reads little of its control task (Hewitt & Liang 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from probing.metrics import shown_metric
from probing.panels import place_legend
from probing.tables import VARIANT, level_order, primary_split, reported, short_names
from spafit import plotting
from spafit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from probing.results import ProbeResults

By = Literal["probe", "n_train"]
_PARTS = {"none": "score", "word-type": "control", "difference:word-type": "selectivity"}
_KEY = ("task", "level", *VARIANT, "n_train")
_AXIS = {"low-rank": "rank", "mlp": "hidden units"}


def complexity_table(results: ProbeResults | Sequence[ProbeResults]) -> pd.DataFrame:
    """Score, control score and selectivity of every probe of one run, or of runs that differ in their training items.

    Args:
        results: one or several runs on the same model and tasks.

    Returns:
        One row per (task, stack, site, pooling, probe, n_train, hidden), with the columns level, family (``low-rank``,
        ``mlp``, ``linear``, …), size (rank or hidden units; missing for ``linear``), metric (the task's primary one),
        ``score``, ``control`` and ``selectivity`` (each with ``_low`` and ``_high``, 95 %; missing where there is no
        control task), and ``best``: whether this is the hidden state of the largest score of that probe and n_train.
        The best hidden state is chosen on the test items that are scored, so its score is a little too high; the same
        holds at every complexity.

    Raises:
        UsageError: no run was given, or two that hold the same numbers under the same key.
    """
    runs = [results] if not isinstance(results, Sequence) else list(results)
    if not runs:
        raise UsageError("Give at least one probing run.")
    table = pd.concat([_of_run(r.scores) for r in runs], ignore_index=True)
    if table.duplicated([*_KEY, "hidden"]).any():
        twice = table.loc[table.duplicated([*_KEY, "hidden"]), ["task", "probe", "n_train"]].iloc[0].tolist()
        raise UsageError(
            "Two of the runs hold {} with probe {} and {} training items. Give runs that differ in --max-train or "
            "--probe.".format(*twice)
        )
    known = table[table["score"].notna()]
    return table.assign(best=table.index.isin(known.groupby(list(_KEY), sort=False, observed=True)["score"].idxmax()))


def _of_run(scores: pd.DataFrame) -> pd.DataFrame:
    rows = reported(scores)
    rows = rows[rows["control"].isin(list(_PARTS))]
    parts = []
    for task, own in rows.groupby("task", sort=False):
        metric = shown_metric(own["metric"])
        parts.append(own[(own["metric"] == metric) & (own["split"] == primary_split(own, str(task)))])
    rows = pd.concat(parts)
    keys = [*_KEY, "hidden"]
    table = rows[rows["control"] == "none"][[*keys, "metric"]].copy()
    for control, name in _PARTS.items():
        own = rows[rows["control"] == control][[*keys, "value", "ci_low", "ci_high"]]
        named = own.rename(columns={"value": name, "ci_low": f"{name}_low", "ci_high": f"{name}_high"})
        table = table.merge(named, on=keys, how="left")
    kinds = [_family(p) for p in table["probe"].astype(str)]
    return table.assign(family=[k for k, _ in kinds], size=[s for _, s in kinds])


def _family(probe: str) -> tuple[str, float]:
    """Family and size of a probe's name; dropout is part of the family."""
    name, _, rest = probe.partition(":")
    size, comma, more = rest.partition(",")
    return name + comma + more, float(size) if size else float("nan")


def has_several_sizes(scores: pd.DataFrame) -> bool:
    """Whether a run holds low-rank or MLP probes of several sizes, so that :func:`complexity_curves` says something."""
    kinds = [_family(p) for p in scores["probe"].astype(str).unique()]
    sized = [family for family, size in kinds if np.isfinite(size)]
    return len(sized) > len(set(sized))


def complexity_curves(
    table: pd.DataFrame, *, by: By = "probe", stack: str | None = None, site: str | None = None
) -> Figure:
    """Task score, control score and selectivity at the best hidden state against complexity, with 95 % intervals.

    A panel per task and family (and, ``by="n_train"``, per task and probe). A linear probe stands at the right of the
    low-rank ones, as the one of full rank. Numbers at the points are the hidden states.

    Args:
        table: of :func:`complexity_table`.
        by: ``probe`` has the rank or the hidden units on the x axis, ``n_train`` the training items.
        stack: stack; the first by default.
        site: site; the first by default.

    Raises:
        UsageError: no task has several complexities of that kind.
    """
    rows = table[table["best"]]
    for column, value in (("stack", stack), ("site", site)):
        rows = rows[rows[column].astype(str) == (value or str(rows[column].iloc[0]))]
    rows = rows[rows["pooling"].astype(str) == str(rows["pooling"].iloc[0])]
    panels = _panels(rows, by)
    if not panels:
        wanted = "--probe with several ranks or widths" if by == "probe" else "runs with several --max-train"
        raise UsageError(f"No task has several complexities by {by}. It needs {wanted}.")
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    names = short_names(list(dict.fromkeys(str(p["task"].iloc[0]) for _, p in panels)))
    with plotting.style():
        figure = plotting.new_figure(width=max(2.55 * columns + 0.5, 5.6), height=1.9 * lines + 1.1)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, (label, part) in zip(axes, panels, strict=False):
            _panel(ax, part)
            task, level = str(part["task"].iloc[0]), str(part["level"].iloc[0])
            ax.set_title(names[task].replace("_", " "), loc="left", color=plotting.level_color(level),
                         fontweight="bold", fontsize=9)  # fmt: skip
            ax.set_title(plotting.METRIC_LABELS[str(part["metric"].iloc[0])], loc="right", color=plotting.MUTED,
                         fontsize=7.5)  # fmt: skip
            ax.set_xlabel(label)
        for ax in axes[len(panels) :]:
            ax.remove()
        words = f"at the best hidden state, which the numbers name; {plotting.INTERVAL}"
        place_legend(figure, _handles(), words=words)
    return plotting.freeze_layout(figure)


def _panels(rows: pd.DataFrame, by: By) -> list[tuple[str, pd.DataFrame]]:
    """Label of the x axis and rows of each panel, with the columns ``x`` (position) and ``tick``."""
    found = []
    tasks = sorted(
        dict.fromkeys(zip(rows["level"].astype(str), rows["task"].astype(str), strict=True)),
        key=lambda pair: level_order(pair[0]),
    )
    for _, task in tasks:
        own = rows[rows["task"] == task]
        if by == "n_train":
            for probe, part in own.groupby("probe", sort=False, observed=True):
                if part["n_train"].nunique() > 1:
                    part = part.sort_values("n_train")
                    ticks = [f"{int(n):,}" for n in part["n_train"]]
                    found.append(
                        (f"training items ({probe})", part.assign(x=part["n_train"].astype(float), tick=ticks))
                    )
            continue
        own = own[own["n_train"] == own["n_train"].max()]
        for family, part in own.groupby("family", sort=False):
            part = part[part["size"].notna()].sort_values("size")
            if len(part) < 2:
                continue
            ticks, sizes = [f"{int(s):,}" for s in part["size"]], part["size"].tolist()
            linear = own[own["family"] == "linear"]
            if family == "low-rank" and len(linear):
                part = pd.concat([part, linear])
                ticks, sizes = [*ticks, "full"], [*sizes, sizes[-1] ** 2 / sizes[-2]]
            axis = _AXIS.get(str(family).split(",")[0], "size")
            found.append((f"{axis} ({family})", part.assign(x=sizes, tick=ticks)))
    return found


def _panel(ax: Axes, part: pd.DataFrame) -> None:
    color = plotting.level_color(str(part["level"].iloc[0]))
    x = part["x"].to_numpy(float)
    for name, (_, style) in _lines(color).items():
        y = part[name].to_numpy(float)
        if np.isfinite(y).any():
            low, high = part[f"{name}_low"].to_numpy(float), part[f"{name}_high"].to_numpy(float)
            plotting.band(ax, x, low, high, color=style["color"], alpha=0.15)
            ax.plot(x, y, label=name, **style)
    for position, score, hidden in zip(x, part["score"], part["hidden"], strict=True):
        ax.annotate(str(int(hidden)), (position, score), xytext=(0, 3), textcoords="offset points", fontsize=6.5,
                    ha="center", color=plotting.MUTED)  # fmt: skip
    ax.set_xscale("log")
    ax.set_xticks(x, part["tick"].tolist())
    ax.set_xticks([], minor=True)
    ax.margins(x=0.12, y=0.15)


def _lines(color: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and style of the three lines, in the order in which they are drawn."""
    shared = {"markersize": 3.5, "linewidth": 1.2}
    return {
        "score": ("task", {**shared, "color": color, "marker": "o"}),
        "control": ("control task", {**shared, "color": plotting.MUTED, "marker": "s", "linestyle": (0, (4, 1.5))}),
        "selectivity": ("task − control", {**shared, "color": plotting.INK, "marker": "^", "linestyle": ":"}),
    }


def _handles() -> list[tuple[Any, str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = _lines(plotting.INK).values()
    handles: list[tuple[Any, str]] = [(Line2D([], [], **style), label) for label, style in lines]
    return [*handles, (Patch(facecolor=plotting.INK, alpha=0.15, linewidth=0), "95 % interval")]
