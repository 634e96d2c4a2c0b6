"""Online codes: blocks, units, an independent code with scikit-learn, random labels, and what must not matter."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from probing.probes.mdl import FRACTIONS, block_ends, online_code, published_compression
from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator

TIGHT = 1e-6


def planted(n: int, width: int, classes: int, *, seed: int = 0, strength: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Features with unequal scales and offsets, and labels drawn from a softmax of them."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, width))
    logits = strength * latent @ rng.standard_normal((width, classes)) / np.sqrt(width) + rng.standard_normal(classes)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return (latent * rng.uniform(0.1, 30, width) + rng.uniform(-50, 50, width)).astype(np.float32), labels


def plain_code(x: np.ndarray, y: np.ndarray, classes: int, l2: float, seed: int, base: float = 2.0) -> list[float]:
    """Each block's code length, with scikit-learn; logarithms of the probes to ``base``."""
    order = generator(seed, "online code", len(y)).permutation(len(y))
    z, y = ((x - x.mean(0)) / x.std(0))[order], y[order]
    first = max(round(0.001 * len(y)), classes)
    ends = [first] + [e for e in (round(f * len(y)) for f in FRACTIONS[1:]) if e > first]
    costs = [first * np.log2(classes)]
    for known, stop in pairwise(ends):
        seen, count = np.unique(y[:known]), classes - len(np.unique(y[:known]))
        p = np.full((stop - known, classes), 0.5 / (known + 0.5 * count))
        if len(seen) == 1:
            p[:, seen] = 1 - p[0, 0] * count
        else:
            c = (2 if len(seen) == 2 else 1) / (l2 * len(y))
            probe = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(z[:known], y[:known])
            p[:, seen] = probe.predict_proba(z[known:stop]) * (1 - p[0, 0] * count)
        costs.append(-np.log(p[np.arange(stop - known), y[known:stop]]).sum() / np.log(base))
    return costs


def test_blocks_end_where_the_paper_says_and_never_before_every_class_had_an_item():
    assert block_ends(1_000_000, 45).tolist() == [
        1000, 2000, 4000, 8000, 16_000, 32_000, 62_500, 125_000, 250_000, 500_000, 1_000_000,
    ]  # fmt: skip
    assert block_ends(10_000, 45).tolist() == [45, 80, 160, 320, 625, 1250, 2500, 5000, 10_000]
    assert block_ends(950_028, 45)[0] == 950
    assert block_ends(46, 45).tolist() == [45, 46]
    with pytest.raises(UsageError, match="at least 46 items"):
        block_ends(45, 45)


@pytest.mark.parametrize(("classes", "n"), [(2, 700), (5, 900), (9, 400)])
def test_code_is_that_of_scikit_learn_block_by_block(classes, n):
    x, y = planted(n, 8, classes)
    x2 = planted(n, 8, classes, seed=1)[0]
    control = np.random.default_rng(5).permutation(y)
    l2 = np.array([0.01, 0.05])
    code = online_code(np.stack([x, x2]), np.stack([y, control]), n_classes=classes, l2=l2, seed=3, tolerance=TIGHT)
    assert code.converged.all()
    assert code.block_bits.shape == (2, 2, len(code.ends))
    for b, states in enumerate((x, x2)):
        for m, labels in enumerate((y, control)):
            expected = plain_code(states.astype(float), labels, classes, l2[b], 3)
            np.testing.assert_allclose(code.block_bits[b, m], expected, rtol=2e-3, atol=0.02)
            # Natural logarithms after the first block, the published mistake, would have been seen.
            in_nats = sum(plain_code(states.astype(float), labels, classes, l2[b], 3, base=np.e))
            print(classes, b, m, code.bits[b, m], sum(expected), in_nats)
            assert in_nats < 0.75 * code.bits[b, m]
            assert code.legacy_kbit()[b, m] == pytest.approx(in_nats / 1024, rel=2e-3)
    assert code.compression[0, 0] > 1.1 > code.compression[0, 1]


def test_one_prior_for_all_blocks_makes_shorter_codes_than_one_penalty_on_every_mean_loss():
    x, y = planted(3000, 40, 6, strength=4.0)
    l2 = 3e-4
    code = online_code(x[None], y, n_classes=6, l2=l2)
    # With one penalty on every mean loss, the block after t items has the probe of a code with t / n of the penalty.
    same = [
        online_code(x[None], y, n_classes=6, l2=l2 * known / 3000).block_bits[0, 0, i + 1]
        for i, known in enumerate(code.ends[:-1].tolist())
    ]
    print("one prior", code.block_bits[0, 0, 1:].sum(), "one mean penalty", sum(same))
    assert code.block_bits[0, 0, 1:].sum() < 0.9 * sum(same)


def test_default_tolerance_changes_a_code_by_little():
    x, y = planted(6000, 12, 5)
    loose, tight = (online_code(x[None], y, n_classes=5, l2=0.01, tolerance=t) for t in (0.004, TIGHT))
    assert loose.bits[0, 0] == pytest.approx(tight.bits[0, 0], abs=0.004 * 6000)


@pytest.mark.parametrize("classes", [2, 6])
def test_random_labels_do_not_compress_and_labels_in_the_states_do(classes):
    rng = np.random.default_rng(0)
    x, y = planted(4000, 16, classes, strength=6.0)
    random = rng.integers(0, classes, len(y))
    code = online_code(x[None], np.stack([y, random]), n_classes=classes, l2=0.5)
    free = online_code(x[None], np.stack([y, random]), n_classes=classes, l2=1e-4)
    print(classes, code.compression, free.compression)
    assert 0.98 < code.compression[0, 1] <= 1.0
    assert free.compression[0, 1] < code.compression[0, 1]  # a freer probe learns the noise and pays for it
    assert free.compression[0, 0] > 1.5


def test_code_of_random_labels_with_unequal_shares_comes_down_to_their_entropy():
    rng = np.random.default_rng(1)
    y = (rng.random(20_000) < 0.1).astype(int)
    x = rng.standard_normal((1, 20_000, 4)).astype(np.float32)
    entropy = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9))
    found = online_code(x, y, n_classes=2, l2=0.5)
    print(found.bits[0, 0] / 20_000, entropy)
    assert found.bits[0, 0] / 20_000 == pytest.approx(entropy, abs=0.01)


def test_order_of_items_matters_only_as_another_shuffle_and_rotation_hardly():
    x, y = planted(3000, 10, 4)
    x = (x - x.mean(0)) / x.std(0)
    seeds = [online_code(x[None], y, n_classes=4, l2=0.02, seed=s, tolerance=TIGHT).bits[0, 0] for s in range(6)]
    order = np.random.default_rng(9).permutation(len(y))
    permuted = online_code(x[None, order], y[order], n_classes=4, l2=0.02, tolerance=TIGHT).bits[0, 0]
    print("shuffles", seeds, "permuted", permuted)
    assert np.ptp(seeds) > 0
    assert abs(permuted - np.mean(seeds)) < 4 * np.std(seeds, ddof=1)
    # Columns of a rotation are nearly standardised already, where the features are white.
    vectors = np.linalg.eigh(np.cov(x.T, bias=True))[1]
    white = x @ vectors / (x @ vectors).std(0)
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((10, 10)))[0]
    codes = online_code(np.stack([white, white @ rotation]), y, n_classes=4, l2=0.02, tolerance=TIGHT).bits[:, 0]
    print("rotated", codes)
    assert codes[1] == pytest.approx(codes[0], rel=1e-4)


def test_scale_and_offset_of_the_states_and_names_of_classes_do_not_matter():
    x, y = planted(1500, 6, 4)
    code, moved, renamed = (
        online_code(states[None], labels, n_classes=4, l2=0.02, tolerance=TIGHT).bits[0, 0]
        for states, labels in ((x, y), (x * 7 + 3, y), (x, (y + 1) % 4))
    )
    assert moved == pytest.approx(code, rel=1e-4)
    assert renamed == pytest.approx(code, rel=1e-4)


def test_a_code_is_the_same_alone_and_in_company_and_again():
    x, y = planted(1000, 6, 3)
    other, control = planted(1000, 6, 3, seed=4)
    together = online_code(np.stack([x, other]), np.stack([y, control]), n_classes=3, l2=[0.02, 0.1], tolerance=TIGHT)
    again = online_code(np.stack([x, other]), np.stack([y, control]), n_classes=3, l2=[0.02, 0.1], tolerance=TIGHT)
    alone = online_code(other[None], control, n_classes=3, l2=0.1, tolerance=TIGHT)
    assert together.block_bits.tobytes() == again.block_bits.tobytes()
    assert alone.bits[0, 0] == pytest.approx(together.bits[1, 1], rel=1e-4)


def test_classes_that_come_late_or_never_cost_their_pseudo_share():
    y = np.zeros(64, dtype=int)
    x = np.random.default_rng(0).standard_normal((1, 64, 3)).astype(np.float32)
    code = online_code(x, y, n_classes=3, l2=0.1)
    known = code.ends[:-1]
    expected = -(code.ends[1:] - known) * np.log2(1 - 2 * 0.5 / (known + 1))
    np.testing.assert_allclose(code.block_bits[0, 0, 1:], expected, rtol=1e-5)


def test_tables_add_up():
    x, y = planted(500, 6, 3)
    code = online_code(np.stack([x, -x]), np.stack([y, y[::-1]]), n_classes=3, l2=0.05, seed=7)
    codes, blocks = code.to_pandas(), code.to_pandas(rows="blocks")
    assert len(codes) == 4
    assert list(codes.columns) == [
        "hidden", "label_set", "seed", "l2", "n_items", "n_classes", "uniform_bits", "bits", "compression", "converged",
    ]  # fmt: skip
    total = blocks.groupby(["hidden", "label_set"])["bits"].sum().to_numpy()
    np.testing.assert_allclose(total, codes["bits"])
    assert codes["uniform_bits"].iloc[0] == pytest.approx(500 * np.log2(3))
    assert (blocks["stop"] - blocks["start"]).sum() == 4 * 500
    assert set(codes["seed"]) == {7}


def test_published_code_of_elmo_in_consistent_bits():
    legacy = published_compression(96.02, n_items=950_028, n_classes=45, units="legacy_nats")
    bits = published_compression(96.02, n_items=950_028, n_classes=45)
    print(legacy, bits)
    assert (legacy.kbit, round(legacy.compression, 2)) == (96.02, 53.06)
    assert (round(bits.kbit, 1), round(bits.compression, 1)) == (136.3, 37.4)


def test_reading_a_published_code_undoes_the_mixture_of_units():
    x, y = planted(2000, 6, 4)
    code = online_code(x[None], y, n_classes=4, l2=0.02)
    read = published_compression(float(code.legacy_kbit()[0, 0]), n_items=2000, n_classes=4)
    assert read.kbit * 1024 == pytest.approx(code.bits[0, 0])
    assert read.compression == pytest.approx(code.compression[0, 0])


def test_bad_input_is_refused_in_one_sentence():
    x, y = planted(100, 4, 3)
    with pytest.raises(UsageError, match="2 penalties for 1 hidden state"):
        online_code(x[None], y, n_classes=3, l2=[0.1, 0.2])
    with pytest.raises(UsageError, match="positive"):
        online_code(x[None], y, n_classes=3, l2=0.0)
    with pytest.raises(UsageError, match="from 0 to 1"):
        online_code(x[None], y, n_classes=2, l2=0.1)
    x[3, 1] = np.nan
    with pytest.raises(NumericalError, match="item 3"):
        online_code(x[None], y, n_classes=3, l2=0.1)
    with pytest.raises(UsageError, match="shorter than its first block"):
        published_compression(1.0, n_items=950_028, n_classes=45)
