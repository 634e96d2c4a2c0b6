"""The cells of a benchmark run, one per task and method: trained over seeds, finished once, failures recorded."""

from __future__ import annotations

import gc
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from spafit import io
from spafit.data.training import TrainData
from spafit.errors import SpafitError
from spafit.fit_result import FitResult
from spafit.glue_plan import GlueMethod, GluePlan
from spafit.runtime import stderr_console
from spafit.seed_run import NUMBERS_VERSION
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig
from spafit.training import fit

_DONE = "cell.json"


@dataclass(frozen=True)
class Context:
    """What every cell of a call shares; arguments as in :func:`spafit.glue_runs.run_glue`."""

    plan: GluePlan
    folder: Path
    device: str
    offline: bool
    allow_pickle: bool
    resume: bool
    command: str | None
    quiet: bool


@dataclass(frozen=True)
class Cell:
    """One task and method, all seeds."""

    task: str
    method: GlueMethod
    settings: TrainSettings
    data: TrainData
    folder: Path
    key: str

    @property
    def work(self) -> float:
        """Items that a seed sees, the unit of the remaining time."""
        items = len(self.data.frames["train"])
        return min(items, self.settings.max_train or items) * self.settings.epochs

    def finished(self) -> FitResult | None:
        """What an earlier call left, if it was made from the same inputs."""
        record = self.folder / _DONE
        if record.is_file() and io.read_json(record)["key"] == self.key and (self.folder / "runs.parquet").is_file():
            return FitResult.load(self.folder)
        return None


def make_cell(context: Context, task: str, method: GlueMethod, data: TrainData) -> Cell:
    """One cell of the plan, with the key that its results are known by."""
    plan = context.plan
    settings = plan.settings_of(method, task)
    strata = method.strata.to_dict() if isinstance(method.strata, StrataConfig) else method.strata
    key = io.content_digest(
        [NUMBERS_VERSION, plan.model, plan.revision, _stamp(plan.model), method.name, strata, settings.to_dict(),
         data.digest, plan.seeds, context.device, [repr(r) for r in method.remedies()]]
    )  # fmt: skip
    return Cell(task, method, settings, data, context.folder / task / method.folder, key)


def _stamp(model: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's files: a quick sign that it is another one than before."""
    if model is None or not Path(model).exists():
        return []
    place = Path(model)
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def train_cells(
    cells: list[Cell], context: Context
) -> tuple[dict[tuple[str, str], FitResult], dict[tuple[str, str], str]]:
    """Result of every cell that has a finished seed, and the reason of every cell that failed, by task and method."""
    console = stderr_console(quiet=context.quiet)
    results: dict[tuple[str, str], FitResult] = {}
    reasons: dict[tuple[str, str], str] = {}
    before = {(c.task, c.method.name): c.finished() if context.resume else None for c in cells}
    seeds = context.plan.seeds
    left = sum(c.work * len(seeds) for c in cells if before[c.task, c.method.name] is None)
    done, begun, number = 0.0, time.monotonic(), 0
    for cell in cells:
        at = (cell.task, cell.method.name)
        finished = before[at]
        if finished is not None:
            results[at] = finished
            number += len(seeds)
            continue
        (cell.folder / _DONE).unlink(missing_ok=True)  # what it stands for is about to change
        succeeded: list[int] = []
        failed: dict[int, str] = {}
        for seed in seeds:
            number += 1
            remaining = f", about {_duration((time.monotonic() - begun) * left / done)} left" if done else ""
            console.print(f"[{number}/{len(cells) * len(seeds)}] {', '.join(at)}, seed {seed}{remaining}", markup=False)
            reason = _train_seed(cell, seed, context)
            if reason is None:
                succeeded.append(seed)
            else:
                failed[seed] = reason
                console.print(f"Failed: {reason}", markup=False)
            done, left = done + cell.work, left - cell.work
        if succeeded:
            results[at] = _assemble(cell, succeeded, context)
        if failed:
            reasons[at] = " ".join(f"Seed {s}: {r}" for s, r in failed.items())
        else:
            io.write_json(cell.folder / _DONE, {"key": cell.key})
    return results, reasons


def _train_seed(cell: Cell, seed: int, context: Context) -> str | None:
    """Train one seed; None, or why it failed."""
    log = cell.folder / f"failure-seed-{seed}.txt"
    try:
        _fit(cell, (seed,), context, resume=context.resume, quiet=context.quiet)
        log.unlink(missing_ok=True)
        return None
    except SpafitError as error:
        reason = str(error)
    except Exception as error:  # one cell's defect must not cost the days of the others; it is recorded whole
        io.write_text(log, traceback.format_exc())
        first = (str(error).strip().splitlines() or ["no message"])[0]
        reason = f"{type(error).__name__}: {first} (traceback in {log})."
    _free_memory(context.device)
    return reason


def _assemble(cell: Cell, seeds: list[int], context: Context) -> FitResult:
    """One view over the finished seeds; nothing trains."""
    if len(context.plan.seeds) == 1:
        return FitResult.load(cell.folder)
    return _fit(cell, tuple(seeds), context, resume=True, quiet=True)


def _fit(cell: Cell, seeds: tuple[int, ...], context: Context, *, resume: bool, quiet: bool) -> FitResult:
    plan = context.plan
    return fit(
        plan.model, cell.method.strata, data=cell.data, settings=cell.settings, seeds=seeds, out=cell.folder,
        method=cell.method.name, device=context.device, revision=plan.revision, offline=context.offline,
        allow_pickle=context.allow_pickle, remedies=cell.method.remedies(),
        resume=resume, command=context.command, quiet=quiet,
    )  # fmt: skip


def _free_memory(device: str) -> None:
    """Give a failed model's memory back before the next is loaded: trainers hold themselves in cycles."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
