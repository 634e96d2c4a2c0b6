"""The pages of results are made from their rows, and say where a row has no score."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from tests.paths import ROOT

SCRIPT = ROOT / "docs" / "results" / "glue_minilm" / "run.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="runs in a checkout, not beside a wheel")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, writing into a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("glue_minilm_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


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
