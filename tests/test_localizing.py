"""Hypothesis files, and one verdict for each run or published curve: planted orders, their absence, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.cli.main import app
from analysis.hypothesis import default_hypothesis, read_hypothesis
from analysis.localizing import localize
from probing.curves import LayerCurve
from probing.summaries import published_emergence
from spafit.errors import ConfigError, DataError, UsageError
from tests.paths import SHARED, needs_shared

LEVELS = {"surface": 4, "syntax": 4, "semantics": 4}


def curves(tmp_path: Path, name: str, places: dict[str, float], *, noise: float = 0.0, seed: int = 0) -> Path:
    """A file of published curves of 12 blocks whose tasks rise in one step at about the place of their level."""
    rng = np.random.default_rng(seed)
    columns: dict[str, object] = {"layer": np.arange(13)}
    for level, n in LEVELS.items():
        for i in range(n):
            place = int(np.clip(round(places[level] + rng.normal(0, 1)), 1, 12))
            columns[f"{level}{i}"] = np.where(np.arange(13) >= place, 80.0, 50.0) + noise * rng.standard_normal(13)
    path = tmp_path / f"{name}.csv"
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    path = tmp_path / "claim.yaml"
    lines = [f"  {level}: [{', '.join(f'{level}{i}' for i in range(n))}]" for level, n in LEVELS.items()]
    path.write_text("levels:\n" + "\n".join(lines) + "\nalpha: 0.05\ndelta: 0.1\n")
    return path


def test_planted_orders_give_their_verdicts(tmp_path: Path, claim: Path) -> None:
    ordered = curves(tmp_path, "ordered", {"surface": 2, "syntax": 6, "semantics": 10})
    alike = curves(tmp_path, "alike", {"surface": 6, "syntax": 6, "semantics": 6}, seed=1)
    reversed_ = curves(tmp_path, "reversed", {"surface": 10, "syntax": 6, "semantics": 2})
    found = localize([ordered, alike, reversed_], read_hypothesis(claim))
    rows = found.table.set_index("source")
    assert rows.loc["ordered", "verdict"] == "supported"
    assert rows.loc["ordered", "difference"] == pytest.approx(8 / 12, abs=0.1)
    assert rows.loc["alike", "verdict"] != "supported"
    assert rows.loc["reversed", "verdict"] == "refuted"
    assert rows.loc["ordered", "smallest_p"] < 1e-3
    text = found.to_markdown()
    assert "1 supported" in text
    assert found.hypothesis.digest[:16] in text
    paths = found.save(tmp_path / "out")
    assert all(p.exists() for p in paths)


def test_without_an_order_supported_is_rare(tmp_path: Path, claim: Path) -> None:
    """Levels of one place each, over many worlds: the share of "supported" stays near the level of the test."""
    file = read_hypothesis(claim)
    places = {"surface": 6.0, "syntax": 6.0, "semantics": 6.0}
    verdicts = [
        localize([curves(tmp_path, f"world{seed}", places, seed=seed)], file).table["verdict"].iloc[0]
        for seed in range(100)
    ]
    assert verdicts.count("supported") <= 11  # .05 of 100, and two and a half binomial standard deviations


def test_a_published_step_is_dated_where_it_is_and_noise_is_not() -> None:
    step = np.where(np.arange(13) >= 5, 80.0, 50.0)
    nothing = np.empty((0, 13))
    assert published_emergence(LayerCurve("t", "syntax", np.arange(13), step, nothing)).value == 5
    ramp = np.clip(np.arange(13) - 3, 0, 6) * 5.0
    assert published_emergence(LayerCurve("t", "syntax", np.arange(13), ramp, nothing)).value == pytest.approx(6.5)
    noise = np.random.default_rng(0).standard_normal(13)
    flat = published_emergence(LayerCurve("t", "syntax", np.arange(13), noise, nothing))
    assert np.isnan(flat.value)
    assert "noise" in flat.note


def test_a_file_decides_levels_statistic_and_digest(tmp_path: Path, claim: Path) -> None:
    first = read_hypothesis(claim)
    again = claim.with_name("again.yaml")
    again.write_text("# another comment\nclaim: the same in other words\n" + claim.read_text())
    assert read_hypothesis(again).digest == first.digest
    for change in ("delta: 0.2", "statistic: best"):
        again.write_text(claim.read_text().replace("delta: 0.1", change))
        assert read_hypothesis(again).digest != first.digest
    again.write_text(claim.read_text().replace("surface3", "other"))
    assert read_hypothesis(again).digest != first.digest
    found = first.file_curve(LayerCurve("core.syntax2", "other", np.arange(3), np.zeros(3), np.empty((0, 3))))
    assert found.level == "syntax"
    assert default_hypothesis().tasks["SentLen"] == "surface"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("level: {a: [x], b: [y]}", "unknown key 'level'"),
        ("levels: [a, b]", "levels must map"),
        ("levels: {a: [x], b: [x]}", "'x' stands under a and b"),
        ("levels: {a: [x], b: [y]}\nalpha: high", "alpha must be a number"),
        ("levels: {a: [x], b: [y]}\nalpha: 0.7", "alpha between 0 and 0.5"),
        ("levels: {a: [x], b: [y]}\nmin_tasks: 1.5", "min_tasks must be a number"),
        ("levels: {a: [x], b: [y]}\nstatistic: mode", "emergence_cog or best"),
        ("levels: {a: [x]}", "two or more different levels"),
        ("levels: {a: [x", "is not YAML"),
        ("[]", "must map names"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "claim.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_hypothesis(path)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        localize([])
    with pytest.raises(DataError, match="is neither"):
        localize([tmp_path / "nothing"])
    path = tmp_path / "cumulative.csv"
    path.write_text("task,layer,f1\n" + "".join(f"t,{i},{i}\n" for i in range(5)))
    with pytest.raises(DataError, match="holds cumulative scores"):
        localize([path])


@needs_shared
def test_published_verdicts_hang_on_the_statistic_and_the_pooling(tmp_path: Path) -> None:
    reference = SHARED.parent / "reference"
    files = [str(reference / f"{n}.csv") for n in (
        "jawahar2019_table2_bert_base_uncased_cls", "sentevalinfo_bert_probing_acc")]  # fmt: skip
    shown = CliRunner().invoke(app, ["localize", "--print-hypothesis"])
    best = tmp_path / "best.yaml"
    best.write_text(shown.output.replace("statistic: emergence_cog", "statistic: best"))
    done = CliRunner().invoke(app, ["localize", *files, "--hypothesis", str(best), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "out" / "localization.csv").fillna({"variant": ""}).set_index("variant")
    assert table.loc["", "difference"] == pytest.approx((8.6 - 3.5) / 12, abs=0.005)  # means of METHODS' best layers
    assert table.loc["", "smallest_p"] < 0.001
    assert table.loc["bert-base-uncased, first", "verdict"] == "inconclusive"
    assert table.loc["bert-base-uncased, mean", "verdict"] == "supported"
    assert set(localize(files).table["verdict"]) == {"inconclusive"}
