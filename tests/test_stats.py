from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import f1_score

from spafit.errors import NumericalError, UsageError
from spafit.stats import (
    BootstrapDraw,
    bca_interval,
    crossed_bootstrap,
    holm,
    interval,
    jackknife,
    max_t,
    paired_cluster_test,
)

GROUPS = np.repeat(list("cabd"), [3, 1, 5, 2])


def resampled_items(draw, b):
    """Item positions of replicate ``b``, written out."""
    return np.concatenate(
        [np.tile(np.flatnonzero(draw.codes == g), count) for g, count in enumerate(draw.cluster_counts[b])]
    ).astype(int)


def resampled_seeds(draw, b):
    return np.repeat(np.arange(draw.n_seeds), draw.seed_counts[b])


def test_replicates_equal_means_over_written_out_resamples():
    values = np.random.default_rng(0).normal(size=(3, 4, 11))
    draw = BootstrapDraw.make(GROUPS, 3, n_boot=300, seed=5)
    replicates = draw.means(values)
    for b in (0, 7, 150, 299):
        expected = values[resampled_seeds(draw, b)][:, :, resampled_items(draw, b)].mean(axis=(0, 2))
        np.testing.assert_allclose(replicates[b], expected, rtol=1e-12)
    np.testing.assert_array_equal(replicates, crossed_bootstrap(values, GROUPS, n_boot=300, seed=5))
    assert not np.array_equal(replicates, crossed_bootstrap(values, GROUPS, n_boot=300, seed=6))


def test_macro_f1_replicates_equal_sklearn_on_written_out_resamples():
    random = np.random.default_rng(1)
    labels = random.integers(0, 4, 11)
    predictions = random.integers(0, 4, (2, 3, 11))
    draw = BootstrapDraw.make(GROUPS, 2, n_boot=200, seed=2)
    replicates = draw.macro_f1(labels, predictions, n_classes=5)
    for b in (0, 3, 130, 199):
        items = resampled_items(draw, b)
        for c in range(3):
            scores = [
                f1_score(labels[items], predictions[s, c, items], average="macro", zero_division=0)
                for s in resampled_seeds(draw, b)
            ]
            assert replicates[b, c] == pytest.approx(np.mean(scores), abs=1e-6)


def test_curves_share_the_resample_so_differences_are_paired():
    random = np.random.default_rng(2)
    base = random.normal(size=400)
    values = np.stack([base, base + 0.5])[None]
    replicates = crossed_bootstrap(values, np.arange(400))
    assert (replicates[:, 1] - replicates[:, 0]).std() < 1e-12
    assert replicates[:, 0].std() > 0.02  # negative control: each alone varies


def test_one_seed_is_not_resampled_and_more_are():
    one = BootstrapDraw.make(GROUPS, 1)
    assert (one.seed_counts == 1).all()
    three = BootstrapDraw.make(GROUPS, 3)
    assert (three.seed_counts.sum(axis=1) == 3).all()
    assert three.seed_counts.var() > 0
    assert (three.cluster_counts.sum(axis=1) == 4).all()


def test_standard_error_matches_the_closed_form_for_clusters_and_seeds():
    random = np.random.default_rng(3)
    n, seeds = 300, 5
    item, fit = random.normal(size=n), random.normal(0, 0.1, size=seeds)
    values = (item[None] + fit[:, None])[:, None]
    got = crossed_bootstrap(values, np.arange(n), n_boot=4000).std(ddof=1)
    expected = np.sqrt(item.var() / n + fit.var() / seeds)
    assert got == pytest.approx(expected, rel=0.04)


def test_ignoring_clusters_understates_the_error():
    random = np.random.default_rng(4)
    groups = np.repeat(np.arange(60), 10)
    values = (random.normal(size=60)[groups] + 0.3 * random.normal(size=600))[None, None]
    clustered = crossed_bootstrap(values, groups).std()
    assert clustered == pytest.approx(1 / np.sqrt(60), rel=0.3)
    assert crossed_bootstrap(values, np.arange(600)).std() < 0.5 * clustered


def coverage(n_worlds, n_boot, seed):
    """Share of clustered worlds with unequal cluster sizes whose interval covers the true mean 0."""
    random = np.random.default_rng(seed)
    covered = 0
    for world in range(n_worlds):
        sizes = random.integers(1, 12, 100)
        groups = np.repeat(np.arange(100), sizes)
        values = random.normal(size=100)[groups] + random.normal(size=len(groups))
        low, high = interval(crossed_bootstrap(values[None, None], groups, n_boot=n_boot, seed=world))[:, 0]
        covered += low <= 0 <= high
    return covered / n_worlds


def test_interval_covers_the_truth_about_as_often_as_it_says():
    assert 0.91 <= coverage(400, 300, 0) <= 0.98


@pytest.mark.slow
def test_interval_covers_the_truth_over_many_worlds():
    assert 0.93 <= coverage(4000, 1000, 1) <= 0.96


def test_bca_interval_equals_scipys():
    random = np.random.default_rng(5)
    sample = random.exponential(size=40)
    theirs = scipy_stats.bootstrap((sample,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(0))
    replicates = theirs.bootstrap_distribution
    _, left_out = jackknife(sample[None], np.arange(40))
    ours = bca_interval(replicates, sample.mean(), leave_one_out=left_out[:, 0])
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=1e-3)
    # negative control: the plain percentile interval of this skewed sample lies elsewhere
    assert np.abs(interval(replicates) - theirs.confidence_interval).max() > 5e-3


def test_jackknife_error_of_equal_clusters_is_the_error_of_their_means():
    random = np.random.default_rng(6)
    groups = np.tile(np.arange(20), 5)
    values = random.normal(size=(3, 100))
    error, left_out = jackknife(values, groups)
    means = np.stack([values[:, groups == g].mean(axis=1) for g in range(20)])
    np.testing.assert_allclose(error, means.std(axis=0, ddof=1) / np.sqrt(20))
    np.testing.assert_allclose(left_out[4], values[:, groups != 4].mean(axis=1))


def test_sign_flip_test_is_exact_for_few_clusters():
    differences = np.array([[1.0, 2.0, 0.5, 3.0, 1.5]])
    assert paired_cluster_test(differences, np.arange(5))[0] == 2 / 32
    assert paired_cluster_test(differences, np.arange(5), alternative="greater")[0] == 1 / 32
    assert paired_cluster_test(differences, np.arange(5), alternative="less")[0] == 1
    theirs = scipy_stats.permutation_test(
        (differences[0], np.zeros(5)), lambda a, b: np.mean(a - b), permutation_type="samples"
    )
    assert theirs.pvalue == paired_cluster_test(differences, np.arange(5))[0]


def test_sign_flip_test_holds_its_level_with_clusters_and_an_item_test_does_not():
    random = np.random.default_rng(7)
    groups = np.repeat(np.arange(40), 8)
    worlds = random.normal(size=(300, 40))[:, groups] + 0.5 * random.normal(size=(300, 320))
    by_cluster = paired_cluster_test(worlds, groups, n_flips=499)
    by_item = paired_cluster_test(worlds, np.arange(320), n_flips=499)
    assert (by_cluster <= 0.05).mean() < 0.10
    assert (by_item <= 0.05).mean() > 0.25
    assert (paired_cluster_test(worlds + 0.8, groups, n_flips=499) <= 0.05).mean() > 0.95


def test_holm_equals_the_hand_calculation():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, np.nan, 0.9]), [1, np.nan, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_max_t_controls_family_wise_error_and_beats_holm_under_correlation():
    random = np.random.default_rng(8)
    n_worlds, n_curves, n_boot = 400, 12, 400
    shared = 0.95
    false = found = found_holm = 0
    for _ in range(n_worlds):
        noise = np.sqrt(shared) * random.normal(size=(n_boot + 1, 1)) + np.sqrt(1 - shared) * random.normal(
            size=(n_boot + 1, n_curves)
        )
        p, _ = max_t(noise[0], noise[1:])
        false += (p <= 0.05).any()
        p, _ = max_t(noise[0] + 2.5, noise[1:], alternative="greater")
        single = scipy_stats.norm.sf(noise[0] + 2.5)
        found += (p <= 0.05).sum()
        found_holm += (holm(single) <= 0.05).sum()
    assert false / n_worlds <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_worlds)
    assert found > 1.1 * found_holm


def test_max_t_of_one_curve_is_its_own_test_and_a_fixed_curve_is_decided_by_its_sign():
    replicates = np.random.default_rng(9).normal(size=(999, 1))
    p, critical = max_t(np.array([1.0]), replicates)
    assert p[0] == pytest.approx(2 * scipy_stats.norm.sf(1), abs=0.05)
    assert critical == pytest.approx(1.96, abs=0.12)
    p, _ = max_t(np.array([0.0, 0.3]), np.tile([0.0, 0.3], (999, 1)))
    assert p[0] == 1
    assert p[1] == pytest.approx(1 / 1000)


def test_bad_input_is_named():
    draw = BootstrapDraw.make(GROUPS, 2, n_boot=10)
    with pytest.raises(UsageError, match=r"seeds=2, curves, items=11"):
        draw.means(np.zeros((3, 1, 11)))
    with pytest.raises(NumericalError, match="NaN"):
        draw.means(np.full((2, 1, 11), np.nan))
    with pytest.raises(UsageError, match="allowed are 0 to 1"):
        draw.macro_f1(np.full(11, 2), np.zeros((2, 1, 11), int), n_classes=2)
    with pytest.raises(UsageError, match="at least two clusters"):
        jackknife(np.zeros((1, 3)), [0, 0, 0])
    with pytest.raises(UsageError, match="one label per item"):
        BootstrapDraw.make([], 1)
