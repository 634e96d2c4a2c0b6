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
#: Rows in memory at a time.
ROWS = 8192


def _chunks(x: np.ndarray | torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Float32 rows of one representation on the host, some at a time."""
    import torch

    for start in range(0, len(x), ROWS):
        part = slice(start, min(start + ROWS, len(x)))
        rows = x[part]
        if not torch.is_tensor(rows):
            rows = torch.from_numpy(np.array(rows, dtype=np.float32))
        yield part, rows.detach().to("cpu", torch.float32)


def moments(x: np.ndarray | torch.Tensor, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and population standard deviation of every column, summed in float64.

    Args:
        x: (n, width), any float type.
        b: position of the representation, for messages.

    Returns:
        Float32 mean (width,), float32 scale (width,) with 1 for columns that do not vary, and a mask of those columns.

    Raises:
        NumericalError: NaN or infinite values.
    """
    import torch

    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for part, rows in _chunks(x):
        if not bool(torch.isfinite(rows.sum(dtype=torch.float64))):
            bad = int((~torch.isfinite(rows).all(1)).nonzero()[0]) + part.start
            raise NumericalError(
                f"Representation {b} of the training features holds NaN or infinite values (first in item {bad}). "
                "Extract in float32, or leave those items out."
            )
        total += rows.sum(0, dtype=torch.float64)
    mean = total / len(x)
    squares = torch.zeros_like(total)
    for _, rows in _chunks(x):
        squares += (rows.double() - mean).square().sum(0)
    deviation = (squares / len(x)).sqrt()
    constant = deviation <= CONSTANT * torch.finfo(torch.float32).eps * mean.abs()
    scale = deviation.masked_fill(constant, 1.0)
    return mean.float().numpy(), scale.float().numpy(), constant.numpy()


def standardised_rows(
    x: np.ndarray | torch.Tensor, mean: np.ndarray, scale: np.ndarray, b: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of rows with their standardised features, float32 on the host.

    Raises:
        NumericalError: NaN or infinite values.
    """
    import torch

    for part, rows in _chunks(x):
        standardised = (rows - torch.from_numpy(mean)) / torch.from_numpy(scale)
        if not bool(torch.isfinite(standardised.sum(dtype=torch.float64))):
            bad = int((~torch.isfinite(standardised).all(1)).nonzero()[0]) + part.start
            raise NumericalError(
                f"Representation {b} holds NaN or infinite values (first in item {bad}). Extract in float32, or leave "
                "those items out."
            )
        yield part, standardised
