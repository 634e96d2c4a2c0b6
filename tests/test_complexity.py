"""Selectivity by complexity is read from the score table, at the best hidden state of each probe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.complexity import complexity_curves, complexity_table, has_several_sizes
from probing.results import ProbeResults
from spafit.errors import UsageError
from tests.report_fixtures import CORE, scores


def run(**by_probe: float) -> ProbeResults:
    """A run whose probes differ in score by what is given; names have ``_`` for ``:``."""
    import pandas as pd

    tables = []
    for name, shift in by_probe.items():
        table = scores(blocks=4, tasks=[s for s in CORE if s[2] == "word"][:2], noise=0.0)
        own = table["control"].isin(["none", "difference:word-type"])
        for column in ("value", "ci_low", "ci_high"):
            table.loc[own, column] += shift
        tables.append(table.assign(probe=name.replace("low_rank_", "low-rank:").replace("mlp_", "mlp:")))
    return ProbeResults({}, pd.concat(tables, ignore_index=True), pd.DataFrame())


def test_the_table_holds_scores_controls_and_their_difference_at_the_best_hidden_state():
    results = run(low_rank_1=0.0, low_rank_4=0.01, linear=0.02, mlp_16=0.0, mlp_64=0.03)
    table = complexity_table(results)
    assert set(table["family"]) == {"low-rank", "linear", "mlp"}
    best = table[table["best"]]
    assert len(best) == 2 * 5
    for row in best.itertuples():
        same = table[(table["task"] == row.task) & (table["probe"] == row.probe)]
        assert row.score == same["score"].max()
        assert row.selectivity == pytest.approx(row.score - row.control, abs=0.05)
    first = best[best["task"] == best["task"].iloc[0]].set_index("probe")
    assert first.loc["mlp:64", "score"] - first.loc["mlp:16", "score"] == pytest.approx(0.03)
    assert first.loc["mlp:64", "selectivity"] - first.loc["mlp:16", "selectivity"] == pytest.approx(0.03)
    assert first.loc["low-rank:4", "size"] == 4


def test_the_figure_has_a_panel_for_each_task_and_family_with_linear_as_the_full_rank():
    table = complexity_table(run(low_rank_1=0.0, low_rank_4=0.01, linear=0.02, mlp_16=0.0, mlp_64=0.03))
    figure = complexity_curves(table)
    assert len(figure.axes) == 4
    ticks = [[t.get_text() for t in ax.get_xticklabels()] for ax in figure.axes]
    assert ["1", "4", "full"] in ticks
    assert ["16", "64"] in ticks


def test_runs_with_more_items_are_a_curve_over_items_and_equal_runs_are_refused():
    one = run(linear=0.0)
    more = replace(one, scores=one.scores.assign(n_train=8000))
    figure = complexity_curves(complexity_table([one, more]), by="n_train")
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["2,000", "8,000"]
    with pytest.raises(UsageError, match="differ in --max-train"):
        complexity_table([one, one])
    with pytest.raises(UsageError, match="at least one"):
        complexity_table([])


def test_one_size_of_each_family_gives_no_figure():
    results = run(linear=0.0, mlp_16=0.0)
    assert not has_several_sizes(results.scores)
    assert has_several_sizes(run(mlp_16=0.0, mlp_64=0.0).scores)
    with pytest.raises(UsageError, match="several ranks or widths"):
        complexity_curves(complexity_table(results))
