"""Images: their classes, the texts that belong to them (two towers), and captions that a decoder writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from spafit import io
from spafit.batches import EncodedTexts
from spafit.errors import ModelError, UsageError
from spafit.heads import Head, HeadedModel
from spafit.kinds.base import Collate, TaskKind
from spafit.kinds.classification import Classification
from spafit.kinds.language import Answers
from spafit.text_windows import end_of_text

if TYPE_CHECKING:
    import torch

    from spafit.image_processing import ImageProcessor
    from spafit.settings import TrainSettings

#: Scores of matching: share of items whose right partner is the nearest, or among the nearest five.
MATCHING = ("text_recall@1", "text_recall@5", "image_recall@1", "image_recall@5")


@dataclass(frozen=True)
class ImageClassification(Classification):
    """Classes of images; a summary is the image's logits."""

    columns: ClassVar[tuple[str, ...]] = ("image", "label")

    def head(self, reference: str | None, *, revision: str | None, offline: bool) -> Head:
        """A classifier of images."""
        return "image-classification"

    def load(
        self, reference: str | None, *, seed: int, revision: str | None, offline: bool, allow_pickle: bool
    ) -> HeadedModel:
        """The model with its head and its image processor.

        Raises:
            ModelError: it reads no images, or nothing says of which size.
        """
        return with_image_processor(
            super().load(reference, seed=seed, revision=revision, offline=offline, allow_pickle=allow_pickle)
        )

    def encode(self, frame: pd.DataFrame, headed: HeadedModel, *, max_length: int) -> EncodedTexts:
        """Images by their address; pixels are read batch by batch."""
        labels = frame["label"].to_numpy(dtype=np.int64) if frame["label"].notna().all() else None
        return EncodedTexts(tuple({"image": image} for image in frame["image"]), labels, 0)

    def collator(self, headed: HeadedModel) -> Collate:
        """Reads the images of a batch."""
        return Images(headed.image_processor)


@dataclass(frozen=True)
class Matching(TaskKind):
    """Images and the texts that belong to them, by two towers; a summary is both embeddings, of length 1, in a row.

    The loss is CLIP's (Radford et al. 2021, arXiv 2103.00020): cross-entropy over the batch in both directions. Another
    item with the very same text is no wrong partner and is left out of the sum.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "text")
    keeps_head: ClassVar[bool] = False

    def check(self, settings: TrainSettings) -> None:
        """No classes.

        Raises:
            UsageError: settings for classes.
        """
        if settings.class_weights:
            raise UsageError("class_weights are for classes, and this task matches images with texts. Leave them off.")

    def head(self, reference: str | None, *, revision: str | None, offline: bool) -> Head:
        """Two towers with projections into one space."""
        return "image-text-matching"

    def load(
        self, reference: str | None, *, seed: int, revision: str | None, offline: bool, allow_pickle: bool
    ) -> HeadedModel:
        """The model with its tokenizer and its image processor.

        Raises:
            ModelError: it has no two towers.
        """
        return with_image_processor(
            super().load(reference, seed=seed, revision=revision, offline=offline, allow_pickle=allow_pickle)
        )

    def encode(self, frame: pd.DataFrame, headed: HeadedModel, *, max_length: int) -> EncodedTexts:
        """Texts as the tokenizer puts them, images by their address."""
        from spafit.batches import encode

        texts = encode(frame.assign(label=np.nan), headed.tokenizer, max_length=max_length, regression=False)
        items = tuple({**t, "image": i} for t, i in zip(texts.items, frame["image"], strict=True))
        return dataclasses.replace(texts, items=items)

    def collator(self, headed: HeadedModel) -> Collate:
        """Reads the images of a batch and pads its texts."""
        from spafit.batches import Collator

        return Images(headed.image_processor, Collator(headed.tokenizer))

    def loss(
        self, model: Any, inputs: dict[str, Any], *, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's loss of the batch in nats, and both embeddings of each item, shape (items, 2 × width)."""
        import torch

        outputs = model(**inputs)
        scores = outputs.logits_per_image
        ids = inputs["input_ids"]
        same = (ids[:, None] == ids[None]).all(-1)
        same.fill_diagonal_(False)
        scores = scores.masked_fill(same, -torch.inf)
        right = torch.arange(len(scores), device=scores.device)
        both = [torch.nn.functional.cross_entropy(s, right) for s in (scores, scores.T)]
        return (both[0] + both[1]) / 2, torch.cat([outputs.image_embeds, outputs.text_embeds], dim=1)

    def score(self, summaries: np.ndarray, items: EncodedTexts) -> dict[str, float]:
        """:data:`MATCHING` over all items; the headline is the mean of both recalls at 1.

        Candidates are the different texts, and all images; any image with the text counts as right.
        """
        ranks = partner_ranks(summaries, [tuple(i["input_ids"]) for i in items.items])
        found = {f"{way}_recall@{k}": float(np.mean(r < k)) for way, r in ranks.items() for k in (1, 5)}
        both = (found["text_recall@1"] + found["image_recall@1"]) / 2
        return {**{name: found[name] for name in MATCHING}, "headline": both, "loss": 1 - both}

    def write(self, stem: Path, frame: pd.DataFrame, summaries: np.ndarray, texts: pd.DataFrame | None) -> None:
        """Rank (from 1) of the right text for each image, and of the nearest right image for each text."""
        ranks = partner_ranks(summaries, list(frame["text"]))
        table = pd.DataFrame({"idx": frame["idx"].to_numpy(), "text": frame["text"].to_numpy()})
        io.write_table(stem, table.assign(**{f"{way}_rank": r + 1 for way, r in ranks.items()}))


@dataclass(frozen=True)
class Captions(Answers):
    """Captions that a decoder writes of images; a summary is that of a language model."""

    columns: ClassVar[tuple[str, ...]] = ("image", "answer")
    texts: ClassVar[tuple[str, ...]] = ("answer",)

    def head(self, reference: str | None, *, revision: str | None, offline: bool) -> Head:
        """An image encoder with a decoder that writes."""
        return "image-to-text"

    def load(
        self, reference: str | None, *, seed: int, revision: str | None, offline: bool, allow_pickle: bool
    ) -> HeadedModel:
        """The model with its tokenizer and its image processor.

        Raises:
            ModelError: it reads no images, or nothing says with which token it starts.
        """
        return with_image_processor(
            super().load(reference, seed=seed, revision=revision, offline=offline, allow_pickle=allow_pickle)
        )

    def encode(self, frame: pd.DataFrame, headed: HeadedModel, *, max_length: int) -> EncodedTexts:
        """Captions with the token that ends them, images by their address."""
        tokenizer = headed.tokenizer
        assert tokenizer is not None
        end = end_of_text(tokenizer)
        ids = [[*tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"], end] for t in frame["answer"]]
        items = [{"image": i, "labels": t[:max_length]} for i, t in zip(frame["image"], ids, strict=True)]
        return EncodedTexts(tuple(items), None, sum(len(t) > max_length for t in ids), max_length)

    def collator(self, headed: HeadedModel) -> Collate:
        """Reads the images of a batch and pads its captions."""
        return Images(headed.image_processor, super().collator(headed))

    def _read(self, headed: HeadedModel, frame: pd.DataFrame) -> dict[str, Any]:
        return {"prompts": list(frame["image"]), "image_processor": headed.image_processor}


@dataclass(frozen=True)
class Images:
    """Puts the pixel values of a batch's images beside what ``others`` makes of the rest of its items.

    Attributes:
        processor: from addresses to pixels.
        others: pads the texts; None where there are none.
    """

    processor: ImageProcessor | None
    others: Collate | None = None

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """``pixel_values``, ``index``, and ``labels`` or what ``others`` gives."""
        import torch

        assert self.processor is not None
        pixels = self.processor([item["image"] for item in items])
        rest = [{k: v for k, v in item.items() if k != "image"} for item in items]
        if self.others is not None:
            return {**self.others(rest), "pixel_values": pixels}
        batch = {"pixel_values": pixels, "index": torch.as_tensor([item["index"] for item in items])}
        if "labels" in items[0]:
            batch["labels"] = torch.as_tensor(np.array([item["labels"] for item in items]))
        return batch


def with_image_processor(headed: HeadedModel) -> HeadedModel:
    """The same model with the image processor of its folder, or a plain one, which is noted.

    Raises:
        ModelError: the model names no image size, and its folder has no processor.
    """
    from spafit.image_processing import load_image_processor

    notes = list(headed.notes)
    processor = load_image_processor(headed.model, [Path(headed.folder)], notes=notes)
    if processor is None:
        raise ModelError(
            f"{headed.name} has no image processor, and its configuration names no image size. Put a "
            "preprocessor_config.json beside it, and install Pillow."
        )
    return dataclasses.replace(headed, image_processor=processor, notes=tuple(notes))


def partner_ranks(summaries: np.ndarray, texts: Sequence[Any]) -> dict[str, np.ndarray]:
    """Rank, from 0, of the right partner of every item in both directions; ties are counted against it.

    Args:
        summaries: both embeddings of each item, of length 1, shape (items, 2 × width).
        texts: what tells equal texts, one per item.

    Returns:
        ``text``: of the item's text among the different texts, by its image; ``image``: of the nearest image with the
        item's text among all images, by its text.
    """
    width = summaries.shape[1] // 2
    images, own = summaries[:, :width].astype(np.float64), summaries[:, width:].astype(np.float64)
    codes, first = pd.factorize(pd.Series([repr(t) for t in texts]))
    places = [int(np.flatnonzero(codes == c)[0]) for c in range(len(first))]
    near = images @ own[places].T  # images × different texts
    right = near[np.arange(len(images)), codes]
    text_rank = (near >= right[:, None]).sum(1) - 1
    best = np.array([near[codes == c, c].max() for c in range(len(first))])
    # Images of another text that are at least as near as the nearest right one.
    wrong = np.array([(near[codes != c, c] >= best[c]).sum() for c in range(len(first))])
    return {"text": text_rank, "image": wrong[codes]}
