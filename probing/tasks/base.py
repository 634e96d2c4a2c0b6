"""What a task is: items that point into a corpus of texts, with labels, splits and what a reader must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import pandas as pd

from spafit.errors import TaskError
from spafit.io import content_digest
from spafit.runtime import generator

Level = Literal["surface", "syntax", "semantics", "other"]
Unit = Literal["word", "sentence", "pair"]
LEVELS: tuple[str, ...] = get_args(Level)
UNITS: tuple[str, ...] = get_args(Unit)

#: Columns every task's items have; any further column is metadata that results can be split by.
ITEM_COLUMNS = ("item", "text", "span", "label", "split", "group", "control")


@dataclass(frozen=True)
class Text:
    """One string that goes through a model.

    Attributes:
        string: what is encoded. A text made of words is those words joined by single spaces.
        spans: half-open character ranges of the words whose states are kept (empty for sentence tasks).
        second: second segment of a pair, encoded together with ``string``; None for single texts.
    """

    string: str
    spans: tuple[tuple[int, int], ...] = ()
    second: str | None = None

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Text:
        """Join ``words`` by single spaces, with one span per word."""
        spans, start = [], 0
        for word in words:
            spans.append((start, start + len(word)))
            start += len(word) + 1
        return cls(" ".join(words), tuple(spans))

    @property
    def words(self) -> tuple[str, ...]:
        """The strings under the spans."""
        return tuple(self.string[a:b] for a, b in self.spans)


@dataclass(frozen=True)
class Corpus:
    """Distinct texts that the tasks of one source share, so that each is encoded once.

    Attributes:
        name: the source, for example ``core`` or a treebank's folder name.
        texts: the texts; tasks point at them by position.
    """

    name: str
    texts: tuple[Text, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all texts, their spans and second segments."""
        return content_digest((t.string, t.spans, t.second) for t in self.texts)


@dataclass(frozen=True)
class Task:
    """A labelled question put to each layer's representation.

    Attributes:
        name: unique in a run, for example ``core.tense`` or ``ewt.upos``.
        level: the linguistic level the task is filed under; an assumption that users can regroup.
        unit: ``word`` (one span), ``sentence`` (a whole text) or ``pair`` (a text with a second segment).
        labels: class names; ``items.label`` indexes them.
        corpus: the texts.
        items: one row per item with the columns of :data:`ITEM_COLUMNS`: ``item`` (unique string id),
            ``text`` (position in ``corpus.texts``), ``span`` (position in the text's spans; -1 for whole texts),
            ``label`` (position in ``labels``), ``split`` (``train``, ``dev``, and one or more test splits),
            ``group`` (cluster for intervals: the sentence or document, as a string) and ``control``
            (the string whose type draws the control label: the word, or a sentence's content word; empty if none).
        description: one sentence for a reader, with the unit and what the classes are.
        source: where the labels come from.
        licence: licence of the data.
        citation: BibTeX key or reference of the data or definition.
        notes: what was dropped, truncated or changed while reading, for the report.
    """

    name: str
    level: Level
    unit: Unit
    labels: tuple[str, ...]
    corpus: Corpus
    items: pd.DataFrame = field(repr=False)
    description: str = ""
    source: str = ""
    licence: str = ""
    citation: str = ""
    notes: tuple[str, ...] = ()

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the test splits, the primary one (``test``, or ``seen`` where word types are split) first."""
        found = sorted(set(self.items["split"].unique()) - {"train", "dev"})
        return tuple(sorted(found, key=lambda s: (s not in ("test", "seen"), s)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what determines the task's numbers: texts, spans, labels, splits, groups, control keys."""
        columns = (self.items[c].astype(str).str.cat(sep="\x1f") for c in ITEM_COLUMNS)
        return content_digest((self.name, self.unit, "\x1f".join(self.labels), self.corpus.digest, *columns))

    def regroup(self, level: Level) -> Task:
        """The same task filed under another level."""
        return replace(self, level=level)

    def validate(self) -> Task:
        """Check that the task can be probed and return it.

        Raises:
            TaskError: a column is missing, a split is empty, fewer than two classes in training, a label that
                occurs in a test split only, a pointer outside the corpus, or a duplicate item id.
        """
        items = self.items
        missing = [c for c in ITEM_COLUMNS if c not in items.columns]
        if missing:
            raise TaskError(f"Task {self.name!r}: the item table lacks column(s) {', '.join(missing)}.")
        if not self.name or any(c in self.name for c in "/\\:\0") or self.name.startswith("."):
            raise TaskError(f"Task name {self.name!r} must serve as a file name: no slash, colon or leading dot.")
        if self.level not in LEVELS:
            raise TaskError(f"Task {self.name!r}: level {self.level!r} is not one of {', '.join(LEVELS)}.")
        if self.unit not in UNITS:
            raise TaskError(f"Task {self.name!r}: unit {self.unit!r} is not one of {', '.join(UNITS)}.")
        for split in ("train", "dev"):
            if not (items["split"] == split).any():
                raise TaskError(
                    f"Task {self.name!r} has no {split} items. Add them, or give a file with a {split} split."
                )
        if not self.test_splits:
            raise TaskError(f"Task {self.name!r} has no test items. Add a test split.")
        if items["item"].duplicated().any():
            first = items.loc[items["item"].duplicated(), "item"].iloc[0]
            raise TaskError(f"Task {self.name!r}: item id {first!r} occurs twice; ids must be unique.")
        trained = set(items.loc[items["split"] == "train", "label"])
        if len(trained) < 2:
            only = self.labels[next(iter(trained))]
            raise TaskError(
                f"Task {self.name!r} has one class only in training ({only!r}); a probe needs at least two."
            )
        unseen = sorted({self.labels[i] for i in set(items["label"]) - trained})
        if unseen:
            raise TaskError(
                f"Task {self.name!r}: label(s) {', '.join(map(repr, unseen[:5]))} occur in dev or test but never in "
                "training. Remove those items, merge the label, or add training items."
            )
        text, span = items["text"].to_numpy(), items["span"].to_numpy()
        if text.min() < 0 or text.max() >= len(self.corpus.texts):
            raise TaskError(
                f"Task {self.name!r}: column 'text' points outside the corpus of {len(self.corpus.texts)} texts."
            )
        lengths = np.array([len(t.spans) for t in self.corpus.texts])
        if self.unit == "word" and ((span < 0) | (span >= lengths[text])).any():
            raise TaskError(f"Task {self.name!r}: column 'span' points outside its text's words.")
        if self.unit != "word" and (span != -1).any():
            raise TaskError(f"Task {self.name!r}: items of a {self.unit} task must have span -1.")
        return self

    def training_draw(self, seed: int, max_train: int | None) -> np.ndarray:
        """Positions in ``items`` (ascending) of the training items that ``seed`` draws.

        Whole texts are taken in an order that depends on the corpus and the seed alone, until ``max_train`` items are
        reached, so that tasks on one corpus share texts. ``max_train=None`` takes 80 % of the training items (at most
        20,000), so that seeds differ; a ``max_train`` at or above the number of training items takes all of them,
        and all seeds are then the same draw. A class that the draw would miss adds its first item.
        """
        train = np.flatnonzero((self.items["split"] == "train").to_numpy())
        wanted = min(int(0.8 * len(train)), 20_000) if max_train is None else max_train
        if wanted >= len(train):
            return train
        order = generator(seed, "training draw", self.corpus.digest).permutation(len(self.corpus.texts))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        ranked = train[np.argsort(rank[self.items["text"].to_numpy()[train]], kind="stable")]
        labels = self.items["label"].to_numpy()
        drawn, rest = ranked[:wanted], ranked[wanted:]
        absent, first = np.unique(labels[rest], return_index=True)
        return np.sort(np.concatenate([drawn, rest[first[~np.isin(absent, labels[drawn])]]]))
