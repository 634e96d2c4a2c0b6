"""The benchmark's table, its submission files and its plan files."""

from __future__ import annotations

import json
import math
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.cli.main import app
from spafit import io
from spafit.data.glue_tasks import GLUE_TASKS
from spafit.errors import ConfigError, DataError, UsageError
from spafit.fit_result import METRIC_COLUMNS, FitResult
from spafit.glue_cells import Context
from spafit.glue_plan import NINE_TASKS, GluePlan, parse, shipped_plans
from spafit.glue_runs import run_glue, trainable_by_method
from spafit.glue_submission import SUBMISSION_FILES, best_seed, collect_submissions
from spafit.glue_table import summarize, to_markdown
from tests.paths import SHARED, needs_shared
from tests.tiny import save_tiny

WORDS = ("the cat sees a dog", "a dog runs", "the old cat runs and runs", "big dogs", "a cat and a dog", "old old dog")
PLAN = """\
model: {model}
tasks: [{tasks}]
methods:
  - head
  - strata: spafit-scaled-I
    name: strata
    settings: {{learning_rate: 1e-3}}
seeds: 2
settings: {{epochs: 1, batch_size: 8, log_steps: 1, select_share: 0.25, max_length: 32, prefix_cache: off}}
"""


def rows(task: str, n: int, *, test: bool) -> str:
    """A file of the benchmark with ``n`` made-up rows."""
    known = GLUE_TASKS[task]
    names = [t[0] for t in known.text]
    head = ["index", *names, *([] if test else [known.label[0]])]
    lines = []
    for i in range(n):
        cells = [str(i), *(WORDS[(i + 2 * k) % len(WORDS)] for k in range(len(names)))]
        if not test:
            label = f"{i % 6 * 0.9:.1f}" if known.regression else i % len(known.labels)
            cells.append(known.labels[int(label)] if known.words else str(label))
        lines.append("\t".join(cells))
    return "\n".join(["\t".join(head), *lines]) + "\n"


def write_glue(folder: Path, tasks: tuple[str, ...]) -> Path:
    for task in tasks:
        for split, names in GLUE_TASKS[task].splits.items():
            place = folder / GLUE_TASKS[task].folders[0] / names[0]
            place.parent.mkdir(parents=True, exist_ok=True)
            text = rows(task, 24 if split == "train" else 12, test=split in GLUE_TASKS[task].predictions)
            if task == "cola" and split != "test":  # no header there
                cells = [line.split("\t") for line in text.splitlines()[1:]]
                text = "\n".join(f"gj04\t{c[2]}\t\t{c[1]}" for c in cells) + "\n"
            place.write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue-model") / "tiny-bert"
    save_tiny("bert", folder)
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Two tasks and the diagnostic, two methods, two seeds: the plan, its data and its result."""
    place = tmp_path_factory.mktemp("glue")
    data = write_glue(place / "data", ("stsb", "mnli", "ax"))
    plan = parse(PLAN.format(model=model, tasks="stsb, mnli"), file="p.yaml", folder=place, name="p")
    return plan, data, run_glue(plan, data=data, out=place / "out", device="cpu", quiet=True)


def raw(*entries: tuple[str, str, int, str, str, float], trainable: int = 10) -> pd.DataFrame:
    names = ("method", "task", "seed", "split", "metric", "value")
    return pd.DataFrame(entries, columns=names).assign(trainable=trainable, total=100)


# ---------------------------------------------------------------- the table


def test_scores_and_average_are_the_benchmarks_by_hand():
    whole = [("m", t, s, "validation", "headline", 0.5 + 0.1 * s) for t in NINE_TASKS if t != "mnli" for s in (0, 1)]
    mnli = [
        ("m", "mnli", seed, f"validation_{split}", "headline", value)
        for split, seed, value in (
            ("matched", 0, 0.7),
            ("mismatched", 0, 0.9),
            ("matched", 1, 0.6),
            ("mismatched", 1, 0.6),
        )
    ]
    other = [("m", "sst2", 0, "test", "headline", 0.0), ("m", "sst2", 0, "validation", "accuracy", 0.0)]
    row = summarize(raw(*whole, *mnli, *other), methods=["m"], tasks=NINE_TASKS).iloc[0]
    assert row["mnli"] == pytest.approx(0.7)  # (0.8 + 0.6) / 2
    assert row["mnli_sd"] == pytest.approx(math.sqrt(0.02))
    assert row["sst2"] == pytest.approx(0.55)
    assert row["average"] == pytest.approx((8 * 0.55 + 0.7) / 9)
    assert row["average_sd"] == pytest.approx(np.std([(8 * 0.5 + 0.8) / 9, (8 * 0.6 + 0.6) / 9], ddof=1))
    assert (row["missing"], row["average_tasks"]) == ("", 9)


def test_the_headline_of_a_task_with_two_metrics_is_their_mean(finished):
    _, _, result = finished
    scores = result.runs.query("task == 'stsb' and method == 'head'").pivot(
        index="seed", columns="metric", values="value"
    )
    assert scores["headline"].to_numpy() == pytest.approx(scores[["pearson", "spearman"]].mean(axis=1).to_numpy())
    table = result.table.set_index("method")
    assert table.loc["head", "stsb"] == pytest.approx(scores["headline"].mean())


def test_a_partial_average_says_what_it_lacks():
    runs = raw(("m", "rte", 0, "validation", "headline", 0.6), ("m", "cola", 0, "validation", "headline", 0.4),
               ("n", "rte", 0, "validation", "headline", 0.6))  # fmt: skip
    table = summarize(runs, methods=["m", "n"], tasks=("cola", "rte"))
    assert table["average"].tolist() == pytest.approx([0.5, 0.6])
    text = to_markdown(table, tasks=("cola", "rte"), seeds=1)
    assert "| m | 10 | 40.0 | 60.0 | 50.0 (partial: 2 of 9) |" in text
    assert "| n | 10 | – | 60.0 | 60.0 (partial: 1 of 9) |" in text
    assert "Partial average of m: it lacks SST-2, MRPC, QQP, STS-B, MNLI, QNLI, WNLI" in text
    assert "do not compare" in text


def test_an_undefined_score_is_shown_and_left_out_of_the_average():
    found = {("stsb", 0): math.nan, ("stsb", 1): 0.9, ("rte", 0): 0.6, ("rte", 1): 0.6}
    runs = raw(*(("m", task, seed, "validation", "headline", value) for (task, seed), value in found.items()))
    table = summarize(runs, methods=["m"], tasks=("stsb", "rte"))
    assert "stsb" in table["missing"].iloc[0].split()
    assert table["average"].iloc[0] == pytest.approx(0.6)
    assert "undefined" in to_markdown(table, tasks=("stsb", "rte"), seeds=2)


# ---------------------------------------------------------------- runs


def test_every_cell_is_a_fit_folder_and_counts_its_parameters(finished):
    _, _, result = finished
    assert not result.failures
    for task in ("stsb", "mnli"):
        for method in ("head", "strata"):
            cell = FitResult.load(result.folder / task / method)
            assert cell.seeds == (0, 1)
            assert (cell.model_folder() / "spafit_config.json").is_file()
    table = result.table.set_index("method")
    assert (table.loc["head", "trainable_min"], table.loc["head", "trainable_max"]) == (17, 51)  # 17 per output
    for name in ("results.md", "results.csv", "runs.parquet", "runs.csv", "run.json"):
        assert (result.folder / name).is_file()
    assert "17 to 51" in (result.folder / "results.md").read_text()


def test_prediction_files_have_the_benchmarks_format(finished):
    _, _, result = finished
    folder = result.folder / "submissions" / "strata"
    assert sorted(p.name for p in folder.iterdir()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "STS-B.tsv"]
    for name in ("MNLI-m.tsv", "AX.tsv"):
        lines = (folder / name).read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(12)]
        assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "neutral", "contradiction"}
    values = pd.read_csv(folder / "STS-B.tsv", sep="\t")["prediction"]
    assert values.between(0, 5).all()
    found = result.run["submissions"]["strata"]
    assert found["missing"] == ["CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "QNLI.tsv", "RTE.tsv", "WNLI.tsv"]
    assert not list((result.folder / "submissions").glob("*.zip"))


def test_the_test_set_is_predicted_by_the_seed_that_is_best_on_the_held_out_share(finished):
    from spafit.batches import encode
    from spafit.checkpoint import load
    from spafit.data.glue import read_glue
    from spafit.predictions import predict_logits
    from tests.tiny import tiny_tokenizer

    _, data, result = finished
    cell = FitResult.load(result.folder / "stsb" / "strata")
    curves = cell.metrics.query("split == 'select' and metric == 'headline'")
    seed = int(curves.loc[curves["value"].idxmax(), "seed"])
    frame = read_glue("stsb", data)["test"]
    encoded = encode(frame, tiny_tokenizer(), max_length=32, regression=True)
    got = pd.read_csv(result.folder / "submissions" / "strata" / "STS-B.tsv", sep="\t")["prediction"].to_numpy()
    wanted = {}
    for s in (0, 1):
        logits = predict_logits(load(cell.model_folder(s)).model, encoded, tiny_tokenizer())
        wanted[s] = np.clip(logits[:, 0], 0, 5)
    assert got == pytest.approx(wanted[seed], abs=6e-4)
    assert got != pytest.approx(wanted[1 - seed], abs=6e-4)


def test_the_seed_is_not_chosen_by_the_development_score():
    rows = [(0, 1, 1.0, "select", "headline", 0.9), (1, 1, 1.0, "select", "headline", 0.1),
            (0, 1, 1.0, "validation", "headline", 0.1), (1, 1, 1.0, "validation", "headline", 0.9)]  # fmt: skip
    metrics = pd.DataFrame(rows, columns=list(METRIC_COLUMNS))
    runs = pd.DataFrame({"seed": [0, 1]})
    assert best_seed(FitResult(Path(), {}, metrics, runs)) == (0, "held-out share")
    none = FitResult(Path(), {}, metrics[metrics["split"] == "validation"], runs)
    assert best_seed(none) == (0, "first seed")


def test_a_second_call_trains_and_predicts_nothing(finished):
    plan, data, result = finished

    def times() -> dict[str, int]:
        inside = [p for p in result.folder.rglob("*") if p.is_file() and p.parent != result.folder]
        return {str(p): p.stat().st_mtime_ns for p in inside}

    before = times()
    again = run_glue(plan, data=data, out=result.folder, device="cpu", quiet=True)
    assert times() == before
    pd.testing.assert_frame_equal(again.table, result.table)


def test_a_failing_cell_is_recorded_and_the_others_go_on(model: Path, tmp_path: Path):
    data = write_glue(tmp_path / "data", ("rte", "wnli"))
    (data / "wnli" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t7\n")
    text = f"model: {model}\ntasks: [rte, wnli, qnli]\nmethods: [head, last-9]\nsettings: {{epochs: 1, log_steps: 1}}\n"
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    command = [
        "glue",
        str(plan),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "-q",
        "--device",
        "cpu",
        "--json",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 3, done.output
    content = json.loads(done.stdout)
    status = {(c["task"], c["method"]): (c["status"], c["reason"]) for c in content["run"]["cells"]}
    assert status["rte", "head"] == ("complete", "")
    assert "3 blocks" in status["rte", "last-9"][1]
    assert "dev.tsv:2: label '7'" in status["wnli", "head"][1]
    assert "no file for the train split of qnli" in status["qnli", "head"][1]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "- rte, last-9: Seed 0: Preset 'last-9'" in text
    assert "| last-9 | – | – | – | – | – |" in text


def test_a_method_with_all_eleven_files_gets_a_zip_that_goes_when_they_change(tmp_path: Path):
    plan = parse("methods: [head, lora]\n", file="p", folder=tmp_path, name="p")
    context = Context(plan, tmp_path, "cpu", True, False, True, None, True)
    for name in SUBMISSION_FILES:
        io.write_text(tmp_path / "submissions" / "head" / name, f"index\tprediction\n0\t{name}\n")
    found = collect_submissions(context, {"head": list(SUBMISSION_FILES), "lora": []})
    assert (found["head"]["missing"], found["head"]["zip"]) == ([], "submissions/head.zip")
    assert found["lora"]["missing"] == list(SUBMISSION_FILES)
    archive = tmp_path / "submissions" / "head.zip"
    with zipfile.ZipFile(archive) as inside:
        assert sorted(inside.namelist()) == sorted(SUBMISSION_FILES)
        assert len(SUBMISSION_FILES) == 11
        assert inside.read("AX.tsv") == b"index\tprediction\n0\tAX.tsv\n"
    some = {"head": ["RTE.tsv"], "lora": []}
    assert collect_submissions(context, some)["head"]["zip"] is None
    assert archive.is_file()  # a call for some tasks leaves a zip that still is of the folder's files
    io.write_text(tmp_path / "submissions" / "head" / "RTE.tsv", "index\tprediction\n0\tother\n")
    collect_submissions(context, some)
    assert not archive.exists()


@pytest.mark.slow
def test_nine_tasks_and_the_diagnostic_make_a_whole_submission(model: Path, tmp_path: Path):
    data = write_glue(tmp_path / "data", tuple(GLUE_TASKS))
    text = f"model: {model}\nmethods: [head]\nsettings: {{epochs: 1, batch_size: 24, log_steps: 1}}\n"
    plan = parse(text, file="p.yaml", folder=tmp_path, name="p")
    result = run_glue(plan, data=data, out=tmp_path / "out", device="cpu", quiet=True)
    assert not result.failures
    with zipfile.ZipFile(tmp_path / "out" / "submissions" / "head.zip") as archive:
        assert sorted(archive.namelist()) == sorted(SUBMISSION_FILES)
    assert result.table["missing"].tolist() == [""]
    assert "partial" not in result.to_markdown()


def test_a_seed_that_fails_costs_neither_the_others_nor_its_traceback(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from spafit import glue_cells

    real = glue_cells.fit

    def breaks(*args, seeds, **more):
        if 0 in seeds:
            raise RuntimeError("planted defect\nsecond line")
        return real(*args, seeds=seeds, **more)

    data = write_glue(tmp_path / "data", ("rte",))
    plan = parse(PLAN.format(model=model, tasks="rte"), file="p", folder=tmp_path, name="p").narrowed(methods=["head"])
    monkeypatch.setattr(glue_cells, "fit", breaks)
    result = run_glue(plan, data=data, out=tmp_path / "out", device="cpu", quiet=True)
    assert "Seed 0: RuntimeError: planted defect (traceback" in result.failures[0]["reason"]
    assert result.failures[0]["seeds"] == [1]
    assert "(1 of 2 seeds)" in result.to_markdown()
    log = tmp_path / "out" / "rte" / "head" / "failure-seed-0.txt"
    assert "second line" in log.read_text()
    monkeypatch.setattr(glue_cells, "fit", real)
    mended = run_glue(plan, data=data, out=tmp_path / "out", device="cpu", quiet=True)
    assert not mended.failures
    assert set(mended.runs["seed"]) == {0, 1}
    assert not log.exists()


def test_other_settings_in_the_same_folder_are_refused_by_the_cell(finished):
    plan, data, result = finished
    other = parse(
        PLAN.format(model=plan.model, tasks="stsb").replace("epochs: 1", "epochs: 2"), file="p", folder=Path(), name="p"
    ).narrowed(methods=["head"], seeds=1)
    done = FitResult.load(result.folder / "stsb" / "head").runs
    refused = run_glue(other, data=data, out=result.folder, device="cpu", quiet=True)
    assert "--no-resume" in refused.failures[0]["reason"]
    pd.testing.assert_frame_equal(FitResult.load(result.folder / "stsb" / "head").runs, done)


def test_no_readable_task_and_no_data_are_errors(model: Path, tmp_path: Path):
    plan = parse(PLAN.format(model=model, tasks="rte"), file="p", folder=tmp_path, name="p")
    with pytest.raises(DataError, match="no such folder"):
        run_glue(plan, data=tmp_path / "nowhere", out=tmp_path / "out")
    with pytest.raises(UsageError, match="--data"):
        run_glue(plan, out=tmp_path / "out")


def test_several_processes_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = parse(PLAN.format(model=model, tasks="rte"), file="p", folder=tmp_path, name="p")
    with pytest.raises(UsageError, match="one process"):
        run_glue(plan, data=tmp_path, out=tmp_path / "out")


@needs_shared
@pytest.mark.slow
def test_a_method_may_hold_on_to_knowledge_and_sweep_towards_the_start(model: Path, tmp_path: Path):
    (tmp_path / "kept.tsv").write_text("text\tlabel\nthe cat sees\t0\na dog\t1\n")
    text = PLAN.format(model=model, tasks="rte").replace("seeds: 2", "seeds: 1")
    text = text.replace(
        "  - head\n", "  - strata: bitfit\n    name: kept\n    retain: ['kl:1,data=kept.tsv', 'l2sp:0.1']\n"
    )
    plan = tmp_path / "plan.yaml"
    plan.write_text(text.replace("epochs: 1,", "epochs: 1, interpolate: [0, 1.0],"))
    data = tmp_path / "RTE"
    data.mkdir()
    for name, n in (("train", 24), ("dev", 12), ("test", 6)):
        (data / f"{name}.tsv").write_text(rows("rte", n, test=name == "test"))
    run_glue(GluePlan.load(plan), out=tmp_path / "out", data=str(tmp_path), device="cpu", quiet=True)
    kept, other = (FitResult.load(tmp_path / "out" / "rte" / name) for name in ("kept", "strata"))
    assert [r["remedy"] for r in kept.run["remedy_price"]] == ["kl", "l2sp"]
    assert other.run["remedies"] == []
    assert kept.interpolation is not None
    assert set(kept.interpolation["share"]) == {0.0, 1.0}
    plan.write_text(text.replace("kept.tsv", "none.tsv"))
    with pytest.raises(ConfigError, match=r"plan.yaml, line \d+.*none.tsv"):
        GluePlan.load(plan)


def test_the_real_wnli_and_rte_run_on_a_tiny_model(model: Path, tmp_path: Path):
    text = PLAN.format(model=model, tasks="rte, wnli") + "files: {wnli: {train: train.rebuilt.tsv}}\n"
    plan = parse(text, file="p", folder=tmp_path, name="p").narrowed(methods=["strata"], seeds=1)
    result = run_glue(plan, data=SHARED / "glue", out=tmp_path / "out", device="cpu", quiet=True)
    assert not result.failures
    assert len((result.folder / "submissions" / "strata" / "WNLI.tsv").read_text().splitlines()) == 147
    assert len((result.folder / "submissions" / "strata" / "RTE.tsv").read_text().splitlines()) == 3001
    assert result.table["rte"].between(0.4, 0.65).all()


# ---------------------------------------------------------------- plan files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: [loar]\n", "line 1, methods[0]: Preset 'loar' is not known"),
        ("methods: [loar]\n", "Did you mean 'lora'?"),
        ("method: [lora]\n", "line 1, method: unknown field 'method'. Allowed: methods"),
        ("methods: [lora]\ntasks: [rte,\n  mnl]\n", "line 3, tasks[1]: 'mnl' is no task of GLUE"),
        ("methods: [lora]\ntasks: [mnl]\n", "Did you mean 'mnli'?"),
        ("methods: [lora]\ntasks: [ax]\n", "the model of mnli answers it"),
        ("methods: [lora]\nsettings:\n  epochs: 2\n  lerning_rate: 1\n", "line 4, settings.lerning_rate: unknown"),
        ("methods: [lora]\nsettings:\n  lerning_rate: 1\n", "Did you mean 'learning_rate'?"),
        ("methods: [lora]\nsettings:\n  epochs: many\n", "line 3, settings.epochs: got 'many'; write a number"),
        ("methods: [lora]\nsettings: {epochs: -1}\n", "line 2, settings.epochs: epochs must be above 0; got -1.0"),
        ("methods: [lora]\nsettings: {schedule: lineer}\n", "settings.schedule: 'lineer' is not a schedule"),
        ("methods: [lora]\ntask_settings: {rte: {class_weights: 1}}\n", "task_settings.rte.class_weights: got 1"),
        ("methods:\n  - strata: lora\n    setings: {}\n", "line 3, methods[0].setings: unknown field"),
        ("methods:\n  - strata: mine.yaml\n", "line 2, methods[0].strata: 'mine.yaml': no such file"),
        ("methods: [lora, LORA]\n", "goes by the same folder as 'lora'"),
        ("methods: []\n", "the list is empty"),
        ("methods: [lora]\nseeds: 0\n", "line 2, seeds: got 0"),
        ("methods: [lora]\nseeds: [1, 1]\n", "write different whole numbers"),
        ("methods: [lora]\nfiles: {rte: {trian: a}}\n", "files.rte.trian: unknown field 'trian'"),
        ("methods: [lora]\nsettings: {patience: 2}\ntask_settings: {rte: {select_share: 0}}\n", "for rte together"),
        ("methods: [lora\n", "line 2, column 1: not readable as YAML"),
        ("methods: [lora]\nschema_version: 2\n", "newer than this package's 1"),
        ("methods: [lora]\nrevision: main\n", "a revision needs a model"),
    ],
)  # fmt: skip
def test_errors_name_file_line_and_field(tmp_path: Path, text: str, said: str):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        GluePlan.load(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_the_more_particular_setting_wins(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(
        "schema_version: 1\nmodel: {id: x, blocks: {encoder: 3}}\n"
        "strata: [{stack: encoder, blocks: [0, 3], method: norm}]\n"
    )
    text = """\
model: x
settings: {epochs: 1, batch_size: 1, max_length: 11, prefix_cache: off}
task_settings: {RTE: {epochs: 2, batch_size: 2}}
methods:
  - strata: mine.yaml
    settings: {batch_size: 3, learning_rate: 1e-5}
    task_settings: {rte: {learning_rate: 1e-4}}
  - random:spafit-scaled-I:3
  - lora-matched:spafit-4-9-I
"""
    plan = parse(text, file="p", folder=tmp_path, name="p")
    mine, random, _ = plan.methods
    rte, cola = plan.settings_of(mine, "rte"), plan.settings_of(mine, "cola")
    assert (rte.epochs, rte.batch_size, rte.max_length, rte.learning_rate) == (2, 3, 11, 1e-4)
    assert (cola.epochs, cola.batch_size, cola.learning_rate, cola.prefix_cache) == (1, 3, 1e-5, "off")
    assert plan.settings_of(random, "rte").learning_rate is None
    assert (mine.name, random.folder) == ("mine", "random-spafit-scaled-I-3")
    assert plan.tasks == NINE_TASKS


def test_names_that_the_plan_lacks_are_refused_with_the_closest():
    plan = GluePlan.load("bert-large-cased")
    assert plan.narrowed(tasks=["rte"], methods=["full"], seeds=2).seeds == (0, 1)
    with pytest.raises(UsageError, match="Did you mean 'cola'"):
        plan.narrowed(tasks=["cla"])
    with pytest.raises(UsageError, match="Did you mean 'bitfit'"):
        plan.narrowed(methods=["bitfti"])
    with pytest.raises(ConfigError, match="Did you mean 'bert-large-cased'"):
        GluePlan.load("bert-large-case")


# ---------------------------------------------------------------- the shipped plan


def test_the_shipped_plan_is_the_papers_comparison_and_is_packaged():
    assert (files("spafit") / "plans" / "bert-large-cased.yaml").is_file()
    assert list(shipped_plans()) == ["bert-large-cased"]
    plan = GluePlan.load("bert-large-cased")
    assert [m.strata for m in plan.methods] == ["full", "lora", "bitfit", "spafit-4-9-I", "spafit-4-9-II"]
    assert (plan.model, plan.data, plan.tasks) == ("bert-large-cased", "hub", NINE_TASKS)
    assert "could not be recovered" in (files("spafit") / "plans" / "bert-large-cased.yaml").read_text()
    assert "bert-large-cased: BERT-large" in CliRunner().invoke(app, ["glue", "--list"]).stdout


def test_the_shipped_plans_parameters_are_the_papers_by_configuration_alone(tmp_path: Path):
    from dataclasses import replace

    from transformers import BertConfig

    config = BertConfig(
        vocab_size=28996, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    config.save_pretrained(tmp_path)
    plan = GluePlan.load("bert-large-cased").narrowed(methods=["spafit-4-9-I", "spafit-4-9-II"])
    counted = trainable_by_method(replace(plan, model=str(tmp_path), tasks=("rte", "mnli", "stsb")))
    got = {(r["method"], r["outputs"]): r["trainable"] for r in counted.to_dict("records")}
    assert (got["spafit-4-9-I", 1], got["spafit-4-9-I", 2], got["spafit-4-9-I", 3]) == (5_649_409, 5_650_434, 5_651_459)
    assert (got["spafit-4-9-II", 1], got["spafit-4-9-II", 2]) == (7_484_417, 7_485_442)


def test_a_dry_run_prints_the_cells_and_says_when_nothing_can_be_counted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    done = CliRunner().invoke(app, ["glue", "bert-large-cased", "--dry-run", "--offline", "--tasks", "rte"])
    assert done.exit_code == 0
    assert "1 tasks × 5 methods × 3 seeds = 15 runs" in done.stdout
    assert "Trainable parameters are not counted: 'bert-large-cased' is not in the cache" in done.stdout
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(model=model, tasks="rte, stsb"))
    done = CliRunner().invoke(app, ["glue", str(plan), "--dry-run"])
    assert "| head | 1 | 17 |" in done.stdout
    assert "| head | 2 | 34 |" in done.stdout
    assert not list(tmp_path.glob("out*"))
