"""Search through Ray Tune: grids, random draws and TPE, several trials at a time, with successive halving."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spafit.errors import OutputError, UsageError, check_choice
from spafit.io import content_digest, read_json, write_json
from spafit.runtime import Progress, seed_sequence
from spafit.tuning.parameters import Evaluate, Outcome, Parameter, Pruned, Values, active_values, check_parameters
from spafit.tuning.ray_session import import_tune, local_ray, one_thread, quiet_tune, trial_resources

#: Value of trials that failed: below every infeasible one (see :meth:`Outcome.single_value`).
_FAILED = -4e12


#: Points of a grid, at most: they are listed before the first is evaluated.
MOST_POINTS = 100_000


def run_ray(
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
    """Evaluate with Ray Tune until ``n_trials`` trials are finished, those of earlier calls included.

    Grid and random configurations are known before any result: they are listed (random ones drawn from Tune's
    domains, parameters in order, inactive ones left out) and given to Tune as points of a grid. TPE goes through
    Tune's OptunaSearch with a define-by-run space, which asks for active parameters only.

    Each finished trial is a JSON file in ``ray`` in ``folder``; a later call rebuilds the search from these files, and
    Tune's own state is not kept. A trial that was under way when the search was killed is tried again, or replaced.

    Args:
        parameters: the space; a condition looks at a parameter that comes before.
        evaluate: gives the outcome of values. It runs in other processes, so it must be picklable (as by
            ``cloudpickle``) and record into files; several evaluate at the same time. It runs in a thread of its
            own. It may raise :class:`Pruned`, or anything else where it fails: such trials count; failed ones rank
            below all others, pruned ones by their last report.
        strategy: ``grid`` (every combination of :attr:`Parameter.grid`, stops when there are no more), ``random`` or
            ``tpe`` (tree of Parzen estimators, 10 random trials first).
        n_trials: number of finished trials at which to stop.
        folder: where the search's state lies.
        first: configurations that are evaluated before any other, unless they have been.
        objectives: one name, which is maximised. Infeasible outcomes count as :meth:`Outcome.single_value` says.
        seed: of all suggestions; with several workers TPE also depends on which trial ends first.
        workers: trials at a time, each with one core, one torch thread and its share of the GPUs.
        prune: give up trials by asynchronous successive halving: at 1, 3, 9, … reports a trial goes on if it is among
            the better third of those that came as far. Limits are not seen by it, since reports carry none.

    Raises:
        UsageError: Ray or, for ``tpe``, Optuna is not installed; several objectives are asked for; the strategy is
            none of the three; ``first`` does not fit the space; a real parameter of a grid has no ``grid``.
        OutputError: ``folder`` holds the search of another space or objective.

    Source: Liaw et al. (2018), arXiv 1807.05118; successive halving: Li et al. (2020), arXiv 1810.05934.
    """
    check_choice("The strategy of Ray", strategy, ("grid", "random", "tpe"))
    if len(objectives) != 1:
        raise UsageError(
            f"Ray maximises one objective here, not {', '.join(objectives) or 'none'}. "
            "Give one, or search for several with Optuna's nsga2."
        )
    if workers < 1:
        raise UsageError(f"Ray cannot run {workers} trials at a time. Give at least one worker.")
    check_parameters(parameters)
    queued = [active_values(parameters, values) for values in first]
    listed = grid_configurations(parameters) if strategy == "grid" else []
    if strategy == "tpe":
        _import_optuna()  # before its logger's level is noted
    with quiet_tune(seed=seed) as tune:
        state = Path(folder).absolute() / "ray"
        done = _finished(state, parameters, objectives[0])
        known = [record["coordinates"] for record in done]
        queued = [values for values in queued if _coordinates(parameters, values) not in known]
        left = n_trials - len(done)
        if strategy == "random":
            listed = [random_configuration(parameters, seed=seed, number=i) for i in range(n_trials)]
        if strategy != "tpe":
            known += [_coordinates(parameters, values) for values in queued]
            queued = (queued + _without(parameters, listed, known))[:left]
            left = len(queued)
        if left < 1:
            return
        with local_ray(workers, state / "tune"), Progress("ray", len(done) + left) as progress:
            from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

            progress.advance(len(done))
            watch = _watch(parameters, state, progress)
            searcher = _optuna_search(parameters, queued, done, seed=seed) if strategy == "tpe" else None
            space = {} if strategy == "tpe" else {"values": tune.grid_search(queued)}
            halving = ASHAScheduler(time_attr="reports", max_t=10**6, reduction_factor=3)
            trainable = _trainable(evaluate, parameters, state, objectives[0], prune=prune)
            tune.Tuner(
                tune.with_resources(trainable, trial_resources(workers)),
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric="value", mode="max", search_alg=searcher, scheduler=halving if prune else FIFOScheduler(),
                    num_samples=left if strategy == "tpe" else 1, max_concurrent_trials=workers, reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="tune", storage_path=str(state), verbose=0, callbacks=[watch], stop=watch,
                ),
            ).fit()  # fmt: skip
    if watch.refused:
        raise UsageError(watch.refused)


def grid_configurations(parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Every combination of the parameters' grids, the last parameter fastest; inactive ones left out.

    Raises:
        UsageError: a real parameter has no grid, or a grid leaves the range.
    """
    configurations: list[dict[str, Any]] = [{}]
    for parameter in parameters:
        if len(configurations) > MOST_POINTS:
            raise UsageError(
                f"The grid has more than {MOST_POINTS:,} points. Narrow the space (fewer groups, methods, ranks or "
                "rates), or search at random or by TPE."
            )
        points = parameter.grid or parameter.choices
        if not points and parameter.kind == "integer":
            points = tuple(range(int(parameter.low), int(parameter.high) + 1))
        if not points:
            raise UsageError(f"A grid search needs the values of {parameter.name!r}. Name them in its grid.")
        configurations = [
            {**values, **point}
            for values in configurations
            for point in ([{parameter.name: p} for p in points] if parameter.is_active(values) else [{}])
        ]
    return [active_values(parameters, values) for values in configurations]


def random_configuration(parameters: Sequence[Parameter], *, seed: int, number: int) -> dict[str, Any]:
    """The ``number``-th random configuration of a seed, drawn from Tune's domains."""
    draws = np.random.default_rng(seed_sequence(seed, "ray", number))
    values: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.is_active(values):
            values[parameter.name] = _draw(parameter, draws)
    return values


def _draw(parameter: Parameter, draws: np.random.Generator) -> Any:
    tune = import_tune()
    if parameter.kind == "categorical":
        return parameter.choices[int(draws.integers(len(parameter.choices)))]
    if parameter.low == parameter.high:
        return int(parameter.low) if parameter.kind == "integer" else parameter.low
    if parameter.kind == "integer":
        low, above = int(parameter.low), int(parameter.high) + 1
        domain = tune.lograndint(low, above) if parameter.log else tune.randint(low, above)
        return int(domain.sample(random_state=draws))
    domain = (tune.loguniform if parameter.log else tune.uniform)(parameter.low, parameter.high)
    return min(max(float(domain.sample(random_state=draws)), parameter.low), parameter.high)


def _import_optuna() -> Any:
    try:
        with warnings.catch_warnings():
            import optuna
    except ImportError as error:
        raise UsageError('The strategy tpe of Ray needs Optuna. Install it with pip install "spafit[ray]".') from error
    return optuna


@dataclass(frozen=True)
class _Ask:
    """Optuna's define-by-run space; a class, because Tune pickles its searcher."""

    parameters: tuple[Parameter, ...]

    def __call__(self, trial: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for p in self.parameters:
            if not p.is_active(values):
                continue
            if p.kind == "categorical":
                values[p.name] = p.choices[trial.suggest_categorical(p.name, tuple(range(len(p.choices))))]
            elif p.kind == "integer":
                values[p.name] = trial.suggest_int(p.name, int(p.low), int(p.high), log=p.log)
            else:
                values[p.name] = trial.suggest_float(p.name, p.low, p.high, log=p.log)
        return {"values": values}


def _optuna_search(
    parameters: Sequence[Parameter], queued: Sequence[Values], done: Sequence[Mapping[str, Any]], *, seed: int
) -> Any:
    """Tune's searcher over an Optuna study that already knows the finished trials."""
    optuna = _import_optuna()
    from ray.tune.search.optuna import OptunaSearch

    distributions: dict[str, Any] = {}
    for p in parameters:
        if p.kind == "categorical":
            distributions[p.name] = optuna.distributions.CategoricalDistribution(tuple(range(len(p.choices))))
        elif p.kind == "integer":
            distributions[p.name] = optuna.distributions.IntDistribution(int(p.low), int(p.high), log=p.log)
        else:
            distributions[p.name] = optuna.distributions.FloatDistribution(p.low, p.high, log=p.log)
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="spafit", direction="maximize")
    for record in done:
        known = record["coordinates"]
        study.add_trial(
            optuna.trial.create_trial(
                params=known, distributions={name: distributions[name] for name in known}, value=record["value"]
            )
        )
    draw = int(seed_sequence(seed, "ray", "tpe", len(done)).generate_state(1, np.uint32)[0])
    return OptunaSearch(
        _Ask(tuple(parameters)), metric="value", mode="max", storage=storage, study_name="spafit",
        sampler=optuna.samplers.TPESampler(seed=draw), points_to_evaluate=[_coordinates(parameters, v) for v in queued],
    )  # fmt: skip


def _trainable(
    evaluate: Evaluate, parameters: Sequence[Parameter], state: Path, objective: str, *, prune: bool
) -> type[Any]:
    """Tune's trial of one configuration. Local, so that it travels to the workers with what it holds."""
    from ray.tune import Trainable

    class Trial(Trainable):
        """Evaluates in a thread, so that a report can wait for Tune's decision and end the evaluation in order."""

        def setup(self, config: dict[str, Any]) -> None:
            self.values = config["values"]
            self.results: queue.Queue[dict[str, Any]] = queue.Queue()
            self.decided = threading.Semaphore(0)
            self.given_up = False
            self.thread: threading.Thread | None = None

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.cleanup()
            self.setup(config)
            return True

        def step(self) -> dict[str, Any]:
            if self.thread is None:
                one_thread()
                self.thread = threading.Thread(target=self.evaluate, daemon=True)
                self.thread.start()
            else:
                self.decided.release()
            return self.results.get()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass  # Tune takes one at the end; the record of the trial is all that lasts

        def cleanup(self) -> None:
            self.given_up = True
            self.decided.release()
            if self.thread is not None:
                self.thread.join()  # the pruned trial is recorded before the process ends

        def evaluate(self) -> None:
            reports: list[float] = []

            def report(step: int, value: float) -> None:
                reports.append(float(value))
                if prune:
                    self.results.put({"value": float(value), "reports": len(reports)})
                    self.decided.acquire()
                    if self.given_up:
                        raise Pruned

            outcome: Outcome | None = None
            kind, value, refused = "complete", None, ""
            try:
                outcome = evaluate(self.values, report)
            except Pruned:
                kind, value = "pruned", reports[-1] if reports else None
            except Exception:  # recorded by evaluate; the search goes on
                kind = "failed"
            try:
                value = value if outcome is None else outcome.single_value(objective)
            except UsageError as error:
                refused = str(error)
            value = _FAILED if value is None or not np.isfinite(value) else value
            if not refused:
                _record(state, parameters, self.values, kind, value)
            self.results.put({"value": value, "reports": len(reports), "refused": refused, "done": True})

    return Trial


def _watch(parameters: Sequence[Parameter], state: Path, progress: Progress) -> Any:
    """What follows the trials in this process: progress, trials whose process died, and an early end."""
    from ray.tune import Callback, Stopper

    class Watch(Callback, Stopper):
        refused = ""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self.refused = self.refused or result.get("refused", "")
            return False

        def stop_all(self) -> bool:
            return bool(self.refused)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            progress.advance()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _record(state, parameters, trial.config["values"], "failed", _FAILED)
            progress.advance()

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles it with its own state, which nothing reads

    return Watch()


def _coordinates(parameters: Sequence[Parameter], values: Values) -> dict[str, Any]:
    """Values with the position of a choice in its place."""
    return {
        p.name: p.choices.index(values[p.name]) if p.kind == "categorical" else values[p.name]
        for p in parameters
        if p.name in values
    }


def _without(
    parameters: Sequence[Parameter], listed: Sequence[Values], known: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Configurations without those that are finished, each of which stands for one."""
    rest, known = [], list(known)
    for values in listed:
        coordinates = _coordinates(parameters, values)
        if coordinates in known:
            known.remove(coordinates)
        else:
            rest.append(dict(values))
    return rest


def _record(state: Path, parameters: Sequence[Parameter], values: Values, kind: str, value: float) -> None:
    coordinates = _coordinates(parameters, values)
    name = f"{time.time_ns():020d}-{content_digest(map(repr, coordinates.items()))[:8]}.json"
    write_json(state / "trials" / name, {"coordinates": coordinates, "state": kind, "value": value})


def _finished(state: Path, parameters: Sequence[Parameter], objective: str) -> list[dict[str, Any]]:
    """Records of earlier calls in the order in which the trials ended."""
    space = {"space": [repr(p) for p in parameters], "objective": objective}
    path = state / "search.json"
    if not path.exists():
        write_json(path, space)
    earlier = read_json(path)
    for what in space:
        if earlier[what] != space[what]:
            raise OutputError(f"{path} is the search of another {what}. Choose another folder, or delete {state}.")
    return [read_json(p) for p in sorted((state / "trials").glob("*.json"))]
