"""One hierarchy of errors; every message says what, where, what was got, what is allowed, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpafitError(Exception):
    """Base of every error that a user can cause or mend. The command line prints its one sentence."""


class UsageError(SpafitError):
    """An option or argument that cannot be used as given (exit status 2)."""


class ConfigError(UsageError):
    """A configuration, strata or hypothesis file that does not hold together; names file, line and field."""


class ModelError(SpafitError):
    """A model that cannot be found, read, trusted, or taken apart into blocks."""


class HubError(ModelError):
    """The model hub did not answer, refused, or does not have what was asked for."""


class DataError(SpafitError):
    """A data file whose content does not follow its format; names file and line."""


class TaskError(SpafitError):
    """A task that cannot be probed as it stands (one class, a label seen in test only, no items left)."""


class UnknownTaskError(TaskError, UsageError):
    """A task reference that names nothing."""


class StoreError(SpafitError):
    """The activation cache could not be written or trusted."""


class OutputError(SpafitError):
    """The output folder cannot be written, or holds something that must not be overwritten."""


class NumericalError(SpafitError):
    """Activations or fits that are not finite."""


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a setting that is none of its spellings, so that no comparison with one of them goes the other way.

    Raises:
        UsageError: names the setting, what it is, and what it can be.
    """
    choices = list(allowed)
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; it can be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}.")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the closest of ``options``, or an empty string if none is close."""
    close = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
