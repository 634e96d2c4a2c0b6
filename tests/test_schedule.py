"""Schedules: what moves while training moves as the rules say, is logged with its reason, and goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spafit import io
from spafit.adapt import apply_strata, canonical_parameters
from spafit.data.training import TrainData
from spafit.fit_result import SCHEDULE_COLUMNS, FitResult
from spafit.runtime import generator
from spafit.scheduling import At, OnGradient, OnPlateau, OnSignal, Schedule, ranks
from spafit.scheduling.moving import Holding
from spafit.scheduling.rules import Look
from spafit.strata import Outside, StrataConfig, Stratum
from spafit.stratum import LoraOptions
from spafit.trainer import StratifiedTrainer
from spafit.training import fit
from tests.tiny import save_tiny, tiny_inputs
from tests.training_fixtures import PLAN, QUICK, task, weights

#: All three blocks train.
WIDE = StrataConfig(
    model_id="tiny",
    blocks={"encoder": 3},
    strata=(Stratum("encoder", (0, 3), "lora+bitfit", lora=LoraOptions(rank=2, dropout=0.2)),),
    outside=Outside(pooler="bitfit"),
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_tiny("bert", folder)
    return folder


def train(bert: Path, out: Path, plan: Any = WIDE, *, data: TrainData | None = None, **changes: Any) -> FitResult:
    """Train quickly on the CPU; ``changes`` are of the settings, or arguments of ``fit``."""
    options = {k: changes.pop(k) for k in ("seeds", "remedies", "signals", "schedule", "resume") if k in changes}
    settings = replace(QUICK, **changes)
    return fit(str(bert), plan, data=data or task(), settings=settings, out=out, device="cpu", quiet=True, **options)


def at(entries: FitResult, what: str) -> list[tuple[int, str]]:
    """Step and state afterwards of every change of one kind."""
    rows = entries.schedule
    assert rows is not None
    assert tuple(rows.columns) == SCHEDULE_COLUMNS
    return [(int(s), a) for s, w, a in zip(rows["step"], rows["what"], rows["after"], strict=True) if w == what]


# ---------------------------------------------------------------- ranks


def factors(rank: int, *, inputs: int = 12, outputs: int = 9, wide: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    a, b = torch.zeros(wide, inputs), torch.zeros(outputs, wide)
    a[:rank] = torch.randn(rank, inputs, generator=draw)
    b[:, :rank] = torch.randn(outputs, rank, generator=draw) * torch.logspace(0, -2, rank)
    return a, b


def test_growth_leaves_the_product_and_draws_as_peft_does() -> None:
    a, b = factors(2, inputs=4000)
    before = b @ a
    ranks.grow(a, b, old=2, new=5, draw=generator(0, "test"))
    assert torch.equal(b @ a, before)
    bound = 4000**-0.5
    assert a[2:5].abs().max() <= bound
    assert a[2:5].std() == pytest.approx(bound / 3**0.5, rel=0.05)  # of a uniform law
    assert not a[5:].any()
    assert not b[:, 2:].any()


@pytest.mark.parametrize("new", [1, 3, 4])
def test_shrinking_gives_the_truncated_svd_of_the_product(new: int) -> None:
    a, b = factors(5)
    product, size = b @ a, a[:5].norm() / 5**0.5
    u, sigma, v = torch.linalg.svd(product.double(), full_matrices=False)
    lost, _, _ = ranks.shrink(a, b, old=5, new=new)
    expected = (u[:, :new] * sigma[:new]) @ v[:new]
    assert torch.allclose((b @ a).double(), expected, atol=1e-6)
    assert lost == pytest.approx(float(sigma[new:].norm()), rel=1e-5)
    assert lost == pytest.approx(float((product.double() - expected).norm()), rel=1e-5)
    assert not a[new:].any()
    assert not b[:, new:].any()
    assert a[:new].norm() / new**0.5 == pytest.approx(float(size), rel=1e-5)  # A keeps its size, so do the rates
    other_a, other_b = factors(5)  # negative control: dropping directions as they stand is further away
    assert (other_b[:, :new] @ other_a[:new] - product).norm() > 1.05 * lost


def test_shrinking_an_update_that_has_learnt_nothing_leaves_nothing() -> None:
    a, b = factors(4)
    b.zero_()
    lost, n, m = ranks.shrink(a, b, old=4, new=2)
    assert lost == 0
    assert not b.any()
    assert a[:2].isfinite().all()
    assert n.isfinite().all()
    assert m.isfinite().all()
    assert torch.linalg.matrix_rank(a[:2]) == 2  # it can learn


def test_moments_turn_as_gradients_do() -> None:
    """The first moments after shrinking are the gradients that autograd gives the turned factors."""
    a, b = (t.double() for t in factors(5))
    target = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
        return torch.autograd.grad(((leaves[1] @ leaves[0]) * target).sum(), leaves)  # linear: the same G everywhere

    first = gradients(a, b)
    states = [{"exp_avg": g.clone(), "exp_avg_sq": g.square()} for g in first]
    _, n, m = ranks.shrink(a, b, old=5, new=3)
    ranks.carry_moments(*states, n, m)
    now = gradients(a, b)
    assert torch.allclose(states[0]["exp_avg"][:3], now[0][:3], atol=1e-10)
    assert torch.allclose(states[1]["exp_avg"][:, :3], now[1][:, :3], atol=1e-10)
    assert not states[0]["exp_avg"][3:].any()
    assert (states[0]["exp_avg_sq"] >= 0).all()


def test_young_directions_step_as_a_new_optimiser_would() -> None:
    draw = torch.Generator().manual_seed(0)
    old, late = nn.Parameter(torch.randn(4, 6, generator=draw)), 30
    fresh = nn.Parameter(old.detach()[2:].clone())
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    wide, narrow = torch.optim.AdamW([old], **options), torch.optim.AdamW([fresh], **options)
    plain = nn.Parameter(old.detach().clone())
    uncorrected = torch.optim.AdamW([plain], **options)
    for step in range(late + 20):
        gradient = torch.randn(4, 6, generator=draw)
        if step < late:
            gradient[2:] = 0
        with torch.no_grad():
            if step == late:
                for tensor in (old, plain):
                    tensor[2:] = fresh
        for parameter in (old, plain):
            parameter.grad = gradient.clone()
        before = old.detach()[2:].clone()
        wide.step()
        uncorrected.step()
        if step >= late:
            fresh.grad = gradient[2:].clone()
            narrow.step()
            ranks.as_if_begun_at(
                old, before, wide.state[old], wide.param_groups[0], (2, 4), born=float(late), of_a=True
            )
    assert torch.allclose(old[2:], fresh, atol=1e-6)
    assert torch.equal(old[:2], plain[:2])  # the others are as they were, to the bit
    assert (plain[2:] - fresh).abs().max() > 0.02  # negative control: without it they go several times too far


def watched_changes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the model gives and the optimiser holds, right before and right after each change."""
    from spafit.scheduling.driver import ScheduleDriver

    original, found = ScheduleDriver._change, []

    def look(driver: Any, optimizer: Any) -> dict[str, Any]:
        model = driver.stratified.model
        modes = {m: m.training for m in model.modules()}
        with torch.no_grad():
            logits = model.eval()(**tiny_inputs("bert")).logits
        for module, mode in modes.items():
            module.training = mode
        states = getattr(optimizer, "optimizer", optimizer).state
        moments = {n: {k: v.clone() for k, v in states[p].items()} for n, p in driver.parameters.items() if p in states}
        values = {n: p.detach().clone() for n, p in driver.parameters.items()}
        return {"logits": logits, "moments": moments, "values": values, "ranks": dict(driver.ranks)}

    def change(self: Any, proposal: Any, rule: str, step: int, epoch: float, optimizer: Any, scheduler: Any) -> None:
        before = look(self, optimizer)
        original(self, proposal, rule, step, epoch, optimizer, scheduler)
        found.append({"step": step, "before": before, "after": look(self, optimizer), "driver": self})

    monkeypatch.setattr(ScheduleDriver, "_change", change)
    return found


def test_in_training_growth_leaves_outputs_and_moments_and_shrinking_only_what_it_turns(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = watched_changes(monkeypatch)
    result = train(bert, tmp_path, schedule=Schedule((At(step=5, rank=4), At(step=9, rank=1))))
    assert at(result, "rank") == [(5, "[0, 3) 4"), (9, "[0, 3) 1")]
    grown, shrunk = found
    assert set(grown["before"]["ranks"].values()) == {2}
    assert set(grown["after"]["ranks"].values()) == {4}
    assert torch.allclose(grown["before"]["logits"], grown["after"]["logits"], atol=1e-6)
    for name, moments in grown["before"]["moments"].items():
        for key, value in moments.items():
            assert torch.equal(value, grown["after"]["moments"][name][key]), name  # those of what is new are zero
    query = "bert.encoder.layer.0.attention.self.query"
    assert not grown["before"]["values"][f"{query}.lora_A.weight"][2:].any()  # it was of rank 2 until then
    assert grown["after"]["values"][f"{query}.lora_A.weight"][2:].any()
    assert (shrunk["before"]["values"][f"{query}.lora_B.weight"].abs().amax(0) > 0).all()  # the new ones learnt
    turned = 0
    for name, moments in shrunk["before"]["moments"].items():
        same_values = all(torch.equal(v, shrunk["after"]["moments"][name][k]) for k, v in moments.items())
        assert same_values == ("lora_" not in name), name
        turned += not same_values
    assert turned == 18
    for when in ("before", "after"):
        shrunk[when]["product"] = (
            shrunk[when]["values"][f"{query}.lora_B.weight"] @ shrunk[when]["values"][f"{query}.lora_A.weight"]
        )
    u, sigma, v = torch.linalg.svd(shrunk["before"]["product"])
    assert torch.allclose(shrunk["after"]["product"], sigma[0] * u[:, :1] @ v[:1], atol=1e-6)
    assert not torch.equal(shrunk["after"]["product"], shrunk["before"]["product"])


def test_a_rank_that_lies_in_wider_matrices_trains_as_that_rank_does(bert: Path, tmp_path: Path) -> None:
    """Masked directions add nothing: a run that would grow after its end is the run of that rank."""
    plain = train(bert, tmp_path / "plain", epochs=1.0)
    wide = train(bert, tmp_path / "wide", epochs=1.0, schedule=Schedule((At(step=99, rank=5),)))
    assert at(wide, "rank") == []
    assert "training ended before step 99 of the timetable" in " ".join(wide.run["notes"])
    one, two = weights(plain.model_folder()), weights(wide.model_folder())
    assert set(one) == set(two)
    other = 0
    for name, value in one.items():
        cut = two[name][:2] if "lora_A" in name else two[name][:, :2] if "lora_B" in name else two[name]
        rest = two[name][2:] if "lora_A" in name else two[name][:, 2:] if "lora_B" in name else value[:0]
        assert not rest.any()
        other += value.shape != two[name].shape
        assert value.shape == cut.shape
    assert other == 18


# ---------------------------------------------------------------- rules do what they say


def test_a_timetable_moves_boundaries_rank_and_rate_when_it_says(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, dict[str, Any]] = {}
    original = StratifiedTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        groups = {id(p): g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        parameters = canonical_parameters(self.stratified.model)
        moved = {n for n, p in parameters.items() if p.grad is not None}
        blocks = sorted({n.split(".layer.")[1][0] for n in moved if ".layer." in n})
        low_rank = sorted({n.split(".layer.")[1][0] for n in moved if "lora_" in n})
        rates = {n: groups[id(parameters[n])] for n in self.stratified.trainable}
        training = [self.stratified.model.get_base_model().bert.encoder.layer[b].training for b in range(3)]
        seen[self.state.global_step] = {"blocks": blocks, "lora": low_rank, "rates": rates, "training": training}
        return loss

    monkeypatch.setattr(StratifiedTrainer, "training_step", step)
    schedule = Schedule(
        (
            At(step=2, boundaries=(1, 1)),
            At(epoch=1.0, boundaries=(0, 2), learning_rate=1e-3),
            At(share=0.75, boundaries=(2, 2)),
        )
    )
    result = train(bert, tmp_path, PLAN, schedule=schedule, warmup=0.0)
    assert result.schedule is not None
    assert [seen[s]["blocks"] for s in (1, 2, 6, 9)] == [["1", "2"], ["1", "2"], ["0", "1", "2"], ["2"]]
    assert [seen[s]["lora"] for s in (1, 2, 6, 9)] == [["2"], ["1", "2"], ["2"], ["2"]]
    assert seen[2]["training"] == [False, True, True]
    assert seen[9]["training"] == [False, False, True]  # no dropout in what is frozen now
    bias, head = "bert.encoder.layer.1.output.dense.bias", "classifier.weight"
    linear = [1 - s / 12 for s in range(12)]
    for s in range(12):
        assert seen[s]["rates"][head] == pytest.approx(1e-2 * linear[s])
        if s < 9:  # then it is frozen, and its rate stands still
            assert seen[s]["rates"][bias] == pytest.approx((1e-2 if s < 6 else 1e-3) * linear[s])
    assert set(result.schedule["rule"]) == {"timetable"}
    assert "the timetable, epoch 1" in set(result.schedule["reason"])
    assert at(result, "strata")[0] == (2, "[0, 1) freeze; [1, 3) lora+bitfit")
    assert result.run["changes"] == io.plain(result.schedule.to_dict("records"))


def test_what_a_schedule_freezes_keeps_its_trained_value(bert: Path, tmp_path: Path) -> None:
    frozen = train(bert, tmp_path / "frozen", schedule=Schedule((At(step=6, boundaries=(2, 2)),)))
    short = train(bert, tmp_path / "short", epochs=1.0, warmup=0.0, select_share=0.0)
    one, two = weights(frozen.model_folder()), weights(short.model_folder())
    lower = [n for n in one if ".layer.0." in n or ".layer.1." in n]
    assert lower
    start = load_start(bert)
    for name in lower:
        assert not torch.equal(one[name], start[name])
        assert one[name].shape == two[name].shape


def load_start(bert: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors before training, by their names in its file."""
    from spafit.checkpoint import adapter_state
    from spafit.heads import load_with_head
    from spafit.runtime import torch_seed

    headed = load_with_head(str(bert), labels=("cat", "dog"), seed=0)
    with torch_seed(0, "adapter"):
        return {n: t.clone() for n, t in adapter_state(apply_strata(headed.model, WIDE)).items()}


def look(scores: Iterable[float] = (), *, plan: StrataConfig = WIDE, **changes: Any) -> Look:
    base = Look(100, 200, 1.0, Holding(plan), scores=[(10 * (i + 1), s) for i, s in enumerate(scores)])
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("scores", "patience", "since", "fires"),
    [
        ([0.5, 0.6, 0.7], 1, -1, False),
        ([0.5, 0.6, 0.6], 1, -1, True),
        ([0.5, 0.6, 0.6], 2, -1, False),
        ([0.5, 0.6, 0.5, 0.55], 2, -1, True),
        ([0.5, 0.6, 0.5, 0.55], 2, 30, False),  # one evaluation since the last change
        ([0.5, 0.6, 0.5, 0.55], 1, 40, False),  # none since
        ([0.5, 0.6, 0.605], 1, -1, False),
    ],
)
def test_a_plateau_is_evaluations_without_a_gain(scores: list[float], patience: int, since: int, fires: bool) -> None:
    found = OnPlateau("freeze", patience=patience).decide(look(scores, since=since))
    assert (found is not None) == fires
    if found is not None:
        assert found.holding.floor == {"encoder": 1}
        assert "held-out score" in found.reason
        assert "0.6000 of step 20" in found.reason


def test_a_gain_too_small_is_no_gain() -> None:
    assert OnPlateau("freeze", gain=0.01).decide(look([0.5, 0.6, 0.605])) is not None


def test_unfreezing_begins_above_and_goes_down_to_where_the_plan_trains() -> None:
    rule = OnPlateau("unfreeze", start=1)
    holding = rule.begin(Holding(PLAN))
    assert holding.config(1.0).boundaries() == (2, 2)
    once = rule.decide(look([0.5, 0.5], holding=holding))
    assert once is not None
    assert once.holding.config(1.0) == PLAN
    assert rule.decide(look([0.5, 0.5], holding=once.holding)) is None  # block 0 is frozen by the plan


def test_freezing_leaves_what_is_kept() -> None:
    rule = OnPlateau("freeze", blocks=2, keep=1)
    first = rule.decide(look([0.5, 0.5], holding=Holding(PLAN)))
    assert first is not None
    assert first.holding.floor == {"encoder": 2}
    assert rule.decide(look([0.5, 0.5], holding=first.holding)) is None


def test_a_signal_is_compared_with_its_start_and_read_anew_after_each_change() -> None:
    readings = [(0, 1, 0.2), (0, 2, 0.4), (50, 1, 0.25), (50, 2, 0.55)]
    rule = OnSignal("lost", 0.08, "rises", blocks=2)
    found = rule.decide(look(readings=readings))
    assert found is not None
    assert found.holding.floor == {"encoder": 2}
    assert found.reason == "lost rose by 0.1000 by step 50, above 0.08"  # of the means
    assert rule.decide(look(readings=readings, since=50)) is None
    assert OnSignal("lost", 0.12, "rises").decide(look(readings=readings)) is None
    assert OnSignal("lost", 0.08, "falls").decide(look(readings=readings)) is None
    at_two = OnSignal("lost", 0.12, "rises", hidden=2).decide(look(readings=readings))
    assert at_two is not None
    assert "lost at hidden 2 rose by 0.1500" in at_two.reason
    slow = OnSignal("lost", 0.08, "rises", do="slow", factor=0.25).decide(look(readings=readings))
    assert slow is not None
    assert slow.holding.config(1e-2).strata[0].learning_rate == pytest.approx(2.5e-3)
    assert OnSignal("lost", 0.08, "rises").decide(look(readings=[(0, None, 0.1), (50, None, float("nan"))])) is None


def test_gradients_give_rates_by_their_share_of_the_largest_and_freeze_the_lowest_where_it_is_small() -> None:
    small = {0: 0.001, 1: 0.04, 2: 0.02}
    rates = OnGradient("rates", every=5).decide(look(gradients=small, counted=5))
    assert rates is not None
    assert [s.learning_rate for s in rates.holding.config(1e-2).strata] == [
        pytest.approx(2.5e-4), None, pytest.approx(5e-3),
    ]  # fmt: skip
    assert "largest in block 1" in rates.reason
    assert OnGradient("rates", every=6).decide(look(gradients=small, counted=5)) is None
    frozen = OnGradient("freeze", every=5).decide(look(gradients=small, counted=5))
    assert frozen is not None
    assert frozen.holding.floor == {"encoder": 1}
    assert "block 0 is 0.025 of the largest" in frozen.reason
    assert OnGradient("freeze", every=5, below=0.02).decide(look(gradients=small, counted=5)) is None


def test_gradients_that_a_rule_sees_are_those_of_training(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spafit.scheduling.driver import ScheduleDriver

    expected: list[dict[int, float]] = []
    got: dict[int, Mapping[int, float]] = {}
    original, before = ScheduleDriver._look, ScheduleDriver.on_pre_optimizer_step

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        found = {}
        for block in range(3):
            own = [p for n, p in self.parameters.items() if f".layer.{block}." in n and p.grad is not None]
            sides = [p.grad for p in own], [p.detach() for p in own]
            norms = [torch.cat([t.flatten().double() for t in side]).norm() for side in sides]
            found[block] = float(norms[0] / norms[1])
        expected.append(found)
        before(self, *args, **kwargs)

    def seen(self: Any, i: int, step: int, *args: Any) -> Any:
        found = original(self, i, step, *args)
        got[step] = found.gradients
        return found

    monkeypatch.setattr(ScheduleDriver, "on_pre_optimizer_step", note)
    monkeypatch.setattr(ScheduleDriver, "_look", seen)
    train(bert, tmp_path, epochs=1.0, schedule=Schedule((OnGradient("freeze", every=3, below=0.001),)))
    for steps, when in ((slice(0, 3), 3), (slice(3, 5), 5)):
        for block in range(3):
            mean = np.mean([e[block] for e in expected[steps]])
            assert got[when][block] == pytest.approx(mean, rel=1e-6)
