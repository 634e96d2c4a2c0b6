"""Probe representations that a user already has: arrays in, the same results out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from probing.config import check_penalties, seed_numbers
from probing.fitting import ProbeSettings, States, fit_task
from probing.probes.families import Structural, parse_probes, reads_words
from probing.results import ProbeResults, summary_table
from probing.scoring import item_table, score_table
from probing.tasks.base import Corpus, Kind, Level, Task, Text
from spafit import io
from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator, provenance


def probe_arrays(
    X: np.ndarray,
    y: Sequence[Any] | np.ndarray,
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
    split: Sequence[str] | np.ndarray | None = None,
    control: Sequence[str] | np.ndarray | None = None,
    random_states: Mapping[int, np.ndarray] | None = None,
    name: str = "task",
    level: Level = "other",
    seeds: int | Sequence[int] = (0, 1, 2),
    max_train: int | None = None,
    kind: Kind = "classes",
    probe: str | Sequence[str] = ("linear",),
    l2: Sequence[float] | None = None,
    n_boot: int = 1000,
) -> ProbeResults:
    """Probe each layer of an array of representations.

    Args:
        X: states, shape (hidden states, items, width); position 0 is the embeddings.
        y: labels, shape (items,); for several labels per item 0 or 1, shape (items, labels).
        groups: cluster of each item for splits and intervals, such as the sentence of a token; each item by default.
        split: ``train``, ``dev`` or ``test`` per item; by default 60/20/20 by group, the same on every call.
        control: the type of each item (such as the word), which draws its control label; none by default.
        random_states: states of a random-weight encoder for each seed, shaped like ``X``; none by default.
        name: the task's name in the tables.
        level: the linguistic level it is filed under.
        seeds: each redraws training items and control labels; a number n means seeds 0 to n - 1.
        max_train: training items per seed; None takes 80 % of them, at most 20,000.
        kind: what ``y`` holds: ``classes``, ``number`` (regression) or ``multilabel`` (a yes-or-no question per label).
        probe: probe families (:mod:`probing.probes.families`), such as ``"linear,mlp:64"``.
        l2: penalties tried; None takes the family's own grid.
        n_boot: bootstrap replicates.

    Returns:
        Results with the same tables as a run on a model; ``.save(folder)`` writes them.

    Raises:
        UsageError: shapes that do not fit, no seed, a penalty that is not positive and finite.
        NumericalError: ``X`` is not finite.
        TaskError: the labels cannot be probed (one class, a class in test only, numbers that are missing or constant).
    """
    seeds = seed_numbers(seeds)
    if l2 is not None:
        check_penalties(tuple(l2))
    every = [f for text in ((probe,) if isinstance(probe, str) else probe) for f in parse_probes(text)]
    families = [f for f in every if not isinstance(f, Structural)]
    if len(families) < len(every):
        raise UsageError(
            "structural probes need trees, which labels of single items are not. Use "
            "probing.tree_scores.structural_arrays(states, trees)."
        )
    if any(reads_words(f) for f in families):
        raise UsageError(
            "edge-span probes read every word of a span, of which X has one state. Use "
            "probing.probes.edge_span.fit_edge_attention(words, spans, labels, …), or the linear probe."
        )
    states = np.asarray(X)
    if states.ndim != 3:
        raise UsageError(f"X must have shape (hidden states, items, width); got {states.shape}.")
    n = states.shape[1]
    columns = {"y": y, "groups": groups, "split": split, "control": control}
    for column, values in columns.items():
        if values is not None and len(values) != n:
            raise UsageError(f"{column} has {len(values)} entries; X has {n} items (its second axis).")
    for seed, other in (random_states or {}).items():
        if np.shape(other) != states.shape:
            raise UsageError(f"random_states[{seed}] has shape {np.shape(other)}; X has {states.shape}.")
    if random_states and set(random_states) != set(seeds):
        raise UsageError(f"random_states needs one entry per seed {seeds}; got {tuple(random_states)}.")
    for hidden, layer in enumerate(states):
        if not np.isfinite(layer).all():
            raise NumericalError(f"X[{hidden}] holds NaN or infinite values; leave those items out.")

    if control is not None and "" in np.asarray(control).astype(str):
        raise UsageError("control has an empty type; name a type for every item, or leave control out.")
    group = np.arange(n).astype(str) if groups is None else np.asarray(groups).astype(str)
    labels, codes = _labels(np.asarray(y), kind)
    items = pd.DataFrame(
        {
            "item": np.arange(n).astype(str),
            "text": np.arange(n),
            "span": -1,
            "label": codes,
            "split": _split_by_group(group) if split is None else np.asarray(split).astype(str),
            "group": group,
            "control": "" if control is None else np.asarray(control).astype(str),
        }
    )
    texts = tuple(Text(f"item {i}") for i in range(n))
    task = Task(name, level, "sentence", labels, Corpus("arrays", texts), items, kind=kind).validate()
    controls = tuple(
        c for c, given in (("word-type", control is not None), ("random-encoder", bool(random_states))) if given
    )
    settings = ProbeSettings(
        seeds=seeds,
        max_train=max_train,
        l2=None if l2 is None else tuple(l2),
        controls=controls,
        n_boot=n_boot,
        probe=tuple(f.name for f in families),
    )
    scores, found = [], []
    for family in families:
        fit = fit_task(
            task,
            settings,
            hidden=range(len(states)),
            states=_reader(states),
            encoders={"random-encoder": {seed: _reader(np.asarray(x)) for seed, x in random_states.items()}}
            if random_states
            else {},
            family=family,
        )
        where = {"stack": "arrays", "site": "block", "pooling": "given", "probe": family.name}
        scores.append(score_table(task, fit, settings, where=where))
        found.append(item_table(task, fit, where=where))
    rows, predicted = pd.concat(scores, ignore_index=True), pd.concat(found, ignore_index=True)
    run = {
        "schema_version": io.SCHEMA_VERSION,
        "command": "probing.probe_arrays",
        "status": "complete",
        "model": {"name": "arrays", "stack": "arrays", "blocks": len(states) - 1, "width": states.shape[2]},
        "seeds": list(seeds),
        "tasks": {name: {"status": "done", "level": level, "unit": "sentence", "kind": kind, "notes": []}},
        **provenance(),
    }
    results = ProbeResults(run, rows, pd.DataFrame(), None, {name: predicted})
    return ProbeResults(run, rows, summary_table(results, name, n_boot=n_boot), None, results.item_tables)


def _labels(y: np.ndarray, kind: Kind) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the labels, and the task's ``label`` column."""
    if kind == "number":
        return (), y.astype(np.float64)
    if kind == "multilabel":
        if y.ndim != 2 or not np.isin(y, (0, 1)).all():
            raise UsageError(f"Several labels per item are 0 or 1, shape (items, labels); y has shape {y.shape}.")
        column = [",".join(map(str, np.flatnonzero(row))) for row in y]
        return tuple(str(i) for i in range(y.shape[1])), np.array(column, dtype=object)
    names, codes = np.unique(y.astype(str), return_inverse=True)
    return tuple(names.tolist()), codes


def _reader(states: np.ndarray) -> States:
    return lambda hidden, rows: np.asarray(states[hidden][rows], dtype=np.float32)


def _split_by_group(group: np.ndarray) -> np.ndarray:
    """60/20/20 by group, drawn once from the groups' names."""
    names = np.unique(group)
    order = generator(0, "split").permutation(len(names))
    share = np.empty(len(names))
    share[order] = np.arange(len(names)) / len(names)
    part = np.where(share < 0.6, "train", np.where(share < 0.8, "dev", "test"))
    return part[np.searchsorted(names, group)]
