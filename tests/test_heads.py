"""A head of the checkpoint's own is trained on for its own classes, in its own order; any other is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from spafit.adapt import apply_strata, plan_for
from spafit.checkpoint import load, save
from spafit.errors import ModelError
from spafit.heads import load_with_head
from tests.tiny import draw_weights, save_tiny


def with_head(kind: str, folder: Path, *names: str) -> str:
    """A checkpoint with a head for these classes."""
    save_tiny(kind, folder)
    names_by_code = dict(enumerate(names))
    config = AutoConfig.from_pretrained(
        folder, num_labels=len(names), id2label=names_by_code, label2id={v: k for k, v in names_by_code.items()}
    )
    draw_weights(AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            ("dog", "cat"),
            r"in the order cat, dog, and the data have them in the order dog, cat\. Give the data's labels",
        ),
        (("red", "blue"), r"for the classes cat, dog, and the data have red, blue\. Use its backbone"),
        (("cat", "dog", "cow"), "other classes than the data's 3"),
    ],
)
def test_a_head_of_other_classes_or_another_order_is_refused(
    kind: str, labels: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        load_with_head(with_head(kind, tmp_path, "cat", "dog"), labels=labels)


@pytest.mark.parametrize(
    ("own", "labels"),
    [
        (("cat", "dog"), ("cat", "dog")),
        (("CAT", "DOG"), ("cat", "dog")),
        (("LABEL_0", "LABEL_1"), ("dog", "cat")),
    ],
)
def test_a_head_of_the_same_classes_is_taken_over(
    own: tuple[str, ...], labels: tuple[str, ...], tmp_path: Path
) -> None:
    folder = with_head("bert", tmp_path, *own)
    headed = load_with_head(folder, labels=labels)
    assert headed.missing == headed.notes == ()
    assert headed.model.config.id2label == dict(enumerate(labels))
    whole = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(headed.model.classifier.weight, whole.classifier.weight)


def test_names_without_a_head_do_not_count(tmp_path: Path) -> None:
    folder = with_head("bert", tmp_path / "whole", "cat", "dog")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "backbone")  # its configuration keeps the names
    load_with_head(folder, labels=("cat", "dog")).tokenizer.save_pretrained(tmp_path / "backbone")  # type: ignore[union-attr]
    headed = load_with_head(str(tmp_path / "backbone"), labels=("red", "blue"))
    assert "classifier.weight" in headed.missing
    assert headed.model.config.id2label == {0: "red", 1: "blue"}
    # A regression has no classes.
    load_with_head(str(tmp_path / "backbone"), regression=True)


def test_what_was_trained_before_is_loaded_as_it_was(tmp_path: Path) -> None:
    folder = with_head("bert", tmp_path / "base", "cat", "dog")
    base = load_with_head(folder, labels=("dog", "cat"), restoring=True).model
    stratified = apply_strata(base, plan_for(base, "lora"))
    save(stratified, tmp_path / "adapter", base={"reference": folder, "labels": ["dog", "cat"]})
    assert load(tmp_path / "adapter").model.config.id2label == {0: "dog", 1: "cat"}
