"""A finished run's probes, read back and applied to other states: those of the same model after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probing.controls import control_labels
from probing.fitting import ProbeSettings, training_rows
from probing.parts import part_files
from probing.probes.fitted import FittedProbe
from probing.probes.outputs import absent_outputs
from probing.probes.span_words import SpanWords
from probing.targets import Answers, label_values
from probing.tasks.base import Task
from spafit.errors import DataError


@dataclass(frozen=True)
class StoredProbe:
    """One fitted probe with what is needed to score it.

    Attributes:
        fit: the probe, of any family.
        answers: what counts as right for every item of the task, or of the control task that it was fitted to.
    """

    fit: FittedProbe
    answers: Answers

    def scores(self, states: np.ndarray | SpanWords, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score states of items, as the run scored those that it was fitted for.

        Args:
            states: shape (items, width), or the words of the items' spans, as the probe's family reads them.
            items: their positions in ``task.items``.

        Returns:
            Whether the prediction is right, float64 (NaN for numbers, which are never just right), and bits saved,
            float64; both of shape (items,).
        """
        predicted, bits = self.answers.score(self.fit, states, items)
        gold = self.answers.values[items]
        if self.answers.kind == "number":
            right = np.full(len(items), np.nan)
        else:
            right = (predicted == gold).reshape(len(items), -1).all(1).astype(np.float64)
        return right, bits.astype(np.float64)


def stored_probes(
    folder: Path,
    task: Task,
    settings: ProbeSettings,
    *,
    usable: np.ndarray,
    site: str,
    pooling: str,
    probe: str = "linear",
    stack: str | None = None,
) -> Mapping[tuple[str, int, int], StoredProbe]:
    """Probes of one task by (control, seed, hidden index), from a finished run's folder.

    Args:
        folder: the run's folder.
        task: the task, with the same items as in the run.
        settings: those of the run; they say which items each seed trained on.
        usable: items that have states, shape (items,).
        site: site of the states.
        pooling: pooling of the states.
        probe: name of the probe family.
        stack: name of the stack, where the run probed several.

    Raises:
        DataError: the run holds no such probes.
    """
    from safetensors.numpy import load_file

    path = folder / part_files(task.name)[1]
    if not path.is_file():
        raise DataError(f"{folder} holds no probes of {task.name} ({path.name}). Probe it again, with its own --out.")
    parts: dict[tuple[str, int, int], dict[str, np.ndarray]] = {}
    start = [site, pooling]
    for key, array in load_file(path).items():
        pieces = key.split("/")
        if len(pieces) == 8 and pieces.pop(0) != stack:  # a run of several stacks
            continue
        if len(pieces) == 6:  # earlier files held linear probes only and did not say so
            pieces.insert(2, "linear")
        if pieces[:3] == [*start, probe]:
            control, number, layer, part = pieces[3:]
            parts.setdefault((control, int(number), int(layer)), {})[part] = array
    if not parts:
        raise DataError(f"{path} holds no {probe} probes at site {site!r}, pooling {pooling!r}.")
    labels, draws = label_values(task), training_rows(task, settings)
    rights: dict[tuple[str, int], tuple[Answers, np.ndarray, int]] = {}
    for control, seed in {(c, s) for c, s, _ in parts}:
        values = labels if control == "none" else control_labels(task, seed)
        assert values is not None
        drawn = draws[seed][usable[draws[seed]]]
        absent = absent_outputs(values[drawn][None], len(task.labels), kind=task.kind)[0]
        rights[control, seed] = Answers.of(task, values), absent, len(drawn)
    found = {}
    for (control, seed, hidden), arrays in parts.items():
        answers, absent_classes, n_items = rights[control, seed]
        found[control, seed, hidden] = StoredProbe(FittedProbe(arrays, task.kind, absent_classes, n_items), answers)
    return found
