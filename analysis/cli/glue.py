"""``spafit glue``: tasks × methods × seeds of a plan file into the benchmark's table and its submission files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.cli.invocation import command_line
from analysis.cli.train import AllowPickle, Debug, Device, Json, Offline, Quiet

if TYPE_CHECKING:
    from spafit.glue_plan import GluePlan

EXAMPLES = """
Examples:

- `spafit glue --list`
- `spafit glue bert-large-cased --dry-run`
- `spafit glue plan.yaml --data glue_data --tasks cola,rte --seeds 3`
"""


def _plans(incomplete: str) -> list[str]:
    from spafit.glue_plan import shipped_plans

    return [p for p in shipped_plans() if p.startswith(incomplete)]


def glue(
    plan: Annotated[
        str | None, typer.Argument(help="A plan file, or the name of a shipped plan.", autocompletion=_plans)
    ] = None,
    list_plans: Annotated[bool, typer.Option("--list", help="List the shipped plans and stop.")] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="Folder of GLUE files, or `hub`. Default: the plan's own.")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Only these of the plan's, between commas.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Only these of the plan's, between commas.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many seeds. Default: the plan's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Default: runs/glue/<plan>. Tables there are of the last call's cells."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from finished cells, or train them again.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what would train, without weights, and stop.")
    ] = False,
    device: Device = "auto",
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    json_output: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a benchmark plan: one row per method, a column per GLUE task, the average, and test-set predictions.

    Exit status 3 when a cell failed; the others are finished all the same, and the same command goes on from there.
    """
    from spafit.errors import UsageError

    if list_plans:
        from spafit.glue_plan import GluePlan, shipped_plans

        for name in shipped_plans():
            typer.echo(f"{name}: {GluePlan.load(name).description}")
        return
    if plan is None:
        raise UsageError("Name a plan file or a shipped plan; spafit glue --list shows those.")
    from spafit.glue_plan import GluePlan

    whole = GluePlan.load(plan)
    chosen = whole.narrowed(tasks=_names("--tasks", tasks), methods=_names("--methods", methods), seeds=seeds)
    if dry_run:
        typer.echo(_describe(chosen, offline=offline))
        return
    from spafit.glue_runs import run_glue

    folder = out or Path("runs") / "glue" / whole.name
    try:
        result = run_glue(
            chosen, data=data, out=folder, device=device, offline=offline, allow_pickle=allow_pickle, resume=resume,
            command=command_line(), quiet=quiet,
        )  # fmt: skip
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. Finished cells and the last checkpoint are kept; the same command goes on.\n")
        raise typer.Exit(130) from None
    if json_output:
        import json

        from spafit import io

        tables = {"results": result.table.to_dict("records"), "runs": result.runs.to_dict("records")}
        typer.echo(json.dumps(io.plain({"run": result.run, **tables}), indent=1))
    else:
        typer.echo(f"\n{result.to_markdown()}\n")
        names = ("results.md", "results.csv", "runs.parquet", "runs.csv", "run.json")
        typer.echo("Written:\n" + "\n".join(f"  {folder / n}" for n in names))
    if result.failures:
        raise typer.Exit(3)


def _names(option: str, given: str | None) -> list[str] | None:
    from spafit.errors import UsageError

    if given is None:
        return None
    names = [n.strip() for n in given.split(",") if n.strip()]
    if not names:
        raise UsageError(f"{option} names nothing. Give names between commas, or leave it out for all.")
    return names


def _describe(plan: GluePlan, *, offline: bool) -> str:
    """The cells with their settings, and what each method trains where the model's configuration can be had."""
    from spafit.errors import ModelError
    from spafit.glue_runs import trainable_by_method

    seeds = len(plan.seeds)
    lines = [
        f"{plan.name}: {plan.model or 'the built-in model'}, {len(plan.tasks)} tasks × {len(plan.methods)} methods × "
        f"{seeds} seeds = {len(plan.tasks) * len(plan.methods) * seeds} runs",
        "",
        "| task | method | seeds | epochs | batch | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for task in plan.tasks:
        for method in plan.methods:
            got = plan.settings_of(method, task)
            rate = "the method's default" if got.learning_rate is None else f"{got.learning_rate:g}"
            lines.append(
                f"| {task} | {method.name} | {seeds} | {got.epochs:g} | {got.batch_size * got.accumulate} | {rate} |"
            )
    try:
        counts = trainable_by_method(plan, offline=offline)
    except ModelError as error:
        return "\n".join([*lines, "", f"Trainable parameters are not counted: {error}"])
    lines += ["", "| method | outputs | trained parameters | share |", "|---|---|---|---|"]
    for row in counts.to_dict("records"):
        if row["problem"]:
            lines.append(f"| {row['method']} | {row['outputs']} | does not fit: {row['problem']} | – |")
        else:
            share = f"{100 * row['trainable'] / row['total']:.2f} %"
            lines.append(f"| {row['method']} | {row['outputs']} | {row['trainable']:,} | {share} |")
    return "\n".join(lines)
