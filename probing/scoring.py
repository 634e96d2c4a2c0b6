"""From fitted probes to tidy tables: scores with intervals, and what was predicted for each item."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from probing.fitting import ControlFits, ProbeSettings, TaskFit
from probing.metrics import METRICS, PAIRED, majority_score, points, replicates
from probing.tasks.base import ITEM_COLUMNS, Task
from spafit.stats import BootstrapDraw, interval

SCORE_COLUMNS = (
    "task",
    "level",
    "unit",
    "stack",
    "site",
    "hidden",
    "block",
    "pooling",
    "probe",
    "control",
    "seed",
    "split",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "n_classes",
    "chance",
    "l2",
    "converged",
    "n_train",
    "n_seeds",
)


def score_table(task: Task, fit: TaskFit, settings: ProbeSettings, *, where: dict[str, str]) -> pd.DataFrame:
    """One row per (hidden state, control, seed, test split, metric), with the columns of :data:`SCORE_COLUMNS`.

    Rows whose ``seed`` is missing are the mean over seeds; their intervals cross items (by cluster) with seeds, and
    they are the ones to report. The metrics of each kind of task are described in :mod:`probing.metrics`. ``bits`` is
    the bits saved per item: label entropy minus the probe's cross-entropy. ``chance`` is the primary metric of always
    giving the training split's most frequent label, so accuracy for classes (the control task's own, for its rows;
    missing for differences). Controls named ``difference:<control>`` are the task's own score minus that control's,
    with a paired interval (for ``word-type`` on accuracy: selectivity).

    Args:
        where: values of the columns ``stack``, ``site``, ``pooling`` and ``probe``.
    """
    rows: list[dict[str, Any]] = []
    items = task.items.iloc[fit.test]
    for split in task.test_splits:
        chosen = (items["split"] == split).to_numpy()
        if not chosen.any():
            continue
        groups = items["group"].to_numpy()[chosen]
        draws = {n: BootstrapDraw.make(groups, n_seeds=n, n_boot=settings.n_boot, seed=0) for n in _seed_counts(fit)}
        base = {
            "task": task.name,
            "level": task.level,
            "unit": task.unit,
            **where,
            "split": split,
            "n": int(chosen.sum()),
            "n_classes": len(task.labels),
            "n_train": fit.n_train,
        }
        for control, fits in fit.controls.items():
            if control == "word-type" and split == "unseen":
                continue  # types never recur: chance by construction
            chances = majority_score(fit, fits, chosen)
            for metric in METRICS[fit.kind]:
                if metric == "macro_f1" and control == "word-type":
                    continue  # every seed has labels of its own: no common classes to average over
                values = points(metric, fit, fits, chosen)
                for i, seed in enumerate(fits.seeds):
                    one = replicates(metric, fit, fits, chosen, draws[1], seed=i)
                    rows += _rows(fit, base, control, metric, values[i], one, fits, i, seed, chances[i])
                crossed = replicates(metric, fit, fits, chosen, draws[len(fits.seeds)])
                rows += _rows(fit, base, control, metric, values.mean(0), crossed, fits, None, None, chances.mean())
            if control != "none":
                rows += _differences(fit, base, control, chosen, draws)
    table = pd.DataFrame(rows, columns=list(SCORE_COLUMNS))
    return table.astype({"seed": "Int64", "hidden": "int64", "block": "int64"})


def _differences(
    fit: TaskFit, base: dict[str, Any], control: str, chosen: np.ndarray, draws: dict[int, BootstrapDraw]
) -> list[dict[str, Any]]:
    """The task's own scores minus a control's; a single own fit is paired with every seed's control."""
    own, fits = fit.controls["none"], fit.controls[control]
    both = replace(fits, converged=fits.converged & own.converged)
    draw, rows = draws[max(len(fits.seeds), len(own.seeds))], []
    for metric in (m for m in METRICS[fit.kind] if m in PAIRED):
        values = points(metric, fit, own, chosen).mean(0) - points(metric, fit, fits, chosen).mean(0)
        spread = replicates(metric, fit, own, chosen, draw) - replicates(metric, fit, fits, chosen, draw)
        rows += _rows(
            fit, base, f"difference:{control}", metric, values, spread, both, None, None, float("nan")
        )  # fmt: skip
    return rows


def item_table(task: Task, fit: TaskFit, *, where: dict[str, str]) -> pd.DataFrame:
    """One row per (test item, hidden state, control, seed).

    Columns: item, group, text (the words shown), target (the words of the span or spans, or empty), split, label,
    stack, site, hidden, pooling, probe, control, seed, prediction, bits (bits saved on this item), and the task's
    metadata columns. Labels
    and predictions are numbers for tasks of numbers, and sets joined by commas where items have several labels.
    """
    items = task.items.iloc[fit.test]
    texts = [task.corpus.texts[i] for i in items["text"]]
    seconds = [t.second if t.target is None else t.target for t in texts]
    if len(task.text_columns) == 2:
        seconds = [task.corpus.texts[i].string for i in items["text2"]]
    shown = [t.string if s is None else f"{t.string} ⏐ {s}" for t, s in zip(texts, seconds, strict=True)]
    spans = items[list(task.span_columns)].to_numpy()
    target = [" ⏐ ".join(t.words[i] for i in own) for t, own in zip(texts, spans, strict=True)]
    fixed: dict[str, Any] = {
        "item": items["item"].astype(str),
        "group": items["group"].astype(str),
        "text": shown,
        "target": target,
        "split": items["split"],
    }
    reserved = {*fixed, *where, "label", "prediction", "hidden", "control", "seed", "bits"}
    for column in items.columns:  # metadata, never under a name that the table uses itself
        if column not in (*ITEM_COLUMNS, *task.span_columns, *task.text_columns):
            fixed[f"data_{column}" if column in reserved else column] = items[column]
    keys, labels, predictions, bits = [], [], [], []
    for control, fits in fit.controls.items():
        for i, seed in enumerate(fits.seeds):
            for k, hidden in enumerate(fit.hidden):
                keys.append((hidden, control, seed))
                labels.append(fits.labels[i])
                predictions.append(fits.predictions[i, k])
                bits.append(fits.bits[i, k])
    n, repeats = len(items), len(keys)
    names = np.array(fit.names, dtype=object)
    columns: dict[str, Any] = {}
    for column, values in fixed.items():
        codes, categories = pd.factorize(np.asarray(values, dtype=object))
        columns[column] = _categorical(np.tile(codes, repeats), categories)
    for column, found in (("label", np.concatenate(labels)), ("prediction", np.concatenate(predictions))):
        columns[column] = found if fit.kind == "number" else _categorical(found, names)
    for column, value in where.items():
        columns[column] = _categorical(np.zeros(n * repeats, dtype=np.int8), [value])
    columns["hidden"] = np.repeat(np.array([h for h, _, _ in keys], dtype=np.int16), n)
    columns["control"] = pd.Categorical(np.repeat([c for _, c, _ in keys], n))
    columns["seed"] = np.repeat(np.array([s for _, _, s in keys], dtype=np.int32), n)
    columns["bits"] = np.concatenate(bits)
    return pd.DataFrame(columns)


def _categorical(codes: Any, categories: Any) -> Any:
    return pd.Categorical.from_codes(codes, categories=pd.Index(categories))


def _seed_counts(fit: TaskFit) -> set[int]:
    return {1} | {len(f.seeds) for f in fit.controls.values()}


def _rows(
    fit: TaskFit,
    base: dict[str, Any],
    control: str,
    metric: str,
    points: np.ndarray,
    replicates: np.ndarray,
    fits: ControlFits,
    position: int | None,
    seed: int | None,
    chance: float,
) -> list[dict[str, Any]]:
    low, high = interval(replicates)
    rows = []
    for k, hidden in enumerate(fit.hidden):
        l2 = fits.l2[:, k] if position is None else fits.l2[position : position + 1, k]
        converged = fits.converged[:, k] if position is None else fits.converged[position, k]
        rows.append(
            {
                **base,
                "hidden": hidden,
                "block": hidden - 1,
                "control": control,
                "seed": seed,
                "metric": metric,
                "chance": float(chance),
                "value": float(points[k]),
                "ci_low": float(low[k]),
                "ci_high": float(high[k]),
                "l2": float(l2[0]) if (l2 == l2[0]).all() else float("nan"),
                "converged": bool(np.all(converged)),
                "n_seeds": len(fits.seeds) if position is None else 1,
            }
        )
    return rows
