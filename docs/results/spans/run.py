"""Entities, constituents and semantic roles at every layer of two models: real runs, their rows, and the page.

    python docs/results/spans/run.py MINILM SMOLLM2_GGUF_FOLDER NER_FOLDER PROPBANK_FOLDER WORK

A model whose rows are committed is not run again. Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
MAX_TRAIN, LIMIT = 2000, 4000
NAMES = {"minilm": "MiniLM-L6 (6 blocks)", "smollm2": "SmolLM2-135M-Instruct (30 blocks)"}
KEEP = ["model", "task", "probe", "control", "hidden", "metric", "value", "ci_low", "ci_high", "n", "n_train", "chance"]


def run(minilm: str, smollm2: str, ner: str, propbank: str, work: Path) -> None:
    """Probe each model whose rows are not there, and write the page."""
    from probing import probe_layers

    tasks = [f"iob:{ner}#spans", f"propbank:{propbank}#constituents,roles"]
    for name, reference in (("minilm", minilm), ("smollm2", smollm2)):
        if (HERE / "scores.csv").exists() and (pd.read_csv(HERE / "scores.csv")["model"] == name).any():
            continue
        results = probe_layers(
            reference, tasks, probe=["linear"], max_train=MAX_TRAIN, limit=LIMIT, seeds=1, out=work / name
        )
        scores = results.scores[results.scores["seed"].isna()].assign(model=name)
        kept = scores[scores["metric"].isin(["accuracy", "micro_f1", "bits"]) & (scores["split"] == "test")]
        _add("scores", kept[KEEP].round(5))
        _add("summaries", results.summaries.assign(model=name).round(4))
        write_page()


def _add(name: str, rows: pd.DataFrame) -> None:
    path = HERE / f"{name}.csv"
    old = [pd.read_csv(path)] if path.exists() else []
    pd.concat([*old, rows], ignore_index=True).to_csv(path, index=False)


def write_page() -> None:
    """README.md from scores.csv and summaries.csv."""
    scores, summaries = pd.read_csv(HERE / "scores.csv"), pd.read_csv(HERE / "summaries.csv")
    lines = [
        "# Entities, constituents and semantic roles, layer by layer",
        "",
        f"Linear probes on mean-pooled spans of the English Web Treebank's sentences: named entities (UNER), constituents and PropBank roles (a role is read from predicate and argument). At most {MAX_TRAIN:,} training items of the first {LIMIT:,} of each split, one seed, so intervals speak about test sentences alone. MiniLM is contrastively tuned, not a raw language model; SmolLM2's weights are de-quantised from 4 bits. Made by `python docs/results/spans/run.py` from `scores.csv` and `summaries.csv`.",
        "",
        "| model | task | n | score | best | at hidden | beyond random encoder | beyond control task | chance | first within 1 SE | emergence CoG |",
        "|---|---|--:|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for (model, task), own in scores.groupby(["model", "task"], sort=False):
        metric = "micro_f1" if (own["metric"] == "micro_f1").any() else "accuracy"
        part = own[own["metric"] == metric].set_index(["control", "hidden"])
        curve = part.loc["none"]
        at = int(curve["value"].idxmax())
        best = curve.loc[at]
        gaps = [_gap(part, f"difference:{c}", at) for c in ("random-encoder", "word-type")]
        found = summaries[(summaries["model"] == model) & (summaries["task"] == task) & (summaries["metric"] == "bits")]
        beyond = found[found["control"] == "random-encoder"].set_index("statistic")
        cells = [_place(beyond.loc[s]) for s in ("first_within_1se", "emergence_cog")]
        lines.append(
            f"| {NAMES[model]} | {task} | {int(best['n']):,} | {metric.replace('_', ' ')} | {best['value']:.3f} [{best['ci_low']:.3f} {best['ci_high']:.3f}] | {at} | {' | '.join(gaps)} | {best['chance']:.3f} | {cells[0]} | {cells[1]} |"
        )
    lines += [
        "",
        "First within one standard error and centre of gravity are of the bits saved beyond the random encoder's, as hidden states (0 = embeddings); — where they are suppressed.",
        "",
        "## Score at every hidden state",
        "",
    ]
    for (model, task), own in scores.groupby(["model", "task"], sort=False):
        metric = "micro_f1" if (own["metric"] == "micro_f1").any() else "accuracy"
        curve = own[(own["metric"] == metric) & (own["control"] == "none")].sort_values("hidden")
        values = " ".join(f"{v:.3f}".lstrip("0") for v in curve["value"])
        lines.append(f"- {NAMES[model]}, {task}: {values}")
    lines += [
        "",
        "## What this shows, and what it does not",
        "",
        "- One training draw and one probe: how far the layers move with another pooling, probe or draw is what `spafit sensitivity` measures.",
        "- Relative depth differs between the models, and so do their tokenizers, tuning and width: two models are no law.",
        "- The first items of each split were taken, so the scores are of some documents, not of the treebank.",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _gap(part: pd.DataFrame, control: str, at: int) -> str:
    return f"{part.loc[(control, at), 'value']:+.3f}" if (control, at) in part.index else "—"


def _place(row: pd.Series) -> str:
    return "—" if pd.isna(row["value"]) else f"{row['value']:.1f} [{row['ci_low']:.1f} {row['ci_high']:.1f}]"


if __name__ == "__main__":
    if len(sys.argv) == 6:
        run(*sys.argv[1:5], Path(sys.argv[5]))
    else:
        write_page()
