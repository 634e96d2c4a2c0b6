"""What classification tuning left of SmolLM2's language: real runs, their rows, and the page made from them.

    python docs/results/retention_smollm2/run.py SMOLLM2_GGUF_FOLDER GLUE_FOLDER WIKITEXT_FOLDER BLIMP_FOLDER WORK

Plans that the committed rows hold are not trained again; finished trainings and measured models in ``WORK`` are kept.
Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
METHODS = ("lora", "spafit-scaled-I")
SEEDS = (0,)
ITEMS, PAIRS, TEST_CHARACTERS, REFIT_CHARACTERS = 4000, 10, 40_000, 24_000


def run(gguf: Path, glue: Path, wikitext: Path, blimp: Path, work: Path) -> None:
    """Train each plan on SST-2, graft the original head, measure."""
    from analysis.retention import retention_table
    from spafit import fit, load_model
    from spafit.data.blimp import read_blimp
    from spafit.data.training import glue_data
    from spafit.language_models import graft, load_language_model
    from spafit.settings import TrainSettings

    original = load_language_model(gguf)
    base = work / "base"
    if not (base / "tokenizer_config.json").exists():  # an adapter's base is a folder of tensors
        import torch
        import transformers

        config = original.model.config.to_dict()
        config.pop("quantization_config", None)  # the weights have been de-quantised
        plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        plain.load_state_dict({n: t.to(torch.float32) for n, t in original.model.state_dict().items()})
        plain.save_pretrained(str(base))
        original.tokenizer.save_pretrained(str(base))
    data = glue_data("sst2", glue, files={"train": "train.tsv", "validation": "dev.tsv"}).limited(ITEMS, seed=0)
    data = data.limited(200, seed=0, split="validation")
    pairs = read_blimp(blimp, pairs=PAIRS)
    text = (wikitext / "test.txt").read_text(encoding="utf-8")[:TEST_CHARACTERS]
    other = (wikitext / "valid.txt").read_text(encoding="utf-8")[:REFIT_CHARACTERS]
    settings = TrainSettings(epochs=1, batch_size=8, max_length=48, learning_rate=5e-4, select_share=0.0)
    for method in METHODS:
        for seed in SEEDS:
            known = pd.read_csv(HERE / "rows.csv") if (HERE / "rows.csv").exists() else pd.DataFrame(columns=["method"])
            if (known["method"] == method).any():
                continue
            out = work / f"{method}-{seed}"
            result = fit(str(base), method, data=data, settings=settings, seeds=(seed,), out=out)
            kept = out / "retention.csv"
            if not kept.exists():
                after = graft(original, load_model(str(result.model_folder())).model, name=method)
                table = retention_table(original, after, text=text, pairs=pairs, refit_on=other, quiet=False)
                table.to_csv(kept, index=False)
            _add("rows", pd.read_csv(kept).assign(method=method, training_seed=seed).round(5))
            _add("training", result.runs.assign(method=method))
            write_page()


def _add(name: str, rows: pd.DataFrame) -> None:
    path = HERE / f"{name}.csv"
    old = [pd.read_csv(path)] if path.exists() else []
    pd.concat([*old, rows], ignore_index=True).to_csv(path, index=False)


def write_page() -> None:
    """README.md from rows.csv and training.csv."""
    rows, training = pd.read_csv(HERE / "rows.csv"), pd.read_csv(HERE / "training.csv")
    lines = [
        "# What classification tuning left of SmolLM2's language",
        "",
        f"SmolLM2-135M-Instruct (weights de-quantised from 4 bits, so not exactly those that were trained), tuned on {ITEMS:,} "
        f"items of SST-2 for one epoch, one seed; its original language-model head grafted on the tuned body. Bits per token "
        f"on the first {TEST_CHARACTERS:,} characters of WikiText-2's test text, windows of 256 tokens; BLiMP with {PAIRS} "
        "pairs of each of 67 paradigms. *Refitted*: an affine map from the tuned last states to the original ones, fitted on "
        f"{REFIT_CHARACTERS:,} characters of the validation text, before the same head. Made by "
        "`python docs/results/retention_smollm2/run.py` from `rows.csv`. Brackets are 95 % intervals over windows or pairs.",
        "",
        "| plan | SST-2 accuracy | trained parameters | head | bits per token before | after | KL, bits per token | BLiMP before | after | difference |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]

    def cell(own: pd.DataFrame, measure: str, side: str, *, interval: bool = False, field: str = "all") -> str:
        chosen = own[
            (own["measure"] == measure) & (own["side"] == side) & (own["field"] == field) & (own["paradigm"] == "all")
        ]
        row = chosen.iloc[0]
        return f"{row['value']:.3f}" + (f" [{row['ci_low']:+.3f} {row['ci_high']:+.3f}]" if interval else "")

    for method, every in rows.groupby("method", sort=False):
        trained = training[(training["method"] == method) & (training["metric"] == "accuracy")]
        for head in every["head"].unique():
            own = every[every["head"] == head]
            first = every[every["head"] == "original"]
            lines.append(
                f"| {method} | {trained['value'].mean():.3f} | {int(trained['trainable'].iloc[0]):,} | {head} | "
                f"{cell(first, 'bits_per_token', 'before')} | {cell(own, 'bits_per_token', 'after')} | "
                f"{cell(own, 'kl_bits', 'difference')} | {cell(first, 'blimp_accuracy', 'before')} | "
                f"{cell(own, 'blimp_accuracy', 'after')} | {cell(own, 'blimp_accuracy', 'difference', interval=True)} |"
            )
    fields = [f for f in rows["field"].unique() if f != "all"]
    lines += ["", "## BLiMP by field: after minus before", "", "| plan | head | " + " | ".join(fields) + " |"]
    lines.append("|---|---" + "|---" * len(fields) + "|")
    for (method, head), own in rows.groupby(["method", "head"], sort=False):
        cells = [cell(own, "blimp_accuracy", "difference", interval=True, field=f) for f in fields]
        lines.append(f"| {method} | {head} | " + " | ".join(cells) + " |")
    kept = rows[(rows["measure"] == "blimp_accuracy") & (rows["side"] == "difference") & (rows["paradigm"] == "all")]
    overall = kept[(kept["field"] == "all") & (kept["head"] == "original")]
    noise = overall[(overall["ci_low"] <= 0) & (overall["ci_high"] >= 0)]["method"].tolist()
    lines += [
        "",
        "## What this shows, and what it does not",
        "",
        f"- With the original head, the change of BLiMP as a whole is within noise for: {', '.join(noise) or 'no plan'}.",
        "- One seed, one task, few items: each plan is one trained model, not a method.",
        "- SmolLM2's blocks have no biases; norms stand in BitFit's place in `spafit-scaled-I`.",
        "- The re-fitted map is least squares on few tokens, and itself costs some bits: it is what can be recovered this way, "
        "not all that can.",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 6:
        run(*(Path(a) for a in sys.argv[1:]))
    else:
        write_page()
