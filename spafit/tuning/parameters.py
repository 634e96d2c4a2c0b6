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
