"""Remedies as they are written on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spafit.errors import UsageError, did_you_mean
from spafit.retain.outputs import KLToBase, Replay
from spafit.retain.weights import EWC, L2SP

#: Options of each remedy on the command line, and how each is read.
_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "l2sp": {"heads": str},
    "ewc": {"data": Path, "labels": str, "seed": int},
    "kl": {"data": Path, "temperature": float, "batch_size": int, "seed": int},
    "replay": {"data": Path, "batch_size": int, "seed": int},
}


def parse_remedy(text: str, *, folder: Path = Path()) -> L2SP | EWC | KLToBase | Replay:
    """Read ``name:weight[,option=value…]``: ``l2sp:0.01``, ``ewc:100,data=FILE.tsv,labels=given``.

    ``data`` names a table with the columns ``text``, optionally ``text2``, and ``label`` where labels are read; the
    path is relative to ``folder``.

    Raises:
        UsageError: an unknown name or option, a weight or value that cannot be read, or a missing ``data``.
        DataError: the file cannot be read.
    """
    head, *rest = (part.strip() for part in text.split(","))
    name, colon, number = head.partition(":")
    if name not in _OPTIONS:
        raise UsageError(f"{name!r} is not a remedy. Allowed: {', '.join(_OPTIONS)}.{did_you_mean(name, _OPTIONS)}")
    if not colon:
        raise UsageError(f"{text!r} has no weight. Write {name}:1, with a number of at least 0 after the colon.")
    weight = _read(float, number, f"{text!r}: the weight")
    options: dict[str, Any] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if key not in _OPTIONS[name] or not equals:
            raise UsageError(
                f"{text!r}: {name} has no option {key!r}. Options, as option=value: {', '.join(_OPTIONS[name])}."
                f"{did_you_mean(key, _OPTIONS[name])}"
            )
        if key in options:
            raise UsageError(f"{text!r}: {key} stands twice. Remove one.")
        options[key] = _read(_OPTIONS[name][key], value, f"{text!r}: {key}")
    if name == "l2sp":
        return L2SP(weight, **options)
    if "data" not in options:
        raise UsageError(f"{text!r}: {name} needs items. Add data=FILE, a table with the columns text and label.")
    from spafit.data.tables import read_table_file

    options["data"] = read_table_file(folder / options["data"].expanduser())
    kinds: dict[str, Any] = {"ewc": EWC, "kl": KLToBase, "replay": Replay}
    made: EWC | KLToBase | Replay = kinds[name](weight, **options)
    return made


def _read(kind: Callable[[str], Any], value: str, where: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{where} must be {what}; got {value!r}.") from error
