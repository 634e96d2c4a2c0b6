"""MiniLM on small GLUE tasks with every kind of plan: the raw rows behind this folder's table.

python docs/results/glue_minilm/run.py DATA RUNS [TASK …]   train what rows.csv lacks, in RUNS; write both files
python docs/results/glue_minilm/run.py                      write README.md from rows.csv

DATA is a folder of GLUE files. Each task × method runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from spafit.fit_result import FitResult

HERE = Path(__file__).parent
METHODS = (
    "spafit-scaled-I", "spafit-scaled-II", "lora", "lora-matched:spafit-scaled-I", "bitfit", "full", "head",
    "reversed:spafit-scaled-I", "thirds",
)  # fmt: skip
FOUR = ("spafit-scaled-I", "lora", "bitfit", "full")
#: task: (training items, epochs, tokens kept, methods, file names that differ)
TASKS: dict[str, tuple[int, float, int, tuple[str, ...], dict[str, str]]] = {
    "sst2": (1000, 2.0, 48, FOUR, {}),
    "stsb": (1000, 2.0, 64, FOUR, {}),
    "wnli": (635, 2.0, 64, FOUR, {"train": "train.rebuilt.tsv"}),
    "cola": (2000, 3.0, 48, METHODS, {}),
    "rte": (600, 3.0, 96, METHODS, {}),
}
BATCH, SEEDS = 16, (0, 1, 2)
CHOSEN_BY = "headline on the tenth of the training items that is held out"


def rates(method: str) -> tuple[float, float]:
    """The two learning rates of a method."""
    return (5e-5, 2e-4) if method == "full" else (5e-4, 2e-3)


def train(task: str, method: str, data: Path, runs: Path) -> None:
    """All rates and seeds of one task and method."""
    known = _rows()
    for rate in rates(method):
        cell = known[(known["task"] == task) & (known["method"] == method) & np.isclose(known["learning_rate"], rate)]
        if not set(SEEDS) <= set(cell["seed"]):
            train_cell(task, method, rate, SEEDS, data, runs)


def train_cell(task: str, method: str, rate: float, seeds: tuple[int, ...], data: Path, runs: Path) -> FitResult:
    """Some seeds of one task, method and rate; finished ones are kept."""
    from spafit import TrainSettings, fit
    from spafit.data.training import glue_data

    items, epochs, length, _, files = TASKS[task]
    given = glue_data(task, data, files=files or None)
    splits = {s: f for s, f in given.frames.items() if s in ("train", "validation")}
    given = type(given)(given.name, splits, given.labels, given.metrics, given.source)
    settings = TrainSettings(epochs=epochs, batch_size=BATCH, learning_rate=rate, max_length=length, max_train=items)
    out = runs / task / method.replace(":", "-") / f"{rate:g}"
    return fit(None, method, data=given, settings=settings, seeds=seeds, out=out, device="cpu", quiet=True)


def collect(runs: Path) -> None:
    """Rows of all finished runs: reported scores, and the held-out score that rates are chosen by."""
    rows = [_rows()]
    for folder in sorted(p.parent for p in runs.glob("*/*/*/seed-*/runs.parquet")):
        found = pd.read_parquet(folder / "runs.parquet")
        curves = pd.read_parquet(folder / "metrics.parquet")
        held = curves[(curves["split"] == "select") & (curves["metric"] == "headline")]["value"]
        rows.append(found.assign(held_out=held.max()))
    cell = ["task", "method", "learning_rate", "seed", "split", "metric"]
    table = pd.concat([r for r in rows if len(r)], ignore_index=True)
    table = table.drop_duplicates(cell, keep="last").sort_values(cell)
    partial = HERE / f".rows.{os.getpid()}.csv"  # two tasks may be trained at once, each by a command of its own
    table.to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")
    partial.replace(HERE / "rows.csv")


def _rows() -> pd.DataFrame:
    path = HERE / "rows.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["task", "method", "learning_rate", "seed"])


def write_page() -> None:
    """README.md from rows.csv."""
    rows = pd.read_csv(HERE / "rows.csv")
    main = rows[rows["metric"] == "headline"]
    undefined = _undefined(main)
    main = main.fillna({"value": 0.0, "held_out": 0.0})
    chosen = (
        main.groupby(["task", "method", "learning_rate"])["held_out"].mean().reset_index()
        .sort_values("held_out", kind="stable").groupby(["task", "method"]).last().reset_index()
    )  # fmt: skip
    best = main.merge(chosen[["task", "method", "learning_rate"]])
    lines = [
        "# MiniLM-L6 on small GLUE tasks, by plan",
        "",
        f"{len(main)} runs: batches of {BATCH}, seeds {', '.join(map(str, SEEDS))}, two learning rates "
        f"each; the rate is chosen by the {CHOSEN_BY}, the score is on the task's development set (Matthews for CoLA, "
        "mean of Pearson and Spearman for STS-B, accuracy for the others), mean ± standard deviation over seeds.",
        "Made by `python docs/results/glue_minilm/run.py` from `rows.csv`.",
        *undefined,
        "",
    ]
    for task in [t for t in TASKS if t in set(best["task"])]:
        lines += [
            f"## {task} ({TASKS[task][0]} training items, a tenth of them held out; {TASKS[task][1]:g} epochs)",
            "",
            "| plan | score | trained parameters | learning rate | seconds | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for method in [m for m in METHODS if m in set(best[best["task"] == task]["method"])]:
            own = best[(best["task"] == task) & (best["method"] == method)]
            lines.append(
                f"| {method} | {own['value'].mean():.3f} ± {own['value'].std():.3f} | "
                f"{int(own['trainable'].iloc[0]):,} ({100 * own['trainable'].iloc[0] / own['total'].iloc[0]:.2f} %) | "
                f"{own['learning_rate'].iloc[0]:g} | {own['seconds'].mean():.0f} | "
                f"{own['peak_memory_bytes'].max() / 1e9:.2f} GB |"
            )
        lines.append("")
    lines += [*_reading(best), ""]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _undefined(main: pd.DataFrame) -> list[str]:
    """A sentence on the scores that have no value and count as 0, if there are any."""
    found = []
    for column, name in (("value", "scores"), ("held_out", "held-out scores")):
        missing = main[column].isna().groupby([main["task"], main["method"], main["learning_rate"]], sort=False)
        for (task, method, rate), lost in missing:
            if lost.any():
                found.append(f"{lost.sum()} of {len(lost)} {name} of {task}, {method}, learning rate {rate:g}")
    if not found:
        return []
    return [f"Undefined scores (a constant prediction has no correlation) count as 0: {'; '.join(found)}."]


def _reading(best: pd.DataFrame) -> list[str]:
    """What the table shows and does not, from its own numbers."""
    lines = ["## What this shows, and what it does not", ""]
    for task, own in best.groupby("task", sort=False):
        scores = own.groupby("method")["value"]
        means, spread = scores.mean().sort_values(ascending=False), scores.std().mean()
        within = [m for m in means.index if means.iloc[0] - means[m] <= 2 * spread]
        lines.append(
            f"- {task}: best mean {means.index[0]} ({means.iloc[0]:.3f}); {len(within)} of {len(means)} plans lie "
            f"within two typical standard deviations over seeds ({2 * spread:.3f}) of it: {', '.join(within)}."
        )
        constant = [m for m in means.index if task == "cola" and (own[own["method"] == m]["value"] == 0).all()]
        if constant:
            lines.append(
                f"- {task}: a Matthews coefficient of exactly 0 for every seed is one class predicted throughout: "
                f"{', '.join(constant)} learned nothing that the score can see in this few steps."
            )
    lines += [
        "- RTE and WNLI need inference over a pair of sentences, STS-B was given to the model as one joined text: "
        "this encoder was trained on single sentences, and so few items do not teach it more.",
        "- Seconds are those of the committed runs: training with its set-up and the scoring of the development set.",
        "- Seconds and memory are of two shared cores beside other work; ratios of speed belong to `tests/bench`.",
        "- A sentence encoder of six blocks, few items and three seeds: differences between plans that are smaller "
        "than the spread over seeds are not differences. Nothing here speaks about BERT-large or full training sets.",
    ]
    return lines


if __name__ == "__main__":
    if len(sys.argv) > 5 and sys.argv[1] == "--one":
        train(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
    elif len(sys.argv) >= 3:
        data, runs = Path(sys.argv[1]), Path(sys.argv[2])
        for name in sys.argv[3:] or TASKS:
            for plan in TASKS[name][3]:
                subprocess.run([sys.executable, __file__, "--one", name, plan, str(data), str(runs)], check=True)
                collect(runs)
                write_page()
    else:
        write_page()
