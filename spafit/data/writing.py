"""Data of models that write: running text from text files, answers to prompts from tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from spafit.data.sampling import hold_out
from spafit.data.tables import read_table_file
from spafit.data.text import read_text
from spafit.data.training import TrainData
from spafit.errors import DataError, did_you_mean


def text_data(files: Mapping[str, str | Path], *, name: str | None = None, seed: int = 0) -> TrainData:
    """Running text, one file per split; a line with something in it is a text.

    Args:
        files: split -> UTF-8 file; ``train`` alone is split 80/20 into train and validation.
        name: short name; by default the first file's.
        seed: of the split.

    Raises:
        DataError: a file cannot be read or is empty.
    """
    frames = {}
    for split, path in files.items():
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        frames[split] = pd.DataFrame({"text": lines, "idx": np.arange(len(lines))})
    return _task(files, frames, name, seed, kind="text")


def answers_data(
    files: Mapping[str, str | Path],
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    header: bool = True,
    name: str | None = None,
    seed: int = 0,
) -> TrainData:
    """Prompts and answers from tables (TSV, CSV, JSON lines, parquet), one file per split.

    Args:
        files: split -> file; ``train`` alone is split 80/20 into train and validation.
        prompt: column of what is read (a number for files without a header).
        answer: column of what is to be written.
        header: whether text files name their columns in the first line.
        name: short name; by default the first file's.
        seed: of the split.

    Raises:
        DataError: a column that a file does not have, or an empty prompt or answer (names the file and the row).
    """
    frames = {}
    for split, path in files.items():
        table = read_table_file(Path(path), header=header)
        for column in (prompt, answer):
            if column not in table:
                raise DataError(
                    f"{path}: no column {column!r}. Columns: {', '.join(map(str, table.columns))}."
                    f"{did_you_mean(column, map(str, table.columns))}"
                )
        frame = pd.DataFrame({"prompt": table[prompt].astype(str), "answer": table[answer].astype(str)})
        frame["idx"] = np.arange(len(frame))
        for column in ("prompt", "answer"):
            empty = np.flatnonzero(
                (frame[column].str.strip() == "") | table[{"prompt": prompt, "answer": answer}[column]].isna()
            )
            if len(empty):
                raise DataError(
                    f"{path}, row {empty[0] + 1}: the {column} is empty ({len(empty)} in all). Remove such rows."
                )
        frames[split] = frame
    return _task(files, frames, name, seed, kind="answers")


def _task(
    files: Mapping[str, str | Path], frames: dict[str, pd.DataFrame], name: str | None, seed: int, *, kind: str
) -> TrainData:
    if set(frames) == {"train"}:
        kept, held = hold_out(frames["train"], 0.2, seed=seed)
        frames = {"train": kept.reset_index(drop=True), "validation": held.reset_index(drop=True)}
    paths = [Path(f) for f in files.values()]
    return TrainData(
        name or paths[0].stem, frames, None, (), source=", ".join(p.name for p in paths), kind=kind
    )  # fmt: skip
