"""Fit one task's probes at every hidden state, for all seeds, with its control task and random-weight encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from probing.controls import control_labels
from probing.probes.linear import DEFAULT_L2, LinearProbeFit, fit_selected
from probing.tasks.base import Task
from spafit.errors import TaskError

#: Reads states: (hidden index, positions in ``task.items``) -> float32 array (positions, width).
States = Callable[[int, np.ndarray], np.ndarray]

#: Memory that one group of hidden states may take while it is fitted, in bytes.
CHUNK_BYTES = 600_000_000


@dataclass(frozen=True)
class ProbeSettings:
    """What determines a task's numbers besides model and data.

    Attributes:
        seeds: each redraws the training items, the control labels and the random-weight encoder.
        max_train: training items per draw; None takes 80 % of them, at most 20,000.
        l2: penalties tried, on the scale of :mod:`probing.probes.linear`; the one with the lowest dev log loss is used.
        controls: any of ``word-type`` and ``random-encoder``.
        n_boot: bootstrap replicates behind each interval.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    max_train: int | None = None
    l2: tuple[float, ...] = tuple(DEFAULT_L2)
    controls: tuple[str, ...] = ("word-type", "random-encoder")
    n_boot: int = 1000


@dataclass(frozen=True)
class ControlFits:
    """Test predictions of one control (or of the task itself) at every hidden state.

    Attributes:
        seeds: the distinct fits; one entry where seeds would only repeat the same fit.
        predictions: predicted label, shape (seeds, hidden, test items).
        labels: the labels that count as right, shape (seeds, test items): the control task has its own per seed.
        bits: bits saved on each item, log2 p(label) - log2 of the label's frequency in the training split (for the
            control task: among its own labels there), like ``predictions``.
        l2: penalty chosen on dev, shape (seeds, hidden).
        converged: whether the fit met its tolerance, shape (seeds, hidden).
        majority: most frequent training label, shape (seeds,).
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
    """All fits of one task at one site and pooling.

    Attributes:
        hidden: hidden indices, ascending.
        test: positions in ``task.items`` of the scored items, all test splits together.
        controls: keyed ``none``, ``word-type``, ``random-encoder``.
        n_train: training items per fit.
        weights: fitted probes by ``<control>/<seed>/<hidden>/<part>`` with parts weight, bias, mean, scale.
    """

    hidden: tuple[int, ...]
    test: np.ndarray
    controls: Mapping[str, ControlFits]
    n_train: int
    weights: Mapping[str, np.ndarray] = field(repr=False)


def training_rows(task: Task, settings: ProbeSettings) -> dict[int, np.ndarray]:
    """Training positions in ``task.items`` for each seed; seeds that draw the same items share one array."""
    rows: dict[int, np.ndarray] = {}
    for seed in settings.seeds:
        drawn = task.training_draw(seed, settings.max_train)
        rows[seed] = next((earlier for earlier in rows.values() if np.array_equal(earlier, drawn)), drawn)
    return rows


def label_log2_frequency(task: Task, answers: np.ndarray) -> np.ndarray:
    """log2 of each label's share of the training split, shape (labels,): what bits saved are counted from.

    Half an item for a label that training never has (a control task may draw one for a test word only).
    """
    train = (task.items["split"] == "train").to_numpy()
    counts = np.bincount(answers[train], minlength=len(task.labels))
    return np.log2(np.maximum(counts, 0.5) / counts.sum())


def fit_task(
    task: Task,
    settings: ProbeSettings,
    *,
    hidden: Sequence[int],
    states: States,
    random_states: Mapping[int, States],
    usable: np.ndarray | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> TaskFit:
    """Fit the linear probe for every hidden state, seed and control of one task.

    Args:
        task: a validated task.
        settings: seeds, penalties and controls.
        hidden: hidden indices to probe.
        states: reads the model's states.
        random_states: for each seed, reads the states of that seed's random-weight encoder (empty: no such control).
        usable: items whose states exist, shape (items,); others (cut off by the model's window) are left out.
        device: torch device of the solver's products; one with float64.
        progress: called with the number of (hidden, seed, encoder) fits just finished.

    Raises:
        TaskError: dropping unusable items leaves no training, dev or test items, or one class only.
    """
    split = task.items["split"].to_numpy()
    labels = task.items["label"].to_numpy().astype(np.int64)
    usable = np.ones(len(task.items), dtype=bool) if usable is None else usable
    dev = np.flatnonzero((split == "dev") & usable)
    test = np.flatnonzero(~np.isin(split, ("train", "dev")) & usable)
    draws = {seed: rows[usable[rows]] for seed, rows in training_rows(task, settings).items()}
    for name, rows in {"dev": dev, "test": test, **{f"training (seed {s})": r for s, r in draws.items()}}.items():
        if not len(rows):
            raise TaskError(f"Task {task.name!r}: no {name} item has a state. Use shorter texts or a longer window.")
    if any(len(np.unique(labels[rows])) < 2 for rows in draws.values()):
        raise TaskError(f"Task {task.name!r}: a training draw holds one class only. Raise --max-train.")

    same_draw = all(np.array_equal(rows, draws[settings.seeds[0]]) for rows in draws.values())
    control = {s: control_labels(task, s) for s in settings.seeds} if "word-type" in settings.controls else {}
    has_control = bool(control) and all(c is not None for c in control.values())

    def shape(n_seeds: int) -> dict[str, np.ndarray]:
        return {
            "predictions": np.zeros((n_seeds, len(hidden), len(test)), dtype=np.int32),
            "labels": np.zeros((n_seeds, len(test)), dtype=np.int32),
            "bits": np.zeros((n_seeds, len(hidden), len(test)), dtype=np.float32),
            "l2": np.zeros((n_seeds, len(hidden))),
            "converged": np.zeros((n_seeds, len(hidden)), dtype=bool),
            "majority": np.zeros(n_seeds, dtype=np.int64),
        }

    own_seeds = settings.seeds[:1] if same_draw else settings.seeds
    results = {"none": shape(len(own_seeds))}
    if has_control:
        results["word-type"] = shape(len(settings.seeds))
    if random_states:
        results["random-encoder"] = shape(len(settings.seeds))
    weights: dict[str, np.ndarray] = {}

    def record(name: str, i: int, k: slice, fit: LinearProbeFit, m: int, x: np.ndarray, answers: np.ndarray) -> None:
        gold, counts = answers[test], np.bincount(answers[split == "train"], minlength=len(task.labels))
        log2_frequency = label_log2_frequency(task, answers)
        log_p = fit.log_probabilities(x, label_set=m)[:, 0]
        into = results[name]
        into["labels"][i], into["majority"][i] = gold, counts.argmax()
        into["predictions"][i, k] = log_p.argmax(-1)
        into["bits"][i, k] = (
            np.take_along_axis(log_p, gold[None, :, None], -1)[..., 0] / np.log(2) - log2_frequency[gold]
        )
        into["converged"][i, k] = fit.converged[:, m, 0]

    for seed_position, seed in enumerate(settings.seeds):
        train = draws[seed]
        for encoder, read in (("none", states), ("random-encoder", random_states.get(seed))):
            if read is None:
                continue
            first = encoder == "none" and (seed_position == 0 or not same_draw)
            if encoder == "none" and not first and not has_control:
                continue
            for k in _chunks(hidden, len(train) + len(dev) + len(test), read(hidden[0], train[:1]).shape[1]):
                chosen = [hidden[j] for j in range(*k.indices(len(hidden)))]
                x_train, x_dev, x_test = (np.stack([read(h, rows) for h in chosen]) for rows in (train, dev, test))
                sets = [labels]
                if encoder == "none" and has_control:
                    sets.append(control[seed])  # type: ignore[arg-type]
                fit, l2 = fit_selected(
                    x_train,
                    np.stack([s[train] for s in sets]),
                    x_dev,
                    np.stack([s[dev] for s in sets]),
                    n_classes=len(task.labels),
                    l2_grid=settings.l2,
                    device=device,
                )
                if encoder == "random-encoder" or first:
                    i = seed_position
                    record(encoder, i, k, fit, 0, x_test, labels)
                    results[encoder]["l2"][i, k] = l2
                if len(sets) == 2:
                    record("word-type", seed_position, k, fit, 1, x_test, sets[1])
                    results["word-type"]["l2"][seed_position, k] = l2
                if encoder == "none":
                    for j, h in enumerate(chosen):
                        for m, name in enumerate(("none", "word-type")[: len(sets)]):
                            if name == "none" and not first:
                                continue
                            key = f"{name}/{seed}/{h}"
                            weights[f"{key}/weight"] = fit.weights[j, m, 0]
                            weights[f"{key}/bias"] = fit.bias[j, m, 0]
                            weights[f"{key}/mean"] = fit.mean[j]
                            weights[f"{key}/scale"] = fit.scale[j]
                if progress is not None:
                    progress(len(chosen))

    fits = {
        name: ControlFits(seeds=own_seeds if name == "none" else settings.seeds, **arrays)
        for name, arrays in results.items()
    }
    return TaskFit(tuple(hidden), test, fits, int(np.mean([len(r) for r in draws.values()])), weights)


def _chunks(hidden: Sequence[int], rows: int, width: int) -> list[slice]:
    """Groups of hidden states whose arrays fit in :data:`CHUNK_BYTES` (with a factor for the solver's copies)."""
    size = max(1, int(CHUNK_BYTES / (3 * 4 * rows * width)))
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]
