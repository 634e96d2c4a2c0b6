"""GLUE's metrics: closed forms, independent computations, and a stated value wherever a formula divides by zero."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spafit.errors import NumericalError, UsageError
from spafit.metrics import METRICS, compute_metrics, headline
from spafit.runtime import generator

#: 6 true positives, 2 false positives, 1 false negative, 3 true negatives.
PREDICTED = [1] * 6 + [1] * 2 + [0] + [0] * 3
GOLD = [1] * 6 + [0] * 2 + [1] + [0] * 3


def test_two_class_metrics_equal_their_closed_forms():
    got = compute_metrics(("matthews", "accuracy", "f1", "macro_f1"), PREDICTED, GOLD)
    tp, fp, fn, tn = 6, 2, 1, 3
    phi = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    f1, f0 = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
    wanted = {"matthews": phi, "accuracy": 9 / 12, "f1": f1, "macro_f1": (f1 + f0) / 2}
    assert got == pytest.approx(wanted, abs=1e-14)
    assert list(got) == ["matthews", "accuracy", "f1", "macro_f1"]


def test_predictions_and_labels_are_not_interchanged():
    swapped = compute_metrics("f1", [1, 1, 1, 0], [1, 0, 0, 0])["f1"]
    assert swapped == pytest.approx(2 * 1 / (2 * 1 + 2 + 0))
    # Class 1 is the positive one: with the codes turned round the value differs.
    assert compute_metrics("f1", 1 - np.array(PREDICTED), 1 - np.array(GOLD))["f1"] == pytest.approx(6 / 9)


def test_more_classes_equal_an_independent_computation():
    rng = generator(0, "metrics")
    gold = rng.integers(0, 3, 500)
    predicted = np.where(rng.random(500) < 0.6, gold, rng.integers(0, 3, 500))
    got = compute_metrics(["matthews", "macro_f1", "accuracy"], predicted, gold)
    # R_K as the correlation of the one-hot matrices (Gorodkin 2004).
    x, y = np.eye(3)[predicted], np.eye(3)[gold]
    x, y = x - x.mean(0), y - y.mean(0)
    assert got["matthews"] == pytest.approx((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()), abs=1e-12)
    f1 = [2 * np.sum((predicted == k) & (gold == k)) / (np.sum(predicted == k) + np.sum(gold == k)) for k in range(3)]
    assert got["macro_f1"] == pytest.approx(np.mean(f1), abs=1e-12)
    assert got["accuracy"] == np.mean(predicted == gold)
    with pytest.raises(UsageError, match=r"f1 is for the classes 0 and 1, and there is class 2\. Use macro_f1"):
        compute_metrics("f1", predicted, gold)


def test_correlations_equal_numpy_and_scipy_ties_included():
    from scipy.stats import spearmanr

    rng = generator(1, "metrics")
    gold = np.round(rng.uniform(0, 5, 300) * 5) / 5
    predicted = (gold + rng.normal(0, 1, 300)).astype(np.float32).round(1)
    got = compute_metrics(("pearson", "spearman"), predicted, gold)
    assert got["pearson"] == pytest.approx(np.corrcoef(predicted.astype(float), gold)[0, 1], abs=1e-12)
    assert got["spearman"] == pytest.approx(spearmanr(predicted, gold).statistic, abs=1e-12)
    # A monotone map leaves ranks alone and changes Pearson's.
    bent = compute_metrics(("pearson", "spearman"), np.exp(2 * predicted.astype(float)), gold)
    assert bent["spearman"] == pytest.approx(got["spearman"], abs=1e-12)
    assert bent["pearson"] < got["pearson"] - 0.1
    # The closed form without ties: 1 - 6 Σd² / (n (n² - 1)).
    order = rng.permutation(20)
    d2 = int(((order - np.arange(20)) ** 2).sum())
    assert compute_metrics("spearman", order, np.arange(20))["spearman"] == pytest.approx(1 - 6 * d2 / (20 * 399))


def test_unrelated_predictions_score_near_zero():
    rng = generator(2, "metrics")
    gold, noise = rng.integers(0, 2, 4000), rng.integers(0, 2, 4000)
    assert abs(compute_metrics("matthews", noise, gold)["matthews"]) < 0.06
    assert abs(compute_metrics("spearman", rng.normal(size=4000), gold)["spearman"]) < 0.06


@pytest.mark.parametrize(("predicted", "gold"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([1, 1], [1, 1])])
def test_matthews_of_one_class_is_zero(predicted, gold):
    assert compute_metrics("matthews", predicted, gold) == {"matthews": 0.0}


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlation_with_a_constant_is_undefined(name):
    assert math.isnan(compute_metrics(name, [2.5, 2.5, 2.5], [0.0, 1.0, 5.0])[name])
    assert math.isnan(compute_metrics(name, [0.0, 1.0, 5.0], [2.5, 2.5, 2.5])[name])
    assert math.isnan(compute_metrics(name, [1.0], [2.0])[name])
    assert compute_metrics(name, [1.0, 2.0], [5.0, 3.0])[name] == -1.0


def test_rounding_noise_has_no_pearson_correlation():
    noise = 3.0 + np.array([0, 1, 2]) * np.spacing(3.0)
    assert math.isnan(compute_metrics("pearson", noise, [0, 1, 2])["pearson"])
    assert compute_metrics("pearson", 3.0 + np.arange(3) * 1e-6, [0, 1, 2])["pearson"] == pytest.approx(1.0)


def test_f1_without_positives_is_zero():
    assert compute_metrics(("f1", "accuracy"), [0, 0], [0, 0]) == {"f1": 0.0, "accuracy": 1.0}
    assert compute_metrics("macro_f1", [1, 1], [1, 1]) == {"macro_f1": 1.0}


def test_bad_input_is_named():
    with pytest.raises(UsageError, match=r"Unknown metric 'mathews'\. Did you mean 'matthews'"):
        compute_metrics("mathews", [0], [0])
    with pytest.raises(UsageError, match="no items"):
        compute_metrics("accuracy", [], [])
    with pytest.raises(UsageError, match="2 predictions for 3 labels"):
        compute_metrics("accuracy", [0, 1], [0, 1, 1])
    with pytest.raises(NumericalError, match="1 of 2 predictions are not finite"):
        compute_metrics("pearson", [0.0, math.nan], [0.0, 1.0])
    with pytest.raises(UsageError, match="1 of 2 labels are missing"):
        compute_metrics("accuracy", [0, 1], [0, None])
    with pytest.raises(UsageError, match=r"shape \(2, 2\).*argmax"):
        compute_metrics("accuracy", [[0.1, 0.9], [0.8, 0.2]], [1, 0])
    with pytest.raises(UsageError, match="accuracy needs class codes, and the predictions"):
        compute_metrics(("pearson", "accuracy"), [0.3, 0.9], [0, 1])
    with pytest.raises(UsageError, match="labels are not numbers"):
        compute_metrics("accuracy", [0, 1], ["entailment", "neutral"])


def test_the_headline_is_the_mean_of_the_tasks_metrics():
    assert headline({"accuracy": 0.8, "f1": 0.9, "loss": 3.0}, ("accuracy", "f1")) == pytest.approx(0.85)
    assert math.isnan(headline({"pearson": math.nan, "spearman": 0.1}, ("pearson", "spearman")))
    with pytest.raises(UsageError, match=r"lack 'f1'\. They hold accuracy"):
        headline({"accuracy": 0.8}, ("accuracy", "f1"))
    with pytest.raises(UsageError, match="at least one metric"):
        headline({"accuracy": 0.8}, ())


@pytest.mark.parametrize("name", METRICS)
def test_values_reach_the_stated_ends(name):
    metric = METRICS[name]
    gold = np.array([0, 1, 0, 1, 1])
    best, worst = compute_metrics(name, gold, gold)[name], compute_metrics(name, 1 - gold, gold)[name]
    assert (best, worst) == pytest.approx((metric.high, metric.low))
    assert metric.greater_is_better == (best > worst)
