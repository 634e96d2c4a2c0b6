"""Images for a vision stack: how its tokens stand for patches, and which token is the state of a cell of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probing.align import EncodedTexts
from probing.forward import Backbone
from probing.tasks.base import Image, Text
from spafit.errors import DataError, ModelError, SpafitError
from spafit.layout import is_inside

if TYPE_CHECKING:
    import torch

    from spafit.models import LoadedModel
    from spafit.stacks import Stack


@dataclass(frozen=True)
class PatchGrid:
    """The tokens of one image in a vision stack: ``prefix`` tokens of no patch ([CLS], registers), then the patches.

    Attributes:
        prefix: tokens before the first patch.
        rows: rows of patches.
        columns: columns of patches.
        size: (channels, height, width) of the pixels.
    """

    prefix: int
    rows: int
    columns: int
    size: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.prefix + self.rows * self.columns

    def token_of(self, cell: np.ndarray, grid: int) -> np.ndarray:
        """Token of the patch around the centre of each cell of a ``grid`` × ``grid`` division."""
        row, column = np.divmod(np.asarray(cell), grid)
        at = [((2 * k + 1) * n) // (2 * grid) for k, n in ((row, self.rows), (column, self.columns))]
        return self.prefix + at[0] * self.columns + at[1]


def check_kind(loaded: LoadedModel, stack: Stack, texts: Sequence[Text], *, takes_images: bool) -> bool:
    """Whether the texts are images; they go through the one kind of stack, strings through the other.

    Raises:
        DataError: images and strings in one list.
        ModelError: the stack does not take what was given.
    """
    images = [isinstance(t, Image) for t in texts]
    if any(images) and not all(images):
        raise DataError("Images and texts stand in one list; encode them in two.")
    if any(images) == takes_images:
        return takes_images
    given, others = ("images", "texts") if any(images) else ("texts", "images")
    fits = [s.name for s in loaded.stacks if s.name.startswith("vision") == any(images)]
    remedy = f"Name the other one: stack={fits[0]!r} (--stack {fits[0]})." if fits else f"Give it {others}."
    raise ModelError(f"Stack {stack.name!r} of {loaded.name} takes {others}, and these are {given}. {remedy}")


_GRIDS: dict[tuple[str, str, str], PatchGrid] = {}


def patch_grid(loaded: LoadedModel, stack: Stack) -> PatchGrid:
    """Find out from three images of noise how a stack's tokens stand for patches.

    The second image differs from the first in the pixels of its first patch only, the third in those of its last: the
    tokens that change at the input of block 0 are the first and last patches'.

    Raises:
        ModelError: patches are not the last tokens, one each and in reading order (masked, merged or windowed ones).
    """
    import torch

    if loaded.image_processor is None:
        raise ModelError(
            f"{loaded.name} has no image processor, and its configuration names no image_size. Add "
            "preprocessor_config.json to its folder, or give the pair (model, image processor)."
        )
    key = loaded.weights_digest, stack.path, loaded.image_processor.digest
    if key in _GRIDS:
        return _GRIDS[key]
    shape = loaded.image_processor.shape()
    backbone = Backbone(loaded, stack, device=str(next(loaded.model.parameters()).device))
    noise = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    grids: list[tuple[int, ...]] = []
    states: list[torch.Tensor] = []

    def embedded(module: Any, args: Any, output: torch.Tensor) -> None:
        grids.append(tuple(output.shape[2:]))

    def entered(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    convolution = next(
        (
            m for n, m in backbone.module.named_modules()
            if type(m).__name__ == "Conv2d" and not is_inside(n, stack.path[len(backbone.path) :].lstrip("."))
        ),
        None,
    )  # fmt: skip
    problem = "its patches are not embedded by a convolution"
    if convolution is not None:
        handles = [
            convolution.register_forward_hook(embedded),
            backbone.submodule(stack.block_paths[0]).register_forward_pre_hook(entered, with_kwargs=True),
        ]
        modes = {m: m.training for m in backbone.module.modules()}
        try:
            backbone.module.eval()
            with torch.no_grad():
                height, width = convolution.kernel_size
                noise[1, :, :height, :width] += 1
                noise[2, :, shape[1] - shape[1] % height - height :, shape[2] - shape[2] % width - width :] += 1
                backbone.module(**backbone.inputs({"pixel_values": noise}))
            problem = _problem(grids, states)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{loaded.name} does not take the {shape[1]} × {shape[2]} pixels that its image processor gives "
                f"({next(iter(str(error).splitlines()), '')}). Correct the size in preprocessor_config.json."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
    if problem:
        raise ModelError(
            f"The tokens of stack {stack.name!r} of {loaded.name} cannot be told apart by patch: {problem}. Probe "
            "states that you computed yourself with probing.probe_arrays."
        )
    rows, columns = grids[0]
    grid = PatchGrid(states[0].shape[1] - rows * columns, rows, columns, shape)
    _GRIDS[key] = grid
    return grid


def _problem(grids: Sequence[tuple[int, ...]], states: Sequence[torch.Tensor]) -> str:
    if len(grids) != 1 or len(grids[0]) != 2 or len(states) != 1 or states[0].dim() != 3 or len(states[0]) != 3:
        return "block 0 does not get one row of tokens per image"
    tokens, patches = states[0].shape[1], grids[0][0] * grids[0][1]
    if tokens < patches:
        return f"block 0 gets {tokens} tokens of {patches} patches"
    first, last = ((states[0][i] != states[0][0]).any(1).nonzero().flatten().tolist() for i in (1, 2))
    if first != [tokens - patches] or last != [tokens - 1]:
        return "a change in one patch does not change one token in reading order"
    return ""


def encode_images(images: Sequence[Image], grid: PatchGrid, *, numbers: np.ndarray) -> EncodedTexts:
    """Images as texts of patches: the tokens before the first patch are special, cells of the grid are words.

    Args:
        images: the images.
        grid: the stack's tokens.
        numbers: what errors call each image.

    Raises:
        DataError: a span that is no cell of its grid.
    """
    for i, image in zip(numbers, images, strict=True):
        if any(not (0 <= a < image.grid**2 and b == a + 1) for a, b in image.spans):
            raise DataError(
                f"Image {i} ({image.string}) has a span that is no cell of its {image.grid} × {image.grid}."
            )
    n, tokens = len(images), grid.tokens
    counts = np.array([len(i.spans) for i in images], dtype=np.int64)
    cells = np.array([a for i in images for a, _ in i.spans], dtype=np.int64)
    sides = np.repeat(np.array([i.grid for i in images], dtype=np.int64), counts)
    words = np.array([int(grid.token_of(c, int(g))) for c, g in zip(cells, sides, strict=True)], dtype=np.int64)
    return EncodedTexts(
        ids=np.zeros(n * tokens, dtype=np.int64),
        types=np.zeros(n * tokens, dtype=np.int64),
        own=np.tile(np.arange(tokens) >= grid.prefix, n),
        token_offsets=np.arange(n + 1) * tokens,
        word_first=words,
        word_last=words,
        word_offsets=np.concatenate([[0], np.cumsum(counts)]),
        truncated=np.zeros(n, dtype=bool),
    )


def pixel_values(loaded: LoadedModel, images: Sequence[Text]) -> dict[str, torch.Tensor]:
    """What the backbone takes for some images; an image that has become unreadable is named."""
    assert loaded.image_processor is not None
    sources = [t.source for t in images if isinstance(t, Image)]
    try:
        return {"pixel_values": loaded.image_processor(sources)}
    except DataError:
        for image, source in zip(images, sources, strict=True):
            try:
                loaded.image_processor([source])
            except SpafitError as error:
                raise DataError(f"Image {image.string} can no longer be read: {error}") from error
        raise
