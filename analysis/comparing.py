"""`compare`: models before and after training on the same items, splits, probes and seeds, into one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.comparison import KEYS, Comparison, trained_tasks, with_sequence
from analysis.forgetting import COLUMNS, forgetting_table
from analysis.language_side import read_language_side
from analysis.readings import Side, TaskReadings, read_task
from analysis.sides import first_side, is_pair, later_side, side_labels
from analysis.task_measures import (
    TASK_TABLES,
    TaskFindings,
    TaskOptions,
    check_classifiers,
    check_erased,
    measure_tasks,
)  # fmt: skip
from probing.config import ProbeConfig, seed_numbers
from probing.planning import extraction_options, timed
from probing.results import ProbeResults
from probing.running import run_plan
from probing.shared_prefix import extract_sharing
from probing.tasks.base import Task
from spafit import io
from spafit.errors import DataError, UsageError
from spafit.runtime import Progress, provenance

if TYPE_CHECKING:
    from spafit.data.training import TrainData
    from spafit.stacks import Stack

#: Sentences that drift is measured on, at most.
DRIFT_SENTENCES = 2000


def compare(
    before: Any,
    after: Sequence[Any] | Any,
    *,
    tasks: Sequence[str | Task] = ("core",),
    labels: Sequence[str] | None = None,
    controls: Sequence[str] = ("word-type", "random-encoder"),
    seeds: int | Sequence[int] = (0, 1, 2),
    max_train: int | None = None,
    limit: int | None = None,
    pooling: Sequence[str] = ("mean",),
    stack: str | None = None,
    n_boot: int = 1000,
    drift: bool = True,
    text: str | Path | None = None,
    blimp: str | Path | None = None,
    blimp_pairs: int | None = 100,
    refit_on: str | Path | None = None,
    lens: bool = False,
    data: TrainData | None = None,
    cause_items: int = 200,
    use_items: int = 24,
    erase: Sequence[str] = (),
    shapley: int | None = None,
    sequence: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    out: str | Path = "runs/compare",
    command: str | None = None,
    quiet: bool = False,
) -> Comparison:
    """What training changed, per task and hidden state: lost, moved, re-encoded, and drift; write a folder.

    The first model is probed with its controls. Of every other one only hidden states from its first changed block on
    are computed and probed: the others' terms are exactly 0. Finished work is kept, and the same call goes on.

    Folders of probing runs are compared too: their models are loaded again where they can be had with the same
    weights; otherwise only what their tables hold is compared (what was readable before and is readable now), and the
    result says so. Tasks, seeds and controls are then those of the runs.

    Args:
        before: anything that :func:`spafit.load_model` takes (None: the built-in default), a
            :class:`spafit.LoadedModel`, or the folder of a probing run.
        after: one or more of the same kind; adapters of the first model as a rule. In the order of training, where
            they follow one another.
        tasks: as in :func:`probing.probe_layers`.
        labels: names of the models after training; by default made from their references.
        controls: ``word-type`` is subtracted from every reading; ``random-encoder`` gives the share forgotten and
            costs an encoder per seed.
        seeds: each redraws training items and controls.
        max_train: training items per seed.
        limit: items of each split, for a quick look.
        pooling: how tokens become one state.
        stack: which stack; several by commas (``encoder,decoder``).
        n_boot: bootstrap replicates.
        drift: also measure the drift of states and weights.
        text: file of running text, for perplexity and KL (:func:`analysis.retention.retention_table`); the model
            before training must have a language-model head, which is grafted on every tuned body.
        blimp: folder of BLiMP's files.
        blimp_pairs: pairs of each paradigm; None takes all.
        refit_on: file of other running text, on which the head is re-fitted, too.
        lens: also read every hidden state through an affine lens fitted on ``refit_on`` (:mod:`analysis.lens`).
        data: labelled items of the classification task that the models after were trained on
            (:func:`spafit.data.training.glue_data`, :func:`~spafit.data.training.table_data`): cause and use are then
            measured in each that is a classifier of it, on its first split other than the training one.
        cause_items: items that interventions on blocks are scored on; 0 leaves them out.
        use_items: items whose conductance is computed; 0 leaves it out.
        erase: probing tasks whose labels are erased from each hidden state of the classifiers (LEACE).
        shapley: random orders of blocks for sampled Shapley values; None gives exact ones up to eight blocks; 0 none.
        sequence: for models trained one after another, the probing task that each stage trained, in order; ``-`` for a
            stage that trained none of them.
        device: torch device.
        dtype: precision of the forward passes.
        cache_dir: where states are cached.
        offline: never ask the hub.
        allow_pickle: accept pickle weights.
        out: output folder.
        command: how this was called, for the record.
        quiet: no progress on stderr.

    Raises:
        SpafitError: a model, task or option that cannot be used; runs that share no task or differ in their settings.
    """
    started, seconds = time.time(), dict[str, float]()
    folder = Path(out)
    references = list(after) if isinstance(after, list | tuple) and not is_pair(after) else [after]
    if not references:
        raise UsageError("Give at least one model after training.")
    names = side_labels(references, labels)
    options, facts_of = None, {}
    if data is not None:
        options = TaskOptions(data, cause_items, use_items, tuple(erase), shapley, n_boot)
        given_models = dict(zip(names, references, strict=True))
        facts_of = check_classifiers(given_models, options, offline=offline, allow_pickle=allow_pickle)
    elif erase:
        raise UsageError("Erasing is measured on the task that the models were trained on; give data, too.")
    reader = read_language_side(
        before, text, blimp, blimp_pairs, refit_on, lens=lens, offline=offline, allow_pickle=allow_pickle
    )
    config = ProbeConfig(
        model=None, tasks=tuple(t if isinstance(t, str) else t.name for t in tasks), stack=stack,
        pooling=tuple(pooling), controls=tuple(controls), max_train=max_train, seeds=seed_numbers(seeds),
        n_boot=n_boot, limit=limit, device=device, dtype=dtype, offline=offline, allow_pickle=allow_pickle,
        cache_dir=None if cache_dir is None else str(cache_dir), out=str(folder / "before"),
    )  # fmt: skip
    given = [t for t in tasks if isinstance(t, Task)]
    first = first_side(before, config, given)
    stages = None if sequence is None else trained_tasks(sequence, names, first.task_names)
    check_erased(first, erase)
    sides = {name: later_side(ref, name, first, folder, seconds) for name, ref in zip(names, references, strict=True)}
    _extract(first, sides, quiet=quiet, seconds=seconds)
    with timed(seconds, "probe before"):
        first = replace(first, results=_results(first, quiet=quiet))
    for name, side in sides.items():
        with timed(seconds, "probe after"):
            sides[name] = replace(side, results=_results(side, quiet=quiet))
    forgetting, drifts, maps, weights = [], [], [], []
    facts: dict[str, dict[str, Any]] = {}
    for (name, side), reference in zip(sides.items(), references, strict=True):
        with timed(seconds, "forgetting"):
            forgetting += _forgetting(name, first, side, n_boot=n_boot, quiet=quiet)
        facts[name] = _facts(first, side, reference)
        if drift and first.plan is not None and side.plan is not None and side.comparable:
            with timed(seconds, "drift"):
                for at in first.plan.stacks:
                    table, heat = _drift(name, first, side, at)
                    drifts.append(table)
                    maps.append(heat)
                weights.append(_weights(name, first, side))
    retained = []
    for name, side in sides.items():
        plan = side.plan or first.plan  # a side without a plan is the model before training
        if reader is not None and plan is not None:
            with timed(seconds, "retention"):
                retained.append(reader.measure(name, plan.loaded.model, quiet))
    found_by_task = TaskFindings()
    if options is not None:
        found_by_task = measure_tasks(
            first, sides, facts_of, options, folder=folder, language=reader,
            seconds=seconds, quiet=quiet,
        )  # fmt: skip
    if not forgetting:
        raise DataError("The runs share no task with the same items, so nothing can be compared. Probe the same tasks.")
    seconds["total"] = round(time.time() - started, 1)
    run = {
        "schema_version": io.SCHEMA_VERSION,
        "command": command or "analysis.compare",
        "before": first.name,
        "after": list(sides),
        "models": facts,
        "tasks": {t: first.facts(t) for t in dict.fromkeys(r["task"].iloc[0] for r in forgetting)},
        "task": None if options is None else options.record(found_by_task.reasons),
        "notes": _notes(first, sides),
        "seconds": seconds,
        **provenance(),
    }
    found = Comparison(
        run=run, forgetting=pd.concat(forgetting, ignore_index=True)[[*KEYS, *COLUMNS]],
        drift=_together(drifts), cka_map=_together(maps), weights=_together(weights), retention=_together(retained),
        **{name: found_by_task.table(name) for name in TASK_TABLES}, sequence=None, folder=folder,
    )  # fmt: skip
    if stages is not None:
        found = with_sequence(found, stages)
    found.save(folder)
    return found


# ---------------------------------------------------------------- states and probes


def _extract(first: Side, sides: dict[str, Side], *, quiet: bool, seconds: dict[str, float]) -> None:
    """States of all models, shared ones once; what this leaves out the probing runs compute themselves."""
    if first.plan is None or len(first.plan.stacks) > 1:  # a run of several stacks has them from one pass
        return
    with_plan = {n: s for n, s in sides.items() if s.plan is not None and s.comparable}
    corpora = {c: t.texts for c, t in first.plan.needed.items()}
    config = first.plan.config
    todo = {
        n: (s.plan.loaded, s.unchanged) for n, s in with_plan.items()
        if s.plan is not None and {t.name for t in s.plan.tasks} - s.plan.done
    }  # fmt: skip
    if not todo:
        return
    tokens = sum(p.tokens for p in first.plan.extractions.values()) * (1 + len(todo))
    with timed(seconds, "encode"), Progress(f"Encoding with {1 + len(todo)} models", tokens, quiet=quiet) as progress:
        for corpus, texts in corpora.items():
            extract_sharing(
                first.plan.loaded, todo, texts, options=extraction_options(config, first.plan.tasks, corpus),
                device=first.plan.device, cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
                progress=progress.advance,
            )  # fmt: skip


def _results(side: Side, *, quiet: bool) -> ProbeResults | None:
    return side.results if side.plan is None else run_plan(side.plan, quiet=quiet)


# ---------------------------------------------------------------- tables


def _forgetting(name: str, first: Side, side: Side, *, n_boot: int, quiet: bool) -> list[pd.DataFrame]:
    tables = []
    assert first.results is not None
    tasks = [t for t in first.results.tasks_with_bits if side.results is None or t in side.results.tasks]
    with Progress(f"Comparing {name}", len(tasks), quiet=quiet) as progress:
        for task in tasks:
            found = read_task(first, side, task)
            if found is not None:
                tables += [table for reading in found for table in _tables(name, reading, n_boot=n_boot)]
            progress.advance(1)
    return tables


def _tables(name: str, reading: TaskReadings, *, n_boot: int) -> Iterator[pd.DataFrame]:
    """The task's scores less the control task's, where there is one, and the task's alone with the share forgotten."""
    for subtracted in ("word-type", "none"):
        control = reading.control if subtracted == "word-type" else None
        if subtracted == "word-type" and control is None:
            continue
        table = forgetting_table(
            reading.values, reading.groups, hidden=reading.hidden, control=control,
            random=reading.random if subtracted == "none" else None, reasons=reading.reasons, n_boot=n_boot,
        )  # fmt: skip
        yield table.assign(**{"model": name, **reading.keys, "control": subtracted})[[*KEYS, *COLUMNS]]


def _drift(name: str, first: Side, side: Side, stack: Stack) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drift of the largest corpus's states: sentences where there are any, else words by sentence."""
    from analysis.drift import cka_heat_map, drift_table

    assert first.plan is not None
    corpus = max(first.plan.needed, key=lambda c: len(first.plan.needed[c].texts))  # type: ignore[union-attr]
    unit, groups, states = side_states(first, side, corpus, most=DRIFT_SENTENCES, stack=stack.name)
    hidden = list(first.plan.hidden_of(stack))
    own = {"model": name, "unit": unit, "stack": stack.name}
    tables = drift_table(states[0], states[1], groups, hidden=hidden), cka_heat_map(*states, groups, hidden=hidden)
    return tuple(t.assign(**own)[[*own, *[c for c in t if c not in own]]] for t in tables)  # type: ignore[return-value]


def side_states(
    first: Side, side: Side, corpus: str, *, most: int, stack: str
) -> tuple[str, np.ndarray, tuple[Callable[[int], np.ndarray], Callable[[int], np.ndarray]]]:
    """Unit, sentence of each row, and readers of the states of two models by hidden index, for part of a corpus."""
    from spafit.runtime import generator

    stores = first.store(corpus, stack), side.store(corpus, stack)
    assert first.plan is not None
    n = len(first.plan.needed[corpus].texts)
    texts = np.sort(generator(0, "drift sentences").permutation(n)[:most])
    pooling = first.plan.config.pooling[0]
    sentences = any(not t.span_columns for t in first.plan.tasks if t.corpus.name == corpus)
    if sentences:
        rows, groups = texts, texts
    else:
        starts, stops = stores[0].word_offsets[texts], stores[0].word_offsets[texts + 1]
        rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        groups = np.repeat(texts, stops - starts)
        good = stores[0].word_valid[rows] & stores[1].word_valid[rows]
        rows, groups = rows[good], groups[good]

    def reader(of: Side, store: Any) -> Callable[[int], np.ndarray]:
        read = store.sentences if sentences else store.words
        return lambda h: read(pooling, hidden=h, rows=rows)

    old = reader(first, stores[0])
    new = reader(side, stores[1])
    both = old, lambda h: old(h) if h < side.unchanged_of(stack) else new(h)
    return ("sentence" if sentences else "word"), groups, both


def _weights(name: str, first: Side, side: Side) -> pd.DataFrame:
    from analysis.weights import weight_drift

    assert first.plan is not None
    assert side.plan is not None
    table = weight_drift(first.plan.loaded.model.state_dict(), side.plan.loaded.model.state_dict())
    return table.assign(model=name)[["model", *table.columns]]


def _facts(first: Side, side: Side, reference: Any) -> dict[str, Any]:
    loaded = None if side.plan is None else side.plan.loaded
    given = str(reference) if isinstance(reference, str | Path) else None
    return {
        "reference": given if loaded is None else loaded.reference,
        "weights_digest": None if loaded is None else loaded.weights_digest,
        "adapter_digest": None if loaded is None else loaded.adapter_digest,
        "unchanged": side.unchanged,
        "unchanged_by_stack": dict(side.unchanged_by),
        "missing": " ".join(m.strip() for m in (side.missing, first.why, side.why) if m).strip(),
    }


def _notes(first: Side, sides: dict[str, Side]) -> list[str]:
    notes = [] if first.results is None else list(first.results.run["warnings"])
    if first.results is not None:
        trees = [t for t in first.results.tasks if t not in first.results.tasks_with_bits]
        notes += [f"{t}: structural probes are not compared; their scores stand in each model's own run" for t in trees]
    for name, side in sides.items():
        notes += [f"{name}: {n}" for n in (() if side.results is None else side.results.run["warnings"])]
    return list(dict.fromkeys(notes))


def _together(tables: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    return pd.concat(tables, ignore_index=True) if tables else None
