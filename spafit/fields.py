"""Checked fields of configuration files: errors that carry the field's path, so that a reader can add file and line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spafit.errors import ConfigError, did_you_mean

FieldPath = tuple[str | int, ...]


class FieldError(ConfigError):
    """A field that does not hold together, before the file and line are known.

    Attributes:
        path: keys and positions from the top of the configuration to the field.
        sentence: what was got, what is allowed, and the remedy.
    """

    def __init__(self, path: FieldPath, sentence: str):
        self.path, self.sentence = path, sentence
        super().__init__(f"{field_name(path) or 'strata configuration'}: {sentence}")


def field_name(path: FieldPath) -> str:
    """Spell a field path as people write it: ``strata[2].lora.rank``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


@contextmanager
def within(*prefix: str | int) -> Iterator[None]:
    """Put ``prefix`` before the path of a :class:`FieldError` raised inside."""
    try:
        yield
    except FieldError as error:
        raise FieldError((*prefix, *error.path), error.sentence) from None


@dataclass(frozen=True)
class Origin:
    """Where a configuration was read: for errors found later.

    Attributes:
        file: the file's name as given.
        lines: line number (from 1) of each field path.
    """

    file: str
    lines: Mapping[FieldPath, int]

    def locate(self, error: FieldError) -> ConfigError:
        """The same error with file and line in front."""
        known = next((p for n in range(len(error.path), 0, -1) if (p := error.path[:n]) in self.lines), None)
        line = self.lines[known] if known is not None else 1
        name = field_name(error.path)
        return ConfigError(f"{self.file}, line {line}{f', {name}' if name else ''}: {error.sentence}")


def integer(value: Any, path: FieldPath, *, minimum: int) -> int:
    """Return ``value`` if it is a whole number of at least ``minimum``; else raise :class:`FieldError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise FieldError(path, f"got {value!r}; write a whole number of at least {minimum}.")
    return value


def number(value: Any, path: FieldPath) -> float:
    """Return ``value`` if it is a finite number; else raise :class:`FieldError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FieldError(path, f"got {value!r}; write a number.")
    return value


def text(value: Any, path: FieldPath) -> str:
    """Return ``value`` if it is a non-empty text; else raise :class:`FieldError`."""
    if not isinstance(value, str) or not value:
        raise FieldError(path, f"got {value!r}; write a non-empty text.")
    return value


def choice(value: Any, path: FieldPath, allowed: Sequence[str], what: str) -> str:
    """Return ``value`` if it is one of ``allowed``; else raise :class:`FieldError` with the closest of them."""
    if not isinstance(value, str) or value not in allowed:
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise FieldError(path, f"{value!r} is not a {what}. Allowed: {', '.join(allowed)}.{hint}")
    return value


def name_list(value: Any, path: FieldPath, allowed: Sequence[str], what: str) -> tuple[str, ...]:
    """Return ``value`` as a tuple if it is a non-empty list of distinct names of ``allowed``; else raise."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise FieldError(path, f"got {value!r}; write a list of names. Allowed: {', '.join(allowed)}.")
    if not value:
        raise FieldError(path, f"the list is empty, so nothing would train. Name one or more of {', '.join(allowed)}.")
    for i, name in enumerate(value):
        choice(name, (*path, i), allowed, what)
        if name in value[:i]:
            raise FieldError((*path, i), f"{name!r} stands here twice. Remove one.")
    return tuple(value)


def plain(value: Any, path: FieldPath) -> Any:
    """Copy JSON-like content; NumPy scalars become numbers, tuples lists, numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, (*path, str(k))) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, (*path, i)) for i, v in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), path)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise FieldError(path, f"got {type(value).__name__}; only texts, numbers, lists and mappings can be written here.")
