"""How often a verdict and strata come out in simulated worlds of one setting, beside what was announced."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import numpy as np

from analysis.hypothesis import default_hypothesis
from analysis.localization import localization_test
from analysis.power import plan
from analysis.suggestion import suggest_strata
from tests import worlds

Kind = Literal["flat", "trend", "distributed", "planted", "planted from the first block"]
Effects = Literal["none", "even", "trend", "shuffled", "planted"]


@dataclass(frozen=True)
class Setting:
    """One kind of world.

    Attributes:
        kind: of the layer curves; None without any.
        counts: tasks of each type.
        num_blocks: depth.
        step: layers between successive types.
        sd: standard deviation of a type's tasks, in layers.
        effects: kind of interventional effects.
        share: share of the effect in a type's own third beside what is even.
        share_sd: its standard deviation over tasks.
    """

    kind: Kind | None
    counts: tuple[int, int, int] = (2, 3, 5)
    num_blocks: int = 12
    step: float = 0.0
    sd: float = 0.0
    effects: Effects = "none"
    share: float = 0.0
    share_sd: float = 0.1

    @property
    def planted(self) -> bool:
        return (self.kind or "planted").startswith("planted") and self.effects in ("none", "planted")

    def announced(self) -> float:
        """Power that is printed for the verdict at these effect sizes; NaN where nothing is planted."""
        if not self.planted:
            return math.nan
        has = self.effects != "none"
        rows = plan(
            default_hypothesis(), self.counts, self.num_blocks, interventions=has, depths=self.kind is not None
        ).power
        sizes = {"difference": self.step, "sd": self.sd} if self.kind else {}
        if has:
            sizes |= ({"share": self.share, "share_sd": self.share_sd} if self.kind else
                      {"difference": self.share, "sd": self.share_sd})  # fmt: skip
        (found,) = [r["power"] for r in rows if r["condition"] == "supported" and sizes.items() <= r.items()]
        return float(found)

    def world(self, random: np.random.Generator) -> worlds.World | None:
        if self.kind is None:
            return None
        if self.kind == "distributed":
            return worlds.distributed(self.counts, self.num_blocks, random)
        if self.kind in ("flat", "trend"):
            return worlds.no_structure(self.kind, self.counts, self.num_blocks, random)
        first = None if self.kind == "planted" else 0.5
        return worlds.planted(self.counts, self.num_blocks, random, step=self.step, sd=self.sd, first=first)

    def harm(self, random: np.random.Generator) -> worlds.BlockEffects | None:
        if self.effects == "none":
            return None
        return worlds.effects(
            self.counts, self.num_blocks, random, gap=self.share, sd=self.share_sd,
            trend=3.0 * (self.effects == "trend"), shuffled=self.effects == "shuffled",
        )  # fmt: skip


def error(rate: float, n: int) -> float:
    """Binomial standard error."""
    return math.sqrt(rate * (1 - rate) / n)


def near(found: Sequence[int], truth: Sequence[int]) -> bool:
    """Whether both boundaries are within one block."""
    return max(abs(a - b) for a, b in zip(found, truth, strict=True)) <= 1


def simulate(setting: Setting, n: int, *, strata: bool = True, seed: int = 0) -> Counter[str]:
    """Counts over ``n`` worlds.

    Returns:
        ``supported``, ``refuted``, ``inconclusive``. With curves and ``strata`` also ``smooth``: three segments do not
        beat the smooth profiles; ``segmentation``, ``holding`` or ``none`` (too weak, or of no use): what places the
        boundaries; ``near segmentation`` and ``near holding``: how often both are then within one block of those that
        tell the types apart, and of those from which the curves without noise hold.
    """
    random, claim, found = np.random.default_rng(seed), default_hypothesis(), Counter[str]()
    with patch("analysis.judging.share_powers", return_value=(math.nan, math.nan)):  # no part of a verdict
        for _ in range(n):
            world = setting.world(random)
            curves = [] if world is None else worlds.curves(world, random)
            test = localization_test(curves, claim, num_blocks=setting.num_blocks, effects=setting.harm(random))
            found[test.verdict] += 1
            if world is None or not strata:
                continue
            suggestion = suggest_strata(curves, num_blocks=setting.num_blocks, n_boot=100)
            found["smooth"] += suggestion.null_test is None or not suggestion.null_test.beats_null
            found[suggestion.criterion] += 1
            truth = {"segmentation": world.boundaries, "holding": world.held}.get(suggestion.criterion)
            if truth is not None:
                found[f"near {suggestion.criterion}"] += near(suggestion.boundaries, truth)
    return found
