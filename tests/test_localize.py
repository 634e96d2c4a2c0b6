"""`spafit localize`: every kind of evidence, several runs, and what the command writes and refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.block_effects import effects_from_table, effects_of_erasure, effects_of_training
from analysis.causal import effect, windows
from analysis.cli.main import app, run_guarded
from analysis.evidence import parts_of, read_evidence, with_causal
from analysis.hypothesis import Hypothesis, KnowledgeType, default_hypothesis
from analysis.localization import localization_test
from analysis.localization_displays import plot_runs
from analysis.localization_runs import LocalizationRuns, announce, localize, pool
from analysis.stability import readings_of, stability
from spafit import io
from spafit.errors import DataError, SpafitError, UsageError
from tests.localization_fixtures import LEVELS, TASKS, causal_table, planted_comparison, planted_run, rise
from tests.paths import REFERENCE

CLAIM = default_hypothesis()
TYPES = dict(TASKS)


def invoke(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["localize", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def outcomes(test) -> dict[str, str]:
    return {c.name: c.outcome for c in test.conditions}


def published(path: Path, *, names=("base", "large"), centres=((2, 6, 10), (2, 6, 10))) -> Path:
    """A long file of scores by layer, with noise that is too small to matter."""
    random, rows = np.random.default_rng(0), []
    for name, own in zip(names, centres, strict=True):
        for task, level in TASKS:
            at = own[LEVELS.index(level)] + 0.3 * random.standard_normal()
            scores = 50 + 40 * rise(at, 12) + 0.01 * random.standard_normal(13)
            rows += [{"model": name, "task": task, "layer": k, "f1": s} for k, s in enumerate(scores)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def naming() -> Hypothesis:
    """The default claim, with the planted tasks by name: published files have no levels."""
    types = tuple(replace(t, tasks=(f"made.{t.name}*",)) for t in CLAIM.types)
    return replace(CLAIM, types=types)


# ---------------------------------------------------------------- L4


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("localize") / "planted")


def test_a_planted_run_with_causal_evidence_passes_all_four_conditions(planted):
    effects = effects_from_table(causal_table(), source="skipped")
    readings = readings_of(planted)
    found = localization_test(planted.curves(), CLAIM, effects=effects, readings=readings)
    assert outcomes(found) == dict.fromkeys(("L1", "L2", "L3", "L4"), "holds")
    assert found.verdict == "supported"
    assert [t.verdict for t in found.types] == ["supported"] * 3
    assert [t.blocks for t in found.types] == [(0, 4), (4, 8), (8, 12)]
    assert "sit in layers of their own" in found.sentence
    assert "was not tested" not in found.sentence
    kinds = [(r.kind, r.name) for r in readings]
    assert kinds == [
        ("seed", "0"), ("seed", "1"), ("seed", "2"), ("pooling", "mean"), ("pooling", "first"), ("probe", "linear"),
        ("probe", "mlp:16"), ("random-encoder", ""),
    ]  # fmt: skip
    l4 = found.conditions[3]
    assert "in 3 of 3 seeds, 2 of 2 poolings and 2 of 2 probe families" in l4.sentence
    assert "A random encoder lets only" in l4.sentence
    assert l4.number == 1


def test_readings_differ_from_the_main_one_in_one_thing_alone(planted):
    readings = {(r.kind, r.name): r.depths for r in readings_of(planted)}
    truth = {t: d.depth for t, d in ((t.task, t) for t in localization_test(planted.curves(), CLAIM).tasks)}
    for key, depths in readings.items():
        if key[0] != "random-encoder":
            assert depths.keys() == truth.keys()
            assert max(abs(depths[t] - truth[t]) for t in truth) < 0.6, key
    assert readings["pooling", "first"] != readings["pooling", "mean"] == readings["probe", "linear"]


@pytest.mark.parametrize("turned", ["1", "first", "mlp:16"])
def test_a_seed_pooling_or_probe_that_turns_the_order_takes_the_support_away(turned, tmp_path):
    results = planted_run(tmp_path / "run", turned=turned, spread=0.2)
    found = localization_test(results.curves(), CLAIM, readings=readings_of(results))
    assert outcomes(found)["L1"] == "holds"
    assert outcomes(found)["L4"] == "fails"
    assert found.verdict == "inconclusive"
    assert "supported" not in {t.verdict for t in found.types}


def test_an_order_that_a_random_encoder_shows_too_is_no_support(tmp_path):
    results = planted_run(tmp_path / "run", random_order=True)
    found = localization_test(results.curves(), CLAIM, readings=readings_of(results))
    assert outcomes(found) == {"L1": "holds", "L2": "not tested", "L3": "not tested", "L4": "fails"}
    assert "A random encoder shows the same order" in found.conditions[3].sentence
    assert found.conditions[3].sentence in found.sentence


def test_what_stability_lacks_is_said_and_does_not_count(tmp_path):
    results = planted_run(tmp_path / "run", seeds=2, poolings=("mean",), probes=("linear",))
    found = stability(readings_of(results), TYPES, CLAIM)
    assert (found.tested, found.outcome) == (False, "not tested")
    assert found.sentence.startswith("Not tested in full.")
    assert "Needed, too: 3 seeds instead of 2, 2 poolings instead of 1 and probes of the family mlp." in found.sentence
    modest = replace(CLAIM, seeds=2, poolings=1, probes=("linear",))
    assert stability(readings_of(results), TYPES, modest).outcome == "holds"


def test_a_folder_gives_what_the_function_gives(planted):
    direct = localization_test(planted.curves(), num_blocks=12, readings=readings_of(planted))
    (evidence,) = read_evidence(planted.folder, CLAIM)
    assert localize([evidence], CLAIM).runs[0].test.to_dict() == direct.to_dict()


# ---------------------------------------------------------------- tables of effects


def test_interventions_on_a_real_model_are_read_as_effects():
    """A table of analysis.causal with scores named after tasks is what L2 and L3 need."""
    import torch

    from tests.tiny import tiny, tiny_inputs

    model = tiny("bert", num_hidden_layers=3).eval()
    inputs = tiny_inputs("bert", rows=2)

    def metric(m):
        with torch.no_grad():
            states = m(**inputs).last_hidden_state
        return {"t0": float(states.mean()), "t1": float(states.std())}

    table = effect(model, model, intervention="skip", blocks=windows(3, "single"), metric=metric)
    found = effects_from_table(table, source="skipped")
    assert (found.kind, found.tasks, found.harm.shape) == ("blocks", ("t0", "t1"), (1, 2, 3))
    for task, row in zip(found.tasks, found.harm[0], strict=True):
        own = table[table["metric"] == task].sort_values("blocks_start")
        assert row == pytest.approx(-own["effect"].to_numpy())


def test_the_sign_of_harm_the_chosen_rows_and_the_mean_over_draws():
    rows = [
        {"intervention": i, "blocks_start": b, "blocks_stop": b + w, "part": part, "draw": d, "metric": m, "effect": e}
        for i, b, w, part, d, m, e in [
            ("skip", 0, 1, "block", 0, "loss_bits", 0.2), ("skip", 0, 1, "block", 1, "loss_bits", 0.4),
            ("skip", 1, 1, "block", 0, "loss_bits", -0.1), ("skip", 0, 2, "block", 0, "loss_bits", 9),
            ("skip", 0, 1, "attention", 0, "loss_bits", 9), ("transplant", 0, 1, "block", 0, "loss_bits", 9),
            ("skip", 0, 1, "block", 0, "score", 9), ("skip", 1, 1, "block", 0, "score", 9),
            ("revert", 0, 1, "block", 0, "loss_bits", 9),
        ]
    ]  # fmt: skip
    found = effects_from_table(pd.DataFrame(rows), source="x", task="rte")
    assert found.tasks == ("rte",)
    assert found.harm[0, 0] == pytest.approx([0.3, -0.1])


def test_erasure_is_less_its_control_and_training_is_what_each_block_adds(tmp_path):
    comparison = planted_comparison(tmp_path / "c", erased=True, run=False)
    erased = effects_of_erasure(comparison.erasure, levels=TYPES, source="x")
    assert erased.levels == tuple(TYPES[t] for t in erased.tasks)
    own = erased.harm[0][list(erased.tasks).index("made.syntax0")]
    assert own == pytest.approx(np.where((np.arange(12) >= 4) & (np.arange(12) < 8), 0.11, 0.01), abs=0.012)
    without = comparison.erasure[comparison.erasure["eraser"] != "equal-variance"]
    assert effects_of_erasure(without, levels=TYPES, source="x").harm[0].mean() == pytest.approx(0.1 / 3, abs=0.005)
    rows = comparison.forgetting[comparison.forgetting["metric"] == "bits"]
    trained = effects_of_training(rows, source="x")
    lost = rows[(rows["term"] == "lost") & (rows["task"] == "made.syntax0")]["value"].to_numpy(float)
    assert trained.harm[0][trained.tasks.index("made.syntax0")].sum() == pytest.approx(lost[-1] - lost[0])
    assert trained.harm.shape == (1, 12, 12)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.drop(columns="effect"), "the column 'effect' is missing"),
        (lambda t: t.assign(intervention="transplant"), "no intervention on single whole blocks that takes something"),
        (lambda t: t[t["blocks_start"] != 3], "every single block from 0 on is needed"),
        (lambda t: t.drop(index=5), "task made.surface0 has no effect of block 5"),
        (lambda t: t.assign(metric="score"), "of one task. Add a column task"),
        (lambda t: t.assign(half=2), "write 0 and 1"),
        (lambda t: t.assign(effect=np.nan), "missing or not finite"),
    ],
)
def test_tables_that_do_not_fit_are_named_in_one_sentence(change, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        effects_from_table(change(causal_table()), source="skipped.csv")
    assert "skipped.csv" in str(caught.value)


# ---------------------------------------------------------------- sources


def test_a_comparison_gives_the_order_before_and_what_erasing_or_training_did(tmp_path):
    planted_comparison(tmp_path / "c", erased=True)
    (evidence,) = read_evidence(tmp_path / "c", CLAIM)
    assert evidence.name == "c: tuned"
    assert evidence.effects.kind == "erasure"
    found = localize([evidence], CLAIM).runs[0].test
    assert outcomes(found) == dict.fromkeys(("L1", "L2", "L3", "L4"), "holds")
    assert "Erasing a task's label" in found.conditions[1].sentence
    training = replace(CLAIM, interventions=("training", "erasure"))
    (other,) = read_evidence(tmp_path / "c", training)
    assert other.effects.kind == "training"
    assert "weak evidence" in localize([other], training).runs[0].test.conditions[1].sentence
    none = replace(CLAIM, interventions=("blocks",))
    (bare,) = read_evidence(tmp_path / "c", none)
    assert bare.effects is None


def test_a_comparison_without_its_run_is_dated_from_its_table_and_a_small_erasure_gives_way(tmp_path):
    comparison = planted_comparison(tmp_path / "c", erased=True, run=False)
    few = comparison.erasure[comparison.erasure["task"].isin(["made.surface0", "made.syntax0"])]
    replace(comparison, erasure=few).save(tmp_path / "c")
    (evidence,) = read_evidence(tmp_path / "c", CLAIM)
    assert evidence.effects.kind == "training"
    assert evidence.notes == ("Effects by erasure are of 2 task(s), too few for every type.",)
    found = localize([evidence], CLAIM).runs[0].test
    assert found.verdict == "supported"
    assert outcomes(found)["L4"] == "not tested"
    assert "no control was subtracted" in found.sentence


def test_shared_losses_are_refuted(tmp_path):
    planted_comparison(tmp_path / "c", gap=0.0, run=False)
    found = localize(read_evidence(tmp_path / "c", CLAIM), CLAIM).runs[0].test
    assert outcomes(found)["L1"] == "holds"
    assert found.verdict == "refuted"
    assert "effects by range (L2)" in found.sentence


def test_a_causal_table_is_a_run_of_its_own_or_stands_beside_one(tmp_path, planted):
    path = tmp_path / "skipped.csv"
    causal_table().to_csv(path, index=False)
    (alone,) = read_evidence(path, CLAIM)
    found = localize([alone], CLAIM).runs[0].test
    assert outcomes(found) == {"L1": "not tested", "L2": "holds", "L3": "holds", "L4": "not tested"}
    assert found.verdict == "supported"
    assert "there are no layer curves" in found.sentence
    assert found.tested == "effects by range (L2) and double dissociation (L3)"
    (together,) = with_causal(read_evidence(planted.folder, CLAIM), [path])
    assert localize([together], CLAIM).runs[0].test.tested.startswith("order of emergence (L1), effects by range")
    # tasks from two files are put together
    half = [causal_table(tasks=TASKS[i::2], state=i) for i in (0, 1)]
    for i, table in enumerate(half):
        table.to_parquet(tmp_path / f"half{i}.parquet")
    (both,) = with_causal([], [tmp_path / "half0.parquet", tmp_path / "half1.parquet"])
    assert sorted(both.effects.tasks) == sorted(TYPES)


def test_evidence_of_two_models_is_refused(tmp_path, planted):
    causal_table(blocks=6).to_csv(tmp_path / "six.csv", index=False)
    with pytest.raises(UsageError, match=r"another model than .*6 and 12 blocks.*Give evidence of one model"):
        with_causal(read_evidence(planted.folder, CLAIM), [tmp_path / "six.csv"])
    effects = effects_from_table(causal_table(blocks=6), source="six.csv")
    with pytest.raises(UsageError, match=r"six\.csv has effects of 6 blocks"):
        localization_test(planted.curves(), CLAIM, effects=effects)
    causal_table().to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match=r"the task made\.semantics0 more than once"):
        with_causal([], [tmp_path / "a.csv", tmp_path / "a.csv"])
    two = read_evidence(planted.folder, CLAIM) * 2
    with pytest.raises(UsageError, match="there are 2 runs"):
        with_causal(two, [tmp_path / "a.csv"])


# ---------------------------------------------------------------- several runs


def test_runs_are_pooled_by_task_and_their_differences_shown(tmp_path):
    path = published(tmp_path / "both.csv")
    found = localize(read_evidence(path, naming()), naming())
    assert [r.name for r in found.runs] == ["base", "large"]
    assert {r.test.verdict for r in found.runs} == {"supported"}
    pooled = found.pooled
    gaps = [r.test.conditions[0].number for r in found.runs]
    assert pooled.verdict == "supported"
    assert (pooled.mean, pooled.low, pooled.high) == pytest.approx((np.mean(gaps), min(gaps), max(gaps)))
    assert pooled.sd == pytest.approx(np.std(gaps, ddof=1))
    # a task in two runs is one unit: as many assignments as in one run
    assert pooled.conditions[0].smallest_p == pytest.approx(1 / 34650) == found.runs[0].test.conditions[0].smallest_p
    first = {t.task: t.depth for t in found.runs[0].test.tasks}
    second = {t.task: t.depth for t in found.runs[1].test.tasks}
    means = [np.mean([(first[t] + second[t]) / 24 for t in first if TYPES[t] == k]) for k in LEVELS]
    assert [t.depth for t in pooled.types] == pytest.approx(means)
    table = found.to_pandas()
    assert list(table["run"]) == ["base", "large", "pooled"]
    assert list(table["L1"]) == ["holds"] * 3


def test_a_claim_that_holds_here_and_fails_there_is_not_supported_together(tmp_path):
    path = published(tmp_path / "both.csv", centres=((2, 6, 10), (8, 6, 4)))
    found = localize(read_evidence(path, naming()), naming())
    assert [r.test.verdict for r in found.runs] == ["supported", "refuted"]
    assert found.pooled.verdict == "inconclusive"
    assert found.pooled.conditions[3].outcome == "fails"
    assert "Semantics is deeper than surface in 1 of 2 runs." in found.pooled.conditions[3].sentence
    assert "1 supported, 1 refuted" in found.pooled.sentence
    assert found.pooled.sd > 0.5


def test_models_of_different_depth_are_pooled_on_the_shallower_ones_blocks():
    tests = [
        localization_test((), CLAIM, effects=effects_from_table(causal_table(blocks=b, state=b), source="x"))
        for b in (12, 24)
    ]
    pooled = pool(tests, CLAIM)
    assert pooled.verdict == "supported"
    assert pooled.types[0].blocks == (0, 4)
    own = [np.mean([sum(s.shares[: t.num_blocks // 3]) for s in t.shares if s.level == "surface"]) for t in tests]
    assert pooled.types[0].share == pytest.approx(np.mean(own))
    assert math.isnan(pooled.mean)
    chosen = Hypothesis(types=tuple(KnowledgeType(n) for n in LEVELS), held_out="items")
    halves = [
        localization_test((), chosen, effects=effects_from_table(causal_table(state=s, halves=2), source="x"))
        for s in (0, 1)
    ]
    assert {t.verdict for t in halves} == {"supported"}
    assert "ranges were chosen in each run" in pool(halves, chosen).conditions[1].sentence


def test_the_plan_comes_from_numbers_of_tasks_alone(planted):
    (evidence,) = read_evidence(planted.folder, CLAIM)
    unreadable = replace(evidence, results=None)  # no scores to look at
    for e in (evidence, unreadable):
        ((name, plan),) = announce([e], CLAIM)
        assert (name, plan.counts) == ("planted", (4, 4, 4))
        assert plan.smallest_p == {"L1": pytest.approx(1 / 34650)}


# ---------------------------------------------------------------- command


def test_the_command_prints_power_first_and_writes_everything(tmp_path, planted):
    causal_table().to_csv(tmp_path / "skipped.csv", index=False)
    out = tmp_path / "out"
    shown = invoke(planted.folder, "--causal", tmp_path / "skipped.csv", "--out", out, "-q").stdout
    assert shown.index("smallest reachable p") < shown.index("supported")
    assert f"digest {CLAIM.digest[:16]}" in shown
    assert "L3: smallest reachable p 0.043. Power at a difference of" in shown
    for name in (
        "verdict.json",
        "localization.md",
        "localization.csv",
        "localization.png",
        "hypothesis.yaml",
        "run.json",
    ):
        assert (out / name).stat().st_size > 0, name
    page = (out / "localization.md").read_text()
    for piece in (
        CLAIM.digest,
        "What could be found",
        "| L2 | holds |",
        "| syntax | supported | 4 |",
        "Hase et al. 2023",
    ):
        assert piece in page, piece
    again = LocalizationRuns.load(out)
    assert again.to_dict() == json.loads((out / "verdict.json").read_text())
    assert again.hypothesis == CLAIM == Hypothesis.load(out / "hypothesis.yaml")
    assert json.loads((out / "run.json").read_text())["hypothesis_digest"] == CLAIM.digest
    first = (out / "verdict.json").read_bytes()
    invoke(planted.folder, "--causal", tmp_path / "skipped.csv", "--out", out, "-q")
    assert (out / "verdict.json").read_bytes() == first


def test_a_dry_run_stops_before_any_score_and_json_is_one_document(tmp_path, planted):
    shown = invoke(planted.folder, "--dry-run", "--out", tmp_path / "no").stdout
    assert "smallest reachable p" in shown
    assert "Verdict supported (L1 holds, nothing refuted; L4 aside): power at a difference of 1 layers, sd 1:" in shown
    assert "This supports" not in shown
    assert not (tmp_path / "no").exists()
    path = published(tmp_path / "both.csv")
    mine = naming().save(tmp_path / "mine.yaml")
    content = json.loads(invoke(path, "-H", mine, "--out", tmp_path / "out", "--json", "-q").stdout)
    assert [r["verdict"] for r in content["runs"]] == ["supported"] * 2
    assert content["pooled"]["verdict"] == "supported"
    assert content["hypothesis_digest"] == naming().digest


def test_a_printed_hypothesis_is_a_file_to_edit(tmp_path):
    (tmp_path / "mine.yaml").write_text(invoke("--print-hypothesis").stdout)
    assert Hypothesis.load(tmp_path / "mine.yaml") == CLAIM


def test_help_has_examples():
    shown = " ".join(invoke("--help").stdout.split())
    assert "spafit localize runs/english runs/german runs/french --hypothesis mine.yaml" in shown
    assert "--dry-run" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence", "status"),
    [
        ((), "Name a folder of spafit-probe", 2),
        (("none",), "none does not exist", 1),
        (("empty",), "neither a folder of spafit-probe", 1),
        (("table.csv",), "neither the column 'layer' .* nor 'blocks_start'.*it has a, b", 1),
        (("weights.csv",), "mixing weights", 1),
        (("bad.parquet",), "cannot be read as a table", 1),
        (("table.csv", "-H", "bert"), "neither a file that can be read", 2),
        (("twice.csv", "twice.csv"), "is given twice", 2),
    ],
)
def test_bad_input_is_one_sentence_and_a_status(arguments, sentence, status, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "weights.csv").write_text("task,layer,softmax_weight\nx,0,0.5\nx,1,0.5\n")
    causal_table().to_csv(tmp_path / "twice.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["spafit", "localize", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_guarded(app)
    assert caught.value.code == status
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ")
    assert len(printed.strip().splitlines()) == 1
    import re

    assert re.search(sentence, printed), printed


def test_the_figure_has_a_row_per_run_and_refuses_nothing_to_draw(tmp_path):
    found = localize(read_evidence(published(tmp_path / "both.csv"), naming()), naming())
    axis = plot_runs(found)
    assert [t.get_text() for t in axis.get_yticklabels()] == ["base", "large"]
    assert [t.get_text() for t in axis.texts] == ["supported", "supported"]
    effects = effects_from_table(causal_table(), source="x")
    alone = localization_test((), CLAIM, effects=effects)
    with pytest.raises(SpafitError, match="nothing to draw"):
        plot_runs(replace(found, runs=(replace(found.runs[0], test=alone),)))


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published curves are not here")
def test_published_curves_are_tested_and_pooling_moves_the_verdict(tmp_path):
    best = Hypothesis.load("best-layer")
    (jawahar,) = localize(read_evidence(REFERENCE / "jawahar2019_table2_bert_base_uncased_cls.csv", best), best).runs
    l1 = jawahar.test.conditions[0]
    assert [t.depth * 12 for t in jawahar.test.types] == pytest.approx([3.5, 22 / 3, 8.6])  # as published
    assert l1.smallest_p == pytest.approx(2 / 2520)  # two tasks share a best layer
    logs = localize(read_evidence(REFERENCE / "sentevalinfo_bert_probing_acc.csv", best), best)
    by_name = {r.name: r.test for r in logs.runs}
    assert len(by_name) == 8
    assert [t.depth * 12 for t in by_name["bert-base-uncased, mean"].types] == pytest.approx([0.5, 17 / 3, 8.0])
    assert [t.depth * 12 for t in by_name["bert-base-uncased, first"].types] == pytest.approx([7.5, 19 / 3, 8.4])
    signs = {n: t.conditions[0].number > 0 for n, t in by_name.items()}
    assert signs["bert-base-uncased, mean"]
    assert len({t.verdict for t in by_name.values()}) > 1
    edge = Hypothesis.load("edge-probing")
    tenney = localize(read_evidence(REFERENCE / "tenney2019_cumulative_dev_f1.csv", edge), edge)
    assert {r.test.verdict for r in tenney.runs} == {"supported"}


def test_parts_of_the_items_get_verdicts_of_their_own_and_unstable_tasks_none(tmp_path):
    """Half of the items show the claimed order, the others the reversed one."""
    claimed = planted_run(tmp_path / "claimed", poolings=("mean",), probes=("linear",))
    turned = planted_run(tmp_path / "turned", centres=(10, 6, 2), poolings=("mean",), probes=("linear",), state=1)
    items = {}
    for task in claimed.tasks:
        parts = [r.items(task).assign(kind=k) for r, k in ((claimed, "claimed"), (turned, "turned"))]
        named = [p.assign(item=p["item"].astype(str) + e, group=p["group"].astype(str) + e)
                 for p, e in zip(parts, "ab", strict=True)]  # fmt: skip
        items[task] = pd.concat(named, ignore_index=True)
    folder = replace(claimed, item_tables=items).save(tmp_path / "mixed")
    claim = default_hypothesis()
    (whole,) = read_evidence(folder, claim)
    parts = {e.name: e for e in parts_of([whole], "kind", least_items=20)}
    assert list(parts) == ["kind claimed", "kind turned"]
    verdicts = {r.name: r.test for r in localize(list(parts.values()), claim).runs}
    assert verdicts["kind claimed"].verdict == "supported"
    assert verdicts["kind turned"].verdict == "refuted"
    with pytest.raises(UsageError, match="by 'colour'"):
        parts_of([whole], "colour")

    with pytest.raises(UsageError, match="one probe only, linear"):
        parts_of([whole], "probe")
    both = planted_run(tmp_path / "both", turned="first", seeds=1, probes=("linear",), spread=0.2)
    split = localize(parts_of(read_evidence(both.folder, claim), "pooling"), claim)
    assert [(r.name, r.test.verdict) for r in split.runs] == [
        ("pooling mean", "supported"), ("pooling first", "refuted"),
    ]  # fmt: skip

    first = claimed.tasks[0]
    io.write_json(folder / "sensitivity.json", {"blocks": 12, "unstable": {first: "it moves"}})
    (again,) = read_evidence(folder, claim)
    assert first not in {c.task for c in again.curves()}
    assert first not in {t for r in again.readings() for t in r.depths}
    assert first in {c.task for c in whole.given} | {t for t in whole.levels}
    assert announce([again], claim)[0][1].counts == (3, 4, 4)
    assert localize([again], claim).runs[0].notes == (f"Left out as unstable: {first}: it moves.",)


def test_published_curves_without_an_order_are_seldom_supported(tmp_path):
    random, claim, supported = np.random.default_rng(3), naming(), 0
    for world in range(100):
        columns = {t: np.where(np.arange(13) >= round(6 + random.normal()), 80.0, 50.0) for t, _ in TASKS}
        path = tmp_path / f"world{world}.csv"
        pd.DataFrame({"layer": range(13), **columns}).to_csv(path, index=False)
        supported += localize(read_evidence(path, claim), claim).runs[0].test.verdict == "supported"
    assert supported <= 11  # .05 of 100, and two and a half binomial standard deviations


def test_seeds_that_share_one_fit_are_one_reading(planted):
    tables = {t: planted.items(t) for t in planted.tasks}
    shared = {t: i[(i["control"] != "none") | (i["seed"] == 0)] for t, i in tables.items()}
    readings = readings_of(replace(planted, item_tables=shared))
    assert [r.name for r in readings if r.kind == "seed"] == ["0"]
    found = stability(readings, TYPES, CLAIM)
    assert not found.tested
    assert "3 seeds instead of 1" in found.sentence
