"""``spafit train``, ``evaluate``, ``predict``, ``merge``: what they print and write; bad input is one sentence."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analysis.cli.main import app, run_guarded
from spafit import io
from tests.paths import ROOT
from tests.tiny import save_tiny, tiny_config
from tests.training_fixtures import frame

QUICK = ("--epochs", "2", "--batch-size", "8", "--max-length", "16", "--lr", "1e-2", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    save_tiny("bert", folder)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for name, n, seed in (("train", 48, 1), ("validation", 16, 2)):
        table = frame(n, seed).assign(label=lambda t: t["label"].map({0: "cat", 1: "dog"}))
        table.to_csv(folder / f"{name}.tsv", sep="\t", index=False)
        pairs = frame(n, seed, pairs=True, regression=True)
        pairs.to_csv(folder / f"{name}-pairs.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def trained(bert: Path, tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two seeds."""
    out = tmp_path_factory.mktemp("run") / "out"
    invoke(*train_arguments(bert, tables, out), "--seeds", 2, "--retain", "l2sp:0.01")
    return out


def train_arguments(bert: Path, tables: Path, out: Path) -> list[object]:
    files = ["--train", tables / "train.tsv", "--validation", tables / "validation.tsv"]
    return ["train", "--model", bert, *files, "--strata", "spafit-scaled-I", "--out", out, *QUICK]


def invoke(*arguments: object, code: int | None = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if code is not None:
        assert result.exit_code == code, (result.output, result.exception)
    return result


def sentence(*arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["spafit", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_guarded(app)
    assert caught.value.code in (1, 2)
    written = capsys.readouterr().err.strip().splitlines()
    assert len(written) == 1, written
    return written[0]


# ---------------------------------------------------------------- train


def test_training_writes_models_tables_and_a_record(trained: Path) -> None:
    run = io.read_json(trained / "run.json")
    assert run["seeds"] == [0, 1]
    assert run["remedies"] == ["l2sp:0.01,heads=leave"]
    (price,) = run["remedy_price"]
    assert price["seconds"] > 0
    assert price["bytes"] > 0
    names = {p.name for p in trained.iterdir()}
    assert {"results.md", "learning_curve.png", "runs.csv", "metrics.csv", "seed-0", "seed-1"} <= names
    model = {p.name for p in (trained / "seed-0" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "spafit_config.json", "README.md"} <= model
    assert "tokenizer.json" in model
    assert {p.name for p in (trained / "seed-0").iterdir()} == {
        "model", "run.json", "runs.csv", "runs.parquet", "metrics.csv", "metrics.parquet",
        "predictions-validation.csv", "predictions-validation.parquet",
    }  # fmt: skip


def test_the_model_card_is_filled_from_the_run(trained: Path) -> None:
    card = (trained / "seed-1" / "model" / "README.md").read_text()
    rows = io.read_table(trained / "seed-1" / "runs").set_index("metric")["value"]
    assert f"| validation accuracy | {rows['accuracy']:.4f} |" in card
    for piece in ("library_name: peft", "lora+bitfit", "learning_rate: 0.01", "random weights (seed 1)", "PeftModel"):
        assert piece in card, piece


def run_card(folder: Path) -> str:
    """Run the Python of a model card, in its folder, where this package cannot be imported."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    hidden = "import sys; sys.modules.update(dict.fromkeys(('spafit', 'probing', 'analysis')))\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    more = "\nimport json; print(json.dumps([model.config.id2label, model(**inputs).logits.tolist()]))"
    done = subprocess.run(
        [sys.executable, "-c", hidden + code + more], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_model_card_s_code_runs_as_pasted(trained: Path) -> None:
    from transformers import AutoTokenizer

    from spafit.checkpoint import load

    folder = trained / "seed-0" / "model"
    names, logits = json.loads(run_card(folder))
    assert names == {"0": "cat", "1": "dog"}
    inputs = AutoTokenizer.from_pretrained(folder)(["A text.", "Another one."], padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = load(folder).model.eval()(**inputs).logits
    assert torch.allclose(torch.tensor(logits), ours, atol=1e-5)
    saved = io.read_json(folder / "adapter_config.json")["modules_to_save"]
    assert sorted(saved) == sorted(set(saved))


def test_the_table_is_printed_and_json_holds_the_same(bert: Path, tables: Path, trained: Path) -> None:
    arguments = [*train_arguments(bert, tables, trained), "--seeds", 2, "--retain", "l2sp:0.01"]
    shown = invoke(*arguments).stdout  # finished: returned as it is
    assert (trained / "results.md").read_text().strip() in shown
    assert "random weights" in shown
    assert str(trained / "seed-1" / "model") in shown
    content = json.loads(invoke(*arguments, "--json").stdout)
    assert len(content["runs"]) == 6
    assert content["run"]["task"] == "train"


def test_one_table_is_split_and_a_strata_file_is_read(bert: Path, tables: Path, tmp_path: Path) -> None:
    plan = tmp_path / "mine.yaml"
    from tests.training_fixtures import PLAN as config

    config.save(plan)
    out = tmp_path / "out"
    invoke("train", "--model", bert, "--train", tables / "train.tsv", "--strata", plan, "--out", out, *QUICK)
    assert len(io.read_table(out / "seed-0" / "predictions-validation")) == 10
    assert io.read_json(out / "run.json")["method"] == "mine"


def test_pairs_with_numbers_train_and_are_predicted_as_numbers(bert: Path, tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = ["--train", tables / "train-pairs.csv", "--validation", tables / "validation-pairs.csv"]
    invoke("train", "--model", bert, *files, "--text2", "text2", "--regression", "--out", out, *QUICK)
    assert set(io.read_table(out / "runs")["metric"]) == {"pearson", "spearman", "headline"}
    stem = tmp_path / "numbers"
    model = out / "seed-0" / "model"
    invoke("predict", model, tables / "validation-pairs.csv", "--text2", "text2", "--out", stem, "--quiet")
    ours, theirs = io.read_table(stem), io.read_table(out / "seed-0" / "predictions-validation")
    assert ours["prediction"].to_numpy() == pytest.approx(theirs["prediction"].to_numpy(), abs=1e-6)


@pytest.mark.parametrize("weights", [True, False])
def test_a_dry_run_prints_the_plan_within_two_seconds_even_without_weights(tmp_path: Path, weights: bool) -> None:
    folder = tmp_path / "model"
    if weights:
        save_tiny("bert", folder)
    else:
        tiny_config("bert").save_pretrained(folder)
    invoke("train", "--model", folder, "--dry-run", "--strata", "full")  # imports
    start = time.perf_counter()
    shown = invoke("train", "--model", folder, "--dry-run", "--strata", "spafit-1-2-II").stdout
    assert time.perf_counter() - start < 2
    assert "2 labels" in shown
    assert "encoder [2, 3)" in shown
    assert "expected step" in shown
    assert "1 label\n" in invoke("train", "--model", folder, "--dry-run", "--regression").stdout
    assert "3 labels" in invoke("train", "--model", folder, "--dry-run", "--task", "mnli").stdout


def test_a_dry_run_counts_the_classes_of_a_table(
    bert: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.tsv").write_text("said\tkind\n" + "".join(f"a {k}\t{k}\n" for k in ("cat", "cow", "dog", "cat")))
    dry = ["train", "--model", bert, "--dry-run", "--train"]
    columns = ["--text", "said", "--label", "kind"]
    shown = invoke(*dry, tmp_path / "t.tsv", *columns).stdout
    assert shown.startswith("bert, 3 labels\n")
    # 16 wide: a weight and a bias more than with two classes.
    both = [invoke(*dry, p, *c, "--strata", "head").stdout for p, c in
            ((tmp_path / "t.tsv", columns), (tables / "train.tsv", []))]  # fmt: skip
    three, two = (int(re.search(r"\nall +[\d,]+ +(\d+) ", s)[1]) for s in both)  # type: ignore[index]
    assert three - two == 17
    pairs = [*dry, tables / "train-pairs.csv", "--text2", "text2", "--regression"]
    assert "1 label\n" in invoke(*pairs).stdout
    for arguments, expected in (
        ([*dry, tmp_path / "t.tsv"], "no column 'text'"),
        ([*dry, tables / "train.tsv", "--task", "rte"], "name the data twice"),
        ([*dry[:-1], "--task", "rtee"], "Did you mean 'rte'"),
    ):
        assert expected in sentence(*arguments, capsys=capsys, monkeypatch=monkeypatch)


def test_presets_are_listed_one_a_line() -> None:
    shown = dict(line.split("  ", 1) for line in invoke("train", "--presets").stdout.splitlines())
    assert {"full", "bitfit", "spafit-scaled-II"} <= {name.strip() for name in shown}
    assert all(what.strip() for what in shown.values())


def test_help_and_readme_show_how_remedies_and_glue_plans_are_written() -> None:
    import re

    import yaml

    from spafit.glue_plan import parse
    from spafit.retain import parse_remedy

    shown = " ".join(re.findall(r"[^\s│]+", invoke("train", "--help").stdout))
    assert "ewc:1,data=FILE" in shown
    readme = (ROOT / "README.md").read_text()
    written = re.findall(r"--retain (\S+?)(?:\s|`)", readme)
    assert {"l2sp:0.01", "kl:1,data=FILE.tsv"} <= set(written)
    assert parse_remedy("l2sp:0.01").weight == 0.01
    content = yaml.safe_load(re.search(r"<!-- glue plan -->\n```yaml\n(.*?)```", readme, re.DOTALL)[1])  # type: ignore[index]
    assert [m.pop("retain", None) for m in content["methods"]] == [None, ["kl:1,data=FILE.tsv"]]
    plan = parse(yaml.safe_dump(content), file="x.yaml", folder=ROOT, name="x")
    assert (len(plan.tasks), len(plan.methods), plan.seeds) == (2, 2, (0, 1, 2))


def test_the_first_seed_s_model_is_pushed(
    bert: Path, tables: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spafit import hub

    pushed = []
    monkeypatch.setattr(hub, "push_folder", lambda folder, name: pushed.append((folder, name)))
    arguments = [*train_arguments(bert, tables, trained), "--seeds", 2, "--retain", "l2sp:0.01"]
    invoke(*arguments, "--push-to-hub", "me/mine")
    assert pushed == [(trained / "seed-0" / "model", "me/mine")]


def test_ctrl_c_keeps_the_checkpoint_and_the_same_command_goes_on(bert: Path, tables: Path, tmp_path: Path) -> None:
    arguments = [str(a) for a in train_arguments(bert, tables, tmp_path / "out")] + ["--save-steps", "2"]
    code = (
        "import os, signal, sys; sys.argv[0] = 'spafit'\n"
        "from spafit.trainer import StratifiedTrainer as T\n"
        "step = T.training_step\n"
        "def training_step(self, *a, **k):\n"
        "    if self.state.global_step == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self, *a, **k)\n"
        "T.training_step = training_step\n"
        "from analysis.cli.main import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 130, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "Interrupted. What is finished, and the last checkpoint, are kept; the same command goes on."
    seed = tmp_path / "out" / "seed-0"
    assert sorted(p.name for p in seed.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    from spafit.trainer import StratifiedTrainer

    steps = []
    original = StratifiedTrainer.training_step

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StratifiedTrainer, "training_step", count)
        invoke(*arguments)
    assert steps[0] == 4
    assert io.read_json(seed / "run.json")["status"] == "complete"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_is_status_1(
    bert: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = train_arguments(bert, tables, tmp_path / "out")
    arguments[arguments.index("--lr") + 1] = "1e30"
    arguments[arguments.index("--strata") + 1] = "full"
    said = sentence(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert "not finite" in said
    assert "Lower the learning rate" in said


# ---------------------------------------------------------------- evaluate, predict, merge


def test_evaluate_gives_what_training_reported(tables: Path, trained: Path, tmp_path: Path) -> None:
    model = trained / "seed-1" / "model"
    scores = json.loads(invoke("evaluate", model, "--table", tables / "validation.tsv", "--json").stdout)["table"]
    reported = io.read_table(trained / "seed-1" / "runs").set_index("metric")["value"]
    for metric in ("accuracy", "macro_f1", "headline"):
        assert scores[metric] == pytest.approx(reported[metric])
    assert scores["items"] == 16
    shown = invoke("evaluate", model, "--table", tables / "validation.tsv").stdout
    assert f"accuracy {reported['accuracy']:.4f}" in shown
    # A table with one of the classes only is still coded as the model's head is.
    table = pd.read_csv(tables / "validation.tsv", sep="\t")
    table[table["label"] == "dog"].to_csv(tmp_path / "dogs.tsv", sep="\t", index=False)
    alone = json.loads(invoke("evaluate", model, "--table", tmp_path / "dogs.tsv", "--json").stdout)["table"]
    predictions = io.read_table(trained / "seed-1" / "predictions-validation")
    of_dogs = predictions[predictions["label"] == 1]
    assert alone["accuracy"] == pytest.approx((of_dogs["class"] == "dog").mean())


def test_evaluate_on_a_task_matches_its_classes_by_name(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a table the classes are sorted, (equivalent, not_equivalent); the task's order is the reverse, and its F1 is
    # of "equivalent".
    table = frame(60, 1).assign(label=lambda t: t["label"].map({0: "equivalent", 1: "not_equivalent"}))
    table["text2"] = "a cat"
    table.to_csv(tmp_path / "pairs.csv", index=False)
    out, glue = tmp_path / "out", tmp_path / "glue"
    pairs = ["--train", tmp_path / "pairs.csv", "--text2", "text2"]
    invoke("train", "--model", bert, *pairs, "--strata", "full", "--out", out, *QUICK)
    (glue / "MRPC").mkdir(parents=True)
    rows = [
        f"{int(label == 'equivalent')}\t{i}\t{i}\t{text}\ta cat"
        for i, (text, label) in enumerate(zip(table["text"], table["label"], strict=True))
    ]
    for name in ("train.tsv", "dev.tsv"):
        text = "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows[:45], ""])
        (glue / "MRPC" / name).write_text(text)
    model = out / "seed-0" / "model"
    invoke("predict", model, tmp_path / "pairs.csv", "--text2", "text2", "--out", tmp_path / "said", "--quiet")
    said = io.read_table(tmp_path / "said")["class"][:45]
    truth = table["label"][:45]
    right = float((said == truth).mean())
    assert right != 0.5
    hits = int(((said == "equivalent") & (truth == "equivalent")).sum())
    f1 = 2 * hits / (int((said == "equivalent").sum()) + int((truth == "equivalent").sum()))
    on_task = ["evaluate", model, "--task", "mrpc", "--data", glue]
    found = json.loads(invoke(*on_task, "--json").stdout)["validation"]
    assert found["accuracy"] == pytest.approx(right)
    assert found["f1"] == pytest.approx(f1)
    (glue / "RTE").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (glue / "RTE" / name).write_text("index\tsentence1\tsentence2\tlabel\n0\ta cat\ta dog\tentailment\n")
    on_task[on_task.index("mrpc")] = "rte"
    error = sentence(*on_task, capsys=capsys, monkeypatch=monkeypatch)
    assert "rte needs a model that predicts the classes entailment, not_entailment" in error
    assert "this one predicts the classes equivalent, not_equivalent" in error


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_predict_takes_any_table(tables: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    table = pd.read_csv(tables / "validation.tsv", sep="\t")[["text"]].rename(columns={"text": "sentence"})
    path = tmp_path / f"new.{kind}"
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False, quoting=csv.QUOTE_MINIMAL)
    model = trained / "seed-0" / "model"
    shown = invoke("predict", model, path, "--text", "sentence", "--out", tmp_path / "p.q.csv").stdout
    assert "16 rows written" in shown
    ours = io.read_table(tmp_path / "p.q")
    theirs = io.read_table(trained / "seed-0" / "predictions-validation")
    assert list(ours) == ["idx", "prediction", "class", "p(cat)", "p(dog)"]
    assert ours["p(dog)"].to_numpy() == pytest.approx(theirs["p(dog)"].to_numpy(), abs=1e-6)
    assert (tmp_path / "p.q.csv").is_file()
    assert ours[["p(cat)", "p(dog)"]].sum(axis=1).to_numpy() == pytest.approx(1.0)


def test_a_merged_model_gives_the_same_logits_in_plain_transformers(
    tables: Path, trained: Path, tmp_path: Path, bert: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from spafit.checkpoint import load

    model = trained / "seed-0" / "model"
    invoke("merge", model, "--out", tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = pd.read_csv(tables / "validation.tsv", sep="\t")["text"].tolist()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    ours = load(model).model.eval()
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, ours(**inputs).logits, atol=1e-5)
        start = AutoModelForSequenceClassification.from_pretrained(bert)
        assert not torch.allclose(plain(**inputs).logits, start(**inputs).logits, atol=1e-3)
    assert plain.config.id2label == {0: "cat", 1: "dog"}


def test_a_model_is_found_from_another_folder_when_its_base_was_named_relatively(
    bert: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bert.parent)
    out = tmp_path / "out"
    invoke(*train_arguments(Path("bert"), tables, out))
    monkeypatch.chdir(tmp_path)
    invoke("evaluate", out / "seed-0" / "model", "--table", tables / "validation.tsv")


def test_a_fully_trained_model_is_evaluated_and_merged_alike(bert: Path, tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = train_arguments(bert, tables, out)
    arguments[arguments.index("--strata") + 1] = "full"
    invoke(*arguments)
    model = out / "seed-0" / "model"
    scores = json.loads(invoke("evaluate", model, "--table", tables / "validation.tsv", "--json").stdout)["table"]
    assert scores["accuracy"] == io.read_table(out / "runs").set_index("metric")["value"]["accuracy"]
    invoke("merge", model, "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert json.loads(run_card(model))[0] == {"0": "cat", "1": "dog"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--strata", "spafit-scald-I"], "Did you mean 'spafit-scaled-I'"),
        (["--strata", "nothing.yaml"], "no such file"),
        (["--text", "sentence"], "no column 'sentence'"),
        (["--label", "class"], "no column 'class'"),
        (["--validation", "BIRD"], "'bird' is not a class of the training split"),
        (["--task", "rte"], "name the data twice"),
        (["--retain", "kl:1,data=missing.tsv"], "missing.tsv"),
        (["--regression"], "is not a number"),
        (["--metric", "acuracy"], "Did you mean 'accuracy'"),
        (["--metric", "pearson"], "not a metric of classification"),
        (["--retain", "l3sp:1"], "Did you mean 'l2sp'"),
        (["--schedule", "linea"], "Did you mean 'linear'"),
        (["--precision", "float64"], "float32, bfloat16, auto"),
        (["--epochs", "nan"], "epochs must be above 0"),
        (["--lr", "inf"], "learning_rate must be above 0"),
        (["--patience", "2", "--select-share", "0"], "patience needs items to watch"),
        (["--track", "comet"], "Trackers: tensorboard"),
        (["--model", "THREE"], "head of its own for other classes"),
        (["--model", "ADAPTER"], "merge it first"),
        (["--model", "LLAMA", "--strata", "BIASES"], "norm"),
        (["--model", "BART", "--strata", "PLAN"], "decoder"),
        (["--strata", "DEEP"], "blocks"),
    ],
)
def test_bad_input_is_one_sentence_before_training(
    bert: Path, tables: Path, trained: Path, tmp_path: Path, changes: list[str], expected: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from spafit.strata import StrataConfig, Stratum
    from spafit.trainer import StratifiedTrainer

    def never(*args: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(StratifiedTrainer, "train", never)
    special: dict[str, Path] = {"ADAPTER": trained / "seed-0" / "model"}
    for name, (kind, auto) in {
        "THREE": ("bert", "AutoModelForSequenceClassification"), "LLAMA": ("llama", "AutoModel"),
        "BART": ("bart", "AutoModel"),
    }.items():  # fmt: skip
        if name in changes:
            special[name] = tmp_path / name
            save_tiny(kind, tmp_path / name, auto=auto)
            if name == "THREE":
                change_labels(tmp_path / name)
    if "BIRD" in changes:
        special["BIRD"] = tmp_path / "bird.tsv"
        special["BIRD"].write_text("text\tlabel\na cat\tcat\na b\tbird\n")
    for name, stack, blocks, method in (
        ("PLAN", "encoder", 3, "lora"),
        ("DEEP", "encoder", 4, "lora"),
        ("BIASES", "decoder", 3, "bitfit"),
    ):
        if name in changes:
            special[name] = tmp_path / f"{name}.yaml"
            StrataConfig("x", {stack: blocks}, (Stratum(stack, (0, blocks), method),)).save(special[name])
    arguments = [*train_arguments(bert, tables, tmp_path / "out"), *(special.get(c, c) for c in changes)]
    said = sentence(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert expected in said, said
    assert not (tmp_path / "out").exists()


def change_labels(folder: Path) -> None:
    """A sequence classifier with a trained head of three classes."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["evaluate", "TABLES"], "not a model that was trained here"),
        (["evaluate", "MODEL"], "--table"),
        (["evaluate", "MODEL", "--table", "MISSING"], "missing.tsv"),
        (["predict", "MODEL", "TABLE", "--text", "sentence", "--out", "x"], "no column 'sentence'"),
        (["merge", "TABLES", "--out", "x"], "not a model that was trained here"),
        (["merge", "MODEL", "--out", "TABLES"], "is not empty"),
        (["predict", "MODEL", "TABLE", "--text2", "text", "--out", "x"], "was trained on single texts"),
        (["train", "--task", "rte", "--data", "TABLES", "--metric", "f1"], "has metrics of its own"),
    ],
)
def test_bad_input_to_the_other_commands_is_one_sentence(
    tables: Path, trained: Path, tmp_path: Path, command: list[str], expected: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = {"TABLES": tables, "MODEL": trained / "seed-0" / "model", "TABLE": tables / "validation.tsv"}
    named["MISSING"] = tmp_path / "missing.tsv"
    said = sentence(*(named.get(c, c) for c in command), capsys=capsys, monkeypatch=monkeypatch)
    assert expected in said, said


def test_a_schedule_changes_strata_while_training_and_says_why(
    bert: Path, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = {"capsys": capsys, "monkeypatch": monkeypatch}
    (tmp_path / "rules.yaml").write_text(
        "schema_version: 1\nrules:\n  - {at: {step: 4}, rank: 8}\n"
        "  - {on: signal, reading: 'lost:core.tense', tolerance: 0, moves: rises, do: freeze}\n"
    )
    rules = ("--strata-schedule", tmp_path / "rules.yaml")
    said = sentence(*train_arguments(bert, tables, tmp_path / "out"), *rules, **how)
    assert "reads 'lost:core.tense', and nothing is measured while training. Give a signal" in said
    (tmp_path / "rules.yaml").write_text("schema_version: 1\nrules:\n  - {at: {step: 4}, rank: 8}\n")
    done = invoke(*train_arguments(bert, tables, tmp_path / "out"), *rules)
    assert re.search(r"Change:  seed 0, step 4: rank .* 64 → .* 8 \(the timetable, step 4\)", done.stdout)
    run = io.read_json(tmp_path / "out" / "run.json")
    assert run["method"] == "spafit-scaled-I + rules"
    (tmp_path / "rules.yaml").write_text("schema_version: 1\nrules:\n  - {at: {step: 4}, ranks: 8}\n")
    said = sentence(*train_arguments(bert, tables, tmp_path / "other"), *rules, **how)
    assert "line 3, rules[0].ranks: unknown field 'ranks'" in said
