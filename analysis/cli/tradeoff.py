"""``spafit tradeoff``: task score against forgetting of the models in one or more comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from analysis.cli.invocation import command_line

EXAMPLES = """
Example:

- `spafit compare default runs/lora/seed-0/model runs/lora-kl/seed-0/model --out runs/compared`
- `spafit tradeoff runs/compared --tasks core.agent,core.voice,core.denied`
"""


def tradeoff(
    comparisons: Annotated[
        list[Path], typer.Argument(help="Folders of spafit compare, all with the same model before.")
    ],
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", "-t", help="Tasks that forgetting is the mean of, between commas. Default: all."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Reported split of the training.")] = None,
    metric: Annotated[str, typer.Option("--metric", help="Metric of the training.")] = "headline",
    control: Annotated[
        Literal["word-type", "none"], typer.Option("--control", help="Subtract the control task where there is one.")
    ] = "word-type",
    n_boot: Annotated[int, typer.Option("--n-boot", min=2, help="Bootstrap draws.")] = 2000,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("runs/tradeoff"),
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Set trained models' task scores against what they forgot: the Pareto front, and how surely each is on it.

    The score of each compared model is read beside it, where `spafit train` wrote it; seeds of one training are one
    method. Writes a table and a figure.
    """
    from analysis.tradeoff_displays import plot_tradeoff
    from analysis.tradeoff_folders import tradeoff as run_tradeoff
    from analysis.tradeoffs import tradeoff_markdown
    from spafit import io, plotting
    from spafit.runtime import provenance

    chosen = None if tasks is None else [t.strip() for t in tasks.split(",") if t.strip()]
    table = run_tradeoff(comparisons, tasks=chosen, split=split, metric=metric, control=control, n_boot=n_boot)
    io.write_table(out / "tradeoff", table)
    io.write_json(
        out / "run.json",
        {
            "schema_version": io.SCHEMA_VERSION, "command": command_line(),
            "comparisons": [str(c) for c in comparisons], "tasks": chosen, "split": split, "metric": metric,
            "control": control, "n_boot": n_boot, **provenance(),
        },
    )  # fmt: skip
    written = [out / "tradeoff.csv"]
    if table["score"].notna().any():
        with plotting.style():
            figure = plot_tradeoff(table).get_figure(root=True)
        assert figure is not None
        written.append(plotting.save_figure(figure, out / "tradeoff.png"))
    if json_output:
        import json

        typer.echo(
            json.dumps(io.plain({"table": table.to_dict("records"), "paths": [str(p) for p in written]}), indent=1)
        )
        return
    typer.echo(f"{tradeoff_markdown(table)}\n\nWritten:\n" + "\n".join(f"  {p}" for p in written))
