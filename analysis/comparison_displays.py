"""Figures of a comparison: what was lost, moved and re-encoded by hidden state, and the map of losses by task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spafit import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of the parts (colour-blind-safe; told apart in grey by their lightness and hatching).
PARTS = {"lost": ("#D55E00", ""), "moved": ("#56B4E9", "//"), "re-encoded": ("#F0E442", "..")}


def score_unit(rows: pd.DataFrame) -> tuple[float, str]:
    """What values are multiplied by, and the unit that they are then in."""
    return (100.0, "points") if rows["metric"].iloc[0] == "accuracy" else (1.0, "bits")


def plot_forgetting(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Stacked parts of what the old probes no longer score, by hidden state; positive parts up, negative ones down.

    Args:
        rows: of one model, metric and split (:meth:`analysis.comparison.Comparison.to_pandas`); several tasks are
            averaged.
        ax: axes to draw on; new ones by default.
    """
    if ax is None:
        ax = plotting.new_figure(width=6.4, height=3.6).add_subplot()
    n_tasks = rows["task"].nunique()
    mean = rows.groupby(["hidden", "term"])["value"].mean().unstack("term")
    hidden = mean.index.to_numpy()
    factor, unit = score_unit(rows)
    up, down = np.zeros(len(hidden)), np.zeros(len(hidden))
    for term, (color, hatch) in PARTS.items():
        value = mean[term].fillna(0.0).to_numpy() * factor
        bottom = np.where(value >= 0, up, down)
        ax.bar(
            hidden, value, bottom=bottom, width=0.72, color=color, hatch=hatch, edgecolor="#333333", linewidth=0.5,
            label=term,
        )  # fmt: skip
        up, down = up + np.maximum(value, 0), down + np.minimum(value, 0)
    ax.plot(hidden, mean["total"] * factor, "D", color="#000000", markersize=4, label="before − transfer (the sum)")
    ax.axhline(0, color="#333333", linewidth=0.8)
    ax.set_xticks(plotting.hidden_ticks(int(hidden.min()), int(hidden.max())))
    ax.set_xlabel("hidden state (0 = embeddings)")
    metric = "accuracy" if unit == "points" else "saved"
    ax.set_ylabel(f"{metric} above control, {unit}" if (rows["control"] != "none").any() else f"{metric}, {unit}")
    what = rows["task"].iloc[0] if n_tasks == 1 else f"mean of {n_tasks} tasks"
    ax.set_title(f"{rows['model'].iloc[0]}: {what}")
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
    return ax


def forgetting_figure(rows: pd.DataFrame) -> Figure:
    """:func:`plot_forgetting` for every model in ``rows``, side by side on one scale."""
    models = list(dict.fromkeys(rows["model"]))
    columns = min(len(models), 2)
    lines = -(-len(models) // columns)
    figure = plotting.new_figure(width=6.0 * columns, height=3.7 * lines)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for ax, model in zip(axes.flat, models, strict=False):
        plot_forgetting(rows[rows["model"] == model], ax=ax)
    for ax in list(axes.flat)[len(models) :]:
        ax.remove()
    plotting.lay_out(figure)
    return figure


def loss_map(rows: pd.DataFrame) -> Figure:
    """Loss of every task at every hidden state, a panel per model; dots mark p < .05 over hidden states."""
    from matplotlib.colors import TwoSlopeNorm

    models, lost = list(dict.fromkeys(rows["model"])), rows[rows["term"] == "lost"]
    tasks = list(dict.fromkeys(rows["task"]))
    factor, unit = score_unit(rows)
    limit = max(0.05 * factor, float(factor * lost["value"].abs().max()))
    figure = plotting.new_figure(width=2.6 + 3.4 * len(models), height=max(3.2, 1.5 + 0.27 * len(tasks)))
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    image = None
    for ax, model in zip(axes, models, strict=True):
        own = lost[lost["model"] == model].pivot_table(
            index="task", columns="hidden", values=["value", "p_layers"], sort=False, dropna=False
        )
        value = factor * own["value"].reindex(tasks)
        image = ax.imshow(
            value.to_numpy(), aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), interpolation="nearest"
        )
        marked = np.argwhere((own["p_layers"].reindex(tasks) < 0.05).to_numpy())
        ax.plot(marked[:, 1], marked[:, 0], ".", color="#000000", markersize=4)
        ticks = plotting.hidden_ticks(int(value.columns.min()), int(value.columns.max()))
        ax.set_xticks([list(value.columns).index(t) for t in ticks if t in value.columns], ticks)
        ax.set_yticks(range(len(tasks)), tasks)
        ax.set_xlabel("hidden state")
        ax.set_title(model, fontsize=9)
        for side in ax.spines.values():
            side.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), shrink=0.9)
    bar.set_label(f"lost, {unit} (dot: p < .05)")
    return figure
