"""`fit`: a model, a plan and a task to trained adapters, over several seeds; resumable, with everything on files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from spafit import io
from spafit.data.training import TrainData
from spafit.errors import DataError, OutputError, UsageError
from spafit.fit_result import (
    INTERPOLATION_COLUMNS,
    METRIC_COLUMNS,
    RUN_COLUMNS,
    SCHEDULE_COLUMNS,
    SIGNAL_COLUMNS,
    FitResult,
)
from spafit.kinds import kind_of
from spafit.processes import joined
from spafit.runtime import provenance
from spafit.seed_run import Job, train_seed
from spafit.settings import TrainSettings
from spafit.signals import Signal
from spafit.strata import StrataConfig

if TYPE_CHECKING:
    from spafit.retain import PricedRemedy
    from spafit.scheduling import Schedule


def fit(
    model: str | None,
    config: StrataConfig | str,
    *,
    data: TrainData,
    settings: TrainSettings | None = None,
    seeds: Sequence[int] = (0,),
    out: str | Path,
    remedies: Sequence[PricedRemedy] = (),
    signals: Sequence[Signal] = (),
    schedule: Schedule | None = None,
    prefix_folder: str | Path | None = None,
    start: str | Path | None = None,
    method: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    resume: bool = True,
    command: str | None = None,
    quiet: bool = False,
) -> FitResult:
    """Train a plan on a task, once per seed; write a folder and return a view on it.

    A seed draws the head's weights, the held-out share of the training items, the order of the items, and dropout.
    The reported splits are never selected on: the best checkpoint and early stopping look at the held-out share.
    Finished seeds are returned as they are, an interrupted one goes on from its last checkpoint, bit-identically on
    the CPU. Under torchrun or accelerate launch every process calls this with the same arguments on a shared disk;
    the first one writes. Where items do not divide evenly by processes, a few at the end of an epoch count twice.

    Args:
        model: hub id, folder or GGUF file; None for the built-in default.
        config: a plan, or the name of a preset.
        data: task to train on.
        settings: how to train; defaults of :class:`TrainSettings`.
        seeds: one run each.
        out: output folder.
        remedies: what holds on to knowledge while training; see :mod:`spafit.retain`.
        signals: what is measured while training; see :class:`spafit.signals.Signal`. They change no weight: training
            is the same to the bit with and without them, and a finished seed is not trained again for their sake. One
            that finished without a signal has none, which is said on stderr; ``resume=False`` trains it anew.
        schedule: rules by which boundaries, ranks and learning rates change while training, and what freezes; see
            :mod:`spafit.scheduling`. Part of what makes a run the same run. ``trainable`` then counts whatever can
            train at any time, and the saved adapter holds all of it, at its largest rank.
        prefix_folder: where the frozen prefix's outputs are kept for several calls; those with equal training items,
            base and frozen blocks then share them. None keeps them in the seed's folder while it trains.
        start: folder of a model that this plan trained before on the same base (``FitResult.model_folder``): training
            begins with its weights and a fresh optimiser. None begins with the base.
        method: what tables call the plan; by default the preset's name or the plan's source, and the remedies.
        device: kind of torch device; ``auto`` takes the first of cuda, mps, cpu.
        revision: branch, tag or commit of a hub model.
        offline: never ask the hub.
        allow_pickle: accept pickle weights (read with ``weights_only``).
        resume: go on from finished seeds and checkpoints; False starts over.
        command: how this was called, for the record.
        quiet: no progress on stderr.

    Raises:
        SpafitError: bad options, a plan that does not fit the model, data without a training split, a loss that is
            not finite, an output folder that cannot be written.
    """
    settings = settings or TrainSettings()
    _check_data(data, settings)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds must be different numbers, at least one; got {list(seeds)}.")
    settings.check_trackers()
    if len({s.name for s in signals}) < len(signals):
        raise UsageError(f"Two signals have one name: {', '.join(s.name for s in signals)}. Rename one.")
    plan_name = config if isinstance(config, str) else str(config.provenance.get("source", "own plan"))
    name = method or " + ".join([plan_name, *(r.name for r in remedies), *(["schedule"] if schedule else [])])
    processes = joined(device)
    if schedule is not None:
        if start is not None:
            raise UsageError("A schedule begins with the base, and start names a trained model. Leave one of them out.")
        schedule.check(signals=[s.name for s in signals], select_share=settings.select_share, processes=processes.count)
        if isinstance(config, StrataConfig):
            schedule.widest(config)
    if processes.first:
        _check_writable(Path(out))
    job = Job(
        model, config, data, settings, Path(out), tuple(remedies), tuple(signals), name, revision,
        offline, allow_pickle, resume, command or "spafit.fit", quiet or not processes.first, processes,
        None if prefix_folder is None else Path(prefix_folder), None if start is None else Path(start), schedule,
    )  # fmt: skip
    try:
        done = [train_seed(job, seed) for seed in seeds]
    except BaseException:
        with suppress(OSError):  # a folder that this call made and left empty; others are not removed by rmdir
            Path(out).rmdir()
        raise
    written = all(d["kept"] for d in done) and _is_written(job.folder, done)
    processes.wait()  # all have looked before the first one writes
    if written:
        return FitResult.load(job.folder)
    result = _result(job, done)
    if processes.first:
        result.save(job.folder)
        figure = result.plot().get_figure(root=True)
        assert figure is not None
        io.atomic_write(job.folder / "learning_curve.png", lambda p: figure.savefig(p, dpi=150, bbox_inches="tight"))
        io.write_text(job.folder / "results.md", result.to_markdown() + "\n")
    processes.wait()
    return result


def _check_data(data: TrainData, settings: TrainSettings) -> None:
    if "train" not in data.frames or not data.scored_splits:
        raise DataError(
            f"{data.name} needs a train split and a labelled split to score; it has {', '.join(data.frames)}. Name the "
            "missing files."
        )
    train = data.frames["train"]
    kind = kind_of(data)
    for split, frame in data.frames.items():
        if lacking := [c for c in kind.columns if c not in frame]:
            raise DataError(
                f"{data.name}, {split}: a task of kind {data.kind} needs the column {lacking[0]!r}; there are "
                f"{', '.join(frame.columns)}."
            )
    unlabelled = int(train["label"].isna().sum()) if "label" in kind.columns else 0
    if unlabelled or not len(train):
        raise DataError(
            f"{data.name}: {unlabelled} of {len(train)} training items have no label. Every one needs a label; remove "
            "the others."
        )
    kind.check(settings)
    if settings.patience and round(settings.select_share * len(train)) == 0:
        raise UsageError(
            f"patience needs items to watch, and a share of {settings.select_share} of {len(train)} training items is "
            "none. Raise select_share."
        )


def _is_written(folder: Path, done: Sequence[dict[str, Any]]) -> bool:
    """Whether the folder's own tables are those of these seeds."""
    record = folder / "run.json"
    names = ("runs.parquet", "metrics.parquet", "results.md", "learning_curve.png")
    if not record.is_file() or not all((folder / n).is_file() for n in names):
        return False
    return bool(io.read_json(record).get("keys") == [d["run"]["key"] for d in done])


def _result(job: Job, done: Sequence[dict[str, Any]]) -> FitResult:
    first = done[0]["run"]
    more = ("interpolation", "signals", "schedule")
    swept, measured, changed = ([d[k] for d in done if d[k] is not None] for k in more)
    return FitResult(
        job.folder,
        {
            "schema_version": io.SCHEMA_VERSION,
            "command": job.command,
            "task": job.data.name,
            "method": job.name,
            "model": first["model"],
            "plan": first["plan"],
            "settings": first["settings"],
            "remedies": first["remedies"],
            "remedy_price": first["remedy_price"],
            "signals": [{"seed": d["run"]["seed"], **s} for d in done for s in d["run"].get("signals", [])],
            "schedule": first.get("schedule"),
            "changes": [c for d in done for c in d["run"].get("changes") or ()],
            "seeds": [d["run"]["seed"] for d in done],
            "keys": [d["run"]["key"] for d in done],
            "processes": job.processes.count,
            "data": {
                "digest": job.data.digest,
                "source": job.data.source,
                "items": {s: len(f) for s, f in job.data.frames.items()},
            },
            "notes": list(dict.fromkeys([*job.data.notes, *(note for d in done for note in d["run"]["notes"])])),
            **provenance(),
        },
        pd.concat([d["metrics"] for d in done], ignore_index=True)[list(METRIC_COLUMNS)],
        pd.concat([d["rows"] for d in done], ignore_index=True)[list(RUN_COLUMNS)],
        None if not swept else pd.concat(swept, ignore_index=True)[list(INTERPOLATION_COLUMNS)],
        None if not measured else pd.concat(measured, ignore_index=True)[list(SIGNAL_COLUMNS)],
        None if not changed else pd.concat(_filled(changed), ignore_index=True)[list(SCHEDULE_COLUMNS)],
    )


def _filled(tables: Sequence[pd.DataFrame]) -> Sequence[pd.DataFrame]:
    """Those that have rows, so that the types are theirs; the first where none has."""
    return [t for t in tables if len(t)] or tables[:1]


def _check_writable(folder: Path) -> None:
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"--out {folder} cannot be written: {error.strerror}. Choose another folder with --out."
        ) from error
