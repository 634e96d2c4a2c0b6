"""Scores of the GLUE benchmark as its table: a row per method, a column per task, and the average of the nine."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spafit.glue_plan import NINE_TASKS

TITLES = {
    "cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "stsb": "STS-B", "mnli": "MNLI", "qnli": "QNLI",
    "rte": "RTE", "wnli": "WNLI",
}  # fmt: skip
#: What each number is, for the table's foot.
CONVENTIONS = {
    "cola": "Matthews' correlation",
    "sst2": "accuracy",
    "mrpc": "mean of accuracy and F1",
    "qqp": "mean of accuracy and F1",
    "stsb": "mean of Pearson's and Spearman's correlation",
    "mnli": "mean of matched and mismatched accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
}


def seed_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """One number per method, task and seed, by the benchmark's conventions (Wang et al. 2019).

    The number of a development set is the mean of the task's metrics; MNLI's is the mean of the matched and the
    mismatched set's. Undefined metrics (a constant prediction's correlation) stay NaN.

    Args:
        runs: rows with the columns of :data:`spafit.fit_result.RUN_COLUMNS`.

    Returns:
        Columns ``method``, ``task``, ``seed``, ``score`` (a share or correlation, not points).
    """
    rows = runs[(runs["metric"] == "headline") & runs["split"].str.startswith("validation")]
    grouped = rows.groupby(["method", "task", "seed"], sort=False)["value"]
    return grouped.agg(lambda v: v.mean(skipna=False)).rename("score").reset_index()


def summarize(runs: pd.DataFrame, *, methods: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """The table: mean and standard deviation over seeds.

    Args:
        runs: raw rows, see :func:`seed_scores`.
        methods: rows, in order; one without runs has no scores.
        tasks: columns, in order.

    Returns:
        A row per method: ``method``, ``trainable_min`` and ``trainable_max`` (parameters; they differ by the tasks'
        numbers of classes), ``total``; per task ``<task>``, ``<task>_sd`` (NaN for one seed) and ``<task>_seeds``;
        ``average`` (mean of the tasks that have a defined score), ``average_sd`` (over seeds that scored on each of
        them), ``average_tasks`` and ``missing`` (tasks of the nine that the average lacks, between spaces; empty for
        the benchmark's full average, WNLI included). An average that lacks tasks must not be set beside one that
        lacks others or none.
    """
    scores = seed_scores(runs)
    table = []
    for method in methods:
        own, raw = scores[scores["method"] == method], runs[runs["method"] == method]
        row: dict[str, object] = {
            "method": method,
            "trainable_min": raw["trainable"].min() if len(raw) else pd.NA,
            "trainable_max": raw["trainable"].max() if len(raw) else pd.NA,
            "total": raw["total"].max() if len(raw) else pd.NA,
        }
        by_seed = own.pivot(index="seed", columns="task", values="score").reindex(columns=list(tasks))
        means: dict[str, float] = {}
        for task in tasks:
            values = own.loc[own["task"] == task, "score"].to_numpy(dtype=np.float64)
            mean = float(values.mean()) if len(values) else float("nan")
            row |= {task: mean, f"{task}_sd": _sd(values), f"{task}_seeds": len(values)}
            if np.isfinite(mean):
                means[task] = mean
        row["average"] = float(np.mean(list(means.values()))) if means else float("nan")
        row["average_sd"] = (
            _sd(by_seed[list(means)].dropna().mean(axis=1).to_numpy(dtype=np.float64)) if means else np.nan
        )
        row["average_tasks"] = len(means)
        row["missing"] = " ".join(t for t in NINE_TASKS if t not in means)
        table.append(row)
    counts = {c: "Int64" for c in ("trainable_min", "trainable_max", "total")}
    return pd.DataFrame(table).astype(counts)


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def to_markdown(table: pd.DataFrame, *, tasks: Sequence[str], seeds: int) -> str:
    """The table of a paper, in points (hundredths), and below it what its numbers are and what its averages lack."""
    head = ["method", "trained parameters", *(TITLES[t] for t in tasks), "average"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in table.to_dict("records"):
        cells = [_score(row, t, seeds) for t in tasks]
        lines.append(_line([row["method"], _parameters(row), *cells, _average(row)]))
    said = "; ".join(f"{TITLES[t]} {CONVENTIONS[t]}" for t in tasks)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so without a spread"
    lines += ["", f"Points (hundredths) on the development sets, {spread}. {said}."]
    return "\n".join([*lines, *(f"\n{s}" for s in average_notes(table))])


def average_notes(table: pd.DataFrame) -> list[str]:
    """A sentence per set of missing tasks, naming the methods whose average lacks them."""
    notes = []
    for missing, rows in table.groupby("missing", sort=False):
        if missing:
            names = ", ".join(rows["method"])
            notes.append(
                f"Partial average of {names}: it lacks {', '.join(TITLES[t] for t in str(missing).split())} and is not "
                "the benchmark's, which is over nine tasks."
            )
    if table["missing"].nunique() > 1:
        notes.append("The averages are over different tasks: do not compare them with each other.")
    return notes


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _score(row: Mapping[Hashable, Any], task: str, seeds: int) -> str:
    count = int(row[f"{task}_seeds"])
    if not count:
        return "–"
    shown = _points(row[task], row[f"{task}_sd"])
    return shown if count == seeds else f"{shown} ({count} of {seeds} seeds)"


def _average(row: Mapping[Hashable, Any]) -> str:
    if not row["average_tasks"]:
        return "–"
    shown = _points(row["average"], row["average_sd"])
    return shown if not row["missing"] else f"{shown} (partial: {row['average_tasks']} of {len(NINE_TASKS)})"


def _points(mean: float, sd: float) -> str:
    if not np.isfinite(mean):
        return "undefined"
    return f"{100 * mean:.1f}" + (f" ± {100 * sd:.1f}" if np.isfinite(sd) else "")


def _parameters(row: Mapping[Hashable, Any]) -> str:
    low, high = row["trainable_min"], row["trainable_max"]
    if pd.isna(low):
        return "–"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
