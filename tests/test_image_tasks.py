"""Tasks from images: what the pixels say, read off by hand; probed from end to end, with planted truth and controls."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image as Pillow
from typer.testing import CliRunner

from analysis import compare
from analysis.cli.main import app
from probing import probe_layers
from probing.controls import control_labels
from probing.registry import load_tasks, split_references
from probing.tasks.pixels import (
    GRID,
    brightness_bins,
    cell_types,
    dominant_channels,
    image_types,
    ink_quadrants,
    pixel_facts,
)
from spafit.errors import TaskError, UnknownTaskError, UsageError
from spafit.models import load_model
from tests.image_fixtures import digits, digits_folder, save_processor, tiny_vit, train_digits

# ---------------------------------------------------------------- pixels


def test_facts_of_hand_made_pixels():
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[1, 6] = 255
    facts = pixel_facts(pixels)
    assert facts.intensity == pytest.approx(1 / 64)
    assert facts.grey
    assert facts.centre == pytest.approx((1.5 / 8, 6.5 / 8))
    assert facts.cells.shape == (2 * GRID, 2 * GRID)
    assert np.argwhere(facts.cells == 1).tolist() == [[1, 6]]
    inverse = pixel_facts(255 - pixels)  # ink is what differs from the background, dark or bright
    assert inverse.centre == pytest.approx(facts.centre)
    assert pixel_facts(np.full((5, 7), 9, dtype=np.uint8)).centre == (0.5, 0.5)


def test_parts_of_any_image_size_are_means_over_their_pixels():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (24, 40)).astype(np.uint8)
    wanted = (pixels / 255).reshape(8, 3, 8, 5).mean((1, 3))
    assert np.allclose(pixel_facts(pixels).cells, wanted)
    small = pixel_facts(random.integers(0, 256, (3, 5)).astype(np.uint8)).cells
    assert small.shape == (8, 8)
    assert np.isfinite(small).all()


def test_classes_come_from_the_training_images_alone():
    train = np.arange(8) < 4
    bins, names = brightness_bins(np.array([0.1, 0.2, 0.3, 0.4, 0.0, 0.9, 0.25, 0.31]), train)
    assert bins.tolist() == [0, 1, 2, 3, 0, 3, 2, 2]
    assert len(names) == 4
    colour = np.eye(3)[[0, 0, 2, 2, 1, 0, 2, 0]]
    found, names = dominant_channels(colour, train)
    assert names == ("red", "blue")
    assert found.tolist() == [0, 0, 1, 1, -1, 0, 1, 0]
    centre = np.array([[0.1, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.9], [0.2, 0.8], [0.8, 0.2], [0, 0], [1, 1]])
    assert ink_quadrants(centre, train)[0].tolist() == [0, 1, 2, 3, 1, 2, 0, 3]


def test_types_of_looks_recur_and_do_not_depend_on_the_test_images():
    facts = [pixel_facts(p) for p in digits()[0][:300]]
    cells, train = np.stack([f.cells for f in facts]), np.arange(300) < 200
    types = image_types(cells, train)
    assert 16 < len(set(types)) <= 64
    assert np.isin(types[~train], types[train]).mean() > 0.9
    other = cells.copy()
    other[250:] = 0
    assert image_types(other, train)[:250].tolist() == types[:250].tolist()
    cell = np.arange(300) % GRID**2
    assert len(set(cell_types(cells, cell, train))) <= 16


# ---------------------------------------------------------------- tasks


def test_tasks_of_a_folder_with_their_levels_units_and_notes(tmp_path):
    folder = digits_folder(tmp_path, train=120, test=60)
    (folder / "train" / "3" / "broken.png").write_bytes(b"no image")
    tasks = {t.name: t for t in load_tasks([f"images:{folder}"])}
    assert {n: (t.level, t.unit, len(t.labels)) for n, t in tasks.items()} == {
        "digits.intensity": ("surface", "sentence", 4),
        "digits.quadrant": ("surface", "sentence", 4),
        "digits.patch_position": ("surface", "word", 16),
        "digits.class": ("semantics", "sentence", 10),
    }
    for task in tasks.values():
        assert "1 image(s) could not be read and were left out: train/3/broken.png (no image in a known format)." in (
            task.notes
        )
        assert "There is no dev split: " in " ".join(task.notes)
        assert control_labels(task, 0) is not None
    items = tasks["digits.class"].items
    assert (items["split"] == "test").sum() == 60
    named = [n.split("/")[1] for n in items["item"]]
    assert [tasks["digits.class"].labels[i] for i in items["label"]] == named
    cells = tasks["digits.patch_position"].items["label"].value_counts()
    assert cells.max() - cells.min() <= 1


def test_references_stand_beside_others_and_name_tasks(tmp_path):
    folder = digits_folder(tmp_path, train=120, test=60)
    references = split_references(f"images:{folder}#class,intensity,core.tense")
    assert references == [f"images:{folder}#class,intensity", "core.tense"]
    assert [t.name for t in load_tasks(references)] == ["digits.class", "digits.intensity", "core.tense"]
    with pytest.raises(UnknownTaskError, match=r"no task 'clas' of images\. Did you mean 'class'"):
        load_tasks([f"images:{folder}#clas"])
    with pytest.raises(TaskError, match=r"'digits\.colour' has one class only"):
        load_tasks([f"images:{folder}#colour"])
    with pytest.raises(TaskError, match=r"unknown option 'lable'\. Did you mean 'label'"):
        load_tasks([f"images:{folder},lable=x"])


def test_table_of_coloured_images_gives_the_colour_task(tmp_path):
    random = np.random.default_rng(0)
    lines = ["picture\tkind\tpart"]
    for i in range(60):
        strongest = i % 3
        pixels = random.integers(0, 100, (6, 6, 3)).astype(np.uint8)
        pixels[..., strongest] += 100
        Pillow.fromarray(pixels).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png\t{'abc'[strongest]}\t{'train' if i < 36 else 'val' if i < 45 else 'test'}")
    (tmp_path / "kinds.tsv").write_text("\n".join(lines) + "\n")
    reference = f"images:{tmp_path / 'kinds.tsv'},image=picture,label=kind,split=part,name=my kinds#colour,class"
    colour, kind = load_tasks([reference])
    assert colour.name == "my_kinds.colour"
    assert colour.labels == ("red", "green", "blue")
    assert colour.items["label"].tolist() == kind.items["label"].tolist() == [i % 3 for i in range(60)]
    assert colour.items["split"].value_counts().to_dict() == {"train": 36, "dev": 9, "test": 15}


def test_digest_follows_pixels_and_not_file_names(tmp_path):
    folder = digits_folder(tmp_path, train=60, test=30)
    (task,) = load_tasks([f"images:{folder}#class"])
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "digits")
    assert load_tasks([f"images:{moved}#class"])[0].digest == task.digest
    file = next((moved / "test").rglob("*.png"))
    Pillow.fromarray(np.full((8, 8), 77, dtype=np.uint8)).save(file)
    assert load_tasks([f"images:{moved}#class"])[0].digest != task.digest


# ---------------------------------------------------------------- end to end


def accuracy(results, task, control="none"):
    found = results.scores
    found = found[(found["task"] == task) & (found["control"] == control) & (found["metric"] == "accuracy")]
    return found[found["seed"].isna()].set_index("hidden")["value"]


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A ViT that learnt digits, and its probing run, with one file of a hostile name."""
    place = tmp_path_factory.mktemp("probed")
    folder = digits_folder(place, train=500, test=250)
    hostile = folder / "test" / "4" / "<img src=x onerror=alert(1)>.png"
    Pillow.fromarray(digits()[0][-1]).save(hostile)
    train_digits(tiny_vit(classes=10), folder=place / "vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPAFIT_CACHE", str(place / "cache"))
        outcome = CliRunner().invoke(
            app, ["probe", "--model", str(place / "vit"), "--tasks", f"images:{folder}", "--out", str(place / "run"),
                  "--seeds", "2", "--n-boot", "100", "--quiet"],
        )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    return place, outcome.output


def test_command_prints_table_and_verdict_and_writes_a_page_with_escaped_file_names(probed):
    place, printed = probed
    for name in ("intensity", "quadrant", "patch_position", "class"):
        assert f" {name} " in printed
    assert "Verdict: inconclusive." in printed
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    items = pd.read_parquet(place / "run" / "items" / "digits.class.parquet")
    assert "test/4/<img src=x onerror=alert(1)>.png" in set(items["text"])
    positions = pd.read_parquet(place / "run" / "items" / "digits.patch_position.parquet")
    positions = positions[positions["control"] == "none"]
    assert (positions["target"].astype(str) == positions["label"].astype(str)).all()
    assert json.loads((place / "run" / "run.json").read_text())["status"] == "complete"


def test_position_stands_in_patches_and_class_in_later_layers(probed):
    from probing.results import ProbeResults

    place, _ = probed
    results = ProbeResults.load(place / "run")
    position = accuracy(results, "digits.patch_position")
    assert position[0] == 1
    own, random = (accuracy(results, "digits.class", c) for c in ("none", "random-encoder"))
    assert own[4] > own[0] + 0.3
    assert own[4] > random[4] + 0.03
    # Without order, the mean of patch embeddings says far less of the class than the pixels do.
    from sklearn.linear_model import LogisticRegression

    (task,) = load_tasks([f"images:{place / 'digits'}#class"])
    pixels = np.stack([np.asarray(Pillow.open(t.source)).ravel() for t in task.corpus.texts]) / 255
    x, y = pixels[task.items["text"]], task.items["label"].to_numpy()
    train, test = ((task.items["split"] == s).to_numpy() for s in ("train", "test"))
    of_pixels = LogisticRegression(max_iter=500).fit(x[train], y[train]).score(x[test], y[test])
    assert random[0] < of_pixels - 0.3


def test_position_is_gone_without_position_embeddings(tmp_path, cache):
    folder = digits_folder(tmp_path, train=400, test=200)
    model = tiny_vit()
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
    results = probe_layers((model, None), [f"images:{folder}#patch_position"], controls=(), seeds=1, quiet=True,
                           out=tmp_path / "run", n_boot=100)  # fmt: skip
    # Blank corners still tell a little; hidden states of a model without positions cannot tell the rest.
    assert accuracy(results, "digits.patch_position")[0] < 0.45


def test_shuffled_labels_are_at_chance(tmp_path, cache):
    folder = digits_folder(tmp_path, train=400, test=300, shuffled=True)
    results = probe_layers((tiny_vit(), None), [f"images:{folder}#class"], controls=(), seeds=2, quiet=True,
                           out=tmp_path / "run", n_boot=100)  # fmt: skip
    # Ten classes; four standard errors of a share of 12 % of 300.
    assert accuracy(results, "digits.class").max() < 0.12 + 4 * np.sqrt(0.12 * 0.88 / 300)


def test_compare_shows_where_training_changed_an_image_model(tmp_path, cache):
    folder = digits_folder(tmp_path, train=400, test=200)
    before = tiny_vit(classes=10)
    before.save_pretrained(tmp_path / "before")
    save_processor(tmp_path / "before", side=8)
    for parameter in before.base_model.parameters():
        parameter.requires_grad_(False)
    for block in before.base_model.layers[2:]:
        block.requires_grad_(True)
    train_digits(before, epochs=10, folder=tmp_path / "after")
    found = compare(
        tmp_path / "before", [tmp_path / "after"], tasks=[f"images:{folder}#class,intensity"], seeds=2, n_boot=100,
        out=tmp_path / "compare", quiet=True,
    )  # fmt: skip
    lost = found.forgetting.query("term == 'lost' and control == 'none'").pivot_table(
        index="task", columns="hidden", values="value"
    )
    assert (lost[[0, 1, 2]] == 0).all(axis=None)  # the first changed block is 2, so hidden states 0 to 2 are as before
    assert lost.loc["digits.class", 4] < -0.1  # gained
    assert found.drift is not None
    assert set(found.drift["stack"]) == {"vision"}


def test_controls_that_read_words_are_refused_or_left_out(tmp_path, cache):
    folder = digits_folder(tmp_path, train=200, test=100)
    with pytest.raises(UsageError, match=r"items of task 'digits\.class' are images, which have no word order"):
        probe_layers((tiny_vit(), None), [f"images:{folder}#class"], controls=("permuted-order",), quiet=True)
    results = probe_layers(
        (tiny_vit(), None), [f"images:{folder}#class"], controls=("bag-of-words", "permuted-weights"), seeds=1,
        out=tmp_path / "run", n_boot=100, quiet=True,
    )  # fmt: skip
    assert "no control bag-of-words: it reads words, and the items are images" in " ".join(
        results.run["tasks"]["digits.class"]["notes"]
    )
    assert "bag-of-words" not in set(results.scores["control"])
    assert "permuted-weights" in set(results.scores["control"])


def test_tasks_command_lists_describes_and_shows_images(tmp_path):
    folder = digits_folder(tmp_path, train=60, test=30)
    run = CliRunner()
    shown = run.invoke(app, ["tasks", "show", f"images:{folder}#class"]).output
    assert "Class of an image of digits." in shown
    rows = run.invoke(app, ["tasks", "rows", f"images:{folder}#patch_position", "--n", "1"]).output
    assert "[row " in rows
    assert "images:PATH" in " ".join(run.invoke(app, ["tasks", "show", "--help"]).output.split())


def test_dry_run_speaks_of_images(tmp_path, cache):
    folder = digits_folder(tmp_path, train=60, test=30)
    tiny_vit(tmp_path / "vit")
    outcome = CliRunner().invoke(
        app, ["probe", "--model", str(tmp_path / "vit"), "--tasks", f"images:{folder}", "--dry-run"]
    )
    assert "images     " in outcome.output
    assert " distinct, " in outcome.output
    assert load_model(tmp_path / "vit").image_processor is not None


def test_watching_an_image_model_reads_it_with_its_processor_in_the_tokenizers_place(tmp_path):
    from analysis import forgetting_signal
    from spafit.image_processing import plain_processor

    folder = digits_folder(tmp_path, train=300, test=200)
    signal = forgetting_signal(plain_processor(channels=1, image_size=(8, 8)), load_tasks([f"images:{folder}#class"]))
    model = tiny_vit(classes=10)
    signal.measure(model, 0)
    train_digits(model, epochs=8)
    lost = {hidden: value for name, hidden, value in signal.measure(model, 1) if name == "lost:digits.class"}
    assert sorted(lost) == [0, 1, 2, 3, 4]
    assert min(lost.values()) < -0.05  # classes became easier to read
