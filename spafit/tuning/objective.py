"""The objective of a search over plans: trained on each fold, scored on the rest, within hard limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spafit import io
from spafit.data.training import TrainData
from spafit.errors import UsageError
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig
from spafit.tuning.parameters import Outcome, Report, Values
from spafit.tuning.space import SearchSpace

if TYPE_CHECKING:
    from spafit.scheduling import Schedule

#: What is measured of a trained model that spafit itself cannot measure: a number by the folder of the model.
Measure = Callable[[Path], float]


@dataclass(frozen=True)
class PlanObjective:
    """Evaluates values of a :class:`SearchSpace` by training.

    Objectives are ``quality`` (mean headline over folds), ``parameters`` (trainable, negative) and, with
    ``forgetting``, ``forgetting`` (negative). Limits are constraints: what trains too many parameters is not trained.

    Attributes:
        space: decodes the values.
        model: reference of a plain model; None for the built-in default.
        folds: tasks with ``train`` and ``fold`` (:func:`spafit.tuning.crossval.folds`).
        settings: of each training; the values' rates take its place.
        folder: one folder per configuration; adapters are kept there.
        seed: of each training.
        max_parameters: most trainable parameters.
        max_memory: most bytes at the peak of a training.
        max_forgetting: most forgetting, in the unit of ``forgetting``.
        forgetting: what a trained model forgot, by its folder (law: analysis supplies it).
        device: kind of torch device.
        revision: of a hub model.
        offline: never ask the hub.
        allow_pickle: accept pickle weights.
        schedule: changes each plan while it trains, by rules on time or gradients; see :mod:`spafit.scheduling`. Its
            boundaries must fit every plan of the space.
    """

    space: SearchSpace
    model: str | None
    folds: Sequence[TrainData]
    settings: TrainSettings
    folder: Path
    seed: int = 0
    max_parameters: int | None = None
    max_memory: int | None = None
    max_forgetting: float | None = None
    forgetting: Measure | None = None
    device: str = "auto"
    revision: str | None = None
    offline: bool = False
    allow_pickle: bool = False
    schedule: Schedule | None = None

    def __call__(self, values: Values, report: Report) -> Outcome:
        """Train and score on each fold in turn; each fold's headline is reported."""
        from spafit.training import fit

        config, changes = self.space.decode(values)
        size = self.count(config)
        constraints: dict[str, float] = {}
        details: dict[str, Any] = {"parameters": size, "plan": config.to_dict()}
        if self.max_parameters is not None:
            constraints["parameters"] = float(size - self.max_parameters) / max(1, self.max_parameters)
            if constraints["parameters"] > 0:  # known before training, so that it costs none
                return Outcome({"quality": float("-inf")}, constraints, details)
        place = self.folder / io.content_digest([config.to_dict()["strata"], changes])[:16]
        scores, memory, lost = [], [], []
        for i, data in enumerate(self.folds):
            result = fit(
                self.model, config, data=data, settings=replace(self.settings, select_share=0, patience=0, **changes),
                seeds=(self.seed,), out=place / f"fold-{i}", method="search", prefix_folder=self.folder / "prefix",
                device=self.device, revision=self.revision, offline=self.offline, allow_pickle=self.allow_pickle,
                schedule=self.schedule, quiet=True,
            )  # fmt: skip
            own = result.runs[result.runs["split"] == "fold"]
            scores.append(float(own.loc[own["metric"] == "headline", "value"].iloc[0]))
            memory.append(float(own["peak_memory_bytes"].iloc[0]))
            if self.forgetting is not None:
                lost.append(self.forgetting(result.model_folder(self.seed)))
            report(i, scores[-1] if np.isfinite(scores[-1]) else -1.0)
        details |= {"folds": scores, "folder": place.name, "peak_memory_bytes": max(memory)}
        objectives = {"quality": float(np.mean(scores)), "parameters": -float(size)}
        if lost:
            objectives["forgetting"] = -float(np.mean(lost))
            details["forgetting"] = lost
        if self.max_memory is not None:
            constraints["memory"] = (max(memory) - self.max_memory) / self.max_memory
        if self.max_forgetting is not None:
            constraints["forgetting"] = float(np.mean(lost)) - self.max_forgetting
        return Outcome(objectives, constraints, details)

    def record(self) -> list[object]:
        """What outcomes depend on beside the values; see ``depends_on`` of :func:`spafit.search`."""
        limits = self.max_parameters, self.max_memory, self.max_forgetting
        settings = {k: v for k, v in self.settings.to_dict().items() if k not in ("track", "log_steps", "workers")}
        measure = self.forgetting
        name = repr(measure) if is_dataclass(measure) else getattr(measure, "__qualname__", type(measure).__qualname__)
        rules = [] if self.schedule is None else [self.schedule.to_dict()]
        return [self.model, self.revision, [f.digest for f in self.folds], settings, self.seed, limits, name, *rules]

    def count(self, config: StrataConfig) -> int:
        """Parameters that a plan trains on the model, at any time of its schedule."""
        from spafit.adapt import count_trainable, with_missing_pooler
        from spafit.heads import build_without_weights

        labels = self.folds[0].labels
        empty, _ = build_without_weights(
            self.model, labels=1 if labels is None else len(labels), revision=self.revision, offline=self.offline
        )
        plan = with_missing_pooler(empty, config, ())
        return count_trainable(empty, plan if self.schedule is None else self.schedule.widest(plan))

    def check(self) -> None:
        """See before anything trains that the limits can be kept and measured.

        Raises:
            UsageError: no plan of the space is small enough (says the smallest), or a limit that nothing measures.
        """
        if self.max_forgetting is not None and self.forgetting is None:
            raise UsageError("A limit of forgetting needs something that measures it. Give forgetting.")
        if self.schedule is not None:  # a search trains on all of a fold and measures nothing meanwhile
            self.schedule.check(signals=(), select_share=0, processes=1)
        if self.max_parameters is None:
            return
        rank = min(self.space.ranks)
        sizes = []
        for method in self.space.methods:
            strata = {s: method for s in self.space.blocks}
            values = {f"{s}.groups": min(self.space.groups) for s in strata}
            smallest = _uniform(self.space, method, rank) | values
            sizes.append(self.count(self.space.decode(smallest)[0]))
        if min(sizes) > self.max_parameters:
            raise UsageError(
                f"At most {self.max_parameters:,} parameters is less than the smallest plan of the space trains: "
                f"{min(sizes):,}. Give at least that."
            )


def _uniform(space: SearchSpace, method: str, rank: int) -> dict[str, Any]:
    """Values of one method everywhere."""
    found: dict[str, Any] = {}
    for parameter in space.parameters():
        name = parameter.name.rpartition(".")[2]
        value: Any = parameter.choices[0] if parameter.kind == "categorical" else parameter.low
        if parameter.name.endswith(".groups"):
            value = min(space.groups)
        elif name.startswith("method"):
            value = method
        elif name.startswith("rank"):
            value = rank
        elif name == "s1":
            value = int(parameter.low)
        if parameter.is_active(found):
            found[parameter.name] = value
    return found


def measured(values: Mapping[str, Any]) -> str:
    """Digest of values, by which records are known."""
    return io.content_digest([sorted((k, repr(v)) for k, v in values.items())])[:16]
