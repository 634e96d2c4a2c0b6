"""The pages of results are made from their rows, and say where a row has no score."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from analysis.retention import retention_table
from spafit.language_models import graft
from tests.paths import ROOT
from tests.test_lens import FIT, HELD_OUT
from tests.test_retention import language

RESULTS = ROOT / "docs" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="runs in a checkout, not beside a wheel")


def load(study: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of a study, writing into ``folder``."""
    spec = importlib.util.spec_from_file_location(f"{study}_run", RESULTS / study / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", folder)
    return module


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the GLUE study, writing into a folder of the test's own."""
    return load("glue_minilm", tmp_path, monkeypatch)


def page(script: ModuleType, changes: dict[tuple[float, int], dict[str, float]]) -> str:
    """The page of one task and plan at two rates, the second of which is better on the held-out share."""
    rows = [
        {"task": "cola", "method": "lora", "seed": seed, "split": "validation", "metric": "headline", "value": 0.6,
         "learning_rate": rate, "trainable": 1, "total": 4, "seconds": 1.0, "peak_memory_bytes": 1.0,
         "held_out": 0.5 if rate > 1e-3 else 0.4, **changes.get((rate, seed), {})}
        for rate in (5e-4, 2e-3) for seed in (0, 1, 2)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(script.HERE / "rows.csv", index=False)
    script.write_page()
    return str((script.HERE / "README.md").read_text(encoding="utf-8"))


def test_a_page_without_undefined_scores_does_not_speak_of_them(script: ModuleType) -> None:
    text = page(script, {})
    assert "| lora | 0.600 ± 0.000 |" in text
    assert "| 0.002 |" in text
    assert "ndefined" not in text


def test_undefined_scores_count_as_zero_and_are_named(script: ModuleType) -> None:
    text = page(script, {(2e-3, 1): {"value": float("nan")}})
    assert "| lora | 0.400 ± 0.346 |" in text
    assert "count as 0: 1 of 3 scores of cola, lora, learning rate 0.002.\n" in text


def test_a_rate_without_held_out_scores_is_not_chosen(script: ModuleType) -> None:
    text = page(script, {(2e-3, seed): {"held_out": float("nan"), "value": 0.9} for seed in (0, 1, 2)})
    assert "| lora | 0.600 ± 0.000 |" in text
    assert "| 0.0005 |" in text
    assert "count as 0: 3 of 3 held-out scores of cola, lora, learning rate 0.002." in text


@pytest.fixture
def retained() -> pd.DataFrame:
    """What a tiny masked model whose second block changed keeps, measured."""
    own = language("bert")
    body = copy.deepcopy(own.body)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if name.startswith("encoder.layer.1."):
                parameter.mul_(1.3)
    pairs = pd.DataFrame({"field": "syntax", "paradigm": ["x", "x", "y"], "good": ["the cat", "a dog", "dogs ran"],
                          "bad": ["cat the", "dog a", "ran dogs"]})  # fmt: skip
    return retention_table(
        own, graft(own, body), text=HELD_OUT[:150], pairs=pairs, refit_on=FIT, lens=True, window=20, n_boot=50
    )  # fmt: skip


@pytest.mark.parametrize("learnt", [True, False])
def test_the_page_of_the_masked_model_says_whether_it_learnt_a_language(
    retained: pd.DataFrame, learnt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("masked_lm", tmp_path, monkeypatch)
    rows = retained.assign(method="full")
    rows.to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame({"method": ["full"], "metric": "accuracy", "value": 0.625, "trainable": 12345}).to_csv(
        tmp_path / "training.csv", index=False
    )
    control = pd.DataFrame({"model": ["trained", "untrained", "token frequencies"]})
    control["bits_per_token"] = [8.0 if learnt else 9.5, 12.0, 9.25]
    control.assign(ci_low=1.0, ci_high=2.0, tokens=9, blimp_accuracy=[0.6, 0.5, None]).to_csv(
        tmp_path / "control.csv", index=False
    )
    script.write_page()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("needs 1.25 bits per token less" in text) == learnt
    assert ("what follows says nothing" in text) != learnt
    assert "| token frequencies | 9.250 [1.000 2.000] | – |" in text
    assert "| full | 0.625 | 12,345 | original |" in text
    kl = rows[rows["measure"] == "lens_kl_bits"].set_index("hidden")["value"]
    assert f"| change, full | 0 | 0 | {kl[2]:.3f} | {kl[3]:.3f} |" in text
    assert (tmp_path / "lens.png").stat().st_size > 10_000


def test_the_committed_page_of_the_masked_model_is_made_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("control.csv", "rows.csv", "training.csv"):
        shutil.copy(RESULTS / "masked_lm" / name, tmp_path / name)
    load("masked_lm", tmp_path, monkeypatch).write_page()
    committed, made = (f / "README.md" for f in (RESULTS / "masked_lm", tmp_path))
    assert made.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


# ---------------------------------------------------------------- remedies


@pytest.fixture
def remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of remedies, with planted rows of four methods in a folder of the test's own."""
    module = load("remedies_minilm", tmp_path, monkeypatch)
    pd.DataFrame([{"items": 10, "accuracy": 0.75}]).to_csv(tmp_path / "first.csv", index=False)
    planted = {"lora + kl 1": (180, 0.02), "lora": (180, 0.2), "head": (100, 0.0), "full": (120, 0.3)}
    for seed in (1, 0):  # not in the page's order
        for i, (method, (right, lost)) in enumerate(planted.items()):
            losses = [
                {"method": method, "seed": seed, "task": t, "hidden": 3, "pre": 0.9, "recoverable": 0.9 - lost,
                 "lost": lost + 1e-3 * ((k + i) % 3), "p_layers": 1.0}
                for k, t in enumerate((*module.TASKS, module.FIRST_TASK))
            ]  # fmt: skip
            run = {
                "method": method, "seed": seed, "accuracy": right / 200, "first_accuracy": 0.5, "trainable": 1000 + i,
                "learning_rate": 1e-3, "seconds": 5.0, "remedy_seconds_per_step": 0.25 * ("+" in method),
            }  # fmt: skip
            items = pd.DataFrame({"item": range(200), "right": [k < right for k in range(200)]})
            module._add("runs.csv", pd.DataFrame([run]))
            module._add("losses.csv", pd.DataFrame(losses))
            module._add("items.parquet", items.assign(method=method, seed=seed))
            gone = pd.DataFrame({"item": range(100), "lost": [int(k < 500 * lost) for k in range(100)]})
            module._add("first_items.parquet", gone.assign(method=method, seed=seed))
    return module


def test_the_page_of_remedies_says_what_was_planted(remedies: ModuleType) -> None:
    remedies.write_page()
    text = (remedies.HERE / "README.md").read_text(encoding="utf-8")
    at = [text.index(f"| {m} | 0.") for m in ("lora", "head", "full", "lora + kl 1")]
    assert at == sorted(at)
    found = (
        "on the front in 95 % of draws: head, lora + kl 1; dominated: lora (by lora + kl 1), full (by lora); all others"
    )
    for of in ("the generated tasks", "SST-2"):
        assert f"- By forgetting of {of}, {found} within noise." in text
    (against,) = [line for line in text.splitlines() if line.startswith("- lora + kl 1 minus lora alone, points:")]
    assert "score +0.0 [+0.0 +0.0], within noise; generated tasks lost -18.0 [" in against
    assert "SST-2 lost -90.0 [" in against
    assert "- Not run yet: bitfit, spafit-scaled-I, lora + l2sp 0.1," in text
    assert "| lora + kl 1 | 0.880 ± 0.000 | 0.500 ± 0.000 | 1,000 | 5 | 0.25 |" in text
    assert (remedies.HERE / "tradeoff.png").stat().st_size < 150_000


def test_rows_that_are_there_are_not_made_again(remedies: ModuleType) -> None:
    assert remedies._known("lora", 1)
    assert not remedies._known("lora", 2)
    assert not remedies._known("bitfit", 0)
    before = pd.read_csv(remedies.HERE / "runs.csv")
    remedies._add("runs.csv", before.iloc[:1])
    after = pd.read_csv(remedies.HERE / "runs.csv")
    key = ["method", "seed"]
    pd.testing.assert_frame_equal(
        before.sort_values(key).reset_index(drop=True), after.sort_values(key).reset_index(drop=True)
    )


@pytest.mark.parametrize(
    "study",
    [
        "localization_minilm", "published_localization", "remedies_minilm", "retention_smollm2", "schedule",
        "simulated_worlds", "spans", "structural",
    ],
)  # fmt: skip
def test_a_committed_page_is_made_of_its_rows(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RESULTS / study
    for file in [*folder.glob("*.csv"), *folder.glob("*.parquet")]:
        shutil.copy(file, tmp_path / file.name)
    load(study, tmp_path, monkeypatch).write_page()
    committed, made = (f / "README.md" for f in (folder, tmp_path))
    assert made.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
