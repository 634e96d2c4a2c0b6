"""``spafit suggest``: strata from probing runs or a pilot, within limits; with --race against baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from analysis.cli.invocation import command_line
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
    from analysis.abilities import Abilities
    from analysis.race_result import RaceResult
    from analysis.strata_suggestion import StrataSuggestion
    from probing.results import ProbeResults
    from spafit.data.training import TrainData

EXAMPLES = """
Examples:

- `spafit suggest runs/all-MiniLM-L6-v2` places the boundaries from probing alone
- `spafit suggest runs/all-MiniLM-L6-v2 --budget 300000` moves them to train at most so many parameters
- `spafit suggest --task sst2 --data glue_data --max-train 1500 --budget 2%` trains a pilot and chooses by it
- `spafit suggest --task sst2 --data glue_data --keep core.tense,core.voice --tolerance 0.05bits`
- `spafit suggest --model gpt2 --train mine.tsv --keep-blimp blimp --tolerance 1point`
- `spafit suggest --task sst2 --data glue_data --race --minutes 60` races the short list against baselines
"""

_EVIDENCE, _LIMITS, _PILOT, _RACE = "Evidence", "Strata and limits", "Pilot", "Race"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def suggest(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of spafit-probe, all of one model; one or more per stack.")
    ] = None,
    strata: Annotated[
        str,
        _option(_LIMITS, "--strata", "-s", help="One to five methods from the first block up, ranks after a colon."),
    ] = "freeze,bitfit,lora+bitfit",
    budget: Annotated[
        str | None,
        _option(_LIMITS, "--budget", help="Most trainable parameters, the head included: a number or a share (2%)."),
    ] = None,
    tolerance: Annotated[
        str | None,
        _option(_LIMITS, "--tolerance", help="Most forgetting: 0.05bits, 1point (BLiMP), 0.5perplexity."),
    ] = None,
    adapter_type: Annotated[Literal["I", "II"], _option(_LIMITS, "--type", help="SPAFIT's type.")] = "I",
    holding: Annotated[
        float, _option(_EVIDENCE, "--holding", help="Share q of the holding rule, from probing alone.")
    ] = 0.95,
    basic: Annotated[
        str, _option(_EVIDENCE, "--basic", help="Levels that place the first boundary, from probing alone.")
    ] = "surface,syntax",
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
    batch_size: Annotated[int, typer.Option("--batch-size", help="Items per step.")] = 16,
    keep: Annotated[
        str, _option(_PILOT, "--keep", help="Probing tasks that should not be forgotten, between commas.")
    ] = "core",
    keep_text: Annotated[
        Path | None, _option(_PILOT, "--keep-text", help="Running text, for models with a language-model head.")
    ] = None,
    keep_blimp: Annotated[
        Path | None, _option(_PILOT, "--keep-blimp", help="Folder of BLiMP, for models with a language-model head.")
    ] = None,
    keep_items: Annotated[int, _option(_PILOT, "--keep-items", help="Items per probing task, and pairs in all.")] = 300,
    pilot_epochs: Annotated[float, _option(_PILOT, "--pilot-epochs", help="Epochs of the pilot.")] = 1.0,
    pilot_seeds: Annotated[int, _option(_PILOT, "--pilot-seeds", min=1, help="Seeds of the pilot.")] = 2,
    race: Annotated[
        bool, _option(_RACE, "--race", help="Race the short list against baselines, and confirm with fresh seeds.")
    ] = False,
    epochs: Annotated[float, _option(_RACE, "--epochs", help="Epochs of a full training.")] = 3.0,
    minutes: Annotated[
        float | None, _option(_RACE, "--minutes", help="Time budget of the race's trainings, over all calls.")
    ] = None,
    race_seeds: Annotated[int, _option(_RACE, "--race-seeds", min=1, help="Seeds of the rungs.")] = 1,
    confirm_seeds: Annotated[int, _option(_RACE, "--confirm-seeds", min=1, help="Fresh seeds to confirm with.")] = 5,
    short_list: Annotated[int, _option(_RACE, "--short-list", min=1, help="Suggested placements that race.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("runs/suggest"),
    json_output: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Suggest where the strata begin: from probing runs, or from a pilot training on your task, within limits.

    Without a task the boundaries rest on probing alone. With one, a pilot measures what each block would gain and
    what it would forget; every placement is scored, and the one with the fewest parameters among the best is written.
    Either way strata.yaml says what it rests on, and whether a race has tested it.
    """
    from analysis.cli.train import read_training_data
    from analysis.run_suggestion import merged_config, suggest_from_runs
    from probing.results import ProbeResults
    from spafit import io
    from spafit.errors import UsageError

    limit = None if budget is None else read_budget(budget, "--budget")
    methods = tuple(m.strip() for m in strata.split(",") if m.strip())
    has_data = task is not None or train_file is not None
    if not runs and not has_data:
        raise UsageError("There is nothing to suggest from. Name a folder of spafit-probe, or a task with --data.")
    for given, option in ((tolerance, "--tolerance"), (race or None, "--race")):
        if given is not None and not has_data:
            raise UsageError(f"{option} needs a pilot on your task: give --task with --data, or --train.")
    given_data = None
    if has_data:
        given_data = read_training_data(
            task, data, file, {"train": train_file, "validation": validation, "test": test}, text=text, text2=text2,
            label=label, regression=regression, header=not no_header, metrics=None, offline=offline,
            skip_bad_rows=skip_bad_rows,
        )  # fmt: skip
        if max_train is not None:
            given_data = given_data.limited(max_train)
    loaded = [ProbeResults.load(r) for r in runs or ()]
    reference = model
    if model is None and loaded and loaded[0].run["model"]["reference"] != "default":
        reference = str(loaded[0].run["model"]["reference"])
    found: dict[str, Any] = {"revision": revision, "offline": offline, "allow_pickle": allow_pickle}
    probed: dict[str, StrataSuggestion] = {}
    if loaded:
        counted = None
        if limit is not None and given_data is None:
            counted = _counter(reference, limit, revision=revision, offline=offline)
        probed = suggest_from_runs(
            loaded, strata=methods, share=holding, basic_levels=tuple(b.strip() for b in basic.split(",")),
            adapter_type=adapter_type, seed=seed, budget=None if counted is None else counted[0],
            count=None if counted is None else counted[1],
        )  # fmt: skip
    suggestions = probed
    result: RaceResult | None = None
    if given_data is not None:
        kept = _abilities(reference, keep, keep_text, keep_blimp, keep_items, offline=offline,
                          allow_pickle=allow_pickle)  # fmt: skip
        suggestion, result = _pilot_and_race(
            reference, given_data, kept, probed, loaded, methods=methods, budget=limit, tolerance=tolerance,
            adapter_type=adapter_type, out=out, pilot={"epochs": pilot_epochs, "seeds": pilot_seeds}, race=race,
            racing={"epochs": epochs, "minutes": minutes, "seeds": race_seeds, "confirm": confirm_seeds,
                    "short_list": short_list},
            loop={"batch_size": batch_size, "max_length": max_length}, seed=seed, device=device, quiet=quiet,
            found=found,
        )  # fmt: skip
        suggestions = {suggestion.stack: suggestion}
    stacks = loaded[0].run["model"].get("stacks") if loaded else None
    config = merged_config(suggestions, blocks=stacks)
    if result is not None:
        config = result.stamp(config)
    written = _write(suggestions, config, result, out)
    if json_output:
        import json

        typer.echo(json.dumps(io.plain({
            "plan": config.to_dict(),
            "suggestions": {s: g.to_pandas().to_dict("records") for s, g in suggestions.items()},
            "race": None if result is None else result.run,
        }), indent=1))  # fmt: skip
        return
    for stack, one in suggestions.items():
        head = f"Stack {stack}:\n" if len(suggestions) > 1 else ""
        lines = [line for line in one.explain().splitlines() if result is None or not line.startswith("Untested")]
        typer.echo(head + "\n".join(lines) + "\n")
    typer.echo(config.describe() + "\n")
    if result is not None:
        typer.echo(result.to_markdown() + "\n")
    typer.echo("Written:\n" + "\n".join(f"  {p}" for p in written))


def _counter(
    reference: str | None, budget: tuple[float, bool], *, revision: str | None, offline: bool
) -> tuple[int, Any]:
    """The budget as a number, and what counts a plan's parameters, from the configuration alone."""
    from spafit.adapt import count_trainable, with_missing_pooler
    from spafit.heads import build_without_weights

    empty, _ = build_without_weights(reference, labels=2, revision=revision, offline=offline)
    return _budget(budget, empty), lambda plan: count_trainable(empty, with_missing_pooler(empty, plan, ()))


def read_budget(text: str, option: str) -> tuple[float, bool]:
    """A number of parameters, or a share of the model's and that it is one."""
    from spafit.errors import UsageError

    digits = text.replace(",", "").replace("_", "").strip()
    share = digits.endswith("%")
    try:
        value = float(digits.removesuffix("%"))
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a number of parameters nor a share such as 2%.") from None
    if not value > 0 or (value < 1 and not share):
        raise UsageError(f"{option} {text!r}: write a number of parameters, or a share with a per cent sign (2%).")
    return (value / 100, True) if share else (value, False)


def _budget(limit: tuple[float, bool], model: Any) -> int:
    value, share = limit
    return int(value * sum(p.numel() for p in model.parameters()) if share else value)


def _abilities(
    reference: str | None, keep: str, text: Path | None, blimp: Path | None, items: int, *, offline: bool,
    allow_pickle: bool,
) -> Abilities:  # fmt: skip
    from analysis.abilities import LanguageAbilities, ProbedAbilities
    from probing.registry import split_references
    from spafit.errors import UsageError

    if text is not None and blimp is not None:
        raise UsageError("--keep-text and --keep-blimp measure forgetting in two units; give one of them.")
    if text is None and blimp is None:
        return ProbedAbilities.of(split_references(keep), train_items=items, test_items=items)
    from spafit.data.blimp import read_blimp
    from spafit.data.text import read_text
    from spafit.language_models import load_language_model

    if reference is None:
        raise UsageError("The built-in default model has no language-model head; keep probing tasks (--keep) instead.")
    pairs = None if blimp is None else read_blimp(blimp, pairs=max(1, items // 67))
    running = None if text is None else read_text(text)
    original = load_language_model(reference, offline=offline, allow_pickle=allow_pickle)
    return LanguageAbilities(original, running, pairs)


def _pilot_and_race(
    reference: str | None, data: TrainData, kept: Abilities, probed: dict[str, StrataSuggestion],
    runs: list[ProbeResults], *,
    methods: tuple[str, ...], budget: tuple[float, bool] | None, tolerance: str | None, adapter_type: Any, out: Path,
    pilot: dict[str, Any], race: bool, racing: dict[str, Any], loop: dict[str, Any], seed: int, device: str,
    quiet: bool, found: dict[str, Any],
) -> tuple[StrataSuggestion, RaceResult | None]:  # fmt: skip
    """Train the pilot, choose, and race if asked to."""
    from analysis.block_evidence import BlockEvidence
    from analysis.pilot import run_pilot
    from analysis.pilot_suggestion import suggest_from_pilot, tolerance_in
    from analysis.placed_strata import on_model
    from analysis.race_candidates import standard_baselines, suggested_candidates
    from analysis.racing import race as run_race
    from spafit.errors import UsageError
    from spafit.heads import load_with_head
    from spafit.settings import TrainSettings
    from spafit.stacks import find_stacks

    if len(methods) < 2:
        raise UsageError("A pilot chooses boundaries, and one stratum has none. Name two to five strata.")
    command = command_line()
    shared: dict[str, Any] = {"device": device, "command": command, "quiet": quiet, **found}
    headed = load_with_head(reference, labels=data.labels, regression=data.regression, seed=0, **found)
    limit = None if budget is None else _budget(budget, headed.model)
    roles = find_stacks(headed.model)[0].bias_roles
    if limit is not None:
        _check_budget(limit, headed, on_model(methods, roles), adapter_type)
    if tolerance is not None:
        tolerance_in(tolerance, unit=kept.unit, before=-1.0)  # its form and unit, before anything trains
    if probed:
        _check_same_model(reference, runs, found)
    measured = run_pilot(
        reference, data, abilities=kept, out=out / "pilot", methods=[m for m in methods if m != "freeze"],
        adapter_type=adapter_type, settings=TrainSettings(epochs=pilot["epochs"], select_share=0, **loop),
        warm_up=TrainSettings(epochs=1, select_share=0, learning_rate=1e-3, **loop), seeds=range(pilot["seeds"]),
        **shared,
    )  # fmt: skip
    most = None
    if tolerance is not None:
        before = BlockEvidence.from_pilot(measured, n_boot=20).before
        most = tolerance_in(tolerance, unit=measured.run["unit"], before=before)
    suggestion = suggest_from_pilot(
        measured, strata=on_model(methods, roles), budget=limit, tolerance=most,
        probing=probed.get(measured.run["stack"]), seed=seed,
        missing_pooler=any("pooler" in name for name in headed.missing),
    )  # fmt: skip
    if not race:
        return suggestion, None
    relative = measured.relative_gradients()
    candidates = [
        *suggested_candidates(suggestion, n=racing["short_list"], bias_roles=roles,
                              adapter_type=adapter_type, probing=probed.get(measured.run["stack"])),
        *standard_baselines(suggestion.config, headed.model, missing=headed.missing, relative_gradients=relative,
                            remedies=["l2sp:0.1"] if tolerance is not None else ()),
    ]  # fmt: skip
    confirm = range(1000, 1000 + racing["confirm"])
    result = run_race(
        candidates, data, model=reference, out=out / "race", settings=TrainSettings(epochs=racing["epochs"], **loop),
        seeds=range(racing["seeds"]), confirm_seeds=confirm, abilities=kept,
        tolerance=most,
        time_budget=None if racing["minutes"] is None else 60 * racing["minutes"], **shared,
    )  # fmt: skip
    return suggestion, result


def _check_budget(limit: int, headed: Any, methods: tuple[str, ...], adapter_type: Any) -> None:
    """Refuse a budget that no placement keeps, before the pilot trains."""
    from analysis.placed_strata import placed_strata
    from spafit.adapt import count_trainable, with_missing_pooler
    from spafit.errors import UsageError
    from spafit.stacks import find_stacks

    stack = find_stacks(headed.model)[0]
    place: dict[str, Any] = {
        "stack": stack.name, "num_blocks": stack.num_blocks, "bias_roles": stack.bias_roles,
        "adapter_type": adapter_type,
    }  # fmt: skip
    plans = (with_missing_pooler(headed.model, placed_strata([m], [], **place), headed.missing) for m in methods)
    smallest = min(count_trainable(headed.model, plan) for plan in plans)
    if limit < smallest:
        raise UsageError(
            f"A budget of {limit:,} parameters is less than the smallest plan of these strata trains: {smallest:,}. "
            "Give at least that."
        )


def _check_same_model(reference: str | None, runs: list[ProbeResults], found: dict[str, Any]) -> None:
    """Refuse probing runs of another model than the one that will be trained."""
    from spafit.errors import UsageError
    from spafit.models import load_model

    loaded, probed = load_model(reference, **found), runs[0].run["model"]
    if loaded.weights_digest != probed["weights_digest"]:
        raise UsageError(
            f"The evidence is from two different models: {runs[0].folder} is of {probed['name']}, and {loaded.name} "
            "would be trained (other weights). Give runs of the model that is trained."
        )


def _write(suggestions: dict[str, StrataSuggestion], config: Any, result: RaceResult | None, out: Path) -> list[Path]:
    from spafit import io, plotting
    from spafit.runtime import provenance

    stamp = provenance()
    written = [config.with_provenance({k: stamp[k] for k in ("created_at", "versions")}).save(out / "strata.yaml")]
    for stack, suggestion in suggestions.items():
        name = "suggestion" if len(suggestions) == 1 else f"suggestion-{stack}"
        io.write_table(out / name, suggestion.to_pandas())
        io.write_text(out / f"{name}.md", suggestion.explain() + "\n")
        figure = suggestion.plot().get_figure(root=True)
        assert figure is not None
        written += [out / f"{name}.md", plotting.save_figure(figure, out / f"{name}.png")]
        if suggestion.choice is not None:
            io.write_table(out / "placements", suggestion.choice.table)
            written.append(out / "placements.csv")
    if result is not None:
        io.write_text(out / "race.md", result.to_markdown() + "\n")
        figure = result.plot().get_figure(root=True)
        assert figure is not None
        written += [out / "race.md", plotting.save_figure(figure, out / "race.png"), result.folder / "trials.csv"]
    return written
