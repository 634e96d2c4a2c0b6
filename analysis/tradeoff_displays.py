"""Figure of a trade-off: task score against forgetting, intervals as crosses, the Pareto front as steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spafit import plotting
from spafit.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

#: Marker, colour and whether it is filled, by finding; told apart without colour, too.
_LOOKS = {
    "front": ("o", plotting.MODEL_COLORS[0], True),
    "within noise": ("o", plotting.MODEL_COLORS[0], False),
    "dominated": ("s", plotting.MODEL_COLORS[1], False),
}
_SAID = {"front": "on the front", "within noise": "within noise of the front", "dominated": "dominated"}


def plot_tradeoff(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every method at its forgetting and score; the stepped line is the front by the means.

    Args:
        table: as :func:`analysis.tradeoffs.tradeoff_table` gives it. Methods without a score are not drawn; the title
            says how many.
        ax: axes to draw on; new ones by default.

    Raises:
        DataError: no method has a score.
    """
    known = table[table["score"].notna()]
    if known.empty:
        raise DataError("No method has a defined score, so there is nothing to draw.")
    if ax is None:
        ax = plotting.new_figure(width=6.8, height=4.6).add_subplot()
    x, y = 100 * known["forgetting"].to_numpy(float), known["score"].to_numpy(float)
    for finding, (marker, color, filled) in _LOOKS.items():
        own = known["finding"] == finding
        if not own.any():
            continue
        rows = known[own]
        errors = [_arms(rows, "forgetting", 100.0), _arms(rows, "score", 1.0)]
        ax.errorbar(
            x[own], y[own], xerr=errors[0], yerr=errors[1], fmt="none", ecolor=color, elinewidth=0.9, alpha=0.45,
            zorder=2,
        )  # fmt: skip
        ax.plot(
            x[own], y[own], marker, color=color, markersize=6, markerfacecolor=color if filled else plotting.PAPER,
            markeredgewidth=1.4, linestyle="none", label=_SAID[finding], zorder=4,
        )  # fmt: skip
    front = known[known["front"]].sort_values(["forgetting", "score"])
    ax.plot(
        100 * front["forgetting"], front["score"], drawstyle="steps-post", color=plotting.INK, linewidth=1.0,
        linestyle=(0, (4, 2)), label="front by the means", zorder=3,
    )  # fmt: skip
    ax.margins(0.12)
    ax.set_xlabel(f"forgetting: accuracy lost, points, mean of {int(known['n_tasks'].iloc[0])} tasks (← less)")
    ax.set_ylabel("task score (higher is better ↑)")
    left_out = len(table) - len(known)
    if left_out:
        ax.set_title(f"{left_out} method{'s' * (left_out > 1)} without a defined score left out", fontsize=8)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, fontsize=8)
    label_points(ax, x, y, [str(m) for m in known["method"]], lines=_lines(known, front))
    return ax


def _arms(rows: pd.DataFrame, name: str, factor: float) -> np.ndarray:
    """How far the interval reaches below and above, shape (2, methods); 0 where there is none."""
    ends = rows[[f"{name}_low", f"{name}_high"]].to_numpy(float) - rows[[name]].to_numpy(float)
    return np.nan_to_num(factor * np.abs(ends)).T


def _lines(known: pd.DataFrame, front: pd.DataFrame) -> np.ndarray:
    """Both ends of the arms and of the front's steps in data coordinates, shape (lines, 2, 2)."""
    found = []
    for row in known.to_dict("records"):
        f, s = 100 * row["forgetting"], row["score"]
        found.append([[100 * row["forgetting_low"], s], [100 * row["forgetting_high"], s]])
        if np.isfinite(row["score_low"]):
            found.append([[f, row["score_low"]], [f, row["score_high"]]])
    corners = np.column_stack([100 * front["forgetting"], front["score"]])
    for one, other in pairwise(corners):
        found += [[one.tolist(), [other[0], one[1]]], [[other[0], one[1]], other.tolist()]]
    return np.asarray(found, dtype=float)


def label_points(
    ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], *, lines: np.ndarray | None = None,
    fontsize: float = 7.5,
) -> None:  # fmt: skip
    """Write a name beside each point where neither another name nor a point stands; a thin line leads to a far one.

    Lines are avoided where there is room.

    Call it last: the places are those of the axes' limits and size as they are now.

    Args:
        ax: axes with everything else drawn.
        x: of the points, in data coordinates; likewise ``y``.
        y: see ``x``.
        names: one per point.
        lines: ends of horizontal and vertical lines in data coordinates, shape (lines, 2, 2).
        fontsize: points.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = ax.get_figure(root=True)
    assert figure is not None
    if figure.get_layout_engine() is not None:
        plotting.lay_out(figure)
    unit = figure.dpi / 72  # pixels in a point
    at = ax.transData.transform(np.column_stack([x, y]))
    taken = [Bbox.from_extents(px - 4 * unit, py - 4 * unit, px + 4 * unit, py + 4 * unit) for px, py in at]
    ends = np.zeros((0, 2, 2)) if lines is None else ax.transData.transform(lines.reshape(-1, 2)).reshape(-1, 2, 2)
    drawn = [Bbox([e.min(axis=0) - unit, e.max(axis=0) + unit]) for e in ends]
    inside = ax.get_window_extent()
    for i in np.lexsort((at[:, 0], -at[:, 1])):  # from the top down, so that crowds spread evenly
        text = ax.annotate(
            names[i], (x[i], y[i]), xytext=(0, 0), textcoords="offset points", fontsize=fontsize, color=plotting.INK,
            va="center", ha="left", zorder=5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": plotting.MUTED, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        text.set_in_layout(False)  # a name near the edge must not shrink the axes that it was placed by
        size = Text.get_window_extent(text)  # without the line, which an annotation's own extent has in it
        width, height = size.width / unit, size.height / unit
        best, least, place = (8.0, 0.0), np.inf, size
        for dx, dy in _offsets(width, height):
            left, low = at[i, 0] + dx * unit, at[i, 1] + (dy - 0.5 * height) * unit
            box = Bbox.from_bounds(left, low, size.width, size.height)
            cost = sum(_overlap(box, other) for k, other in enumerate(taken) if k != i) + _outside(box, inside)
            cost += 0.1 * sum(_overlap(box, line) for line in drawn) + 0.02 * size.height * np.hypot(dx, dy)
            if cost < least:
                best, least, place = (dx, dy), cost, box
        text.set_position(best)
        taken.append(place)
        if abs(best[1]) <= 1.3 * height and -width - 12 <= best[0] <= 12:  # near enough to need no line
            text.arrow_patch.set_visible(False)  # type: ignore[union-attr]


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Places of a name's left middle relative to its point, in points, from near to far."""
    found = []
    for ring in range(12):
        rise = ring * 0.55 * height
        for dy in (rise, -rise) if ring else (0.0,):
            found += [(7.0 + 2 * ring, dy), (-7.0 - 2 * ring - width, dy)]
            if abs(dy) >= 0.9 * height:
                found += [(3.0, dy), (-3.0 - width, dy), (-0.5 * width, dy)]
    return found


def _overlap(one: Bbox, other: Bbox) -> float:
    """Shared area in pixels."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(wide, 0.0) * max(high, 0.0)


def _outside(box: Bbox, axes: Bbox) -> float:
    """Area of the box beyond the axes, in pixels."""
    return float(box.width * box.height - _overlap(box, axes))
