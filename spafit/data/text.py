"""Running text from a file."""

from __future__ import annotations

from pathlib import Path

from spafit.errors import DataError


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give a file of running text.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Convert it first.") from error
    if not text.strip():
        raise DataError(f"{path} is empty. Give a file of running text.")
    return text
