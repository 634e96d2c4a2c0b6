"""Sensitivity of layers and breakdowns by a column: planted shifts are found, and none where nothing was planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.breakdown import breakdown
from analysis.cli.main import app
from analysis.interpretation import interpret
from analysis.sensitivity import sensitivity, unstable_tasks
from probing import ProbeResults, probe_arrays, probe_layers
from spafit import io
from spafit.errors import DataError, UsageError
from tests.planted import planted_states
from tests.test_conllu import conllu

MODEL = {"blocks": 6, "weights_digest": "a", "adapter_digest": None, "stack": "arrays", "name": "planted"}


def planted(block: int, *, pooling: str = "given", probe: str = "linear", seeds: int = 3, **more) -> ProbeResults:
    """Results on states whose labels enter at ``block``; names of pooling and probe are put in afterwards."""
    states, labels = planted_states(block, items=900)
    noise = {s: np.random.default_rng(s).standard_normal(states.shape).astype(np.float32) for s in range(seeds)}
    found = probe_arrays(states, labels, random_states=noise, name="t", level="syntax", seeds=seeds, n_boot=200, **more)
    renamed = {"pooling": pooling, "probe": probe}
    items = {"t": found.items("t").assign(**renamed)}
    run = {**found.run, "model": MODEL}
    return replace(found, run=run, scores=found.scores.assign(**renamed), item_tables=items)


def joined(first: ProbeResults, second: ProbeResults) -> ProbeResults:
    """One run with the curves of both."""
    scores = pd.concat([first.scores, second.scores], ignore_index=True)
    items = pd.concat([first.items("t"), second.items("t")], ignore_index=True)
    return replace(first, scores=scores, item_tables={"t": items})


@pytest.mark.parametrize(("axis", "names"), [("pooling", ("mean", "first")), ("probe", ("linear", "mlp:8"))])
def test_a_planted_shift_along_an_axis_is_found(axis: str, names: tuple[str, str]) -> None:
    run = joined(planted(0, **{axis: names[0]}), planted(4, **{axis: names[1]}))
    found = sensitivity(run, n_boot=200)
    rows = found.summary().set_index("axis")
    assert rows.loc[axis, "emergence_cog"] == pytest.approx(4, abs=0.3)
    assert rows.loc[axis, "first_within_1se"] > 2
    assert list(found.unstable) == ["t"]
    assert names[1] in found.unstable["t"]
    assert abs(rows.loc["seed", "emergence_cog"]) < 0.3
    assert not rows.loc["seed", "unstable"]
    assert rows.loc["seed", "settings"] == 3
    other = "probe" if axis == "pooling" else "pooling"
    assert other not in rows.index  # it did not vary


def test_the_same_states_under_two_names_do_not_move() -> None:
    found = sensitivity(joined(planted(2, pooling="mean"), planted(2, pooling="first")), n_boot=200)
    moved = found.table.query("axis == 'pooling' and not base and statistic == 'emergence_cog'")
    assert moved["shift"].abs().max() < 0.05
    assert found.unstable == {}
    assert "No task is unstable" in found.to_markdown()


def test_another_number_of_training_items_is_an_axis() -> None:
    runs = [planted(1, max_train=300), planted(1, max_train=60)]
    found = sensitivity(runs, n_boot=200)
    rows = found.table.query("axis == 'training items'")
    assert set(rows["setting"]) == {"300", "60"}
    assert rows.query("base")["setting"].unique().tolist() == ["300"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="Nothing varies"):
        sensitivity(planted(1, seeds=1))
    other = planted(1)
    other = replace(other, run={**other.run, "model": {**MODEL, "weights_digest": "b"}})
    with pytest.raises(DataError, match="another model"):
        sensitivity([planted(1), other])


def test_an_unstable_task_leaves_the_verdict(tmp_path: Path) -> None:
    run = joined(planted(0, pooling="mean"), planted(4, pooling="first"))
    run = replace(run, run={**run.run, "model": {**MODEL, "bias_roles": [], "has_biases": True, "reference": "x",
                                                 "width": 16, "parameters": 1, "stacks": {"arrays": 6}}})  # fmt: skip
    run.save(tmp_path)
    loaded = ProbeResults.load(tmp_path)
    sensitivity(loaded, n_boot=200).save(tmp_path)
    assert set(unstable_tasks(tmp_path)) == {"t"}
    assert (tmp_path / "figures" / "sensitivity.png").stat().st_size > 5_000
    assert unstable_tasks(tmp_path / "elsewhere") == {}


def word_treebank(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("dev", 20), ("test", 40)):
        trees = []
        for i in range(n):
            noun, verb = rng.choice(["dogs", "cats", "birds"]), rng.choice(["bark", "sleep", "run"])
            tail = " ".join(f"x{split}{i}{j}/ADV/2/advmod" for j in range(int(rng.integers(1, 12))))
            trees.append(f"{noun}/NOUN/2/nsubj {verb}/VERB/0/root {tail}")
        (folder / f"made-ud-{split}.conllu").write_text(conllu(*trees, ids=split, documents=True))
    return folder


def test_commands_on_a_real_run(tmp_path: Path, small_bert: Path, cache: Path) -> None:
    out = tmp_path / "run"
    results = probe_layers(
        str(small_bert), [f"conllu:{word_treebank(tmp_path)}#upos"], pooling=["mean", "last"], max_train=150, seeds=2,
        n_boot=100, out=out, quiet=True,
    )  # fmt: skip
    interpret(results)
    done = CliRunner().invoke(
        app, ["sensitivity", str(out), "--probe", "mlp:4", "--train-sizes", "60", "--n-boot", "100", "-q"]
    )
    assert done.exit_code == 0, done.output
    table = pd.read_parquet(out / "sensitivity.parquet")
    assert set(table["axis"]) == {"pooling", "probe", "seed", "training items"}
    assert (out / "sensitivity" / "probe-mlp-4" / "run.json").exists()

    done = CliRunner().invoke(
        app, ["breakdown", str(out), "--by", "length,distance", "--least-items", "20", "--n-boot", "100"]
    )
    assert done.exit_code == 0, done.output
    curves = pd.read_parquet(out / "breakdown.parquet")
    assert set(curves["by"]) == {"length", "distance"}
    assert curves.query("by == 'distance'")["part"].nunique() > 1
    assert (out / "figures" / "breakdown.png").stat().st_size > 5_000
    whole = ProbeResults.load(out).curve("made.upos", n_boot=100)
    parts = curves[(curves["by"] == "length")]
    sums = parts.assign(product=parts["value"] * parts["n"]).groupby("hidden")[["product", "n"]].sum()
    assert sums["n"].iloc[0] == whole.n_items  # the parts are all items, so their mean is the curve
    np.testing.assert_allclose(sums["product"] / sums["n"], whole.values, atol=1e-6)

    io.write_json(out / "sensitivity.json", {"blocks": 2, "unstable": {"made.upos": "it moves"}})
    verdict = interpret(ProbeResults.load(out)).verdict
    assert verdict["unstable"] == {"made.upos": "it moves"}
    assert "Left out as unstable (1): made.upos: it moves." in verdict["sentence"]
    assert verdict["verdict"] == "inconclusive"

    for wrong, said in (("colour", "Nothing can be split by colour"), ("bits", "Nothing can be split by bits")):
        with pytest.raises(UsageError, match=said):
            breakdown(results, wrong)
    refused = CliRunner().invoke(app, ["sensitivity", str(out), "--train-sizes", "few"])
    assert refused.exit_code != 0


def test_parts_with_another_layer_are_told_apart() -> None:
    """Two halves of the items whose labels enter at different blocks, and a column of chance as negative control."""
    early, labels = planted_states(0, items=1600)
    late, _ = planted_states(4, items=1600)
    half = np.random.default_rng(5).integers(0, 2, 1600).astype(bool)
    states = np.where(half[None, :, None], late, early)
    found = probe_arrays(states, labels, name="t", level="syntax", seeds=1, n_boot=200)
    items = found.items("t")
    number = items["item"].astype(str).str.extract(r"(\d+)$")[0].astype(int).to_numpy()
    items = items.assign(kind=np.where(half[number], "late", "early"), coin=number % 2)
    found = replace(found, item_tables={"t": items})
    place = breakdown(found, ["kind", "coin"], n_boot=200).summaries.query("statistic == 'emergence_cog'")
    place = place.set_index(["by", "part"])["value"]
    assert place["kind", "late"] - place["kind", "early"] > 3
    assert abs(place["coin", "0"] - place["coin", "1"]) < 0.7


def test_two_treebanks_stand_side_by_side(tmp_path: Path, small_bert: Path, cache: Path) -> None:
    first = word_treebank(tmp_path)
    second = tmp_path / "other"
    second.mkdir()
    for file in first.iterdir():
        (second / file.name.replace("made", "other")).write_text(file.read_text().replace("dogs", "hens"))
    out = tmp_path / "run"
    done = CliRunner().invoke(
        app,
        ["probe", "--model", str(small_bert), "--tasks", f"conllu:{first}#upos,conllu:{second}#upos,core.length",
         "--max-train", "150", "--limit", "200", "--seeds", "1", "--n-boot", "100", "--out", str(out), "-q"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "models.csv" in done.output
    table = pd.read_csv(out / "models.csv")
    assert set(table["source"]) == {"made", "other"}
    assert set(table["task"]) == {"upos"}
    assert table["relative_depth"].max() == 1
    assert (out / "figures" / "relative_depth.png").stat().st_size > 5_000


def test_a_replaced_run_takes_what_was_derived_from_it_along(tmp_path: Path, small_bert: Path, cache: Path) -> None:
    out = tmp_path / "run"
    made = {"max_train": 100, "seeds": 2, "n_boot": 100, "out": out, "quiet": True}
    tasks = [f"conllu:{word_treebank(tmp_path)}#upos"]
    interpret(probe_layers(str(small_bert), tasks, **made))
    runner = CliRunner()
    derived = ["sensitivity", str(out), "--pooling", "last", "--n-boot", "100", "-q"]
    assert runner.invoke(app, derived).exit_code == 0
    assert (out / "sensitivity" / "pooling-last" / "run.json").exists()
    again = runner.invoke(app, ["sensitivity", str(out), "--pooling", "mean", "-q"])
    assert isinstance(again.exception, UsageError)
    assert "is in the run already" in str(again.exception)
    interpret(probe_layers(str(small_bert), tasks, overwrite="always", **{**made, "seeds": 1}))
    assert not list(out.glob("sensitivity*"))
    assert unstable_tasks(out) == {}
    assert runner.invoke(app, derived).exit_code == 0  # with the new run's options


def test_a_size_that_no_task_has_is_no_second_curve(tmp_path: Path, small_bert: Path, cache: Path) -> None:
    out = tmp_path / "run"
    tasks = [f"conllu:{word_treebank(tmp_path)}#upos"]
    interpret(probe_layers(str(small_bert), tasks, max_train=5000, seeds=2, n_boot=100, out=out, quiet=True))
    done = CliRunner().invoke(app, ["sensitivity", str(out), "--train-sizes", "9000", "--n-boot", "100", "-q"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert not (out / "figures" / "complexity_items.png").exists()
