"""Which texts of the tasks' corpora a run encodes, and of which spans and words it keeps the states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from probing.fitting import ProbeSettings, training_rows
from probing.probes.families import parse_probe, reads_words, suits
from probing.tasks.base import Corpus, Task, Text


@dataclass(frozen=True)
class NeededTexts:
    """The texts of one corpus that a run encodes, with the spans that it needs.

    Attributes:
        texts: the texts.
        position: position in ``texts`` of each text of the corpus, -1 if it is not encoded.
        spans: position in its encoded text of each span of the corpus, text after text, -1 if it is not encoded.
        span_offsets: where each text's spans begin in ``spans``, shape (texts of the corpus + 1,).
        words: half-open positions in its encoded text of the words that each span of the corpus touches, shaped
            (spans, 2); empty ranges where no probe reads them. They follow the spans of the corpus.
    """

    texts: tuple[Text, ...]
    position: np.ndarray = field(repr=False)
    spans: np.ndarray = field(repr=False)
    span_offsets: np.ndarray = field(repr=False)
    words: np.ndarray = field(repr=False)

    def span_of(self, text: np.ndarray, span: np.ndarray) -> np.ndarray:
        """Position among the encoded spans of ``span`` of ``text``, both as the corpus counts; -1 if not encoded."""
        return self.spans[self.span_offsets[text] + span]

    def words_of(self, text: np.ndarray, span: np.ndarray) -> np.ndarray:
        """Begin and end among the encoded spans of the words in ``span`` of ``text``, on a last axis of its own."""
        return self.words[self.span_offsets[text] + span]


def needed_texts(tasks: Sequence[Task], settings: ProbeSettings) -> dict[str, NeededTexts]:
    """For each corpus the texts that some draw, dev or test split of some task needs, in the corpus's order."""
    masks: dict[str, np.ndarray] = {}
    for task in tasks:
        mask = masks.setdefault(task.corpus.name, np.zeros(len(task.corpus.texts), dtype=bool))
        for column in task.text_columns:
            text = task.items[column].to_numpy()
            for rows in (
                np.flatnonzero((task.items["split"] != "train").to_numpy()),
                *training_rows(task, settings).values(),
            ):
                mask[text[rows]] = True
    needed = {}
    readers = [f for f in map(parse_probe, settings.probe) if reads_words(f)]
    for name, mask in masks.items():
        own = [t for t in tasks if t.corpus.name == name]
        position = np.full(len(mask), -1, dtype=np.int64)
        position[mask] = np.arange(mask.sum())
        texts: list[Text] = []
        corpus = own[0].corpus
        offsets = np.concatenate([[0], np.cumsum([len(t.spans) for t in corpus.texts])])
        kept = _needed_spans(own, corpus, offsets) & np.repeat(mask, np.diff(offsets))
        read = _spans_of([t for t in own if any(suits(f, t) for f in readers)], offsets)
        words = np.zeros((len(kept), 2), dtype=np.int64)
        for i in np.flatnonzero(mask):
            whole, at = corpus.texts[i], slice(offsets[i], offsets[i + 1])
            spans = tuple(span for span, k in zip(whole.spans, kept[at], strict=True) if k)
            if read[at].any():
                inside, words[at] = _words_in(whole, read[at])
                words[at] += len(spans)
                spans += inside
            texts.append(whole if spans == whole.spans else replace(whole, spans=spans))
        before = np.concatenate([[0], np.cumsum(kept)])
        spans_at = np.where(kept, before[:-1] - np.repeat(before[offsets[:-1]], np.diff(offsets)), -1)
        needed[name] = NeededTexts(tuple(texts), position, spans_at, offsets, words)
    return needed


def _needed_spans(tasks: Sequence[Task], corpus: Corpus, offsets: np.ndarray) -> np.ndarray:
    """Which spans of a corpus are stored: all of them where only words are probed, else those of some item."""
    units = {task.unit for task in tasks}
    return np.full(offsets[-1], "word" in units and not units & {"span", "span-pair"}) | _spans_of(tasks, offsets)


def _spans_of(tasks: Sequence[Task], offsets: np.ndarray) -> np.ndarray:
    """Which spans of a corpus some item of these tasks points to."""
    found = np.zeros(offsets[-1], dtype=bool)
    for task in tasks:
        for column in task.span_columns:
            found[offsets[task.items["text"].to_numpy()] + task.items[column].to_numpy()] = True
    return found


def _words_in(text: Text, chosen: np.ndarray) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
    """The words of a text, parted by white space, that some chosen span touches; and those of each chosen span.

    Args:
        text: the text.
        chosen: which of its spans, bool, (spans,).

    Returns:
        Character ranges of the words in their order, and half-open positions among them, (spans, 2), empty for others.
    """
    found = np.array([m.span() for m in re.finditer(r"\S+", text.string)], dtype=np.int64).reshape(-1, 2)
    spans = np.array(text.spans, dtype=np.int64)
    ranges = np.stack(
        [np.searchsorted(found[:, 1], spans[:, 0], side="right"), np.searchsorted(found[:, 0], spans[:, 1])], axis=1
    )
    touched = np.zeros(len(found), dtype=bool)
    for begin, end in ranges[chosen]:
        touched[begin:end] = True
    before = np.concatenate([[0], np.cumsum(touched)])
    words = tuple((int(a), int(b)) for a, b in found[touched])
    return words, np.where(chosen[:, None], before[ranges], 0)
