"""``spafit search``: plans and rates by grid, random or Bayesian search with cross-validation; the best confirmed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli.invocation import command_line
from analysis.cli.suggest import read_budget
from analysis.cli.train import (
    AllowPickle,
    Data,
    Debug,
    Device,
    Files,
    GlueTask,
    Json,
    LabelColumn,
    MaxLength,
    MaxTrain,
    Model,
    NoHeader,
    Offline,
    Quiet,
    Regression,
    Revision,
    SkipBadRows,
    Test,
    Text2Column,
    TextColumn,
    TrainTable,
    Validation,
)

if TYPE_CHECKING:
    from spafit.tuning.search_result import SearchResult
    from spafit.tuning.space import SearchSpace

EXAMPLES = """
Examples:

- `spafit search --task sst2 --data glue_data --max-train 1500 --trials 30`
- `spafit search --task rte --data glue_data --strategy random --max-params 500000 --first runs/suggest/strata.yaml`
- `spafit search --train mine.tsv --backend ray --workers 4 --prune`
- `spafit search --task sst2 --data glue_data --backend ray --strategy pbt --trials 8 --intervals 6 --epochs 1`
- `spafit search --print-space > space.yaml`, edit it, then `spafit search --space space.yaml …`
- several workers: the same command in several shells, with `--storage sqlite:///search.db` or one `--out`
"""

_SEARCH, _LIMITS = "Search", "Limits"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def search(
    model: Model = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    task: GlueTask = None,
    data: Data = None,
    file: Files = None,
    skip_bad_rows: SkipBadRows = False,
    train_file: TrainTable = None,
    validation: Validation = None,
    test: Test = None,
    text: TextColumn = "text",
    text2: Text2Column = None,
    label: LabelColumn = "label",
    regression: Regression = False,
    no_header: NoHeader = False,
    max_train: MaxTrain = None,
    max_length: MaxLength = 128,
    recipe: Annotated[
        str | None, _option(_SEARCH, "--recipe", help="Starting point by name. Default: the first that fits the task.")
    ] = None,
    recipes: Annotated[Path | None, _option(_SEARCH, "--recipes", help="A file of recipes of your own.")] = None,
    space: Annotated[Path | None, _option(_SEARCH, "--space", help="Fields of the space that differ (YAML).")] = None,
    print_space: Annotated[bool, _option(_SEARCH, "--print-space", help="Print the space and stop.")] = False,
    backend: Annotated[str, _option(_SEARCH, "--backend", help="optuna, ray or hyperopt.")] = "optuna",
    strategy: Annotated[
        str, _option(_SEARCH, "--strategy", help="grid, random, tpe, gp, nsga2 (Optuna), anneal (Hyperopt), pbt (Ray).")
    ] = "tpe",
    objectives: Annotated[
        str, _option(_SEARCH, "--objectives", help="quality, or several between commas: quality,parameters,forgetting.")
    ] = "quality",
    trials: Annotated[int | None, _option(_SEARCH, "--trials", help="Trials in all. Default: the recipe's.")] = None,
    n_folds: Annotated[int | None, _option(_SEARCH, "--folds", help="Folds. Default: the recipe's.")] = None,
    epochs: Annotated[float | None, _option(_SEARCH, "--epochs", help="Epochs. Default: the recipe's.")] = None,
    first: Annotated[
        list[Path] | None, _option(_SEARCH, "--first", help="A strata.yaml that is tried first, before the presets.")
    ] = None,
    intervals: Annotated[
        int, _option(_SEARCH, "--intervals", min=1, help="With pbt: intervals of --epochs each; --trials are members.")
    ] = 6,
    prune: Annotated[bool, _option(_SEARCH, "--prune", help="Give up trials that fall behind over the folds.")] = False,
    workers: Annotated[int, _option(_SEARCH, "--workers", min=1, help="Trials at a time, with --backend ray.")] = 1,
    storage: Annotated[
        str | None, _option(_SEARCH, "--storage", help="Database URL, for many workers with Optuna.")
    ] = None,
    confirm_seeds: Annotated[
        int | None, _option(_SEARCH, "--confirm-seeds", help="Fresh seeds of the best trial; 0 leaves it out.")
    ] = None,
    max_params: Annotated[
        str | None, _option(_LIMITS, "--max-params", help="Most trainable parameters: a number or a share (2%).")
    ] = None,
    max_memory: Annotated[
        float | None, _option(_LIMITS, "--max-memory", help="Most gigabytes at the peak of a training.")
    ] = None,
    max_forgetting: Annotated[
        float | None, _option(_LIMITS, "--max-forgetting", help="Most bits lost of the --keep tasks, their mean.")
    ] = None,
    keep: Annotated[
        str | None, _option(_LIMITS, "--keep", help="Probing tasks that should not be forgotten, between commas.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the strategy, the folds and the trainings.")] = 0,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("runs/search"),
    json_output: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search over where strata begin, how they train, ranks and learning rates, with cross-validation.

    SPAFIT's presets, scaled, and the plans of --first are the first trials. Limits are hard: what breaks one is never
    the best. The official split is touched once, when the best trial is trained again with fresh seeds.
    """
    from analysis.cli.train import read_training_data
    from spafit.errors import UsageError
    from spafit.heads import build_without_weights
    from spafit.settings import TrainSettings
    from spafit.stacks import find_stacks
    from spafit.strata import StrataConfig
    from spafit.tuning.crossval import folds
    from spafit.tuning.objective import PlanObjective
    from spafit.tuning.population import search_population
    from spafit.tuning.ray_backend import grid_configurations
    from spafit.tuning.recipes import recipe_for
    from spafit.tuning.searching import search as run_search
    from spafit.tuning.space import SearchSpace

    limit = None if max_params is None else read_budget(max_params, "--max-params")
    if max_forgetting is not None and keep is None:
        raise UsageError("--max-forgetting needs --keep: the probing tasks that should not be forgotten.")
    wanted = tuple(o.strip() for o in objectives.split(","))
    if "forgetting" in wanted and keep is None:
        raise UsageError("The objective forgetting needs --keep: the probing tasks that should not be forgotten.")
    has_data = task is not None or train_file is not None
    given = None
    if has_data:
        given = read_training_data(
            task, data, file, {"train": train_file, "validation": validation, "test": test}, text=text, text2=text2,
            label=label, regression=regression, header=not no_header, metrics=None, offline=offline,
            skip_bad_rows=skip_bad_rows,
        )  # fmt: skip
        if max_train is not None:
            given = given.limited(max_train)
    elif not print_space:
        raise UsageError("No data: give --task with --data, or a table with --train.")
    items = 1000 if given is None else len(given.frames["train"])
    kind = "regression" if given is not None and given.regression else "classification"
    start = recipe_for(
        items=items, kind=kind, paired=given is not None and given.paired, name=recipe, path=recipes
    )  # fmt: skip
    labels = 2 if given is None else 1 if given.labels is None else len(given.labels)
    empty, name = build_without_weights(model, labels=labels, revision=revision, offline=offline)
    stacks = find_stacks(empty)
    plans = start.apply(
        SearchSpace({s.name: s.num_blocks for s in stacks}, {s.name: s.bias_roles for s in stacks}, model_id=name)
    )
    if space is not None:
        plans = plans.with_file(space)
    if print_space:
        typer.echo(f"# {start.name}: {start.source}\n{plans.to_yaml()}", nl=False)
        return
    assert given is not None
    settings = TrainSettings(**{"max_length": max_length, **start.settings, **({"epochs": epochs} if epochs else {})})
    forgetting = None
    if keep is not None:
        from analysis.search_forgetting import ProbedForgetting

        forgetting = ProbedForgetting(model, tuple(keep.split(",")), revision, offline, allow_pickle)
    objective = PlanObjective(
        plans, model, folds(given, n_folds or start.folds, seed=seed), settings, out / "trained", seed,
        None if limit is None else int(limit[0] * sum(p.numel() for p in empty.parameters()) if limit[1] else limit[0]),
        None if max_memory is None else int(max_memory * 1e9), max_forgetting, forgetting, device, revision, offline,
        allow_pickle,
    )  # fmt: skip
    objective.check()
    queued = _first(plans, [StrataConfig.load(p) for p in first or ()], {s.name: s.bias_roles for s in stacks})
    seeds = start.seeds if confirm_seeds is None else confirm_seeds
    confirm = None
    if seeds and given.scored_splits:
        official = given.scored_splits[0]
        whole = replace(given, frames={s: given.frames[s] for s in ("train", official)}, digests={})
        confirm = Confirm(replace(objective, folds=(whole,)), out / "confirmed", official)
    wanted_trials = trials or start.trials
    how = f"{wanted_trials} trials of {len(objective.folds)} folds"
    if strategy == "pbt":
        how = f"{wanted_trials} members of {intervals} intervals, scored on one fold"
    if not quiet:
        sys.stderr.write(
            f"Search: {start.name} ({start.source})\n{how}, {settings.epochs:g} epochs of about "
            f"{len(objective.folds[0].frames['train'])} items each; "
            f"{len(queued)} first trial(s).\n"
        )
        points = len(grid_configurations(plans.parameters())) if strategy == "grid" else 0
        if points > wanted_trials:
            sys.stderr.write(f"The grid has {points:,} points, and --trials stops at {wanted_trials:,}.\n")
    if strategy == "pbt":
        _check_population(backend, wanted, prune=prune)
        if not queued:
            raise UsageError("pbt trains one plan, and the space has none of the presets. Give one by --first.")
        result = search_population(
            objective, queued[0], out=out, population=wanted_trials, intervals=intervals, workers=workers, seed=seed,
            official=None if confirm is None else (confirm.objective.folds[0], confirm.split),
            confirm_seeds=range(1000, 1000 + seeds), command=command_line(),
        )  # fmt: skip
        _print(result, out, json_output=json_output)
        return
    result = run_search(
        objective, plans, out=out, strategy=strategy, backend=backend, n_trials=wanted_trials, first=queued,
        objectives=wanted, confirm=confirm, confirm_seeds=range(1000, 1000 + seeds), depends_on=objective.record(),
        seed=seed, workers=workers, prune=prune, storage=storage, command=command_line(),
    )  # fmt: skip
    _print(result, out, json_output=json_output)


def _check_population(backend: str, objectives: tuple[str, ...], *, prune: bool) -> None:
    from spafit.errors import UsageError

    if backend != "ray":
        raise UsageError(f"The strategy pbt is Ray's, and the backend is {backend}. Give --backend ray.")
    if objectives != ("quality",) or prune:
        raise UsageError("pbt looks at quality alone and gives up no trial. Leave --objectives and --prune out.")


def _print(result: SearchResult, out: Path, *, json_output: bool) -> None:
    from spafit import io

    if json_output:
        import json

        typer.echo(json.dumps(io.plain({"run": result.run, "trials": result.to_pandas().to_dict("records")}), indent=1))
        return
    typer.echo(result.to_markdown())
    names = ("trials.csv", "strata.yaml", "course.csv", "history.png", "importance.png", "course.png")
    typer.echo("\nWritten:\n" + "\n".join(f"  {out / n}" for n in names if (out / n).is_file()))


class Confirm:
    """The best values trained on all training items with a fresh seed, scored on the official split."""

    def __init__(self, objective: Any, folder: Path, split: str):
        self.objective, self.folder, self.split = objective, folder, split

    def __call__(self, values: Any, seed: int) -> float:
        """The headline on the official split."""
        from spafit.training import fit
        from spafit.tuning.objective import measured

        o, place = self.objective, self.folder / measured(values) / f"seed-{seed}"
        config, changes = o.space.decode(values)
        result = fit(
            o.model, config, data=o.folds[0], settings=replace(o.settings, select_share=0, patience=0, **changes),
            seeds=(seed,), out=place, method="best of the search", device=o.device,
            revision=o.revision, offline=o.offline, allow_pickle=o.allow_pickle, quiet=True,
        )  # fmt: skip
        rows = result.runs[(result.runs["split"] == self.split) & (result.runs["metric"] == "headline")]
        return float(rows["value"].iloc[0])


def _first(space: SearchSpace, plans: list[Any], biases: dict[str, Any]) -> list[Any]:
    """Values of the plans of --first, which must fit, and of the scaled presets as far as they do."""
    from spafit.errors import UsageError
    from spafit.strata import StrataConfig

    found = [space.encode(plan) for plan in plans]
    for name in ("spafit-scaled-I", "spafit-scaled-II"):
        plan = StrataConfig.preset(name, blocks=dict(space.blocks), bias_roles=biases)
        try:
            values = space.encode(_at_rank(plan, max(space.ranks)))
        except UsageError:  # methods or types that the space does not have
            continue
        if values not in found:
            found.append(values)
    return found


def _at_rank(plan: Any, rank: int) -> Any:
    """The plan with the space's largest rank in place of the paper's 64, at the same scale."""
    from spafit.stratum import LoraOptions

    strata = tuple(
        s if s.lora is None else replace(s, lora=LoraOptions(rank, targets=s.lora.targets)) for s in plan.strata
    )
    return replace(plan, strata=strata)
