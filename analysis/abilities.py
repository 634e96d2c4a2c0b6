"""Abilities that training should leave: probing tasks, running text and minimal pairs, read of one model as it changes.

Each reader scores the items of some tasks on a backbone whose weights are exchanged meanwhile (block reversion), so
that what a set of trained blocks costs is a difference of paired items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from analysis.drawn_items import DrawnItems, check_watchable, rows_of, texts_of
from probing.probes.linear import LinearProbeFit, fit_linear_probes, fit_selected
from probing.repeated import RepeatedStates
from spafit.errors import TaskError, UsageError

if TYPE_CHECKING:
    import pandas as pd

    from probing.tasks.base import Task
    from spafit.language_models import LanguageModel
    from spafit.models import LoadedModel

Unit = Literal["bits", "points"]
_LN2 = math.log(2)


@dataclass(frozen=True)
class Ability:
    """How well a model does on the items of one task.

    Attributes:
        values: per item, higher is better; log2 of the right label's probability (``bits``) or 100 and 0 for right and
            wrong (``points``), shape (items,).
        groups: cluster of each item (sentence, paradigm), shape (items,).
    """

    values: np.ndarray
    groups: np.ndarray


#: Reads the abilities of the model as it is now, by task.
Reader = Callable[[], Mapping[str, Ability]]


class Abilities(Protocol):
    """What is read; :meth:`reader` lays out one model, whose weights may change between readings."""

    @property
    def unit(self) -> Unit:
        """What the values are in."""

    def reader(self, loaded: LoadedModel) -> Reader:
        """A reader of one model. It must be called first with the weights from before training."""

    def record(self) -> list[object]:
        """What the numbers depend on, for the record."""


def forgotten(abilities: Abilities, before: LoadedModel, after: LoadedModel) -> dict[str, float]:
    """What a tuned model lost of each task, in the abilities' unit, the mean over items; positive is a loss."""
    from analysis.causal import exchanged

    read = abilities.reader(after)
    with exchanged(after.model, before.model, range(after.stacks[0].num_blocks), outside=True):
        old = read()
    new = read()
    return {task: float((old[task].values - new[task].values).mean()) for task in old}


@dataclass(frozen=True)
class ProbedAbilities:
    """What a probe fitted anew finds of probing tasks, each at the hidden state where it was read best before training.

    A probe is fitted on the states as they are at each reading: what was merely moved does not count as lost. The
    hidden state and the penalty are chosen before training, on dev items. In bits per item: log2 of the probability
    that the probe gives the right label.

    Attributes:
        tasks: with one class per word, span, sentence or pair of sentences.
        train_items: items that a probe is fitted on.
        test_items: items that are scored.
        hidden: ``best``, ``last``, or a hidden index.
        pooling: how tokens become one state.
        seed: draws the items.
        unit: bits.
    """

    tasks: tuple[Task, ...]
    train_items: int = 400
    test_items: int = 400
    hidden: Literal["best", "last"] | int = "best"
    pooling: str = "mean"
    seed: int = 0
    unit: Unit = "bits"

    @classmethod
    def of(
        cls, tasks: Sequence[str | Task], *, train_items: int = 400, test_items: int = 400,
        hidden: Literal["best", "last"] | int = "best", pooling: str = "mean", seed: int = 0,
    ) -> ProbedAbilities:  # fmt: skip
        """From references such as ``core.tense``, or tasks.

        Raises:
            SpafitError: a task that does not exist or cannot be read like this, or fewer than 10 items.
        """
        if train_items < 10 or test_items < 10:
            raise UsageError(f"train_items is {train_items} and test_items {test_items}; at least 10 each are needed.")
        return cls(tuple(check_watchable(tasks).values()), train_items, test_items, hidden, pooling, seed)

    def record(self) -> list[object]:
        """See :class:`Abilities`."""
        names = [(t.name, t.corpus.digest) for t in self.tasks]
        return ["probed", names, self.train_items, self.test_items, self.hidden, self.pooling, self.seed]

    def reader(self, loaded: LoadedModel) -> Reader:
        """See :class:`Abilities`."""
        draws = [DrawnItems.make(t, self.train_items, self.test_items, self.seed) for t in self.tasks]
        texts, place = texts_of(draws, "train", "dev", "test")
        states = RepeatedStates(loaded, texts, pooling=self.pooling)
        known: dict[str, _Probed] = {}

        def read() -> dict[str, Ability]:
            now = states.read()
            if not known:
                for draw in draws:
                    known[draw.task.name] = _Probed.choose(draw, states, now, place, self.hidden)
            return {name: probed.read(now) for name, probed in known.items()}

        return read


@dataclass(frozen=True)
class _Probed:
    """A task with rows and labels by split, the hidden state that is read, and the probe from before training."""

    unit: str
    rows: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    groups: np.ndarray
    hidden: int
    fit: LinearProbeFit
    before: tuple[np.ndarray, np.ndarray]

    @classmethod
    def choose(
        cls, draw: DrawnItems, states: RepeatedStates, now: Mapping[str, np.ndarray],
        place: dict[tuple[str, int], int], hidden: Literal["best", "last"] | int,
    ) -> _Probed:  # fmt: skip
        task = draw.task
        unit = "words" if task.span_columns else "sentences"
        rows, labels, items = {}, {}, {}
        for split in ("train", "dev", "test"):
            drawn = getattr(draw, split)
            found = rows_of(states, task, drawn, place)
            if not (found >= 0).any():
                raise TaskError(f"Task {task.name!r}: no {split} item has a state. Use shorter texts.")
            rows[split], items[split] = found[found >= 0], drawn[found >= 0]
            labels[split] = task.items["label"].to_numpy().astype(np.int64)[items[split]]
        count = len(now[unit])
        if isinstance(hidden, int) and not 0 <= hidden < count:
            raise UsageError(f"hidden is {hidden}; the model has hidden states 0 to {count - 1}.")
        at = np.arange(count) if hidden == "best" else np.array([count - 1 if hidden == "last" else hidden])
        fit, _ = fit_selected(
            now[unit][at][:, rows["train"]], labels["train"], now[unit][at][:, rows["dev"]], labels["dev"],
            n_classes=len(task.labels),
        )  # fmt: skip
        on_dev = fit.log_probabilities(now[unit][at][:, rows["dev"]], label_set=0)[:, 0]
        bits = on_dev[:, np.arange(len(labels["dev"])), labels["dev"]].mean(axis=1)
        best = int(bits.argmax())
        chosen = int(at[best])
        groups = task.items["group"].astype(str).to_numpy()[items["test"]]
        before = now[unit][chosen][rows["train"]], now[unit][chosen][rows["test"]]
        return cls(unit, rows, labels, groups, chosen, fit.only(best), before)

    def read(self, now: Mapping[str, np.ndarray]) -> Ability:
        states = now[self.unit][self.hidden]
        x_train, x_test = states[self.rows["train"]], states[self.rows["test"]]
        fit = self.fit
        if not (np.array_equal(x_train, self.before[0]) and np.array_equal(x_test, self.before[1])):
            fit = fit_linear_probes(
                x_train[None], self.labels["train"], n_classes=fit.weights.shape[4], l2=fit.l2[0], warm_start=fit
            )
        found = fit.log_probabilities(x_test[None], label_set=0)[0, 0]
        return Ability(
            found[np.arange(len(x_test)), self.labels["test"]].astype(np.float64) / _LN2, self.groups
        )  # fmt: skip


@dataclass(frozen=True)
class LanguageAbilities:
    """A language model's own ability under its original head: bits per token of running text, or minimal pairs.

    Attributes:
        original: the language model before training.
        text: running text (``bits``: log2 of a token's probability, the mean of each window), or None.
        pairs: minimal pairs with the columns of :data:`spafit.data.blimp.COLUMNS` (``points``: 100 where the
            acceptable sentence is more probable), or None. Just one of the two is given.
        window: tokens of a window.
    """

    original: LanguageModel
    text: str | None = None
    pairs: pd.DataFrame | None = None
    window: int = 128

    def __post_init__(self) -> None:
        if (self.text is None) == (self.pairs is None):
            raise UsageError("Give running text or minimal pairs: what was forgotten is measured in one unit.")

    @property
    def unit(self) -> Unit:
        """Bits of running text, points of minimal pairs."""
        return "bits" if self.pairs is None else "points"

    def record(self) -> list[object]:
        """See :class:`Abilities`."""
        pairs = None if self.pairs is None else [self.pairs[c].astype(str).str.cat(sep="\x1f") for c in ("good", "bad")]
        return ["language", self.original.name, self.text, pairs, self.window]

    def reader(self, loaded: LoadedModel) -> Reader:
        """See :class:`Abilities`."""
        from analysis.retention import pair_scores
        from analysis.token_scores import score, windows
        from spafit.language_models import graft

        language = graft(self.original, loaded.model)
        if self.pairs is not None:
            pairs = self.pairs
            groups = pairs["paradigm"].astype(str).to_numpy()
            return lambda: {"minimal pairs": Ability(100 * pair_scores(language, pairs), groups)}
        assert self.text is not None
        ids = windows(language, self.text, length=self.window)

        def read() -> dict[str, Ability]:
            found = score(language, ids)
            tokens = np.bincount(found.text, minlength=len(ids))
            values = found.sums(len(ids)) / np.maximum(tokens, 1) / _LN2
            return {"running text": Ability(values, np.arange(len(ids)).astype(str))}

        return read
