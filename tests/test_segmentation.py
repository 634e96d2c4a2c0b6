"""Segmentation of depth profiles: exact against enumeration, and its answers on planted smooth and stepped worlds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from analysis.segmentation import MIN_BLOCKS, SMOOTH, segment, segmentation_test, standardise
from spafit.errors import UsageError


def enumerate_cuts(profiles: np.ndarray, segments: int) -> tuple[list[int], float]:
    """Try every set of cuts; of equal ones the first in lexicographic order."""
    length = profiles.shape[1]
    best: tuple[list[int], float] = ([], np.inf)
    for cuts in itertools.combinations(range(1, length), segments - 1):
        parts = [profiles[:, a:b] for a, b in itertools.pairwise((0, *cuts, length))]
        cost = sum(((p - p.mean(axis=1, keepdims=True)) ** 2).sum() for p in parts)
        if cost < best[1] - 1e-9:
            best = (list(cuts), float(cost))
    return best


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_dynamic_programming_finds_what_enumeration_finds(segments):
    rng = np.random.default_rng(segments)
    for _ in range(40):
        profiles = rng.normal(size=(rng.integers(1, 6), rng.integers(segments, 11))).cumsum(axis=1)
        cuts, _ = enumerate_cuts(profiles, segments)
        assert segment(profiles, segments=segments).tolist() == cuts


def test_problems_on_leading_axes_are_solved_separately():
    profiles = np.random.default_rng(0).normal(size=(7, 2, 3, 9))
    expected = [[segment(p).tolist() for p in row] for row in profiles]
    assert segment(profiles).tolist() == expected


def test_a_cut_before_hidden_k_plus_1_starts_a_stratum_at_block_k():
    hidden = np.arange(1, 13)
    profile = 1.0 * (hidden >= 4) + (hidden >= 9)  # hidden 4 and 9 are the outputs of blocks 3 and 8
    assert segment(profile[None]).tolist() == [3, 8]


def test_too_few_hidden_states_are_refused():
    with pytest.raises(UsageError, match="2 hidden states cannot be cut into 3"):
        segment(np.zeros((4, 2)))
    with pytest.raises(UsageError, match=f"at least {MIN_BLOCKS} blocks"):
        segmentation_test(np.random.default_rng(0).normal(size=(4, MIN_BLOCKS - 1)))


def test_standardised_profiles_have_mean_0_and_deviation_1_and_constants_stay_out():
    profiles = np.random.default_rng(0).normal(3, 5, size=(4, 9))
    z = standardise(np.vstack([profiles, np.full(9, 0.1)]))
    np.testing.assert_allclose(z[:4].mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(z[:4].std(axis=1), 1)
    assert (z[4] == 0).all()
    with pytest.raises(UsageError, match="at least two tasks whose score varies"):
        segmentation_test(np.vstack([profiles[:1], np.full(9, 0.1)]))


def test_values_that_are_not_finite_are_refused():
    profiles = np.random.default_rng(0).normal(size=(4, 9))
    profiles[1, 3] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        segmentation_test(profiles)


def test_leave_one_task_out_errors_agree_with_fits_done_one_by_one():
    rng = np.random.default_rng(3)
    profiles = rng.normal(size=(5, 8)).cumsum(axis=1)
    z = standardise(profiles)
    errors = {"segments": 0.0, "flat": 5 * 8.0, "line": 0.0, "quadratic": 0.0, "cubic": 0.0}
    x = np.arange(8)
    for t in range(5):
        rest = np.delete(z, t, axis=0)
        mean = rest.mean(axis=0)
        for degree, name in ((1, "line"), (2, "quadratic"), (3, "cubic")):
            errors[name] += ((z[t] - np.polyval(np.polyfit(x, mean, degree), x)) ** 2).sum()
        cuts, _ = enumerate_cuts(rest, 3)
        for a, b in itertools.pairwise((0, *cuts, 8)):
            errors["segments"] += ((z[t, a:b] - mean[a:b].mean()) ** 2).sum()
    test = segmentation_test(profiles)
    for name, expected in errors.items():
        assert test.errors[name] == pytest.approx(expected)
        assert test.task_errors[name].sum() == pytest.approx(expected)


def test_answers_do_not_depend_on_the_unit_of_a_task():
    rng = np.random.default_rng(4)
    profiles = rng.normal(size=(6, 12)).cumsum(axis=1)
    scaled = profiles * rng.uniform(0.1, 10, size=(6, 1)) + rng.normal(size=(6, 1))
    a, b = segmentation_test(profiles), segmentation_test(scaled)
    assert a.cuts == b.cuts
    assert a.errors == pytest.approx(b.errors)


# -- simulated worlds: 8 to 12 tasks, rise of one unit, independent or drifting noise of .05 to .1 of the rise ---------


def noise(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    scale, memory = rng.uniform(0.05, 0.1), rng.choice([0.0, 0.5])
    drawn = rng.normal(size=shape)
    for column in range(1, shape[1]):
        drawn[:, column] = memory * drawn[:, column - 1] + np.sqrt(1 - memory**2) * drawn[:, column]
    return scale * drawn


def planted_cuts(rng: np.random.Generator, length: int) -> tuple[int, int]:
    shortest = max(1, length // 6)
    pairs = [(a, b) for a, b in itertools.combinations(range(1, length), 2) if min(a, b - a, length - b) >= shortest]
    return pairs[rng.integers(len(pairs))]


def world(rng: np.random.Generator, kind: str, length: int) -> tuple[np.ndarray, tuple[int, int] | None]:
    tasks = int(rng.integers(8, 13))
    depth, block = np.linspace(0, 1, length), np.arange(length)
    cuts = None
    if kind == "linear":
        shape = np.tile(depth, (tasks, 1))
    elif kind == "quadratic":
        vertex = rng.uniform(0.4, 1.2)
        shape = np.tile(-((depth - vertex) ** 2), (tasks, 1))
    elif kind == "saturating":  # tasks differ in speed
        tau = rng.uniform(0.08, 0.5) * np.exp(rng.normal(0, 0.3, size=(tasks, 1)))
        shape = 1 - np.exp(-depth / tau)
    elif kind == "steps":  # shared places, own shares
        cuts = planted_cuts(rng, length)
        first = rng.uniform(0.3, 0.7, size=(tasks, 1))
        shape = first * (block >= cuts[0]) + (1 - first) * (block >= cuts[1])
    elif kind == "steps by level":  # half of the tasks step at the first place, the others at the second
        cuts = planted_cuts(rng, length)
        shape = np.where(np.arange(tasks)[:, None] < tasks // 2, block >= cuts[0], block >= cuts[1]).astype(float)
    else:
        shape = np.zeros((tasks, length))
    rise = np.ptp(shape, axis=1, keepdims=True)
    shape = (shape - shape.min(axis=1, keepdims=True)) / np.where(rise > 0, rise, 1)
    size = np.exp(rng.normal(0, 0.4, size=(tasks, 1)))
    return size * (shape + noise(rng, shape.shape)), cuts


def share_without_strata(kind: str, length: int, worlds: int) -> tuple[float, float]:
    """Share of worlds answered "no strata", and share whose cuts are the planted ones."""
    rng = np.random.default_rng([length, worlds, *kind.encode()])
    smooth = exact = 0
    for _ in range(worlds):
        profiles, cuts = world(rng, kind, length)
        test = segmentation_test(profiles)
        smooth += not test.beats_null
        exact += test.cuts == cuts
    return smooth / worlds, exact / worlds


@pytest.mark.parametrize("length", [6, 12, 24])
@pytest.mark.parametrize("kind", ["linear", "quadratic", "saturating", "noise"])
def test_no_strata_are_found_on_smooth_trends_and_on_noise(kind, length):
    answered, _ = share_without_strata(kind, length, 120)
    assert answered >= 0.9


@pytest.mark.parametrize("length", [6, 12, 24])
def test_planted_steps_of_the_same_size_are_found_where_they_are(length):
    missed, exact = share_without_strata("steps", length, 120)
    assert missed <= 0.1
    assert exact >= 0.95


@pytest.mark.parametrize(("length", "most"), [(6, 0.7), (12, 0.1), (24, 0.1)])
def test_steps_at_other_places_for_other_tasks_are_found_given_twelve_blocks(length, most):
    # With six blocks about half of them are missed: a loss against the null says little there.
    missed, exact = share_without_strata("steps by level", length, 120)
    assert missed <= most
    assert exact >= 0.95


def test_errors_name_segments_and_every_smooth_profile():
    test = segmentation_test(world(np.random.default_rng(0), "saturating", 12)[0])
    assert set(test.errors) == {"segments", *SMOOTH}
    assert test.best_smooth == "saturating"


@pytest.mark.slow
@pytest.mark.parametrize("length", [6, 12, 24])
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("linear", 0.9, 1), ("quadratic", 0.9, 1), ("saturating", 0.9, 1), ("noise", 0.9, 1), ("steps", 0, 0.1)],
)
def test_error_rates_hold_over_a_thousand_worlds(kind, low, high, length):
    answered, _ = share_without_strata(kind, length, 1000)
    assert low <= answered <= high
