"""`compare` on small chains: zeros where nothing changed, the probing runs' own numbers, folders, errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from analysis.cli.main import app
from analysis.comparing import compare
from analysis.comparison import Comparison, stage_scores
from analysis.comparison_report import write_comparison_report
from analysis.forgetting import DIFFERENCES
from analysis.sequence import forgetting_matrix, sequence_summaries
from probing.running import probe_layers
from spafit.errors import DataError, ModelError, UsageError
from tests.tiny import save_tiny, tiny, tiny_tokenizer

WORDS = ["the", "cat", "dog", "sees", "a", "big", "and", "runs", "old", "dogs", "running", "walked"]


def table_of(folder: Path, n: int = 420) -> str:
    """A sentence task that the words decide: which of two animals comes first."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(n):
        label = int(rng.integers(2))
        pair = ["cat", "dog"] if label else ["dog", "cat"]
        rows.append((" ".join([*rng.choice(WORDS, 3), pair[0], *rng.choice(WORDS, 2), pair[1]]), "ab"[label]))
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(folder / "order.tsv", sep="\t", index=False)
    return f"table:{folder / 'order.tsv'},text=text,label=label"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model and three others: block 1 changed, rotated states after the last block, everything changed."""
    tokenizer, base = tiny_tokenizer(), tiny("bert")
    changed, all_changed = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        for parameter in changed.encoder.layer[1].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        for parameter in all_changed.parameters():
            parameter.add_(0.2)
    return {"base": (base, tokenizer), "changed": (changed, tokenizer), "all": (all_changed, tokenizer)}


@pytest.fixture(scope="module")
def found(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("compare")
    return compare(
        models["base"], [models["changed"], models["base"]], labels=["changed", "same"], tasks=[table_of(folder)],
        seeds=2, n_boot=100, out=folder / "out", cache_dir=folder / "cache", quiet=True,
    )  # fmt: skip


def test_hidden_states_below_the_first_changed_block_are_exactly_zero(found: Comparison) -> None:
    assert found.run["models"]["changed"]["unchanged"] == 2
    rows = found.forgetting[found.forgetting["term"].isin(DIFFERENCES)]
    below = rows[(rows["model"] == "changed") & (rows["hidden"] < 2)]
    same = rows[rows["model"] == "same"]
    for own in (below, same):
        assert len(own)
        assert (own[["value", "ci_low", "ci_high"]] == 0).all(axis=None)
        assert (own["p"] == 1).all()
    above = rows[(rows["model"] == "changed") & (rows["hidden"] >= 2)]
    assert (above["value"] != 0).any()


def test_they_are_not_probed_again(found: Comparison) -> None:
    after = pd.read_parquet(found.folder / "after" / "changed" / "scores.parquet")
    assert sorted(after["hidden"].unique()) == [2, 3]
    assert not (found.folder / "after" / "same").exists()


def test_the_identity_holds_everywhere(found: Comparison) -> None:
    wide = found.forgetting.pivot_table(
        index=["model", "task", "split", "metric", "control", "hidden"], columns="term", values="value", dropna=False
    )
    wide = wide.dropna(subset=["aligned"])
    assert len(wide)
    gap = wide["pre"] - wide["transfer"] - wide["lost"] - wide["moved"] - wide["re-encoded"]
    assert gap.abs().max() < 1e-9
    assert (wide["total"] - wide["pre"] + wide["transfer"]).abs().max() < 1e-9


def test_readings_are_the_scores_of_the_probing_runs(found: Comparison) -> None:
    own = found.to_pandas(metric="accuracy", control="none")
    for term, folder in (("pre", "before"), ("recoverable", "after/changed")):
        scores = pd.read_parquet(found.folder / folder / "scores.parquet")
        scores = scores[(scores["control"] == "none") & scores["seed"].isna() & (scores["metric"] == "accuracy")]
        for hidden in (2, 3):
            expected = scores[scores["hidden"] == hidden]["value"].iloc[0]
            row = own[(own["model"] == "changed") & (own["term"] == term) & (own["hidden"] == hidden)]
            assert row["value"].iloc[0] == pytest.approx(expected, abs=1e-12)


def test_stored_probes_score_their_own_states_as_the_run_did(models: dict[str, Any], found: Comparison) -> None:
    from analysis.readings import Side, _Arrays
    from probing.config import ProbeConfig
    from probing.item_states import rows_of_items
    from probing.planning import plan_probing
    from probing.transfer import stored_probes

    config = json.loads((found.folder / "before" / "run.json").read_text())["config"]
    config = {k: v for k, v in config.items() if v is not None}
    plan = plan_probing(ProbeConfig.from_dict(config, where="run"), model=models["base"])
    side = Side("b", plan, None, plan.out, 0, "")
    (task,) = plan.tasks
    store = side.store(task.corpus.name)
    rows, usable = rows_of_items(plan, task, store)
    probes = stored_probes(plan.out, task, plan.settings, usable=usable, site="block", pooling="mean")
    items = pd.read_parquet(plan.out / "items" / f"{task.name}.parquet")
    test = np.flatnonzero(~task.items["split"].isin(["train", "dev"]).to_numpy())
    arrays = _Arrays(items, (0, 1, 2, 3))
    for control in {c for c, _, _ in probes}:
        expected = arrays.of(control)
        for i, seed in enumerate(sorted({s for c, s, _ in probes if c == control})):
            states = store.sentences("mean", hidden=3, rows=rows[test, 0])
            for m, got in enumerate(probes[control, seed, 3].scores(states, test)):
                assert np.allclose(got, expected[m, i, 3], atol=1e-5)


def test_the_same_call_goes_on_from_what_is_there(
    models: dict[str, Any], found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probing import running

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(running, "fit_task", never)
    again = compare(
        models["base"], [models["changed"], models["base"]], labels=["changed", "same"],
        tasks=[table_of(found.folder.parent)], seeds=2, n_boot=100, out=found.folder,
        cache_dir=found.folder.parent / "cache", quiet=True,
    )  # fmt: skip
    pd.testing.assert_frame_equal(again.forgetting, found.forgetting)
    loaded = Comparison.load(found.folder)
    pd.testing.assert_frame_equal(loaded.forgetting, found.forgetting)


def test_the_page_holds_everything_and_loads_nothing(found: Comparison) -> None:
    page = write_comparison_report(found)[0].read_text()
    assert "changed: hidden states 2 to 3 changed, 0 to 1 are as before" in page
    assert "no hidden state differs from those before training" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "src=" not in page
    assert (found.folder / "figures" / "forgetting.png").read_bytes()[:4] == b"\x89PNG"


def test_run_folders_are_compared_with_their_models_or_by_their_tables(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "base")
    model = save_tiny("bert", tmp_path / "tuned")
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight.add_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    task = table_of(tmp_path)
    for name in ("base", "tuned"):
        probe_layers(
            str(tmp_path / name), [task], seeds=1, n_boot=100, controls=("word-type",), out=tmp_path / f"run-{name}",
            cache_dir=tmp_path / "cache", quiet=True,
        )  # fmt: skip
    options: dict[str, Any] = {"n_boot": 100, "cache_dir": tmp_path / "cache", "quiet": True}
    whole = compare(tmp_path / "run-base", [tmp_path / "run-tuned"], out=tmp_path / "a", **options)
    assert whole.forgetting["term"].isin(["aligned"]).any()
    rows = whole.to_pandas()
    assert rows[(rows["term"] == "transfer")]["value"].notna().all()
    (tmp_path / "tuned" / "model.safetensors").unlink()
    tables = compare(tmp_path / "run-base", [tmp_path / "run-tuned"], out=tmp_path / "b", **options)
    rows = tables.to_pandas()
    assert rows[(rows["term"] == "transfer")]["value"].isna().all()
    assert "cannot be had" in tables.paragraphs()[0]
    both = [t.to_pandas().query("term == 'lost' and hidden == 3")["value"].iloc[0] for t in (whole, tables)]
    assert both[0] == pytest.approx(both[1], abs=1e-12)


def test_bad_input_is_one_sentence(models: dict[str, Any], tmp_path: Path) -> None:
    task = table_of(tmp_path)
    options: dict[str, Any] = {"out": tmp_path / "out", "cache_dir": tmp_path / "cache", "seeds": 1, "quiet": True}
    deep = (tiny("bert", num_hidden_layers=4), tiny_tokenizer())
    with pytest.raises(UsageError, match=r"4 blocks and .* has 3"):
        compare(models["base"], [deep], tasks=[task], **options)
    with pytest.raises(UsageError, match="different names"):
        compare(models["base"], [models["all"]], labels=["a", "b"], tasks=[task], **options)
    trained = tmp_path / "train" / "seed-0" / "model"
    trained.mkdir(parents=True)
    with pytest.raises(UsageError, match="seed-0/model"):
        compare(models["base"], [str(tmp_path / "train")], tasks=[task], **options)


def test_other_widths_give_the_loss_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    wide = tiny("bert", hidden_size=24, num_attention_heads=2)
    found = compare(
        (tiny("bert"), tokenizer), [(wide, tokenizer)], tasks=[table_of(tmp_path)], seeds=1, n_boot=100,
        out=tmp_path / "out", cache_dir=tmp_path / "cache", quiet=True,
    )  # fmt: skip
    rows = found.to_pandas()
    assert rows[rows["term"] == "lost"]["value"].notna().all()
    assert rows[rows["term"] == "moved"]["value"].isna().all()
    assert "probes do not transfer" in found.paragraphs()[0]


def test_the_command_prints_the_table_and_writes_the_page(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "base")
    model = save_tiny("bert", tmp_path / "tuned")
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight.add_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    arguments = [
        "compare", tmp_path / "base", tmp_path / "tuned", "--tasks", table_of(tmp_path), "--seeds", "1", "--controls",
        "word-type", "--n-boot", "100", "--out", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--quiet",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "| tuned | order |" in result.stdout
    assert "tuned: hidden states 3 to 3 changed" in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    again = CliRunner().invoke(app, [*(str(a) for a in arguments), "--json"])
    content = json.loads(again.stdout)
    assert content["summary"][0]["model"] == "tuned"


def test_retention_is_measured_with_the_original_head(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "base", auto="AutoModelForMaskedLM")
    model = save_tiny("bert", tmp_path / "tuned", auto="AutoModelForMaskedLM")
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight[::2].add_(0.5)  # of all rows, the norm would take it back
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 6))
    options: dict[str, Any] = {
        "tasks": [table_of(tmp_path)], "seeds": 1, "n_boot": 100, "controls": (), "out": tmp_path / "out",
        "cache_dir": tmp_path / "cache", "quiet": True, "drift": False,
    }  # fmt: skip
    (tmp_path / "other.txt").write_text(" ".join(WORDS[::-1] * 10))
    text: dict[str, Any] = {"text": tmp_path / "text.txt", "refit_on": tmp_path / "other.txt", "lens": True}
    found = compare(str(tmp_path / "base"), [str(tmp_path / "tuned")], **text, **options)
    assert found.retention is not None
    changes = found.retention[found.retention["measure"] == "lens_kl_bits"].set_index("hidden")["value"]
    assert (changes.loc[[0, 1, 2]] == 0).all()  # block 2 changed, so hidden state 3
    assert changes.loc[3] > 1e-4
    kl = found.retention[found.retention["measure"] == "kl_bits"]["value"].iloc[0]
    assert kl > 1e-4
    page = write_comparison_report(found)[0].read_text()
    assert "Retention" in page
    assert "what each hidden state says of the next token" in page
    with pytest.raises(UsageError, match="give both refit_on and text"):
        compare(str(tmp_path / "base"), [str(tmp_path / "tuned")], text=tmp_path / "text.txt", lens=True, **options)
    save_tiny("bert", tmp_path / "headless")
    with pytest.raises(ModelError, match="without a language-model head"):
        compare(str(tmp_path / "headless"), [str(tmp_path / "tuned")], text=tmp_path / "text.txt", **options)
    with pytest.raises(UsageError, match="the built-in default has none"):
        compare(None, [str(tmp_path / "tuned")], text=tmp_path / "text.txt", **options)
    with pytest.raises(DataError, match="cannot be read"):
        compare(str(tmp_path / "base"), [str(tmp_path / "tuned")], text=tmp_path / "none.txt", **options)


# ---------------------------------------------------------------- sequences


def test_the_published_scalars_of_a_sequence_by_hand() -> None:
    scores = pd.DataFrame(
        [("before", "a", 0.5), ("before", "b", 0.4), ("A", "a", 0.9), ("A", "b", 0.5), ("B", "a", 0.7), ("B", "b", 0.8),
         ("C", "a", 0.6), ("C", "b", 0.75)],
        columns=["stage", "task", "value"],
    )  # fmt: skip
    matrix = forgetting_matrix(scores)
    assert list(matrix.index) == ["before", "A", "B", "C"]
    got = sequence_summaries(matrix, {"A": "a", "B": "b"})
    assert got["backward_transfer"] == pytest.approx(0.7 - 0.9)
    assert got["average_forgetting"] == pytest.approx(0.9 - 0.7)
    scores = pd.concat(
        [
            scores.assign(),
            pd.DataFrame([(s, "c", 0.1) for s in ("before", "A", "B", "C")], columns=["stage", "task", "value"]),
        ]
    )
    got = sequence_summaries(forgetting_matrix(scores), {"A": "a", "B": "b", "C": "c"})
    assert got["backward_transfer"] == pytest.approx(((0.6 - 0.9) + (0.75 - 0.8)) / 2)
    assert got["average_forgetting"] == pytest.approx(((0.9 - 0.6) + (0.8 - 0.75)) / 2)
    with pytest.raises(UsageError, match="not in the matrix"):
        sequence_summaries(matrix, {"A": "z"})


def test_stage_scores_come_from_a_comparison(found: Comparison) -> None:
    matrix = forgetting_matrix(stage_scores(found))
    assert list(matrix.index) == ["before", "changed", "same"]
    assert matrix.loc["same"].equals(matrix.loc["before"])


def test_numbers_are_compared_in_bits_by_every_family(models: dict[str, Any], tmp_path: Path) -> None:
    from tests.test_running import number_task

    found = compare(
        models["base"], models["changed"], tasks=[number_task()], seeds=1, n_boot=100, controls=("word-type",),
        drift=False, out=tmp_path / "compared", cache_dir=tmp_path / "cache", quiet=True,
    )  # fmt: skip
    assert set(found.forgetting["metric"]) == {"bits"}
    before = found.forgetting.query("term == 'pre'")["value"]
    assert len(before)
    assert np.isfinite(before).all()
    lost = found.summary()["lost"].iloc[0]
    assert found.to_markdown() == found.to_markdown(metric="bits")
    write_comparison_report(found)
    page = (tmp_path / "compared" / "report.html").read_text()
    assert f"{lost:+.3f}" in page
    assert "bits saved per item" in page
    assert "points of accuracy" not in page
    with pytest.raises(UsageError, match="Tasks of numbers are compared in bits"):
        found.to_markdown(metric="accuracy")
