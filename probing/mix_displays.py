"""The figure of a scalar mix: mixing weights per hidden state, with what each layer adds to those below it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spafit import plotting
from spafit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def weights_and_gains(
    scores: pd.DataFrame, summaries: pd.DataFrame, *, control: str = "none", ax: Axes | None = None
) -> Axes:
    """Bars of mixing weights (filled) beside differential scores (outlined), as in Tenney et al. 2019, figure 2.

    Both are shares: weights sum to one, and so do the absolute values of the gains. Whiskers are 95 % intervals. The
    centre of gravity and the robust expected layer stand above, where they are not suppressed.

    Args:
        scores: scores of one task, as in :class:`probing.mixes.MixResult`.
        summaries: its summaries.
        control: the label set that is shown.
        ax: axes to draw into; a new figure if None.

    Raises:
        UsageError: the scores hold no mixing weights.
    """
    shown = scores[scores["seed"].isna() & (scores["control"] == control)].sort_values("hidden")
    weights, gains = (shown[shown["metric"] == m] for m in ("mix_weight", "differential_bits"))
    if weights.empty:
        raise UsageError(f"These scores hold no mixing weights of control {control!r}; run a scalar mix first.")
    with plotting.style():
        if ax is None:
            ax = plotting.new_figure(width=5.6, height=3.0).add_subplot()
        whisker = {"ecolor": plotting.INK, "elinewidth": 0.9, "capsize": 1.8}
        blue, orange = plotting.MODEL_COLORS[:2]
        ax.bar(
            weights["hidden"] - 0.2, weights["value"], width=0.38, color=blue, label="weight in the mix of all",
            yerr=_whiskers(weights, 1.0), error_kw=whisker,
        )  # fmt: skip
        total = float(gains["value"].abs().sum())
        if total > 0:
            ax.bar(
                gains["hidden"] + 0.2, gains["value"] / total, width=0.38, facecolor="none", edgecolor=orange,
                linewidth=1.3, hatch="////", label=f"gain over the layers below, share of {total:.2f} bits",
                yerr=_whiskers(gains, total), error_kw=whisker,
            )  # fmt: skip
        ax.axhline(0, color=plotting.MUTED, linewidth=0.8)
        first, last = int(weights["hidden"].min()), int(weights["hidden"].max())
        ax.set_xticks(plotting.hidden_ticks(first, last, most=13))
        ax.set_xlabel("hidden state (0: embeddings)")
        ax.set_ylabel("share")
        found = summaries[
            (summaries["control"] == control) & summaries["metric"].isin(["mix_weight", "cumulative_bits"])
        ]
        values = dict(zip(found["statistic"], found["value"], strict=True))
        low, high = ax.get_ylim()
        ax.set_yticks([t for t in ax.get_yticks() if low <= t <= high])
        ax.set_ylim(low, high + 0.34 * (high - low))  # room for the marks and the legend
        marks = (("cog", "centre of weights", blue, 0.80), ("expected_layer_robust", "expected layer", orange, 0.72))
        shown_marks = sorted((values[m[0]], *m[1:]) for m in marks if np.isfinite(values.get(m[0], np.nan)))
        for i, (value, words, color, height) in enumerate(shown_marks):
            ax.axvline(value, ymax=height, color=color, linestyle=(0, (4, 2)), linewidth=1.1, zorder=0)
            outwards = i if len(shown_marks) > 1 else value < (first + last) / 2  # away from the other mark
            ax.text(
                value, height, f" {words} {value:.1f} ", transform=ax.get_xaxis_transform(),
                ha="left" if outwards else "right", va="top", fontsize=8, color=color,
            )  # fmt: skip
        ax.legend(loc="upper center", ncols=2, borderaxespad=0.1, columnspacing=1.2, handlelength=1.4)
        ax.set_title(f"{shown['task'].iloc[0]}" + ("" if control == "none" else f" ({control})"), loc="left")
    return ax


def _whiskers(rows: pd.DataFrame, total: float) -> np.ndarray | None:
    ends = np.stack([rows["value"] - rows["ci_low"], rows["ci_high"] - rows["value"]]) / total
    return np.maximum(ends, 0) if np.isfinite(ends).all() else None
