"""What is watched while training: progress, peak memory, learning curves, early stopping."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from spafit import io
from spafit.fit_result import METRIC_COLUMNS
from spafit.runtime import Progress

SECONDS_FILE = "spafit_seconds.json"


class StepMonitor(TrainerCallback):
    """Progress with remaining time, and the process's largest memory during training steps.

    Memory is the device's where it is a GPU; on the CPU the process's resident size, seen at the end of each step, so
    it includes the model and everything else that the process holds.
    """

    def __init__(self, resumed_from: Path | None, *, quiet: bool):
        self.quiet = quiet
        self.peak_bytes = 0
        self.seconds_before = 0.0
        if resumed_from is not None and (resumed_from / SECONDS_FILE).is_file():
            self.seconds_before = float(io.read_json(resumed_from / SECONDS_FILE))
        self._progress: Progress | None = None
        self._process = psutil.Process()
        self._begun = 0.0

    def callbacks(self, patience: int) -> list[TrainerCallback]:
        """This and, with ``patience``, early stopping."""
        return [self, *([EarlyStoppingCallback(patience)] if patience else [])]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self._begun = time.perf_counter()
        self._progress = Progress(f"Training {state.max_steps} steps", state.max_steps, quiet=self.quiet).__enter__()
        self._progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance, and look at the memory."""
        if self._progress is not None:
            self._progress.advance(1)
        if torch.cuda.is_available() and args.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        else:
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the seconds spent beside the checkpoint, so that a resumed run can add them up."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            io.write_json(folder / SECONDS_FILE, self.seconds)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.seconds_before + time.perf_counter() - self._begun

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)

    def table(self, history: list[dict[str, Any]], *, seed: int) -> pd.DataFrame:
        """Learning curves from the Trainer's log; columns :data:`METRIC_COLUMNS`."""
        rows = []
        for entry in history:
            for key, value in entry.items():
                split, metric = ("select", key.removeprefix("eval_")) if key.startswith("eval_") else ("train", key)
                if metric in ("step", "epoch") or metric.endswith(("_runtime", "_per_second", "runtime", "total_flos")):
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
