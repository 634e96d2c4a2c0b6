"""Measures of a run are those of the functions on its own items; they are added, resumed, and never in the way."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

import probing.encoding
import probing.running
from analysis.interpretation import interpret
from probing import ProbeResults
from probing.controls import control_labels
from probing.extraction import extract
from probing.fitting import ProbeSettings
from probing.item_states import item_states, rows_of_items
from probing.measure_displays import measure_markdown, measure_rows
from probing.measures import measure_task, unsuited
from probing.planning import extraction_options, plan_probing
from probing.probes.mdl import online_code
from probing.targets import label_values
from spafit.errors import UsageError
from tests.test_running import contents, number_task, quick, word_task

MEASURES = ("online-code", "conditional", "mix")
WHERE = {"stack": "made", "site": "block", "pooling": "mean"}


def value(rows: pd.DataFrame, metric: str, hidden: int, control: str = "none", seed: int | None = None) -> float:
    own = rows[(rows["metric"] == metric) & (rows["hidden"] == hidden) & (rows["control"] == control)]
    own = own[own["seed"].isna() if seed is None else own["seed"] == seed]
    assert len(own) == 1
    return float(own["value"].iloc[0])


def measured(measure: str, states: np.ndarray, task, **settings) -> pd.DataFrame:
    """A measure of a task whose states are given, hidden × items × width."""
    options = ProbeSettings(n_boot=100, **{"seeds": (0, 1), "controls": ("word-type",), **settings})
    return measure_task(
        measure, task, options, hidden=range(len(states)), states=lambda h, rows: states[h][rows],
        usable=np.ones(len(task.items), dtype=bool), where=WHERE,
    ).scores  # fmt: skip


def planted(n: int = 600, width: int = 6, copies: int = 3) -> tuple[np.ndarray, object]:
    """Hidden 0 is noise, hidden 1 holds the label, the others copy hidden 1."""
    task = word_task(n=n)
    rng = np.random.default_rng(2)
    noise, holds = (rng.standard_normal((n, width)).astype(np.float32) for _ in range(2))
    holds[:, 0] += 3 * (2 * task.items["label"].to_numpy() - 1)
    return np.stack([noise, *[holds] * (copies - 1)]), task


def test_a_run_measures_what_the_function_gives_on_its_items(small_bert, tmp_path, cache):
    results = quick(small_bert, tmp_path / "run", [word_task()], controls=("word-type",), measures=("online-code",))
    assert results.measures is not None
    plan = plan_probing(probing.config.ProbeConfig(model=str(small_bert), seeds=(0, 1), n_boot=100,
                        controls=("word-type",)), given=[word_task()], only_given=True)  # fmt: skip
    (task,) = plan.tasks
    texts = plan.needed[task.corpus.name].texts
    store = extract(plan.loaded, texts, **extraction_options(plan.config, plan.tasks, task.corpus.name))
    rows, _ = rows_of_items(plan, task, store)
    draw = task.training_draw(1, None)
    states = np.stack([item_states(task, store, rows[draw], pooling="mean", hidden=h) for h in range(4)])
    fitted = results.scores[(results.scores["seed"] == 1) & (results.scores["control"] == "none")]
    l2 = fitted[fitted["metric"] == "bits"].sort_values("hidden")["l2"].to_numpy()
    labels = np.stack([label_values(task), control_labels(task, 1)])[:, draw]
    code = online_code(states, labels, n_classes=2, l2=l2, seed=1)
    for m, control in enumerate(("none", "word-type")):
        for h in range(4):
            assert value(results.measures, "code_bits", h, control, 1) == pytest.approx(code.bits[h, m], rel=1e-3)
            compression = len(draw) / code.bits[h, m]
            assert value(results.measures, "compression", h, control, 1) == pytest.approx(compression, rel=1e-3)


def test_a_measure_is_added_to_a_finished_run_without_touching_it(small_bert, tmp_path, cache, monkeypatch):
    quick(small_bert, tmp_path / "run")
    before = contents(tmp_path / "run")

    def never(*_, **__):
        raise AssertionError("finished work was done again")

    monkeypatch.setattr(probing.running, "fit_task", never)
    results = quick(small_bert, tmp_path / "run", measures=MEASURES)
    after = contents(tmp_path / "run")
    tables = [f for f in before if not f.startswith("summaries")]
    assert {f: after[f] for f in tables} == {f: before[f] for f in tables}
    assert results.run["status"] == "complete", [t.get("failed_measures") for t in results.run["tasks"].values()]
    assert set(results.measures["probe"]) == set(MEASURES)
    written = (tmp_path / "run" / "measures.parquet").read_bytes()
    monkeypatch.setattr(probing.encoding, "encoders", never)
    again = quick(small_bert, tmp_path / "run", measures=("mix",))  # nothing that was measured is lost
    pd.testing.assert_frame_equal(again.measures, results.measures)
    assert (tmp_path / "run" / "measures.parquet").read_bytes() == written
    pd.testing.assert_frame_equal(ProbeResults.load(tmp_path / "run").measures, again.measures)


def test_measures_are_on_the_page_and_leave_verdict_and_table_alone(small_bert, tmp_path, cache):
    plain = interpret(quick(small_bert, tmp_path / "plain"))
    found = interpret(quick(small_bert, tmp_path / "run", measures=MEASURES))
    assert found.verdict == plain.verdict
    assert found.results.to_markdown() == plain.results.to_markdown()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Further measures" in page
    assert "Further measures" not in (tmp_path / "plain" / "report.html").read_text()
    rows = measure_rows(found.results.measures, found.results.summaries)
    assert [r["task"] for r in rows] == ["even", "plural"]
    assert rows[1]["online compression"] in measure_markdown(found.results.measures, found.results.summaries)
    assert all(v in page for v in rows[1].values())


def test_pointwise_values_average_to_the_rows(small_bert, tmp_path, cache):
    results = quick(small_bert, tmp_path / "run", [word_task()], controls=(), measures=("conditional", "mix"))
    items = results.measure_items(word_task().name, "conditional")
    means = items.groupby(["metric", "seed", "hidden"])["bits"].mean()
    for (metric, seed, hidden), mean in means.items():
        assert value(results.measures, metric, hidden, seed=seed) == pytest.approx(mean, abs=1e-6)
    cumulative = results.measure_items(word_task().name, "mix")
    own = cumulative[cumulative["seed"] == 0].groupby("hidden")["bits"].mean()
    for hidden, mean in own.items():
        assert value(results.measures, "cumulative_bits", hidden, seed=0) == pytest.approx(mean, abs=1e-6)
    with pytest.raises(UsageError, match="--measures"):
        results.measure_items("none.such", "mix")


def test_a_copied_hidden_state_adds_nothing_and_the_label_adds_its_bit():
    states, task = planted()
    rows = measured("conditional", states, task)
    assert value(rows, "bits_beyond_first", 1) > 0.8
    assert value(rows, "bits_beyond_first", 2) == pytest.approx(value(rows, "bits_beyond_first", 1), abs=0.01)
    assert abs(value(rows, "bits_beyond_below", 2)) < 0.01
    assert value(rows, "bits_beyond_first", 1, "word-type") < 0.1


def test_codes_of_a_readable_label_are_short_and_of_random_labels_not():
    states, task = planted(n=1500)
    rows = measured("online-code", states, task)
    assert value(rows, "compression", 1) > 3
    assert value(rows, "compression", 0) <= 1.02
    for hidden in range(3):
        assert value(rows, "compression", hidden, "word-type") <= 1.02
    own, control = (value(rows, "code_bits_per_item", 1, c) for c in ("none", "word-type"))
    assert value(rows, "code_bits_per_item", 1, "difference:word-type") == pytest.approx(own - control)
    variational = measured("variational-code", states[:2], task, seeds=(0,), controls=())
    assert value(variational, "compression", 1) > 3
    assert value(variational, "code_bits", 1) == pytest.approx(
        value(variational, "model_bits", 1) + value(variational, "data_bits", 1)
    )
    assert math.isnan(variational["ci_low"].iloc[-1])  # one seed: no interval


def test_the_mix_finds_the_hidden_state_that_holds_the_label():
    states, task = planted(copies=2)
    found = measure_task(
        "mix", task, ProbeSettings(seeds=(0, 1), controls=(), n_boot=100), hidden=range(2),
        states=lambda h, rows: states[h][rows], usable=np.ones(len(task.items), dtype=bool), where=WHERE,
    )  # fmt: skip
    assert value(found.scores, "mix_weight", 1) > 0.9
    assert value(found.scores, "differential_bits", 1) > 0.8
    layer = found.summaries.query("statistic == 'expected_layer_robust' and metric == 'cumulative_bits'")
    assert layer["value"].iloc[0] == pytest.approx(1.0)


def test_measures_that_do_not_suit_are_notes_and_unknown_ones_are_refused(small_bert, tmp_path, cache):
    results = quick(small_bert, tmp_path / "run", [number_task()], measures=("mix",), controls=())
    assert results.measures is None
    assert "mix was not measured: the task has no classes" in results.run["tasks"]["made.number"]["notes"]
    assert results.run["status"] == "complete"
    assert "from 0" in unsuited("conditional", word_task(), [0, 2])
    assert "two hidden states" in unsuited("mix", word_task(), [3])
    assert unsuited("online-code", word_task(), [3]) == ""
    with pytest.raises(UsageError, match=r"--measures 'online'.*online-code"):
        quick(small_bert, tmp_path / "other", measures=("online",))


def test_a_failing_measure_costs_nothing_else(small_bert, tmp_path, cache, monkeypatch):
    def fails(*_, **__):
        raise UsageError("too few items")

    monkeypatch.setattr("probing.measures.measure_task", fails)
    results = quick(small_bert, tmp_path / "run", [word_task()], measures=("mix",), controls=())
    assert results.run["status"] == "partial"
    assert results.run["tasks"]["made.plural"]["failed_measures"] == {"mix": "too few items"}
    assert len(results.scores)
    monkeypatch.undo()
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    again = quick(small_bert, tmp_path / "run", [word_task()], measures=("mix",), controls=())
    assert again.run["status"] == "complete"
    assert set(again.measures["probe"]) == {"mix"}
