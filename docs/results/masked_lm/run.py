"""What classification tuning left of a small masked language model: real runs, their rows, and the page made of them.

    python docs/results/masked_lm/run.py WIKITEXT_FOLDER GLUE_FOLDER BLIMP_FOLDER WORK

The model is made by ``pretrain.py`` beside this file. Finished trainings and measured models in ``WORK`` are kept.
Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
#: Learning rates; with the trainer's own ones a model as small as this learns nothing of SST-2.
RATES = {"full": 1e-3, "spafit-scaled-I": 2e-3}
ITEMS, EPOCHS, PAIRS, TEST_CHARACTERS, REFIT_CHARACTERS = 2000, 5, 10, 12_000, 60_000


def pretraining() -> ModuleType:
    """The script that makes the model."""
    spec = importlib.util.spec_from_file_location("masked_lm_pretrain", Path(__file__).parent / "pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def control_table(trained: Any, fresh: Any, train_text: str, text: str, pairs: pd.DataFrame | None) -> pd.DataFrame:
    """Bits per masked token of the trained model, of itself before its first step, and of token frequencies.

    Columns model, bits_per_token, ci_low, ci_high (over windows), tokens, blimp_accuracy. Token frequencies are those
    of ``train_text``, one added to each; they rank no pairs.
    """
    from analysis.retention import pair_scores
    from analysis.token_rows import unmasked_rows
    from analysis.token_scores import score, windows
    from spafit.stats import BootstrapDraw, interval

    texts = windows(trained, text, length=256)
    scored = {"trained": score(trained, texts), "untrained": score(fresh, texts)}
    ids = trained.tokenizer(train_text, add_special_tokens=False, verbose=False)["input_ids"]
    counts = np.bincount(ids, minlength=len(trained.tokenizer)) + 1.0
    targets = np.concatenate([r.targets for r in unmasked_rows(trained, texts)]).astype(int)
    owners = np.concatenate([r.text for r in unmasked_rows(trained, texts)])
    found = {name: (-s.log_p / np.log(2), s.text) for name, s in scored.items()}
    found["token frequencies"] = (-np.log2(counts / counts.sum())[targets], owners)
    rows = []
    for name, (bits, groups) in found.items():
        low, high = interval(BootstrapDraw.make(groups, n_seeds=1).means(bits[None, None]))[:, 0]
        model = {"trained": trained, "untrained": fresh}.get(name)
        blimp = (
            float("nan") if model is None or pairs is None else _mean_over_paradigms(pairs, pair_scores(model, pairs))
        )
        rows.append((name, bits.mean(), low, high, len(bits), blimp))
    return pd.DataFrame(rows, columns=["model", "bits_per_token", "ci_low", "ci_high", "tokens", "blimp_accuracy"])


def _mean_over_paradigms(pairs: pd.DataFrame, right: np.ndarray) -> float:
    return float(pd.Series(right).groupby(pairs["paradigm"].to_numpy()).mean().mean())


def run(wikitext: Path, glue: Path, blimp: Path, work: Path) -> None:
    """Make the model, see that it learnt something, tune it on SST-2 by each plan, and measure what is left."""
    from dataclasses import replace

    from analysis.retention import retention_table
    from spafit import fit, load_model
    from spafit.data.blimp import read_blimp
    from spafit.data.training import glue_data
    from spafit.language_models import graft, load_language_model
    from spafit.settings import TrainSettings

    made = pretraining()
    train_text, test_text = (made.read_text(wikitext / f"{n}.txt") for n in ("valid", "test"))
    base = made.pretrain(train_text, work / "base")
    original = load_language_model(base)
    text = test_text[:TEST_CHARACTERS]
    other = test_text[TEST_CHARACTERS : TEST_CHARACTERS + REFIT_CHARACTERS]
    pairs = read_blimp(blimp, pairs=PAIRS)
    if not (work / "control.csv").exists():
        fresh = replace(original, model=made.untrained(original.tokenizer, made.Recipe()), name="untrained")
        control_table(original, fresh, train_text, text, pairs).to_csv(work / "control.csv", index=False)
    pd.read_csv(work / "control.csv").round(5).to_csv(HERE / "control.csv", index=False)
    data = glue_data("sst2", glue, files={"train": "train.tsv", "validation": "dev.tsv"}).limited(ITEMS, seed=0)
    tables, scores = [], []
    for method, rate in RATES.items():
        settings = TrainSettings(epochs=EPOCHS, batch_size=16, max_length=48, learning_rate=rate, select_share=0.0)
        out = work / f"{method}-{rate:g}"
        result = fit(str(base), method, data=data, settings=settings, seeds=(0,), out=out)
        scores.append(result.runs.assign(method=method))
        kept = out / "retention.csv"
        if not kept.exists():
            after = graft(original, load_model(str(result.model_folder())).model, name=method)
            table = retention_table(
                original, after, text=text, pairs=pairs, refit_on=other, lens=True, quiet=False
            )  # fmt: skip
            table.to_csv(kept, index=False)
        tables.append(pd.read_csv(kept, dtype={"hidden": "Int64"}).assign(method=method))
    pd.concat(tables).round(5).to_csv(HERE / "rows.csv", index=False)
    pd.concat(scores).to_csv(HERE / "training.csv", index=False)
    write_page()


def write_page() -> None:
    """README.md and lens.png from control.csv, rows.csv and training.csv."""
    control, training = pd.read_csv(HERE / "control.csv"), pd.read_csv(HERE / "training.csv")
    rows = pd.read_csv(HERE / "rows.csv", dtype={"hidden": "Int64"})
    recipe = pretraining().Recipe()
    _draw(rows)
    lines = [
        "# What classification tuning left of a small masked language model",
        "",
        f"A BERT of {recipe.blocks} blocks, {recipe.width} wide, with a vocabulary of {recipe.vocabulary:,}, trained from nothing on "
        f"WikiText-2's validation text ({recipe.steps:,} steps of {recipe.batch} windows of {recipe.window} tokens; "
        f"`pretrain.py`), tuned on {ITEMS:,} items of SST-2 for {EPOCHS} epochs, one seed (learning rate "
        f"{', '.join(f'{r:g} for {m}' for m, r in RATES.items())}); then its original language-model head on the "
        f"tuned body. Bits per token are pseudo-perplexity's: one masked position at a time, on the first {TEST_CHARACTERS:,} characters "
        f"of the test text; BLiMP with {PAIRS} pairs of each of 67 paradigms. *Refitted*: an affine map from the tuned last states "
        f"to the original ones, fitted on the next {REFIT_CHARACTERS:,} characters of the test text, before the same head. Made by "
        "`python docs/results/masked_lm/run.py` from the rows beside this page. Brackets are 95 % intervals over windows or pairs.",
        "",
        "## Did it learn a language at all?",
        "",
        "| model | bits per masked token | BLiMP |",
        "|---|---|--:|",
    ]
    for r in control.to_dict("records"):
        blimp = "–" if pd.isna(r["blimp_accuracy"]) else f"{r['blimp_accuracy']:.3f}"
        lines.append(f"| {r['model']} | {r['bits_per_token']:.3f} [{r['ci_low']:.3f} {r['ci_high']:.3f}] | {blimp} |")
    bits = control.set_index("model")["bits_per_token"]
    if bits["trained"] < min(bits["untrained"], bits["token frequencies"]):
        said = (
            f"The trained model needs {bits['token frequencies'] - bits['trained']:.2f} bits per token less than the frequencies of its "
            "training text: it uses context."
        )
    else:
        said = "The trained model does no better than token frequencies: what follows says nothing."
    lines += [
        "",
        said,
        "",
        "## What tuning left",
        "",
        "| plan | SST-2 accuracy | trained parameters | head | bits per token before | after | KL, bits per token | BLiMP before | after | difference |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]

    def cell(own: pd.DataFrame, measure: str, side: str, *, interval: bool = False) -> str:
        chosen = own[
            (own["measure"] == measure) & (own["side"] == side) & (own["field"] == "all") & (own["paradigm"] == "all")
        ]
        row = chosen.iloc[0]
        return f"{row['value']:.3f}" + (f" [{row['ci_low']:+.3f} {row['ci_high']:+.3f}]" if interval else "")

    for method, every in rows.groupby("method", sort=False):
        trained = training[(training["method"] == method) & (training["metric"] == "accuracy")]
        first = every[every["head"] == "original"]
        for head in ("original", "refitted"):
            own = every[every["head"] == head]
            lines.append(
                f"| {method} | {trained['value'].mean():.3f} | {int(trained['trainable'].iloc[0]):,} | {head} | "
                f"{cell(first, 'bits_per_token', 'before')} | {cell(own, 'bits_per_token', 'after')} | "
                f"{cell(own, 'kl_bits', 'difference')} | {cell(first, 'blimp_accuracy', 'before')} | "
                f"{cell(own, 'blimp_accuracy', 'after')} | {cell(own, 'blimp_accuracy', 'difference', interval=True)} |"
            )
    lens = rows[(rows["head"] == "lens") & rows["hidden"].notna()]
    hidden = sorted(lens["hidden"].unique())
    lines += [
        "",
        "## By hidden state, through a lens",
        "",
        "![KL by hidden state](lens.png)",
        "",
        "KL in bits per token. *Error* is from the model's own prediction before training to that of the lens: where it is not far "
        "below that of a lens that sees nothing "
        f"({rows[(rows['head'] == 'lens') & rows['hidden'].isna()]['value'].iloc[0]:.3f}), a change says little. Positions are not "
        "masked here, so the prediction is mostly the token itself.",
        "",
        "| | " + " | ".join(f"hidden {h}" for h in hidden) + " |",
        "|---|" + "--:|" * len(hidden),
    ]
    for i, (method, own) in enumerate(lens.groupby("method", sort=False)):
        for measure, label in (("lens_error_bits", "error before"), ("lens_kl_bits", f"change, {method}")):
            values = own[own["measure"] == measure].set_index("hidden")["value"]
            if measure == "lens_kl_bits" or i == 0:
                lines.append(f"| {label} | " + " | ".join(_number(values[h]) for h in hidden) + " |")
    moved = {m: o[o["measure"] == "kl_bits"].set_index("head")["value"] for m, o in rows.groupby("method", sort=False)}
    noise = [
        str(m)
        for m, o in rows[
            (rows["measure"] == "blimp_accuracy") & (rows["side"] == "difference") & (rows["head"] == "original")
        ].groupby("method", sort=False)
        if (o[(o["field"] == "all")][["ci_low", "ci_high"]].prod(axis=1) <= 0).all()
    ]
    gained = [str(m) for m, kl in moved.items() if kl["refitted"] < kl["original"]]
    lines += [
        "",
        "## What this shows, and what it does not",
        "",
        "- A tiny model: trained on a quarter of a million tokens, it knows frequent words, what stands beside them, and little grammar. It is "
        "here so that masked models are measured on weights that learnt something, not as a stand-in for BERT.",
        f"- With the original head, the change of BLiMP as a whole is within noise for: {', '.join(noise) or 'no plan'}.",
        f"- A re-fitted head comes closer to the predictions before training for: {', '.join(gained) or 'no plan'}. It is least squares "
        "on few tokens: what can be recovered this way, not all that can.",
        "- One seed, one task, few items: each plan is one trained model, not a method.",
        "",
    ]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3f}"


def _draw(rows: pd.DataFrame) -> None:
    from analysis.retention_displays import plot_lens
    from spafit import plotting

    methods = list(dict.fromkeys(rows["method"]))
    with plotting.style():
        figure = plotting.new_figure(width=4.6 * len(methods), height=3.8)
        axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for ax, method in zip(axes, methods, strict=True):
            plot_lens(rows[rows["method"] == method], ax=ax)
            ax.set_title(method)
    plotting.save_figure(plotting.freeze_layout(figure), HERE / "lens.png")


if __name__ == "__main__":
    if len(sys.argv) == 5:
        run(*(Path(a) for a in sys.argv[1:]))
    else:
        write_page()
