"""Data sets of the ``datasets`` library: saved folders, class names, hidden labels, and a hub that does not answer."""

from __future__ import annotations

import time

import pytest

from probing.tasks.hub import hub_tasks
from spafit.errors import DataError, HubError, TaskError

datasets = pytest.importorskip("datasets")

FEATURES = datasets.Features({"s": datasets.Value("string"), "y": datasets.ClassLabel(names=["neg", "pos"])})


def rows(n, label=None):
    return datasets.Dataset.from_dict(
        {"s": [f"text {n} {i}" for i in range(n)], "y": [i % 2 if label is None else label for i in range(n)]},
        features=FEATURES,
    )


def test_a_saved_folder_gives_named_classes_and_passes_over_hidden_labels(tmp_path):
    splits = {"train": rows(40), "validation": rows(6), "test": rows(5, label=-1)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "Mood"))
    (task,) = hub_tasks("Mood,text=s,label=y", base=tmp_path)
    assert (task.name, task.labels, task.unit) == ("mood", ("neg", "pos"), "sentence")
    assert task.items["split"].value_counts().to_dict() == {"train": 36, "test": 6, "dev": 4}
    assert "Mood (test) has no labels and is not used." in task.notes
    with pytest.raises(TaskError, match=r"has no split 'vaild' \(dev=\)\. .*It has train, validation, test"):
        hub_tasks("Mood,text=s,label=y,dev=vaild", base=tmp_path)
    with pytest.raises(TaskError, match=r"Mood \(train\): has no column 'z' \(label=\)\. It has s, y"):
        hub_tasks("Mood,text=s,label=z", base=tmp_path)


def test_token_labels_in_a_single_table(tmp_path):
    sequence = datasets.Sequence if hasattr(datasets, "Sequence") else datasets.List
    features = datasets.Features(
        {"w": sequence(datasets.Value("string")), "t": sequence(datasets.ClassLabel(names=["O", "B-PER"]))}
    )
    data = datasets.Dataset.from_dict(
        {"w": [["Anna", f"w{i}"] for i in range(30)], "t": [[1, 0]] * 30}, features=features
    )
    data.save_to_disk(str(tmp_path / "ner"))
    (task,) = hub_tasks("ner,text=w,label=t", base=tmp_path)
    assert (task.unit, task.labels) == ("word", ("B-PER", "O"))
    assert "split 80/10/10" in task.notes[0]


def test_a_folder_that_the_library_did_not_write_is_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match="was not saved by datasets"):
        hub_tasks("plain,text=s,label=y", base=tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        hub_tasks("./nowhere,text=s,label=y", base=tmp_path)


def test_a_hub_that_does_not_answer_is_reported_at_once(monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    endpoint = "http://127.0.0.1:9"  # the discard port: nobody listens
    question = HfApi.dataset_info
    monkeypatch.setattr(
        HfApi, "dataset_info", lambda self, *a, **k: question(HfApi(endpoint=endpoint), *a, **k)
    )  # fmt: skip
    start = time.monotonic()
    with pytest.raises(HubError, match=r"cannot be reached for data set 'nyu-mll/glue'.*save_to_disk"):
        hub_tasks("nyu-mll/glue,config=cola,text=sentence,label=label", base=tmp_path)
    assert time.monotonic() - start < 10


def test_a_name_that_cannot_exist_is_refused_without_asking(tmp_path):
    with pytest.raises(HubError, match="There is no data set 'a b'"):
        hub_tasks("a b,text=s,label=y", base=tmp_path)
