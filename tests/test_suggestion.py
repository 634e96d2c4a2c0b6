"""Strata from curves: planted boundaries, both criteria, every fallback with its reason, determinism."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.holding import held_from
from analysis.strata_suggestion import StrataSuggestion
from analysis.suggestion import SMOOTH_SENTENCE, suggest_strata
from probing.curves import LayerCurve
from spafit.errors import UsageError
from spafit.strata import LoraOptions, StrataConfig

LEVELS = ("surface", "surface", "surface", "syntax", "syntax", "syntax", "semantics", "semantics", "semantics")


def curve(
    name: str,
    level: str,
    values: np.ndarray,
    *,
    error: float = 0.01,
    hidden: np.ndarray | None = None,
    seed: int = 0,
    metric: str = "bits",
) -> LayerCurve:
    """A curve measured with a standard error, and replicates around what was measured."""
    rng = np.random.default_rng([seed, *name.encode()])
    values = np.asarray(values, dtype=float)
    measured = values + error * rng.normal(size=values.shape)
    replicates = measured + error * rng.normal(size=(300, len(values)))
    hidden = np.arange(len(values)) if hidden is None else hidden
    return LayerCurve(name, level, hidden, measured, replicates, metric=metric, adjusted_by="random-encoder")


def stepped(num_blocks: int, first: int, second: int, *, error: float = 0.01, seed: int = 0) -> list[LayerCurve]:
    """All tasks step where blocks ``first`` and ``second`` write; each has its own share and size."""
    rng = np.random.default_rng([seed, num_blocks])
    hidden = np.arange(num_blocks + 1)
    curves = []
    for i, level in enumerate(LEVELS):
        share, size = rng.uniform(0.3, 0.7), rng.uniform(0.5, 2)
        values = size * (share * (hidden > first) + (1 - share) * (hidden > second))
        curves.append(curve(f"task{i}", level, values, error=error * size, seed=seed))
    return curves


def saturating(num_blocks: int, *, basic: float, other: float, error: float = 0.002) -> list[LayerCurve]:
    depth = np.arange(num_blocks + 1) / num_blocks
    return [
        curve(f"task{i}", level, 1 - np.exp(-depth / (other if level == "semantics" else basic)), error=error)
        for i, level in enumerate(LEVELS)
    ]


# -- the holding rule -------------------------------------------------------------------------------------------------


def test_holding_finds_the_first_state_that_reaches_the_share_by_hand():
    bits = np.array([[0.0, 0.5, 1.0, 0.2], [0.0, 0.0, 0.8, 1.0]])
    # Running maxima: means 0, .25, .9, 1.
    assert [int(held_from(bits, share=q)) for q in (0.2, 0.25, 0.3, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_knowledge_that_is_there_from_the_embeddings_on_is_held_at_hidden_0():
    assert held_from(np.array([[1.0, 0.9, 0.2]])) == 0


def test_a_group_below_its_control_holds_nothing():
    assert held_from(np.array([[-1.0, -0.1, 0.0]])) == -1
    assert held_from(np.array([[-1.0, -0.1, 0.0], [0.0, 0.0, 0.3]])) == 2


def test_holding_treats_leading_axes_separately():
    bits = np.random.default_rng(0).normal(size=(20, 3, 8))
    assert held_from(bits).tolist() == [int(held_from(b)) for b in bits]


# -- planted truth ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "first", "second"), [(6, 2, 4), (12, 3, 8), (24, 5, 10), (30, 6, 20)])
def test_planted_steps_place_the_strata_at_the_blocks_that_make_them(num_blocks, first, second):
    suggestion = suggest_strata(stepped(num_blocks, first, second), num_blocks=num_blocks)
    assert suggestion.criterion == "segmentation"
    assert suggestion.evidence == "strata"
    assert suggestion.boundaries == (first, second)
    assert suggestion.segmentation.intervals == ((first, first), (second, second))
    assert suggestion.config.provenance["criterion"] == "segmentation"
    assert suggestion.config.provenance["tested"] is False


def test_levels_that_saturate_at_different_depths_are_placed_by_the_holding_rule():
    suggestion = suggest_strata(saturating(12, basic=0.05, other=0.15), num_blocks=12)
    # 1 - exp(-h / (12 τ)) relative to its largest value reaches .95 at h = -12 τ ln(.05): 1.8 and 5.4 (5.35 relative).
    assert suggestion.boundaries == (2, 6)
    assert suggestion.criterion == "holding"
    assert suggestion.evidence == "smooth"
    assert suggestion.reason.startswith(SMOOTH_SENTENCE)
    assert suggestion.config.provenance["criterion"] == "holding rule"
    errors = suggestion.config.provenance["null_errors"]
    assert errors["segments"] > min(v for k, v in errors.items() if k != "segments")


def test_a_higher_share_moves_the_boundaries_up():
    curves = saturating(24, basic=0.08, other=0.15)
    pairs = [suggest_strata(curves, num_blocks=24, share=q).holding.boundaries for q in (0.5, 0.8, 0.95)]
    assert pairs == sorted(pairs)
    assert pairs[0] < pairs[2]
    assert suggest_strata(curves, num_blocks=24).sensitivity.keys() == {0.9, 0.99}


def test_s2_is_never_below_s1():
    suggestion = suggest_strata(saturating(12, basic=0.15, other=0.05), num_blocks=12)
    s1, s2 = suggestion.holding.boundaries
    assert s1 == s2 == 6
    assert (suggestion.holding.draws[:, 0] <= suggestion.holding.draws[:, 1]).all()


def test_levels_can_be_regrouped():
    curves = saturating(12, basic=0.05, other=0.15)
    swapped = suggest_strata(curves, num_blocks=12, basic_levels=("semantics",))
    assert swapped.holding.boundaries[0] == 6


def test_a_task_below_its_control_places_nothing_and_is_named():
    curves = saturating(12, basic=0.05, other=0.15)
    late = curve("late", "semantics", np.where(np.arange(13) == 12, 0.01, -1.0), error=0.02)
    only = [c for c in curves if c.level != "semantics"]
    early = curve("early", "semantics", 1 - np.arange(13) / 24, error=0.002)
    suggestion = suggest_strata([*only, early, late], num_blocks=12)
    assert suggestion.holding.boundaries == (2, 2)
    assert "s2 rests on a single task (early)." in suggestion.reason
    assert "not used for it: late." in suggestion.reason
    assert suggestion.reason == suggestion.config.provenance["reason"]
    assert suggestion.explain().startswith(suggestion.reason)
    assert "single task" not in suggest_strata(curves, num_blocks=12).reason


def test_knowledge_that_only_falls_leaves_nothing_frozen():
    hidden = np.arange(13)
    curves = [curve(f"task{i}", level, 1 - hidden / 12, error=0.002) for i, level in enumerate(LEVELS)]
    suggestion = suggest_strata(curves, num_blocks=12)
    assert suggestion.criterion == "holding"
    assert suggestion.boundaries == (0, 0)
    assert [s.method for s in suggestion.config.strata] == ["lora+bitfit"]


def test_knowledge_that_grows_to_the_end_leaves_no_third_stratum_and_says_so():
    hidden = np.arange(13)
    curves = [curve(f"task{i}", level, (hidden / 12) ** 2, error=1e-4) for i, level in enumerate(LEVELS)]
    suggestion = suggest_strata(curves, num_blocks=12)
    assert suggestion.boundaries == (12, 12)
    assert "No block is left to train" in suggestion.reason


def test_noise_gives_no_strata_and_no_confident_boundary():
    for seed in range(5):
        curves = [curve(f"task{i}", level, np.zeros(25), seed=seed) for i, level in enumerate(LEVELS)]
        suggestion = suggest_strata(curves, num_blocks=24)
        assert suggestion.evidence in ("weak", "none")
        assert suggestion.config.strata == StrataConfig.preset("spafit-scaled-I", blocks=24).strata


# -- fallbacks --------------------------------------------------------------------------------------------------------


def assert_scaled(suggestion: StrataSuggestion, *words: str) -> None:
    blocks = suggestion.num_blocks
    assert suggestion.criterion == "none"
    assert suggestion.config.strata == StrataConfig.preset("spafit-scaled-I", blocks=blocks).strata
    assert suggestion.config.provenance["source"] == "preset spafit-scaled-I"
    assert suggestion.config.provenance["tested"] is False
    for word in words:
        assert word in suggestion.reason
        assert word in suggestion.config.provenance["reason"]


def test_wide_intervals_are_called_weak_and_the_scaled_preset_is_written():
    suggestion = suggest_strata(saturating(12, basic=0.05, other=0.1, error=0.2), num_blocks=12)
    assert suggestion.evidence == "weak"
    assert_scaled(
        suggestion, "The evidence is weak", "more than a third of the 12 blocks", "spafit-scaled-I is written"
    )
    assert suggestion.config.provenance["intervals"] is None
    # Control: the same curves measured precisely are not weak.
    assert suggest_strata(saturating(12, basic=0.05, other=0.1), num_blocks=12).evidence == "smooth"


def test_segments_that_win_with_an_uncertain_place_are_weak_too():
    hidden = np.arange(13)
    # Half of the tasks have their lower step early, half late: either half alone would move it by half the depth.
    curves = [
        curve(f"task{i}", "surface", 0.5 * (hidden > (1 if i % 2 else 8)) + 0.5 * (hidden > 10), error=0.02)
        for i in range(4)
    ]
    suggestion = suggest_strata(curves, num_blocks=12)
    name, (low, high) = suggestion.segmentation.widest()
    assert high - low > 4
    assert name in ("s1", "s2")
    assert_scaled(suggestion)


def test_without_other_tasks_and_without_strata_the_scaled_preset_is_written_with_the_reason():
    curves = [c for c in saturating(12, basic=0.05, other=0.15) if c.level != "semantics"]
    suggestion = suggest_strata(curves, num_blocks=12)
    assert suggestion.evidence == "none"
    assert_scaled(suggestion, SMOOTH_SENTENCE, "no task belongs to the other levels")


def test_without_basic_tasks_and_without_strata_the_scaled_preset_is_written_with_the_reason():
    curves = [c for c in saturating(12, basic=0.05, other=0.15) if c.level == "semantics"]
    assert_scaled(suggest_strata(curves, num_blocks=12), "no task belongs to the basic levels (surface, syntax)")


def test_segments_decide_even_where_one_group_has_no_task():
    curves = [c for c in stepped(12, 3, 8) if c.level != "semantics"]
    suggestion = suggest_strata(curves, num_blocks=12)
    assert suggestion.criterion == "segmentation"
    assert suggestion.boundaries == (3, 8)
    assert "holding rule gave no boundaries: no task belongs to the other levels" in suggestion.explain()


def test_one_task_gives_neither_criterion():
    suggestion = suggest_strata(stepped(12, 3, 8)[:1], num_blocks=12)
    assert_scaled(suggestion, "at least two tasks, got 1", "no task belongs to the other levels")


def test_no_task_at_all_gives_the_scaled_preset():
    assert_scaled(suggest_strata([], num_blocks=12), "at least two tasks, got 0", "no usable curve")


def test_tasks_below_their_control_give_no_holding_boundary():
    curves = [
        curve(c.task, c.level, c.values - 5 if c.level == "semantics" else c.values)
        for c in saturating(12, basic=0.05, other=0.15)
    ]
    suggestion = suggest_strata(curves, num_blocks=12)
    assert_scaled(suggestion, "no task of the other levels exceeds its control")


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_few_blocks_use_the_holding_rule_alone(num_blocks):
    curves = [curve(f"task{i}", level, np.arange(num_blocks + 1) > 0) for i, level in enumerate(LEVELS)]
    suggestion = suggest_strata(curves, num_blocks=num_blocks)
    assert suggestion.null_test is None
    assert f"at least 5 blocks, got {num_blocks}" in suggestion.reason
    assert suggestion.evidence in ("untested", "weak")


def test_some_hidden_states_only_place_no_boundaries():
    hidden = np.array([0, 3, 6, 9, 12])
    curves = [curve(f"task{i}", level, hidden >= 6, hidden=hidden) for i, level in enumerate(LEVELS)]
    suggestion = suggest_strata(curves, num_blocks=12)
    assert suggestion.evidence == suggestion.criterion == "none"
    assert "every hidden state from 1 to 12" in suggestion.explain()
    assert "every hidden state from 0 to 12" in suggestion.explain()


def test_curves_that_are_not_finite_are_left_out_and_named():
    curves = stepped(12, 3, 8)
    broken = LayerCurve("odd", "syntax", np.arange(13), np.full(13, np.nan), np.full((10, 13), np.nan))
    suggestion = suggest_strata([broken, *curves], num_blocks=12)
    assert suggestion.boundaries == (3, 8)
    assert "odd" in suggestion.notes["tasks"]
    assert "odd" in suggestion.explain()


# -- options and bad input --------------------------------------------------------------------------------------------


def test_blocks_without_biases_get_norm():
    suggestion = suggest_strata(stepped(12, 3, 8), num_blocks=12, stack="decoder", bias_roles=())
    assert [s.method for s in suggestion.config.strata] == ["freeze", "norm", "lora+norm"]
    assert suggestion.config.provenance["substitutions"]
    assert suggestion.stack == "decoder"


def test_rank_and_type_reach_the_plan():
    lora = LoraOptions(rank=8, alpha=16)
    config = suggest_strata(stepped(12, 3, 8), num_blocks=12, adapter_type="II", lora=lora).config
    assert config.strata[2].lora == LoraOptions(8, 16, 0.0, ("query", "key", "value", "attention_output"))
    weak = suggest_strata([], num_blocks=12, adapter_type="II", lora=lora)
    assert weak.config.strata[2].lora.rank == 8
    assert weak.config.provenance["source"] == "preset spafit-scaled-II"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_blocks": 6}, "hidden 0 to 12, but 6 blocks"),
        ({"num_blocks": 0}, "at least one block"),
        ({"share": 0.0}, "above 0"),
        ({"n_boot": 3}, "at least 20"),
    ],
)
def test_options_out_of_range_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        suggest_strata(stepped(12, 3, 8), **{"num_blocks": 12, **change})


def test_curves_that_do_not_belong_together_are_refused():
    curves = stepped(12, 3, 8)
    with pytest.raises(UsageError, match="different hidden states"):
        suggest_strata([*curves, curve("short", "syntax", np.arange(7))], num_blocks=12)
    with pytest.raises(UsageError, match="several curves"):
        suggest_strata([*curves, curves[0]], num_blocks=12)
    with pytest.raises(UsageError, match="mix metrics"):
        suggest_strata([*curves, curve("acc", "syntax", np.arange(13), metric="accuracy")], num_blocks=12)
    bare = LayerCurve("bare", "syntax", np.arange(13), np.arange(13.0), np.zeros((0, 13)))
    with pytest.raises(UsageError, match="no bootstrap replicates"):
        suggest_strata([bare], num_blocks=12)


# -- intervals, determinism, files ------------------------------------------------------------------------------------


def test_intervals_hold_the_estimate_and_widen_with_the_noise():
    widths = []
    for error in (0.002, 0.05):
        estimate = suggest_strata(saturating(24, basic=0.1, other=0.2, error=error), num_blocks=24).holding
        for block, (low, high) in zip(estimate.boundaries, estimate.intervals, strict=True):
            assert low <= block <= high
        widths.append(sum(high - low for low, high in estimate.intervals))
    assert widths[0] < widths[1]


def test_disagreement_between_tasks_widens_the_interval_even_when_each_is_measured_exactly():
    hidden = np.arange(13)
    late = [curve(f"task{i}", lv, hidden > (9 if i in (6, 8) else 2), error=1e-6) for i, lv in enumerate(LEVELS)]
    same = [curve(f"task{i}", lv, hidden > 2, error=1e-6) for i, lv in enumerate(LEVELS)]
    assert suggest_strata(same, num_blocks=12).holding.intervals == ((3, 3), (3, 3))
    low, high = suggest_strata(late, num_blocks=12).holding.intervals[1]
    assert (low, high) == (3, 10)


def test_the_same_curves_and_seed_give_the_same_plan_and_another_seed_the_same_estimates():
    curves = saturating(12, basic=0.05, other=0.15, error=0.02)
    a, b, c = (suggest_strata(curves, num_blocks=12, seed=s) for s in (0, 0, 1))
    assert a.config == b.config
    assert a.config.to_yaml() == b.config.to_yaml()
    assert (a.holding.draws == b.holding.draws).all()
    assert a.holding.boundaries == c.holding.boundaries
    assert (a.holding.draws != c.holding.draws).any()


def test_what_is_saved_loads_and_says_where_it_comes_from(tmp_path):
    suggestion = suggest_strata(stepped(12, 3, 8), num_blocks=12, model_id="model")
    loaded = StrataConfig.load(suggestion.save(tmp_path / "strata.yaml"))
    assert loaded.strata == suggestion.config.strata
    assert loaded.boundaries() == (3, 8)
    assert loaded.provenance["intervals"] == {"s1": [3, 3], "s2": [8, 8]}
    assert loaded.provenance["versions"]["spafit"]
    assert StrataConfig.from_yaml(suggestion.config.to_yaml()) == suggestion.config


def test_explanations_name_criterion_evidence_alternative_and_what_would_change_it():
    text = suggest_strata(saturating(12, basic=0.05, other=0.15), num_blocks=12).explain()
    for words in (
        SMOOTH_SENTENCE,
        "Of 12 blocks: blocks 0 to 1 frozen, blocks 2 to 5 bias-only, blocks 6 to 11 low-rank.",
        "hold 95% of their largest bits at hidden 2",
        "Leave-one-task-out error",
        "The segmentation would put them at s1 =",
        "What would change it",
        "Untested",
    ):
        assert words in text


def test_table_plot_and_html_show_both_boundaries():
    suggestion = suggest_strata(stepped(12, 3, 8), num_blocks=12, model_id="<b>")
    table = suggestion.to_pandas()
    assert table.columns.tolist() == ["criterion", "boundary", "block", "ci_low", "ci_high", "chosen", "probability"]
    assert table.loc[table["chosen"], "block"].tolist() == [3, 8]
    assert table.loc[table["chosen"], "probability"].tolist() == [1, 1]
    ax = suggestion.plot()
    assert len(ax.lines) == 2
    assert len(ax.patches) == 2 * 13
    assert not suggest_strata([], num_blocks=12).plot().patches
    assert "<b>" not in suggestion._repr_html_()
    probabilities = suggestion.segmentation.probabilities(12)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
