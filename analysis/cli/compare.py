"""``spafit compare``: what training changed, layer by layer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.cli.probe import _references

EXAMPLES = """
Examples:

- `spafit compare default runs/train/all-MiniLM-L6-v2-cola-lora/seed-0/model`
- `spafit compare bert-large-cased full/seed-0/model lora/seed-0/model --labels full,lora --device cuda`
- `spafit compare runs/before runs/after` compares two folders of spafit-probe
- `spafit compare default stage1 stage2 --tasks conllu:UD_English-EWT#upos,deprel --seeds 1`
"""

_LEGEND = (
    "before, after: accuracy of the probe fitted before training and of one fitted after it, at the hidden\n"
    "state where the task could be read best before. lost, moved, re-encoded: differences of accuracy less the\n"
    "control task's, in points; + is a loss. *: p < .05 over hidden states.\n"
)
_DATA, _RUN, _OUT = "Tasks", "Running", "Output"


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
    stack: Annotated[str | None, _option(_RUN, "--stack", help="Which block stack.")] = None,
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
    import shlex

    from analysis.comparing import compare as run_compare
    from analysis.comparison_report import write_comparison_report

    names = _references(tasks) or ("core",)
    chosen = () if controls.strip() == "none" else tuple(c.strip() for c in controls.split(","))
    try:
        found = run_compare(
            None if before == "default" else before, [None if a == "default" else a for a in after], tasks=names,
            labels=None if labels is None else [n.strip() for n in labels.split(",")], controls=chosen, seeds=seeds,
            max_train=max_train, limit=limit, pooling=[p.strip() for p in pooling.split(",")], stack=stack,
            n_boot=n_boot, drift=drift, text=text, blimp=blimp, blimp_pairs=blimp_pairs or None,
            refit_on=refit_on, device=device, dtype=dtype, cache_dir=cache_dir, offline=offline,
            allow_pickle=allow_pickle, out=out, quiet=quiet,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
    for paragraph in found.paragraphs():
        typer.echo(f"{paragraph}\n")
    typer.echo("Written:\n" + "\n".join(f"  {p}" for p in (*paths[:2], out / "forgetting.csv", out / "run.json")))
