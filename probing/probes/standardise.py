"""Standardisation on the training rows, some rows at a time, so that memory-mapped states are never copied whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from spafit.errors import NumericalError

if TYPE_CHECKING:
    import torch

#: A standard deviation below this many float32 roundings of its column's mean counts as zero.
CONSTANT = 8
_EPS = float(np.finfo(np.float32).eps)
#: Rows handled at a time: few enough for the processor's cache.
ROWS = 1024


def chunks(x: np.ndarray | torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of rows with those rows of ``x`` (n, width) as float32 on the host."""
    import torch

    for start in range(0, len(x), ROWS):
        part = slice(start, min(start + ROWS, len(x)))
        rows = x[part]
        if not torch.is_tensor(rows):
            rows = torch.from_numpy(np.array(rows, dtype=np.float32))
        yield part, rows.detach().to("cpu", torch.float32)


def moments(x: np.ndarray | torch.Tensor, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and population standard deviation of every column.

    Args:
        x: (n, width), any float type.
        b: position of the representation, for messages.

    Returns:
        Float32 mean (width,), float32 scale (width,) with 1 for columns that do not vary, and a mask of those columns.

    Raises:
        NumericalError: NaN or infinite values, or a standard deviation beyond float32.
    """
    import torch

    total = squares = torch.zeros(x.shape[1], dtype=torch.float64)
    shift: torch.Tensor | None = None
    for _, rows in chunks(x):
        if shift is None:
            # A constant column minus this is exactly zero, and any other loses little in the difference of squares.
            shift = rows.double().mean(0).float()
        moved = rows - shift
        ones = moved.new_ones(1, len(moved))
        total = total + (ones @ moved)[0].double()
        squares = squares + (ones @ moved.square_())[0].double()
    assert shift is not None
    offset = total / len(x)
    mean = shift.double() + offset
    variance = squares / len(x) - offset.square()
    # Very small or very large values (LayerNorm weights of 1e-31 exist) leave float32 when squared: float64 for those.
    doubtful = ~(torch.isfinite(variance) & (variance > (CONSTANT * _EPS * mean).square()) & (squares > 1e-30))
    if bool(doubtful.any()):
        mean[doubtful], variance[doubtful] = _exact_moments(x, doubtful)
    deviation = variance.sqrt()
    if not bool(torch.isfinite(mean).all() & torch.isfinite(deviation).all() & (deviation < 1e38).all()):
        raise NumericalError(
            f"Representation {b} of the training features holds {_first_bad(x)}. Extract in float32, or leave those "
            "items out."
        )
    constant = deviation <= (CONSTANT * _EPS * mean.abs()).clamp_min(1e-37)
    scale = deviation.masked_fill(constant, 1.0)
    return mean.float().numpy(), scale.float().numpy(), constant.numpy()


def _exact_moments(x: np.ndarray | torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of some columns in float64, in two passes."""
    import torch

    mean = torch.zeros(int(columns.sum()), dtype=torch.float64)
    for _, rows in chunks(x):
        mean += rows[:, columns].double().sum(0)
    mean /= len(x)
    variance = torch.zeros_like(mean)
    for _, rows in chunks(x):
        variance += (rows[:, columns].double() - mean).square().sum(0)
    return mean, variance / len(x)


def standardised_rows(
    x: np.ndarray | torch.Tensor, mean: np.ndarray, scale: np.ndarray, b: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of rows with their standardised features, float32 on the host.

    Raises:
        NumericalError: NaN or infinite values.
    """
    import torch

    centre, factor = torch.from_numpy(mean), 1 / torch.from_numpy(scale)
    for part, rows in chunks(x):
        standardised = (rows - centre).mul_(factor)
        if not bool(torch.isfinite(standardised.sum())):
            raise NumericalError(
                f"Representation {b} holds {_first_bad(x)}. Extract in float32, or leave those items out."
            )
        yield part, standardised


def _first_bad(x: np.ndarray | torch.Tensor) -> str:
    import torch

    for part, rows in chunks(x):
        bad = (~torch.isfinite(rows).all(1)).nonzero()
        if len(bad):
            return f"NaN or infinite values (first in item {int(bad[0]) + part.start})"
    return "values too large for float32 arithmetic"
