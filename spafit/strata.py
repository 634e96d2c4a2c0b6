"""Stratum and StrataConfig: which blocks of a model train, and how. Checked when made; no torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from spafit.errors import ConfigError, did_you_mean
from spafit.fields import FieldError, Origin, choice, integer, name_list, number, plain, text

SCHEMA_VERSION = 1
METHODS = ("freeze", "bitfit", "norm", "lora", "lora+bitfit", "lora+norm", "ia3", "dora", "full")
OUTSIDE_METHODS = ("freeze", "bitfit", "norm", "full")
#: Roles that are linear maps: what LoRA, DoRA and IA3 can target.
LINEAR_ROLES = (
    "query",
    "key",
    "value",
    "attention_output",
    "intermediate",
    "output",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
)
NORM_ROLES = ("attention_norm", "output_norm", "cross_attention_norm")
ROLES = LINEAR_ROLES + NORM_ROLES


@dataclass(frozen=True)
class LoraOptions:
    """Options of the low-rank methods (``lora``, ``lora+…``, ``dora``).

    The SPAFIT paper's rank is 64; its alpha and dropout are not known: alpha = rank and no dropout are this
    project's defaults.

    Attributes:
        rank: rank of each update, at least 1.
        alpha: numerator of the update's scale alpha / rank; None takes the rank.
        dropout: dropout on the update's input, in [0, 1).
        targets: roles of the linear maps that get an update.
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value")

    def __post_init__(self) -> None:
        integer(self.rank, ("rank",), minimum=1)
        object.__setattr__(self, "alpha", number(self.rank if self.alpha is None else self.alpha, ("alpha",)))
        if self.alpha is None or self.alpha <= 0:
            raise FieldError(("alpha",), f"got {self.alpha}; alpha must be above 0. Equal to the rank is our default.")
        object.__setattr__(self, "dropout", float(number(self.dropout, ("dropout",))))
        if not 0 <= self.dropout < 1:
            raise FieldError(("dropout",), f"got {self.dropout}; allowed: at least 0 and below 1.")
        object.__setattr__(self, "targets", name_list(self.targets, ("targets",), LINEAR_ROLES, "role of a linear map"))


@dataclass(frozen=True)
class Stratum:
    """One contiguous range of blocks and the method that trains it.

    Attributes:
        stack: name of the block stack (``encoder``, ``decoder``, …).
        blocks: half-open range ``(start, stop)``; block 0 follows the embeddings.
        method: one of :data:`METHODS`. ``norm`` trains the weights (and biases) of the block's norms.
        lora: options of the low-rank methods; None for other methods (defaults are filled in where needed).
        bitfit: roles whose biases train under ``bitfit`` and ``lora+bitfit``; None means every bias of the block.
        ia3: roles scaled under ``ia3``; None means key, value and output, as its authors do.

    Raises:
        ConfigError: empty range, unknown method or role, an option the method does not read, nothing to train.
    """

    stack: str
    blocks: tuple[int, int]
    method: str
    lora: LoraOptions | None = None
    bitfit: tuple[str, ...] | None = None
    ia3: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        text(self.stack, ("stack",))
        if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence) or len(self.blocks) != 2:
            raise FieldError(
                ("blocks",), f"got {self.blocks!r}; write two whole numbers, first and one past the last: [0, 5]."
            )
        start, stop = (integer(b, ("blocks", i), minimum=0) for i, b in enumerate(self.blocks))
        if stop <= start:
            raise FieldError(
                ("blocks",),
                f"the range [{start}, {stop}) holds no block; ranges are half-open, so the stop must be above the "
                "start. Remove the stratum or widen it.",
            )
        object.__setattr__(self, "blocks", (start, stop))
        choice(self.method, ("method",), METHODS, "method")
        for option, used in (
            ("lora", self.is_low_rank),
            ("bitfit", "bitfit" in self.method),
            ("ia3", self.method == "ia3"),
        ):
            if getattr(self, option) is not None and not used:
                raise FieldError(
                    (option,), f"method {self.method!r} does not read {option!r}. Remove it, or change the method."
                )
        if self.is_low_rank and self.lora is None:
            object.__setattr__(self, "lora", LoraOptions())
        if self.bitfit is not None:
            object.__setattr__(self, "bitfit", name_list(self.bitfit, ("bitfit",), ROLES, "role"))
        if self.method == "ia3":
            wanted = ("key", "value", "output") if self.ia3 is None else self.ia3
            object.__setattr__(self, "ia3", name_list(wanted, ("ia3",), LINEAR_ROLES, "role of a linear map"))

    @property
    def is_low_rank(self) -> bool:
        """Whether the method reads ``lora`` options."""
        return self.method.startswith("lora") or self.method == "dora"

    @property
    def trains(self) -> str:
        """What trains, in words."""
        parts = []
        if self.lora is not None:
            name = "DoRA" if self.method == "dora" else "LoRA"
            parts.append(f"{name} rank {self.lora.rank} on {', '.join(self.lora.targets)}")
        if "bitfit" in self.method:
            parts.append("every bias" if self.bitfit is None else f"biases of {', '.join(self.bitfit)}")
        if "norm" in self.method:
            parts.append("norm weights")
        if self.ia3 is not None:
            parts.append(f"IA3 on {', '.join(self.ia3)}")
        if self.method == "full":
            parts.append("everything")
        return "; ".join(parts) or "nothing"


@dataclass(frozen=True)
class Outside:
    """What trains outside the blocks; each one of :data:`OUTSIDE_METHODS`. Defaults are SPAFIT's.

    Attributes:
        embeddings: the embedding tables and their norm.
        pooler: the pooler between the last block and the head, where there is one.
        head: the classifier or language-model head.
        final_norm: the norm after the last block of pre-norm models.
    """

    embeddings: str = "freeze"
    pooler: str = "bitfit"
    head: str = "full"
    final_norm: str = "freeze"

    def __post_init__(self) -> None:
        for name in ("embeddings", "pooler", "head", "final_norm"):
            choice(getattr(self, name), (name,), OUTSIDE_METHODS, "method outside the blocks")


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
        ConfigError: gaps, overlaps, ranges beyond the stack, a stack without strata or without blocks.
    """

    model_id: str
    blocks: Mapping[str, int]
    strata: tuple[Stratum, ...]
    outside: Outside = Outside()
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

    def check_model(
        self, blocks: Mapping[str, int], *, bias_roles: Mapping[str, Collection[str]] | None = None
    ) -> StrataConfig:
        """Check the plan against a real model's stacks and return it.

        Args:
            blocks: number of blocks of each stack of the model.
            bias_roles: per stack, the roles whose sub-layers have a bias; None skips that check.

        Raises:
            ConfigError: other stacks or depths than the model's; BitFit where there is no bias to train.
        """
        try:
            if dict(self.blocks) != dict(blocks):
                raise FieldError(
                    ("model", "blocks"),
                    f"the plan is for {_counts(self.blocks)}, the model has {_counts(blocks)}. Use a plan made for "
                    "this model, or a preset.",
                )
            for i, stratum in enumerate(self.strata):
                if bias_roles is None or "bitfit" not in stratum.method:
                    continue
                present = set(bias_roles.get(stratum.stack, ()))
                remedy = "norm" if stratum.method == "bitfit" else "lora+norm"
                if not present:
                    raise FieldError(
                        ("strata", i, "method"),
                        f"{stratum.method!r} trains biases, and the blocks of stack {stratum.stack!r} have none. "
                        f"Write {remedy} in its place.",
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
            if stratum.method != "freeze":
                s1 = min(s1, stratum.blocks[0])
            if stratum.method not in ("freeze", "bitfit", "norm"):
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
    ) -> StrataConfig:
        """A named plan; see :func:`spafit.presets.preset_config`."""
        from spafit.presets import preset_config

        return preset_config(name, blocks=blocks, bias_roles=bias_roles, model_id=model_id)

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
        lines.append(
            f"outside: embeddings {self.outside.embeddings}, pooler {self.outside.pooler}, "
            f"head {self.outside.head}, final norm {self.outside.final_norm}"
        )
        if "tested" in self.provenance:
            lines.append(f"tested against baselines: {'yes' if self.provenance['tested'] else 'no'}")
        if "source" in self.provenance:
            lines.append(f"source: {self.provenance['source']}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{h}</th>" for h in ("stack", "blocks", "count", "method", "trains"))
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self._rows())
        return f"<table><caption>{escape(self.model_id)}</caption><tr>{head}</tr>{body}</table>"


def _counts(blocks: Mapping[str, int]) -> str:
    return ", ".join(f"{stack} of {count} blocks" for stack, count in blocks.items())
