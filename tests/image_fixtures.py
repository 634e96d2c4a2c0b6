"""Real digits as image files, scenes composed of them with captions, and tiny image models.

Everything is deterministic: the digits are scikit-learn's 1,797 scans of 8 × 8 pixels, scenes are drawn from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from spafit.runtime import generator, torch_seed

RELATIONS = ("left of", "right of", "above", "below")
SIZES = {"large": 16, "small": 8}
CANVAS = 32


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits, uint8 of shape (1797, 8, 8), bright on black, and their classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.round(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.int64)


def digits_folder(
    place: Path, *, train: int = 600, test: int = 300, side: int = 8, seed: int = 0, shuffled: bool = False
) -> Path:
    """Digits as PNG files in ``train/<class>`` and ``test/<class>``; returns the folder.

    Args:
        place: the folder ``digits`` is made in it.
        train: number of training images; ``test`` that of test images.
        side: pixels per side, a multiple of 8.
        seed: which images, and in which order.
        shuffled: whether the classes are dealt out at random: the negative control.
    """
    images, labels = digits()
    order = generator(seed, "digits folder").permutation(len(images))[: train + test]
    if shuffled:
        labels = labels.copy()
        labels[order] = labels[generator(seed, "shuffled digits").permutation(order)]
    folder = place / "digits"
    for n, i in enumerate(order):
        home = folder / ("train" if n < train else "test") / str(labels[i])
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].repeat(side // 8, 0).repeat(side // 8, 1)).save(home / f"{i:04d}.png")
    return folder


def save_processor(folder: Path, *, side: int, channels: int = 1) -> None:
    """Write the image processor of a model: ``side`` × ``side`` pixels, scaled to [-1, 1]."""
    from spafit.image_processing import plain_processor

    plain_processor(channels=channels, image_size=(side, side)).save(folder)


def tiny_vit(
    folder: Path | None = None, *, seed: int = 0, side: int = 8, patch: int = 2, width: int = 32, blocks: int = 4,
    channels: int = 1, classes: int | None = None,
) -> nn.Module:  # fmt: skip
    """A random ViT, or a ViT with a classifier of ``classes`` labels.

    Saved with its processor where a folder is given.
    """
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    config = ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=2 * width,
        image_size=side, patch_size=patch, num_channels=channels, num_labels=classes or 2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch_seed(seed, "tiny vit"):
        model = ViTModel(config) if classes is None else ViTForImageClassification(config)
        # Position embeddings are drawn small by default, as trained ones are not.
        embeddings = (model if classes is None else model.base_model).embeddings
        with torch.no_grad():
            embeddings.position_embeddings.normal_(0, 0.5)
    model.eval()
    if folder is not None:
        model.save_pretrained(folder)
        save_processor(folder, side=side, channels=channels)
    return model


def train_digits(model: nn.Module, *, epochs: int = 15, count: int = 600, seed: int = 0, folder: Path | None = None):
    """Train a :func:`tiny_vit` with a classifier on the first ``count`` digits of :func:`digits_folder`; return it."""
    images, labels = digits()
    order = generator(0, "digits folder").permutation(len(images))[:count]
    x = torch.from_numpy(images[order].astype(np.float32) / 127.5 - 1)[:, None]
    y = torch.from_numpy(labels[order])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for rows in torch.from_numpy(generator(seed, "training", epoch).permutation(count)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixel_values=x[rows]).logits, y[rows]).backward()
            optimizer.step()
    model.eval()
    if folder is not None:
        model.save_pretrained(folder)
        save_processor(folder, side=8)
    return model


# ---------------------------------------------------------------- scenes with captions


@dataclass(frozen=True)
class Scene:
    """Two digits on one canvas.

    Attributes:
        pixels: uint8, (32, 32).
        caption: such as ``a large 3 left of a small 7``.
        digits: the two classes, in the caption's order.
        sizes: their sizes, ``large`` or ``small``, of which there is one each.
        relation: where the first lies, seen from the second.
    """

    pixels: np.ndarray
    caption: str
    digits: tuple[int, int]
    sizes: tuple[str, str]
    relation: str


def held_out(first: int, second: int) -> bool:
    """Whether a pair of digits (in either order) is kept for the test: 20 of the 100 ordered pairs."""
    return ((first + second) % 5 == 0 and first != second) or (first == second and first % 5 == 0)


def digit_scenes(n: int, seed: int = 0, *, test: bool = False) -> list[Scene]:
    """``n`` scenes with captions: 2 sizes × 4 relations × 10 × 10 digits, of which some pairs occur in the test only.

    Args:
        n: number of scenes.
        seed: of the draw; scans of training and test scenes come from different halves of the digits.
        test: scenes of held-out pairs of digits (:func:`held_out`) rather than of the others.
    """
    images, labels = digits()
    half = slice(len(images) // 2, None) if test else slice(0, len(images) // 2)
    images, labels = images[half], labels[half]
    random = generator(seed, "digit scenes", test)
    kinds = [
        (a, b, sizes, relation)
        for a, b, sizes, relation in product(range(10), range(10), (("large", "small"), ("small", "large")), RELATIONS)
        if held_out(a, b) == test
    ]
    order = np.concatenate([random.permutation(len(kinds)) for _ in range(n // len(kinds) + 1)])[:n]
    scenes = []
    for k in order:
        a, b, sizes, relation = kinds[k]
        canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
        along_columns = relation in ("left of", "right of")
        first_is_early = relation in ("left of", "above")
        for digit, size, early in ((a, sizes[0], first_is_early), (b, sizes[1], not first_is_early)):
            scan = images[random.choice(np.flatnonzero(labels == digit))]
            side = SIZES[size]
            scan = scan.repeat(side // 8, 0).repeat(side // 8, 1)
            across = int(random.integers(0, CANVAS - side + 1))
            along = int(random.integers(0, CANVAS // 2 - side + 1)) + (0 if early else CANVAS // 2)
            row, column = (across, along) if along_columns else (along, across)
            canvas[row : row + side, column : column + side] = scan
        caption = f"a {sizes[0]} {a} {relation} a {sizes[1]} {b}"
        scenes.append(Scene(canvas, caption, (a, b), sizes, relation))
    return scenes


def scenes_table(place: Path, scenes: list[Scene], *, name: str = "scenes") -> Path:
    """The scenes as PNG files and a table ``<name>.csv`` with the columns file and caption; returns the table."""
    folder = place / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,caption"]
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.pixels).save(folder / f"{i:04d}.png")
        lines.append(f"{name}/{i:04d}.png,{scene.caption}")
    table = place / f"{name}.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def caption_tokenizer():
    """A word tokenizer of the captions' vocabulary; the end token has the highest id, by which CLIP finds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<unk>", "a", *SIZES, "left", "right", "of", "above", "below"]
    words += [*map(str, range(10)), "<end>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", len(words) - 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>",
        model_max_length=16,
    )  # fmt: skip


def train_clip(model: nn.Module, scenes: list[Scene], *, epochs: int = 40, seed: int = 0) -> nn.Module:
    """Train a :func:`tiny_clip` on scenes and captions by its own contrastive loss; return it."""
    x = torch.from_numpy(np.stack([s.pixels for s in scenes]).astype(np.float32) / 127.5 - 1)[:, None]
    encoded = caption_tokenizer()([s.caption for s in scenes], return_tensors="pt", padding=True)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for rows in torch.from_numpy(generator(seed, "training", epoch).permutation(len(scenes))).split(128):
            optimizer.zero_grad()
            model(
                input_ids=ids[rows], attention_mask=mask[rows], pixel_values=x[rows], return_loss=True
            ).loss.backward()
            optimizer.step()
    return model.eval()


def tiny_clip(
    folder: Path | None = None, *, seed: int = 0, side: int = CANVAS, patch: int = 8, width: int = 32, blocks: int = 3,
    joint: int = 32,
) -> nn.Module:  # fmt: skip
    """A random CLIP of two towers (the vision one of one grey channel); with its readers where a folder is given."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": 4, "intermediate_size": 2 * width,
        "projection_dim": joint,
    }  # fmt: skip
    tokenizer = caption_tokenizer()
    config = CLIPConfig(
        text_config={
            **tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": len(tokenizer) - 1,
        },
        vision_config={**tower, "image_size": side, "patch_size": patch, "num_channels": 1},
        projection_dim=joint,
    )  # fmt: skip
    with torch_seed(seed, "tiny clip"):
        model = CLIPModel(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_processor(folder, side=side)
    return model
