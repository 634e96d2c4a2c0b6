"""Simulated worlds: what is planted in them, and how often the verdict and the strata say so."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis.cli.main import app
from analysis.conditions import effect_shares
from analysis.hypothesis import default_hypothesis
from analysis.localization_runs import LocalizationRuns
from analysis.suggestion import suggest_strata
from probing.curves import LayerCurve
from probing.summaries import expected_layer_robust
from tests import worlds
from tests.world_rates import Setting, error, near, simulate

FEW, EVEN = (2, 3, 5), (4, 4, 4)
N = 1000


def depths(world: worlds.World) -> np.ndarray:
    return np.array([expected_layer_robust(row) for row in world.truth])


# ---------------------------------------------------------------- what the worlds are


def test_planted_tasks_emerge_around_their_types_depth_and_distributed_ones_do_not():
    random = np.random.default_rng(0)
    own = np.array([depths(worlds.planted(FEW, 24, random, step=2, sd=1)) for _ in range(300)])
    ranks = np.repeat([0, 1, 2], FEW)
    means = [own[:, ranks == k].mean() for k in range(3)]
    # a rise at depth a, written by block floor(a), is read from hidden a + 1/2 on average
    assert means == pytest.approx([10.5, 12.5, 14.5], abs=0.1)
    assert own[:, ranks == 1].std() == pytest.approx(1, abs=0.06)
    spread = np.array([depths(worlds.distributed(FEW, 24, random)) for _ in range(300)])
    assert [spread[:, ranks == k].mean() for k in range(3)] == pytest.approx([12.5] * 3, abs=0.6)


def test_worlds_from_the_first_block_begin_where_their_boundaries_say():
    world = worlds.planted(EVEN, 12, np.random.default_rng(1), step=3, sd=0, first=0.5)
    assert world.boundaries == (3, 6)
    rise = np.diff(world.truth / world.truth[:, -1:], axis=1)  # what each block adds
    assert rise[:4, 0] == pytest.approx(1, abs=0.05)
    assert rise[4:8, 3] == pytest.approx(1, abs=0.1)
    assert rise[8:, 6] == pytest.approx(1, abs=0.1)
    assert world.held == (4, 7)  # hidden states that blocks 3 and 6 write


def test_trends_are_shared_and_flat_curves_are_flat():
    random = np.random.default_rng(2)
    trend, flat = (worlds.no_structure(kind, FEW, 12, random) for kind in ("trend", "flat"))
    assert np.linalg.matrix_rank(trend.truth) == 1
    assert np.ptp(flat.truth, axis=1) == pytest.approx(0)


def test_shares_of_harm_differ_and_scatter_as_asked():
    random = np.random.default_rng(3)
    found = [effect_shares(worlds.effects(EVEN, 12, random, gap=0.3, sd=0.1).harm[0]) for _ in range(400)]
    third = np.array(found)[:, :, :4].sum(axis=2)
    own, other = third[:, :4], third[:, 4:]
    assert own.mean() - other.mean() == pytest.approx(0.3, abs=0.01)
    assert np.sqrt((own.var() + other.var()) / 2) == pytest.approx(0.1, abs=0.005)


def test_a_measured_curve_scatters_by_its_noise_around_the_truth():
    random, truth = np.random.default_rng(4), np.linspace(0, 1, 13)
    found = [worlds.curve("t", "syntax", truth, 0.03, random) for _ in range(400)]
    assert isinstance(found[0], LayerCurve)
    assert np.mean([c.values - truth for c in found]) == pytest.approx(0, abs=0.004)
    assert np.std([c.values - truth for c in found]) == pytest.approx(0.03, abs=0.002)
    assert np.mean([c.standard_errors for c in found]) == pytest.approx(0.03, abs=0.002)


def test_few_worlds_of_each_kind_are_told_apart():
    """The slow tests in small."""
    assert simulate(Setting("trend"), 25)["supported"] == 0
    assert simulate(Setting("distributed"), 25)["supported"] <= 5
    found = simulate(Setting("planted from the first block", FEW, 12, 2.0, 1.0), 25)
    assert found["supported"] >= 22
    assert found["near holding"] >= 0.9 * found["holding"] > 0
    far = simulate(Setting(None, EVEN, effects="planted", share=0.4), 25)
    assert far["supported"] >= 19
    assert simulate(Setting(None, EVEN, effects="shuffled", share=0.4), 25)["supported"] <= 4


# ---------------------------------------------------------------- rates


def shown(name: str, found: dict[str, int], n: int, announced: float = float("nan")) -> None:
    said = ", ".join(f"{k} {found[k] / n:.3f}" for k in ("supported", "refuted", "inconclusive"))
    extra = "" if announced != announced else f", announced {announced:.3f}"
    print(f"{name}: {n} worlds, {said} (± {error(found['supported'] / n, n):.3f}){extra}", dict(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        Setting("flat"), Setting("trend"), Setting("distributed"),
        *(Setting(None, EVEN, effects=e, share=0.4 * (e == "shuffled")) for e in ("even", "trend", "shuffled")),
    ],
    ids=lambda s: f"{s.kind or 'effects'} {s.effects}",
)  # fmt: skip
def test_what_is_not_planted_is_supported_in_at_most_five_percent(setting):
    found = simulate(setting, N)
    shown(f"{setting.kind}, effects {setting.effects}", found, N)
    assert found["supported"] / N <= 0.05 + 2 * error(0.05, N)
    if setting.kind in ("flat", "trend"):
        assert found["smooth"] / N >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        *(Setting("planted", FEW, 12, step, sd) for step in (1.0, 2.0) for sd in (1.0, 2.0)),
        *(Setting(None, EVEN, effects="planted", share=g, share_sd=s) for g in (0.2, 0.4) for s in (0.1, 0.2)),
        Setting("planted", EVEN, 12, 2.0, 1.0, effects="planted", share=0.4, share_sd=0.1),
    ],
    ids=lambda s: f"{s.kind or 'effects'} {s.step:g} {s.sd:g} {s.share:g} {s.share_sd:g}",
)
def test_what_is_planted_is_supported_with_the_announced_power(setting):
    found, announced = simulate(setting, N, strata=False), setting.announced()
    shown(
        f"{setting.kind} {setting.step:g} {setting.sd:g}, {setting.share:g} {setting.share_sd:g}", found, N, announced
    )
    assert found["supported"] / N == pytest.approx(announced, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("num_blocks", "of_all"), [(12, 0.9), (24, 0.86)])
def test_boundaries_are_within_one_block_of_the_planted_ones(num_blocks, of_all):
    """In .9 of the worlds in which a criterion places them.

    With 24 blocks a tenth of the worlds are said to be too weak to place them; counting these, it is .885 (page).
    """
    setting = Setting("planted from the first block", FEW, num_blocks, 2.0, 1.0)
    found = simulate(setting, N)
    shown(f"boundaries, {num_blocks} blocks", found, N, setting.announced())
    assert setting.announced() >= 0.9
    assert found["supported"] / N == pytest.approx(setting.announced(), abs=0.05)
    for criterion in ("segmentation", "holding"):
        assert found[f"near {criterion}"] >= 0.9 * found[criterion] > 0
    assert found["near segmentation"] + found["near holding"] >= of_all * N


# ---------------------------------------------------------------- the whole chain


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fewest", "most"), [("none", 0, 3), ("distributed", 0, 3), ("planted", 16, 20)])
def test_twenty_run_folders_go_through_the_command_as_announced(kind, fewest, most, tmp_path):
    """Run folder and causal table through ``spafit localize``: L1 to L4 are all tested.

    Four or more of 20 come up in less than 2 % of repetitions of a test that errs in 5 %, fewer than 16 in less than
    2 % at the announced power of .92.
    """
    random, n, supported, smooth, placed = np.random.default_rng(9), 20, 0, 0, 0
    for number in range(n):
        if kind == "planted":
            world = worlds.planted(EVEN, 12, random, step=2, sd=1)
            harm = worlds.effects(EVEN, 12, random, gap=0.4, sd=0.1)
        elif kind == "distributed":
            world = worlds.distributed(EVEN, 12, random)
            harm = worlds.effects(EVEN, 12, random, gap=0.4, sd=0.1, shuffled=True)
        else:
            world = worlds.no_structure("trend", EVEN, 12, random)
            harm = worlds.effects(EVEN, 12, random)
        results = worlds.write_run(world, tmp_path / str(number), random)
        worlds.causal_rows(harm, world).to_csv(tmp_path / "skipped.csv", index=False)
        out = tmp_path / f"out{number}"
        command = ["localize", results.folder, "--causal", tmp_path / "skipped.csv", "--out", out, "-q"]
        run = CliRunner().invoke(app, [str(a) for a in command])
        assert run.exit_code == 0, (run.output, run.exception)
        test = LocalizationRuns.load(out).runs[0].test
        assert [c.name for c in test.conditions if c.tested][:3] == ["L1", "L2", "L3"]
        supported += test.verdict == "supported"
        suggestion = suggest_strata(results.curves(n_boot=100), num_blocks=12, n_boot=100)
        smooth += suggestion.null_test is None or not suggestion.null_test.beats_null
        placed += suggestion.criterion == "holding" and near(suggestion.boundaries, world.held)
    print(f"{kind}: {n} run folders, {supported} supported, {smooth} without strata, {placed} held within one block")
    assert fewest <= supported <= most
    if kind == "none":
        assert smooth >= 18
    if kind == "planted":
        assert placed + (n - smooth) >= 18


def test_the_announced_power_is_found_by_its_sizes():
    both = Setting("planted", EVEN, 12, 2.0, 1.0, effects="planted", share=0.4, share_sd=0.1).announced()
    alone = Setting(None, EVEN, 12, effects="planted", share=0.4, share_sd=0.1).announced()
    order = Setting("planted", EVEN, 12, 2.0, 1.0).announced()
    assert both < min(alone, order)
    assert both == pytest.approx(alone * order, abs=0.02)
    assert np.isnan(Setting("trend").announced())
    assert default_hypothesis().alpha == 0.05
