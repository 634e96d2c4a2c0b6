"""Image models in the trainer: classes, matching and captions are learnt, shuffled ones are not, plans come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import spafit
from analysis.cli.main import app
from spafit import checkpoint
from spafit.data.image_tasks import image_data
from spafit.errors import DataError, UsageError
from spafit.kinds.images import partner_ranks
from spafit.settings import TrainSettings
from tests.image_fixtures import digit_scenes, digits_folder, scenes_table, tiny_clip, tiny_vit

pytest.importorskip("PIL", reason="Pillow is not installed")


def test_ranks_of_partners_are_those_of_a_hand_made_space() -> None:
    """Two items share a text: either image of it is right. The third image lies nearest to the first text."""
    images = np.array([[1.0, 0], [0.6, 0.8], [0.8, 0.6]])
    texts = np.array([[1.0, 0], [1.0, 0], [0.0, 1.0]])
    ranks = partner_ranks(np.hstack([images, texts]), ["a", "a", "b"])
    assert ranks["text"].tolist() == [0, 1, 1]  # the second image is nearer to b, the third to a
    assert ranks["image"].tolist() == [0, 0, 1]  # the nearest image to b is the second
    perfect = np.eye(4)
    assert all((r == 0).all() for r in partner_ranks(np.hstack([perfect, perfect]), list("abcd")).values())
    assert partner_ranks(np.hstack([perfect, -perfect]), list("abcd"))["text"].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("shuffled", [False, True])
def test_digits_are_learnt_and_shuffled_classes_are_not(shuffled: bool, tmp_path: Path) -> None:
    tiny_vit(tmp_path / "vit", classes=10)
    data = image_data(digits_folder(tmp_path, train=300, test=150, shuffled=shuffled))
    how = TrainSettings(epochs=20, batch_size=16, learning_rate=2e-3, select_share=0.0)
    result = spafit.fit(
        str(tmp_path / "vit"), "full", data=data, settings=how, out=tmp_path / "o", device="cpu", quiet=True
    )
    accuracy = result.runs.set_index("metric")["value"]["accuracy"]
    assert accuracy < 0.3 if shuffled else accuracy > 0.6, accuracy


def test_a_plan_on_images_comes_back_and_its_folder_has_the_processor(tmp_path: Path) -> None:
    tiny_vit(tmp_path / "vit", classes=10)
    data = image_data(digits_folder(tmp_path, train=60, test=20))
    how = TrainSettings(epochs=1, batch_size=16, select_share=0.2)
    result = spafit.fit(
        str(tmp_path / "vit"), "spafit-scaled-I", data=data, settings=how, out=tmp_path / "o", device="cpu", quiet=True
    )
    again = checkpoint.load(result.model_folder(0))
    assert set(again.trainable) == set(checkpoint.read_config(result.model_folder(0))["trainable"])
    assert (result.model_folder(0) / "preprocessor_config.json").is_file()
    assert "prefix cache off: the items are images" in result.run["notes"]
    on = TrainSettings(epochs=1, prefix_cache="on")
    with pytest.raises(UsageError, match="the items are images"):
        spafit.fit(str(tmp_path / "vit"), "lora", data=data, settings=on, out=tmp_path / "p", device="cpu", quiet=True)


def test_the_command_merges_an_image_model_and_refuses_to_score_it_on_texts(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    tiny_vit(tmp_path / "vit", classes=10)
    data = image_data(digits_folder(tmp_path, train=60, test=20))
    how = TrainSettings(epochs=1, batch_size=16, select_share=0.0)
    result = spafit.fit(
        str(tmp_path / "vit"), "lora", data=data, settings=how, out=tmp_path / "o", device="cpu", quiet=True
    )
    folder = result.model_folder(0)
    done = CliRunner().invoke(app, ["merge", str(folder), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    tuned = checkpoint.load(folder).model.eval()
    with torch.no_grad():
        assert torch.allclose(merged(pixels).logits, tuned(pixel_values=pixels).logits, atol=1e-5)
    for command in (["evaluate", str(folder), "--table", "t.csv"], ["predict", str(folder), "t.csv", "--out", "x"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code != 0
        assert "was trained for the kind 'images'" in str(done.exception)


def test_two_towers_are_trained_by_a_plan_of_their_own_and_scored_by_recall(tmp_path: Path) -> None:
    tiny_clip(tmp_path / "clip")
    table = scenes_table(tmp_path, digit_scenes(48), name="scenes")
    data = image_data(table, kind="matching", image="file", label="caption")
    how = TrainSettings(epochs=2, batch_size=16, learning_rate=2e-3, select_share=0.2)
    result = spafit.fit(
        str(tmp_path / "clip"), "full", data=data, settings=how, out=tmp_path / "o", device="cpu", quiet=True
    )
    scores = result.runs.set_index("metric")["value"]
    assert scores["headline"] == pytest.approx((scores["text_recall@1"] + scores["image_recall@1"]) / 2)
    assert scores["text_recall@1"] <= scores["text_recall@5"] <= 1
    ranks = pd.read_csv(tmp_path / "o" / "seed-0" / "predictions-validation.csv")
    assert (ranks["text_rank"] == 1).mean() == pytest.approx(scores["text_recall@1"])
    losses = result.metrics[(result.metrics["split"] == "train") & (result.metrics["metric"] == "loss")]["value"]
    assert np.isfinite(losses).all()


def test_bad_image_data_are_refused_and_unreadable_images_are_named(tmp_path: Path) -> None:
    folder = digits_folder(tmp_path, train=40, test=20)
    broken = next((folder / "train").rglob("*.png"))
    broken.write_bytes(b"no image")
    data = image_data(folder)
    assert any("1 image(s) could not be read" in note and broken.name in note for note in data.notes)
    assert len(data.frames["train"]) == 39
    one = tmp_path / "one" / "train" / "a"
    one.mkdir(parents=True)
    (one / "x.png").write_bytes(next((folder / "test").rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="one class only"):
        image_data(tmp_path / "one")
