"""What a trained plan forgot, as a search measures it: supplied to the objective by its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.abilities import ProbedAbilities, forgotten
from spafit.models import load_model


@dataclass(frozen=True)
class ProbedForgetting:
    """Bits that probes fitted anew lost, the mean over tasks; see :class:`analysis.abilities.ProbedAbilities`.

    Attributes:
        model: reference of the model before training; None for the built-in default.
        tasks: references of probing tasks.
        revision: of a hub model.
        offline: never ask the hub.
        allow_pickle: accept pickle weights.
    """

    model: str | None
    tasks: tuple[str, ...]
    revision: str | None = None
    offline: bool = False
    allow_pickle: bool = False

    def __call__(self, folder: Path) -> float:
        """Of the model in ``folder``."""
        before = load_model(self.model, revision=self.revision, offline=self.offline, allow_pickle=self.allow_pickle)
        after = load_model(folder, offline=self.offline, allow_pickle=self.allow_pickle)
        abilities = ProbedAbilities.of(self.tasks, train_items=300, test_items=300)
        return float(np.mean(list(forgotten(abilities, before, after).values())))
