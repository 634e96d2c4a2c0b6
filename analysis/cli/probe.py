"""``spafit-probe``: from a model's name to layer curves, a verdict and strata."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli.invocation import command_line

if TYPE_CHECKING:
    from analysis.interpretation import Interpretation
    from probing.config import ProbeConfig
    from probing.results import ProbeResults

EXAMPLES = """
Examples:

- `spafit-probe` probes the built-in model (MiniLM-L6, extra `demo`) on the generated suite
- `spafit-probe --model bert-large-cased --device cuda`
- `spafit-probe --model ./my-adapter --tasks core,conllu:UD_English-EWT#upos,deprel`
- `spafit-probe --tasks table:cola/train.tsv,text=3,label=1 --seeds 5`
- `spafit-probe --probe linear,mlp:64` fits two families of probes to every hidden state
- `spafit-probe --measures online-code,mix` adds description lengths and scalar mixes
- `spafit-probe --dry-run` prints the plan and an estimate of time and disk, and stops
"""

_MODEL, _DATA, _PROBE, _RUN, _OUT = "Model", "Tasks", "Probes", "Running", "Output"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def probe(
    model: Annotated[
        list[str] | None,
        _option(
            _MODEL,
            "--model",
            "-m",
            help="Hub id, folder, GGUF file or PEFT adapter folder; repeat for several. Default: MiniLM-L6.",
        ),
    ] = None,
    revision: Annotated[str | None, _option(_MODEL, "--revision", help="Branch, tag or commit of a hub model.")] = None,
    stack: Annotated[
        str | None,
        _option(
            _MODEL,
            "--stack",
            help="Which block stack, for models with several (encoder, text, vision); several by commas, in one pass: "
            "encoder,decoder. A decoder with cross-attention is fed the text shifted right.",
        ),
    ] = None,
    offline: Annotated[
        bool | None, _option(_MODEL, "--offline/--online", help="Never ask the hub.", show_default=False)
    ] = None,
    allow_pickle: Annotated[
        bool | None,
        _option(
            _MODEL,
            "--allow-pickle/--no-pickle",
            show_default=False,
            help="Accept pickle weight files (read with weights_only); only from authors whom you trust.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        _option(
            _DATA,
            "--tasks",
            "-t",
            help="Task references, separated by commas or repeated; `spafit tasks` lists them. Default: core.",
            autocompletion=lambda incomplete: _complete_tasks(incomplete),
        ),
    ] = None,
    max_train: Annotated[
        int | None,
        _option(_DATA, "--max-train", help="Training items per seed. Default: 80 % of them, at most 20,000."),
    ] = None,
    limit: Annotated[
        int | None, _option(_DATA, "--limit", help="Keep only the first N items of each split: for a quick look only.")
    ] = None,
    layers: Annotated[
        str | None,
        _option(
            _PROBE,
            "--layers",
            help="Hidden indices, 0 = embeddings: 0-6 or 0,3,6; by stack encoder:0-6,decoder:0-3. Default: all.",
        ),
    ] = None,
    sites: Annotated[
        str | None,
        _option(_PROBE, "--sites", help="block, attention, feed_forward, heads, final_norm. Default: block."),
    ] = None,
    pooling: Annotated[
        str | None,
        _option(
            _PROBE,
            "--pooling",
            help="mean, max, first ([CLS]) or last; several by commas. word-final is last: the sub-word that has read "
            "the whole word in a causal stack. Default: mean.",
        ),
    ] = None,
    probes: Annotated[
        list[str] | None,
        _option(
            _PROBE,
            "--probe",
            help="linear, low-rank:R, mlp:W or mlp:W,dropout=P; structural:R for trees; edge-span or "
            "edge-span:attention over the words of labelled spans; several by commas or repeated. The verdict uses the "
            "first. Default: linear.",
        ),
    ] = None,
    controls: Annotated[
        str | None,
        _option(
            _PROBE,
            "--controls",
            help="word-type, random-encoder, permuted-weights, permuted-order, bag-of-words, tf-idf, length, "
            "majority-per-word, column:NAME, or none; several by commas. Default: word-type,random-encoder.",
        ),
    ] = None,
    measures: Annotated[
        str | None,
        _option(
            _PROBE,
            "--measures",
            help="online-code, variational-code (slow), conditional, mix; several by commas, added to a finished run. "
            "Default: none beside accuracy and bits.",
            autocompletion=lambda incomplete: _complete_measures(incomplete),
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        _option(
            _PROBE,
            "--seeds",
            min=1,
            help="How many seeds; each redraws training items, control labels and random encoder. Default: 3.",
        ),
    ] = None,
    l2: Annotated[
        str | None, _option(_PROBE, "--l2", help="Penalties tried, by commas; the best on dev is used.")
    ] = None,
    n_boot: Annotated[
        int | None, _option(_PROBE, "--n-boot", help="Bootstrap replicates behind each interval. Default: 1000.")
    ] = None,
    device: Annotated[
        str | None, _option(_RUN, "--device", help="Torch device; default: the first of cuda, mps, cpu.")
    ] = None,
    dtype: Annotated[
        str | None, _option(_RUN, "--dtype", help="Precision of the forward passes: float32, bfloat16, float16.")
    ] = None,
    batch_tokens: Annotated[
        int | None, _option(_RUN, "--batch-tokens", help="Padded tokens per batch; halved when memory runs out.")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        _option(_RUN, "--cache-dir", help="Where states are kept. Default: $SPAFIT_CACHE or the user's cache."),
    ] = None,
    shard: Annotated[
        str | None,
        _option(
            _RUN,
            "--shard",
            help="i/n: only compute part i (from 0) of n of the states, for job arrays; then run without.",
        ),
    ] = None,
    dry_run: Annotated[bool, _option(_RUN, "--dry-run", help="Print the plan with time and disk, and stop.")] = False,
    config: Annotated[
        Path | None, _option(_RUN, "--config", help="Options from a YAML file or an earlier run.json; the shell wins.")
    ] = None,
    print_config: Annotated[
        bool, _option(_RUN, "--print-config", help="Print the options as YAML for --config, and stop.")
    ] = False,
    out: Annotated[Path | None, _option(_OUT, "--out", "-o", help="Output folder. Default: `runs/<model>`.")] = None,
    overwrite: Annotated[
        str | None,
        _option(
            _OUT,
            "--overwrite",
            help="If --out holds a run. missing: go on with the same options or more tasks, refuse others; "
            "always: remove that run first; never: refuse. Default: missing.",
        ),
    ] = None,
    json_output: Annotated[bool, _option(_OUT, "--json", help="Print JSON instead of the table.")] = False,
    quiet: Annotated[bool, _option(_OUT, "--quiet", "-q", help="No plan and no progress on stderr.")] = False,
    verbose: Annotated[bool, _option(_OUT, "--verbose", "-v", help="Log what is read, cached and recomputed.")] = False,
    debug: Annotated[bool, _option(_OUT, "--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Probe every layer of a model, test the layer-localization hypothesis, and suggest strata."""
    from spafit.errors import UsageError

    if verbose:
        import logging

        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
    from probing.config import ProbeConfig, read_config

    options: dict[str, Any] = read_config(config) if config is not None else {}
    given = {
        "revision": revision,
        "stack": stack,
        "offline": offline,
        "allow_pickle": allow_pickle,
        "tasks": _references(tasks),
        "max_train": max_train,
        "limit": limit,
        "layers": layers,
        "sites": _split(sites),
        "pooling": _split(pooling),
        "probe": tuple(probes) if probes else None,
        "controls": () if controls == "none" else _split(controls),
        "measures": () if measures == "none" else _split(measures),
        "seeds": None if seeds is None else tuple(range(seeds)),
        "l2": _numbers(l2),
        "n_boot": n_boot,
        "device": device,
        "dtype": dtype,
        "batch_tokens": batch_tokens,
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "overwrite": overwrite,
    }
    options.update({k: v for k, v in given.items() if v is not None})
    models: list[str | None] = list(model) if model else [options.pop("model", None)]
    options.pop("model", None)
    if out is not None:
        options["out"] = str(out)
    if len(models) > 1 and (json_output or shard):
        raise UsageError("--json and --shard take one --model; run once for each.")
    folder = options.pop("out", None)
    names = [Path(m or "default").name for m in models]
    if len(set(names)) < len(names):
        raise UsageError(
            "Two models have the same name, and so the same folder; run them apart, each with its own --out."
        )
    configs = [ProbeConfig(model=m, out=_folder(folder, m, len(models)), **options) for m in models]
    if print_config:
        import yaml

        typer.echo(yaml.safe_dump(configs[0].to_dict(), sort_keys=False), nl=False)
        return
    part = _shard(shard)
    try:
        finished = [_run(c, dry_run=dry_run, shard=part, json_output=json_output, quiet=quiet) for c in configs]
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What was finished is kept; the same command goes on from there.\n")
        raise typer.Exit(130) from None
    results = [r for r in finished if r is not None]
    if results and not json_output:
        from analysis.interpretation import compare_models

        if (figure := compare_models(results)) is not None:
            typer.echo(f"\nSide by side over relative depth: {figure}\nTheir scores in one table: {_table_of(figure)}")
    if any(r.run["status"] == "partial" for r in results):
        raise typer.Exit(3)


def _run(
    config: ProbeConfig, *, dry_run: bool, shard: tuple[int, int] | None, json_output: bool, quiet: bool
) -> ProbeResults | None:
    from analysis.interpretation import interpret
    from probing.encoding import extract_shard
    from probing.planning import plan_probing
    from probing.running import run_plan

    plan = plan_probing(config)
    if dry_run:
        typer.echo(plan.describe())
        return None
    if not quiet:
        sys.stderr.write(plan.describe() + "\n\n")
        sys.stderr.flush()
    if shard is not None:
        extract_shard(plan, shard, quiet=quiet)
        typer.echo(f"Part {shard[0]} of {shard[1]} of the states is in the cache. Run without --shard when all are.")
        return None
    results = run_plan(plan, command=command_line(), quiet=quiet)
    interpretation = interpret(results)
    if json_output:
        import json

        typer.echo(json.dumps(interpretation.to_dict(), indent=1, allow_nan=False))
    else:
        _print(results, interpretation)
    return results


def _table_of(figure: Path) -> Path:
    folder = figure.parent.parent if figure.parent.name == "figures" else figure.parent
    return folder / "models.csv"


def _print(results: ProbeResults, interpretation: Interpretation) -> None:
    typer.echo(f"\n{results.to_markdown()}\n")
    if results.measures is not None:
        from probing.measure_displays import measure_markdown

        typer.echo(f"{measure_markdown(results.measures, results.summaries)}\n")
    by_stack, tested = interpretation.suggestions.by_stack, False
    for stack, suggestion in by_stack.items():
        if len(by_stack) > 1:
            typer.echo(f"Stack {stack}:")
        if interpretation.localizations[stack].conditions[0].tested:
            verdict, tested = interpretation.verdict_of(stack), True
            typer.echo(f"Verdict: {verdict['verdict']}. {verdict['sentence']}\n")
            typer.echo("Strata:  " + suggestion.explain() + "\n")
        else:
            typer.echo("Verdict: inconclusive. Too few tasks per level for a verdict; see the scores.")
            placed = "No boundaries from these tasks; strata.yaml holds SPAFIT's own, scaled to the model's depth."
            typer.echo(f"Strata:  {placed if suggestion.criterion == 'none' else suggestion.reason}\n")
    if tested:
        typer.echo(interpretation.suggestions.config.describe() + "\n")
    about: dict[str, list[str]] = {}
    for name, facts in results.run["tasks"].items():
        if facts["status"] == "failed":
            typer.echo(f"Failed:  {name}: {facts['error']}")
        for measure, why in facts.get("failed_measures", {}).items():
            typer.echo(f"Failed:  {measure} of {name}: {why}")
        for note in facts.get("notes", []):
            about.setdefault(note, []).append(name)
    for note, names in about.items():
        typer.echo(f"Note:    {', '.join(names) if len(names) < 5 else f'{len(names)} tasks'}: {note}")
    for note in results.run["warnings"]:
        typer.echo(f"Note:    {note}")
    typer.echo("Written:\n" + "\n".join(f"  {p}" for p in interpretation.paths))


def _folder(out: str | None, model: str | None, number: int) -> str | None:
    """Several models get a folder each below ``--out``."""
    if out is None or number == 1:
        return out
    return str(Path(out) / Path(model or "default").name)


def _references(values: list[str] | None) -> tuple[str, ...] | None:
    from probing.registry import split_references

    return None if not values else tuple(r for v in values for r in split_references(v))


def _split(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(p.strip() for p in text.split(",") if p.strip())


def _numbers(text: str | None) -> tuple[float, ...] | None:
    from spafit.errors import UsageError

    try:
        return None if text is None else tuple(float(p) for p in text.split(","))
    except ValueError as error:
        raise UsageError(f"--l2 {text!r} must be numbers separated by commas, such as 0.001,0.01,0.1.") from error


def _shard(text: str | None) -> tuple[int, int] | None:
    from spafit.errors import UsageError

    if text is None:
        return None
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise UsageError(f"--shard {text!r} must be i/n with 0 <= i < n, such as 0/4.")
    return int(i), int(n)


def _complete_measures(incomplete: str) -> list[str]:
    from probing.config import MEASURES

    return [name for name in MEASURES if name.startswith(incomplete)]


def _complete_tasks(incomplete: str) -> list[str]:
    from probing.registry import list_tasks

    return [name for name in list_tasks()["name"] if name.startswith(incomplete)]
