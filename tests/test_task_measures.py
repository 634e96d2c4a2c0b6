"""Cause and use in trained classifiers: exact ends, a planted cause, sums, what is kept, what cannot be measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analysis import task_measures, task_tables
from analysis.causal import exchanged
from analysis.cli.main import app
from analysis.comparing import compare
from analysis.comparison import Comparison
from analysis.comparison_report import write_comparison_report
from analysis.comparison_rows import beside_rows, cause_rows, use_rows
from analysis.task_measures import TaskOptions, check_classifiers
from analysis.task_models import classifier_facts, load_classifier, on_body_before
from analysis.task_scores import TaskScore, resampled_metric
from analysis.task_tables import erasure_table, interaction_table, reverted
from probing.running import probe_layers
from spafit.batches import encode
from spafit.data.training import TrainData
from spafit.errors import DataError, ModelError, UsageError
from spafit.metrics import METRICS, compute_metrics
from spafit.models import load_model
from spafit.training import fit
from tests.test_comparing import table_of
from tests.tiny import save_tiny, tiny, tiny_tokenizer
from tests.training_fixtures import PLAN, QUICK, frame, task

OPTIONS: dict[str, Any] = {"seeds": 1, "n_boot": 100, "controls": (), "quiet": True, "device": "cpu"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, an adapter trained on it by this package, a probing task, and a cache."""
    folder = tmp_path_factory.mktemp("task")
    save_tiny("bert", folder / "base")
    fit(str(folder / "base"), PLAN, data=task(48), settings=QUICK, seeds=(0,), out=folder / "run", quiet=True)
    return {
        "folder": folder, "base": str(folder / "base"), "tuned": str(folder / "run" / "seed-0" / "model"),
        "order": table_of(folder), "cache": folder / "cache",
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(places: dict[str, Any]) -> Comparison:
    return compare(
        places["base"], [places["tuned"]], labels=["tuned"], tasks=[places["order"]], data=task(48), cause_items=12,
        use_items=4, erase=["order"], out=places["folder"] / "out", cache_dir=places["cache"], **OPTIONS,
    )  # fmt: skip


def planted(block: int = 1) -> tuple[Any, Any, Any]:
    """A backbone, a classifier on it of which one block was changed, and a tokenizer."""
    after = tiny("bert", auto="AutoModelForSequenceClassification", num_labels=2)
    before = copy.deepcopy(after.bert)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in after.bert.encoder.layer[block].parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        after.classifier.weight.mul_(20)
    return before, after, tiny_tokenizer()


def scored(model: Any, tokenizer: Any, *, n: int = 40, **options: Any) -> TaskScore:
    """The score of a classifier on items that it labels itself: 1 without an intervention."""
    from spafit.predictions import predict_logits

    items = encode(frame(n, 5), tokenizer, max_length=16, regression=False)
    labels = predict_logits(model, items, tokenizer).argmax(1)
    items = type(items)(items.items, labels, 0, items.window)
    return TaskScore(
        items, tokenizer, metrics=("accuracy",), order=[0, 1], regression=False, n_boot=100, **options
    )  # fmt: skip


# ---------------------------------------------------------------- the two models


def test_the_body_before_is_the_base_itself_under_the_tuned_head(places: dict[str, Any]) -> None:
    base = load_model(places["base"]).model
    facts = classifier_facts(places["tuned"])
    assert facts.ours
    assert facts.labels == ("cat", "dog")
    after, tokenizer = load_classifier(facts, offline=True, allow_pickle=False, device="cpu")
    before = on_body_before(after, base)
    shared = {p.data_ptr() for p in base.parameters()}
    for name, parameter in before.named_parameters():
        theirs = after.get_parameter(name)
        head = "pool" in name or not name.startswith("bert.")
        assert (parameter.data_ptr() == theirs.data_ptr()) == head, name
        assert head or parameter.data_ptr() in shared, name  # nothing is copied
    inputs = tokenizer(["cat the", "dog a"], return_tensors="pt", padding=True)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits.clone()

    tuned, start = logits(after), logits(before)
    assert not torch.equal(tuned, start)
    with exchanged(after, before, range(3)):
        assert torch.equal(logits(after), start)
    with exchanged(after, before, []):
        assert torch.equal(logits(after), tuned)
    with torch.no_grad():
        states = base(**inputs)[0]
        head = after.classifier(after.bert.pooler(states))
    assert torch.allclose(head, start, atol=1e-6)


def test_the_loaded_classifier_is_what_was_saved(places: dict[str, Any]) -> None:
    from spafit.checkpoint import load

    after, tokenizer = load_classifier(
        classifier_facts(places["tuned"]), offline=True, allow_pickle=False, device="cpu"
    )
    inputs = tokenizer(["cat the big", "dog"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = load(places["tuned"]).model.eval()(**inputs).logits
        assert torch.allclose(after(**inputs).logits, expected, atol=1e-5)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("name", list(METRICS))
def test_resampled_metrics_are_those_of_every_resample(name: str) -> None:
    rng = np.random.default_rng(0)
    if METRICS[name].kind == "regression":
        labels, guesses = rng.normal(size=(30, 25)), rng.integers(0, 4, (30, 25)).astype(float)
        guesses[0] = 1.0  # undefined
    else:
        classes = 2 if name == "f1" else 3
        labels, guesses = rng.integers(0, classes, (30, 25)), rng.integers(0, classes, (30, 25))
        guesses[0], labels[1], labels[2], guesses[2] = 1, 0, 0, 0
    expected = [compute_metrics(name, g, y)[name] for g, y in zip(guesses, labels, strict=True)]
    assert np.allclose(resampled_metric(name, guesses, labels), expected, equal_nan=True)


def test_scores_are_those_of_the_trained_run(places: dict[str, Any], found: Comparison) -> None:
    runs = pd.read_parquet(places["folder"] / "run" / "seed-0" / "predictions-validation.parquet")
    own = found.causal[(found.causal["intervention"] == "revert") & (found.causal["metric"] == "score")]
    right = (runs["prediction"] == runs["label"]).mean()
    macro = compute_metrics("macro_f1", runs["prediction"], runs["label"])["macro_f1"]
    assert own["reference"].iloc[0] == pytest.approx((right + macro) / 2)
    assert own["n"].iloc[0] == len(runs) == 12


def test_items_of_equal_length_stand_in_batches_of_their_own() -> None:
    before, after, tokenizer = planted()
    score = scored(after, tokenizer, equal_lengths=True)
    for part in score._parts:
        assert len(part) > 1
        assert len(set(part.lengths)) == 1
    assert score(after)["score"] == 1.0
    lonely = encode(frame(40, 5).iloc[:1], tokenizer, max_length=16, regression=False)
    with pytest.raises(UsageError, match="same number of tokens"):
        TaskScore(lonely, tokenizer, metrics=("accuracy",), order=[0, 1], regression=False, equal_lengths=True)
    del before


# ---------------------------------------------------------------- tables


def test_the_one_changed_block_has_all_the_effect() -> None:
    body, after, tokenizer = planted(1)
    before = on_body_before(after, body)
    score = scored(after, tokenizer)
    table = task_tables.causal_table(before, after, score, equal=scored(after, tokenizer, equal_lengths=True))
    single = reverted(table, "single").set_index("blocks_start")
    assert single["effect"][0] == single["effect"][2] == 0
    assert single.loc[[0, 2], ["ci_low", "ci_high"]].eq(0).all(axis=None)
    assert single["effect"][1] < 0
    assert single["ci_low"][1] <= single["effect"][1] <= single["ci_high"][1]
    assert reverted(table, "prefix")["effect"].tolist() == [0, single["effect"][1], single["effect"][1]]
    assert reverted(table, "suffix").sort_values("blocks_start", ascending=False)["effect"].tolist() == [
        0, single["effect"][1], single["effect"][1],
    ]  # fmt: skip
    moved = table[(table["intervention"] == "transplant") & (table["metric"] == "score")].set_index("blocks_start")
    assert moved["value"][1] == 1.0
    assert moved["effect"][0] == moved["effect"][2] == 0
    assert set(table["intervention"]) == {"revert", "transplant", "skip", "resample"}
    assert set(table[table["intervention"] == "resample"]["draw"]) == {0, 1}
    shares = interaction_table(before, after, score, table)
    own = shares[shares["metric"] == "score"].set_index("block")
    assert own["interaction"].tolist() == [0, 0, 0]
    assert own["shapley"].tolist() == pytest.approx([0, single["effect"][1], 0])
    none = interaction_table(before, after, score, table, permutations=0)
    assert none["shapley"].isna().all()
    some = interaction_table(before, after, score, table, permutations=2)
    assert some[some["metric"] == "score"]["shapley"].tolist() == pytest.approx(own["shapley"].tolist())


def test_erasing_what_decides_costs_the_score_and_random_directions_do_not() -> None:
    _, after, tokenizer = planted()
    texts = encode(frame(60, 9), tokenizer, max_length=16, regression=False)
    with torch.no_grad():  # the decision is one direction of the last state of [CLS], which the pooler hands on
        after.bert.pooler.dense.weight.copy_(torch.eye(16))
        after.bert.pooler.dense.bias.zero_()
    states = []
    for item in texts.items:
        with torch.no_grad():
            found = after(**{k: torch.tensor([v]) for k, v in item.items()}, output_hidden_states=True).hidden_states[
                3
            ][0, 0]
        states.append(found.numpy())
    x = np.stack(states)
    labels = (x[:, 3] > np.median(x[:, 3])).astype(int)
    with torch.no_grad():
        after.classifier.weight.zero_()
        after.classifier.weight[1, 3] = 50.0
        after.classifier.bias.copy_(torch.tensor([0.0, -50.0 * float(np.tanh(np.median(x[:, 3])))]))
    items = type(texts)(texts.items, labels, 0, texts.window)
    score = TaskScore(items, tokenizer, metrics=("accuracy",), order=[0, 1], regression=False, n_boot=100)
    table = erasure_table(after, score, {"decision": (labels, lambda h: x)}, [3])
    own = table[table["metric"] == "score"].groupby("eraser")["effect"].mean()
    assert own["leace"] < -0.25
    assert own["leace"] < own["random"] - 0.1
    leace = table[table["eraser"] == "leace"].iloc[0]
    assert (leace["rank"], leace["n"], leace["n_fit"]) == (1, 60, 60)
    matched = table[table["eraser"] == "equal-variance"]
    if len(matched):
        assert np.allclose(matched["removed_variance"], leace["removed_variance"], rtol=1e-6)


def test_every_table_of_a_comparison_is_whole(places: dict[str, Any], found: Comparison) -> None:
    assert list(found.causal) == ["model", *task_tables.CAUSAL_COLUMNS]
    assert list(found.interaction) == ["model", *task_tables.INTERACTION_COLUMNS]
    assert list(found.erasure) == ["model", *task_tables.ERASURE_COLUMNS]
    prefixes = reverted(found.causal, "prefix")
    base = found.causal[(found.causal["intervention"] == "transplant") & (found.causal["metric"] == "score")]
    assert prefixes["value"].iloc[-1] == base["reference"].iloc[0]  # the adapter left the embeddings as they were
    single = reverted(found.causal, "single")
    assert single["effect"].iloc[0] == 0  # block 0 is frozen
    own = found.interaction[found.interaction["metric"] == "score"]
    assert own["shapley"].sum() == pytest.approx(prefixes["effect"].iloc[-1])
    assert set(found.erasure["hidden"]) == {1, 2, 3}
    assert found.run["task"]["not_measured"] == {"tuned": []}
    loaded = Comparison.load(found.folder)
    for name in task_measures.TASK_TABLES:
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(found, name))


def test_residual_sums_of_the_use_table_are_the_same_at_every_block(found: Comparison) -> None:
    own = found.use[(found.use["branch"] == "residual") & (found.use["statistic"] == "sum")]["value"]
    assert len(own) == 3
    assert own.max() - own.min() <= 0.1 * own.abs().max()
    assert (found.use["n"] + found.use["n_failed"] == 4).all()


def test_the_same_call_measures_nothing_again(
    places: dict[str, Any], found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("causal_table", "interaction_table", "erasure_table", "use_table"):
        monkeypatch.setattr(task_measures, name, never)
    options: dict[str, Any] = {
        "labels": ["tuned"], "tasks": [places["order"]], "data": task(48), "use_items": 4, "erase": ["order"],
        "out": places["folder"] / "out", "cache_dir": places["cache"], **OPTIONS,
    }  # fmt: skip
    again = compare(places["base"], [places["tuned"]], cause_items=12, **options)
    pd.testing.assert_frame_equal(again.causal, found.causal)
    pd.testing.assert_frame_equal(again.use, found.use)
    with pytest.raises(AssertionError, match="measured again"):
        compare(places["base"], [places["tuned"]], cause_items=10, **options)


def test_the_page_and_markdown_hold_cause_and_use(found: Comparison) -> None:
    page, markdown, *figures = write_comparison_report(found)
    text = page.read_text()
    for part in (
        'id="cause"',
        'id="use"',
        'id="beside"',
        "Erased labels",
        "score lost, reverted",
        "conductance, attention",
    ):
        assert part in text
    assert {"cause.png", "use.png", "erasure.png", "beside.png"} <= {f.name for f in figures}
    assert "not converged" in markdown.read_text()
    assert len(cause_rows(found)) == len(use_rows(found)) == 3
    assert len({tuple(r) for r in beside_rows(found)}) == 1
    assert "On 12 items of pets (validation)" in found.paragraphs()[0]


# ---------------------------------------------------------------- what cannot be measured


def test_one_model_that_is_no_classifier_does_not_cost_the_others(places: dict[str, Any], tmp_path: Path) -> None:
    backbone = save_tiny("bert", tmp_path / "backbone")
    with torch.no_grad():
        backbone.encoder.layer[2].output.dense.weight.add_(0.3)
    backbone.save_pretrained(tmp_path / "backbone")
    both = compare(
        places["base"], [str(tmp_path / "backbone"), places["tuned"]], labels=["plain", "tuned"],
        tasks=[places["order"]], data=task(48), cause_items=6, use_items=2, out=tmp_path / "out",
        cache_dir=places["cache"], **OPTIONS,
    )  # fmt: skip
    assert set(both.causal["model"]) == {"tuned"}
    assert "saved as BertModel, which has no classification head" in both.paragraphs()[0]
    rows = beside_rows(both)
    assert {r["score lost, reverted"] for r in rows if r["model"] == "plain"} == {"–"}
    assert len({tuple(r) for r in rows}) == 1
    write_comparison_report(both)


def test_a_classifier_without_gradients_still_gives_its_causes(places: dict[str, Any], tmp_path: Path) -> None:
    body, after, tokenizer = planted(1)

    class Cut(type(after)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return super().forward(*args, **kwargs)

    after.__class__ = Cut
    one = compare(
        (body, tokenizer), [(after, tokenizer)], labels=["cut"], tasks=[places["order"]], data=task(48), cause_items=6,
        use_items=2, out=tmp_path / "out", cache_dir=places["cache"], **OPTIONS,
    )  # fmt: skip
    assert one.use is None
    assert one.causal is not None
    (why,) = one.run["task"]["not_measured"]["cut"]
    assert why.startswith("use: Cut gives no gradient")
    assert f"Not measured: {why}." in one.paragraphs()[0]


def test_bad_input_is_one_sentence_before_anything_is_probed(places: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": [places["order"]], "out": tmp_path / "out", **OPTIONS}
    others = TrainData("birds", task().frames, ("crow", "owl"), ("accuracy",))
    for data, models, said in (
        (task(), [places["base"]], "saved as BertModel, which has no classification head"),
        (others, [places["tuned"]], "needs a model that predicts the classes crow, owl"),
        (task(pairs=True), [places["tuned"]], "trained on single texts, and pets holds pairs"),
        (task(regression=True), [places["tuned"]], "needs a model that predicts a value"),
    ):
        with pytest.raises(UsageError, match=f"No model after training can be measured on .*{said}"):
            compare(places["base"], models, data=data, **options)
    unlabelled = TrainData("pets", {"train": task().frames["train"]}, ("cat", "dog"), ("accuracy",))
    with pytest.raises(UsageError, match="no labelled items besides those of training"):
        compare(places["base"], [places["tuned"]], data=unlabelled, **options)
    with pytest.raises(UsageError, match="Did you mean 'order'"):
        compare(places["base"], [places["tuned"]], data=task(), erase=["ordr"], cache_dir=places["cache"], **options)
    with pytest.raises(UsageError, match="give data, too"):
        compare(places["base"], [places["tuned"]], erase=["order"], **options)
    with pytest.raises(UsageError, match="cause_items more than 0"):
        check_classifiers(
            {"a": places["tuned"]}, TaskOptions(task(), 0, 2, ("order",)), offline=True, allow_pickle=False
        )
    with pytest.raises(UsageError, match="Name mean or first before max"):
        compare(
            places["base"], [places["tuned"]], data=task(), erase=["order"], pooling=("max",),
            cache_dir=places["cache"], **options,
        )  # fmt: skip
    assert not (tmp_path / "out" / "before" / "scores.parquet").exists()
    wide = tiny("bert", hidden_size=24, num_attention_heads=2)
    after, _ = load_classifier(classifier_facts(places["tuned"]), offline=True, allow_pickle=False, device="cpu")
    with pytest.raises(ModelError, match="not checkpoints of one architecture"):
        on_body_before(after, wide)


def test_run_folders_use_their_models_or_say_why_not(places: dict[str, Any], tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        probe_layers(
            places[name], [places["order"]], seeds=1, n_boot=100, controls=(), out=tmp_path / name,
            cache_dir=places["cache"], quiet=True,
        )  # fmt: skip
    options: dict[str, Any] = {"n_boot": 100, "cache_dir": places["cache"], "quiet": True, "data": task(48)}
    whole = compare(tmp_path / "base", [tmp_path / "tuned"], cause_items=6, use_items=0, out=tmp_path / "a", **options)
    assert whole.causal is not None
    assert whole.use is None
    run = json.loads((tmp_path / "base" / "run.json").read_text())
    run["config"]["model"] = str(tmp_path / "gone")
    (tmp_path / "base" / "run.json").write_text(json.dumps(run))
    tables = compare(tmp_path / "base", [tmp_path / "tuned"], cause_items=6, out=tmp_path / "b", **options)
    assert tables.causal is None
    assert "cannot be had" in tables.run["task"]["not_measured"]["tuned"][0]
    with pytest.raises(UsageError, match="Erasing needs states"):
        compare(tmp_path / "base", [tmp_path / "tuned"], erase=["order"], out=tmp_path / "c", **options)


def test_runs_without_a_common_task_and_other_tokenizers_are_said(places: dict[str, Any], tmp_path: Path) -> None:
    for i, name in enumerate(("base", "tuned")):
        tasks = [table_of(tmp_path / str(i), n=120 + 40 * i)]
        probe_layers(
            places[name], tasks, seeds=1, n_boot=100, controls=(), out=tmp_path / name, cache_dir=places["cache"],
            quiet=True,
        )  # fmt: skip
    with pytest.raises(DataError, match="share no task with the same items"):
        compare(tmp_path / "base", [tmp_path / "tuned"], out=tmp_path / "out", quiet=True, cache_dir=places["cache"])
    other = tiny_tokenizer(decoder=True)
    model = tiny("bert")
    found = compare(
        (model, tiny_tokenizer()), [(model, other)], labels=["other"], tasks=[places["order"]], drift=False,
        out=tmp_path / "words", cache_dir=places["cache"], **OPTIONS,
    )  # fmt: skip
    assert "the tokenizers differ" in found.paragraphs()[0]


def test_an_adapter_on_another_base_is_said(places: dict[str, Any], tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "elsewhere", seed=7)
    found = compare(
        str(tmp_path / "elsewhere"), [places["tuned"]], labels=["tuned"], tasks=[places["order"]], drift=False,
        out=tmp_path / "out", cache_dir=places["cache"], **OPTIONS,
    )  # fmt: skip
    assert "the adapter was trained on another base than elsewhere" in found.paragraphs()[0]


# ---------------------------------------------------------------- running text, sequences, the command


def test_reverted_blocks_are_scored_on_running_text(tmp_path: Path) -> None:
    """A classifier whose base is a language model: only the changed block brings bits per token back."""
    original = save_tiny("bert", tmp_path / "base", auto="AutoModelForMaskedLM")
    after = tiny("bert", auto="AutoModelForSequenceClassification", num_labels=2)
    own = original.bert.state_dict()
    after.bert.load_state_dict({k: own.get(k, v) for k, v in after.bert.state_dict().items()})
    with torch.no_grad():
        after.bert.encoder.layer[2].output.dense.weight.add_(0.5)
    after.config.id2label, after.config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    after.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    (tmp_path / "text.txt").write_text("the cat sees a big dog and runs " * 8)
    found = compare(
        str(tmp_path / "base"), [str(tmp_path / "tuned")], tasks=[table_of(tmp_path)], data=task(48), cause_items=6,
        use_items=0, text=tmp_path / "text.txt", out=tmp_path / "out", cache_dir=tmp_path / "cache", drift=False,
        **OPTIONS,
    )  # fmt: skip
    own = found.causal[found.causal["metric"] == "bits_per_token"].set_index("blocks_start")
    assert own["effect"][0] == own["effect"][1] == 0
    before = found.retention[(found.retention["measure"] == "bits_per_token") & (found.retention["side"] == "before")]
    assert own["value"][2] == pytest.approx(before["value"].iloc[0], abs=1e-6)
    assert "bits per token, reverted" in cause_rows(found)[0]


def test_the_command_takes_every_option(places: dict[str, Any], tmp_path: Path) -> None:
    table = frame(20, 3).assign(label=lambda t: t["label"].map({0: "cat", 1: "dog"}), words=lambda t: t["text"])
    table[["words", "label"]].to_csv(tmp_path / "held.tsv", sep="\t", index=False)
    arguments = [
        "compare", places["base"], places["tuned"], places["tuned"], "--labels", "one,two", "--tasks", places["order"],
        "--seeds", 1, "--controls", "none", "--n-boot", 100, "--out", tmp_path / "out", "--cache-dir", places["cache"],
        "--quiet", "--device", "cpu", "--items", f"{tmp_path / 'held.tsv'},text=words,label=label", "--cause-items", 8,
        "--use-items", 2, "--erase", "order", "--shapley", 1, "--sequence", "order,-", "--no-drift",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    for part in ("Cause: points", "Use: conductance", "Erased labels", "| before |", "As a sequence, one (order)"):
        assert part in done.stdout
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["sequence"]["trained"] == {"one": "order"}
    assert run["sequence"]["backward_transfer"] is None  # one stage alone trained a task that is compared
    assert pd.read_parquet(tmp_path / "out" / "sequence.parquet")["stage"].tolist() == ["before", "one", "two"]
    assert run["task"]["split"] == "items"
    for wrong, said in (
        (["--task", "sst2"], "--task and --items"),
        (["--items", "x.tsv,txt=words"], "Did you mean 'text'"),
        (["--sequence", "order"], "2 are needed, got 1"),
        (["--sequence", "order,ordre"], "Did you mean 'order'"),
    ):
        failed = CliRunner().invoke(app, [str(a) for a in [*arguments, *wrong]])
        assert said in str(failed.exception)
    alone = CliRunner().invoke(app, ["compare", "default", "x", "--data", "y"])
    assert "belong to --task" in str(alone.exception)


def test_a_sequence_of_two_stages_has_both_published_scalars(places: dict[str, Any], tmp_path: Path) -> None:
    second = table_of(tmp_path / "b", n=300)
    found = compare(
        places["base"], [places["tuned"], places["base"]], labels=["one", "two"],
        tasks=[places["order"], f"{second},name=again"], sequence=["order", "again"], drift=False,
        out=tmp_path / "out", cache_dir=places["cache"], **OPTIONS,
    )  # fmt: skip
    assert found.sequence is not None
    value = found.sequence.set_index(["stage", "task"])["value"]
    assert found.run["sequence"]["backward_transfer"] == pytest.approx(value["two", "order"] - value["one", "order"])
    assert "terms above give it, each stage against the start" in found.paragraphs()[-1]
    assert 'id="sequence"' in write_comparison_report(found)[0].read_text()
