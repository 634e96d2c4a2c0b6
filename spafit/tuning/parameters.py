"""What every search backend is given and gives back: parameters, the function to evaluate, and records of trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from spafit.errors import UsageError

#: Values of one trial by parameter name; parameters that are not active are left out.
Values = Mapping[str, Any]
State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Parameter:
    """One dimension of a search space.

    Attributes:
        name: unique in the space.
        kind: ``categorical`` (one of ``choices``, no order), ``integer`` or ``real`` (from ``low`` to ``high``, both
            included).
        choices: values of a categorical parameter.
        low: least value of the other kinds.
        high: greatest value.
        log: uniform in the logarithm.
        grid: values that a grid search takes; by default every choice or integer. A real one needs them there.
        when: (name of a categorical or integer parameter, values at which this one is active); None: always.
    """

    name: str
    kind: Literal["categorical", "integer", "real"]
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    grid: tuple[Any, ...] = ()
    when: tuple[str, tuple[Any, ...]] | None = None

    def __post_init__(self) -> None:
        if self.kind == "categorical":
            if not self.choices:
                raise UsageError(f"Parameter {self.name!r} has no choices. Give at least one.")
        elif not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise UsageError(f"Parameter {self.name!r} goes from {self.low} to {self.high}. Give low ≤ high.")
        elif self.log and self.low <= 0:
            raise UsageError(f"Parameter {self.name!r} is logarithmic from {self.low}. Give a low above 0.")

    def is_active(self, values: Values) -> bool:
        """Whether the parameter plays a part beside these values of the parameters before it."""
        return self.when is None or values.get(self.when[0]) in self.when[1]


def check_parameters(parameters: Sequence[Parameter]) -> None:
    """Refuse a space in which a name comes twice, or a condition looks at something that is not decided before.

    Raises:
        UsageError: names the parameter.
    """
    earlier: dict[str, Parameter] = {}
    for parameter in parameters:
        if parameter.name in earlier:
            raise UsageError(
                f"Parameter {parameter.name!r} comes twice in the space. Give every parameter its own name."
            )
        if parameter.when is not None:
            parent = earlier.get(parameter.when[0])
            if parent is None or parent.kind == "real":
                raise UsageError(
                    f"Parameter {parameter.name!r} depends on {parameter.when[0]!r}. "
                    "Let it depend on a categorical or integer parameter that comes before it."
                )
        earlier[parameter.name] = parameter


def active_values(parameters: Sequence[Parameter], values: Values) -> dict[str, Any]:
    """Values of the active parameters in the order of the space; those of inactive ones are dropped.

    Raises:
        UsageError: a name that is no parameter, an active parameter without a value, or a value outside its range.
    """
    unknown = sorted(set(values) - {p.name for p in parameters})
    if unknown:
        raise UsageError(
            f"A configuration gives {unknown[0]!r}, which is no parameter of the space. "
            f"Use {', '.join(p.name for p in parameters)}."
        )
    active: dict[str, Any] = {}
    for parameter in parameters:
        if not parameter.is_active(active):
            continue
        if parameter.name not in values:
            raise UsageError(f"A configuration gives no value for {parameter.name!r}. Give one beside {dict(values)}.")
        value = values[parameter.name]
        if parameter.kind == "categorical":
            inside, allowed = value in parameter.choices, f"one of {', '.join(map(repr, parameter.choices))}"
        else:
            inside, allowed = parameter.low <= value <= parameter.high, f"{parameter.low} to {parameter.high}"
            inside = inside and (parameter.kind == "real" or value == int(value))
        if not inside:
            raise UsageError(f"A configuration gives {value!r} for {parameter.name!r}. Give {allowed}.")
        active[parameter.name] = value
    return active


@dataclass(frozen=True)
class Outcome:
    """What evaluating one configuration gave.

    Attributes:
        objectives: name -> value, larger is better; the first one is what single-objective strategies maximise.
        constraints: name -> excess over the limit, at most 0 where it is kept (parameters, memory, forgetting).
        details: anything else to keep, JSON-like (scores by fold, number of parameters, seconds).
    """

    objectives: Mapping[str, float]
    constraints: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Whether every limit is kept."""
        return all(v <= 0 for v in self.constraints.values())

    def single_value(self, objective: str) -> float | None:
        """The one number that a library without constraints maximises; None where the objective is not finite.

        The objective itself where every limit is kept. Otherwise −10¹² · (1 + e / (1 + e)) with e the sum of the
        positive excesses: finite, below every feasible value, and higher the nearer the limits are. What the
        infeasible configuration scores plays no part in it.

        Raises:
            UsageError: the outcome has no such objective.
        """
        if objective not in self.objectives:
            raise UsageError(
                f"The objective gave no {objective!r}. It gives {', '.join(map(repr, self.objectives)) or 'nothing'}."
            )
        value = float(self.objectives[objective])
        if self.feasible:
            return value if math.isfinite(value) else None
        inverse = 1 / (1 + sum(v for v in self.constraints.values() if not v <= 0))
        return -1e12 * (2 - (0.0 if math.isnan(inverse) else inverse))


class Pruned(Exception):
    """Raised by an objective, or by a backend's ``report``, to end a trial that will not win."""


#: Called by an objective with (step, value of the first objective so far); raises :class:`Pruned` where the trial is
#: to be given up. Steps count up from 0: folds, or evaluations within a training.
Report = Callable[[int, float], None]
#: Evaluates the values of one trial. Deterministic in them: a trial that finished is never evaluated again.
Evaluate = Callable[[Values, Report], Outcome]


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it is kept.

    Attributes:
        number: in the order in which trials began.
        values: of the active parameters.
        state: ``complete``, ``pruned`` or ``failed``.
        outcome: None where it was pruned or failed.
        reports: (step, value) pairs.
        seconds: that the evaluation took.
        error: one sentence where it failed.
    """

    number: int
    values: Values
    state: State
    outcome: Outcome | None
    reports: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    error: str = ""


class Backend(Protocol):
    """One library's way through a space. Resumes from what lies in ``folder``; repeats no finished trial."""

    def __call__(
        self,
        parameters: Sequence[Parameter],
        evaluate: Evaluate,
        *,
        strategy: str,
        n_trials: int,
        folder: str,
        first: Sequence[Values] = (),
        objectives: Sequence[str] = ("quality",),
        seed: int = 0,
        workers: int = 1,
        prune: bool = False,
    ) -> None:
        """Evaluate until ``n_trials`` trials are finished, those of earlier calls included.

        ``evaluate`` is already the recording one: it writes each finished trial's record and gives the recorded
        outcome of values that were evaluated before. Failed trials count, and do not stop the search.
        """
