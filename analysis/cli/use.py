"""``spafit evaluate``, ``spafit predict``, ``spafit merge``: use what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli.train import (
    Data,
    Debug,
    Device,
    Files,
    GlueTask,
    Json,
    LabelColumn,
    NoHeader,
    Offline,
    Quiet,
    SkipBadRows,
    Text2Column,
    TextColumn,
    read_training_data,
)  # fmt: skip

if TYPE_CHECKING:
    from spafit.adapt import StratifiedModel
    from spafit.data.training import TrainData
    from spafit.heads import Readers

#: Kinds of tasks whose models read images.
_IMAGES = ("images", "matching", "captions")
Folder = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a trained model (…/seed-0/model).")]


def evaluate(
    folder: Folder,
    table: Annotated[Path | None, typer.Option("--table", help="A table with labels.")] = None,
    task: GlueTask = None,
    data: Data = None,
    file: Files = None,
    skip_bad_rows: SkipBadRows = False,
    text: TextColumn = "text",
    text2: Text2Column = None,
    label: LabelColumn = "label",
    no_header: NoHeader = False,
    offline: Offline = False,
    device: Device = "auto",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Score a trained model on a table or a GLUE task's labelled splits.

    The model's classes are matched with the task's by name, so their order makes no difference; other classes are
    refused.

    Example: `spafit evaluate runs/train/all-MiniLM-L6-v2-rte-spafit-scaled-I/seed-0/model --task rte --data glue_data`
    """
    from spafit.batches import encode
    from spafit.metrics import compute_metrics, headline
    from spafit.predictions import predict_logits, predicted

    _check_kind(folder, "evaluate")
    stratified, readers, base = _load(folder, offline=offline, device=device)
    given = read_training_data(
        task, data, file, {"table": table}, text=text, text2=text2, label=label, regression=base["regression"],
        header=not no_header, metrics=None, offline=offline, labels=_labels(base),
        skip_bad_rows=skip_bad_rows,
    )  # fmt: skip
    _check_pairs(given, base)
    order = given.output_order(None if base["regression"] else _labels(base) or _outputs(stratified.model))
    scores: dict[str, dict[str, float]] = {}
    for split in given.scored_splits:
        encoded = encode(
            given.frames[split], readers.tokenizer, max_length=base.get("max_length", 512), regression=given.regression
        )
        logits = predict_logits(stratified.model, encoded, readers.tokenizer)[:, order]
        assert encoded.labels is not None
        found = compute_metrics(given.metrics, predicted(logits, regression=given.regression), encoded.labels)
        scores[split] = {**found, "headline": headline(found, given.metrics), "items": len(encoded)}
    if json_output:
        import json

        typer.echo(json.dumps(scores, indent=1))
        return
    for split, found in scores.items():
        typer.echo(f"{split}: " + ", ".join(f"{k} {v:.4f}" if k != "items" else f"{v} items" for k, v in found.items()))


def predict(
    folder: Folder,
    table: Annotated[Path, typer.Argument(help="Any table: TSV, CSV, JSONL, parquet.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where predictions go (.parquet and .csv are added).")],
    text: TextColumn = "text",
    text2: Text2Column = None,
    no_header: NoHeader = False,
    offline: Offline = False,
    device: Device = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Predict every row of a table: class and probabilities, or a value.

    Example: `spafit predict runs/train/mine/seed-0/model new.tsv --text sentence --out predicted`
    """
    from spafit.batches import encode
    from spafit.predictions import predict_logits, write_scores

    _check_kind(folder, "predict")
    stratified, readers, base = _load(folder, offline=offline, device=device)
    given = read_training_data(
        None, None, None, {"table": table}, text=text, text2=text2, label=None, regression=base["regression"],
        header=not no_header, metrics=None, offline=offline, labels=_labels(base),
    )  # fmt: skip
    _check_pairs(given, base)
    out = out.with_suffix("") if out.suffix in (".csv", ".parquet") else out
    frame = given.frames["table"]
    encoded = encode(frame, readers.tokenizer, max_length=base.get("max_length", 512), regression=given.regression)
    logits = predict_logits(stratified.model, encoded, readers.tokenizer)
    written = write_scores(out, frame, logits, labels=given.labels)
    if not quiet:
        typer.echo(written.head(5).to_string(index=False))
        typer.echo(f"{len(written)} rows written to {out}.parquet and {out}.csv")


def merge(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base and write a plain transformers model.

    Example: `spafit merge runs/train/all-MiniLM-L6-v2-rte-spafit-scaled-I/seed-0/model --out merged`
    """
    from spafit.errors import OutputError
    from spafit.hub import quiet

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"--out {out} exists and is not empty; a merged model gets a folder of its own. Choose another."
        )
    stratified, readers, _ = _load(folder, offline=offline, device="cpu")
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        stratified.merge().save_pretrained(str(out))
    readers.save_pretrained(str(out))
    typer.echo(f"Merged model written to {out}. Probe it with: spafit-probe --model {out}")


def _load(folder: Path, *, offline: bool, device: str) -> tuple[StratifiedModel, Readers, dict[str, Any]]:
    from spafit.checkpoint import load, read_config
    from spafit.heads import Readers
    from spafit.hub import locate
    from spafit.image_processing import load_image_processor
    from spafit.loading import load_tokenizer
    from spafit.runtime import pick_device

    base = read_config(folder)["base"]
    kind = base.get("kind", "classification")
    stratified = load(folder, offline=offline)
    stratified.model.eval().to(pick_device(device))
    tokenizer = load_tokenizer([locate(str(folder))], required=kind != "images")
    images = load_image_processor(stratified.model, [folder], notes=[]) if kind in _IMAGES else None
    return stratified, Readers(tokenizer, images), base


def _check_kind(folder: Path, verb: str) -> None:
    """Refuse, before anything is loaded, a model of another kind of task than classes or values of texts."""
    from spafit.checkpoint import read_config
    from spafit.errors import UsageError

    kind = read_config(folder)["base"].get("kind", "classification")
    if kind != "classification":
        remedy = "Use spafit generate." if kind in ("text", "answers") else "From Python: spafit.kinds."
        raise UsageError(
            f"spafit {verb} is for classes and values of texts, and {folder} was trained for the kind {kind!r}. "
            + remedy
        )


def _check_pairs(given: TrainData, base: dict[str, Any]) -> None:
    """Refuse single texts for a model of pairs, and pairs for one of single texts."""
    from spafit.errors import UsageError

    if "paired" not in base or base["paired"] == given.paired:
        return
    trained, got = ("pairs of texts", "single texts") if base["paired"] else ("single texts", "pairs of texts")
    remedy = "Name the second column with --text2." if base["paired"] else "Leave --text2 out."
    raise UsageError(f"This model was trained on {trained}, and the data hold {got}. {remedy}")


def _labels(base: dict[str, Any]) -> tuple[str, ...] | None:
    return None if base.get("labels") is None else tuple(base["labels"])


def _outputs(model: Any) -> tuple[str, ...]:
    """Names of the outputs by transformers' configuration, for a model that was saved without names of its classes."""
    return tuple(model.config.id2label[i] for i in range(model.config.num_labels))
