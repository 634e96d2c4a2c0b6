"""``spafit summarize``: layer summaries of published curves and mixing weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import pandas as pd


def summarize(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV with the columns task, layer and a score; or layer and one column per task; or task, layer and "
            "softmax_weight. Columns of text (model, pooling) tell curves apart.",
        ),
    ],
    scores: Annotated[
        Literal["cumulative", "single"] | None,
        typer.Option(
            help="What scores are of: layers 0 to l together, or layer l alone. By default cumulative in a file with "
            "the column task, single in one with a column per task."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Summarise published layer curves: best and expected layer, centre of gravity, and where they say nothing.

    Example: `spafit summarize cumulative_f1.csv`
    """
    from probing.published import read_published, summarize_published

    table = summarize_published(read_published(file, scores=scores))
    if json:
        import json as encoder

        from spafit import io

        records = table.to_dict("records")
        typer.echo(encoder.dumps(io.plain(records), indent=1, ensure_ascii=False))
        return
    kind = table["kind"].iloc[0]
    typer.echo(
        {
            "cumulative": "Scores of layers 0 to l together (layer 0 is the embeddings); --scores single reads them "
            "otherwise.",
            "single": "Scores of single layers; --scores cumulative reads them otherwise.",
            "weights": "Mixing weights: centre of gravity in layers, K(s) = KL(s ‖ uniform) and entropy in bits.",
        }[kind]
    )
    for line in _lines(table):
        typer.echo(line)


def _lines(table: pd.DataFrame) -> list[str]:
    """One line per curve, one column per statistic, notes at the end."""
    keys = [c for c in table.columns if c not in ("kind", "statistic", "value", "note")]
    statistics = list(dict.fromkeys(table["statistic"]))
    cells = [[*keys, *statistics, "note"]]
    for key, rows in table.groupby(keys, sort=False):
        values = dict(zip(rows["statistic"], rows["value"], strict=True))
        shown = [_number(name, values[name]) for name in statistics]
        notes = dict.fromkeys(note for note in rows["note"] if note)
        cells.append([*map(str, key), *shown, "; ".join(notes)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    left = {*range(len(keys)), len(cells[0]) - 1}
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _number(statistic: str, value: float) -> str:
    if value != value:
        return "—"
    return f"{value:.0f}" if statistic in ("best", "first_within_noise") else f"{value:.2f}"
