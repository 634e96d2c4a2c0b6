"""``spafit report``: write the verdict, strata, figures and page of a run's folder again, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/all-MiniLM-L6-v2.", exists=True)],
) -> None:
    """Write verdict, strata, figures and the report page of a run again, from the files in its folder.

    Example: `spafit report runs/all-MiniLM-L6-v2`
    """
    from analysis.interpretation import interpret
    from probing.results import ProbeResults

    for path in interpret(ProbeResults.load(run), rewrite=True).paths:
        typer.echo(path)
