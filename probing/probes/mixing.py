"""Scalar mix (Tenney et al. 2019, eq. 1 and 2): a linear probe on a weighted sum of layers, trained with the weights.

The probe reads z = γ Σ_l s_l (h_l - mean_l) with s = softmax(a), and minimises, as the linear probe does,

    mean log loss in nats + l2/2 · ‖W‖²

over W, the intercepts and a. Three choices, and what they mean for the numbers:

* Layers are centred, which changes nothing but the intercepts, and not scaled: s are the *raw* weights, as published. A
  layer of small norm needs a large weight to say the same. ``norm_corrected`` weights, proportional to
  s_l · mean ‖h_l‖, are what each layer contributes to the sum; read those where norms differ between layers
  (Fayyaz et al. 2021).
* γ is not a free parameter: beside a linear probe only γ·W matters, and a free γ would void the penalty. It is one over
  the root mean square of the entries of the mix, so that penalties are on the scale of the linear probe's.
* One scale per mix rather than one per column: the loss does not depend on the basis in which states are written. The
  linear probe standardises each column, so that on one layer the two differ a little.

Training starts at equal weights. The objective is not convex in W and a together; what nothing pulls apart, such as two
equal layers, keeps equal weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.linear import (
    BATCH_COEFFICIENTS,
    DEFAULT_L2,
    ProbeProblem,
    check_labels,
    log_softmax_with_absent,
)  # fmt: skip
from probing.probes.standardise import chunks, moments
from spafit.errors import NumericalError, UsageError

if TYPE_CHECKING:
    import torch

#: Bits per item: a fit stops once its estimated distance from the minimum is below this, after one more step. Tighter
#: than the linear probe's, because gains of one layer over those below it are small.
MIX_TOLERANCE = 0.0002
#: Rows that are scored at a time.
SCORED_ROWS = 1024

_LN2 = float(np.log(2))


@dataclass(frozen=True)
class MixFit:
    """Linear probes on mixes of layers 0 to ``last``, for B values of ``last`` and M label sets.

    Attributes:
        last: (B,), the last layer that takes part in each mix.
        mix_weights: s, float64, (B, M, layers); zero above ``last``, sum one.
        scale: γ, float64, (B, M): multiplies the mix of centred layers.
        weights: W on scaled mixes, float32, (B, M, width, classes); zero for absent classes.
        bias: float32, (B, M, classes).
        mean: float32, (layers, width): subtracted from each layer.
        norms: float64, (layers,): mean Euclidean norm of each layer's training states, not centred.
        l2: the penalty of each mix, chosen on dev for label set 0, (B,).
        converged: bool, (B, M): whether the estimated distance from a minimum fell below the tolerance.
        gap: that estimate in bits per item before the last step, (B, M).
        iterations: passes over all training rows, (B, M).
        present: bool, (M, classes): which classes have training items.
        n_items: training items.
    """

    last: np.ndarray
    mix_weights: np.ndarray
    scale: np.ndarray
    weights: np.ndarray = field(repr=False)
    bias: np.ndarray = field(repr=False)
    mean: np.ndarray = field(repr=False)
    norms: np.ndarray
    l2: np.ndarray
    converged: np.ndarray
    gap: np.ndarray = field(repr=False)
    iterations: np.ndarray = field(repr=False)
    present: np.ndarray = field(repr=False)
    n_items: int

    @property
    def norm_corrected(self) -> np.ndarray:
        """What each layer contributes to the mix: s_l · mean ‖h_l‖, renormalised, (B, M, layers)."""
        share = self.mix_weights * self.norms
        return share / share.sum(-1, keepdims=True)

    def log_probabilities(self, x: np.ndarray | torch.Tensor) -> np.ndarray:
        """Natural logarithms of the class probabilities (divide by ln 2 for bits).

        Args:
            x: states of all layers that the fit knows, (layers, n, width), in the units of the training states.

        Returns:
            float32, (B, M, n, classes).

        Raises:
            UsageError: ``x`` has another shape.
            NumericalError: ``x`` is not finite.
        """
        import torch

        layers, width = self.mean.shape
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (layers, width):
            raise UsageError(
                f"The mix was fitted on {layers} layers of width {width}; x has shape {tuple(x.shape)}, and "
                f"({layers}, items, {width}) is needed."
            )
        mixes, sets, _, classes = self.weights.shape
        out = np.empty((mixes, sets, x.shape[1], classes), dtype=np.float32)
        factors = torch.from_numpy(self.scale[..., None] * self.mix_weights).float().flatten(0, 1)
        weights, bias = (torch.from_numpy(v).flatten(0, 1) for v in (self.weights, self.bias))
        for rows, block in _blocks(x, torch.from_numpy(self.mean)):
            mixed = (factors @ block.flatten(1)).view(len(factors), *block.shape[1:])
            logits = torch.baddbmm(bias[:, None], mixed, weights)
            for i, one in enumerate(logits):
                b, m = divmod(i, sets)
                out[b, m, rows] = log_softmax_with_absent(one, self.present[m], self.n_items)
        return out


def fit_mixes(
    x_train: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    x_dev: np.ndarray | torch.Tensor,
    labels_dev: np.ndarray,
    *,
    n_classes: int,
    last: Sequence[int] | None = None,
    l2_grid: Sequence[float] = DEFAULT_L2,
    device: str = "cpu",
    max_iterations: int = 200,
    tolerance: float = MIX_TOLERANCE,
) -> MixFit:
    """Fit the mix of layers 0 to l for every l in ``last``; each with the penalty that dev prefers.

    All mixes are trained at once: a pass reads each layer one time, whatever the number of mixes, label sets and
    penalties. Label set 0 is the task, fitted at every penalty; the others (control tasks) are fitted at its choice.
    The same call gives the same bytes on one machine with one number of threads.

    When not to trust it. Weights of layers that say the same are hardly determined, and differ between training draws
    although losses agree: compare draws, and read K = KL(s‖uniform). ``tolerance`` bounds losses, not weights.

    Args:
        x_train: training states, (layers, n, width), layer 0 the embeddings.
        labels: training labels, (M, n) or (n,).
        x_dev: dev states, (layers, n_dev, width).
        labels_dev: dev labels, shaped like ``labels``; only label set 0 is read.
        n_classes: number of classes, at least two.
        last: the last layer of each mix; every layer by default, which gives Tenney's cumulative probes.
        l2_grid: penalties to choose from; equal losses go to the first.
        device: torch device for the products; one with float64.
        max_iterations: passes over all rows after which a fit is given up; ``converged`` is then False.
        tolerance: bits per item, see :data:`MIX_TOLERANCE`.

    Raises:
        UsageError: shapes, labels, layers or penalties that do not fit together.
        NumericalError: states that are not finite; names the layer.
    """
    problem = ProbeProblem(x_train, labels, n_classes, l2_grid, device, max_iterations, tolerance)
    dev = np.atleast_2d(np.asarray(labels_dev))[0]
    if x_dev.ndim != 3 or x_dev.shape != (len(x_train), len(dev), x_train.shape[2]):
        raise UsageError(
            f"x_dev has shape {tuple(x_dev.shape)}; with {len(dev)} dev labels it must be "
            f"{(len(x_train), len(dev), x_train.shape[2])}."
        )
    check_labels(dev[None], n_classes)
    lasts = np.arange(len(x_train)) if last is None else np.asarray(last, dtype=np.int64)
    if lasts.ndim != 1 or not len(lasts) or lasts.min() < 0 or lasts.max() >= len(x_train):
        raise UsageError(f"last is {list(lasts)}; give layers from 0 to {len(x_train) - 1}.")
    data, grid, others = _Data(problem), len(problem.l2), len(problem.labels) - 1
    path = data.fit(
        np.repeat(lasts, grid), np.zeros(len(lasts) * grid, dtype=np.int64), np.tile(problem.l2, len(lasts))
    )
    scored = data.assemble({name: values[:, None] for name, values in path.items()})
    loss = np.zeros(len(lasts) * grid)
    for start in range(0, len(dev), SCORED_ROWS) if grid > 1 else ():
        rows = slice(start, start + SCORED_ROWS)
        log_p = scored.log_probabilities(x_dev[:, rows])[:, 0]
        loss -= np.take_along_axis(log_p, dev[None, rows, None], 2).sum((1, 2), dtype=np.float64)
    chosen = np.arange(len(lasts)) * grid + loss.reshape(-1, grid).argmin(1)
    own = {name: values[chosen][:, None] for name, values in path.items()}
    if others:
        sets = np.tile(np.arange(1, others + 1), len(lasts))
        rest = data.fit(np.repeat(lasts, others), sets, np.repeat(own["l2"][:, 0], others))
        rest = {name: values.reshape(len(lasts), others, *values.shape[1:]) for name, values in rest.items()}
        own = {name: np.concatenate([own[name], rest[name]], 1) for name in own}
    return data.assemble(own)


def _blocks(x: np.ndarray | torch.Tensor, mean: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows with all layers of those rows, centred, (layers, rows, width)."""
    import torch

    for parts in zip(*(chunks(layer) for layer in x), strict=True):
        block = torch.stack([rows for _, rows in parts]) - mean[:, None]
        if not bool(torch.isfinite(block.sum())):
            bad = [i for i, layer in enumerate(block) if not bool(torch.isfinite(layer).all())]
            where = f"Layer {bad[0]} holds NaN or infinite values" if bad else "The layers hold values beyond float32"
            raise NumericalError(f"{where}. Extract in float32, or leave those items out.")
        yield parts[0][0], block


class _Data:
    """The training rows, centred, shuffled and in blocks on the device."""

    def __init__(self, problem: ProbeProblem):
        import torch

        from probing.probes.mix_solver import Layers

        self.problem, x = problem, problem.x
        found = [moments(layer, b) for b, layer in enumerate(x)]
        self.mean = np.stack([mean for mean, _, _ in found])
        # Columns that hold rounding only must not be read.
        varies = torch.from_numpy(np.stack([~constant for _, _, constant in found]).astype(np.float32))
        size = np.sqrt(np.mean([np.where(c, 0.0, s.astype(np.float64)) ** 2 for _, s, c in found]))
        self.unit = 1 / size if size > 0 else 1.0
        shuffled = torch.empty(len(x), problem.n, problem.width)
        norms = np.zeros(len(x))
        for b, layer in enumerate(x):
            centre, factor = torch.from_numpy(self.mean[b]), varies[b] * self.unit
            for part, rows in chunks(layer):
                norms[b] += float(rows.double().norm(dim=1).sum())
                shuffled[b, problem.place[part]] = (rows - centre) * factor
        self.norms, self.varies = norms / problem.n, varies
        self.layers = Layers(shuffled.to(problem.device))

    def fit(self, last: np.ndarray, sets: np.ndarray, l2: np.ndarray) -> dict[str, np.ndarray]:
        """Fit label set ``sets[i]`` on the mix of layers 0 to ``last[i]`` with penalty ``l2[i]`` for every i."""
        order = np.argsort(-last, kind="stable")  # fits that read a layer come first
        last, sets, l2 = last[order], sets[order], l2[order]
        size = max(1, BATCH_COEFFICIENTS // (self.problem.classes * (self.problem.width + 1)))
        parts = [slice(i, i + size) for i in range(0, len(sets), size)]
        found = [self._fit_together(last[p], sets[p], l2[p]) for p in parts]
        back = np.argsort(order)
        return {name: np.concatenate([f[name] for f in found])[back] for name in found[0]}

    def _fit_together(self, last: np.ndarray, sets: np.ndarray, l2: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        from probing.probes.mix_solver import Mixes, solve_mixes

        problem = self.problem
        order = torch.from_numpy(problem.order)[sets]
        present = torch.from_numpy(np.take_along_axis(problem.present, problem.order, 1)[sets])
        index, lasts, penalties, there = (
            torch.from_numpy(v).to(problem.device) if isinstance(v, np.ndarray) else v.to(problem.device)
            for v in (sets, last, l2.astype(np.float32), present)
        )
        fits = Mixes(self.layers, problem.shuffled, index, penalties, there, lasts)
        found = solve_mixes(fits, tolerance=problem.tolerance * _LN2, max_iterations=problem.max_iterations)
        probe, a = fits.parts(found.coefficients)
        s, gamma = fits.mixing(a)
        probe = probe.cpu().masked_fill(~present[:, :, None], 0.0)
        probe = probe.gather(1, order[:, :, None].expand(probe.shape))
        gap = (found.gap / _LN2).cpu().numpy()
        if not (torch.isfinite(probe).all() and np.isfinite(gap).all()):
            raise NumericalError("A mix is not finite although its layers are. Look for extreme values.")
        return {
            "last": last,
            "l2": l2,
            "mix_weights": s.cpu().numpy(),
            "scale": gamma.cpu().numpy() * self.unit,
            "weights": probe[..., :-1].transpose(1, 2).contiguous().numpy(),
            "bias": probe[..., -1].contiguous().numpy(),
            "gap": gap,
            "iterations": found.passes.cpu().numpy(),
        }

    def assemble(self, values: dict[str, np.ndarray]) -> MixFit:
        """The fit that holds ``values``, each of shape (mixes, label sets, …)."""
        return MixFit(
            last=values["last"][:, 0],
            l2=values["l2"][:, 0],
            converged=values["gap"] < self.problem.tolerance,
            mean=self.mean,
            norms=self.norms,
            present=self.problem.present[: values["gap"].shape[1]],
            n_items=self.problem.n,
            **{name: values[name] for name in ("mix_weights", "scale", "weights", "bias", "gap", "iterations")},
        )
