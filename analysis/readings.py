"""The four readings of one task: by the probe fitted before training and by a new one, with and without alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from analysis.alignment import Alignment, fit_alignment
from probing.item_states import family_states, rows_of_items
from probing.planning import ProbePlan, extraction_options
from probing.probes.families import parse_probe
from probing.probes.span_words import SpanWords
from probing.results import ProbeResults
from probing.tasks.base import Task
from probing.transfer import StoredProbe, stored_probes
from spafit.errors import DataError
from spafit.runtime import generator

if TYPE_CHECKING:
    from probing.store import ActivationStore

#: Items that an alignment is fitted on, at most: a random part of those that belong to training sentences.
MOST_ALIGNED = 20_000
Metric = Literal["accuracy", "bits"]
METRICS: tuple[Metric, ...] = ("accuracy", "bits")
#: Corpus, unit, stack, pooling and hidden index.
AlignmentKey = tuple[str, str, str, str, int]


@dataclass(frozen=True)
class Side:
    """One model of a comparison.

    Attributes:
        name: label in the tables.
        plan: what was probed; None where the model is not to be had, or is the same as before training.
        results: tables of the probing run, once it is there.
        folder: of the probing run.
        unchanged: number of hidden states that are bitwise those before training, of the first stack.
        why: why the model is not to be had.
        comparable: hidden states of both models have the same width.
        missing: what cannot be compared.
        unchanged_by: like ``unchanged`` for each stack, where several are compared.
    """

    name: str
    plan: ProbePlan | None
    results: ProbeResults | None
    folder: Path | None
    unchanged: int
    why: str
    comparable: bool = True
    missing: str = ""
    unchanged_by: Mapping[str, int] = field(default_factory=dict)
    stores: dict[tuple[str, str], ActivationStore] = field(default_factory=dict, compare=False, repr=False)
    alignments: dict[AlignmentKey, Alignment | str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks that are probed, or that a finished run's tables hold."""
        if self.plan is not None:
            return [t.name for t in self.plan.tasks]
        return [] if self.results is None else list(self.results.tasks)

    def unchanged_of(self, stack: str) -> int:
        """Number of hidden states of one stack that are bitwise those before training."""
        return self.unchanged_by.get(stack, self.unchanged)

    def store(self, corpus: str, stack: str | None = None) -> ActivationStore:
        """States of one corpus at one stack (the first by default), from the cache."""
        from probing.extraction import extract

        assert self.plan is not None
        at = self.plan.stack.path if stack is None else stack
        if (corpus, at) not in self.stores:
            config = self.plan.config
            options = {**extraction_options(config, self.plan.tasks, corpus), "stack": at}
            self.stores[corpus, at] = extract(
                self.plan.loaded, self.plan.needed[corpus].texts, **options, device=self.plan.device,
                cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
            )  # fmt: skip
        return self.stores[corpus, at]

    def facts(self, task: str) -> dict[str, Any]:
        """What the run's record says of a task."""
        assert self.results is not None
        return dict(self.results.run["tasks"][task])


@dataclass(frozen=True)
class TaskReadings:
    """Scores of one task's test items in the four readings, for one metric, pooling and test split.

    Attributes:
        values: shape (4, seeds, hidden, items); NaN where a reading does not exist.
        control: the same for the word-type control task, or None.
        random: with random-weight encoders, shape (seeds, hidden, items), or None.
        groups: sentence of each item.
        hidden: hidden indices.
        reasons: why a reading is missing at each hidden state.
        keys: task, level, unit, stack, site, pooling, probe, split, metric.
    """

    values: np.ndarray
    control: np.ndarray | None
    random: np.ndarray | None
    groups: np.ndarray
    hidden: tuple[int, ...]
    reasons: tuple[str, ...]
    keys: dict[str, str]


def read_task(first: Side, side: Side, name: str) -> list[TaskReadings] | None:
    """All readings of one task, or None where the two runs do not hold the same items.

    Raises:
        DataError: the runs differ in what was probed, so that their numbers do not stand beside each other.
    """
    assert first.results is not None
    facts = first.facts(name)
    if side.results is not None and side.facts(name)["digest"] != facts["digest"]:
        return None
    old = first.results.items(name)
    new = old if side.results is None else side.results.items(name)
    old, new = (t[t["site"] == "block"] for t in (old, new))
    found = []
    for (stack, pooling, probe), own in old.groupby(["stack", "pooling", "probe"], observed=True, sort=False):
        theirs = new[(new["stack"] == stack) & (new["pooling"] == pooling) & (new["probe"] == probe)]
        keys = {
            "task": name, "level": str(facts["level"]), "unit": str(facts["unit"]), "stack": str(stack),
            "site": "block", "pooling": str(pooling), "probe": str(probe),
        }  # fmt: skip
        hidden = tuple(sorted(int(h) for h in own["hidden"].unique()))
        found += _readings(first, side, own, theirs, hidden, keys)
    return found


#: Control ("none" for the task itself) -> scores of shape (metrics, 4, seeds, hidden, items).
Readings = dict[str, np.ndarray]


def _readings(
    first: Side, side: Side, old: pd.DataFrame, new: pd.DataFrame, hidden: tuple[int, ...], keys: dict[str, str]
) -> list[TaskReadings]:
    there = set(old["control"].astype(str).unique())
    controls = [c for c in ("none", "word-type", "random-encoder") if c in there]  # a run may hold others
    before = _Arrays(old, hidden)
    changed = [k for k, h in enumerate(hidden) if h >= side.unchanged_of(keys["stack"])]
    after = _Arrays(new, tuple(hidden[k] for k in changed)) if changed else None
    if after is not None and not np.array_equal(after.items, before.items):
        raise DataError(
            f"{keys['task']}: the runs do not hold the same test items in the same order. Probe both with the same "
            "options."
        )
    seeds = max(len(before.of(c)[0]) for c in controls)
    values: Readings = {}
    for control in (c for c in ("none", "word-type") if c in controls):
        pre = _broadcast(before.of(control), seeds)
        four = np.stack([pre] * 4, axis=1)  # unchanged hidden states: every reading is the same number
        if after is not None:
            four[:, 1:3, :, changed] = np.nan
            four[:, 3][:, :, changed] = _broadcast(after.of(control), seeds)
        values[control] = four
    reasons = [""] * len(hidden)
    _fill_transferred(first, side, values, hidden, keys, before.items, reasons)
    random = _broadcast(before.of("random-encoder"), seeds) if "random-encoder" in controls else None
    table = old.iloc[: len(before.items)]
    splits, groups = table["split"].astype(str).to_numpy(), table["group"].astype(str).to_numpy()
    found = []
    numbers = pd.api.types.is_float_dtype(old["label"])  # a predicted number is never just right: bits alone
    for m, metric in enumerate(METRICS):
        if numbers and metric == "accuracy":
            continue
        for split in dict.fromkeys(splits):
            at = splits == split
            # where word types never recur, the control task is at chance by construction
            minus = None if split == "unseen" or "word-type" not in values else values["word-type"][m][..., at]
            found.append(
                TaskReadings(
                    values["none"][m][..., at], minus, None if random is None else random[m][..., at], groups[at],
                    hidden, tuple(reasons), {**keys, "split": str(split), "metric": metric},
                )
            )  # fmt: skip
    return found


class _Arrays:
    """Scores of one item table as arrays."""

    def __init__(self, table: pd.DataFrame, hidden: tuple[int, ...]):
        self.hidden = hidden
        own = table[table["hidden"].isin(hidden)]
        self.control = own["control"]
        self.seed = own["seed"].to_numpy()
        one = (
            (self.control == "none").to_numpy() & (self.seed == self.seed[0]) & (own["hidden"] == hidden[0]).to_numpy()
        )
        self.items = own["item"][one].astype(str).to_numpy()
        self.right = _codes(own["prediction"], own["label"])
        self.bits = own["bits"].to_numpy(dtype=np.float64)

    def of(self, control: str) -> np.ndarray:
        """Right or not, and bits, of one control; shape (2, seeds, hidden, items).

        Raises:
            DataError: the table does not hold every item for every seed and hidden state.
        """
        chosen = (self.control == control).to_numpy()
        seeds, shape = len(np.unique(self.seed[chosen])), (len(self.hidden), len(self.items))
        if chosen.sum() != seeds * shape[0] * shape[1] or not seeds:
            raise DataError(
                f"A run's items hold {int(chosen.sum())} rows of {control} where {seeds} seeds × {shape[0]} hidden "
                f"states × {shape[1]} items are needed. Probe both models with the same options."
            )
        return np.stack([v[chosen].reshape(seeds, *shape) for v in (self.right, self.bits)])


def _codes(predictions: pd.Series, labels: pd.Series) -> np.ndarray:
    """Whether predictions are right, float64, NaN for numbers.

    Labels are compared as text where the two do not share their classes.
    """
    if pd.api.types.is_float_dtype(labels):
        return np.full(len(labels), np.nan)
    if predictions.dtype == labels.dtype and hasattr(predictions, "cat"):
        return (predictions.cat.codes.to_numpy() == labels.cat.codes.to_numpy()).astype(np.float64)
    return (predictions.astype(str).to_numpy() == labels.astype(str).to_numpy()).astype(np.float64)


def _broadcast(values: np.ndarray, seeds: int) -> np.ndarray:
    """A fit that every seed would repeat stands beside each seed's control; shape (metrics, seeds, hidden, items)."""
    return np.repeat(values, seeds, axis=1) if values.shape[1] == 1 and seeds > 1 else values


def _fill_transferred(
    first: Side,
    side: Side,
    values: Readings,
    hidden: tuple[int, ...],
    keys: dict[str, str],
    items: np.ndarray,
    reasons: list[str],
) -> None:
    """Put in what the probes of before say about the states after, as they are and aligned."""
    changed = [(k, h) for k, h in enumerate(hidden) if h >= side.unchanged_of(keys["stack"])]
    if not changed:
        return
    if first.plan is None or side.plan is None or not side.comparable or first.folder is None:
        why = side.missing.strip() or "the states are not to be had"
        for k, _ in changed:
            reasons[k] = why
        return
    task = next(t for t in first.plan.tasks if t.name == keys["task"])
    pooling, stack = keys["pooling"], keys["stack"]
    own, theirs = first.store(task.corpus.name, stack), side.store(task.corpus.name, stack)
    family = parse_probe(keys["probe"])
    _, usable = rows_of_items(first.plan, task, own)
    new_rows, new_usable = rows_of_items(side.plan, task, theirs, family=family)
    split = task.items["split"].to_numpy()
    test = np.flatnonzero(~np.isin(split, ("train", "dev")) & usable)
    same = np.array_equal(task.items["item"].astype(str).to_numpy()[test], items.astype(str))
    if not same or not new_usable[test].all():
        for k, _ in changed:
            reasons[k] = "the tokenizers leave different items without a state"
        return
    probes = stored_probes(
        first.folder, task, first.plan.settings, usable=usable, site="block", pooling=pooling, probe=keys["probe"],
        stack=stack,
    )  # fmt: skip
    for k, h in changed:
        states = family_states(family, task, theirs, new_rows[test], pooling=pooling, hidden=h)
        _fill(values, 1, k, probes, h, states, test)
        alignment = _alignment(first, side, task, stack, pooling, h)
        if isinstance(alignment, str):
            reasons[k] = alignment
        else:
            aligned = family_states(
                family, task, theirs, new_rows[test], pooling=pooling, hidden=h, each=alignment.apply
            )
            _fill(values, 2, k, probes, h, aligned, test)


def _fill(
    values: Readings, reading: int, k: int, probes: Any, hidden: int, states: np.ndarray | SpanWords, test: np.ndarray
) -> None:
    """Score states with the stored probes of one hidden state; a fit that seeds share is scored once."""
    for control, four in values.items():
        seeds = sorted(s for c, s, h in probes if c == control and h == hidden)
        for i, seed in enumerate(seeds):
            probe: StoredProbe = probes[control, seed, hidden]
            here = slice(None) if len(seeds) == 1 else i
            for m, scores in enumerate(probe.scores(states, test)):
                four[m, reading, here, k] = scores


def _alignment(first: Side, side: Side, task: Task, stack: str, pooling: str, hidden: int) -> Alignment | str:
    """The rigid map of one hidden state, fitted on training sentences of the corpus, or why there is none."""
    key = (task.corpus.name, "word" if task.span_columns else "sentence", stack, pooling, hidden)
    if key not in side.alignments:
        side.alignments[key] = _fit_alignment(first, side, key)
    return side.alignments[key]


def _fit_alignment(first: Side, side: Side, key: AlignmentKey) -> Alignment | str:
    assert first.plan is not None
    corpus, unit, stack, pooling, hidden = key
    stores = first.store(corpus, stack), side.store(corpus, stack)
    needed = first.plan.needed[corpus]
    free = np.ones(len(needed.texts), dtype=bool)
    for task in first.plan.tasks:
        if task.corpus.name == corpus:
            for column in task.text_columns:
                scored = task.items.loc[task.items["split"] != "train", column].to_numpy()
                free[needed.position[scored]] = False
    texts = np.flatnonzero(free)
    if unit == "word":
        offsets = stores[0].word_offsets
        rows = np.concatenate([np.arange(offsets[t], offsets[t + 1]) for t in texts] or [np.zeros(0, dtype=np.int64)])
        rows = rows[stores[0].word_valid[rows] & stores[1].word_valid[rows]]
    else:
        rows = texts
    if len(rows) > MOST_ALIGNED:
        rows = np.sort(generator(0, "alignment").permutation(rows)[:MOST_ALIGNED])
    width = stores[0].width()
    if len(rows) < 2 * width:
        return f"{len(rows)} {unit}s of training sentences are too few to align {width} dimensions ({2 * width} needed)"
    sides = [(s.words if unit == "word" else s.sentences)(pooling, hidden=hidden, rows=rows) for s in reversed(stores)]
    return fit_alignment(sides[0], sides[1])
