"""One claim over several runs: a verdict for each, and a pooled one beside how much the runs differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.evidence import Evidence
from analysis.hypothesis import Hypothesis
from analysis.judging import Shares, judge_interventions, judge_order, judge_types
from analysis.localization import LocalizationTest, in_words, localization_test, tested_words
from analysis.power import Plan, plan
from analysis.verdicts import Condition, Outcome, TypeVerdict, Verdict, decide, percent
from spafit import io
from spafit.errors import DataError, UsageError


@dataclass(frozen=True)
class Run:
    """The verdict on one run.

    Attributes:
        name: what it is called.
        source: folder or file.
        test: the verdict.
        notes: what was left aside.
    """

    name: str
    source: str
    test: LocalizationTest
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PooledTest:
    """The verdict on several runs together, with tasks as units.

    A task that occurs in several runs is one unit: its depth, as a share of the depth of the model, and its shares of
    effects are averaged over the runs that have it, because what is peculiar to a task is not independent from run to
    run. Shares of models of different depth are put on the blocks of the shallowest one.

    Attributes:
        verdict: as in :class:`LocalizationTest`.
        sentence: in words.
        tested: what was tested.
        conditions: L1 to L4; L4 asks whether the order has the same sign in every run.
        types: a verdict on each type.
        n_runs: runs with an order.
        mean: mean over runs of the difference of L1, as a fraction of the depth; NaN without any.
        sd: its standard deviation between runs; NaN with fewer than two.
        low: the smallest of them.
        high: the largest.
    """

    verdict: Verdict
    sentence: str
    tested: str
    conditions: tuple[Condition, ...]
    types: tuple[TypeVerdict, ...]
    n_runs: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class LocalizationRuns:
    """What ``spafit localize`` found.

    Attributes:
        hypothesis: the claim.
        runs: a verdict for each.
        pooled: on all of them; None with one run.
    """

    hypothesis: Hypothesis
    runs: tuple[Run, ...]
    pooled: PooledTest | None = None

    def to_dict(self) -> dict[str, Any]:
        """Content of ``verdict.json``."""
        runs = [{"name": r.name, "source": r.source, "notes": list(r.notes), **r.test.to_dict()} for r in self.runs]
        return io.plain(
            {
                "schema_version": io.SCHEMA_VERSION,
                "hypothesis": self.hypothesis.to_dict(),
                "hypothesis_digest": self.hypothesis.digest,
                "runs": runs,
                "pooled": None if self.pooled is None else asdict(self.pooled),
            }
        )

    def save(self, directory: str | Path) -> Path:
        """Write ``verdict.json`` into ``directory`` and return its path."""
        path = Path(directory) / "verdict.json"
        io.write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, directory: str | Path) -> LocalizationRuns:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the folder holds no such verdict.
        """
        path = Path(directory) / "verdict.json"
        content = io.read_json(path) if path.is_file() else {}
        if "runs" not in content:
            raise DataError(f"{directory} holds no verdict of spafit localize.")
        runs = tuple(
            Run(r["name"], r["source"], LocalizationTest.from_dict(r), tuple(r["notes"])) for r in content["runs"]
        )
        pooled = content["pooled"]
        if pooled is not None:
            numbers = {k: float("nan") if pooled[k] is None else pooled[k] for k in ("mean", "sd", "low", "high")}
            pooled = PooledTest(
                **{**pooled, **numbers, "conditions": tuple(map(Condition.from_dict, pooled["conditions"])),
                   "types": tuple(map(TypeVerdict.from_dict, pooled["types"]))}
            )  # fmt: skip
        return cls(Hypothesis.from_dict(content["hypothesis"]), runs, pooled)

    def to_pandas(self) -> pd.DataFrame:
        """One row per run, the pooled one last.

        Columns: run, source, verdict, blocks, tasks, difference, ci_low, ci_high (fractions of the depth), p,
        smallest_p, power (of L1), then the outcome of each condition and the verdict on each type.
        """
        rows = [_row(r.name, r.source, r.test, r.test.num_blocks) for r in self.runs]
        if self.pooled is not None:
            rows.append(_row("pooled", "", self.pooled, None))
        return pd.DataFrame(rows)


def announce(evidence: Sequence[Evidence], claim: Hypothesis) -> list[tuple[str, Plan]]:
    """What each run could find, from its numbers of tasks alone."""
    return [
        (
            e.name,
            plan(claim, e.counts(claim), e.num_blocks, interventions=e.effects is not None, depths=bool(e.levels)),
        )
        for e in evidence
    ]


def localize(
    evidence: Sequence[Evidence],
    claim: Hypothesis,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> LocalizationRuns:
    """Test the claim on each piece of evidence, and on all of them together where there are several.

    Args:
        evidence: from :func:`analysis.evidence.read_evidence`.
        claim: the hypothesis.
        seed: chooses the draws of the emergence correction.
        progress: called with 1 after each run.

    Raises:
        UsageError: no evidence, two runs of one name, or two sources of the same name.
    """
    if not evidence:
        raise UsageError("There is no evidence to test the claim on. Give at least one run.")
    runs = []
    for e, name in zip(evidence, _distinct(evidence), strict=True):
        readings = e.readings(statistic=claim.statistic, seed=seed)
        test = localization_test(
            e.curves(), claim, num_blocks=e.num_blocks, effects=e.effects, readings=readings, seed=seed
        )
        unstable = tuple(f"Left out as unstable: {t}: {why}." for t, why in e.unstable.items() if t in e.levels)
        runs.append(Run(name, str(e.source), test, (*e.notes, *unstable)))
        if progress is not None:
            progress(1)
    return LocalizationRuns(claim, tuple(runs), pool([r.test for r in runs], claim) if len(runs) > 1 else None)


def pool(tests: Sequence[LocalizationTest], claim: Hypothesis) -> PooledTest:
    """One verdict on several; see :class:`PooledTest`.

    Args:
        tests: two or more verdicts on the same claim.
        claim: the hypothesis.
    """
    depths: dict[str, list[float]] = {}
    types: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for test in tests:
        for t in test.tasks:
            if t.level in claim.levels:
                types[t.task] = t.level
                if t.used:
                    depths.setdefault(t.task, []).append(t.depth / test.num_blocks)
                else:
                    left_out[t.task] = t.level
    means = {t: float(np.mean(v)) for t, v in depths.items()}
    without = [t for t in left_out if t not in means]
    l1, order = judge_order(means, types, claim, num_blocks=1, left_out=without, pooled=True)
    shares = _pooled_shares(tests, claim)
    l2, l3, ranges, pairs = judge_interventions(shares, claim)
    gaps = np.array([t.conditions[0].number for t in tests if t.conditions[0].number is not None], dtype=np.float64)
    l4 = _over_runs(tests, gaps, claim)
    verdict, conditions = decide((l1, l2, l3, l4), alpha=claim.alpha)
    by_type = judge_types(
        claim, means, types, num_blocks=1, order=order, shares=shares, ranges=ranges, pairs=pairs,
        contradicted=l4.outcome == "fails",
    )  # fmt: skip
    spread = float(gaps.std(ddof=1)) if len(gaps) > 1 else float("nan")
    found = [t.verdict for t in tests]
    said = ", ".join(f"{found.count(v)} {v}" for v in ("supported", "refuted", "inconclusive") if v in found)
    words = f"{in_words(verdict, conditions, claim)} Of {len(tests)} runs: {said}."
    if len(gaps) > 1:
        words += (
            f" Between runs the difference has the mean {percent(gaps.mean())} % of the depth and the standard "
            f"deviation {percent(spread)} (from {percent(gaps.min())} to {percent(gaps.max())} %)."
        )
    numbers = (float(gaps.mean()), spread, float(gaps.min()), float(gaps.max())) if len(gaps) else (float("nan"),) * 4
    return PooledTest(verdict, words, tested_words(conditions), conditions, by_type, len(gaps), *numbers)


def _over_runs(tests: Sequence[LocalizationTest], gaps: np.ndarray, claim: Hypothesis) -> Condition:
    """L4 over runs: the same sign in each, and no reading within a run that contradicts the order."""
    own = [t.conditions[3].outcome for t in tests]
    if len(gaps) < 2 and "fails" not in own:
        return Condition("L4", False, "Not tested: an order in two or more runs is needed.")
    deeper = int((gaps > 0).sum())
    outcome: Outcome = "fails" if deeper < len(gaps) or "fails" in own else "holds"
    words = f"{claim.levels[-1].capitalize()} is deeper than {claim.levels[0]} in {deeper} of {len(gaps)} runs."
    if "fails" in own:
        words += f" Within {own.count('fails')} of them a seed, pooling, probe or random encoder contradicts the order."
    return Condition("L4", len(gaps) > 1, words, outcome, deeper / len(gaps) if len(gaps) else None)


def _pooled_shares(tests: Sequence[LocalizationTest], claim: Hypothesis) -> Shares | str | None:
    """Mean shares by task over runs, of the first kind of intervention that any run has."""
    kinds = {s.kind for t in tests for s in t.shares}
    kind = next((k for k in claim.interventions if k in kinds), None)
    if kind is None:
        return None
    if claim.held_out != "none":
        return "ranges were chosen in each run, and differ. Claim ranges to pool over runs."
    with_it = [t for t in tests if any(s.kind == kind for s in t.shares)]
    depth = min(t.num_blocks for t in with_it)
    rows: dict[str, list[np.ndarray]] = {}
    level: dict[str, str] = {}
    for test in with_it:
        for s in test.shares:
            if s.kind == kind:
                whole = np.concatenate([[0.0], np.cumsum(s.shares)])
                at = np.linspace(0, test.num_blocks, depth + 1)
                rows.setdefault(s.task, []).append(np.diff(np.interp(at, np.arange(len(whole)), whole)))
                level[s.task] = s.level
    names = tuple(rows)
    ranks = np.array([claim.levels.index(level[t]) for t in names])
    ranges = claim.ranges(depth)
    assert ranges is not None
    notes = f" Means over {len(with_it)} runs."
    return Shares(names, ranks, np.stack([np.mean(rows[t], axis=0) for t in names]), ranges, kind, notes)


def _distinct(evidence: Sequence[Evidence]) -> list[str]:
    """Names, with the source where two are the same."""
    names = [e.name for e in evidence]
    found = [f"{n} ({e.source})" if names.count(n) > 1 else n for n, e in zip(names, evidence, strict=True)]
    twice = sorted({n for n in found if found.count(n) > 1})
    if twice:
        raise UsageError(f"The run {twice[0]} is given twice. Name each source once.")
    return found


def _row(name: str, source: str, test: LocalizationTest | PooledTest, blocks: int | None) -> dict[str, Any]:
    l1 = test.conditions[0]
    low, high = l1.interval or (None, None)
    return {
        "run": name, "source": source, "verdict": test.verdict, "blocks": blocks,
        "tasks": sum(t.n_tasks for t in test.types), "difference": l1.number, "ci_low": low, "ci_high": high,
        "p": l1.p, "smallest_p": l1.smallest_p, "power": l1.power,
        **{c.name: c.outcome for c in test.conditions}, **{f"type {t.type}": t.verdict for t in test.types},
    }  # fmt: skip
