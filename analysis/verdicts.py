"""A condition of a claim with its outcome, and the verdict that conditions give together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from spafit.stats import holm

Verdict = Literal["supported", "refuted", "inconclusive"]
Outcome = Literal["holds", "refuted", "open", "fails", "not tested"]


@dataclass(frozen=True)
class Condition:
    """One of the four conditions.

    Attributes:
        name: L1 to L4.
        tested: whether it was.
        sentence: the result in words.
        outcome: ``holds``; ``refuted``, where a bound excludes the margin; ``open``, neither; ``fails``, where a
            reading contradicts it (L4 only); ``not tested``.
        number: L1, the mean depth of the last type minus that of the first, as a fraction of the blocks. L2 and L3,
            the smallest difference between types of the share of an effect that falls in a range. L4, the share of
            readings in which the last type is deeper than the first.
        interval: of the number, of level 1 - 2·alpha, whose ends are one-sided bounds of level 1 - alpha.
        p: one-sided p, tasks as units; of L2 the largest over types, of L3 the largest over pairs after Holm.
        smallest_p: smallest p that these numbers of tasks could have given.
        power: probability that the condition holds if types differ by the margin, at the observed spread.
        p_refuted: p of "the difference is at least the margin"; of L2 and L3 the smallest after Holm.
    """

    name: str
    tested: bool
    sentence: str
    outcome: Outcome = "not tested"
    number: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    smallest_p: float | None = None
    power: float | None = None
    p_refuted: float | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Condition:
        """The inverse of ``asdict``."""
        return cls(**{**content, "interval": None if content["interval"] is None else tuple(content["interval"])})


@dataclass(frozen=True)
class TypeVerdict:
    """What the evidence says of one type.

    Attributes:
        type: its name.
        verdict: ``supported`` where it passes each condition that was tested, against every other type and adjusted
            over them by Holm; ``refuted`` where a bound excludes the margin.
        n_tasks: tasks with a depth.
        depth: their mean emergence, as a fraction of the blocks; NaN without any.
        blocks: the range that was tested, half-open; None without one.
        order_p: largest p of its pairs in L1, adjusted.
        range_p: its p in L2, adjusted over types.
        dissociation_p: largest p of its pairs in L3, adjusted.
        share: share of the effect on its tasks that falls in its range.
        sentence: in words.
    """

    type: str
    verdict: Verdict
    n_tasks: int
    depth: float
    sentence: str
    blocks: tuple[int, int] | None = None
    order_p: float | None = None
    range_p: float | None = None
    dissociation_p: float | None = None
    share: float | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TypeVerdict:
        """The inverse of ``asdict``."""
        blocks, depth = content["blocks"], content["depth"]
        return cls(
            **{**content, "blocks": None if blocks is None else tuple(blocks),
               "depth": math.nan if depth is None else depth}
        )  # fmt: skip


def decide(conditions: Sequence[Condition], *, alpha: float) -> tuple[Verdict, tuple[Condition, ...]]:
    """The verdict on what was tested, and the conditions with their outcome.

    Refuted: a bound of L1, L2 or L3 excludes the margin, adjusted over the tested ones by Holm. Supported: at least
    one of L1, L2 and L3 was tested, each tested one holds at ``alpha``, and no reading of L4 contradicts it. So each
    error is made with probability of at most ``alpha``. Inconclusive: everything else.
    """
    tested = [c for c in conditions if c.p_refuted is not None]
    adjusted = holm(np.array([c.p_refuted for c in tested], dtype=np.float64))
    refuted = {c.name for c, p in zip(tested, adjusted, strict=True) if p <= alpha}
    settled = tuple(replace(c, outcome="refuted") if c.name in refuted else c for c in conditions)
    if refuted:
        return "refuted", settled
    contradicted = any(c.outcome in ("open", "fails") for c in settled)
    holds = any(c.outcome == "holds" for c in settled if c.name != "L4")
    return ("supported" if holds and not contradicted else "inconclusive"), settled


def listed(names: Sequence[str]) -> str:
    """Names as prose: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def p_text(p: float) -> str:
    """A p-value for a reader."""
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def percent(value: float) -> str:
    """A fraction in whole percent."""
    return f"{100 * value + 0.0:.0f}"
