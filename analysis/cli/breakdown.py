"""``spafit breakdown``: layer curves of a run by genre, length, distance or any other column of its items."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Examples:

- `spafit breakdown runs/all-MiniLM-L6-v2 --by length`
- `spafit breakdown runs/ewt --by genre,length,distance` for tasks of a treebank
"""


def breakdown(
    run: Annotated[Path, typer.Argument(help="Folder of a probing run.", exists=True, file_okay=False)],
    by: Annotated[
        str, typer.Option(help="Columns of the test items, by commas; length (words of the text) is always there.")
    ],
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, by commas.")] = None,
    least_items: Annotated[int, typer.Option(min=2, help="Parts with fewer test items are left out.")] = 50,
    n_boot: Annotated[int, typer.Option(min=100, help="Bootstrap replicates.")] = 1000,
) -> None:
    """Split a run's test items by a column and show where each task's layers lie in every part."""
    from analysis.breakdown import breakdown as split
    from probing.results import ProbeResults

    columns = [c.strip() for c in by.split(",") if c.strip()]
    names = [t.strip() for t in tasks.split(",") if t.strip()] if tasks else None
    found = split(ProbeResults.load(run), columns, tasks=names, least_items=least_items, n_boot=n_boot)
    typer.echo(found.to_markdown())
    typer.echo("Written:\n" + "\n".join(f"  {p}" for p in found.save(run)))
