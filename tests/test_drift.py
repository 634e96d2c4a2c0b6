"""Drift: debiased CKA against other ways to compute it, its published traps, rigid maps, neighbours, weights."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from analysis import cka
from analysis.alignment import Alignment, fit_alignment
from analysis.drift import cka_heat_map, cluster_cka, debiased_cka, drift_table, mutual_knn, procrustes_r2
from analysis.hsic import Variant
from analysis.weights import low_rank_drift, weight_drift
from spafit.errors import UsageError


@pytest.fixture(autouse=True)
def no_warning():  # type: ignore[no-untyped-def]
    """A trap is answered with a number or with NaN and a reason, never with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def hsic1_by_kernels(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased HSIC (Song et al. 2012, eq. 5) from n × n kernels with an empty diagonal."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    middle = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return float((np.trace(k @ m) + middle) / (n * (n - 3)))


def gaussians(n: int, d: int, e: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((n, e or d))


def test_debiased_cka_is_the_ratio_of_unbiased_hsics() -> None:
    x, y = gaussians(40, 7, 5)
    y[:, :3] += x[:, :3]
    expected = hsic1_by_kernels(x, y) / np.sqrt(hsic1_by_kernels(x, x) * hsic1_by_kernels(y, y))
    assert debiased_cka(x, y).value == pytest.approx(expected, rel=1e-9)
    shifted = debiased_cka(x + 100, y - 50).value
    assert shifted == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("variant", ["raw", "z-scored"])
def test_rows_in_several_chunks_give_what_all_at_once_give(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (a.astype(np.float32) + 3 for a in gaussians(47, 7, 5))
    y[:, :3] += 2 * x[:, :3]
    whole, copies = debiased_cka(x, y, variant=variant), (x.copy(), y.copy())
    monkeypatch.setattr(cka, "PLAIN_CHUNK", 20)
    assert debiased_cka(x, y, variant=variant).value == pytest.approx(whole.value, rel=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip((x, y), copies, strict=True))
    assert 0.1 < whole.value < 0.9


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 4.0])
def test_independent_gaussians_are_unrelated_whatever_n_over_d(ratio: float) -> None:
    d = 96
    n = max(8, int(ratio * d))
    found, biased = [], []
    for seed in range(30):
        x, y = gaussians(n, d, seed=seed)
        found.append(debiased_cka(x, y).value)
        cx, cy = x - x.mean(0), y - y.mean(0)
        biased.append(np.linalg.norm(cy.T @ cx) ** 2 / (np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy)))
    error = np.nanstd(found) / np.sqrt(np.isfinite(found).sum())
    assert abs(np.nanmean(found)) < 4 * error + 0.01
    assert np.mean(biased) > 0.15  # what an estimator without correction reports for unrelated states


def clustered(
    seed: int, sentences: int = 25, tokens: int = 12, d: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(sentences), tokens)
    share = np.sqrt(0.43)
    x, y = (
        share * rng.standard_normal((sentences, d))[groups] + np.sqrt(1 - 0.43) * rng.standard_normal((len(groups), d))
        for _ in range(2)
    )
    return x, y, groups


def test_tokens_of_one_sentence_do_not_make_unrelated_states_similar() -> None:
    naive, safe = [], []
    for seed in range(12):
        x, y, groups = clustered(seed)
        naive.append(debiased_cka(x, y).value)
        safe.append(cluster_cka(x, y, groups, n_permutations=0).value)
    assert np.mean(naive) == pytest.approx(0.30, abs=0.06)  # the published figure of the trap
    assert abs(np.mean(safe)) < 0.05


def test_one_outlier_dimension_is_named_and_z_scores_are_safe() -> None:
    rng = np.random.default_rng(0)
    x, y = gaussians(800, 64)
    shared = rng.standard_normal(800)
    x[:, 5], y[:, 9] = 40 * shared, 40 * shared
    y[:, 5] = y[:, 5]
    raw = debiased_cka(x, y).value
    assert raw > 0.8
    both = x.copy(), y.copy()
    both[1][:, 5] = 40 * shared
    table = drift_table(both[0][None], both[1][None], np.arange(800), measures=["cka"], n_permutations=0)
    values = table.set_index("variant")["value"]
    assert values["raw"] > 0.8
    assert abs(values["z-scored"]) < 0.2
    assert "5" in table["outlier_dimensions"].iloc[0].split(",")


def test_padding_and_copied_sentences_do_not_count() -> None:
    x, y = gaussians(120, 8)
    y += x
    clean = cluster_cka(x, y, np.arange(120), n_permutations=0).value
    padded_x, padded_y = (np.vstack([a, np.zeros((60, 8))]) for a in (x, y))
    assert cluster_cka(padded_x, padded_y, np.arange(180), n_permutations=0).value == pytest.approx(clean, abs=1e-9)
    twice_x, twice_y = (np.vstack([a, a[:50]]) for a in (x, y))
    assert cluster_cka(twice_x, twice_y, np.arange(170), n_permutations=0).value == pytest.approx(clean, abs=1e-9)


def test_too_few_items_and_negative_denominators_are_nan_with_the_reason() -> None:
    x, y = gaussians(3, 5)
    found = debiased_cka(x, y)
    assert np.isnan(found.value)
    assert "4" in found.reason
    constant = debiased_cka(np.ones((20, 4)), gaussians(20, 4)[0])
    assert np.isnan(constant.value)
    assert constant.reason
    # over single items HSIC1 of a side with itself is a squared norm, so no smaller than 0; two zeros are not a number
    both = debiased_cka(np.ones((20, 4)), 2 * np.ones((20, 3)))
    assert np.isnan(both.value)
    assert both.reason
    for seed in range(50):
        x, _ = gaussians(5, 3, seed=seed)
        assert hsic1_by_kernels(x, x) >= 0


def test_a_rotation_and_a_shift_leave_everything_as_it_was() -> None:
    x, _ = gaussians(400, 16)
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0]
    moved = x @ q + 7
    assert debiased_cka(x, moved).value == pytest.approx(1.0, abs=1e-9)
    assert procrustes_r2(moved, x, np.arange(400)).value == pytest.approx(1.0, abs=1e-9)
    alignment = fit_alignment(moved, x)
    assert np.allclose(alignment.apply(moved), x, atol=1e-9)
    assert np.allclose(alignment.rotation @ alignment.rotation.T, np.eye(16), atol=1e-12)
    unrelated = gaussians(400, 16, seed=9)[1]
    assert procrustes_r2(unrelated, x, np.arange(400)).value < 0.1
    assert np.array_equal(Alignment.identity(16).apply(x), x)
    with pytest.raises(UsageError, match="at least 32 items"):
        fit_alignment(moved[:20], x[:20])


def test_the_permutation_test_is_calm_without_a_relation_and_sure_with_one() -> None:
    related, unrelated = [], []
    for seed in range(40):
        x, y = gaussians(60, 6, seed=seed)
        unrelated.append(cluster_cka(x, y, np.arange(60), n_permutations=99, seed=seed).p)
        related.append(cluster_cka(x, y + x, np.arange(60), n_permutations=99, seed=seed).p)
    assert np.mean(np.array(unrelated) <= 0.1) < 0.3
    assert max(related) <= 0.02


def test_the_jackknife_interval_covers_a_known_similarity() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6))
    big = rng.standard_normal((40_000, 6))
    noise = rng.standard_normal((40_000, 6))
    truth = debiased_cka(big, big @ mixing + 2 * noise).value
    hits = 0
    for seed in range(100):
        r = np.random.default_rng(seed + 1)
        x = r.standard_normal((150, 6))
        found = cluster_cka(x, x @ mixing + 2 * r.standard_normal((150, 6)), np.arange(150), n_permutations=0)
        hits += found.ci_low <= truth <= found.ci_high
    assert 85 <= hits <= 100


def test_shared_neighbours_leave_out_the_own_sentence_and_know_their_chance() -> None:
    x, y = gaussians(300, 12)
    groups = np.repeat(np.arange(100), 3)
    same = mutual_knn(x, x, groups, k=10)
    assert same.value == pytest.approx(1.0)
    assert same.chance == pytest.approx(10 / 297)
    other = mutual_knn(x, y, groups, k=10)
    assert other.value == pytest.approx(other.chance, abs=0.02)
    # twins within a sentence would be each other's neighbours on both sides
    twins = np.repeat(gaussians(100, 12, seed=3)[0], 3, axis=0) + 0.01 * gaussians(300, 12, seed=4)[0]
    others = np.repeat(gaussians(100, 12, seed=5)[1], 3, axis=0) + 0.01 * gaussians(300, 12, seed=6)[0]
    assert mutual_knn(twins, others, groups, k=2).value < 0.1


def test_the_table_and_the_map_hold_what_the_functions_give() -> None:
    rng = np.random.default_rng(0)
    before = rng.standard_normal((3, 90, 5))
    after = before.copy()
    after[2] += rng.standard_normal((90, 5))
    table = drift_table(before, after, np.arange(90), n_permutations=19)
    unchanged = table[table["hidden"] < 2]
    assert (unchanged["value"] == 1).all()
    assert (unchanged["ci_low"] == 1).all()
    cka = table[(table["hidden"] == 2) & (table["measure"] == "cka") & (table["variant"] == "raw")].iloc[0]
    assert cka["value"] == pytest.approx(debiased_cka(before[2], after[2]).value)
    square = cka_heat_map(before, after, np.arange(90)).pivot(index="hidden", columns="hidden2", values="value")
    assert square.shape == (3, 3)
    assert square.loc[2, 2] == pytest.approx(cka["value"])
    assert square.loc[0, 0] == pytest.approx(1.0)


def test_figures_draw_every_measure_and_pair() -> None:
    from analysis.drift_displays import plot_cka_map, plot_drift

    rng = np.random.default_rng(0)
    before = rng.standard_normal((3, 60, 4))
    after = before + rng.standard_normal((3, 60, 4))
    ax = plot_drift(drift_table(before, after, np.arange(60), n_permutations=0))
    assert len(ax.get_lines()) == 6
    assert ax.get_xlabel() == "hidden state (0 = embeddings)"
    image = plot_cka_map(cka_heat_map(before, after, np.arange(60))).get_images()[0]
    assert image.get_array().shape == (3, 3)


# ---------------------------------------------------------------- weights


def test_weight_drift_is_what_a_dense_decomposition_says() -> None:
    rng = np.random.default_rng(0)
    w, delta = rng.standard_normal((30, 20)), 0.1 * rng.standard_normal((30, 4)) @ rng.standard_normal((4, 20))
    before = {"a.weight": w, "a.bias": np.ones(30), "a.LayerNorm.weight": np.ones(30)}
    after = {"a.weight": w + delta, "a.bias": np.ones(30) + 0.5, "a.LayerNorm.weight": np.ones(30)}
    table = weight_drift(before, after).set_index("name")
    s = np.linalg.svd(delta, compute_uv=False)
    row = table.loc["a.weight"]
    assert row["relative"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(w))
    assert row["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2)
    assert row["energy_rank"] == int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9) + 1)
    assert table.loc["a.bias", "kind"] == "bias"
    assert table.loc["a.LayerNorm.weight", "kind"] == "norm"
    assert table.loc["a.LayerNorm.weight", "change"] == 0


def test_a_planted_intruder_dimension_is_counted() -> None:
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    w = left[:, :20] * np.geomspace(10, 1, 20) @ right[:, :20].T
    strange = left[:, 40:] @ rng.standard_normal(20)  # outside the base's 20 directions
    strange /= np.linalg.norm(strange)
    tall = 50 * np.outer(strange, right[:, 0])
    full = weight_drift({"w": w}, {"w": w + tall}).iloc[0]
    base = weight_drift({"w": w}, {"w": 1.1 * w}).iloc[0]
    assert base["intruders"] == 0
    assert full["intruders"] >= 1


def test_lora_through_qr_is_the_dense_product() -> None:
    rng = np.random.default_rng(2)
    w, a, b = rng.standard_normal((24, 16)), rng.standard_normal((3, 16)), rng.standard_normal((24, 3))
    thin = low_rank_drift("m", w, a=a, b=b, scale=0.5).iloc[0]
    dense = weight_drift({"m": w}, {"m": w + 0.5 * b @ a}).iloc[0]
    for column in ("change", "norm", "relative", "stable_rank"):
        assert thin[column] == pytest.approx(dense[column], rel=1e-8)
    assert thin["energy_rank"] == dense["energy_rank"]
    assert thin["intruders"] == dense["intruders"]
