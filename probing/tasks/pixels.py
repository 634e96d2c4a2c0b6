"""What can be read off the pixels of an image: brightness, dominant colour, where its ink lies. Arrays in, numbers out.

Ink is whatever differs from the background, whose brightness is taken to be the median of the image's border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Cells per side of the grid that single patches are asked about.
GRID = 4
CHANNELS = ("red", "green", "blue")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
#: Classes that brightness is binned into.
BINS = ("darkest quarter", "darker", "brighter", "brightest quarter")


@dataclass(frozen=True)
class PixelFacts:
    """What one image's pixels say.

    Attributes:
        intensity: mean brightness, 0 to 1.
        colour: mean of red, green and blue, shape (3,); all equal for a grey image.
        grey: whether every pixel is grey.
        centre: centre of mass of the ink, (vertical, horizontal), each 0 (top, left) to 1; the middle without any ink.
        cells: mean brightness of ``2 * GRID`` × ``2 * GRID`` equal parts, each at least a pixel.
    """

    intensity: float
    colour: np.ndarray
    grey: bool
    centre: tuple[float, float]
    cells: np.ndarray


def pixel_facts(pixels: np.ndarray) -> PixelFacts:
    """Read off an image's pixels.

    Args:
        pixels: (height, width) or (height, width, 3), 0 to 255.
    """
    colours = pixels.astype(np.float64) / 255
    if colours.ndim == 2:
        colours = np.repeat(colours[..., None], 3, axis=2)
    light = colours.mean(2)
    ink = np.abs(light - np.median(np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])))
    total = ink.sum()
    at = [(np.arange(n) + 0.5) / n for n in light.shape]
    centre = (0.5, 0.5) if total == 0 else (float(ink.sum(1) @ at[0] / total), float(ink.sum(0) @ at[1] / total))
    return PixelFacts(
        intensity=float(light.mean()),
        colour=colours.mean((0, 1)),
        grey=bool((colours == colours[..., :1]).all()),
        centre=centre,
        cells=_cells(light, 2 * GRID),
    )


def _cells(light: np.ndarray, n: int) -> np.ndarray:
    edges = [(np.arange(n + 1) * size) / n for size in light.shape]
    starts = [np.floor(e[:-1]).astype(int) for e in edges]
    stops = [np.maximum(np.ceil(e[1:]).astype(int), s + 1) for e, s in zip(edges, starts, strict=True)]
    total = np.pad(light, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    (top, left), (bottom, right) = np.meshgrid(*starts, indexing="ij"), np.meshgrid(*stops, indexing="ij")
    sums = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    return np.asarray(sums / ((bottom - top) * (right - left)))


def brightness_bins(intensity: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Quarter of the training images' brightness that each image falls into; the classes that occur in training."""
    edges = np.quantile(intensity[train], (0.25, 0.5, 0.75))
    found = np.searchsorted(edges, intensity, side="right")
    return _occurring(found, train, BINS)


def dominant_channels(colour: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Channel with the largest mean of each image, ``colour`` being (images, 3)."""
    return _occurring(colour.argmax(1), train, CHANNELS)


def ink_quadrants(centre: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Quadrant of each centre of ink, (images, 2), about the median centre of the training images."""
    below, right = (centre >= np.median(centre[train], axis=0)).T
    return _occurring(2 * below + right, train, QUADRANTS)


def _occurring(found: np.ndarray, train: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Positions among the classes that training has; -1 for images of another one."""
    kept = np.unique(found[train])
    place = np.full(len(names), -1)
    place[kept] = np.arange(len(kept))
    return place[found], tuple(names[i] for i in kept)


def image_types(cells: np.ndarray, train: np.ndarray) -> np.ndarray:
    """A type for each image that recurs: which of six parts are brighter than in the median training image.

    The control task gives each of these (at most 64) looks a label of its own: a probe can only give it back by
    recognising the look, as it can a word's control label only by recognising the word.

    Args:
        cells: brightness by part, (images, 2 * GRID, 2 * GRID).
        train: the training images.
    """
    n = cells.shape[1]
    parts = cells.reshape(len(cells), 2, n // 2, n)
    halves = parts[:, :, :, : n // 2].mean((2, 3)), parts[:, :, :, n // 2 :].mean((2, 3))
    middle = parts[:, :, :, n // 4 : 3 * n // 4].mean((2, 3))
    return _signs(np.concatenate([*halves, middle], axis=1), train)


def cell_types(cells: np.ndarray, cell: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The same for one cell of each image: which of its four parts are brighter than that part's median in training.

    Args:
        cells: brightness by part, (images, 2 * GRID, 2 * GRID).
        cell: the cell of each image, counted row by row, (images,).
        train: the training images.
    """
    row, column = np.divmod(cell, GRID)
    rows = np.arange(len(cells))
    parts = np.stack([cells[rows, 2 * row + i, 2 * column + j] for i in (0, 1) for j in (0, 1)], axis=1)
    return _signs(parts, train)


def _signs(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    brighter = values > np.median(values[train], axis=0)
    return np.array(["".join("+" if b else "-" for b in row) for row in brighter])
