"""Control tasks: labels that a representation can only give back by recognising the word itself."""

from __future__ import annotations

import numpy as np

from probing.targets import label_values
from probing.tasks.base import Task
from spafit.runtime import generator

#: Controls that a probing run can be asked for.
CONTROLS = ("word-type", "random-encoder")


def control_labels(task: Task, seed: int) -> np.ndarray | None:
    """Labels of the control task of Hewitt & Liang (2019): each word type draws one label, once, for all splits.

    The draw is from the label distribution of the task's training split and depends on the seed and the set of types.
    Where items have several labels a type draws all labels of one training item; where they have a number, the number
    of one. For sentence tasks the type is the content word that the task names in its ``control`` column.

    Returns:
        Labels of all items as :func:`probing.targets.label_values` gives the task's own, or None where the task names
        no types. Where types do not recur between training and test (a split of unseen types) the control's accuracy
        is chance by construction: do not read selectivity from such a split.
    """
    types = task.items["control"].astype(str)
    if (types == "").any():
        return None
    unique, inverse = np.unique(types.to_numpy(), return_inverse=True)
    random = generator(seed, "control task", task.name)
    if task.kind == "classes":
        drawn = random.choice(len(task.labels), size=len(unique), p=label_frequencies(task))
    else:
        values = label_values(task)[(task.items["split"] == "train").to_numpy()]
        drawn = values[random.integers(len(values), size=len(unique))]
    return drawn[inverse]


def label_frequencies(task: Task) -> np.ndarray:
    """Relative frequency of each label in the task's whole training split, shape (classes,), summing to 1."""
    train = task.items.loc[task.items["split"] == "train", "label"]
    return np.bincount(train, minlength=len(task.labels)) / len(train)
