"""Schedules as YAML: text with line numbers to rules, and rules to plain content.

schema_version: 1
min_steps: 10            # between two changes (not the timetable's)
most_changes: 20
cool_down: 50            # steps in which nothing is taken back
rules:
  - {at: {share: 0.5}, boundaries: [2, 4], rank: 16, learning_rate: 1e-4}   # or step, epoch; or plan: FILE
  - {on: plateau, do: unfreeze, start: 2, blocks: 1, patience: 1}           # or do: freeze
  - {on: signal, reading: "lost:core.tense", tolerance: 0.02, moves: rises, do: freeze}   # or restore, slow
  - {on: gradient, do: freeze, every: 20, below: 0.1}                       # or rates
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit.errors import ConfigError
from spafit.fields import FieldError, FieldPath, Origin, choice, integer, text, within
from spafit.strata import StrataConfig
from spafit.yaml_fields import entries, mapping, read_fields

if TYPE_CHECKING:
    from spafit.scheduling.rules import AnyRule
    from spafit.scheduling.schedule import Schedule

SCHEMA_VERSION = 1
_GUARD = ("min_steps", "most_changes", "cool_down")
_AT = ("step", "epoch", "share")


def load(path: Path) -> Schedule:
    """Read a schedule from a file; the files of its plans lie relative to it.

    Raises:
        ConfigError: with file, line, field, what was got, what is allowed and the remedy.
    """
    try:
        source = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    return read_fields(
        source, file=str(path), what="a schedule",
        build=lambda content, origin: schedule_from_plain(content, folder=path.parent, origin=origin),
    )  # fmt: skip


def schedule_from_plain(content: Any, *, folder: Path = Path(), origin: Origin | None = None) -> Schedule:
    """Build a schedule from plain objects with the file's keys.

    Raises:
        FieldError: a :class:`~spafit.errors.ConfigError` that names the field.
    """
    from spafit.scheduling.schedule import Schedule

    top = mapping(content, (), ("schema_version", "rules"), _GUARD, None)
    version = integer(top["schema_version"], ("schema_version",), minimum=1)
    if version > SCHEMA_VERSION:
        raise FieldError(("schema_version",), f"got {version}; this package reads {SCHEMA_VERSION}. Upgrade it.")
    rules = []
    for i, entry in enumerate(entries(top["rules"], ("rules",))):
        with within("rules", i):
            rules.append(_rule(entry, folder))
    return Schedule(tuple(rules), **{k: top[k] for k in _GUARD if k in top}, origin=origin)


def _kinds() -> dict[str, type]:
    from spafit.scheduling.rules import OnGradient, OnPlateau, OnSignal

    return {"plateau": OnPlateau, "signal": OnSignal, "gradient": OnGradient}


def _rule(entry: Any, folder: Path) -> AnyRule:
    from spafit.scheduling.rules import At

    path: FieldPath = ()
    if not isinstance(entry, dict) or ("at" in entry) == ("on" in entry):
        raise FieldError(path, "write a mapping with one of at (a time) and on (plateau, signal or gradient).")
    if "at" in entry:
        own = mapping(entry, path, ("at",), ("boundaries", "rank", "learning_rate", "plan", "stack"), None)
        when = mapping(own.pop("at"), ("at",), (), _AT, None)
        if "plan" in own:
            own["plan"] = _plan(own["plan"], folder)
        return At(**when, **own)
    kinds = _kinds()
    kind = kinds[choice(entry["on"], ("on",), tuple(kinds), "thing that a rule looks at")]
    needed = tuple(f.name for f in fields(kind) if f.default is MISSING)
    optional = tuple(f.name for f in fields(kind) if f.default is not MISSING)
    own = mapping(entry, path, ("on", *needed), optional, None)
    del own["on"]
    rule: AnyRule = kind(**own)
    return rule


def _plan(content: Any, folder: Path) -> StrataConfig:
    if isinstance(content, dict):
        with within("plan"):
            return StrataConfig.from_dict(content)
    return StrataConfig.load(folder / text(content, ("plan",)))


def plain_from_schedule(schedule: Schedule) -> dict[str, Any]:
    """Plain objects with the file's keys; fields at their defaults are written out, those that are None are not."""
    from spafit.scheduling.rules import At

    rules = []
    for rule in schedule.rules:
        own = {f.name: getattr(rule, f.name) for f in fields(rule) if getattr(rule, f.name) is not None}
        if isinstance(rule, At):
            own = {"at": {n: own.pop(n) for n in _AT if n in own}, **own}
            if rule.plan is not None:
                own["plan"] = {k: v for k, v in rule.plan.to_dict().items() if k != "provenance"}
            if rule.boundaries is not None:
                own["boundaries"] = list(rule.boundaries)
        else:
            own = {"on": next(name for name, kind in _kinds().items() if kind is type(rule)), **own}
        rules.append(own)
    return {"schema_version": SCHEMA_VERSION, **{k: getattr(schedule, k) for k in _GUARD}, "rules": rules}
