"""What a localization test can be fed: probing runs, comparisons, causal tables, published curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.block_effects import (
    BlockEffects,
    effects_from_table,
    effects_of_erasure,
    effects_of_training,
    read_causal,
)
from analysis.breakdown import LEAST_ITEMS, part_curves
from analysis.comparison import Comparison
from analysis.hypothesis import Hypothesis, Statistic
from analysis.sensitivity import unstable_tasks
from analysis.stability import Reading, readings_of
from probing.curves import LayerCurve
from probing.published import read_published
from probing.results import ProbeResults
from spafit.errors import DataError, UsageError


@dataclass(frozen=True)
class Evidence:
    """Evidence for one verdict.

    Attributes:
        name: what the verdict is called.
        source: the folder or file.
        num_blocks: depth of the model.
        levels: level of each task with a curve; no scores are read for it.
        results: a probing run whose curves are used.
        given: curves that are at hand already.
        effects: interventional effects.
        weights: digest of the model's weights, where it is known.
        notes: what was left aside, in sentences.
    """

    name: str
    source: Path
    num_blocks: int
    levels: dict[str, str]
    results: ProbeResults | None = field(default=None, repr=False)
    given: tuple[LayerCurve, ...] = field(default=(), repr=False)
    effects: BlockEffects | None = field(default=None, repr=False)
    weights: str | None = None
    notes: tuple[str, ...] = ()

    def curves(self) -> list[LayerCurve]:
        """Bits less a random encoder's where the run has one, with replicates; or the curves as they were given.

        Tasks that ``spafit sensitivity`` found unstable in the run are left out, unless that leaves none.
        """
        if self.results is None:
            return list(self.given)
        curves = self.results.curves(adjusted_by="random-encoder")
        return [c for c in curves if c.task not in self.unstable] or curves

    @property
    def unstable(self) -> dict[str, str]:
        """Tasks that the run's folder says are unstable, with the reason."""
        return {} if self.results is None else unstable_tasks(self.source)

    def readings(self, *, statistic: Statistic = "emergence_cog", seed: int = 0) -> tuple[Reading, ...]:
        """Readings of the order for L4."""
        return (
            ()
            if self.results is None
            else readings_of(self.results, statistic=statistic, without=self.unstable, seed=seed)
        )

    def counts(self, claim: Hypothesis) -> list[int]:
        """Tasks of each type that have a curve, or else an effect: before any is dated."""
        levels = self.levels
        if not levels and self.effects is not None:
            levels = dict(zip(self.effects.tasks, self.effects.levels, strict=True))
        types = [claim.type_of(t, level) for t, level in levels.items() if t not in self.unstable]
        return [types.count(name) for name in claim.levels]


def read_evidence(path: str | Path, claim: Hypothesis) -> list[Evidence]:
    """Read a source: one piece of evidence per verdict that it gives.

    A probing run's folder gives one; a comparison's one per model after training; a file of published curves one per
    model and pooling (its columns of text); a causal table one.

    Args:
        path: folder or file.
        claim: the hypothesis: which kind of intervention is used where there are several, and which tasks count.

    Raises:
        DataError: nothing of the kind.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "forgetting.parquet").is_file():
            return _of_comparison(Comparison.load(path), claim)
        if (path / "scores.parquet").is_file():
            results = ProbeResults.load(path)
            ends = {s: f" ({s})" if len(results.stacks) > 1 else "" for s in results.stacks}
            return [_of_run(results.of_stack(s), name=f"{_name(path)}{end}") for s, end in ends.items()]
        raise DataError(
            f"{path} is neither a folder of spafit-probe (no scores.parquet) nor of spafit compare (no "
            "forgetting.parquet). Give one of these, a CSV of published curves, or a causal table."
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a folder of spafit-probe or spafit compare, or a file.")
    columns = _columns(path)
    if "layer" in columns:
        return _of_published(path)
    if "blocks_start" in columns:
        effects = read_causal(path)
        return [Evidence(path.stem, path, effects.num_blocks, {}, effects=effects)]
    raise DataError(
        f"{path} has neither the column 'layer' (published curves) nor 'blocks_start' (a causal table); it has "
        f"{', '.join(columns) or 'no columns'}."
    )


def read_causal_evidence(paths: Sequence[str | Path]) -> tuple[BlockEffects, set[str]]:
    """Effects of interventions on blocks from several sources together, and digests of the models they are of.

    Args:
        paths: causal tables, or folders of ``spafit compare --task``: each of these gives the task that its models were
            trained on; several models of one task are averaged.

    Raises:
        DataError: a source has no such effects, a task is there twice, or depths differ.
    """
    found: list[BlockEffects] = []
    digests: set[str] = set()
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(read_causal(path))
            continue
        comparison = Comparison.load(path)
        if comparison.causal is None:
            raise DataError(f"{path} has no table causal. Run spafit compare with --task, --data and this --out.")
        found.append(effects_from_table(comparison.causal, source=str(path), task=comparison.run["task"]["name"]))
        digests |= {d for d in [_before_digest(comparison)] if d is not None}
    first = found[0]
    for other in found[1:]:
        if other.harm.shape[::2] != first.harm.shape[::2]:
            raise DataError(
                f"{first.source} has effects of {first.num_blocks} blocks in {first.harm.shape[0]} half(s) of the "
                f"items, {other.source} of {other.num_blocks} in {other.harm.shape[0]}. Give evidence of one model."
            )
    tasks = [t for e in found for t in e.tasks]
    twice = sorted({t for t in tasks if tasks.count(t) > 1})
    if twice:
        raise DataError(f"--causal holds the task {twice[0]} more than once. Name each task once.")
    together = replace(
        first, tasks=tuple(tasks), levels=tuple(v for e in found for v in e.levels),
        harm=np.concatenate([e.harm for e in found], axis=1), source=", ".join(e.source for e in found),
    )  # fmt: skip
    return together, digests


def with_causal(evidence: Sequence[Evidence], paths: Sequence[str | Path]) -> list[Evidence]:
    """The evidence with effects of interventions on blocks beside it.

    Raises:
        UsageError: more than one run, or effects of another model.
    """
    if len(evidence) > 1:
        raise UsageError(
            f"--causal holds effects on one model, and there are {len(evidence)} runs. Give it with one run, or name "
            "the causal table as a run of its own."
        )
    effects, digests = read_causal_evidence(paths)
    if not evidence:
        return [Evidence("causal", Path(paths[0]), effects.num_blocks, {}, effects=effects)]
    own = evidence[0]
    if own.num_blocks != effects.num_blocks or (own.weights and digests - {own.weights}):
        raise UsageError(
            f"{effects.source} has effects on another model than {own.source} ({effects.num_blocks} and "
            f"{own.num_blocks} blocks, or other weights). Give evidence of one model."
        )
    return [replace(own, effects=effects)]


def parts_of(evidence: Sequence[Evidence], column: str, *, least_items: int = LEAST_ITEMS) -> list[Evidence]:
    """Each probing run cut into the parts of a column of its items, such as ``genre``: one verdict for every part.

    ``pooling`` and ``probe`` cut a run, too, into its poolings or probe families. Parts of a column have the curves of
    the run's first pooling and probe; those with fewer than ``least_items`` test items of a task are left out. No part
    has readings for L4.

    Raises:
        UsageError: evidence that is no probing run, or a run without two such parts.
    """
    found = []
    for own in evidence:
        if own.results is None:
            raise UsageError(f"{own.source} is no probing run, so it has no items to cut by {column!r}. Give runs.")
        if column in ("pooling", "probe"):
            cut = _settings(own.results, column)
        else:
            cut = part_curves(own.results, column, least_items=least_items)
        for part, curves in cut.items():
            name = f"{column} {part}" if len(evidence) == 1 else f"{own.name}, {column} {part}"
            kept = tuple(c for c in curves if c.task not in own.unstable)
            found.append(
                Evidence(name, own.source, own.num_blocks, {c.task: c.level for c in kept}, given=kept,
                         weights=own.weights)
            )  # fmt: skip
    return found


def _settings(results: ProbeResults, column: str) -> dict[str, list[LayerCurve]]:
    """Curves of a run's tasks at each of its poolings, or by each of its probe families."""
    rows = results.scores[results.scores["task"].isin(results.tasks_with_bits)]
    found: dict[str, list[LayerCurve]] = {}
    for task, value in rows[["task", column]].drop_duplicates().astype(str).itertuples(index=False, name=None):
        curve = results.curve(task, pooling=value) if column == "pooling" else results.curve(task, probe=value)
        found.setdefault(value, []).append(curve)
    if len(found) < 2:
        raise UsageError(f"{results.folder} has one {column} only, {next(iter(found), 'none')}. Cut it otherwise.")
    return found


def _of_run(results: ProbeResults, *, name: str, effects: BlockEffects | None = None) -> Evidence:
    assert results.folder is not None
    model = results.run["model"]
    used = results.scores[results.scores["task"].isin(results.tasks_with_bits or results.tasks)]
    levels = dict(zip(used["task"].astype(str), used["level"].astype(str), strict=True))
    return Evidence(
        name, results.folder, model["blocks"], levels, results=results, effects=effects,
        weights=model.get("weights_digest"),
    )  # fmt: skip


def _of_comparison(comparison: Comparison, claim: Hypothesis) -> list[Evidence]:
    """One piece per stack and model after training: the order before it, and what erasing or training did to tasks."""
    if len(comparison.stacks) > 1:
        parts = {s: _of_comparison(comparison.of_stack(s), claim) for s in comparison.stacks}
        return [replace(e, name=f"{e.name} ({s})") for s, own in parts.items() for e in own]
    folder = comparison.folder
    before = folder / "before"
    results = ProbeResults.load(before) if (before / "scores.parquet").is_file() else None
    results = None if results is None else results.of_stack(comparison.stacks[0])
    found = []
    for model in comparison.models:
        effects, notes = _comparison_effects(comparison, model, claim)
        name = f"{_name(folder)}: {model}"
        if results is not None:
            own = _of_run(results, name=name, effects=effects)
            found.append(replace(own, source=folder, notes=notes))
            continue
        rows = _bits(comparison.forgetting, model)
        curves = tuple(_before_curves(rows))
        levels = {c.task: c.level for c in curves}
        depth = int(rows["hidden"].max())
        found.append(Evidence(name, folder, depth, levels, given=curves, effects=effects, notes=notes))
    return found


def _comparison_effects(
    comparison: Comparison, model: str, claim: Hypothesis
) -> tuple[BlockEffects | None, tuple[str, ...]]:
    """The first kind of intervention in the hypothesis's order that has enough tasks; the last one if none has."""
    rows = _bits(comparison.forgetting, model)
    levels = dict(zip(rows["task"].astype(str), rows["level"].astype(str), strict=True))
    kinds: dict[str, BlockEffects] = {}
    if comparison.erasure is not None:
        own = comparison.erasure[comparison.erasure["model"] == model]
        if len(own):
            kinds["erasure"] = effects_of_erasure(own, levels=levels, source=f"{comparison.folder} (erasure)")
    if not rows.empty:
        kinds["training"] = effects_of_training(rows, source=f"{comparison.folder} (forgetting)")
    asked = [kinds[k] for k in claim.interventions if k in kinds]
    notes: list[str] = []
    for effects in asked:
        types = [claim.type_of(t, level) for t, level in zip(effects.tasks, effects.levels, strict=True)]
        if min(types.count(name) for name in claim.levels) >= claim.min_tasks:
            return effects, tuple(notes)
        notes.append(f"Effects by {effects.kind} are of {len(effects.tasks)} task(s), too few for every type.")
    return (asked[-1] if asked else None), tuple(notes[:-1])


def _bits(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Rows of one model in bits, the task alone, each task's first split, probe, pooling and site."""
    rows = table[(table["model"] == model) & (table["metric"] == "bits") & (table["control"] == "none")]
    for column in ("site", "pooling", "probe", "split"):
        rows = rows[rows[column] == rows.groupby("task")[column].transform("first")]
    return rows


def _before_curves(rows: pd.DataFrame) -> list[LayerCurve]:
    """Curves before training from a comparison's table, without replicates."""
    found = []
    for task, own in rows[rows["term"] == "pre"].groupby("task", sort=False):
        own = own.sort_values("hidden")
        hidden = own["hidden"].to_numpy(np.int64)
        values = own["value"].to_numpy(np.float64)
        found.append(LayerCurve(str(task), str(own["level"].iloc[0]), hidden, values, np.empty((0, len(hidden)))))
    return found


def _before_digest(comparison: Comparison) -> str | None:
    before = comparison.folder / "before"
    if not (before / "scores.parquet").is_file():
        return None
    digest = ProbeResults.load(before).run["model"].get("weights_digest")
    return None if digest is None else str(digest)


def _of_published(path: Path) -> list[Evidence]:
    curves = read_published(path)
    if any(c.kind == "weights" for c in curves):
        raise DataError(
            f"{path} holds mixing weights, which say where a mix looks and not where a task can be read. Give scores "
            "by layer; spafit summarize has the centre of gravity of weights."
        )
    groups: dict[str, list[LayerCurve]] = {}
    for c in curves:
        groups.setdefault(", ".join(c.keys.values()) or path.stem, []).append(c.curve)
    return [
        Evidence(name, path, int(max(c.hidden.max() for c in own)), {c.task: c.level for c in own}, given=tuple(own))
        for name, own in groups.items()
    ]


def _name(folder: Path) -> str:
    return folder.resolve().name


def _columns(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        return list(pd.read_csv(path, nrows=0).columns)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as a table: {reason}. Give a CSV or parquet file.") from error
