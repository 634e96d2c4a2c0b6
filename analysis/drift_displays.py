"""Figures of drift: similarity by hidden state, and of every pair of hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spafit import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Name, colour and marker of each measure.
MEASURES = {
    "cka": ("debiased CKA", "#0072B2", "o"),
    "procrustes_r2": ("R² of a rigid map, held out", "#D55E00", "s"),
    "mutual_knn": ("shared nearest neighbours", "#009E73", "^"),
}


def plot_drift(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Each measure by hidden state with its interval; z-scored states as full lines, raw ones dashed.

    Args:
        table: rows of :func:`analysis.drift.drift_table`, of one model.
        ax: axes to draw on; new ones by default.
    """
    if ax is None:
        ax = plotting.new_figure(width=6.4, height=3.6).add_subplot()
    for measure, (label, color, marker) in MEASURES.items():
        for variant, line in (("z-scored", "-"), ("raw", "--")):
            own = table[(table["measure"] == measure) & (table["variant"] == variant)].sort_values("hidden")
            if not len(own):
                continue
            ax.plot(own["hidden"], own["value"], line, color=color, marker=marker, markersize=4, linewidth=1.3,
                    label=f"{label}, {variant}")  # fmt: skip
            if variant == "z-scored":
                ax.fill_between(own["hidden"], own["ci_low"], own["ci_high"], color=color, alpha=0.18, linewidth=0)
    hidden = table["hidden"]
    ax.set_xticks(plotting.hidden_ticks(int(hidden.min()), int(hidden.max())))
    ax.set_xlabel("hidden state (0 = embeddings)")
    ax.set_ylabel("similarity (1 = unchanged)")
    low = float(np.nanmin(table["value"].to_numpy())) if table["value"].notna().any() else 0.0
    ax.set_ylim(max(-1.0, min(-0.02, low - 0.05)), 1.05)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return ax


def plot_cka_map(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Debiased CKA of every hidden state before (rows) with every one after (columns).

    Args:
        table: rows of :func:`analysis.drift.cka_heat_map`, of one model.
        ax: axes to draw on; new ones by default.
    """
    if ax is None:
        ax = plotting.new_figure(width=4.6, height=4.0).add_subplot()
    square = table.pivot(index="hidden", columns="hidden2", values="value")
    image = ax.imshow(square.to_numpy(), cmap="cividis", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    ticks = plotting.hidden_ticks(0, len(square) - 1)
    ax.set_xticks(ticks, [str(square.columns[t]) for t in ticks])
    ax.set_yticks(ticks, [str(square.index[t]) for t in ticks])
    ax.set_xlabel("hidden state after")
    ax.set_ylabel("hidden state before")
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=ax, shrink=0.9).set_label("debiased CKA, raw states")
    return ax
