"""Fit one task's probes at every hidden state, for all seeds, with its control task and random-weight encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probing.baselines import BaselineOutputs
from probing.controls import control_labels
from probing.probes.families import Family, Linear
from probing.probes.span_words import SpanWords, stack_states
from probing.targets import Answers, LabelSets, label_values, varies
from probing.tasks.base import Kind, Task
from spafit.errors import TaskError

#: Reads states: (hidden index, positions in ``task.items``) -> float32 array (positions, width).
States = Callable[[int, np.ndarray], np.ndarray]
#: The same for any family: one that attends to the words of spans reads them all.
Features = Callable[[int, np.ndarray], np.ndarray | SpanWords]

#: Memory that one group of hidden states may take while it is fitted, in bytes.
CHUNK_BYTES = 600_000_000


@dataclass(frozen=True)
class ProbeSettings:
    """What determines a task's numbers besides model and data.

    Attributes:
        seeds: each redraws the training items, the control labels and the random-weight encoder.
        max_train: training items per draw; None takes 80 % of them, at most 20,000.
        l2: penalties tried, on the scale of :mod:`probing.probes.linear`; the one with the lowest dev log loss is used.
            None takes the family's own grid.
        controls: of :data:`probing.controls.ALL_CONTROLS`, or ``column:NAME``.
        n_boot: bootstrap replicates behind each interval.
        probe: names of the probe families that are fitted, as :func:`probing.probes.families.parse_probe` reads them.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    max_train: int | None = None
    l2: tuple[float, ...] | None = None
    controls: tuple[str, ...] = ("word-type", "random-encoder")
    n_boot: int = 1000
    probe: tuple[str, ...] = ("linear",)


@dataclass(frozen=True)
class ControlFits:
    """Test predictions of one control (or of the task itself) at every hidden state.

    Attributes:
        seeds: the distinct fits; one entry where seeds would only repeat the same fit.
        predictions: predicted label, shape (seeds, hidden, test items): a position in ``TaskFit.names``, or a number.
        labels: the labels that count as right, shape (seeds, test items): the control task has its own per seed.
        bits: bits saved on each item (:meth:`probing.targets.Answers.score`), shaped like ``predictions``.
        l2: penalty chosen on dev, shape (seeds, hidden); NaN in families that have none.
        converged: whether the fit met its tolerance, shape (seeds, hidden).
        majority: the prediction that takes no state into account, the most frequent training label (or the mean of the
            training targets), shape (seeds,).
    """

    seeds: tuple[int, ...]
    predictions: np.ndarray
    labels: np.ndarray
    bits: np.ndarray
    l2: np.ndarray
    converged: np.ndarray
    majority: np.ndarray


@dataclass(frozen=True)
class TaskFit:
    """All fits of one task at one site and pooling, by one probe family.

    Attributes:
        hidden: hidden indices, ascending.
        test: positions in ``task.items`` of the scored items, all test splits together.
        controls: keyed ``none``, ``word-type``, ``random-encoder`` and so on.
        n_train: training items per fit.
        weights: fitted probes by ``<control>/<seed>/<hidden>/<part>``; the parts are those of
            :class:`probing.probes.fitted.FittedProbe`.
        kind: classes, several labels, or numbers.
        names: what labels and predictions are positions in: the classes, or sets of labels joined by commas; empty for
            numbers.
        members: which labels each of ``names`` holds, bool, (names, labels); None unless items have several labels.
    """

    hidden: tuple[int, ...]
    test: np.ndarray
    controls: Mapping[str, ControlFits]
    n_train: int
    weights: Mapping[str, np.ndarray] = field(repr=False)
    kind: Kind = "classes"
    names: tuple[str, ...] = ()
    members: np.ndarray | None = field(default=None, repr=False)


def training_rows(task: Task, settings: ProbeSettings) -> dict[int, np.ndarray]:
    """Training positions in ``task.items`` for each seed; seeds that draw the same items share one array."""
    rows: dict[int, np.ndarray] = {}
    for seed in settings.seeds:
        drawn = task.training_draw(seed, settings.max_train)
        rows[seed] = next((earlier for earlier in rows.values() if np.array_equal(earlier, drawn)), drawn)
    return rows


def fit_task(
    task: Task,
    settings: ProbeSettings,
    *,
    hidden: Sequence[int],
    states: Features,
    encoders: Mapping[str, Mapping[int, Features]],
    baselines: Mapping[str, Mapping[int, BaselineOutputs]] | None = None,
    family: Family | None = None,
    usable: np.ndarray | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> TaskFit:
    """Fit one family's probes for every hidden state, seed and control of one task.

    Args:
        task: a validated task.
        settings: seeds, penalties and controls.
        hidden: hidden indices to probe.
        states: reads the model's states as the family needs them.
        encoders: for each control that is an encoder of its own, and each seed, reads that encoder's states.
        baselines: for each baseline and each seed that draws items of its own, its outputs for the test items.
        family: the probe family; linear by default.
        usable: items whose states exist, shape (items,); others (cut off by the model's window) are left out.
        device: torch device of the solver's products; one with float64.
        progress: called with the number of (hidden, seed, encoder) fits just finished.

    Raises:
        TaskError: dropping unusable items leaves no training, dev or test items, or a draw whose labels do not vary.
        UsageError: the family does not suit the task or the width of its states.
    """
    family = Linear() if family is None else family
    labels, usable = label_values(task), np.ones(len(task.items), dtype=bool) if usable is None else usable
    rows = split_rows(task, settings, labels, usable)
    family.check(task, states(hidden[0], rows.dev[:1]).shape[1])

    seeds = settings.seeds
    drawn = {s: control_labels(task, s) for s in seeds} if "word-type" in settings.controls else {}
    control = {s: Answers.of(task, c) for s, c in drawn.items() if c is not None}
    own = Answers.of(task, labels)
    record = _Record(task, hidden, rows.test)
    record.add("none", seeds[:1] if rows.same_draw else seeds)
    if control:
        record.add("word-type", seeds)
    for name in encoders:
        record.add(name, seeds)
    for name, outputs in (baselines or {}).items():
        record.add(name, tuple(outputs))
        for seed, found in outputs.items():
            scored = own.score_outputs(found.outputs, rows.test, deviation=found.deviation)
            for k in range(len(hidden)):
                record.put(name, seed, k, own, *scored, float("nan"), True)

    def fit(
        encoder: str, read: Features, train: np.ndarray, sets: Sequence[tuple[str, int, Answers]], *, seed: int
    ) -> None:
        """Fit these label sets, the task's first, on the states of one encoder, and record them."""
        n_items = len(train) + len(rows.dev) + len(rows.test)
        some = read(hidden[0], train[:200])  # how many words the spans have varies from item to item
        for k in hidden_chunks(hidden, n_items, some.size // len(some)):
            chosen = [hidden[j] for j in range(*k.indices(len(hidden)))]
            x: list[Any] = [stack_states([read(h, r) for h in chosen]) for r in (train, rows.dev, rows.test)]
            x_train, x_dev, x_test = x
            found = family.fit(
                x_train,
                np.stack([a.values[train] for _, _, a in sets]),
                x_dev,
                np.stack([a.values[rows.dev] for _, _, a in sets]),
                kind=task.kind,
                n_classes=len(task.labels),
                l2=settings.l2,
                seed=seed,
                device=device,
            )
            for m, (name, of_seed, answers) in enumerate(sets):
                for j, h in enumerate(chosen):
                    scored = answers.score(found.probes[j][m], x_test[j], rows.test, position=h)
                    record.put(name, of_seed, k.start + j, answers, *scored, found.l2[j, m], found.converged[j, m])
                    if encoder == "none":
                        parts = found.parameters(j, m)
                        record.weights.update({f"{name}/{of_seed}/{h}/{part}": v for part, v in parts.items()})
            if progress is not None:
                progress(len(chosen) * (len(seeds) if encoder == "none" and rows.same_draw else 1))

    for position, seed in enumerate(seeds):
        train = rows.draws[seed]
        if position == 0 or not rows.same_draw:
            # Where all seeds train on the same items, one call fits the control labels of every seed.
            together = seeds if rows.same_draw else (seed,)
            sets = [("none", seed, own), *(("word-type", s, control[s]) for s in together if s in control)]
            fit("none", states, train, sets, seed=seed)
        for name, readers in encoders.items():
            fit(name, readers[seed], train, [(name, seed, own)], seed=seed)
    return record.finish(int(np.mean([len(r) for r in rows.draws.values()])))


@dataclass(frozen=True)
class SplitRows:
    """Positions in ``task.items`` of the items that are used, by split.

    Attributes:
        draws: training items by seed.
        dev: dev items.
        test: items of all test splits together.
    """

    draws: Mapping[int, np.ndarray]
    dev: np.ndarray
    test: np.ndarray

    @property
    def same_draw(self) -> bool:
        """Whether all seeds train on the same items."""
        first = next(iter(self.draws.values()))
        return all(np.array_equal(rows, first) for rows in self.draws.values())


def split_rows(task: Task, settings: ProbeSettings, labels: np.ndarray, usable: np.ndarray) -> SplitRows:
    """Training items of each seed, dev and test items, without those that have no state.

    Raises:
        TaskError: this leaves no training, dev or test items, or a draw whose labels do not vary.
    """
    split = task.items["split"].to_numpy()
    draws = {seed: rows[usable[rows]] for seed, rows in training_rows(task, settings).items()}
    found = SplitRows(
        draws,
        np.flatnonzero((split == "dev") & usable),
        np.flatnonzero(~np.isin(split, ("train", "dev")) & usable),
    )
    parts = {"dev": found.dev, "test": found.test, **{f"training (seed {s})": r for s, r in draws.items()}}
    for name, rows in parts.items():
        if not len(rows):
            raise TaskError(f"Task {task.name!r}: no {name} item has a state. Use shorter texts or a longer window.")
    for seed, rows in draws.items():
        if not varies(labels[rows]):
            one = "the same number everywhere" if task.kind == "number" else "one class only"
            raise TaskError(f"Task {task.name!r}: the training draw of seed {seed} holds {one}. Raise --max-train.")
    return found


class _Record:
    """Predictions and bits as they come, by control, seed and hidden state."""

    def __init__(self, task: Task, hidden: Sequence[int], test: np.ndarray):
        self.task, self.hidden, self.test = task, tuple(hidden), test
        self.seeds: dict[str, tuple[int, ...]] = {}
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.sets = LabelSets(len(task.labels))

    def add(self, name: str, seeds: Sequence[int]) -> None:
        """Make room for one control."""
        n, n_hidden, items = len(seeds), len(self.hidden), len(self.test)
        answer = np.float64 if self.task.kind == "number" else np.int32
        self.seeds[name] = tuple(seeds)
        self.arrays[name] = {
            "predictions": np.zeros((n, n_hidden, items), dtype=answer),
            "labels": np.zeros((n, items), dtype=answer),
            "bits": np.zeros((n, n_hidden, items), dtype=np.float32),
            "l2": np.zeros((n, n_hidden)),
            "converged": np.zeros((n, n_hidden), dtype=bool),
            "majority": np.zeros(n, dtype=np.float64 if self.task.kind == "number" else np.int64),
        }

    def put(
        self,
        name: str,
        seed: int,
        k: int,
        answers: Answers,
        predictions: np.ndarray,
        bits: np.ndarray,
        l2: float,
        converged: bool,
    ) -> None:
        """Keep the scores of one fit at the hidden state in position ``k``."""
        into, i = self.arrays[name], self.seeds[name].index(seed)
        if k == 0:
            into["labels"][i] = self._coded(answers.values[self.test])
            into["majority"][i] = self._coded(answers.majority[None])[0]
        into["predictions"][i, k], into["bits"][i, k] = self._coded(predictions), bits
        into["l2"][i, k], into["converged"][i, k] = l2, converged

    def _coded(self, values: np.ndarray) -> np.ndarray:
        return self.sets.encode(values) if self.task.kind == "multilabel" else values

    def finish(self, n_train: int) -> TaskFit:
        """Everything recorded."""
        fits = {name: ControlFits(seeds=self.seeds[name], **arrays) for name, arrays in self.arrays.items()}
        names, members = self.task.labels, None
        if self.task.kind == "multilabel":
            members = self.sets.members
            names = tuple(", ".join(np.array(self.task.labels, dtype=object)[row]) or "(none)" for row in members)
        return TaskFit(self.hidden, self.test, fits, n_train, self.weights, self.task.kind, tuple(names), members)


def hidden_chunks(hidden: Sequence[int], rows: int, width: int) -> list[slice]:
    """Groups of hidden states whose arrays fit in :data:`CHUNK_BYTES` (with a factor for the solver's copies)."""
    size = max(1, int(CHUNK_BYTES / (3 * 4 * rows * width)))
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]
