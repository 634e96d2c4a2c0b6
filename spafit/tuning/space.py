"""The search space of plans: groups, boundaries as fractions of what is left, methods, ranks, rates."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from spafit import io
from spafit.errors import ConfigError, UsageError
from spafit.fields import FieldError, integer, name_list, number
from spafit.presets import TARGETS, THIRD_STRATUM_BIASES
from spafit.strata import LoraOptions, Outside, StrataConfig, Stratum
from spafit.stratum import METHODS
from spafit.tuning.parameters import Parameter, Values, active_values
from spafit.yaml_fields import entries, mapping, read_fields

MAX_GROUPS = 5
#: Methods from the least to the most that they change, for ``growing``.
COMPLEXITY = (
    "freeze", "norm", "bitfit", "bias-added", "ia3", "lora", "lora+norm", "lora+bitfit", "lora+bias-added", "dora",
    "full",
)  # fmt: skip
#: What a learning rate belongs to, by method.
RATE_OF = {
    "norm": "bias", "bitfit": "bias", "bias-added": "bias", "ia3": "low-rank", "lora": "low-rank",
    "lora+norm": "low-rank", "lora+bitfit": "low-rank", "lora+bias-added": "low-rank",
    "dora": "low-rank", "full": "full",
}  # fmt: skip
DEFAULT_RATES = {"bias": (2e-4, 5e-3), "low-rank": (1e-4, 4e-3), "full": (5e-6, 2e-4)}
SCHEMA_VERSION = 1
#: Fractions that a grid takes.
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SearchSpace:
    """Plans for a model, as parameters that every backend understands.

    The first boundary is a whole number; each further one is a fraction of the blocks that are left, so that every
    value is a plan (of encodings tried elsewhere the one that lost least; sorting and rejecting lost more). Empty
    groups vanish. Groups that touch and are alike stay two strata.

    Attributes:
        blocks: number of blocks of each stack.
        bias_roles: per stack, roles whose sub-layers have a bias; None means all.
        groups: numbers of groups that are tried, from 1 to 5.
        methods: what a group may be; of one kind of adapter.
        growing: methods are put in the order of :data:`COMPLEXITY`, so that they never fall with depth.
        ranks: of low-rank methods, for each group by itself.
        alphas: multiples of the rank that LoRA's alpha may be.
        dropout: least and most dropout on low-rank updates.
        rates: peak learning rates, least and most, of ``bias``, ``low-rank`` and ``full``; each group has its method's.
        types: SPAFIT's types: LoRA on query, key, value (I), or on the attention's output, too (II).
        model_id: the model's reference, for people.
    """

    blocks: Mapping[str, int]
    bias_roles: Mapping[str, Collection[str]] | None = None
    groups: tuple[int, ...] = (2, 3)
    methods: tuple[str, ...] = ("freeze", "bitfit", "lora+bitfit")
    growing: bool = True
    ranks: tuple[int, ...] = (4, 16, 64)
    alphas: tuple[float, ...] = (1.0,)
    dropout: tuple[float, float] = (0.0, 0.0)
    rates: Mapping[str, tuple[float, float]] = field(default_factory=lambda: dict(DEFAULT_RATES))
    types: tuple[Literal["I", "II"], ...] = ("I",)
    model_id: str = "unnamed"

    def __post_init__(self) -> None:
        groups = tuple(integer(g, ("groups", i), minimum=1) for i, g in enumerate(self.groups))
        object.__setattr__(self, "groups", groups)
        if not self.groups or max(self.groups) > MAX_GROUPS or len(set(self.groups)) < len(self.groups):
            raise FieldError(("groups",), f"got {list(self.groups)}; write different numbers from 1 to {MAX_GROUPS}.")
        object.__setattr__(self, "methods", name_list(list(self.methods), ("methods",), COMPLEXITY, "method"))
        kinds = {k for m in self.methods if (k := Stratum("s", (0, 1), m).adapter) is not None}
        if len(kinds) > 1:
            raise FieldError(("methods",), f"{' and '.join(sorted(kinds))} do not fit into one PEFT adapter. Keep one.")
        if set(self.methods) == {"freeze"}:
            raise FieldError(("methods",), "freeze alone leaves nothing to search. Add a method that trains.")
        object.__setattr__(self, "ranks", tuple(integer(r, ("ranks", i), minimum=1) for i, r in enumerate(self.ranks)))
        object.__setattr__(self, "alphas", tuple(number(a, ("alphas", i)) for i, a in enumerate(self.alphas)))
        if not self.ranks or not self.alphas or min(self.alphas) <= 0:
            raise FieldError(("ranks" if not self.ranks else "alphas",), "write one or more numbers above 0.")
        rates = dict(DEFAULT_RATES) | {k: tuple(v) for k, v in self.rates.items()}
        for name, ends in rates.items():
            if name not in DEFAULT_RATES or len(ends) != 2 or not 0 < number(ends[0], ("rates", name)) <= number(
                ends[1], ("rates", name)
            ):  # fmt: skip
                known = ", ".join(DEFAULT_RATES)
                raise FieldError(("rates", name), f"got {list(ends)}; write {known}: [least, most], above 0.")
        object.__setattr__(self, "rates", rates)
        low, high = (float(number(d, ("dropout", i))) for i, d in enumerate(self.dropout))
        if not 0 <= low <= high < 1:
            raise FieldError(("dropout",), f"got {list(self.dropout)}; write [least, most], at least 0 and below 1.")
        if not self.types or set(self.types) - set(TARGETS):
            raise FieldError(("types",), f"got {list(self.types)}; write I, II or both.")
        if self.bias_roles is not None:
            bare = [s for s in self.blocks if not self.bias_roles.get(s)]
            if bare and any("bitfit" in m for m in self.methods):
                swapped = tuple(dict.fromkeys(m.replace("bitfit", "norm") for m in self.methods))
                object.__setattr__(self, "methods", swapped)

    @property
    def _low_rank(self) -> tuple[str, ...]:
        return tuple(m for m in self.methods if m.startswith("lora") or m == "dora")

    def parameters(self) -> tuple[Parameter, ...]:
        """The dimensions, in the order in which they are decided; with values for a grid."""
        found: list[Parameter] = []
        most = max(self.groups)
        for stack, blocks in self.blocks.items():
            found.append(Parameter(f"{stack}.groups", "categorical", choices=self.groups))
            for g in range(1, most):
                when = (f"{stack}.groups", tuple(n for n in self.groups if n > g))
                if g == 1:
                    found.append(Parameter(f"{stack}.s1", "integer", low=0, high=blocks, when=when))
                else:
                    found.append(Parameter(f"{stack}.fraction{g}", "real", low=0, high=1, grid=QUARTERS, when=when))
            for g in range(1, most + 1):
                when = (f"{stack}.groups", tuple(n for n in self.groups if n >= g))
                found.append(Parameter(f"{stack}.method{g}", "categorical", choices=self.methods, when=when))
                if self._low_rank:
                    active = (f"{stack}.method{g}", self._low_rank)
                    found.append(Parameter(f"{stack}.rank{g}", "categorical", choices=self.ranks, when=active))
        if self._low_rank:
            found.append(Parameter("alpha", "categorical", choices=self.alphas))
            found.append(Parameter("type", "categorical", choices=self.types))
            low, high = self.dropout
            if high > low:
                found.append(Parameter("dropout", "real", low=low, high=high, grid=(low, high)))
        for name in dict.fromkeys(RATE_OF[m] for m in self.methods if m != "freeze"):
            low, high = self.rates[name]
            middle = math.sqrt(low * high)
            found.append(Parameter(f"rate.{name}", "real", low=low, high=high, log=True, grid=(low, middle, high)))
        return tuple(found)

    def decode(self, values: Values) -> tuple[StrataConfig, dict[str, Any]]:
        """The plan of some values, and settings of the training that go with it.

        Raises:
            UsageError: values that do not fit the space.
        """
        values = active_values(self.parameters(), values)
        strata: list[Stratum] = []
        for stack, blocks in self.blocks.items():
            count = int(values[f"{stack}.groups"])
            cuts = [int(values[f"{stack}.s1"])] if count > 1 else []
            for g in range(2, count):
                left = blocks - cuts[-1]
                cuts.append(cuts[-1] + round(float(values[f"{stack}.fraction{g}"]) * left))
            kinds = [(values[f"{stack}.method{g}"], values.get(f"{stack}.rank{g}")) for g in range(1, count + 1)]
            if self.growing:
                kinds.sort(key=lambda k: (COMPLEXITY.index(k[0]), k[1] or 0))
            ends = [0, *cuts, blocks]
            for (method, rank), start, stop in zip(kinds, ends, ends[1:], strict=False):
                if stop > start:
                    strata.append(self._stratum(stack, (start, stop), method, rank, values))
        used = {s.method for s in strata} - {"freeze"}
        rates = [float(values[f"rate.{RATE_OF[m]}"]) for m in used]
        bare = self.bias_roles is not None and not any(self.bias_roles.values())
        outside = Outside(pooler="norm" if bare else "bitfit")
        config = StrataConfig(
            self.model_id, dict(self.blocks), tuple(strata), outside,
            {"source": "search", "criterion": "a trial of a search", "tested": False},
        )  # fmt: skip
        # What trains outside the blocks goes at the gentlest rate in use; a head alone at the default.
        return config, {"learning_rate": min(rates) if rates else None}

    def _stratum(
        self, stack: str, blocks: tuple[int, int], method: str, rank: int | None, values: Mapping[str, Any]
    ) -> Stratum:
        lora = bitfit = None
        if rank is not None:
            lora = LoraOptions(
                int(rank), float(values["alpha"]) * int(rank), float(values.get("dropout", self.dropout[0])),
                TARGETS[values["type"]],
            )  # fmt: skip
        if method == "lora+bitfit":
            present = None if self.bias_roles is None else self.bias_roles.get(stack, ())
            bitfit = tuple(r for r in THIRD_STRATUM_BIASES if present is None or r in present)
        rate = None if method == "freeze" else float(values[f"rate.{RATE_OF[method]}"])
        return Stratum(stack, blocks, method, lora, bitfit=bitfit, learning_rate=rate)

    def encode(self, config: StrataConfig, *, learning_rate: float | None = None) -> dict[str, Any]:
        """Values of a plan, so that it can be a first trial; rates outside the space go to its nearer end.

        What trains outside the blocks is the space's, whatever the plan says.

        Args:
            config: strata, ranks and types that the space has.
            learning_rate: of methods whose strata name none; None takes the geometric middle of each range.

        Raises:
            UsageError: the plan is not in the space; says why.
        """
        if dict(config.blocks) != dict(self.blocks):
            raise UsageError(f"The plan is for {dict(config.blocks)}, the space for {dict(self.blocks)}.")
        values: dict[str, Any] = {}
        for stack, blocks in self.blocks.items():
            own = sorted((s for s in config.strata if s.stack == stack), key=lambda s: s.blocks)
            if len(own) not in self.groups:
                # A smaller number of groups is a larger one with empty groups behind it.
                larger = [g for g in self.groups if g > len(own)]
                if not larger:
                    raise UsageError(f"The plan has {len(own)} groups in {stack!r}, the space {list(self.groups)}.")
            count = next(g for g in sorted(self.groups) if g >= len(own))
            starts = [s.blocks[0] for s in own[1:]] + [blocks] * (count - len(own))
            values[f"{stack}.groups"] = count
            if count > 1:
                values[f"{stack}.s1"] = starts[0]
            for g, (before, start) in enumerate(pairwise(starts), start=2):
                values[f"{stack}.fraction{g}"] = 0.0 if before == blocks else (start - before) / (blocks - before)
            for g in range(1, count + 1):
                stratum = own[min(g, len(own)) - 1]
                if stratum.method not in self.methods:
                    raise UsageError(f"The plan has {stratum.method!r}, the space {', '.join(self.methods)}.")
                values[f"{stack}.method{g}"] = stratum.method
                if stratum.lora is not None:
                    values[f"{stack}.rank{g}"] = self._listed(stratum.lora.rank, self.ranks, "rank")
                    ratio = (stratum.lora.alpha or stratum.lora.rank) / stratum.lora.rank
                    values["alpha"] = self._listed(ratio, self.alphas, "alpha over rank")
                    kind = next((t for t in self.types if TARGETS[t] == tuple(stratum.lora.targets)), None)
                    values["type"] = self._listed(kind, self.types, "type")
                    values["dropout"] = min(max(stratum.lora.dropout, self.dropout[0]), self.dropout[1])
        for name in dict.fromkeys(RATE_OF[m] for m in self.methods if m != "freeze"):
            low, high = self.rates[name]
            given = [s.learning_rate for s in config.strata if RATE_OF.get(s.method) == name and s.learning_rate]
            rate = given[0] if given else learning_rate
            values[f"rate.{name}"] = math.sqrt(low * high) if rate is None else min(max(rate, low), high)
        if self._low_rank:
            values.setdefault("alpha", self.alphas[0])
            values.setdefault("type", self.types[0])
            values.setdefault("dropout", self.dropout[0])
        known = {p.name for p in self.parameters()}
        found = active_values(self.parameters(), {k: v for k, v in values.items() if k in known})
        if _shape(self.decode(found)[0]) != _shape(config):
            raise UsageError(
                "The plan's methods do not grow with depth, and the space asks for that. Set growing: false, or leave "
                "the plan out."
            )
        return found

    def _listed(self, value: Any, allowed: Sequence[Any], what: str) -> Any:
        if value not in allowed:
            raise UsageError(f"The plan's {what} is {value}, the space has {', '.join(map(str, allowed))}.")
        return value

    def to_yaml(self) -> str:
        """The part that people edit."""
        content = {"schema_version": SCHEMA_VERSION, **{k: v for k, v in asdict(self).items() if k in _FIELDS}}
        return str(yaml.safe_dump(io.plain(content), sort_keys=False, width=110))

    def with_file(self, path: str | Path) -> SearchSpace:
        """The same model's space with the fields of a YAML file.

        Raises:
            ConfigError: the file cannot be read, or a field is wrong; names file, line and field.
        """
        path = Path(path)
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"The space {path} cannot be read: {error.strerror}. Give a YAML file.") from error
        return read_fields(source, file=str(path), what="a search space", build=lambda c, _: self.with_fields(c))

    def with_fields(self, content: Any) -> SearchSpace:
        """The same model's space with some fields, written as in a file.

        Raises:
            FieldError: a field is wrong.
        """
        got = mapping(content, (), (), ("schema_version", *_FIELDS), None)
        if integer(got.pop("schema_version", 1), ("schema_version",), minimum=1) > SCHEMA_VERSION:
            raise FieldError(("schema_version",), f"this package reads up to {SCHEMA_VERSION}. Upgrade spafit.")
        changes: dict[str, Any] = {}
        for name, value in got.items():
            if name == "growing":
                if not isinstance(value, bool):
                    raise FieldError((name,), f"got {value!r}; write true or false.")
                changes[name] = value
            elif name == "rates":
                rates = mapping(value, (name,), (), tuple(DEFAULT_RATES), None)
                changes[name] = {k: tuple(entries(v, (name, k))) for k, v in rates.items()}
            else:
                changes[name] = tuple(entries(value, (name,)))
        return replace(self, **changes)


def _shape(config: StrataConfig) -> list[tuple[Any, ...]]:
    """Where each method stands, at which rank."""
    rows = [(s.stack, s.blocks, s.method, s.lora.rank if s.lora else None) for s in config.strata]
    return sorted(rows, key=lambda r: r[:2])


_FIELDS = ("groups", "methods", "growing", "ranks", "alphas", "dropout", "rates", "types")
assert set(COMPLEXITY) <= set(METHODS)
