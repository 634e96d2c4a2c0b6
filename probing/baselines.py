"""Baselines that read a task's texts and no model: what words, lengths or a given number tell of the labels.

=====================  =================================================================================================
``bag-of-words``       counts of lower-cased words of the text; those of the items' spans are counted apart
``tf-idf``             the same, weighted by inverse document frequency
``length``             numbers of words and characters, and their logarithms, of the texts and spans
``majority-per-word``  how often each label goes with the word (or the content word that the task names) in training
``column:NAME``        a number that the items bring along, such as a sentence's perplexity
=====================  =================================================================================================

Each is fitted on the run's training draw, its penalty chosen on dev, and scored like a probe; it has the same score at
every hidden state, so that the model's score minus the baseline's is a curve.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.probes.outputs import fixed_log_odds
from probing.targets import label_values
from probing.tasks.base import ITEM_COLUMNS, Task
from spafit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from probing.fitting import SplitRows

BASELINES = ("bag-of-words", "tf-idf", "length", "majority-per-word")
#: Inverse penalties of scikit-learn's logistic regression that are tried.
C_GRID = (0.01, 0.1, 1.0, 10.0)
_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class BaselineOutputs:
    """Outputs of a baseline for some items, as :meth:`probing.targets.Answers.score_outputs` takes them.

    Attributes:
        outputs: (items, classes) natural logarithms of probabilities; (items, labels) log odds; (items, 1) numbers.
        deviation: of the residuals on dev, for numbers.
    """

    outputs: np.ndarray = field(repr=False)
    deviation: float = float("nan")


def is_baseline(control: str) -> bool:
    """Whether a control reads texts or columns alone."""
    return control in BASELINES or control.startswith("column:")


def check_columns(controls: Sequence[str], tasks: Sequence[Task]) -> None:
    """Refuse a column that no task has, or that does not hold finite numbers, and word order where there is none.

    Raises:
        UsageError: names the columns of numbers that there are, or the task whose items are images.
    """
    images = next((t for t in tasks if t.corpus.of_images), None)
    if "permuted-order" in controls and images is not None:
        raise UsageError(
            f"--controls permuted-order: the items of task {images.name!r} are images, which have no word order. "
            "Leave it out; permuted-weights and random-encoder work with images."
        )
    for control in (c for c in controls if c.startswith("column:")):
        name = control.removeprefix("column:")
        having = [t for t in tasks if name in _metadata(t)]
        numbers = sorted({c for t in tasks for c in _metadata(t) if _is_number(t.items[c])})
        there = f"Columns of numbers: {', '.join(numbers) or 'none'}.{did_you_mean(name, numbers)}"
        if not having:
            raise UsageError(f"--controls {control}: no task has items with a column {name!r}. {there}")
        for task in having:
            if not _is_number(task.items[name]):
                raise UsageError(f"--controls {control}: the column of task {task.name!r} is not of numbers. {there}")


def unsuited(control: str, task: Task) -> str:
    """Why a baseline cannot be had for a task; empty if it can."""
    if control.startswith("column:") and control.removeprefix("column:") not in _metadata(task):
        return f"no control {control}: its items have no such column"
    if control in ("bag-of-words", "tf-idf", "length") and task.corpus.of_images:
        return f"no control {control}: it reads words, and the items are images"
    if control == "majority-per-word":
        if task.kind != "classes":
            return "no control majority-per-word: the task has no classes"
        if (_types(task) == "").any():
            return "no control majority-per-word: items name no word"
    return ""


def baseline_outputs(control: str, task: Task, rows: SplitRows, seed: int) -> BaselineOutputs:
    """Fit one baseline on a seed's training draw, and apply it to the test items.

    Args:
        control: of :data:`BASELINES`, or ``column:NAME``; one that is not :func:`unsuited`.
        task: a validated task.
        rows: the run's items.
        seed: whose draw is trained on.
    """
    train = rows.draws[seed]
    if control == "majority-per-word":
        return _majority_per_word(task, train, rows.test)
    features = _features(control, task, train)
    parts = [features[r] for r in (train, rows.dev, rows.test)]
    values = label_values(task)
    return _fit(task, parts, [values[train], values[rows.dev]])


def _metadata(task: Task) -> list[str]:
    own = (*ITEM_COLUMNS, *task.span_columns, *task.text_columns)
    return [str(c) for c in task.items.columns if c not in own]


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and bool(np.isfinite(column.to_numpy(dtype=float)).all())


# ---------------------------------------------------------------- features


def _features(control: str, task: Task, train: np.ndarray) -> Any:
    """Features of all items, (items, features), sparse for words; fitted on the training items alone."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.preprocessing import StandardScaler

    if control in ("bag-of-words", "tf-idf"):
        words = _item_words(task)
        counter = CountVectorizer(analyzer=lambda item: item).fit([words[i] for i in train])
        counts = counter.transform(words)
        return counts if control == "bag-of-words" else TfidfTransformer().fit(counts[train]).transform(counts)
    if control == "length":
        numbers = _lengths(task)
        numbers = np.concatenate([numbers, np.log1p(numbers)], axis=1)
    else:
        numbers = task.items[[control.removeprefix("column:")]].to_numpy(dtype=np.float64)
    return StandardScaler().fit(numbers[train]).transform(numbers)


def _strings(task: Task) -> list[list[tuple[str, str]]]:
    """(part, string) of every item: its text or texts, and its spans."""
    texts = task.corpus.texts
    found = []
    columns = [task.items[c].to_numpy() for c in (*task.text_columns, *task.span_columns)]
    n_texts = len(task.text_columns)
    for values in zip(*columns, strict=True):
        text = texts[values[0]]
        parts = [("", text.string)]
        if text.second is not None:
            parts.append(("second ", text.second))
        if text.target is not None:
            parts.append(("target ", text.target))
        parts += [("second ", texts[i].string) for i in values[1:n_texts]]
        for k, span in enumerate(values[n_texts:]):
            parts.append((f"span {k} ", text.string[slice(*text.spans[span])]))
        found.append(parts)
    return found


def _item_words(task: Task) -> list[list[str]]:
    return [
        [prefix + word for prefix, string in parts for word in _WORDS.findall(string.lower())]
        for parts in _strings(task)
    ]


def _lengths(task: Task) -> np.ndarray:
    rows = [[n for _, string in parts for n in (len(string), len(string.split()))] for parts in _strings(task)]
    return np.array(rows, dtype=np.float64)


def _types(task: Task) -> np.ndarray:
    """The word of each item: the control task's type, or the words under its span."""
    types = task.items["control"].astype(str)
    if (types == "").any() and task.span_columns:
        spans = [dict(parts).get("span 0 ", "") for parts in _strings(task)]
        types = pd.Series(spans).str.lower()
    return types.to_numpy(dtype=object)


# ---------------------------------------------------------------- fits


def _majority_per_word(task: Task, train: np.ndarray, test: np.ndarray) -> BaselineOutputs:
    """Shares of labels with the word in training, with one pseudo-item that has the shares of all training items."""
    labels, types, n_classes = label_values(task), _types(task), len(task.labels)
    shares = np.maximum(np.bincount(labels[train], minlength=n_classes), 0.5)
    shares = shares / shares.sum()
    names, codes = np.unique(types, return_inverse=True)
    counts = np.zeros((len(names), n_classes))
    np.add.at(counts, (codes[train], labels[train]), 1)
    p = (counts + shares) / (counts.sum(1, keepdims=True) + 1)
    return BaselineOutputs(np.log(p[codes[test]]))


def _fit(task: Task, parts: Sequence[Any], targets: Sequence[np.ndarray]) -> BaselineOutputs:
    x_train, x_dev, x_test = parts
    y_train, y_dev = targets
    if task.kind == "number":
        from sklearn.linear_model import Ridge

        models = [Ridge(alpha=1 / c).fit(x_train, y_train) for c in C_GRID]
        errors = [float(np.mean((m.predict(x_dev) - y_dev) ** 2)) for m in models]
        best = int(np.argmin(errors))
        return BaselineOutputs(models[best].predict(x_test)[:, None], float(np.sqrt(errors[best])))
    if task.kind == "multilabel":
        n = len(y_train)
        columns = []
        for k in range(len(task.labels)):
            own = y_train[:, k]
            if own.all() or not own.any():
                columns.append(np.full(x_test.shape[0], fixed_log_odds(np.array(own.all()), n)))
            else:
                log_p = _logistic(x_train, own.astype(int), x_dev, y_dev[:, k].astype(int), x_test, 2)
                columns.append(log_p[:, 1] - log_p[:, 0])
        return BaselineOutputs(np.stack(columns, axis=1))
    return BaselineOutputs(_logistic(x_train, y_train, x_dev, y_dev, x_test, len(task.labels)))


def _logistic(
    x_train: Any, y_train: np.ndarray, x_dev: Any, y_dev: np.ndarray, x_test: Any, n_classes: int
) -> np.ndarray:
    """Natural log probabilities of the test items, by the penalty that is best on dev; absent classes share a bit."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present, codes = np.unique(y_train, return_inverse=True)
    absent = n_classes - len(present)
    share = 0.5 / (len(y_train) + 0.5 * absent)

    def whole(log_p: np.ndarray) -> np.ndarray:
        out = np.full((len(log_p), n_classes), np.log(share))
        out[:, present] = log_p + np.log1p(-absent * share)
        return out

    best, lowest = None, np.inf
    for c in C_GRID:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what is not reached is not chosen, or is good enough
            model = LogisticRegression(C=c, max_iter=300).fit(x_train, codes)
        loss = -whole(model.predict_log_proba(x_dev))[np.arange(len(y_dev)), y_dev].mean()
        if loss < lowest:
            best, lowest = model, loss
    assert best is not None
    return whole(best.predict_log_proba(x_test))
