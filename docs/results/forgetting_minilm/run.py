"""What fine-tuning made MiniLM forget, by plan and hidden state: real runs, their rows, and the page made from them.

    python docs/results/forgetting_minilm/run.py GLUE_FOLDER UD_FOLDER WORK

Every plan is trained as in ``docs/results/glue_minilm``, with the learning rate chosen there, and compared with the
model that it started from. ``WORK`` keeps everything that is slow, so that the same command goes on where it was
interrupted; what the committed rows hold is not made again. Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd

HERE = Path(__file__).parent
METHODS = ("spafit-scaled-I", "lora", "bitfit", "full")
TASKS = ("sst2", "stsb")
SEEDS = (0, 1, 2)
SEQUENCE = "cola → rte"
TERMS = ("pre", "recoverable", "lost", "moved", "re-encoded")
KEPT = ["trained_on", "method", "training_seed", "task", "level", "control", "hidden", "term", "value", "p_layers"]


def glue_study() -> ModuleType:
    """The script of the other study: its rows chose the learning rates, and its trainings are repeated here."""
    spec = importlib.util.spec_from_file_location("glue_study", HERE.parent / "glue_minilm" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen_rates() -> dict[tuple[str, str], float]:
    """Learning rate of each task and method, chosen on held-out training items in the other study."""
    rows = pd.read_csv(HERE.parent / "glue_minilm" / "rows.csv")
    main = rows[rows["metric"] == "headline"].fillna({"held_out": 0.0})
    mean = main.groupby(["task", "method", "learning_rate"])["held_out"].mean().reset_index()
    best = mean.sort_values("held_out", kind="stable").groupby(["task", "method"]).last()
    return {(str(t), str(m)): float(r) for (t, m), r in best["learning_rate"].items()}


def run(glue: Path, treebank: Path, work: Path) -> None:
    """Probe the model before; train and compare what the committed rows lack, a training seed at a time."""
    from probing.running import probe_layers

    tasks = ["core", f"conllu:{treebank}#upos,deprel"]
    before = work / "before"
    probe_layers(
        None, tasks, controls=("word-type",), seeds=SEEDS, max_train=6000, out=before, cache_dir=work / "cache"
    )
    rates, study = chosen_rates(), glue_study()
    for seed in SEEDS:
        for task in TASKS:
            for method in METHODS:
                facts: dict[str, object] = {"trained_on": task, "method": method, "training_seed": seed}
                if _known(**facts):
                    continue
                result = study.train_cell(task, method, rates[task, method], (seed,), glue, work / "trained")
                _compare(before, [result.model_folder(seed)], work, f"{task}-{method}-{seed}", facts)
                write_page()
        facts = {"trained_on": SEQUENCE, "method": "full, stage 2", "training_seed": seed}
        if not _known(**facts):
            first = study.train_cell("cola", "full", rates["cola", "full"], (seed,), glue, work / "trained")
            _sequence(first.model_folder(seed), glue, work, before, seed)
            write_page()


def _known(**facts: object) -> bool:
    path = HERE / "rows.parquet"
    rows = pd.read_parquet(path, columns=list(facts)) if path.exists() else pd.DataFrame(columns=list(facts))
    return bool((rows[list(facts)] == pd.Series(facts)).all(axis=1).any())


def _compare(before: Path, models: list[Path], work: Path, name: str, facts: dict[str, object]) -> None:
    from analysis.comparing import compare
    from analysis.comparison import Comparison

    out = work / "compared" / name
    done = (out / "forgetting.parquet").exists()
    labels = [str(i) for i in range(len(models))] if len(models) > 1 else ["model"]
    found = Comparison.load(out) if done else compare(
        before, models, labels=labels, out=out, cache_dir=work / "cache", drift=True
    )  # fmt: skip
    tables = []
    for control in ("word-type", "none"):
        rows = found.to_pandas(control=control)  # type: ignore[arg-type]
        tables.append(rows[rows["term"].isin(TERMS) & (rows["control"] == control)])
    rows = pd.concat(tables).assign(**facts)
    if len(models) > 1:
        rows["method"] = rows["method"] + ", stage " + (rows["model"].astype(int) + 1).astype(str)
    _add("rows", rows[KEPT].round({"value": 5, "p_layers": 4}))
    drift = found.drift
    assert drift is not None
    drift = drift[drift["variant"] == "z-scored"].assign(**facts)
    if len(models) > 1:
        drift["method"] = drift["method"] + ", stage " + (drift["model"].astype(int) + 1).astype(str)
    _add("drift", drift[["trained_on", "method", "training_seed", "hidden", "measure", "value", "ci_low", "ci_high"]])


def _sequence(first: Path, glue: Path, work: Path, before: Path, seed: int) -> None:
    """CoLA, then RTE from what CoLA left, everything trained: two stages compared with the start."""
    from spafit import fit, load_model
    from spafit.data.training import glue_data
    from spafit.settings import TrainSettings

    body = work / "sequence" / f"body-{seed}"
    if not (body / "model.safetensors").exists():
        loaded = load_model(str(first))
        assert loaded.tokenizer is not None
        loaded.model.save_pretrained(str(body))
        loaded.tokenizer.save_pretrained(str(body))
    data = glue_data("rte", glue, files={"train": "train.tsv", "validation": "dev.tsv"}).limited(600, seed=0)
    result = fit(
        str(body), "full", data=data, settings=TrainSettings(epochs=3, batch_size=16, learning_rate=5e-5),
        seeds=(seed,), out=work / "sequence" / f"rte-{seed}",
    )  # fmt: skip
    models = [first, result.model_folder()]
    facts = {"trained_on": SEQUENCE, "method": "full", "training_seed": seed}
    _compare(before, models, work, f"sequence-{seed}", facts)
    _own_tasks(models, glue, work, seed)


def _own_tasks(models: list[Path], glue: Path, work: Path, seed: int) -> None:
    """What the stages leave of the two tasks themselves, read by probes."""
    from analysis.comparing import compare
    from analysis.comparison import stage_scores

    tasks = []
    for name, columns in (("cola", "text=text,label=label"), ("rte", "text=text,text2=text2,label=label")):
        folder = work / "tables" / name
        if not folder.is_dir():
            _write_tables(name, glue, folder)
        tasks.append(f"table:{folder},{columns}")
    found = compare(
        None, models, tasks=tasks, labels=["cola", "rte"], controls=(), out=work / "compared" / f"own-{seed}",
        cache_dir=work / "cache", drift=False,
    )  # fmt: skip
    scores = stage_scores(found).assign(training_seed=seed)
    path = HERE / "sequence.csv"
    old = pd.read_csv(path) if path.exists() else scores.iloc[:0]
    pd.concat([old[old["training_seed"] != seed], scores]).round(5).to_csv(path, index=False)


def _write_tables(name: str, glue: Path, folder: Path) -> None:
    """A task's training and development items as tables that a probing task reads."""
    from spafit.data.training import glue_data

    data = glue_data(name, glue, files={"train": "train.tsv", "validation": "dev.tsv"} if name == "rte" else None)
    folder.mkdir(parents=True)
    for split, file in (("train", "train.tsv"), ("validation", "test.tsv")):
        data.frames[split].to_csv(folder / file, sep="\t", index=False)


def _add(name: str, rows: pd.DataFrame) -> None:
    """Put rows into the committed table, in place of earlier ones of the same runs."""
    path = HERE / f"{name}.parquet"
    if path.exists():
        old = pd.read_parquet(path)
        key = ["trained_on", "method", "training_seed"]
        fresh = set(rows[key].itertuples(index=False, name=None))
        old = old[[k not in fresh for k in old[key].itertuples(index=False, name=None)]]
        rows = pd.concat([old, rows], ignore_index=True)
    rows.to_parquet(path, index=False, compression="zstd")


def write_page() -> None:
    """README.md and the figure from the rows."""
    rows, drift = pd.read_parquet(HERE / "rows.parquet"), pd.read_parquet(HERE / "drift.parquet")
    alone = rows[rows["control"] == "none"]
    own = rows[(rows["control"] == "word-type") | ~rows["task"].isin(rows.loc[rows["control"] == "word-type", "task"])]
    n_models = rows[["trained_on", "method", "training_seed"]].drop_duplicates().shape[0]
    lines = [
        "# What fine-tuning made MiniLM forget",
        "",
        f"{n_models} trained models against the one that they started from, {rows['task'].nunique()} probing tasks (the "
        "generated suite, UD EWT's parts of speech and dependency labels), probes on 3 seeds, up to 6,000 training items. The "
        "model is contrastively tuned to embed sentences, not a raw language model. Made by "
        "`python docs/results/forgetting_minilm/run.py` from `rows.parquet` and `drift.parquet`.",
        "",
        "## At the hidden state where each task could be read best before",
        "",
        "Accuracy of the task alone, in points, mean over tasks; ± is the standard deviation over training seeds. "
        "Lost: the probe fitted before minus one fitted after, each on its own states. Significant: losses with p < .05 (max-T "
        "over hidden states, less the control task), of all tasks and seeds.",
        "",
        "Score: the trained task's own headline score on its development items (SST-2 accuracy, STS-B the mean of both "
        "correlations), of the same trainings in `../glue_minilm/rows.csv`.",
        "",
        "| trained on | method | score | lost | significant losses | significant gains | CKA of the last hidden state |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    scores = _scores()
    best = _at_best(alone)
    strict = _at_best(own)
    for (trained_on, method), group in best.groupby(["trained_on", "method"], sort=False):
        seeds = 100 * group[group["term"] == "lost"].groupby("training_seed")["value"].mean()
        tests = strict[(strict["trained_on"] == trained_on) & (strict["method"] == method) & (strict["term"] == "lost")]
        hit = tests[tests["p_layers"] < 0.05]
        cka = drift[
            (drift["trained_on"] == trained_on) & (drift["method"] == method) & (drift["measure"] == "cka")
            & (drift["hidden"] == drift["hidden"].max())
        ]["value"]  # fmt: skip
        spread = f" ± {seeds.std():.1f}" if len(seeds) > 1 else ""
        lines.append(
            f"| {trained_on} | {method} | {_score(scores, trained_on, method, seeds.index)} | {seeds.mean():+.1f}{spread} | "
            f"{(hit['value'] > 0).sum()} of {len(tests)} | "
            f"{(hit['value'] < 0).sum()} | {cka.mean():.2f} |"
        )
    lines += ["", "## By hidden state, mean over tasks and seeds", ""]
    lines += ["Points less the control task: lost / moved / re-encoded.", ""]
    hidden = sorted(own["hidden"].unique())
    lines += [
        "| trained on | method | " + " | ".join(f"{h}" for h in hidden) + " |",
        "|---|---" + "|---" * len(hidden) + "|",
    ]
    mean = 100 * own.groupby(["trained_on", "method", "hidden", "term"], sort=False)["value"].mean()
    for trained_on, method in dict.fromkeys(zip(own["trained_on"], own["method"], strict=True)):
        cells = [
            " / ".join(f"{mean[trained_on, method, h, t]:+.1f}" for t in ("lost", "moved", "re-encoded"))
            for h in hidden
        ]
        lines.append(f"| {trained_on} | {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## The largest significant losses",
        "",
        "| task | trained on | method | seeds | lost |",
        "|---|---|---|---|--:|",
    ]
    lost = strict[(strict["term"] == "lost") & (strict["p_layers"] < 0.05) & (strict["value"] > 0)]
    top = (
        lost.groupby(["task", "trained_on", "method"])["value"]
        .agg(["mean", "size"])
        .sort_values("mean", ascending=False)
    )
    for (task, trained_on, method), r in top.head(10).iterrows():
        lines.append(f"| {task} | {trained_on} | {method} | {int(r['size'])} | {100 * r['mean']:+.1f} |")
    lines += _sequence_lines()
    lines += ["", *_reading(best, strict), ""]
    (HERE / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _scores() -> pd.Series:
    """Headline score by task, method and training seed, at the chosen learning rate."""
    rows, rates = pd.read_csv(HERE.parent / "glue_minilm" / "rows.csv"), chosen_rates()
    main = rows[rows["metric"] == "headline"]
    at_rate = [rates[t, m] == r for t, m, r in zip(main["task"], main["method"], main["learning_rate"], strict=True)]
    return main[at_rate].set_index(["task", "method", "seed"])["value"]


def _score(scores: pd.Series, task: str, method: str, seeds: pd.Index) -> str:
    own = [float(scores[task, method, s]) for s in seeds if (task, method, s) in scores.index]
    return f"{sum(own) / len(own):.3f}" if own else "–"


def _sequence_lines() -> list[str]:
    """The forgetting matrix of the sequence and its two scalars, from sequence.csv."""
    from analysis.sequence import forgetting_matrix, sequence_summaries

    path = HERE / "sequence.csv"
    if not path.exists():
        return []
    scores = pd.read_csv(path)
    names = {t: t.rsplit(".", 1)[-1] for t in scores["task"].unique()}
    lines = [
        "",
        "## In sequence: CoLA, then RTE, everything trained",
        "",
        "Best accuracy over hidden states of a probe for each of the two tasks themselves, before and after each stage, in percent. "
        "Backward transfer ([Lopez-Paz & Ranzato 2017](https://arxiv.org/abs/1706.08840), equation 3) is the first task's last score "
        "minus that right after its own stage; average forgetting ([Chaudhry et al. 2018](https://arxiv.org/abs/1801.10112)) its best "
        "earlier score after a stage minus its last. What each hidden state lost of the probing tasks after each stage stands above.",
        "",
        "| training seed | stage | " + " | ".join(names.values()) + " | backward transfer | average forgetting |",
        "|--:|---" + "|--:" * (len(names) + 2) + "|",
    ]
    for seed, own in scores.groupby("training_seed"):
        matrix = forgetting_matrix(own[["stage", "task", "value"]])
        trained = {
            stage: next(t for t, n in names.items() if n == stage) for stage in matrix.index if stage in names.values()
        }
        both = sequence_summaries(matrix, trained)
        for stage in matrix.index:
            cells = " | ".join(
                f"{100 * v:.1f}{'*' if trained.get(stage) == t else ''}" for t, v in matrix.loc[stage].items()
            )
            last = stage == matrix.index[-1]
            tail = [f"{100 * v:+.1f}" if last else "" for v in both.values()]
            lines.append(f"| {seed} | {stage} | {cells} | {' | '.join(tail)} |")
    return [*lines, "", "\\* trained in this stage."]


def _at_best(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows at each task's best hidden state before training."""
    pre = rows[rows["term"] == "pre"].groupby(["task", "hidden"])["value"].mean()
    best = pre.groupby("task").idxmax().map(lambda key: key[1])
    return rows[rows["hidden"] == rows["task"].map(best)]


def _reading(best: pd.DataFrame, strict: pd.DataFrame) -> list[str]:
    """What it shows and does not, from the numbers themselves."""
    lost = best[best["term"] == "lost"]
    order = (100 * lost.groupby(["trained_on", "method"])["value"].mean()).sort_values()
    seeds = lost.groupby(["trained_on", "method"])["training_seed"].nunique()
    ends = [f"{m} on {t} ({order[t, m]:+.1f} points)" for t, m in (order.index[0], order.index[-1])]
    spread = (100 * lost.groupby(["trained_on", "method", "training_seed"])["value"].mean()).groupby(level=[0, 1]).std()
    said = (
        f"; {int((seeds < 2).sum())} of {len(seeds)} rows are a single training, so nothing is said about methods"
        if (seeds < 2).any()
        else f"; the standard deviation over training seeds is {spread.mean():.1f} on average"
    )
    return [
        "## What this shows, and what it does not",
        "",
        f"- Mean loss from {ends[0]} to {ends[1]}{said}.",
        "- A loss at one hidden state is not a loss of the model: another hidden state may still show it.",
        "- Few items and epochs, one small encoder; adapters that barely learned their task had little reason to forget.",
        "- Losses are what a linear probe no longer reads; intervals and p are about test items and probing seeds of one "
        "trained model each.",
    ]


if __name__ == "__main__":
    if len(sys.argv) == 4:
        run(*(Path(a) for a in sys.argv[1:]))
    else:
        write_page()
