"""Race: suggested strata against baselines, by successive halving, and a confirmation with fresh seeds and other data.

Rungs train every entry (a candidate at one learning rate) from the start with a growing number of epochs and keep the
better part by the score on held-out training items (successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943).
What is then claimed rests on the confirmation alone: the best suggestion and the baselines that are left, trained with
seeds and scored on a split that chose nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.race_candidates import Candidate
from analysis.race_result import COMPARISON_COLUMNS, TRIAL_COLUMNS, RaceResult, Verdict
from analysis.task_scores import resampled_metric
from spafit import io
from spafit.data.sampling import hold_out
from spafit.data.training import TrainData
from spafit.errors import OutputError, UsageError
from spafit.runtime import generator, provenance, stderr_console
from spafit.settings import TrainSettings, default_learning_rate
from spafit.stats import interval

if TYPE_CHECKING:
    from analysis.abilities import Abilities

#: Multiples of a plan's default rate (:func:`spafit.settings.default_learning_rate`) that are tried.
RATE_FACTORS = (1.0, 4.0)


@dataclass(frozen=True)
class _Entry:
    """A candidate at one rate."""

    candidate: Candidate
    rate: float

    @property
    def key(self) -> str:
        folder = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.candidate.name)
        return f"{folder}-{self.rate:.3g}"


@dataclass
class _Clock:
    """Seconds of trainings so far, and what a further one will take."""

    budget: float | None
    spent: float = 0.0
    passes: float = 0.0

    def seconds(self, passes: float) -> float:
        """Expected seconds of so many passes of an item, from what was measured so far."""
        return passes * self.spent / self.passes if self.passes else 0.0

    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - self.spent


class _TimeUp(Exception):
    """The next training would go beyond the time budget."""


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
    computed once for all that share one. Of a rung's candidates 1/``eta`` go on, by the mean headline over seeds at
    their best rate, with that rate's like; protected baselines and the best suggestion always do. The confirmation
    trains the best suggestion, the best baseline and the protected ones.

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
        abilities: what the confirmed plans should not forget; read before and after each confirmed training.
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
    if not data.scored_splits:
        raise UsageError(f"{data.name} has no labelled split to confirm on. Give one with --validation or --test.")
    official = data.scored_splits[0]
    kept, held = hold_out(data.frames["train"], select_share, seed=0, most=settings.max_train)
    if not len(held) or not len(kept):
        raise UsageError(f"A share of {select_share} of the training items leaves nothing to train or to score on.")
    chosen_on = replace(data, frames={"train": kept, "held-out": held}, digests={})
    confirmed_on = replace(data, frames={"train": kept, official: data.frames[official]}, digests={})
    settings = replace(settings, max_train=None)
    runner = _Runner(
        Path(out), model, settings, _Clock(time_budget), device, revision, offline, allow_pickle, command, quiet
    )
    key = io.content_digest(
        [1, data.digest, settings.to_dict(), tuple(rate_factors), tuple(seeds), tuple(confirm_seeds), rungs, eta,
         select_share, [(c.name, c.plan.to_dict()["strata"], c.learning_rates, c.remedies) for c in candidates]]
    )  # fmt: skip
    runner.claim(key)
    entries = [
        _Entry(c, rate)
        for c in candidates
        for rate in (c.learning_rates or tuple(default_learning_rate(c.plan) * f for f in rate_factors))
    ]
    plan = _schedule(entries, rungs=rungs, eta=eta, epochs=settings.epochs)
    items = len(kept)
    announced = _announce(plan, entries, items, settings.epochs, seeds, confirm_seeds, time_budget)
    stderr_console(quiet=quiet).print(announced["sentence"], markup=False)
    rows: list[dict[str, Any]] = []
    confirmed: dict[str, dict[int, pd.DataFrame]] = {}
    forgotten: list[pd.DataFrame] = []
    missing = ""
    finalists: list[_Entry] = []
    try:
        alive = entries
        for rung, (size, epochs) in enumerate(plan):
            if rung:
                alive = _promoted(alive, rows, f"rung-{rung - 1}", size)
                alive = _within_time(alive, rows, f"rung-{rung - 1}", runner.clock, items, epochs, seeds,
                                     len(confirm_seeds), settings.epochs, plan[rung:])  # fmt: skip
            for entry in alive:
                for seed in seeds:
                    rows += runner.train(entry, chosen_on, seed, f"rung-{rung}", epochs)[0]
        finalists = _finalists(alive, rows, f"rung-{len(plan) - 1}")
        for seed in confirm_seeds:  # seed by seed, so that what is there after a stop is balanced
            for entry in finalists:
                found, scored, folder = runner.train(entry, confirmed_on, seed, "confirmation", settings.epochs)
                rows += found
                confirmed.setdefault(entry.candidate.name, {})[seed] = scored
                if abilities is not None:
                    forgotten.append(runner.forgotten(entry, folder, seed, abilities))
    except _TimeUp:
        missing = f"The time budget of {time_budget:.0f} s ends before the race does; the same command goes on."
    trials = pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))
    suggestion = next((e.candidate.name for e in finalists if e.candidate.role == "suggestion"), None)
    complete = len(confirmed) == len(finalists) and all(len(s) == len(confirm_seeds) for s in confirmed.values())
    comparison = pd.DataFrame(columns=list(COMPARISON_COLUMNS))
    verdict: Verdict = "untested"
    if suggestion is not None and complete and confirmed:
        comparison = compare_confirmed(suggestion, confirmed, data.metrics, n_boot=n_boot)
        verdict = _verdict(comparison)
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
        "suggestion": suggestion, "verdict": verdict, "complete": complete and bool(confirmed),
        "sentence": _sentence(verdict, suggestion, comparison, missing), **provenance(),
    }  # fmt: skip
    result = RaceResult(Path(out), run, trials, comparison, pd.concat(forgotten) if forgotten else None)
    result.save(out)
    return result


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


def _schedule(entries: Sequence[_Entry], *, rungs: int, eta: int, epochs: float) -> list[tuple[int, float]]:
    """Entries and epochs of each rung: each has a share 1/eta of the one before, and the last one all epochs."""
    least = sum(1 for c in {e.candidate.name: e.candidate for e in entries}.values() if c.protected) + 2
    return [
        (max(math.floor(len(entries) / eta**r), min(least, len(entries))), epochs / eta ** (rungs - 1 - r))
        for r in range(rungs)
    ]


def _announce(
    plan: Sequence[tuple[int, float]], entries: Sequence[_Entry], items: int, epochs: float, seeds: Sequence[int],
    confirm: Sequence[int], time_budget: float | None,
) -> dict[str, Any]:  # fmt: skip
    """What the race will cost, in trainings and passes of an item, and what training every entry in full would."""
    final = min(len({e.candidate.name for e in entries}), plan[-1][0], 2 + sum(
        1 for n in {e.candidate.name for e in entries if e.candidate.protected}
    ))  # fmt: skip
    trainings = sum(n for n, _ in plan) * len(seeds)
    passes = sum(n * e for n, e in plan) * len(seeds) * items
    of_all = len(entries) * epochs * len(seeds) * items
    confirmation = final * len(confirm) * epochs * items
    limit = "" if time_budget is None else f" Time budget: {time_budget / 60:.0f} min."
    return {
        "trainings": trainings, "passes": passes, "passes_of_all": of_all, "share_of_all": passes / of_all,
        "confirmation_trainings": final * len(confirm), "confirmation_passes": confirmation,
        "sentence": f"Race: {len(entries)} entries, {trainings} trainings in {len(plan)} rungs "
        f"({passes:,.0f} passes of an item, {100 * passes / of_all:.0f} % of training every entry in full), then about "
        f"{final * len(confirm)} trainings to confirm ({confirmation:,.0f} passes).{limit}",
    }  # fmt: skip


@dataclass
class _Runner:
    """Trains entries into folders of their own; what is finished is read."""

    folder: Path
    model: str | None
    settings: TrainSettings
    clock: _Clock
    device: str
    revision: str | None
    offline: bool
    allow_pickle: bool
    command: str | None
    quiet: bool
    trained: int = 0

    def claim(self, key: str) -> None:
        """Take the folder for this race, or see that it is this one's."""
        record = self.folder / "race.json"
        if record.is_file() and io.read_json(record)["key"] != key:
            raise OutputError(
                f"{self.folder} holds another race (other candidates, data, settings or seeds). Choose another --out."
            )
        if not record.is_file():
            io.write_json(record, {"key": key, "status": "running"})

    def train(
        self, entry: _Entry, data: TrainData, seed: int, stage: str, epochs: float
    ) -> tuple[list[dict[str, Any]], pd.DataFrame, Path]:
        """Rows of the trial, the scored items, and the folder of the model."""
        from spafit.retain import parse_remedy
        from spafit.training import fit

        candidate, place = entry.candidate, self.folder / "trainings" / entry.key / stage
        passes = epochs * len(data.frames["train"])
        timed = place / f"seconds-{seed}.json"
        if not timed.is_file() and self.clock.seconds(passes) > self.clock.left():
            raise _TimeUp
        begun = time.perf_counter()
        settings = replace(self.settings, epochs=epochs, learning_rate=entry.rate)
        say = stderr_console(quiet=self.quiet)
        if not timed.is_file():
            say.print(f"{stage}: {candidate.name}, rate {entry.rate:.2g}, seed {seed}", markup=False)
        result = fit(
            self.model, candidate.plan, data=data, settings=settings, seeds=(seed,), out=place / f"seed-{seed}",
            remedies=[parse_remedy(r) for r in candidate.remedies], method=candidate.name,
            prefix_folder=self.folder / "prefix", device=self.device, revision=self.revision, offline=self.offline,
            allow_pickle=self.allow_pickle, command=self.command, quiet=True,
        )  # fmt: skip
        if not timed.is_file():
            io.write_json(timed, {"seconds": time.perf_counter() - begun, "passes": passes})
        spent = io.read_json(timed)
        self.clock.spent += spent["seconds"]
        self.clock.passes += spent["passes"]
        split = data.scored_splits[0]
        self.trained += 1
        s1, s2 = candidate.plan.boundaries(next(iter(candidate.plan.blocks)))
        shared = {
            "trial": self.trained, "candidate": candidate.name, "role": candidate.role,
            "digest": io.content_digest([candidate.plan.to_dict()["strata"], entry.rate])[:12], "s1": s1, "s2": s2,
            "trainable": int(result.runs["trainable"].iloc[0]), "learning_rate": entry.rate, "seed": seed,
            "stage": stage, "epochs": epochs, "split": split, "seconds": spent["seconds"],
        }  # fmt: skip
        own = result.runs[result.runs["split"] == split]
        home = result.folder / f"seed-{seed}"
        scored = io.read_table(home / f"predictions-{split}")
        values = {**dict(zip(own["metric"], own["value"], strict=True)), "loss": _loss(scored, data)}
        return [{**shared, "metric": m, "value": v} for m, v in values.items()], scored, home / "model"

    def forgotten(self, entry: _Entry, folder: Path, seed: int, abilities: Abilities) -> pd.DataFrame:
        """What a trained plan forgot, by task; kept beside the training."""
        from spafit.models import load_model

        place = folder.parent / "forgotten"
        if not place.with_suffix(".parquet").is_file():
            from analysis.causal import exchanged

            before = load_model(
                self.model, revision=self.revision, offline=self.offline, allow_pickle=self.allow_pickle
            )
            after = load_model(folder, offline=self.offline, allow_pickle=self.allow_pickle)
            read = abilities.reader(after)
            with exchanged(after.model, before.model, range(after.stacks[0].num_blocks), outside=True):
                old = read()
            new = read()
            table = pd.DataFrame(
                {"candidate": entry.candidate.name, "seed": seed, "task": list(old), "unit": abilities.unit,
                 "value": [float((old[t].values - new[t].values).mean()) for t in old]}
            )  # fmt: skip
            io.write_table(place, table, csv=False)
        return io.read_table(place)


def _loss(scored: pd.DataFrame, data: TrainData) -> float:
    """Mean negative log-likelihood in nats, or mean squared error of a regression."""
    if data.labels is None:
        return float(((scored["prediction"] - scored["label"]) ** 2).mean())
    columns = scored[[f"p({c})" for c in data.labels]].to_numpy(float)
    right = columns[np.arange(len(scored)), scored["label"].to_numpy().astype(np.int64)]
    return float(-np.log(np.maximum(right, 1e-12)).mean())


def _ranked(entries: Sequence[_Entry], rows: Sequence[Mapping[str, Any]], stage: str) -> list[_Entry]:
    """Entries of a stage by mean headline over seeds, best first; ties to the smaller loss, undefined scores last."""
    found: dict[tuple[str, float, str], list[float]] = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault((row["candidate"], row["learning_rate"], row["metric"]), []).append(row["value"])

    def order(entry: _Entry) -> tuple[float, float]:
        score, loss = (
            float(np.mean(found.get((entry.candidate.name, entry.rate, m), [math.nan]))) for m in ("headline", "loss")
        )
        return (-score if math.isfinite(score) else math.inf, loss if math.isfinite(loss) else math.inf)

    return sorted(entries, key=order)


def _promoted(entries: Sequence[_Entry], rows: Sequence[Mapping[str, Any]], stage: str, size: int) -> list[_Entry]:
    """The ``size`` entries that go on: the best rate of whoever must, then the best of all."""
    ranked = _ranked(entries, rows, stage)
    kept = _must(ranked)
    kept += [e for e in ranked if e not in kept][: max(0, size - len(kept))]
    return [e for e in ranked if e in kept]


def _must(ranked: Sequence[_Entry]) -> list[_Entry]:
    """The best suggestion, the best baseline, and the best rate of each protected baseline."""
    wanted: list[Callable[[Candidate], bool]] = [lambda c: c.role == "suggestion", lambda c: c.role == "baseline"]
    names = dict.fromkeys(e.candidate.name for e in ranked if e.candidate.protected)
    wanted += [lambda c, n=n: c.name == n for n in names]  # type: ignore[misc]
    found = [next(e for e in ranked if fits(e.candidate)) for fits in wanted]
    return list({e.key: e for e in found}.values())


def _finalists(entries: Sequence[_Entry], rows: Sequence[Mapping[str, Any]], stage: str) -> list[_Entry]:
    """The best suggestion, the best baseline and the protected ones, each at its best rate."""
    return _must(_ranked(entries, rows, stage))


def _within_time(
    entries: list[_Entry], rows: Sequence[Mapping[str, Any]], stage: str, clock: _Clock, items: int, epochs: float,
    seeds: Sequence[int], confirmations: int, full: float, rest: Sequence[tuple[int, float]],
) -> list[_Entry]:  # fmt: skip
    """Fewer entries where the time left would not do for them, the rungs after this one and the confirmation."""
    ranked = _ranked(entries, rows, stage)
    must = _must(ranked)

    def needed(n: int) -> float:
        later = sum(min(n, size) * e for size, e in rest[1:]) * len(seeds)
        return clock.seconds((n * epochs * len(seeds) + later + len(must) * confirmations * full) * items)

    n = len(entries)
    while n > len(must) and needed(n) > clock.left():
        n -= 1
    kept = must + [e for e in ranked if e not in must][: n - len(must)]
    return [e for e in ranked if e in kept]


def compare_confirmed(
    suggestion: str, confirmed: Mapping[str, Mapping[int, pd.DataFrame]], metrics: Sequence[str], *, n_boot: int = 2000
) -> pd.DataFrame:
    """The suggestion's headline less that of each other plan, with paired intervals over items crossed with seeds.

    Args:
        suggestion: its name.
        confirmed: name -> seed -> scored items with the columns idx, label and prediction.
        metrics: the headline is the mean of them; an undefined one (a constant prediction's correlation) counts 0.
        n_boot: bootstrap draws.

    Returns:
        Columns :data:`analysis.race_result.COMPARISON_COLUMNS`.
    """
    seeds = sorted(confirmed[suggestion])
    first = confirmed[suggestion][seeds[0]]
    n = len(first)
    random = generator(0, "race", n, len(seeds))
    draws = random.integers(n, size=(n_boot, n))
    weights = np.full((n_boot, len(seeds)), 1 / len(seeds))
    if len(seeds) > 1:
        weights = random.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=n_boot) / len(seeds)
    labels = first["label"].to_numpy()

    def scores(table: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
        guesses = table["prediction"].to_numpy()[rows]
        return np.asarray(np.mean([np.nan_to_num(resampled_metric(m, guesses, labels[rows])) for m in metrics], axis=0))

    every = np.arange(n)[None]
    point: dict[str, float] = {}
    drawn: dict[str, np.ndarray] = {}
    for name, by_seed in confirmed.items():
        point[name] = float(np.mean([scores(by_seed[s], every)[0] for s in seeds]))
        drawn[name] = (np.stack([scores(by_seed[s], draws) for s in seeds], axis=1) * weights).sum(1)
    rows = []
    for name in confirmed:
        if name != suggestion:
            low, high = interval(drawn[suggestion] - drawn[name])
            numbers = (point[suggestion] - point[name], float(low), float(high), point[suggestion], point[name])
            rows.append((suggestion, name, *numbers, len(seeds), n))
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def _verdict(comparison: pd.DataFrame) -> Verdict:
    if comparison.empty:
        return "untested"
    if (comparison["ci_low"] > 0).all():
        return "yes"
    return "no" if (comparison["ci_high"] < 0).any() else "within noise"


def _sentence(verdict: Verdict, suggestion: str | None, comparison: pd.DataFrame, missing: str) -> str:
    if verdict == "untested":
        return " ".join(["Suggestion beats the baselines: untested.", missing]).strip()
    row = comparison.loc[comparison["baseline_score"].idxmax()]
    return (
        f"Suggestion beats the baselines: {verdict}. {suggestion} less the best of them, {row['baseline']}: "
        f"{row['difference']:+.3f} ({row['ci_low']:+.3f} to {row['ci_high']:+.3f}), {row['seeds']} fresh seeds, "
        f"{row['items']} items that chose nothing."
    )
