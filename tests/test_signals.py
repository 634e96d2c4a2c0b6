"""Signals while training: the same weights to the bit, the share of time that is kept, rows after an interruption."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from spafit import io
from spafit.errors import UsageError
from spafit.fit_result import SIGNAL_COLUMNS, FitResult
from spafit.signals import Pace, Reading, Signal
from spafit.training import fit
from tests.tiny import save_tiny
from tests.training_fixtures import PLAN, QUICK, BrokenOff, breaking_off, same, task

ALL = 1000.0  # a share that never widens an interval


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_tiny("bert", folder)
    return folder


def train(bert: Path, out: Path, plan: Any = PLAN, *, signals: tuple[Signal, ...] = (), **changes: Any) -> FitResult:
    options = {k: changes.pop(k) for k in ("seeds", "resume") if k in changes}
    settings = replace(QUICK, **changes)
    return fit(
        str(bert), plan, data=task(), settings=settings, out=out, device="cpu", quiet=True, signals=signals, **options
    )


def restless(model: torch.nn.Module, step: int) -> dict[str, float]:
    """A forward pass that draws from every global generator and switches modes on its way."""
    assert not model.training
    assert not torch.is_grad_enabled()
    torch.randn(3)
    np.random.rand(3)  # noqa: NPY002
    random.random()
    model.train()
    ids = torch.arange(5, 25).reshape(2, 10)
    return {"logit": float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum())}


def weight_norm(model: torch.nn.Module, step: int) -> list[Reading]:
    """The trained weights' size; a row for each of two hidden states."""
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad)
    return [("size", 0, total), ("size", 1, 2 * total)]


# ---------------------------------------------------------------- training is left alone

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapter with dropout": (PLAN, {}),
    "prefix cached, best of the held-out": (PLAN, {"prefix_cache": "on", "select_share": 0.25}),
    "full": ("full", {"learning_rate": 1e-3}),
    "activations recomputed, accumulated": (PLAN, {"checkpoint_activations": True, "accumulate": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same_to_the_bit_with_and_without_signals(bert: Path, tmp_path: Path, variant: str) -> None:
    plan, changes = VARIANTS[variant]
    without = train(bert, tmp_path / "without", plan, **changes)
    signals = (Signal("restless", restless, every=1, share=ALL), Signal("size", weight_norm, every=1, share=ALL))
    watched = train(bert, tmp_path / "watched", plan, signals=signals, **changes)
    assert same(without.model_folder(), watched.model_folder())
    curves = [r.metrics[["step", "split", "metric", "value"]] for r in (without, watched)]
    pd.testing.assert_frame_equal(*curves)
    assert watched.signals is not None
    assert watched.signals["value"].nunique() > 4  # it saw the weights move


def test_a_signal_that_draws_would_change_training_if_it_were_not_for_the_guard(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    import spafit.signals

    @contextmanager
    def open_gate(model: torch.nn.Module) -> Iterator[None]:
        model.eval()
        with torch.no_grad():
            yield

    without = train(bert, tmp_path / "without")
    monkeypatch.setattr(spafit.signals, "untouched", open_gate)
    watched = train(bert, tmp_path / "watched", signals=(Signal("restless", restless, every=1, share=ALL),))
    assert not same(without.model_folder(), watched.model_folder())


def test_modes_and_generators_are_put_back_even_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr, index]  # noqa: NPY002

    def measure(model: Any, step: int) -> dict[str, float]:
        assert not model[1].training
        restless_numbers = model(torch.randn(1, 2)).sum() + random.random() + np.random.rand()  # noqa: NPY002
        return {"x": float(restless_numbers) / step}

    with pytest.raises(ZeroDivisionError):
        Signal("x", measure).read(model, 0)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]  # noqa: NPY002
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- which steps, and what is written


def test_values_are_of_the_steps_that_they_name(bert: Path, tmp_path: Path) -> None:
    result = train(bert, tmp_path / "run", signals=(Signal("size", weight_norm, every=5, share=ALL),), seeds=(0, 3))
    assert result.signals is not None
    assert list(result.signals.columns) == list(SIGNAL_COLUMNS)
    assert list(result.signals["step"].unique()) == [0, 5, 10, 12]  # 24 items, 4 a step, two epochs
    assert list(result.signals["seed"].unique()) == [0, 3]
    assert result.signals.groupby(["seed", "step", "signal", "hidden"]).size().eq(1).all()
    assert result.signals.query("step == 5")["epoch"].iloc[0] == pytest.approx(5 / 6)
    for _, own in result.signals.query("hidden == 0").groupby("seed"):
        assert (np.diff(own["value"]) != 0).all()
    loaded = FitResult.load(tmp_path / "run")
    pd.testing.assert_frame_equal(loaded.signals, result.signals)  # type: ignore[arg-type]
    written = pd.read_csv(tmp_path / "run" / "signals.csv")
    np.testing.assert_allclose(written["value"], result.signals["value"])
    record = io.read_json(tmp_path / "run" / "run.json")
    assert [(s["seed"], s["name"], s["measured"]) for s in record["signals"]] == [(0, "size", 4), (3, "size", 4)]
    assert any("size measured at 4 steps" in note for note in record["notes"])


def test_the_weights_that_are_kept_are_measured_too(bert: Path, tmp_path: Path) -> None:
    signals = (Signal("size", weight_norm, every=100, share=ALL),)
    result = train(bert, tmp_path / "run", signals=signals, select_share=0.25, epochs=4, learning_rate=0.05)
    best = io.read_json(tmp_path / "run" / "seed-0" / "run.json")["best_step"]
    last = int(result.runs["steps"].iloc[0])
    assert result.signals is not None
    assert set(result.signals["step"]) == {0, best, last}


def test_numbers_without_a_hidden_state_have_none(bert: Path, tmp_path: Path) -> None:
    result = train(bert, tmp_path / "run", signals=(Signal("r", restless, share=ALL),))
    assert result.signals is not None
    assert result.signals["hidden"].isna().all()
    assert list(result.signals["step"]) == list(range(13))  # a fiftieth of twelve steps is each of them


@pytest.mark.parametrize("step", [9, 3])
def test_an_interrupted_run_goes_on_without_losing_or_doubling_a_row(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    signals = (Signal("size", weight_norm, every=1, share=ALL), Signal("r", restless, every=3, share=ALL))
    whole = train(bert, tmp_path / "whole", signals=signals, save_steps=4)
    repair = breaking_off(monkeypatch, step)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path / "broken", signals=signals, save_steps=4)
    repair()
    left = io.read_table(tmp_path / "broken" / "seed-0" / "signals")
    assert left["step"].max() == step - 1
    resumed = train(bert, tmp_path / "broken", signals=signals, save_steps=4)
    assert same(resumed.model_folder(), whole.model_folder())
    keys = ["step", "signal", "hidden"]
    tables = [t.signals.sort_values(keys, ignore_index=True) for t in (whole, resumed)]  # type: ignore[union-attr]
    pd.testing.assert_frame_equal(*tables)


def test_a_run_that_goes_on_shows_the_signal_the_weights_before_training(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def remember(model: torch.nn.Module, step: int) -> list[Reading]:
        rows = weight_norm(model, step)
        seen.append((step, rows[0][2]))
        return rows

    signals = (Signal("size", remember, every=4, share=ALL),)
    repair = breaking_off(monkeypatch, 9)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path / "run", signals=signals, save_steps=4)
    repair()
    train(bert, tmp_path / "run", signals=signals, save_steps=4)
    starts = [value for step, value in seen if step == 0]
    assert [step for step, _ in seen] == [0, 4, 8, 0, 12]
    assert starts[0] == starts[1]


def test_a_finished_seed_is_not_trained_again_for_a_signal_and_says_so(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(bert, tmp_path / "run")
    assert first.signals is None
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    signals = (Signal("size", weight_norm),)
    options: dict[str, Any] = {"data": task(), "settings": QUICK, "out": tmp_path / "run", "device": "cpu"}
    again = fit(str(bert), PLAN, signals=signals, **options)
    assert again.signals is None
    assert "finished without size" in " ".join(capsys.readouterr().err.split())
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    watched = fit(str(bert), PLAN, signals=signals, resume=False, quiet=True, **options)
    assert watched.signals is not None
    assert same(watched.model_folder(), first.model_folder())
    fit(str(bert), PLAN, signals=signals, **options)
    assert "finished without" not in capsys.readouterr().err
    unwatched = fit(str(bert), PLAN, resume=False, quiet=True, **options)
    assert unwatched.signals is None
    assert FitResult.load(tmp_path / "run").signals is None  # nothing of the earlier training is left


def test_the_seconds_of_measuring_are_not_the_trainings(bert: Path, tmp_path: Path) -> None:
    import time

    def slow(model: torch.nn.Module, step: int) -> dict[str, float]:
        time.sleep(0.5)
        return {"x": 1.0}

    result = train(bert, tmp_path / "run", signals=(Signal("slow", slow, every=1, share=ALL),))
    (record,) = result.run["signals"]
    assert record["seconds"] >= 13 * 0.5
    assert result.runs["seconds"].iloc[0] < 4


# ---------------------------------------------------------------- the share of time


def run_at(pace: Pace, *, step_seconds: float, cost: float) -> None:
    """Go through a training on a clock of its own."""
    pace.add(0, cost)
    for step in range(1, pace.total + 1):
        if pace.due(step, seconds=step * step_seconds):
            pace.add(step, cost)


@pytest.mark.parametrize(("cost", "measured"), [(0.0, 101), (0.05, 101), (2.0, 50), (10.0, 10), (40.0, 2), (99.0, 2)])
def test_the_interval_is_widened_until_the_share_is_kept(cost: float, measured: int) -> None:
    pace = Pace(0.1, every=10, total=1000, reserved=1)
    run_at(pace, step_seconds=1.0, cost=cost)
    assert abs(len(pace.steps) - measured) <= 1
    assert pace.steps[0] == 0
    assert pace.steps[-1] == 1000
    assert all(step % 10 == 0 for step in pace.steps)
    assert pace.spent <= 0.1 * 1000 or len(pace.steps) == 2  # start and end are made whatever they cost
    gaps = np.diff(pace.steps)
    assert gaps.max() - gaps.min() <= 10  # evenly


def test_a_cost_that_rises_later_is_made_up_for() -> None:
    pace = Pace(0.1, every=1, total=1000, reserved=1)
    pace.add(0, 1.0)
    for step in range(1, 1001):
        if pace.due(step, seconds=step * 1.0):
            pace.add(step, 1.0 if step < 300 else 5.0)
    assert pace.spent <= 100
    assert sum(s > 300 for s in pace.steps) >= 8


def test_without_a_bound_every_step_of_the_interval_is_measured() -> None:
    pace = Pace(ALL, every=7, total=30)
    run_at(pace, step_seconds=1.0, cost=50.0)
    assert pace.steps == [0, 7, 14, 21, 28, 30]


def test_a_costly_signal_says_what_happened(bert: Path, tmp_path: Path) -> None:
    import time

    def slow(model: torch.nn.Module, step: int) -> dict[str, float]:
        time.sleep(0.3)
        return {"x": 1.0}

    result = train(bert, tmp_path / "run", signals=(Signal("slow", slow, every=1),))
    assert result.signals is not None
    assert list(result.signals["step"]) == [0, 12]
    (note,) = (n for n in result.run["notes"] if "slow measured" in n)
    assert "widened from 1 to up to 12 steps to stay within 10 %" in note
    assert "more than its share" in note


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [({"every": 0}, "every 0 steps"), ({"share": 0.0}, "above 0"), ({"share": float("nan")}, "above 0")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Signal("x", weight_norm, **options)


@pytest.mark.parametrize("answer", [3.0, [("a", 1)], {"a": "high"}, None])
def test_what_is_no_reading_is_one_sentence(answer: Any) -> None:
    signal = Signal("odd", lambda model, step: answer)
    with pytest.raises(UsageError, match=r"The signal odd gave \w+ at step 7"):
        signal.read(torch.nn.Linear(1, 1), 7)


def test_names_that_collide_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one name"):
        train(bert, tmp_path / "a", signals=(Signal("x", weight_norm), Signal("x", restless)))
    with pytest.raises(UsageError, match="both give 'size'"):
        train(bert, tmp_path / "b", signals=(Signal("x", weight_norm), Signal("y", weight_norm)))
