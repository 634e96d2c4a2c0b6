"""Scalar mixes of layers and linear probes on them, many solved together: the objective and its preconditioner.

Fits differ in the layers that take part, in labels and in penalty, but share the layers. Rows are taken a few at a
time: while their layers lie in the processor's cache they are mixed for every fit, and its own products follow, one
forwards, two back (for the probe and for the mixing weights). The layers are read once per pass, whatever the number of
fits, and a pass needs far less arithmetic than one product per layer and fit.

With s the softmax of a fit's logits a over the layers that take part, and x_l the centred layers, the features are
z = γ Σ s_l x_l with γ = 1 / root mean square of Σ s_l x_l: penalties mean what they mean on standardised features.
A fit's coefficients are one row: the probe's (classes, width + 1), the intercept last, then a, (layers,).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from probing.probes.lbfgs import Point, Solution, dot, minimise
from probing.probes.solver import (
    PREFIX_MINIMUM,
    PREFIX_PENALTY,
    PREFIXES,
    PROBE_ROWS,
    Gram,
    Preconditioner,
    probabilities,
    softmax_covariance,
    softmax_residuals,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

#: Rows handled at a time: few enough for the layers and their mixes to stay in the processor's cache.
ROWS = 128
#: Fits whose mixes are held at a time, for the same reason.
TOGETHER = 8
#: Rows that give the curvature of the mixing weights.
CURVATURE_ROWS = 512
#: Added to that curvature, in nats per item, for directions that hardly change the loss.
MIX_DAMPING = 1e-3
#: Largest change of a mixing logit in one step.
MIX_STEP = 2.0
#: Rows behind each Gram matrix of the preconditioner, per feature.
GRAM_SAMPLE = 4


class Layers:
    """Centred training rows of all layers in blocks of :data:`ROWS`, in random order.

    Attributes:
        blocks: tensors (layers, rows, width).
        second: mean product of two layers' entries, float64, (layers, layers).
        n: number of rows.
    """

    def __init__(self, blocks: list[Tensor]):
        import torch

        self.blocks = blocks
        self.count, _, self.width = blocks[0].shape
        self.n = sum(b.shape[1] for b in blocks)
        self.second = torch.zeros(self.count, self.count, dtype=torch.float64, device=blocks[0].device)
        for block in blocks:
            flat = block.reshape(self.count, -1)
            self.second += (flat @ flat.T).double()
        self.second /= self.n * self.width

    def first(self, n: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the position and the layers of the first ``n`` rows, block by block."""
        for i, block in enumerate(self.blocks):
            start = i * ROWS
            if start >= n:
                return
            yield start, block if start + block.shape[1] <= n else block[:, : n - start].contiguous()


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
        last: int64, (fits,): layers 0 to ``last`` take part.
        basis: for the preconditioner.
    """

    def __init__(
        self, layers: Layers, labels: Tensor, sets: Tensor, l2: Tensor, present: Tensor, last: Tensor, *,
        basis: Basis | None = None,
    ):  # fmt: skip
        import torch

        self.layers, self.all_labels, self.sets, self.l2, self.present = layers, labels, sets, l2, present
        self.last, self.basis, self.n, self.classes = last, basis, layers.n, present.shape[1]
        own = labels[sets][:, None]
        self.column, self.other = (own - 1).clamp_min(0), (own > 0).to(l2.dtype)
        penalised = torch.ones(layers.width + 1, dtype=l2.dtype, device=l2.device)
        penalised[-1] = 0
        self.penalty = l2[:, None, None] * penalised
        self.closed = torch.arange(layers.count, device=last.device) > last[:, None]
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
        stronger = self.l2 + PREFIX_PENALTY * (1 / rows - 1 / self.n)
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

    def _scores(self, factors: Tensor, relative: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed features (fits, rows, width) and relative logits (fits, classes - 1, rows)."""
        import torch

        z = (factors @ x.flatten(1)).view(len(factors), *x.shape[1:])
        return z, torch.baddbmm(relative[:, :, -1:], relative[:, :, :-1], z.transpose(1, 2))

    def evaluate(self, coefficients: Tensor, n: int) -> MixPoint:
        """Objective and gradient on the first ``n`` rows."""
        import torch

        probe, a = self.parts(coefficients)
        s, gamma = self.mixing(a)
        factors = (gamma[:, None] * s).to(probe)
        relative = probe[:, 1:] - probe[:, :1]
        fits, probe_rows, curved = len(probe), min(n, PROBE_ROWS), min(n, CURVATURE_ROWS)
        loss = torch.zeros(fits, dtype=torch.float64, device=probe.device)
        gradient = torch.zeros_like(relative)
        by_factor = torch.zeros(fits, self.layers.count, dtype=torch.float64, device=probe.device)
        scores_kept: list[list[Tensor]] = []
        covariance: list[Tensor] = []
        curvature = torch.zeros(fits, self.layers.count, self.layers.count, dtype=torch.float64, device=probe.device)
        groups = [slice(i, min(i + TOGETHER, fits)) for i in range(0, fits, TOGETHER)]
        counted = 0
        for start, x in self.layers.first(n):
            counted += x.shape[1] if start < curved else 0
            rows = slice(start, start + x.shape[1])
            probed = max(0, min(probe_rows - start, x.shape[1]))
            kept: list[Tensor] = []
            spread: list[Tensor] = []
            for group in groups:
                column, other, own = self.column[group, :, rows], self.other[group, :, rows], relative[group]
                z, scores = self._scores(factors[group], own, x)
                if self.barred is not None:
                    scores += self.barred[group]
                kept.append(scores[:, :, :probed].clone())
                part_loss, p = softmax_residuals(scores, column, other, probed)
                loss[group] += part_loss
                gradient[group, :, :-1].baddbmm_(scores, z)
                gradient[group, :, -1] += scores.sum(2)
                back = torch.bmm(scores.transpose(1, 2), own[:, :, :-1], out=z)
                by_factor[group] += (back.flatten(1) @ x.flatten(1).T).double()
                if probed > 0:
                    spread.append(softmax_covariance(p) / probe_rows)
                if start < curved:
                    curvature[group] += _curvature(own, x, p)
            if probed > 0:
                scores_kept.append(kept)
                covariance = spread if not covariance else [c + d for c, d in zip(covariance, spread, strict=True)]
        shrink = self.penalty * probe
        value = loss / n + 0.5 * (shrink * probe).sum((1, 2), dtype=torch.float64)
        later = gradient / n
        by_probe = torch.cat([-later.sum(1, keepdim=True), later], 1) + shrink
        slopes = self._slopes(s, gamma)
        by_logit = ((by_factor / n)[:, None] @ slopes)[:, 0]
        return MixPoint(
            value,
            torch.cat([by_probe.flatten(1), by_logit.to(probe)], 1)[:, None],
            torch.cat([torch.cat(kept) for kept in scores_kept], 2),
            torch.cat(covariance),
            slopes.transpose(1, 2) @ (curvature / counted) @ slopes,
            coefficients,
        )

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
        import torch

        assert isinstance(point, MixPoint)
        (probe, a), (probe_step, a_step) = self.parts(point.coefficients), self.parts(direction)
        s, gamma = self.mixing(a)
        factors = (gamma[:, None] * s).to(probe)
        factor_step = (self._slopes(s, gamma) @ a_step[:, :, None].double())[:, :, 0].to(probe)
        relative, relative_step = probe[:, 1:] - probe[:, :1], probe_step[:, 1:] - probe_step[:, :1]
        without = torch.cat([relative[:, :, :-1], torch.zeros_like(relative[:, :, -1:])], 2)
        rows = point.scores.shape[2]
        curvature = torch.zeros_like(slope)
        for start, x in self.layers.first(rows):
            before = point.scores[:, :, start : start + x.shape[1]]
            change = self._scores(factors, relative_step, x)[1] + self._scores(factor_step, without, x)[1]
            gained = probabilities(before + change)[:, 1:] - probabilities(before)[:, 1:]
            curvature += (gained * change).sum((1, 2))
        curvature = curvature / rows + dot(self.penalty * probe_step, probe_step)
        length = (-slope / curvature.clamp_min(1e-30)).clamp(0.1, 5.0)
        length = length if rows == self.n else length.sqrt()
        return length.minimum(MIX_STEP / a_step.abs().amax(1).clamp_min(1e-30))


def _curvature(relative: Tensor, x: Tensor, p: Tensor) -> Tensor:
    """Sum over rows of the Gauss-Newton curvature by the factors, (fits, layers, layers), float64."""
    weights = relative[:, :, :-1]
    p = p[:, 1:]
    u = (
        (weights.flatten(0, 1) @ x.flatten(0, 1).T)
        .view(*weights.shape[:2], *x.shape[:2])
        .transpose(1, 2)[..., : p.shape[2]]
    )
    weighted = u * p[:, None]
    total = weighted.sum(2)
    return (weighted.flatten(2) @ u.flatten(2).transpose(1, 2) - total @ total.transpose(1, 2)).double()


class Basis:
    """Eigenvectors of each fit's features; fits with the same layers share those of their mean mix.

    Attributes:
        grams: one per number of layers that take part.
        which: position of each fit's in ``grams``, (fits,).
        spectrum: see :class:`probing.probes.solver.Rotation`; (fits, 1, width + 1).
    """

    def __init__(self, grams: list[Gram], which: Tensor):
        import torch

        self.grams, self.which = grams, which
        self.spectrum = torch.stack([g.spectrum for g in grams])[which][:, None]

    @classmethod
    def at(cls, fits: Mixes, coefficients: Tensor) -> Basis:
        """The basis for the mixes at ``coefficients``."""
        import torch

        s, gamma = fits.mixing(fits.parts(coefficients)[1])
        lasts, which = fits.last.unique(return_inverse=True)
        factors = torch.stack([(gamma[:, None] * s)[which == i].mean(0) for i in range(len(lasts))]).float()
        sample = list(fits.layers.first(max(PROBE_ROWS, GRAM_SAMPLE * fits.layers.width)))
        grams = []
        for factor in factors:
            rows = [(factor[None] @ x.flatten(1)).view(x.shape[1:]) for _, x in sample]
            mixed = torch.cat(rows)
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

        out = torch.empty_like(v)
        for i, gram in enumerate(self.grams):
            members = (self.which == i).nonzero().squeeze(1)
            if len(members):
                out[members] = getattr(gram, way)(v[members])
        return out


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
        rows = int(share * fits.n)
        if rows >= PREFIX_MINIMUM // 2:
            fits.basis = Basis.at(fits, start)
            start = minimise(fits.on_prefix(rows), start, rows=rows, tolerance=tolerance, passes=passes).coefficients
    fits.basis = Basis.at(fits, start)
    return minimise(fits, start, rows=fits.n, tolerance=tolerance, passes=max_iterations)
