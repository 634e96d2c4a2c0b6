"""`fit`: a model, a plan and a task to trained adapters, over several seeds; resumable, with everything on files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit import io
from spafit.data.training import TrainData, hold_out
from spafit.errors import DataError, OutputError, UsageError
from spafit.fit_result import METRIC_COLUMNS, RUN_COLUMNS, FitResult
from spafit.runtime import Progress, pick_device, provenance, stderr_console
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig

if TYPE_CHECKING:
    from spafit.adapt import StratifiedModel
    from spafit.batches import EncodedTexts
    from spafit.retain import PricedRemedy

#: Raised by one whenever the same inputs would give other numbers, so that older finished seeds are trained again.
NUMBERS_VERSION = 1


def fit(
    model: str | None,
    config: StrataConfig | str,
    *,
    data: TrainData,
    settings: TrainSettings | None = None,
    seeds: Sequence[int] = (0,),
    out: str | Path,
    remedies: Sequence[PricedRemedy] = (),
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
    the CPU.

    Args:
        model: hub id, folder or GGUF file; None for the built-in default.
        config: a plan, or the name of a preset.
        data: task to train on.
        settings: how to train; defaults of :class:`TrainSettings`.
        seeds: one run each.
        out: output folder.
        remedies: what holds on to knowledge while training; see :mod:`spafit.retain`.
        method: what tables call the plan; by default the preset's name or the plan's source.
        device: torch device; ``auto`` takes the first of cuda, mps, cpu.
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
    folder = Path(out)
    settings = settings or TrainSettings()
    if "train" not in data.frames or not data.scored_splits:
        raise DataError(
            f"{data.name} needs a train split and a labelled split to score; it has {', '.join(data.frames)}. Name the "
            "missing files."
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds must be different numbers; got {list(seeds)}.")
    _check_writable(folder)
    name = method or (config if isinstance(config, str) else str(config.provenance.get("source", "own plan")))
    device = pick_device(device)
    runs, curves, first = [], [], None
    for seed in seeds:
        done = _train_seed(
            model, config, data=data, settings=settings, seed=seed, folder=folder / f"seed-{seed}", remedies=remedies,
            name=name, device=device, revision=revision, offline=offline, allow_pickle=allow_pickle, resume=resume,
            command=command, quiet=quiet,
        )  # fmt: skip
        runs.append(done["rows"])
        curves.append(done["metrics"])
        first = first or done
    assert first is not None
    result = FitResult(
        folder,
        {
            "schema_version": io.SCHEMA_VERSION,
            "command": command or "spafit.fit",
            "task": data.name,
            "method": name,
            "model": first["run"]["model"],
            "plan": first["run"]["plan"],
            "settings": first["run"]["settings"],
            "seeds": list(seeds),
            "data": {
                "digest": data.digest,
                "source": data.source,
                "items": {s: len(f) for s, f in data.frames.items()},
            },
            "notes": first["run"]["notes"],
            **provenance(),
        },
        pd.concat(curves, ignore_index=True)[list(METRIC_COLUMNS)],
        pd.concat(runs, ignore_index=True)[list(RUN_COLUMNS)],
    )
    result.save(folder)
    figure = result.plot().get_figure(root=True)
    assert figure is not None
    io.atomic_write(folder / "learning_curve.png", lambda p: figure.savefig(p, dpi=150, bbox_inches="tight"))
    io.write_text(folder / "results.md", result.to_markdown() + "\n")
    return result


def _train_seed(
    model: str | None,
    config: StrataConfig | str,
    *,
    data: TrainData,
    settings: TrainSettings,
    seed: int,
    folder: Path,
    remedies: Sequence[PricedRemedy],
    name: str,
    device: str,
    revision: str | None,
    offline: bool,
    allow_pickle: bool,
    resume: bool,
    command: str | None,
    quiet: bool,
) -> dict[str, Any]:
    """One seed: from the base to scores, or what an earlier call left of it."""
    from spafit.adapt import apply_strata, plan_for
    from spafit.checkpoint import base_digest, model_card
    from spafit.heads import load_with_head

    headed = load_with_head(
        model, labels=data.labels, regression=data.regression, seed=seed, revision=revision, offline=offline,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    plan = plan_for(headed.model, config, model_id=headed.name)
    settings = settings.for_plan(plan)
    stratified = apply_strata(headed.model, plan)
    base = {
        "reference": headed.reference,
        "folder": str(headed.folder) if headed.reference == "default" else headed.reference,
        "revision": headed.revision,
        "head": headed.head,
        "labels": None if data.labels is None else list(data.labels),
        "regression": data.regression,
    }
    content = plan.to_dict()
    content.pop("provenance", None)
    key = io.content_digest(
        [NUMBERS_VERSION, content, {k: v for k, v in settings.to_dict().items() if k not in ("track", "log_steps")},
         data.digest, base_digest(stratified), seed, device, [repr(r) for r in remedies]]
    )  # fmt: skip
    record = folder / "run.json"
    if not resume and folder.exists():
        shutil.rmtree(folder)
    if record.exists():
        before = io.read_json(record)
        if before["key"] != key:
            raise OutputError(
                f"{folder} holds a run with other settings, plan, data or model. Choose another --out, or start over "
                "with --no-resume."
            )
        if before["status"] == "complete":
            return {"run": before, "rows": io.read_table(folder / "runs"), "metrics": io.read_table(folder / "metrics")}
    notes = [*headed.notes, *stratified.plan.notes]
    run: dict[str, Any] = {
        "schema_version": io.SCHEMA_VERSION,
        "command": command or "spafit.fit",
        "status": "running",
        "key": key,
        "seed": seed,
        "model": {"name": headed.name, "reference": headed.reference, "revision": headed.revision},
        "plan": plan.to_dict(),
        "settings": settings.to_dict(),
        "remedies": [repr(r) for r in remedies],
        "trainable": stratified.trainable_parameters(),
        "total": stratified.total_parameters(),
        "device": device,
        "notes": notes,
        **provenance(),
    }
    io.write_json(record, run)
    done = _run(stratified, headed.tokenizer, data, settings, seed, folder, remedies, device, base, quiet, notes)
    rows = pd.DataFrame(
        [
            {
                "task": data.name, "method": name, "seed": seed, "split": split, "metric": metric, "value": value,
                "learning_rate": settings.learning_rate, "epochs": settings.epochs, "train_items": done["train_items"],
                "trainable": run["trainable"], "total": run["total"], "steps": done["steps"],
                "seconds": done["seconds"], "peak_memory_bytes": done["peak_memory_bytes"],
                "saved_bytes": done["saved_bytes"],
            }
            for split, scores in done["scores"].items()
            for metric, value in scores.items()
        ]
    )[list(RUN_COLUMNS)]  # fmt: skip
    scores = {f"{s} {m}": v for s, found in done["scores"].items() for m, v in found.items()}
    io.write_text(
        folder / "model" / "README.md",
        model_card(
            stratified, base=headed.reference if headed.reference != "default" else headed.name, task=data.name,
            scores=scores, settings={k: v for k, v in settings.to_dict().items() if v not in (None, (), False)},
            command=command, notes=notes,
        ),
    )  # fmt: skip
    io.write_table(folder / "runs", rows)
    io.write_table(folder / "metrics", done["metrics"])
    run |= {"status": "complete", "notes": notes, "prefix_cache": done["prefix_cache"], "remedy_price": done["price"]}
    io.write_json(record, run)
    return {"run": run, "rows": rows, "metrics": done["metrics"]}


def _run(
    stratified: StratifiedModel,
    tokenizer: Any,
    data: TrainData,
    settings: TrainSettings,
    seed: int,
    folder: Path,
    remedies: Sequence[PricedRemedy],
    device: str,
    base: dict[str, Any],
    quiet: bool,
    notes: list[str],
) -> dict[str, Any]:
    """Train, keep the best, score; everything that needs torch."""
    import torch

    from spafit import checkpoint
    from spafit.batches import encode
    from spafit.data.glue import class_weights
    from spafit.metrics import compute_metrics, headline
    from spafit.monitor import StepMonitor
    from spafit.retain import prices
    from spafit.runtime import torch_seed
    from spafit.trainer import StratifiedTrainer, training_arguments

    frame = data.frames["train"]
    kept, held = hold_out(frame, settings.select_share, seed=seed, most=settings.max_train)

    def encoded_of(rows: pd.DataFrame) -> EncodedTexts:
        return encode(rows, tokenizer, max_length=settings.max_length, regression=data.regression)

    train, select = encoded_of(kept), encoded_of(held)
    if train.truncated:
        notes.append(f"{train.truncated} of {len(train)} training items were cut at {settings.max_length} tokens")
    arguments = training_arguments(settings, folder, seed=seed, device=device, select=len(select) > 0, quiet=quiet)

    def score(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found = compute_metrics(data.metrics, predicted(predictions, regression=data.regression), labels)
        return {**found, "headline": headline(found, data.metrics)}

    stratified.model.to(device)
    weights = None
    if settings.class_weights and not data.regression:
        weights = torch.as_tensor(class_weights(kept["label"]), dtype=torch.float32)
    last = last_checkpoint(folder)
    monitor = StepMonitor(last, quiet=quiet)
    with torch_seed(seed, "training"):
        cache, said = _prefix_cache(stratified, train, tokenizer, settings, folder, device, quiet)
        if said:
            notes.append(said)
        for remedy in remedies:
            remedy.prepare(stratified, tokenizer, max_length=settings.max_length, device=device)
        if settings.checkpoint_activations:
            from spafit.activations import checkpoint_trained_blocks

            checkpoint_trained_blocks(stratified)
        trainer = StratifiedTrainer(
            stratified, settings, arguments, train=train, select=select, tokenizer=tokenizer, metrics=score,
            cache=cache, remedies=remedies, weights=weights, base=base, callbacks=monitor.callbacks(settings.patience),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = monitor.seconds
    stratified.check()
    scores: dict[str, dict[str, float]] = {}
    for split in data.scored_splits:
        encoded = encoded_of(data.frames[split])
        logits = predict_logits(stratified.model, encoded, tokenizer, batch_size=4 * settings.batch_size)
        found = score(logits, encoded.labels)  # type: ignore[arg-type]
        scores[split] = found
        write_scores(folder / f"predictions-{split}", data.frames[split], logits, data)
    checkpoint.save(stratified, folder / "model", base=base)
    tokenizer.save_pretrained(str(folder / "model"))
    curves = monitor.table(trainer.state.log_history, seed=seed)
    final = pd.DataFrame(
        [
            {"seed": seed, "step": trainer.state.global_step, "epoch": float(trainer.state.epoch or 0), "split": s,
             "metric": m, "value": v}
            for s, found in scores.items() for m, v in found.items()
        ],
    )  # fmt: skip
    if cache is not None:
        cache.close()
        shutil.rmtree(folder / "prefix", ignore_errors=True)
    for old in folder.glob("checkpoint-*"):  # the final model is saved; its optimiser's state is of no more use
        shutil.rmtree(old)
    weights_file = [p for p in (folder / "model").iterdir() if p.suffix == ".safetensors"]
    return {
        "train_items": len(train),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "peak_memory_bytes": monitor.peak_bytes,
        "saved_bytes": sum(p.stat().st_size for p in weights_file),
        "scores": scores,
        "metrics": pd.concat([curves, final], ignore_index=True)[list(METRIC_COLUMNS)],
        "prefix_cache": None if cache is None else {"bytes": cache.bytes},
        "price": prices(remedies).to_dict("records") if remedies else [],
    }


def _prefix_cache(
    stratified: StratifiedModel,
    train: EncodedTexts,
    tokenizer: Any,
    settings: TrainSettings,
    folder: Path,
    device: str,
    quiet: bool,
) -> tuple[Any, str]:
    """The cache that the settings ask for, or None, and what to say about it."""
    from spafit.batches import Collator
    from spafit.prefix import PrefixCache, PrefixError, prefix_bytes, prefix_pays

    if settings.prefix_cache == "off" or settings.prefix_dropout:
        return None, ""
    free = shutil.disk_usage(folder).free
    pays, why = prefix_pays(stratified, train, epochs=settings.epochs, free_bytes=free, device=device)
    if settings.prefix_cache == "auto" and not pays:
        return None, f"prefix cache off: {why}"
    size = prefix_bytes(stratified, train)
    stderr_console(quiet=quiet).print(f"Prefix cache: {size / 1e6:,.0f} MB ({why})")
    try:
        with Progress("Frozen prefix", len(train), quiet=quiet) as progress:
            cache = PrefixCache.build(
                stratified, train, Collator(tokenizer), folder / "prefix", device=device, progress=progress.advance
            )
    except PrefixError as error:
        if settings.prefix_cache == "on":
            raise
        return None, f"prefix cache off: {error}"
    said = "; ".join([f"prefix cache on, {cache.bytes / 1e6:,.0f} MB: {why}", *cache.notes])
    return cache, said


def predict_logits(model: Any, encoded: EncodedTexts, tokenizer: Any, *, batch_size: int = 64) -> np.ndarray:
    """Logits of every item in eval mode, shape (items, outputs), float32; batches of similar length."""
    import torch

    from spafit.batches import Collator

    collate, device = Collator(tokenizer), next(model.parameters()).device
    order = np.argsort(encoded.lengths, kind="stable")
    was_training = model.training
    model.eval()
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = collate([encoded[int(i)] for i in order[start : start + batch_size]])
            inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "index")}
            rows.append(model(**inputs).logits.float().cpu().numpy())
    model.train(was_training)
    found = np.concatenate(rows)
    logits = np.empty_like(found)
    logits[order] = found
    return logits


def predicted(logits: np.ndarray, *, regression: bool) -> np.ndarray:
    """Predicted values (regression) or class codes."""
    if isinstance(logits, tuple):
        logits = logits[0]
    return logits.reshape(len(logits)) if regression else logits.argmax(axis=1)


def write_scores(stem: Path, frame: pd.DataFrame, logits: np.ndarray, data: TrainData) -> pd.DataFrame:
    """Write one row per item: idx, label (where known), prediction, and the probability of each class."""
    columns: dict[str, Any] = {"idx": frame["idx"].to_numpy()}
    if frame["label"].notna().all():
        columns["label"] = frame["label"].to_numpy()
    columns["prediction"] = predicted(logits, regression=data.regression)
    if data.labels is not None:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        columns["class"] = [data.labels[c] for c in columns["prediction"]]
        columns |= {f"p({c})": probabilities[:, i] for i, c in enumerate(data.labels)}
    table = pd.DataFrame(columns)
    io.write_table(stem, table)
    return table


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole (its trainer state is written last), or None."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


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
