"""What counts as right for each item of a task, in its three kinds, and the score of a probe's answer to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from probing.probes.fitted import FittedProbe
from probing.probes.span_words import SpanWords
from probing.tasks.base import Kind, Task

_LOG2E = float(np.log2(np.e))


def label_values(task: Task) -> np.ndarray:
    """The labels of all items as numbers.

    Returns:
        ``classes``: int64 (items,), positions in ``task.labels``. ``number``: float64 (items,). ``multilabel``: bool
        (items, labels), which labels an item has.
    """
    labels = task.items["label"]
    if task.kind == "number":
        return labels.to_numpy(dtype=np.float64)
    if task.kind == "classes":
        return labels.to_numpy().astype(np.int64)
    texts, inverse = np.unique(labels.to_numpy().astype(str), return_inverse=True)
    members = np.zeros((len(texts), len(task.labels)), dtype=bool)
    for row, text in zip(members, texts, strict=True):
        row[[int(i) for i in text.split(",") if i]] = True
    return members[inverse]


def varies(values: np.ndarray) -> bool:
    """Whether these items (first axis) have at least two different labels or numbers."""
    return bool((values != values[:1]).any())


@dataclass(frozen=True)
class Answers:
    """The right answers of one task, or of one draw of its control task, and what training alone tells of them.

    Attributes:
        kind: classes, several labels, or numbers.
        values: of every item, as :func:`label_values` gives them.
        log2_reference: log2 of the probability (for numbers: density) of each item's answer by the training split
            alone, (items,). Classes: the label's share, half an item for a label that training never has (a control
            task may draw one for a test word only). Several labels: the sum over labels of log2 of the share of
            training items that have it, or have it not. Numbers: the Gaussian with the training targets' mean and
            variance.
        majority: the answer that is given without a look at the states: the most frequent class or set of labels of
            the training split, or the mean of its numbers.
    """

    kind: Kind
    values: np.ndarray = field(repr=False)
    log2_reference: np.ndarray = field(repr=False)
    majority: np.ndarray

    @classmethod
    def of(cls, task: Task, values: np.ndarray) -> Answers:
        """The answers ``values`` to a task's items."""
        train = values[(task.items["split"] == "train").to_numpy()]
        if task.kind == "number":
            mean, variance = train.mean(), train.var()
            return cls("number", values, _gaussian(values - mean, variance), np.asarray(mean))
        if task.kind == "multilabel":
            share = np.clip(train.sum(0), 0.5, len(train) - 0.5) / len(train)
            reference = np.where(values, np.log2(share), np.log2(1 - share)).sum(1)
            sets, counts = np.unique(train, axis=0, return_counts=True)
            return cls("multilabel", values, reference, sets[counts.argmax()])
        counts = np.bincount(train, minlength=len(task.labels))
        shares = np.log2(np.maximum(counts, 0.5) / counts.sum())
        return cls("classes", values, shares[values], np.asarray(counts.argmax()))

    def score(
        self, probe: FittedProbe, x: np.ndarray | SpanWords, items: np.ndarray, *, position: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """A probe's answers for some items, and the bits that they save.

        Bits saved are log2 of the probability that the probe gives the right answer, minus ``log2_reference``. A probe
        of numbers gives the Gaussian around its prediction with the deviation that its residuals had on dev; the
        density's unit cancels. A probe of several labels gives each label on its own, and bits add up over labels.

        Args:
            probe: of this kind.
            x: the items' states, (items, width), or the words of their spans where the probe reads those.
            items: their positions in the task.
            position: of the hidden state, for messages.

        Returns:
            Predictions, as ``values`` has them, and bits saved, float32, (items,).
        """
        if self.kind == "classes":
            return self.score_outputs(probe.log_probabilities(x, position=position), items)
        deviation = float(probe.parameters["deviation"][0]) if self.kind == "number" else float("nan")
        return self.score_outputs(probe.outputs(x, position=position), items, deviation=deviation)

    def score_outputs(
        self, outputs: np.ndarray, items: np.ndarray, *, deviation: float = float("nan")
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`score` of given outputs for some items.

        Args:
            outputs: natural logarithms of probabilities (items, classes), log odds (items, labels), or numbers
                (items, 1).
            items: their positions in the task.
            deviation: of numbers around their predictions.
        """
        right = self.values[items]
        if self.kind == "classes":
            log2_p = np.take_along_axis(outputs, right[:, None], 1)[:, 0] / np.log(2)
            return outputs.argmax(1), (log2_p - self.log2_reference[items]).astype(np.float32)
        if self.kind == "multilabel":
            signed = np.where(right, outputs, -outputs).astype(np.float64)
            log2_p = -np.logaddexp(0, -signed).sum(1) * _LOG2E
            return outputs > 0, (log2_p - self.log2_reference[items]).astype(np.float32)
        predicted = outputs[:, 0].astype(np.float64)
        log2_p = _gaussian(right - predicted, deviation**2)
        return predicted, (log2_p - self.log2_reference[items]).astype(np.float32)


def _gaussian(difference: np.ndarray, variance: float) -> np.ndarray:
    """log2 density of a Gaussian at these differences from its mean."""
    return -0.5 * (np.log2(2 * np.pi * variance) + _LOG2E * difference**2 / variance)


class LabelSets:
    """Numbers sets of labels as they come, so that a set is one integer in tables of predictions."""

    def __init__(self, n_labels: int):
        self._codes: dict[bytes, int] = {}
        self._n_labels = n_labels

    def encode(self, members: np.ndarray) -> np.ndarray:
        """Codes of sets given as bool (items, labels); int32, (items,)."""
        found, inverse = np.unique(np.packbits(members, axis=1), axis=0, return_inverse=True)
        codes = [self._codes.setdefault(row.tobytes(), len(self._codes)) for row in found]
        return np.array(codes, dtype=np.int32)[inverse.ravel()]

    @property
    def members(self) -> np.ndarray:
        """Labels of each coded set, bool, (codes, labels)."""
        packed = np.array([np.frombuffer(code, dtype=np.uint8) for code in self._codes])
        return np.unpackbits(packed, axis=1, count=self._n_labels).astype(bool)
