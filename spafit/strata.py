"""StrataConfig, a whole plan: which blocks of a model train, and how. Checked when made; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from spafit.errors import ConfigError, did_you_mean
from spafit.fields import FieldError, FieldPath, Origin, choice, integer, plain, text
from spafit.stratum import (
    LINEAR_ROLES,
    METHODS,
    NORM_ROLES,
    OUTSIDE_METHODS,
    PEFT_METHODS,
    PLACES,
    ROLES,
    CrossOptions,
    LoraOptions,
    Outside,
    PeftOptions,
    Stratum,
    optimizer_words,
)

__all__ = [
    "LINEAR_ROLES",
    "METHODS",
    "NORM_ROLES",
    "OUTSIDE_METHODS",
    "PEFT_METHODS",
    "ROLES",
    "SCHEMA_VERSION",
    "CrossOptions",
    "LoraOptions",
    "Outside",
    "PeftOptions",
    "StrataConfig",
    "Stratum",
]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StrataConfig:
    """A whole plan: strata that cover every block of every stack once, and what trains outside them.

    Attributes:
        model_id: the model's reference, for people; not loaded from here.
        blocks: number of blocks of each stack.
        strata: the strata, in the order in which they are written.
        outside: embeddings, pooler, head, final norm.
        provenance: where the plan comes from: source, criterion, ``tested``, and what the writer adds (JSON-like;
            numbers that are not finite become null).
        origin: file and lines, when read from a file; not compared.

    Raises:
        ConfigError: gaps, overlaps, ranges beyond the stack, a stack without strata or without blocks; strata that
            do not fit into one PEFT adapter.
    """

    model_id: str
    blocks: Mapping[str, int]
    strata: tuple[Stratum, ...]
    outside: Outside = field(default_factory=Outside)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        text(self.model_id, ("model", "id"))
        if not isinstance(self.blocks, Mapping) or not self.blocks:
            raise FieldError(("model", "blocks"), f"got {self.blocks!r}; write stacks and counts: {{encoder: 12}}.")
        for stack, count in self.blocks.items():
            text(stack, ("model", "blocks"))
            integer(count, ("model", "blocks", stack), minimum=1)
        object.__setattr__(self, "blocks", dict(self.blocks))
        object.__setattr__(self, "strata", tuple(self.strata))
        object.__setattr__(self, "provenance", plain(self.provenance, ("provenance",)))
        self._check_cover()
        self._check_one_adapter()

    def _check_cover(self) -> None:
        for i, stratum in enumerate(self.strata):
            if stratum.stack not in self.blocks:
                raise FieldError(
                    ("strata", i, "stack"),
                    f"{stratum.stack!r} is not a stack of this model. Allowed: {', '.join(self.blocks)}."
                    + did_you_mean(stratum.stack, self.blocks),
                )
        for stack, count in self.blocks.items():
            own = sorted((s.blocks, i) for i, s in enumerate(self.strata) if s.stack == stack)
            if not own:
                raise FieldError(
                    ("model", "blocks", stack),
                    f"stack {stack!r} has {count} block(s) and no stratum. Each stack needs its own plan: add strata "
                    f"that cover [0, {count}), with method freeze where nothing should train.",
                )
            end, before = 0, None
            for (start, stop), i in own:
                where = ("strata", i, "blocks")
                if stop > count:
                    raise FieldError(
                        where,
                        f"[{start}, {stop}) goes beyond stack {stack!r}, which has {count} blocks by model.blocks. "
                        f"End it at {count}, or correct model.blocks.",
                    )
                if start > end:
                    raise FieldError(
                        where,
                        f"blocks [{end}, {start}) of stack {stack!r} belong to no stratum. Start this one at {end}, or "
                        "add a stratum with method freeze.",
                    )
                if start < end:
                    raise FieldError(
                        where,
                        f"[{start}, {stop}) overlaps strata[{before}], which ends at {end}. Start this one at {end}, "
                        f"or end strata[{before}] at {start}.",
                    )
                end, before = stop, i
            if end < count:
                raise FieldError(
                    ("strata", own[-1][1], "blocks"),
                    f"the last stratum of stack {stack!r} ends at {end}, but model.blocks gives it {count} blocks, so "
                    f"[{end}, {count}) belong to no stratum. End it at {count}, or correct model.blocks.",
                )

    def _check_one_adapter(self) -> None:
        """One plan is one stock PEFT adapter: one kind, one dropout, one scaling rule; only LoRA's carry biases."""
        adapted = [(i, p) for i, s in enumerate(self.strata) for p in s.pieces if p.adapter is not None]
        if not adapted:
            return
        k, first = adapted[0]
        there = f"strata[{k}] ({_place(first)})"
        for i, stratum in adapted[1:]:
            here = f"strata[{i}] ({_place(stratum)})"
            if stratum.adapter != first.adapter:
                raise FieldError(
                    ("strata", i, "method"),
                    f"{here} is {stratum.method!r} and {there} is {first.method!r}; a plan is one PEFT adapter, of one "
                    "kind (lora, lora+bitfit, lora+norm and bias-added are one). Give both the same "
                    "kind, or write norm or full for one of them.",
                )
            if stratum.peft is not None and first.peft is not None:
                self._check_alike(i, k, ("peft", "options"), stratum.peft.options, first.peft.options)
        low_rank = [(i, s.lora) for i, s in adapted if s.lora is not None]
        for i, lora in low_rank[1:]:
            for name in ("dropout", "rslora"):
                other = low_rank[0]
                self._check_alike(i, other[0], ("lora", name), getattr(lora, name), getattr(other[1], name))
        if first.adapter in ("lora", "dora"):
            return
        places = (
            (("strata", i, "method"), piece.method, f"strata[{i}] ({_place(s)})")
            for i, s in enumerate(self.strata) for piece in s.pieces
        )  # fmt: skip
        outside = ((("outside", p), getattr(self.outside, p), f"outside.{p}") for p in PLACES)
        for where, method, here in (*places, *outside):
            if "bitfit" in method:
                raise FieldError(
                    where,
                    f"{here} is {method!r} and {there} is {first.method!r}; only adapters of the kinds lora and dora "
                    f"carry trained biases. Write norm, full or freeze for {here}, or lora for {there}.",
                )

    def _check_alike(self, i: int, k: int, path: FieldPath, own: Any, other: Any) -> None:
        """Refuse an option of strata i and k that differs and that a PEFT adapter has once."""
        if own != other:
            here, there = (f"strata[{j}] ({_place(self.strata[j])})" for j in (i, k))
            raise FieldError(
                ("strata", i, *path),
                f"{here} has {own} and {there} has {other}; a PEFT adapter has one {path[-1]} for all its modules. "
                "Write the same in both.",
            )

    def check_model(
        self, blocks: Mapping[str, int], *, bias_roles: Mapping[str, Collection[str]] | None = None
    ) -> StrataConfig:
        """Check the plan against a real model's stacks and return it.

        Args:
            blocks: number of blocks of each stack of the model.
            bias_roles: per stack, the roles whose sub-layers have a bias; None skips that check.

        Raises:
            ConfigError: other stacks or depths than the model's; BitFit where there is no bias to train, or an added
                bias where there is one already.
        """
        try:
            if dict(self.blocks) != dict(blocks):
                raise FieldError(
                    ("model", "blocks"),
                    f"the plan is for {_counts(self.blocks)}, the model has {_counts(blocks)}. Use a plan made for "
                    "this model, or a preset.",
                )
            for i, stratum in ((i, p) for i, s in enumerate(self.strata) for p in s.pieces):
                if bias_roles is not None and stratum.adds_biases:
                    _check_added(i, stratum, bias_roles.get(stratum.stack, ()))
                if bias_roles is None or "bitfit" not in stratum.method:
                    continue
                present = set(bias_roles.get(stratum.stack, ()))
                remedy = "norm" if stratum.method == "bitfit" else "lora+norm"
                if not present:
                    raise FieldError(
                        ("strata", i, "method"),
                        f"{stratum.method!r} trains biases, and the blocks of stack {stratum.stack!r} have none. "
                        f"Write {remedy} in its place, or {remedy.replace('norm', 'bias-added')} for new biases.",
                    )
                for k, role in enumerate(stratum.bitfit or ()):
                    if role not in present:
                        have = ", ".join(r for r in ROLES if r in present)
                        raise FieldError(
                            ("strata", i, "bitfit", k),
                            f"{role!r} has no bias in stack {stratum.stack!r}. Roles with one: {have}. Remove it, or "
                            f"write method {remedy}.",
                        )
        except FieldError as error:
            raise (self.origin.locate(error) if self.origin else error) from None
        return self

    def boundaries(self, stack: str | None = None) -> tuple[int, int]:
        """First blocks (s1, s2) of SPAFIT's second and third stratum.

        s1 is the number of frozen blocks at the bottom; s2 the first block from s1 on that trains more than biases
        and norms (the number of blocks where none does). For plans that are not built like SPAFIT (reversed, five
        strata) the pair does not describe the plan: look at :meth:`describe`.

        Args:
            stack: the stack; may be left out where there is one only.

        Raises:
            ConfigError: unknown stack, or none named and several there.
        """
        if stack is None and len(self.blocks) > 1:
            raise ConfigError(f"This plan has stacks {', '.join(self.blocks)}; name the one whose boundaries you want.")
        stack = next(iter(self.blocks)) if stack is None else stack
        choice(stack, ("stack",), tuple(self.blocks), "stack")
        s1 = s2 = self.blocks[stack]
        for stratum in sorted((s for s in self.strata if s.stack == stack), key=lambda s: s.blocks):
            if stratum.is_trained:
                s1 = min(s1, stratum.blocks[0])
            if any(p.method not in ("freeze", "bitfit", "bias-added", "norm") for p in stratum.pieces):
                s2 = min(s2, stratum.blocks[0])
        return s1, s2

    def with_provenance(self, entries: Mapping[str, Any]) -> StrataConfig:
        """The same plan with ``entries`` added to its provenance (equal keys replaced)."""
        return replace(self, provenance={**self.provenance, **entries})

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        blocks: Mapping[str, int] | int,
        bias_roles: Mapping[str, Collection[str]] | None = None,
        model_id: str = "unnamed",
        roles: Mapping[str, Collection[str]] | None = None,
        count: Callable[[StrataConfig], int] | None = None,
    ) -> StrataConfig:
        """A named plan; see :func:`spafit.presets.preset_config`."""
        from spafit.presets import preset_config

        return preset_config(name, blocks=blocks, bias_roles=bias_roles, model_id=model_id, roles=roles, count=count)

    @classmethod
    def from_boundaries(
        cls,
        boundaries: Mapping[str, tuple[int, int]],
        *,
        blocks: Mapping[str, int],
        adapter_type: Literal["I", "II"] = "I",
        lora: LoraOptions | None = None,
        bias_roles: Mapping[str, Collection[str]] | None = None,
        model_id: str = "unnamed",
        provenance: Mapping[str, Any] | None = None,
    ) -> StrataConfig:
        """SPAFIT's three strata at given boundaries; see :func:`spafit.presets.three_strata_config`."""
        from spafit.presets import three_strata_config

        return three_strata_config(
            boundaries,
            blocks=blocks,
            adapter_type=adapter_type,
            lora=lora,
            bias_roles=bias_roles,
            model_id=model_id,
            provenance=provenance,
        )

    @classmethod
    def from_dict(cls, content: Any) -> StrataConfig:
        """Build from plain objects with the file's keys; see :func:`spafit.strata_files.config_from_plain`."""
        from spafit.strata_files import config_from_plain

        return config_from_plain(content)

    @classmethod
    def from_yaml(cls, text: str, *, file: str = "<text>") -> StrataConfig:
        """Read YAML text. Errors name ``file``, line and field; newer files load with a warning."""
        from spafit.strata_files import parse

        return parse(text, file=file, kind="yaml")

    @classmethod
    def load(cls, path: str | Path) -> StrataConfig:
        """Read a YAML file, or a JSON file by its suffix.

        Raises:
            ConfigError: with file, line, field, what was got, what is allowed and the remedy.
        """
        from spafit.strata_files import load

        return load(Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain objects with the file's keys, in the file's order."""
        from spafit.strata_files import plain_from_config

        return plain_from_config(self)

    def to_yaml(self) -> str:
        """The file's text, with short comments for people who edit it. Equal plans give equal bytes."""
        from spafit.strata_files import dump_yaml

        return dump_yaml(self)

    def to_json(self) -> str:
        """The same content as JSON text."""
        from spafit.strata_files import dump_json

        return dump_json(self)

    def save(self, path: str | Path) -> Path:
        """Write atomically: JSON where the suffix is ``.json``, otherwise YAML. Returns the path."""
        from spafit.io import write_text

        path = Path(path)
        write_text(path, self.to_json() if path.suffix == ".json" else self.to_yaml())
        return path

    def _rows(self) -> list[tuple[str, ...]]:
        ordered = sorted(self.strata, key=lambda s: (list(self.blocks).index(s.stack), s.blocks))
        return [
            (s.stack, f"[{s.blocks[0]}, {s.blocks[1]})", str(s.blocks[1] - s.blocks[0]), s.method, s.trains)
            for s in ordered
        ]

    def describe(self) -> str:
        """The plan as a plain-text table: stack, blocks (half-open), count, method, what trains."""
        rows = [("stack", "blocks", "count", "method", "trains"), *self._rows()]
        widths = [max(len(r[c]) for r in rows) for c in range(4)]
        lines = [f"{self.model_id}: {_counts(self.blocks)}"]
        lines += ["  ".join([*(cell.ljust(w) for cell, w in zip(r, widths, strict=False)), r[4]]) for r in rows]
        places = [f"{place.replace('_', ' ')} {getattr(self.outside, place)}" for place in PLACES
                  if place != "projector" or self.outside.projector != "freeze"]  # fmt: skip
        lines.append(f"outside: {', '.join([*places, *optimizer_words(self.outside)])}")
        if "tested" in self.provenance:
            lines.append(f"tested against baselines: {'yes' if self.provenance['tested'] else 'no'}")
        if "source" in self.provenance:
            lines.append(f"source: {self.provenance['source']}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{h}</th>" for h in ("stack", "blocks", "count", "method", "trains"))
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self._rows())
        return f"<table><caption>{escape(self.model_id)}</caption><tr>{head}</tr>{body}</table>"


def _check_added(i: int, stratum: Stratum, present: Collection[str]) -> None:
    """Refuse added biases on roles that have one."""
    asked = LINEAR_ROLES if stratum.bias_added is None else stratum.bias_added
    for role in (r for r in asked if r in present):
        where: FieldPath = ("strata", i, "method")
        if stratum.bias_added is not None:
            where = ("strata", i, "bias_added", stratum.bias_added.index(role))
        raise FieldError(
            where,
            f"{role!r} has a bias already in stack {stratum.stack!r}, which a second one would double. Write "
            f"{stratum.method.replace('bias-added', 'bitfit')} in place of {stratum.method}, or name roles without a "
            "bias in bias_added.",
        )


def _place(stratum: Stratum) -> str:
    return f"{stratum.stack} [{stratum.blocks[0]}, {stratum.blocks[1]})"


def _counts(blocks: Mapping[str, int]) -> str:
    return ", ".join(f"{stack} of {count} blocks" for stack, count in blocks.items())
