"""Training: an interrupted run ends as an uninterrupted one, only what is declared moves, what is reported is right."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from spafit import checkpoint, io
from spafit.adapt import apply_strata, canonical_name, canonical_parameters
from spafit.batches import Collator, EpochOrder, encode
from spafit.data.training import TrainData
from spafit.errors import DataError, ModelError, NumericalError, OutputError, SpafitError, UsageError
from spafit.fit_result import METRIC_COLUMNS, RUN_COLUMNS, FitResult
from spafit.heads import load_with_head
from spafit.predictions import predict_logits
from spafit.runtime import torch_seed
from spafit.settings import TrainSettings
from spafit.strata import Outside, StrataConfig, Stratum
from spafit.stratum import LoraOptions
from spafit.trainer import StratifiedTrainer, last_checkpoint, training_arguments
from spafit.training import fit
from tests.tiny import save_tiny, tiny_tokenizer
from tests.training_fixtures import PLAN, QUICK, BrokenOff, breaking_off, frame, is_key_bias, same, task, weights


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_tiny("bert", folder)
    return folder


def train(bert: Path, out: Path, plan: Any = PLAN, *, data: TrainData | None = None, **changes: Any) -> FitResult:
    """Train quickly on the CPU; ``changes`` are of the settings, or arguments of ``fit``."""
    options = {k: changes.pop(k) for k in ("seeds", "remedies", "resume", "method") if k in changes}
    settings = replace(QUICK, **changes)
    return fit(str(bert), plan, data=data or task(), settings=settings, out=out, device="cpu", quiet=True, **options)


def make_trainer(bert: Path, out: Path, plan: Any = PLAN, **changes: Any) -> StratifiedTrainer:
    headed = load_with_head(str(bert), labels=("cat", "dog"), seed=0)
    with torch_seed(0):
        stratified = apply_strata(headed.model, plan)
    settings = replace(QUICK, **changes)
    arguments = training_arguments(settings, out, seed=0, device="cpu", select=False)
    train = encode(frame(24, 1), headed.tokenizer, max_length=16, regression=False)
    return StratifiedTrainer(stratified, settings, arguments, train=train, tokenizer=headed.tokenizer)


# ---------------------------------------------------------------- interrupted runs

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapter, random order": (PLAN, {"group_by_length": False}),
    "adapter, by length": (PLAN, {"group_by_length": True}),
    "adapter, prefix cached": (PLAN, {"prefix_cache": "on"}),
    "adapter, best of the held-out": (PLAN, {"select_share": 0.25, "epochs": 3}),
    "adapter, accumulated": (PLAN, {"accumulate": 2, "epochs": 5}),
    "full": ("full", {"learning_rate": 1e-3}),
    "full, best of the held-out": ("full", {"learning_rate": 1e-3, "select_share": 0.25, "epochs": 3}),
    "prefix with dropout, activations recomputed": (PLAN, {"prefix_dropout": True, "checkpoint_activations": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", [9, pytest.param(5, marks=pytest.mark.slow)])  # in the second epoch, and in the first
def test_a_run_that_was_broken_off_ends_with_the_same_weights_to_the_bit(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, step: int
) -> None:
    plan, changes = VARIANTS[variant]
    whole = train(bert, tmp_path / "whole", plan, save_steps=2, **changes)
    repair = breaking_off(monkeypatch, step)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path / "broken", plan, save_steps=2, **changes)
    repair()
    seed = tmp_path / "broken" / "seed-0"
    assert io.read_json(seed / "run.json")["status"] == "running"
    assert last_checkpoint(seed) == seed / f"checkpoint-{(step - 1) // 2 * 2}"
    resumed = train(bert, tmp_path / "broken", plan, save_steps=2, **changes)
    assert same(resumed.model_folder(), whole.model_folder())
    pd.testing.assert_series_equal(resumed.runs["value"], whole.runs["value"])
    assert resumed.runs["steps"].iloc[0] == whole.runs["steps"].iloc[0]
    assert not list(seed.glob("checkpoint-*"))


def test_dropout_is_on_so_that_the_bits_say_something(bert: Path, tmp_path: Path) -> None:
    trainer = make_trainer(bert, tmp_path)
    batch = Collator(trainer.tokenizer_to_save)([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    losses = {float(trainer.compute_loss(trainer.model, batch).detach()) for _ in range(3)}
    assert len(losses) == 3


_CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.training_fixtures import PLAN, QUICK, task
from dataclasses import replace
from spafit.training import fit
from spafit.trainer import StratifiedTrainer

original, how, plan, out = StratifiedTrainer.training_step, *sys.argv[1:4]
def training_step(self, *args, **kwargs):
    loss = original(self, *args, **kwargs)
    if self.state.global_step + 1 == 9:
        os.kill(os.getpid(), getattr(signal, how))
    return loss
StratifiedTrainer.training_step = training_step
settings = replace(QUICK, save_steps=2, learning_rate=1e-3)
fit({bert!r}, PLAN if plan == "adapter" else plan, data=task(), settings=settings, out=out, device="cpu", quiet=True)
"""


@pytest.mark.parametrize("plan", ["adapter", pytest.param("full", marks=pytest.mark.slow)])
def test_after_kill_9_the_same_call_ends_with_the_same_weights_to_the_bit(
    bert: Path, tmp_path: Path, plan: str
) -> None:
    chosen = PLAN if plan == "adapter" else plan
    whole = train(bert, tmp_path / "whole", chosen, save_steps=2, learning_rate=1e-3)
    script = _CHILD.format(root=str(Path(__file__).parent.parent), bert=str(bert))
    command = [sys.executable, "-c", script, "SIGKILL", plan, str(tmp_path / "killed")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    seed = tmp_path / "killed" / "seed-0"
    assert sorted(p.name for p in seed.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    resumed = train(bert, tmp_path / "killed", chosen, save_steps=2, learning_rate=1e-3)
    assert same(resumed.model_folder(), whole.model_folder())


@pytest.mark.parametrize("left", ["nothing", "half a state", "no state"])
def test_a_half_written_checkpoint_is_not_used(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    whole = train(bert, tmp_path / "whole", save_steps=2)
    repair = breaking_off(monkeypatch, 7)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path / "broken", save_steps=2)
    repair()
    seed = tmp_path / "broken" / "seed-0"
    newest = seed / "checkpoint-6"
    state = newest / "trainer_state.json"
    if left == "half a state":
        state.write_text(state.read_text()[:100])
    elif left == "no state":
        state.unlink()
    else:
        for file in newest.iterdir():
            file.unlink()
    assert last_checkpoint(seed) == seed / "checkpoint-4"
    assert same(train(bert, tmp_path / "broken", save_steps=2).model_folder(), whole.model_folder())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"select_share": 0.25}, marks=pytest.mark.slow),
        pytest.param({"epochs": 0.5}, marks=pytest.mark.slow),
        {"select_share": 0.25, "patience": 1, "epochs": 9, "learning_rate": 1e-6},
    ],
)
def test_a_run_that_dies_after_its_last_step_is_finished_without_another_one(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    from spafit import seed_run

    whole = train(bert, tmp_path / "whole", save_steps=2, **changes)

    def stop(*args: Any) -> None:
        raise BrokenOff

    with monkeypatch.context() as patch:
        patch.setattr(seed_run, "_write", stop)
        with pytest.raises(BrokenOff):
            train(bert, tmp_path / "broken", save_steps=2, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(StratifiedTrainer, "training_step", stop)
        resumed = train(bert, tmp_path / "broken", save_steps=2, **changes)
    assert same(resumed.model_folder(), whole.model_folder())
    assert resumed.runs["steps"].equals(whole.runs["steps"])
    assert (resumed.runs["seconds"] > 0).all()
    pd.testing.assert_frame_equal(resumed.metrics, whole.metrics)


def test_an_interrupted_run_stops_early_where_an_uninterrupted_one_does(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"select_share": 0.25, "patience": 3, "epochs": 9, "learning_rate": 1e-6, "save_steps": 2}
    whole = train(bert, tmp_path / "whole", **changes)
    repair = breaking_off(monkeypatch, 6)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path / "broken", **changes)
    repair()
    resumed = train(bert, tmp_path / "broken", **changes)
    assert resumed.runs["steps"].iloc[0] == whole.runs["steps"].iloc[0] == 8  # evaluations at 2, and at 4, 6, 8 in vain
    assert same(resumed.model_folder(), whole.model_folder())


def test_a_folder_that_moved_goes_on(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"select_share": 0.25, "epochs": 3, "learning_rate": 1e-6, "save_steps": 2}  # an early one is best
    whole = train(bert, tmp_path / "whole", **changes)
    repair = breaking_off(monkeypatch, 14)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path / "before", **changes)
    repair()
    (tmp_path / "before").rename(tmp_path / "after")
    resumed = train(bert, tmp_path / "after", **changes)
    assert io.read_json(tmp_path / "after" / "seed-0" / "run.json")["best_step"] < 14  # before it broke off
    assert same(resumed.model_folder(), whole.model_folder())


def test_another_plan_in_the_same_folder_is_one_sentence(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking_off(monkeypatch, 5)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path, save_steps=2)
    kept = sorted(tmp_path.rglob("*"))
    for other, what in (
        ({"plan": "bitfit"}, "another plan"),
        ({"learning_rate": 1e-3}, "learning_rate .*, not 0.001"),
        ({"data": task(28)}, "other data"),
    ):
        with pytest.raises(OutputError, match=f"holds another run: {what}. .* --no-resume"):
            train(bert, tmp_path, save_steps=2, **other)
    assert sorted(tmp_path.rglob("*")) == kept


def test_another_base_under_the_same_plan_is_noticed_even_if_everything_trains(bert: Path, tmp_path: Path) -> None:
    train(bert, tmp_path / "run", "full", learning_rate=1e-3)
    save_tiny("bert", tmp_path / "other", seed=1)
    with pytest.raises(OutputError, match="holds another run"):
        train(tmp_path / "other", tmp_path / "run", "full", learning_rate=1e-3)


def test_a_finished_run_is_returned_without_training_and_without_a_changed_file(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(bert, tmp_path, seeds=(0, 1))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(StratifiedTrainer, "train", never)
    again = train(bert, tmp_path, seeds=(0, 1))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    pd.testing.assert_frame_equal(again.runs, first.runs)
    assert again.run["created_at"] == first.run["created_at"]


def test_a_further_seed_leaves_the_finished_ones(bert: Path, tmp_path: Path) -> None:
    train(bert, tmp_path, seeds=(0,))
    stamp = (tmp_path / "seed-0" / "model" / "adapter_model.safetensors").stat().st_mtime_ns
    result = train(bert, tmp_path, seeds=(0, 1))
    assert (tmp_path / "seed-0" / "model" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert result.seeds == (0, 1)
    assert FitResult.load(tmp_path).seeds == (0, 1)


def test_starting_over_removes_runs_only(bert: Path, tmp_path: Path) -> None:
    train(bert, tmp_path / "run")
    train(bert, tmp_path / "run", learning_rate=1e-3, resume=False)
    other = tmp_path / "mine" / "seed-0"
    other.mkdir(parents=True)
    (other / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="something else than a training run"):
        train(bert, tmp_path / "mine", resume=False)
    assert (other / "thesis.txt").is_file()


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StratifiedTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StratifiedTrainer, "training_step", poisoned)
    with pytest.raises(
        NumericalError, match=r"not finite \(nan\) at step 7 of 12.*kept: .*checkpoint-6.*learning rate"
    ):
        train(bert, tmp_path, save_steps=2)
    kept = weights(tmp_path / "seed-0" / "checkpoint-6")
    assert all(t.isfinite().all() for t in kept.values())


def test_weights_that_are_not_finite_are_never_saved(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if step.calls == 3:  # type: ignore[attr-defined]
            self.param_groups[0]["params"][0].data.fill_(float("inf"))
        step.calls += 1  # type: ignore[attr-defined]
        return found

    step.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(NumericalError, match=r"weights .* not finite after step 4 of 12.*checkpoint-2"):
        train(bert, tmp_path, save_steps=2)
    assert [p.name for p in (tmp_path / "seed-0").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_huge_learning_rate_ends_in_one_sentence(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        train(bert, tmp_path, "full", learning_rate=1e30, save_steps=100, max_grad_norm=0.0)


@pytest.mark.parametrize("plan", ["adapter", "full"])
@pytest.mark.parametrize("limit", [600, 20_000])
def test_a_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(
    bert: Path, tmp_path: Path, plan: str, limit: int
) -> None:
    """Files beyond a size fail to be written as on a full disk: small ones at once, or the optimiser's state only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    chosen = PLAN if plan == "adapter" else plan
    size = limit if plan == "adapter" else 5 * limit
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(OutputError, match=r"[Cc]annot (be )?writ"):
            train(bert, tmp_path, chosen, save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert not list(tmp_path.rglob(".*.safetensors"))
    train(bert, tmp_path, chosen, save_steps=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": TrainData("t", {"train": frame(8, 0)}, ("cat", "dog"), ("accuracy",))}, "labelled split to score"),
        ({"data": TrainData("t", {"validation": frame(8, 0)}, ("cat", "dog"), ("accuracy",))}, "needs a train split"),
        (
            {
                "data": TrainData(
                    "t",
                    {"train": frame(8, 0).assign(label=[np.nan] + [1.0] * 7), "validation": frame(8, 1)},
                    ("cat", "dog"),
                    ("accuracy",),
                )
            },
            "1 of 8 training items have no label",
        ),
        ({"seeds": ()}, "different numbers"),
        ({"seeds": (1, 1)}, "different numbers"),
        ({"patience": 1, "select_share": 0.01}, "Raise select_share"),
        ({"class_weights": True, "data": task(regression=True)}, "regression"),
        ({"plan": "spafit-2-9-I"}, "3"),
        ({"track": ("tensorboard",)}, "pip install tensorboard"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    from spafit import settings

    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(SpafitError, match=sentence) as caught:
        train(bert, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("run.json"))


def test_a_folder_that_cannot_be_made_is_one_sentence(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(bert, tmp_path / "file" / "out")


# ---------------------------------------------------------------- what trains, and how


def test_the_trainer_changes_exactly_the_declared_tensors(bert: Path, tmp_path: Path) -> None:
    for number, plan in enumerate((PLAN, "norm", "head", "full")):
        config = plan if isinstance(plan, StrataConfig) else preset(bert, plan)
        trainer = make_trainer(bert, tmp_path / str(number), config, epochs=1.0, prefix_dropout=True)
        named = dict(trainer.stratified.model.named_parameters())
        before = {n: p.detach().clone() for n, p in named.items()}
        trainer.train()
        moved = {canonical_name(n) for n, p in named.items() if not p.detach().equal(before[n])}
        declared = set(trainer.stratified.trainable)
        assert {n for n in moved if not is_key_bias(n)} == {n for n in declared if not is_key_bias(n)}
        assert moved <= set(trainer.stratified.trainable)


def preset(bert: Path, name: str) -> StrataConfig:
    from spafit.adapt import plan_for

    return plan_for(load_with_head(str(bert), labels=("cat", "dog")).model, name)


def test_rates_and_decays_of_each_part_reach_its_parameters(bert: Path, tmp_path: Path) -> None:
    plan = StrataConfig(
        model_id="tiny",
        blocks={"encoder": 3},
        strata=(
            Stratum("encoder", (0, 1), "full", learning_rate=1e-5, weight_decay=0.3),
            Stratum("encoder", (1, 2), "bitfit", learning_rate=1e-4, weight_decay=0.2),
            Stratum("encoder", (2, 3), "lora+norm", lora=LoraOptions(rank=2), learning_rate=1e-3),
        ),
        outside=Outside(pooler="bitfit", head="full", learning_rate=1e-2),
    )
    trainer = make_trainer(bert, tmp_path, plan, weight_decay=0.1, learning_rate=1.0)
    optimizer = trainer.create_optimizer()
    names = {id(p): canonical_name(n) for n, p in trainer.model.named_parameters()}
    got = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert set(got) == set(trainer.stratified.trainable)
    layer = "bert.encoder.layer"
    assert got[f"{layer}.0.attention.self.query.weight"] == (1e-5, 0.3)
    assert got[f"{layer}.0.attention.self.query.bias"] == (1e-5, 0.0)
    assert got[f"{layer}.0.attention.output.LayerNorm.weight"] == (1e-5, 0.0)
    assert got[f"{layer}.1.output.dense.bias"] == (1e-4, 0.2)  # nothing else trains there, so the decay is meant
    assert got[f"{layer}.2.attention.self.query.lora_A.weight"] == (1e-3, 0.1)
    assert got[f"{layer}.2.output.LayerNorm.weight"] == (1e-3, 0.0)
    assert got["bert.pooler.dense.bias"] == (1e-2, 0.0)
    assert got["classifier.weight"] == (1e-2, 0.1)
    assert got["classifier.bias"] == (1e-2, 0.0)


def test_a_step_moves_each_part_by_its_own_rate(bert: Path, tmp_path: Path) -> None:
    """AdamW's first step is the rate itself, in each entry with a gradient."""
    plan = StrataConfig(
        model_id="tiny",
        blocks={"encoder": 3},
        strata=(
            Stratum("encoder", (0, 1), "freeze"),
            Stratum("encoder", (1, 2), "bitfit", learning_rate=1e-4),
            Stratum("encoder", (2, 3), "bitfit", learning_rate=1e-3),
        ),
    )
    changes = {"schedule": "constant", "warmup": 0.0, "learning_rate": 1e-2, "epochs": 1 / 6}
    trainer = make_trainer(bert, tmp_path, plan, **changes)
    named = {canonical_name(n): p for n, p in trainer.model.named_parameters()}
    before = {n: p.detach().clone() for n, p in named.items()}
    trainer.train()
    assert trainer.state.global_step == 1
    for name, rate in (
        ("bert.encoder.layer.1.output.dense.bias", 1e-4),
        ("bert.encoder.layer.2.output.dense.bias", 1e-3),
        ("classifier.bias", 1e-2),
    ):
        assert float((named[name].detach() - before[name]).abs().max()) == pytest.approx(rate, rel=1e-3)


def test_the_prefix_cache_leaves_the_trained_weights_as_they_are(bert: Path, tmp_path: Path) -> None:
    """Dropout runs in the trained blocks alike; what was computed in batches of other widths is rounded differently."""
    results = [
        train(bert, tmp_path / cache, prefix_cache=cache, select_share=0.25, learning_rate=1e-3)
        for cache in ("on", "off")
    ]
    one, two = (weights(r.model_folder()) for r in results)
    apart = {n: float((one[n] - two[n]).abs().max()) for n in one}
    assert max(v for n, v in apart.items() if not is_key_bias(n)) < 1e-6, apart
    assert max(v for n, v in apart.items() if is_key_bias(n)) < 1e-4
    assert results[0].runs["value"].to_numpy() == pytest.approx(results[1].runs["value"].to_numpy())
    assert any("prefix cache on" in n for n in results[0].run["notes"])
    assert not (tmp_path / "on" / "seed-0" / "prefix").exists()
    assert io.read_json(tmp_path / "on" / "seed-0" / "run.json")["prefix_cache"]["bytes"] > 0


def test_bfloat16_trains_close_to_float32_with_and_without_the_cache(bert: Path, tmp_path: Path) -> None:
    """Rounding to 8 bits; the cache is built in the same mixed precision, so that it makes no further difference."""
    found = {
        name: weights(train(bert, tmp_path / name, learning_rate=1e-3, **changes).model_folder())
        for name, changes in {
            "float32": {},
            "plain": {"precision": "bfloat16"},
            "cached": {"precision": "bfloat16", "prefix_cache": "on"},
        }.items()
    }
    heads = {n: next(t for k, t in found[n].items() if k.endswith("classifier.weight")) for n in found}
    assert 0 < float((heads["plain"] - heads["float32"]).abs().max()) < 0.02
    assert heads["plain"].dtype == torch.float32
    assert float((heads["cached"] - heads["plain"]).abs().max()) < 1e-4
    # What is reported is what the saved model gives when it is loaded, in float32.
    stratified, tokenizer = checkpoint.load(tmp_path / "plain" / "seed-0" / "model"), tiny_tokenizer()
    items = encode(task().frames["validation"], tokenizer, max_length=16, regression=False)
    shares = np.exp(predict_logits(stratified.model, items, tokenizer))
    told = io.read_table(tmp_path / "plain" / "seed-0" / "predictions-validation")["p(dog)"]
    np.testing.assert_allclose(shares[:, 1] / shares.sum(1), told, atol=2e-6)


def test_every_item_of_a_step_weighs_the_same_however_it_is_cut_into_micro_batches(bert: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    outside = Outside(embeddings="full", pooler="full")
    everything = StrataConfig("tiny", {"encoder": 3}, (Stratum("encoder", (0, 3), "full"),), outside=outside)

    def gradients(batch_size: int, accumulate: int, weighted: bool) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                found.update({n: p.grad.clone() for n, p in given["model"].named_parameters() if p.grad is not None})

        trainer = make_trainer(bert, tmp_path, everything, batch_size=batch_size, accumulate=accumulate, epochs=1)
        for module in trainer.stratified.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if weighted:
            trainer.class_weights = torch.tensor([0.5, 3.0])
        trainer.add_callback(Look())
        trainer.train()
        return found

    for weighted in (False, True):
        whole = gradients(24, 1, weighted)
        for cut in ((12, 2), (16, 2), (10, 3)):  # 12 + 12, 16 + 8, 10 + 10 + 4
            got = gradients(*cut, weighted)
            off = sum(float((got[n] - whole[n]).square().sum()) for n in whole) ** 0.5
            assert off < 1e-5 * sum(float(g.square().sum()) for g in whole.values()) ** 0.5


def test_the_seconds_end_where_training_ends_and_begin_with_its_set_up(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spafit import seed_run

    clock, ahead = time.perf_counter, [0.0]

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            ahead[0] += seconds
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead[0])
    monkeypatch.setattr(seed_run, "_prefix_cache", taking(1000.0, seed_run._prefix_cache))
    monkeypatch.setattr(seed_run, "summarise", taking(100_000.0, seed_run.summarise))
    assert 1000 < float(train(bert, tmp_path, epochs=1, prefix_cache="on").runs["seconds"].iloc[0]) < 2000


def test_worker_processes_make_no_difference(bert: Path, tmp_path: Path) -> None:
    none, one = (train(bert, tmp_path / str(n), workers=n, epochs=1) for n in (0, 1))
    assert same(none.model_folder(), one.model_folder())


def test_recomputed_activations_give_the_same_gradients_and_only_trained_blocks_run_twice(
    bert: Path, tmp_path: Path
) -> None:
    gradients, calls, kept = [], {}, []
    for recompute in (False, True):
        trainer = make_trainer(bert, tmp_path)
        if recompute:
            from spafit.activations import checkpoint_trained_blocks

            assert checkpoint_trained_blocks(trainer.stratified) == 2
        for block in range(3):
            layer = trainer.stratified.model.get_base_model().bert.encoder.layer[block]

            def count(module: Any, args: Any, key: tuple[bool, int] = (recompute, block)) -> None:
                calls[key] = calls.get(key, 0) + 1

            layer.attention.self.register_forward_pre_hook(count)
        trainer.model.train()
        batch = Collator(trainer.tokenizer_to_save)([trainer.train_dataset[i] for i in range(8)])
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t)
        torch.manual_seed(0)
        with hooks:
            loss = trainer.compute_loss(trainer.model, batch)
        kept.append(sum(saved))
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(gradients[0][n], g, rtol=1e-6, atol=1e-8) for n, g in gradients[1].items())
    assert [calls[False, b] for b in range(3)] == [1, 1, 1]
    assert [calls[True, b] for b in range(3)] == [1, 2, 2]
    assert kept[1] < 0.5 * kept[0]


def test_items_come_in_an_order_of_seed_and_epoch_with_similar_lengths_together() -> None:
    lengths = np.random.default_rng(0).integers(3, 100, size=1003)
    order = EpochOrder(lengths, batch_size=8, seed=0, grouped=True)
    first = list(order)
    assert sorted(first) == list(range(1003)) == sorted(EpochOrder(lengths, batch_size=8, seed=0, grouped=False))
    assert first == list(order)
    order.epoch = 1
    assert list(order) != first
    assert first != list(EpochOrder(lengths, batch_size=8, seed=1, grouped=True))
    spread = np.mean([np.ptp(lengths[first[i : i + 8]]) for i in range(0, 1000, 8)])
    assert spread < 0.2 * np.mean([np.ptp(lengths[i : i + 8]) for i in range(0, 1000, 8)])
    firsts = lengths[first[0:1000:8]]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.3  # short and long batches come mixed
    assert sorted(EpochOrder(lengths[:3], batch_size=8, seed=0, grouped=True)) == [0, 1, 2]
    left_over = []
    for order.epoch in range(60):
        left_over += list(order)[1000:]
    assert abs(lengths[left_over].mean() - lengths.mean()) < 0.25 * lengths.std()  # not the longest of all


@pytest.mark.parametrize("plan", [PLAN, "full"])
def test_interpolation_is_swept_after_training_and_leaves_the_model_as_trained(
    bert: Path, tmp_path: Path, plan: Any
) -> None:
    options: dict[str, Any] = {"select_share": 0.25, "epochs": 4, "learning_rate": 3e-3, "data": task(48)}
    plain = train(bert, tmp_path / "plain", plan, **options)
    swept = train(bert, tmp_path / "swept", plan, interpolate=(0.0, 0.5, 1.0), seeds=(0, 1), **options)
    assert plain.interpolation is None
    assert same(plain.model_folder(), swept.model_folder())
    table = swept.interpolation
    assert table is not None
    assert set(table["split"]) == {"select", "validation"}
    assert set(table["seed"]) == {0, 1}
    scores = table.set_index(["seed", "share", "split", "metric"])["value"]
    told = swept.runs[swept.runs["seed"] == 1].set_index("metric")["value"]
    assert scores[1, 1.0, "validation", "accuracy"] == told["accuracy"]
    assert scores[1, 1.0, "validation", "macro_f1"] == told["macro_f1"]
    assert FitResult.load(tmp_path / "swept").interpolation.equals(table)
    assert swept.interpolation_to_markdown().splitlines()[0] == "| share of the training | held out | validation |"
    # The start with the trained head: what plain transformers gives with the base's weights below it.
    headed, model = load_with_head(str(bert), labels=("cat", "dog"), seed=1), checkpoint.load(swept.model_folder(1))
    own, trained = (
        canonical_parameters(headed.model),
        canonical_parameters(model.merge() if plan == PLAN else model.model),
    )
    with torch.no_grad():
        for name in own:
            if name.startswith("classifier."):
                own[name].copy_(trained[name])
    items = encode(task(48).frames["validation"], tiny_tokenizer(), max_length=16, regression=False)
    assert items.labels is not None
    right = (predict_logits(headed.model, items, tiny_tokenizer()).argmax(1) == items.labels).mean()
    assert scores[1, 0.0, "validation", "accuracy"] == right


def test_interpolation_of_a_plan_without_lines_is_refused_before_training(bert: Path, tmp_path: Path) -> None:
    config = replace(PLAN, strata=(Stratum("encoder", (0, 3), "dora", lora=LoraOptions(rank=2)),))
    with pytest.raises(ModelError, match="straight line"):
        train(bert, tmp_path, config, interpolate=(0.5,))
    assert not list(tmp_path.glob("seed-0/checkpoint-*"))
    with pytest.raises(UsageError, match="shares between 0"):
        replace(QUICK, interpolate=(1.5,))


def test_among_equal_scores_the_checkpoint_with_the_lower_loss_is_kept(bert: Path, tmp_path: Path) -> None:
    result = train(
        bert, tmp_path, "full", data=task(64), select_share=0.25, epochs=12, learning_rate=1e-3, save_steps=6
    )
    curves = result.metrics[result.metrics["split"] == "select"].pivot_table(
        index="step", columns="metric", values="value"
    )
    best = curves[curves["headline"] == curves["headline"].max()]
    assert len(best) > 1, "no tie"
    assert io.read_json(tmp_path / "seed-0" / "run.json")["best_step"] == best["loss"].idxmin()
    assert "selection" not in set(result.metrics["metric"])
    assert any("kept, chosen on 16 held-out items" in note for note in result.run["notes"])


# ---------------------------------------------------------------- tasks


def test_it_learns_what_can_be_learnt(bert: Path, tmp_path: Path) -> None:
    result = train(bert, tmp_path, "full", data=task(64), epochs=8, learning_rate=3e-3)
    assert result.runs.set_index("metric")["value"]["accuracy"] > 0.9


def test_class_weights_change_the_decision_on_rare_classes(bert: Path, tmp_path: Path) -> None:
    rare = task(60, share=0.1, scored=40)
    shares = {}
    for weighted in (False, True):
        out = tmp_path / str(weighted)
        train(bert, out, "head", data=rare, class_weights=weighted, epochs=4, learning_rate=3e-3)
        shares[weighted] = io.read_table(out / "seed-0" / "predictions-validation")["p(dog)"].mean()
    assert shares[False] < 0.35
    assert shares[True] > shares[False] + 0.1


def test_a_weighted_loss_is_a_mean_over_items_however_they_are_spread(bert: Path, tmp_path: Path) -> None:
    trainer = make_trainer(bert, tmp_path)
    trainer.class_weights = torch.tensor([0.5, 3.0])
    trainer.model.eval()
    items = [trainer.train_dataset[i] for i in range(8)]
    collate = Collator(trainer.tokenizer_to_save)
    with torch.no_grad():
        whole = float(trainer.compute_loss(trainer.model, collate(items)))
        halves = [float(trainer.compute_loss(trainer.model, collate(part))) for part in (items[:4], items[4:])]
    assert whole == pytest.approx(np.mean(halves), rel=1e-5)
    batch = collate(items)
    logits = trainer.model(**{k: v for k, v in batch.items() if k not in ("labels", "index")}).logits.detach()
    nll = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    assert whole == pytest.approx(float((trainer.class_weights[batch["labels"]] * nll).mean()), rel=1e-5)


def test_regression_predicts_values(bert: Path, tmp_path: Path) -> None:
    data = task(64, regression=True, pairs=True)
    result = train(bert, tmp_path, "full", data=data, epochs=8, learning_rate=3e-3, select_share=0.2)
    assert result.runs.set_index("metric")["value"]["pearson"] > 0.7
    table = io.read_table(tmp_path / "seed-0" / "predictions-validation")
    assert list(table) == ["idx", "label", "prediction"]


def test_an_undefined_score_is_never_the_best(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spafit.kinds import classification

    values = iter([float("nan"), 0.2, 0.1, *[0.5] * 9])
    monkeypatch.setattr(classification, "headline", lambda *a: next(values))
    train(bert, tmp_path, data=task(24, regression=True), select_share=0.25, epochs=3)
    assert io.read_json(tmp_path / "seed-0" / "run.json")["best_step"] == 10  # of 5, 10, 15: the second


def test_pairs_go_through_the_tokenizer_as_pairs(small_bert: Path) -> None:
    tokenizer = load_with_head(str(small_bert), labels=("a", "b")).tokenizer
    pairs = frame(5, 0, pairs=True)
    encoded = encode(pairs, tokenizer, max_length=64, regression=False)
    for row, item in zip(pairs.to_dict("records"), encoded.items, strict=True):
        assert item["input_ids"] == tokenizer(row["text"], row["text2"])["input_ids"]
        assert item["token_type_ids"].count(1) > 0


def test_texts_that_are_cut_are_counted(bert: Path, tmp_path: Path) -> None:
    long = frame(12, 0)
    long.loc[[2, 5, 7], "text"] = "the cat " * 30
    tokenizer = load_with_head(str(bert), labels=("a", "b")).tokenizer
    encoded = encode(long, tokenizer, max_length=16, regression=False)
    assert encoded.truncated == 3
    assert encoded.window == 16 == encoded.lengths.max()
    # Exactly as long as the window is not cut.
    exact = pd.DataFrame({"text": ["the " * 14], "label": [0]})
    assert encode(exact, tokenizer, max_length=16, regression=False).truncated == 0
    assert encode(long, tokenizer, max_length=1000, regression=False).window == 64  # the tokenizer's own
    data = task()
    frames = {"train": long, "validation": data.frames["validation"]}
    result = train(bert, tmp_path, data=replace(data, frames=frames))
    assert "3 of 12 training items were cut at 16 tokens" in result.run["notes"]
    assert not any("validation items were cut" in n for n in result.run["notes"])


def test_held_out_items_are_neither_trained_on_nor_reported(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {"train": [], "select": []}
    original = StratifiedTrainer.compute_loss

    def watch(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen["train" if model.training else "select"] += [tuple(r[r > 0].tolist()) for r in inputs["input_ids"]]
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StratifiedTrainer, "compute_loss", watch)
    unique = frame(40, 1)
    unique["text"] = [f"{t} {i}" for i, t in enumerate(unique["text"])]
    data = replace(task(), frames={"train": unique, "validation": frame(12, 2)})
    result = train(bert, tmp_path, data=data, select_share=0.25, epochs=3)
    trained, selected = set(seen["train"]), set(seen["select"])
    assert len(trained) == 30 == result.runs["train_items"].iloc[0]
    assert len(selected) == 10
    assert not trained & selected
    assert len(seen["train"]) == 3 * 30
    assert set(result.runs["split"]) == {"validation"}
    assert len(io.read_table(tmp_path / "seed-0" / "predictions-validation")) == 12


def test_the_best_checkpoint_is_the_one_that_is_saved_and_reported(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spafit import checkpoint
    from spafit.data.sampling import hold_out
    from spafit.metrics import compute_metrics
    from spafit.predictions import predict_logits, predicted

    states: dict[int, Any] = {}
    original = StratifiedTrainer._save_checkpoint

    def keep(self: Any, model: Any, trial: Any) -> None:
        states[self.state.global_step] = copy.deepcopy(checkpoint.adapter_state(self.stratified))
        original(self, model, trial)

    monkeypatch.setattr(StratifiedTrainer, "_save_checkpoint", keep)
    data = task(40)
    result = train(bert, tmp_path, data=data, select_share=0.3, epochs=6, learning_rate=3e-2)
    held = result.metrics.query("split == 'select' and metric == 'headline'")
    best = int(held.loc[held["value"].idxmax(), "step"])
    assert best == io.read_json(tmp_path / "seed-0" / "run.json")["best_step"]
    assert 0 < best < held["step"].max()  # otherwise this shows nothing
    saved = weights(result.model_folder())
    assert all(saved[n].equal(t) for n, t in states[best].items())
    # Read back and scored again, it gives what was reported, on the reported split and on the held-out one.
    loaded = checkpoint.load(result.model_folder())
    tokenizer = load_with_head(str(bert), labels=("cat", "dog")).tokenizer
    _, select = hold_out(data.frames["train"], 0.3, seed=0)
    for rows, reported in (
        (data.frames["validation"], result.runs.set_index("metric")["value"]["accuracy"]),
        (
            select,
            result.metrics.query(f"split == 'select' and metric == 'accuracy' and step == {best}")["value"].item(),
        ),
    ):
        encoded = encode(rows, tokenizer, max_length=16, regression=False)
        codes = predicted(predict_logits(loaded.model, encoded, tokenizer), regression=False)
        assert compute_metrics("accuracy", codes, rows["label"])["accuracy"] == pytest.approx(reported)


def test_tables_and_figure_have_what_is_documented(bert: Path, tmp_path: Path) -> None:
    result = train(bert, tmp_path, "spafit-scaled-I", seeds=(0, 1, 2), select_share=0.25)
    assert tuple(result.runs) == RUN_COLUMNS
    assert tuple(result.metrics) == METRIC_COLUMNS
    assert set(result.metrics["split"]) == {"train", "select", "validation"}
    assert {"loss", "learning_rate", "grad_norm"} <= set(result.metrics.query("split == 'train'")["metric"])
    assert set(result.metrics.query("split == 'select'")["metric"]) == {"loss", "accuracy", "macro_f1", "headline"}
    assert not result.metrics["value"].isna().any()
    assert len(result.runs) == 3 * 3
    summary = result.to_pandas().set_index("metric")
    values = result.runs.query("metric == 'accuracy'")["value"]
    assert summary.loc["accuracy", "mean"] == pytest.approx(values.mean())
    assert summary.loc["accuracy", "sd"] == pytest.approx(values.std(ddof=1))
    assert summary.loc["accuracy", "seeds"] == 3
    text = (tmp_path / "results.md").read_text()
    assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f} (3 seeds)" in text
    model = result.model_folder(1)
    assert result.runs["saved_bytes"].iloc[0] == (model / "adapter_model.safetensors").stat().st_size
    assert (result.runs["peak_memory_bytes"] > 1e6).all()
    assert (result.runs["seconds"] > 0).all()
    assert (tmp_path / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert io.read_json(tmp_path / "run.json")["seeds"] == [0, 1, 2]
    pd.testing.assert_frame_equal(FitResult.load(tmp_path).runs, result.runs)
    card = (model / "README.md").read_text()
    assert "validation accuracy" in card
    assert "spafit-scaled-I" in card or "bitfit" in card
    assert not same(result.model_folder(0), result.model_folder(1))


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.8, np.nan, 0.6), "0.700 ± 0.141 (defined for 2 of 3 seeds)"),
        ((0.8, np.nan), "0.800 (defined for 1 of 2 seeds)"),
        ((np.nan, np.nan), "undefined (defined for 0 of 2 seeds)"),
        ((np.nan,), "undefined (defined for 0 of 1 seed)"),
        ((0.8, 0.6), "0.700 ± 0.141 (2 seeds)"),
        ((0.8,), "0.800 (1 seed)"),
    ],
)
def test_undefined_scores_are_counted_out(values: tuple[float, ...], shown: str) -> None:
    cost = {"trainable": 1, "total": 4, "seconds": 1.0, "peak_memory_bytes": 1.0}
    runs = pd.DataFrame(
        [
            {"task": "t", "method": "m", "seed": seed, "split": "validation", "metric": "pearson", "value": v, **cost}
            for seed, v in enumerate(values)
        ]
    )
    result = FitResult(Path("nowhere"), {}, pd.DataFrame(), runs)
    assert f"| pearson | {shown} |" in result.to_markdown()
    summary = result.to_pandas().iloc[0]
    assert (summary["seeds"], summary["defined"]) == (len(values), np.isfinite(values).sum())


def test_equal_calls_give_equal_runs(bert: Path, tmp_path: Path) -> None:
    one, two = (train(bert, tmp_path / n, select_share=0.25, prefix_cache="on") for n in ("a", "b"))
    assert same(one.model_folder(), two.model_folder())
    pd.testing.assert_frame_equal(one.metrics, two.metrics)


def test_nothing_global_is_left_changed(bert: Path, tmp_path: Path) -> None:
    import random

    from transformers.utils import logging

    torch.manual_seed(7)

    def state() -> tuple[Any, ...]:
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), numpy, logging.get_verbosity()

    before = state()
    environment = dict(os.environ)
    train(bert, tmp_path)
    assert state() == before
    assert dict(os.environ) == environment


def test_memory_of_a_seed_is_released_before_the_next(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spafit import seed_run

    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    original = seed_run._run

    def watch(job: Any, kind: Any, stratified: Any, *args: Any) -> Any:
        alive.append(sum(r() is not None for r in models))
        models.append(weakref.ref(stratified.model))
        return original(job, kind, stratified, *args)

    monkeypatch.setattr(seed_run, "_run", watch)
    train(bert, tmp_path, seeds=(0, 1, 2))
    assert alive == [0, 0, 0]


def test_remedies_add_to_the_loss_and_their_price_is_recorded(bert: Path, tmp_path: Path) -> None:
    from spafit.retain import parse_remedy

    distances = {}
    for weight in ("0", "1000"):
        result = train(bert, tmp_path / weight, remedies=[parse_remedy(f"l2sp:{weight}")], learning_rate=1e-3)
        now = weights(result.model_folder())
        start = weights_of(bert)
        names = [n for n in now if n.endswith("layer.1.output.dense.bias")]
        assert names
        distances[weight] = float((now[names[0]] - start["encoder.layer.1.output.dense.bias"]).norm())
    assert distances["1000"] < 0.8 * distances["0"]
    assert result.run["remedies"] == ["l2sp:1000.0,heads=leave"]
    (price,) = result.run["remedy_price"]
    assert price["remedy"] == "l2sp"
    assert price["bytes"] > 0
    terms = result.metrics.query("metric == 'l2sp'")
    assert len(terms) == 6
    assert (terms["value"] >= 0).all()
    # The same remedy is the same run; another weight is another.
    train(bert, tmp_path / "1000", remedies=[parse_remedy("l2sp:1000")], learning_rate=1e-3)
    with pytest.raises(OutputError, match="holds another run"):
        train(bert, tmp_path / "1000", remedies=[parse_remedy("l2sp:1")], learning_rate=1e-3)


def weights_of(bert: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(bert / "model.safetensors")


def test_settings_are_checked(bert: Path) -> None:
    for changes, sentence in (
        ({"epochs": 0}, "epochs must be above 0"),
        ({"patience": 2, "select_share": 0.0}, "patience needs items"),
        ({"prefix_cache": "on", "prefix_dropout": True}, "prefix_dropout"),
        ({"track": ("comet",)}, "Trackers: tensorboard"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
    ):
        with pytest.raises(UsageError, match=sentence):
            TrainSettings(**changes)


def test_run_records_hold_plain_json(bert: Path, tmp_path: Path) -> None:
    train(bert, tmp_path)
    for path in (tmp_path / "run.json", tmp_path / "seed-0" / "run.json"):
        record = json.loads(path.read_text())
        assert record["schema_version"] == io.SCHEMA_VERSION
        assert record["settings"]["learning_rate"] == 1e-2


def test_data_without_a_class_in_training_is_refused_with_class_weights(bert: Path, tmp_path: Path) -> None:
    data = task(24, share=0.0)
    with pytest.raises((DataError, UsageError), match=r"does not occur|no item"):
        train(bert, tmp_path, data=data, class_weights=True)
