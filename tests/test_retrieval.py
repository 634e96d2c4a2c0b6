"""Retrieval between two spaces: identical ones, shuffled ones, a planted linear map, and CLIP's own embeddings."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from probing.joint_space import tower_embeddings, tower_retrieval
from probing.retrieval import COLUMNS, fit_ridge_map, recall_hits, retrieval_table
from probing.tasks.base import Image, Text
from spafit.data.images import read_images
from spafit.errors import ModelError, UsageError
from spafit.models import load_model
from tests.image_fixtures import caption_tokenizer, digit_scenes, scenes_table, tiny_clip, tiny_vit, train_clip

SPLIT = np.repeat(["train", "dev", "test"], (200, 50, 100))


def planted(seed=0, *, noise=0.0, width=12, joint=8):
    random = np.random.default_rng(seed)
    x = random.standard_normal((len(SPLIT), width))
    y = x @ random.standard_normal((width, joint)) + 1.5
    return x, y + noise * random.standard_normal(y.shape)


def test_identical_spaces_find_every_pair_and_a_planted_map_is_found():
    x, y = planted()
    table = retrieval_table({0: x}, y, split=SPLIT, own={3: y}, n_boot=100)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 8
    assert (table["value"] == 1).all()
    assert (table["n"] == 100).all()
    assert set(zip(table["query"], table["gallery"], strict=True)) == {("image", "text"), ("text", "image")}
    assert table.loc[table["map"] == "own", "l2"].isna().all()


def test_shuffled_pairs_are_at_chance():
    x, y = planted()
    values = []
    for seed in range(12):
        order = np.random.default_rng(seed).permutation(len(y))
        values.append(retrieval_table({0: x}, y[order], split=SPLIT, own={1: y}, n_boot=10)["value"].to_numpy()[:4])
        table = retrieval_table({0: x}, y[order], split=SPLIT, n_boot=10)
    assert table["chance"].tolist() == pytest.approx([0.01, 0.05, 0.01, 0.05])
    # 12 × 100 queries: three standard errors of a share of 1 % and 5 %.
    assert np.abs(np.mean(values, 0) - table["chance"]).tolist() <= [0.0087, 0.019, 0.0087, 0.019]


def test_noise_lowers_recall_and_the_interval_covers_it():
    x, y = planted(noise=3.0)
    table = retrieval_table({0: x}, y, split=SPLIT, at=(1, 5, 100), n_boot=500)
    one, five, every = table["value"][:3]
    assert 0.05 < one < five < every == 1
    assert (table["ci_low"] <= table["value"]).all()
    assert (table["value"] <= table["ci_high"]).all()
    widths = (table["ci_high"] - table["ci_low"])[:2].to_numpy()
    expected = 2 * 1.96 * np.sqrt(np.array([one, five]) * (1 - np.array([one, five])) / 100)
    assert np.allclose(widths, expected, rtol=0.2)


def test_map_is_scikit_learns_ridge_at_the_penalty_chosen():
    from sklearn.linear_model import Ridge

    x, y = planted(noise=1.0)
    x = x * np.linspace(0.1, 5, x.shape[1]) + 3
    fit = fit_ridge_map(x[:200], y[:200], x_dev=x[200:250], targets_dev=y[200:250], l2_grid=[0.3])
    standard = (x - x[:200].mean(0)) / x[:200].std(0)
    wanted = Ridge(alpha=0.3 * 200).fit(standard[:200], y[:200]).predict(standard[250:])
    assert np.allclose(fit(x[250:]), wanted, atol=1e-9)


def test_penalty_with_the_best_cosine_on_dev_is_chosen():
    random = np.random.default_rng(1)
    x = random.standard_normal((60, 50))
    y = x[:, :3] + random.standard_normal((60, 3))
    parts = x[:40], y[:40], x[40:], y[40:]
    grid = (1e-6, 0.5, 1e3)

    def cosine(l2):
        fit = fit_ridge_map(parts[0], parts[1], x_dev=parts[2], targets_dev=parts[3], l2_grid=[l2])
        a, b = fit(parts[2]), parts[3]
        return (a * b).sum(1).__truediv__(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)).mean()

    chosen = fit_ridge_map(parts[0], parts[1], x_dev=parts[2], targets_dev=parts[3], l2_grid=grid).l2
    assert chosen == max(grid, key=cosine)


def test_chance_counts_every_right_candidate_and_ties_earn_nothing():
    right = np.zeros((2, 6), dtype=bool)
    right[0, 2] = right[1, [0, 4]] = True
    hits, chance = recall_hits(np.ones((2, 3)), np.ones((6, 3)), right, at=(1, 5))
    assert not hits[0].any()
    for i, wanted in enumerate(right):
        for k, at in enumerate((1, 5)):
            draws = [wanted[list(c)].any() for c in combinations(range(6), at)]
            assert chance[k, i] == pytest.approx(np.mean(draws))


def test_equal_captions_are_one_candidate_and_all_of_their_images_are_right():
    _, y = planted()
    caption = np.arange(len(SPLIT)) // 2
    y = y[caption * 2]
    table = retrieval_table({}, y, split=SPLIT, own={0: y}, others=caption, n_boot=10).set_index(["query", "at"])
    assert table.loc[("image", 1), "candidates"] == 50
    assert table.loc[("text", 1), "candidates"] == 100
    assert table.loc[("text", 1), "n"] == 50
    assert (table["value"] == 1).all()
    assert table.loc[("text", 1), "chance"] == pytest.approx(2 / 100)


def test_bad_shapes_and_missing_splits_are_refused():
    x, y = planted()
    with pytest.raises(UsageError, match="350 pairs have a split, but embeddings has 10"):
        retrieval_table({0: x}, y[:10], split=SPLIT)
    with pytest.raises(UsageError, match="two pairs or more of split 'dev'; there are 0"):
        retrieval_table({0: x}, y, split=np.where(SPLIT == "dev", "train", SPLIT))


def pairs(table):
    frame = read_images(table, image="file", label="caption")
    images = [
        Image(n, source=p, digest=d) for n, p, d in zip(frame["name"], frame["image"], frame["digest"], strict=True)
    ]
    return images, [Text(c) for c in frame["label"]]


def test_embeddings_are_what_clip_itself_gives(tmp_path, cache):
    from probing.extraction import extract

    tiny_clip(tmp_path / "clip")
    loaded = load_model(tmp_path / "clip")
    images, texts = pairs(scenes_table(tmp_path, digit_scenes(10)))
    ids = loaded.tokenizer([t.string for t in texts], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = loaded.model(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"],
            pixel_values=loaded.image_processor([i.source for i in images]),
        )  # fmt: skip
    for stack, given, pooling, wanted in (
        ("vision", images, "first", out.image_embeds), ("text", texts, "last", out.text_embeds),
    ):  # fmt: skip
        store = extract(loaded, given, stack=stack, sentence_pooling=[pooling], word_pooling=())
        mine = tower_embeddings(loaded, stack, store.sentences(pooling, hidden=3))
        assert np.allclose(mine / np.linalg.norm(mine, axis=1, keepdims=True), wanted.numpy(), atol=1e-5)


def test_untrained_towers_are_at_chance_and_one_tower_is_refused(tmp_path, cache):
    tiny_clip(tmp_path / "clip")
    loaded = load_model(tmp_path / "clip")
    images, texts = pairs(scenes_table(tmp_path, [*digit_scenes(90), *digit_scenes(60, test=True)]))
    split = np.repeat(["train", "dev", "test"], (60, 30, 60))
    table = tower_retrieval(loaded, images, texts, split=split, n_boot=200)
    assert table.groupby(["tower", "map"]).size().to_dict() == {
        ("text", "own"): 4, ("text", "ridge"): 16, ("vision", "own"): 4, ("vision", "ridge"): 16,
    }  # fmt: skip
    own = table[(table["map"] == "own") & (table["at"] == 5)]
    assert (own["value"] < own["chance"] + 0.12).all()
    tiny_vit(tmp_path / "vit")
    with pytest.raises(ModelError, match="has no visual_projection"):
        tower_retrieval(load_model(tmp_path / "vit"), images, texts, split=split)


@pytest.mark.slow
def test_a_trained_dual_encoder_retrieves_unseen_pairs_of_digits_from_its_later_layers(tmp_path, cache):
    seen, unseen = digit_scenes(1500), digit_scenes(200, test=True)
    loaded = load_model((train_clip(tiny_clip(), seen), caption_tokenizer()))
    images, texts = pairs(scenes_table(tmp_path, [*seen, *unseen]))
    table = tower_retrieval(loaded, images, texts, split=np.repeat(["train", "dev", "test"], (1200, 300, 200)))
    five = table[table["at"] == 5]
    own = five[five["map"] == "own"]
    assert (own["ci_low"] > 5 * own["chance"]).all()
    for tower in ("vision", "text"):
        curve = five[(five["tower"] == tower) & (five["map"] == "ridge") & (five["query"] == "image")]
        curve = curve.set_index("hidden")["value"]
        assert curve[0] < 0.1  # the token that pools has seen nothing yet
        assert curve[3] > curve[1] + 0.1
