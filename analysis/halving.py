"""Successive halving: rungs, who goes on from one to the next, and what it will cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.race_candidates import Candidate
from analysis.race_trainings import Clock, Entry


def schedule(entries: Sequence[Entry], *, rungs: int, eta: int, epochs: float) -> list[tuple[int, float]]:
    """Entries and epochs of each rung: each has a share 1/eta of the one before, and the last one all epochs."""
    least = sum(1 for c in {e.candidate.name: e.candidate for e in entries}.values() if c.protected) + 2
    return [
        (max(math.floor(len(entries) / eta**r), min(least, len(entries))), epochs / eta ** (rungs - 1 - r))
        for r in range(rungs)
    ]


def announce(
    plan: Sequence[tuple[int, float]], entries: Sequence[Entry], items: int, epochs: float, seeds: Sequence[int],
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


def ranked(
    entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]], stage: str, *, tolerance: float | None = None
) -> list[Entry]:
    """Entries of a stage, best first, by their means over seeds.

    Those that keep the tolerance come before the others; then by headline, ties to the smaller loss, undefined last.
    """
    found: dict[tuple[str, float, str], list[float]] = {}
    for row in rows:
        if row["stage"] == stage:
            found.setdefault((row["candidate"], row["learning_rate"], row["metric"]), []).append(row["value"])

    def order(entry: Entry) -> tuple[bool, float, float]:
        score, loss, lost = (
            float(np.mean(found.get((entry.candidate.name, entry.rate, metric), [math.nan])))
            for metric in ("headline", "loss", "forgetting")
        )
        over = tolerance is not None and lost > tolerance
        return (over, -score if math.isfinite(score) else math.inf, loss if math.isfinite(loss) else math.inf)

    return sorted(entries, key=order)


def promoted(
    entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]], stage: str, size: int, *,
    tolerance: float | None = None,
) -> list[Entry]:  # fmt: skip
    """The ``size`` entries that go on: the best rate of whoever must, then the best of all."""
    order = ranked(entries, rows, stage, tolerance=tolerance)
    kept = _must(order)
    kept += [e for e in order if e not in kept][: max(0, size - len(kept))]
    return [e for e in order if e in kept]


def _must(order: Sequence[Entry]) -> list[Entry]:
    """The best suggestion, the best baseline, and the best rate of each protected baseline."""
    wanted: list[Callable[[Candidate], bool]] = [lambda c: c.role == "suggestion", lambda c: c.role == "baseline"]
    names = dict.fromkeys(e.candidate.name for e in order if e.candidate.protected)
    wanted += [lambda c, n=n: c.name == n for n in names]  # type: ignore[misc]
    found = [next(e for e in order if fits(e.candidate)) for fits in wanted]
    return list({e.key: e for e in found}.values())


def finalists(
    entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]], stage: str, *, tolerance: float | None = None
) -> list[Entry]:
    """The best suggestion, the best baseline and the protected ones, each at its best rate."""
    return _must(ranked(entries, rows, stage, tolerance=tolerance))


def within_time(
    entries: list[Entry], rows: Sequence[Mapping[str, Any]], stage: str, clock: Clock, items: int, epochs: float,
    seeds: Sequence[int], confirmations: int, full: float, rest: Sequence[tuple[int, float]], *,
    tolerance: float | None = None,
) -> list[Entry]:  # fmt: skip
    """Fewer entries where the time left would not do for them, the rungs after this one and the confirmation."""
    order = ranked(entries, rows, stage, tolerance=tolerance)
    must = _must(order)

    def needed(n: int) -> float:
        later = sum(min(n, size) * e for size, e in rest[1:]) * len(seeds)
        return clock.seconds((n * epochs * len(seeds) + later + len(must) * confirmations * full) * items)

    n = len(entries)
    while n > len(must) and needed(n) > clock.left():
        n -= 1
    kept = must + [e for e in order if e not in must][: n - len(must)]
    return [e for e in order if e in kept]
