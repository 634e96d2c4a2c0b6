"""Search through Optuna: grid, random, TPE, Gaussian processes, and NSGA-II for several objectives."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit import io
from spafit.errors import OutputError, UsageError, check_choice
from spafit.runtime import Progress, seed_sequence
from spafit.tuning.parameters import (
    Evaluate,
    Outcome,
    Parameter,
    Pruned,
    Values,
    active_values,
    check_parameters,
)

if TYPE_CHECKING:
    import optuna

STRATEGIES = ("grid", "random", "tpe", "gp", "nsga2")


def run_optuna(
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
    storage: str | None = None,
) -> int:
    """Evaluate until ``n_trials`` trials are finished, those of earlier calls and other workers included.

    The space is define-by-run: inactive parameters are not asked for. The study lies in ``optuna.log`` in ``folder``
    (Optuna's journal; its dashboard reads it), or in a database by ``storage``: several processes with the same command
    then share it. Trials that were under way when a process was killed are tried again with the same values.

    Args:
        parameters: the space.
        evaluate: gives the outcome of values. It may raise :class:`Pruned`; anything else that it raises fails the
            trial, which counts.
        strategy: ``grid`` (every combination of :attr:`Parameter.grid`, without those that differ in inactive
            parameters alone), ``random``, ``tpe`` (multivariate, groups of conditions apart), ``gp`` or ``nsga2``.
        n_trials: number of finished trials at which to stop.
        folder: where the study lies.
        first: evaluated before any other.
        objectives: names, all maximised; several need ``nsga2``, ``tpe`` or ``random``.
        seed: of the sampler. With several workers suggestions also depend on who ends first.
        workers: threads are not used; start the same command several times instead. Must be 1.
        prune: give up trials whose reports over folds are worse than the best trial's, by Wilcoxon's signed-rank test
            (Optuna's WilcoxonPruner, p < .1 after two folds); for one objective.
        storage: URL of a database (``sqlite:///search.db``, ``postgresql://…``); None takes the journal.

    Returns:
        Trials that are still under way in other processes; the last one to end confirms.

    Raises:
        UsageError: Optuna is missing, an unknown strategy, or options that do not go together.
        OutputError: the storage cannot be used, or holds the search of another space or objective.

    Source: Akiba et al. (2019), arXiv 1907.10902.
    """
    check_choice("The strategy of Optuna", strategy, STRATEGIES)
    if workers != 1:
        raise UsageError(
            f"Optuna's workers are processes: start the same command {workers} times with one storage, or use Ray."
        )
    if len(objectives) > 1 and (strategy in ("grid", "gp") or prune):
        raise UsageError("Several objectives go with nsga2, tpe or random, and without pruning.")
    check_parameters(parameters)
    queued = [active_values(parameters, values) for values in first]
    optuna = _import_optuna()
    with _quiet(optuna):
        study = _study(optuna, parameters, objectives, folder=Path(folder), storage=storage, prune=prune)
        if strategy == "grid":
            from spafit.tuning.ray_backend import grid_configurations

            queued += grid_configurations(parameters)
        _enqueue(optuna, study, queued)
        finished = _finished(optuna, study)
        with Progress("Search", n_trials) as progress:
            progress.advance(finished)
            while finished < n_trials:
                if strategy == "grid" and not _waiting(optuna, study):
                    break
                study.sampler = _sampler(optuna, strategy, seed=seed, study=study)
                _one(optuna, study, parameters, evaluate, objectives)
                now = _finished(optuna, study)
                progress.advance(now - finished)
                finished = now
        return _elsewhere(optuna, study)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError('Optuna is not installed. Run pip install "spafit[tune]".') from error
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna's log and its warnings about experimental parts, as they were afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _sampler(optuna: Any, strategy: str, *, seed: int, study: Any) -> Any:
    """A sampler for the next trial: seeded by how many there are, so that a search that goes on repeats nothing.

    Where another process is at work, by this process as well: both may see the same number.
    """
    samplers = optuna.samplers
    trials = study.get_trials(deepcopy=False)
    running = [t.user_attrs.get("process") for t in trials if t.state == optuna.trial.TrialState.RUNNING]
    others = [p for p in running if p != _process()]
    key = (len(trials), *(_process() if others else ()))
    number = int(seed_sequence(seed, strategy, *key).generate_state(1)[0])
    if strategy == "tpe":
        return samplers.TPESampler(seed=number, multivariate=True, group=True)
    if strategy == "gp":
        return samplers.GPSampler(seed=number)
    if strategy == "nsga2":
        return samplers.NSGAIISampler(seed=number, population_size=20)
    return samplers.RandomSampler(seed=number)


def _study(
    optuna: Any, parameters: Sequence[Parameter], objectives: Sequence[str], *, folder: Path, storage: str | None,
    prune: bool,
) -> optuna.Study:  # fmt: skip
    pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=2) if prune else optuna.pruners.NopPruner()
    folder.mkdir(parents=True, exist_ok=True)
    space = [repr(p) for p in parameters]
    try:
        if storage is None:
            backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log"))
            place: Any = optuna.storages.JournalStorage(backend)
        else:
            place = optuna.storages.RDBStorage(storage)
        study = optuna.create_study(
            study_name="spafit", storage=place, pruner=pruner, load_if_exists=True,
            directions=["maximize"] * len(objectives),
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, optuna.exceptions.OptunaError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"The storage {storage or folder / 'optuna.log'} cannot be used ({said}). Give another --storage or --out; "
            "a database in use by another program is free when that has ended."
        ) from error
    except Exception as error:  # SQLAlchemy's own, which is imported only where a database is used
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"The storage {storage} cannot be used ({said}). If another program holds it, wait or give another."
        ) from error
    search = {"space": space, "objectives": list(objectives)}  # written at once: another worker may be reading
    known = study.user_attrs.get("search", search)
    if known != search:
        raise OutputError(
            f"{storage or folder} holds the search of another space or objective. Choose another --out or --storage."
        )
    study.set_user_attr("search", search)
    return study


def _enqueue(optuna: Any, study: Any, queued: Sequence[Values]) -> None:
    """Queue what was not tried yet, and what was under way in a process that is gone."""
    state = optuna.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    known = [t.system_attrs.get("fixed_params", t.params) for t in trials if t.state != state.RUNNING]
    known += [t.params for t in trials if t.state.is_finished()]
    for trial in trials:
        if trial.state == state.RUNNING and _is_gone(trial.user_attrs.get("process")):
            study.tell(trial.number, state=state.FAIL)
            if trial.params:
                study.enqueue_trial(dict(trial.params), user_attrs={"again": trial.number}, skip_if_exists=False)
    for values in queued:
        if dict(values) not in known:
            study.enqueue_trial(dict(values), skip_if_exists=True)


def _process() -> list[Any]:
    """This process, to tell on this machine whether it is still there; a digest stands for the machine."""
    import platform

    return [io.content_digest([platform.node()])[:12], os.getpid()]


def _is_gone(process: Any) -> bool:
    """Whether a process of this machine has ended; of others nothing is known."""
    import psutil

    machine, own = _process()
    return bool(process) and process[0] == machine and (process[1] == own or not psutil.pid_exists(process[1]))


def _elsewhere(optuna: Any, study: Any) -> int:
    """Trials under way in other processes; on another machine, none of an hour and ten times the longest one's age."""
    trials = study.get_trials(deepcopy=False)
    longest = max((t.duration.total_seconds() for t in trials if t.duration is not None), default=math.inf)
    running = [t for t in trials if t.state == optuna.trial.TrialState.RUNNING]
    here = [t for t in running if (t.user_attrs.get("process") or _process())[0] == _process()[0]]
    ages = [
        (datetime.datetime.now() - t.datetime_start).total_seconds() for t in running if t not in here
    ]  # local time
    return sum(not _is_gone(t.user_attrs.get("process")) for t in here) + sum(a < max(3600, 10 * longest) for a in ages)


def _waiting(optuna: Any, study: Any) -> bool:
    return any(t.state == optuna.trial.TrialState.WAITING for t in study.get_trials(deepcopy=False))


def _finished(optuna: Any, study: Any) -> int:
    """Trials that ended by themselves; those of a killed process are tried again and do not count."""
    state = optuna.trial.TrialState
    return sum(
        t.state in (state.COMPLETE, state.PRUNED) or (t.state == state.FAIL and "error" in t.user_attrs)
        for t in study.get_trials(deepcopy=False)
    )


def _one(
    optuna: Any, study: Any, parameters: Sequence[Parameter], evaluate: Evaluate, objectives: Sequence[str]
) -> None:
    trial = study.ask()
    trial.set_user_attr("process", _process())
    values: dict[str, Any] = {}
    for parameter in parameters:
        if not parameter.is_active(values):
            continue
        if parameter.kind == "categorical":
            value = trial.suggest_categorical(parameter.name, list(parameter.choices))
        elif parameter.kind == "integer":
            value = trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), log=parameter.log)
        else:
            value = trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)
        values[parameter.name] = value

    def report(step: int, value: float) -> None:
        if len(objectives) > 1:
            return
        trial.report(value, step)
        if trial.should_prune():
            raise Pruned

    state = optuna.trial.TrialState
    try:
        outcome = evaluate(values, report)
    except Pruned:
        study.tell(trial, state=state.PRUNED)
        return
    except OutputError:  # nor can the next trial be written; this one stays under way, and is tried again
        raise
    except Exception as error:  # one configuration's defect must not end the others' search
        trial.set_user_attr("error", (str(error).splitlines() or [type(error).__name__])[0])
        study.tell(trial, state=state.FAIL)
        return
    found = _values(outcome, objectives)
    if found is None:
        trial.set_user_attr("error", "the objective is not finite")
        study.tell(trial, state=state.FAIL)
        return
    for name, excess in outcome.constraints.items():
        trial.set_constraint(name, excess)
    study.tell(trial, found)


def _values(outcome: Outcome, objectives: Sequence[str]) -> list[float] | None:
    """What Optuna maximises; None where it is not a number. An infeasible configuration that was not tried is last."""
    found = []
    for name in objectives:
        value = outcome.objectives.get(name)
        if value is None or not math.isfinite(value):
            if outcome.feasible:
                return None
            value = outcome.single_value(objectives[0]) or -1e12 if objectives[0] in outcome.objectives else -1e12
        found.append(float(value))
    return found
