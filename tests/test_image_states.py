"""States of image models: equal to a bare forward pass, one pass per distinct image, patches as words, two towers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from probing.batching import plan_extraction
from probing.extraction import extract
from probing.patches import PatchGrid, patch_grid
from probing.tasks.base import Image, Text
from spafit.data.images import read_images
from spafit.errors import DataError, ModelError, UsageError
from spafit.image_processing import plain_processor
from spafit.models import load_model, randomize_weights
from tests.image_fixtures import digit_scenes, digits, digits_folder, scenes_table, tiny_clip, tiny_vit


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("image models")
    tiny_vit(place / "vit")
    tiny_clip(place / "clip")
    return place


def as_images(frame, *, cells: tuple[int, ...] = (), grid: int = 4) -> list[Image]:
    spans = tuple((c, c + 1) for c in cells)
    return [
        Image(n, spans, source=p, digest=d, grid=grid)
        for n, p, d in zip(frame["name"], frame["image"], frame["digest"], strict=True)
    ]


def bare_states(model, pixels: np.ndarray) -> np.ndarray:
    """Hidden states by the model's own output, for digits as they are, (hidden, images, tokens, width)."""
    x = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1)[:, None]
    with torch.no_grad():
        return torch.stack(model(pixel_values=x, output_hidden_states=True).hidden_states).numpy()


def test_store_equals_a_bare_forward_pass_for_every_pooling_and_patch(folders, tmp_path, cache):
    loaded = load_model(folders / "vit")
    assert loaded.tokenizer is None
    assert loaded.notes == ()
    frame = read_images(digits_folder(tmp_path, train=30, test=10))
    pixels = np.stack([digits()[0][int(n[-8:-4])] for n in frame["name"]])
    wanted = bare_states(loaded.model, pixels)
    store = extract(
        loaded, as_images(frame, cells=(0, 5, 15)), sentence_pooling=("first", "last", "mean", "max"),
        batch_tokens=17 * 7,
    )  # fmt: skip
    assert store.num_hidden == 5
    for hidden in range(5):
        own = wanted[hidden]
        for pooling, states in (
            ("first", own[:, 0]), ("last", own[:, -1]), ("mean", own[:, 1:].mean(1)), ("max", own[:, 1:].max(1)),
        ):  # fmt: skip
            assert np.abs(store.sentences(pooling, hidden=hidden) - states).max() < 1e-5, (pooling, hidden)
        patches = store.words("mean", hidden=hidden).reshape(len(frame), 3, -1)
        assert np.allclose(patches, own[:, [1, 6, 16]], atol=1e-5)


def test_one_forward_pass_per_distinct_image_and_none_when_cached(folders, tmp_path, cache):
    loaded = load_model(folders / "vit")
    frame = read_images(digits_folder(tmp_path, train=20, test=10))
    renamed = [Image("another name", source=i.source, digest=i.digest) for i in as_images(frame)]
    seen = []
    handle = loaded.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    patch_grid(loaded, loaded.stacks[0])
    seen.clear()
    store = extract(loaded, [*as_images(frame), *renamed], device="cpu")
    assert sum(seen) == 30
    assert np.array_equal(*np.split(store.sentences("mean", hidden=2), 2))
    seen.clear()
    extract(loaded, renamed, device="cpu")
    assert seen == []
    handle.remove()


def test_address_follows_pixels_and_processor_and_not_the_name(folders, tmp_path, cache):
    frame = read_images(digits_folder(tmp_path, train=10, test=5))
    loaded = load_model(folders / "vit")
    images = as_images(frame)
    folder = plan_extraction(loaded, images).folder
    renamed = [Image("x", source=i.source, digest=i.digest) for i in images]
    assert plan_extraction(loaded, renamed).folder == folder
    changed = [Image(images[0].string, source=images[0].source, digest="0" * 64), *images[1:]]
    assert plan_extraction(loaded, changed).folder != folder
    other = plain_processor(channels=1, image_size=(8, 8))
    other = type(other).of(type(other.processor)(**{**other.processor.to_dict(), "image_mean": [0.4]}), channels=1)
    assert plan_extraction(load_model((loaded.model, other)), images).folder != folder


@pytest.mark.parametrize(("patch", "prefix", "side"), [(2, 1, 4), (4, 1, 2), (8, 1, 1)])
def test_grid_is_found_whatever_the_patch_size(patch, prefix, side):
    loaded = load_model((tiny_vit(patch=patch), None))
    grid = patch_grid(loaded, loaded.stacks[0])
    assert grid == PatchGrid(prefix, side, side, (1, 8, 8))


def test_cells_fall_to_the_patch_around_their_centre():
    grid = PatchGrid(1, 4, 4, (1, 8, 8))
    assert grid.token_of(np.arange(16), 4).tolist() == list(range(1, 17))
    assert grid.token_of(np.arange(4), 2).tolist() == [6, 8, 14, 16]
    assert PatchGrid(0, 2, 2, (1, 8, 8)).token_of(np.array([0, 3, 12, 15]), 4).tolist() == [0, 1, 2, 3]


def test_registers_stand_before_the_patches_and_siglip_has_no_first_token():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

    common = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        "num_channels": 1,
    }  # fmt: skip
    dino = load_model((Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**common, num_register_tokens=3)), None))
    assert patch_grid(dino, dino.stacks[0]).prefix == 4
    siglip = load_model((SiglipVisionModel(SiglipVisionConfig(**common, intermediate_size=16)), None))
    assert patch_grid(siglip, siglip.stacks[0]).prefix == 0


def test_masked_patches_are_refused():
    from transformers import ViTMAEConfig, ViTMAEModel

    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=2,
        num_channels=1, mask_ratio=0.5,
    )  # fmt: skip
    loaded = load_model((ViTMAEModel(config), None))
    with pytest.raises(ModelError, match="cannot be told apart by patch: block 0 gets 9 tokens of 16 patches"):
        patch_grid(loaded, loaded.stacks[0])


def test_colour_images_are_read_in_colour(tmp_path, cache):
    loaded = load_model((tiny_vit(channels=3), None))
    Pillow.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    values = loaded.image_processor([tmp_path / "red.png"])
    assert values.shape == (1, 3, 8, 8)
    assert values[0, :, 0, 0].tolist() == [1, -1, -1]


def test_processor_of_the_checkpoint_is_used_and_a_missing_one_is_a_note(tmp_path):
    tiny_vit(tmp_path / "vit")
    config = tmp_path / "vit" / "preprocessor_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "image_mean": [0.0], "image_std": [1.0]}))
    Pillow.new("L", (20, 10), 51).save(tmp_path / "grey.png")
    loaded = load_model(tmp_path / "vit")
    assert torch.allclose(loaded.image_processor([tmp_path / "grey.png"]), torch.full((1, 1, 8, 8), 0.2))
    config.unlink()
    loaded = load_model(tmp_path / "vit")
    assert torch.allclose(loaded.image_processor([tmp_path / "grey.png"]), torch.full((1, 1, 8, 8), -0.6))
    assert "no preprocessor_config.json" in loaded.notes[-1]
    config.write_text(json.dumps({**settings, "size": {"height": 16, "width": 16}}))
    loaded = load_model(tmp_path / "vit")
    with pytest.raises(ModelError, match="does not take the 16 × 16 pixels that its image processor gives"):
        patch_grid(loaded, loaded.stacks[0])


def test_random_encoder_reads_images_as_the_model_does(folders, tmp_path, cache):
    loaded = load_model(folders / "vit")
    other = randomize_weights(loaded, 1)
    frame = read_images(digits_folder(tmp_path, train=10, test=5))
    states = [extract(m, as_images(frame)).sentences("mean", hidden=4) for m in (loaded, other)]
    assert states[0].shape == states[1].shape
    assert not np.allclose(*states)


def test_an_image_that_vanishes_after_planning_is_named(folders, tmp_path, cache):
    frame = read_images(digits_folder(tmp_path, train=10, test=5))
    images = as_images(frame)
    (digits_folder(tmp_path, train=10, test=5) / images[3].string).write_bytes(b"")
    with pytest.raises(DataError, match=f"Image {images[3].string} can no longer be read"):
        extract(load_model(folders / "vit"), images)


def test_each_tower_of_a_dual_encoder_reads_its_own_input_alone(folders, tmp_path, cache):
    loaded = load_model(folders / "clip")
    assert [s.name for s in loaded.stacks] == ["text", "vision"]
    frame = read_images(scenes_table(tmp_path, digit_scenes(12)), image="file", label="caption")
    ran = []
    for name in ("text_model", "vision_model"):
        getattr(loaded.model, name).register_forward_hook(lambda module, args, output, name=name: ran.append(name))
    images, texts = as_images(frame), [Text(c) for c in frame["label"]]
    seen = extract(loaded, images, stack="vision", sentence_pooling=("first", "mean"))
    assert set(ran) == {"vision_model"}
    ran.clear()
    read = extract(loaded, texts, stack="text", sentence_pooling=("last",))
    assert set(ran) == {"text_model"}
    pixels = loaded.image_processor(list(frame["image"]))
    ids = loaded.tokenizer(list(frame["label"]), return_tensors="pt", padding=True)
    with torch.no_grad():
        vision = loaded.model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        text = loaded.model.text_model(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], output_hidden_states=True
        ).hidden_states
    ends = ids["attention_mask"].sum(1) - 1
    for k in range(4):
        assert np.allclose(seen.sentences("first", hidden=k), vision[k][:, 0].numpy(), atol=1e-5)
        assert np.allclose(seen.sentences("mean", hidden=k), vision[k][:, 1:].mean(1).numpy(), atol=1e-5)
        assert np.allclose(read.sentences("last", hidden=k), text[k][range(12), ends].numpy(), atol=1e-5)


def test_images_and_texts_in_the_wrong_tower_are_refused(folders, tmp_path, cache):
    loaded = load_model(folders / "clip")
    images = as_images(read_images(digits_folder(tmp_path, train=5, test=5)))
    with pytest.raises(ModelError, match=r"takes texts, and these are images. Name the other one: stack='vision'"):
        extract(loaded, images)
    with pytest.raises(ModelError, match=r"takes images, and these are texts. Name the other one: stack='text'"):
        extract(loaded, [Text("a large 3")], stack="vision")
    with pytest.raises(DataError, match="Images and texts stand in one list"):
        extract(loaded, [*images, Text("a large 3")], stack="vision")
    vit = load_model(folders / "vit")
    with pytest.raises(ModelError, match=r"takes images, and these are texts. Give it images"):
        extract(vit, [Text("a large 3")])
    with pytest.raises(UsageError, match="must be a sequence"):
        extract(vit, "a large 3")
