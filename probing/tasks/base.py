"""What a task is: items that point into a corpus of texts, with labels, splits and what a reader must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import pandas as pd

from probing.trees import item_trees
from spafit.errors import TaskError
from spafit.io import content_digest
from spafit.runtime import generator

Level = Literal["surface", "syntax", "semantics", "other"]
Unit = Literal["word", "sentence", "pair", "span", "span-pair"]
Kind = Literal["classes", "multilabel", "number", "tree"]
LEVELS: tuple[str, ...] = get_args(Level)
UNITS: tuple[str, ...] = get_args(Unit)
KINDS: tuple[str, ...] = get_args(Kind)
#: Units whose items point at spans of their text.
SPAN_UNITS = ("word", "span", "span-pair")

#: Columns every task's items have; any further column is metadata that results can be split by.
ITEM_COLUMNS = ("item", "text", "span", "label", "split", "group", "control")


@dataclass(frozen=True)
class Text:
    """One string that goes through a model.

    Attributes:
        string: what is encoded. A text made of words is those words joined by single spaces.
        spans: half-open character ranges of the words whose states are kept (empty for sentence tasks).
        second: second segment of a pair, encoded together with ``string``; None for single texts.
        target: what the decoder of an encoder-decoder reads in place of ``string``, which its encoder reads; None for
            texts that both read. Other models refuse it.
    """

    string: str
    spans: tuple[tuple[int, int], ...] = ()
    second: str | None = None
    target: str | None = None

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

    @property
    def content(self) -> tuple[object, ...]:
        """What a model reads, and which of its states are kept: what decides whether two texts are the same."""
        own = (self.string, self.spans, self.second)
        return own if self.target is None else (*own, self.target)


@dataclass(frozen=True)
class Image(Text):
    """One image in a text's place: it goes through a model's vision stack, and its patches stand for words.

    A span ``(k, k + 1)`` is cell k of a grid of ``grid`` × ``grid`` equal cells over what the model sees, counted row
    by row from the top left; its state is that of the patch around the cell's centre, whatever the patches' size.

    Attributes:
        string: what displays call it, such as the file's name; it plays no part in what is computed.
        source: path of the file, or its encoded bytes.
        digest: SHA-256 of its bytes.
        grid: cells per side that spans count by.
    """

    source: str | bytes = field(default="", repr=False)
    digest: str = ""
    grid: int = 1

    @property
    def words(self) -> tuple[str, ...]:
        """What displays call the cells: row and column, from 1."""
        return tuple(f"row {a // self.grid + 1} column {a % self.grid + 1}" for a, _ in self.spans)

    @property
    def content(self) -> tuple[object, ...]:
        """See :attr:`Text.content`: the bytes' digest, not the name."""
        return ("image", self.digest, self.grid if self.spans else 0, self.spans)


@dataclass(frozen=True)
class Corpus:
    """Distinct texts (or images) that the tasks of one source share, so that each is encoded once.

    Attributes:
        name: the source, for example ``core`` or a treebank's folder name.
        texts: the texts; tasks point at them by position.
    """

    name: str
    texts: tuple[Text, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all texts, their spans, second segments and targets."""
        return content_digest(t.content for t in self.texts)

    @property
    def of_images(self) -> bool:
        """Whether the texts are images, which other stacks encode and no word-based control reads."""
        return isinstance(self.texts[0], Image) if self.texts else False


@dataclass(frozen=True)
class Task:
    """A labelled question put to each layer's representation.

    Attributes:
        name: unique in a run, for example ``core.tense`` or ``ewt.upos``.
        level: the linguistic level the task is filed under; an assumption that users can regroup.
        unit: ``word`` (one span that is a word), ``sentence`` (a whole text), ``pair`` (a text with a second segment;
            or, where the items have the column ``text2``, two texts that are encoded each alone), ``span`` (one span of
            any length) or ``span-pair`` (two spans of one text, in the columns ``span`` and ``span2``).
        labels: class names, which ``items.label`` indexes; empty for numbers.
        corpus: the texts.
        items: one row per item with the columns of :data:`ITEM_COLUMNS`: ``item`` (unique string id),
            ``text`` (position in ``corpus.texts``), ``span`` (position in the text's spans; -1 for whole texts),
            ``label`` (see ``kind``), ``split`` (``train``, ``dev``, and one or more test splits),
            ``group`` (cluster for intervals: the sentence or document, as a string) and ``control``
            (the string whose type draws the control label: the word, or a sentence's content word; empty if none).
        description: one sentence for a reader, with the unit and what the classes are.
        source: where the labels come from.
        licence: licence of the data.
        citation: BibTeX key or reference of the data or definition.
        notes: what was dropped, truncated or changed while reading, for the report.
        kind: what ``items.label`` holds. ``classes``: one position in ``labels``. ``multilabel``: positions in
            ``labels``, ascending and between commas in a string such as ``"3,17"``; empty where none applies.
            ``number``: a finite float. ``tree``: items are all words of whole sentences in their order, a sentence
            being the items of one ``group``; the label is the number of the word's head in its sentence, counted
            from 1, and 0 for the root. A boolean column ``punctuation`` marks words that tree scores leave out.
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
    kind: Kind = "classes"

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the test splits, the primary one (``test``, or ``seen`` where word types are split) first."""
        found = sorted(set(self.items["split"].unique()) - {"train", "dev"})
        return tuple(sorted(found, key=lambda s: (s not in ("test", "seen"), s)))

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of the texts that are encoded for an item: two for pairs whose texts are encoded each alone."""
        return ("text", "text2") if self.unit == "pair" and "text2" in self.items.columns else ("text",)

    @property
    def span_columns(self) -> tuple[str, ...]:
        """Columns of the spans that an item points to; none for whole texts."""
        return () if self.unit not in SPAN_UNITS else ("span", "span2") if self.unit == "span-pair" else ("span",)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what determines the task's numbers: texts, spans, labels, splits, groups, control keys."""
        columns = (self.items[c].astype(str).str.cat(sep="\x1f") for c in ITEM_COLUMNS)
        extra: tuple[str, ...] = () if self.kind == "classes" else (self.kind,)
        second = (*self.span_columns, *self.text_columns)
        extra += tuple(self.items[c].astype(str).str.cat(sep="\x1f") for c in second if c not in ITEM_COLUMNS)
        return content_digest((self.name, self.unit, "\x1f".join(self.labels), self.corpus.digest, *columns, *extra))

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
        self._validate_labels()
        text, span = items["text"].to_numpy(), items["span"].to_numpy()
        for column in self.text_columns:
            if items[column].min() < 0 or items[column].max() >= len(self.corpus.texts):
                size = len(self.corpus.texts)
                raise TaskError(f"Task {self.name!r}: column {column!r} points outside the corpus of {size} texts.")
        lengths = np.array([len(t.spans) for t in self.corpus.texts])
        for column in self.span_columns:
            if column not in items:
                raise TaskError(f"Task {self.name!r}: items of a span-pair task need the column {column}.")
            at = items[column].to_numpy()
            if ((at < 0) | (at >= lengths[text])).any():
                raise TaskError(f"Task {self.name!r}: column {column!r} points outside its text's spans.")
        if self.unit not in SPAN_UNITS and (span != -1).any():
            raise TaskError(f"Task {self.name!r}: items of a {self.unit} task must have span -1.")
        return self

    def _validate_labels(self) -> None:
        items, train = self.items, self.items["split"] == "train"
        if self.kind not in KINDS:
            raise TaskError(f"Task {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}.")
        if self.kind == "tree":
            if self.unit != "word" or "punctuation" not in items:
                raise TaskError(f"Task {self.name!r}: trees need items that are words, and the column punctuation.")
            item_trees(items)
            return
        if self.kind == "number":
            values = items["label"].to_numpy(dtype=np.float64)
            if not np.isfinite(values).all():
                first = items["item"].iloc[int(np.flatnonzero(~np.isfinite(values))[0])]
                raise TaskError(
                    f"Task {self.name!r}: the target of item {first!r} is missing or not finite. Remove such items."
                )
            if np.ptp(values[train.to_numpy()]) == 0:
                raise TaskError(
                    f"Task {self.name!r}: every training target is {values[train.to_numpy()][0]:g}; a regression needs "
                    "targets that vary."
                )
            return
        if self.kind == "multilabel":
            trained, every = self._label_positions(items.loc[train, "label"]), self._label_positions(items["label"])
            outside = sorted(i for i in every if not 0 <= i < len(self.labels))
            if outside:
                raise TaskError(
                    f"Task {self.name!r}: label position {outside[0]} is outside its {len(self.labels)} labels."
                )
            if not trained:
                raise TaskError(f"Task {self.name!r}: no training item has a label.")
        else:
            trained, every = set(items.loc[train, "label"]), set(items["label"])
            if len(trained) < 2:
                only = self.labels[next(iter(trained))]
                raise TaskError(
                    f"Task {self.name!r} has one class only in training ({only!r}); a probe needs at least two."
                )
        unseen = sorted({self.labels[i] for i in every - trained})
        if unseen:
            raise TaskError(
                f"Task {self.name!r}: label(s) {', '.join(map(repr, unseen[:5]))} occur in dev or test but never in "
                "training. Remove those items, merge the label, or add training items."
            )

    @staticmethod
    def _label_positions(labels: pd.Series) -> set[int]:
        return {int(i) for text in labels.unique() for i in str(text).split(",") if i}

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
        if self.kind == "tree":  # whole sentences, of which the first always
            groups = self.items["group"].to_numpy()[ranked]
            if groups[wanted] == groups[wanted - 1]:
                cut = int(np.flatnonzero(groups == groups[wanted])[0])
                drawn = ranked[: cut or int((groups == groups[0]).sum())]
            return np.sort(drawn)
        if self.kind == "number":
            return np.sort(drawn)
        if self.kind == "multilabel":
            have = self._label_positions(self.items["label"].iloc[drawn])
            added = []
            for row in rest:
                if new := self._label_positions(self.items["label"].iloc[[row]]) - have:
                    have |= new
                    added.append(row)
            return np.sort(np.concatenate([drawn, np.array(added, dtype=drawn.dtype)]))
        absent, first = np.unique(labels[rest], return_index=True)
        return np.sort(np.concatenate([drawn, rest[first[~np.isin(absent, labels[drawn])]]]))
