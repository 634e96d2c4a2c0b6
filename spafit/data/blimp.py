"""BLiMP: minimal pairs of an acceptable and an unacceptable sentence (Warstadt et al. 2020, arXiv 1912.00582)."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from spafit.errors import DataError

COLUMNS = ("field", "phenomenon", "paradigm", "pair", "good", "bad")


def read_blimp(folder: str | Path, *, pairs: int | None = 100) -> pd.DataFrame:
    """Minimal pairs of every paradigm in a folder of BLiMP's JSONL files.

    Args:
        folder: holds ``<paradigm>.jsonl``, or a folder ``data`` with them.
        pairs: the first so many of each paradigm (they are in random order in the files); None takes all.

    Returns:
        Columns :data:`COLUMNS`; ``field`` is morphology, syntax, syntax_semantics (their interface) or semantics.

    Raises:
        DataError: no such files, or a malformed line (file, line, what).
    """
    folder = Path(folder)
    files = sorted((folder / "data").glob("*.jsonl")) or sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder} holds no BLiMP files (*.jsonl, or data/*.jsonl). Give the folder of its paradigms.")
    rows = []
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if pairs is not None and number > pairs:
                    break
                try:
                    item = json.loads(line)
                    good, bad = item["sentence_good"], item["sentence_bad"]
                    named = item["field"].replace("/", "_"), item["linguistics_term"], item["UID"]
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise DataError(
                        f"{file}, line {number}: not a pair of BLiMP ({error!r}); sentence_good, sentence_bad, field, "
                        "linguistics_term and UID are needed."
                    ) from error
                if not (isinstance(good, str) and isinstance(bad, str) and good.strip() and bad.strip()):
                    raise DataError(f"{file}, line {number}: a sentence is empty.")
                rows.append((*named, number - 1, good, bad))
    return pd.DataFrame(rows, columns=list(COLUMNS))
