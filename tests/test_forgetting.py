"""Lost, moved, re-encoded: planted changes of representations, the identity, intervals and their coverage."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.forgetting import COLUMNS, DIFFERENCES, READINGS, forgetting_table
from probing.probes.linear import fit_selected
from spafit.errors import UsageError


def value(table: pd.DataFrame, term: str, column: str = "value", hidden: int = 0) -> float:
    return float(table[(table["term"] == term) & (table["hidden"] == hidden)][column].iloc[0])


def some_readings(seed: int = 0, seeds: int = 3, hidden: int = 2, items: int = 120) -> np.ndarray:
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.5, 0.9, (4, 1, hidden, 1))
    return (rng.random((4, seeds, hidden, items)) < level).astype(float)


def test_the_terms_add_up_to_what_the_old_probe_lost() -> None:
    readings, control = some_readings(), 0.3 * some_readings(1)
    table = forgetting_table(readings, np.arange(120) // 3, hidden=[1, 2], control=control)
    assert list(table) == list(COLUMNS)
    for hidden in (1, 2):
        terms = {t: value(table, t, hidden=hidden) for t in (*READINGS, *DIFFERENCES)}
        assert terms["total"] == pytest.approx(terms["lost"] + terms["moved"] + terms["re-encoded"], abs=1e-9)
        assert terms["total"] == pytest.approx(terms["pre"] - terms["transfer"], abs=1e-9)
    by_hand = (readings - control).mean(axis=(1, 3))
    assert value(table, "lost", hidden=2) == pytest.approx(by_hand[0, 1] - by_hand[3, 1], abs=1e-12)


def test_no_change_is_exactly_zero() -> None:
    one = some_readings()[:1]
    table = forgetting_table(np.repeat(one, 4, axis=0), np.arange(120), hidden=[0, 1])
    for term in DIFFERENCES:
        for hidden in (0, 1):
            row = [value(table, term, c, hidden) for c in ("value", "ci_low", "ci_high", "p", "p_layers")]
            assert row == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_a_loss_is_found_where_it_is_and_only_there() -> None:
    readings = np.repeat(some_readings(2)[:1], 4, axis=0)
    rng = np.random.default_rng(0)
    hit = (rng.random((3, 1, 120)) < 0.35) & (readings[0, :, 1:2] > 0)
    readings[3, :, 1:2][hit] = 0
    table = forgetting_table(readings, np.arange(120), hidden=[3, 4])
    assert value(table, "lost", hidden=3) == 0
    assert value(table, "lost", "p_layers", hidden=3) == 1
    assert value(table, "lost", "ci_low", hidden=4) > 0
    assert value(table, "lost", "p", hidden=4) < 0.01
    assert value(table, "lost", "p_layers", hidden=4) < 0.01


def test_new_knowledge_is_a_negative_loss_and_is_not_clipped() -> None:
    readings = np.zeros((4, 1, 1, 60))
    readings[3] = 1
    table = forgetting_table(readings, np.arange(60), hidden=[0])
    assert value(table, "lost") == -1


def test_a_reading_that_does_not_exist_leaves_the_others() -> None:
    readings = some_readings()
    readings[2, :, 1] = np.nan
    table = forgetting_table(readings, np.arange(120), hidden=[0, 1], reasons=["", "too few sentences"])
    assert np.isnan(value(table, "moved", hidden=1))
    assert np.isnan(value(table, "re-encoded", hidden=1))
    assert np.isfinite(value(table, "moved", hidden=0))
    assert np.isfinite(value(table, "lost", hidden=1))
    row = table[(table["term"] == "aligned") & (table["hidden"] == 1)].iloc[0]
    assert row["reason"] == "too few sentences"
    readings[2, :, 1, 0] = 1.0
    with pytest.raises(Exception, match="NaN"):
        forgetting_table(readings, np.arange(120), hidden=[0, 1])


def test_the_share_forgotten_is_given_only_above_the_random_encoder() -> None:
    rng = np.random.default_rng(0)
    readings = np.ones((4, 2, 2, 200))
    readings[3] = 0.0
    readings[3, :, :, :150] = 1.0  # a quarter is lost
    random = np.stack([(rng.random((2, 200)) < 0.5), np.ones((2, 200))], axis=1).astype(float)
    readings[0] = readings[1] = 1.0
    table = forgetting_table(readings, np.arange(200), hidden=[0, 1], random=random)
    floor = random[:, 0].mean()
    assert value(table, "share_forgotten") == pytest.approx(0.25 / (1 - floor))
    assert np.isnan(value(table, "share_forgotten", hidden=1))
    reason = table[(table["term"] == "share_forgotten") & (table["hidden"] == 1)]["reason"].iloc[0]
    assert "random-weight encoder" in reason


def test_shapes_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(UsageError, match="expected"):
        forgetting_table(some_readings()[:3], np.arange(120), hidden=[0, 1])
    with pytest.raises(UsageError, match="control has shape"):
        forgetting_table(some_readings(), np.arange(120), hidden=[0, 1], control=np.zeros((4, 1, 2, 120)))


# ---------------------------------------------------------------- planted changes of representations


class World:
    """States with classes in a subspace, a probe on them before, and everything after a change of the states."""

    def __init__(self, seed: int, width: int = 24, n: int = 1800, classes: int = 3):
        rng = np.random.default_rng(seed)
        self.rng, self.width, self.classes, self.labels = rng, width, classes, rng.integers(0, classes, n)
        self.words = rng.integers(0, 60, n)  # word types: each has a vector of its own and a control label
        self.control = rng.integers(0, classes, 60)[self.words]
        centres = np.zeros((classes, width))
        centres[:, :classes] = 3.0 * np.eye(classes)
        scale = np.ones(width)
        scale[classes:] = np.geomspace(0.5, 6, width - classes)  # unequal scales, as real states have
        types = rng.standard_normal((60, width)) * (np.arange(width) >= classes)
        mixing = np.linalg.qr(rng.standard_normal((width, width)))[0]
        self.before = (
            (centres[self.labels] + 0.6 * types[self.words] + rng.standard_normal((n, width))) * scale
        ) @ mixing
        self.train, self.dev, self.align, self.test = np.split(np.arange(n), [600, 800, 1200])[0:4]
        self.subspace = np.linalg.pinv(np.diag(1 / scale) @ mixing)[:, :0]
        self.mixing, self.scale = mixing, scale

    def readings(self, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right or not in the four readings, for the task and for the control task: two arrays (4, 1, 1, items)."""
        from analysis.alignment import fit_alignment

        both = np.stack([self.labels, self.control])

        def fitted(states: np.ndarray):  # type: ignore[no-untyped-def]
            x = states.astype(np.float32)[None]
            return fit_selected(
                x[:, self.train], both[:, self.train], x[:, self.dev], both[:, self.dev], n_classes=self.classes
            )[0]

        old, new = fitted(self.before), fitted(after)
        back = fit_alignment(after[self.align], self.before[self.align]).apply(after)
        out = []
        for probe, states in ((old, self.before), (old, after), (old, back), (new, after)):
            log_p = probe.log_probabilities(states.astype(np.float32)[None, self.test])[0, :, 0]
            out.append(log_p.argmax(-1) == both[:, self.test])
        return tuple(np.array(out, dtype=float)[:, i][:, None, None] for i in range(2))  # type: ignore[return-value]

    def terms(self, after: np.ndarray) -> dict[str, float]:
        task, control = self.readings(after)
        table = forgetting_table(task, self.test, hidden=[0], control=control, n_boot=100)
        return {t: value(table, t) for t in (*READINGS, *DIFFERENCES)}


def rotation(rng: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


@pytest.mark.parametrize("change", ["rotation", "shift", "rotation and shift"])
def test_a_rotation_or_a_shift_is_all_moved(change: str) -> None:
    world = World(0)
    after = world.before.copy()
    if "rotation" in change:
        after = after @ rotation(world.rng, world.width)
    if "shift" in change:
        after = after + 40 * world.rng.standard_normal(world.width)
    terms = world.terms(after)
    assert terms["total"] > 0.15
    assert terms["moved"] == pytest.approx(terms["total"], abs=0.02)
    assert abs(terms["lost"]) < 0.02
    assert abs(terms["re-encoded"]) < 0.02


def test_erasing_the_label_subspace_is_all_lost_while_cka_stays_high() -> None:
    cka = pytest.importorskip("analysis.cka")
    world = World(1)
    means = np.stack([world.before[world.labels == c].mean(axis=0) for c in range(world.classes)])
    directions = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)[2][: world.classes - 1]
    # the oblique erasure that leaves no covariance with the labels (least squares: LEACE)
    centred = world.before - world.before.mean(axis=0)
    covariance = centred.T @ centred / len(centred)
    toward = covariance @ directions.T
    del toward
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, (means - means.mean(axis=0)).T)
    basis = np.linalg.svd(white, full_matrices=False)[0][:, : world.classes - 1]
    after = centred - centred @ np.linalg.solve(root.T, basis) @ basis.T @ root.T + world.before.mean(axis=0)
    terms = world.terms(after)
    assert terms["lost"] > 0.3
    assert terms["lost"] == pytest.approx(terms["total"], abs=0.06)
    assert abs(terms["moved"]) < 0.06
    assert cka.debiased_cka(world.before[world.test], after[world.test]).value >= 0.9


def test_an_invertible_map_that_is_no_rotation_is_re_encoded() -> None:
    world = World(2)
    left, right = rotation(world.rng, world.width), rotation(world.rng, world.width)
    after = world.before @ (left * np.geomspace(0.02, 5, world.width)) @ right
    terms = world.terms(after)
    assert abs(terms["lost"]) < 0.04
    assert terms["re-encoded"] > 0.1
    assert terms["re-encoded"] > 3 * abs(terms["lost"])


def test_unrelated_states_are_lost_not_moved() -> None:
    world = World(3)
    terms = world.terms(world.rng.standard_normal(world.before.shape))
    assert terms["recoverable"] < 0.1
    assert terms["lost"] > 0.3
    assert abs(terms["moved"]) < 0.08


@pytest.mark.slow
def test_intervals_cover_the_truth_in_95_percent_of_worlds() -> None:
    """Clustered items, crossed with seeds that redraw the training items: 1,000 worlds with real probes."""
    rng = np.random.default_rng(0)
    n_worlds, width, seeds, clusters, per = 1000, 6, 3, 100, 3
    n_test, n_train = clusters * per, 400
    lost, low, high = np.empty(n_worlds), np.empty(n_worlds), np.empty(n_worlds)
    for w in range(n_worlds):
        n = n_train + n_test
        labels = rng.integers(0, 2, n)
        shared = np.concatenate([np.zeros((n_train, width)), np.repeat(rng.standard_normal((clusters, width)), per, 0)])
        noise = rng.standard_normal((n, width)) + 0.5 * shared
        signal = np.outer(2 * labels - 1, np.eye(width)[0])
        before, after = 1.2 * signal + noise, 0.6 * signal + noise
        right = np.zeros((4, seeds, 1, n_test))
        x = np.stack([before, after]).astype(np.float32)
        for s in range(seeds):
            train = rng.choice(n_train, 320, replace=False)
            rest = np.setdiff1d(np.arange(n_train), train)
            fit, _ = fit_selected(x[:, train], labels[train], x[:, rest], labels[rest], n_classes=2, l2_grid=(0.01,))
            guesses = fit.log_probabilities(x[:, n_train:])[:, 0, 0].argmax(-1)
            right[0, s, 0], right[3, s, 0] = guesses == labels[n_train:]
        groups = np.repeat(np.arange(clusters), per)
        table = forgetting_table(right, groups, hidden=[0], n_boot=400, seed=w)
        lost[w], low[w], high[w] = (value(table, "lost", c) for c in ("value", "ci_low", "ci_high"))
    truth = lost.mean()  # the estimate has no bias, so its mean over worlds is what each interval should cover
    coverage = ((low <= truth) & (truth <= high)).mean()
    assert 0.92 <= coverage <= 0.98, coverage
