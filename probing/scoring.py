"""From fitted probes to tidy tables: scores with intervals, and what was predicted for each item."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from probing.fitting import ControlFits, ProbeSettings, TaskFit
from probing.tasks.base import ITEM_COLUMNS, Task
from spafit.stats import BootstrapDraw, interval

METRICS = ("accuracy", "macro_f1", "bits")

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
    they are the ones to report. ``bits`` is the bits saved per item: label entropy minus the probe's cross-entropy.
    ``chance`` is the test accuracy of the training split's most frequent label (the control task's own, for its rows;
    missing for differences). Controls named
    ``difference:<control>`` are the task's own score minus that control's, with a paired interval (for ``word-type``
    on accuracy: selectivity).

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
            values = _metric_values(fits, chosen)
            chances = (fits.labels[:, chosen] == fits.majority[:, None]).mean(1)
            for metric in METRICS:
                if metric != "macro_f1":
                    per_seed = [draws[1].means(v[None]) for v in values[metric]]
                    crossed = draws[len(fits.seeds)].means(values[metric])
                    points = values[metric].mean(-1)
                elif control == "word-type":
                    continue  # every seed has labels of its own: no common classes to average over
                else:
                    gold, guesses = fits.labels[0, chosen], fits.predictions[:, :, chosen]
                    per_seed = [draws[1].macro_f1(gold, g[None], n_classes=len(task.labels)) for g in guesses]
                    crossed = draws[len(fits.seeds)].macro_f1(gold, guesses, n_classes=len(task.labels))
                    points = _macro_f1(gold, guesses)
                for i, seed in enumerate(fits.seeds):
                    rows += _rows(fit, base, control, metric, points[i], per_seed[i], fits, i, seed, chances[i])
                rows += _rows(fit, base, control, metric, points.mean(0), crossed, fits, None, None, chances.mean())
            if control != "none":
                own = _metric_values(fit.controls["none"], chosen)
                met = fits.converged & fit.controls["none"].converged  # a single own fit stands beside every control's
                both = replace(fits, converged=met)
                for metric in ("accuracy", "bits"):
                    difference = own[metric] - values[metric]  # a single own fit is paired with every seed's control
                    replicates = draws[len(difference)].means(difference)
                    rows += _rows(
                        fit,
                        base,
                        f"difference:{control}",
                        metric,
                        difference.mean((0, 2)),
                        replicates,
                        both,
                        None,
                        None,
                        float("nan"),
                    )
    table = pd.DataFrame(rows, columns=list(SCORE_COLUMNS))
    return table.astype({"seed": "Int64", "hidden": "int64", "block": "int64"})


def item_table(task: Task, fit: TaskFit, *, where: dict[str, str]) -> pd.DataFrame:
    """One row per (test item, hidden state, control, seed).

    Columns: item, group, text (the words shown), target (the word itself, or empty), split, label, stack, site, hidden,
    pooling, probe, control, seed, prediction, bits (bits saved on this item), and the task's metadata columns.
    """
    items = task.items.iloc[fit.test]
    texts = [task.corpus.texts[i] for i in items["text"]]
    shown = [t.string if t.second is None else f"{t.string} ⏐ {t.second}" for t in texts]
    target = [t.string[slice(*t.spans[s])] if s >= 0 else "" for t, s in zip(texts, items["span"], strict=True)]
    fixed: dict[str, Any] = {
        "item": items["item"].astype(str),
        "group": items["group"].astype(str),
        "text": shown,
        "target": target,
        "split": items["split"],
    }
    reserved = {*fixed, *where, "label", "prediction", "hidden", "control", "seed", "bits"}
    for column in items.columns:
        if column not in ITEM_COLUMNS:  # metadata, never under a name that the table uses itself
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
    names = np.array(task.labels, dtype=object)
    columns: dict[str, Any] = {}
    for column, values in fixed.items():
        codes, categories = pd.factorize(np.asarray(values, dtype=object))
        columns[column] = _categorical(np.tile(codes, repeats), categories)
    columns["label"] = _categorical(np.concatenate(labels), names)
    columns["prediction"] = _categorical(np.concatenate(predictions), names)
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


def _metric_values(fits: ControlFits, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Per-item values, shape (seeds, hidden, chosen items)."""
    right = fits.predictions[:, :, chosen] == fits.labels[:, None, chosen]
    return {"accuracy": right.astype(np.float64), "bits": fits.bits[:, :, chosen].astype(np.float64)}


def _macro_f1(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """F1 averaged over the classes that occur among labels or predictions, shape (seeds, hidden)."""
    from sklearn.metrics import f1_score

    return np.array([[f1_score(labels, g, average="macro", zero_division=0.0) for g in seed] for seed in predictions])


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
