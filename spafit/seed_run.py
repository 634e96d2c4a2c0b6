"""One seed of a training run: base, plan, training, scores; finished once, resumed where it was interrupted."""

from __future__ import annotations

import gc
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit import io
from spafit.data.sampling import hold_out
from spafit.data.training import TrainData
from spafit.errors import ModelError, OutputError, UsageError
from spafit.fit_result import INTERPOLATION_COLUMNS, RUN_COLUMNS, table_if_there
from spafit.kinds import kind_of
from spafit.predictions import summarise
from spafit.processes import Processes
from spafit.runtime import Progress, provenance, stderr_console
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig

if TYPE_CHECKING:
    from spafit.adapt import StratifiedModel
    from spafit.batches import EncodedTexts
    from spafit.heads import HeadedModel
    from spafit.kinds.base import Collate, TaskKind
    from spafit.prefix import PrefixCache
    from spafit.retain import PricedRemedy
    from spafit.scheduling import Schedule
    from spafit.signals import Signal

#: Raised by one whenever the same inputs would give other numbers, so that older finished seeds are trained again.
NUMBERS_VERSION = 3
#: Settings that change no number.
_NOT_NUMERIC = ("track", "log_steps", "workers")


@dataclass(frozen=True)
class Job:
    """What all seeds of a run share; arguments as in :func:`spafit.fit`, and the processes that train together."""

    model: str | None
    config: StrataConfig | str
    data: TrainData
    settings: TrainSettings
    folder: Path
    remedies: tuple[PricedRemedy, ...]
    signals: tuple[Signal, ...]
    name: str
    revision: str | None
    offline: bool
    allow_pickle: bool
    resume: bool
    command: str
    quiet: bool
    processes: Processes
    prefix_folder: Path | None = None
    start: Path | None = None
    schedule: Schedule | None = None


def train_seed(job: Job, seed: int) -> dict[str, Any]:
    """One seed: from the base to scores, or what an earlier call left of it.

    Returns:
        ``run`` (the seed's record), ``rows`` and ``metrics`` (its tables), ``kept`` (nothing was trained).

    Raises:
        SpafitError: as in :func:`spafit.fit`.
    """
    from spafit.adapt import apply_strata, meta_copy, plan_for
    from spafit.checkpoint import base_digest
    from spafit.digests import model_digest, tokenizer_digest
    from spafit.runtime import torch_seed

    folder, data, processes = job.folder / f"seed-{seed}", job.data, job.processes
    kind = kind_of(data)
    headed = kind.load(job.model, seed=seed, revision=job.revision, offline=job.offline, allow_pickle=job.allow_pickle)
    start = model_digest(headed.model), tokenizer_digest(headed.tokenizer)
    plan = plan_for(headed.model, job.config, model_id=headed.name, missing=headed.missing, keep_head=kind.keeps_head)
    settings = job.settings.for_plan(plan)
    schedule = job.schedule
    bare = None if schedule is None else meta_copy(headed.model)
    with torch_seed(seed, "adapter"):  # PEFT draws its matrices from torch's own generator
        stratified = apply_strata(headed.model, plan if schedule is None else schedule.widest(plan))
    stratified.moment.bare = bare
    began = _begin_with(stratified, job.start)
    content = plan.to_dict()
    content.pop("provenance", None)
    numeric = {k: v for k, v in settings.to_dict().items() if k not in _NOT_NUMERIC}
    device = processes.device.partition(":")[0]
    key = io.content_digest(
        [
            NUMBERS_VERSION,
            content,
            numeric,
            data.digest,
            *start,
            seed,
            device,
            processes.count,
            [repr(r) for r in job.remedies],
            *began,
            *([] if headed.image_processor is None else [headed.image_processor.digest]),
            *([] if schedule is None else [schedule.to_dict()]),
        ]
    )
    record = folder / "run.json"
    run: dict[str, Any] = {
        "schema_version": io.SCHEMA_VERSION,
        "command": job.command,
        "status": "running",
        "key": key,
        "seed": seed,
        "model": {"name": headed.name, "reference": headed.reference, "revision": headed.revision},
        "plan": plan.to_dict(),
        "settings": settings.to_dict(),
        "remedies": [repr(r) for r in job.remedies],
        "schedule": None if schedule is None else schedule.to_dict(),
        "data": data.digest,
        "trainable": stratified.trainable_parameters(),
        "total": stratified.total_parameters(),
        "device": device,
        "processes": processes.count,
        "notes": [*headed.notes, *stratified.plan.notes],
        **provenance(),
    }
    if not job.resume and folder.exists():
        _start_over(folder, processes)
    if record.exists():
        before = io.read_json(record)
        if before["key"] != key:
            raise OutputError(
                f"{folder} holds another run: {_difference(before, run)}. Choose another --out, or start over with "
                "--no-resume."
            )
        if before["status"] == "complete":
            stderr_console(quiet=job.quiet).print(f"Seed {seed}: finished earlier, kept as it is")
            had = {s["name"] for s in before.get("signals", ())}
            if missing := [s.name for s in job.signals if s.name not in had]:
                stderr_console(quiet=job.quiet).print(
                    f"Seed {seed}: it finished without {' and '.join(missing)}, and a finished seed is not trained "
                    "again to measure. Start over (--no-resume), or choose another --out, to have it"
                )
            return _finished(folder, kept=True)
    reference = headed.reference
    if reference != "default" and Path(reference).expanduser().exists():
        reference = str(Path(reference).expanduser().absolute())
    base: dict[str, Any] = {
        "reference": reference,
        "folder": str(headed.folder) if reference == "default" else reference,
        "revision": headed.revision,
        "head": headed.head,
        "labels": None if data.labels is None else list(data.labels),
        "regression": data.regression,
        "paired": data.paired,
        "kind": data.kind,
        "digest": base_digest(stratified),
    }
    processes.wait()  # no process may see the record of this very call as an earlier one's
    if processes.first:
        io.write_json(record, run)
    processes.wait()
    done = _run(job, kind, stratified, headed, settings, plan, seed, folder, base, run["notes"])
    _write(job, stratified, headed, settings, folder, base, run, done)
    del headed, stratified
    _release(device)
    processes.wait()
    return _finished(folder, kept=False)


def _begin_with(stratified: StratifiedModel, folder: Path | None) -> list[str]:
    """Put the weights of an earlier training into the model; gives what tells them apart from others."""
    from spafit.checkpoint import WEIGHTS_FILE, base_digest, read_config
    from spafit.trainer import load_weights

    if folder is None:
        return []
    base = read_config(folder)["base"]
    if base["digest"] != base_digest(stratified):
        raise ModelError(f"{folder} was trained on another base ({base.get('reference')}). Give one of the same base.")
    load_weights(stratified, folder)
    return [io.file_digest(p) for p in sorted(folder.glob("model*.safetensors")) or [folder / WEIGHTS_FILE]]


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between the record of a folder's run and that of this call, for people."""
    now = io.plain(now)  # as it would be read back
    old, new = before["settings"], now["settings"]
    found = [f"{k} {old.get(k)!r}, not {v!r}" for k, v in new.items() if old.get(k) != v and k not in _NOT_NUMERIC]
    plans = [{k: v for k, v in record["plan"].items() if k != "provenance"} for record in (before, now)]
    found += ["another plan"] if plans[0] != plans[1] else []
    found += [f"model {before['model']['name']}"] if before["model"] != now["model"] else []
    for part, called in (("remedies", "remedies"), ("device", "device"), ("processes", "number of processes")):
        found += [f"{called} {before.get(part)!r}, not {now[part]!r}"] if before.get(part) != now[part] else []
    found += ["another schedule"] if before.get("schedule") != now["schedule"] else []
    found += ["other data"] if before.get("data") != now["data"] else []
    return "; ".join(found) or "made by another version of this package, or from other weights"


def _start_over(folder: Path, processes: Processes) -> None:
    if not (folder / "run.json").is_file() and any(folder.iterdir()):
        raise OutputError(f"{folder} holds something else than a training run. Choose another --out.")
    processes.wait()
    if processes.first:
        shutil.rmtree(folder)
    processes.wait()


def _finished(folder: Path, *, kept: bool) -> dict[str, Any]:
    """What a finished seed left; the state that only an interrupted one needs is removed."""
    if kept:
        _remove_state(folder)
    return {
        "run": io.read_json(folder / "run.json"),
        "rows": io.read_table(folder / "runs"),
        "metrics": io.read_table(folder / "metrics"),
        "interpolation": table_if_there(folder / "interpolation"),
        "signals": table_if_there(folder / "signals"),
        "schedule": table_if_there(folder / "schedule"),
        "kept": kept,
    }


def _remove_state(folder: Path) -> None:
    for old in [*folder.glob("checkpoint-*"), folder / "prefix"]:
        shutil.rmtree(old, ignore_errors=True)


def _write(
    job: Job,
    stratified: StratifiedModel,
    headed: HeadedModel,
    settings: TrainSettings,
    folder: Path,
    base: dict[str, Any],
    run: dict[str, Any],
    done: dict[str, Any],
) -> None:
    """Write a seed's model, tables and record, in this order, and then remove its checkpoints."""
    from spafit import checkpoint

    data, target = job.data, folder / "model"
    base |= {"max_length": done["window"]}
    if not job.processes.first:
        checkpoint.save(stratified, target, base=base, write=False)
        return
    for split, summaries in done["summaries"].items():
        kind_of(data).write(folder / f"predictions-{split}", data.frames[split], summaries, done["texts"].get(split))
    card = checkpoint.model_card(
        stratified,
        base=headed.reference if headed.reference != "default" else headed.name,
        task=data.name,
        scores={f"{s} {m}": v for s, found in done["scores"].items() for m, v in found.items()},
        settings={k: v for k, v in settings.to_dict().items() if v not in (None, (), False)}
        | {f"remedy {i + 1}": remedy for i, remedy in enumerate(run["remedies"])}
        | {"training items": done["train_items"]},
        command=job.command,
        notes=run["notes"],
    )
    checkpoint.save(stratified, target, base=base, card=card)
    headed.readers.save_pretrained(str(target))
    saved = sum(p.stat().st_size for p in target.iterdir() if p.suffix == ".safetensors")
    shared = {
        "task": data.name, "method": job.name, "seed": run["seed"], "learning_rate": settings.learning_rate,
        "epochs": settings.epochs, "train_items": done["train_items"], "trainable": run["trainable"],
        "total": run["total"], "steps": done["steps"], "seconds": done["seconds"],
        "peak_memory_bytes": done["peak_memory_bytes"], "saved_bytes": saved,
    }  # fmt: skip
    rows = [
        {**shared, "split": split, "metric": metric, "value": value}
        for split, scores in done["scores"].items()
        for metric, value in scores.items()
    ]
    io.write_table(folder / "runs", pd.DataFrame(rows)[list(RUN_COLUMNS)])
    io.write_table(folder / "metrics", done["metrics"])
    if len(done["interpolation"]):
        io.write_table(folder / "interpolation", done["interpolation"])
    more = {"prefix_cache": done["prefix_cache"], "remedy_price": done["price"], "best_step": done["best_step"]}
    more |= {"signals": done["signals"], "changes": done["changes"]}
    io.write_json(folder / "run.json", {**run, "status": "complete", **more})
    _remove_state(folder)


def _run(
    job: Job,
    kind: TaskKind,
    stratified: StratifiedModel,
    headed: HeadedModel,
    settings: TrainSettings,
    plan: StrataConfig,
    seed: int,
    folder: Path,
    base: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """Train, keep the best, score; everything that needs torch. Writes checkpoints only."""
    import torch

    from spafit.data.sampling import class_weights
    from spafit.monitor import SELECTION, StepMonitor
    from spafit.retain import interpolate, prices, snapshot
    from spafit.retain.interpolation import check_line
    from spafit.runtime import seed_sequence, torch_seed
    from spafit.signal_recorder import SignalRecorder
    from spafit.trainer import StratifiedTrainer, is_finished, last_checkpoint, training_arguments

    data, device = job.data, job.processes.device
    if settings.interpolate:
        check_line(stratified)
    # A wrapped model keeps its start itself.
    start = snapshot(stratified) if settings.interpolate and not stratified.is_adapter else None
    kept, held = hold_out(data.frames["train"], settings.select_share, seed=seed, most=settings.max_train)
    positions = getattr(stratified.model.config, "max_position_embeddings", None) or settings.max_length

    def encoded_of(rows: pd.DataFrame, what: str) -> EncodedTexts:
        found = kind.encode(rows, headed, max_length=min(settings.max_length, positions))
        if found.truncated:
            notes.append(f"{found.truncated} of {len(found)} {what} items were cut at {found.window} tokens")
        return found

    def selection(summaries: np.ndarray, index: np.ndarray) -> dict[str, float]:
        """The scores, and what the checkpoint is chosen by: the headline, and among equal ones the loss."""
        ordered = np.empty_like(summaries)
        ordered[index] = summaries
        found = kind.score(ordered, select)
        loss = found.pop("loss")
        return {**found, SELECTION: found["headline"] - 1e-6 * loss}

    train, select, collate = encoded_of(kept, "training"), encoded_of(held, "held-out"), kind.collator(headed)
    weights = None
    if settings.class_weights:
        counted = class_weights(kept["label"], n_classes=len(data.labels or ()))
        weights = torch.as_tensor(counted, dtype=torch.float32)
    last = last_checkpoint(folder)
    console = stderr_console(quiet=job.quiet)
    console.print(f"Seed {seed}: " + (f"{len(train)} training items" if last is None else f"goes on from {last.name}"))
    monitor = StepMonitor(last, patience=settings.patience, quiet=job.quiet)
    with torch_seed(seed, "training"), _own_state():
        arguments = training_arguments(settings, folder, seed=seed, device=device, select=len(select) > 0)
        stratified.model.to(device)
        mixed = torch.autocast(device.partition(":")[0], dtype=torch.bfloat16) if arguments.bf16 else nullcontext()
        begun = time.perf_counter()
        with mixed:
            cache, said = _prefix_cache(job, stratified, train, collate, settings, folder)
        if said:
            notes.append(said)
        for remedy in job.remedies:
            remedy.prepare(stratified, headed.tokenizer, max_length=settings.max_length, device=device)
        monitor.add_setup(time.perf_counter() - begun)
        if last is None and job.processes.first:
            for old in [*folder.glob("signals.*"), *folder.glob("schedule.*")]:
                old.unlink()
        recorder = SignalRecorder(
            job.signals if job.processes.first else (), stratified.model, folder, seed=seed, resumed_from=last,
            monitor=monitor, selects=len(select) > 0, exact=job.schedule is not None and bool(job.schedule.readings),
        )  # fmt: skip
        recorder.start()  # before a checkpoint is loaded
        driver = None
        if job.schedule is not None:
            from spafit.scheduling.driver import ScheduleDriver

            assert settings.learning_rate is not None
            driver = ScheduleDriver(
                job.schedule, stratified, plan, learning_rate=settings.learning_rate, folder=folder, seed=seed,
                resumed_from=last, recorder=recorder,
            )  # fmt: skip
            driver.check_readings()
        if settings.checkpoint_activations:
            from spafit.activations import checkpoint_trained_blocks

            checkpoint_trained_blocks(stratified)
        trainer = StratifiedTrainer(
            stratified, settings, arguments, train=train, select=select, tokenizer=headed.readers,
            metrics=selection, collate=collate, loss=kind.loss, units=kind.units, cache=cache, remedies=job.remedies,
            weights=weights, base=base, rated=None if driver is None else driver.units,
            callbacks=[monitor, recorder, *([] if driver is None else [driver])],
        )  # fmt: skip
        if job.signals and trainer.is_fsdp_enabled:
            raise UsageError(
                f"{job.signals[0].name} looks at the whole model, and FSDP gives each process a share of it. Use "
                "several processes without FSDP (DDP), or leave the signal off."
            )
        # Each process draws dropout of its own; the Trainer has just seeded them all alike.
        dropout = seed_sequence(seed, "dropout", job.processes.rank).generate_state(1, np.uint32)[0]
        torch.manual_seed(int(dropout))
        try:
            if last is not None and is_finished(last, settings.patience):
                trainer.restore(last)
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            monitor.close()
            if cache is not None:
                cache.close()
    stratified.check()
    if arguments.bf16:  # what is reported is what the saved model gives when it is loaded: float32
        trainer.accelerator.unwrap_model(stratified.model, keep_fp32_wrapper=False)
    summaries: dict[str, np.ndarray] = {}
    state = trainer.state
    best = state.best_global_step or state.global_step
    epochs = [float(e["epoch"]) for e in state.log_history if e["step"] == best and "epoch" in e]
    recorder.finish(best, epochs[0] if epochs else float(state.epoch or 0), total=state.max_steps)
    notes += [*recorder.notes(), *([] if driver is None else driver.notes())]
    if len(select):
        notes.append(f"seed {seed}: step {best} of {state.global_step} kept, chosen on {len(select)} held-out items")
    if state.global_step < state.max_steps:
        notes.append(f"seed {seed}: stopped early, at step {state.global_step} of {state.max_steps}")
    console.print(f"Seed {seed}: scoring {sum(len(data.frames[s]) for s in data.scored_splits)} items")
    scored = {split: encoded_of(data.frames[split], split) for split in data.scored_splits}

    def scores_of(split: str, items: EncodedTexts) -> dict[str, float]:
        summaries[split] = summarise(
            stratified.model, items, collate, lambda model, inputs: kind.loss(model, inputs)[1],
            batch_size=4 * settings.batch_size,
        )  # fmt: skip
        found = kind.score(summaries[split], items)
        found.pop("loss")
        return found

    swept = []
    for share in settings.interpolate:
        with interpolate(stratified, share, start=start, head="trained"):
            for split, items in {"select": select, **scored}.items():
                if len(items):
                    swept += [(seed, share, split, m, v) for m, v in scores_of(split, items).items()]
    summaries.clear()
    scores = {split: scores_of(split, items) for split, items in scored.items()}
    texts: dict[str, pd.DataFrame] = {}
    for split in scored:
        more, written = kind.generated(stratified.model, headed, data.frames[split], settings)
        scores[split] |= more
        if written is not None:
            texts[split] = written
            if len(written) < len(data.frames[split]):
                notes.append(
                    f"texts were written and scored for {len(written)} of {len(data.frames[split])} {split} items"
                )
    final = pd.DataFrame(
        [
            {"seed": seed, "step": best, "epoch": float(state.epoch or 0),
             "split": split, "metric": metric, "value": value}
            for split, found in scores.items() for metric, value in found.items()
        ],
    )  # fmt: skip
    return {
        "train_items": len(train),
        "window": train.window,
        "steps": state.global_step,
        "best_step": best,
        "seconds": monitor.seconds,
        "peak_memory_bytes": monitor.peak_bytes,
        "summaries": summaries,
        "texts": texts,
        "scores": scores,
        "metrics": pd.concat([monitor.table(state.log_history, seed=seed), final], ignore_index=True),
        "interpolation": pd.DataFrame(swept, columns=list(INTERPOLATION_COLUMNS)),
        "prefix_cache": None if cache is None else {"bytes": cache.bytes},
        "signals": recorder.record(),
        "changes": None if driver is None else driver.rows,
        "price": prices(job.remedies).to_dict("records") if job.remedies else [],
    }


@contextmanager
def _own_state() -> Iterator[None]:
    """Give back what the Trainer sets for the whole process: Python's and NumPy's seeds, transformers' log level."""
    from transformers.utils import logging

    python, numpy, level = random.getstate(), np.random.get_state(), logging.get_verbosity()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        logging.set_verbosity(level)


def _release(kind: str) -> None:
    """Free what a seed's Trainer held; it refers to itself, so that only the collector finds it."""
    gc.collect()
    if kind == "cuda":
        import torch

        torch.cuda.empty_cache()


def _prefix_cache(
    job: Job, stratified: StratifiedModel, train: EncodedTexts, collate: Collate, settings: TrainSettings, folder: Path
) -> tuple[PrefixCache | None, str]:
    """The cache that the settings ask for, or None, and what to say about it."""
    from spafit.prefix import PrefixCache, PrefixError, prefix_bytes, prefix_pays

    if settings.prefix_cache == "off" or settings.prefix_dropout:
        return None, ""
    if len(train) and "input_ids" not in train.items[0]:
        if settings.prefix_cache == "on":
            raise UsageError("The prefix cache holds states of texts, and the items are images. Set it off.")
        return None, "prefix cache off: the items are images"
    free = shutil.disk_usage(folder).free
    job.processes.wait()  # all decide on the same free space
    pays, why = prefix_pays(stratified, train, epochs=settings.epochs, free_bytes=free, device=job.processes.device)
    shared = job.prefix_folder is not None and prefix_bytes(stratified, train) > 0
    if settings.prefix_cache == "auto" and not (pays or shared):
        return None, f"prefix cache off: {why}"
    size = prefix_bytes(stratified, train)
    stderr_console(quiet=job.quiet).print(f"Prefix cache: {size / 1e6:,.0f} MB ({why})")

    def build() -> PrefixCache:
        with Progress("Frozen prefix", len(train), quiet=job.quiet) as progress:
            return PrefixCache.build(
                stratified, train, collate, job.prefix_folder or folder / "prefix",
                device=job.processes.device, shared=job.prefix_folder is not None, progress=progress.advance,
            )  # fmt: skip

    try:
        with job.processes.first_alone():  # the others then find the first one's file
            cache = build()
    except PrefixError as error:
        if settings.prefix_cache == "on":
            raise
        return None, f"prefix cache off: {error}"
    said = "; ".join([f"prefix cache on, {cache.bytes / 1e6:,.0f} MB: {why}", *cache.notes])
    return cache, said
