"""``spafit compare``: what training changed, layer by layer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli.invocation import command_line
from analysis.cli.probe import _references
from analysis.cli.train import _tasks, read_training_data

if TYPE_CHECKING:
    from spafit.data.training import TrainData

EXAMPLES = """
Examples:

- `spafit compare default runs/train/all-MiniLM-L6-v2-cola-lora/seed-0/model`
- `spafit compare bert-large-cased full/seed-0/model lora/seed-0/model --labels full,lora --device cuda`
- `spafit compare runs/before runs/after` compares two folders of spafit-probe
- `spafit compare default stage1 stage2 --tasks conllu:UD_English-EWT#upos,deprel --seeds 1`
- `spafit compare default tuned --task sst2 --data glue_data --erase core.tense` adds cause and use in the classifier
- `spafit compare default stage1 stage2 --sequence core.tense,core.voice` for models trained one after another
"""

_LEGEND = (
    "before, after: accuracy of the probe fitted before training and of one fitted after it, at the hidden\n"
    "state where the task could be read best before. lost, moved, re-encoded: differences of accuracy less the\n"
    "control task's, in points; + is a loss. *: p < .05 over hidden states.\n"
)
_DATA, _TASK, _RUN, _OUT = "Tasks", "Cause and use", "Running", "Output"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def compare(
    before: Annotated[
        str, typer.Argument(help="Model before training (hub id, folder, GGUF, `default`), or a probing run's folder.")
    ],
    after: Annotated[list[str], typer.Argument(help="Models after training, such as adapters, or runs' folders.")],
    labels: Annotated[str | None, _option(_OUT, "--labels", help="Names of the models after, between commas.")] = None,
    tasks: Annotated[
        list[str] | None, _option(_DATA, "--tasks", "-t", help="As for spafit-probe. Default: core.")
    ] = None,
    controls: Annotated[
        str,
        _option(
            _DATA,
            "--controls",
            help="word-type is subtracted; random-encoder gives the share forgotten (an encoder per seed); or none.",
        ),
    ] = "word-type,random-encoder",
    max_train: Annotated[int | None, _option(_DATA, "--max-train", help="Training items per seed.")] = None,
    limit: Annotated[
        int | None, _option(_DATA, "--limit", help="First N items of each split: a quick look only.")
    ] = None,
    seeds: Annotated[int, _option(_RUN, "--seeds", min=1, help="How many seeds.")] = 3,
    pooling: Annotated[
        str, _option(_RUN, "--pooling", help="mean, first, last or max; several between commas.")
    ] = "mean",
    stack: Annotated[
        str | None, _option(_RUN, "--stack", help="Which block stack; both of an encoder-decoder: encoder,decoder.")
    ] = None,
    drift: Annotated[bool, _option(_RUN, "--drift/--no-drift", help="Measure drift of states and weights.")] = True,
    text: Annotated[
        Path | None,
        _option(_DATA, "--text", help="Running text: perplexity and KL, with the original head on the tuned body."),
    ] = None,
    blimp: Annotated[Path | None, _option(_DATA, "--blimp", help="Folder of BLiMP: minimal pairs by field.")] = None,
    blimp_pairs: Annotated[
        int, _option(_DATA, "--blimp-pairs", min=0, help="Pairs of each paradigm; 0 takes all.")
    ] = 100,
    refit_on: Annotated[
        Path | None, _option(_DATA, "--refit-on", help="Other running text, to re-fit the language-model head on.")
    ] = None,
    lens: Annotated[
        bool,
        _option(
            _RUN, "--lens", help="KL by hidden state through an affine lens: fitted on --refit-on, read on --text."
        ),
    ] = False,
    task: Annotated[
        str | None,
        _option(
            _TASK,
            "--task",
            autocompletion=_tasks,
            help="GLUE task that the models after were trained on; with --data, measures cause and use in them.",
        ),
    ] = None,
    data: Annotated[
        str | None, _option(_TASK, "--data", help="Folder of GLUE files, or `hub` for the hub's copy.")
    ] = None,
    file: Annotated[
        list[str] | None, _option(_TASK, "--file", help="SPLIT=NAME for GLUE files of other names.")
    ] = None,
    skip_bad_rows: Annotated[bool, _option(_TASK, "--skip-bad-rows", help="Leave out malformed lines.")] = False,
    items: Annotated[
        str | None,
        _option(
            _TASK,
            "--items",
            help="Instead of --task: a table of held-out items, FILE[,text=COLUMN,text2=COLUMN,label=COLUMN].",
        ),
    ] = None,
    cause_items: Annotated[
        int, _option(_TASK, "--cause-items", min=0, help="Items that interventions on blocks are scored on; 0: none.")
    ] = 200,
    use_items: Annotated[
        int, _option(_TASK, "--use-items", min=0, help="Items whose conductance is computed; 0: none.")
    ] = 24,
    erase: Annotated[
        str | None,
        _option(_TASK, "--erase", help="Probing tasks whose labels are erased at every hidden state, between commas."),
    ] = None,
    shapley: Annotated[
        int | None,
        _option(
            _TASK,
            "--shapley",
            min=0,
            help="Random orders of blocks for Shapley values. Default: exact up to 8 blocks, none above; 0: none.",
        ),
    ] = None,
    sequence: Annotated[
        str | None,
        _option(
            _DATA,
            "--sequence",
            help="Models trained one after another: the probing task that each stage trained, or -, between commas.",
        ),
    ] = None,
    n_boot: Annotated[int, _option(_RUN, "--n-boot", help="Bootstrap replicates behind the intervals.")] = 1000,
    device: Annotated[
        str, _option(_RUN, "--device", help="Torch device; default: the first of cuda, mps, cpu.")
    ] = "auto",
    dtype: Annotated[str, _option(_RUN, "--dtype", help="Precision: float32, bfloat16, float16.")] = "float32",
    cache_dir: Annotated[Path | None, _option(_RUN, "--cache-dir", help="Where states are cached.")] = None,
    offline: Annotated[bool, _option(_RUN, "--offline", help="Never ask the hub.")] = False,
    allow_pickle: Annotated[bool, _option(_RUN, "--allow-pickle", help="Accept pickle weights.")] = False,
    out: Annotated[Path, _option(_OUT, "--out", "-o", help="Output folder.")] = Path("runs/compare"),
    json_output: Annotated[bool, _option(_OUT, "--json", help="Print JSON instead of the table.")] = False,
    quiet: Annotated[bool, _option(_OUT, "--quiet", "-q", help="No progress on stderr.")] = False,
    debug: Annotated[bool, _option(_OUT, "--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare models before and after training: what each hidden state lost, moved or re-encoded, and its drift.

    Hidden states below the first changed block are neither computed nor probed again. Writes tables and a page.
    """
    from analysis.comparing import compare as run_compare
    from analysis.comparison_report import write_comparison_report
    from analysis.comparison_rows import cause_rows, erasure_rows, markdown, sequence_rows, use_rows

    given = _items(task, data, file, items, after, skip_bad_rows=skip_bad_rows, offline=offline)
    names = _references(tasks) or ("core",)
    chosen = () if controls.strip() == "none" else tuple(c.strip() for c in controls.split(","))
    try:
        found = run_compare(
            None if before == "default" else before, [None if a == "default" else a for a in after], tasks=names,
            labels=_listed(labels), controls=chosen, seeds=seeds,
            max_train=max_train, limit=limit, pooling=[p.strip() for p in pooling.split(",")], stack=stack,
            n_boot=n_boot, drift=drift, text=text, blimp=blimp, blimp_pairs=blimp_pairs or None,
            refit_on=refit_on, lens=lens, data=given, cause_items=cause_items, use_items=use_items,
            erase=_listed(erase) or (), shapley=shapley, sequence=_listed(sequence), device=device, dtype=dtype,
            cache_dir=cache_dir, offline=offline, allow_pickle=allow_pickle, out=out, quiet=quiet,
            command=command_line(),
        )  # fmt: skip
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What was finished is kept; the same command goes on.\n")
        raise typer.Exit(130) from None
    paths = write_comparison_report(found)
    if json_output:
        import json

        from spafit import io

        content = {"run": found.run, "summary": found.summary().to_dict("records"), "paths": [str(p) for p in paths]}
        typer.echo(json.dumps(io.plain(content), indent=1))
        return
    typer.echo(f"\n{found.to_markdown()}\n")
    typer.echo(_LEGEND)
    for title, rows in (
        ("Cause: points of the trained task's score lost when a block is …", cause_rows(found)),
        ("Erased labels: points of the trained task's score lost", erasure_rows(found)),
        ("Use: conductance, in logits", use_rows(found)),
        ("Sequence: best accuracy over hidden states, %; *: trained in this stage", sequence_rows(found)),
    ):
        if rows:
            typer.echo(f"{title}\n\n{markdown(rows)}\n")
    for paragraph in found.paragraphs():
        typer.echo(f"{paragraph}\n")
    typer.echo("Written:\n" + "\n".join(f"  {p}" for p in (*paths[:2], out / "forgetting.csv", out / "run.json")))


def _listed(text: str | None) -> list[str] | None:
    """Names between commas."""
    return None if text is None else [n.strip() for n in text.split(",")]


def _items(
    task: str | None,
    data: str | None,
    file: list[str] | None,
    items: str | None,
    after: list[str],
    *,
    skip_bad_rows: bool,
    offline: bool,
) -> TrainData | None:
    """Labelled items of the task that the models after were trained on; None if none are named."""
    from spafit.errors import UsageError, did_you_mean

    if task is not None and items is not None:
        raise UsageError("--task and --items name the trained task twice; give one of them.")
    if task is None and items is None:
        if data is not None or file:
            raise UsageError("--data and --file belong to --task, the task that the models after were trained on.")
        return None
    if items is None:
        return read_training_data(
            task, data, file, {}, text="text", text2=None, label="label", regression=False, header=True, metrics=None,
            offline=offline, skip_bad_rows=skip_bad_rows,
        )  # fmt: skip
    from analysis.task_models import known_classes

    path, *pairs = items.split(",")
    columns = {"text": "text", "label": "label"}
    for pair in pairs:
        name, _, column = pair.partition("=")
        if name not in ("text", "text2", "label") or not column:
            hint = did_you_mean(name, ("text", "text2", "label"))
            raise UsageError(f"--items takes text=, text2= and label= after the file; got {pair!r}.{hint}")
        columns[name] = column
    labels, regression = known_classes([None if a == "default" else a for a in after], offline=offline)
    return read_training_data(
        None, None, None, {"items": Path(path)}, text=columns["text"], text2=columns.get("text2"),
        label=columns["label"], regression=regression, header=True, metrics=None, offline=offline, labels=labels,
    )  # fmt: skip
