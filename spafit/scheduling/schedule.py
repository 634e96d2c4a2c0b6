"""Schedule: the rules of a training, the guard against thrash, and what they need and reach. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from spafit.errors import ConfigError, UsageError
from spafit.fields import FieldError, Origin, integer, within
from spafit.scheduling.moving import Holding, by_block, only_stack, union
from spafit.scheduling.rules import AnyRule, At, OnPlateau, OnSignal
from spafit.strata import StrataConfig


@dataclass(frozen=True)
class Schedule:
    """What changes during a training, by rules, with a guard against thrash.

    A training with a schedule makes its adapter once, as wide as any plan that the rules can reach, and moves within
    it what trains, ranks and learning rates. What the schedule freezes keeps its trained values. Between two steps at
    most one rule changes something; of several, the first. Rules decide from the run's own log alone, so that an
    interrupted run goes on to the same weights.

    Attributes:
        rules: in their order of precedence.
        min_steps: between two changes, at least. Neither this nor what follows holds back a timetable.
        most_changes: of all rules together; the timetable's count.
        cool_down: steps in which no rule takes back what the last change did to any block.
        origin: file and lines, when read from a file; not compared.
    """

    rules: tuple[AnyRule, ...]
    min_steps: int = 10
    most_changes: int = 20
    cool_down: int = 50
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise FieldError(("rules",), "the schedule has no rule. Add one, or train without a schedule.")
        for name, least in (("min_steps", 1), ("most_changes", 1), ("cool_down", 0)):
            integer(getattr(self, name), (name,), minimum=least)
        times = [(i, r) for i, r in enumerate(self.rules) if isinstance(r, At)]
        for (_, before), (i, entry) in pairwise(times):
            for unit in ("step", "epoch", "share"):
                one, two = getattr(before, unit), getattr(entry, unit)
                if one is not None and two is not None and two < one:
                    raise FieldError(
                        ("rules", i, "at", unit), f"got {two} after {one}. Write a timetable's entries in time's order."
                    )

    @property
    def readings(self) -> tuple[str, ...]:
        """Names of the readings that rules react to."""
        return tuple(dict.fromkeys(r.reading for r in self.rules if isinstance(r, OnSignal)))

    def begin(self, plan: StrataConfig) -> Holding:
        """What holds before the first step."""
        holding = Holding(plan, first=plan)
        for rule in self.rules:
            holding = rule.begin(holding)
        return holding

    def widest(self, plan: StrataConfig) -> StrataConfig:
        """The plan within which all that the rules can reach is held; the run's own where they only take away.

        Raises:
            ConfigError: a rule does not fit the plan, or no one PEFT adapter holds everything.
        """
        if any(s.method == "adalora" for s in plan.strata):
            raise ConfigError("AdaLoRA moves ranks by a schedule of its own. Write lora, or train without a schedule.")
        if any(s.cross is not None for s in plan.strata):
            raise ConfigError(
                "A schedule moves whole strata, and this plan gives cross-attention a method of its own. Remove "
                "'cross', or train without a schedule."
            )
        plans, holding = [plan], Holding(plan, first=plan)
        try:
            for i, rule in enumerate(self.rules):
                with within("rules", i):
                    if not isinstance(rule, At):
                        stack = only_stack(plan, rule.stack)
                        if all(s.method == "freeze" for s in by_block(plan, stack)):
                            raise FieldError(
                                ("stack",), f"nothing trains in stack {stack!r}. Let the plan train some of its blocks."
                            )
                    holding = rule.reach(holding)
                plans.append(holding.plan)
        except FieldError as error:
            raise (self.origin.locate(error) if self.origin else error) from None
        return union(plans)

    def check(self, *, signals: Sequence[str], select_share: float, processes: int) -> None:
        """See that what the rules look at will be there.

        Raises:
            UsageError: no signal to read, no held-out items to score, or several processes.
        """
        if processes > 1:
            raise UsageError(
                "A schedule changes which parameters train, on which several processes agree only once. Train with "
                "one process, or without a schedule."
            )
        if self.readings and not signals:
            raise UsageError(
                f"The schedule reads {self.readings[0]!r}, and nothing is measured while training. Give a signal "
                "(signals, or --watch)."
            )
        if select_share == 0 and any(isinstance(r, OnPlateau) for r in self.rules):
            raise UsageError(
                "A rule on a plateau looks at the score of held-out training items, and select_share is 0. Set it "
                "above 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain objects, with the keys of the file."""
        from spafit.scheduling.files import plain_from_schedule

        return plain_from_schedule(self)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a YAML file; see :mod:`spafit.scheduling.files`.

        Raises:
            ConfigError: with file, line, field, what was got, what is allowed and the remedy.
        """
        from spafit.scheduling.files import load

        return load(Path(path))
