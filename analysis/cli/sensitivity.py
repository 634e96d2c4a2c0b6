"""``spafit sensitivity``: how far a run's layers move with pooling, probe, seed and number of training items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from probing.results import ProbeResults

EXAMPLES = """
Examples:

- `spafit sensitivity runs/all-MiniLM-L6-v2` compares the poolings, probes and seeds that the run has
- `spafit sensitivity runs/all-MiniLM-L6-v2 --pooling first,max --probe mlp:64 --train-sizes 300,1000` adds runs that
  each differ from it in one choice
"""


def sensitivity(
    run: Annotated[Path, typer.Argument(help="Folder of a probing run, the base.", exists=True, file_okay=False)],
    pooling: Annotated[
        str | None, typer.Option(help="Further poolings to run, by commas: mean, max, first, last.")
    ] = None,
    probe: Annotated[str | None, typer.Option(help="Further probes to run, by commas, such as mlp:64.")] = None,
    train_sizes: Annotated[
        str | None, typer.Option(help="Further numbers of training items to run, by commas, such as 300,1000.")
    ] = None,
    n_boot: Annotated[int, typer.Option(help="Bootstrap replicates.")] = 1000,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Vary one choice at a time and show how far each task's layers move; what moves too far leaves the verdict."""
    from analysis.interpretation import interpret
    from analysis.sensitivity import check_one_stack
    from analysis.sensitivity import sensitivity as measure
    from probing.probes.families import split_probes
    from probing.results import ProbeResults

    base = ProbeResults.load(run)
    check_one_stack(base)
    sizes = _sizes(train_sizes)
    _refuse_repeated("--pooling", _split(pooling), base.run["config"]["pooling"])
    _refuse_repeated("--probe", split_probes(probe) if probe else [], base.run["config"]["probe"])
    _refuse_repeated("--train-sizes", list(map(str, sizes)), [str(base.run["config"]["max_train"])])
    changes: list[tuple[str, dict[str, Any]]] = []
    first = {"pooling": base.run["config"]["pooling"][:1], "probe": base.run["config"]["probe"][:1]}
    changes += [(f"pooling-{p}", {**first, "pooling": [p]}) for p in _split(pooling)]
    changes += [(f"probe-{p}", {**first, "probe": [p]}) for p in (split_probes(probe) if probe else [])]
    changes += [(f"train-{n}", {**first, "max_train": n}) for n in sizes]
    try:
        runs = [base, *(_further(base, name, change, quiet=quiet) for name, change in changes)]
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. What was finished is kept; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    found = measure(runs, n_boot=n_boot)
    paths = [*found.save(run), *_complexity(runs, run)]
    typer.echo(found.to_markdown())
    verdict = interpret(base).verdict
    typer.echo(f"Verdict without unstable tasks: {verdict['verdict']}.")
    typer.echo("Written:\n" + "\n".join(f"  {p}" for p in paths))


def _further(base: ProbeResults, name: str, change: dict[str, Any], *, quiet: bool) -> ProbeResults:
    """A run that differs from the base in one choice, in a folder below the base's."""
    from dataclasses import replace

    from probing.config import ProbeConfig
    from probing.planning import plan_probing
    from probing.running import run_plan

    assert base.folder is not None
    content = {k: v for k, v in base.run["config"].items() if v is not None}
    config = ProbeConfig.from_dict({**content, **change}, where=str(base.folder))
    folder = base.folder / "sensitivity" / name.replace(":", "-").replace(",", "-").replace("=", "-")
    config = replace(config, out=str(folder), overwrite="missing", measures=())
    return run_plan(plan_probing(config), quiet=quiet)


def _complexity(runs: list[ProbeResults], folder: Path) -> list[Path]:
    """Task and control task by probe size and by number of training items, where the runs have several."""
    from analysis.complexity import complexity_curves, complexity_table, has_several_sizes
    from spafit import io, plotting

    kept: list[ProbeResults] = []  # a size that all tasks lack gives the base's numbers again
    for one in runs:
        keys = _fits(one)
        if not any(keys & _fits(other) for other in kept):
            kept.append(one)
    table = complexity_table(kept)
    paths = []
    if has_several_sizes(table):
        paths.append(plotting.save_figure(complexity_curves(table), folder / "figures" / "complexity.png"))
    if table.groupby(["task", "probe"], observed=True)["n_train"].nunique().max() > 1:
        figure = complexity_curves(table, by="n_train")
        paths.append(plotting.save_figure(figure, folder / "figures" / "complexity_items.png"))
    if paths:
        io.write_table(folder / "complexity", table)
        paths.append(folder / "complexity.csv")
    return paths


def _fits(results: ProbeResults) -> set[tuple[str, ...]]:
    """Task, pooling, probe and number of training items of every fit of a run."""
    columns = ["task", "site", "pooling", "probe", "n_train"]
    return set(results.scores[columns].astype(str).itertuples(index=False, name=None))


def _refuse_repeated(option: str, given: list[str], there: list[str]) -> None:
    from spafit.errors import UsageError

    twice = [g for i, g in enumerate(given) if g in there or g in given[:i]]
    if twice:
        raise UsageError(f"{option} {twice[0]} is in the run already, or named twice. Name what is to be added.")


def _split(text: str | None) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()] if text else []


def _sizes(text: str | None) -> list[int]:
    from spafit.errors import UsageError

    found = _split(text)
    for piece in found:
        if not (piece.isascii() and piece.isdigit() and int(piece) >= 10):
            raise UsageError(f"--train-sizes {piece!r} must be whole numbers of at least 10, such as 300,1000.")
    return [int(piece) for piece in found]
