"""LEACE against its definition and linear classifiers; controls match in rank and removed variance."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from analysis.erasure import fit_leace, random_eraser, variance_matched_eraser
from spafit.errors import UsageError


def world(seed: int = 0, n: int = 3000, width: int = 20, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    mixing = rng.standard_normal((width, width)) * np.geomspace(0.3, 3, width)
    centres = 1.5 * rng.standard_normal((classes, width))
    return (rng.standard_normal((n, width)) + centres[labels]) @ mixing, labels


def accuracy(x: np.ndarray, labels: np.ndarray) -> float:
    return float(LogisticRegression(C=1e4, max_iter=3000).fit(x, labels).score(x, labels))


def test_nothing_linear_is_left_of_the_label() -> None:
    x, labels = world()
    eraser = fit_leace(x, labels)
    erased = eraser.apply(x)
    assert eraser.rank == 2
    z = np.eye(3)[labels]
    cross = (erased - erased.mean(0)).T @ (z - z.mean(0)) / len(x)
    assert np.abs(cross).max() < 1e-8 * np.abs(x).max()
    chance = np.bincount(labels).max() / len(labels)
    assert accuracy(x, labels) > 0.8
    assert accuracy(erased, labels) <= chance + 0.02


def test_the_change_is_the_smallest_that_does_it() -> None:
    """Against the orthogonal projection off the class means' span, which also leaves no difference of means."""
    x, labels = world(1)
    erased = fit_leace(x, labels).apply(x)
    means = np.stack([x[labels == c].mean(0) for c in range(3)])
    basis = np.linalg.qr((means - means.mean(0)).T)[0][:, :2]
    centred = x - x.mean(0)
    orthogonal = x - centred @ basis @ basis.T
    assert ((x - erased) ** 2).sum() < 0.999 * ((x - orthogonal) ** 2).sum()


def test_states_of_lower_rank_are_erased_too() -> None:
    x, labels = world(2)
    flat = np.hstack([x, x[:, :5] * 2, np.zeros((len(x), 3))])
    erased = fit_leace(flat, labels).apply(flat)
    assert np.isfinite(erased).all()
    assert accuracy(erased, labels) <= np.bincount(labels).max() / len(labels) + 0.02


def test_controls_match_in_rank_and_in_removed_variance_and_leave_the_label() -> None:
    x, labels = world(3)
    eraser = fit_leace(x, labels)
    removed = eraser.removed_variance(x)
    same_rank = random_eraser(x, rank=eraser.rank, seed=1)
    matched = variance_matched_eraser(x, rank=eraser.rank, variance=removed, seed=1)
    for control in (same_rank, matched):
        assert control.rank == eraser.rank
        twice = control.apply(control.apply(x))
        assert np.allclose(twice, control.apply(x), atol=1e-8 * np.abs(x).max())  # a projection
        assert accuracy(control.apply(x), labels) > 0.6
    assert matched.removed_variance(x) == pytest.approx(removed, rel=1e-6)
    assert same_rank.removed_variance(x) != pytest.approx(removed, rel=1e-2)
    assert not np.allclose(variance_matched_eraser(x, rank=2, variance=removed, seed=2).left, matched.left)


def test_bad_input_is_one_sentence() -> None:
    x, labels = world()
    with pytest.raises(UsageError, match="two classes"):
        fit_leace(x, labels * 0)
    with pytest.raises(UsageError, match="carry a variance from"):
        variance_matched_eraser(x, rank=2, variance=1e9)
    with pytest.raises(UsageError, match="rank must be"):
        random_eraser(x, rank=0)
