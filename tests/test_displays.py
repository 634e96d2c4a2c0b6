"""Figures and tables show what the score table holds: the right rows, at the right place, with their doubt."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from probing.displays import (
    html_table,
    layer_curves,
    markdown_table,
    overview,
    sparkline,
    task_layer_heatmap,
)
from probing.model_displays import relative_depth
from probing.tables import bracket, number, primary_split, shorten_curve
from spafit.errors import UsageError
from spafit.strata import StrataConfig
from tests import report_fixtures as made

FOUR = tuple(s for s in made.CORE if s[0].split(".")[1] in ("word_content", "tree_depth", "dependency", "odd_man_out"))


@pytest.fixture(scope="module")
def scores():
    return made.scores(tasks=FOUR)


@pytest.fixture(scope="module")
def summaries(scores):
    return made.summaries(scores)


def _value(scores, task, *, control="none", metric="accuracy", split=None):
    rows = scores[scores["seed"].isna() & (scores["task"] == task) & (scores["control"] == control)]
    split = split or primary_split(scores, task)
    return rows[(rows["metric"] == metric) & (rows["split"] == split)].sort_values("hidden")["value"].to_numpy()


def _lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def _panel(figure, name):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == name)


def _words(figure):
    return " ".join(t.get_text() for legend in figure.legends for t in [legend.get_title(), *legend.get_texts()])


def test_each_task_has_a_panel_with_its_curve_its_controls_and_chance(scores):
    figure = layer_curves(scores)
    assert len(figure.axes) == 4
    lines = _lines(_panel(figure, "dependency"))
    assert set(lines) == {"task", "unseen", "random-encoder", "word-type", "chance"}
    for label, control, split in (
        ("task", "none", "seen"), ("unseen", "none", "unseen"), ("random-encoder", "random-encoder", "seen"),
        ("word-type", "word-type", "seen"),
    ):  # fmt: skip
        expected = _value(scores, "core.dependency", control=control, split=split)
        np.testing.assert_array_equal(lines[label].get_ydata(), expected)
        np.testing.assert_array_equal(lines[label].get_xdata(), np.arange(7))
    assert set(lines["chance"].get_ydata()) == {0.16}
    assert set(_lines(_panel(figure, "word content"))) == {"task", "random-encoder", "chance"}


def test_rows_of_single_seeds_are_not_what_is_drawn(scores):
    wrong = scores.copy()
    wrong.loc[wrong["seed"].notna(), "value"] = 99.0
    assert layer_curves(wrong).axes[0].get_ylim()[1] < 2
    wrong.loc[wrong["seed"].isna(), "value"] = 99.0
    assert layer_curves(wrong).axes[0].get_ylim()[1] > 2


def test_strata_are_shaded_between_the_hidden_states_that_bound_their_blocks(scores):
    figure = layer_curves(scores, strata=made.strata(6))
    for ax in figure.axes:
        spans = sorted((p.get_x(), p.get_x() + p.get_width()) for p in ax.patches)
        assert spans == [(0, 1), (1, 3), (3, 6)]
    assert "bitfit: blocks 1–2" in _words(figure)
    assert not layer_curves(scores).axes[0].patches


@pytest.mark.parametrize("layout", ["tasks", "levels"])
def test_figures_say_unit_interval_fits_and_items(scores, layout):
    words = " ".join(_words(layer_curves(scores, layout=layout, metric="bits")).split())
    for part in ("bits saved per item", "95 % bootstrap interval", "3 distinct fits", "1,200–2,400 test items"):
        assert part in words


def test_levels_share_a_panel_and_shares_have_their_best_at_one(scores):
    figure = layer_curves(scores, metric="bits", layout="levels", scale="share", strata=made.strata(6))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["surface", "syntax", "semantics"]
    syntax = _lines(_panel(figure, "syntax"))
    assert [k.split(" ", 1)[-1] for k in syntax if k not in ("random-encoder", "chance")] == [
        "tree depth",
        "dependency",
    ]
    curve = next(line.get_ydata() for k, line in syntax.items() if "dependency" in k)
    bits = _value(scores, "core.dependency", metric="bits")
    np.testing.assert_allclose(curve, bits / bits.max())
    names = {t.get_text() for t in _panel(figure, "syntax").texts}
    assert {"freeze", "bitfit", "lora+bitfit"} <= names
    assert any("tree depth" in n for n in names), "curves are named at their ends"


def test_names_at_the_ends_of_curves_do_not_overlap():
    figure = layer_curves(made.scores(noise=0.0), metric="bits", layout="levels", scale="share")
    for ax in figure.axes:
        boxes = sorted((t.get_window_extent() for t in ax.texts), key=lambda b: b.y0)
        tops = [t.get_window_extent().height for t in ax.texts]
        centres = [(b.y0 + b.y1) / 2 for b in boxes]
        assert len(centres) == 4
        assert np.diff(centres).min() > 0.6 * min(tops)


def test_shares_of_accuracy_are_measured_from_chance(scores):
    figure = layer_curves(scores, metric="accuracy", layout="levels", scale="share")
    curve = next(line.get_ydata() for k, line in _lines(_panel(figure, "syntax")).items() if "dependency" in k)
    own = _value(scores, "core.dependency") - 0.16
    np.testing.assert_allclose(curve, own / own.max())


def test_several_poolings_are_several_lines_named_in_the_legend():
    table = made.scores(tasks=FOUR[:2], poolings=("mean", "first"))
    figure = layer_curves(table)
    lines = _lines(figure.axes[0])
    assert {"mean", "first"} <= set(lines)
    assert lines["mean"].get_linestyle() != lines["first"].get_linestyle()
    assert "mean" in _words(figure)


def test_several_stacks_need_a_choice_and_take_their_own_strata():
    table = made.scores(tasks=FOUR[:2], stacks=("encoder", "decoder"))
    with pytest.raises(UsageError, match="several values of stack: encoder, decoder"):
        layer_curves(table)
    with pytest.raises(UsageError, match="No stack 'vision'"):
        layer_curves(table, stack="vision")
    config = StrataConfig.from_boundaries({"encoder": (1, 2), "decoder": (3, 4)}, blocks={"encoder": 6, "decoder": 6})
    figure = layer_curves(table, stack="decoder", strata=config.strata)
    assert sorted(p.get_x() for p in figure.axes[0].patches) == [0, 3, 4]


def test_one_task_can_be_drawn_into_given_axes(scores):
    figure = Figure()
    ax = figure.subplots()
    assert layer_curves(scores, tasks=["core.dependency"], ax=ax) is figure
    assert "task" in _lines(ax)
    with pytest.raises(UsageError, match="axes hold one"):
        layer_curves(scores, ax=ax)
    with pytest.raises(UsageError, match=r"Did you mean .core\.dependency."):
        layer_curves(scores, tasks=["core.dependancy"])


def test_missing_intervals_and_single_hidden_states_are_drawn(scores):
    table = scores.assign(ci_low=np.nan, ci_high=np.nan)
    assert not layer_curves(table).axes[0].collections
    assert layer_curves(scores).axes[0].collections
    alone = scores[scores["hidden"] == 3]
    assert len(layer_curves(alone).axes) == 4
    assert len(layer_curves(alone, layout="levels", metric="bits", scale="share").axes) == 3
    with pytest.raises(UsageError, match="nothing to draw"):
        layer_curves(scores.head(0))


def test_heat_map_cells_hold_percentages_and_the_box_is_at_the_best(scores):
    figure = task_layer_heatmap(scores)
    ax = figure.axes[0]
    expected = [f"{100 * v:.0f}" for t in dict.fromkeys(scores["task"]) for v in _value(scores, t)]
    assert [t.get_text() for t in ax.texts] == expected
    best = [int(_value(scores, t).argmax()) for t in dict.fromkeys(scores["task"])]
    assert [round(p.get_x()) for p in ax.patches] == best
    colours = ax.collections[0].get_array().reshape(4, 7)
    np.testing.assert_allclose(colours.max(axis=1), 1.0)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["word content", "tree depth", "dependency", "odd man out"]
    assert "half-width of the 95 % interval" in " ".join(ax.get_xlabel().split())


def test_heat_map_leaves_cells_without_a_score_empty(scores):
    table = scores.copy()
    table.loc[(table["task"] == "core.tree_depth") & (table["hidden"] == 2), "value"] = np.nan
    texts = [t.get_text() for t in task_layer_heatmap(table).axes[0].texts]
    assert len(texts) == 27
    with pytest.raises(UsageError, match="no finite value"):
        task_layer_heatmap(table.assign(value=np.nan))


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 4])
def test_the_heat_maps_colour_label_lies_within_the_figure(scores, n_tasks):
    kept = list(dict.fromkeys(scores["task"]))[:n_tasks]
    figure = task_layer_heatmap(scores[scores["task"].isin(kept)])
    figure.canvas.draw()
    label, page = figure.axes[1].yaxis.label.get_window_extent(), figure.bbox
    margin = 2  # pixels: a line's extent holds the room of its descenders
    assert page.x0 <= label.x0 < label.x1 <= page.x1 + margin
    assert page.y0 <= label.y0 < label.y1 <= page.y1


def test_models_of_different_depth_meet_at_relative_depth_one(scores):
    deep = made.scores(tasks=FOUR[1:], blocks=12)
    figure = relative_depth({"six": scores, "twelve": deep})
    assert len(figure.axes) == 3, "only tasks that both have"
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert [len(c.get_xdata()) for c in curves] == [7, 13]
    assert all(c.get_xdata()[0] == 0 and c.get_xdata()[-1] == 1 for c in curves)
    assert "six (6 blocks)" in _words(figure)
    with pytest.raises(UsageError, match="no task in common"):
        relative_depth({"a": made.scores(tasks=FOUR[:1]), "b": made.scores(tasks=FOUR[1:2])})
    with pytest.raises(UsageError, match="No score tables"):
        relative_depth({})


@pytest.mark.parametrize("blocks", [6, 12, 24])
def test_the_table_fits_a_terminal_with_a_row_per_task(blocks):
    table = made.scores(blocks=blocks, seeds=1)
    text = markdown_table(table, made.summaries(table))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 12
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert [r.split("|")[1].strip() for r in rows[2:]] == ["surface"] * 4 + ["syntax"] * 4 + ["semantics"] * 4


def test_the_table_holds_the_numbers_of_the_tables(scores, summaries):
    row = next(r for r in overview(scores, summaries) if r.task == "core.dependency")
    own = _value(scores, "core.dependency")
    assert (row.best, row.at) == (own.max(), own.argmax())
    assert row.gap == pytest.approx(own.max() - _value(scores, "core.dependency", control="random-encoder")[row.at])
    assert row.selectivity == pytest.approx(own.max() - _value(scores, "core.dependency", control="word-type")[row.at])
    cog = summaries[(summaries["task"] == "core.dependency") & (summaries["statistic"] == "emergence_cog")].iloc[0]
    assert (row.cog, row.cog_low, row.cog_high) == (cog["value"], cog["ci_low"], cog["ci_high"])
    assert (row.cog_of, row.first_of) == ("bits − random-encoder", "accuracy")
    line = next(x for x in markdown_table(scores, summaries).splitlines() if "dependency" in x)
    for part in (bracket(row.best, row.best_low, row.best_high), number(row.gap, sign=True), ".160", "2400"):
        assert part in line


def test_what_was_not_computed_is_a_dash_and_not_a_number(scores):
    bare = scores[scores["control"] == "none"]
    for row in overview(bare, pd.DataFrame()):
        assert row.first is None
        assert np.isnan(row.gap)
        assert np.isnan(row.cog)
    line = next(x for x in markdown_table(bare, pd.DataFrame()).splitlines() if "dependency" in x)
    assert line.count("—") == 3
    lost = scores.assign(value=np.nan, ci_low=np.nan, ci_high=np.nan)
    assert "nan" not in markdown_table(lost, pd.DataFrame())


def test_long_names_give_way_before_numbers_do(scores, summaries):
    names = {t: f"treebank.{t}_of_a_very_long_kind_that_nobody_can_remember|x" for t in scores["task"].unique()}
    table, shorter = (f.assign(task=f["task"].map(names)) for f in (scores, summaries))
    text = markdown_table(table, shorter)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" in text
    assert bracket(*(lambda r: (r.best, r.best_low, r.best_high))(overview(table, shorter)[0])) in text


def test_variants_become_a_column_only_where_a_task_has_several(scores, summaries):
    assert "pooling" not in markdown_table(scores, summaries)
    table = made.scores(tasks=FOUR[:2], poolings=("mean", "first"))
    text = markdown_table(table, made.summaries(table))
    assert "pooling" in text
    assert text.count("tree_depth") == 2


def test_sparklines_show_shape_and_do_not_magnify_noise():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.90, 0.91, 0.90], low=0.2) == "███"
    assert sparkline([0.90, 0.91, 0.90]) == "▁█▁"
    assert sparkline([1.0, float("nan"), 3.0]) == "▁ █"
    assert sparkline([float("nan")] * 3) == "   "
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert shorten_curve([0, 1, 2, 3, 4], 2) == [1.0, 3.5]


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0.943, {}, ".943"), (1.0, {}, "1.000"), (-0.05, {"sign": True}, "-.050"), (0.12, {"sign": True}, "+.120"),
        (-0.0001, {}, ".000"), (12.34, {"digits": 1}, "12.3"), (float("nan"), {}, "—"), (None, {}, "—"),
        (0.9999, {}, "1.000"), (0.0, {"sign": True}, "+.000"), (10.0, {"digits": 0}, "10"), (0.0, {"digits": 0}, "0"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_in_a_paper(value, options, text):
    assert number(value, **options) == text


def test_the_notebook_table_escapes_names(scores, summaries):
    table = scores.assign(task=scores["task"] + "<b>")
    text = html_table(table, summaries)
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert text.count("<tr>") == 5


def test_a_layout_or_scale_that_is_none_is_refused(scores):
    with pytest.raises(UsageError, match="layout is 'level'; it can be 'tasks' or 'levels'"):
        layer_curves(scores, layout="level")
    with pytest.raises(UsageError, match="scale is 'percent'"):
        layer_curves(scores, scale="percent")
