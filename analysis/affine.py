"""Affine maps between states, fitted by ridge least squares from running sums, so that no text's states are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spafit.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Ridge, as a share of the mean variance of the states mapped.
RIDGE = 1e-3


class AffineFit:
    """The map ``x @ weight + bias`` that comes closest to ``y`` in squared error, with a ridge on the weight.

    The penalty is ``ridge`` times the mean variance of the columns of ``x``, times the number of items; the bias is
    free. Sums are float64; two matrices of width × width are held.

    Attributes:
        n: items added.
    """

    def __init__(self) -> None:
        self.n = 0
        self._gram: Any = 0.0
        self._cross: Any = 0.0
        self._x: Any = 0.0
        self._y: Any = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add items: ``x`` of shape (items, width), ``y`` of shape (items, width of the target)."""
        x, y = x.double(), y.double()
        self.n += len(x)
        self._gram, self._cross = self._gram + x.T @ x, self._cross + x.T @ y
        self._x, self._y = self._x + x.sum(0), self._y + y.sum(0)

    def check(self, what: str) -> None:
        """See that there are enough items.

        Raises:
            UsageError: fewer than twice the width of ``x``.
        """
        width = len(self._x)
        if self.n < 2 * width:
            raise UsageError(
                f"{what} of width {width} needs at least {2 * width} tokens; the text has {self.n}. Give a longer one."
            )

    def solve(self, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` of shape (width, width of the target) and ``bias``, both float64."""
        import torch

        mean_x, mean_y = self._x / self.n, self._y / self.n
        gram = self._gram - self.n * torch.outer(mean_x, mean_x)
        cross = self._cross - self.n * torch.outer(mean_x, mean_y)
        penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + penalty, cross)
        return weight, mean_y - mean_x @ weight
