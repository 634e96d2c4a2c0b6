"""Scalar mixes of layers and linear probes on them, many solved together: the objective and its preconditioner.

Fits differ in the layers that take part, in labels and in penalty, but share the layers: for each layer, one product
with the stacked weights of all fits that read it goes forwards, and one with their residuals goes back. The slopes by
the mixing weights follow from the latter without a product of their own.

With s the softmax of a fit's logits a over the layers that take part, and x_l the centred layers, the features are
z = γ Σ s_l x_l with γ = 1 / root mean square of Σ s_l x_l: penalties mean what they mean on standardised features.
A fit's coefficients are one row: the probe's (classes, width + 1), the intercept last, then a, (layers,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from probing.probes.lbfgs import Point, Solution, dot, minimise
from probing.probes.solver import (
    BLOCK,
    PREFIX_MINIMUM,
    PREFIX_PENALTY,
    PREFIXES,
    Gram,
    Preconditioner,
    probabilities,
    softmax_covariance,
    softmax_residuals,
)

if TYPE_CHECKING:
    from torch import Tensor

#: Rows that give the class covariance and the curvature along a step.
PROBE_ROWS = 512
#: Rows that give the curvature of the mixing weights.
CURVATURE_ROWS = 256
#: Added to that curvature, in nats per item, for directions that hardly change the loss.
MIX_DAMPING = 1e-3
#: Largest change of a mixing logit in one step.
MIX_STEP = 2.0
#: Rows behind each Gram matrix of the preconditioner, at least; four per feature where that is more.
GRAM_ROWS = 2048


class Layers:
    """Centred training rows of all layers, in random order.

    Attributes:
        rows: float32, (layers, n, width).
        second: mean product of two layers' entries, float64, (layers, layers).
    """

    def __init__(self, rows: Tensor):
        import torch

        self.rows = rows
        self.count, self.n, self.width = rows.shape
        self.second = torch.zeros(self.count, self.count, dtype=torch.float64, device=rows.device)
        for start in range(0, self.n, 512):
            flat = rows[:, start : start + 512].flatten(1)
            self.second += (flat @ flat.T).double()
        self.second /= self.n * self.width


@dataclass
class MixPoint(Point):
    """As :class:`~probing.probes.lbfgs.Point`, with the curvature of the mixing logits and the place itself.

    Attributes:
        curvature: Gauss-Newton curvature by the mixing logits, float64, (fits, layers, layers).
        coefficients: where the point is, (fits, 1, coefficients).
    """

    curvature: Tensor
    coefficients: Tensor


class Mixes:
    """Problems: minimise mean log loss of the probe on the mix + l2/2 · ‖weights‖², over weights, intercepts and a.

    Args:
        layers: the training rows.
        labels: int64, (label sets, n).
        sets: int64, (fits,), the label set of each fit.
        l2: float32, (fits,).
        present: bool, (fits, classes); class 0 must take part, see :class:`probing.probes.solver.Fits`.
        last: int64, (fits,), descending: layers 0 to ``last`` take part.
        basis: for the preconditioner.
    """

    def __init__(
        self, layers: Layers, labels: Tensor, sets: Tensor, l2: Tensor, present: Tensor, last: Tensor, *,
        basis: Basis | None = None,
    ):  # fmt: skip
        import torch

        self.layers, self.all_labels, self.sets, self.l2, self.present = layers, labels, sets, l2, present
        self.last, self.basis, self.classes = last, basis, present.shape[1]
        own = labels[sets][:, None]
        self.column, self.other = (own - 1).clamp_min(0), (own > 0).to(l2.dtype)
        penalised = torch.ones(layers.width + 1, dtype=l2.dtype, device=l2.device)
        penalised[-1] = 0
        self.penalty = l2[:, None, None] * penalised
        self.closed = torch.arange(layers.count, device=last.device) > last[:, None]
        #: How many fits read each layer (they come first), as far as any does.
        self.readers = [count for count in (~self.closed).sum(0).tolist() if count]
        self.barred = None
        if not bool(present.all()):
            self.barred = torch.where(present[:, 1:], 0.0, -torch.inf).to(l2.dtype)[:, :, None]

    def take(self, index: Tensor) -> Mixes:
        """The problems at ``index``."""
        basis = None if self.basis is None else self.basis.take(index)
        chosen = self.sets[index], self.l2[index], self.present[index], self.last[index]
        return Mixes(self.layers, self.all_labels, *chosen, basis=basis)

    def on_prefix(self, rows: int) -> Mixes:
        """The same problems, with the penalties that suit a prefix of so many rows."""
        stronger = self.l2 + PREFIX_PENALTY * (1 / rows - 1 / self.layers.n)
        fixed = self.sets, stronger, self.present, self.last
        return Mixes(self.layers, self.all_labels, *fixed, basis=self.basis)

    def start(self) -> Tensor:
        """Coefficients of zero: equal weights for the layers that take part."""
        import torch

        size = self.classes * (self.layers.width + 1) + self.layers.count
        return torch.zeros(len(self.l2), 1, size, dtype=self.l2.dtype, device=self.l2.device)

    def parts(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """The probe's coefficients (fits, classes, width + 1) and mixing logits (fits, layers), as views."""
        flat, size = coefficients[:, 0], self.classes * (self.layers.width + 1)
        return flat[:, :size].view(len(flat), self.classes, -1), flat[:, size:]

    def mixing(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Mixing weights s, (fits, layers), and scales γ, (fits,), in float64."""
        s = a.double().masked_fill(self.closed, float("-inf")).softmax(1)
        square = ((s @ self.layers.second) * s).sum(1)
        # Layers that are constant leave nothing to scale.
        return s, (square + 1e-12 * self.layers.second.diagonal().mean().clamp_min(1e-30)).rsqrt()

    def _scores(self, weights: list[Tensor], bias: Tensor, rows: slice) -> Tensor:
        """Relative logits (fits, classes - 1, rows) of each layer's weights (readers × (classes - 1), width)."""
        import torch

        layers = self.layers.rows[:, rows].transpose(1, 2)
        scores = torch.addmm(bias.view(-1, 1), weights[0], layers[0])  # every fit reads layer 0
        for own, layer in zip(weights[1:], layers[1:], strict=False):
            scores[: len(own)].addmm_(own, layer)
        return scores.view(*bias.shape, -1)

    def _per_layer(self, factors: Tensor, relative: Tensor) -> list[Tensor]:
        """Factors (fits, layers) times weights (fits, classes - 1, width), for the readers of each layer."""
        return [
            (factors[:readers, layer, None, None] * relative[:readers]).flatten(0, 1)
            for layer, readers in enumerate(self.readers)
        ]

    def evaluate(self, coefficients: Tensor, n: int) -> MixPoint:
        """Objective and gradient on the first ``n`` rows, in blocks of rows."""
        import torch

        probe, a = self.parts(coefficients)
        s, gamma = self.mixing(a)
        factors = (gamma[:, None] * s).to(probe)
        relative, bias = _relative(probe)
        weights = self._per_layer(factors, relative)
        fits, classes, width = relative.shape
        loss = torch.zeros(fits, dtype=torch.float64, device=probe.device)
        by_layer = [relative.new_zeros(readers * classes, width) for readers in self.readers]
        by_bias = torch.zeros_like(bias)
        probe_rows = min(n, PROBE_ROWS)
        kept: list[Tensor] = []
        covariance: Tensor | float = 0.0
        step = max(256, BLOCK // (fits * self.classes))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            column, other = self.column[:, :, rows], self.other[:, :, rows]
            scores = self._scores(weights, bias, rows)
            if self.barred is not None:
                scores += self.barred
            probed = max(0, min(probe_rows, rows.stop) - start)
            if probed > 0:
                kept.append(scores[:, :, :probed].clone())
            part_loss, p = softmax_residuals(scores, column, other, probed)
            loss += part_loss
            if probed > 0:
                covariance = covariance + softmax_covariance(p) / probe_rows
            by_bias += scores.sum(2)
            flat = scores.view(fits * classes, -1)
            for layer, own in enumerate(by_layer):
                own.addmm_(flat[: len(own)], self.layers.rows[layer, rows])
        shrink = self.penalty * probe
        value = loss / n + 0.5 * (shrink * probe).sum((1, 2), dtype=torch.float64)
        gradient = torch.zeros_like(relative)
        by_factor = torch.zeros_like(s)
        for layer, readers in enumerate(self.readers):
            own = by_layer[layer].view(readers, classes, width)
            gradient[:readers] += factors[:readers, layer, None, None] * own
            by_factor[:readers, layer] = (own * relative[:readers]).sum((1, 2), dtype=torch.float64)
        later = torch.cat([gradient, by_bias[:, :, None]], 2) / n
        # The residuals of all classes sum to zero, so those of the first follow from the others.
        by_probe = torch.cat([-later.sum(1, keepdim=True), later], 1) + shrink
        slopes = self._slopes(s, gamma)
        by_logit = ((by_factor / n)[:, None] @ slopes)[:, 0]
        scores = torch.cat(kept, 2)
        assert isinstance(covariance, torch.Tensor)
        return MixPoint(
            value,
            torch.cat([by_probe.flatten(1), by_logit.to(probe)], 1)[:, None],
            scores,
            covariance,
            slopes.transpose(1, 2) @ self._curvature(relative, scores) @ slopes,
            coefficients,
        )

    def _curvature(self, relative: Tensor, scores: Tensor) -> Tensor:
        """Gauss-Newton curvature by the factors γ s_l on the first rows, (fits, layers, layers), float64."""
        fits, classes, width = relative.shape
        count = min(CURVATURE_ROWS, scores.shape[2])
        u = relative.new_zeros(fits, self.layers.count, classes, count)
        for layer, readers in enumerate(self.readers):
            own = relative[:readers].reshape(readers * classes, width) @ self.layers.rows[layer, :count].T
            u[:readers, layer] = own.view(readers, classes, count)
        weighted = u * probabilities(scores[:, :, :count])[:, None, 1:]
        total = weighted.sum(2)
        found = weighted.flatten(2) @ u.flatten(2).transpose(1, 2) - total @ total.transpose(1, 2)
        return found.double() / count

    def _slopes(self, s: Tensor, gamma: Tensor) -> Tensor:
        """Derivatives of the factors γ s_l by the mixing logits, (fits, layers, layers)."""
        import torch

        products = s @ self.layers.second
        square = (products * s).sum(1, keepdim=True)
        direct = torch.diag_embed(s) - s[:, :, None] * s[:, None]
        scale = -(gamma[:, None] ** 2) * s * (products - square)
        return gamma[:, None, None] * (direct + s[:, :, None] * scale[:, None])

    def preconditioner(self, point: Point) -> MixPreconditioner:
        """Approximate inverse Hessian at ``point``."""
        assert isinstance(point, MixPoint)
        return MixPreconditioner(self, point)

    def step_length(self, point: Point, direction: Tensor, slope: Tensor) -> Tensor:
        """Step along ``direction``; see :meth:`probing.probes.solver.Fits.step_length`."""
        assert isinstance(point, MixPoint)
        (probe, a), (probe_step, a_step) = self.parts(point.coefficients), self.parts(direction)
        s, gamma = self.mixing(a)
        factors = (gamma[:, None] * s).to(probe)
        factor_step = (self._slopes(s, gamma) @ a_step[:, :, None].double())[:, :, 0].to(probe)
        relative, (relative_step, bias_step) = _relative(probe)[0], _relative(probe_step)
        pairs = zip(self._per_layer(factors, relative_step), self._per_layer(factor_step, relative), strict=True)
        weights = [a + b for a, b in pairs]
        rows = point.scores.shape[2]
        change = self._scores(weights, bias_step, slice(0, rows))
        # The first class's relative logit does not change, so its probability drops out.
        before, after = (probabilities(v)[:, 1:] for v in (point.scores, point.scores + change))
        curvature = ((after - before) * change).sum((1, 2)) / rows + dot(self.penalty * probe_step, probe_step)
        length = (-slope / curvature.clamp_min(1e-30)).clamp(0.1, 5.0)
        length = length if rows == self.layers.n else length.sqrt()
        return length.minimum(MIX_STEP / a_step.abs().amax(1).clamp_min(1e-30))


def _relative(probe: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (fits, classes - 1, width) and intercepts (fits, classes - 1) relative to the first class."""
    relative = probe[:, 1:] - probe[:, :1]
    return relative[:, :, :-1].contiguous(), relative[:, :, -1].contiguous()


class Basis:
    """Eigenvectors of each fit's features; fits with the same layers share those of their mean mix.

    Attributes:
        grams: one per number of layers that take part.
        which: position of each fit's in ``grams``, (fits,); fits that share one lie side by side.
        spectrum: see :class:`probing.probes.solver.Rotation`; (fits, 1, width + 1).
    """

    def __init__(self, grams: list[Gram], which: Tensor):
        import torch

        self.grams, self.which = grams, which
        self.spectrum = torch.stack([g.spectrum for g in grams])[which][:, None]
        found, counts = which.unique_consecutive(return_counts=True)
        self.runs = [(grams[i], count) for i, count in zip(found.tolist(), counts.tolist(), strict=True)]

    @classmethod
    def at(cls, fits: Mixes, coefficients: Tensor) -> Basis:
        """The basis for the mixes at ``coefficients``."""
        import torch

        s, gamma = fits.mixing(fits.parts(coefficients)[1])
        lasts, which = fits.last.unique(return_inverse=True)
        factors = torch.stack([(gamma[:, None] * s)[which == i].mean(0) for i in range(len(lasts))]).float()
        sample = fits.layers.rows[:, : max(GRAM_ROWS, 4 * fits.layers.width)]
        grams = []
        for factor in factors:
            mixed = torch.einsum("l,lnd->nd", factor, sample)
            grams.append(Gram(torch.cat([mixed, mixed.new_ones(len(mixed), 1)], 1)))
        return cls(grams, which)

    def take(self, index: Tensor) -> Basis:
        """The bases of the fits at ``index``."""
        return Basis(self.grams, self.which[index])

    def enter(self, v: Tensor) -> Tensor:
        """Coefficients of the features -> coefficients in the bases."""
        return self._each(v, "enter")

    def leave(self, v: Tensor) -> Tensor:
        """Coefficients in the bases -> coefficients of the features."""
        return self._each(v, "leave")

    def _each(self, v: Tensor, way: Literal["enter", "leave"]) -> Tensor:
        import torch

        parts = torch.split(v, [count for _, count in self.runs])
        return torch.cat([getattr(gram, way)(part) for (gram, _), part in zip(self.runs, parts, strict=True)])


class MixPreconditioner:
    """Approximate inverse Hessian: a Kronecker product for the probe, a matrix for the logits, nothing between."""

    def __init__(self, fits: Mixes, point: MixPoint):
        import torch

        assert fits.basis is not None
        self.fits = fits
        self.probe = Preconditioner(fits.penalty, point.covariance, fits.basis, None)
        slopes = fits.parts(point.gradient)[1].double().abs()
        # A weight on its way to zero has the curvature of its own slope: the loss is linear in s, s exponential in a.
        matrix = point.curvature + torch.diag_embed(slopes + MIX_DAMPING)
        self.factor = torch.linalg.cholesky(matrix)

    def apply(self, v: Tensor) -> Tensor:
        """Damped inverse times ``v``."""
        import torch

        probe, a = self.fits.parts(v)
        moved = torch.cholesky_solve(a.double()[:, :, None], self.factor)[:, :, 0].to(a)
        return torch.cat([self.probe.apply(probe).flatten(1), moved], 1)[:, None]

    def gap(self, gradient: Tensor) -> Tensor:
        """Distance of each objective from its minimum if it were a parabola with this Hessian."""
        import torch

        probe, a = self.fits.parts(gradient)
        a = a.double()[:, :, None]
        return self.probe.gap(probe) + 0.5 * (a * torch.cholesky_solve(a, self.factor)).sum((1, 2))


def solve_mixes(fits: Mixes, *, tolerance: float, max_iterations: int) -> Solution:
    """Minimise every fit's objective from equal weights, first on growing prefixes of the rows if there are many.

    Args:
        fits: the problems.
        tolerance: a fit stops when its estimated distance from the minimum is below this many nats per item; it then
            takes one more step.
        max_iterations: passes over all rows after which a fit is given up.
    """
    start = fits.start()
    for share, passes in PREFIXES:
        rows = int(share * fits.layers.n)
        if rows >= PREFIX_MINIMUM // 2:
            fits.basis = Basis.at(fits, start)
            start = minimise(fits.on_prefix(rows), start, rows=rows, tolerance=tolerance, passes=passes).coefficients
    fits.basis = Basis.at(fits, start)
    return minimise(fits, start, rows=fits.layers.n, tolerance=tolerance, passes=max_iterations)
