"""Table and figures of the measures beyond accuracy and bits (:mod:`probing.measures`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.config import MEASURES
from probing.panels import X_WORDS, place_legend
from probing.tables import MISSING, bracket, number, ordered_tasks, primary_split, reported, short_names
from spafit import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Tasks that one figure shows, at most: the first of each level in turn would hide which are missing, so the first.
MOST_PANELS = 24
TITLES = {
    "online-code": "Compression by the online code, with the control task’s",
    "variational-code": "Compression by the variational code, with the control task’s",
    "conditional": "Bits beyond the embeddings, and beyond the hidden state below",
    "mix": "Weights of the scalar mix, and what each hidden state adds to those below",
}
KEYS = ("stack", "site", "pooling")


def measure_rows(measures: pd.DataFrame, summaries: pd.DataFrame) -> list[dict[str, str]]:
    """One row per task (and site and pooling, where there are several) as texts, for the shell and the page.

    Compression is uniform code / code at its largest over hidden states, with the control task's there; bits beyond
    hidden state 0 are the largest over hidden states, a footnote like any maximum; expected layer, centre of gravity
    and K(s) are the mix's, where they are not suppressed.
    """
    rows = reported(measures)
    several = [c for c in KEYS if rows[c].nunique() > 1]
    names = short_names([t for _, t in ordered_tasks(rows)])
    found = []
    for _, task in ordered_tasks(rows):
        of_task = rows[rows["task"] == task]
        for key, own in of_task.groupby(list(KEYS), sort=False, observed=True):
            row = {"task": names[task]} | {c: str(v) for c, v in zip(KEYS, key, strict=True) if c in several}
            mix = summaries
            for column, value in (("task", task), ("probe", "mix"), *zip(KEYS, key, strict=True)):
                mix = mix[mix[column] == value] if len(mix) else mix
            for measure in MEASURES:
                if (measures["probe"] == measure).any():
                    row |= _cells(measure, own[own["probe"] == measure], mix)
            found.append(row)
    return found


def _cells(measure: str, own: pd.DataFrame, mix: pd.DataFrame) -> dict[str, str]:
    if measure == "conditional":
        split = primary_split(own, own["task"].iloc[0]) if len(own) else "test"
        best = _largest(own[(own["metric"] == "bits_beyond_first") & (own["split"] == split)], "none")
        text = MISSING if best is None else bracket(best["value"], best["ci_low"], best["ci_high"], digits=2)
        return {"bits beyond hidden 0": text, "beyond at": MISSING if best is None else str(best["hidden"])}
    if measure == "mix":
        statistics = mix[mix["control"] == "none"] if len(mix) else mix
        return {
            label: _statistic(statistics, metric, name)
            for label, metric, name in (
                ("expected layer", "cumulative_bits", "expected_layer_robust"),
                ("CoG, norm-corrected", "mix_weight", "cog_norm"),
                ("K(s)", "mix_weight", "kl_uniform"),
            )
        }
    codes = own[own["metric"] == "compression"]
    best = _largest(codes, "none")
    label = measure.removesuffix("-code")
    if best is None:
        return {f"{label} compression": MISSING, f"{label} at": MISSING, f"{label} control": MISSING}
    control = codes[(codes["control"] == "word-type") & (codes["hidden"] == best["hidden"])]["value"]
    return {
        f"{label} compression": bracket(best["value"], best["ci_low"], best["ci_high"], digits=2),
        f"{label} at": str(best["hidden"]),
        f"{label} control": number(float(control.iloc[0]), digits=2) if len(control) else MISSING,
    }


def _largest(rows: pd.DataFrame, control: str) -> dict[str, Any] | None:
    own = rows[rows["control"] == control]
    return None if own.empty else dict(own.iloc[int(own["value"].to_numpy().argmax())])


def _statistic(rows: pd.DataFrame, metric: str, name: str) -> str:
    own = rows[(rows["metric"] == metric) & (rows["statistic"] == name)] if len(rows) else rows
    if own.empty:
        return MISSING
    return bracket(*(float(own.iloc[0][c]) for c in ("value", "ci_low", "ci_high")), digits=2)


def measure_figure(measure: str, measures: pd.DataFrame, summaries: pd.DataFrame) -> Figure:
    """One panel per task: its curve over hidden states, or its mixing weights, at the first site and pooling.

    Args:
        measure: of :data:`probing.config.MEASURES`, one that the table holds.
        measures: rows of measures.
        summaries: summaries of the run, which the mix's marks come from.
    """
    from probing.mix_displays import weights_and_gains

    rows = measures[measures["probe"] == measure]
    for column in KEYS:
        rows = rows[rows[column] == rows[column].iloc[0]]
    tasks = [t for _, t in ordered_tasks(rows)][:MOST_PANELS]
    wide = measure == "mix"
    columns = min(2 if wide else 4, len(tasks))
    lines = -(-len(tasks) // columns)
    names = short_names(tasks)
    with plotting.style():
        figure = plotting.new_figure(
            width=max((5.4 if wide else 2.6) * columns, 5.2),
            height=(3.1 if wide else 2.0) * lines + (0.2 if wide else 1.0),
        )
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, task in zip(axes, tasks, strict=False):
            own = rows[rows["task"] == task]
            if wide:
                weights_and_gains(own, summaries[(summaries["task"] == task) & (summaries["probe"] == "mix")], ax=ax)
            else:
                _curves(ax, measure, reported(own))
            ax.set_title(names[task].replace("_", " "), loc="left")
        for ax in axes[len(tasks) :]:
            ax.remove()
        if not wide:
            handles, labels = axes[0].get_legend_handles_labels()
            bands = plotting.INTERVAL if measure == "conditional" else "spread over seeds alone, too narrow with few"
            place_legend(figure, list(zip(handles, labels, strict=True)), words=f"bands: {bands}; {X_WORDS}")
    return plotting.freeze_layout(figure)


def _curves(ax: Axes, measure: str, own: pd.DataFrame) -> None:
    blue, orange = plotting.MODEL_COLORS[:2]
    if measure == "conditional":
        own = own[own["split"] == primary_split(own, own["task"].iloc[0])]
        lines = [("bits_beyond_first", "none", "beyond hidden state 0", blue, "-"),
                 ("bits_beyond_below", "none", "beyond the hidden state below", orange, (0, (5, 1.5)))]  # fmt: skip
        zero, label = 0.0, "bits"
    else:
        lines = [("compression", "none", "task", blue, "-"),
                 ("compression", "word-type", "control task", plotting.MUTED, (0, (5, 1.5)))]  # fmt: skip
        zero, label = 1.0, "compression"
    for metric, control, words, color, style in lines:
        curve = own[(own["metric"] == metric) & (own["control"] == control)].sort_values("hidden")
        if curve.empty:
            continue
        x = curve["hidden"].to_numpy()
        low, high = (curve[c].to_numpy(float) for c in ("ci_low", "ci_high"))
        if np.isfinite(low).all():
            plotting.band(ax, x, low, high, color=color)
        ax.plot(x, curve["value"], color=color, linestyle=style, marker=".", markersize=4, label=words)
    ax.axhline(zero, color=plotting.MUTED, linewidth=0.9, linestyle=":", zorder=1)
    ax.set_xticks(plotting.hidden_ticks(0, int(own["hidden"].max()), most=7))
    ax.set_xlabel("hidden state")
    ax.set_ylabel(label)


def measure_markdown(measures: pd.DataFrame, summaries: pd.DataFrame) -> str:
    """:func:`measure_rows` as a table that pastes."""
    rows = measure_rows(measures, summaries)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(n, MISSING) for n in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
