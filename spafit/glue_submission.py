"""Predictions of the GLUE test sets in the benchmark's format, and a zip per method that has all eleven files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from spafit import io
from spafit.data.glue_predictions import write_predictions
from spafit.data.glue_tasks import GLUE_TASKS
from spafit.data.training import TrainData
from spafit.errors import SpafitError
from spafit.fit_result import FitResult
from spafit.glue_cells import Cell, Context
from spafit.predictions import predict_logits, predicted

#: Files of a whole submission, in the benchmark's order.
SUBMISSION_FILES = tuple(name for task in GLUE_TASKS.values() for name in task.predictions.values())
_PREDICTED = "test_predictions.json"


def best_seed(result: FitResult) -> tuple[int, Literal["held-out share", "first seed"]]:
    """The seed with the best score on the held-out training items, and what it was chosen by.

    The scores on the development set are not looked at. Without a held-out share (``select_share: 0``), or where no
    score on it is defined, the first seed is taken.
    """
    curves = result.metrics
    rows = curves[(curves["split"] == "select") & (curves["metric"] == "headline")].dropna(subset="value")
    if not len(rows):
        return result.seeds[0], "first seed"
    return int(str(rows.groupby("seed")["value"].max().idxmax())), "held-out share"


def predict_tests(
    cells: list[Cell], results: Mapping[tuple[str, str], FitResult], ax: TrainData | None, context: Context
) -> tuple[dict[str, list[str]], dict[tuple[str, str], str], list[str]]:
    """Files written per method, the reason where predicting failed, and notes."""
    written: dict[str, list[str]] = {m.name: [] for m in context.plan.methods}
    reasons: dict[tuple[str, str], str] = {}
    unchosen: list[str] = []
    for cell in cells:
        at = (cell.task, cell.method.name)
        tests = {(cell.task, s): f for s, f in cell.data.frames.items() if s in GLUE_TASKS[cell.task].predictions}
        if cell.task == "mnli" and ax is not None:
            tests["ax", "test"] = ax.frames["test"]
        names = [GLUE_TASKS[task].predictions[split] for task, split in tests]
        place = context.folder / "submissions" / cell.method.folder
        if at not in results:
            for name in names:  # of an earlier run: it must not be taken for this one's
                (place / name).unlink(missing_ok=True)
            continue
        seed, how = best_seed(results[at])
        if how == "first seed" and len(results[at].seeds) > 1:
            unchosen.append(f"{cell.task} by {cell.method.name}")
        parts = [cell.key, seed, results[at].seeds, ax.digest if ax is not None and cell.task == "mnli" else ""]
        key, record = io.content_digest(parts), cell.folder / _PREDICTED
        before = io.read_json(record) if record.is_file() and context.resume else {"key": None, "files": {}}
        known = before["key"] == key and set(before["files"]) == set(names)
        if not known or any(_digest(place / n) != d for n, d in before["files"].items()):
            try:
                _write_tests(cell, tests, results[at].model_folder(seed), place, context)
            except SpafitError as error:
                reasons[at] = f"Its test set is not predicted: {error}"
                continue
            io.write_json(record, {"key": key, "seed": seed, "files": {n: _digest(place / n) for n in names}})
        written[cell.method.name] += names
    notes = []
    if unchosen:
        notes.append(f"No score on a held-out share, so the first seed predicts the test set of {', '.join(unchosen)}")
    return written, reasons, notes


def _digest(path: Path) -> str | None:
    return io.file_digest(path) if path.is_file() else None


def _write_tests(
    cell: Cell, tests: Mapping[tuple[str, str], pd.DataFrame], model: Path, place: Path, context: Context
) -> None:
    """Load a trained model and write the benchmark's files of its test sets."""
    from spafit.batches import encode
    from spafit.checkpoint import load, read_config
    from spafit.hub import locate
    from spafit.loading import load_tokenizer

    if not tests:
        return
    stratified = load(model, offline=context.offline, allow_pickle=context.allow_pickle)
    stratified.model.eval().to(context.device)
    tokenizer = load_tokenizer([locate(str(model))], required=True)
    regression, window = cell.data.regression, read_config(model)["base"]["max_length"]
    for (task, split), frame in tests.items():
        encoded = encode(frame, tokenizer, max_length=window, regression=regression)
        logits = predict_logits(stratified.model, encoded, tokenizer, batch_size=4 * cell.settings.batch_size)
        write_predictions(task, split, frame["idx"], predicted(logits, regression=regression), place)


def collect_submissions(context: Context, written: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Zip every method that has all files; say what the others lack."""
    found: dict[str, dict[str, Any]] = {}
    for method in context.plan.methods:
        names = [n for n in SUBMISSION_FILES if n in written[method.name]]
        missing = [n for n in SUBMISSION_FILES if n not in names]
        place = context.folder / "submissions"
        archive = place / f"{method.folder}.zip"
        if not missing:
            io.atomic_write(archive, lambda p, names=names, at=place / method.folder: _zip(p, at, names))  # type: ignore[misc]
        elif archive.is_file() and not _zip_holds(archive, place / method.folder):
            archive.unlink()  # its files were predicted anew or removed since
        found[method.name] = {
            "files": names,
            "missing": missing,
            "zip": None if missing else f"submissions/{archive.name}",
        }
    return found


def _zip(path: Path, folder: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            # A fixed date, so that equal predictions give equal bytes.
            archive.writestr(
                zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), (folder / name).read_bytes(), zipfile.ZIP_DEFLATED
            )


def _zip_holds(path: Path, folder: Path) -> bool:
    """Whether an archive's files are those of the folder."""
    with zipfile.ZipFile(path) as archive:
        return all((folder / n).is_file() and archive.read(n) == (folder / n).read_bytes() for n in archive.namelist())
