"""Many L2-penalised multinomial logistic regressions on one feature matrix, solved together.

The fits of one representation differ in labels and in penalty but share their features, so one product of the features
with all stacked coefficients serves every fit. L-BFGS runs on all of them at once (:mod:`probing.probes.lbfgs`). Few
passes over the data are needed because

* the inverse Hessian starts from a Kronecker approximation: eigenvectors of the Gram matrix for the features and of the
  mean softmax covariance for the classes, damped, plus the penalty (exact where all items get the same prediction);
* the length of each step comes from the curvature along it on a few rows, so that trial steps are hardly ever refused;
* with many rows, the first iterations run on growing prefixes of the shuffled rows.

Objectives are in nats per item here; callers convert to bits. Losses accumulate in float64, products run in float32.
Coefficients have shape (fits, classes, width + 1), the intercept last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from probing.probes.lbfgs import Point, Solution, dot, minimise

if TYPE_CHECKING:
    from torch import Tensor

#: Added to the class covariance's eigenvalues: without it, steps are far too long once most items are predicted well.
DAMPING = 0.02
#: Scores computed at a time (fits × classes × rows): about what a processor's cache holds.
BLOCK = 2**18
#: Rows that give the class covariance and the curvature along a step.
PROBE_ROWS = 2048
#: Shares of the rows, and passes over each, before all rows are used; prefixes below ``PREFIX_MINIMUM`` are skipped.
PREFIXES = ((0.1, 6), (0.3, 4))
PREFIX_MINIMUM = 3000
#: Penalty added on a prefix of m of n rows, times (1/m - 1/n): fewer rows tie the coefficients down less.
PREFIX_PENALTY = 30.0
#: Rows behind the Gram matrix of the preconditioner, at least; four per feature where that is more.
GRAM_ROWS = 8192
#: Class blocks serve fits with at most this penalty; the rows drawn for each are this many per coefficient.
BLOCK_L2 = 0.02
BLOCK_SAMPLE = 4
#: Mean curvature p(1 - p) of a class below which fewer rows are drawn.
BLOCK_CURVATURE = 0.02
#: Added to the blocks' diagonals beside the penalty.
BLOCK_DAMPING = 2e-3
#: Blocks are used where they cost at most so many passes over all rows, and hold at most so many numbers.
BLOCK_PASSES = 4.0
BLOCK_NUMBERS = 2**26
#: Above this many classes the class covariance's diagonal stands for the whole of it.
FULL_COVARIANCE = 128


class Fits:
    """Problems on the same features: minimise mean log loss + l2/2 · ‖weights‖², the intercept unpenalised.

    Args:
        rows: float32, (n, width + 1), standardised features and a column of ones. The order of the rows must be random:
            prefixes act as samples.
        labels: int64, (label sets, n).
        sets: int64, (fits,), the label set of each fit.
        l2: float32, (fits,).
        present: bool, (fits, classes); classes that do not take part get probability zero. Class 0 must take part: the
            other classes' logits are taken relative to its own, which spares its share of every product.
        gram: eigenvectors of the features, for the preconditioner.
        blocks: class blocks of the Hessian, where they are used.
    """

    def __init__(
        self, rows: Tensor, labels: Tensor, sets: Tensor, l2: Tensor, present: Tensor, *, gram: Gram,
        blocks: Blocks | None = None,
    ):  # fmt: skip
        import torch

        self.gram, self.blocks = gram, blocks
        self.rows, self.all_labels, self.sets, self.l2, self.present = rows, labels, sets, l2, present
        own = labels[sets][:, None]
        self.column, self.other = (own - 1).clamp_min(0), (own > 0).to(rows.dtype)
        self.n, self.width, self.classes = rows.shape[0], rows.shape[1] - 1, present.shape[1]
        penalised = torch.ones(self.width + 1, dtype=l2.dtype, device=l2.device)
        penalised[-1] = 0
        self.penalty = l2[:, None, None] * penalised
        self.barred = None
        if not bool(present.all()):
            self.barred = torch.where(present[:, 1:], 0.0, -torch.inf).to(l2.dtype)[:, :, None]

    def take(self, index: Tensor) -> Fits:
        """The problems at ``index``."""
        blocks = None if self.blocks is None else self.blocks.take(index)
        chosen = self.sets[index], self.l2[index], self.present[index]
        return Fits(self.rows, self.all_labels, *chosen, gram=self.gram, blocks=blocks)

    def on_prefix(self, rows: int) -> Fits:
        """The same problems, with the penalties that suit a prefix of so many rows."""
        stronger = self.l2 + PREFIX_PENALTY * (1 / rows - 1 / self.n)
        return Fits(self.rows, self.all_labels, self.sets, stronger, self.present, gram=self.gram)

    def scores(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """Logits of the classes after the first, relative to it, (fits, classes - 1, rows)."""
        relative = (coefficients[:, 1:] - coefficients[:, :1]).flatten(0, 1)
        return (relative @ rows.T).view(len(coefficients), self.classes - 1, len(rows))

    def evaluate(self, coefficients: Tensor, n: int) -> Point:
        """Objective and gradient on the first ``n`` rows, in blocks of rows: one product forwards, one back."""
        import torch

        fits, classes, width = coefficients.shape
        loss = torch.zeros(fits, dtype=torch.float64, device=coefficients.device)
        gradient = coefficients.new_zeros(fits * (classes - 1), width)
        probe_rows = min(n, PROBE_ROWS)
        kept: list[Tensor] = []
        covariance: Tensor | float = 0.0
        step = max(256, BLOCK // (fits * classes))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            rows, column, other = self.rows[part], self.column[:, :, part], self.other[:, :, part]
            scores = self.scores(coefficients, rows)
            if self.barred is not None:
                scores += self.barred
            probed = min(probe_rows - start, len(rows))
            if probed > 0:
                kept.append(scores[:, :, :probed].clone())
            part_loss, p = softmax_residuals(scores, column, other, max(0, probed))
            loss += part_loss
            if probed > 0:
                covariance = covariance + softmax_covariance(p) / probe_rows
            gradient.addmm_(scores.view(fits * (classes - 1), -1), rows)
        shrink = self.penalty * coefficients
        value = loss / n + 0.5 * (shrink * coefficients).sum((1, 2), dtype=torch.float64)
        later = gradient.view(fits, classes - 1, width) / n
        assert isinstance(covariance, torch.Tensor)
        # The residuals of all classes sum to zero, so those of the first follow from the others.
        gradient = torch.cat([-later.sum(1, keepdim=True), later], 1) + shrink
        return Point(value, gradient, torch.cat(kept, 2), covariance)

    def preconditioner(self, point: Point) -> Preconditioner:
        """Approximate inverse Hessian at ``point``."""
        return Preconditioner(self.penalty, point.covariance, self.gram, self.blocks)

    def step_length(self, point: Point, direction: Tensor, slope: Tensor) -> Tensor:
        """Step along ``direction``: minimum of the parabola with the exact slope and the curvature on the first rows.

        The root draws it towards 1, L-BFGS's own length: a few rows give the curvature with some noise.
        """
        rows = self.rows[: point.scores.shape[2]]
        change = self.scores(direction, rows)
        # The first class's relative logit does not change, so its probability drops out.
        before, after = (probabilities(v)[:, 1:] for v in (point.scores, point.scores + change))
        curvature = ((after - before) * change).sum((1, 2)) / len(rows) + dot(self.penalty * direction, direction)
        length = (-slope / curvature.clamp_min(1e-30)).clamp(0.1, 5.0)
        return length if len(rows) == self.n else length.sqrt()


def probabilities(scores: Tensor) -> Tensor:
    """Probabilities of all classes from logits relative to the first, (fits, classes - 1, rows)."""
    import torch

    return torch.softmax(torch.cat([torch.zeros_like(scores[:, :1]), scores], 1), 1)


def softmax_residuals(scores: Tensor, column: Tensor, other: Tensor, probed: int) -> tuple[Tensor, Tensor]:
    """Log loss of some rows; ``scores`` become the residuals (probability minus label) of the classes after the first.

    Args:
        scores: logits relative to the first class, (fits, classes - 1, rows); overwritten.
        column: position of each row's label among the classes after the first, (fits, 1, rows); any for the first.
        other: 1 where the label is not the first class, (fits, 1, rows).
        probed: rows whose probabilities are returned.

    Returns:
        Summed loss in nats, float64, (fits,), and the probabilities of all classes, (fits, classes, probed).
    """
    import torch

    first = -scores.amax(1, keepdim=True).clamp_min_(0)  # the first class's logit after the shift
    scores += first
    chosen = torch.where(other > 0, scores.gather(1, column), first)
    first.exp_()
    total = scores.exp_().sum(1, keepdim=True) + first
    loss = (total.log() - chosen).sum((1, 2), dtype=torch.float64)
    scores /= total
    p = torch.cat([(first / total)[:, :, :probed], scores[:, :, :probed]], 1)
    scores.scatter_add_(1, column, -other)
    return loss, p


def softmax_covariance(p: Tensor) -> Tensor:
    """Sum over items of diag(p) - p pᵀ, or of its diagonal for very many classes."""
    import torch

    if p.shape[1] > FULL_COVARIANCE:
        return (p * (1 - p)).sum(2)
    return torch.diag_embed(p.sum(2)) - p @ p.transpose(1, 2)


class Rotation(Protocol):
    """Basis in which the features' Gram matrix is diagonal; ``spectrum`` holds its diagonal, (…, width + 1)."""

    spectrum: Tensor

    def enter(self, v: Tensor) -> Tensor:
        """Coefficients of the features -> coefficients in the basis."""

    def leave(self, v: Tensor) -> Tensor:
        """Coefficients in the basis -> coefficients of the features."""


class Gram:
    """Eigenvectors (width, width) and eigenvalues (width + 1,) of the features' Gram matrix.

    The intercept is a direction of its own, with the second moment of a feature that is always one.
    """

    def __init__(self, rows: Tensor):
        import torch

        sample = rows[: max(GRAM_ROWS, 4 * (rows.shape[1] - 1)), :-1]
        values, self.vectors = torch.linalg.eigh((sample.T @ sample) / len(sample))
        self.spectrum = torch.cat([values.clamp_min(0), values.new_ones(1)])

    def enter(self, v: Tensor) -> Tensor:
        """Coefficients of the features -> coefficients in the eigenbasis."""
        import torch

        return torch.cat([v[..., :-1] @ self.vectors, v[..., -1:]], -1)

    def leave(self, v: Tensor) -> Tensor:
        """Coefficients in the eigenbasis -> coefficients of the features."""
        import torch

        return torch.cat([v[..., :-1] @ self.vectors.T, v[..., -1:]], -1)


class Blocks:
    """Inverses of the Hessian's diagonal blocks, one per class, for the weakly penalised fits of each label set.

    Each class has curvature p(1 - p) at its own rows, far from what the Gram matrix says where most rows are predicted
    with certainty. The blocks of a label set are those of one of its fits, estimated from rows drawn with probability
    proportional to that curvature (systematically, so without chance), and serve all its weakly penalised fits.

    Attributes:
        inverses: (label sets, classes, width + 1, width + 1).
        which: (fits,), position in ``inverses``, or -1 for fits that do not use blocks.
    """

    def __init__(self, inverses: Tensor, which: Tensor):
        self.inverses, self.which = inverses, which

    @classmethod
    def at(cls, fits: Fits, coefficients: Tensor) -> Blocks | None:
        """Blocks at ``coefficients``, or None where they would cost more than they save."""
        import torch

        weak = fits.l2 <= BLOCK_L2
        sets = fits.sets[weak].unique()
        size = fits.width + 1
        drawn = BLOCK_SAMPLE * size
        passes = len(sets) * drawn * size / (2 * fits.n * max(1, int(weak.sum())))
        if not len(sets) or passes > BLOCK_PASSES or len(sets) * fits.classes * size**2 > BLOCK_NUMBERS:
            return None
        rows = fits.rows[: max(GRAM_ROWS, 4 * drawn)]
        inverses = coefficients.new_empty(len(sets), fits.classes, size, size)
        which = torch.full_like(fits.sets, -1)
        for i, label_set in enumerate(sets.tolist()):
            members = (weak & (fits.sets == label_set)).nonzero().squeeze(1)
            which[members] = i
            level = fits.l2[members].log().mean()
            chosen = members[(fits.l2[members].log() - level).abs().argmin()][None]
            p = probabilities(fits.take(chosen).scores(coefficients[chosen], rows))[0]
            total = (p * (1 - p)).double().cumsum(1)
            for k in range(fits.classes):
                mean = float(total[k, -1]) / len(rows)
                # The less curvature there is beside what is added, the fewer rows tell it well enough.
                count = int(drawn * min(1.0, max(0.2, mean / BLOCK_CURVATURE)))
                marks = (torch.arange(count, device=total.device, dtype=torch.float64) + 0.5) / count
                sample = rows[torch.searchsorted(total[k], marks * total[k, -1]).clamp_max(len(rows) - 1)]
                block = (sample.T @ sample) * (mean / count)
                block.diagonal().add_(float(level.exp()) + BLOCK_DAMPING)
                inverses[i, k] = torch.cholesky_inverse(torch.linalg.cholesky(block))
        return cls(inverses, which)

    def take(self, index: Tensor) -> Blocks:
        """The blocks of the fits at ``index``."""
        return Blocks(self.inverses, self.which[index])

    def apply(self, v: Tensor, out: Tensor) -> Tensor:
        """Replace ``out`` by the inverse blocks times ``v`` where fits use blocks."""
        for i in range(len(self.inverses)):
            members = (self.which == i).nonzero().squeeze(1)
            if len(members):
                # (classes, members, size): one product per class serves all fits of the label set.
                moved = (v[members].transpose(0, 1) @ self.inverses[i]).transpose(0, 1)
                # A shift that all classes share changes no probability.
                out[members] = moved - moved.mean(1, keepdim=True)
        return out


class Preconditioner:
    """Approximate inverse Hessian at one point: class blocks where there are any, else a Kronecker product."""

    def __init__(self, penalty: Tensor, covariance: Tensor, gram: Rotation, blocks: Blocks | None):
        import torch

        self.vectors = None
        values = covariance
        if covariance.ndim == 3:
            # Tiny matrices: their eigenvectors are cheaper on the host, in float64.
            eigenvalues, vectors = torch.linalg.eigh(covariance.double().cpu())
            values, self.vectors = eigenvalues.to(covariance), vectors.to(covariance)
        self.gram, self.blocks = gram, blocks
        self.values, self.penalty = values.clamp_min(0)[:, :, None], penalty

    def _kronecker(self, v: Tensor, damping: float) -> Tensor:
        v = self.gram.enter(v)
        curvature = ((self.values + damping) * self.gram.spectrum + self.penalty).clamp_min(1e-12)
        if self.vectors is None:
            return self.gram.leave(v / curvature)
        return self.gram.leave(self.vectors @ ((self.vectors.transpose(1, 2) @ v) / curvature))

    def apply(self, v: Tensor) -> Tensor:
        """Damped inverse times ``v``."""
        out = self._kronecker(v, DAMPING)
        return out if self.blocks is None else self.blocks.apply(v, out)

    def gap(self, gradient: Tensor) -> Tensor:
        """Distance of the objective from its minimum if it were a parabola with this Hessian (undamped).

        Blocks leave out how classes trade probability, which can halve the curvature: their estimate is doubled.
        """
        import torch

        moved = self._kronecker(gradient, 1e-4)
        if self.blocks is not None:
            moved = self.blocks.apply(2 * gradient, moved)
        return 0.5 * (gradient * moved).sum((1, 2), dtype=torch.float64)


def solve(fits: Fits, *, start: Tensor, warm: Tensor, tolerance: float, max_iterations: int) -> Solution:
    """Minimise every fit's objective.

    Args:
        fits: the problems.
        start: coefficients to start from, (fits, classes, width + 1).
        warm: bool, (fits,): whether ``start`` is near a fit's solution. The others begin on prefixes of the rows, if
            there are many.
        tolerance: a fit stops when its estimated distance from the minimum is below this many nats per item; it then
            takes one more step.
        max_iterations: passes over all rows after which a fit is given up.
    """
    prefixes = [(int(share * fits.n), passes) for share, passes in PREFIXES if share * fits.n >= PREFIX_MINIMUM]
    cold = (~warm).nonzero().squeeze(1)
    if prefixes:
        start = start.clone()
        for rows, passes in prefixes if len(cold) else ():
            problems = fits.take(cold).on_prefix(rows)
            start[cold] = minimise(problems, start[cold], rows=rows, tolerance=tolerance, passes=passes).coefficients
        fits.blocks = Blocks.at(fits, start)
    return minimise(fits, start, rows=fits.n, tolerance=tolerance, passes=max_iterations)
