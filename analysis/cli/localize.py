"""``spafit localize``: test a hypothesis file on runs, comparisons, causal tables and published curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from analysis.cli.invocation import command_line

EXAMPLES = """
Examples:

- `spafit localize runs/all-MiniLM-L6-v2`
- `spafit localize runs/english runs/german runs/french --hypothesis mine.yaml`
- `spafit localize runs/compared --hypothesis bert-pipeline`
- `spafit localize runs/ewt --by genre`
- `spafit localize runs/base --causal skipped.csv`
- `spafit localize published.csv --out runs/published`
- `spafit localize --print-hypothesis > mine.yaml`
"""


def localize(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of spafit-probe or spafit compare, CSV files of published curves, or causal tables; several "
            "give one verdict each, and a pooled one."
        ),
    ] = None,
    hypothesis: Annotated[
        str, typer.Option("--hypothesis", "-H", help="Hypothesis file, or the name of a shipped one.")
    ] = "bert-pipeline",
    causal: Annotated[
        list[Path] | None,
        typer.Option(
            "--causal",
            help="Causal table (CSV or parquet) or folder of spafit compare --task, with effects on the one run's "
            "model; may be repeated, for further tasks.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", help="Column of the items, such as genre, or pooling or probe: a verdict for each part."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("runs/localization"),
    seed: Annotated[int, typer.Option("--seed", help="Draws of the correction of emergence.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print smallest reachable p and power, and stop before any score.")
    ] = False,
    print_hypothesis: Annotated[
        bool, typer.Option("--print-hypothesis", help="Print the hypothesis file, to edit it, and stop.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Test whether each type of knowledge sits in layers of its own: supported, refuted or inconclusive.

    The claim stands in a hypothesis file, whose digest is in every result. Power and the smallest p that can be reached
    are printed before any score is looked at. Conditions without evidence are said to be not tested.
    """
    from analysis.evidence import parts_of, read_evidence, with_causal
    from analysis.hypothesis import Hypothesis
    from analysis.localization_displays import localization_markdown, plan_lines, plot_runs, verdict_lines
    from analysis.localization_runs import announce
    from analysis.localization_runs import localize as run_localize
    from spafit import io, plotting
    from spafit.errors import UsageError
    from spafit.runtime import Progress, provenance

    claim = Hypothesis.load(hypothesis)
    if print_hypothesis:
        typer.echo(claim.to_yaml(), nl=False)
        return
    if not runs and not causal:
        raise UsageError("There is no evidence to test the claim on. Name a folder of spafit-probe, or see --help.")
    evidence = [e for path in runs or () for e in read_evidence(path, claim)]
    if by is not None:
        evidence = parts_of(evidence, by)
    if causal:
        evidence = with_causal(evidence, causal)
    plans = announce(evidence, claim)
    before = "\n".join(plan_lines(plans, claim))
    if not json_output:
        typer.echo(f"{before}\n")
        sys.stdout.flush()
    if dry_run:
        return
    with Progress("Testing the claim", len(evidence), quiet=quiet) as progress:
        found = run_localize(evidence, claim, seed=seed, progress=progress.advance)
    written = [found.save(out), out / "localization.md"]
    io.write_text(out / "localization.md", localization_markdown(found, plans))
    claim.save(out / "hypothesis.yaml")
    io.write_table(out / "localization", found.to_pandas())
    written += [out / "hypothesis.yaml", out / "localization.csv"]
    if any(t.used for r in found.runs for t in r.test.tasks):
        with plotting.style():
            figure = plot_runs(found).get_figure(root=True)
        assert figure is not None
        written.append(plotting.save_figure(figure, out / "localization.png"))
    command = command_line()
    record = {"runs": [str(r) for r in runs or ()], "causal": [str(c) for c in causal or ()], "seed": seed}
    io.write_json(
        out / "run.json",
        {"schema_version": io.SCHEMA_VERSION, "command": command, "hypothesis_digest": claim.digest, **record,
         **provenance()},
    )  # fmt: skip
    if json_output:
        import json

        typer.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return
    typer.echo("\n\n".join(verdict_lines(found)))
    typer.echo("\nWritten:\n" + "\n".join(f"  {p}" for p in written))
