"""Files: atomic writes, content digests, schema versions, tidy tables as parquet and CSV."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spafit.errors import OutputError

SCHEMA_VERSION = 1


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` beside ``path`` and rename the result onto ``path``.

    A reader therefore sees the old file or the whole new one, never a part. The temporary file is removed on failure.

    Raises:
        OutputError: the folder cannot be written or the disk is full; names the path and the system's reason.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another folder; "
            "what was finished before is kept."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: sorted keys are *not* imposed, NaN becomes null, NumPy scalars become numbers."""
    write_text(path, json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file as plain Python objects."""
    return json.loads(path.read_text(encoding="utf-8"))


def plain(value: Any) -> Any:
    """Plain JSON content: string keys, lists, numbers; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return None if value is pd.NA else value


def write_table(stem: Path, table: pd.DataFrame, *, csv: bool = True) -> None:
    """Write ``stem.parquet`` (with the schema version in its metadata) and, by default, ``stem.csv``.

    The bytes depend on the table alone, so that equal results give equal files.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**(arrow.schema.metadata or {}), b"spafit_schema_version": str(SCHEMA_VERSION).encode()}
    arrow = arrow.replace_schema_metadata(metadata)
    atomic_write(_with_extension(stem, ".parquet"), lambda p: pq.write_table(arrow, p, compression="zstd"))
    if csv:
        atomic_write(_with_extension(stem, ".csv"), lambda p: table.to_csv(p, index=False, lineterminator="\n"))


def read_table(stem: Path) -> pd.DataFrame:
    """Read the table that :func:`write_table` wrote under the same ``stem``."""
    return pd.read_parquet(_with_extension(stem, ".parquet"))


def _with_extension(stem: Path, extension: str) -> Path:
    return stem.parent / (stem.name + extension)  # a stem may hold dots, as task names do


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def content_digest(parts: Iterable[object]) -> str:
    """SHA-256 over the parts' UTF-8 text, each preceded by its length, so that boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
