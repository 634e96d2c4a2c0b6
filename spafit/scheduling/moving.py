"""Plans made from plans: blocks frozen from below, other boundaries, ranks and rates, and the union of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from spafit.errors import ConfigError
from spafit.fields import FieldError, choice
from spafit.strata import StrataConfig
from spafit.stratum import OUTSIDE_METHODS, PLACES, LoraOptions, Stratum

#: What each method trains, for the union of two.
_PIECES = {"freeze": (), "bitfit": ("bitfit",), "norm": ("norm",), "lora": ("lora",), "dora": ("dora",),
           "lora+bitfit": ("lora", "bitfit"), "lora+norm": ("lora", "norm"), "full": ("full",)}  # fmt: skip


@dataclass(frozen=True)
class Holding:
    """What a schedule has set at a moment.

    Attributes:
        plan: the run's plan, as a timetable has changed it since.
        floor: by stack, the first block that may train; those below rest, whatever the plan says.
        factors: by stack and block, what the learning rate is multiplied by.
        first: the run's plan as it was, from which boundaries take a stratum that no longer stands in ``plan``.
    """

    plan: StrataConfig
    floor: Mapping[str, int] = field(default_factory=dict)
    factors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    first: StrataConfig | None = None

    def config(self, rate: float) -> StrataConfig:
        """The plan of the moment; ``rate`` is the run's learning rate, for blocks without one of their own."""
        blocks = {}
        for stack in self.plan.blocks:
            own = by_block(self.plan, stack)
            for b, stratum in enumerate(own):
                if b < self.floor.get(stack, 0):
                    own[b] = Stratum(stack, (b, b + 1), "freeze")
                elif stratum.method != "freeze" and (factor := self.factors.get(stack, {}).get(b, 1.0)) != 1:
                    own[b] = replace(stratum, learning_rate=(stratum.learning_rate or rate) * factor)
            blocks[stack] = own
        return joined(self.plan, blocks)

    def first_trained(self, stack: str) -> int:
        """The first block of a stack that trains; the number of blocks where none does."""
        return max(self.floor.get(stack, 0), self.plan.boundaries(stack)[0])

    def with_floor(self, stack: str, block: int) -> Holding:
        """The same with another first block that may train."""
        return replace(self, floor={**self.floor, stack: block})

    def with_factors(self, stack: str, factors: Mapping[int, float]) -> Holding:
        """The same with other factors for blocks of a stack."""
        return replace(self, factors={**self.factors, stack: {**self.factors.get(stack, {}), **factors}})

    def to_plain(self) -> dict[str, Any]:
        """Plain content for a checkpoint."""
        factors = {s: {str(b): f for b, f in found.items()} for s, found in self.factors.items()}
        return {"plan": self.plan.to_dict(), "floor": dict(self.floor), "factors": factors}

    @classmethod
    def from_plain(cls, content: Mapping[str, Any], first: StrataConfig) -> Holding:
        """What :meth:`to_plain` wrote, of a run with the plan ``first``."""
        factors = {s: {int(b): float(f) for b, f in found.items()} for s, found in content["factors"].items()}
        return cls(StrataConfig.from_dict(content["plan"]), dict(content["floor"]), factors, first)


def only_stack(config: StrataConfig, stack: str | None) -> str:
    """The named stack, or the only one.

    Raises:
        FieldError: unknown, or none named and several there.
    """
    if stack is None:
        if len(config.blocks) > 1:
            names = ", ".join(config.blocks)
            raise FieldError(("stack",), f"the plan has the stacks {names}; name the one that the rule is about.")
        return next(iter(config.blocks))
    return choice(stack, ("stack",), tuple(config.blocks), "stack of the plan")


def by_block(config: StrataConfig, stack: str) -> list[Stratum]:
    """The stratum of each block of a stack, cut to that block."""
    own: dict[int, Stratum] = {
        b: replace(s, blocks=(b, b + 1)) for s in config.strata if s.stack == stack for b in range(*s.blocks)
    }
    return [own[b] for b in sorted(own)]


def joined(config: StrataConfig, blocks: Mapping[str, Sequence[Stratum]]) -> StrataConfig:
    """The plan with these strata of single blocks; equal neighbours become one, unchanged plans stay as written."""
    if all(list(blocks[s]) == by_block(config, s) for s in config.blocks):
        return config
    strata = []
    for own in blocks.values():
        for stratum, same in groupby(own, key=lambda s: replace(s, blocks=(0, 1))):
            ends = [s.blocks for s in same]
            strata.append(replace(stratum, blocks=(ends[0][0], ends[-1][1])))
    return replace(config, strata=tuple(strata), origin=None)


def with_boundaries(
    config: StrataConfig, pair: tuple[int, int], stack: str | None = None, *, first: StrataConfig | None = None
) -> StrataConfig:
    """A plan built like SPAFIT's with other first blocks (s1, s2) of its second and third stratum.

    The strata keep their methods and options; the second trains biases or norms alone. One that stands in ``first``
    only, an earlier plan, is taken from there.

    Raises:
        FieldError: the boundaries do not fit the stack, or the plan lacks the stratum that they would widen.
    """
    stack = only_stack(config, stack)
    count, (low, high) = config.blocks[stack], pair
    if not 0 <= low <= high <= count:
        raise FieldError(
            ("boundaries",),
            f"got [{low}, {high}]; stack {stack!r} has {count} blocks. Write two numbers that rise, from 0 to {count}.",
        )
    own = by_block(config, stack)
    earlier = [] if first is None else by_block(first, stack)
    light, heavy = (
        [s for s in own if _level(s) == level] or [s for s in earlier if _level(s) == level] for level in (1, 2)
    )
    for found, wide, what in ((light, high > low, "biases or norms alone"), (heavy, count > high, "more")):
        if wide and not found:
            raise FieldError(
                ("boundaries",),
                f"[{low}, {high}] would need a stratum of stack {stack!r} that trains {what}, and the plan has "
                "none. Write the whole plan (plan), or other boundaries.",
            )
        if any(replace(s, blocks=(0, 1)) != replace(found[0], blocks=(0, 1)) for s in found):
            raise FieldError(
                ("boundaries",),
                f"stack {stack!r} has strata of several kinds that train {what}, so that two boundaries do not say "
                "where each goes. Write the whole plan (plan).",
            )
    frozen = [Stratum(stack, (b, b + 1), "freeze") for b in range(low)]
    middle = [replace(light[0], blocks=(b, b + 1)) for b in range(low, high)]
    upper = [replace(heavy[0], blocks=(b, b + 1)) for b in range(high, count)]
    blocks = {s: by_block(config, s) for s in config.blocks} | {stack: [*frozen, *middle, *upper]}
    return joined(config, blocks)


def with_rank(config: StrataConfig, rank: int, stack: str | None = None) -> StrataConfig:
    """The plan with another rank of its low-rank strata, and alpha such that their scale stays as it is.

    Raises:
        FieldError: nothing in the plan has a rank.
    """
    strata = [
        replace(s, lora=_ranked(s.lora, rank)) if s.lora is not None and stack in (None, s.stack) else s
        for s in config.strata
    ]
    if strata == list(config.strata) and not any(s.lora is not None and s.lora.rank == rank for s in strata):
        raise FieldError(("rank",), "the plan has no low-rank stratum at this point. Remove it, or write another plan.")
    return replace(config, strata=tuple(strata), origin=None)


def with_learning_rate(config: StrataConfig, rate: float, stack: str | None = None) -> StrataConfig:
    """The plan with one learning rate of all strata that train."""
    return replace(
        config,
        strata=tuple(
            replace(s, learning_rate=rate) if s.method != "freeze" and stack in (None, s.stack) else s
            for s in config.strata
        ),
        origin=None,
    )


def union(plans: Sequence[StrataConfig]) -> StrataConfig:
    """The smallest plan within which each of these can be held; the first itself where it holds the others.

    Raises:
        ConfigError: no one PEFT adapter holds them all.
    """
    first = plans[0]
    for other in plans[1:]:
        if dict(other.blocks) != dict(first.blocks):
            raise ConfigError(
                f"The schedule has a plan for {dict(other.blocks)} blocks, and the run's is for {dict(first.blocks)}. "
                "Write plans for one model."
            )
    blocks = {}
    for stack in first.blocks:
        columns = zip(*(by_block(p, stack) for p in plans), strict=True)
        blocks[stack] = [_union_of(list(column)) for column in columns]
    outside: dict[str, Any] = {place: _outside([getattr(p.outside, place) for p in plans], place) for place in PLACES}
    if len({p.outside.weight_decay for p in plans}) > 1:
        raise ConfigError(f"{_DECAY} outside the blocks.")
    own = replace(first.outside, **outside)
    try:
        widest = joined(first, blocks)
        return widest if own == first.outside else replace(widest, outside=own, origin=None)
    except ConfigError as error:
        raise ConfigError(f"The plans of the schedule do not fit into one PEFT adapter ({error})") from error


_DECAY = "A schedule changes learning rates, not weight decay, and its plans differ in the weight decay"


def _union_of(strata: Sequence[Stratum]) -> Stratum:
    """One stratum that holds all of these; they are of one block."""
    found = strata[0]
    for other in strata[1:]:
        found = _pair(found, other)
    return found


def _pair(one: Stratum, two: Stratum) -> Stratum:
    where = f"block {one.blocks[0]} of stack {one.stack!r}"
    if one.method == "freeze" or two.method == "freeze":
        return two if one.method == "freeze" else one
    if one.weight_decay != two.weight_decay:
        raise ConfigError(f"{_DECAY} of {where}.")
    if one.method not in _PIECES or two.method not in _PIECES:
        if (one.method, one.ia3, one.peft) == (two.method, two.ia3, two.peft):
            return one
        raise ConfigError(f"{where} would train by {one.method!r} and by {two.method!r}; {_ONE_KIND}")
    pieces = set(_PIECES[one.method]) | set(_PIECES[two.method])
    if "full" in pieces and not pieces & {"lora", "dora"}:
        pieces = {"full"}
    method = next((m for m, p in _PIECES.items() if set(p) == pieces), None)
    if method is None:
        raise ConfigError(f"{where} would train by {one.method!r} and by {two.method!r}; {_ONE_KIND}")
    roles = None
    if "bitfit" in method:
        lists = [s.bitfit for s in (one, two) if "bitfit" in s.method]
        roles = None if None in lists else tuple(dict.fromkeys(r for found in lists for r in found or ()))
    rate = one.learning_rate
    return Stratum(one.stack, one.blocks, method, lora=_lora(one, two, where), bitfit=roles, learning_rate=rate,
                   weight_decay=one.weight_decay)  # fmt: skip


_ONE_KIND = "no stratum holds both. Write methods of which one holds the other, such as bitfit and lora+bitfit."


def _lora(one: Stratum, two: Stratum, where: str) -> LoraOptions | None:
    given = [s.lora for s in (one, two) if s.lora is not None]
    if len(given) < 2 or given[0] == given[1]:
        return given[0] if given else None
    first, second = given
    if abs(_scale(first) - _scale(second)) > 1e-9 * _scale(first) or first.dropout != second.dropout:
        raise ConfigError(
            f"{where} would have LoRA's scale (alpha by rank) {_scale(first):g} and {_scale(second):g}, dropout "
            f"{first.dropout:g} and {second.dropout:g}. A change of the scale would change what was learnt; write "
            "alpha such that it stays, and one dropout."
        )
    targets = tuple(dict.fromkeys([*first.targets, *second.targets]))
    return replace(_ranked(first, max(first.rank, second.rank)), targets=targets)


def _scale(lora: LoraOptions) -> float:
    assert lora.alpha is not None
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def _ranked(lora: LoraOptions, rank: int) -> LoraOptions:
    """The same scale at another rank."""
    return lora if rank == lora.rank else replace(
        lora, rank=rank, alpha=_scale(lora) * (rank**0.5 if lora.rslora else rank)
    )  # fmt: skip


def _outside(methods: Sequence[str], place: str) -> str:
    if {"bitfit", "norm"} <= set(methods) and "full" not in methods:
        raise ConfigError(f"outside.{place} would train biases and norms; no method outside the blocks holds both.")
    return max(methods, key=OUTSIDE_METHODS.index)


# ---------------------------------------------------------------- differences


def differences(before: StrataConfig, after: StrataConfig, rate: float) -> list[tuple[str, str, str, str]]:
    """What changes from one plan to the next: what, before, after, and a short label for a figure."""
    rows = []
    for stack in after.blocks:
        old, new = by_block(before, stack), by_block(after, stack)
        for what, of in (("strata", _method), ("rank", _rank), ("learning rate", lambda s: _rate(s, rate))):
            # A block that is frozen has neither rank nor rate, and that it was frozen is said once.
            seen = [(a, b) for a, b in zip(old, new, strict=True)]
            both = [(a, b) for a, b in seen if what == "strata" or "freeze" not in (a.method, b.method)]
            if all(of(a) == of(b) or None in (of(a), of(b)) for a, b in both):
                continue
            one, two = (_ranges([(s.blocks[0], of(s)) for s in side]) for side in (old, new))
            name = what if len(after.blocks) == 1 else f"{what} of {stack}"
            rows.append((name, one, two, _label(what, stack, before, after, both, rate)))
    for place in PLACES:
        one, two = getattr(before.outside, place), getattr(after.outside, place)
        if one != two:
            rows.append((place, one, two, f"{place} {two}"))
    old_rate, new_rate = (p.outside.learning_rate or rate for p in (before, after))
    if old_rate != new_rate:
        what = "learning rate outside the blocks"
        rows.append((what, f"{old_rate:.3g}", f"{new_rate:.3g}", f"outside ×{new_rate / old_rate:.2g}"))
    return rows


def undoes(before: StrataConfig, now: StrataConfig, after: StrataConfig, rate: float) -> bool:
    """Whether going on from ``now`` to ``after`` takes back, in any block, a part of what led to ``now``."""
    for stack in now.blocks:
        for a, b, c in zip(*(by_block(p, stack) for p in (before, now, after)), strict=True):
            measures = [[_level(s) for s in (a, b, c)]]
            if all(s.method != "freeze" for s in (a, b, c)):
                measures += [[_rank(s) or 0 for s in (a, b, c)], [_rate(s, rate) or 0 for s in (a, b, c)]]
            if any((m[1] - m[0]) * (m[2] - m[1]) < 0 for m in measures):
                return True
    return False


def _level(stratum: Stratum) -> float:
    return {"freeze": 0, "bitfit": 1, "norm": 1}.get(stratum.method, 2)


def _method(stratum: Stratum) -> str:
    return stratum.method


def _rank(stratum: Stratum) -> int | None:
    return None if stratum.lora is None else stratum.lora.rank


def _rate(stratum: Stratum, rate: float) -> float | None:
    return None if stratum.method == "freeze" else stratum.learning_rate or rate


def _ranges(values: Sequence[tuple[int, Any]]) -> str:
    parts = []
    for value, same in groupby(values, key=lambda v: v[1]):
        blocks = [b for b, _ in same]
        if value is not None:
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            parts.append(f"[{blocks[0]}, {blocks[-1] + 1}) {shown}")
    return "; ".join(parts) or "none"


def _label(
    what: str, stack: str, before: StrataConfig, after: StrataConfig, both: Sequence[tuple[Any, Any]], rate: float
) -> str:
    if what == "strata":
        (old, _), (new, second) = before.boundaries(stack), after.boundaries(stack)
        if old != new:
            return f"trains from {new}"
        return f"strata at {new}, {second}"
    if what == "rank":
        pairs = {(_rank(a), _rank(b)) for a, b in both if _rank(a) != _rank(b)}
        return "rank " + ", ".join(f"{a or 0}→{b or 0}" for a, b in sorted(pairs, key=str))
    ratios = [_rate(b, rate) / _rate(a, rate) for a, b in both]  # type: ignore[operator]
    return f"rate ×{ratios[0]:.2g}" if max(ratios) - min(ratios) < 1e-9 else "rates by block"
