"""Readers of labelled images: folders, tables and saved data sets; what cannot be read is named, never fatal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spafit.data.images import COLUMNS, open_image, read_images, reading_notes
from spafit.errors import DataError
from tests.image_fixtures import digit_scenes, digits, digits_folder, held_out, scenes_table


def grey(path, value=100, *, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def test_folder_of_classes_under_splits_gives_paths_labels_and_splits(tmp_path):
    frame = read_images(digits_folder(tmp_path, train=40, test=20))
    assert tuple(frame.columns) == COLUMNS
    assert frame["split"].value_counts().to_dict() == {"train": 40, "test": 20}
    for row in frame.sample(10, random_state=0).itertuples():
        number = int(row.name.rpartition("/")[2].removesuffix(".png"))
        assert np.array_equal(np.asarray(open_image(row.image)), digits()[0][number])
        assert row.label == str(digits()[1][number])
    assert frame["idx"].tolist() == list(range(60))
    assert reading_notes(frame) == []


def test_classes_called_train_beside_others_are_classes(tmp_path):
    grey(tmp_path / "train" / "1.png")
    grey(tmp_path / "bus" / "1.png", 3)
    frame = read_images(tmp_path)
    assert sorted(frame["label"]) == ["bus", "train"]
    assert set(frame["split"]) == {""}


def test_unreadable_images_are_named_counted_and_the_others_kept(tmp_path):
    folder = digits_folder(tmp_path, train=20, test=10)
    good = next((folder / "train").rglob("*.png")).read_bytes()
    (folder / "train" / "0").mkdir(exist_ok=True)
    (folder / "train" / "0" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "train" / "0" / "text.png").write_text("no image")
    (folder / "train" / "0" / "empty.jpg").touch()
    (folder / "train" / "0" / "notes.txt").write_text("no image either")
    frame = read_images(folder)
    assert len(frame) == 30
    assert set(frame.attrs["unreadable"]) == {"train/0/cut.png", "train/0/text.png", "train/0/empty.jpg"}
    first, second = reading_notes(frame)
    assert first.startswith("3 image(s) could not be read and were left out:")
    assert "train/0/text.png (no image in a known format)" in first
    assert second == "1 file(s) that are no images were passed over."


def test_equal_bytes_have_one_digest_and_other_bytes_another(tmp_path):
    for name, value in (("a/1.png", 5), ("a/2.png", 5), ("b/3.png", 6)):
        grey(tmp_path / name, value)
    digest = read_images(tmp_path)["digest"].tolist()
    assert digest[0] == digest[1] != digest[2]


def test_table_with_captions_and_a_missing_file(tmp_path):
    scenes = digit_scenes(12)
    table = scenes_table(tmp_path, scenes)
    (tmp_path / "scenes" / "0003.png").unlink()
    frame = read_images(table, image="file", label="caption")
    assert frame["label"].tolist() == [s.caption for i, s in enumerate(scenes) if i != 3]
    assert frame.attrs["unreadable"] == {"scenes/0003.png": "no such file, named in line 5 of scenes.csv"}


def test_mixed_up_columns_are_refused_in_one_sentence(tmp_path):
    table = scenes_table(tmp_path, digit_scenes(5))
    with pytest.raises(DataError, match=r"column 'caption' holds 'a .*' .*are in column 'file': give image="):
        read_images(table, image="caption", label="file")
    with pytest.raises(DataError, match=r"no column 'fiel' \(image=\). Did you mean 'file'"):
        read_images(table, image="fiel", label="caption")
    with pytest.raises(DataError, match="name the columns of image files and labels"):
        read_images(table)


def test_folder_without_images_and_missing_folder_say_what_is_wrong(tmp_path):
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "one.txt").write_text("a text")
    with pytest.raises(DataError, match=r"class folder\(s\) hold no image files \(1 other file"):
        read_images(tmp_path / "texts")
    with pytest.raises(DataError, match="no such file or folder"):
        read_images(tmp_path / "nothing")
    grey(tmp_path / "flat" / "1.png")
    with pytest.raises(DataError, match=r"holds 1 image\(s\) but no sub-folders"):
        read_images(tmp_path / "flat")


def test_saved_data_set_gives_the_same_images_as_the_folder(tmp_path):
    import datasets

    folder = digits_folder(tmp_path, train=30, test=10)
    of_folder = read_images(folder)
    names = sorted(set(of_folder["label"]))
    parts = {}
    for split, key in (("train", "train"), ("test", "test")):
        rows = of_folder[of_folder["split"] == split]
        features = datasets.Features({"picture": datasets.Image(), "digit": datasets.ClassLabel(names=names)})
        cells = [{"bytes": Path(p).read_bytes(), "path": None} for p in rows["image"]]
        parts[key] = datasets.Dataset.from_dict(
            {"picture": cells, "digit": [names.index(v) for v in rows["label"]]}, features=features
        )
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    saved = read_images(tmp_path / "saved")
    for column in ("label", "split", "digest"):
        assert saved[column].tolist() == of_folder.sort_values("split", kind="stable", ascending=False)[column].tolist()
    assert isinstance(saved["image"].iloc[0], bytes)
    with pytest.raises(DataError, match="column 'digit' holds ClassLabel"):
        read_images(tmp_path / "saved", image="digit", label="picture")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_grey_or_colour(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 128 << 8, dtype=np.uint16))
    else:
        image = Image.new("L", (4, 4), 255 if mode == "1" else 128).convert(mode)
    file = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(file)
    value = 255 if mode == "1" else 128
    for channels, shape in ((1, (4, 4)), (3, (4, 4, 3))):
        pixels = np.asarray(open_image(file, channels=channels))
        assert pixels.shape == shape
        assert np.abs(pixels.astype(int) - value).max() <= 1


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "turned.png"))
    assert upright.shape == (4, 2)
    assert upright[0, 1] == 255


def test_scenes_are_deterministic_with_held_out_pairs_and_say_what_they_show():
    scenes, again, test = digit_scenes(300, 3), digit_scenes(300, 3), digit_scenes(200, 3, test=True)
    for one, same in zip(scenes, again, strict=True):
        assert one.caption == same.caption
        assert np.array_equal(one.pixels, same.pixels)
    assert len({s.caption for s in scenes}) == 300
    assert not {frozenset(s.digits) for s in scenes} & {frozenset(s.digits) for s in test}
    assert all(held_out(*s.digits) for s in test)
    for scene in scenes:
        ink = np.abs(scene.pixels.astype(float))
        first_half, second_half = (ink[:, :16], ink[:, 16:]) if "of" in scene.relation.split() else (ink[:16], ink[16:])
        large_first = (scene.sizes[0] == "large") == (scene.relation in ("left of", "above"))
        assert ((first_half > 0).sum() > (second_half > 0).sum()) == large_first, scene.caption
