"""One way to print measured figures beside their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """A figure, its target and how they must compare."""

    name: str
    value: float
    target: float
    relation: Literal[">=", "<="]
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.target if self.relation == ">=" else self.value <= self.target


def print_table(title: str, rows: Sequence[Row], *, notes: Sequence[str] = ()) -> int:
    """Print a Markdown table; return 0 if every target is met and 1 otherwise."""
    print(f"\n### {title}\n\n| figure | measured | target | met | note |\n|---|---|---|---|---|")
    for row in rows:
        met = "yes" if row.met else "NO"
        print(f"| {row.name} | {row.value:.3g} | {row.relation} {row.target:.3g} | {met} | {row.note} |")
    for note in notes:
        print(f"\n{note}")
    return int(not all(row.met for row in rows))
