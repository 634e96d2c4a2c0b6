from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from analysis.conditions import order_test
from analysis.hypothesis import Hypothesis, KnowledgeType, default_hypothesis
from analysis.judging import judge_order
from analysis.localization import LocalizationTest, localization_test
from analysis.verdicts import decide
from probing.curves import LayerCurve
from spafit.errors import UsageError
from spafit.trend import trend_power

LEVELS = ("surface", "syntax", "semantics")
DEPTH = 12
_LAYERS = np.arange(DEPTH + 1)
#: Noise common to all layers (items) and noise that neighbouring layers share.
_FACTOR = np.linalg.cholesky(0.5 + 0.5 * 0.7 ** np.abs(np.subtract.outer(_LAYERS, _LAYERS)))


def curve(task, level, truth, noise, random, n_boot=60):
    values = truth + noise * _FACTOR @ random.normal(size=DEPTH + 1)
    replicates = values + noise * random.normal(size=(n_boot, DEPTH + 1)) @ _FACTOR.T
    return LayerCurve(task, level, _LAYERS, values, replicates, adjusted_by="random-encoder", n_items=1000)


def rise(at, width=1.0, gain=1.0):
    """A smooth rise centred on ``at`` that starts at 0."""
    shape = 1 / (1 + np.exp(-(_LAYERS - at) / (0.5 * width)))
    return gain * (shape - shape[0])


def world(centres, counts=(4, 4, 4), *, sd=1.0, noise=0.03, gains=(1, 1, 1), random, shuffled=False):
    """Curves of tasks whose emergence scatters around their level's centre."""
    levels = np.repeat(np.arange(3), counts)
    truths = [
        rise(np.clip(random.normal(centres[k], sd), 0.5, 11), gain=gains[k] * random.uniform(0.5, 1.5)) for k in levels
    ]
    names = random.permutation(levels) if shuffled else levels
    return [curve(f"t{i}", LEVELS[k], t, noise, random) for i, (k, t) in enumerate(zip(names, truths, strict=True))]


def random_encoder_world(kind, random):
    """Curves such as an untrained network gives: nothing above its control, a fall, or noise beyond the item noise."""
    curves = []
    for i, level in enumerate(np.repeat(LEVELS, 4)):
        truth = {"flat": np.zeros, "fall": lambda n: -0.03 * np.arange(n), "wander": np.zeros}[kind](DEPTH + 1)
        if kind == "wander":  # one control network more or less: smooth differences that items do not explain
            truth = np.cumsum(random.normal(0, 0.15, DEPTH + 1))
        curves.append(curve(f"t{i}", level, truth, 0.03, random))
    return curves


def verdicts(make, n_worlds):
    return Counter(localization_test(make(), seed=i).verdict for i, _ in enumerate(range(n_worlds)))


def at_most(share, n_worlds):
    return share + 3 * math.sqrt(share * (1 - share) / n_worlds)


NULL_WORLDS = {
    "shuffled levels": lambda random: world((2, 5, 8), random=random, shuffled=True),
    "same depth": lambda random: world((4, 4, 4), random=random),
    "same depth, weaker late levels": lambda random: world((3, 3, 3), gains=(2, 1, 0.4), noise=0.06, random=random),
    "same late depth, weaker early levels": lambda random: world(
        (9, 9, 9), gains=(0.4, 1, 2), noise=0.06, random=random
    ),
    "random encoder, flat": lambda random: random_encoder_world("flat", random),
    "random encoder, falling": lambda random: random_encoder_world("fall", random),
    "random encoder, noise beyond the items": lambda random: random_encoder_world("wander", random),
}


@pytest.mark.parametrize("name", NULL_WORLDS)
def test_supported_is_rare_where_levels_mean_nothing(name):
    random = np.random.default_rng(1)
    found = verdicts(lambda: NULL_WORLDS[name](random), 30)
    assert found["supported"] <= 30 * at_most(0.05, 30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NULL_WORLDS)
def test_supported_comes_up_in_at_most_five_percent_of_a_thousand_worlds(name):
    random = np.random.default_rng(2)
    found = verdicts(lambda: NULL_WORLDS[name](random), 1000)
    assert found["supported"] <= 1000 * at_most(0.05, 1000)


def test_planted_order_is_supported_and_its_reverse_or_absence_refuted():
    random = np.random.default_rng(3)
    planted = verdicts(lambda: world((2, 5, 8), random=random), 30)
    reverse = verdicts(lambda: world((8, 5, 2), random=random), 30)
    absent = verdicts(lambda: world((5, 5, 5), sd=0.4, random=random), 30)
    assert planted["supported"] >= 0.95 * 30
    assert reverse["refuted"] >= 0.95 * 30
    assert absent["refuted"] >= 0.75 * 30
    vague = verdicts(lambda: world((5, 5, 5), sd=2.5, random=random), 30)
    assert vague["inconclusive"] >= 0.6 * 30


def test_verdict_from_depths_holds_its_two_error_rates():
    random = np.random.default_rng(4)
    n_worlds, outcomes = 1000, Counter()
    claim, names = default_hypothesis(), [f"t{i}" for i in range(10)]
    ranks = np.repeat([0, 1, 2], [2, 3, 5])
    types = {n: LEVELS[k] for n, k in zip(names, ranks, strict=True)}

    def verdict(depths):
        condition, _ = judge_order(dict(zip(names, depths, strict=True)), types, claim, num_blocks=12)
        return decide([condition], alpha=claim.alpha)[0]

    for _ in range(n_worlds):
        noise = random.normal(size=10)
        outcomes["null", verdict(noise)] += 1
        # a true difference of exactly delta: 1.2 of 12 blocks
        outcomes["delta", verdict(noise + 0.6 * ranks)] += 1
        outcomes["far", verdict(noise + 2 * ranks)] += 1
    assert outcomes["null", "supported"] <= n_worlds * at_most(0.05, n_worlds)
    assert outcomes["delta", "refuted"] <= n_worlds * at_most(0.05, n_worlds)
    assert outcomes["far", "supported"] / n_worlds == pytest.approx(0.98, abs=0.02)
    assert outcomes["far", "refuted"] == 0


def test_bounds_of_the_order_are_students_t():
    from scipy import stats

    depths, ranks = np.array([1.0, 2.0, 4.0, 5.0, 7.0, 9.0]), np.array([0, 0, 1, 1, 1, 2])
    model = np.eye(3)[ranks]  # means of three groups with one variance, as a linear model
    residual = depths - model @ np.linalg.lstsq(model, depths, rcond=None)[0]
    error = math.sqrt(residual @ residual / 3) * math.sqrt(1 / 2 + 1)
    found = order_test(depths, ranks, num_blocks=12).difference
    assert found.value == pytest.approx((9 - 1.5) / 12)
    low, high = (np.array([-1, 1]) * stats.t.ppf(0.95, 3) * error + 7.5) / 12
    assert found.interval == pytest.approx((low, high))
    assert found.p_refuted == pytest.approx(stats.t.cdf((7.5 - 1.2) / error, 3))


def test_an_order_smaller_than_the_margin_is_refuted_and_says_that_it_is_there():
    levels = np.repeat([0, 1, 2], 4)
    random = np.random.default_rng(5)
    curves = [curve(f"t{i}", LEVELS[k], rise(5 + 0.15 * k), 0.001, random) for i, k in enumerate(levels)]
    result = localization_test(curves)
    assert result.verdict == "refuted"
    assert "although the order itself is there" in result.sentence
    assert localization_test(curves, replace(default_hypothesis(), delta=0.005)).verdict == "supported"


@pytest.mark.parametrize(("step", "sd", "published"), [(2, 1, 0.98), (2, 2, 0.63), (1, 1, 0.65), (1, 2, 0.26)])
def test_power_with_two_three_and_five_tasks_is_the_published_one(step, sd, published):
    assert trend_power((2, 3, 5), step=step, sd=sd) == pytest.approx(published, abs=0.04)


def test_power_is_the_level_without_a_trend_and_zero_where_alpha_is_out_of_reach():
    assert trend_power((4, 4, 4), step=0, sd=1) == pytest.approx(0.045, abs=0.015)
    assert trend_power((2, 2), step=100, sd=1) == 0  # smallest p is 1/6
    assert trend_power((4,) * 8, step=0, sd=1) == pytest.approx(0.05, abs=0.015)  # too large to count exactly


def test_result_names_what_was_tested_and_survives_a_round_trip(tmp_path):
    random = np.random.default_rng(6)
    curves = world((2, 5, 8), random=random)
    curves.append(curve("none", "semantics", np.zeros(DEPTH + 1), 0.03, random))
    curves.append(curve("extra", "other", rise(3), 0.03, random))
    result = localization_test(curves)
    l1, *others = result.conditions
    assert [c.name for c in result.conditions] == ["L1", "L2", "L3", "L4"]
    assert l1.tested
    assert l1.smallest_p == pytest.approx(1 / 34650)
    assert l1.interval[0] < l1.number < l1.interval[1]
    assert not any(c.tested for c in others)
    assert all(c.sentence.startswith("Not tested") for c in others)
    assert result.tested == "order of emergence (L1) only"
    assert "Left out because they cannot be dated: none." in result.sentence
    assert "this checkpoint" in result.sentence
    assert "no control" not in result.sentence
    table = result.to_pandas().set_index("task")
    assert table["used"].sum() == 12
    assert table.loc["extra", "note"] == "no type of the hypothesis names it"
    path = result.save(tmp_path)
    again = LocalizationTest.load(tmp_path)
    assert again.to_dict() == result.to_dict()
    content = json.loads(path.read_text())
    assert content["verdict"] == "supported"
    assert content["hypothesis_digest"] == default_hypothesis().digest
    wanted = {"name", "tested", "outcome", "number", "interval", "p", "smallest_p", "power", "p_refuted", "sentence"}
    assert wanted == set(content["conditions"][0])
    assert localization_test(curves).to_dict() == result.to_dict()
    assert "&lt;" not in result._repr_html_()
    assert "<b>supported</b>" in result._repr_html_()


def test_too_few_tasks_are_inconclusive_and_named():
    random = np.random.default_rng(7)
    short = localization_test(world((2, 5, 8), (1, 3, 3), random=random))
    assert (short.verdict, short.conditions[0].tested) == ("inconclusive", False)
    assert "it needs 2 usable tasks of each level" in short.sentence
    assert "there are 1 surface, 3 syntax and 3 semantics tasks." in short.sentence
    assert short.tested == "nothing: too few tasks"
    assert "order of emergence (L1)" not in short._repr_html_()
    none = localization_test(world((2, 5, 8), (0, 1, 0), random=random))
    assert "there are no surface, 1 syntax and no semantics tasks." in none.sentence
    two = Hypothesis(types=(KnowledgeType("surface"), KnowledgeType("semantics")))
    reachable = localization_test(world((2, 5, 6), (2, 0, 2), sd=2, random=random), two)
    assert reachable.conditions[0].smallest_p == pytest.approx(1 / 6)
    assert reachable.verdict == "inconclusive"
    assert "cannot reach 0.05: add tasks" in reachable.sentence


def test_unadjusted_scores_are_called_so():
    random = np.random.default_rng(8)
    plain = [replace(c, adjusted_by="none") for c in world((2, 5, 8), random=random)]
    assert "no control was subtracted" in localization_test(plain).sentence


def test_bad_input_is_named():
    random = np.random.default_rng(9)
    curves = world((2, 5, 8), random=random)
    with pytest.raises(UsageError, match="several of t0"):
        localization_test([*curves, curves[0]])
    with pytest.raises(UsageError, match="no layer curves"):
        localization_test([])


def test_plot_shows_every_dated_task():
    random = np.random.default_rng(10)
    result = localization_test([*world((2, 5, 8), random=random), curve("flat", "syntax", np.zeros(13), 0.03, random)])
    axis = result.plot()
    assert len(axis.get_yticks()) == 12
    assert axis.get_xlabel().startswith("emergence")
