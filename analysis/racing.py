"""Race: suggested strata against baselines, by successive halving, and a confirmation with fresh seeds and other data.

Rungs train every entry (a candidate at one learning rate) from the start with a growing number of epochs and keep the
better part by the score on held-out training items (successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943).
What is then claimed rests on the confirmation alone: the best suggestion and the baselines that are left, trained with
seeds and scored on a split that chose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.halving import announce, finalists, promoted, schedule, within_time
from analysis.race_candidates import Candidate
from analysis.race_result import COMPARISON_COLUMNS, TRIAL_COLUMNS, RaceResult, Verdict
from analysis.race_trainings import Clock, Entry, Runner, TimeUp
from analysis.race_verdict import compare_confirmed, sentence_of, verdict_of
from spafit import io
from spafit.data.sampling import hold_out
from spafit.data.training import TrainData
from spafit.errors import UsageError
from spafit.runtime import provenance, stderr_console
from spafit.settings import TrainSettings, default_learning_rate

if TYPE_CHECKING:
    from analysis.abilities import Abilities

#: Multiples of a plan's default rate (:func:`spafit.settings.default_learning_rate`) that are tried.
RATE_FACTORS = (1.0, 4.0)


def race(
    candidates: Sequence[Candidate],
    data: TrainData,
    *,
    model: str | None = None,
    out: str | Path,
    settings: TrainSettings | None = None,
    rate_factors: Sequence[float] = RATE_FACTORS,
    seeds: Sequence[int] = (0,),
    confirm_seeds: Sequence[int] = (100, 101, 102, 103, 104),
    rungs: int = 3,
    eta: int = 3,
    select_share: float = 0.2,
    time_budget: float | None = None,
    abilities: Abilities | None = None,
    tolerance: float | None = None,
    n_boot: int = 2000,
    device: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    command: str | None = None,
    quiet: bool = False,
) -> RaceResult:
    """Train, halve, confirm, compare; resumable, within a time budget.

    All candidates see the same items, in orders of the same seeds, each at rates of its own; frozen prefixes are
    computed once for all that share one. An entry is a candidate at one rate; of a rung's entries 1/``eta`` go on, by
    the mean headline over seeds, ties by loss. The best suggestion, the best baseline and each protected baseline go
    on at their best rate whatever their place, and these are trained in the confirmation.

    The verdict: ``yes`` where the paired interval of suggestion less baseline is above 0 for every confirmed baseline,
    ``no`` where it is below 0 for one, else ``within noise``; ``untested`` where the confirmation was not reached.
    Intervals resample scored items and seeds together for all plans. With fewer than about five confirmation seeds
    they understate what another training would give. Scores are of this task, model and number of items.

    Args:
        candidates: at least one suggestion and one baseline, with names of their own.
        data: with a train split, and a labelled split that nothing is chosen on (the first scored one).
        model: reference of a plain model; None for the built-in default.
        out: folder.
        settings: of a full training; ``select_share`` and ``learning_rate`` are the race's.
        rate_factors: multiples of the default rate for candidates without rates of their own.
        seeds: of the rungs, the same for all.
        confirm_seeds: others than ``seeds``.
        rungs: number of rungs; the last one trains all epochs.
        eta: factor between rungs, in epochs and candidates.
        select_share: share of the training items that rungs are scored on.
        time_budget: seconds of training over all calls; entries are cut to stay within it, and where even the
            finalists do not fit the race stops and says what is missing.
        abilities: what should not be forgotten; read before and after each confirmed training, and with a tolerance
            after every one.
        tolerance: most forgetting, the mean over tasks, in the abilities' unit. Entries beyond it go on last, and the
            suggestion has to beat the baselines that keep it.
        n_boot: bootstrap draws.
        device: kind of torch device.
        revision: of a hub model.
        offline: never ask the hub.
        allow_pickle: accept pickle weights.
        command: how this was called.
        quiet: no progress on stderr.

    Raises:
        UsageError: no suggestion or no baseline, names that repeat, seeds that overlap, numbers out of range.
        SpafitError: as :func:`spafit.fit`.
    """
    settings = replace(settings or TrainSettings(), select_share=0.0, patience=0, learning_rate=None)
    _check(candidates, seeds, confirm_seeds, rungs, eta, time_budget)
    if tolerance is not None and abilities is None:
        raise UsageError("A tolerance needs abilities to measure forgetting on. Give abilities.")
    if not data.scored_splits:
        raise UsageError(f"{data.name} has no labelled split to confirm on. Give one with --validation or --test.")
    official = data.scored_splits[0]
    kept, held = hold_out(data.frames["train"], select_share, seed=0, most=settings.max_train)
    if not len(held) or not len(kept):
        raise UsageError(f"A share of {select_share} of the training items leaves nothing to train or to score on.")
    chosen_on = replace(data, frames={"train": kept, "held-out": held}, digests={})
    confirmed_on = replace(data, frames={"train": kept, official: data.frames[official]}, digests={})
    settings = replace(settings, max_train=None)
    runner = Runner(
        Path(out), model, settings, Clock(time_budget), device, revision, offline, allow_pickle, command, quiet
    )
    key = io.content_digest(
        [1, model, data.digest, settings.to_dict(), tuple(rate_factors), tuple(seeds), tuple(confirm_seeds), rungs, eta,
         select_share, tolerance, [] if abilities is None else abilities.record(),
         [(c.name, c.plan.strata, c.plan.outside, c.learning_rates, c.remedies) for c in candidates]]
    )  # fmt: skip
    runner.claim(key)
    entries = [
        Entry(c, rate)
        for c in candidates
        for rate in (c.learning_rates or tuple(default_learning_rate(c.plan) * f for f in rate_factors))
    ]
    plan = schedule(entries, rungs=rungs, eta=eta, epochs=settings.epochs)
    items = len(kept)
    announced = announce(plan, entries, items, settings.epochs, seeds, confirm_seeds, time_budget)
    stderr_console(quiet=quiet).print(announced["sentence"], markup=False)
    rows: list[dict[str, Any]] = []
    confirmed: dict[str, dict[int, pd.DataFrame]] = {}
    forgotten: list[pd.DataFrame] = []
    missing = ""
    final: list[Entry] = []
    try:
        alive = entries
        for rung, (size, epochs) in enumerate(plan):
            if rung:
                alive = promoted(alive, rows, f"rung-{rung - 1}", size, tolerance=tolerance)
                alive = within_time(alive, rows, f"rung-{rung - 1}", runner.clock, items, epochs, seeds,
                                    len(confirm_seeds), settings.epochs, plan[rung:], tolerance=tolerance)  # fmt: skip
            for entry in alive:
                for seed in seeds:
                    watched = None if tolerance is None else abilities
                    rows += runner.train(entry, chosen_on, seed, f"rung-{rung}", epochs, watched)[0]
        final = finalists(alive, rows, f"rung-{len(plan) - 1}", tolerance=tolerance)
        for seed in confirm_seeds:  # seed by seed, so that what is there after a stop is balanced
            for entry in final:
                found, scored, lost = runner.train(
                    entry, confirmed_on, seed, "confirmation", settings.epochs, abilities
                )
                rows += found
                confirmed.setdefault(entry.candidate.name, {})[seed] = scored
                forgotten += [] if lost is None else [lost]
    except TimeUp:
        missing = f"The time budget of {time_budget:.0f} s ends before the race does; the same command goes on."
    trials = pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))
    suggestion = next((e.candidate.name for e in final if e.candidate.role == "suggestion"), None)
    # Where time ended the race, the seeds that every finalist has finished still compare them, from two on.
    done = [s for s in confirm_seeds if final and all(s in confirmed.get(e.candidate.name, {}) for e in final)]
    complete = len(done) == len(confirm_seeds)
    confirmed = {n: {s: by[s] for s in done} for n, by in confirmed.items()}
    comparison = pd.DataFrame(columns=list(COMPARISON_COLUMNS))
    verdict: Verdict = "untested"
    keeps = True
    if suggestion is not None and (complete or len(done) > 1):
        beyond = _beyond(forgotten, tolerance)
        keeps = suggestion not in beyond
        comparison = compare_confirmed(suggestion, confirmed, data.metrics, beyond=beyond, n_boot=n_boot)
        verdict = verdict_of(comparison, suggestion_keeps=keeps)
    run = {
        "schema_version": io.SCHEMA_VERSION, "key": key, "command": command or "analysis.race", "task": data.name,
        "model": model or "default", "data": {"digest": data.digest, "train": items, "held-out": len(held),
                                              official: len(data.frames[official])},
        "settings": settings.to_dict(), "seeds": list(seeds), "confirm_seeds": list(confirm_seeds),
        "candidates": [{"name": c.name, "role": c.role, "plan": c.plan.to_dict(), "remedies": list(c.remedies)}
                       for c in candidates],
        "rungs": [{"entries": n, "epochs": e} for n, e in plan], "announced": announced,
        "spent": {"seconds": runner.clock.spent, "passes": runner.clock.passes,
                  "share_of_all": runner.clock.passes / announced["passes_of_all"]},
        "suggestion": suggestion, "verdict": verdict, "complete": complete, "confirmed_seeds": done,
        "tolerance": tolerance,
        "sentence": sentence_of(verdict, suggestion, comparison, missing, suggestion_keeps=keeps), **provenance(),
    }  # fmt: skip
    result = RaceResult(Path(out), run, trials, comparison, pd.concat(forgotten) if forgotten else None)
    result.save(out)
    return result


def _beyond(forgotten: Sequence[pd.DataFrame], tolerance: float | None) -> list[str]:
    """Candidates whose mean forgetting over tasks and seeds is more than the tolerance."""
    if tolerance is None or not forgotten:
        return []
    means = pd.concat(forgotten).groupby("candidate")["value"].mean()
    return [str(name) for name, value in means.items() if value > tolerance]


def _check(
    candidates: Sequence[Candidate], seeds: Sequence[int], confirm: Sequence[int], rungs: int, eta: int,
    time_budget: float | None,
) -> None:  # fmt: skip
    names = [c.name for c in candidates]
    if len(set(names)) < len(names):
        raise UsageError(f"Two candidates have one name: {', '.join(n for n in names if names.count(n) > 1)}.")
    for role in ("suggestion", "baseline"):
        if not any(c.role == role for c in candidates):
            raise UsageError(f"A race needs at least one {role}; there is none among {', '.join(names) or 'nothing'}.")
    if not seeds or not confirm or set(seeds) & set(confirm) or len(set(confirm)) < len(confirm):
        raise UsageError(f"Confirmation needs fresh seeds: {list(confirm)} must differ from {list(seeds)}.")
    if rungs < 1 or eta < 2 or (time_budget is not None and not time_budget > 0):
        raise UsageError(f"rungs is {rungs}, eta {eta}, time_budget {time_budget}: at least 1, at least 2, above 0.")
