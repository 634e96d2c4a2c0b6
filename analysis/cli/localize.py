"""``spafit localize``: test a hypothesis about layers on runs and published curves, one verdict for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Examples:

- `spafit localize runs/all-MiniLM-L6-v2` gives a verdict for every pooling and probe of the run
- `spafit localize runs/a runs/b --hypothesis mine.yaml --out verdicts` sets several models side by side
- `spafit localize runs/ewt --by genre` shows where the claim holds and where it fails
- `spafit localize senteval.csv` tests published single-layer scores
- `spafit localize --print-hypothesis > mine.yaml` writes the shipped claim, to edit
"""


def localize(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of probing runs, or CSV files of published single-layer scores."),
    ] = None,
    hypothesis: Annotated[Path | None, typer.Option(help="YAML file of the claim; the shipped one by default.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Column of the items, such as genre; each part gets a verdict, too.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for localization.md, .csv, .parquet and .json.")] = None,
    print_hypothesis: Annotated[bool, typer.Option("--print-hypothesis", help="Print the shipped claim.")] = False,
) -> None:
    """Test whether levels of knowledge emerge in the claimed order of depth: supported, refuted or inconclusive."""
    from analysis.hypothesis import read_hypothesis
    from analysis.localizing import localize as test

    if print_hypothesis:
        from importlib.resources import files

        typer.echo((files("analysis") / "templates" / "hypothesis.yaml").read_text(encoding="utf-8"), nl=False)
        return
    found = test(list(sources or []), None if hypothesis is None else read_hypothesis(hypothesis), by=by)
    typer.echo(found.to_markdown())
    if out is not None:
        typer.echo("Written:\n" + "\n".join(f"  {p}" for p in found.save(out)))
