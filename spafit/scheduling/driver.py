"""Carry out a schedule while the Trainer runs: decide between steps, change, log, keep the state in checkpoints.

A change is made before a step, never after one, so that a checkpoint, its score and what signals measured of it belong
to the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from spafit import io
from spafit.adapt import canonical_parameters
from spafit.errors import UsageError, did_you_mean
from spafit.fit_result import SCHEDULE_COLUMNS
from spafit.layout import is_inside
from spafit.monitor import STATE_FILE
from spafit.runtime import generator
from spafit.scheduling import ranks
from spafit.scheduling.moving import Holding, by_block, differences, undoes
from spafit.scheduling.rules import At, Look, OnGradient, OnPlateau, OnSignal, Proposal
from spafit.scheduling.schedule import Schedule

if TYPE_CHECKING:
    from spafit.adapt import StratifiedModel
    from spafit.resolve import ResolvedPlan
    from spafit.signal_recorder import SignalRecorder
    from spafit.strata import StrataConfig


class ScheduleDriver(TrainerCallback, ExportableState):
    """Moves what trains, ranks and learning rates of a model as a schedule says.

    Make it before a checkpoint is loaded, since it keeps the values before training that a rule may put back.

    Attributes:
        rows: the log so far, with the columns :data:`SCHEDULE_COLUMNS`.

    Args:
        schedule: the rules.
        stratified: the model, made for :meth:`Schedule.widest`, with its bare form in ``moment``.
        plan: the run's plan.
        learning_rate: the run's peak rate.
        folder: the seed's folder.
        seed: the run's seed; draws new directions of low-rank updates.
        resumed_from: checkpoint that the run goes on from, or None.
        recorder: holds what signals measured.
    """

    def __init__(
        self,
        schedule: Schedule,
        stratified: StratifiedModel,
        plan: StrataConfig,
        *,
        learning_rate: float,
        folder: Path,
        seed: int,
        resumed_from: Path | None,
        recorder: SignalRecorder,
    ):
        self.schedule, self.stratified, self.rate = schedule, stratified, learning_rate
        self.folder, self.seed, self.recorder = folder, seed, recorder
        self.parameters = canonical_parameters(stratified.model)
        self.units = _units(stratified)
        self.rows: list[dict[str, Any]] = []
        self._widest = self._ranks_of(stratified.config, stratified.plan)  # as the updates lie in memory
        planned = self._ranks_of(plan)
        self._first_ranks = {t: planned.get(t, 0) for t in self._widest}
        with torch.no_grad():
            for target, rank in self._first_ranks.items():
                for name, of_a in _matrices(target):
                    ranks.rows_in_use(self.parameters[name], rank, self._widest[target], of_a=of_a).zero_()
        restores = any(isinstance(r, OnSignal) and r.do == "restore" for r in schedule.rules)
        self._start = {n: self.parameters[n].detach().clone() for n in stratified.trainable if restores}
        self._before_step: dict[tuple[str, bool], torch.Tensor] = {}
        if resumed_from is None:
            self._begin(plan)
        else:
            kept = io.read_json(resumed_from / STATE_FILE)["stateful_callbacks"]["ScheduleDriver"]["attributes"]
            self._go_on(kept, plan)
        self._check_movable(plan)
        for target, widest in self._widest.items():
            for name, of_a in _matrices(target):  # before anything rests: a hook needs a tensor that trains
                self.parameters[name].register_hook(self._masking(target, widest, of_a=of_a))
        self.stratified.hold(self.config)

    def _begin(self, plan: StrataConfig) -> None:
        self.holding = self.schedule.begin(plan)
        self.before: StrataConfig | None = None  # the plan that held before the last change
        self.last_step, self.changes, self.held_back = -1, 0, 0
        self.done = [0] * len(self.schedule.rules)
        self.since = [-1] * len(self.schedule.rules)
        self.seen = [-1] * len(self.schedule.rules)  # the last step at which the guard held a rule back
        self.sums: list[dict[str, float]] = [{} for _ in self.schedule.rules]
        self.counted = [0] * len(self.schedule.rules)
        self.born: dict[str, list[list[float]]] = {}  # target: first and past-the-last direction, steps of A and B then
        self.ranks = dict(self._first_ranks)
        if self.config != plan:
            self._log(0, 0.0, "start", plan, self.config, "what holds before the first step")
        self._write()

    def _go_on(self, kept: Mapping[str, Any], plan: StrataConfig) -> None:
        from spafit.strata import StrataConfig

        self.holding = Holding.from_plain(kept["holding"], plan)
        self.before = None if kept["before"] is None else StrataConfig.from_dict(kept["before"])
        self.last_step, self.changes, self.held_back = kept["last_step"], kept["changes"], kept["held_back"]
        self.done, self.since, self.seen = list(kept["done"]), list(kept["since"]), list(kept["seen"])
        self.sums, self.counted = [dict(found) for found in kept["sums"]], list(kept["counted"])
        self.born, self.ranks, self.rows = dict(kept["born"]), dict(kept["ranks"]), list(kept["rows"])
        self._write()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {
            "holding": self.holding.to_plain(), "before": None if self.before is None else self.before.to_dict(),
            "last_step": self.last_step, "changes": self.changes, "held_back": self.held_back, "done": self.done,
            "since": self.since, "seen": self.seen, "sums": self.sums, "counted": self.counted, "born": self.born,
            "ranks": self.ranks, "rows": self.rows,
        }  # fmt: skip
        return {"args": {}, "attributes": io.plain(kept)}

    @property
    def config(self) -> StrataConfig:
        """The plan that holds."""
        return self.holding.config(self.rate)

    def check_readings(self) -> None:
        """See, once signals were measured before training, that they give what rules read.

        Raises:
            UsageError: none of them does.
        """
        names = sorted({r["signal"] for r in self.recorder.rows})
        for rule in self.schedule.rules:
            if isinstance(rule, OnSignal) and not self._read(rule):
                where = "" if rule.hidden is None else f" at hidden index {rule.hidden}"
                raise UsageError(
                    f"The schedule reads {rule.reading!r}{where}, which no signal gives. They give: "
                    f"{', '.join(names) or 'nothing'}.{did_you_mean(rule.reading, names)}"
                )

    # ------------------------------------------------------------ the Trainer's calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rates that hold before the first step."""
        state.stateful_callbacks.setdefault("ScheduleDriver", self.state())
        if state.global_step == 0:
            self._set_rates(kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the rules in turn; at most one changes something."""
        step, epoch = int(state.global_step), float(state.epoch or 0)
        for i, rule in enumerate(self.schedule.rules):
            if isinstance(rule, At) and any(
                isinstance(r, At) and not self.done[j] for j, r in enumerate(self.schedule.rules[:i])
            ):
                continue  # a timetable's entries come one after the other
            proposal = rule.decide(self._look(i, step, epoch, state))
            if proposal is None or (proposal.holding == self.holding and not isinstance(rule, At)):
                continue
            if proposal.guarded and not self._allowed(step, proposal):
                self.held_back += self.seen[i] < self._evidence(i, state)
                self.seen[i] = max(self.seen[i], self._evidence(i, state))
                continue
            name = "timetable" if isinstance(rule, At) else f"rule {i + 1}"
            self._change(proposal, name, step, epoch, kwargs["optimizer"], kwargs["lr_scheduler"])
            self.done[i], self.since[i] = self.done[i] + 1, step
            break
        for i, rule in enumerate(self.schedule.rules):
            if isinstance(rule, OnGradient) and (self.counted[i] >= rule.every or self.last_step == step):
                self.sums[i], self.counted[i] = {}, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note ‖g‖ / ‖θ‖ by block, and what young directions are before the step."""
        due = [i for i, r in enumerate(self.schedule.rules) if isinstance(r, OnGradient)]
        if due:
            gradients: dict[str, float] = {}
            sizes: dict[str, float] = {}
            for name, unit in self.units.items():
                gradient = self.parameters[name].grad
                if gradient is not None:
                    gradients[unit] = gradients.get(unit, 0.0) + float(gradient.detach().double().square().sum())
                    sizes[unit] = sizes.get(unit, 0.0) + float(self.parameters[name].detach().double().square().sum())
            for i in due:
                self.counted[i] += 1
                for unit, squares in gradients.items():
                    if sizes[unit]:
                        self.sums[i][unit] = self.sums[i].get(unit, 0.0) + (squares / sizes[unit]) ** 0.5
        self._before_step = {}
        for target, young in self.born.items():
            for name, of_a in _matrices(target):
                if self.parameters[name].grad is not None:
                    start, stop = int(young[0][0]), int(young[-1][1])
                    part = ranks.rows_in_use(self.parameters[name].detach(), start, stop, of_a=of_a)
                    self._before_step[target, of_a] = part.clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let young directions step as far as their own age says."""
        groups = _groups(kwargs["optimizer"])
        for (target, of_a), before in self._before_step.items():
            parameter = self.parameters[dict(_names(target))[of_a]]
            first = int(self.born[target][0][0])
            for start, stop, *born in self.born[target]:
                ranks.as_if_begun_at(
                    parameter, ranks.rows_in_use(before, int(start) - first, int(stop) - first, of_a=of_a),
                    _states(kwargs["optimizer"])[parameter], groups[id(parameter)], (int(start), int(stop)),
                    born=born[0 if of_a else 1], of_a=of_a,
                )  # fmt: skip
        self._before_step = {}

    # ------------------------------------------------------------ deciding

    def _look(self, i: int, step: int, epoch: float, state: Any) -> Look:
        rule = self.schedule.rules[i]
        scores, readings, gradients = [], [], {}
        if isinstance(rule, OnPlateau):
            scores = [(int(e["step"]), float(e["eval_headline"])) for e in state.log_history if "eval_headline" in e]
        elif isinstance(rule, OnSignal):
            readings = [r for r in self._read(rule) if r[0] <= step]
        elif isinstance(rule, OnGradient):
            stack = rule.stack or next(iter(self.holding.plan.blocks))
            for unit, total in self.sums[i].items():
                name, _, block = unit.rpartition(" ")
                if name == stack:
                    gradients[int(block)] = total / self.counted[i]
        return Look(step, int(state.max_steps), epoch, self.holding, self.since[i], self.done[i], scores, readings,
                    gradients, self.counted[i])  # fmt: skip

    def _read(self, rule: OnSignal) -> list[tuple[int, int | None, float]]:
        found = []
        for row in self.recorder.rows:
            hidden = None if pd.isna(row["hidden"]) else int(row["hidden"])
            if row["signal"] == rule.reading and rule.hidden in (None, hidden):
                found.append((int(row["step"]), hidden, float(row["value"])))
        return found

    def _allowed(self, step: int, proposal: Proposal) -> bool:
        if self.changes >= self.schedule.most_changes:
            return False
        if self.last_step >= 0 and step - self.last_step < self.schedule.min_steps:
            return False
        cooling = self.before is not None and step - self.last_step < self.schedule.cool_down
        after = proposal.holding.config(self.rate)
        return not (cooling and undoes(self.before, self.config, after, self.rate))  # type: ignore[arg-type]

    def _evidence(self, i: int, state: Any) -> int:
        """The step of what a rule's decision rests on, so that one held-back decision counts once."""
        rule = self.schedule.rules[i]
        if isinstance(rule, OnPlateau):
            return max((int(e["step"]) for e in state.log_history if "eval_headline" in e), default=0)
        if isinstance(rule, OnSignal):
            return max((s for s, _, _ in self._read(rule)), default=0)
        return int(state.global_step)

    # ------------------------------------------------------------ changing

    def _change(self, proposal: Proposal, rule: str, step: int, epoch: float, optimizer: Any, scheduler: Any) -> None:
        before, after = self.config, proposal.holding.config(self.rate)
        moving = set(self.stratified.trainable) - self.stratified.moment.resting
        self.stratified.hold(after)
        self.holding, self.before = proposal.holding, before
        self.last_step, self.changes = step, self.changes + 1
        rests = moving & self.stratified.moment.resting
        for name in rests:
            self.parameters[name].grad = None
        if proposal.restore:
            with torch.no_grad():
                for name in rests:
                    self.parameters[name].copy_(self._start[name])
                    _states(optimizer).pop(self.parameters[name], None)
            for target, rank in self._first_ranks.items():
                if f"{target}.lora_A.weight" in rests:
                    self.ranks[target] = rank
                    self.born.pop(target, None)
        for target, rank in self._ranks_of(after).items():
            self._set_rank(target, rank, step, optimizer)
        self._set_rates(optimizer, scheduler)
        self._log(step, epoch, rule, before, after, proposal.reason, restored=len(rests) if proposal.restore else 0)

    def _set_rank(self, target: str, rank: int, step: int, optimizer: Any) -> None:
        old = self.ranks[target]
        if rank == old:
            return
        pair = [self.parameters[name] for name, _ in _matrices(target)]
        states = [_states(optimizer).get(p) for p in pair]
        if rank > old:
            draw = generator(self.seed, "directions", target, step)
            ranks.grow(*(p.detach() for p in pair), old=old, new=rank, draw=draw)
            ages = [0.0 if not s else float(s["step"]) for s in states]
            if any(ages):
                self.born.setdefault(target, []).append([old, rank, *ages])
        else:
            groups = _groups(optimizer)
            for start, stop, *born in self.born.pop(target, []):
                for parameter, state, birth, of_a in zip(pair, states, born, (True, False), strict=True):
                    if state:
                        ranks.age_as(state, groups[id(parameter)], (int(start), int(stop)), born=birth, of_a=of_a)
            _, n, m = ranks.shrink(*(p.detach() for p in pair), old=old, new=rank)
            ranks.carry_moments(states[0] or {}, states[1] or {}, n, m)
        self.ranks[target] = rank

    def _set_rates(self, optimizer: Any, scheduler: Any) -> None:
        """Give each group the peak rate of its block; the curve over the steps stays the scheduler's."""
        plan = self.config
        rates = {
            f"{stack} {b}": stratum.learning_rate or self.rate
            for stack in plan.blocks
            for b, stratum in enumerate(by_block(plan, stack))
            if stratum.method != "freeze"
        }
        rates["outside"] = plan.outside.learning_rate or self.rate
        unit_of = {id(self.parameters[n]): unit for n, unit in self.units.items()}
        plain = getattr(optimizer, "optimizer", optimizer)
        for i, group in enumerate(plain.param_groups):
            rate = rates.get(unit_of[id(group["params"][0])])
            if rate is not None and rate != scheduler.base_lrs[i]:
                scheduler.base_lrs[i] = group["initial_lr"] = rate
                group["lr"] = rate * scheduler.lr_lambdas[i](scheduler.last_epoch)

    def _ranks_of(self, config: StrataConfig, plan: ResolvedPlan | None = None) -> dict[str, int]:
        """Rank of each target that a plan gives a low-rank update."""
        from spafit.resolve import resolve

        if plan is None:
            assert self.stratified.moment.bare is not None
            plan = resolve(self.stratified.moment.bare, config, stacks=self.stratified.plan.stacks)
        return {
            target: part.stratum.lora.rank
            for part in plan.parts
            if part.stratum is not None and part.stratum.lora is not None
            for target in part.targets
        }

    def _masking(self, target: str, widest: int, *, of_a: bool) -> Any:
        def mask(gradient: torch.Tensor) -> torch.Tensor:
            rank = self.ranks[target]
            if rank == widest:
                return gradient
            gradient = gradient.clone()
            ranks.rows_in_use(gradient, rank, widest, of_a=of_a).zero_()
            return gradient

        return mask

    def _check_movable(self, plan: StrataConfig) -> None:
        """See before training that every floor can be held: blocks that share one module cannot be told apart."""
        for rule in self.schedule.rules:
            if isinstance(rule, At) or (isinstance(rule, OnSignal) and rule.do == "slow"):
                continue
            names = [rule.stack] if rule.stack is not None else list(plan.blocks)
            for stack in self.stratified.plan.stacks:
                if stack.name in names and stack.shared:
                    raise UsageError(
                        f"Blocks of stack {stack.name!r} are one shared module, so that a schedule cannot freeze some "
                        "of them. Use a timetable (at), or train without a schedule."
                    )

    # ------------------------------------------------------------ the log

    def _log(
        self, step: int, epoch: float, rule: str, before: StrataConfig, after: StrataConfig, reason: str, *,
        restored: int = 0,
    ) -> None:  # fmt: skip
        found = differences(before, after, self.rate)
        if restored:
            found.append(("values", "trained", f"{restored} tensors as before training", "restored"))
        for what, one, two, label in found:
            row = (self.seed, step, epoch, rule, what, one, two, reason, label)
            self.rows.append(dict(zip(SCHEDULE_COLUMNS, row, strict=True)))
        self._write()

    def _write(self) -> None:
        io.write_table(self.folder / "schedule", self.table())

    def table(self) -> pd.DataFrame:
        """The log; columns :data:`SCHEDULE_COLUMNS`."""
        return pd.DataFrame(self.rows, columns=list(SCHEDULE_COLUMNS))

    def notes(self) -> list[str]:
        """What to say about it."""
        said = f"seed {self.seed}: the schedule made {self.changes} change{'s' * (self.changes != 1)}"
        if self.held_back:
            said += f", and its guard held back {self.held_back}"
        left = [r.when for r, n in zip(self.schedule.rules, self.done, strict=True) if isinstance(r, At) and not n]
        if left:
            said += f"; training ended before {', '.join(left)} of the timetable"
        return [said]


def _matrices(target: str) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Names of A and B of a low-rank update, and whether each is A."""
    return (f"{target}.lora_A.weight", True), (f"{target}.lora_B.weight", False)


def _names(target: str) -> list[tuple[bool, str]]:
    return [(of_a, name) for name, of_a in _matrices(target)]


def _units(stratified: StratifiedModel) -> dict[str, str]:
    """Canonical name of what can train -> its block, as ``encoder 3``, or ``outside``."""
    units = {}
    for name in stratified.trainable:
        places = [
            f"{stack.name} {b}"
            for stack in stratified.plan.stacks
            for b, path in enumerate(stack.block_paths)
            if is_inside(name, path)
        ]
        units[name] = places[0] if places else "outside"
    return units


def _states(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer).state


def _groups(optimizer: Any) -> dict[int, Any]:
    return {id(p): g for g in getattr(optimizer, "optimizer", optimizer).param_groups for p in g["params"]}
