"""What is watched while training: progress, peak memory, time, learning curves, early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from spafit import io
from spafit.fit_result import METRIC_COLUMNS
from spafit.runtime import Progress

STATE_FILE = "trainer_state.json"
#: What the best checkpoint is chosen by; see :mod:`spafit.seed_run`. Not a metric of the tables.
SELECTION = "selection"


class StepMonitor(TrainerCallback, ExportableState):
    """Progress with remaining time, seconds, the largest memory during training steps, and early stopping.

    Memory is the device's where it is a GPU; on the CPU the process's resident size, seen at the end of each step, so
    it includes the model and everything else that the process holds. Seconds and memory are kept in each checkpoint,
    so that a resumed run adds them up. The clock stops where training ends, before anything is scored.

    Args:
        resumed_from: checkpoint that the run goes on from, or None.
        patience: stop after so many evaluations without a better score; 0 never stops early.
        quiet: no progress on stderr.
    """

    def __init__(self, resumed_from: Path | None, *, patience: int, quiet: bool):
        self.patience, self.quiet = patience, quiet
        self.peak_bytes, self._seconds_before = 0, 0.0
        if resumed_from is not None:
            kept = io.read_json(resumed_from / STATE_FILE)["stateful_callbacks"]["StepMonitor"]["attributes"]
            self.peak_bytes, self._seconds_before = int(kept["peak_bytes"]), float(kept["seconds"])
        self._progress: Progress | None = None
        self._process = psutil.Process()
        self._begun: float | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"peak_bytes": self.peak_bytes, "seconds": self.seconds}}

    @property
    def seconds(self) -> float:
        """Seconds of training so far: set-up, evaluations and those before an interruption included."""
        return self._seconds_before + (0.0 if self._begun is None else time.perf_counter() - self._begun)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self._begun = time.perf_counter()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._progress = Progress(f"Training {state.max_steps} steps", state.max_steps, quiet=self.quiet).__enter__()
        self._progress.advance(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._seconds_before, self._begun = self.seconds, None

    def add_setup(self, seconds: float) -> None:
        """Count what comes before the first step: the prefix cache, and what remedies prepare."""
        self._seconds_before += seconds

    def leave_out(self, seconds: float) -> None:
        """Take off what was spent on something else while the clock ran."""
        self._seconds_before -= seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance, look at the memory, and have the last step logged."""
        if self._progress is not None:
            self._progress.advance(1)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps, too, and those of a run shorter than the logging interval
        if args.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        else:
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop early, by what the log says, so that a resumed run stops where an uninterrupted one does."""
        if exhausted(state.log_history, self.patience):
            control.should_training_stop = True

    def close(self) -> None:
        """Take the bar away; also after an interruption."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def table(self, history: Sequence[dict[str, Any]], *, seed: int) -> pd.DataFrame:
        """Learning curves from the Trainer's log; columns :data:`METRIC_COLUMNS`. What was not a number is missing."""
        rows = []
        for entry in history:
            if "train_runtime" in entry:  # totals of the last session, not a point of a curve
                continue
            for key, value in sorted(entry.items()):  # checkpoints sort them, too
                split, metric = ("select", key.removeprefix("eval_")) if key.startswith("eval_") else ("train", key)
                if metric in ("step", "epoch", "runtime", SELECTION) or metric.endswith("_per_second"):
                    continue
                rows.append(
                    {
                        "seed": seed,
                        "step": entry["step"],
                        "epoch": float(entry.get("epoch", 0.0)),
                        "split": split,
                        "metric": metric,
                        "value": float(value),
                    }
                )
        return pd.DataFrame(rows, columns=list(METRIC_COLUMNS))


def exhausted(history: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the last ``patience`` evaluations in a Trainer's log gave no better score; never with patience 0.

    A score that is undefined (NaN) is not better than any other.
    """
    best, since = -math.inf, 0
    for entry in history:
        if "eval_headline" in entry:
            better = entry["eval_headline"] > best
            best, since = (entry["eval_headline"], 0) if better else (best, since + 1)
    return 0 < patience <= since
