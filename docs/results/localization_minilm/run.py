"""Does each type of knowledge sit in blocks of its own in MiniLM? Every block skipped, every generated task probed again.

    python docs/results/localization_minilm/run.py measure

Without the argument only the page is made again from ``effects.csv``.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).parent
#: Training and test items of each task, seed 0.
ITEMS = 1000


def run() -> None:
    """Bits of each task at the last hidden state with each block skipped, by probes fitted anew each time."""
    from analysis.causal import effect, windows
    from probing import probe_layers
    from spafit import load_model
    from spafit.stacks import find_stacks

    loaded = load_model(None)
    blocks = find_stacks(loaded.model)[0].num_blocks
    levels: dict[str, str] = {}

    def bits(model: Any) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:  # states of a changed model must not meet those of another
            found = probe_layers(
                loaded, ["core"], layers=str(blocks), limit=ITEMS, max_train=ITEMS, seeds=1, controls=(), n_boot=100,
                out=f"{folder}/run", cache_dir=f"{folder}/cache", quiet=True,
            )  # fmt: skip
            rows = found.scores[(found.scores["metric"] == "bits") & found.scores["seed"].isna()]
        rows = rows[(rows["control"] == "none") & (rows["split"] == rows.groupby("task")["split"].transform("first"))]
        levels.update(zip(rows["task"], rows["level"], strict=True))
        return dict(zip(rows["task"], rows["value"], strict=True))

    table = effect(loaded.model, loaded.model, intervention="skip", blocks=windows(blocks, "single"), metric=bits)
    table = table.assign(level=table["metric"].map(levels)).drop(columns=["seconds", "share", "draw"])
    table.round(5).to_csv(HERE / "effects.csv", index=False)
    write_page()


def write_page() -> None:
    """README.md from effects.csv."""
    from analysis import Hypothesis, localize, read_evidence

    claim = Hypothesis.load("bert-pipeline")
    test = localize(read_evidence(HERE / "effects.csv", claim), claim).runs[0].test
    effects = pd.read_csv(HERE / "effects.csv")
    wide = effects.pivot_table(index=["level", "metric"], columns="blocks_start", values="effect")
    lines = [
        "# Skipping the blocks of MiniLM, one at a time",
        "",
        f"Bits of each generated task that a linear probe reads from the last hidden state when one block is skipped, less those of the whole model; probes are fitted anew each time, {ITEMS:,} training and at most {ITEMS:,} test items, one seed, no control. The model is contrastively tuned to embed sentences: its last blocks remove what does not serve that, so skipping them gives bits back. Made by `python docs/results/localization_minilm/run.py` from `effects.csv`.",
        "",
        f"**{test.verdict.capitalize()}** ({test.tested}; hypothesis `{claim.name}`, digest `{test.hypothesis.digest[:16]}`). {test.sentence}",
        "",
        "| type | verdict | in words |",
        "|---|---|---|",
        *(f"| {t.type} | {t.verdict} | {t.sentence} |" for t in test.types),
        "",
        "Change of bits per item, by skipped block; positive numbers are bits that the block takes away.",
        "",
        f"| type | task | {' | '.join(map(str, wide.columns))} |",
        f"|---|---|{'--:|' * len(wide.columns)}",
    ]
    for level in claim.levels:
        for task, row in wide.loc[level].iterrows():
            lines.append(f"| {level} | {task} | {' | '.join(f'{v:+.2f}' for v in row)} |")
    lines += [
        "",
        "- A block that is skipped leaves the later ones with inputs that they were not trained on: an effect is not a place of storage.",
        "- Effects of a range are sums of those of its blocks; interactions between blocks are not in them.",
        "- Only the range and dissociation conditions are tested here; what a probing run adds is the order of emergence and its stability.",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    run() if sys.argv[1:] == ["measure"] else write_page()
