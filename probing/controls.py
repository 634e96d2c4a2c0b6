"""Control tasks: labels that a representation can only give back by recognising the word itself."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from probing.baselines import BASELINES
from probing.targets import label_values
from probing.tasks.base import Task
from spafit.runtime import generator

#: Controls of a probing run by default.
CONTROLS = ("word-type", "random-encoder")
#: Controls that are encoders of their own, one per seed: weights drawn anew by the model's own scheme, the model's
#: weights in another order within each tensor, and the model on texts whose words stand in another order.
ENCODERS = ("random-encoder", "permuted-weights", "permuted-order")
#: Every control that has a name; ``column:NAME`` comes on top (:mod:`probing.baselines`).
ALL_CONTROLS = ("word-type", *ENCODERS, *BASELINES)

#: Share of test items whose type must occur in training for the control of a sentence task.
RECURRING = 0.5
_WORDS = re.compile(r"\w+")


def control_labels(task: Task, seed: int) -> np.ndarray | None:
    """Labels of the control task of Hewitt & Liang (2019): each word type draws one label, once, for all splits.

    The draw is from the label distribution of the task's training split and depends on the seed and the set of types.
    Where items have several labels a type draws all labels of one training item; where they have a number, the number
    of one. For sentence tasks the type is the content word that the task names in its ``control`` column, else
    that of :func:`content_words`.

    Returns:
        Labels of all items as :func:`probing.targets.label_values` gives the task's own, or None where the task names
        no types. Where types do not recur between training and test (a split of unseen types) the control's accuracy
        is chance by construction: do not read selectivity from such a split.
    """
    types = control_types(task)
    if types is None or task.kind == "tree":
        return None
    unique, inverse = np.unique(types, return_inverse=True)
    random = generator(seed, "control task", task.name)
    if task.kind == "classes":
        drawn = random.choice(len(task.labels), size=len(unique), p=label_frequencies(task))
    else:
        values = label_values(task)[(task.items["split"] == "train").to_numpy()]
        drawn = values[random.integers(len(values), size=len(unique))]
    return drawn[inverse]


def control_types(task: Task) -> np.ndarray | None:
    """The word type of every item, (items,); None where there are none, or too few that recur."""
    types = task.items["control"].astype(str).to_numpy()
    if not (types == "").any():
        return types
    if task.unit not in ("sentence", "pair") or not (types == "").all() or task.corpus.of_images:
        return None
    types = content_words(task)
    split = task.items["split"].to_numpy()
    test = ~np.isin(split, ("train", "dev"))
    known = np.isin(types[test], types[split == "train"])
    return types if known.size and known.mean() >= RECURRING else None


def content_words(task: Task) -> np.ndarray:
    """A word of each item's text that stands for it: of the words in two training texts or more, the rarest there.

    The first of equally rare ones; lower-cased. A text without such a word gets its longest one.
    """
    texts = [_WORDS.findall(t.string.lower()) for t in task.corpus.texts]
    own = task.items["text"].to_numpy()
    train = np.unique(own[(task.items["split"] == "train").to_numpy()])
    count = Counter(word for i in train for word in set(texts[i]))
    chosen = {}
    for i in np.unique(own):
        words = [w for w in texts[i] if count[w] > 1]
        chosen[i] = min(words, key=lambda w: count[w]) if words else max(texts[i], key=len, default="")
    return np.array([chosen[i] for i in own], dtype=object).astype(str)


def label_frequencies(task: Task) -> np.ndarray:
    """Relative frequency of each label in the task's whole training split, shape (classes,), summing to 1."""
    train = task.items.loc[task.items["split"] == "train", "label"]
    return np.bincount(train, minlength=len(task.labels)) / len(train)
