"""`run_glue`: every task × method × seed of a plan into the benchmark's table and its test-set prediction files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spafit import io
from spafit.data.glue import read_glue
from spafit.data.glue_tasks import GLUE_TASKS
from spafit.data.training import TrainData
from spafit.errors import DataError, SpafitError, UsageError
from spafit.fit_result import RUN_COLUMNS, FitResult
from spafit.glue_cells import Context, make_cell, train_cells
from spafit.glue_plan import GluePlan
from spafit.glue_submission import SUBMISSION_FILES, collect_submissions, predict_tests
from spafit.glue_table import summarize, to_markdown
from spafit.runtime import pick_device, provenance, stderr_console


@dataclass(frozen=True)
class GlueResult:
    """A view on the folder of a benchmark run.

    Attributes:
        folder: holds ``results.md``, ``results.csv``, ``runs`` (parquet, csv), ``run.json``, ``submissions/`` and one
            :func:`spafit.training.fit` folder per task and method.
        run: content of ``run.json``; ``cells`` says of each task and method whether it is ``complete`` or ``failed``
            and why, ``submissions`` which files each method has and lacks.
        runs: raw rows, with the columns of :data:`spafit.fit_result.RUN_COLUMNS`.
        table: a row per method; see :func:`spafit.glue_table.summarize`.
    """

    folder: Path
    run: dict[str, Any]
    runs: pd.DataFrame
    table: pd.DataFrame

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Cells that did not finish, with their ``reason``."""
        return [c for c in self.run["cells"] if c["status"] != "complete"]

    def to_markdown(self) -> str:
        """The table, what its averages lack, what failed, and which predictions there are."""
        parts = [to_markdown(self.table, tasks=self.run["tasks"], seeds=len(self.run["seeds"]))]
        if self.failures:
            parts.append("Failed:")
            parts.append("\n".join(f"- {c['task']}, {c['method']}: {c['reason']}" for c in self.failures))
        parts.append("Predictions of the test sets:")
        said = []
        for method, found in self.run["submissions"].items():
            lacks = f"no zip, it lacks {', '.join(found['missing'])}" if found["missing"] else f"all in {found['zip']}"
            said.append(f"- {method}: {len(found['files'])} of {len(SUBMISSION_FILES)} files; {lacks}")
        parts.append("\n".join(said))
        if self.run["notes"]:
            parts.append("\n".join(f"Note: {n}." for n in self.run["notes"]))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return str(self.table.round(4).to_html(index=False))


def run_glue(
    plan: GluePlan,
    *,
    data: str | Path | None = None,
    out: str | Path,
    device: str = "auto",
    offline: bool = False,
    allow_pickle: bool = False,
    resume: bool = True,
    command: str | None = None,
    quiet: bool = False,
) -> GlueResult:
    """Train every cell of a plan, score it on the development sets, predict the test sets.

    A finished cell is returned as it is; an interrupted one goes on. A cell that fails is recorded with its reason, and
    the others go on. The test sets are predicted by the seed that is best on the held-out share of the training items,
    never by the one that is best on the development set; AX by the model of MNLI.

    Args:
        plan: tasks, methods and seeds.
        data: folder of GLUE files, ``hub`` or ``hub:NAME``; by default the plan's own.
        out: output folder. Its tables hold the cells of this call only.
        device: torch device; ``auto`` takes the first of cuda, mps, cpu.
        offline: never ask the hub.
        allow_pickle: accept pickle weights (read with ``weights_only``).
        resume: go on from what is there; False trains every cell of this call again.
        command: how this was called, for the record.
        quiet: no progress on stderr.

    Raises:
        UsageError: no data are named, the device does not exist, or several processes were launched.
        DataError: not one of the tasks can be read.
        OutputError: the folder cannot be written.
    """
    source = plan.data if data is None else str(data)
    if source is None:
        raise UsageError("The plan names no data. Give a folder of GLUE files, or hub, with --data or as data: in it.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "A benchmark runs in one process, since a cell that fails in one of several would halt the others. Share "
            "the work by calling it once per --tasks or --methods with one --out, or train a cell with spafit train."
        )
    context = Context(plan, Path(out), pick_device(device), offline, allow_pickle, resume, command, quiet)
    stderr_console(quiet=quiet).print(f"Reading {', '.join(plan.tasks)} from {source}")
    read, unread, notes = _read_all(plan, source, offline=offline)
    if not any(task in read for task in plan.tasks):
        raise DataError(f"None of the plan's tasks can be read. {unread[plan.tasks[0]]}")
    cells = [
        make_cell(context, task, method, read[task]) for task in plan.tasks if task in read for method in plan.methods
    ]
    results, reasons = train_cells(cells, context)
    written, predict_reasons, predict_notes = predict_tests(cells, results, read.get("ax"), context)
    submissions = collect_submissions(context, written)
    records = []
    for task in plan.tasks:
        for method in plan.methods:
            at = (task, method.name)
            reason = unread.get(task) or " ".join(r for r in (reasons.get(at), predict_reasons.get(at)) if r)
            records.append(
                {"task": task, "method": method.name, "status": "failed" if reason else "complete", "reason": reason,
                 "seeds": list(results[at].seeds) if at in results else []}
            )  # fmt: skip
    if "ax" in unread and "mnli" in read:
        notes.append(f"AX is not predicted: {unread['ax'].rstrip('.')}")
    notes += [*predict_notes, *_revision_notes(results)]
    runs = pd.concat([r.runs for r in results.values()], ignore_index=True) if results else _no_runs()
    table = summarize(runs, methods=[m.name for m in plan.methods], tasks=plan.tasks)
    run = {
        "schema_version": io.SCHEMA_VERSION,
        "command": command or "spafit.run_glue",
        "plan": plan.name,
        "model": plan.model or "default",
        "revision": plan.revision,
        "data": source,
        "tasks": list(plan.tasks),
        "methods": [m.name for m in plan.methods],
        "seeds": list(plan.seeds),
        "device": context.device,
        "cells": records,
        "submissions": submissions,
        "notes": notes,
        **provenance(),
    }
    result = GlueResult(context.folder, run, runs, table)
    io.write_table(context.folder / "runs", runs)
    io.atomic_write(context.folder / "results.csv", lambda p: table.to_csv(p, index=False, lineterminator="\n"))
    io.write_json(context.folder / "run.json", run)
    io.write_text(context.folder / "results.md", result.to_markdown() + "\n")
    return result


def trainable_by_method(plan: GluePlan, *, offline: bool = False) -> pd.DataFrame:
    """Trainable parameters of every method by number of outputs, from the model's configuration alone.

    Returns:
        Columns ``method``, ``outputs`` (classes, 1 for STS-B), ``trainable``, ``total``, and ``problem``, which says
        why a method does not fit the model (empty where it does).

    Raises:
        ModelError: the model's configuration cannot be had.
    """
    from spafit.adapt import apply_strata, plan_for
    from spafit.heads import build_without_weights

    rows = []
    for outputs in sorted({len(GLUE_TASKS[t].labels) or 1 for t in plan.tasks}):
        for method in plan.methods:
            empty, name = build_without_weights(plan.model, labels=outputs, revision=plan.revision, offline=offline)
            trainable = total = None
            problem = ""
            try:
                stratified = apply_strata(empty, plan_for(empty, method.strata, model_id=name))
                trainable, total = stratified.trainable_parameters(), stratified.total_parameters()
            except SpafitError as error:
                problem = str(error)
            rows.append(
                {"method": method.name, "outputs": outputs, "trainable": trainable, "total": total, "problem": problem}
            )
    return pd.DataFrame(rows).astype({"trainable": "Int64", "total": "Int64"})


# ---------------------------------------------------------------- data


def _read_all(plan: GluePlan, source: str, *, offline: bool) -> tuple[dict[str, TrainData], dict[str, str], list[str]]:
    """Every task that can be read (AX with MNLI), why the others cannot, and notes."""
    read: dict[str, TrainData] = {}
    unread: dict[str, str] = {}
    notes: list[str] = []
    for name in (*plan.tasks, *(("ax",) if "mnli" in plan.tasks else ())):
        task = GLUE_TASKS[name]
        try:
            frames = read_glue(
                name, source, files=plan.files.get(name), on_bad_rows=plan.on_bad_rows, offline=offline
            )  # fmt: skip
        except SpafitError as error:
            unread[name] = str(error)
            continue
        for split, frame in frames.items():
            if frame.attrs.get("bad_rows"):
                notes.append(f"{name}: {frame.attrs['bad_rows']} malformed lines of {split} were left out")
        labels = None if task.regression else task.labels
        read[name] = TrainData(name, frames, labels, task.metrics, source=f"GLUE {name}")
    return read, unread, notes


def _no_runs() -> pd.DataFrame:
    words = ("task", "method", "split", "metric")
    return pd.DataFrame({c: pd.Series(dtype=object if c in words else np.float64) for c in RUN_COLUMNS})


def _revision_notes(results: Mapping[tuple[str, str], FitResult]) -> list[str]:
    found = sorted({str(r.run["model"]["revision"]) for r in results.values()})
    if len(found) < 2:
        return []
    return [
        f"The cells were trained on {len(found)} revisions of the model ({', '.join(found)}); pin one with revision:"
    ]
