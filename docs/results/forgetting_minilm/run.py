"""What fine-tuning made MiniLM forget, by plan and hidden state: real runs, their rows, and the page made from them.

    python docs/results/forgetting_minilm/run.py GLUE_FOLDER UD_FOLDER WORK

Every plan is trained with the learning rate that ``docs/results/glue_minilm`` chose for SST-2, or a smaller one where that
fails, and compared with the model that it started from. ``WORK`` keeps everything that is slow, so that the same command goes on where it was
interrupted; what the committed rows hold is not made again. Without arguments only the page is made again.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
METHODS = ("spafit-scaled-I", "lora", "bitfit", "full")
#: Training items, epochs and tokens kept. With a fifth of STS-B's items most plans learn nothing of it, and what they
#: forget is the damage of a training that failed.
TASKS = {"sst2": (1000, 2.0, 48), "stsb": (5000, 3.0, 64)}
#: Learning rates on STS-B where those of SST-2 end in a constant prediction (score .16 and .12 after the same epochs);
#: LoRA does not learn STS-B at this one either.
STSB_RATES = {"lora": 1e-4, "spafit-scaled-I": 2e-4}
#: Items, epochs and tokens of the two tasks that are trained one after the other, with everything trained.
STAGES = {"cola": (8551, 3.0, 48), "rte": (2490, 3.0, 96)}
#: A score below this is that of a training that failed.
LEARNT = {"sst2": 0.6, "stsb": 0.5}
FILES = {"rte": {"train": "train.tsv", "validation": "dev.tsv"}}
SEEDS = (0, 1, 2)
SEQUENCE = "cola → rte"
TERMS = ("pre", "recoverable", "lost", "moved", "re-encoded")
KEPT = ["trained_on", "method", "training_seed", "task", "level", "control", "hidden", "term", "value", "p_layers"]


def chosen_rates() -> dict[str, float]:
    """Learning rate of each method, chosen on held-out training items of SST-2 in the other study."""
    rows = pd.read_csv(HERE.parent / "glue_minilm" / "rows.csv")
    main = rows[(rows["metric"] == "headline") & (rows["task"] == "sst2")].fillna({"held_out": 0.0})
    mean = main.groupby(["method", "learning_rate"])["held_out"].mean().reset_index()
    best = mean.sort_values("held_out", kind="stable").groupby("method").last()
    return {str(m): float(r) for m, r in best["learning_rate"].items()}


def train(
    task: str, method: str, seed: int, glue: Path, out: Path, *, size: tuple[int, float, int], model: str | None = None
) -> tuple[Path, float]:
    """The trained model's folder, and its headline score on the task's development items; finished work is kept."""
    from spafit import TrainSettings, fit
    from spafit.data.training import glue_data

    items, epochs, length = size
    given = glue_data(task, glue, files=FILES.get(task))
    frames = {split: frame for split, frame in given.frames.items() if split in ("train", "validation")}
    data = type(given)(given.name, frames, given.labels, given.metrics, given.source)
    rate = STSB_RATES.get(method, chosen_rates()[method]) if task == "stsb" else chosen_rates()[method]
    settings = TrainSettings(epochs=epochs, batch_size=16, learning_rate=rate, max_length=length, max_train=items)
    result = fit(model, method, data=data, settings=settings, seeds=(seed,), out=out, device="cpu", quiet=True)
    runs = result.runs[(result.runs["metric"] == "headline") & (result.runs["seed"] == seed)]
    return result.model_folder(seed), float(runs["value"].iloc[0])


def run(glue: Path, treebank: Path, work: Path) -> None:
    """Probe the model before; train and compare what the committed rows lack, a training seed at a time."""
    from probing.running import probe_layers

    tasks = ["core", f"conllu:{treebank}#upos,deprel"]
    before = work / "before"
    probe_layers(
        None, tasks, controls=("word-type",), seeds=SEEDS, max_train=6000, out=before, cache_dir=work / "cache"
    )
    for seed in SEEDS:
        for task, size in TASKS.items():
            for method in METHODS:
                facts: dict[str, object] = {"trained_on": task, "method": method, "training_seed": seed}
                if not _known(**facts):
                    folder, score = train(task, method, seed, glue, work / "trained" / f"{task}-{method}", size=size)
                    _compare(before, [folder], work, f"{task}-{method}-{seed}", facts)
                    _add_score(facts, score)
                    write_page()
        if not _known(trained_on=SEQUENCE, method="full, stage 2", training_seed=seed):
            _sequence(glue, work, before, seed)
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


def _sequence(glue: Path, work: Path, before: Path, seed: int) -> None:
    """CoLA, then RTE from what CoLA left, everything trained: two stages compared with the start."""
    from spafit import load_model

    place = work / "sequence"
    first, score = train("cola", "full", seed, glue, place / "cola", size=STAGES["cola"])
    facts: dict[str, object] = {"trained_on": SEQUENCE, "method": "full, stage 1", "training_seed": seed}
    _add_score(facts, score)
    body = place / f"body-{seed}"
    if not (body / "model.safetensors").exists():
        loaded = load_model(str(first))
        assert loaded.tokenizer is not None
        loaded.model.save_pretrained(str(body))
        loaded.tokenizer.save_pretrained(str(body))
    second, score = train(
        "rte", "full", seed, glue, place / f"rte-{seed}", size=STAGES["rte"], model=str(body)
    )  # fmt: skip
    _add_score({**facts, "method": "full, stage 2"}, score)
    _compare(before, [first, second], work, f"sequence-{seed}", {**facts, "method": "full"})
    _own_tasks([first, second], glue, work, seed)


def _add_score(facts: dict[str, object], score: float) -> None:
    """Put a trained model's score into scores.csv, in place of an earlier one."""
    path = HERE / "scores.csv"
    rows = pd.DataFrame([{**facts, "score": round(score, 5)}])
    if path.exists():
        old = pd.read_csv(path)
        rows = pd.concat([old[~(old[list(facts)] == pd.Series(facts)).all(axis=1)], rows])
    rows.to_csv(path, index=False, lineterminator="\n")


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

    data = glue_data(name, glue, files=FILES.get(name))
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
        "Score: the trained task's own on its development items (accuracy; STS-B the mean of both correlations, CoLA Matthews' "
        "correlation). "
        + "; ".join(f"{t}: {n:,} training items, {e:g} epochs" for t, (n, e, _) in {**TASKS, **STAGES}.items())
        + ".",
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
            f"| {trained_on} | {method} | {scores[trained_on, method].mean():.3f} | {seeds.mean():+.1f}{spread} | "
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
    """Score by what a model was trained on, method and training seed."""
    return pd.read_csv(HERE / "scores.csv").set_index(["trained_on", "method", "training_seed"])["score"].sort_index()


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
    mean = _scores().groupby(level=[0, 1]).mean()
    failed = [f"{m} on {t} ({s:.2f})" for (t, m), s in mean.items() if s < LEARNT.get(str(t), float("-inf"))]
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
        *(
            [f"- Not learnt: {', '.join(failed)}. What such a training changed is damage, not the price of learning."]
            if failed
            else []
        ),
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
