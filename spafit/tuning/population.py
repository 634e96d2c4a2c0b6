"""Population-based training of one plan: learning rates and dropout that change while it trains, then confirmed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from spafit import io, plotting
from spafit.data.training import TrainData
from spafit.errors import UsageError
from spafit.runtime import provenance
from spafit.tuning.objective import PlanObjective
from spafit.tuning.parameters import Parameter, Values
from spafit.tuning.ray_population import PopulationStep, run_pbt
from spafit.tuning.search_result import SearchResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: In a member's state: the values of every interval so far, and the folder of its trained model.
COURSE, MODEL = "course.json", "model"


@dataclass(frozen=True)
class PlanStep:
    """Trains a plan for one interval from the state in a folder; a :data:`spafit.tuning.ray_population.Step`.

    An interval trains ``settings.epochs`` at constant rates, with a fresh optimiser. A finished interval is kept under
    ``folder`` and never trained again, so that an interrupted population goes on.

    Attributes:
        objective: model, data (the first fold), settings, seed; its space decodes the values.
        plan: values of the plan, which stay.
        folder: keeps trained intervals.
        split: what is scored.
    """

    objective: PlanObjective
    plan: Values
    folder: Path
    split: str = "fold"

    def __call__(self, values: Values, state: Path) -> float:
        """Train one interval, leave the new state in the folder, give the headline."""
        course = io.read_json(state / COURSE) if (state / COURSE).is_file() else []
        start = state / MODEL if course else None
        score, model = self.train(values, course, start=start)
        shutil.rmtree(state / MODEL, ignore_errors=True)
        shutil.copytree(model, state / MODEL)
        io.write_json(state / COURSE, [*course, dict(values)])
        return score

    def train(self, values: Values, course: Sequence[Values], *, start: Path | None) -> tuple[float, Path]:
        """One interval after those of ``course``; gives the headline and the folder of the trained model."""
        from spafit.training import fit

        o = self.objective
        config, changes = o.space.decode({**self.plan, **values})
        place = self.folder / io.content_digest([o.seed, repr(dict(self.plan)), *map(repr, course), repr(values)])[:16]
        settings = replace(o.settings, select_share=0, patience=0, schedule="constant", warmup=0, **changes)
        seed = o.seed + len(course)  # another order of the items in each interval
        result = fit(
            o.model, config, data=o.folds[0], settings=settings, seeds=(seed,), out=place, method="population",
            prefix_folder=self.folder / "prefix", start=start, device=o.device, revision=o.revision, offline=o.offline,
            allow_pickle=o.allow_pickle, quiet=True,
        )  # fmt: skip
        rows = result.runs[(result.runs["split"] == self.split) & (result.runs["metric"] == "headline")]
        return float(rows["value"].iloc[0]), result.model_folder(seed)

    def replay(self, course: Sequence[Values], *, seed: int, data: TrainData, split: str) -> float:
        """The headline of a whole course with another seed, on other data: what confirms it."""
        again = replace(self, objective=replace(self.objective, seed=seed, folds=(data,)), split=split)
        score, model = math.nan, None
        for i, values in enumerate(course):
            score, model = again.train(values, course[:i], start=model)
        return score


def changeable(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """The parameters that can change within a training: rates and dropout."""
    return tuple(p for p in parameters if p.kind == "real" and p.when is None)


def search_population(
    objective: PlanObjective,
    plan: Values,
    *,
    out: str | Path,
    population: int = 8,
    intervals: int = 6,
    official: tuple[TrainData, str] | None = None,
    confirm_seeds: Sequence[int] = (1000, 1001, 1002),
    seed: int = 0,
    workers: int = 1,
    command: str | None = None,
) -> SearchResult:
    """Train a population of one plan whose rates and dropout change after every interval; confirm the best course.

    A finished population is kept, and an interrupted one trains no finished interval again, where the members end in
    the same order.

    Args:
        objective: the first of its folds is trained on and scored; ``settings.epochs`` is the length of an interval.
        plan: values of the space that give the plan; its rates are the first member's.
        out: folder; one record per member, ``course.csv`` with the values of the best course, and what
            :func:`spafit.search` writes.
        population: members, at least 4.
        intervals: per member.
        official: data and split on which the best course is trained anew with each of ``confirm_seeds``.
        confirm_seeds: see ``official``.
        seed: of all draws.
        workers: members at a time.
        command: how this was called.

    Returns:
        The result; ``run["best"]["course"]`` has the values of every interval of the best member's model, whose
        earlier intervals may be another member's. ``values`` are those of the last interval.

    Raises:
        UsageError: Ray is not installed, nothing of the space can change within a training, or limits that this
            strategy does not keep.
        OutputError: the folder holds another search.

    Source: Jaderberg et al. (2017), arXiv 1711.09846.
    """
    from spafit.tuning.searching import claimed, read_records

    folder, space = Path(out), objective.space
    parameters = changeable(space.parameters())
    if not parameters:
        raise UsageError("No rate or dropout of the space can change within a training. Give a range.")
    if objective.max_memory is not None or objective.max_forgetting is not None:
        raise UsageError("Limits of memory and forgetting are for the other strategies. Leave them out with pbt.")
    step = PlanStep(objective, dict(plan), folder / "trained")
    config, _ = space.decode(plan)
    size = objective.count(config)
    if objective.max_parameters is not None and size > objective.max_parameters:
        raise UsageError(f"The plan trains {size:,} parameters, more than {objective.max_parameters:,}. Give another.")
    first = {p.name: plan[p.name] for p in parameters if p.name in plan}
    key = claimed(folder, parameters, [*objective.record(), repr(step.plan), population, intervals])
    place = folder / "population"
    if (place / "pbt.json").is_file():
        steps = tuple(PopulationStep(**s) for s in io.read_json(place / "pbt.json"))
        best = max((s for s in steps if s.interval == intervals - 1), key=lambda s: s.score)
    else:
        shutil.rmtree(place, ignore_errors=True)
        found = run_pbt(
            parameters, step, folder=str(place), population=population, intervals=intervals, first=[first], seed=seed,
            workers=workers,
        )  # fmt: skip
        steps, best = found.steps, found.best
    course = io.read_json(place / "best" / COURSE)
    for member in range(population):
        own = sorted((s for s in steps if s.member == member), key=lambda s: s.interval)
        values = {**plan, **own[-1].values}
        details = {"parameters": size, "plan": space.decode(values)[0].to_dict(), "intervals": [s.values for s in own]}
        io.write_json(
            folder / "trials" / f"member-{member}.json",
            {"values": values, "state": "complete", "reports": [(s.interval, s.score) for s in own], "error": "",
             "started": float(member), "seconds": 0.0,
             "objectives": {"quality": own[-1].score, "parameters": -float(size)}, "constraints": {},
             "details": details},
        )  # fmt: skip
    confirmed: list[dict[str, Any]] = []
    if official is not None:
        again = replace(step, folder=folder / "confirmed")
        confirmed = [
            {"seed": s, "value": again.replay(course, seed=s, data=official[0], split=official[1])}
            for s in confirm_seeds
        ]  # fmt: skip
    content = {
        "schema_version": io.SCHEMA_VERSION, "key": key, "status": "complete", "command": command or "spafit.search",
        "backend": "ray", "strategy": "pbt", "n_trials": population, "objectives": ["quality"], "seed": seed,
        "best": {"trial": best.member, "values": {**plan, **best.values}, "value": best.score, "course": course},
        "confirmed": confirmed, "parameters": [p.name for p in parameters], **provenance(),
    }  # fmt: skip
    table = pd.DataFrame(course)
    table.insert(0, "epoch", [i * objective.settings.epochs for i in range(len(course))])
    io.write_table(folder / "course", table)
    result = SearchResult(folder, content, read_records(folder / "trials"), parameters, space)
    result.save(folder)
    figure = plot_course(steps, course, parameters)
    plotting.save_figure(figure, folder / "course.png")
    return result


def plot_course(steps: Sequence[PopulationStep], course: Sequence[Values], parameters: Sequence[Parameter]) -> Figure:
    """Each member's values over the intervals, and those that the best model was trained with; one panel per name."""
    with plotting.style():
        figure = plotting.new_figure(width=6.4, height=1.0 + 2.0 * len(parameters))
        axes = figure.subplots(len(parameters), 1, sharex=True, squeeze=False)[:, 0]
        for ax, parameter in zip(axes, parameters, strict=True):
            for member in sorted({s.member for s in steps}):
                own = sorted((s for s in steps if s.member == member), key=lambda s: s.interval)
                values = [s.values[parameter.name] for s in own]
                ax.plot(range(len(own)), values, color="0.7", linewidth=1, label="member" if member == 0 else None)
            best = [values[parameter.name] for values in course]
            ax.plot(range(len(best)), best, color=plotting.MODEL_COLORS[1], linewidth=2, label="best model's course")
            ax.set(ylabel=parameter.name, yscale="log" if parameter.log else "linear")
            for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                axis(lambda value, _: f"{value:.2g}")
        axes[0].legend(frameon=False, fontsize="small")
        axes[-1].set(xlabel="interval", xticks=range(len(course)))
    return figure
