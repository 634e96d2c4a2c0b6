"""A hypothesis file: which types of knowledge are claimed to sit where, and by which rules the claim is judged.

It is written before looking at results: the same content gives the same digest, which stands in every result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from spafit import io
from spafit.errors import ConfigError, did_you_mean
from spafit.fields import FieldError, FieldPath, choice, integer, number, text, within
from spafit.yaml_fields import entries, mapping, read_fields

SCHEMA_VERSION = 1
DEFAULT = "bert-pipeline"
HeldOut = Literal["none", "tasks", "items"]
#: What a task's depth is: the bias-corrected centre of its rises, or the hidden state with the largest score.
Statistic = Literal["emergence_cog", "best"]
#: What an interventional effect was measured with; see :mod:`analysis.block_effects`.
Intervened = Literal["blocks", "erasure", "training"]
INTERVENTIONS: tuple[Intervened, ...] = get_args(Intervened)
_LEVEL = "level:"
_FIELDS = (
    "name", "description", "statistic", "delta", "alpha", "min_tasks", "seeds", "poolings", "probes", "interventions",
    "held_out", "split_seed",
)  # fmt: skip


@dataclass(frozen=True)
class KnowledgeType:
    """One type of knowledge.

    Attributes:
        name: its name, such as ``syntax``.
        tasks: names of its probing tasks, or their parts after the last dot, ``*`` and ``?`` allowed; or
            ``level:NAME`` for all tasks of a level; by default the level of the type's own name.
        range: claimed range as fractions of the number of blocks, start and stop; None where no range is claimed, or
            where it is chosen on one half of the evidence.
    """

    name: str
    tasks: tuple[str, ...] = ()
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.tasks:
            object.__setattr__(self, "tasks", (_LEVEL + self.name,))
        if self.range is not None:
            start, stop = (number(v, ("range", i)) for i, v in enumerate(self.range))
            if not 0 <= start < stop <= 1:
                raise FieldError(
                    ("range",), f"got [{start:g}, {stop:g}]; write start and stop as fractions with 0 <= start < stop "
                    "<= 1."
                )  # fmt: skip

    def blocks(self, num_blocks: int) -> tuple[int, int] | None:
        """The claimed range in blocks of a model, half-open; None without one.

        Raises:
            ConfigError: the range holds no block of so shallow a model.
        """
        if self.range is None:
            return None
        start, stop = (math.floor(v * num_blocks + 0.5) for v in self.range)
        if start == stop:
            raise ConfigError(
                f"The range [{self.range[0]:g}, {self.range[1]:g}] of {self.name} holds none of {num_blocks} blocks. "
                "Widen it."
            )
        return start, stop


@dataclass(frozen=True)
class Hypothesis:
    """What is claimed, and how it is judged.

    Attributes:
        types: the types of knowledge, the one that is claimed to sit lowest first. Which task belongs to which type is
            itself an assumption.
        name: a short name.
        description: the claim in words.
        statistic: the depth of one task: ``emergence_cog``, or ``best``, which is noise on a flat curve.
        alpha: level of the one-sided tests.
        delta: smallest difference that would matter: of depth between the first and the last type, as a fraction
            of the number of blocks; and between types, of the share of an intervention's effect that falls in a range.
        min_tasks: fewest usable tasks per type with which a condition is tested.
        seeds: fewest seeds over which the order must keep its sign.
        poolings: fewest poolings.
        probes: probe families, each of which must show it.
        interventions: kinds of interventional evidence, the one that is used where there are several first.
        held_out: whether ranges are chosen on one half of the ``tasks`` or ``items`` and tested on the other.
        split_seed: draws the halves of the tasks.
    """

    types: tuple[KnowledgeType, ...]
    name: str = "hypothesis"
    description: str = ""
    statistic: Statistic = "emergence_cog"
    alpha: float = 0.05
    delta: float = 0.1
    min_tasks: int = 2
    seeds: int = 3
    poolings: int = 2
    probes: tuple[str, ...] = ("linear", "mlp")
    interventions: tuple[Intervened, ...] = INTERVENTIONS
    held_out: HeldOut = "none"
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        names = [t.name for t in self.types]
        if len(names) < 2 or len(set(names)) != len(names):
            raise FieldError(("types",), f"got {names}; write two or more different types, the lowest first.")
        for field, most in (("alpha", 0.5), ("delta", 1.0)):
            if not 0 < number(getattr(self, field), (field,)) < most:
                raise FieldError((field,), f"got {getattr(self, field)!r}; write a number between 0 and {most:g}.")
        integer(self.min_tasks, ("min_tasks",), minimum=2)  # fewer do not show how tasks of a type differ
        for field, least in (("seeds", 2), ("poolings", 1), ("split_seed", 0)):
            integer(getattr(self, field), (field,), minimum=least)
        for field in ("probes", "interventions"):
            given = getattr(self, field)
            if not given or len(set(given)) != len(given):
                raise FieldError((field,), f"got {list(given)}; write one or more different names.")
        for i, kind in enumerate(self.interventions):
            choice(kind, ("interventions", i), INTERVENTIONS, "kind of intervention")
        choice(self.statistic, ("statistic",), get_args(Statistic), "depth of a task")
        choice(self.held_out, ("held_out",), get_args(HeldOut), "way to hold evidence out")
        for i, t in enumerate(self.types):
            if self.held_out != "none" and t.range is not None:
                raise FieldError(
                    ("types", i, "range"), f"{t.name} has a claimed range, but held_out: {self.held_out} chooses "
                    "ranges. Remove one of the two."
                )  # fmt: skip

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the types, lowest first."""
        return tuple(t.name for t in self.types)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides a verdict: all fields but the name and the description."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("name", "description")}
        return io.content_digest(f"{name}={value}" for name, value in fields.items())

    def type_of(self, task: str, level: str) -> str | None:
        """The type that a task belongs to: the first that names it, else the first that names its level, else None.

        A task is named by its whole name, or by the part after its last dot.
        """
        own = task, task.rpartition(".")[2]
        for t in self.types:
            if any(not p.startswith(_LEVEL) and any(fnmatchcase(n, p) for n in own) for p in t.tasks):
                return t.name
        return next((t.name for t in self.types if _LEVEL + level in t.tasks), None)

    def ranges(self, num_blocks: int) -> tuple[tuple[int, int], ...] | None:
        """Claimed ranges in blocks, half-open, in the order of the types; None unless every type claims one."""
        found = [t.blocks(num_blocks) for t in self.types]
        return None if None in found else tuple(r for r in found if r is not None)

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        content["types"] = [{k: v for k, v in t.items() if v is not None} for t in content["types"]]
        return io.plain(content)

    def to_yaml(self) -> str:
        """The file's text."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110))

    def save(self, path: str | Path) -> Path:
        """Write a hypothesis file."""
        io.write_text(Path(path), self.to_yaml())
        return Path(path)

    @classmethod
    def load(cls, source: str | Path) -> Hypothesis:
        """Read a hypothesis file, or the shipped one of that name.

        Raises:
            ConfigError: no such file or name, or it does not hold together; names file, line and field.
        """
        path, shipped = Path(source), shipped_hypotheses()
        if not path.is_file() and str(source) in shipped:
            path = shipped[str(source)]
        try:
            return parse(path.read_bytes().decode("utf-8-sig"), file=str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
        except OSError as error:
            raise ConfigError(
                f"Hypothesis {str(source)!r} is neither a file that can be read ({error.strerror}) nor a shipped one "
                f"({', '.join(shipped)}).{did_you_mean(str(source), shipped)}"
            ) from error

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Hypothesis:
        """The inverse of :meth:`to_dict`."""
        return _from_plain(content)


@cache
def default_hypothesis() -> Hypothesis:
    """The shipped claim that SPAFIT rests on: surface below syntax below semantics, a third of the depth each."""
    return Hypothesis.load(DEFAULT)


def shipped_hypotheses() -> dict[str, Path]:
    """Name and file of every hypothesis that comes with the package."""
    folder = Path(str(resources("analysis") / "hypotheses"))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def parse(source: str, *, file: str) -> Hypothesis:
    """Read a hypothesis from text.

    Raises:
        ConfigError: ``file``, line, field, what was got, what is allowed, and the remedy.
    """
    return read_fields(source, file=file, what="a hypothesis", build=lambda content, _: _from_plain(content))


def _from_plain(content: Any) -> Hypothesis:
    top = mapping(content, (), ("schema_version", "types"), _FIELDS, None)
    if integer(top.pop("schema_version"), ("schema_version",), minimum=1) > SCHEMA_VERSION:
        raise FieldError(("schema_version",), f"this package reads up to {SCHEMA_VERSION}. Upgrade spafit.")
    types = []
    for i, entry in enumerate(entries(top.pop("types"), ("types",))):
        with within("types", i):
            got = mapping(entry, (), ("name",), ("tasks", "range"), None)
            claimed = got.get("range")
            if claimed is not None and (not isinstance(claimed, list) or len(claimed) != 2):
                raise FieldError(("range",), f"got {claimed!r}; write [start, stop] as fractions of the depth.")
            tasks = _names(got["tasks"], ("tasks",)) if "tasks" in got else ()
            types.append(
                KnowledgeType(text(got["name"], ("name",)), tasks, None if claimed is None else tuple(claimed))
            )
    for field in {"name", "description"} & set(top):
        text(top[field], (field,))
    for field in ("probes", "interventions"):
        if field in top:
            top[field] = _names(top[field], (field,))
    return Hypothesis(types=tuple(types), **top)


def _names(value: Any, path: FieldPath) -> tuple[str, ...]:
    names: Sequence[Any] = entries(value, path)
    if not names:
        raise FieldError(path, "the list is empty. Name one or more, or remove the field.")
    return tuple(text(v, (*path, i)) for i, v in enumerate(names))
