"""Measure signals while the Trainer runs, and keep their values beside the seed's checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from spafit import io
from spafit.errors import UsageError
from spafit.fit_result import SIGNAL_COLUMNS
from spafit.monitor import STATE_FILE, StepMonitor
from spafit.signals import MOST_STEPS, Pace, Signal

if TYPE_CHECKING:
    from torch import nn


class SignalRecorder(TrainerCallback, ExportableState):
    """Measures signals at their steps and writes a table after each, so that an interruption costs no row.

    A run that goes on from a checkpoint drops the rows after it, which are measured again. Seconds of measuring are
    not the training's: the monitor's clock leaves them out. So does its peak memory on a GPU; on the CPU it sees the
    whole process.

    Attributes:
        rows: what was measured so far, with the columns :data:`SIGNAL_COLUMNS`.
        paces: by name of the signal, when it was measured and what that took.

    Args:
        signals: what is measured.
        model: the model that trains.
        folder: the seed's folder.
        seed: the run's seed.
        resumed_from: checkpoint that the run goes on from, or None.
        monitor: keeps the training's time.
        selects: whether other weights than the last ones may be kept in the end.
        exact: measure at each of a signal's steps, whatever its share of the time, since a schedule reads it.
    """

    def __init__(
        self,
        signals: Sequence[Signal],
        model: nn.Module,
        folder: Path,
        *,
        seed: int,
        resumed_from: Path | None,
        monitor: StepMonitor,
        selects: bool,
        exact: bool = False,
    ):
        self.signals, self.model, self.folder, self.seed, self.monitor = tuple(signals), model, folder, seed, monitor
        self.rows: list[dict[str, Any]] = []
        before: dict[str, Any] = {}
        if resumed_from is not None:
            state = io.read_json(resumed_from / STATE_FILE)
            before = state["stateful_callbacks"].get("SignalRecorder", {}).get("attributes", {})
            if (folder / "signals.parquet").is_file():
                kept = io.read_table(folder / "signals")
                self.rows = kept[kept["step"] <= state["global_step"]].to_dict("records")
        self.paces = {
            s.name: Pace(s.share, **before.get(s.name, {}), reserved=1 + selects, every=s.every or 1, exact=exact)
            for s in signals
        }
        self._owners: dict[str, str] = {}
        self._keys = {(r["step"], r["signal"], _number(r["hidden"])) for r in self.rows}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        paces = {n: {"steps": list(p.steps), "spent": p.spent, "cost": p.cost} for n, p in self.paces.items()}
        return {"args": {}, "attributes": paces}

    def start(self) -> None:
        """Measure before training; on a run that goes on, too, since a signal may compare with what it saw then."""
        for signal in self.signals:
            self._measure(signal, 0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn how many steps there are."""
        self._learn(state.max_steps)
        state.stateful_callbacks.setdefault("SignalRecorder", self.state())  # a checkpoint may be older than this class

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what is due."""
        for signal in self.signals:
            if self.paces[signal.name].due(state.global_step, seconds=self.monitor.seconds):
                self.monitor.leave_out(self._measure(signal, state.global_step, float(state.epoch)))
                if args.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()

    def finish(self, step: int, epoch: float, *, total: int) -> None:
        """Measure the weights that were kept, those of ``step``, unless that was done when they were trained."""
        self._learn(total)  # nothing was left to train where a run went on from its last step
        for signal in self.signals:
            if step not in self.paces[signal.name].steps:
                self._measure(signal, step, epoch)

    def record(self) -> list[dict[str, Any]]:
        """What the run's record says of each signal."""
        return [
            {
                "name": s.name,
                "every": s.every,
                "share": s.share,
                "measured": len(self.paces[s.name].steps),
                "seconds": self.paces[s.name].spent,
            }
            for s in self.signals
        ]

    def notes(self) -> list[str]:
        """What to say about cost and steps, a sentence for each signal."""
        training, found = self.monitor.seconds, []
        for signal in self.signals:
            pace = self.paces[signal.name]
            steps = sorted(pace.steps)
            widest = max((b - a for a, b in pairwise(steps)), default=0)
            said = (
                f"seed {self.seed}: {signal.name} measured at {len(steps)} steps in {pace.spent:.1f} s, "
                f"{100 * pace.spent / max(training, 1e-9):.0f} % of the {training:.1f} s of training"
            )
            if widest > pace.every:
                said += (
                    f"; the interval was widened from {pace.every} to up to {widest} steps to stay within "
                    f"{100 * signal.share:g} %"
                )
            if pace.exact:
                said += "; at each of its steps, since the schedule reads signals"
            elif pace.spent > signal.share * training:
                said += "; more than its share, since the measurements at the start and the end are always made"
            found.append(said)
        return found

    def _learn(self, total: int) -> None:
        for signal in self.signals:
            pace = self.paces[signal.name]
            pace.total, pace.every = total, signal.every or -(-total // MOST_STEPS)

    def _measure(self, signal: Signal, step: int, epoch: float) -> float:
        """Measure one signal and write the table; gives the seconds that took."""
        begun = time.perf_counter()
        new = False
        for name, hidden, value in signal.read(self.model, step):
            owner = self._owners.setdefault(name, signal.name)
            if owner != signal.name:
                raise UsageError(
                    f"The signals {owner} and {signal.name} both give {name!r}. Rename what one of them gives."
                )
            if (step, name, hidden) in self._keys:  # of the run before it was interrupted
                continue
            self._keys.add((step, name, hidden))
            row = (self.seed, step, epoch, name, hidden, value)
            self.rows.append(dict(zip(SIGNAL_COLUMNS, row, strict=True)))
            new = True
        if new:
            io.write_table(self.folder / "signals", self.table())
        seconds = time.perf_counter() - begun
        self.paces[signal.name].add(step, seconds)
        return seconds

    def table(self) -> pd.DataFrame:
        """All rows by step; columns :data:`SIGNAL_COLUMNS`."""
        table = pd.DataFrame(self.rows, columns=list(SIGNAL_COLUMNS)).sort_values("step", kind="stable")
        return table.astype({"hidden": "Int64"}).reset_index(drop=True)


def _number(hidden: Any) -> int | None:
    return None if pd.isna(hidden) else int(hidden)
