"""Scalar mixes: planted layers, an independent optimiser, invariances, and what must not be found."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

import probing
from probing.mix_summaries import (
    MIN_KL,
    kl_from_uniform,
    mix_centre,
    mix_entropy,
    summarize_cumulative,
    summarize_weights,
)
from probing.mixes import mix_arrays
from probing.probes.mixing import MixFit, fit_mixes
from probing.scoring import SCORE_COLUMNS
from spafit.errors import NumericalError, TaskError, UsageError


def layers_with_signal_at(at, *, layers=5, n=2400, width=12, classes=3, signal=1.2, seed=0):
    """Noise at every layer, and the label's centre added at the layers ``at``."""
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, n)
    x = random.standard_normal((layers, n, width))
    x[list(at)] += signal * random.standard_normal((classes, width))[y]
    return x.astype(np.float32), y


def fitted(x, y, *, n_classes=3, train=0.75, l2=(1e-2,), **options) -> tuple[MixFit, slice]:
    cut = int(train * x.shape[1])
    fit = fit_mixes(x[:, :cut], y[..., :cut], x[:, cut:], y[..., cut:], n_classes=n_classes, l2_grid=l2, **options)
    return fit, slice(cut, None)


def bits(fit, x, y):
    """Mean cross-entropy in bits of label set 0, per mix."""
    log_p = fit.log_probabilities(x)[:, 0]
    return -np.take_along_axis(log_p, y[None, :, None], 2)[..., 0].mean(1, dtype=np.float64) / np.log(2)


def independent(x, y, *, classes, l2):
    """The same objective by autograd and torch's own L-BFGS in float64; its minimum in bits, and s."""
    import torch

    layers, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(y)
    layers = layers - layers.mean(1, keepdim=True)
    weights = torch.zeros(x.shape[2], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    a = torch.zeros(len(x), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights, bias, a], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-8, tolerance_change=1e-12
    )

    def closure():
        optimiser.zero_grad()
        z = torch.einsum("l,lnd->nd", a.softmax(0), layers)
        z = z / z.square().mean().sqrt()
        loss = torch.nn.functional.cross_entropy(z @ weights + bias, labels) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return closure().item() / math.log(2), a.detach().softmax(0).numpy()


def objective(fit, x, y, l2):
    return bits(fit, x, y) + l2 / 2 * (fit.weights[:, 0].astype(np.float64) ** 2).sum((1, 2)) / np.log(2)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_weights_go_to_the_layer_that_carries_the_label(at):
    x, y = layers_with_signal_at([at], n=12_000)  # fewer items would let chance carry some of the label elsewhere
    fit, _ = fitted(x, y)
    assert fit.converged.all()
    assert fit.mix_weights[-1, 0, at] > 0.93
    assert mix_centre(fit.mix_weights[-1, 0]) == pytest.approx(at, abs=0.25)
    assert (fit.mix_weights[at, 0, at + 1 :] == 0).all()  # layers above the last take no part


@pytest.mark.parametrize("l2", [3e-4, 1e-2, 0.5])
@pytest.mark.parametrize("classes", [2, 4])
def test_an_independent_optimiser_finds_no_lower_loss(l2, classes):
    x, y = layers_with_signal_at([1, 3], classes=classes, signal=0.8, width=10)
    x[2] *= 7  # layers of unequal norm
    fit = fit_mixes(x, y, x, y, n_classes=classes, l2_grid=[l2])
    reached = objective(fit, x, y, l2)
    for last in range(len(x)):
        lowest, _ = independent(x[: last + 1], y, classes=classes, l2=l2)
        assert reached[last] == pytest.approx(lowest, abs=0.005)
    lowest, s = independent(x, y, classes=classes, l2=l2)
    assert mix_centre(fit.mix_weights[-1, 0]) == pytest.approx(mix_centre(s), abs=0.1)


def test_many_rows_with_stages_on_part_of_them_reach_the_same_loss():
    x, y = layers_with_signal_at([1, 2], n=16_000, layers=4, signal=0.7)
    fit = fit_mixes(x, y, x[:, :50], y[:50], n_classes=3, l2_grid=[1e-2])
    lowest, s = independent(x, y, classes=3, l2=1e-2)
    assert objective(fit, x, y, 1e-2)[-1] == pytest.approx(lowest, abs=0.002)
    np.testing.assert_allclose(fit.mix_weights[-1, 0], s, atol=0.03)


def test_identical_layers_keep_equal_weights():
    x, y = layers_with_signal_at([0], layers=1)
    fit, _ = fitted(np.repeat(x, 4, axis=0), y)
    np.testing.assert_allclose(fit.mix_weights[-1, 0], 0.25, atol=1e-4)
    assert kl_from_uniform(fit.mix_weights[-1, 0]) == pytest.approx(0, abs=1e-5)


def test_a_copied_layer_adds_nothing():
    x, y = layers_with_signal_at([1], layers=3)
    copied = np.concatenate([x[:2], x[1:2], x[2:]])
    fit, held = fitted(copied, y)
    score = bits(fit, copied[:, held], y[held])
    assert score[2] == pytest.approx(score[1], abs=0.003)
    assert score[0] - score[1] > 0.5  # while the layer itself added much


def test_rotating_features_and_scaling_all_layers_change_no_bits():
    x, y = layers_with_signal_at([1, 3], signal=0.6)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))
    turned = (30 * (x @ rotation) + 5).astype(np.float32)
    (one, held), (other, _) = fitted(x, y), fitted(turned, y)
    np.testing.assert_allclose(bits(one, x[:, held], y[held]), bits(other, turned[:, held], y[held]), atol=2e-3)
    np.testing.assert_allclose(one.mix_weights[-1, 0], other.mix_weights[-1, 0], atol=0.02)


def test_norm_corrected_weights_undo_the_size_of_a_layer():
    x, y = layers_with_signal_at([0, 1], layers=2, signal=0.8)
    x = np.repeat(x[:1], 2, axis=0) + 0.8 * np.random.default_rng(3).standard_normal(x.shape).astype(np.float32)
    larger = x * np.array([1, 10], dtype=np.float32)[:, None, None]
    (plain, held), (scaled, _) = fitted(x, y), fitted(larger, y)
    assert plain.mix_weights[-1, 0, 1] == pytest.approx(0.5, abs=0.1)
    assert scaled.mix_weights[-1, 0, 1] < 0.2  # the large layer needs a small weight to say as much
    np.testing.assert_allclose(scaled.norm_corrected[-1, 0], plain.norm_corrected[-1, 0], atol=0.03)
    np.testing.assert_allclose(bits(plain, x[:, held], y[held]), bits(scaled, larger[:, held], y[held]), atol=3e-3)


def test_random_labels_save_nothing_on_held_out_items():
    x, y = layers_with_signal_at([2])
    y = np.random.default_rng(5).permutation(y)
    fit, held = fitted(x, y, l2=(3e-4, 1e-2, 0.5, 10.0))
    entropy = -(p := np.bincount(y) / len(y)) @ np.log2(p)
    assert (bits(fit, x[:, held], y[held]) > entropy - 0.01).all()


def test_probabilities_are_normalised_and_bits_are_of_probabilities():
    """A softmax before the cross-entropy would leave the loss of a perfect probe at log2(1 + (K - 1) / e) bits."""
    x, y = layers_with_signal_at([0], layers=2, signal=30.0)
    fit, held = fitted(x, y, l2=(1e-5,))
    log_p = fit.log_probabilities(x[:, held])
    np.testing.assert_allclose(np.exp(log_p.astype(np.float64)).sum(-1), 1, atol=1e-5)
    assert bits(fit, x[:, held], y[held])[-1] < 0.05 < math.log2(1 + 2 / math.e)


def test_label_sets_are_fitted_at_the_penalty_of_the_first():
    x, y = layers_with_signal_at([1])
    other = np.random.default_rng(2).permutation(y)
    fit, _ = fitted(x, np.stack([y, other]), l2=(1e-3, 1e-1))
    alone, _ = fitted(x, y, l2=(1e-3, 1e-1))
    np.testing.assert_array_equal(fit.l2, alone.l2)
    np.testing.assert_allclose(fit.mix_weights[:, 0], alone.mix_weights[:, 0], atol=1e-3)
    by_hand, _ = fitted(x, other, l2=(fit.l2[-1],), last=[4])
    np.testing.assert_allclose(fit.mix_weights[-1, 1], by_hand.mix_weights[-1, 0], atol=0.05)


def test_the_same_call_gives_the_same_bytes():
    x, y = layers_with_signal_at([1])
    one, other = fitted(x, y)[0], fitted(x, y)[0]
    assert one.weights.tobytes() == other.weights.tobytes()
    assert one.mix_weights.tobytes() == other.mix_weights.tobytes()


def test_constant_layers_and_absent_classes():
    x, y = layers_with_signal_at([2], layers=3)
    x[0] = 0.123
    fit, held = fitted(x, y, n_classes=4)  # class 3 has no item
    log_p = fit.log_probabilities(x[:, held])
    assert (np.ptp(log_p[0, 0], axis=0) < 1e-6).all()  # embeddings that are constant tell nothing
    assert np.exp(log_p[2, 0, :, 3]).max() == pytest.approx(0.5 / (fit.n_items + 0.5))
    assert fit.mix_weights[2, 0, 2] > 5 * fit.mix_weights[2, 0, 1]  # a constant layer's weight changes nothing


def test_errors_say_what_is_wrong():
    x, y = layers_with_signal_at([1], n=60)
    with pytest.raises(UsageError, match="x_dev has shape"):
        fit_mixes(x, y, x[:, :5], y, n_classes=3)
    with pytest.raises(UsageError, match="layers from 0 to 4"):
        fit_mixes(x, y, x, y, n_classes=3, last=[5])
    with pytest.raises(NumericalError, match="Representation 3"):
        fit_mixes(np.where(np.arange(5)[:, None, None] == 3, np.nan, x), y, x, y, n_classes=3)
    fit = fit_mixes(x, y, x, y, n_classes=3, l2_grid=[0.1])
    with pytest.raises(UsageError, match="fitted on 5 layers"):
        fit.log_probabilities(x[:4])
    bad = x.copy()
    bad[2, 7] = np.inf
    with pytest.raises(NumericalError, match="Layer 2"):
        fit.log_probabilities(bad)
    with pytest.raises(UsageError, match="y_dev"):
        mix_arrays(x, y, x, y[:5], x, y)
    with pytest.raises(UsageError, match="at least one"):
        mix_arrays(x, y, x, y, x[:, :0], y[:0])
    with pytest.raises(UsageError, match="groups"):
        mix_arrays(x, y, x, y, x, y, groups=["a"])
    with pytest.raises(TaskError, match="one class only"):
        mix_arrays(x, np.zeros_like(y), x, y, x, y, n_classes=3)


def test_closed_forms_of_weights():
    uniform, one, half = np.full(8, 1 / 8), np.eye(8)[5], np.array([0.5, 0.5, 0, 0, 0, 0, 0, 0])
    assert mix_entropy(uniform) == pytest.approx(3)
    assert kl_from_uniform(uniform) == pytest.approx(0)
    assert (mix_entropy(one), kl_from_uniform(one), mix_centre(one)) == (0, 3, 5)
    assert (mix_entropy(half), kl_from_uniform(half), mix_centre(half)) == (1, 2, 0.5)
    assert mix_centre(half, np.arange(3, 11)) == 3.5
    with pytest.raises(UsageError, match="sum to one"):
        mix_centre(np.array([0.5, 0.2]))
    with pytest.raises(NumericalError):
        mix_centre(np.array([0.5, np.nan]))


def test_centres_of_near_uniform_weights_say_so():
    even = np.full((3, 6), 1 / 6)
    rows = {r.statistic: r for r in summarize_weights(even, even, seed_counts=np.array([[3, 0, 0], [0, 1, 2]]))}
    assert "near uniform" in rows["cog"].note
    assert "near uniform" in rows["cog_norm"].note
    steep = np.eye(6)[[4, 5, 4]] * 0.9 + 0.1 / 6
    rows = {r.statistic: r for r in summarize_weights(steep, seed_counts=np.array([[3, 0, 0], [0, 3, 0], [1, 1, 1]]))}
    assert rows["kl_uniform"].value > MIN_KL
    assert rows["cog"].note == ""
    assert rows["cog"].ci_low < rows["cog"].value < rows["cog"].ci_high
    rows = {r.statistic: r for r in summarize_weights(steep[:1], seed_counts=np.ones((4, 1)))}
    assert math.isnan(rows["cog"].ci_low)
    assert "one training draw" in rows["cog"].note


@pytest.fixture(scope="module")
def measured():
    x, y = layers_with_signal_at([2, 3], n=3000, signal=0.9)
    other = np.random.default_rng(9).integers(0, 3, 3000)
    labels = np.stack([y, other])
    part = [slice(0, 1500), slice(1500, 2000), slice(2000, 3000)]
    arrays = [v for p in part for v in (x[:, p], labels[:, p])]
    groups = np.repeat(np.arange(500), 2)
    return mix_arrays(
        *arrays, groups=groups, label_sets=("none", "word-type"), l2=(1e-2, 1e-1), n_boot=200, name="planted"
    ), arrays  # fmt: skip


def test_tables_hold_what_they_say(measured):
    result, (_, _, _, _, x_test, y_test) = measured
    table = result.to_pandas()
    assert tuple(table.columns) == SCORE_COLUMNS
    assert not table.duplicated(["control", "seed", "hidden", "metric"]).any()
    assert (table["block"] == table["hidden"] - 1).all()
    assert table["converged"].all()
    own = table[(table["control"] == "none") & table["seed"].isna()].pivot(
        index="hidden", columns="metric", values="value"
    )
    np.testing.assert_allclose(own["differential_bits"].iloc[1:], np.diff(own["cumulative_bits"]), atol=1e-6)
    assert own["mix_weight"].sum() == pytest.approx(1)
    assert own["mix_weight_norm"].sum() == pytest.approx(1)
    assert own["cumulative_accuracy"].iloc[-1] > 0.9
    assert own["differential_bits"].idxmax() == 2
    by_hand = [fit.log_probabilities(x_test)[:, 0].argmax(-1) == y_test[0] for fit in result.fits]
    np.testing.assert_allclose(own["cumulative_accuracy"], np.mean(by_hand, axis=(0, 2)))
    items = result.items[result.items["control"] == "none"]
    np.testing.assert_allclose(items.groupby("hidden")["bits"].mean(), own["cumulative_bits"], atol=1e-5)
    means = table[table["seed"].isna()]
    inside = (means["ci_low"] <= means["value"] + 1e-9) & (means["value"] <= means["ci_high"] + 1e-9)
    assert inside.all()


def test_summaries_date_the_planted_layer_and_suppress_the_control(measured):
    result, _ = measured
    found = result.summaries[result.summaries["metric"] != "cumulative_accuracy"].set_index(["control", "statistic"])
    assert found.loc[("none", "cog"), "value"] == pytest.approx(2.5, abs=0.4)
    assert found.loc[("none", "expected_layer_robust"), "value"] == pytest.approx(2.2, abs=0.4)
    assert found.loc[("none", "headroom"), "ci_low"] > 0.3
    assert math.isnan(found.loc[("word-type", "expected_layer_robust"), "value"])
    assert found.loc[("word-type", "expected_layer_robust"), "note"] != ""
    assert "not to be trusted" in found.loc[("word-type", "expected_layer"), "note"]
    assert "none" in result._repr_html_()


def test_the_plain_and_robust_expected_layer_agree_on_a_clear_step():
    from probing.curves import LayerCurve

    y = np.array([0.0, 0.1, 1.0, 1.1, 1.2])
    noise = 0.01 * np.random.default_rng(0).standard_normal((400, 5))
    rows = {r.statistic: r for r in summarize_cumulative(LayerCurve("t", "other", np.arange(5), y, y + noise))}
    exact = (1 * 0.1 + 2 * 0.9 + 3 * 0.1 + 4 * 0.1) / 1.2
    assert rows["expected_layer"].value == pytest.approx(exact)
    assert rows["expected_layer_robust"].value == pytest.approx(exact, abs=0.02)
    assert rows["expected_layer"].ci_low < exact < rows["expected_layer"].ci_high
    assert rows["headroom"].value == pytest.approx(1.2)


def test_seeds_that_would_draw_the_same_items_count_once():
    x, y = layers_with_signal_at([1], n=300)
    result = mix_arrays(x, y, x, y, x, y, max_train=300, l2=(0.1,), n_boot=50)
    assert len(result.fits) == 1
    assert result.scores["n_seeds"].max() == 1
    assert result.summaries.loc[result.summaries["statistic"] == "cog", "note"].str.contains("one training draw").all()


def test_the_figure_shows_weights_and_gains(measured, tmp_path):
    result, _ = measured
    ax = result.plot()
    weights, gains = ax.containers[1], ax.containers[3]
    np.testing.assert_allclose([b.get_height() for b in weights], _means(result.scores, "mix_weight"))
    heights = np.array([b.get_height() for b in gains])
    assert np.abs(heights).sum() == pytest.approx(1)
    assert any("centre of weights 2." in t.get_text() for t in ax.texts)
    ax.figure.savefig(tmp_path / "mix.png")
    assert (tmp_path / "mix.png").stat().st_size > 5000


def _means(scores: pd.DataFrame, metric: str) -> pd.Series:
    keep = scores["seed"].isna() & (scores["metric"] == metric) & (scores["control"] == "none")
    return scores[keep].sort_values("hidden")["value"]


def test_public_name():
    assert probing.mix_arrays is mix_arrays
