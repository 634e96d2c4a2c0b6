"""The chain from states to tables finds planted truth, and nothing where nothing is planted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probing.arrays import probe_arrays
from probing.fitting import ProbeSettings
from probing.results import ProbeResults
from probing.scoring import SCORE_COLUMNS
from spafit.errors import NumericalError, TaskError, UsageError
from tests.planted import planted_states


def means(results: ProbeResults, metric: str = "accuracy", control: str = "none") -> pd.DataFrame:
    table = results.to_pandas()
    return table[(table["metric"] == metric) & (table["control"] == control)].sort_values("hidden")


def emergence_of(results: ProbeResults) -> pd.Series:
    table = results.summaries
    return table[(table["metric"] == "bits") & (table["statistic"] == "emergence_cog")].iloc[0]


@pytest.mark.parametrize("block", range(6))
def test_information_planted_at_a_block_emerges_at_the_next_hidden_state(block):
    states, labels = planted_states(block)
    results = probe_arrays(states, labels, n_boot=400)
    accuracy = means(results)
    assert (accuracy["value"].to_numpy()[: block + 1] < 0.6).all()
    assert (accuracy["value"].to_numpy()[block + 1 :] > 0.9).all()
    emergence = emergence_of(results)
    assert emergence["ci_low"] <= block + 1 <= emergence["ci_high"]
    assert emergence["ci_high"] - emergence["ci_low"] < 1.5


def test_labels_that_no_state_tells_stay_at_chance_with_no_bits_saved_and_no_emergence():
    states, labels = planted_states(2)
    results = probe_arrays(states, np.random.default_rng(9).permutation(labels), n_boot=400)
    assert means(results)["value"].between(0.4, 0.6).all()
    assert (means(results, "bits")["value"] < 0.02).all()
    assert np.isnan(emergence_of(results)["value"])


def test_a_number_of_seeds_means_that_many_and_penalties_are_checked():
    states, labels = planted_states(1, blocks=2, items=200, width=4)
    control = np.arange(len(labels)) // 10  # with control labels, every seed is a fit of its own
    results = probe_arrays(states, labels, control=control, seeds=2, n_boot=100)
    assert results.run["seeds"] == [0, 1]
    with pytest.raises(UsageError, match="finite penalties"):
        probe_arrays(states, labels, seeds=1, l2=(float("nan"),))


def test_bits_saved_of_a_perfect_reading_are_the_label_entropy():
    rng = np.random.default_rng(0)
    labels = (rng.random(3000) < 0.25).astype(int)
    states = np.stack([rng.standard_normal((3000, 4)), np.eye(4)[labels] * 50 + rng.standard_normal((3000, 4))])
    results = probe_arrays(states, labels, n_boot=200)
    entropy = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    bits = means(results, "bits")["value"].to_numpy()
    assert bits[1] == pytest.approx(entropy, abs=0.03)
    assert bits[0] == pytest.approx(0.0, abs=0.01)


def test_chance_is_the_accuracy_of_the_training_majority_not_one_over_k():
    rng = np.random.default_rng(0)
    labels = (rng.random(2000) < 0.2).astype(int)
    states = rng.standard_normal((2, 2000, 4))
    split = np.array(["train"] * 1000 + ["dev"] * 500 + ["test"] * 500)
    table = probe_arrays(states, labels, split=split, n_boot=200).to_pandas()
    np.testing.assert_allclose(table.loc[table["control"] == "none", "chance"], np.mean(labels[1500:] == 0))


def test_word_type_control_is_read_from_identity_and_selectivity_is_the_paired_difference():
    rng = np.random.default_rng(0)
    types = rng.integers(0, 20, 3000)
    labels = types % 2
    identity = np.eye(20)[types] * 3 + 0.1 * rng.standard_normal((3000, 20))
    states = np.stack([identity, rng.standard_normal((3000, 20))])
    results = probe_arrays(states, labels, control=[f"t{t}" for t in types], n_boot=200)
    control = means(results, control="word-type")["value"].to_numpy()
    assert control[0] > 0.95  # every type is told apart, so its drawn label is too
    assert control[1] < 0.8  # nothing to read: the majority of the drawn labels at best
    difference = means(results, control="difference:word-type")["value"].to_numpy()
    np.testing.assert_allclose(difference, means(results)["value"].to_numpy() - control, atol=1e-12)


def test_a_random_encoder_that_knows_as_much_leaves_no_difference():
    states, labels = planted_states(2)
    same = probe_arrays(states, labels, random_states=dict.fromkeys((0, 1, 2), states), n_boot=200)
    difference = means(same, "bits", "difference:random-encoder")
    assert (difference["value"] == 0).all()
    noise = {s: np.random.default_rng(s).standard_normal(states.shape) for s in (0, 1, 2)}
    gap = means(probe_arrays(states, labels, random_states=noise, n_boot=200), "bits", "difference:random-encoder")
    assert gap["ci_low"].iloc[-1] > 0.5
    assert gap["ci_low"].iloc[0] <= 0.01


def test_seeds_that_draw_the_same_items_are_one_fit_and_not_three():
    states, labels = planted_states(1, items=400)
    every = probe_arrays(states, labels, max_train=10_000, n_boot=200).scores
    assert set(every["seed"].dropna()) == {0}
    assert (every["n_seeds"] == 1).all()
    drawn = probe_arrays(states, labels, n_boot=200).scores
    assert set(drawn["seed"].dropna()) == {0, 1, 2}
    assert (drawn.loc[drawn["seed"].isna(), "n_seeds"] == 3).all()


def test_intervals_of_clustered_items_are_wider_than_those_of_independent_ones():
    rng = np.random.default_rng(0)
    sentence = np.repeat(np.arange(150), 10)
    labels = rng.integers(0, 2, 150)[sentence]
    states = (labels[:, None] * 1.5 + rng.standard_normal(150)[sentence][:, None] * 2)[None]
    split = np.where(sentence < 75, "train", np.where(sentence < 100, "dev", "test"))
    width = {}
    for name, groups in (("clustered", sentence), ("independent", None)):
        table = means(probe_arrays(states, labels, groups=groups, split=split, n_boot=500))
        width[name] = float((table["ci_high"] - table["ci_low"]).iloc[0])
    assert width["clustered"] > 1.8 * width["independent"]


def test_tables_have_the_documented_columns_and_survive_the_folder(tmp_path):
    states, labels = planted_states(2, items=300)
    results = probe_arrays(states, labels, control=["a", "b", "c"] * 100, n_boot=200)
    assert tuple(results.scores.columns) == SCORE_COLUMNS
    results.save(tmp_path)
    again = ProbeResults.load(tmp_path)
    pd.testing.assert_frame_equal(again.scores, results.scores)
    pd.testing.assert_frame_equal(again.items("task"), results.items("task"))
    np.testing.assert_array_equal(again.curve("task").replicates, results.curve("task").replicates)
    point = means(results, "bits")["value"].to_numpy()
    np.testing.assert_allclose(results.curve("task", adjusted_by=None).values, point, atol=1e-6)


def test_chunks_of_hidden_states_do_not_change_the_numbers(monkeypatch):
    states, labels = planted_states(2, items=400)
    whole = probe_arrays(states, labels, n_boot=200).scores
    monkeypatch.setattr("probing.fitting.CHUNK_BYTES", 1)
    pieces = probe_arrays(states, labels, n_boot=200).scores
    pd.testing.assert_series_equal(whole["l2"], pieces["l2"])
    np.testing.assert_allclose(whole["value"], pieces["value"], atol=2e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"X": np.zeros((3, 4))}, UsageError, "must have shape"),
        ({"y": [0, 1]}, UsageError, "2 entries"),
        ({"groups": [1]}, UsageError, "groups has 1"),
        ({"y": np.zeros(400)}, TaskError, "one class"),
        ({"random_states": {0: np.zeros((7, 400, 16))}}, UsageError, "one entry per seed"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, error, message):
    states, labels = planted_states(2, items=400)
    with pytest.raises(error, match=message):
        probe_arrays(**{"X": states, "y": labels, **change})


def test_nan_states_are_refused_naming_the_hidden_state():
    states, labels = planted_states(2, items=400)
    states[4, 7, 1] = np.nan
    with pytest.raises(NumericalError, match=r"X\[4\]"):
        probe_arrays(states, labels)


def test_defaults_are_three_seeds_and_both_controls():
    assert ProbeSettings().seeds == (0, 1, 2)
    assert ProbeSettings().controls == ("word-type", "random-encoder")


def test_a_control_that_cannot_be_read_saves_no_bits_although_its_labels_are_unbalanced():
    rng = np.random.default_rng(0)
    types = rng.integers(0, 4, 3000)
    states = rng.standard_normal((2, 3000, 8))
    results = probe_arrays(states, types % 2, control=[f"t{t}" for t in types], n_boot=200)
    assert means(results, "bits", "word-type")["value"].abs().max() < 0.03
    assert means(results, "bits", "difference:word-type")["value"].abs().max() < 0.03
    control = means(results, control="word-type")
    assert (control["value"] - control["chance"]).abs().max() < 0.03


def test_a_curve_says_which_metric_it_holds():
    states, labels = planted_states(1, items=300)
    results = probe_arrays(states, labels, n_boot=200)
    assert results.curve("task").metric == "bits"
    accuracy = results.curve("task", metric="accuracy")
    assert accuracy.metric == "accuracy"
    np.testing.assert_allclose(accuracy.values, means(results)["value"].to_numpy(), atol=1e-12)
    with pytest.raises(UsageError, match="no items"):
        results.curve("task", site="attention")
