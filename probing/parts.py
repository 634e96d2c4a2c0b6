"""Finished tasks in a run's folder: what was written for each, and whether it is whole and still valid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spafit import io


def part_files(task: str) -> tuple[str, str, str, str]:
    """Paths, relative to the run's folder, of one task's items, probes, score rows and summaries."""
    return (
        f"items/{task}.parquet",
        f"probes/{task}.safetensors",
        f"parts/{task}.parquet",
        f"parts/{task}.summaries.parquet",
    )


def measure_part(task: str, measure: str) -> str:
    """Name of the part that holds one measure of a task (:mod:`probing.measures`); it has no probes."""
    return f"{task}.{measure}"


def write_part(
    out: Path,
    task: str,
    *,
    key: str,
    labels: Sequence[str],
    scores: pd.DataFrame,
    summaries: pd.DataFrame,
    items: pd.DataFrame | None,
    weights: Mapping[str, np.ndarray] | None,
    notes: Sequence[str],
) -> None:
    """Write items, probes and scores of one finished task, and last the file that says it is finished.

    Args:
        out: the run's folder.
        task: the task's name, or that of a measure of it.
        key: digest of everything that the numbers depend on.
        labels: class names, kept with the probes.
        scores: rows as :func:`probing.scoring.score_table` gives them.
        summaries: rows as :func:`probing.results.summary_table` gives them.
        items: rows as :func:`probing.scoring.item_table` gives them; None where there are none.
        weights: fitted probes, ``<site>/<pooling>/<probe>/<control>/<seed>/<hidden>/<part>`` (behind ``<stack>/`` in a
            run of several stacks), parts as in :class:`probing.probes.fitted.FittedProbe`; None where none are kept.
        notes: what was left out or cut.
    """
    from safetensors.numpy import save_file

    # One key only: safetensors writes several in random order, and equal results must give equal bytes.
    content = {"schema_version": io.SCHEMA_VERSION, "task": task, "labels": list(labels)}
    metadata = {"spafit": json.dumps(content, ensure_ascii=False)}
    item_file, probe_file, score_file, summary_file = part_files(task)
    if items is not None:
        io.write_table(out / item_file.removesuffix(".parquet"), items, csv=False)
    if weights is not None:
        contiguous = {k: np.ascontiguousarray(v) for k, v in sorted(weights.items())}
        io.atomic_write(out / probe_file, lambda p: save_file(contiguous, p, metadata=metadata))
    io.write_table(out / score_file.removesuffix(".parquet"), scores, csv=False)
    io.write_table(out / summary_file.removesuffix(".parquet"), summaries, csv=False)
    absent = {item_file: items is None, probe_file: weights is None}
    kept = [f for f in part_files(task) if not absent.get(f)]
    files = {f: io.file_digest(out / f) for f in kept}
    io.write_json(out / "parts" / f"{task}.json", {"key": key, "files": files, "notes": list(notes)})


def is_finished(out: Path, task: str, key: str) -> bool:
    """Whether the folder holds this task, whole, with the same key. A damaged part counts as not finished."""
    part = _read(out, task)
    if part is None or part.get("key") != key:
        return False
    needed, files = set(part_files(task)[2:]), part["files"]
    return needed <= set(files) and all((out / f).is_file() and io.file_digest(out / f) == d for f, d in files.items())


def read_part(out: Path, task: str) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Score rows, summaries and notes of a finished task."""
    part = _read(out, task)
    assert part is not None
    scores, summaries = (io.read_table(out / f.removesuffix(".parquet")) for f in part_files(task)[2:])
    return scores, summaries, list(part["notes"])


def _read(out: Path, task: str) -> dict[str, Any] | None:
    try:
        part = io.read_json(out / "parts" / f"{task}.json")
    except (OSError, ValueError):  # absent, or damaged: the task is computed again
        return None
    return part if isinstance(part, dict) and isinstance(part.get("files"), dict) else None
