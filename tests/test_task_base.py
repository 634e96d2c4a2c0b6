"""A task that cannot be probed says why; training draws are redraws, nested in the corpus's order, and complete."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probing.controls import control_labels, label_frequencies
from probing.tasks.base import Corpus, Task, Text
from spafit.errors import TaskError


def make_task(n: int = 100, *, labels: tuple[str, ...] = ("a", "b")) -> Task:
    words = [f"w{i % 7}" for i in range(n)]
    corpus = Corpus("made", tuple(Text.from_words([w, "and", f"x{i}"]) for i, w in enumerate(words)))
    items = pd.DataFrame(
        {
            "item": [f"i{i}" for i in range(n)],
            "text": np.arange(n),
            "span": 0,
            "label": np.arange(n) % len(labels),
            "split": np.where(np.arange(n) < 60, "train", np.where(np.arange(n) < 80, "dev", "test")),
            "group": [f"g{i}" for i in range(n)],
            "control": words,
        }
    )
    return Task("made.task", "syntax", "word", labels, corpus, items)


def test_words_are_where_their_spans_say():
    text = Text.from_words(["Who", "'s", "naïve", "?"])
    assert text.string == "Who 's naïve ?"
    assert text.words == ("Who", "'s", "naïve", "?")


def change(task: Task, **columns: object) -> Task:
    return replace(task, items=task.items.assign(**columns))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda t: change(t, label=0), "one class only in training"),
        (lambda t: change(t, split="train"), "no dev items"),
        (lambda t: change(t, split=t.items["split"].replace("test", "dev")), "no test items"),
        (lambda t: change(t, item="same"), "occurs twice"),
        (lambda t: change(t, text=5000), "outside the corpus"),
        (lambda t: change(t, span=3), "outside its text"),
        (lambda t: replace(t, unit="sentence"), "must have span -1"),
        (lambda t: replace(t, items=t.items.drop(columns="group")), "lacks column"),
        (lambda t: replace(t, level="phonology"), "level 'phonology'"),
        (lambda t: replace(t, name="a/b"), "file name"),
        (
            lambda t: change(t, label=np.where(t.items["split"] == "test", 2, t.items["label"])),
            "never in training",
        ),
    ],
)
def test_a_task_that_cannot_be_probed_says_why(broken, message):
    task = make_task(labels=("a", "b", "c")) if "never" in message else make_task()
    if "never" in message:
        task = change(task, label=task.items["label"] % 2)
    task.validate()
    with pytest.raises(TaskError, match=message):
        broken(task).validate()


def test_seeds_redraw_training_items_unless_all_are_taken():
    task = make_task()
    first, second = task.training_draw(0, None), task.training_draw(1, None)
    assert len(first) == len(second) == 48
    assert not np.array_equal(first, second)
    assert (task.items["split"].to_numpy()[first] == "train").all()
    assert np.array_equal(task.training_draw(0, None), first)
    assert np.array_equal(task.training_draw(0, 60), task.training_draw(1, 1000))


def test_smaller_draws_are_part_of_larger_ones_so_that_texts_are_shared():
    task = make_task()
    assert set(task.training_draw(0, 20)) <= set(task.training_draw(0, 40))


def test_a_draw_holds_every_class_even_a_rare_one():
    task = make_task()
    rare = np.zeros(100, dtype=int)
    rare[[3, 70]] = 1
    task = change(task, label=rare)
    for seed in range(20):
        assert 3 in task.training_draw(seed, 10)


def test_control_labels_depend_on_the_type_alone_and_follow_the_label_distribution():
    n = 20_000
    rng = np.random.default_rng(0)
    task = make_task(100)
    items = pd.DataFrame(
        {
            "item": np.arange(n).astype(str), "text": 0, "span": 0, "label": (rng.random(n) < 0.2).astype(int),
            "split": "train", "group": "g", "control": [f"type{i % 5000}" for i in range(n)],
        }
    )  # fmt: skip
    task = replace(task, items=items)
    labels = control_labels(task, 0)
    assert pd.Series(labels).groupby(items["control"]).nunique().max() == 1
    assert label_frequencies(task)[1] == pytest.approx(0.2, abs=0.02)
    assert labels.mean() == pytest.approx(0.2, abs=0.03)
    assert (labels != control_labels(task, 1)).any()
    shuffled = replace(task, items=items.iloc[::-1].reset_index(drop=True))
    assert np.array_equal(control_labels(shuffled, 0), labels[::-1])
    assert control_labels(change(task, control=""), 0) is None


def test_the_digest_changes_with_anything_that_changes_numbers():
    task = make_task()
    base = task.digest
    assert make_task().digest == base
    assert change(task, label=1 - task.items["label"]).digest != base
    assert change(task, group="one").digest != base
    assert change(task, control="x").digest != base


# ---------------------------------------------------------------- numbers, several labels, two spans


def as_numbers(values: object) -> Task:
    return replace(change(make_task(), label=values), kind="number", labels=())


def as_several(labels: list[str]) -> Task:
    return replace(change(make_task(), label=labels), kind="multilabel", labels=("a", "b", "c"))


def test_numbers_are_targets_unless_missing_or_constant():
    values = np.linspace(0, 1, 100)
    assert as_numbers(values).validate().kind == "number"
    with pytest.raises(TaskError, match="item 'i7' is missing or not finite"):
        as_numbers(np.where(np.arange(100) == 7, np.nan, values)).validate()
    with pytest.raises(TaskError, match="targets that vary"):
        as_numbers(np.where(np.arange(100) < 60, 2.0, values)).validate()
    drawn = as_numbers(values).training_draw(0, 20)
    assert len(drawn) == 20  # no number has to be there as a class has to


def test_several_labels_are_drawn_and_checked_one_by_one():
    labels = ["0,1" if i % 2 else "0" for i in range(100)]
    labels[59] = "0,2"
    task = as_several(labels).validate()
    assert 59 in task.training_draw(0, 10)
    with pytest.raises(TaskError, match="'c' occur in dev or test but never"):
        as_several(["0,2" if i == 80 else "0" for i in range(100)]).validate()
    with pytest.raises(TaskError, match="position 3 is outside"):
        as_several(["0,3"] * 100).validate()
    with pytest.raises(TaskError, match="no training item has a label"):
        as_several([""] * 100).validate()


def test_pairs_of_spans_point_into_their_text():
    task = replace(change(make_task(), span2=2), unit="span-pair")
    assert task.validate().digest != change(task, span2=1).digest
    with pytest.raises(TaskError, match="column 'span2' points outside"):
        change(task, span2=3).validate()
    with pytest.raises(TaskError, match="need the column span2"):
        replace(make_task(), unit="span-pair").validate()


def test_pairs_of_texts_encoded_alone_point_into_the_corpus():
    task = replace(change(make_task(), span=-1, text2=0), unit="pair")
    assert task.validate().text_columns == ("text", "text2")
    assert task.digest != change(task, text2=1).digest
    assert replace(task, items=task.items.drop(columns="text2")).text_columns == ("text",)
    with pytest.raises(TaskError, match="column 'text2' points outside"):
        change(task, text2=10_000).validate()
