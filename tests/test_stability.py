"""Condition L4: planted orders that hold at every setting, that one pooling turns round, and what cannot be tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.hypothesis import read_hypothesis
from analysis.localizing import localize
from analysis.stability import is_stable, order, stability
from probing import ProbeResults, probe_arrays
from spafit.errors import UsageError
from tests.planted import planted_states

TASKS = {"surface": (0, 1), "syntax": (2, 3), "semantics": (4, 4)}
MODEL = {"blocks": 6, "name": "planted", "weights_digest": "a", "adapter_digest": None, "stack": "arrays"}


@pytest.fixture(scope="module")
def fits() -> dict[str, ProbeResults]:
    """Results of one task for each place, on states whose labels enter there, with random encoders."""
    found = {}
    for place in sorted({p for places in TASKS.values() for p in places}):
        states, labels = planted_states(place, items=800, seed=place)
        noise = {s: np.random.default_rng(s).standard_normal(states.shape).astype(np.float32) for s in range(3)}
        found[str(place)] = probe_arrays(states, labels, random_states=noise, name="t", seeds=3, n_boot=100)
    return found


def run(
    fits: dict[str, ProbeResults], *, turned: str = "", probes: tuple[str, ...] = ("linear", "mlp:8")
) -> ProbeResults:
    """A run of two tasks a level at two poolings; at the pooling ``turned`` the levels stand in the other order."""
    scores, items = [], {}
    for level, places in TASKS.items():
        for i, place in enumerate(places):
            name, tables = f"{level}{i}", []
            for pooling in ("mean", "first"):
                at = str(4 - place) if pooling == turned else str(place)
                for probe in probes:
                    where = {"pooling": pooling, "probe": probe}
                    scores.append(fits[at].scores.assign(task=name, level=level, **where))
                    tables.append(fits[at].items("t").assign(**where))
            items[name] = pd.concat(tables, ignore_index=True)
    base = fits["0"]
    facts = {"model": MODEL, "seeds": [0, 1, 2]}
    return replace(base, run={**base.run, **facts}, scores=pd.concat(scores, ignore_index=True), item_tables=items)


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    path = tmp_path / "claim.yaml"
    path.write_text("levels:\n  surface: []\n  syntax: []\n  semantics: []\n")
    return path


def test_an_order_at_every_setting_is_stable_and_one_that_turns_is_not(fits, claim: Path, tmp_path: Path) -> None:
    file = read_hypothesis(claim)
    good = stability(run(fits), file, n_boot=100)
    assert good.tested
    assert good.number == 1
    assert is_stable(good)
    assert "12 of 12 settings (3 seeds, 2 poolings, 2 probes)" in good.sentence
    turned = run(fits, turned="first")
    bad = stability(turned, file, n_boot=100)
    assert bad.number == pytest.approx(0.5)
    assert not is_stable(bad)

    for results, verdict in ((run(fits), "supported"), (turned, "inconclusive")):
        folder = results.save(tmp_path / verdict)
        found = localize([folder], file)
        first = found.table[found.table["variant"] == "mean, linear"].iloc[0]
        assert first["p"] <= 0.05
        assert first["verdict"] == verdict
        assert found.tests[0].conditions[3].name == "L4"
        assert "settings (3 seeds" in found.to_markdown()


def test_what_does_not_vary_is_named(fits, claim: Path) -> None:
    file = read_hypothesis(claim)
    found = stability(run(fits, probes=("linear",)), file)
    assert not found.tested
    assert "no mlp probe" in found.sentence
    whole = run(fits)
    one = replace(whole, scores=whole.scores[whole.scores["pooling"] == "mean"])
    assert "1 of 2 poolings" in stability(one, file).sentence
    items = {t: i[(i["seed"] == 0) | (i["control"] != "none")] for t, i in whole.item_tables.items()}
    assert "1 of 3 seeds" in stability(replace(whole, item_tables=items), file).sentence
    bare = replace(whole, scores=whole.scores[whole.scores["control"] == "none"])
    assert "no random encoder" in stability(bare, file).sentence


def test_too_few_tasks_have_no_order(fits, claim: Path) -> None:
    curves = [replace(fits["0"].curve("t", n_boot=100), task=f"x{i}", level="surface") for i in range(2)]
    assert np.isnan(order(curves, read_hypothesis(claim)))


def test_parts_have_verdicts_of_their_own(fits, claim: Path, tmp_path: Path) -> None:
    """Items whose levels stand in the claimed order, and as many whose levels stand in the other one."""
    whole = run(fits, turned="first", probes=("linear",))
    items = {}
    for task, table in whole.item_tables.items():
        parts = [table[table["pooling"] == p].assign(kind=k) for p, k in (("mean", "as claimed"), ("first", "turned"))]
        renamed = [p.assign(item=p["item"].astype(str) + k, pooling="mean") for p, k in zip(parts, "ab", strict=True)]
        items[task] = pd.concat(renamed, ignore_index=True)
    mixed = replace(whole, scores=whole.scores[whole.scores["pooling"] == "mean"], item_tables=items)
    folder = mixed.save(tmp_path / "mixed")
    table = localize([folder], read_hypothesis(claim), by="kind").table.set_index("variant")
    assert table.loc["kind as claimed", "verdict"] == "supported"
    assert table.loc["kind turned", "difference"] < 0
    assert table.loc["kind turned", "stability"] == ""
    with pytest.raises(UsageError, match="No task of"):
        localize([folder], read_hypothesis(claim), by="colour")
