"""Controls that read no model, or the model in another order: planted tasks that each must or must not solve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from probing.baselines import baseline_outputs, check_columns, unsuited
from probing.controls import content_words, control_labels, control_types
from probing.fitting import ProbeSettings, split_rows
from probing.permuted import permuted_texts
from probing.targets import Answers, label_values
from probing.tasks.base import Corpus, Task, Text
from spafit.errors import UsageError
from spafit.models import load_model, randomize_weights
from tests.test_running import quick, word_task

WORDS = ("stone", "river", "cloud", "bread", "chair", "glass")


def sentences(make, n: int = 400, **more) -> Task:
    """A task of two classes whose texts ``make(rng, label)`` writes."""
    rng = np.random.default_rng(3)
    texts, rows = [], []
    for i in range(n):
        label = int(rng.integers(2))
        texts.append(Text(make(rng, label)))
        split = "train" if i < 0.6 * n else "dev" if i < 0.75 * n else "test"
        rows.append((f"i{i}", i, -1, label, split, f"s{i}", ""))
    items = pd.DataFrame(rows, columns=["item", "text", "span", "label", "split", "group", "control"])
    return Task("made.task", "surface", "sentence", ("no", "yes"), Corpus("made", tuple(texts)), items, **more)


def by_word(rng: np.random.Generator, label: int) -> str:
    words = [*rng.choice(WORDS, 5), "red" if label else "tan"]
    return " ".join(rng.permutation(words))


def by_order(rng: np.random.Generator, label: int) -> str:
    pair = ["alpha", "omega"] if label else ["omega", "alpha"]
    return " ".join([*rng.choice(WORDS, 3), *pair])


def by_length(rng: np.random.Generator, label: int) -> str:
    return " ".join(rng.choice(WORDS, 4 + 6 * label + int(rng.integers(3))))


def outcome(control: str, task: Task) -> tuple[float, float]:
    """Accuracy and bits saved of a baseline."""
    values = label_values(task)
    rows = split_rows(task, ProbeSettings(seeds=(0,)), values, np.ones(len(task.items), dtype=bool))
    found = baseline_outputs(control, task, rows, 0)
    predicted, bits = Answers.of(task, values).score_outputs(found.outputs, rows.test, deviation=found.deviation)
    right = (predicted == values[rows.test]) if task.kind == "classes" else np.array([np.nan])
    return float(right.mean()), float(bits.mean())


@pytest.mark.parametrize(
    ("make", "solved", "not_solved"),
    [
        (by_word, ("bag-of-words", "tf-idf"), ("length",)),
        (by_order, (), ("bag-of-words", "tf-idf", "length")),
        (by_length, ("length", "bag-of-words"), ()),
    ],
)
def test_baselines_solve_what_their_features_hold(make, solved, not_solved):
    task = sentences(make)
    for control in solved:
        accuracy, bits = outcome(control, task)
        assert accuracy > 0.95, control
        assert bits > 0.6, control
    for control in not_solved:
        accuracy, bits = outcome(control, task)
        assert abs(accuracy - 0.5) < 0.15, control
        assert bits < 0.05, control


def test_tf_idf_is_that_of_an_independent_pipeline():
    task = sentences(lambda rng, label: by_word(rng, label if rng.random() < 0.8 else 1 - label))
    values = label_values(task)
    rows = split_rows(task, ProbeSettings(seeds=(0,)), values, np.ones(len(task.items), dtype=bool))
    found = baseline_outputs("tf-idf", task, rows, 0)
    strings = [task.corpus.texts[i].string for i in task.items["text"]]
    vectors = TfidfVectorizer(token_pattern=r"\w+").fit([strings[i] for i in rows.draws[0]])
    x = vectors.transform(strings)
    train, dev = rows.draws[0], rows.dev
    models = [LogisticRegression(C=c, max_iter=300).fit(x[train], values[train]) for c in (0.01, 0.1, 1, 10)]
    losses = [-m.predict_log_proba(x[dev])[np.arange(len(dev)), values[dev]].mean() for m in models]
    np.testing.assert_allclose(found.outputs, models[int(np.argmin(losses))].predict_log_proba(x[rows.test]), atol=1e-6)


def test_the_majority_of_a_word_is_its_share_in_training():
    task = word_task()
    labels = (task.items["control"] == "dogs").to_numpy().astype(int)
    task = replace(task, items=task.items.assign(label=labels))
    accuracy, bits = outcome("majority-per-word", task)
    assert accuracy == 1
    assert bits > 0
    random = replace(task, items=task.items.assign(label=np.random.default_rng(0).integers(2, size=len(labels))))
    assert outcome("majority-per-word", random)[1] < 0.02


def test_a_column_that_is_the_label_tells_it_and_noise_tells_nothing():
    task = sentences(by_order)
    noise = np.random.default_rng(1).standard_normal(len(task.items))
    task = replace(task, items=task.items.assign(known=task.items["label"].astype(float), noise=noise, name="x"))
    assert outcome("column:known", task)[0] == 1
    assert abs(outcome("column:noise", task)[1]) < 0.05
    number = replace(task, kind="number", labels=(), items=task.items.assign(label=2 * noise + 1.0))
    assert outcome("column:noise", number)[1] > 5
    check_columns(["column:noise", "word-type"], [task])
    with pytest.raises(UsageError, match=r"no column|no task has items with a column 'perplexity'.*known, noise"):
        check_columns(["column:perplexity"], [task])
    with pytest.raises(UsageError, match="not of numbers"):
        check_columns(["column:name"], [task])
    assert "no such column" in unsuited("column:noise", word_task())
    assert "no classes" in unsuited("majority-per-word", number)


def test_sentence_tasks_without_a_type_are_keyed_on_a_word_that_recurs():
    task = sentences(by_word)
    types = content_words(task)
    counts = pd.Series(types[task.items["split"] == "train"]).value_counts()
    assert counts.min() >= 2
    drawn = control_labels(task, 0)
    assert drawn is not None
    assert all(len(set(drawn[types == t])) == 1 for t in set(types))
    unlike = sentences(lambda rng, label: " ".join(f"w{rng.integers(10**6)}" for _ in range(4)))
    assert control_types(unlike) is None


def test_permuted_texts_keep_their_words_and_what_spans_hold():
    text = Text("It's a red stone, near the river 😀 .", ((5, 6), (7, 16), (27, 32)), second="two words more here")
    (moved,) = permuted_texts([text], 1)
    assert sorted(moved.string.split()) == sorted(text.string.split())
    assert moved.string != text.string
    assert moved.words == text.words
    assert sorted(moved.second.split()) == sorted(text.second.split())
    assert permuted_texts([text], 1) == (moved,)
    assert permuted_texts([text], 2) != (moved,)
    whole = Text("all of it", ((0, 9), (0, 3)))
    assert permuted_texts([whole], 3)[0].string == "all of it"


def test_permuted_weights_are_the_same_numbers_in_another_order(small_bert):
    loaded = load_model(str(small_bert))
    permuted, again, other = (randomize_weights(loaded, s, how="permute") for s in (0, 0, 1))
    assert permuted.weights_digest == again.weights_digest
    assert permuted.weights_digest not in (other.weights_digest, loaded.weights_digest)
    changed = 0
    for old, new in zip(loaded.model.parameters(), permuted.model.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
        changed += int(not torch.equal(old, new))
    assert changed > 0


def test_a_run_with_every_control_has_its_rows_and_differences(small_bert: Path, tmp_path, cache):
    controls = ("permuted-weights", "permuted-order", "bag-of-words", "length", "majority-per-word")
    results = quick(small_bert, tmp_path / "run", [word_task()], controls=controls)
    assert results.run["status"] == "complete"
    rows = results.to_pandas()
    for control in controls:
        own, beside = (rows[(rows["control"] == c) & (rows["metric"] == "accuracy")] for c in ("none", control))
        difference = rows[(rows["control"] == f"difference:{control}") & (rows["metric"] == "accuracy")]
        np.testing.assert_allclose(difference["value"], own["value"].to_numpy() - beside["value"].to_numpy())
    bag = rows[(rows["control"] == "bag-of-words") & (rows["metric"] == "bits")]
    assert bag["value"].nunique() == 1  # no model, so no layers
    again = quick(small_bert, tmp_path / "again", [word_task()], controls=controls)
    pd.testing.assert_frame_equal(again.scores, results.scores)
    with pytest.raises(UsageError, match=r"--controls 'bag'.*bag-of-words"):
        quick(small_bert, tmp_path / "other", controls=("bag",))
