"""Several models' or treebanks' curves side by side over relative depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from probing.displays import Metric
from probing.panels import LINES, metric_words, number_range, place_legend, select
from probing.tables import curve_rows, ordered_tasks, primary_split, short_names, variants
from spafit import plotting
from spafit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def relative_depth(
    models: Mapping[str, pd.DataFrame], *, metric: Metric = "bits", stack: str | None = None, site: str | None = None
) -> Figure:
    """Several models' curves over relative depth (hidden index / number of blocks), a panel per task that they share.

    Args:
        models: scores by the name to show. Depths are those of a column ``relative_depth`` where there is one, else
            hidden indices divided by the largest one.
        metric: which score.
        stack: needed where a table has several; must exist in all.
        site: likewise.

    Raises:
        UsageError: no model, no task in common, or as :func:`layer_curves`.
    """
    from matplotlib.lines import Line2D

    if not models:
        raise UsageError("No score tables were given. Give at least one, by the name to show.")
    tables = {name: select(s, metric=metric, stack=stack, site=site) for name, s in models.items()}
    common = set.intersection(*(set(t["task"]) for t in tables.values()))
    tasks = [p for p in ordered_tasks(next(iter(tables.values()))) if p[1] in common]
    if not tasks:
        raise UsageError(f"{', '.join(models)} have no task in common, so there is nothing to compare.")
    names, words_of_metric = short_names([t for _, t in tasks]), metric_words(next(iter(tables.values())), metric)
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    with plotting.style():
        figure = plotting.new_figure(width=max(2.55 * columns + 0.4, 5.2), height=1.75 * lines + 1.35)
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
        for ax, (level, task) in zip(axes, tasks, strict=False):
            for i, rows in enumerate(tables.values()):
                color, deepest = plotting.MODEL_COLORS[i % len(plotting.MODEL_COLORS)], max(rows["hidden"].max(), 1)
                for k, variant in enumerate(variants(rows, task)):
                    split = primary_split(rows, task)
                    own = curve_rows(rows, task=task, variant=variant, control="none", metric=metric, split=split)
                    x = (own["relative_depth"] if "relative_depth" in own else own["hidden"] / deepest).to_numpy()
                    plotting.band(ax, x, own["ci_low"].to_numpy(float), own["ci_high"].to_numpy(float), color=color)
                    ax.plot(
                        x,
                        own["value"],
                        color=color,
                        linestyle=LINES[k % len(LINES)],
                        zorder=3,
                        marker=".",
                        markersize=4,
                    )
            ax.set_title(
                names[task].replace("_", " "),
                loc="left",
                color=plotting.level_color(level),
                fontweight="bold",
                fontsize=9,
            )
            ax.set_xlim(-0.03, 1.03)
            ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            if metric == "bits":
                ax.axhline(0, color=plotting.MUTED, linewidth=0.9, linestyle=":", zorder=1.8)
        for i, ax in enumerate(axes):
            if i >= len(tasks):
                ax.remove()
            elif i % columns == 0:
                ax.set_ylabel(words_of_metric)
            if i < len(tasks) <= i + columns:
                ax.tick_params(labelbottom=True)
                ax.set_xlabel("relative depth")
        handles = [
            (Line2D([], [], color=plotting.MODEL_COLORS[i % len(plotting.MODEL_COLORS)]), _blocks(name, rows))
            for i, (name, rows) in enumerate(tables.items())
        ]
        n = pd.concat([t.loc[t["task"].isin(common), "n"] for t in tables.values()])
        words = (
            f"{words_of_metric}; bands: {plotting.INTERVAL}; n = {number_range(n)} test items per task; "
            "relative depth = hidden index / blocks (0 = embeddings, 1 = output of the last block)"
        )
        place_legend(figure, handles, words=words)
    return plotting.freeze_layout(figure)


def _blocks(name: str, rows: pd.DataFrame) -> str:
    """The name with the number of blocks, as far as hidden states reach them."""
    share = rows["relative_depth"].max() if "relative_depth" in rows else 1.0
    return f"{name} ({round(int(rows['hidden'].max()) / share) if share else 0} blocks)"
