"""A finished run's probes, read back and applied to other states: those of the same model after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probing.controls import control_labels
from probing.fitting import ProbeSettings, label_log2_frequency, training_rows
from probing.parts import part_files
from probing.probes.linear import LinearProbeFit
from probing.tasks.base import Task
from spafit.errors import DataError


@dataclass(frozen=True)
class StoredProbe:
    """One fitted probe with what is needed to score it.

    Attributes:
        fit: the probe.
        answers: the label that counts as right for every item of the task, shape (items,).
        log2_frequency: of each label in the training split, shape (labels,).
    """

    fit: LinearProbeFit
    answers: np.ndarray
    log2_frequency: np.ndarray

    def scores(self, states: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score states of items, as the run scored those that it was fitted for.

        Args:
            states: shape (items, width).
            items: their positions in ``task.items``.

        Returns:
            Whether the prediction is right, bool, and bits saved, float64; both of shape (items,).
        """
        log_p = self.fit.log_probabilities(states[None], label_set=0)[0, 0]
        gold = self.answers[items]
        bits = np.take_along_axis(log_p, gold[:, None], 1)[:, 0] / np.log(2) - self.log2_frequency[gold]
        return log_p.argmax(1) == gold, bits.astype(np.float64)


def stored_probes(
    folder: Path, task: Task, settings: ProbeSettings, *, usable: np.ndarray, site: str, pooling: str
) -> Mapping[tuple[str, int, int], StoredProbe]:
    """Probes of one task by (control, seed, hidden index), from a finished run's folder.

    Args:
        folder: the run's folder.
        task: the task, with the same items as in the run.
        settings: those of the run; they say which items each seed trained on.
        usable: items that have states, shape (items,).
        site: site of the states.
        pooling: pooling of the states.

    Raises:
        DataError: the run holds no such probes.
    """
    from safetensors.numpy import load_file

    path = folder / part_files(task.name)[1]
    if not path.is_file():
        raise DataError(f"{folder} holds no probes of {task.name} ({path.name}). Probe it again, with its own --out.")
    arrays, start = load_file(path), f"{site}/{pooling}/"
    keys = [k.removeprefix(start).split("/") for k in arrays if k.startswith(start) and k.endswith("/weight")]
    labels, draws = task.items["label"].to_numpy().astype(np.int64), training_rows(task, settings)
    rights: dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray, int]] = {}
    for control, seed in sorted({(c, int(s)) for c, s, _, _ in keys}):
        answers = labels if control == "none" else control_labels(task, seed)
        assert answers is not None
        drawn = draws[seed][usable[draws[seed]]]
        present = np.bincount(answers[drawn], minlength=len(task.labels)) > 0
        rights[control, seed] = answers, label_log2_frequency(task, answers), present, len(drawn)
    found: dict[tuple[str, int, int], StoredProbe] = {}
    one = np.ones((1, 1, 1))
    for control, number, hidden, _ in keys:
        seed = int(number)
        parts = {p: arrays[f"{start}{control}/{seed}/{hidden}/{p}"] for p in ("weight", "bias", "mean", "scale")}
        answers, frequency, present, n_items = rights[control, seed]
        fit = LinearProbeFit(
            weights=parts["weight"][None, None, None], bias=parts["bias"][None, None, None], mean=parts["mean"][None],
            scale=parts["scale"][None], l2=np.full(1, np.nan), converged=one > 0, gap=one * 0, iterations=one * 0,
            present=present[None], n_items=n_items,
        )  # fmt: skip
        found[control, seed, int(hidden)] = StoredProbe(fit, answers, frequency)
    if not found:
        raise DataError(f"{path} holds no probes at site {site!r}, pooling {pooling!r}.")
    return found
