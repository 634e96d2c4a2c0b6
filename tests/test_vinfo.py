"""V-information against closed forms: a binary symmetric channel, Gaussians, noisy labels, two views, a copy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from probing.probes.linear import fit_selected
from probing.probes.vinfo import ProbeSplits, VInformation, log2_shares, v_information
from spafit.errors import UsageError

SIZES = (4000, 1000, 6000)
TIGHT = 1e-6
#: Hardly penalised and fitted to the end, since the closed forms are those of the best probe there is.
BEST = {"l2_grid": (1e-5, 3e-4), "tolerance": TIGHT, "n_boot": 200}


def entropy(p: float) -> float:
    return float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))


def split(x: np.ndarray, y: np.ndarray, n_classes: int = 2) -> ProbeSplits:
    """States (B, items, width) and labels (…, items) in three splits of :data:`SIZES`."""
    cuts = np.cumsum(SIZES)[:-1]
    labels = np.split(y, cuts, axis=-1)
    train, dev, test = np.split(x.astype(np.float32), cuts, axis=1)
    return ProbeSplits((train, dev, test), (labels[0], labels[1], labels[2]), n_classes)


def flipped(y: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    return y ^ (rng.random(len(y)) < rate)


def views(rates: list[float], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Binary labels, and one hidden state per rate: the label flipped with that rate, beside two columns of noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, sum(SIZES))
    seen = np.stack([flipped(y, rate, rng) for rate in rates])
    return np.concatenate([seen[..., None], rng.standard_normal((*seen.shape, 2))], 2), y


GROUPS = np.arange(SIZES[2])


def gaussian_information(mu: float) -> float:
    """Bits that x ~ N(±mu, 1) tells of an even sign, by numeric integration."""
    return 1 - quad(lambda z: norm.pdf(z) * np.logaddexp(0, -2 * mu * (mu + z)) / np.log(2), -10, 10)[0]


def agree(found: list[VInformation], truth: float | np.ndarray, name: str) -> None:
    """The mean over draws is the truth but for the little that a fitted probe loses; intervals hold it as they say."""
    bits = np.stack([v.bits[:, 0] for v in found])
    error = bits.std(0, ddof=1) / np.sqrt(len(bits))
    covered = np.mean([(v.low[:, 0] < truth) & (truth < v.high[:, 0]) for v in found])
    print(name, "mean", bits.mean(0), "truth", truth, "standard error", error, "covered", covered)
    assert (np.abs(bits.mean(0) - truth) < 3 * error + 0.0015).all()
    assert covered >= 0.8


def test_binary_symmetric_channels_have_their_capacity():
    rates = [0.02, 0.1, 0.25, 0.45]
    truth = np.array([1 - entropy(r) for r in rates])
    found = [v_information(split(*views(rates, seed=s)), GROUPS, **BEST) for s in range(20)]
    agree(found, truth, "channels")
    with pytest.raises(AssertionError):  # what the same numbers in nats would be
        agree(found, truth * np.log(2), "channels in nats")


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_gaussians_of_equal_covariance_have_the_information_of_the_integral(mu):
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, sum(SIZES))
        x = rng.standard_normal((len(y), 4))
        x[:, 0] += mu * (2 * y - 1)
        states = (x @ rng.standard_normal((4, 4)))[None]
        found.append(v_information(split(states, y), GROUPS, **BEST))
    agree(found, gaussian_information(mu), f"gaussian {mu}")


def test_label_noise_lowers_it_as_the_closed_form_says():
    rng = np.random.default_rng(2)
    x, y = views([0.05])
    rates = [0.0, 0.05, 0.15, 0.3, 0.5]
    noisy = np.stack([flipped(y, r, rng) for r in rates])
    found = v_information(split(x, noisy), GROUPS, **BEST)
    truth = np.array([1 - entropy(0.05 * (1 - r) + r * 0.95) for r in rates])
    print("noise", found.bits[0], truth)
    np.testing.assert_allclose(found.bits[0], truth, atol=0.025)
    assert (found.low[0] < truth + 0.002).all()
    assert (truth < found.high[0] + 0.002).all()
    assert (np.diff(found.bits[0]) < -0.03).all()


def test_two_views_add_what_enumeration_says():
    rates = [0.2, 0.1, 0.3]

    def given(a: float, b: float) -> float:
        """I(Y; B | A) of two independent channels, over their four joint outcomes."""
        total = 0.0
        for u, v in itertools.product((0, 1), repeat=2):
            joint = [0.5 * (a if u != k else 1 - a) * (b if v != k else 1 - b) for k in (0, 1)]
            total += sum(joint) * entropy(joint[0] / sum(joint))
        return entropy(a) - total

    draws = [split(*views(rates, seed=s)) for s in range(20)]
    for base, before in (("first", [0.2, 0.2]), ("below", [0.2, 0.1])):
        found = [v_information(splits, GROUPS, base=base, **BEST) for splits in draws]
        assert found[0].hidden.tolist() == [1, 2]
        agree(found, np.array([given(a, b) for a, b in zip(before, rates[1:], strict=True)]), base)


def test_a_copy_or_an_affine_image_of_the_base_adds_nothing_and_new_information_does():
    x, y = views([0.2, 0.1])
    x = np.stack([x[0], x[0], x[0] * 3 - 5, x[1]])
    found = v_information(split(x, y), GROUPS, base="first")
    print("copy", found.bits[:, 0], found.low[:, 0], found.high[:, 0])
    assert np.abs(found.bits[:2, 0]).max() < 0.002
    assert found.low[2, 0] > 0.1
    weak = v_information(split(x, y), GROUPS, base="first", l2_grid=(1e-6,), tolerance=TIGHT)
    assert np.abs(weak.items[:2, 0]).max() < 0.01


def test_values_without_a_base_are_the_difference_of_scores_and_nest():
    x, y = views([0.3, 0.15])
    splits = split(x, y)
    both = np.concatenate([x[0], x[1]], 1)[None]
    first = v_information(splits, GROUPS).items[0, 0]
    gain = v_information(splits, GROUPS, base="first").items[0, 0]
    together = v_information(split(both, y), GROUPS).items[0, 0]
    np.testing.assert_allclose(first + gain, together, atol=1e-6)


def test_pointwise_values_are_those_of_scikit_learn_with_unequal_shares():
    rng = np.random.default_rng(3)
    latent = rng.standard_normal((sum(SIZES), 5))
    y = (latent @ rng.standard_normal((5, 3)) + [1.5, 0, -1] + rng.gumbel(size=(len(latent), 3))).argmax(1)
    splits, l2 = split(latent[None], y, 3), 0.01
    found = v_information(splits, GROUPS, l2_grid=(l2,), tolerance=TIGHT)
    train, test = splits.x[0][0].astype(float), splits.x[2][0].astype(float)
    mean, scale, (seen, _, scored) = train.mean(0), train.std(0), splits.labels
    peer = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-9, max_iter=5000).fit((train - mean) / scale, seen[0])
    p = peer.predict_proba((test - mean) / scale)[np.arange(len(test)), scored[0]]
    expected = np.log2(p) - np.log2(np.bincount(seen[0]) / len(train))[scored[0]]
    np.testing.assert_allclose(found.items[0, 0], expected, atol=0.01)
    print("label entropy", found.label_entropy, found.bits)
    assert found.label_entropy[0] == pytest.approx(-np.log2(np.bincount(seen[0]) / len(train))[scored[0]].mean())
    # What no state tells is the whole label entropy: cross-entropy + V-information.
    assert found.label_entropy[0] - found.bits[0, 0] == pytest.approx(-np.log2(p).mean(), abs=1e-3)


def test_noise_and_labels_that_are_known_before_tell_nothing():
    rng = np.random.default_rng(4)
    y = (rng.random(sum(SIZES)) < 0.05).astype(int)  # 95 % one label: high accuracy, no information
    x = rng.standard_normal((1, len(y), 8))
    found = v_information(split(x, y), GROUPS)
    print("noise", found.bits, found.low, found.high)
    assert abs(found.bits[0, 0]) < 0.01
    assert found.low[0, 0] <= 0.005


def test_rotation_and_order_of_items_do_not_matter():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 3, sum(SIZES))
    x = rng.standard_normal((len(y), 6)) + 1.2 * np.eye(6)[y]
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x[: SIZES[0]].T, bias=True))).T  # white in training
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    order = np.concatenate([rng.permutation(SIZES[0]), np.arange(SIZES[0], len(y))])
    plain = v_information(split(np.stack([x, x @ rotation]), y, 3), GROUPS, l2_grid=(0.02,), tolerance=TIGHT).bits
    moved = v_information(split(x[None, order], y[order], 3), GROUPS, l2_grid=(0.02,), tolerance=TIGHT).bits
    print("rotation", plain[:, 0], moved)
    assert plain[1, 0] == pytest.approx(plain[0, 0], abs=1e-4)
    assert moved[0, 0] == pytest.approx(plain[0, 0], abs=1e-4)


def test_intervals_follow_the_groups_and_the_gain_is_paired():
    x, y = views([0.2, 0.2])
    x[1] = x[0] + 0.01 * x[1]  # almost the same state: each varies over items, their difference hardly
    splits = split(x, y)
    whole, gain = v_information(splits, GROUPS), v_information(splits, GROUPS, base="first")
    width, paired = (v.high[0, 0] - v.low[0, 0] for v in (whole, gain))
    print("widths", width, paired)
    assert paired < width / 3
    # Each item ten times over: one group of ten is one item's worth, as items of their own it would look like ten.
    few = tuple(np.repeat(v[:, :600], 10, axis=1) for v in (splits.x[2], splits.labels[2]))
    repeated = ProbeSplits((*splits.x[:2], few[0]), (*splits.labels[:2], few[1]), 2)
    clustered, loose = (v_information(repeated, g) for g in (GROUPS // 10, GROUPS))
    assert (clustered.n_groups, loose.n_groups) == (600, 6000)
    ratio = (clustered.high - clustered.low) / (loose.high - loose.low)
    assert ratio[0, 0] == pytest.approx(np.sqrt(10), rel=0.15)


def test_penalties_are_chosen_on_dev_and_tables_hold_everything():
    x, y = views([0.2, 0.1])
    control = np.random.default_rng(99).integers(0, 2, len(y))
    splits = split(x, np.stack([y, control]))
    found = v_information(splits, GROUPS)
    chosen = fit_selected(splits.x[0], splits.labels[0], splits.x[1], splits.labels[1], n_classes=2)[1]
    np.testing.assert_array_equal(found.l2, chosen)
    table = found.to_pandas()
    assert len(table) == 4
    assert table["bits"].tolist() == found.bits.ravel().tolist()
    assert (table["ci_low"] < table["bits"]).all()
    assert (table["bits"] < table["ci_high"]).all()
    assert abs(table.query("label_set == 1")["bits"]).max() < 0.01
    assert set(table["base"]) == {"labels"}
    assert set(table["n_groups"]) == {SIZES[2]}


def test_a_label_that_training_never_has_counts_as_half_an_item():
    shares = log2_shares(np.array([[0, 0, 0, 1]]), np.array([[0, 1, 2]]), n_classes=3)
    np.testing.assert_allclose(2.0**shares, [[0.75, 0.25, 0.125]])


def test_bad_input_is_refused_in_one_sentence():
    x, y = views([0.2])
    splits = split(x, y)
    with pytest.raises(UsageError, match="at least two hidden states"):
        v_information(splits, GROUPS, base="below")
    with pytest.raises(UsageError, match="it can be 'labels', 'first' or 'below'"):
        v_information(splits, GROUPS, base="above")
    with pytest.raises(UsageError, match="6000 test items"):
        v_information(splits, GROUPS[:5])
    with pytest.raises(UsageError, match="Test features have shape"):
        ProbeSplits((*splits.x[:2], splits.x[2][:, :5]), splits.labels, 2)
    with pytest.raises(UsageError, match="from 0 to 1"):
        ProbeSplits(splits.x, (*splits.labels[:2], splits.labels[2] + 1), 2)
