"""Published curves and weights, replayed from CSV files: real ones, and small ones written here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis.cli.main import app
from probing.published import read_published, summarize_published
from spafit.errors import DataError
from tests.paths import REFERENCE

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published curves are not here")


def values(path, statistic, **options):
    """(model, start of the task's name) -> value."""
    table = summarize_published(read_published(path, **options))
    table = table[table["statistic"] == statistic]
    models = table["model"] if "model" in table else [""] * len(table)
    names = [task.split("-")[0] if not task.startswith("rel") else task[:11] for task in table["task"]]
    return dict(zip(zip(models, names, strict=True), table["value"], strict=True))


@needs_reference
def test_expected_layers_of_both_berts():
    found = values(REFERENCE / "tenney2019_cumulative_dev_f1.csv", "expected_layer")
    tasks = ("pos", "nonterminal", "ner", "dep", "srl", "coref", "rel-semeval", "spr1")
    base = (1.76, 2.38, 2.42, 2.52, 2.59, 3.62, 4.16, 4.29)
    large = (3.39, 3.79, 4.64, 5.69, 6.54, 9.47, 9.40, 9.93)
    for model, layers in (("bert-base-uncased", base), ("bert-large-uncased", large)):
        for task, layer in zip(tasks, layers, strict=True):
            assert found[model, task] == pytest.approx(layer, abs=0.006), (model, task)


@needs_reference
def test_only_dpr_is_suppressed_and_says_why():
    path = REFERENCE / "tenney2019_cumulative_dev_f1.csv"
    assert values(path, "expected_layer")["bert-base-uncased", "dpr"] == pytest.approx(23.9, abs=0.05)
    robust = values(path, "expected_layer_robust")
    assert len(robust) == 22
    assert {key for key, v in robust.items() if math.isnan(v)} == {(m, t) for m, t in robust if t == "dpr"}
    table = summarize_published(read_published(path))
    notes = table[(table["statistic"] == "expected_layer_robust") & (table["note"] != "")]
    assert notes["task"].str.startswith("dpr").all()
    assert notes["note"].str.contains("× noise").all()


@needs_reference
def test_centres_and_divergences_of_mix_weights():
    path = REFERENCE / "tenney2019_mixweights_bert_large.csv"
    cog, kl, entropy = (values(path, s) for s in ("cog", "kl_uniform", "entropy"))
    for task, centre, divergence in (("pos", 11.68, 0.19), ("dep", 13.75, 0.87), ("coref", 15.80, 0.50)):
        assert cog["", task] == pytest.approx(centre, abs=0.006)
        assert kl["", task] == pytest.approx(divergence, abs=0.006)
        assert entropy["", task] == pytest.approx(math.log2(25) - kl["", task])


@needs_reference
def test_wide_tables_of_single_layers():
    path = REFERENCE / "jawahar2019_table2_bert_base_uncased_cls.csv"
    curves = read_published(path)
    assert {c.kind for c in curves} == {"single"}
    best = {c.curve.task: c.curve.hidden[np.argmax(c.curve.values)] for c in curves}
    assert (best["SentLen"], best["BShift"], best["SOMO"]) == (3, 9, 12)
    levels = ("SentLen WC", "TreeDepth TopConst BShift", "Tense SubjNum ObjNum SOMO CoordInv")
    means = [np.mean([best[t] for t in level.split()]) for level in levels]
    assert [round(m, 1) for m in means] == [3.5, 7.3, 8.6]
    logs = read_published(REFERENCE / "sentevalinfo_bert_probing_acc.csv")
    assert len(logs) == 2 * 4 * 10
    assert logs[0].keys == {"model": "bert-base-uncased", "pooling": "first"}


def write(tmp_path, text):
    path = tmp_path / "curves.csv"
    path.write_text(text)
    return path


def rows(task, scores, first=0):
    return "".join(f"{task},{i + first},{v}\n" for i, v in enumerate(scores))


def test_a_step_is_dated_at_the_step_and_noise_is_not(tmp_path):
    step = [50, 50, 50, 90, 90.1, 90, 90.1, 90, 90.1]
    noise = [50, 52, 49, 51, 48, 52, 49, 51, 52.5]
    path = write(tmp_path, "task,layer,f1\n" + rows("step", step) + rows("noise", noise))
    table = summarize_published(read_published(path)).set_index(["task", "statistic"])
    assert table.loc[("step", "expected_layer_robust"), "value"] == pytest.approx(3, abs=0.01)
    assert table.loc[("step", "headroom"), "value"] == pytest.approx(40.1)
    assert table.loc[("step", "first_within_noise"), "value"] == 4
    assert math.isnan(table.loc[("noise", "expected_layer_robust"), "value"])
    assert "below 4" in table.loc[("noise", "expected_layer_robust"), "note"]


def test_rows_in_any_order_and_single_scores(tmp_path):
    lines = rows("a", [1, 5, 6, 6]).splitlines()
    path = write(tmp_path, "task,layer,value\n" + "\n".join(reversed(lines)))
    (curve,) = read_published(path, scores="single")
    np.testing.assert_array_equal(curve.curve.values, [1, 5, 6, 6])
    assert set(summarize_published([curve])["statistic"]) == {
        "best", "first_within_noise", "emergence_cog", "headroom",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,f1\na,3\n", "no column 'layer'"),
        ("task,layer\na,0\na,1\n", "no column of numbers"),
        ("task,layer,f1,acc\na,0,1,2\na,1,1,2\n", "one column of numbers; got f1, acc"),
        ("task,layer,f1\na,0,1\na,1,\na,2,3\n", "line 3: value of task 'a' is ''"),
        ("task,layer,f1\na,0,1\na,1,nan\na,2,3\n", "line 3: value of task 'a' is 'nan'"),
        ("task,layer,f1\na,0,1\na,one,2\na,2,3\n", "line 3: layer is 'one'"),
        ("task,layer,f1\na,0,1\na,0.5,2\n", "no whole number"),
        ("task,layer,f1\na,0,1\na,2,2\n", "layers 0 and 2 with a gap"),
        ("task,layer,f1\na,0,1\na,1,2\na,1,3\n", "layer 1 more than once .lines 3, 4."),
        ("task,layer,f1\na,0,1\n", "two or more"),
        ("task,layer,f1\na,1,1\na,2,2\n", "begins at layer 1; cumulative"),
        ("task,layer,softmax_weight\na,0,0.5\na,1,0.2\n", "sum to 0.7"),
        ("task,layer,softmax_weight\na,0,1.5\na,1,-0.5\n", "smallest is -0.5"),
        ("layer,A,B\n0,1,2\n1,x,3\n2,2,4\n", "line 3: value of task 'A' is 'x'"),
        ("task,layer,f1\n", "no rows"),
        ("", "cannot be read"),
    ],
)
def test_files_that_do_not_hold_together(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_published(write(tmp_path, text))


def test_missing_file():
    with pytest.raises(DataError, match="cannot be read"):
        read_published("no such file.csv")


def test_command_prints_a_table_and_json(tmp_path):
    path = write(tmp_path, "model,task,layer,f1\n" + "".join(f"m,{r}\n" for r in rows("a", [1, 5, 6, 6, 6]).split()))
    done = CliRunner().invoke(app, ["summarize", str(path)])
    assert done.exit_code == 0, done.output
    header, row = done.stdout.splitlines()[1:]
    cells = dict(zip(header.split(), row.split(), strict=False))
    assert (cells["model"], cells["task"], cells["expected_layer"], cells["headroom"]) == ("m", "a", "1.20", "5.00")
    records = json.loads(CliRunner().invoke(app, ["summarize", str(path), "--json"]).stdout)
    assert {
        "model": "m",
        "task": "a",
        "kind": "cumulative",
        "statistic": "headroom",
        "value": 5.0,
        "note": "",
    } in records


@needs_reference
def test_command_shows_the_reason_of_a_suppressed_value():
    done = CliRunner().invoke(app, ["summarize", str(REFERENCE / "tenney2019_cumulative_dev_f1.csv")])
    (line,) = [row for row in done.stdout.splitlines() if row.startswith("bert-base-uncased   dpr")]
    assert " 23.92 " in line
    assert "—" in line
    assert "1.9 × noise" in line
