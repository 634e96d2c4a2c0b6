"""``spafit train``: a preset or a strata.yaml on a task, over seeds, into stock adapters."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from analysis.cli.invocation import command_line

if TYPE_CHECKING:
    from spafit.data.training import TrainData
    from spafit.fit_result import FitResult
    from spafit.signals import Signal

EXAMPLES = """
Examples:

- `spafit train --task rte --data glue_data --strata spafit-scaled-I`
- `spafit train --model bert-large-cased --task cola --data hub --strata spafit-4-9-II --seeds 3`
- `spafit train --train mine.tsv --text sentence --label class --strata runs/all-MiniLM-L6-v2/strata.yaml`
- `spafit train --model SmolLM2-135M.gguf --train pairs.jsonl --prompt question --answer answer` learns to write answers
- `spafit train --model gpt2 --train book.txt --running-text --max-length 256` learns to continue text
- `spafit train --task rte --data glue_data --watch core.tense,core.voice` shows what each layer forgets, step by step
- `spafit train --task rte --data glue_data --strata-schedule rules.yaml` changes boundaries, ranks and rates by rules
- `spafit train --model bert-large-cased --strata spafit-4-9-I --dry-run` prints what would train, without weights
"""

_MODEL, _DATA, _PLAN, _LOOP, _WATCH, _OUT = "Model", "Data", "Plan", "Training", "Watching", "Output"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def _presets(incomplete: str) -> list[str]:
    from spafit.presets import PRESETS

    return [p for p in PRESETS if p.startswith(incomplete)]


def _tasks(incomplete: str) -> list[str]:
    from spafit.data.glue_tasks import GLUE_TASKS

    return [t for t in GLUE_TASKS if t.startswith(incomplete)]


Model = Annotated[str | None, _option(_MODEL, "--model", "-m", help="Hub id, folder or GGUF file. Default: MiniLM-L6.")]
Revision = Annotated[str | None, _option(_MODEL, "--revision", help="Branch, tag or commit of a hub model.")]
Offline = Annotated[bool, _option(_MODEL, "--offline", help="Never ask the hub.")]
AllowPickle = Annotated[bool, _option(_MODEL, "--allow-pickle", help="Accept pickle weights (read with weights_only).")]
GlueTask = Annotated[
    str | None, _option(_DATA, "--task", help="A GLUE task: cola, sst2, mrpc, …", autocompletion=_tasks)
]
Data = Annotated[
    str | None, _option(_DATA, "--data", help="Folder of GLUE files, or `hub` for the hub's copy. With --task.")
]
Files = Annotated[
    list[str] | None,
    _option(_DATA, "--file", help="SPLIT=NAME for GLUE files of other names, such as train=train.rebuilt.tsv."),
]
SkipBadRows = Annotated[
    bool,
    _option(_DATA, "--skip-bad-rows", help="With --task: leave out malformed lines (the official QQP has some)."),
]
TextColumn = Annotated[str, _option(_DATA, "--text", help="Column of the text.")]
Text2Column = Annotated[str | None, _option(_DATA, "--text2", help="Column of a pair's second text.")]
LabelColumn = Annotated[str, _option(_DATA, "--label", help="Column of the label.")]
NoHeader = Annotated[bool, _option(_DATA, "--no-header", help="The table has no header; columns are numbers from 0.")]
TrainTable = Annotated[Path | None, _option(_DATA, "--train", help="A table (TSV, CSV, JSONL, parquet) to train on.")]
Validation = Annotated[
    Path | None, _option(_DATA, "--validation", help="A table to score on; default: a fifth of --train.")
]
Prompt = Annotated[
    str | None, _option(_DATA, "--prompt", help="Column of what is read; the model learns to write --answer.")
]
Answer = Annotated[str, _option(_DATA, "--answer", help="With --prompt: column of what is to be written.")]
RunningText = Annotated[
    bool,
    _option(_DATA, "--running-text", help="The files of --train … are plain text; the model learns to continue it."),
]
Test = Annotated[Path | None, _option(_DATA, "--test", help="A further table to score on.")]
Regression = Annotated[bool, _option(_DATA, "--regression", help="Labels are numbers to predict.")]
MaxTrain = Annotated[int | None, _option(_DATA, "--max-train", help="Training items kept, stratified.")]
MaxLength = Annotated[int, _option(_DATA, "--max-length", help="Tokens kept of each item.")]
Device = Annotated[str, _option(_LOOP, "--device", help="Torch device; default: the first of cuda, mps, cpu.")]
Quiet = Annotated[bool, _option(_OUT, "--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, _option(_OUT, "--json", help="Print JSON instead of the table.")]
Debug = Annotated[bool, _option(_OUT, "--debug", help="Show the traceback of an error.")]


def train(
    model: Model = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    strata: Annotated[
        str,
        _option(
            _PLAN,
            "--strata",
            "-s",
            help="A preset's name or a strata.yaml. `spafit train --presets` lists presets.",
            autocompletion=_presets,
        ),
    ] = "spafit-scaled-I",
    presets: Annotated[bool, _option(_PLAN, "--presets", help="List the presets and stop.")] = False,
    strata_schedule: Annotated[
        Path | None,
        _option(
            _PLAN,
            "--strata-schedule",
            help="A YAML file of rules by which boundaries, ranks and rates change while training: at a time, on a "
            "plateau, on what --watch measures (`lost:core.tense`), on gradients.",
        ),
    ] = None,
    retain: Annotated[
        list[str] | None,
        _option(
            _PLAN,
            "--retain",
            help="Hold on to knowledge: l2sp:0.01, ewc:1,data=FILE, kl:1,data=FILE or replay:1,data=FILE; repeat for "
            "several. FILE is a table with the column text and, for replay and ewc's labels=given, label.",
        ),
    ] = None,
    task: GlueTask = None,
    data: Data = None,
    file: Files = None,
    skip_bad_rows: SkipBadRows = False,
    train_file: TrainTable = None,
    validation: Validation = None,
    test: Test = None,
    text: TextColumn = "text",
    text2: Text2Column = None,
    label: LabelColumn = "label",
    regression: Regression = False,
    no_header: NoHeader = False,
    prompt: Prompt = None,
    answer: Answer = "answer",
    running_text: RunningText = False,
    metric: Annotated[
        list[str] | None, _option(_DATA, "--metric", help="What to score with; repeat for several.")
    ] = None,
    max_train: MaxTrain = None,
    max_length: MaxLength = 128,
    seeds: Annotated[int, _option(_LOOP, "--seeds", min=1, help="How many seeds.")] = 1,
    epochs: Annotated[float, _option(_LOOP, "--epochs", help="Passes over the training items.")] = 3.0,
    batch_size: Annotated[int, _option(_LOOP, "--batch-size", help="Items per step and process.")] = 16,
    accumulate: Annotated[int, _option(_LOOP, "--accumulate", help="Steps per move of the optimiser.")] = 1,
    learning_rate: Annotated[
        float | None, _option(_LOOP, "--lr", help="Peak learning rate. Default: by the plan's method.")
    ] = None,
    weight_decay: Annotated[float, _option(_LOOP, "--weight-decay", help="AdamW's decay of matrices.")] = 0.01,
    warmup: Annotated[float, _option(_LOOP, "--warmup", help="Share of the steps with a rising rate.")] = 0.06,
    schedule: Annotated[str, _option(_LOOP, "--schedule", help="linear, cosine or constant.")] = "linear",
    select_share: Annotated[
        float,
        _option(
            _LOOP,
            "--select-share",
            help="Share of the training items held out to choose the checkpoint by; 0 takes the last one.",
        ),
    ] = 0.1,
    patience: Annotated[
        int, _option(_LOOP, "--patience", help="Stop after so many evaluations without a gain; 0 never.")
    ] = 0,
    class_weights: Annotated[
        bool, _option(_LOOP, "--class-weights", help="Weigh classes by inverse frequency in the loss.")
    ] = False,
    precision: Annotated[str, _option(_LOOP, "--precision", help="float32, bfloat16 or auto.")] = "auto",
    prefix_cache: Annotated[
        str, _option(_LOOP, "--prefix-cache", help="Cache the frozen blocks' outputs: auto, on or off.")
    ] = "auto",
    prefix_dropout: Annotated[
        bool, _option(_LOOP, "--prefix-dropout", help="Leave dropout on in the frozen prefix; excludes the cache.")
    ] = False,
    checkpoint_activations: Annotated[
        bool,
        _option(_LOOP, "--checkpoint-activations", help="Recompute trained blocks' activations to save memory."),
    ] = False,
    save_steps: Annotated[
        int | None, _option(_LOOP, "--save-steps", help="A checkpoint every so many steps. Default: each epoch.")
    ] = None,
    interpolate: Annotated[
        str | None,
        _option(_PLAN, "--interpolate", help="Shares of the way from start to trained that are scored: 0,0.5,1."),
    ] = None,
    watch: Annotated[
        str | None,
        _option(
            _WATCH,
            "--watch",
            help="Probe these tasks while training, on about 300 items each, and draw what each hidden state forgets: "
            "core.tense,core.voice. `spafit tasks` lists tasks. It changes no weight.",
        ),
    ] = None,
    watch_every: Annotated[
        int | None,
        _option(_WATCH, "--watch-every", help="Steps between two looks, at least. Default: a fiftieth of the steps."),
    ] = None,
    watch_share: Annotated[
        float,
        _option(
            _WATCH,
            "--watch-share",
            help="Seconds that watching may take, as a share of training; the interval is widened to keep it.",
        ),
    ] = 0.10,
    workers: Annotated[int, _option(_LOOP, "--workers", help="Processes that prepare batches.")] = 0,
    track: Annotated[
        list[str] | None, _option(_LOOP, "--track", help="tensorboard, trackio, wandb or mlflow; repeat for several.")
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, _option(_OUT, "--out", "-o", help="Default: `runs/train/<model>-<task>-<plan>`.")
    ] = None,
    resume: Annotated[
        bool, _option(_OUT, "--resume/--no-resume", help="Go on from finished seeds and checkpoints, or start over.")
    ] = True,
    push_to_hub: Annotated[
        str | None, _option(_OUT, "--push-to-hub", help="Push the first seed's model to this hub repository.")
    ] = None,
    dry_run: Annotated[
        bool, _option(_OUT, "--dry-run", help="Print what would train, without loading weights, and stop.")
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a plan on a task, once per seed; write stock adapters, scores, learning curves and a table."""
    from spafit.errors import UsageError

    if presets:
        from spafit.presets import PRESETS

        width = max(len(name) for name in PRESETS)
        typer.echo("\n".join(f"{name:{width}}  {what}" for name, what in PRESETS.items()))
        return
    if task is not None and train_file is not None:
        raise UsageError("--task and --train name the data twice; give one of them.")
    if task is not None and metric:
        raise UsageError("--metric is for tables: a GLUE task has metrics of its own. Leave it out.")
    if dry_run:
        labels = _number_of_labels(
            task, train_file, text=text, text2=text2, label=label, regression=regression, header=not no_header
        )  # fmt: skip
        typer.echo(describe_without_weights(model, strata, labels=labels, revision=revision, offline=offline))
        return
    from spafit.settings import TrainSettings

    settings = TrainSettings(
        epochs=epochs, batch_size=batch_size, accumulate=accumulate, learning_rate=learning_rate,
        weight_decay=weight_decay, warmup=warmup, schedule=_choice("--schedule", schedule, "schedule"),
        max_length=max_length, max_train=max_train, select_share=select_share, patience=patience,
        class_weights=class_weights, precision=_choice("--precision", precision, "precision"),
        prefix_cache=_choice("--prefix-cache", prefix_cache, "prefix_cache"), prefix_dropout=prefix_dropout,
        checkpoint_activations=checkpoint_activations, save_steps=save_steps, workers=workers,
        interpolate=_shares(interpolate), track=tuple(track or ()),
    )  # fmt: skip
    plan = load_plan(strata)
    rules = None
    if strata_schedule is not None:
        from spafit.scheduling import Schedule

        rules = Schedule.load(strata_schedule)
    if watch is None and (watch_every is not None or watch_share != 0.10):
        raise UsageError("--watch-every and --watch-share say how --watch looks. Name tasks with --watch.")
    signals = () if watch is None else (
        _watched(watch, watch_every, watch_share, model=model, revision=revision, offline=offline,
                 allow_pickle=allow_pickle),
    )  # fmt: skip
    given = read_training_data(
        task, data, file, {"train": train_file, "validation": validation, "test": test}, text=text, text2=text2,
        label=label, regression=regression, header=not no_header, metrics=tuple(metric) if metric else None,
        offline=offline, skip_bad_rows=skip_bad_rows, prompt=prompt, answer=answer, running_text=running_text,
    )  # fmt: skip
    from spafit.models import DEFAULT_NAME
    from spafit.retain import parse_remedy
    from spafit.training import fit

    remedies = [parse_remedy(r) for r in retain or ()]
    name = " + ".join(
        [strata if isinstance(plan, str) else Path(strata).stem, *(r.name for r in remedies),
         *([] if strata_schedule is None else [strata_schedule.stem])]
    )  # fmt: skip
    folder = out or Path("runs") / "train" / "-".join(
        [Path(model or DEFAULT_NAME).name, given.name, name.replace(":", "-").replace(" + ", "-")]
    )
    try:
        result = fit(
            model, plan, data=given, settings=settings, seeds=tuple(range(seeds)), out=folder,
            remedies=remedies, signals=signals, schedule=rules, method=name, device=device, revision=revision,
            offline=offline, allow_pickle=allow_pickle, resume=resume, command=command_line(), quiet=quiet,
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = any(folder.glob("seed-*/checkpoint-*")) or any(folder.glob("seed-*/model"))
        what = "What is finished, and the last checkpoint, are kept" if kept else "There was no checkpoint yet"
        sys.stderr.write(f"\nInterrupted. {what}; the same command goes on.\n")
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one speaks
        return
    seen = [folder / "signals.csv", _draw_trajectory(result)] if signals and result.signals is not None else []
    if push_to_hub:
        from spafit.hub import push_folder

        push_folder(result.model_folder(), push_to_hub)
    if json_output:
        import json

        from spafit import io

        typer.echo(json.dumps(io.plain({"run": result.run, "runs": result.runs.to_dict("records")}), indent=1))
        return
    typer.echo(f"\n{result.to_markdown()}\n")
    if result.interpolation is not None:
        typer.echo(f"{result.interpolation_to_markdown()}\n")
    for change in result.run["changes"]:
        typer.echo(
            f"Change:  seed {change['seed']}, step {change['step']}: {change['what']} {change['before']} → "
            f"{change['after']} ({change['reason']})"
        )
    for note in result.run["notes"]:
        typer.echo(f"Note:    {note}")
    if signals and not seen:
        typer.echo("Note:    nothing was watched: the run had finished before. Start over (--no-resume) to watch it.")
    typer.echo(
        "Written:\n" + "\n".join(f"  {p}" for p in (folder / "results.md", folder / "learning_curve.png", *seen,
                                                     *(result.model_folder(s) for s in result.seeds)))
    )  # fmt: skip


def _watched(tasks: str, every: int | None, share: float, *, model: str | None, **found: Any) -> Signal:
    """The signal that --watch asks for."""
    from analysis.trajectory import forgetting_signal
    from probing.registry import split_references
    from spafit.heads import tokenizer_of

    return forgetting_signal(tokenizer_of(model, **found), split_references(tasks), every=every, share=share)


def _draw_trajectory(result: FitResult) -> Path:
    """Write the figure of what was forgotten into the run's folder."""
    from analysis.trajectory import trajectory_figure
    from spafit.plotting import save_figure

    return save_figure(trajectory_figure(result), result.folder / "trajectory.png")


def load_plan(strata: str) -> Any:
    """A plan from a file, or the name of a preset, checked as far as a name can be."""
    from spafit.errors import ConfigError
    from spafit.strata import StrataConfig

    if strata.endswith((".yaml", ".yml", ".json")) or Path(strata).is_file():
        if not Path(strata).is_file():
            raise ConfigError(f"--strata {strata}: no such file. Give a preset's name or a strata.yaml.")
        return StrataConfig.load(strata)
    return strata


def read_training_data(
    task: str | None,
    source: str | None,
    files: list[str] | None,
    tables: dict[str, Path | None],
    *,
    text: str,
    text2: str | None,
    label: str | None,
    regression: bool,
    header: bool,
    metrics: tuple[str, ...] | None,
    offline: bool,
    skip_bad_rows: bool = False,
    labels: tuple[str, ...] | None = None,
    prompt: str | None = None,
    answer: str = "answer",
    running_text: bool = False,
) -> TrainData:
    """The data that the options name: a GLUE task, or tables."""
    from spafit.data.training import glue_data, table_data
    from spafit.errors import UsageError

    if task is not None:
        if source is None:
            raise UsageError("--task needs --data: a folder of GLUE files, or hub.")
        names = dict(f.split("=", 1) for f in files or () if "=" in f)
        if len(names) != len(files or ()):
            raise UsageError("--file must be SPLIT=NAME, such as train=train.rebuilt.tsv.")
        on_bad_rows: Literal["error", "skip"] = "skip" if skip_bad_rows else "error"
        return glue_data(task, source, files=names or None, on_bad_rows=on_bad_rows, offline=offline)
    given = {split: path for split, path in tables.items() if path is not None}
    if not given:
        raise UsageError(f"No data: give --task with --data, or a table with --{next(iter(tables))}.")
    name = next(iter(given.values())).stem
    if running_text or prompt is not None:
        from spafit.data.writing import answers_data, text_data

        if regression or (running_text and prompt is not None):
            raise UsageError("--running-text, --prompt and --regression are three kinds of task; give one of them.")
        if running_text:
            return text_data(given, name=name)
        assert prompt is not None
        return answers_data(given, prompt=prompt, answer=answer, header=header, name=name)
    return table_data(
        given, text=text, text2=text2, label=label, regression=regression, header=header, metrics=metrics,
        labels=labels, name=name,
    )  # fmt: skip


def describe_without_weights(
    model: str | None, strata: str, *, labels: int, revision: str | None, offline: bool
) -> str:
    """What a plan would train, from the model's configuration alone."""
    from spafit.adapt import apply_strata, plan_for
    from spafit.heads import build_without_weights

    empty, name = build_without_weights(model, labels=labels, revision=revision, offline=offline)
    plan = plan_for(empty, load_plan(strata), model_id=name)
    return f"{name}, {labels} label{'s' * (labels != 1)}\n{apply_strata(empty, plan).describe()}"


def _number_of_labels(
    task: str | None, table: Path | None, *, text: str, text2: str | None, label: str, regression: bool, header: bool
) -> int:
    """Outputs of the head: of a GLUE task by its name, of a table by reading it, and 2 where no data are named."""
    if task is None:
        if table is None:
            return 1 if regression else 2
        from spafit.data.training import table_data

        data = table_data({"train": table}, text=text, text2=text2, label=label, regression=regression, header=header)
        return 1 if data.labels is None else len(data.labels)
    from spafit.data.glue_tasks import GLUE_TASKS
    from spafit.errors import UsageError, did_you_mean

    if task not in GLUE_TASKS:
        raise UsageError(f"GLUE has no task {task!r}.{did_you_mean(task, GLUE_TASKS)}")
    known = GLUE_TASKS[task]
    return 1 if known.regression else len(known.labels or ())


def _shares(given: str | None) -> tuple[float, ...]:
    from spafit.errors import UsageError

    try:
        return tuple(float(share) for share in given.split(",")) if given else ()
    except ValueError:
        raise UsageError(f"--interpolate {given!r} must be numbers from 0 to 1 with commas, such as 0,0.5,1.") from None


def _choice(option: str, value: str, name: str) -> Any:
    from typing import get_args, get_type_hints

    from spafit.errors import UsageError, did_you_mean
    from spafit.settings import TrainSettings

    allowed = get_args(get_type_hints(TrainSettings)[name])
    assert name in {f.name for f in dataclasses.fields(TrainSettings)}
    if value not in allowed:
        raise UsageError(
            f"{option} {value!r} is not known. Allowed: {', '.join(allowed)}.{did_you_mean(value, allowed)}"
        )
    return value
