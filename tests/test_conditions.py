"""L1 to L3 as tests over tasks: exact against enumeration, calibrated without a reason, able to say no."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from unittest.mock import patch

import numpy as np
import pytest
from scipy import stats

from analysis.block_effects import BlockEffects, halves_of_tasks
from analysis.conditions import (
    DRAWN,
    assignments,
    choose_ranges,
    dissociation_test,
    dissociations,
    effect_shares,
    exact_p,
    order_test,
    range_test,
    smallest_p,
    window_sums,
)
from analysis.hypothesis import Hypothesis, KnowledgeType, default_hypothesis
from analysis.judging import Shares, judge_interventions, prepare_shares
from analysis.localization import localization_test
from analysis.power import plan, share_outcomes, share_powers, simulated_shares
from analysis.verdicts import Condition, decide
from spafit.stats import holm

BLOCKS = 12
RANGES = ((0, 4), (4, 8), (8, 12))
LEVELS = ("surface", "syntax", "semantics")


def harm(counts, random, *, gap=0.0, noise=0.5, trend=0.0, shuffled=False, blocks=BLOCKS, ranges=RANGES):
    """Harm by task and block: a trend over depth that all share, more of it in a type's own range, task noise."""
    ranks = np.repeat(np.arange(len(counts)), counts)
    at = np.arange(blocks)
    effects = 1 + trend * at / blocks + noise * random.standard_normal((len(ranks), blocks))
    for k, (start, stop) in enumerate(ranges):
        effects[np.ix_(ranks == k, (at >= start) & (at < stop))] += gap
    return effects, random.permutation(ranks) if shuffled else ranks


def verdict(effects, ranks, claim=None):
    claim = default_hypothesis() if claim is None else claim
    names = tuple(f"t{i}" for i in range(len(ranks)))
    evidence = BlockEffects("blocks", names, tuple(LEVELS[k] for k in ranks), effects[None], "world")
    two, three, *_ = judge_interventions(prepare_shares(evidence, claim), claim)
    return decide([two, three], alpha=claim.alpha)[0], two, three


# ---------------------------------------------------------------- exact


def test_two_group_p_is_that_of_scipys_enumeration():
    random = np.random.default_rng(0)
    for a, b in ((2, 3), (3, 4), (4, 4)):
        values = random.normal(size=a + b)
        own = np.arange(a + b) < a
        found = stats.permutation_test(
            (values[own], values[~own]), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True,
            alternative="greater", n_resamples=np.inf,
        )  # fmt: skip
        assert exact_p(values, own) == pytest.approx(found.pvalue)
        ordered = np.sort(values)[::-1]
        assert exact_p(ordered, own) == pytest.approx(smallest_p(a + b, a)) == pytest.approx(1 / math.comb(a + b, a))


def test_smallest_p_of_published_designs_and_what_holm_makes_of_them():
    assert [round(smallest_p(a + b, a), 3) for a, b in ((2, 3), (2, 5), (3, 5))] == [0.1, 0.048, 0.018]
    assert holm(np.full(3, smallest_p(8, 4))).max() == pytest.approx(3 / 70)
    claim = default_hypothesis()
    planned = plan(claim, (2, 3, 5), 12, interventions=True)
    assert planned.smallest_p["L1"] == pytest.approx(1 / 2520)
    assert planned.smallest_p["L3"] > claim.alpha  # no pair of 2, 3 and 5 tasks can pass
    assert plan(claim, (4, 4, 4), 12, interventions=True).smallest_p["L3"] == pytest.approx(3 / 70)
    assert any("it cannot hold: add tasks" in line for line in planned.lines(claim))
    assert plan(claim, (1, 3, 5), 12, interventions=True).smallest_p == {}
    assert {r["power"] for r in planned.power if r["condition"] == "L3"} == {0.0}


def test_every_assignment_is_listed_once_and_many_are_drawn():
    rows = assignments(6, 2)
    assert len(rows) == 15
    assert len({tuple(r) for r in rows}) == 15
    assert (rows.sum(axis=1) == 2).all()
    many = assignments(24, 8)
    assert many.shape == (DRAWN, 24)
    assert (many.sum(axis=1) == 8).all()
    assert abs(many.mean(axis=0) - 1 / 3).max() < 0.03
    values = np.arange(24.0)[::-1]
    assert exact_p(values, np.arange(24) < 8) == pytest.approx(smallest_p(24, 8)) == pytest.approx(1e-4)


def test_range_p_is_the_largest_statistic_over_all_assignments_and_windows():
    random = np.random.default_rng(1)
    for seed in range(4):
        effects, ranks = harm((3, 3), random, gap=0.2 * seed, blocks=6, ranges=((0, 2), (3, 5)))
        shares, own = effect_shares(effects), ranks == 0
        sums = window_sums(shares, 2)
        table = np.array(
            [sums[list(c)].mean(0) - np.delete(sums, list(c), axis=0).mean(0) for c in combinations(range(6), 3)]
        )
        errors = table.std(axis=0, ddof=1)
        seen = (sums[own].mean(0) - sums[~own].mean(0)) / errors
        order = np.argsort(-seen)  # step-down: windows with a larger statistic leave before
        p, running = {}, 0.0
        for i, window in enumerate(order):
            largest = (table / errors)[:, order[i:]].max(axis=1)
            running = max(running, float((largest >= seen[window] - 1e-9).mean()))
            p[int(window)] = running
        for start in range(5):
            found = range_test(shares, own, (start, start + 2))
            assert found.p == pytest.approx(p[start])
            assert found.share == pytest.approx(shares[own][:, start : start + 2].sum(1).mean())


def test_dissociation_is_the_larger_of_both_directions():
    random = np.random.default_rng(2)
    ranks = np.repeat([0, 1, 2], [3, 4, 2])
    in_ranges = random.normal(size=(9, 3)) + 0.8 * (ranks[:, None] == np.arange(3))
    tests, adjusted = dissociations(in_ranges, ranks, alpha=0.05, delta=0.1)
    for i, j in combinations(range(3), 2):
        p, gaps = [], []
        for own, other in ((i, j), (j, i)):
            a, b = in_ranges[ranks == own, own], in_ranges[ranks == other, own]
            both = np.concatenate([a, b])
            every = [
                both[list(c)].mean() - np.delete(both, list(c)).mean() for c in combinations(range(len(both)), len(a))
            ]
            p.append(np.mean([e >= a.mean() - b.mean() - 1e-12 for e in every]))
            gaps.append(a.mean() - b.mean())
        assert tests[i, j].p == pytest.approx(max(p))
        assert tests[i, j].difference.value == pytest.approx(min(gaps))
        assert [d.value for d in tests[i, j].directions] == pytest.approx(gaps)
    assert list(adjusted.values()) == pytest.approx(holm(np.array([t.p for t in tests.values()])).tolist())
    swapped = dissociation_test(in_ranges, ranks == 1, ranks == 0, (1, 0), alpha=0.05, delta=0.1)
    assert swapped.p == pytest.approx(tests[0, 1].p)


def test_order_of_pairs_is_exact_too():
    depths, ranks = np.array([1.0, 3.0, 2.0, 5.0, 4.0]), np.array([0, 0, 1, 1, 1])
    found = order_test(depths, ranks, num_blocks=10)
    every = {tuple(sorted(p[:3])) for p in permutations(depths)}
    assert found.pair_p[0, 1] == pytest.approx(np.mean([np.mean(e) >= 11 / 3 for e in every]))
    assert found.p == pytest.approx(2 / 10)  # one inversion: (3, 2)


# ---------------------------------------------------------------- what it says of worlds


def worlds(n, seed, counts=(4, 4, 4), **options):
    random = np.random.default_rng(seed)
    with patch("analysis.judging.share_powers", return_value=(math.nan, math.nan)):  # slow, and no part of a verdict
        return [verdict(*harm(counts, random, **options))[0] for _ in range(n)]


def test_planted_ranges_are_supported_and_shared_ones_are_not():
    found = worlds(60, 3, gap=3.0)
    assert found.count("supported") >= 0.95 * 60
    assert "refuted" not in found
    # the same for all: distributed, with a bound that excludes the margin; and where the top matters most for all
    for options in ({"gap": 0.0, "noise": 0.1}, {"gap": 0.0, "noise": 0.1, "trend": 4.0}):
        assert worlds(40, 4, **options).count("refuted") >= 0.95 * 40
    vague = worlds(40, 5, gap=0.0, noise=3.0)
    assert vague.count("inconclusive") >= 0.7 * 40
    # a wrong range: everything one range further
    random = np.random.default_rng(6)
    moved = [
        verdict(np.roll(harm((4, 4, 4), random, gap=3.0)[0], 4, axis=1), np.repeat([0, 1, 2], 4))[0] for _ in range(20)
    ]
    assert "supported" not in moved


@pytest.mark.parametrize("options", [{"gap": 0.0}, {"gap": 0.0, "trend": 3.0}, {"gap": 3.0, "shuffled": True}])
def test_supported_is_rare_where_types_mean_nothing(options):
    found = worlds(300, 7, **options)
    assert found.count("supported") / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_each_p_is_calibrated_under_shuffled_types():
    random, n = np.random.default_rng(8), 400
    low = {"range": 0, "pair": 0}
    for _ in range(n):
        effects, ranks = harm((4, 4), random, gap=1.0, shuffled=True, ranges=((0, 4), (8, 12)))
        shares = effect_shares(effects)
        in_ranges = np.stack([shares[:, :4].sum(1), shares[:, 8:].sum(1)], axis=1)
        low["range"] += range_test(shares, ranks == 0, (0, 4)).p <= 0.1
        low["pair"] += exact_p(in_ranges[:, 0], ranks == 0) <= 0.1
    for name, hits in low.items():
        assert hits / n <= 0.1 + 3 * math.sqrt(0.09 / n), name
    assert low["pair"] / n >= 0.1 - 3 * math.sqrt(0.09 / n)  # 1/10 of 70 is exactly reachable: not merely conservative


def test_a_true_difference_of_exactly_delta_is_seldom_refuted():
    random, n = np.random.default_rng(9), 400
    refuted = 0
    for _ in range(n):
        in_ranges = 0.1 * random.standard_normal((8, 2)) + 0.1 * np.repeat(np.eye(2), 4, axis=0)
        test = dissociation_test(in_ranges, np.arange(8) < 4, np.arange(8) >= 4, (0, 1), alpha=0.05, delta=0.1)
        refuted += test.difference.p_refuted <= 0.05
    assert refuted / n <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


# ---------------------------------------------------------------- power


@pytest.mark.parametrize(("counts", "ranges"), [((4, 4, 4), RANGES), ((3, 4, 3), ((0, 3), (2, 7), (9, 12)))])
def test_what_holds_in_a_simulated_world_is_what_the_tests_say_of_it_one_by_one(counts, ranges):
    """The fast simulation behind the announced power against the tests themselves, world by world."""
    shares = simulated_shares(counts, ranges, BLOCKS, gap=0.3, sd=0.1, simulations=150)
    two, three = share_outcomes(shares, counts, ranges, alpha=0.05, delta=0.1)
    assert 0.05 < two.holds.mean() < 0.95
    ranks = np.repeat([0, 1, 2], counts)
    for world, own in enumerate(shares):
        tests = [range_test(own, ranks == k, r) for k, r in enumerate(ranges)]
        assert two.holds[world] == all(t.p <= 0.05 and t.beats_ranges and t.beats_random >= 0.95 for t in tests)
        assert two.p_refuted[world] == pytest.approx(holm(np.array([t.difference.p_refuted for t in tests])).min())
        in_ranges = np.stack([own[:, a:b].sum(axis=1) for a, b in ranges], axis=1)
        pairs, adjusted = dissociations(in_ranges, ranks, alpha=0.05, delta=0.1)
        assert three.holds[world] == (max(adjusted.values()) <= 0.05)
        least = holm(np.array([t.difference.p_refuted for t in pairs.values()])).min()
        assert three.p_refuted[world] == pytest.approx(least)


def test_simulated_shares_differ_and_scatter_as_they_are_asked_to():
    shares = simulated_shares((4, 4, 4), RANGES, BLOCKS, gap=0.3, sd=0.1)
    assert shares.sum(axis=2) == pytest.approx(1)
    in_range = shares[:, :, :4].sum(axis=2)
    own, other = in_range[:, :4], in_range[:, 4:]
    assert own.mean() - other.mean() == pytest.approx(0.3, abs=0.01)
    assert np.sqrt((own.var() + other.var()) / 2) == pytest.approx(0.1, abs=0.003)


def test_power_is_none_without_a_difference_or_with_too_few_tasks():
    assert max(share_powers((4, 4, 4), RANGES, BLOCKS, gap=0.0, sd=0.15)) <= 0.02
    assert share_powers((2, 3, 5), RANGES, BLOCKS, gap=0.8, sd=0.05)[1] == 0
    assert min(share_powers((6, 6, 6), RANGES, BLOCKS, gap=0.8, sd=0.05)) == 1


# ---------------------------------------------------------------- held out


def held_out(kind="tasks"):
    return Hypothesis(types=tuple(KnowledgeType(name) for name in LEVELS), held_out=kind)


def test_halves_never_overlap_and_each_type_is_in_both():
    names = [f"task{i}" for i in range(17)]
    ranks = [0] * 4 + [1] * 5 + [2] * 8
    first = halves_of_tasks(names, ranks, seed=0)
    assert [int(first[np.array(ranks) == k].sum()) for k in range(3)] == [2, 2, 4]
    order = np.random.default_rng(0).permutation(17)
    again = halves_of_tasks([names[i] for i in order], [ranks[i] for i in order], seed=0)
    assert {names[i] for i, f in zip(order, again, strict=True) if f} == {
        n for n, f in zip(names, first, strict=True) if f
    }
    assert (halves_of_tasks(names, ranks, seed=1) != first).any()


def test_ranges_are_chosen_on_the_tasks_that_are_not_tested():
    random = np.random.default_rng(12)
    effects, ranks = harm((8, 8, 8), random, gap=3.0)
    names = tuple(f"t{i}" for i in range(24))
    evidence = BlockEffects("blocks", names, tuple(LEVELS[k] for k in ranks), effects[None], "world")
    found = prepare_shares(evidence, held_out())
    assert isinstance(found, Shares)
    chosen_on = found.notes.split("(")[1].split(")")[0].split(", ")
    assert set(chosen_on) & set(found.tasks) == set()
    assert set(chosen_on) | set(found.tasks) == set(names)
    assert found.ranges == RANGES
    rows = [names.index(t) for t in found.tasks]
    assert np.allclose(found.shares, effect_shares(effects)[rows])
    assert verdict(effects, ranks, held_out())[0] == "supported"
    # what the tested half looks like does not move the ranges
    other = effects.copy()
    other[rows] = other[rows][:, ::-1]
    moved = prepare_shares(BlockEffects("blocks", names, evidence.levels, other[None], "world"), held_out())
    assert isinstance(moved, Shares)
    assert moved.ranges == RANGES


def test_ranges_chosen_on_the_tested_tasks_themselves_would_be_too_good():
    """The reason for halves: on noise, chosen ranges look localized; on the other half they do not."""
    random, same, other = np.random.default_rng(13), [], []
    for _ in range(40):
        effects, ranks = harm((4, 4, 4), random, noise=2.0)
        halves = effect_shares(np.stack([effects, 1 + 2.0 * random.standard_normal(effects.shape)]))
        ranges = choose_ranges(halves[0], ranks, 3)
        for half, into in ((halves[0], same), (halves[1], other)):
            into += [range_test(half, ranks == k, r).difference.value for k, r in enumerate(ranges)]
    assert np.mean(same) > 0.1
    assert abs(np.mean(other)) < 0.05


def test_halves_of_items_choose_on_the_first_and_test_on_the_second():
    random = np.random.default_rng(14)
    first, ranks = harm((4, 4, 4), random, gap=3.0)
    second, _ = harm((4, 4, 4), random, gap=3.0)
    names, levels = tuple(f"t{i}" for i in range(12)), tuple(LEVELS[k] for k in ranks)
    both = BlockEffects("blocks", names, levels, np.stack([first, second]), "world")
    found = prepare_shares(both, held_out("items"))
    assert isinstance(found, Shares)
    assert found.ranges == RANGES
    assert np.allclose(found.shares, effect_shares(second))
    one = BlockEffects("blocks", names, levels, first[None], "world")
    assert "were not measured on two halves" in str(prepare_shares(one, held_out("items")))


# ---------------------------------------------------------------- edges


def test_what_cannot_be_tested_is_said():
    claim, random = default_hypothesis(), np.random.default_rng(15)
    effects, ranks = harm((1, 4, 4), random)
    found, two, three = verdict(effects, ranks)
    assert found == "inconclusive"
    assert not two.tested
    assert two.sentence == three.sentence
    assert "needs 2 tasks of each type with an effect, and there are 1 surface, 4 syntax" in two.sentence
    no_range = Hypothesis(types=tuple(KnowledgeType(name) for name in LEVELS))
    assert "claims no range" in verdict(*harm((4, 4, 4), random), no_range)[1].sentence
    silent, ranks = harm((3, 3, 3), random, gap=3.0)
    silent[0] = 0
    _, two, _ = verdict(silent, ranks)
    assert two.tested
    assert "Left out because nothing has an effect on them: t0." in two.sentence
    assert verdict(*harm((2, 3, 5), random, gap=9.0, noise=0.1), claim)[2].sentence.endswith(
        "cannot reach 0.05: add tasks."
    )


def test_effects_of_both_signs_are_not_clipped():
    shares = effect_shares(np.array([[1.0, -1.0, 2.0], [0.0, 0.0, 0.0]]))
    assert shares[0] == pytest.approx([0.25, -0.25, 0.5])
    assert np.isnan(shares[1]).all()


def test_a_range_that_others_beat_does_not_hold_however_small_p():
    # own tasks: more than others in [0, 2), yet most in [4, 6), where the others have even more
    own, other = [4, 4, 0, 0, 6, 6.0], [0, 0, 0, 0, 10, 10.0]
    jitter = 0.01 * np.random.default_rng(16).standard_normal((8, 6))
    shares = effect_shares(np.array([own] * 4 + [other] * 4) + jitter)
    found = range_test(shares, np.arange(8) < 4, (0, 2))
    assert found.p <= 0.05
    assert not found.beats_ranges
    assert found.best == (4, 6)
    assert found.beats_random < 0.95


def test_verdict_needs_every_tested_condition_and_adjusts_refutations():
    holds = Condition("L1", True, "", "holds", p_refuted=0.9)
    weak = Condition("L2", True, "", "open", p_refuted=0.2)
    out = Condition("L2", True, "", "open", p_refuted=0.03)
    unstable = Condition("L4", False, "", "fails")
    assert decide([holds], alpha=0.05)[0] == "supported"
    assert decide([holds, weak], alpha=0.05)[0] == "inconclusive"
    assert decide([holds, unstable], alpha=0.05)[0] == "inconclusive"
    assert decide([out], alpha=0.05)[0] == "refuted"
    assert decide([holds, out], alpha=0.05)[0] == "inconclusive"  # .03 of two is .06
    assert decide([Condition("L4", True, "", "holds")], alpha=0.05)[0] == "inconclusive"
    assert decide([holds, Condition("L2", True, "", "open", p_refuted=0.02)], alpha=0.05)[1][1].outcome == "refuted"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [{"gap": 0.0}, {"gap": 0.0, "trend": 3.0}, {"gap": 3.0, "shuffled": True}])
def test_supported_comes_up_in_at_most_five_percent_of_a_thousand_worlds(options):
    found = worlds(1000, 17, **options)
    assert found.count("supported") / 1000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    found = worlds(1000, 18, counts=(2, 3, 5), **options)
    assert "supported" not in found  # no pair of so few tasks can pass


def test_a_type_is_not_refuted_for_what_another_one_lacks():
    """Syntax suffers most from its own blocks; semantics from those of surface."""
    random = np.random.default_rng(19)
    ranks = np.repeat([0, 1, 2], 5)
    effects = 0.5 + 0.05 * random.standard_normal((15, BLOCKS))
    for k, (start, stop) in enumerate((RANGES[0], RANGES[1], RANGES[0])):
        effects[ranks == k, start:stop] += 3
    names = tuple(f"t{i}" for i in range(15))
    evidence = BlockEffects("blocks", names, tuple(LEVELS[k] for k in ranks), effects[None], "world")
    found = localization_test((), default_hypothesis(), effects=evidence)
    assert found.verdict == "refuted"
    # nothing tells surface from semantics, and semantics is not where it is claimed
    assert {t.type: t.verdict for t in found.types} == {
        "surface": "refuted", "syntax": "supported", "semantics": "refuted",
    }  # fmt: skip
