"""Extract, fit, save: carry out a plan, task by task, so that finished work is kept and never done twice."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.baselines import BaselineOutputs, baseline_outputs, is_baseline, unsuited
from probing.config import MEASURES, Overwrite, ProbeConfig, seed_numbers
from probing.earlier import clear_run
from probing.encoding import Stores, extract_states
from probing.fitting import Features, TaskFit, fit_task, split_rows
from probing.item_states import family_states, item_states, rows_of_items, texts_of_items
from probing.parts import is_finished, measure_part, read_part, write_part
from probing.planning import ProbePlan, plan_probing, timed
from probing.probes.families import NamedFamily, Structural, parse_probe, suits
from probing.records import model_facts, task_facts
from probing.results import ProbeResults, summary_table
from probing.scoring import SCORE_COLUMNS, item_table, score_table
from probing.targets import label_values
from probing.tasks.base import Task
from probing.tree_fitting import fit_trees, order_words, tree_item_table, tree_score_table
from spafit import io
from spafit.errors import OutputError, SpafitError, TaskError
from spafit.runtime import Progress, provenance

if TYPE_CHECKING:
    from probing.store import ActivationStore
    from spafit.stacks import Stack


def probe_layers(
    model: Any = None,
    tasks: Sequence[str | Task] = ("core",),
    *,
    revision: str | None = None,
    layers: str = "all",
    sites: Sequence[str] = ("block",),
    stack: str | None = None,
    pooling: Sequence[str] = ("mean",),
    probe: Sequence[str] = ("linear",),
    controls: Sequence[str] = ("word-type", "random-encoder"),
    measures: Sequence[str] = (),
    max_train: int | None = None,
    seeds: int | Sequence[int] = (0, 1, 2),
    l2: Sequence[float] | None = None,
    n_boot: int = 1000,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    batch_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    out: str | Path | None = None,
    overwrite: Overwrite = "missing",
    quiet: bool = False,
) -> ProbeResults:
    """Probe every layer of a model on every task, with controls and intervals; write a folder and return a view on it.

    The options mean what they mean for ``spafit-probe`` and are described in :class:`probing.config.ProbeConfig`.

    Args:
        model: anything that :func:`spafit.load_model` takes, a :class:`spafit.LoadedModel`, or None for the built-in
            default.
        tasks: references such as ``core`` or ``conllu:PATH#upos``, or :class:`probing.Task` objects.
        seeds: the seeds, or how many: 2 means (0, 1), as in the shell.
        quiet: no progress on stderr.

    Returns:
        The results. Failed tasks are listed in ``results.run["tasks"]`` with the reason.

    Raises:
        SpafitError: bad options, a model or all tasks that cannot be used, an output folder that cannot be written.
        OutputError: ``out`` holds a run with other options, whose results would be replaced. The same options go on
            with that run and more tasks are added to it; ``overwrite="always"`` removes it first.
    """
    config = ProbeConfig(
        model=None if model is None else model if isinstance(model, str) else _reference(model),
        tasks=tuple(t if isinstance(t, str) else t.name for t in tasks),
        revision=revision,
        layers=layers,
        sites=tuple(sites),
        stack=stack,
        pooling=tuple(pooling),
        probe=(probe,) if isinstance(probe, str) else tuple(probe),
        controls=tuple(controls),
        measures=tuple(measures),
        max_train=max_train,
        seeds=seed_numbers(seeds),
        l2=None if l2 is None else tuple(l2),
        n_boot=n_boot,
        limit=limit,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        cache_dir=None if cache_dir is None else str(cache_dir),
        offline=offline,
        allow_pickle=allow_pickle,
        out=None if out is None else str(out),
        overwrite=overwrite,
    )
    given = [t for t in tasks if isinstance(t, Task)]
    references = [t for t in tasks if isinstance(t, str)]
    plan = plan_probing(
        replace(config, tasks=tuple(references)) if references else config,
        model=model,
        given=given,
        only_given=not references,
    )
    return run_plan(replace(plan, config=config), quiet=quiet)


def run_plan(plan: ProbePlan, *, command: str | None = None, quiet: bool = False) -> ProbeResults:
    """Carry out a plan: extract, fit and save task by task, then write the run's tables.

    A task that fails is recorded with its reason and the others go on. On Ctrl-C the finished tasks are kept, the
    tables are written for them, and ``KeyboardInterrupt`` goes on to the caller.
    """
    config, started = plan.config, time.time()
    seconds = dict(plan.seconds)
    if config.overwrite == "always":
        clear_run(plan.out)
    status: dict[str, dict[str, Any]] = {
        **{name: {"status": "failed", "error": why} for name, why in plan.failed.items()},
        **{t.name: {**task_facts(t), "status": "done" if t.name in plan.done else "waiting"} for t in plan.tasks},
    }
    notes: list[str] = [*plan.loaded.notes, *plan.notes]
    run: dict[str, Any] = {
        "schema_version": io.SCHEMA_VERSION,
        "command": command or "probing.probe_layers",
        "status": "running",
        "config": config.to_dict(),
        "model": model_facts(plan),
        "device": plan.device,
        "dtype": config.dtype,
        "seeds": list(config.seeds),
        "tasks": status,
        "texts": plan.texts,
        "truncated": sum(p.truncated for p in plan.extractions.values()),
        "warnings": notes,
        "seconds": seconds,
        **provenance(),
    }
    todo = [t for t in plan.tasks if t.name not in plan.done]
    if plan.measuring:
        for suffix in (".parquet", ".csv"):
            (plan.out / f"measures{suffix}").unlink(missing_ok=True)
    if todo:  # what an earlier run left must not be taken for this one's; its finished tasks stay in parts/
        for name in ("scores", "summaries"):
            for suffix in (".parquet", ".csv"):
                (plan.out / f"{name}{suffix}").unlink(missing_ok=True)
        for name in ("verdict.json", "strata.yaml", "figures/written.json"):
            (plan.out / name).unlink(missing_ok=True)
    io.write_json(plan.out / "run.json", run)
    try:
        stores: Stores = {}
        if todo or plan.measuring:
            stores = extract_states(plan, todo, notes, seconds, quiet=quiet)
        if todo:
            _fit(plan, todo, stores, status, seconds, quiet=quiet)
        if plan.measuring:
            _measure(plan, stores, status, seconds, quiet=quiet)
    except KeyboardInterrupt:
        run["status"] = "interrupted"
        for task in todo:  # the interruption may come right after a task was saved
            if status[task.name]["status"] == "waiting" and is_finished(plan.out, task.name, plan.task_key(task)):
                status[task.name]["status"] = "done"
        raise
    except SpafitError:
        run["status"] = "failed"
        raise
    else:
        failed = [n for n, s in status.items() if s["status"] == "failed" or s.get("failed_measures")]
        run["status"] = "partial" if failed else "complete"
    finally:
        with timed(seconds, "write tables"):
            results = _collect(plan, run, status)
        seconds["total"] = time.time() - started + sum(plan.seconds.values())
        if results is not None:
            io.write_table(plan.out / "scores", results.scores)
            io.write_table(plan.out / "summaries", results.summaries)
            if results.measures is not None:
                io.write_table(plan.out / "measures", results.measures)
        io.write_json(plan.out / "run.json", run)
    if results is None:
        reasons = "; ".join(f"{n}: {s['error']}" for n, s in status.items() if s["status"] == "failed")
        raise TaskError(f"No task could be probed. {reasons}")
    return results


def _fit(
    plan: ProbePlan,
    todo: Sequence[Task],
    stores: Stores,
    status: dict[str, dict[str, Any]],
    seconds: dict[str, float],
    *,
    quiet: bool,
) -> None:
    per_family = (
        sum(len(plan.hidden_of(s)) for s in plan.stacks) * len(plan.config.seeds) * (1 + len(plan.encoder_controls))
    )
    per_family *= len(plan.config.pooling) * len(plan.config.sites)
    families = [parse_probe(p) for p in plan.settings.probe]
    fitted = sum(suits(f, t) for t in todo for f in families)
    with Progress("Probing", fitted * per_family, quiet=quiet) as progress:
        for task in todo:
            progress.advance(0, description=f"Probing {task.name}")
            begun = time.time()
            try:
                notes_of_task = _probe_one(plan, task, stores, progress.advance, seconds)
            except _CAUGHT as error:
                if isinstance(error, OutputError):
                    raise
                # One broken task must not cost the others; the traceback is kept for whoever mends it.
                status[task.name].update(
                    status="failed",
                    error=str(error) or type(error).__name__,
                    traceback=None if isinstance(error, SpafitError) else traceback.format_exc(),
                )
            else:
                status[task.name].update(status="done", seconds=round(time.time() - begun, 2))
                status[task.name]["notes"] += notes_of_task


#: What one task or measure may raise without costing the others.
_CAUGHT = (SpafitError, ValueError, ArithmeticError, LookupError, RuntimeError, OSError)


def _measure(
    plan: ProbePlan, stores: Stores, status: dict[str, dict[str, Any]], seconds: dict[str, float], *, quiet: bool
) -> None:
    """Take the measures that are asked for and not there; one that fails is a note of its task."""
    named = {t.name: t for t in plan.tasks}
    todo = [(named[name], measure) for name, measure in plan.measuring if status[name]["status"] == "done"]
    with Progress("Measuring", len(todo), quiet=quiet) as progress, timed(seconds, "measures"):
        for task, measure in todo:
            progress.advance(0, description=f"{measure} of {task.name}")
            try:
                _measure_one(plan, task, measure, stores)
            except _CAUGHT as error:
                if isinstance(error, OutputError):
                    raise
                status[task.name].setdefault("failed_measures", {})[measure] = str(error) or type(error).__name__
            progress.advance(1)


def _measure_one(plan: ProbePlan, task: Task, measure: str, stores: Stores) -> None:
    from probing import measures

    scores, _, _ = read_part(plan.out, task.name)
    fitted = scores[(scores["control"] == "none") & (scores["probe"] == "linear") & scores["seed"].notna()]
    found, notes = [], []
    for stack, site in itertools.product(plan.stacks, plan.config.sites):
        store = stores["none", None, task.corpus.name, stack.name]
        rows, usable = rows_of_items(plan, task, store)
        hidden = [h for h in plan.hidden_of(stack) if h in store.hidden_of(site)]
        if reason := measures.unsuited(measure, task, hidden):
            notes.append(reason)
            continue
        for pooling in plan.config.pooling:
            own = fitted[(fitted["site"] == site) & (fitted["pooling"] == pooling) & (fitted["stack"] == stack.name)]
            penalties = {(int(s), int(h)): float(v) for s, h, v in own[["seed", "hidden", "l2"]].to_numpy()}
            found.append(
                measures.measure_task(
                    measure, task, plan.settings, hidden=hidden, usable=usable, penalties=penalties,
                    states=lambda h, positions, site=site, pooling=pooling, store=store, rows=rows: (  # type: ignore[misc]
                        item_states(task, store, rows[positions], pooling=pooling, hidden=h, site=site)
                    ),
                    where={"stack": stack.name, "site": site, "pooling": pooling},
                    device="cpu" if plan.device.startswith("mps") else plan.device,
                )
            )  # fmt: skip
    tables = [[getattr(m, name) for m in found if len(getattr(m, name))] for name in ("scores", "summaries", "items")]
    score_rows, summaries, items = (
        pd.concat(t, ignore_index=True) if t else pd.DataFrame({"task": []}) for t in tables
    )
    write_part(
        plan.out, measure_part(task.name, measure), key=plan.measure_key(task, measure), labels=task.labels,
        scores=score_rows, summaries=summaries, items=items if len(items) else None, weights=None,
        notes=list(dict.fromkeys(notes)),
    )  # fmt: skip


def _probe_one(
    plan: ProbePlan,
    task: Task,
    stores: Stores,
    progress: Callable[[float], None],
    seconds: dict[str, float],
) -> list[str]:
    """Fit, score and save one task; returns notes on what was left out."""
    notes: list[str] = []
    parts = [_probe_stack(plan, stack, task, stores, progress, seconds, notes) for stack in plan.stacks]
    scores, items = [table for part in parts for table in part[0]], [table for part in parts for table in part[1]]
    several = len(plan.stacks) > 1
    weights = {
        f"{stack.name}/{key}" if several else key: value
        for stack, part in zip(plan.stacks, parts, strict=True) for key, value in part[2].items()
    }  # fmt: skip
    score_rows, item_rows = pd.concat(scores, ignore_index=True), pd.concat(items, ignore_index=True)
    with timed(seconds, "summarize"):
        view = ProbeResults({}, score_rows, pd.DataFrame(), None, {task.name: item_rows})
        summaries = summary_table(view, task.name, n_boot=plan.settings.n_boot)
    with timed(seconds, "write tables"):
        write_part(
            plan.out,
            task.name,
            key=plan.task_key(task),
            labels=task.labels,
            scores=score_rows,
            summaries=summaries,
            items=item_rows,
            weights=weights,
            notes=notes,
        )
    return notes


def _probe_stack(
    plan: ProbePlan,
    stack: Stack,
    task: Task,
    stores: Stores,
    progress: Callable[[float], None],
    seconds: dict[str, float],
    notes: list[str],
) -> tuple[list[pd.DataFrame], list[pd.DataFrame], dict[str, np.ndarray]]:
    """Scores, items and weights of one task at one stack; what was left out is added to ``notes``."""
    corpus, at = task.corpus.name, stack.name
    own = stores["none", None, corpus, at]
    texts = texts_of_items(plan, task)
    encoded = (texts >= 0).all(1)  # the others are training items that no seed drew
    _, usable = rows_of_items(plan, task, own)
    for seed in plan.config.seeds if "permuted-order" in plan.encoder_controls else ():
        usable &= rows_of_items(plan, task, stores["permuted-order", seed, corpus, at])[1]  # words move out, too
    found_notes: list[str] = []
    if (usable < encoded).any():
        what = "word" if task.unit == "word" else "item"
        found_notes.append(
            f"{int((usable < encoded).sum())} {what}(s) beyond the model's window, or without tokens, were left out"
        )
    elif own.truncated[texts[encoded]].any():
        cut = int(own.truncated[np.unique(texts[encoded])].sum())
        found_notes.append(f"{cut} text(s) were cut at the model's window")
    scores, items, weights = [], [], {}
    with timed(seconds, "baselines"):
        baselines, left_out = _baselines(plan, task, usable)
        found_notes += left_out
    for site in plan.config.sites:
        for pooling in plan.config.pooling:
            present = [h for h in plan.hidden_of(stack) if h in own.hidden_of(site)]
            for probe in plan.settings.probe:
                family = parse_probe(probe)
                if not suits(family, task):
                    continue
                read = partial(
                    _reader, family, task, rows_of_items(plan, task, own, family=family)[0], pooling=pooling, site=site
                )
                common: dict[str, Any] = {
                    "hidden": present,
                    "states": read(own),
                    "encoders": {
                        control: {s: read(stores[control, s, corpus, at]) for s in plan.config.seeds}
                        for control in plan.encoder_controls
                    },
                    "usable": usable,
                    "device": "cpu" if plan.device.startswith("mps") else plan.device,
                    "progress": progress,
                }
                where = {"stack": stack.name, "site": site, "pooling": pooling, "probe": probe}
                if isinstance(family, Structural):
                    with timed(seconds, "fit probes"):
                        found = fit_trees(task, plan.settings, rank=family.rank, **common)
                    with timed(seconds, "score"):
                        scores.append(tree_score_table(task, found, plan.settings, where=where))
                        found_notes.append(order_words(scores[-1], blocks=stack.num_blocks))
                        items.append(tree_item_table(task, found, where=where))
                    weights.update({f"{site}/{pooling}/{probe}/{k}": v for k, v in found.weights.items()})
                    continue
                with timed(seconds, "fit probes"):
                    fit: TaskFit = fit_task(task, plan.settings, baselines=baselines, family=family, **common)
                with timed(seconds, "score"):
                    scores.append(score_table(task, fit, plan.settings, where=where))
                    items.append(item_table(task, fit, where=where))
                weights.update({f"{site}/{pooling}/{probe}/{k}": v for k, v in fit.weights.items()})
    notes += [n if len(plan.stacks) == 1 else f"{stack.name}: {n}" for n in found_notes]
    return scores, items, weights


def _reader(
    family: NamedFamily, task: Task, rows: np.ndarray, store: ActivationStore, *, pooling: str, site: str
) -> Features:  # fmt: skip
    return lambda hidden, positions: family_states(
        family, task, store, rows[positions], pooling=pooling, hidden=hidden, site=site
    )


def _baselines(
    plan: ProbePlan, task: Task, usable: np.ndarray
) -> tuple[dict[str, dict[int, BaselineOutputs]], list[str]]:
    """Outputs of every baseline asked for, by seed (one where all draw the same items); notes on those left out."""
    wanted = [c for c in plan.config.controls if is_baseline(c)]
    if not wanted:
        return {}, []
    if task.kind == "tree":
        return {}, [f"no control {c}: the task has trees" for c in wanted]
    rows = split_rows(task, plan.settings, label_values(task), usable)
    seeds = plan.config.seeds[:1] if rows.same_draw else plan.config.seeds
    reasons = {c: unsuited(c, task) for c in wanted}
    found = {c: {s: baseline_outputs(c, task, rows, s) for s in seeds} for c in wanted if not reasons[c]}
    return found, [r for r in reasons.values() if r]


def _collect(plan: ProbePlan, run: dict[str, Any], status: dict[str, dict[str, Any]]) -> ProbeResults | None:
    """The tables of all finished tasks, in the order of the run; None if there is none."""
    parts, summaries, measures = [], [], []
    for task in plan.tasks:
        if status[task.name]["status"] != "done":
            continue
        part, summary, notes = read_part(plan.out, task.name)
        parts.append(part)
        summaries.append(summary)
        for measure in MEASURES:
            name = measure_part(task.name, measure)
            if is_finished(plan.out, name, plan.measure_key(task, measure)):
                rows, more, why = read_part(plan.out, name)
                measures += [rows] if len(rows) else []
                summaries += [more] if len(more) else []
                notes += why
        status[task.name]["notes"] = [*task.notes, *notes]
    if not parts:
        return None
    scores = pd.concat(parts, ignore_index=True)[list(SCORE_COLUMNS)]
    found = pd.concat(measures, ignore_index=True)[list(SCORE_COLUMNS)] if measures else None
    return ProbeResults(run, scores, pd.concat(summaries, ignore_index=True), plan.out, measures=found)


def _reference(model: Any) -> str:
    return model.reference if hasattr(model, "reference") else f"in memory: {type(model).__name__}"
