"""Probing tasks from a CoNLL-U treebank: word classes, dependencies, morphology, and sentence properties.

Words keep their order and forms; every task but ``bigram_shift``, which needs texts of its own, points into the one
corpus of the treebank, so asking for more tasks changes neither the texts nor the numbers of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from probing.tasks.base import Corpus, Level, Task, Text, Unit
from probing.tasks.treebank import Treebank
from probing.trees import PUNCTUATION
from spafit.data.conllu import Sentence
from spafit.errors import TaskError, UnknownTaskError, did_you_mean
from spafit.runtime import generator

#: Tasks that a reference without ``#…`` asks for.
DEFAULT = ("upos", "deprel", "head_direction", "tree_depth", "bigram_shift", "length", "word_content")
#: ``feats`` takes the FEATS keys with at least two values that each have this many training and test words.
FEATS_SUPPORT = {"train": 100, "test": 20}
#: ``word_content`` asks for this many words: the content words ranked just below the equally many commonest.
CONTENT_WORDS = 50
#: Training sentences that a word of ``word_content`` must have.
CONTENT_SUPPORT = 10

_CONTENT_TAGS = frozenset({"NOUN", "VERB", "ADJ", "ADV", "PROPN"})
_DISTANCES = {1: "1", 2: "2", 3: "3", 5: "4-5", 9: "6-9"}
_FAR = "10+"

Values = Callable[[Sentence], Sequence[str]]


@dataclass(frozen=True)
class _Words:
    """A word task: a label per word of a sentence, empty where the word is not an item."""

    values: Values
    level: Level
    description: str
    missing: str = ""  # what an empty label means where it is worth a note
    classes: tuple[str, ...] | None = None  # their order, where the alphabet's would mislead


def _universal(relations: Sequence[str]) -> list[str]:
    return ["" if r == "_" else r.partition(":")[0] for r in relations]


def _specified(column: Sequence[str]) -> list[str]:
    return ["" if value == "_" else value for value in column]


def _direction(sentence: Sentence) -> list[str]:
    return [
        "" if head < 0 else "root" if head == 0 else "left" if head < i else "right"
        for i, head in enumerate(sentence.heads, start=1)
    ]


def _distance(sentence: Sentence) -> list[str]:
    return [
        "" if head <= 0 else next((name for top, name in _DISTANCES.items() if abs(head - i) <= top), _FAR)
        for i, head in enumerate(sentence.heads, start=1)
    ]


_WORD_TASKS = {
    "upos": _Words(
        lambda s: _specified(s.upos), "syntax", "Universal part of speech of a word (UPOS).", "without a UPOS tag"
    ),
    "xpos": _Words(
        lambda s: _specified(s.xpos), "syntax", "Language-specific part of speech of a word (XPOS).", "without XPOS"
    ),
    "deprel": _Words(
        lambda s: _universal(s.deprels),
        "syntax",
        "Universal dependency relation of a word to its head, without subtype.",
        "without a relation",
    ),
    "deprel_full": _Words(
        lambda s: _specified(s.deprels),
        "syntax",
        "Dependency relation of a word to its head, with subtype.",
        "without a relation",
    ),
    "head_direction": _Words(
        _direction,
        "syntax",
        "Whether a word's head stands to its left, to its right, or it is the root.",
        "without a head",
    ),
    "head_distance": _Words(
        _distance,
        "syntax",
        "Number of words from a word to its head, in six classes; roots are no items.",
        classes=(*_DISTANCES.values(), _FAR),
    ),
}
_SENTENCE_TASKS = ("tree_depth", "length", "word_content", "bigram_shift")
#: Names that may follow ``#`` in a ``conllu:`` reference, besides ``feats.<KEY>``.
DERIVATIONS = (*_WORD_TASKS, "feats", *_SENTENCE_TASKS, "tree")


def treebank_tasks(treebank: Treebank, names: Sequence[str] | None = None) -> list[Task]:
    """Derive tasks from a treebank.

    Args:
        treebank: what :func:`~probing.tasks.treebank.read_treebank` read.
        names: of :data:`DERIVATIONS`, or ``feats.<KEY>`` for one FEATS key (words that have the key; ``feats`` stands
            for every key with :data:`FEATS_SUPPORT`). None means :data:`DEFAULT`, of which those that the treebank
            cannot give (no relations, too small) are left out and named in the notes of the others.

    Returns:
        Validated tasks ``<treebank>.<name>``, in the order asked for. Items carry the metadata columns ``genre`` and
        ``document`` (where the treebank has them), ``length`` (words in the sentence) and, for words, ``distance``
        (words to the head; missing for roots). Items whose label never
        occurs in training are dropped and counted in the notes. ``tree_depth`` and ``length`` are binned into classes
        of about equal size on the training split; depth grows with length, so read the two together. Filing
        morphological features under ``syntax`` is an assumption.

    Raises:
        TaskError: an unknown name, or a task that the treebank cannot give.
    """
    if names is not None:
        wanted = [n for name in names for n in (_supported_feats(treebank) if name == "feats" else [name])]
        return [_derive(treebank, name) for name in dict.fromkeys(wanted)]
    tasks, skipped = [], []
    for name in DEFAULT:
        try:
            tasks.append(_derive(treebank, name))
        except TaskError as error:
            skipped.append(f"{treebank.name}.{name} is left out: {error}")
    if not tasks:
        raise TaskError(f"Treebank {treebank.name!r} gives none of the default tasks. {skipped[0]}")
    return [replace(task, notes=(*task.notes, *skipped)) for task in tasks]


def _derive(treebank: Treebank, name: str) -> Task:
    if name in _WORD_TASKS:
        return _word_task(treebank, name, _WORD_TASKS[name])
    if name.startswith("feats."):
        return _feature_task(treebank, name.removeprefix("feats."))
    if name == "tree_depth":
        return _binned_task(
            treebank, name, [s.depth for s in treebank.sentences], "syntax",
            "Words on the longest path from the root down the dependency tree, binned.", bins=5,
        )  # fmt: skip
    if name == "length":
        return _binned_task(
            treebank, name, [len(s.words) for s in treebank.sentences], "surface",
            "Number of words in the sentence, binned.", bins=6,
        )  # fmt: skip
    if name == "word_content":
        return _word_content(treebank)
    if name == "tree":
        return _tree_task(treebank)
    if name == "bigram_shift":
        return _bigram_shift(treebank)
    raise UnknownTaskError(
        f"A treebank gives no task {name!r}.{did_you_mean(name, DERIVATIONS)} "
        f"Use {', '.join(DERIVATIONS)}, or feats.<KEY> such as feats.Number."
    )


def _finish(
    treebank: Treebank,
    name: str,
    level: Level,
    unit: Unit,
    description: str,
    items: pd.DataFrame,
    *,
    classes: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    corpus: Corpus | None = None,
) -> Task:
    """Index the labels (in the order ``classes``, else sorted) and drop items whose label is not in training."""
    full_name = f"{treebank.name}.{name}"
    trained = set(items.loc[items["split"] == "train", "label"].unique())
    labels = tuple(c for c in (classes or sorted(trained)) if c in trained)
    if len(labels) < 2:
        raise TaskError(
            f"Task {full_name!r} has {len(labels)} class(es) in training ({', '.join(labels) or 'none'}); "
            "a probe needs at least two."
        )
    known = items["label"].isin(labels)
    all_notes = [*treebank.notes, *notes]
    if not known.all():
        unseen = Counter(items.loc[~known, "label"])
        shown = ", ".join(f"{label} {count}" for label, count in unseen.most_common(5))
        all_notes.append(f"{unseen.total()} dev or test item(s) dropped: their label is not in training ({shown}).")
        items = items[known]
    items = items.assign(label=pd.Categorical(items["label"], categories=labels).codes.astype(np.int64))
    return Task(
        name=full_name,
        level=level,
        unit=unit,
        labels=labels,
        corpus=corpus or treebank.corpus,
        items=items.reset_index(drop=True),
        description=description,
        source=treebank.source,
        licence=treebank.licence,
        citation=treebank.citation,
        notes=tuple(all_notes),
    ).validate()


def _sentence_columns(sentences: Sequence[Sentence]) -> pd.DataFrame:
    """One row per sentence with the columns that all its items share."""
    frame = pd.DataFrame({"split": [s.split for s in sentences], "group": [s.id for s in sentences]})
    for column in ("genre", "document"):
        values = [getattr(s, column) for s in sentences]
        if any(values):
            frame[column] = values
    return frame.assign(length=[len(s.words) for s in sentences])


def _word_task(treebank: Treebank, name: str, spec: _Words) -> Task:
    labels: list[str] = []
    owner: list[int] = []
    span: list[int] = []
    missing = 0
    for i, sentence in enumerate(treebank.sentences):
        for j, label in enumerate(spec.values(sentence)):
            if label:
                labels.append(label)
                owner.append(i)
                span.append(j)
            else:
                missing += 1
    sentences = treebank.sentences
    items = _sentence_columns(sentences).iloc[owner].reset_index(drop=True)
    items.insert(0, "item", [f"{sentences[i].id}:{j + 1}" for i, j in zip(owner, span, strict=True)])
    items.insert(1, "text", treebank.text_of[owner])
    items.insert(2, "span", np.array(span, dtype=np.int64))
    items.insert(3, "label", labels)
    items.insert(6, "control", [sentences[i].words[j].lower() for i, j in zip(owner, span, strict=True)])
    heads = [sentences[i].heads[j] for i, j in zip(owner, span, strict=True)]
    distance = [abs(head - j - 1) if head > 0 else np.nan for head, j in zip(heads, span, strict=True)]
    items["distance"] = distance
    notes = [f"{missing} word(s) {spec.missing} are no items."] if missing and spec.missing else []
    return _finish(treebank, name, spec.level, "word", spec.description, items, classes=spec.classes, notes=notes)


def _tree_task(treebank: Treebank) -> Task:
    """Dependency trees of whole sentences, for structural probes; a word's label is the number of its head."""
    whole = [i for i, s in enumerate(treebank.sentences) if all(head >= 0 for head in s.heads)]
    if not whole:
        raise TaskError(f"Task '{treebank.name}.tree' has no items: no sentence has all its heads.")
    sentences = [treebank.sentences[i] for i in whole]
    owner = np.repeat(np.arange(len(whole)), [len(s.words) for s in sentences])
    span = np.concatenate([np.arange(len(s.words)) for s in sentences])
    items = _sentence_columns(sentences).iloc[owner].reset_index(drop=True)
    items.insert(0, "item", [f"{sentences[i].id}:{j + 1}" for i, j in zip(owner, span, strict=True)])
    items.insert(1, "text", treebank.text_of[np.array(whole)[owner]])
    items.insert(2, "span", span)
    items.insert(3, "label", np.concatenate([s.heads for s in sentences]).astype(np.int64))
    items.insert(6, "control", [word.lower() for s in sentences for word in s.words])
    items["punctuation"] = [tag == PUNCTUATION for s in sentences for tag in s.upos]
    missing = len(treebank.sentences) - len(whole)
    notes = [*treebank.notes, *([f"{missing} sentence(s) with words without a head are left out."] if missing else [])]
    return Task(
        name=f"{treebank.name}.tree", level="syntax", unit="word", labels=(), corpus=treebank.corpus, items=items,
        description="The dependency tree of a sentence: distances between its words and their depths.",
        source=treebank.source, licence=treebank.licence, citation=treebank.citation, notes=tuple(notes), kind="tree",
    ).validate()  # fmt: skip


def _features(cell: str) -> dict[str, str]:
    if cell == "_":
        return {}
    return {key: value for key, _, value in (pair.partition("=") for pair in cell.split("|"))}


def _feature_task(treebank: Treebank, key: str) -> Task:
    by_cell = {cell: _features(cell).get(key, "") for cell in {c for s in treebank.sentences for c in s.feats}}
    if not any(by_cell.values()):
        found = sorted({k for cell in by_cell for k in _features(cell)})
        raise UnknownTaskError(
            f"Treebank {treebank.name!r} has no feature {key!r}.{did_you_mean(key, found)} "
            f"Its FEATS keys are {', '.join(found) or 'none'}."
        )
    spec = _Words(
        lambda s: [by_cell[c] for c in s.feats], "syntax", f"Morphological feature {key} of the words that have it."
    )
    return _word_task(treebank, f"feats.{key}", spec)


def _supported_feats(treebank: Treebank) -> list[str]:
    cells = {
        split: Counter(c for s in treebank.sentences if s.split == split for c in s.feats) for split in FEATS_SUPPORT
    }
    counts: dict[str, Counter[tuple[str, str]]] = {split: Counter() for split in FEATS_SUPPORT}
    for split, found in cells.items():
        for cell, n in found.items():
            for pair in _features(cell).items():
                counts[split][pair] += n
    supported = Counter(
        key
        for key, value in counts["train"]
        if all(counts[split][key, value] >= least for split, least in FEATS_SUPPORT.items())
    )
    names = sorted(f"feats.{key}" for key, values in supported.items() if values >= 2)
    if not names:
        raise TaskError(
            f"Treebank {treebank.name!r} has no FEATS key with two values of at least {FEATS_SUPPORT['train']} "
            f"training and {FEATS_SUPPORT['test']} test words each. Name a key with feats.<KEY> to use it all the same."
        )
    return names


def _sentence_items(treebank: Treebank, labels: Sequence[str]) -> pd.DataFrame:
    """Items of the sentences with a non-empty label; the control key is the form of the root word."""
    keep = [i for i, label in enumerate(labels) if label]
    sentences = [treebank.sentences[i] for i in keep]
    items = _sentence_columns(sentences)
    items.insert(0, "item", items["group"])
    items.insert(1, "text", treebank.text_of[keep])
    items.insert(2, "span", -1)
    items.insert(3, "label", [labels[i] for i in keep])
    items.insert(6, "control", [_root_form(s) for s in sentences])
    return items


def _root_form(sentence: Sentence) -> str:
    return sentence.words[sentence.heads.index(0)].lower() if 0 in sentence.heads else ""


def equal_bins(values: Sequence[int], bins: int) -> list[tuple[int, str]]:
    """Cut positive integers into at most ``bins`` classes of about equal size.

    Returns:
        Largest value and name (``1-4``, ``5``, ``6-8``, ``9+``) of each class, ascending; the last has no upper end.
    """
    counts = sorted(Counter(values).items())
    tops: list[int] = []
    left, size, previous = len(values), 0, 0
    for value, count in counts:
        # Close the class before this value where that lands nearer to an equal share of what is left.
        share = (left + size) / (bins - len(tops))
        if size and len(tops) < bins - 1 and size + count / 2 > share:
            tops.append(previous)
            size = 0
        size, left, previous = size + count, left - count, value
    lows = [1, *(t + 1 for t in tops)]
    named = [(top, f"{low}-{top}" if low < top else str(top)) for low, top in zip(lows, tops, strict=False)]
    return [*named, (max(values), f"{lows[-1]}+")]


def _binned_task(
    treebank: Treebank, name: str, values: Sequence[int], level: Level, description: str, *, bins: int
) -> Task:
    training = [v for s, v in zip(treebank.sentences, values, strict=True) if s.split == "train" and v]
    if not training:
        raise TaskError(f"Task '{treebank.name}.{name}' has no items: no training sentence has a complete tree.")
    classes = equal_bins(training, bins)

    def label(value: int) -> str:
        return next((n for top, n in classes if value <= top), classes[-1][1])

    missing = sum(not v for v in values)
    notes = [f"{missing} sentence(s) without a complete tree are no items."] if missing else []
    items = _sentence_items(treebank, [label(v) if v else "" for v in values])
    names = [n for _, n in classes]
    return _finish(treebank, name, level, "sentence", description, items, classes=names, notes=notes)


def _word_content(treebank: Treebank) -> Task:
    """Which of some mid-frequency content words the sentence holds; sentences with exactly one of them."""
    training = [s for s in treebank.sentences if s.split == "train"]
    counts = Counter(w for s in training for w in {word.lower() for word in s.words} if w.isalpha())
    tokens = Counter(w.lower() for s in training for w in s.words)
    content = Counter(
        w.lower()
        for s in training
        for w, tag in zip(s.words, s.upos, strict=True)
        if tag in _CONTENT_TAGS or tag == "_"
    )
    # A form counts as a content word by its usual tag, so that a stray VERB does not let in an auxiliary.
    ranked = sorted((w for w in counts if content[w] > tokens[w] / 2), key=lambda w: (-counts[w], w))
    skipped = min(CONTENT_WORDS, len(ranked) // 10)  # a small treebank has no fifty words to spare
    chosen = set(ranked[skipped : skipped + CONTENT_WORDS])
    lowered = [chosen.intersection(w.lower() for w in s.words) for s in treebank.sentences]
    labels = [next(iter(found)) if len(found) == 1 else "" for found in lowered]
    support = Counter(
        label for s, label in zip(treebank.sentences, labels, strict=True) if s.split == "train" and label
    )
    kept = {word for word, n in support.items() if n >= CONTENT_SUPPORT}
    if len(kept) < 2:
        raise TaskError(
            f"Treebank {treebank.name!r} is too small for word_content: {len(kept)} word(s) have "
            f"{CONTENT_SUPPORT} training sentences."
        )
    items = _sentence_items(treebank, [label if label in kept else "" for label in labels])
    description = f"Which one of {len(kept)} mid-frequency content words the sentence holds (exactly one of them)."
    return _finish(treebank, "word_content", "surface", "sentence", description, items)


def _bigram_shift(treebank: Treebank) -> Task:
    """Whether two neighbouring words were swapped: half of the sentences, on a corpus of its own.

    The swapped words differ, are no punctuation, and leave the first word, whose capital would give them away.
    """
    seen: set[tuple[str, ...]] = set()
    usable: list[tuple[Sentence, list[int]]] = []
    for sentence in treebank.sentences:
        words = [w.lower() for w in sentence.words]
        places = [
            i for i in range(1, len(words) - 1) if words[i] != words[i + 1] and "PUNCT" not in sentence.upos[i : i + 2]
        ]
        if places and sentence.words not in seen:  # no text in two splits, none twice
            seen.add(sentence.words)
            usable.append((sentence, places))
    words_of: list[tuple[str, ...]] = []
    shifted: list[bool] = []
    for split in ("train", "dev", "test"):
        part = [(s, places) for s, places in usable if s.split == split]
        draw = generator(0, "bigram shift", split, len(part))
        swap = draw.permutation(len(part)) < len(part) // 2
        for (sentence, places), change in zip(part, swap, strict=True):
            words = list(sentence.words)
            if change:
                i = places[int(draw.integers(len(places)))]
                words[i], words[i + 1] = words[i + 1], words[i]
            words_of.append(tuple(words))
            shifted.append(bool(change))
    sentences = [s for s, _ in usable]
    items = _sentence_columns(sentences)
    items.insert(0, "item", items["group"])
    items.insert(1, "text", np.arange(len(sentences)))
    items.insert(2, "span", -1)
    items.insert(3, "label", ["shifted" if change else "original" for change in shifted])
    items.insert(6, "control", [_root_form(s) for s in sentences])
    corpus = Corpus(f"{treebank.name}.bigram_shift", tuple(Text(" ".join(words)) for words in words_of))
    dropped = len(treebank.sentences) - len(usable)
    notes = (
        [f"{dropped} sentence(s) are no items: repeated, or without two words that can be swapped."] if dropped else []
    )
    description = "Whether two neighbouring words of the sentence were swapped (half of them)."
    return _finish(treebank, "bigram_shift", "syntax", "sentence", description, items, notes=notes, corpus=corpus)
