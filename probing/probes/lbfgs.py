"""L-BFGS on many objectives together, each with its own steps, history and stopping point.

What differs between families of probes, the objective, its preconditioner and the first step to try, comes from a
:class:`Problem`. Fits that are done leave the batch; the last step of a fit is taken without another pass to confirm
it. Coefficients have three axes, the first of which counts fits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

#: Iterations whose curvature is remembered per fit.
MEMORY = 10
#: Shorter steps tried in a row before a fit is left where it is.
REFUSALS = 8


@dataclass
class Solution:
    """Where the fits stopped.

    Attributes:
        coefficients: shaped like the start.
        gap: estimate of the objective's distance from its minimum before the last step, nats per item, (fits,).
        passes: evaluations on all rows, (fits,).
    """

    coefficients: Tensor
    gap: Tensor
    passes: Tensor


@dataclass
class Point:
    """An objective and what belongs to it at one place.

    Attributes:
        value: the objective, float64, (fits,).
        gradient: shaped like the coefficients.
        scores: logits of the first rows, relative to the first class, (fits, classes - 1, probe rows).
        covariance: mean softmax covariance on those rows, (fits, classes, classes), or its diagonal, (fits, classes).
    """

    value: Tensor
    gradient: Tensor
    scores: Tensor
    covariance: Tensor

    def take(self, index: Tensor) -> Self:
        """The points of the fits at ``index``."""
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    def where(self, accepted: Tensor, other: Self) -> Self:
        """``other`` for the accepted fits, this point for the rest."""
        if bool(accepted.all()):
            return other
        import torch

        pairs = [(getattr(other, f.name), getattr(self, f.name)) for f in fields(self)]
        return type(self)(*(torch.where(accepted.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in pairs))


class Inverse(Protocol):
    """Approximate inverse Hessian of many fits."""

    def apply(self, v: Tensor) -> Tensor:
        """Inverse times ``v``."""


class Preconditioner(Inverse, Protocol):
    """An inverse that also tells how far the minimum is."""

    def gap(self, gradient: Tensor) -> Tensor:
        """Estimated distance of each objective from its minimum, (fits,)."""


class Problem(Protocol):
    """Many objectives that :func:`minimise` can work on together; :class:`Fits` are some."""

    def take(self, index: Tensor) -> Self:
        """The problems at ``index``."""

    def evaluate(self, coefficients: Tensor, n: int) -> Point:
        """Objective and gradient on the first ``n`` rows."""

    def preconditioner(self, point: Point) -> Preconditioner:
        """Approximate inverse Hessian at ``point``."""

    def step_length(self, point: Point, direction: Tensor, slope: Tensor) -> Tensor:
        """First step to try along ``direction``, (fits,)."""


P = TypeVar("P", bound=Problem)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over all but the first axis, (fits,)."""
    return (a * b).sum((1, 2))


class History:
    """Steps and gradient changes of the last iterations; a weight of zero marks a pair that is not used."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, index: Tensor) -> None:
        """Keep the fits at ``index``."""
        self.pairs = [(step[index], change[index], weight[index]) for step, change, weight in self.pairs]

    def push(self, step: Tensor, change: Tensor, accepted: Tensor) -> None:
        """Remember a step and the gradient's change along it, where it was accepted."""
        product = dot(step, change)
        # A pair without positive curvature (rounding, near the minimum) would make the approximation indefinite.
        useful = accepted & (product > 1e-10 * dot(change, change)) & (product > 0)
        weight = (1 / product).where(useful, product.new_zeros(()))
        self.pairs = [*self.pairs[-(MEMORY - 1) :], (step, change, weight)]

    def direction(self, gradient: Tensor, inverse: Inverse) -> Tensor:
        """Minus the approximate inverse Hessian times the gradient (two-loop recursion)."""
        q, used = gradient, []
        for step, change, weight in reversed(self.pairs):
            a = weight * dot(step, q)
            used.append(a)
            q = q - a[:, None, None] * change
        q = inverse.apply(q)
        if self.pairs:
            _, change, weight = self.pairs[-1]
            size = weight * dot(change, inverse.apply(change))
            q = q * (1 / size).where(size > 0, size.new_ones(()))[:, None, None]
        for (step, change, weight), a in zip(self.pairs, reversed(used), strict=True):
            q = q + (a - weight * dot(change, q))[:, None, None] * step
        return -q


def minimise(fits: P, start: Tensor, *, rows: int, tolerance: float, passes: int) -> Solution:
    """L-BFGS on the first ``rows`` rows, whatever their number; see :func:`solve`."""
    import torch

    solution = Solution(
        start.clone(),
        torch.full((len(start),), torch.inf, dtype=torch.float64, device=start.device),
        torch.zeros(len(start), dtype=torch.int64, device=start.device),
    )
    active, history = torch.arange(len(start), device=start.device), History()
    place, point = start, fits.evaluate(start, rows)
    refused = torch.zeros_like(active)
    direction, slope, length = torch.zeros_like(start), start.new_zeros(len(start)), start.new_ones(len(start))
    for count in range(1, passes + 1):
        inverse = fits.preconditioner(point)
        gap = inverse.gap(point.gradient)
        # A fit whose last step was refused tries a shorter one along the same line while the others go on.
        again = refused > 0
        direction = torch.where(again[:, None, None], direction, history.direction(point.gradient, inverse))
        slope = dot(point.gradient, direction)
        length = torch.where(again, 0.25 * length, fits.step_length(point, direction, slope))
        step = length[:, None, None] * direction

        done = (gap < tolerance) | (refused > REFUSALS) if count < passes else torch.ones_like(again)
        if bool(done.any()):
            settled = torch.where((refused > 0)[:, None, None], place, place + step)
            stopped = active[done]
            solution.coefficients[stopped] = settled[done]
            solution.gap[stopped], solution.passes[stopped] = gap[done], count
            keep = (~done).nonzero().squeeze(1)
            if not len(keep):
                break
            fits, point = fits.take(keep), point.take(keep)
            history.take(keep)
            active, place, refused, direction, slope, length, step = (
                v[keep] for v in (active, place, refused, direction, slope, length, step)
            )

        trial = fits.evaluate(place + step, rows)
        enough = point.value + 1e-4 * (length * slope).double() + 1e-7 * (1 + point.value)
        accepted = trial.value <= enough
        refused = torch.where(accepted, 0, refused + 1)
        history.push(step, trial.gradient - point.gradient, accepted)
        place = torch.where(accepted[:, None, None], place + step, place)
        point = point.where(accepted, trial)
    return solution
