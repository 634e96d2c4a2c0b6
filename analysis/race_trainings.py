"""The trainings of a race: each entry into a folder of its own, timed; what is finished is read."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.race_candidates import Candidate
from spafit import io
from spafit.data.training import TrainData
from spafit.errors import OutputError
from spafit.runtime import stderr_console
from spafit.settings import TrainSettings

if TYPE_CHECKING:
    from analysis.abilities import Abilities


@dataclass(frozen=True)
class Entry:
    """A candidate at one rate."""

    candidate: Candidate
    rate: float

    @property
    def key(self) -> str:
        """Name of its folder."""
        folder = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.candidate.name)
        return f"{folder}-{self.rate:.3g}"


@dataclass
class Clock:
    """Seconds of trainings so far, and what a further one will take."""

    budget: float | None
    spent: float = 0.0
    passes: float = 0.0

    def seconds(self, passes: float) -> float:
        """Expected seconds of so many passes of an item, from what was measured so far."""
        return passes * self.spent / self.passes if self.passes else 0.0

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return math.inf if self.budget is None else self.budget - self.spent


class TimeUp(Exception):
    """The next training would go beyond the time budget."""


@dataclass
class Runner:
    """Trains entries into folders of their own; what is finished is read."""

    folder: Path
    model: str | None
    settings: TrainSettings
    clock: Clock
    device: str
    revision: str | None
    offline: bool
    allow_pickle: bool
    command: str | None
    quiet: bool
    trained: int = 0

    def claim(self, key: str) -> None:
        """Take the folder for this race, or see that it is this one's."""
        record = self.folder / "race.json"
        if record.is_file() and io.read_json(record)["key"] != key:
            raise OutputError(
                f"{self.folder} holds another race (other candidates, data, settings or seeds). Choose another --out."
            )
        if not record.is_file():
            io.write_json(record, {"key": key, "status": "running"})

    def train(
        self, entry: Entry, data: TrainData, seed: int, stage: str, epochs: float, abilities: Abilities | None = None
    ) -> tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame | None]:
        """Rows of the trial, the scored items, and what was forgotten of the abilities, by task."""
        from spafit.retain import parse_remedy
        from spafit.training import fit

        candidate, place = entry.candidate, self.folder / "trainings" / entry.key / stage
        passes = epochs * len(data.frames["train"])
        timed = place / f"seconds-{seed}.json"
        if not timed.is_file() and self.clock.seconds(passes) > self.clock.left():
            raise TimeUp
        begun = time.perf_counter()
        settings = replace(self.settings, epochs=epochs, learning_rate=entry.rate)
        say = stderr_console(quiet=self.quiet)
        if not timed.is_file():
            say.print(f"{stage}: {candidate.name}, rate {entry.rate:.2g}, seed {seed}", markup=False)
        result = fit(
            self.model, candidate.plan, data=data, settings=settings, seeds=(seed,), out=place / f"seed-{seed}",
            remedies=[parse_remedy(r) for r in candidate.remedies], method=candidate.name,
            prefix_folder=self.folder / "prefix", device=self.device, revision=self.revision, offline=self.offline,
            allow_pickle=self.allow_pickle, command=self.command, quiet=True,
        )  # fmt: skip
        if not timed.is_file():
            io.write_json(timed, {"seconds": time.perf_counter() - begun, "passes": passes})
        spent = io.read_json(timed)
        self.clock.spent += spent["seconds"]
        self.clock.passes += spent["passes"]
        split = data.scored_splits[0]
        self.trained += 1
        s1, s2 = candidate.plan.boundaries(next(iter(candidate.plan.blocks)))
        shared = {
            "trial": self.trained, "candidate": candidate.name, "role": candidate.role,
            "digest": io.content_digest([candidate.plan.to_dict()["strata"], entry.rate])[:12], "s1": s1, "s2": s2,
            "trainable": int(result.runs["trainable"].iloc[0]), "learning_rate": entry.rate, "seed": seed,
            "stage": stage, "epochs": epochs, "split": split, "seconds": spent["seconds"],
        }  # fmt: skip
        own = result.runs[result.runs["split"] == split]
        home = result.folder / f"seed-{seed}"
        scored = io.read_table(home / f"predictions-{split}")
        values = {**dict(zip(own["metric"], own["value"], strict=True)), "loss": _loss(scored, data)}
        lost = None if abilities is None else self._forgotten(entry, home / "model", seed, abilities)
        if lost is not None:
            values["forgetting"] = float(lost["value"].mean())
        return [{**shared, "metric": m, "value": v} for m, v in values.items()], scored, lost

    def _forgotten(self, entry: Entry, folder: Path, seed: int, abilities: Abilities) -> pd.DataFrame:
        """What a trained plan forgot, by task; kept beside the training."""
        from spafit.models import load_model

        place = folder.parent / "forgotten"
        if not place.with_suffix(".parquet").is_file():
            from analysis.abilities import forgotten

            before = load_model(
                self.model, revision=self.revision, offline=self.offline, allow_pickle=self.allow_pickle
            )
            after = load_model(folder, offline=self.offline, allow_pickle=self.allow_pickle)
            lost = forgotten(abilities, before, after)
            table = pd.DataFrame(
                {"candidate": entry.candidate.name, "seed": seed, "task": list(lost), "unit": abilities.unit,
                 "value": list(lost.values())}
            )  # fmt: skip
            io.write_table(place, table, csv=False)
        return io.read_table(place)


def _loss(scored: pd.DataFrame, data: TrainData) -> float:
    """Mean negative log-likelihood in nats, or mean squared error of a regression."""
    if data.labels is None:
        return float(((scored["prediction"] - scored["label"]) ** 2).mean())
    columns = scored[[f"p({c})" for c in data.labels]].to_numpy(float)
    right = columns[np.arange(len(scored)), scored["label"].to_numpy().astype(np.int64)]
    return float(-np.log(np.maximum(right, 1e-12)).mean())
