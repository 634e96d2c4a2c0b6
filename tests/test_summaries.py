from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probing.curves import LayerCurve
from probing.summaries import emergence, expected_layer, expected_layer_robust, summarize_curve
from spafit.errors import NumericalError, UsageError
from spafit.stats import crossed_bootstrap
from tests.paths import REFERENCE

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published curves are not here")


def noisy_curve(truth, sd, random, *, n_boot=300, neighbours=0.7):
    """A curve around ``truth`` whose noise is half common to all layers, half correlated between neighbours."""
    n = len(truth)
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    factor = np.linalg.cholesky(sd**2 * (0.5 + 0.5 * neighbours**distance))
    values = truth + factor @ random.normal(size=n)
    replicates = values + random.normal(size=(n_boot, n)) @ factor.T
    return LayerCurve("planted", "syntax", np.arange(n), values, replicates)


def step(depth, at):
    return (np.arange(depth + 1) >= at).astype(float)


def covers(ci, truth):
    return ci[0] <= truth + 1e-9 and ci[1] >= truth - 1e-9


@needs_reference
def test_expected_layers_of_published_curves():
    table = pd.read_csv(REFERENCE / "tenney2019_cumulative_dev_f1.csv")
    large = table[table["model"] == "bert-large-uncased"].sort_values("layer").groupby("task")["f1"]
    published = {
        "pos-": 3.4,
        "nonterminal-": 3.8,
        "ner-": 4.6,
        "dep-": 5.7,
        "srl-": 6.5,
        "rel-semeval": 9.4,
        "coref-": 9.5,
        "spr1-": 9.9,
    }
    for prefix, layer in published.items():
        (scores,) = [g.to_numpy() for task, g in large if task.startswith(prefix)]
        assert expected_layer(scores) == pytest.approx(layer, abs=0.05)


@needs_reference
def test_robust_expected_layer_suppresses_only_the_noise_curve():
    table = pd.read_csv(REFERENCE / "tenney2019_cumulative_dev_f1.csv").sort_values("layer")
    curves = {key: g.to_numpy() for key, g in table.groupby(["model", "task"])["f1"]}
    suppressed = {key for key, scores in curves.items() if math.isnan(expected_layer_robust(scores))}
    assert len(curves) == 22
    assert suppressed == {key for key in curves if key[1].startswith("dpr")}
    base = next(scores for key, scores in curves.items() if key[0] == "bert-base-uncased" and key in suppressed)
    assert expected_layer(base) == pytest.approx(23.9, abs=0.05)  # the plain formula leaves the 12-layer model


def test_expected_layer_of_a_step_is_the_step():
    for at in range(1, 13):
        assert expected_layer(step(12, at)) == at
        if at < 6:  # a later jump lies in the layers whose differences count as noise
            assert expected_layer_robust(step(12, at)) == at
    assert math.isnan(expected_layer(np.ones(5)))


def test_correction_removes_the_pull_towards_mid_depth():
    random = np.random.default_rng(0)
    for at, plain in ((2, 2.3), (23, 22.0)):
        found = [emergence(noisy_curve(step(24, at), 1 / 25, random, neighbours=0), n_draws=400) for _ in range(60)]
        raw, corrected = np.mean([f.raw for f in found]), np.mean([f.value for f in found])
        assert raw == pytest.approx(plain, abs=0.25)
        assert abs(corrected - at) < 0.25 * abs(raw - at)


def planted_coverage(depth, at, signal, n_worlds, random):
    found = [
        emergence(noisy_curve(step(depth, at), 1 / signal, random), n_draws=400, seed=world)
        for world in range(n_worlds)
    ]
    return np.mean([covers(f.ci, at) for f in found]), np.mean([f.value for f in found]) - at


@pytest.mark.parametrize("depth", [12, 24])
def test_interval_covers_the_hidden_state_after_the_planted_block(depth):
    random = np.random.default_rng(depth)
    results = [planted_coverage(depth, block + 1, 25, 25, random) for block in range(depth)]
    coverage, bias = np.array(results).T
    assert coverage.mean() >= 0.92
    assert coverage.min() >= 0.76  # 25 worlds: four standard errors below nominal
    # towards the ends the estimate is held within the model, so a small pull inwards remains there
    assert np.abs(bias).max() < 0.02 * depth


@pytest.mark.slow
@pytest.mark.parametrize("signal", [10, 30])
@pytest.mark.parametrize("depth", [6, 12, 24])
def test_interval_coverage_is_near_nominal_for_every_block(depth, signal):
    random = np.random.default_rng(depth)
    coverage, bias = np.array([planted_coverage(depth, b + 1, signal, 200, random) for b in range(depth)]).T
    assert 0.93 <= coverage.mean() <= 0.99
    assert coverage.min() >= 0.88
    assert np.abs(bias).max() < 0.03 * depth


def test_interval_covers_smooth_rises_and_early_peaks():
    random = np.random.default_rng(3)
    layers = np.arange(13)
    for truth in (1 - np.exp(-layers / 2), 1 / (1 + np.exp(6.0 - layers)), np.where(layers < 4, 0, 1 - 0.04 * layers)):
        exact = emergence(LayerCurve("t", "syntax", layers, truth, np.tile(truth, (2, 1)))).value
        found = [emergence(noisy_curve(truth, 1 / 25, random), n_draws=400, seed=s) for s in range(80)]
        assert np.mean([covers(f.ci, exact) for f in found]) >= 0.83


def test_item_level_scores_give_an_interval_around_the_planted_layer():
    random = np.random.default_rng(4)
    groups = np.repeat(np.arange(250), 4)
    item = random.normal(size=250)[groups] + random.normal(size=1000)
    for at in (1, 4, 8):
        scores = (0.5 * step(8, at)[:, None] + item + 0.3 * random.normal(size=(9, 1000)))[None]
        replicates = crossed_bootstrap(scores, groups, n_boot=500)
        curve = LayerCurve("items", "syntax", np.arange(9), scores[0].mean(axis=1), replicates)
        found = emergence(curve)
        assert covers(found.ci, at)
        assert found.ci[1] - found.ci[0] < 1.5


def test_flat_and_falling_curves_are_not_dated():
    random = np.random.default_rng(5)
    flat = [emergence(noisy_curve(np.zeros(25), 1.0, random, neighbours=0)) for _ in range(300)]
    assert np.mean([math.isfinite(f.value) for f in flat]) <= 0.01
    falling = emergence(noisy_curve(np.linspace(1, 0, 13), 0.01, random))
    assert math.isnan(falling.value)
    assert "nothing emerges later" in falling.note
    assert falling.replicates.size == 0
    rising = emergence(noisy_curve(np.linspace(0, 1, 13), 0.01, random))
    assert math.isfinite(rising.value)


def test_a_curve_that_rises_below_its_control_is_not_dated():
    random = np.random.default_rng(11)
    rising = noisy_curve(step(12, 5), 0.02, random)
    below = replace(rising, values=rising.values - 1.05, replicates=rising.replicates - 1.05)
    found = emergence(replace(below, adjusted_by="random-encoder"))
    assert math.isnan(found.value)
    assert "never above its control (random-encoder)" in found.note
    assert emergence(replace(rising, adjusted_by="random-encoder")).value == pytest.approx(5, abs=0.2)
    assert emergence(below).value == pytest.approx(5, abs=0.2)  # nothing was subtracted: 0 is no control's score


def test_an_interval_of_zero_width_says_why():
    falling = np.array([0.0, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4])  # no noise lifts a later hidden state above the first
    found = emergence(noisy_curve(falling, 0.01, np.random.default_rng(12)))
    assert (found.value, *found.ci) == (1, 1, 1)
    assert found.note == "zero width: the whole rise lies at one hidden state in every draw, of one training draw"
    wider = emergence(noisy_curve(np.array([0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]), 0.01, np.random.default_rng(12)))
    assert wider.ci[0] < wider.ci[1]
    assert wider.note == ""


def test_emergence_ignores_unit_and_offset_and_repeats_itself():
    curve = noisy_curve(step(12, 5), 0.05, np.random.default_rng(6))
    other = replace(curve, values=3 * curve.values - 7, replicates=3 * curve.replicates - 7)
    first, second = emergence(curve), emergence(other)
    assert first.value == pytest.approx(second.value, abs=1e-6)
    assert first.ci == pytest.approx(second.ci, abs=1e-6)
    np.testing.assert_array_equal(first.replicates, emergence(curve).replicates)
    assert not np.array_equal(first.replicates, emergence(curve, seed=1).replicates)


def test_exact_scores_are_dated_exactly():
    truth = np.array([0.0, 0.0, 0.25, 0.25, 1.0, 0.5, 1.0])
    curve = LayerCurve("exact", "syntax", np.arange(7), truth, np.tile(truth, (10, 1)))
    found = emergence(curve)
    assert found.value == pytest.approx(0.25 * 2 + 0.75 * 4)
    assert found.ci == pytest.approx((found.value, found.value))


def test_missing_hidden_states_credit_the_upper_end_and_say_so():
    truth = step(12, 5)
    kept = np.array([0, 4, 8, 12])
    curve = LayerCurve("sparse", "syntax", kept, truth[kept], np.tile(truth[kept], (10, 1)))
    found = emergence(curve)
    assert found.value == 8
    assert "missing" in found.note


def test_summary_rows_date_a_sharp_curve_and_doubt_a_flat_one():
    random = np.random.default_rng(7)
    rows = {r.statistic: r for r in summarize_curve(noisy_curve(step(12, 6) - 0.05 * np.arange(13), 0.01, random))}
    assert list(rows) == ["best", "first_within_1se", "emergence_cog", "total_gain"]
    assert (rows["best"].value, rows["best"].ci_low, rows["best"].ci_high, rows["best"].note) == (6, 6, 6, "")
    assert rows["first_within_1se"].value == 6
    assert rows["total_gain"].ci_low < 0.7 < rows["total_gain"].ci_high
    assert covers((rows["emergence_cog"].ci_low, rows["emergence_cog"].ci_high), 6)
    flat = {r.statistic: r for r in summarize_curve(noisy_curve(np.zeros(13), 1.0, random))}
    assert "flat" in flat["best"].note
    assert flat["first_within_1se"].value <= flat["best"].value
    assert math.isnan(flat["emergence_cog"].value)
    assert flat["emergence_cog"].note


def test_bad_curves_are_named():
    curve = noisy_curve(step(6, 3), 0.1, np.random.default_rng(8))
    with pytest.raises(UsageError, match="two or more replicates"):
        emergence(replace(curve, replicates=curve.replicates[:1]))
    with pytest.raises(NumericalError, match="planted"):
        emergence(replace(curve, values=np.full(7, np.nan)))
    with pytest.raises(UsageError, match="two or more scores"):
        expected_layer(np.ones(1))


def test_a_cumulative_curve_without_any_gain_places_none():
    from probing.mix_summaries import summarize_cumulative

    curve = LayerCurve("t", "syntax", np.arange(3), np.ones(3), np.ones((100, 3)), "accuracy", "none", 50, 1)
    rows = {r.statistic: r for r in summarize_cumulative(curve)}
    assert np.isnan(rows["expected_layer"].value)
    assert np.isnan(rows["expected_layer"].ci_low)
    assert "no gain" in rows["expected_layer"].note
    assert np.isnan(rows["expected_layer_robust"].value)
    assert rows["headroom"].value == 0
