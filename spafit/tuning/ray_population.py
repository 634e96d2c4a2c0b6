"""Population-based training through Ray Tune: learning rates and dropouts that change while models train."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.errors import OutputError, UsageError
from spafit.io import plain, write_json
from spafit.runtime import Progress
from spafit.tuning.parameters import Parameter, Values, active_values, check_parameters
from spafit.tuning.ray_backend import random_configuration
from spafit.tuning.ray_session import import_tune, local_ray, one_thread, quiet_tune, trial_resources

#: Trains one interval with these values from the state in the folder (empty at the start), leaves the new state there,
#: and gives the score, larger is better.
Step = Callable[[Values, Path], float]


@dataclass(frozen=True)
class PopulationStep:
    """One interval of one member.

    Attributes:
        member: number of the member.
        interval: counted from 0.
        values: with which it trained.
        score: at its end.
    """

    member: int
    interval: int
    values: dict[str, Any]
    score: float


@dataclass(frozen=True)
class Population:
    """What population-based training gave.

    Attributes:
        steps: in the order in which they ended. A member's state may come from another's after any of them.
        best: the step of the last interval with the best score.
        state: folder with the state after it.
    """

    steps: tuple[PopulationStep, ...]
    best: PopulationStep
    state: Path


def run_pbt(
    parameters: Sequence[Parameter],
    step: Step,
    *,
    folder: str,
    population: int = 8,
    intervals: int = 10,
    first: Sequence[Values] = (),
    seed: int = 0,
    workers: int = 1,
) -> Population:
    """Train a population; after each interval its worst quarter goes on from the state of its best quarter.

    A member that goes on from another's state takes its values, each multiplied by 0.8 or 1.2 and kept in its range,
    or with probability 1/4 drawn anew. Members wait for each other after every interval. What is found is a course of
    values over one training, not values to train with from the start: see the members' ``steps``.

    Only for what can change within a training: learning rate, dropout, weight decay. A plan (its boundaries, methods
    and ranks) decides which weights there are; search those with :func:`~spafit.tuning.ray_backend.run_ray`.

    Args:
        parameters: real ones without conditions.
        step: trains one interval; runs in other processes, so it must be picklable (as by ``cloudpickle``).
        folder: gets ``pbt.json`` with every step, and ``best`` with the best final state; must hold neither. The
            states of all members after all intervals lie in it until the end; a run that is interrupted starts anew.
        population: number of members, at least 4.
        intervals: that each member trains.
        first: values of the first members; the others' are drawn.
        seed: of all draws.
        workers: members that train at the same time, each with one core.

    Raises:
        UsageError: Ray is not installed; a parameter is not real or has a condition; the population is too small.
        OutputError: ``folder`` holds another population.
        RuntimeError: ``step`` failed; Ray's message is its cause.

    Source: Jaderberg et al. (2017), arXiv 1711.09846.
    """
    check_parameters(parameters)
    for parameter in parameters:
        if parameter.kind != "real" or parameter.when is not None:
            raise UsageError(
                f"Population-based training cannot change {parameter.name!r} while a model trains. "
                "Give real parameters without conditions, such as learning rate and dropout, and search the rest."
            )
    if population < 4 or intervals < 1 or len(first) > population:
        raise UsageError(
            f"A population of {population} with {len(first)} first members and {intervals} intervals cannot be "
            "trained. Give at least 4 members, no more first ones than that, and at least one interval."
        )
    out = Path(folder).absolute()
    for name in ("pbt.json", "best"):
        if (out / name).exists():
            raise OutputError(f"{out / name} is of another population. Choose another folder, or delete it.")
    members = [active_values(parameters, values) for values in first]
    with quiet_tune(seed=seed) as tune:
        members += [random_configuration(parameters, seed=seed, number=i) for i in range(len(members), population)]
        with local_ray(workers, out / "tune"), Progress("population", population * intervals) as progress:
            from ray.tune.schedulers import PopulationBasedTraining

            watch = _watch(progress)
            results = tune.Tuner(
                tune.with_resources(_trainable(step), trial_resources(workers, all_cores=True)),
                param_space={"values": tune.grid_search(members)},
                tune_config=tune.TuneConfig(
                    metric="score", mode="max", reuse_actors=True,
                    scheduler=PopulationBasedTraining(
                        time_attr="training_iteration", perturbation_interval=1, synch=True, log_config=False,
                        hyperparam_mutations={"values": _mutations(parameters)},
                        custom_explore_fn=lambda config: _inside(parameters, config),
                    ),
                ),
                run_config=tune.RunConfig(
                    name="tune", storage_path=str(out), verbose=0, callbacks=[watch],
                    stop={"training_iteration": intervals}, failure_config=tune.FailureConfig(fail_fast=True),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
                ),
            ).fit()  # fmt: skip
            if results.errors:
                raise RuntimeError("A step of the population failed.") from results.errors[0]
            steps = tuple(watch.steps)
            best = max((s for s in steps if s.interval == intervals - 1), key=lambda s: s.score)
            state = next(r.checkpoint.path for r in results if _member(r.metrics["trial_id"]) == best.member)
            shutil.copytree(state, out / "best", ignore=shutil.ignore_patterns(".metadata.json", ".tune_metadata"))
    write_json(out / "pbt.json", [plain(vars(s)) for s in steps])
    return Population(steps, best, out / "best")


def _member(trial_id: str) -> int:
    return int(trial_id.rsplit("_", 1)[1])  # Tune numbers the points of a grid in their order


def _mutations(parameters: Sequence[Parameter]) -> dict[str, Any]:
    tune = import_tune()
    return {p.name: (tune.loguniform if p.log else tune.uniform)(p.low, p.high) for p in parameters}


def _inside(parameters: Sequence[Parameter], config: dict[str, Any]) -> dict[str, Any]:
    """Changed values, kept in their ranges."""
    values = {p.name: min(max(config["values"][p.name], p.low), p.high) for p in parameters}
    return {**config, "values": values}


def _trainable(step: Step) -> type[Any]:
    """Tune's trial of one member: its state is a folder that is copied into and out of Tune's checkpoints."""
    from ray.tune import Trainable

    class Member(Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.folder = Path(tempfile.mkdtemp(prefix="spafit-member-"))
            self.reset_config(config)

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.values = config["values"]
            self._fill(None)  # the member's own state comes through load_checkpoint
            return True

        def step(self) -> dict[str, Any]:
            one_thread()
            score = float(step(self.values, self.folder))
            return {"score": score, "values": dict(self.values)}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            shutil.copytree(self.folder, checkpoint_dir, dirs_exist_ok=True)

        def load_checkpoint(self, checkpoint_dir: Any) -> None:
            self._fill(checkpoint_dir)

        def _fill(self, source: Any) -> None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if source is None:
                self.folder.mkdir()
            else:
                shutil.copytree(source, self.folder)

        def cleanup(self) -> None:
            shutil.rmtree(self.folder, ignore_errors=True)

    return Member


def _watch(progress: Progress) -> Any:
    from ray.tune import Callback

    class Watch(Callback):
        def __init__(self) -> None:
            self.steps: list[PopulationStep] = []

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            interval = result["training_iteration"] - 1
            self.steps.append(PopulationStep(_member(trial.trial_id), interval, result["values"], result["score"]))
            progress.advance()

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles it with its own state, which nothing reads

    return Watch()
