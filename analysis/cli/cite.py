"""``spafit cite``: BibTeX of the methods and data that a run used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cite(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/all-MiniLM-L6-v2.", exists=True)],
) -> None:
    """Print the BibTeX entries of the methods and data that a run used.

    Example: `spafit cite runs/all-MiniLM-L6-v2 > methods.bib`
    """
    from analysis.citations import bibtex
    from probing.results import ProbeResults

    typer.echo(bibtex(ProbeResults.load(run).run))
