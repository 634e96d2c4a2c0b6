"""Frozen strata and every remedy against forgetting on MiniLM: real runs, their rows, and the page made from them.

    python docs/results/remedies_minilm/run.py GLUE_FOLDER SENTEVAL_FOLDER WORK [SEED …]

One classifier learns SST-2; from it, head included, every plan and remedy learns SentEval's past or present tense, and
is compared with it by probes. ``WORK`` keeps everything that is slow, so that the same command goes on where it was
interrupted; what the committed rows hold is not made again. Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from spafit.data.training import TrainData
    from spafit.settings import TrainSettings

HERE = Path(__file__).parent
#: Learning rates that the study of GLUE tasks chose for SST-2; the head's is that of the other small plans.
RATES = {"lora": 5e-4, "bitfit": 2e-3, "spafit-scaled-I": 2e-3, "head": 2e-3, "full": 5e-5}
#: The plan that remedies are added to, and two weights of each; the first ones are trained first.
REMEDIED = "lora"
WEIGHTS = {"l2sp": (1.0, 0.1), "ewc": (1e6, 1e4), "kl": (1.0, 10.0), "replay": (1.0, 3.0)}
SHARE = 0.5
SEEDS = (0, 1, 2)
ITEMS, KEPT_ITEMS, PROBE_ITEMS = 1000, 400, 1000
EPOCHS = {"first": 2.0, "second": 3.0}
#: Probing tasks that forgetting is the mean of. ``core.tense`` is what the second stage learns, and is not one of them.
TASKS = (
    "core.previous_word", "core.next_word", "core.bigram_shift", "core.subject_number", "core.verb_number",
    "core.main_verb", "core.voice", "core.distant_subject", "core.odd_thing", "core.agent", "core.earlier",
    "core.denied",
)  # fmt: skip
FIRST_TASK = "sst2"


# ---------------------------------------------------------------- runs


def run(glue: Path, senteval: Path, work: Path, seeds: tuple[int, ...]) -> None:
    """Train the first stage and probe it; then every method that the rows lack, a seed at a time."""
    from probing.running import probe_layers

    first_data, second_data = sst2(glue), tense(senteval)
    first, accuracy = _first(first_data, work)
    before = work / "before"
    table = _table(first_data, work / "tables" / FIRST_TASK)
    probe_layers(
        str(first), [*TASKS, table], controls=(), seeds=1, max_train=PROBE_ITEMS, out=before,
        device="cpu", cache_dir=work / "cache", quiet=True,
    )  # fmt: skip
    start = {"items": len(first_data.frames["validation"]), "accuracy": accuracy}
    pd.DataFrame([start]).to_csv(HERE / "first.csv", index=False)
    for seed in seeds:
        later = {_with(name, both[1]) for name, both in WEIGHTS.items()}
        for method in sorted(methods(), key=lambda m: (m == "full", m in later)):
            if not _known(method, seed):
                _one(method, seed, first, first_data, second_data, before, work)
                write_page()


def _first(data: TrainData, work: Path) -> tuple[Path, float]:
    """The classifier that everything starts from, merged, and its accuracy."""
    from spafit import fit
    from spafit.checkpoint import load

    settings = _settings(RATES["lora"], EPOCHS["first"])
    result = fit(None, "lora", data=data, settings=settings, out=work / "first", device="cpu", quiet=True)
    folder = work / "merged"
    if not (folder / "model.safetensors").is_file():
        _tokenizer(result.model_folder()).save_pretrained(str(folder))
        load(result.model_folder()).merge().save_pretrained(str(folder))
    return folder, float(result.runs.loc[result.runs["metric"] == "headline", "value"].iloc[0])


def methods() -> list[str]:
    """Plans, then the remedied plan with each remedy and weight, then interpolation."""
    remedies = [_with(name, weight) for name, both in WEIGHTS.items() for weight in sorted(both)]
    return [*RATES, *remedies, f"{REMEDIED}, interpolated {SHARE:g}"]


def _with(remedy: str, weight: float) -> str:
    return f"{REMEDIED} + {remedy} {weight:g}"


def sst2(folder: Path) -> TrainData:
    """SST-2 with classes called 0 and 1, so that its head is kept for the second task."""
    from spafit.data.training import glue_data

    data = glue_data("sst2", folder)
    frames = {split: data.frames[split] for split in ("train", "validation")}
    return replace(data, frames=frames, labels=("0", "1"), digests={}).limited(ITEMS)


def tense(folder: Path) -> TrainData:
    """SentEval's present (0) or past (1) tense of the main verb; validation and test items are both scored on."""
    from spafit.data.training import TrainData

    names = ["split", "label", "text"]
    rows = pd.read_csv(folder / "past_present.txt", sep="\t", header=None, names=names, quoting=3)
    rows["label"] = (rows["label"] == "PAST").astype(int)
    rows["idx"] = np.arange(len(rows))
    kept = {"train": rows["split"] == "tr", "test": rows["split"] != "tr"}
    frames = {s: rows.loc[at, ["text", "label", "idx"]].reset_index(drop=True) for s, at in kept.items()}
    return TrainData("tense", frames, ("0", "1"), ("accuracy",), source="SentEval past_present").limited(ITEMS)


def _settings(rate: float, epochs: float) -> TrainSettings:
    from spafit.settings import TrainSettings

    return TrainSettings(epochs=epochs, batch_size=16, learning_rate=rate, max_length=48)


def _one(
    method: str, seed: int, first: Path, first_data: TrainData, second_data: TrainData, before: Path, work: Path
) -> None:
    """Train one method from the first stage, compare it with the first stage, and add its rows."""
    from spafit import fit
    from spafit.checkpoint import load

    plan = method.split(" + ")[0].split(",")[0]
    interpolated = "interpolated" in method
    remedies = [] if " + " not in method else [_remedy(method.split(" + ")[1], first_data)]
    folder = work / "trained" / (plan if interpolated else method.replace(" + ", "-").replace(" ", "-"))
    result = fit(
        str(first), plan, data=second_data, settings=_settings(RATES[plan], EPOCHS["second"]), seeds=(seed,),
        out=folder, remedies=remedies, method=method, device="cpu", quiet=True,
    )  # fmt: skip
    stratified = load(result.model_folder(seed))
    if interpolated:
        model, path = _interpolated(stratified, first), work / "interpolated" / f"seed-{seed}"
        model.save_pretrained(str(path))
        _tokenizer(first).save_pretrained(str(path))
    else:
        model, path = stratified.model, result.model_folder(seed)
    right = _right(model, second_data.frames["test"], first)
    kept = _right(model, first_data.frames["validation"], first)
    out = work / "compared" / f"{folder.name}{'-half' * interpolated}-{seed}"
    losses = _losses(before, path, out, work / "cache")
    facts = result.runs.iloc[0]
    price = result.run["remedy_price"]
    record = {
        "method": method, "seed": seed, "accuracy": right.mean(), "first_accuracy": kept.mean(),
        "trainable": int(facts["trainable"]), "learning_rate": RATES[plan], "seconds": facts["seconds"],
        "remedy_seconds_per_step": price[0]["seconds"] if price else 0.0,
    }  # fmt: skip
    _add("runs.csv", pd.DataFrame([record]))
    _add("losses.csv", losses.assign(method=method, seed=seed))
    hidden = int(losses.loc[losses["task"] == FIRST_TASK, "hidden"].iloc[0])
    _add("first_items.parquet", _lost_items(before, out, hidden).assign(method=method, seed=seed))
    items = pd.DataFrame({"item": second_data.frames["test"]["idx"].to_numpy(), "right": right})
    _add("items.parquet", items.assign(method=method, seed=seed))


def _remedy(text: str, data: TrainData) -> Any:
    from spafit.retain import EWC, L2SP, KLToBase, Replay

    name, weight = text.split(" ")
    kept = data.limited(KEPT_ITEMS).frames["train"]
    if name == "l2sp":
        return L2SP(float(weight))
    if name == "ewc":
        return EWC(float(weight), data=kept, labels="given")
    return (KLToBase if name == "kl" else Replay)(float(weight), data=kept)


def _interpolated(stratified: Any, first: Path) -> Any:
    """The model half-way between the first stage and the second, with the second stage's head."""
    from spafit.checkpoint import load
    from spafit.retain import interpolate, snapshot

    start = None if stratified.is_adapter else snapshot(load(first))
    with interpolate(stratified, SHARE, start=start, head="trained"):
        return stratified.merge()


def _tokenizer(folder: Path) -> Any:
    from spafit.hub import locate
    from spafit.loading import load_tokenizer

    return load_tokenizer([locate(str(folder))], required=True)


def _right(model: Any, frame: pd.DataFrame, first: Path) -> np.ndarray:
    """Whether each item is classified as its label says."""
    from spafit.batches import encode
    from spafit.predictions import predict_logits

    tokenizer = _tokenizer(first)
    encoded = encode(frame, tokenizer, max_length=48, regression=False)
    return np.asarray(predict_logits(model.eval(), encoded, tokenizer).argmax(1) == frame["label"].to_numpy())


def _losses(before: Path, model: Path, out: Path, cache: Path) -> pd.DataFrame:
    """Per probing task, at its best hidden state before: its score before and after, and what was lost."""
    from analysis.comparing import compare
    from analysis.comparison import Comparison

    done = (out / "forgetting.parquet").exists()
    found = Comparison.load(out) if done else compare(
        before, [str(model)], labels=["model"], out=out, drift=False, device="cpu", cache_dir=cache, n_boot=200,
        quiet=True,
    )  # fmt: skip
    return found.summary()[["task", "hidden", "pre", "recoverable", "lost", "p_layers"]].round(5)


def _lost_items(before: Path, out: Path, hidden: int) -> pd.DataFrame:
    """For each test item of the first task: 1 if only the probe before was right, -1 if only the one after, else 0."""
    sides = []
    for folder in (before, out / "after" / "model"):
        if folder.is_dir():  # where no hidden state changed, nothing was probed again
            table = pd.read_parquet(folder / "items" / f"{FIRST_TASK}.parquet")
            table = table[table["hidden"] == hidden].set_index("item")
            sides.append((table["label"].astype(str) == table["prediction"].astype(str)).astype(int))
    lost = sides[0] - sides[-1]
    return pd.DataFrame({"item": lost.index.astype(str), "lost": lost.to_numpy(dtype="int8")})


def _table(data: TrainData, folder: Path) -> str:
    """The first task as a probing task: training items that the classifier saw, development items that it did not."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, file in (("train", "train.tsv"), ("validation", "test.tsv")):
        data.frames[split][["text", "label"]].to_csv(folder / file, sep="\t", index=False)
    return f"table:{folder},text=text,label=label,name={FIRST_TASK}"


def _read(name: str) -> pd.DataFrame:
    path = HERE / name
    if not path.exists():
        return pd.DataFrame({"method": [], "seed": []})
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def _known(method: str, seed: int) -> bool:
    items = _read("items.parquet")  # written last
    return bool(((items["method"] == method) & (items["seed"] == seed)).any())


def _add(name: str, rows: pd.DataFrame) -> None:
    """Put one method's and seed's rows into a committed table, in place of earlier ones."""
    old, keys = _read(name), rows[["method", "seed"]].iloc[0]
    old = old[~((old["method"] == keys["method"]) & (old["seed"] == keys["seed"]))]
    table = pd.concat([old, rows], ignore_index=True) if len(old) else rows
    table = table[["method", "seed", *[c for c in table if c not in ("method", "seed")]]]
    if name.endswith(".parquet"):
        table.to_parquet(HERE / name, index=False, compression="zstd")
    else:
        table.to_csv(HERE / name, index=False, float_format="%.6g", lineterminator="\n")


# ---------------------------------------------------------------- page


def _tables(of: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of test items, in the order of the methods, and losses: of probing tasks, or of the first task's items."""
    scores = _ordered(_read("items.parquet").rename(columns={"right": "value"}))
    if of == FIRST_TASK:
        return scores, _read("first_items.parquet").rename(columns={"lost": "value", "item": "task"})
    losses = _read("losses.csv")
    return scores, losses[losses["task"] != FIRST_TASK].rename(columns={"lost": "value"})


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the methods, not in that in which they were made."""
    place = {m: i for i, m in enumerate(methods())}
    return table.sort_values("method", key=lambda names: names.map(place), kind="stable")


def write_page() -> None:
    """README.md and both figures from the rows."""
    from analysis.tradeoffs import tradeoff_table

    general, own = (tradeoff_table(*_tables(of)) for of in ("general", FIRST_TASK))
    runs, losses, first = _ordered(_read("runs.csv")), _read("losses.csv"), pd.read_csv(HERE / "first.csv")
    _draw(
        own,
        "tradeoff_first.png",
        f"forgetting of SST-2: accuracy lost, points, {int(own['n_tasks'].iloc[0])} items (← less)",
    )
    _draw(general, "tradeoff.png", None)
    probed = losses[losses["task"] == FIRST_TASK]
    before = probed["pre"].iloc[0]
    lines = [
        "# Frozen strata and remedies against forgetting: MiniLM on two tasks",
        "",
        f"MiniLM-L6 learns SST-2 ({ITEMS} items, LoRA, merged: accuracy {first['accuracy'].iloc[0]:.3f}), then, from that "
        f"classifier with its head, the tense of the main verb ({ITEMS} items of SentEval's past or present, sentences of UD "
        f"EWT, {EPOCHS['second']:g} epochs), under every plan and with every remedy; remedies are added to `{REMEDIED}` and get "
        f"{KEPT_ITEMS} items of SST-2 where they need items. Weights of remedies and learning rates were fixed beforehand. "
        f"Score: accuracy on {int(general['n_items'].max())} test items. Forgetting: accuracy of probes lost from the first "
        "stage to the second, each task at the hidden state where it could be read best after the first. Brackets are 95 % "
        "intervals over test items, and over probing tasks or SST-2's items, crossed with training seeds. Made by "
        "`python docs/results/remedies_minilm/run.py` from the rows in this folder.",
        "",
        "*On the front*: no other method has a score at least as high and forgetting at most as large, and one of the two "
        "better. The share is of paired draws; a finding other than *within noise* needs 95 % of them.",
        "",
        f"## Forgetting of {len(TASKS)} generated tasks",
        "",
        "Of surface, syntax and semantics; without `core.tense`, which the second stage trains.",
        "",
        *_section(general, "tradeoff.png"),
        "",
        "## Forgetting of SST-2",
        "",
        f"A probe scores {before:.3f} after the first stage. It is fitted on the items that the classifier was trained on, and "
        "tested on SST-2's development set.",
        "",
        *_section(own, "tradeoff_first.png"),
        "",
        "## What each was, and its price",
        "",
        "*By the head*: the one head after the second stage, which answers for tense, applied to SST-2 (after the first stage "
        f"{first['accuracy'].iloc[0]:.3f}); ± is the standard deviation over training seeds.",
        "",
        "| method | SST-2 by a new probe | SST-2 by the head | trained parameters | seconds of training | remedy, seconds per step |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for method, its in runs.groupby("method", sort=False):
        kept = probed.loc[probed["method"] == method, "recoverable"]
        lines.append(
            f"| {method} | {_mean(kept)} | {_mean(its['first_accuracy'])} | {int(its['trainable'].iloc[0]):,} | "
            f"{its['seconds'].mean():.0f} | {its['remedy_seconds_per_step'].mean():.2f} |"
        )
    lines += ["", "## What this shows, and what it does not", ""]
    lines += [*_reading(general, "the generated tasks"), *_reading(own, "SST-2"), *_against(), *_limits(general), ""]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _draw(table: pd.DataFrame, name: str, label: str | None) -> None:
    from analysis.tradeoff_displays import plot_tradeoff
    from spafit import plotting

    with plotting.style():
        ax = plot_tradeoff(table)
    if label:
        ax.set_xlabel(label)
    figure = ax.get_figure(root=True)
    assert figure is not None
    plotting.save_figure(figure, HERE / name, dpi=110)


def _section(table: pd.DataFrame, figure: str) -> list[str]:
    from analysis.tradeoffs import tradeoff_markdown

    return [f"![Task score against forgetting]({figure})", "", tradeoff_markdown(table)]


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def _reading(table: pd.DataFrame, of: str) -> list[str]:
    """Which methods differ, and which do not, by one kind of forgetting."""
    by = table.set_index("method")
    said = []
    for finding, words in (("front", "on the front in 95 % of draws"), ("dominated", "dominated")):
        named = [
            f"{m} (by {r['dominated_by']})" if finding == "dominated" else str(m)
            for m, r in by.iterrows()
            if r["finding"] == finding
        ]
        said.append(f"{words}: {', '.join(named) or 'no method'}")
    noise = by[(by["forgetting_low"] <= 0) & (by["forgetting_high"] >= 0)].index.tolist()
    more = by[by["forgetting_high"] < 0].index.tolist()
    less = by[by["forgetting_low"] > 0].index.tolist()
    return [
        f"- By forgetting of {of}, {'; '.join(said)}; all others within noise.",
        f"- Of {of}, something was lost beyond noise under {', '.join(less) or 'no method'}; more could be read afterwards "
        f"under {', '.join(more) or 'no method'}; within noise of no change: {', '.join(noise) or 'no method'}.",
    ]


def _against() -> list[str]:
    """Every remedy beside the plan without one, in words."""
    from analysis.tradeoffs import tradeoff_differences

    if REMEDIED not in set(_read("items.parquet")["method"]):
        return []
    general, own = (
        tradeoff_differences(*_tables(of), against=REMEDIED).to_dict("records") for of in ("general", FIRST_TASK)
    )
    found = []
    for row, first in zip(general, own, strict=True):
        if row["method"].startswith(REMEDIED):
            said = [_difference(row, "score", "score"), _difference(row, "forgetting", "generated tasks lost")]
            said.append(_difference(first, "forgetting", "SST-2 lost"))
            found.append(f"- {row['method']} minus {REMEDIED} alone, points: {'; '.join(said)}.")
    return found


def _difference(row: dict[Any, Any], name: str, called: str) -> str:
    value, low, high = (100 * row[name + end] for end in ("", "_low", "_high"))
    return f"{called} {value:+.1f} [{low:+.1f} {high:+.1f}]" + (", within noise" if low <= 0 <= high else "")


def _limits(table: pd.DataFrame) -> list[str]:
    seeds = sorted(set(table["n_seeds"]))
    missing = [m for m in methods() if m not in set(table["method"])]
    return [
        f"- Seeds of the second stage: {' or '.join(map(str, seeds))}, all from one first stage. "
        + (
            "A method with one seed is one trained model: its intervals and findings speak of that model, not of the method."
            if seeds[0] == 1
            else "Resampling so few understates what another training would give."
        ),
        *([f"- Not run yet: {', '.join(missing)}."] if missing else []),
        "- One small encoder, one pair of tasks, one head for both, two weights of each remedy: which remedy is best elsewhere "
        "is not known from this. A loss is what a linear probe no longer reads.",
        "- The hidden state is chosen on the same test items before, which raises every method's loss by the same rule; "
        "`head` changes no hidden state, and its forgetting is exactly 0.",
        "- Seconds are of two shared cores beside other work.",
    ]


if __name__ == "__main__":
    if len(sys.argv) >= 4:
        glue, senteval, work = (Path(a) for a in sys.argv[1:4])
        run(glue, senteval, work, tuple(int(a) for a in sys.argv[4:]) or SEEDS)
    else:
        write_page()
