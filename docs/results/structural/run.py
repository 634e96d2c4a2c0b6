"""Dependency trees in MiniLM's hidden states: a real run, its rows, and the page made from them.

    python docs/results/structural/run.py MINILM TREEBANK WORK

Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
MAX_TRAIN, SEEDS = 20_000, 2
METRICS = {"uuas": "UUAS", "dspr": "DSpr.", "nspr": "NSpr.", "root_accuracy": "root accuracy"}
KEEP = ["task", "control", "hidden", "metric", "value", "ci_low", "ci_high", "n", "n_train", "n_seeds", "chance"]


def run(minilm: str, treebank: str, work: str) -> None:
    """Probe, keep the rows, write the page."""
    from probing import probe_layers

    results = probe_layers(
        minilm, [f"conllu:{treebank}#tree"], probe="structural", max_train=MAX_TRAIN, seeds=SEEDS,
        controls=("random-encoder",), out=work,
    )  # fmt: skip
    scores = results.to_pandas()
    scores[KEEP].round(5).to_csv(HERE / "scores.csv", index=False)
    write_page()


def write_page() -> None:
    """README.md from scores.csv."""
    from probing.tree_fitting import PUBLISHED

    scores = pd.read_csv(HERE / "scores.csv")
    first = scores.iloc[0]
    hidden = sorted(scores["hidden"].unique())
    lines = [
        "# Dependency trees in MiniLM's hidden states",
        "",
        f"Structural probes of rank 64 (Hewitt & Manning 2019) on the English Web Treebank: {int(first['n_train']):,} training words in whole sentences, {int(first['n_seeds'])} draws, {int(first['n']):,} test sentences; 95 % intervals resample sentences and draws. MiniLM is contrastively tuned to embed sentences, not a raw language model. Made by `python docs/results/structural/run.py` from `scores.csv`.",
        "",
        "| score | linear chain | " + " | ".join(f"hidden {h}" for h in hidden) + " |",
        "|---|--:|" + "--:|" * len(hidden),
    ]
    for metric, name in METRICS.items():
        for control, words in (("none", name), ("random-encoder", f"{name}, random encoder")):
            own = scores[(scores["metric"] == metric) & (scores["control"] == control)].set_index("hidden")
            cells = [f"{own.loc[h, 'value']:.3f}" for h in hidden]
            lines.append(f"| {words} | {own['chance'].iloc[0]:.3f} | {' | '.join(cells)} |")
    lines += ["", "## At the best hidden state", ""]
    for metric, name in METRICS.items():
        own = scores[(scores["metric"] == metric) & (scores["control"] == "none")].set_index("hidden")
        gap = scores[(scores["metric"] == metric) & (scores["control"] == "difference:random-encoder")].set_index(
            "hidden"
        )
        at = int(own["value"].idxmax())
        best, beyond = own.loc[at], gap.loc[at]
        lines.append(
            f"- {name}: {best['value']:.3f} [{best['ci_low']:.3f} {best['ci_high']:.3f}] at hidden {at}; linear chain {best['chance']:.3f}; beyond the random encoder {beyond['value']:+.3f} [{beyond['ci_low']:+.3f} {beyond['ci_high']:+.3f}]."
        )
    lines += ["", PUBLISHED, ""]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        run(*sys.argv[1:])
    else:
        write_page()
