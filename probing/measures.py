"""Measures beyond accuracy and bits: code lengths, V-information beyond other hidden states, scalar mixes.

=====================  =================================================================================================
``online-code``        online description length of the training labels and of the control task's (:mod:`.probes.mdl`)
``variational-code``   variational description length (:mod:`.probes.variational`); slow
``conditional``        bits beyond hidden state 0 and beyond the hidden state below (:mod:`.probes.vinfo`)
``mix``                scalar mixes of hidden states 0 to l: cumulative and differential scores, weights (:mod:`.mixes`)
=====================  =================================================================================================

All read the run's own training draws, dev and test items and control labels, with linear probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from probing.controls import control_labels
from probing.fitting import ProbeSettings, SplitRows, States, split_rows
from probing.mixes import MixDraw, measure_mixes
from probing.probes.linear import DEFAULT_L2, fit_selected
from probing.probes.mdl import online_code
from probing.probes.variational import variational_code
from probing.probes.vinfo import Base, ProbeSplits, v_information
from probing.scoring import SCORE_COLUMNS
from probing.targets import label_values
from probing.tasks.base import Task
from spafit.stats import BootstrapDraw, interval

#: Bits beyond another hidden state, by what they are beyond.
BEYOND: dict[Base, str] = {"first": "bits_beyond_first", "below": "bits_beyond_below"}


@dataclass(frozen=True)
class Measured:
    """Rows of one measure of one task.

    Attributes:
        scores: columns of :data:`probing.scoring.SCORE_COLUMNS`; ``probe`` is the measure's name.
        summaries: layer summaries; empty but for ``mix``.
        items: pointwise values; empty for code lengths.
    """

    scores: pd.DataFrame
    summaries: pd.DataFrame = field(default_factory=pd.DataFrame)
    items: pd.DataFrame = field(default_factory=pd.DataFrame)


def unsuited(measure: str, task: Task, hidden: Sequence[int]) -> str:
    """Why a measure cannot be taken of a task at these hidden states; empty if it can."""
    if task.kind != "classes":
        return f"{measure} was not measured: the task has no classes"
    if measure in ("conditional", "mix"):
        if len(hidden) < 2:
            return f"{measure} was not measured: it needs two hidden states or more"
        if list(hidden) != list(range(len(hidden))):
            return f"{measure} was not measured: it needs all hidden states from 0, and --layers leaves some out"
    return ""


def cost(measure: str, *, n: int, width: int, classes: int, hidden: int) -> float:
    """Rough number of multiplications of one measure of one task and seed, in the units of a family's ``cost``."""
    fit = 300.0 * n * width * classes * hidden
    return {"online-code": 1.5, "variational-code": 60.0, "conditional": 8.0, "mix": 2.0}[measure] * fit


def measure_task(
    measure: str,
    task: Task,
    settings: ProbeSettings,
    *,
    hidden: Sequence[int],
    states: States,
    usable: np.ndarray,
    where: Mapping[str, str],
    penalties: Mapping[tuple[int, int], float] | None = None,
    device: str = "cpu",
) -> Measured:
    """Take one measure of one task at one site and pooling.

    Args:
        measure: of :data:`probing.config.MEASURES`, one that is not :func:`unsuited`.
        task: a validated task of classes.
        settings: seeds, penalties and controls of the run.
        hidden: hidden indices.
        states: reads the model's states.
        usable: items whose states exist, shape (items,).
        where: values of the columns ``stack``, ``site`` and ``pooling``.
        penalties: penalty of the run's linear probe by (seed, hidden), which the online code takes; chosen on dev if
            missing.
        device: torch device of the products; one with float64.

    Raises:
        TaskError: dropping unusable items leaves too little.
        UsageError: fewer items than an online code needs.
    """
    data = _Data(task, settings, hidden, states, usable, device)
    base = {
        "task": task.name, "level": task.level, "unit": task.unit, **where, "probe": measure,
        "n_classes": len(task.labels), "chance": math.nan, "l2": math.nan, "converged": True,
    }  # fmt: skip
    if measure == "conditional":
        return _conditional(data, base)
    if measure == "mix":
        return _mix(data, base)
    return _codes(data, base, measure, penalties or {})


class _Data:
    """Items, labels and states of a task, by seed."""

    def __init__(
        self,
        task: Task,
        settings: ProbeSettings,
        hidden: Sequence[int],
        states: States,
        usable: np.ndarray,
        device: str,
    ):
        self.task, self.settings, self.hidden, self.read, self.device = task, settings, list(hidden), states, device
        self.own = label_values(task)
        self.rows: SplitRows = split_rows(task, settings, self.own, usable)
        self.l2 = tuple(settings.l2 or DEFAULT_L2)
        drawn = {s: control_labels(task, s) for s in settings.seeds} if "word-type" in settings.controls else {}
        self.control = {s: c for s, c in drawn.items() if c is not None}

    def fits(self) -> Iterator[tuple[int, np.ndarray, list[tuple[str, int, np.ndarray]]]]:
        """Seed and training items of every fit, with its label sets (control, seed, labels of all items).

        Where all seeds train on the same items, one fit has the control labels of every seed.
        """
        for position, seed in enumerate(self.settings.seeds):
            if position and self.rows.same_draw:
                return
            together = self.settings.seeds if self.rows.same_draw else (seed,)
            sets = [("none", seed, self.own)]
            sets += [("word-type", s, self.control[s]) for s in together if s in self.control]
            yield seed, self.rows.draws[seed], sets

    def stack(self, rows: np.ndarray, hidden: Sequence[int] | None = None) -> np.ndarray:
        """States of these items, (hidden, items, width)."""
        return np.stack([self.read(h, rows) for h in (self.hidden if hidden is None else hidden)])


def _labels(sets: Sequence[tuple[str, int, np.ndarray]], rows: np.ndarray) -> np.ndarray:
    return np.stack([labels[rows] for _, _, labels in sets]).astype(np.int64)


# ---------------------------------------------------------------- code lengths


def _codes(data: _Data, base: dict[str, Any], measure: str, penalties: Mapping[tuple[int, int], float]) -> Measured:
    """Online or variational codes of the training labels and of the control task's, a shuffle for each seed."""
    n_classes = len(data.task.labels)
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    converged: dict[str, list[np.ndarray]] = {}
    seeds: dict[str, list[int]] = {}
    items: list[int] = []
    for seed, rows, sets in data.fits():
        labels = _labels(sets, rows)
        bits: dict[str, np.ndarray] = {}
        if measure == "online-code":
            l2 = _chosen_penalties(data, seed, rows, penalties)
            codes = [
                online_code(data.stack(rows, [h]), labels, n_classes=n_classes, l2=l2[k], seed=seed, device=data.device)
                for k, h in enumerate(data.hidden)
            ]
            bits["code_bits"] = np.concatenate([c.bits for c in codes])
            met = np.concatenate([c.converged.all(2) for c in codes])
        else:
            parts = [
                variational_code(data.stack(rows, [h]), labels, n_classes=n_classes, seed=seed, device=data.device)
                for h in data.hidden
            ]
            bits["code_bits"] = np.concatenate([c.bits for c in parts])
            bits["model_bits"] = np.concatenate([c.model_bits for c in parts])
            bits["data_bits"] = np.concatenate([c.data_bits for c in parts])
            met = np.ones(bits["code_bits"].shape, dtype=bool)
        bits["code_bits_per_item"] = bits["code_bits"] / len(rows)
        bits["compression"] = len(rows) * math.log2(n_classes) / bits["code_bits"]
        items.append(len(rows))
        for m, (control, of_seed, _) in enumerate(sets):
            seeds.setdefault(control, []).append(of_seed)
            converged.setdefault(control, []).append(met[:, m])
            for metric, values in bits.items():
                found.setdefault(control, {}).setdefault(metric, []).append(values[:, m])
    n = int(np.mean(items))
    fixed = {**base, "split": "train", "n": n, "n_train": n}
    chance = {"compression": 1.0, "code_bits_per_item": math.log2(n_classes), "code_bits": n * math.log2(n_classes)}
    rows_out: list[dict[str, Any]] = []
    for control, metrics in found.items():
        for metric, each in metrics.items():
            row = {**fixed, "control": control, "metric": metric, "chance": chance.get(metric, math.nan)}
            rows_out += _seed_rows(row, data.hidden, np.stack(each), seeds[control], np.stack(converged[control]))
    if "word-type" in found:
        for metric in ("code_bits_per_item", "compression"):
            own, other = (np.stack(found[c][metric]) for c in ("none", "word-type"))
            difference = own - other  # a single own fit stands beside every seed's control
            row = {**fixed, "control": "difference:word-type", "metric": metric}
            met = np.stack(converged["word-type"]) & np.stack(converged["none"])
            rows_out += _seed_rows(row, data.hidden, difference, seeds["word-type"], met, means_only=True)
    return Measured(_table(rows_out))


def _chosen_penalties(
    data: _Data, seed: int, rows: np.ndarray, known: Mapping[tuple[int, int], float]
) -> list[float]:  # fmt: skip
    """Penalty of each hidden state: the run's linear probe's, else chosen on dev in the same way."""
    if all(math.isfinite(known.get((seed, h), math.nan)) for h in data.hidden):
        return [known[seed, h] for h in data.hidden]
    chosen = []
    for h in data.hidden:
        _, penalty = fit_selected(
            data.stack(rows, [h]), data.own[rows], data.stack(data.rows.dev, [h]), data.own[data.rows.dev],
            n_classes=len(data.task.labels), l2_grid=data.l2, device=data.device,
        )  # fmt: skip
        chosen.append(float(penalty[0]))
    return chosen


def _seed_rows(
    fixed: Mapping[str, Any], hidden: Sequence[int], values: np.ndarray, seeds: Sequence[int], converged: np.ndarray,
    *, means_only: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of each seed and of the mean over seeds, whose interval resamples seeds alone (none with one seed)."""
    low = high = np.full(len(hidden), math.nan)
    if len(seeds) > 1:
        counts = BootstrapDraw.make(np.arange(2), len(seeds), seed=0).seed_counts
        low, high = interval(counts @ values / len(seeds))
    rows = []
    nothing = np.full(len(hidden), math.nan)
    each = [] if means_only else [(s, values[i], nothing, nothing, converged[i]) for i, s in enumerate(seeds)]
    for seed, own, lows, highs, met in [*each, (None, values.mean(0), low, high, converged.all(0))]:
        for k, h in enumerate(hidden):
            rows.append(
                {
                    **fixed, "hidden": h, "block": h - 1, "seed": seed, "value": float(own[k]),
                    "ci_low": float(lows[k]), "ci_high": float(highs[k]), "converged": bool(met[k]),
                    "n_seeds": len(seeds) if seed is None else 1,
                }
            )  # fmt: skip
    return rows


# ---------------------------------------------------------------- beyond other hidden states


def _conditional(data: _Data, base: dict[str, Any]) -> Measured:
    """Bits of each hidden state beyond hidden state 0, and beyond the one below, item by item."""
    test, dev = data.rows.test, data.rows.dev
    table = data.task.items.iloc[test]
    groups = table["group"].to_numpy()
    x_dev, x_test = data.stack(dev), data.stack(test)
    values: dict[tuple[str, str], list[np.ndarray]] = {}
    penalties: dict[str, list[np.ndarray]] = {}
    converged: dict[tuple[str, str], list[np.ndarray]] = {}
    seeds: dict[str, list[int]] = {}
    items: list[int] = []
    for _, rows, sets in data.fits():
        splits = ProbeSplits(
            (data.stack(rows), x_dev, x_test), tuple(_labels(sets, at) for at in (rows, dev, test)),  # type: ignore[arg-type]
            len(data.task.labels),
        )  # fmt: skip
        items.append(len(rows))
        for control, of_seed, _ in sets:
            seeds.setdefault(control, []).append(of_seed)
        for of, metric in BEYOND.items():
            found = v_information(splits, groups, base=of, l2_grid=data.l2, n_boot=2, device=data.device)
            penalties.setdefault(metric, []).append(found.l2)
            for m, (control, _, _) in enumerate(sets):
                values.setdefault((metric, control), []).append(found.items[:, m])
                converged.setdefault((metric, control), []).append(found.converged[:, m])
    hidden = data.hidden[1:]
    rows_out, tables = [], []
    for split in data.task.test_splits:
        chosen = (table["split"] == split).to_numpy()
        if not chosen.any():
            continue
        draws = {
            n: BootstrapDraw.make(groups[chosen], n, n_boot=data.settings.n_boot, seed=0)
            for n in {1, *(len(s) for s in seeds.values())}
        }
        for (metric, control), each in values.items():
            if control == "word-type" and split == "unseen":
                continue  # types never recur: chance by construction
            own = np.stack(each)[:, :, chosen]
            fixed = {**base, "split": split, "n": int(chosen.sum()), "n_train": int(np.mean(items)),
                     "control": control, "metric": metric}  # fmt: skip
            met, l2 = np.stack(converged[metric, control]), np.stack(penalties[metric])
            parts = [([i], s) for i, s in enumerate(seeds[control])] + [(list(range(len(own))), None)]
            for at, seed in parts:
                low, high = interval(draws[len(at)].means(own[at]))
                mean = own[at].mean((0, 2))
                rows_out += [
                    {
                        **fixed, "hidden": h, "block": h - 1, "seed": seed, "value": float(mean[k]),
                        "ci_low": float(low[k]), "ci_high": float(high[k]), "converged": bool(met[at, k].all()),
                        "l2": float(l2[0, k]) if (l2[:, k] == l2[0, k]).all() else math.nan,
                        "n_seeds": len(at) if seed is None else 1,
                    }
                    for k, h in enumerate(hidden)
                ]  # fmt: skip
    for (metric, control), each in values.items():
        for own, seed in zip(each, seeds[control], strict=True):
            tables += [_item_rows(table, base, h, control, seed, metric, own[k]) for k, h in enumerate(hidden)]
    return Measured(_table(rows_out), items=pd.concat(tables, ignore_index=True))


def _item_rows(
    table: pd.DataFrame, base: Mapping[str, Any], hidden: int, control: str, seed: int, metric: str, bits: np.ndarray
) -> pd.DataFrame:
    """Pointwise values of the test items at one hidden state."""
    own = {"item": table["item"].astype(str).to_numpy(), "group": table["group"].astype(str).to_numpy(),
           "split": table["split"].to_numpy()}  # fmt: skip
    named = {c: base[c] for c in ("stack", "site", "pooling", "probe")}
    return pd.DataFrame(
        {**own, **named, "hidden": hidden, "control": control, "seed": seed, "metric": metric,
         "bits": bits.astype(np.float32)}
    )  # fmt: skip


# ---------------------------------------------------------------- mixes


def _mix(data: _Data, base: dict[str, Any]) -> Measured:
    """Scalar mixes on the run's draws, scored on the first test split."""
    task, dev = data.task, data.rows.dev
    splits = task.items["split"].to_numpy()
    split = next(s for s in ("test", "seen", *task.test_splits) if (splits[data.rows.test] == s).any())
    test = data.rows.test[splits[data.rows.test] == split]
    table = task.items.iloc[test]
    train = splits == "train"
    with_control = bool(data.control) and split != "unseen"

    def draws() -> Iterator[MixDraw]:
        for seed, rows, sets in data.fits():
            own = sets[: 1 + with_control]
            counts = np.stack([np.bincount(v[train], minlength=len(task.labels)) for _, _, v in own])
            yield MixDraw(
                seed, data.stack(rows), _labels(own, rows), _labels(own, dev), _labels(own, test), counts
            )  # fmt: skip

    found = measure_mixes(
        draws(), data.stack(dev), data.stack(test), n_classes=len(task.labels),
        names={c: str(base[c]) for c in ("task", "level", "unit", "stack", "site", "pooling")},
        groups=table["group"].to_numpy(), label_sets=("none", "word-type")[: 1 + with_control], split=split,
        l2=data.l2, n_boot=data.settings.n_boot, device=data.device,
    )  # fmt: skip
    names = table["item"].astype(str).to_numpy()
    items = found.items.assign(item=names[found.items["item"]], group=found.items["group"].astype(str))
    return Measured(found.scores, found.summaries, items)


def _table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(SCORE_COLUMNS))
    return table.astype({"seed": "Int64", "hidden": "int64", "block": "int64"})
