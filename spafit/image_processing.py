"""From images to the pixel values that a checkpoint reads, by the image processor that came with it."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spafit.data.images import imaging, open_image
from spafit.errors import ModelError
from spafit.hub import quiet, read_config
from spafit.io import content_digest

if TYPE_CHECKING:
    import torch
    from torch import nn

_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes, crops and normalises as transformers' image processor does, on Pillow and NumPy (no torchvision).

    Attributes:
        processor: transformers' image processor.
        channels: what the model reads: 1 (grey) or 3 (colours).
        digest: SHA-256 of the processor's class, its settings and the number of channels.
    """

    processor: Any = field(repr=False, compare=False)
    channels: int
    digest: str

    @classmethod
    def of(cls, processor: Any, *, channels: int) -> ImageProcessor:
        """Wrap a transformers image processor for a model of one or three channels."""
        kept = {k: v for k, v in processor.to_dict().items() if not k.startswith("_")}
        content = json.dumps(kept, sort_keys=True, default=str)
        return cls(processor, channels, content_digest([type(processor).__name__, content, channels]))

    def __call__(self, images: Sequence[str | Path | bytes]) -> torch.Tensor:
        """Pixel values of some images, float32, (images, channels, height, width).

        Args:
            images: paths or encoded bytes.

        Raises:
            DataError: an image cannot be read.
            ModelError: the processor does not fit images of so many channels, or gives them different sizes.
        """
        import torch

        opened = [open_image(i, channels=self.channels) for i in images]
        try:
            with quiet():
                # Every image has the model's channels already; a conversion to colours would undo grey.
                values = self.processor(opened, return_tensors="pt", do_convert_rgb=False)["pixel_values"]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"The image processor {type(self.processor).__name__} does not take images of {self.channels} "
                f"channel(s) ({next(iter(str(error).splitlines()), '')}). Correct preprocessor_config.json."
            ) from error
        if not isinstance(values, torch.Tensor) or values.dim() != 4 or len(values) != len(images):
            raise ModelError(
                f"The image processor {type(self.processor).__name__} gives no single block of pixels per image, so "
                "its patches have no fixed place. Models with images of one fixed size are supported."
            )
        return values.float()

    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pixel values of one image."""
        import numpy as np

        side = 64  # any will do: images of one fixed size are what comes out
        grey = io.BytesIO()
        imaging().fromarray(np.zeros((side, side), dtype=np.uint8)).save(grey, format="PNG")
        return tuple(self([grey.getvalue()]).shape[1:])  # type: ignore[return-value]

    def save(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json`` as transformers does, so that the folder loads with its processor."""
        with quiet():
            self.processor.save_pretrained(str(folder))


def load_image_processor(model: nn.Module, folders: Sequence[Path], *, notes: list[str]) -> ImageProcessor | None:
    """The image processor of the first folder that has one (an adapter's own, else its base's).

    Without one, images are resized to what the model's configuration says and scaled to [-1, 1], and a note says so.
    None where the configuration names no size, and where Pillow is not installed: the model can be looked into, but
    no image can be encoded.

    Args:
        model: a model with a patch embedding.
        folders: where ``preprocessor_config.json`` may lie.
        notes: what a report must say is added here.

    Raises:
        ModelError: it cannot be read.
    """
    if find_spec("PIL") is None:
        return None
    channels, image_size = image_shape(model)
    for folder in folders:
        named = next((name for name in _FILES if (folder / name).is_file()), None)
        if named is not None and (named == _FILES[0] or "image_processor" in read_config(folder / named)):
            return ImageProcessor.of(_load(folder), channels=channels)
    if image_size is None:
        return None
    notes.append(
        f"no preprocessor_config.json: images are resized to {image_size[0]} × {image_size[1]} and scaled to [-1, 1], "
        "which may not be how the model was trained"
    )
    return plain_processor(channels=channels, image_size=image_size)


def image_shape(model: nn.Module) -> tuple[int, tuple[int, int] | None]:
    """Channels that a model's patch embedding reads, and the (height, width) that its configuration names."""
    from torch import nn

    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    configs = [getattr(m, "config", None) for m in model.modules()]
    sizes = (
        getattr(c, "image_size", None) for config in configs for c in (config, getattr(config, "vision_config", None))
    )
    size = next((s for s in sizes if s), None)
    pair = (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))
    return (3 if convolution is None else convolution.in_channels), pair


def plain_processor(*, channels: int, image_size: tuple[int, int]) -> ImageProcessor:
    """A processor that resizes to (height, width) and scales pixels to [-1, 1]."""
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": image_size[0], "width": image_size[1]}, "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / _FILES[0]).write_text(json.dumps(settings), encoding="utf-8")
        return ImageProcessor.of(_load(Path(place)), channels=channels)


def _load(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    with quiet():
        try:
            return AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            raise ModelError(f"The image processor in {folder} cannot be loaded ({line}).") from error
