"""The localization test over several sources: one verdict for each run, pooling and probe, or published model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.hypothesis import HypothesisFile, default_hypothesis
from analysis.localization import Condition, LocalizationTest, localization_test
from analysis.stability import is_stable, stability
from probing.curves import LayerCurve
from spafit import io
from spafit.errors import DataError, UsageError

COLUMNS = (
    "source", "variant", "verdict", "difference", "low", "high", "p", "smallest_p", "power", "tasks", "left_out",
    "blocks", "stability", "sentence",
)  # fmt: skip


@dataclass(frozen=True)
class Localized:
    """Verdicts of several sources on one hypothesis.

    Attributes:
        table: one row per source and variant (pooling and probe, or a published file's text columns), with the columns
            of :data:`COLUMNS`: ``difference`` is the mean depth of the last level minus the first's, as a share of the
            blocks, with its one-sided bounds ``low`` and ``high``; ``p`` of the exact trend test over tasks and the
            smallest that the tasks could give; ``power`` for steps of the margin; ``tasks`` used by level.
        tests: the tests behind the rows.
        hypothesis: what was tested.
    """

    table: pd.DataFrame = field(repr=False)
    tests: tuple[LocalizationTest, ...] = field(repr=False)
    hypothesis: HypothesisFile

    def to_markdown(self) -> str:
        """The table, and how the verdicts vary between sources."""
        lines = [
            "| source | variant | verdict | difference, % of depth | p | smallest p | power | tasks used |",
            "|---|---|---|---|--:|--:|--:|---|",
        ]
        for row in self.table.to_dict("records"):
            known = np.isfinite(row["p"])
            cells = [row["source"], row["variant"] or "—", row["verdict"]]
            bounds = " ".join(f"{100 * row[k]:+.0f}" for k in ("low", "high")) if known else ""
            cells.append(f"{100 * row['difference']:+.0f} [{bounds}]" if known else "—")
            cells += [f"{row[k]:.2g}" if known else "—" for k in ("p", "smallest_p", "power")]
            lines.append("| " + " | ".join([*cells, row["tasks"]]) + " |")
        counts = Counter(self.table["verdict"])
        found = self.table["difference"].dropna()
        stated = self.table[self.table["stability"] != ""].drop_duplicates(["source", "stability"])
        lines += ["", *(f"{r['source']}: {r['stability']}" for r in stated.to_dict("records"))] if len(stated) else []
        lines += ["", f"Verdicts: {', '.join(f'{n} {v}' for v, n in counts.most_common())}."]
        if len(found) > 1:
            lines.append(
                f"Between {len(found)} sources and variants the difference runs from {100 * found.min():+.0f} to "
                f"{100 * found.max():+.0f} % of the depth (standard deviation {100 * found.std():.0f})."
            )
        claim = self.hypothesis.hypothesis
        lines.append(
            f"{self.hypothesis.claim} Levels {' < '.join(claim.levels)}, depth by {claim.statistic}, "
            f"alpha {claim.alpha:g}, margin {claim.delta:g} of the depth; digest {self.hypothesis.digest[:16]}. "
            "Tasks are the units. Only the order of emergence is "
            "tested: whether the model uses what probes find is not."
        )
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``localization.parquet``, ``.csv``, ``.md`` and ``localization.json`` (every test in full)."""
        folder = Path(folder)
        io.write_table(folder / "localization", self.table)
        io.write_text(folder / "localization.md", "# Localization\n\n" + self.to_markdown())
        content = {"hypothesis_digest": self.hypothesis.digest, "tests": [t.to_dict() for t in self.tests]}
        io.write_json(folder / "localization.json", content)
        return [folder / f"localization.{end}" for end in ("md", "csv", "json")]


def localize(
    sources: Sequence[str | Path], hypothesis: HypothesisFile | None = None, *, by: str | None = None
) -> Localized:  # fmt: skip
    """Test a hypothesis on every source by itself.

    Published curves have no items behind them: their depths are the plain centre of gravity of the running maximum,
    pulled towards mid-depth by noise, and a gain within the noise of successive layers is not dated.

    Args:
        sources: folders of probing runs, and CSV files of published single-layer scores.
        hypothesis: the claim; the shipped one by default.
        by: a column of the runs' items, such as ``genre``: each of its parts gets a verdict of its own, too, from the
            first pooling and probe. Tasks that lack the column are not in it.

    Raises:
        DataError: a source is neither, or holds cumulative scores or weights.
        UsageError: no sources.
    """
    if not sources:
        raise UsageError("Give at least one folder of a probing run or CSV file of published curves.")
    claim = default_hypothesis() if hypothesis is None else hypothesis
    rows, tests = [], []
    for source in sources:
        fourth = _stability(Path(source), claim)
        for name, variant, curves, blocks in (*_curves(Path(source)), *_parts_of(Path(source), by)):
            test = localization_test([claim.file_curve(c) for c in curves], claim.hypothesis, num_blocks=blocks)
            stated = None if by is not None and variant.startswith(f"{by} ") else fourth
            test = _with_stability(test, stated)
            first = test.conditions[0]
            low, high = first.interval or (np.nan, np.nan)
            used = Counter(t.level for t in test.tasks if t.used)
            numbers = {k: np.nan if (v := getattr(first, k)) is None else v for k in ("p", "smallest_p", "power")}
            rows.append(
                {
                    "source": name, "variant": variant, "verdict": test.verdict,
                    "difference": np.nan if first.number is None else first.number, "low": low, "high": high, **numbers,
                    "tasks": ", ".join(f"{used[level]} {level}" for level in claim.hypothesis.levels),
                    "left_out": ", ".join(t.task for t in test.tasks if not t.used), "blocks": blocks,
                    "stability": "" if stated is None else stated.sentence, "sentence": test.sentence,
                }
            )  # fmt: skip
            tests.append(test)
    return Localized(pd.DataFrame(rows, columns=list(COLUMNS)), tuple(tests), claim)


def _stability(source: Path, claim: HypothesisFile) -> Condition | None:
    """Condition L4 of a run's folder; published curves have none."""
    from probing.results import ProbeResults

    return stability(ProbeResults.load(source), claim) if (source / "run.json").exists() else None


def _with_stability(test: LocalizationTest, fourth: Condition | None) -> LocalizationTest:
    """The test with its condition L4; an order that is not stable is not supported."""
    if fourth is None:
        return test
    conditions = (*test.conditions[:3], fourth)
    if not fourth.tested:
        return replace(test, conditions=conditions)
    failed = test.verdict == "supported" and not is_stable(fourth)
    return replace(
        test, conditions=conditions, verdict="inconclusive" if failed else test.verdict,
        tested="order of emergence (L1) and its stability (L4)" if test.conditions[0].tested else test.tested,
        sentence=f"{test.sentence} {fourth.sentence}",
    )  # fmt: skip


def _curves(source: Path) -> Iterator[tuple[str, str, list[LayerCurve], int]]:
    """Name, variant, curves and blocks of everything in a source that takes a verdict of its own."""
    if (source / "run.json").exists():
        yield from _of_run(source)
        return
    if not source.is_file():
        raise DataError(f"{source}: is neither the folder of a probing run nor a CSV file of published curves.")
    from probing.published import read_published

    groups: dict[str, list[LayerCurve]] = {}
    for one in read_published(source):
        if one.kind != "single":
            raise DataError(
                f"{source}: holds {one.kind} {'scores' if one.kind == 'cumulative' else ''}".rstrip()
                + "; the order of emergence is read from scores of single layers."
            )
        groups.setdefault(", ".join(one.keys.values()), []).append(one.curve)
    for variant, curves in groups.items():
        yield source.stem, variant, curves, int(max(c.hidden.max() for c in curves))


def _parts_of(source: Path, by: str | None) -> Iterator[tuple[str, str, list[LayerCurve], int]]:
    if by is None or not (source / "run.json").exists():
        return
    from analysis.breakdown import part_curves
    from probing.results import ProbeResults

    results = ProbeResults.load(source)
    model = results.run["model"]
    for part, curves in part_curves(results, by).items():
        yield str(model["name"]), f"{by} {part}", curves, int(model["blocks"])


def _of_run(folder: Path) -> Iterator[tuple[str, str, list[LayerCurve], int]]:
    from probing.results import ProbeResults

    results = ProbeResults.load(folder)
    tasks = results.tasks_with_bits
    if not tasks:
        raise DataError(f"{folder}: has no task with bits per item; trees alone do not test the order of levels.")
    own = results.scores[results.scores["task"].isin(tasks)]
    variants = own[["site", "pooling", "probe"]].drop_duplicates().astype(str).itertuples(index=False, name=None)
    model = results.run["model"]
    for site, pooling, probe in variants:
        there = own[(own["site"] == site) & (own["pooling"] == pooling) & (own["probe"] == probe)]["task"].unique()
        curves = [results.curve(t, site=site, pooling=pooling, probe=probe) for t in tasks if t in there]
        words = ", ".join([*([] if site == "block" else [site]), pooling, probe])
        yield str(model["name"]), words, curves, int(model["blocks"])
