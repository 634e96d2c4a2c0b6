"""The rules of a schedule, as values: when something changes, and what. Checked when made; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from spafit.fields import FieldError, choice, integer, number, text
from spafit.scheduling.moving import Holding, only_stack, with_boundaries, with_learning_rate, with_rank
from spafit.strata import StrataConfig
from spafit.stratum import PLACES


@dataclass(frozen=True)
class Look:
    """What a rule sees between two steps.

    Attributes:
        step: steps done.
        total: steps of the training.
        epoch: passes done.
        holding: what holds.
        since: step of the last change that this rule made; -1 before the first.
        done: how many changes this rule has made.
        scores: step and held-out score of every evaluation so far.
        readings: step, hidden index and value of every reading so far of the name that the rule reads.
        gradients: by block, ‖g‖ / ‖θ‖ of what trains in it, the mean over ``counted`` steps.
        counted: steps since a rule on gradients was last due.
    """

    step: int
    total: int
    epoch: float
    holding: Holding
    since: int = -1
    done: int = 0
    scores: Sequence[tuple[int, float]] = ()
    readings: Sequence[tuple[int, int | None, float]] = ()
    gradients: Mapping[int, float] = field(default_factory=dict)
    counted: int = 0


@dataclass(frozen=True)
class Proposal:
    """What a rule wants to hold from now on.

    Attributes:
        holding: the new state.
        reason: why, as a phrase.
        restore: put the values of blocks that rest from now on back to those before training.
        guarded: whether it may be held back.
    """

    holding: Holding
    reason: str
    restore: bool = False
    guarded: bool = True


class Rule(Protocol):
    """What a schedule needs of a rule."""

    def begin(self, holding: Holding) -> Holding:
        """What holds before the first step."""
        ...

    def reach(self, holding: Holding) -> Holding:
        """What holds after all changes of this rule that add something; those that only take away do not count."""
        ...

    def decide(self, look: Look) -> Proposal | None:
        """What to change, or None."""
        ...


@dataclass(frozen=True)
class At:
    """A timetable's entry: from a point of the training on, something else holds.

    Entries are carried out in the order in which they stand, and are never held back by the guard.

    Attributes:
        step: steps done; give one of ``step``, ``epoch`` and ``share``.
        epoch: passes over the items.
        share: of all steps, from 0 to 1.
        boundaries: first blocks of the second and third stratum, for a plan that is built like SPAFIT's.
        rank: of all low-rank strata. Their scale alpha / rank (rsLoRA: alpha / √rank) stays what it is.
        learning_rate: peak rate of all strata that train, not of what is outside the blocks.
        plan: a whole plan, in place of the others. LoRA's scale must be that of the run's plan, block by block.
        stack: the stack that the change is about; None: the only one (of a rank or a rate: every one).
    """

    step: int | None = None
    epoch: float | None = None
    share: float | None = None
    boundaries: tuple[int, int] | None = None
    rank: int | None = None
    learning_rate: float | None = None
    plan: StrataConfig | None = None
    stack: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        given = [n for n in ("step", "epoch", "share") if getattr(self, n) is not None]
        if len(given) != 1:
            raise FieldError(("at",), f"got {' and '.join(given) or 'nothing'}; give one of step, epoch and share.")
        if self.step is not None:
            integer(self.step, ("at", "step"), minimum=0)
        when = number(getattr(self, given[0]), ("at", given[0]))
        if when < 0 or (self.share is not None and when > 1):
            raise FieldError(("at", given[0]), f"got {when}; write a number of at least 0, and a share of at most 1.")
        changes = [n for n in ("boundaries", "rank", "learning_rate", "plan") if getattr(self, n) is not None]
        if not changes:
            raise FieldError(("at",), "the entry changes nothing. Write boundaries, rank, learning_rate or plan.")
        if self.plan is not None and (len(changes) > 1 or self.stack is not None):
            raise FieldError(("plan",), "a whole plan says everything. Remove the other fields.")
        if self.boundaries is not None:
            pair = self.boundaries
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise FieldError(("boundaries",), f"got {pair!r}; write two numbers: [2, 4].")
            first, second = (integer(b, ("boundaries", i), minimum=0) for i, b in enumerate(pair))
            object.__setattr__(self, "boundaries", (first, second))
        if self.rank is not None:
            integer(self.rank, ("rank",), minimum=1)
        if self.learning_rate is not None and number(self.learning_rate, ("learning_rate",)) <= 0:
            raise FieldError(("learning_rate",), f"got {self.learning_rate}; write a number above 0.")

    @property
    def when(self) -> str:
        """The point, in words."""
        if self.step is not None:
            return f"step {self.step}"
        return f"epoch {self.epoch:g}" if self.epoch is not None else f"{100 * (self.share or 0):g} % of the steps"

    def changed(self, plan: StrataConfig, first: StrataConfig | None = None) -> StrataConfig:
        """The plan that this entry makes of another, in a run that began with ``first``."""
        if self.plan is not None:
            return self.plan
        if self.boundaries is not None:
            plan = with_boundaries(plan, self.boundaries, self.stack, first=first)
        if self.rank is not None:
            plan = with_rank(plan, self.rank, self.stack)
        return plan if self.learning_rate is None else with_learning_rate(plan, self.learning_rate, self.stack)

    def begin(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        return holding

    def reach(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        return replace(holding, plan=self.changed(holding.plan, holding.first))

    def decide(self, look: Look) -> Proposal | None:
        """See :class:`Rule`."""
        share = 0.0 if self.share is None else math.ceil(self.share * look.total - 1e-9)
        due = look.step >= (self.step or share) if self.epoch is None else look.epoch >= self.epoch - 1e-9
        if look.done or not due:
            return None
        return Proposal(self.reach(look.holding), f"the timetable, {self.when}", guarded=False)


@dataclass(frozen=True)
class OnPlateau:
    """Unfreeze from above, or freeze from below, where the held-out score no longer rises.

    Unfreezing begins with the uppermost ``start`` blocks (Howard & Ruder 2018, ULMFiT, where an epoch takes the place
    of the plateau); the run's plan says what trains once everything is unfrozen. What is frozen keeps its values.

    Attributes:
        do: ``unfreeze`` or ``freeze``.
        blocks: how many at a time.
        patience: evaluations without a gain, since the last change of this rule, before the next one.
        gain: what an evaluation must gain over the best before it to count.
        start: unfreezing: uppermost blocks that train from the beginning.
        keep: freezing: uppermost blocks that always train.
        stack: the stack; None: the only one.
    """

    do: Literal["unfreeze", "freeze"]
    blocks: int = 1
    patience: int = 1
    gain: float = 0.0
    start: int = 1
    keep: int = 1
    stack: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        choice(self.do, ("do",), ("unfreeze", "freeze"), "thing to do on a plateau")
        for name, least in (("blocks", 1), ("patience", 1), ("start", 0), ("keep", 0)):
            integer(getattr(self, name), (name,), minimum=least)
        if number(self.gain, ("gain",)) < 0:
            raise FieldError(("gain",), f"got {self.gain}; write a number of at least 0.")

    def begin(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        if self.do == "freeze":
            return holding
        stack = only_stack(holding.plan, self.stack)
        floor = max(holding.plan.blocks[stack] - self.start, holding.first_trained(stack))
        return holding.with_floor(stack, floor)

    def reach(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        return holding.with_floor(only_stack(holding.plan, self.stack), 0) if self.do == "unfreeze" else holding

    def decide(self, look: Look) -> Proposal | None:
        """See :class:`Rule`."""
        best, where, waited = -math.inf, 0, 0
        for step, score in look.scores:
            if score > best + self.gain:
                best, where, waited = score, step, 0
            elif step > look.since:
                waited += 1
        if waited < self.patience or look.scores[-1][0] <= look.since:
            return None
        stack = only_stack(look.holding.plan, self.stack)
        if self.do == "freeze":
            after = raised(look.holding, stack, self.blocks, self.keep)
        else:
            floor = look.holding.floor.get(stack, 0)
            lowest = look.holding.plan.boundaries(stack)[0]
            after = None if floor <= lowest else look.holding.with_floor(stack, max(floor - self.blocks, lowest))
        said = (
            f"held-out score {look.scores[-1][1]:.4f}, no gain over {best:.4f} of step {where} in {waited} evaluations"
        )
        return None if after is None else Proposal(after, said)


@dataclass(frozen=True)
class OnSignal:
    """React to what a :class:`spafit.signals.Signal` measures, such as forgetting.

    The reading is compared with its own value before training. One that is newer than this rule's last change is
    waited for before the next one. The signal is measured at each of its steps, whatever share of the time that takes,
    so that the training does not depend on the machine's speed.

    Attributes:
        reading: the name that the signal gives the value.
        tolerance: how far it may move.
        moves: the bad direction: ``rises`` (what was lost) or ``falls`` (an ability that is kept).
        do: ``freeze`` the lowest trained blocks, ``restore`` (freeze them and put their values back to those before
            training), or ``slow`` all blocks down.
        hidden: hidden index of the reading; None takes the mean over those that were measured.
        blocks: how many at a time.
        keep: uppermost blocks that always train.
        factor: what ``slow`` multiplies the learning rates by.
        stack: the stack; None: the only one.
    """

    reading: str
    tolerance: float
    moves: Literal["rises", "falls"]
    do: Literal["freeze", "restore", "slow"] = "freeze"
    hidden: int | None = None
    blocks: int = 1
    keep: int = 1
    factor: float = 0.5
    stack: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        text(self.reading, ("reading",))
        if number(self.tolerance, ("tolerance",)) < 0:
            raise FieldError(("tolerance",), f"got {self.tolerance}; write a number of at least 0.")
        choice(self.moves, ("moves",), ("rises", "falls"), "direction")
        choice(self.do, ("do",), ("freeze", "restore", "slow"), "thing to do on a signal")
        if self.hidden is not None:
            integer(self.hidden, ("hidden",), minimum=0)
        integer(self.blocks, ("blocks",), minimum=1)
        integer(self.keep, ("keep",), minimum=0)
        if not 0 < number(self.factor, ("factor",)) < 1:
            raise FieldError(("factor",), f"got {self.factor}; write a number above 0 and below 1.")

    def begin(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        return holding

    def reach(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        return holding

    def decide(self, look: Look) -> Proposal | None:
        """See :class:`Rule`."""
        step = max((s for s, _, _ in look.readings), default=0)
        if step <= max(look.since, 0):
            return None
        now, before = (self._value(look.readings, s) for s in (step, 0))
        moved = now - before if self.moves == "rises" else before - now
        if not moved > self.tolerance:  # also where it is not a number
            return None
        plan, said = look.holding.plan, "rose" if self.moves == "rises" else "fell"
        stack = only_stack(plan, self.stack)
        after: Holding | None
        if self.do == "slow":
            old = look.holding.factors.get(stack, {})
            slower = {b: old.get(b, 1.0) * self.factor for b in range(plan.blocks[stack])}
            after = look.holding.with_factors(stack, slower)
        else:
            after = raised(look.holding, stack, self.blocks, self.keep)
        where = "" if self.hidden is None else f" at hidden {self.hidden}"
        reason = f"{self.reading}{where} {said} by {moved:.4f} by step {step}, above {self.tolerance:g}"
        return None if after is None else Proposal(after, reason, restore=self.do == "restore")

    def _value(self, readings: Sequence[tuple[int, int | None, float]], step: int) -> float:
        found = [v for s, hidden, v in readings if s == step and self.hidden in (None, hidden)]
        return sum(found) / len(found) if found else math.nan


@dataclass(frozen=True)
class OnGradient:
    """React to ‖g‖ / ‖θ‖ of each block: the gradient as the optimiser gets it, by what trains in the block.

    ``rates`` multiplies each block's learning rate by its share of the largest (Lee et al. 2023, Surgical
    Fine-Tuning, their Auto-RGN, once every ``every`` steps rather than at each). ``freeze`` freezes the lowest trained
    block where its share is small (in the spirit of Liu et al. 2021, AutoFreeze). An update's size under AdamW does
    not follow the gradient's, so that neither says what a block would learn.

    Attributes:
        do: ``freeze`` or ``rates``.
        every: steps that are averaged over, and between two decisions.
        below: freezing: share of the largest below which a block freezes.
        least: rates: smallest factor.
        keep: freezing: uppermost blocks that always train.
        stack: the stack; None: the only one.
    """

    do: Literal["freeze", "rates"]
    every: int = 20
    below: float = 0.1
    least: float = 0.01
    keep: int = 1
    stack: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        choice(self.do, ("do",), ("freeze", "rates"), "thing to do on gradients")
        integer(self.every, ("every",), minimum=1)
        integer(self.keep, ("keep",), minimum=0)
        for name in ("below", "least"):
            if not 0 < number(getattr(self, name), (name,)) < 1:
                raise FieldError((name,), f"got {getattr(self, name)}; write a share above 0 and below 1.")

    def begin(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        return holding

    def reach(self, holding: Holding) -> Holding:
        """See :class:`Rule`."""
        return holding

    def decide(self, look: Look) -> Proposal | None:
        """See :class:`Rule`."""
        largest = max(look.gradients.values(), default=0.0)
        if look.counted < self.every or not largest > 0 or not math.isfinite(largest):
            return None
        stack = only_stack(look.holding.plan, self.stack)
        shares = {b: g / largest for b, g in look.gradients.items()}
        over = f"over {look.counted} steps"
        if self.do == "freeze":
            lowest = look.holding.first_trained(stack)
            if shares.get(lowest, 1.0) >= self.below:
                return None
            after = raised(look.holding, stack, 1, self.keep)
            said = f"‖g‖/‖θ‖ of block {lowest} is {shares[lowest]:.3f} of the largest, below {self.below:g}, {over}"
            return None if after is None else Proposal(after, said)
        factors = {b: max(s, self.least) for b, s in shares.items()}
        old = look.holding.factors.get(stack, {})
        if all(abs(f / old.get(b, 1.0) - 1) < 0.1 for b, f in factors.items()):
            return None
        top = max(shares, key=lambda b: shares[b])
        return Proposal(look.holding.with_factors(stack, factors), f"‖g‖/‖θ‖, largest in block {top}, {over}")


def raised(holding: Holding, stack: str, blocks: int, keep: int) -> Holding | None:
    """The lowest trained ``blocks`` frozen; None where only those that are kept, or nothing, would be left."""
    now, count = holding.first_trained(stack), holding.plan.blocks[stack]
    outside = any(getattr(holding.plan.outside, place) != "freeze" for place in PLACES)
    top = count - max(keep, 0 if outside or len(holding.plan.blocks) > 1 else 1)
    return holding.with_floor(stack, min(now + blocks, top)) if now < top else None


AnyRule = At | OnPlateau | OnSignal | OnGradient
