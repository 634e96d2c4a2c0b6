"""What a trainer needs of a remedy against forgetting, and what every remedy reports of its price."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from spafit.errors import ModelError, UsageError
from spafit.retain.items import data_digest

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from spafit.adapt import StratifiedModel

_TIMED_STEPS = 3


@runtime_checkable
class Remedy(Protocol):
    """What a trainer needs of a remedy.

    Attributes:
        name: as on the command line; the loss is logged under it.
        weight: what the term is multiplied by; 0 is the same as no remedy, to the bit.
    """

    name: str
    weight: float

    def prepare(self, stratified: StratifiedModel, tokenizer: Any, *, max_length: int, device: str) -> None:
        """Keep what is needed of the start. Call it before the first step and before a checkpoint is loaded.

        Args:
            stratified: the model, on its device.
            tokenizer: the model's, or None.
            max_length: tokens kept of each item.
            device: where the model is.
        """
        ...

    def loss(self, stratified: StratifiedModel, step: int) -> torch.Tensor:
        """The weighted term at a step, counted from 0: a scalar with gradients, the same for the same step."""
        ...


class PricedRemedy(ABC):
    """What all remedies share: the weight's check, and what the remedy costs.

    Attributes:
        name: see :class:`Remedy`.
        weight: see :class:`Remedy`.
        seconds: extra time per step, forward and backward, measured in ``prepare`` (median of three); 0 at weight 0.
        setup_seconds: time that ``prepare`` took, without that measurement.
        bytes: extra memory kept during training.
    """

    name: str
    _shown: tuple[str, ...] = ()

    def __init__(self, weight: float):
        if isinstance(weight, bool) or not math.isfinite(weight) or weight < 0:
            raise UsageError(f"{self.name}: the weight must be a number of at least 0; got {weight!r}.")
        self.weight = float(weight)
        self.seconds, self.setup_seconds, self.bytes = 0.0, 0.0, 0
        self._ready = False

    def __repr__(self) -> str:
        """The remedy as on the command line, with a digest in the place of data: equal texts mean equal remedies."""
        values = ((n, getattr(self, n)) for n in self._shown)
        shown = [f"{n}={data_digest(v)[:16] if n == 'data' else v}" for n, v in values]
        return ",".join([f"{self.name}:{self.weight!r}", *shown])

    def prepare(self, stratified: StratifiedModel, tokenizer: Any, *, max_length: int, device: str) -> None:
        """Keep what is needed of the start and measure the price; nothing is done at weight 0.

        Raises:
            DataError: the given items do not fit the model's head.
            ModelError: the remedy does not work on this kind of model.
        """
        if self.weight == 0:
            return
        start = time.perf_counter()
        self._set_up(stratified, tokenizer, max_length=max_length, device=device)
        self._ready = True
        self.setup_seconds = time.perf_counter() - start
        self.seconds = self._seconds_per_step(stratified, device)

    def loss(self, stratified: StratifiedModel, step: int) -> torch.Tensor:
        """See :meth:`Remedy.loss`.

        Raises:
            ModelError: ``prepare`` was not called.
        """
        import torch

        if self.weight == 0:
            return torch.zeros((), device=next(stratified.model.parameters()).device)
        if not self._ready:
            raise ModelError(f"{self.name} knows nothing of the start yet. Call prepare() before training.")
        return self.weight * self._term(stratified, step)

    @abstractmethod
    def _set_up(self, stratified: StratifiedModel, tokenizer: Any, *, max_length: int, device: str) -> None: ...

    @abstractmethod
    def _term(self, stratified: StratifiedModel, step: int) -> torch.Tensor: ...

    def _seconds_per_step(self, stratified: StratifiedModel, device: str) -> float:
        """Median time of a step's term with its gradients; random numbers and gradients are left as they were."""
        import torch

        trained = list(trained_parameters(stratified).values())
        seconds = []
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            for step in range(_TIMED_STEPS + 1):  # the first one warms up
                start = time.perf_counter()
                value = self.loss(stratified, step)
                if value.requires_grad:
                    torch.autograd.grad(value, trained, allow_unused=True)
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        return sorted(seconds[1:])[_TIMED_STEPS // 2]


def prices(remedies: Sequence[PricedRemedy]) -> pd.DataFrame:
    """What remedies cost: remedy, weight, seconds (per step), setup_seconds, bytes.

    The price in the task's own score is the difference between runs with and without the remedy.
    """
    import pandas as pd

    columns = ("weight", "seconds", "setup_seconds", "bytes")
    return pd.DataFrame([{"remedy": r.name, **{c: getattr(r, c) for c in columns}} for r in remedies])


def trained_parameters(stratified: StratifiedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by canonical name, as they are now."""
    from spafit.adapt import canonical_parameters

    parameters = canonical_parameters(stratified.model)
    return {name: parameters[name] for name in stratified.trainable}
