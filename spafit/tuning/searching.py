"""`search`: one objective and one space through any backend; records of every trial, and the best one confirmed."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from spafit import io
from spafit.errors import OutputError, UsageError, check_choice
from spafit.runtime import provenance
from spafit.tuning.objective import measured
from spafit.tuning.parameters import (
    Evaluate,
    Outcome,
    Parameter,
    Pruned,
    Report,
    TrialRecord,
    Values,
    active_values,
    check_parameters,
)
from spafit.tuning.search_result import SearchResult
from spafit.tuning.space import SearchSpace

#: Backend -> module and function, loaded on first use.
BACKENDS = {
    "optuna": ("spafit.tuning.optuna_backend", "run_optuna"),
    "ray": ("spafit.tuning.ray_backend", "run_ray"),
    "hyperopt": ("spafit.tuning.hyperopt_backend", "run_hyperopt"),
}
#: Evaluates values with other seeds and on data that chose nothing; gives the objective's value.
Confirm = Callable[[Values, int], float]


@dataclass(frozen=True)
class Recording:
    """An objective that writes each finished trial, and gives what is written for values that were evaluated before."""

    evaluate: Evaluate
    folder: Path

    def __call__(self, values: Values, report: Report) -> Outcome:
        """Evaluate, unless it is on record."""
        path = self.folder / f"{measured(values)}.json"
        if path.is_file():
            known = io.read_json(path)
            for step, value in known["reports"]:
                report(int(step), float(value))
            if known["state"] == "complete":
                return Outcome(
                    {k: -math.inf if v is None else v for k, v in known["objectives"].items()}, known["constraints"],
                    known["details"],
                )  # fmt: skip
            if known["state"] == "failed":
                raise RuntimeError(known["error"])
        reports: list[tuple[int, float]] = []
        begun, started = time.perf_counter(), time.time()

        def noted(step: int, value: float) -> None:
            reports.append((step, float(value)))
            report(step, value)

        def write(state: str, outcome: Outcome | None, error: str = "") -> None:
            io.write_json(
                path,
                {"values": dict(values), "state": state, "reports": reports, "error": error, "started": started,
                 "seconds": time.perf_counter() - begun,
                 "objectives": {} if outcome is None else dict(outcome.objectives),
                 "constraints": {} if outcome is None else dict(outcome.constraints),
                 "details": {} if outcome is None else dict(outcome.details)},
            )  # fmt: skip

        try:
            outcome = self.evaluate(values, noted)
        except Pruned:
            write("pruned", None)
            raise
        except OutputError:  # a full disk says nothing of the configuration: it is tried again
            raise
        except Exception as error:
            write("failed", None, (str(error).splitlines() or [type(error).__name__])[0])
            raise
        write("complete", outcome)
        return outcome


def search(
    objective: Evaluate,
    space: SearchSpace | Sequence[Parameter],
    *,
    out: str | Path,
    strategy: str = "tpe",
    backend: str = "optuna",
    n_trials: int = 30,
    first: Sequence[Values] = (),
    objectives: Sequence[str] = ("quality",),
    confirm: Confirm | None = None,
    confirm_seeds: Sequence[int] = (1000, 1001, 1002),
    depends_on: Sequence[object] = (),
    seed: int = 0,
    workers: int = 1,
    prune: bool = False,
    storage: str | None = None,
    command: str | None = None,
) -> SearchResult:
    """Search, keep every trial, and evaluate the best one again with fresh seeds.

    The best value of a search is too good by the luck of being chosen: what is reported is the confirmed one beside it.
    A killed search goes on where it was, with the same arguments; a larger ``n_trials`` continues a finished one.

    Args:
        objective: values and a report to an :class:`Outcome`; deterministic, and picklable for Ray.
        space: of plans, or any parameters.
        out: folder.
        strategy: ``grid``, ``random``, ``tpe``, ``gp``, ``nsga2`` (Optuna); ``grid``, ``random``, ``tpe`` (Ray);
            ``random``, ``tpe``, ``anneal`` (Hyperopt).
        backend: ``optuna``, ``ray`` or ``hyperopt``.
        n_trials: finished trials in all.
        first: values that are evaluated first, such as those of the suggestion and of SPAFIT's presets.
        objectives: names that the outcome has, all maximised; the first one decides which trial is best.
        confirm: evaluates the best values with a seed, on data that the search did not see; None leaves it out. Of
            several workers the one whose trial ends last confirms.
        confirm_seeds: for ``confirm``.
        depends_on: what the outcomes depend on beside the values, such as the data and the settings: a folder with the
            trials of something else is refused, since finished trials are never evaluated again.
        seed: of the strategy.
        workers: trials at a time (Ray). For Optuna start the same command several times.
        prune: give up trials that will not win, by what is reported for each fold.
        storage: URL of a database, for Optuna.
        command: how this was called.

    Raises:
        UsageError: an unknown backend or strategy, a library that is not installed, values that do not fit.
        OutputError: the folder holds another search, or the storage cannot be used.
    """
    check_choice("backend", backend, BACKENDS)
    if n_trials < 1:
        raise UsageError(f"n_trials is {n_trials}; at least 1 is needed.")
    if storage is not None and backend != "optuna":
        raise UsageError(f"A storage is for Optuna, and the backend is {backend}.")
    parameters = space.parameters() if isinstance(space, SearchSpace) else tuple(space)
    check_parameters(parameters)
    queued = [active_values(parameters, values) for values in first]
    folder = Path(out)
    key = claimed(folder, parameters, depends_on)
    module, name = BACKENDS[backend]
    run: Any = getattr(importlib.import_module(module), name)
    more = {"storage": storage} if backend == "optuna" else {}
    elsewhere = run(
        parameters, Recording(objective, folder / "trials"), strategy=strategy, n_trials=n_trials, folder=str(folder),
        first=queued, objectives=tuple(objectives), seed=seed, workers=workers, prune=prune, **more,
    )  # fmt: skip
    # The last of several workers confirms: before, another one may still find a better trial.
    waits = confirm is not None and bool(elsewhere)
    with FileLock(folder / "confirm.lock"):
        records = read_records(folder / "trials")
        best = best_record(records, objectives[0])
        confirmed: list[dict[str, Any]] = []
        if confirm is not None and best is not None and not waits:
            confirmed = [{"seed": s, "value": float(confirm(best.values, s))} for s in confirm_seeds]
        content = {
            "schema_version": io.SCHEMA_VERSION, "key": key, "status": "running" if waits else "complete",
            "command": command or "spafit.search", "elsewhere": int(elsewhere or 0), "backend": backend,
            "strategy": strategy, "n_trials": n_trials, "objectives": list(objectives), "seed": seed,
            "best": None if best is None else {"trial": best.number, "values": dict(best.values),
                                               "value": _value(best, objectives[0])},
            "confirmed": confirmed, "parameters": [p.name for p in parameters], **provenance(),
        }  # fmt: skip
        result = SearchResult(folder, content, records, parameters, space if isinstance(space, SearchSpace) else None)
        if not waits or io.read_json(folder / "search.json")["status"] == "running":
            result.save(folder)
    return result


def claimed(folder: Path, parameters: Sequence[Parameter], depends_on: Sequence[object]) -> str:
    """Make the folder this search's, or see that it is; gives the search's key.

    Raises:
        OutputError: it holds another search.
    """
    key = io.content_digest([*map(repr, parameters), *map(repr, depends_on)])
    record = folder / "search.json"
    if record.is_file() and io.read_json(record)["key"] != key:
        raise OutputError(f"{folder} holds the search of another space, data or settings. Choose another --out.")
    if not record.is_file():
        io.write_json(record, {"key": key, "status": "running"})
    return key


def read_records(folder: Path) -> tuple[TrialRecord, ...]:
    """Every trial on record, in the order in which they began."""
    found = [io.read_json(p) for p in folder.glob("*.json")]
    found.sort(key=lambda r: r["started"])
    return tuple(
        TrialRecord(
            n, r["values"], r["state"],
            None if r["state"] != "complete" else Outcome(
                {k: -math.inf if v is None else v for k, v in r["objectives"].items()}, r["constraints"], r["details"]
            ),
            tuple((int(s), float(v)) for s, v in r["reports"]), float(r["seconds"]), r["error"],
        )
        for n, r in enumerate(found)
    )  # fmt: skip


def best_record(records: Sequence[TrialRecord], objective: str) -> TrialRecord | None:
    """The feasible trial with the largest objective; of equal ones the earlier; None without any."""
    usable = [
        r for r in records if r.outcome is not None and r.outcome.feasible and math.isfinite(_value(r, objective))
    ]
    return max(usable, key=lambda r: (_value(r, objective), -r.number), default=None)


def _value(record: TrialRecord, objective: str) -> float:
    assert record.outcome is not None
    values: Mapping[str, float] = record.outcome.objectives
    return float(values.get(objective, -math.inf))
