"""Figures of cause and use by block, and of everything that was measured by hidden state, one panel under the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.comparison_displays import PARTS, score_unit
from analysis.task_tables import reverted
from spafit import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.comparison import Comparison

#: Colour, hatching and marker of each branch; told apart in grey by their lightness.
BRANCHES = {"attention": ("#0072B2", "", "o"), "feed-forward": ("#E69F00", "//", "s")}
#: Label, colour, line and marker of each eraser.
ERASERS = {
    "leace": ("the label (LEACE)", "#D55E00", "-", "o"),
    "random": ("random, same rank", "#999999", "--", "s"),
    "equal-variance": ("random, same variance", "#0072B2", ":", "^"),
}


@plotting.style()
def cause_figure(table: pd.DataFrame) -> Figure:
    """Points of score lost, a row per model: blocks reverted (left), skipped and resampled branches (right).

    Args:
        table: the table ``causal`` of a comparison.
    """
    models = list(dict.fromkeys(table["model"]))
    figure = plotting.new_figure(width=11.0, height=3.5 * len(models))
    axes = figure.subplots(len(models), 2, squeeze=False)
    for (left, right), model in zip(axes, models, strict=True):
        own = table[table["model"] == model]
        _reverted(left, own)
        _taken_away(right, own)
        left.set_title(f"{model}: blocks as before training")
        right.set_title(f"{model}: without what a branch computes")
    figure.legend(*axes[-1][0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    figure.legend(*axes[-1][1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    plotting.lay_out(figure)
    return figure


def _reverted(ax: Axes, own: pd.DataFrame) -> None:
    single = reverted(own, "single")
    blocks, lost = single["blocks_start"].to_numpy(), -100 * single["effect"].to_numpy()
    ends = np.abs(np.stack([-100 * single["ci_high"] - lost, -100 * single["ci_low"] - lost]))
    ax.bar(
        blocks, lost, width=0.6, color="#D55E00", edgecolor="#333333", linewidth=0.5, yerr=ends,
        error_kw={"elinewidth": 0.9, "ecolor": plotting.INK}, label="this block alone (95 %)",
    )  # fmt: skip
    for kind, at, label, color, style, marker in (
        ("prefix", "blocks_stop", "this and all below", "#0072B2", "--", "o"),
        ("suffix", "blocks_start", "this and all above", "#009E73", ":", "^"),
    ):
        rows = reverted(own, kind)  # type: ignore[arg-type]
        x = rows[at].to_numpy() - (kind == "prefix")
        ax.plot(x, -100 * rows["effect"], style, color=color, marker=marker, markersize=4.5, label=label)
    _block_axis(ax, blocks, "score lost, points")


def _taken_away(ax: Axes, own: pd.DataFrame) -> None:
    rows = own[own["metric"] == "score"]
    whole = rows[(rows["intervention"] == "skip") & (rows["part"] == "block")].sort_values("blocks_start")
    blocks = whole["blocks_start"].to_numpy()
    ax.plot(blocks, -100 * whole["effect"], "-", color=plotting.INK, marker="D", markersize=4, label="block skipped")
    for part, (color, _, marker) in BRANCHES.items():
        for intervention, style, filled in (("skip", "-", color), ("resample", "--", "none")):
            its = rows[(rows["intervention"] == intervention) & (rows["part"] == part)]
            mean = its.groupby("blocks_start")["effect"].mean()
            if len(mean):
                label = f"{part} {'skipped' if intervention == 'skip' else 'of another item'}"
                ax.plot(
                    mean.index, -100 * mean, style, color=color, marker=marker, markersize=4.5, label=label,
                    markerfacecolor=filled,
                )  # fmt: skip
    _block_axis(ax, blocks, "")


@plotting.style()
def erasure_figure(table: pd.DataFrame) -> Figure:
    """Points of score lost by erasing each task's label and by both controls; a row per model, a panel per task.

    Args:
        table: the table ``erasure`` of a comparison.
    """
    models, tasks = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["task"]))
    rows = table[table["metric"] == "score"]
    figure = plotting.new_figure(width=1.4 + 3.6 * len(tasks), height=1.0 + 2.7 * len(models))
    axes = figure.subplots(len(models), len(tasks), squeeze=False, sharey=True, sharex=True)
    for line, model in zip(axes, models, strict=True):
        for ax, task in zip(line, tasks, strict=True):
            own = rows[(rows["model"] == model) & (rows["task"] == task)]
            for eraser, (label, color, style, marker) in ERASERS.items():
                its = own[own["eraser"] == eraser].groupby("hidden")[["effect", "ci_low", "ci_high"]].mean()
                if its.empty:
                    continue
                ax.plot(its.index, -100 * its["effect"], style, color=color, marker=marker, markersize=4.5, label=label)
                if eraser == "leace":
                    plotting.band(
                        ax, its.index.to_numpy(), -100 * its["ci_high"].to_numpy(), -100 * its["ci_low"].to_numpy(),
                        color=color, alpha=0.15,
                    )  # fmt: skip
            ax.axhline(0, color=plotting.MUTED, linewidth=0.8)
            ax.set_title(f"{model}: {task}")
            ax.set_xlabel("hidden state")
            ax.set_xticks(plotting.hidden_ticks(int(own["hidden"].min()), int(own["hidden"].max())))
        line[0].set_ylabel("score lost, points")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=1 if len(tasks) == 1 else 3)
    plotting.lay_out(figure)
    return figure


@plotting.style()
def use_figure(table: pd.DataFrame) -> Figure:
    """Conductance by block and branch, a row per model: Σ|·| (left) and the signed sum (right), with intervals.

    Args:
        table: the table ``use`` of a comparison.
    """
    models = list(dict.fromkeys(table["model"]))
    figure = plotting.new_figure(width=11.0, height=3.3 * len(models))
    axes = figure.subplots(len(models), 2, squeeze=False)
    labels = {"abs_sum": "Σ|conductance|, logits", "sum": "Σ conductance, logits"}
    titles = {"abs_sum": "size of all contributions", "sum": "towards (+) or away from (−) the decision"}
    for line, model in zip(axes, models, strict=True):
        own = table[table["model"] == model]
        for ax, (statistic, label) in zip(line, labels.items(), strict=True):
            _branch_bars(ax, own[own["statistic"] == statistic])
            _block_axis(ax, own["block"].unique(), label)
            ax.set_title(f"{model}: {titles[statistic]}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    plotting.lay_out(figure)
    return figure


def _branch_bars(ax: Axes, own: pd.DataFrame, *, shift: float = 0.0) -> None:
    for i, (branch, (color, hatch, _)) in enumerate(BRANCHES.items()):
        its = own[own["branch"] == branch].sort_values("block")
        value = its["value"].to_numpy()
        ends = np.abs(np.stack([value - its["ci_low"], its["ci_high"] - value]))
        ax.bar(
            its["block"] + shift + (i - 0.5) * 0.36, value, width=0.34, color=color, hatch=hatch, edgecolor="#333333",
            linewidth=0.5, yerr=ends, error_kw={"elinewidth": 0.9, "ecolor": plotting.INK}, label=branch,
        )  # fmt: skip


def _block_axis(ax: Axes, blocks: np.ndarray, label: str) -> None:
    ax.axhline(0, color=plotting.MUTED, linewidth=0.8)
    ax.set_xticks(plotting.hidden_ticks(int(min(blocks)), int(max(blocks))))
    ax.set_xlabel("block")
    ax.set_ylabel(label)


@plotting.style()
def beside_figure(comparison: Comparison) -> Figure | None:
    """Forgetting, drift, cause and use over one axis of hidden states, a column per model.

    None where less than two of them were measured. A block's cause and use stand at the hidden state that it makes.
    """
    tables = [("drift", comparison.drift), ("cause", comparison.causal), ("use", comparison.use)]
    panels = ["forgetting", *(name for name, table in tables if table is not None)]
    if len(panels) < 2:
        return None
    models = list(comparison.models)
    figure = plotting.new_figure(width=1.2 + 5.0 * len(models), height=0.8 + 1.75 * len(panels))
    axes = figure.subplots(len(panels), len(models), squeeze=False, sharex=True, sharey="row")
    draw: dict[str, Callable[[Axes, Comparison, str], None]] = {
        "forgetting": _panel_forgetting, "drift": _panel_drift, "cause": _panel_cause, "use": _panel_use
    }  # fmt: skip
    for line, panel in zip(axes, panels, strict=True):
        for ax, model in zip(line, models, strict=True):
            draw[panel](ax, comparison, model)
            ax.grid(axis="x", color=plotting.MUTED, alpha=0.25, linewidth=0.6)
        handles, labels = max((ax.get_legend_handles_labels() for ax in line), key=lambda found: len(found[1]))
        line[-1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5))
    hidden = comparison.forgetting["hidden"]
    for ax, model in zip(axes[0], models, strict=True):
        ax.set_title(model)
    for ax in axes[-1]:
        ax.set_xticks(plotting.hidden_ticks(int(hidden.min()), int(hidden.max())))
        ax.set_xlabel("hidden state (0 = embeddings)")
    plotting.lay_out(figure)
    return figure


def _panel_forgetting(ax: Axes, comparison: Comparison, model: str) -> None:
    rows = comparison.to_pandas()
    factor, unit = score_unit(rows)
    mean = factor * rows[rows["model"] == model].groupby(["hidden", "term"])["value"].mean().unstack("term")
    for (term, (color, _)), style, marker in zip(PARTS.items(), ("-", "--", ":"), ("o", "s", "^"), strict=True):
        ink = "#B59F00" if term == "re-encoded" else color  # a line of the bars' yellow is too faint on white
        ax.plot(mean.index, mean[term], style, color=ink, marker=marker, markersize=4, label=term)
    ax.axhline(0, color=plotting.MUTED, linewidth=0.8)
    ax.set_ylabel(f"forgetting,\n{unit}")


def _panel_drift(ax: Axes, comparison: Comparison, model: str) -> None:
    assert comparison.drift is not None
    own = comparison.drift[(comparison.drift["model"] == model) & (comparison.drift["measure"] == "cka")]
    for variant, style, marker in (("z-scored", "-", "o"), ("raw", "--", "s")):
        its = own[own["variant"] == variant].sort_values("hidden")
        ax.plot(
            its["hidden"], its["value"], style, color="#0072B2", marker=marker, markersize=4, label=f"CKA, {variant}"
        )
    ax.set_ylim(bottom=min(ax.get_ylim()[0], 0.9))  # a thousandth shall not look like a fall
    ax.set_ylabel("similarity")


def _panel_cause(ax: Axes, comparison: Comparison, model: str) -> None:
    assert comparison.causal is not None
    own = comparison.causal[comparison.causal["model"] == model]
    single = reverted(own, "single")
    skip = own[(own["intervention"] == "skip") & (own["part"] == "block") & (own["metric"] == "score")]
    for rows, label, color, style, marker in (
        (single, "block reverted", "#D55E00", "-", "o"), (skip, "block skipped", "#333333", "--", "D"),
    ):  # fmt: skip
        rows = rows.sort_values("blocks_start")
        x = rows["blocks_stop"].to_numpy()
        ax.plot(x, -100 * rows["effect"], style, color=color, marker=marker, markersize=4, label=label)
        plotting.band(
            ax, x, -100 * rows["ci_high"].to_numpy(), -100 * rows["ci_low"].to_numpy(), color=color, alpha=0.15
        )
    ax.axhline(0, color=plotting.MUTED, linewidth=0.8)
    ax.set_ylabel("score lost,\npoints")


def _panel_use(ax: Axes, comparison: Comparison, model: str) -> None:
    assert comparison.use is not None
    own = comparison.use[(comparison.use["model"] == model) & (comparison.use["statistic"] == "abs_sum")]
    _branch_bars(ax, own, shift=1.0)
    ax.set_ylabel("Σ|conductance|")
