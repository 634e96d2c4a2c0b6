"""Every placement against a plain loop, planted choices, limits, ties, the null, and bad input."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import matplotlib
import numpy as np
import pytest

from analysis.block_evidence import BlockEvidence
from analysis.boundary_choice import BoundaryChoice, choose_boundaries
from analysis.pilot_suggestion import tolerance_in
from spafit.errors import UsageError

matplotlib.use("agg")
METHODS = ("bitfit", "lora+bitfit:8")


def evidence(
    gain: np.ndarray, lost: np.ndarray, *, parameters: tuple[int, ...] = (10, 100), noise: float = 0.0, seed: int = 0,
    methods: tuple[str, ...] = METHODS, kept: tuple[str, ...] = ("bitfit", "everything"), units: int = 32,
) -> BlockEvidence:  # fmt: skip
    """Arrays as a pilot gives them: gain (M, L), forgetting (K, L + 1); batches differ by ``noise``."""
    draw = np.random.default_rng(seed)
    count, blocks = gain.shape
    each = np.maximum(gain * (1 + noise * draw.normal(size=(units, count, blocks))), 0)
    picks = draw.integers(units, size=(400, units))
    gains = each[picks].mean(1)
    total = each.mean(0)[-1].sum()
    return BlockEvidence(
        "encoder", blocks, methods, np.repeat(np.array(parameters, float)[:, None], blocks, 1), 7, each.mean(0) / total,
        gains / gains[:, -1].sum(-1)[:, None, None], each / total, kept, lost,
        lost * (1 + noise * draw.normal(size=(400, len(kept), 1))), "bits", -1.0, ("order",), 2,
    )  # fmt: skip


def random_evidence(blocks: int = 5, seed: int = 0, noise: float = 0.2) -> BlockEvidence:
    draw = np.random.default_rng(seed)
    lost = np.sort(draw.random((2, blocks + 1)), axis=1)[:, ::-1].copy()
    lost[:, -1] = 0
    return evidence(draw.random((2, blocks)), lost, noise=noise, seed=seed)


def row_of(choice: BoundaryChoice, *pair: int) -> Any:
    table = choice.table
    return table[(table[[f"s{i + 1}" for i in range(len(pair))]] == list(pair)).all(axis=1)].iloc[0]


@pytest.mark.parametrize("strata", [("freeze", *METHODS), ("freeze", METHODS[1]), (METHODS[1], METHODS[0], "freeze")])
def test_every_placement_is_what_a_plain_loop_over_blocks_gives(strata: tuple[str, ...]) -> None:
    given = random_evidence()
    choice = choose_boundaries(given, strata=strata)
    blocks = given.num_blocks
    places = list(combinations_with_replacement(range(blocks + 1), len(strata) - 1))
    assert len(choice.table) == len(places)
    for cuts in places:
        ends = [0, *cuts, blocks]
        gain, size, lost = 0.0, given.outside, 0.0
        for method, a, b in zip(strata, ends, ends[1:], strict=False):
            if method == "freeze":
                continue
            m, k = METHODS.index(method), 0 if method == "bitfit" else 1
            gain += sum(given.gain[m, i] for i in range(a, b))
            size += sum(int(given.parameters[m, i]) for i in range(a, b))
            lost += given.forgetting[k, a] - given.forgetting[k, b]
        row = row_of(choice, *cuts)
        assert row["gain"] == pytest.approx(gain)
        assert row["parameters"] == size
        assert row["forgetting"] == pytest.approx(lost)


def test_all_pairs_of_a_deep_stack_are_there() -> None:
    choice = choose_boundaries(random_evidence(24))
    assert len(choice.table) == 325
    five = ("freeze", "bitfit", METHODS[1], "bitfit", METHODS[1])
    assert len(choose_boundaries(random_evidence(12), strata=five).table) == 1820


def test_shares_of_draws_and_regret_are_those_of_the_draws() -> None:
    given = random_evidence(noise=0.6)
    choice = choose_boundaries(given, budget=400)
    table = choice.table
    assert table["p_optimal"].sum() == pytest.approx(1)
    ends = [(0, a, b, given.num_blocks) for a, b in zip(table["s1"], table["s2"], strict=True)]
    drawn = np.array(
        [[g[0, e[1] : e[2]].sum() + g[1, e[2] :].sum() for e in ends] for g in given.gain_draws]
    )  # fmt: skip
    fits = (table["parameters"] <= 400).to_numpy()
    best = np.where(fits, drawn, -np.inf).argmax(1)
    assert np.allclose(np.bincount(best, minlength=len(table)) / len(drawn), table["p_optimal"])
    assert np.allclose((drawn[np.arange(len(drawn)), best][:, None] - drawn).mean(0), table["regret"])
    assert table.loc[fits, "regret"].min() >= 0


def test_a_planted_place_is_found_under_a_limit_of_forgetting() -> None:
    gain = np.array([[0.01] * 6, [0.05, 0.05, 0.05, 0.05, 1.0, 1.0]])
    lost = np.array([[0.0] * 7, [0.5, 0.4, 0.3, 0.2, 0.0, 0.0, 0.0]])
    given = evidence(gain, lost, noise=0.3)
    choice = choose_boundaries(given, tolerance=0.1)
    assert choice.boundaries[1] == 4
    assert choice.beats_null
    assert not row_of(choice, 0, 0)["feasible"]
    assert choose_boundaries(given).at(choose_boundaries(given).best) == (0, 0)  # without the limit all would train


def test_within_one_standard_error_fewer_parameters_win() -> None:
    gain = np.array([[0.0] * 4, [0.001, 0.001, 1.0, 1.0]])
    noisy = choose_boundaries(evidence(gain, np.zeros((2, 5)), noise=0.0), strata=("freeze", METHODS[1]))
    assert noisy.boundaries == (0,)  # no noise: the small gain below is real
    draw = np.random.default_rng(3)
    given = evidence(gain, np.zeros((2, 5)))
    shaken = given.gain_draws.copy()
    shaken[:, 1, :2] += 0.01 * draw.normal(size=(400, 2))
    given = BlockEvidence(**{**given.__dict__, "gain_draws": shaken})
    assert choose_boundaries(given, strata=("freeze", METHODS[1])).boundaries == (2,)


def test_a_budget_moves_the_choice_and_an_impossible_one_says_what_is_possible() -> None:
    given = random_evidence()
    for budget in (7, 107, 250, 507):
        assert row_of(choose_boundaries(given, budget=budget), *choose_boundaries(given, budget=budget).boundaries)[
            "parameters"
        ] <= budget  # fmt: skip
    with pytest.raises(UsageError, match=r"smallest plan trains: 7 "):
        choose_boundaries(given, budget=6)
    always = evidence(np.ones((2, 4)), np.array([[1.0, 1, 1, 1, 0], [2.0, 2, 2, 2, 0]]))
    with pytest.raises(UsageError, match="the least is 1"):
        choose_boundaries(always, strata=("bitfit", METHODS[1]), tolerance=0.5)


def test_without_structure_over_depth_the_place_of_the_strata_gains_nothing() -> None:
    """No structure in 200 worlds: strata claimed in at most 5 %, plus simulation error; structure: in nearly all."""
    found = []
    for planted in (False, True):
        shape = np.linspace(0.2, 1.8, 12) if planted else np.ones(12)
        gain = np.stack([0.3 * shape, shape])
        hits = 0
        for seed in range(200):
            draw = np.random.default_rng(seed)
            each = gain * draw.gamma(4.0, 0.25, size=(32, 2, 12))
            given = random_evidence(12, noise=0)
            given = BlockEvidence(
                **{
                    **given.__dict__,
                    "gain": each.mean(0),
                    "gain_units": each,
                    "gain_draws": np.repeat(each, 13, 0)[:400],
                }
            )
            hits += choose_boundaries(given, budget=700).beats_null
        found.append(hits / 200)
    assert found[0] <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5
    assert found[1] >= 0.95


def test_nothing_on_the_front_is_beaten_and_everything_off_it_is() -> None:
    table = choose_boundaries(random_evidence()).table
    values = table[["gain", "forgetting", "parameters"]].to_numpy() * [-1, 1, 1]
    for i, own in enumerate(values):
        beaten = any((v <= own).all() and (v < own).any() for v in values)
        assert beaten != table["pareto"].iloc[i]


def test_bad_strata_and_limits_are_refused_in_a_sentence() -> None:
    given = random_evidence()
    for strata, words in (
        (("freeze",), "from two to 5"), (("freeze", "bitft"), "Did you mean 'bitfit'"), (("freeze",) * 6, "two to 5"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            choose_boundaries(given, strata=strata)
    with pytest.raises(UsageError, match="must not be negative"):
        choose_boundaries(given, tolerance=-1.0)


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [("0.02", "bits", 0.02), ("0.02bits", "bits", 0.02), ("2 points", "points", 2.0), ("1point", "points", 1.0)],
)
def test_a_tolerance_is_read_in_its_unit(text: str, unit: str, expected: float) -> None:
    assert tolerance_in(text, unit=unit, before=-4.0) == expected


def test_a_rise_of_perplexity_becomes_bits_and_other_units_are_refused() -> None:
    assert 2 ** (4.0 + tolerance_in("3perplexity", unit="bits", before=-4.0)) == pytest.approx(19.0)
    for text, words in (("2points", "read in bits"), ("x", "not a number"), ("1ells", "the unit")):
        with pytest.raises(UsageError, match=words):
            tolerance_in(text, unit="bits", before=-4.0)


def test_the_triangle_shows_all_pairs_and_the_choice() -> None:
    choice = choose_boundaries(random_evidence(), budget=300)
    ax = choice.plot()
    image = ax.get_images()[0].get_array()
    assert image is not None
    assert np.isfinite(np.ma.filled(image, np.nan)).sum() == len(choice.table)
    assert "s2" in ax.get_ylabel()
    with pytest.raises(UsageError, match="triangle"):
        choose_boundaries(random_evidence(), strata=("freeze", METHODS[1])).plot()
