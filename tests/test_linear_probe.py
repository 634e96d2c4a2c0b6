"""The linear probe reaches the optimum that independent solvers reach, whatever else is in the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from probing import LinearProbe
from probing.probes import solver
from probing.probes.linear import DEFAULT_L2, LinearProbeFit, fit_linear_probes, fit_selected
from probing.probes.standardise import moments
from spafit.errors import NumericalError, UsageError

TIGHT = 1e-6


def planted(n: int, width: int, classes: int, *, seed: int = 0, strength: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features with unequal scales and offsets, and labels drawn from a softmax of them."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, width)) @ rng.standard_normal((width, width))
    logits = strength * latent @ rng.standard_normal((width, classes)) / width + rng.standard_normal(classes)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return (latent * rng.uniform(0.1, 30, width) + rng.uniform(-50, 50, width)).astype(np.float32), labels


def standardised(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    scale = x.std(0)
    return (x - x.mean(0)) / np.where(scale == 0, 1, scale)


def objective(z: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray, l2: float) -> tuple[float, np.ndarray]:
    """Mean log loss in nats + l2/2 ‖w‖² and its gradient, in float64, written out plainly."""
    log_p = log_softmax(z @ w + b, axis=1)
    residual = (np.exp(log_p) - np.eye(w.shape[1])[y]) / len(y)
    value = -log_p[np.arange(len(y)), y].mean() + l2 / 2 * (w**2).sum()
    return value, np.concatenate([(z.T @ residual + l2 * w).ravel(), residual.sum(0)])


def optimum(z: np.ndarray, y: np.ndarray, classes: int, l2: float) -> float:
    width = z.shape[1]

    def flat(v: np.ndarray) -> tuple[float, np.ndarray]:
        return objective(z, y, v[: width * classes].reshape(width, classes), v[width * classes :], l2)

    options = {"maxiter": 1500, "maxfun": 3000, "maxcor": 30, "ftol": 1e-13, "gtol": 1e-8}
    return minimize(flat, np.zeros((width + 1) * classes), jac=True, method="L-BFGS-B", options=options).fun


def excess_bits(fit: LinearProbeFit, x: np.ndarray, y: np.ndarray, *, b: int = 0, m: int = 0, p: int = 0) -> float:
    """How far a fit's objective is above the optimum of the independent solver, in bits."""
    z, l2 = standardised(x), float(np.broadcast_to(fit.l2, (len(fit.mean), fit.weights.shape[2]))[b, p])
    w, bias = fit.weights[b, m, p].astype(np.float64), fit.bias[b, m, p].astype(np.float64)
    best = optimum(z, y, w.shape[1], l2)
    return (objective(z, y, w, bias, l2)[0] - best) / np.log(2)


@pytest.mark.parametrize(("n", "width", "classes"), [(400, 12, 4), (300, 8, 2), (150, 40, 5)])
@pytest.mark.parametrize("l2", [1e-3, 0.05, 2.0])
def test_a_fit_reaches_the_optimum_of_an_independent_solver_in_float64(n, width, classes, l2):
    x, y = planted(n, width, classes)
    fit = fit_linear_probes(x[None], y, n_classes=classes, l2=[l2], tolerance=TIGHT)
    assert fit.converged.all()
    assert -1e-6 < excess_bits(fit, x, y) < 1e-5
    gradient = objective(standardised(x), y, *(v[0, 0, 0].astype(np.float64) for v in (fit.weights, fit.bias)), l2)[1]
    assert np.abs(gradient).max() < 1e-3


def test_a_fit_that_was_given_up_says_so_and_is_worse():
    x, y = planted(400, 12, 4)
    fit = fit_linear_probes(x[None], y, n_classes=4, l2=[1e-3], max_iterations=2, tolerance=TIGHT)
    assert not fit.converged.any()
    assert fit.iterations.max() <= 2
    assert excess_bits(fit, x, y) > 1e-3


@pytest.mark.parametrize("l2", DEFAULT_L2)
def test_default_tolerance_holds_in_bits_on_many_rows_where_prefixes_and_class_blocks_are_used(l2, monkeypatch):
    built = []
    at = solver.Blocks.at.__func__
    monkeypatch.setattr(solver.Blocks, "at", classmethod(lambda cls, *a: built.append(at(cls, *a)) or built[-1]))
    x, y = planted(12_000, 16, 6, strength=4.0)
    fit = fit_linear_probes(x[None], y, n_classes=6, l2=[l2])
    assert (built[0] is not None) == (l2 <= solver.BLOCK_L2)
    assert fit.converged.all()
    assert -1e-5 < excess_bits(fit, x, y) < 0.004
    early = fit_linear_probes(x[None], y, n_classes=6, l2=[l2], max_iterations=1, tolerance=1e-9)
    assert not early.converged.any()


def test_the_reported_gap_is_not_far_below_the_true_distance_from_the_minimum():
    x, y = planted(12_000, 16, 6, strength=4.0)
    z, grid = standardised(x), (4e-4, 0.08)
    best = [optimum(z, y, 6, l2) for l2 in grid]
    for passes in (1, 2, 3):
        fit = fit_linear_probes(x[None], y, n_classes=6, l2=grid, max_iterations=passes, tolerance=1e-9)
        assert not fit.converged.any()
        for p, l2 in enumerate(grid):
            w, bias = (v[0, 0, p].astype(np.float64) for v in (fit.weights, fit.bias))
            true = (objective(z, y, w, bias, l2)[0] - best[p]) / np.log(2)
            assert fit.gap[0, 0, p] > true / 3


@pytest.mark.parametrize(("classes", "factor"), [(2, 2.0), (3, 1.0), (7, 1.0)])
def test_probabilities_are_scikit_learns_at_the_documented_c(classes, factor):
    x, y = planted(500, 10, classes)
    z, l2 = standardised(x), 0.01
    peer = LogisticRegression(C=factor / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(z, y)
    fit = fit_linear_probes(x[None], y, n_classes=classes, l2=[l2], tolerance=1e-7)
    ours = np.exp(fit.log_probabilities(x[None])[0, 0, 0])
    np.testing.assert_allclose(ours, peer.predict_proba(z), atol=2e-3)
    other = LogisticRegression(C=factor / (4 * l2 * len(x)), tol=1e-8, max_iter=5000).fit(z, y)
    assert np.abs(ours - other.predict_proba(z)).max() > 0.02


def test_on_one_hot_features_the_optimum_is_each_cells_label_frequency():
    # Softmax before the cross-entropy, a sigmoid, summed instead of averaged batches: each misses this closed form.
    counts = np.array([[60, 30, 10], [5, 5, 90], [40, 40, 20], [1, 98, 1]])
    cell, label = (np.concatenate(v) for v in zip(*_cells(counts), strict=True))
    x = np.eye(4, dtype=np.float32)[cell]
    fit = fit_linear_probes(x[None], label, n_classes=3, l2=[1e-7], tolerance=1e-7, max_iterations=2000)
    found = np.exp(fit.log_probabilities(np.eye(4, dtype=np.float32)[None])[0, 0, 0])
    np.testing.assert_allclose(found, counts / 100, atol=2e-3)
    assert np.abs(softmax(found, axis=1) - counts / 100).max() > 0.2


def _cells(counts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.full(k, cell), np.full(k, label)) for cell, row in enumerate(counts) for label, k in enumerate(row) if k
    ]


def test_a_representation_gives_the_same_bytes_alone_and_among_others():
    xs = np.stack([planted(600, 9, 3, seed=s)[0] for s in range(3)])
    y = planted(600, 9, 3)[1]
    together = fit_linear_probes(xs, y, n_classes=3, l2=[1e-3, 0.1])
    for b in range(3):
        alone = fit_linear_probes(xs[b : b + 1], y, n_classes=3, l2=[1e-3, 0.1])
        assert alone.weights[0].tobytes() == together.weights[b].tobytes()
        assert alone.bias[0].tobytes() == together.bias[b].tobytes()


@pytest.mark.parametrize("n", [600, 11_000])
def test_a_fit_is_the_same_alone_and_in_a_batch_of_label_sets_and_penalties(n):
    x, y = planted(n, 9, 3)
    sets = np.stack([y, np.random.default_rng(1).permutation(y), (y + 1) % 3])
    l2 = [1e-3, 0.02, 0.5]
    batch = fit_linear_probes(x[None], sets, n_classes=3, l2=l2, tolerance=TIGHT).log_probabilities(x[None])
    for m in range(3):
        for p in range(3):
            alone = fit_linear_probes(x[None], sets[m], n_classes=3, l2=[l2[p]], tolerance=TIGHT)
            np.testing.assert_allclose(batch[0, m, p], alone.log_probabilities(x[None])[0, 0, 0], atol=0.02)
            assert batch[0, m, p].argmax(1).tolist() != batch[0, (m + 1) % 3, p].argmax(1).tolist()


def test_the_same_call_gives_the_same_bytes():
    x, y = planted(11_000, 9, 3)
    first, second = (fit_linear_probes(x[None], y, n_classes=3) for _ in range(2))
    assert first.weights.tobytes() == second.weights.tobytes()
    assert first.gap.tobytes() == second.gap.tobytes()


@pytest.mark.parametrize("n", [500, 11_000])
def test_the_order_of_the_items_does_not_matter(n):
    x, y = planted(n, 8, 4)
    # Sorted by label is the worst order for a method that trusts the first rows.
    order = np.argsort(y, kind="stable")
    given = fit_linear_probes(x[None], y, n_classes=4, l2=[0.01], tolerance=TIGHT)
    sorted_ = fit_linear_probes(x[order][None], y[order], n_classes=4, l2=[0.01], tolerance=TIGHT)
    np.testing.assert_allclose(given.log_probabilities(x[None]), sorted_.log_probabilities(x[None]), atol=0.01)


def test_units_and_offsets_of_the_features_do_not_matter():
    x, y = planted(500, 8, 3)
    rng = np.random.default_rng(0)
    other = (x * rng.uniform(0.01, 100, 8) + rng.uniform(-10, 10, 8)).astype(np.float32)
    first = fit_linear_probes(x[None], y, n_classes=3, l2=[0.01], tolerance=TIGHT).log_probabilities(x[None])
    second = fit_linear_probes(other[None], y, n_classes=3, l2=[0.01], tolerance=TIGHT).log_probabilities(other[None])
    np.testing.assert_allclose(first, second, atol=5e-3)
    mixed = x @ rng.standard_normal((8, 8)).astype(np.float32)
    third = fit_linear_probes(mixed[None], y, n_classes=3, l2=[0.01], tolerance=TIGHT).log_probabilities(mixed[None])
    assert np.abs(first - third).max() > 0.05  # the penalty is not rotation-free once columns are standardised


def test_columns_that_do_not_vary_change_nothing():
    x, y = planted(400, 6, 3)
    rounding = np.float32(20_000) + np.float32(0.002) * (np.arange(400) % 2).astype(np.float32)
    wide = np.column_stack([x[:, :2], np.full(400, 7.5, np.float32), x[:, 2:], np.zeros(400, np.float32), rounding])
    fit = fit_linear_probes(wide[None], y, n_classes=3, l2=[0.01], tolerance=TIGHT)
    assert (fit.scale[0, [2, 7, 8]] == 1).all()
    assert (fit.weights[0, 0, 0, [2, 7, 8]] == 0).all()
    plain = fit_linear_probes(x[None], y, n_classes=3, l2=[0.01], tolerance=TIGHT)
    np.testing.assert_allclose(fit.log_probabilities(wide[None]), plain.log_probabilities(x[None]), atol=5e-3)


def test_a_constant_representation_predicts_the_label_frequencies_for_any_item():
    y = np.repeat([0, 1, 2], [10, 30, 60])
    fit = fit_linear_probes(np.full((1, 100, 5), 3.0), y, n_classes=3, l2=[0.01], tolerance=TIGHT)
    p = np.exp(fit.log_probabilities(np.array([[[3.0] * 5, [9.0, 1, 2, 3, 4]]]))[0, 0, 0])
    np.testing.assert_allclose(p, [[0.1, 0.3, 0.6]] * 2, atol=1e-3)


def test_very_small_and_very_large_columns_are_standardised_like_others():
    x, y = planted(400, 6, 3)
    stretched = x * np.array([1e-31, 1, 1e25, 1, 1e-20, 1], dtype=np.float32)
    mean, scale, constant = moments(stretched, 0)
    assert not constant.any()
    np.testing.assert_allclose(scale, stretched.astype(np.float64).std(0), rtol=1e-5)
    np.testing.assert_allclose(mean, stretched.astype(np.float64).mean(0), rtol=1e-4)
    plain, other = (fit_linear_probes(v[None], y, n_classes=3, l2=[0.01], tolerance=TIGHT) for v in (x, stretched))
    np.testing.assert_allclose(plain.log_probabilities(x[None]), other.log_probabilities(stretched[None]), atol=5e-3)


def test_copied_and_summed_columns_leave_a_finite_optimum():
    x, y = planted(400, 6, 3)
    z = standardised(x).astype(np.float32)
    collinear = np.column_stack([z, z[:, :3], z.sum(1)])
    fit = fit_linear_probes(collinear[None], y, n_classes=3, l2=[1e-3], tolerance=TIGHT)
    assert fit.converged.all()
    assert excess_bits(fit, collinear, y) < 1e-4


def test_separable_classes_converge_to_the_penalised_optimum():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = (np.eye(3)[y] * 10 + rng.standard_normal((300, 3))).astype(np.float32)
    fit = fit_linear_probes(x[None], y, n_classes=3, l2=[1e-4], tolerance=TIGHT)
    assert fit.converged.all()
    assert np.isfinite(fit.weights).all()
    assert excess_bits(fit, x, y) < 1e-4
    assert (fit.log_probabilities(x[None])[0, 0, 0].argmax(1) == y).all()


def test_a_rare_class_keeps_its_optimum():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [980, 16, 4])
    x = (rng.standard_normal((1000, 5)) + np.eye(5)[y] * 2).astype(np.float32)
    fit = fit_linear_probes(x[None], y, n_classes=3, l2=[1e-3], tolerance=TIGHT)
    assert excess_bits(fit, x, y) < 1e-4


def test_with_very_many_classes_the_covariances_diagonal_is_enough(monkeypatch):
    x, y = planted(2000, 12, 10, strength=4.0)
    whole = fit_linear_probes(x[None], y, n_classes=10, l2=[0.01], tolerance=1e-5)
    monkeypatch.setattr(solver, "FULL_COVARIANCE", 9)
    diagonal = fit_linear_probes(x[None], y, n_classes=10, l2=[0.01], tolerance=1e-5)
    assert diagonal.weights.tobytes() != whole.weights.tobytes()
    assert diagonal.converged.all()
    assert excess_bits(diagonal, x, y) < 1e-4


@pytest.mark.parametrize("n", [300, 11_000])
def test_a_class_without_training_items_gets_half_a_pseudo_items_share_and_leaves_the_others_alone(n):
    x, y = planted(n, 6, 3)
    gap = np.where(y >= 1, y + 1, y)  # classes 0, 2, 3 of 5
    fit = fit_linear_probes(x[None], gap, n_classes=5, l2=[0.01], tolerance=TIGHT)
    p = np.exp(fit.log_probabilities(x[None])[0, 0, 0].astype(np.float64))
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(p[:, [1, 4]], 0.5 / (n + 1), rtol=1e-4)
    plain = fit_linear_probes(x[None], y, n_classes=3, l2=[0.01], tolerance=TIGHT)
    expected = np.exp(plain.log_probabilities(x[None])[0, 0, 0]) * (1 - 1 / (n + 1))
    np.testing.assert_allclose(p[:, [0, 2, 3]], expected, atol=3e-3)
    assert (fit.weights[0, 0, 0][:, [1, 4]] == 0).all()


def test_label_sets_with_different_classes_present_share_a_call():
    x, y = planted(400, 6, 4)
    sets = np.stack([y, np.zeros_like(y), y % 2])
    fit = fit_linear_probes(x[None], sets, n_classes=4, l2=[0.01, 0.1], tolerance=TIGHT)
    log_p = fit.log_probabilities(x[None])
    np.testing.assert_allclose(np.exp(log_p.astype(np.float64)).sum(-1), 1, atol=1e-5)
    assert (log_p[0, 1].argmax(-1) == 0).all()
    assert fit.present.sum(1).tolist() == [4, 1, 2]
    assert log_p[0, :, 0].shape == (3, 400, 4)
    np.testing.assert_array_equal(fit.log_probabilities(x[None], label_set=2), log_p[:, 2])


def test_the_penalty_is_chosen_by_dev_log_loss_for_each_representation_on_its_own():
    x, y = planted(300, 30, 3, strength=1.5)
    noise = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    both, grid = np.stack([x, noise]), (1e-4, 1e-2, 1.0, 30.0)
    train, dev = slice(0, 150), slice(150, 300)
    control = np.random.default_rng(3).permutation(y)
    sets = np.stack([y, control])
    fit, l2 = fit_selected(both[:, train], sets[:, train], both[:, dev], sets[:, dev], n_classes=3, l2_grid=grid)
    path = fit_linear_probes(both[:, train], y[train], n_classes=3, l2=grid, tolerance=1e-5)
    log_p = path.log_probabilities(both[:, dev], label_set=0)
    loss = -log_p[:, :, np.arange(150), y[dev]].mean(-1)
    assert l2.tolist() == [grid[p] for p in loss.argmin(1)]
    assert l2[0] < l2[1]
    assert fit.weights.shape == (2, 2, 1, 30, 3)
    np.testing.assert_array_equal(fit.l2, l2[:, None])
    for b in range(2):
        for m in range(2):
            assert excess_bits(fit, both[b, train], sets[m, train], b=b, m=m) < 0.004


def test_the_controls_labels_do_not_influence_the_choice():
    x, y = planted(300, 10, 3)
    train, dev = slice(0, 150), slice(150, 300)
    chosen = []
    for seed in (0, 1):
        sets = np.stack([y, np.random.default_rng(seed).permutation(y)])
        fit, l2 = fit_selected(x[None, train], sets[:, train], x[None, dev], sets[:, dev], n_classes=3)
        chosen.append((l2.tolist(), fit.weights[:, 0].tobytes(), fit.weights[:, 1].tobytes()))
    assert chosen[0][:2] == chosen[1][:2]
    assert chosen[0][2] != chosen[1][2]


def test_a_warm_start_from_another_draw_needs_no_prefixes_and_ends_at_the_same_optimum():
    x, y = planted(24_000, 12, 5, strength=3.0)
    first, second = slice(0, 12_000), slice(12_000, None)
    earlier = fit_linear_probes(x[None, first], y[first], n_classes=5, l2=[1e-3, 0.05])
    cold, warm = (
        fit_linear_probes(x[None, second], y[second], n_classes=5, l2=[1e-3, 0.05], warm_start=start, tolerance=1e-4)
        for start in (None, earlier)
    )
    assert warm.converged.all()
    assert warm.iterations.sum() <= cold.iterations.sum()
    for p in range(2):
        assert excess_bits(warm, x[second], y[second], p=p) < 1e-4
    more = np.stack([y[second], np.random.default_rng(0).permutation(y[second])])
    mixed = fit_linear_probes(x[None, second], more, n_classes=5, l2=[1e-3, 0.05], warm_start=earlier)
    assert excess_bits(mixed, x[second], more[1], m=1) < 0.004
    with pytest.raises(UsageError, match="warm_start"):
        fit_linear_probes(x[None, second], y[second], n_classes=5, l2=[1e-3], warm_start=earlier)


def test_tensors_half_precision_and_memory_maps_are_read_like_arrays(tmp_path):
    x, y = planted(300, 6, 3)
    half = (x / 50).astype(np.float16)
    expected = fit_linear_probes(half.astype(np.float32)[None], y, n_classes=3, l2=[0.01]).weights.tobytes()
    np.save(tmp_path / "states.npy", half[None])
    for given in (half[None], torch.from_numpy(half)[None], np.load(tmp_path / "states.npy", mmap_mode="r")):
        assert fit_linear_probes(given, y, n_classes=3, l2=[0.01]).weights.tobytes() == expected


def test_global_random_state_is_neither_read_nor_moved():
    x, y = planted(300, 6, 3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = fit_linear_probes(x[None], y, n_classes=3, l2=[0.01])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert fit_linear_probes(x[None], y, n_classes=3, l2=[0.01]).weights.tobytes() == first.weights.tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graphics_card_gives_the_same_fit():
    x, y = planted(12_000, 16, 6, strength=4.0)
    fit = fit_linear_probes(x[None], y, n_classes=6, device="cuda")
    for p in range(len(DEFAULT_L2)):
        assert excess_bits(fit, x, y, p=p) < 0.004


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named(bad):
    x = np.stack([planted(100, 4, 3)[0]] * 3)
    y = planted(100, 4, 3)[1]
    fit = fit_linear_probes(x, y, n_classes=3, l2=[0.1])
    x[1, 42, 2] = bad
    with pytest.raises(NumericalError, match=r"Representation 1 .*item 42"):
        fit_linear_probes(x, y, n_classes=3, l2=[0.1])
    with pytest.raises(NumericalError, match=r"Representation 1 .*item 42"):
        fit.log_probabilities(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(100, 3)}, "from 0 to 2"),
        ({"labels": np.zeros(100)}, "integers"),
        ({"labels": np.zeros(99, dtype=int)}, "shape"),
        ({"x": np.zeros((100, 4))}, "shape"),
        ({"n_classes": 1}, "two classes"),
        ({"l2": [0.0]}, "positive"),
        ({"l2": []}, "positive"),
        ({"max_iterations": 0}, "at least 1"),
        ({"tolerance": float("nan")}, "above 0"),
        ({"device": "mps"}, "float64"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(change, message):
    x, y = planted(100, 4, 3)
    given = {"x": x[None], "labels": y, "n_classes": 3, "l2": [0.1], **change}
    with pytest.raises(UsageError, match=message):
        fit_linear_probes(given.pop("x"), given.pop("labels"), **given)


def test_shapes_that_differ_from_training_are_refused():
    x, y = planted(100, 4, 3)
    fit = fit_linear_probes(x[None], y, n_classes=3, l2=[0.1])
    with pytest.raises(UsageError, match="width 4"):
        fit.log_probabilities(x[None, :, :3])
    with pytest.raises(UsageError, match="x_dev"):
        fit_selected(x[None], y, x[None, :50], y, n_classes=3)


@parametrize_with_checks([LinearProbe()])
def test_the_estimator_follows_scikit_learns_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_estimators_coefficients_are_in_the_features_own_units(classes):
    x, y = planted(400, 7, classes)
    names = np.array([f"class {k}" for k in range(classes)])
    probe = LinearProbe(l2=0.01).fit(x, names[y])
    rows = 1 if classes == 2 else classes
    assert probe.coef_.shape == (rows, 7)
    assert probe.n_features_in_ == 7
    assert probe.converged_
    assert probe.classes_.tolist() == names.tolist()
    fit = fit_linear_probes(x[None], y, n_classes=classes, l2=[0.01], tolerance=1e-6)
    expected = fit.log_probabilities(x[None])[0, 0, 0]
    np.testing.assert_allclose(probe.predict_log_proba(x), expected, atol=1e-4)
    np.testing.assert_array_equal(probe.predict(x), names[expected.argmax(1)])
    scores = x.astype(np.float64) @ probe.coef_.T + probe.intercept_
    np.testing.assert_allclose(probe.decision_function(x), scores[:, 0] if classes == 2 else scores)
