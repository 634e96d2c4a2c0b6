"""The four readings of one task: by the probe fitted before training and by a new one, with and without alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from analysis.alignment import Alignment, fit_alignment
from probing.planning import ProbePlan, extraction_options
from probing.results import ProbeResults
from probing.running import rows_of_items
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
#: Corpus, unit, pooling and hidden index.
AlignmentKey = tuple[str, str, str, int]


@dataclass(frozen=True)
class Side:
    """One model of a comparison.

    Attributes:
        name: label in the tables.
        plan: what was probed; None where the model is not to be had, or is the same as before training.
        results: tables of the probing run, once it is there.
        folder: of the probing run.
        unchanged: number of hidden states that are bitwise those before training.
        why: why the model is not to be had.
        comparable: hidden states of both models have the same width.
        missing: what cannot be compared.
    """

    name: str
    plan: ProbePlan | None
    results: ProbeResults | None
    folder: Path | None
    unchanged: int
    why: str
    comparable: bool = True
    missing: str = ""
    stores: dict[str, ActivationStore] = field(default_factory=dict, compare=False, repr=False)
    alignments: dict[AlignmentKey, Alignment | str] = field(default_factory=dict, compare=False, repr=False)

    def store(self, corpus: str) -> ActivationStore:
        """States of one corpus, from the cache."""
        from probing.extraction import extract

        assert self.plan is not None
        if corpus not in self.stores:
            config = self.plan.config
            self.stores[corpus] = extract(
                self.plan.loaded, self.plan.needed[corpus].texts,
                **extraction_options(config, self.plan.tasks, corpus), device=self.plan.device,
                cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
            )  # fmt: skip
        return self.stores[corpus]

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
        theirs = new[(new["pooling"] == pooling) & (new["probe"] == probe)]
        keys = {
            "task": name, "level": str(facts["level"]), "unit": str(facts["unit"]), "stack": str(stack),
            "site": "block", "pooling": str(pooling), "probe": str(probe),
        }  # fmt: skip
        hidden = tuple(sorted(int(h) for h in own["hidden"].unique()))
        for metric in METRICS:
            found += _readings(first, side, own, theirs, hidden, keys, metric)
    return found


def _readings(
    first: Side,
    side: Side,
    old: pd.DataFrame,
    new: pd.DataFrame,
    hidden: tuple[int, ...],
    keys: dict[str, str],
    metric: Metric,
) -> list[TaskReadings]:
    items = _items_of(old)
    values: dict[str, np.ndarray] = {}
    seeds = max(old[old["control"] == c]["seed"].nunique() for c in old["control"].unique())
    for control in ("none", "word-type"):
        if control not in set(old["control"].astype(str)):
            continue
        pre = _broadcast(_array(old, control, metric, hidden, items), seeds)
        four = np.stack([pre, pre, pre, pre])  # unchanged hidden states: every reading is the same number
        changed = [k for k, h in enumerate(hidden) if h >= side.unchanged]
        if changed:
            theirs = _array(new, control, metric, tuple(hidden[k] for k in changed), items)
            four[1:3][:, :, changed] = np.nan
            four[3][:, changed] = _broadcast(theirs, seeds)
        values[control] = four
    reasons = [""] * len(hidden)
    _fill_transferred(first, side, values, hidden, keys, metric, items, reasons)
    random = None
    if "random-encoder" in set(old["control"].astype(str)):
        random = _broadcast(_array(old, "random-encoder", metric, hidden, items), seeds)
    table = old.drop_duplicates("item").set_index("item").loc[items]
    found = []
    for split in dict.fromkeys(table["split"].astype(str)):
        at = np.flatnonzero((table["split"] == split).to_numpy())
        # where word types never recur, the control task is at chance by construction
        minus = None if split == "unseen" or "word-type" not in values else values["word-type"][..., at]
        found.append(
            TaskReadings(
                values["none"][..., at], minus, None if random is None else random[..., at],
                table["group"].to_numpy()[at], hidden, tuple(reasons), {**keys, "split": split, "metric": metric},
            )
        )  # fmt: skip
    return found


def _items_of(table: pd.DataFrame) -> np.ndarray:
    """Items in the order of the table, once each."""
    return table["item"].drop_duplicates().to_numpy()


def _array(table: pd.DataFrame, control: str, metric: Metric, hidden: Sequence[int], items: np.ndarray) -> np.ndarray:
    """Scores of one control, shape (seeds, hidden, items)."""
    own = table[(table["control"] == control) & table["hidden"].isin(hidden)]
    seeds = own["seed"].unique()
    if len(own) != len(seeds) * len(hidden) * len(items):
        raise DataError(
            f"The runs do not hold the same test items, seeds and hidden states ({len(own)} rows of {control}, "
            f"{len(seeds)} seeds × {len(hidden)} hidden states × {len(items)} items wanted). Probe both with the same "
            "options."
        )
    if not np.array_equal(own["item"].to_numpy()[: len(items)], items):
        raise DataError("The runs hold their test items in different orders. Probe both with the same options.")
    if metric == "accuracy":
        values = (own["prediction"].astype(str) == own["label"].astype(str)).to_numpy(dtype=np.float64)
    else:
        values = own["bits"].to_numpy(dtype=np.float64)
    return values.reshape(len(seeds), len(hidden), len(items))


def _broadcast(values: np.ndarray, seeds: int) -> np.ndarray:
    """A fit that every seed would repeat stands beside each seed's control."""
    return np.repeat(values, seeds, axis=0).copy() if len(values) == 1 and seeds > 1 else values.copy()


def _fill_transferred(
    first: Side,
    side: Side,
    values: dict[str, np.ndarray],
    hidden: tuple[int, ...],
    keys: dict[str, str],
    metric: Metric,
    items: np.ndarray,
    reasons: list[str],
) -> None:
    """Put in what the probes of before say about the states after, as they are and aligned."""
    changed = [(k, h) for k, h in enumerate(hidden) if h >= side.unchanged]
    if not changed:
        return
    if first.plan is None or side.plan is None or not side.comparable or first.folder is None:
        why = side.missing.strip() or "the states are not to be had"
        for k, _ in changed:
            reasons[k] = why
        return
    task = next(t for t in first.plan.tasks if t.name == keys["task"])
    pooling = keys["pooling"]
    own, theirs = first.store(task.corpus.name), side.store(task.corpus.name)
    _, usable = rows_of_items(first.plan, task, own)
    new_rows, new_usable = rows_of_items(side.plan, task, theirs)
    split = task.items["split"].to_numpy()
    test = np.flatnonzero(~np.isin(split, ("train", "dev")) & usable)
    same = np.array_equal(task.items["item"].astype(str).to_numpy()[test], items.astype(str))
    if not same or not new_usable[test].all():
        for k, _ in changed:
            reasons[k] = "the tokenizers leave different items without a state"
        return
    probes = stored_probes(first.folder, task, first.plan.settings, usable=usable, site="block", pooling=pooling)
    read = theirs.words if task.unit == "word" else theirs.sentences
    for k, h in changed:
        states = read(pooling, hidden=h, rows=new_rows[test])
        _fill(values, 1, k, probes, h, states, test, metric)
        alignment = _alignment(first, side, task, pooling, h)
        if isinstance(alignment, str):
            reasons[k] = alignment
        else:
            _fill(values, 2, k, probes, h, alignment.apply(states), test, metric)


def _fill(
    values: dict[str, np.ndarray],
    reading: int,
    k: int,
    probes: Any,
    hidden: int,
    states: np.ndarray,
    test: np.ndarray,
    metric: Metric,
) -> None:
    for control, four in values.items():
        seeds = sorted(s for c, s, h in probes if c == control and h == hidden)
        for i in range(four.shape[1]):
            probe: StoredProbe = probes[control, seeds[i if len(seeds) > 1 else 0], hidden]
            four[reading, i, k] = probe.scores(states, test)[0 if metric == "accuracy" else 1]


def _alignment(first: Side, side: Side, task: Task, pooling: str, hidden: int) -> Alignment | str:
    """The rigid map of one hidden state, fitted on training sentences of the corpus, or why there is none."""
    key = (task.corpus.name, "word" if task.unit == "word" else "sentence", pooling, hidden)
    if key not in side.alignments:
        side.alignments[key] = _fit_alignment(first, side, key)
    return side.alignments[key]


def _fit_alignment(first: Side, side: Side, key: AlignmentKey) -> Alignment | str:
    assert first.plan is not None
    corpus, unit, pooling, hidden = key
    stores = first.store(corpus), side.store(corpus)
    needed = first.plan.needed[corpus]
    free = np.ones(len(needed.texts), dtype=bool)
    for task in first.plan.tasks:
        if task.corpus.name == corpus:
            scored = task.items.loc[task.items["split"] != "train", "text"].to_numpy()
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
