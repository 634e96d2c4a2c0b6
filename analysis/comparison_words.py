"""A comparison in words, from its numbers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analysis.task_tables import reverted

if TYPE_CHECKING:
    from analysis.comparison import Comparison


def model_in_words(comparison: Comparison, model: str) -> str:
    """What training changed in one model: forgetting, then cause and use where they were measured."""
    if len(comparison.stacks) == 1:
        return " ".join([f"{model}: {_stack_in_words(comparison, model)}", *_task_in_words(comparison, model)])
    found = [f"{s.capitalize()}: {_stack_in_words(comparison.of_stack(s), model)}" for s in comparison.stacks]
    return " ".join([f"{model}.", *found, *_task_in_words(comparison, model)])


def _stack_in_words(comparison: Comparison, model: str) -> str:
    """What training changed in the hidden states of the one stack that the comparison is of."""
    facts = comparison.run["models"][model]
    rows = comparison.to_pandas()
    rows = rows[rows["model"] == model]

    def amount(value: float) -> str:
        return f"{100 * value:.1f} points" if comparison.metric == "accuracy" else f"{value:.3f} bits"

    last = int(rows["hidden"].max())
    shared = facts.get("unchanged_by_stack", {}).get(comparison.stacks[0], facts["unchanged"])
    if shared > last:
        return "no hidden state differs from those before training; every term is exactly 0."
    head = f"hidden states {shared} to {last} changed" + (f", 0 to {shared - 1} are as before. " if shared else ". ")
    own = comparison.summary()
    own = own[own["model"] == model]
    lost = own[(own["p_layers"] < 0.05) & (own["lost"] > 0)].sort_values("lost", ascending=False)
    gained = own[(own["p_layers"] < 0.05) & (own["lost"] < 0)]
    text = head + (
        f"Where each task could be read best before training, {len(lost)} of {len(own)} tasks lost "
        f"{comparison.metric} beyond what sampling explains (p < .05 over layers)"
    )
    if len(lost):
        text += ": " + ", ".join(f"{r['task']} {amount(r['lost'])}" for r in lost.head(3).to_dict("records"))
    if len(gained):
        text += f"; {len(gained)} gained"
    text += ". "
    deep = rows[rows["hidden"] == last].groupby("term")["value"].mean()
    parts = [f"{amount(deep[t])} {t}" for t in ("lost", "moved", "re-encoded") if pd.notna(deep.get(t))]
    text += f"At the last hidden state the mean over tasks is {', '.join(parts)}."
    if facts["missing"]:
        text += f" Not compared: {facts['missing'].rstrip('.')}."
    return text


def _task_in_words(comparison: Comparison, model: str) -> list[str]:
    """Cause, erasure and use of one model, and what was not measured of them."""
    task = comparison.run.get("task")
    if not task:
        return []
    found = [_cause(own, task) for own in _of(comparison.causal, model)]
    found += [_erasure(own) for own in _of(comparison.erasure, model)]
    found += [_use(own) for own in _of(comparison.use, model)]
    missing = task["not_measured"].get(model)
    if missing:
        found.append("Not measured: " + "; ".join(m.rstrip(".") for m in missing) + ".")
    return found


def _of(table: pd.DataFrame | None, model: str) -> list[pd.DataFrame]:
    """The rows of one model, if there are any."""
    own = None if table is None else table[table["model"] == model]
    return [] if own is None or own.empty else [own]


def _cause(own: pd.DataFrame, task: dict) -> str:
    single, suffix = reverted(own, "single"), reverted(own, "suffix")
    base = own[(own["intervention"] == "transplant") & (own["metric"] == "score")]
    if single.empty or base.empty:
        return ""
    text = (
        f"On {single['n'].iloc[0]} items of {task['name']} ({task['split']}) its score is "
        f"{single['reference'].iloc[0]:.3f}; with the body before training under the same head it is "
        f"{base['reference'].iloc[0]:.3f}."
    )
    worst = single.iloc[int(single["effect"].to_numpy().argmin())]
    if worst["effect"] < 0:
        text += (
            f" Of single blocks, reverting block {worst['blocks_start']} costs most: {-100 * worst['effect']:.1f} "
            f"points [{-100 * worst['ci_high']:.1f} {-100 * worst['ci_low']:.1f}]"
        )
        total = suffix["effect"].min()
        if total < 0:
            few = suffix[suffix["effect"] <= total / 2].sort_values("blocks_start").iloc[-1]
            text += f"; reverting the last {few['blocks_stop'] - few['blocks_start']} costs {-100 * few['effect']:.1f}"
        text += "."
    else:
        text += " No single block costs score when it is reverted."
    return text


def _erasure(own: pd.DataFrame) -> str:
    rows = own[own["metric"] == "score"]
    parts = []
    for task, its in rows.groupby("task", sort=False):
        leace = its[its["eraser"] == "leace"]
        worst = leace.iloc[int(leace["effect"].to_numpy().argmin())]
        there = its[(its["hidden"] == worst["hidden"]) & (its["eraser"] != "leace")]
        beside = "".join(
            f"; {c} {-100 * e:.1f}" for c, e in there.groupby("eraser", sort=False)["effect"].mean().items()
        )
        parts.append(
            f"{task} costs at most {-100 * worst['effect']:.1f} points (hidden state {worst['hidden']}{beside})"
        )
    return f"Erasing {'; '.join(parts)}."


def _use(own: pd.DataFrame) -> str:
    rows = own[(own["statistic"] == "abs_sum") & (own["branch"] != "residual")]
    top = rows.iloc[int(rows["value"].to_numpy().argmax())]
    return (
        f"Most conductance (Σ|·|) passes through {top['branch']} of block {top['block']}, over {top['n']} items that "
        f"converged and {top['n_failed']} that did not."
    )


def sequence_in_words(comparison: Comparison) -> str:
    """The two published scalars of a sequence, and what they hide."""
    facts = comparison.run["sequence"]
    factor, form, unit = (100.0, "+.1f", "points") if comparison.metric == "accuracy" else (1.0, "+.3f", "bits")
    order = ", ".join(f"{stage} ({task})" for stage, task in facts["trained"].items())
    scalars = [
        f"{name} {'not defined' if facts[key] is None or pd.isna(facts[key]) else format(factor * facts[key], form)}"
        for key, name in (("backward_transfer", "backward transfer"), ("average_forgetting", "average forgetting"))
    ]
    return (
        f"As a sequence, {order}: {' and '.join(scalars)} {unit}, from the best score over hidden states. "
        "Both hide the hidden state; the terms above give it, each stage against the start."
    )
