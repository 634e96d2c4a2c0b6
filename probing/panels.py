"""What the figures of layer curves share: which rows are drawn, line styles, captions and legends."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from probing.metrics import shown_metric
from probing.tables import VARIANT, ordered_tasks, primary_split, variants
from spafit import plotting
from spafit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
X_LABEL = "hidden state"
X_WORDS = "hidden state 0 = embeddings, k + 1 = output of block k"


def select(
    scores: pd.DataFrame,
    *,
    metric: str,
    stack: str | None = None,
    site: str | None = None,
    tasks: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The reported rows of one metric at one stack and site; ``primary`` is the metric that suits each task.

    The column ``shown`` names that metric; ``chance`` is missing where the rows hold another.

    Raises:
        UsageError: no such rows, or several stacks or sites and none named.
    """
    rows = scores[scores["seed"].isna()]
    shown = rows.groupby("task")["metric"].agg(shown_metric)
    own = rows["task"].map(shown)
    rows = rows.assign(chance=rows["chance"].where(rows["metric"] == own), shown=own)
    if metric == "primary":
        rows = rows[rows["metric"] == own].assign(metric="primary")
    else:
        rows = rows[rows["metric"] == metric]
    for task in tasks or ():
        if task not in set(rows["task"]):
            raise UsageError(
                f"No task {task!r} with metric {metric!r} in this table.{did_you_mean(task, set(rows['task']))}"
            )
    if tasks is not None:
        rows = rows[rows["task"].isin(list(tasks))]
    for column, value in (("stack", stack), ("site", site)):
        present = list(dict.fromkeys(rows[column].astype(str)))
        if value is None and len(present) > 1:
            raise UsageError(f"The table has several values of {column}: {', '.join(present)}. Choose with {column}=….")
        if value is not None and value not in present:
            raise UsageError(f"No {column} {value!r} in this table. It has: {', '.join(present) or 'no rows'}.")
        if value is not None:
            rows = rows[rows[column] == value]
    if rows.empty:
        raise UsageError(f"The table has no rows over all seeds with metric {metric!r}; there is nothing to draw.")
    return rows


def as_shares(rows: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """The rows with (score − chance) divided by its largest value per task and variant; chance becomes 0."""
    rows = rows.copy()
    base = pd.Series(0.0, index=rows.index) if metric == "bits" else rows["chance"].fillna(0.0)
    own = (rows["value"] - base).where(rows["control"] == "none")
    primary = rows["task"].map({t: primary_split(rows, t) for t in rows["task"].unique()})
    own = own.where(rows["split"] == primary)
    top = own.groupby([rows[c] for c in ("task", *VARIANT)], sort=False).transform("max")
    for column in ("value", "ci_low", "ci_high"):
        rows[column] = ((rows[column] - base) / top.where(top > 0)).astype(float)
    return rows.assign(chance=0.0)


def share_words(metric: str) -> str:
    """What the axis of :func:`as_shares` says."""
    words = {"bits": "bits saved", "accuracy": "accuracy above chance", "primary": "score above chance"}
    return "share of the task's best " + words.get(metric, metric)


def metric_words(rows: pd.DataFrame, metric: str) -> str:
    """What the axis of a metric says; of ``primary``, what all tasks of the figure have, else ``score``."""
    shown = set(rows["shown"]) if metric == "primary" else {metric}
    return plotting.METRIC_LABELS[shown.pop()] if len(shown) == 1 else "score"


def variant_name(rows: pd.DataFrame, variant: Sequence[str]) -> str:
    """What tells this curve from the others of the figure's tasks, for example its pooling; empty if nothing does."""
    several = [c for c in VARIANT if (rows.groupby("task")[c].nunique() > 1).any()]
    return " · ".join(v for c, v in zip(VARIANT, variant, strict=True) if c in several)


def line_styles(rows: pd.DataFrame) -> dict[str, Any]:
    """A line style for each variant name that occurs in the figure."""
    names = dict.fromkeys(variant_name(rows, v) for _, t in ordered_tasks(rows) for v in variants(rows, t))
    return {name: LINES[i % len(LINES)] for i, name in enumerate(names)}


def hidden_axis(ax: Axes, rows: pd.DataFrame, *, most: int) -> None:
    """Limits and integer ticks for an axis of hidden states."""
    first, last = int(rows["hidden"].min()), int(rows["hidden"].max())
    pad = 0.015 * (last - first) + 0.05
    ax.set_xlim(first - pad, last + pad)
    ax.set_xticks(plotting.hidden_ticks(first, last, most=most))


def caption(rows: pd.DataFrame, unit: str) -> str:
    """The caption: unit, interval, number of fits and of items, and what the x axis counts."""
    fits, n = rows.loc[rows["control"] == "none", "n_seeds"], rows["n"]
    seeds = f"{number_range(fits)} distinct fit{'s' if fits.max() > 1 else ''} per point"
    return f"{unit}; {plotting.INTERVAL} ({seeds}); n = {number_range(n)} test items per task; {X_WORDS}"


def number_range(values: pd.Series) -> str:
    """``1,200`` or ``1,200–2,400``."""
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def curve_legend(
    figure: Figure,
    kinds: set[str],
    lines: Mapping[str, Any],
    *,
    metric: str,
    words: str,
    strata: Sequence[plotting.StratumLike],
) -> None:
    """Legend of layer curves below the figure: the kinds of line drawn, then the strata, under the caption."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ink, muted = plotting.INK, plotting.MUTED
    handles: list[tuple[Any, str]] = [
        (Line2D([], [], color=ink, linewidth=1.8, linestyle=dashes), name or "probe on the model")
        for name, dashes in lines.items()
    ]
    handles.append((Patch(facecolor=ink, alpha=0.2, linewidth=0), "95 % interval"))
    for extra in sorted(kinds - {"own", "random-encoder", "word-type", "chance", "linear chain"}):
        label = "unseen word types" if extra == "unseen" else f"split {extra}"
        handles.append((Line2D([], [], color=ink, linewidth=1.0, linestyle=(0, (1.5, 1))), label))
    if "random-encoder" in kinds:
        handles.append((Line2D([], [], color=muted, linewidth=1.1, linestyle=(0, (4, 2))), "random encoder"))
    if "word-type" in kinds:
        handles.append((Line2D([], [], color=muted, linewidth=1.1, linestyle=(0, (3, 1.5, 1, 1.5))), "control task"))
    labels = ["label frequencies only" if metric == "bits" else "majority class"] if "chance" in kinds else []
    labels += ["linear chain"] if "linear chain" in kinds else []  # drawn alike: each panel has one of the two
    if labels:
        handles.append((Line2D([], [], color=muted, linewidth=0.9, linestyle=":"), " / ".join(labels)))
    for s in strata:
        if s.blocks[1] > s.blocks[0]:
            patch = Patch(facecolor=(*rgb(ink), plotting.stratum_shade(s.method)), edgecolor=muted, linewidth=0.6)
            handles.append((patch, plotting.stratum_label(s)))
    place_legend(figure, handles, words=words)


def place_legend(figure: Figure, handles: Sequence[tuple[Any, str]], *, words: str) -> None:
    """Put labelled handles below the figure in balanced rows, with ``words`` above them."""
    width = figure.get_size_inches()[0]
    most = max(2, int(width / (0.55 + 0.075 * max(len(t) for _, t in handles))))
    rows = -(-len(handles) // most)
    figure.legend(
        [h for h, _ in handles], [t for _, t in handles], loc="outside lower center", ncols=-(-len(handles) // rows),
        title=textwrap.fill(words, int(width * 16.5)), title_fontsize=7.5, handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip


def rgb(color: str) -> tuple[float, float, float]:
    """Red, green and blue of a colour, from 0 to 1."""
    from matplotlib.colors import to_rgb

    return to_rgb(color)
