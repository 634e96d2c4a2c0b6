"""Small things that every reader of task files needs in the same way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd


def safe_name(name: str) -> str:
    """``name`` with everything but letters, digits and ``_.-`` replaced: task names become file names."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in numerical order where all are whole numbers, else in alphabetical order."""
    distinct = set(labels)
    whole = all(re.fullmatch(r"-?[0-9]+", label) for label in distinct)
    return tuple(sorted(distinct, key=(lambda label: (int(label), label)) if whole else None))


def overlap_notes(items: pd.DataFrame, what: str) -> list[str]:
    """A note that counts the test texts which training has too, or nothing; ``what`` names them in the plural."""
    trained = set(items.loc[items["split"] == "train", "text"])
    tested = set(items.loc[~items["split"].isin(["train", "dev"]), "text"])
    count = len(trained & tested)
    return [f"{count} test {what} also occur in training; they are kept."] if count else []


def licence_of(folder: Path) -> str:
    """First line of the folder's licence file, or the advice to ask the data's source."""
    found = next((f for f in sorted(folder.iterdir()) if re.match(r"(?i)licen[cs]e", f.name) and f.is_file()), None)
    lines = found.read_text(encoding="utf-8", errors="replace").split("\n") if found else []
    return next((line.strip() for line in lines if line.strip()), "see the data's source")
