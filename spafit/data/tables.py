"""Tables from files (TSV, CSV, JSON lines, parquet), read strictly: a malformed line is named, never skipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pandas as pd

from spafit.errors import DataError

#: Suffixes that :func:`read_table_file` knows; the text formats may be followed by ``.gz``.
TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")

Quoting = Literal["auto", "none", "minimal"]


def table_suffix(path: Path) -> str:
    """The format's suffix of ``path``, lower-case and without ``.gz``; empty if it is none of ours."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in TABLE_SUFFIXES else ""


def read_lines(path: Path) -> list[str]:
    r"""All lines of a UTF-8 text file (``.gz`` too), without line ends; a byte-order mark is dropped.

    Lines end at ``\n`` or ``\r\n`` only: other Unicode separators may stand inside a sentence.

    Raises:
        DataError: the file is missing, is no file, is not valid gzip, or is not UTF-8 (names the line).
    """
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8. Convert the file to UTF-8 first."
        ) from error
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return [line[:-1] if line.endswith("\r") else line for line in lines]


def read_table_file(path: Path, *, header: bool = True, quoting: Quoting = "auto") -> pd.DataFrame:
    """Read one table.

    Args:
        path: a ``.tsv``, ``.csv``, ``.jsonl``/``.ndjson`` or ``.parquet`` file; the text formats also as ``.gz``.
        header: whether a TSV or CSV file's first line names the columns. Without one they are named by position,
            ``"0"``, ``"1"``, …. Ignored by the formats that carry their names.
        quoting: ``none`` takes every quote mark as text (GLUE's TSV files hold unescaped ones), ``minimal``
            understands quoted cells as spreadsheets write them, ``auto`` is ``none`` for TSV and ``minimal`` for CSV.

    Returns:
        A frame with one row per record, whose index, named ``line``, is the line of the file where the record ends
        (from 1; for parquet the row, from 1). TSV and CSV cells are strings exactly as written, empty cells ``""``.
        A key that a JSON line lacks is a missing value.

    Raises:
        DataError: unknown format, no rows, a line with too few or too many cells, a broken quote or JSON line, two
            columns of one name; names the file and line.
    """
    suffix = table_suffix(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".jsonl" or suffix == ".ndjson":
        return _read_json_lines(path)
    if suffix not in (".tsv", ".csv"):
        raise DataError(
            f"{path}: unknown table format. Use one of {', '.join(TABLE_SUFFIXES)} (text formats also .gz)."
        )
    quoted = quoting == "minimal" or (quoting == "auto" and suffix == ".csv")
    return _read_delimited(path, header=header, delimiter="\t" if suffix == ".tsv" else ",", quoted=quoted)


def _records(path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    lines = read_lines(path)
    while lines and lines[-1] == "":  # blank lines at the end are common and harmless; elsewhere they are malformed
        lines.pop()
    if not quoted:
        for number, line in enumerate(lines, start=1):
            yield number, line.split(delimiter)
        return
    reader = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells or [""]
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: {error}. Mend the quotes, or read the file with quoting=none."
        ) from error


def _read_delimited(path: Path, *, header: bool, delimiter: str, quoted: bool) -> pd.DataFrame:
    names: list[str] | None = None
    numbers, rows = [], []
    for number, cells in _records(path, delimiter, quoted):
        if names is None:
            names = cells if header else [str(i) for i in range(len(cells))]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise DataError(f"{path}:{number}: column name {twice[0]!r} occurs twice in the header.")
            if header:
                continue
        if len(cells) != len(names):
            wanted = "the header" if header else "the first line"
            raise DataError(
                f"{path}:{number}: {len(cells)} cell(s) where {wanted} has {len(names)}. "
                f"Mend the line ({'a quote mark may be unbalanced' if quoted else 'a tab too few or too many'})."
            )
        numbers.append(number)
        rows.append(cells)
    if names is None or not rows:
        raise DataError(f"{path}: holds no rows.")
    return pd.DataFrame(rows, columns=names, index=pd.Index(numbers, name="line"))


def _read_json_lines(path: Path) -> pd.DataFrame:
    numbers, rows = [], []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: holds a {type(row).__name__}; each line must be one JSON object.")
        numbers.append(number)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no rows.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # Object columns keep integers apart from floats: a missing cell must not turn class 1 into 1.0.
    content = {c: pd.Series([row.get(c) for row in rows], dtype=object) for c in columns}
    frame = pd.DataFrame(content)
    frame.index = pd.Index(numbers, name="line")
    return frame


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}).") from error
    if not table.num_rows:
        raise DataError(f"{path}: holds no rows.")
    content = {n: pd.Series(table.column(n).to_pylist(), dtype=object) for n in table.column_names}
    frame = pd.DataFrame(content)
    frame.index = pd.RangeIndex(1, table.num_rows + 1, name="line")
    return frame
