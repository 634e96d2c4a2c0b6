"""Pictures of a choice of boundaries: the triangle of all pairs, and what a race confirmed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spafit import plotting
from spafit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.boundary_choice import BoundaryChoice
    from analysis.race_result import RaceResult


def plot_triangle(choice: BoundaryChoice, *, ax: Axes | None = None) -> Axes:
    """Regret of every pair (s1, s2): dark is better, crossed out beyond a limit, ringed within one standard error.

    A star marks the choice, a triangle the largest gain.

    Raises:
        UsageError: other than three strata.
    """
    if len(choice.strata) != 3:
        raise UsageError(f"The triangle shows pairs of boundaries, and there are {len(choice.strata)} strata.")
    table, blocks = choice.table, choice.evidence.num_blocks
    grid = np.full((blocks + 1, blocks + 1), np.nan)
    grid[table["s2"], table["s1"]] = table["regret"].clip(lower=0)
    with plotting.style():
        if ax is None:
            ax = plotting.new_figure(width=5.6, height=4.8).subplots()
        image = ax.imshow(grid, origin="lower", cmap="cividis", aspect="equal")
        figure = ax.get_figure()
        assert figure is not None
        figure.colorbar(image, ax=ax, label="regret (share of the gain of training everything)", shrink=0.85)
        size = 36 if blocks <= 12 else 12
        out = table[~table["feasible"]]
        ax.scatter(out["s1"], out["s2"], marker="x", s=size, color="white", linewidths=1, label="beyond a limit")
        region = table[table["in_region"]]
        ax.scatter(
            region["s1"], region["s2"], s=2 * size, facecolors="none", edgecolors="white", linewidths=1.4,
            label="within one standard error",
        )  # fmt: skip
        s1, s2 = choice.boundaries
        ax.scatter([s1], [s2], marker="*", s=4 * size, color="white", edgecolors="black", label="chosen", zorder=3)
        best = choice.at(choice.best)
        if best != choice.boundaries:
            ax.scatter(
                [best[0]], [best[1]], marker="^", s=1.5 * size, color="white", edgecolors="black",
                label="largest gain", zorder=3,
            )  # fmt: skip
        ax.set(xlabel=f"s1: first block of {choice.strata[1]}", ylabel=f"s2: first block of {choice.strata[2]}")
        ticks = np.arange(0, blocks + 1, max(1, blocks // 12))
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
        handles = ax.get_legend_handles_labels()
        legend = ax.legend(*handles, loc="lower right", fontsize="small", frameon=True, framealpha=1, facecolor="0.35")
        for text in legend.get_texts():
            text.set_color("white")
    return ax


def plot_race(result: RaceResult, *, ax: Axes | None = None) -> Axes:
    """Confirmed differences, suggestion less baseline, with paired intervals; without any, the last rung's scores.

    Raises:
        UsageError: nothing was trained.
    """
    if result.trials.empty:
        raise UsageError("The race has trained nothing yet, so there is nothing to draw.")
    with plotting.style():
        if len(result.comparison):
            rows = result.comparison.sort_values("difference", ascending=False)
            if ax is None:
                ax = plotting.new_figure(width=6.0, height=1.2 + 0.45 * len(rows)).subplots()
            at = np.arange(len(rows))
            spread = np.abs(rows[["ci_low", "ci_high"]].to_numpy() - rows[["difference"]].to_numpy()).T
            ax.errorbar(rows["difference"], at, xerr=spread, fmt="o", color=plotting.MODEL_COLORS[0], capsize=3)
            ax.axvline(0, color="0.4", linewidth=1)
            ax.set_yticks(at, [f"less {b}" for b in rows["baseline"]])
            ax.set(
                xlabel=f"{rows['suggestion'].iloc[0]}: difference in score, 95 % interval", ylim=(len(rows) - 0.5, -0.5)
            )
            return ax
        table = result.to_pandas().dropna(axis=1, how="all")
        stage = [c for c in map(str, table) if c.startswith("rung-")][-1]
        rows = table.dropna(subset=[stage])
        if ax is None:
            ax = plotting.new_figure(width=6.0, height=1.2 + 0.3 * len(rows)).subplots()
        colors = [plotting.MODEL_COLORS[0 if r == "suggestion" else 1] for r in rows["role"]]
        ax.barh(rows["candidate"], rows[stage], color=colors)
        ax.invert_yaxis()
        ax.set(xlabel=f"score on held-out training items, {stage}")
    return ax
