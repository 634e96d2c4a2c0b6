"""The localization hypothesis on published layer curves: a verdict for each model and pooling.

    python docs/results/published_localization/run.py JAWAHAR.csv SENTEVAL.csv

Without arguments only the page is made again from ``verdicts.csv``.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
SOURCES = {"jawahar": "Jawahar et al. 2019, table 2, [CLS], BERT-base", "sentevalinfo": "SentEval logs"}
STATISTICS = {"emergence_cog": "emergence centre of gravity", "best": "hidden state of the largest score"}


def run(*files: str) -> None:
    """Test every published curve with both shipped claims; keep the verdicts."""
    from analysis import localize, read_evidence
    from analysis.hypothesis import Hypothesis

    rows = []
    for name, statistic in (("bert-pipeline", "emergence_cog"), ("best-layer", "best")):
        claim = Hypothesis.load(name)
        for file in files:
            for one in localize(read_evidence(file, claim), claim).runs:
                order, used = one.test.conditions[0], Counter(t.level for t in one.test.tasks if t.used)
                low, high = order.interval or (None, None)
                rows.append(
                    {
                        "source": Path(file).stem, "variant": "" if one.name == Path(file).stem else one.name,
                        "verdict": one.test.verdict, "difference": order.number, "low": low, "high": high,
                        "p": order.p, "smallest_p": order.smallest_p, "power": order.power,
                        "tasks": ", ".join(f"{used[level]} {level}" for level in claim.levels),
                        "left_out": ", ".join(t.task for t in one.test.tasks if not t.used), "statistic": statistic,
                    }
                )  # fmt: skip
    pd.DataFrame(rows).round(5).to_csv(HERE / "verdicts.csv", index=False)
    write_page()


def write_page() -> None:
    """README.md from verdicts.csv."""
    table = pd.read_csv(HERE / "verdicts.csv").fillna({"variant": "", "left_out": ""})
    lines = [
        "# The order of levels on published curves",
        "",
        "Do surface, syntactic and semantic tasks emerge in this order of depth? The shipped hypothesis (margin 10 % of the depth, level .05, tasks as units) on single-layer scores that others published. No items are behind these curves, so depths have no intervals and no correction. *Difference*: mean depth of the semantic tasks minus that of the surface ones, as a share of the blocks, with one-sided bounds. Made by `python docs/results/published_localization/run.py` from `verdicts.csv`.",
        "",
    ]
    for statistic, words in STATISTICS.items():
        own = table[table["statistic"] == statistic]
        lines += [
            f"## Depth of a task: {words}",
            "",
            "| source | model, pooling | verdict | difference, % of depth | p | smallest reachable p | power | tasks used | not dated |",
            "|---|---|---|---|--:|--:|--:|---|---|",
        ]
        for row in own.to_dict("records"):
            known = row["p"] == row["p"]
            source = next(v for k, v in SOURCES.items() if row["source"].startswith(k))
            shift = (
                f"{100 * row['difference']:+.0f} [{100 * row['low']:+.0f} {100 * row['high']:+.0f}]" if known else "—"
            )
            numbers = [f"{row[k]:.2g}" if known else "—" for k in ("p", "smallest_p", "power")]
            lines.append(
                f"| {source} | {row['variant'] or '—'} | {row['verdict']} | {shift} | {' | '.join(numbers)} | {row['tasks']} | {row['left_out'] or '—'} |"
            )
        counts = own["verdict"].value_counts()
        lines += ["", f"Verdicts: {', '.join(f'{n} {v}' for v, n in counts.items())}.", ""]
    best = table[(table["statistic"] == "best") & table["source"].str.startswith("sentevalinfo")]
    parts = best["variant"].str.split(", ", expand=True)
    spread = best.assign(model=parts[0]).groupby("model")["difference"].agg(["min", "max"])
    moved = "; ".join(f"{m}: {100 * a:+.0f} to {100 * b:+.0f} %" for m, a, b in spread.itertuples())
    lines += [
        "## What this shows, and what it does not",
        "",
        f"- The pooling alone moves the difference between semantic and surface tasks, by the place of the largest score ({moved}): a verdict holds for its pooling.",
        "- The emergence of most surface tasks cannot be dated: their information is in the lowest hidden state already, or their gain is within the noise of successive layers. That is no order either.",
        "- The SentEval logs are of probes that were trained for a short time: their shapes are trusted more than their digits.",
        "- The place of the largest score is noise on a flat curve; it is here because published discussions use it.",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(*sys.argv[1:])
    else:
        write_page()
