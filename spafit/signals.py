"""Signals: what is measured of a model while it trains, handed to the trainer as a callable.

The trainer knows nothing of what a signal measures. It decides when, keeps training as it would be without, and writes
the values. Whatever reacts to a signal reads them from the same table.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from spafit.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

#: Name, hidden index (None: of no hidden state), value.
Reading = tuple[str, int | None, float]
#: Called with the model and the step: 0 before training (also where an interrupted run goes on, always with the
#: weights before training), then the number of steps done.
Measure = Callable[["nn.Module", int], Mapping[str, float] | Iterable[Reading]]
#: Steps at which a signal without an interval of its own is measured, at most.
MOST_STEPS = 50


@dataclass(frozen=True)
class Signal:
    """Something that is measured at chosen steps of training.

    It is measured before the first step, then every ``every`` steps as far as ``share`` allows, after the last step,
    and on the weights that are kept. The model that it is given is in eval mode without gradients; modes and random
    generators are put back afterwards. It must not change weights.

    Attributes:
        name: what notes call it.
        measure: gives named numbers, or rows of name, hidden index and value.
        every: steps between two measurements; None takes a fiftieth of the training.
        share: seconds that it may take, as a share of those of training. Where it would take more, the interval is
            widened, evenly over the steps that are left; which steps those are then depends on the machine. The
            measurements at the start and the end are made in any case.
    """

    name: str
    measure: Measure = field(repr=False)
    every: int | None = None
    share: float = 0.10

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.name:
            raise UsageError("A signal needs a name.")
        if self.every is not None and self.every < 1:
            raise UsageError(f"The signal {self.name} is measured every {self.every} steps; give at least 1.")
        if not 0 < self.share < math.inf:
            raise UsageError(
                f"The signal {self.name} may take a share of {self.share} of the training's seconds; give a number "
                "above 0, such as 0.1."
            )

    def read(self, model: nn.Module, step: int) -> list[Reading]:
        """Measure the model as it is now, and leave everything else as it was.

        Raises:
            UsageError: what comes back is neither named numbers nor rows.
        """
        with untouched(model):
            found = self.measure(model, step)
        rows = [(n, None, v) for n, v in found.items()] if isinstance(found, Mapping) else found
        try:
            return [(str(name), None if hidden is None else int(hidden), float(value)) for name, hidden, value in rows]
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The signal {self.name} gave {type(found).__name__} at step {step} that holds no readings ({error}). "
                "Return a dict of numbers, or rows (name, hidden index or None, number)."
            ) from error


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on exit every module's mode and all global random generators are as before."""
    import torch

    from spafit.prefix_forward import eval_mode

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), eval_mode(model):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@dataclass
class Pace:
    """When a signal is due, so that its seconds stay within a share of the training's.

    Attributes:
        share: of the training's seconds.
        every: steps between two measurements, at least.
        total: steps of the training.
        reserved: measurements at the end that are made in any case.
        exact: measure at each step that ``every`` allows, whatever the share.
        steps: steps at which it was measured.
        spent: seconds that all measurements took.
        cost: seconds that the last one took.
    """

    share: float
    every: int = 1
    total: int = 0
    reserved: int = 1
    exact: bool = False
    steps: list[int] = field(default_factory=list)
    spent: float = 0.0
    cost: float = 0.0

    def due(self, step: int, *, seconds: float) -> bool:
        """Whether to measure after ``step`` steps that took ``seconds`` of training, measurements not counted.

        What the share leaves, at the speed so far, is spread evenly over the steps that are left.
        """
        if step in self.steps:
            return False
        if step >= self.total:
            return True
        if step % self.every or self.exact:
            return step % self.every == 0
        left = self.share * seconds * self.total / step - self.spent - self.reserved * self.cost
        if left < self.cost:
            return False
        last = max(self.steps, default=0)
        affordable = math.inf if self.cost == 0 else left // self.cost
        return step - last >= (self.total - last) / (affordable + 1)

    def add(self, step: int, seconds: float) -> None:
        """Note a measurement and what it took."""
        if step not in self.steps:
            self.steps.append(step)
        self.spent, self.cost = self.spent + seconds, seconds
