"""Search through Hyperopt: random, TPE or annealing over nested choices, one trial at a time."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spafit.errors import OutputError, UsageError, check_choice
from spafit.io import read_json, write_json
from spafit.runtime import Progress, seed_sequence
from spafit.tuning.parameters import (
    Evaluate,
    Outcome,
    Parameter,
    Pruned,
    State,
    Values,
    active_values,
    check_parameters,
)

if TYPE_CHECKING:
    from hyperopt.base import Domain, Trials

#: Half-widths just short of a half: the least and greatest integer are as likely as the others, none falls outside.
_HALF = 0.499


def run_hyperopt(
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
    """Evaluate with Hyperopt's own samplers until ``n_trials`` trials are finished, those of earlier calls included.

    A parameter with a condition hangs below its parent's choice, so that Hyperopt samples it only where it is active.
    Trials and their values stand in ``hyperopt.json`` in ``folder``; Hyperopt's history is rebuilt from it, and each
    suggestion depends on ``seed``, the trial's number and that history alone: a search that was interrupted goes on
    as if it had not been. Suggestions can repeat in a small space; each counts as a trial.

    Args:
        parameters: the space; a condition looks at a parameter that comes before.
        evaluate: gives the outcome of values. It may raise :class:`Pruned`, or anything else where it fails: such
            trials count, and rank below all others.
        strategy: ``random``, ``tpe`` (tree of Parzen estimators, 20 random trials first) or ``anneal`` (draws nearer
            and nearer to the best trials).
        n_trials: number of finished trials at which to stop.
        folder: where the search's state lies.
        first: configurations that are evaluated before any other, unless they have been.
        objectives: one name, which is maximised. Infeasible outcomes count as :meth:`Outcome.single_value` says.
        seed: of all suggestions.
        workers: 1.
        prune: False.

    Raises:
        UsageError: Hyperopt is not installed; several objectives, several workers or pruning are asked for; the
            strategy is none of the three; ``first`` does not fit the space.
        OutputError: ``folder`` holds the search of another space or objective.

    Source: Bergstra, Yamins & Cox (2013), https://proceedings.mlr.press/v28/bergstra13.html.
    """
    check_choice("The strategy of Hyperopt", strategy, ("random", "tpe", "anneal"))
    if len(objectives) != 1:
        raise UsageError(
            f"Hyperopt maximises one objective, not {', '.join(objectives) or 'none'}. "
            "Give one, or search for several with Optuna's nsga2."
        )
    if workers != 1:
        raise UsageError(f"Hyperopt runs one trial at a time, not {workers}. Use optuna or ray for several workers.")
    if prune:
        raise UsageError("Hyperopt cannot give up a trial on its way. Use optuna or ray for pruning, or leave it out.")
    check_parameters(parameters)
    queue = [active_values(parameters, values) for values in first]
    suggest, domain, trials = _hyperopt(parameters, strategy)

    path = Path(folder) / "hyperopt.json"
    state = _load(path, parameters, objectives[0])
    for trial in state["trials"]:
        _add(trials, domain, trial)
    with Progress("hyperopt", n_trials) as progress:
        progress.advance(len(state["trials"]))
        for number in range(len(state["trials"]), n_trials):
            done = [trial["coordinates"] for trial in state["trials"]]
            waiting = [c for c in (_coordinates(parameters, values) for values in queue) if c not in done]
            if waiting:
                coordinates = waiting[0]
            else:
                draw = int(seed_sequence(seed, "hyperopt", number).generate_state(1, np.uint32)[0])
                (document,) = suggest([number], domain, trials, draw)
                drawn = {k: v[0] for k, v in document["misc"]["vals"].items() if len(v)}
                coordinates = _coordinates(parameters, _values(parameters, drawn))
            trial = {
                "coordinates": coordinates,
                **_evaluated(evaluate, _values(parameters, coordinates), objectives[0]),
            }
            state["trials"].append(trial)
            write_json(path, state)
            _add(trials, domain, trial)
            progress.advance()


def _hyperopt(parameters: Sequence[Parameter], strategy: str) -> tuple[Callable[..., list[Any]], Domain, Trials]:
    """Hyperopt's suggesting function, the space in its language, and an empty history."""
    try:
        with warnings.catch_warnings():  # its imports add filters of their own
            from hyperopt import anneal, rand, tpe
            from hyperopt.base import Domain, Trials
    except ImportError as error:
        raise UsageError('This search needs Hyperopt. Install it with pip install "spafit[hyperopt]".') from error
    algorithms = {
        "random": rand.suggest,
        "tpe": functools.partial(tpe.suggest, verbose=False),
        "anneal": anneal.suggest,
    }
    return algorithms[strategy], Domain(None, _space(parameters)), Trials()


def _space(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Hyperopt's expression: parameters without a condition, with those that depend on them below their choices."""
    from hyperopt import hp
    from hyperopt.pyll import scope

    nodes: dict[str, Any] = {}
    for parameter in reversed(parameters):  # children before their parents
        children = [p for p in parameters if p.when is not None and p.when[0] == parameter.name]
        below = [
            {p.name: nodes[p.name] for p in children if p.when is not None and choice in p.when[1]}
            for choice in (_choices(parameter) if children or _by_index(parameter) else ())
        ]
        name, low, high = parameter.name, parameter.low, parameter.high
        if _by_index(parameter):
            nodes[name] = hp.choice(name, below)
        elif parameter.kind == "real":
            log = parameter.log
            nodes[name] = hp.loguniform(name, math.log(low), math.log(high)) if log else hp.uniform(name, low, high)
        else:
            if parameter.log:
                node = hp.qloguniform(name, math.log(low - _HALF), math.log(high + _HALF), 1.0)
            else:
                node = hp.quniform(name, low - _HALF, high + _HALF, 1.0)
            nodes[name] = scope.switch(scope.int(node) - int(low), *below) if children else node
    return {p.name: nodes[p.name] for p in parameters if p.when is None}


def _by_index(parameter: Parameter) -> bool:
    """Whether the position among the choices stands for the value: choices, and ranges of a single number."""
    return parameter.kind == "categorical" or parameter.low == parameter.high


def _choices(parameter: Parameter) -> Sequence[Any]:
    if parameter.kind == "categorical":
        return parameter.choices
    if parameter.kind == "integer":
        return range(int(parameter.low), int(parameter.high) + 1)
    return (parameter.low,)


def _coordinates(parameters: Sequence[Parameter], values: Values) -> dict[str, Any]:
    """Values as Hyperopt has them: positions of choices, numbers as they are."""
    return {
        p.name: _choices(p).index(values[p.name]) if _by_index(p) else values[p.name]
        for p in parameters
        if p.name in values
    }


def _values(parameters: Sequence[Parameter], coordinates: Values) -> dict[str, Any]:
    """Values of what Hyperopt drew: whole numbers are rounded, and rounding errors do not leave the range."""
    values: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.name not in coordinates:
            continue
        at = coordinates[parameter.name]
        if _by_index(parameter):
            values[parameter.name] = _choices(parameter)[int(at)]
        elif parameter.kind == "integer":
            values[parameter.name] = round(float(at))
        else:
            values[parameter.name] = min(max(float(at), parameter.low), parameter.high)
    return values


def _evaluated(evaluate: Evaluate, values: Values, objective: str) -> dict[str, Any]:
    """State and loss of one trial; no loss where it was pruned, failed, or gave nothing finite."""
    state: State = "complete"
    outcome: Outcome | None = None
    try:
        outcome = evaluate(values, lambda step, so_far: None)
    except Pruned:
        state = "pruned"
    except Exception:  # recorded by evaluate; the search goes on
        state = "failed"
    value = None if outcome is None else outcome.single_value(objective)
    return {"state": state, "loss": None if value is None else -value}


def _add(trials: Trials, domain: Domain, trial: dict[str, Any]) -> None:
    """Put a finished trial into Hyperopt's history."""
    from hyperopt.base import JOB_STATE_DONE, STATUS_FAIL, STATUS_OK

    number, loss = len(trials.trials), trial["loss"]
    active = {name: name in trial["coordinates"] for name in domain.params}
    misc = {
        "tid": number,
        "cmd": domain.cmd,
        "workdir": None,
        "idxs": {name: [number] if active[name] else [] for name in active},
        "vals": {name: [trial["coordinates"][name]] if active[name] else [] for name in active},
    }
    result = {"status": STATUS_FAIL} if loss is None else {"status": STATUS_OK, "loss": loss}
    (document,) = trials.new_trial_docs([number], [None], [result], [misc])
    document["state"] = JOB_STATE_DONE
    trials.insert_trial_doc(document)
    trials.refresh()


def _load(path: Path, parameters: Sequence[Parameter], objective: str) -> dict[str, Any]:
    """State that an earlier call left, or an empty one."""
    state = {"space": [repr(p) for p in parameters], "objective": objective, "trials": []}
    if not path.exists():
        return state
    earlier = read_json(path)
    for what in ("space", "objective"):
        if earlier[what] != state[what]:
            raise OutputError(f"{path} is the search of another {what}. Choose another folder, or delete that file.")
    return earlier
