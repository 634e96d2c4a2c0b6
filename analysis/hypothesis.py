"""A localization hypothesis as a file: levels in order with their tasks, margin and level of the tests, hashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from analysis.localization import Hypothesis
from probing.curves import LayerCurve
from spafit import io
from spafit.errors import ConfigError, UsageError, did_you_mean

_KEYS = {"schema_version", "claim", "levels", "statistic", "alpha", "delta", "min_tasks"}


@dataclass(frozen=True)
class HypothesisFile:
    """What is claimed, and which tasks stand for it.

    Attributes:
        hypothesis: levels, margin and level of the tests.
        tasks: level of each task that the file names; the name, or its part after the last dot.
        claim: the claim in words.
        digest: SHA-256 of levels, tasks and numbers; comments and the claim's words do not enter.
    """

    hypothesis: Hypothesis
    tasks: Mapping[str, str] = field(default_factory=dict)
    claim: str = ""

    @property
    def digest(self) -> str:
        """See the class."""
        return io.content_digest([self.hypothesis.digest, *(f"{t}={level}" for t, level in sorted(self.tasks.items()))])

    def file_curve(self, curve: LayerCurve) -> LayerCurve:
        """The curve under the level that the file gives its task; as it is where the file does not name it."""
        name = curve.task if curve.task in self.tasks else curve.task.rpartition(".")[2]
        return replace(curve, level=self.tasks.get(name, curve.level))


def default_hypothesis() -> HypothesisFile:
    """The claim that this package ships: surface before syntax before semantics."""
    return _parsed((files("analysis") / "templates" / "hypothesis.yaml").read_text(encoding="utf-8"), "hypothesis.yaml")


def read_hypothesis(path: str | Path) -> HypothesisFile:
    """Read a hypothesis from YAML (``spafit localize --print-hypothesis`` shows the shipped one).

    Raises:
        ConfigError: unreadable, an unknown key, a task under two levels, or a value that is not allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return _parsed(text, str(path))


def _parsed(text: str, where: str) -> HypothesisFile:
    import yaml

    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: is not YAML ({getattr(error, 'problem', None) or error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: must map names to values; levels, alpha, delta, min_tasks.")
    unknown = [k for k in content if k not in _KEYS]
    if unknown:
        hint = did_you_mean(str(unknown[0]), _KEYS)
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}.{hint} Use {', '.join(sorted(_KEYS))}.")
    levels = content.get("levels")
    if not isinstance(levels, dict) or not all(_is_names(v) for v in levels.values()):
        raise ConfigError(f"{where}: levels must map each level, earliest first, to a list of task names (or []).")
    tasks: dict[str, str] = {}
    for level, names in levels.items():
        for name in names or []:
            if tasks.setdefault(name, str(level)) != str(level):
                raise ConfigError(f"{where}: task {name!r} stands under {tasks[name]} and {level}; choose one.")
    numbers = {k: content[k] for k in ("alpha", "delta", "min_tasks") if k in content}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int if key == "min_tasks" else (int, float)):
            raise ConfigError(f"{where}: {key} must be a number, got {value!r}.")
    try:
        statistic = content.get("statistic", "emergence_cog")
        hypothesis = Hypothesis(levels=tuple(map(str, levels)), statistic=statistic, **numbers)
    except UsageError as error:
        raise ConfigError(f"{where}: {error}") from error
    return HypothesisFile(hypothesis, tasks, str(content.get("claim", "")))


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, Sequence) and not isinstance(value, str)
                             and all(isinstance(v, str) for v in value))  # fmt: skip
