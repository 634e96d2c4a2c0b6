"""The options of a probing run: one object for the command line, for Python, and for ``run.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from probing.controls import ALL_CONTROLS, CONTROLS
from probing.probes.families import parse_probes
from spafit.errors import UsageError, did_you_mean
from spafit.runtime import DTYPES

#: What :mod:`probing.measures` can measure beside accuracy and bits.
MEASURES = ("online-code", "variational-code", "conditional", "mix")
POOLINGS = ("mean", "first", "last", "max")
SITES = ("block", "attention", "feed_forward", "heads", "final_norm")
Overwrite = Literal["missing", "always", "never"]


@dataclass(frozen=True)
class ProbeConfig:
    """Options of one probing run; defaults are those of ``spafit-probe``.

    Attributes:
        model: reference of the model (hub id, folder, GGUF file, adapter folder); None is the built-in default.
        revision: branch, tag or commit of a hub model.
        tasks: task references; ``core`` is the generated suite.
        layers: hidden indices to probe, such as ``0-6`` or ``0,3,6``; ``all`` by default. Of several stacks each may
            have its own: ``encoder:0-6,decoder:0,3,6``.
        sites: where states are read: ``block`` output, ``attention``, ``feed_forward``, ``heads``, ``final_norm``.
        stack: which stack (``encoder``, ``decoder``, ``text``, ``vision``), or the dotted path of the list of blocks
            in a model that is not recognised; None takes the first. Several by commas (``encoder,decoder``) are probed
            in one run, from one forward pass.
        pooling: how tokens become one state, for words (over sub-words) and sentences (over tokens): ``mean``, ``max``,
            ``first`` ([CLS] where there is one) or ``last``. ``word-final`` is another name of ``last``: in a causal
            stack it is the sub-word that has read the whole word.
        probe: probe families, such as ``linear`` and ``mlp:64`` (:mod:`probing.probes.families`). Verdict and strata
            speak of the first.
        controls: ``word-type`` control task, ``random-encoder`` and others of :data:`probing.controls.ALL_CONTROLS`,
            or ``column:NAME``, a number that the items bring along.
        measures: further measures of each task with classes, of :data:`probing.measures.MEASURES`.
        max_train: training items per seed; None takes 80 % of them, at most 20,000.
        seeds: each redraws training items, control labels and random encoder.
        l2: penalties tried; None is the family's own grid.
        n_boot: bootstrap replicates behind the intervals.
        limit: keep only this many items of each split (for a quick look, not for claims).
        device: torch device, or ``auto``.
        dtype: precision of the forward passes.
        batch_tokens: padded tokens per batch; None is the default of extraction.
        cache_dir: where states are cached; None is ``SPAFIT_CACHE`` or the user's cache folder.
        offline: never ask the hub.
        allow_pickle: accept pickle weight files, which can only be as trustworthy as their author.
        out: output folder; None is ``runs/<model>``.
        overwrite: for a folder with a run in it. ``missing`` goes on with the same options or with more tasks and
            refuses others, ``always`` removes that run first, ``never`` refuses.
    """

    model: str | None = None
    revision: str | None = None
    tasks: tuple[str, ...] = ("core",)
    layers: str = "all"
    sites: tuple[str, ...] = ("block",)
    stack: str | None = None
    pooling: tuple[str, ...] = ("mean",)
    probe: tuple[str, ...] = ("linear",)
    controls: tuple[str, ...] = CONTROLS
    measures: tuple[str, ...] = ()
    max_train: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    l2: tuple[float, ...] | None = None
    n_boot: int = 1000
    limit: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch_tokens: int | None = None
    cache_dir: str | None = None
    offline: bool = False
    allow_pickle: bool = False
    out: str | None = None
    overwrite: Overwrite = "missing"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probe", tuple(f.name for text in self.probe for f in parse_probes(text)))
        object.__setattr__(self, "pooling", tuple("last" if p == "word-final" else p for p in self.pooling))
        _one_of("controls", [c for c in self.controls if not is_column(c)], (*ALL_CONTROLS, "column:NAME"))
        _one_of("measures", self.measures, MEASURES)
        _one_of("sites", self.sites, SITES)
        _one_of("pooling", self.pooling, (*POOLINGS, "word-final"))
        _one_of("dtype", (self.dtype,), DTYPES)
        _one_of("overwrite", (self.overwrite,), ("missing", "always", "never"))
        for name, least in (("max_train", 10), ("limit", 10), ("n_boot", 100), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value} is too small; use at least {least}.")
        for name in ("tasks", "seeds", "sites", "pooling", "probe", "measures", "controls"):
            values = getattr(self, name)
            if not values and name not in ("measures", "controls"):
                raise UsageError(f"--{name} is empty; give at least one.")
            if len(set(values)) < len(values):
                raise UsageError(f"--{name} {', '.join(map(str, values))} names one twice; name each once.")
        if self.l2 is not None:
            check_penalties(self.l2)
        _parse_layers(self.layers, None)

    def hidden(self, num_hidden: int, *, stack: str | None = None) -> list[int]:
        """Hidden indices that ``layers`` selects in a stack with ``num_hidden`` states (blocks + 1), by its name."""
        return _parse_layers(self.layers, num_hidden, stack=stack)

    def to_dict(self) -> dict[str, Any]:
        """Plain content for YAML and JSON; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str) -> ProbeConfig:
        """Build from a mapping as :meth:`to_dict` gives it.

        Raises:
            UsageError: an unknown key or a value of the wrong kind; ``where`` names the file.
        """
        return cls(**checked_options(content, where=where))


def is_column(control: str) -> bool:
    """Whether a control is ``column:NAME``."""
    return control.startswith("column:") and len(control) > len("column:")


def check_penalties(l2: Sequence[float]) -> None:
    """Refuse penalties that are not positive numbers.

    Raises:
        UsageError: none is given, or one is not positive and finite.
    """
    if not l2 or not all(math.isfinite(value) and value > 0 for value in l2):
        raise UsageError(
            f"--l2 {', '.join(map(str, l2)) or '(empty)'} needs positive, finite penalties, such as 0.001,0.01,0.1."
        )


def seed_numbers(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds themselves; a number n, as in the shell, means 0 to n - 1.

    Raises:
        UsageError: fewer than one.
    """
    if not isinstance(seeds, int):
        return tuple(seeds)
    if seeds < 1:
        raise UsageError(f"--seeds {seeds} is too small; use at least 1.")
    return tuple(range(seeds))


def checked_options(content: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Options from a configuration file: known names only, lists turned into tuples, kinds checked."""
    known = {f.name: f for f in fields(ProbeConfig)}
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{where}: unknown option {key!r}.{did_you_mean(name, known)}")
        kind = str(known[name].type)
        if kind.startswith("tuple"):
            value = tuple(value) if isinstance(value, list | tuple) else value if value is None else (value,)
            element = int if "int" in kind else float if "float" in kind else str
            allowed: tuple[type, ...] = (int, float) if element is float else (element,)
            if value is not None and not all(isinstance(v, allowed) and not isinstance(v, bool) for v in value):
                raise UsageError(f"{where}: option {key!r} must be a list of {element.__name__}, got {list(value)!r}.")
        else:
            expected = int if kind.startswith("int") else bool if kind == "bool" else str
            if value is not None and (not isinstance(value, expected) or (expected is int and isinstance(value, bool))):
                raise UsageError(f"{where}: option {key!r} must be {expected.__name__}, got {value!r}.")
            if value is None and "None" not in kind:
                raise UsageError(f"{where}: option {key!r} must not be empty.")
        options[name] = value
    return options


def read_config(path: Path) -> dict[str, Any]:
    """Options from a YAML file, or from the ``run.json`` of an earlier run (its ``config`` part)."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}.") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold options by name, one a line, such as 'max-train: 5000'.")
    return checked_options(content, where=str(path))


def _one_of(name: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    for value in values:
        if value not in allowed:
            hint = did_you_mean(value, allowed)
            raise UsageError(f"--{name} {value!r} is not known; use {', '.join(allowed)}.{hint}")


def _parse_layers(text: str, num_hidden: int | None, *, stack: str | None = None) -> list[int]:
    if text == "all":
        return list(range(num_hidden or 0))
    chosen: set[int] = set()
    of = None  # the stack that pieces speak of: the last one named
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(?:(\w+):)?(\d+)(?:-(\d+))?\s*", piece)
        if match is None:
            raise UsageError(
                f"--layers {text!r} is not understood; use hidden indices such as 0-6 or 0,3,6, or 'all'; of several "
                "stacks, encoder:0-6,decoder:0-3."
            )
        of = match[1] or of
        start, stop = int(match[2]), int(match[3] or match[2])
        if stop < start:
            raise UsageError(f"--layers {piece.strip()!r} runs backwards; write {stop}-{start}.")
        if num_hidden is None or of in (None, stack):
            chosen |= set(range(start, stop + 1))
    if not chosen:
        raise UsageError(f"--layers {text!r} names no hidden state of stack {stack!r}, which is probed.")
    if num_hidden is not None and max(chosen) >= num_hidden:
        raise UsageError(
            f"--layers {text!r} asks for hidden {max(chosen)}, but the model has hidden 0 to {num_hidden - 1} "
            "(0 = embeddings)."
        )
    return sorted(chosen)
