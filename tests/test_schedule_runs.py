"""Whole runs with a schedule: interrupted, guarded, against forgetting, cached, saved, and what goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from spafit import checkpoint, io
from spafit.errors import ConfigError, ModelError, SpafitError, UsageError
from spafit.scheduling import At, OnGradient, OnPlateau, OnSignal, Schedule
from spafit.scheduling.moving import Holding, undoes, union
from spafit.signals import Signal
from spafit.strata import Outside, StrataConfig, Stratum
from spafit.stratum import LoraOptions
from spafit.trainer import last_checkpoint
from spafit.training import fit
from tests.planted_training import PLANTED_BLOCKS, old_data, save_planted, sentences
from tests.test_schedule import WIDE, at, bert, train
from tests.tiny import save_tiny, tiny_inputs, tiny_tokenizer
from tests.training_fixtures import PLAN, BrokenOff, breaking_off, same, weights

__all__ = ["bert"]  # the fixture


def norms(model: nn.Module, step: int) -> dict[str, float]:
    """How large what trains has become; a reading that rises while training."""
    found = [p.detach().double().square().sum() for n, p in model.named_parameters() if "lora_B" in n]
    return {"size": float(sum(found)) ** 0.5}


SIZE = Signal("sizes", norms, every=2)
RESTORED = OnSignal("size", 1e-4, "rises", do="restore")

#: Name -> schedule, settings, whether it needs the signal, and the plan.
SCHEDULES: dict[str, tuple[Schedule, dict[str, Any]]] = {
    "ranks and boundaries": (
        Schedule((At(step=3, rank=4), At(step=5, boundaries=(1, 2)), At(step=7, rank=1), At(share=0.9, rank=3))),
        {"plan": PLAN},
    ),
    "unfreezing": (
        Schedule((OnPlateau("unfreeze", gain=1.0),), min_steps=2, cool_down=0),
        {"select_share": 0.25, "epochs": 3},
    ),
    "put back, and slower": (
        Schedule((RESTORED, OnSignal("size", 1e-4, "rises", do="slow")), min_steps=1, cool_down=0),
        {"signals": (SIZE,)},
    ),
    "gradients": (
        Schedule((OnGradient("rates", every=2), OnGradient("freeze", every=5, below=0.99)), min_steps=1, cool_down=0),
        {"plan": PLAN},
    ),
    "all of a model": (
        Schedule((OnGradient("freeze", every=2, below=0.999), At(step=6, learning_rate=1e-4)), min_steps=1),
        {"plan": "full", "learning_rate": 1e-3},
    ),
}


# ---------------------------------------------------------------- interrupted runs


@pytest.mark.parametrize("step", [9, 6, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_was_broken_off_in_mid_schedule_ends_with_the_same_weights_to_the_bit(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    schedule, changes = SCHEDULES[name]
    whole = train(bert, tmp_path / "whole", schedule=schedule, save_steps=2, **changes)
    repair = breaking_off(monkeypatch, step)
    with pytest.raises(BrokenOff):
        train(bert, tmp_path / "broken", schedule=schedule, save_steps=2, **changes)
    repair()
    begun = io.read_table(tmp_path / "broken" / "seed-0" / "schedule")
    resumed = train(bert, tmp_path / "broken", schedule=schedule, save_steps=2, **changes)
    assert same(resumed.model_folder(), whole.model_folder())
    assert whole.schedule is not None
    assert resumed.schedule is not None
    pd.testing.assert_frame_equal(resumed.schedule, whole.schedule)
    assert len(whole.schedule) > 1
    if step == 9:
        assert len(begun) > 0
    static = train(bert, tmp_path / "static", **{k: v for k, v in changes.items() if k != "signals"})
    assert not _equal(static, whole)  # the schedule did something


def _equal(one: Any, two: Any) -> bool:
    first, second = weights(one.model_folder()), weights(two.model_folder())
    return all(n in second and first[n].shape == second[n].shape and first[n].equal(second[n]) for n in first)


_CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from spafit.trainer import StratifiedTrainer
from tests.test_schedule import train
from tests.test_schedule_runs import SCHEDULES

original = StratifiedTrainer.training_step
def training_step(self, *args, **kwargs):
    loss = original(self, *args, **kwargs)
    if self.state.global_step + 1 == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
StratifiedTrainer.training_step = training_step
schedule, changes = SCHEDULES["ranks and boundaries"]
train(Path({bert!r}), Path(sys.argv[1]), schedule=schedule, save_steps=2, **changes)
"""


def test_after_kill_9_in_mid_schedule_the_same_call_ends_with_the_same_weights_to_the_bit(
    bert: Path, tmp_path: Path
) -> None:
    schedule, changes = SCHEDULES["ranks and boundaries"]
    whole = train(bert, tmp_path / "whole", schedule=schedule, save_steps=2, **changes)
    script = _CHILD.format(root=str(Path(__file__).parent.parent), bert=str(bert))
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    seed = tmp_path / "killed" / "seed-0"
    last = last_checkpoint(seed)
    assert last is not None
    assert last.name == "checkpoint-6"
    holds = StrataConfig.from_dict(checkpoint.read_config(last)["holds"])
    assert holds.boundaries() == (1, 2)  # of that moment
    assert [s.lora.rank for s in holds.strata if s.lora is not None] == [4]
    resumed = train(bert, tmp_path / "killed", schedule=schedule, save_steps=2, **changes)
    assert same(resumed.model_folder(), whole.model_folder())
    assert [s for s, _ in at(resumed, "rank")] == [3, 7, 11]


def test_another_schedule_in_the_same_folder_is_one_sentence(bert: Path, tmp_path: Path) -> None:
    train(bert, tmp_path, schedule=Schedule((At(step=3, rank=4),)))
    for other in (Schedule((At(step=4, rank=4),)), None):
        with pytest.raises(SpafitError, match=r"holds another run: another schedule\. Choose another --out"):
            train(bert, tmp_path, schedule=other)


# ---------------------------------------------------------------- the guard


def _floors(result: Any) -> list[tuple[int, int]]:
    rows = result.schedule
    return [(int(s), int(label.rpartition(" ")[2])) for s, label in zip(rows["step"], rows["label"], strict=True)]


def test_the_guard_against_thrash(bert: Path, tmp_path: Path) -> None:
    """Two rules that contradict each other at each evaluation: without a cool-down they thrash."""
    rules = (OnPlateau("unfreeze", start=1, gain=1.0), OnPlateau("freeze", keep=0, blocks=3, gain=1.0))
    how: dict[str, Any] = {"select_share": 0.25, "epochs": 5, "save_steps": 1}
    free = train(bert, tmp_path / "free", schedule=Schedule(rules, min_steps=1, cool_down=0), **how)
    floors = [f for _, f in _floors(free)]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(floors, floors[1:], floors[2:], strict=False))
    assert turns > 3
    cooled = train(bert, tmp_path / "cooled", schedule=Schedule(rules, min_steps=1, cool_down=999), **how)
    assert [f for _, f in _floors(cooled)] == [2, 1, 0]  # what the first rule began is not undone
    assert "its guard held back" in " ".join(cooled.run["notes"])
    spaced = train(bert, tmp_path / "spaced", schedule=Schedule(rules, min_steps=5, cool_down=0), **how)
    steps = [s for s, _ in _floors(spaced)][1:]
    assert len(steps) > 2
    assert (np.diff(steps) >= 5).all()
    assert np.diff([s for s, _ in _floors(free)][1:]).min() < 5
    few = train(bert, tmp_path / "few", schedule=Schedule(rules, min_steps=1, cool_down=0, most_changes=2), **how)
    assert _floors(few) == _floors(free)[:3]


def test_a_timetable_is_not_held_back(bert: Path, tmp_path: Path) -> None:
    rules = (At(step=2, rank=4), At(step=3, rank=2), At(step=4, rank=4))
    result = train(bert, tmp_path, schedule=Schedule(rules, min_steps=100, cool_down=100, most_changes=1))
    assert [s for s, _ in at(result, "rank")] == [2, 3, 4]


def test_undoing_is_seen_block_by_block() -> None:
    holding = Holding(WIDE)
    up, further = holding.with_floor("encoder", 1), holding.with_floor("encoder", 2)
    plans = [h.config(1.0) for h in (holding, up, further)]
    assert not undoes(*plans, rate=1.0)
    assert undoes(plans[0], plans[2], plans[1], rate=1.0)
    slower = holding.with_factors("encoder", {0: 0.5, 1: 0.5, 2: 0.5})
    mixed = holding.with_factors("encoder", {0: 0.25, 1: 0.5, 2: 0.6})
    assert undoes(plans[0], slower.config(1.0), mixed.config(1.0), rate=1.0)
    assert not undoes(plans[0], slower.config(1.0), slower.with_factors("encoder", {0: 0.25}).config(1.0), rate=1.0)
    assert not undoes(plans[0], plans[1], slower.with_floor("encoder", 1).config(1.0), rate=1.0)


# ---------------------------------------------------------------- forgetting, planted

#: Everything in the blocks trains, for the same task the upper block would do.
FORGETTING = StrataConfig(
    model_id="planted",
    blocks={"encoder": PLANTED_BLOCKS},
    strata=(
        Stratum(
            "encoder",
            (0, PLANTED_BLOCKS),
            "lora+bitfit",
            lora=LoraOptions(rank=8, targets=("query", "key", "value", "attention_output", "intermediate", "output")),
        ),
    ),
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    save_planted(folder)
    return folder


class Order:
    """Which animal comes first, read below the upper block by a readout that is fitted once, before training."""

    def __init__(self) -> None:
        self.readout: np.ndarray | None = None
        tokenizer = tiny_tokenizer()
        self.rows = [sentences(600, 21), sentences(400, 22)]
        self.batches = [tokenizer(r["text"].tolist(), padding=True, return_tensors="pt") for r in self.rows]

    def states(self, model: Any, i: int) -> np.ndarray:
        mask = self.batches[i]["attention_mask"][..., None]
        states = model(**self.batches[i], output_hidden_states=True).hidden_states[PLANTED_BLOCKS - 1]
        pooled = ((states * mask).sum(1) / mask.sum(1)).numpy()
        return np.hstack([pooled, np.ones((len(pooled), 1))])

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        if step == 0:
            signs = 2.0 * self.rows[0]["first"].to_numpy() - 1
            self.readout = np.linalg.lstsq(self.states(model, 0), signs, rcond=None)[0]
        right = (self.states(model, 1) @ self.readout > 0) == (self.rows[1]["first"].to_numpy() == 1)
        return {"order": float(right.mean())}


TOLERANCE = 0.05


def _forgetting_run(planted: Path, out: Path, schedule: Schedule | None) -> Any:
    from spafit.settings import TrainSettings

    settings = TrainSettings(
        epochs=12, batch_size=32, learning_rate=5e-3, max_length=16, prefix_cache="off", select_share=0.0
    )
    return fit(
        str(planted), FORGETTING, data=old_data(), settings=settings, out=out, device="cpu", quiet=True,
        signals=(Signal("order", Order(), every=4, share=100.0),), schedule=schedule,
    )  # fmt: skip


def _ends(result: Any) -> tuple[float, float, float]:
    """The kept ability before and after training, and the task's score."""
    order = result.signals.set_index("step")["value"]
    return float(order.loc[0]), float(order.iloc[-1]), float(result.runs["value"].iloc[0])


@pytest.fixture(scope="module")
def static(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _forgetting_run(planted, tmp_path_factory.mktemp("static"), None)


def test_the_rule_on_forgetting_stops_a_loss_that_the_static_plan_shows(
    planted: Path, static: Any, tmp_path: Path
) -> None:
    before, after, score = _ends(static)
    print(f"static: order {before:.3f} -> {after:.3f}, task {score:.3f}")
    assert before > 0.9
    assert after < before - 2 * TOLERANCE
    rule = OnSignal("order", TOLERANCE, "falls", do="restore", blocks=PLANTED_BLOCKS - 1)
    result = _forgetting_run(planted, tmp_path, Schedule((rule,)))
    kept_before, kept_after, kept_score = _ends(result)
    print(f"rule: order {kept_before:.3f} -> {kept_after:.3f}, task {kept_score:.3f}")
    assert kept_before == before
    assert kept_after >= before - TOLERANCE
    assert kept_score > score - 0.05
    assert kept_score > 0.9
    rows = result.schedule
    assert list(rows["what"]) == ["strata", "values"]
    assert f"[0, {PLANTED_BLOCKS - 1}) freeze" in rows["after"].iloc[0]
    assert "order fell by" in rows["reason"].iloc[0]


def test_a_tolerance_that_is_never_reached_changes_nothing_to_the_bit(
    planted: Path, static: Any, tmp_path: Path
) -> None:
    rule = OnSignal("order", 2.0, "falls", do="restore", blocks=PLANTED_BLOCKS - 1)
    result = _forgetting_run(planted, tmp_path, Schedule((rule, OnSignal("order", 2.0, "falls", do="slow"))))
    assert len(result.schedule) == 0
    assert same(result.model_folder(), static.model_folder())


# ---------------------------------------------------------------- the cache, and files


def test_the_prefix_cache_serves_only_what_no_rule_can_ever_train(bert: Path, tmp_path: Path) -> None:
    """The plan trains from block 1 on; the schedule begins above it and comes down to it, or lower."""
    down = Schedule((OnPlateau("unfreeze", gain=1.0),), min_steps=1, cool_down=0)
    how: dict[str, Any] = {"plan": PLAN, "schedule": down, "select_share": 0.25, "save_steps": 2}
    plain = train(bert, tmp_path / "plain", **how)
    cached = train(bert, tmp_path / "cached", prefix_cache="on", **how)
    assert "prefix cache on" in " ".join(cached.run["notes"])
    one, two = weights(plain.model_folder()), weights(cached.model_folder())
    for name, value in one.items():
        if "attention.self.key" not in name:  # gradients there are rounding alone
            assert torch.allclose(value, two[name], atol=1e-4), name
    lower = Schedule((At(step=6, boundaries=(0, 2)),))
    with pytest.raises(ModelError, match="block 0, or what comes before it, trains"):
        train(bert, tmp_path / "lower", PLAN, schedule=lower, prefix_cache="on")
    off = train(bert, tmp_path / "off", PLAN, schedule=lower, prefix_cache="auto")
    assert "prefix cache off" in " ".join(off.run["notes"])


def test_what_is_saved_says_what_holds_and_loads_here_and_with_plain_peft(bert: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from spafit.heads import load_with_head
    from spafit.peft_wrapping import quiet_peft

    schedule = Schedule((At(step=3, rank=4), At(step=6, boundaries=(2, 2)), At(step=9, rank=1)))
    result = train(bert, tmp_path, PLAN, schedule=schedule)
    folder = result.model_folder()
    loaded = checkpoint.load(folder)
    assert loaded.moment.plan is not None
    assert loaded.moment.plan.config.boundaries() == (2, 2)
    moving = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert moving
    assert not any(".layer.1." in n for n in moving)
    assert "now: encoder [0, 2) freeze; encoder [2, 3) lora+bitfit" in loaded.describe()
    assert "a schedule moves within this" in (folder / "README.md").read_text()
    headed = load_with_head(str(bert), labels=("cat", "dog"), seed=3)
    with quiet_peft():
        stock = PeftModel.from_pretrained(headed.model, str(folder)).eval()
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        expected = loaded.model.eval()(**inputs).logits
        assert torch.allclose(stock(**inputs).logits, expected, atol=1e-6)
        assert torch.allclose(loaded.merge()(**inputs).logits, expected, atol=1e-5)
    rank = {n: torch.linalg.matrix_rank(t) for n, t in weights(folder).items() if "layer.2" in n and "lora_A" in n}
    assert len(rank) == 3
    assert set(map(int, rank.values())) == {1}


def test_the_best_checkpoint_is_saved_with_the_plan_that_held_when_it_was_scored(bert: Path, tmp_path: Path) -> None:
    schedule = Schedule((At(step=4, boundaries=(1, 1)), At(step=8, boundaries=(2, 2))))
    result = train(bert, tmp_path, PLAN, schedule=schedule, select_share=0.25, save_steps=2, learning_rate=1e-7)
    best = io.read_json(tmp_path / "seed-0" / "run.json")["best_step"]
    assert best <= 8  # hardly anything moves, so that no late one is clearly better
    loaded = checkpoint.load(result.model_folder())
    assert loaded.moment.plan is not None
    assert loaded.moment.plan.config.boundaries() == ((1, 2) if best <= 4 else (1, 1))


def test_several_seeds_have_one_log_and_marks_on_the_curve(bert: Path, tmp_path: Path) -> None:
    result = train(bert, tmp_path, schedule=Schedule((At(step=3, rank=4),)), seeds=(0, 1))
    assert result.schedule is not None
    assert list(result.schedule["seed"]) == [0, 1]
    for seed in (0, 1):
        own = io.read_table(tmp_path / f"seed-{seed}" / "schedule")
        assert len(own) == 1
        assert (tmp_path / f"seed-{seed}" / "schedule.csv").is_file()
    assert result.run["schedule"]["rules"] == [{"at": {"step": 3}, "rank": 4}]
    axes = result.plot()
    assert [t.get_text() for t in axes.texts] == ["rank 2→4"] * 2
    again = type(result).load(tmp_path)
    assert again.schedule is not None
    pd.testing.assert_frame_equal(again.schedule, result.schedule)
    plain = train(bert, tmp_path / "plain")
    assert plain.schedule is None
    assert not plain.plot().texts


# ---------------------------------------------------------------- what goes wrong


def test_a_schedule_file_reads_back_and_plans_lie_beside_it(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "other.yaml")
    (tmp_path / "schedule.yaml").write_text(
        "schema_version: 1\nmin_steps: 5\nrules:\n"
        "  - {at: {share: 0.5}, boundaries: [1, 2], rank: 16, learning_rate: 1e-4}\n"
        "  - {at: {epoch: 2}, plan: other.yaml}\n"
        "  - {on: plateau, do: unfreeze, start: 2}\n"
        "  - {on: signal, reading: 'lost:core.tense', tolerance: 0.02, moves: rises, do: slow, factor: 0.25}\n"
        "  - {on: gradient, do: rates, every: 7}\n"
    )
    found = Schedule.load(tmp_path / "schedule.yaml")
    assert found == Schedule(
        (
            At(share=0.5, boundaries=(1, 2), rank=16, learning_rate=1e-4),
            At(epoch=2, plan=PLAN),
            OnPlateau("unfreeze", start=2),
            OnSignal("lost:core.tense", 0.02, "rises", do="slow", factor=0.25),
            OnGradient("rates", every=7),
        ),
        min_steps=5,
    )
    from spafit.scheduling.files import schedule_from_plain

    assert schedule_from_plain(found.to_dict()) == found


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("[]", "line 2, rules: the schedule has no rule"),
        ("\n  - {at: {step: 1, share: 0.5}, rank: 2}", "line 3, rules[0].at: got step and share; give one of"),
        ("\n  - {at: {step: 1}}", "line 3, rules[0].at: the entry changes nothing"),
        ("\n  - {at: {share: 1.5}, rank: 2}", "line 3, rules[0].at.share: got 1.5"),
        ("\n  - {at: {step: 5}, rank: 2}\n  - {at: {step: 4}, rank: 3}", "line 4, rules[1].at.step: got 4 after 5"),
        ("\n  - {at: {step: 5}, boundaries: [2, 4]}", None),
        ("\n  - {at: {step: 5}, boundaries: 2}", "line 3, rules[0].boundaries: got 2; write two numbers"),
        ("\n  - {on: plateux, do: freeze}", "'plateux' is not a thing that a rule looks at. Allowed: plateau"),
        ("\n  - {on: plateau}", "line 3, rules[0]: the field 'do' is missing"),
        ("\n  - {on: plateau, do: thaw}", "line 3, rules[0].do: 'thaw' is not a thing to do on a plateau"),
        ("\n  - {on: plateau, do: freeze, patience: 0}", "line 3, rules[0].patience: got 0"),
        ("\n  - {on: signal, reading: a, tolerance: -1, moves: rises}", "rules[0].tolerance: got -1"),
        ("\n  - {on: signal, reading: a, tolerance: 1, moves: up}", "'up' is not a direction"),
        ("\n  - {on: gradient, do: rates, evry: 3}", "unknown field 'evry'. Allowed: on, do, every"),
        ("\n  - {do: freeze}", "rules[0]: write a mapping with one of at"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_line(tmp_path: Path, rules: str, says: str | None) -> None:
    file = tmp_path / "schedule.yaml"
    file.write_text(f"schema_version: 1\nrules: {rules}\n")
    if says is None:
        with pytest.raises(
            ConfigError, match=r"line 3, rules\[0\].boundaries: got \[2, 4\]; stack 'encoder' has 3 blo"
        ):
            Schedule.load(file).widest(PLAN)
        return
    with pytest.raises(ConfigError) as error:
        Schedule.load(file)
    assert says in str(error.value)
    assert str(file) in str(error.value)


def test_what_a_schedule_needs_is_checked_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("spafit.heads.load_with_head", never)
    full = StrataConfig("tiny", {"encoder": 3}, (Stratum("encoder", (0, 3), "full"),))
    scaled = StrataConfig("tiny", {"encoder": 3}, (Stratum("encoder", (0, 3), "lora", lora=LoraOptions(4, 32)),))
    two = StrataConfig(
        "tiny", {"encoder": 3, "decoder": 2}, (Stratum("encoder", (0, 3), "lora"), Stratum("decoder", (0, 2), "lora"))
    )
    for rule, plan, says in (
        (OnPlateau("freeze"), PLAN, "select_share is 0"),
        (OnSignal("lost", 0.1, "rises"), PLAN, "reads 'lost', and nothing is measured"),
        (At(step=1, plan=full), PLAN, "block 2 of stack 'encoder' would train by 'lora.bitfit' and by 'full'"),
        (At(step=1, plan=scaled), PLAN, "scale .alpha by rank. 1 and 8"),
        (At(step=1, plan=two), PLAN, "Write plans for one model"),
        (At(step=1, rank=4), full, "no low-rank stratum"),
        (OnGradient("freeze"), two, "encoder, decoder; name the one"),
        (At(step=1, boundaries=(1, 2)), full, "biases or norms alone, and the plan has none"),
    ):
        with pytest.raises(UsageError, match=says):
            train(Path("nowhere"), tmp_path / "out", plan, schedule=Schedule((rule,)))
    assert not (tmp_path / "out").exists()


def test_a_reading_that_no_signal_gives_is_named_before_a_step(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"reads 'sise', which no signal gives. They give: size. Did you mean"):
        train(bert, tmp_path / "a", signals=(SIZE,), schedule=Schedule((OnSignal("sise", 0.1, "rises"),)))
    with pytest.raises(UsageError, match="at hidden index 2"):
        train(bert, tmp_path / "b", signals=(SIZE,), schedule=Schedule((OnSignal("size", 0.1, "rises", hidden=2),)))


def test_blocks_that_are_one_module_cannot_be_frozen_apart(tmp_path: Path) -> None:
    save_tiny("albert", tmp_path / "albert")
    plan = StrataConfig("albert", {"encoder": 3}, (Stratum("encoder", (0, 3), "lora"),))
    with pytest.raises(UsageError, match="one shared module"):
        train(tmp_path / "albert", tmp_path / "out", plan, schedule=Schedule((OnGradient("freeze"),)))


def test_the_union_of_plans_holds_each_and_is_the_plan_itself_where_it_can_be() -> None:
    low = StrataConfig(
        "tiny", {"encoder": 3},
        (
            Stratum("encoder", (0, 2), "bitfit", bitfit=("query",)),
            Stratum("encoder", (2, 3), "lora", lora=LoraOptions(8, dropout=0.2)),
        ),
        outside=Outside(pooler="full", head="full"),
    )  # fmt: skip
    assert union([WIDE, PLAN]).strata == WIDE.strata
    assert union([PLAN, PLAN]) is PLAN
    both = union([PLAN, low])
    assert [(s.blocks, s.method) for s in both.strata] == [
        ((0, 1), "bitfit"),
        ((1, 2), "bitfit"),
        ((2, 3), "lora+bitfit"),
    ]
    assert both.strata[0].bitfit == ("query",)
    assert both.strata[1].bitfit is None
    assert both.strata[2].lora is not None
    assert (both.strata[2].lora.rank, both.strata[2].lora.alpha) == (8, 8.0)
    assert both.outside.pooler == "full"
