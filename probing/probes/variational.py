"""Variational code length of labels given hidden states: the bits of a probe's weights plus those of the labels.

The weights are sent as a distribution q, at the cost KL(q ‖ prior), and the labels with a probe drawn from it, at the
expected cross-entropy; training minimises the sum (Voita & Titov 2020, "Information-theoretic probing with minimum
description length", after Hinton & von Camp 1993). Prior and q are those of Bayesian compression (Louizos et al. 2017,
section 3.1): feature i has a scale z_i with a log-uniform prior, and its weights are z_i times normal ones,

    q(z_i) = N(m_i, a_i · m_i²),   q(w_ik | z_i) = N(z_i · μ_ik, z_i² · σ_ik²),   p(w_ik | z_i) = N(0, z_i²),

so that a feature which says nothing costs nothing. Intercepts have the prior N(0, 1). The log-uniform prior is no
distribution, so lengths are defined up to a constant for each feature: it is chosen so that the cost of z_i goes to 0
as a_i grows (Molchanov et al. 2017, equation 14, whose approximation is used). Compare codes of the same items and
width only. Everything that is returned is in bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.linear import ProbeProblem
from probing.probes.mdl import shuffled_rows
from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator

if TYPE_CHECKING:
    import pandas as pd
    import torch

#: Adam's first step length, which falls linearly to zero, and the items of a step.
LEARNING_RATE = 0.02
BATCH = 256
#: Draws of the noise, for every item, behind the expected cross-entropy.
SAMPLES = 16
#: First logarithm of the variances of weights.
FIRST_LOG_VARIANCE = -6.0

_LN2 = float(np.log(2))


@dataclass(frozen=True)
class VariationalCode:
    """Variational code lengths of M label sets given B hidden states.

    They are what training reached: an upper bound of the shortest code of this kind, which more steps may lower.

    Attributes:
        model_bits: float64, (B, M): KL(q ‖ prior).
        data_bits: float64, (B, M): expected cross-entropy of all labels.
        n_items: number of items n.
        n_classes: number of classes K.
        seed: of batches and noise.
    """

    model_bits: np.ndarray = field(repr=False)
    data_bits: np.ndarray = field(repr=False)
    n_items: int
    n_classes: int
    seed: int

    @property
    def uniform_bits(self) -> float:
        """Length of the uniform code, n · log2 K."""
        return float(self.n_items * np.log2(self.n_classes))

    @property
    def bits(self) -> np.ndarray:
        """Code lengths, float64, (B, M)."""
        return self.model_bits + self.data_bits

    @property
    def compression(self) -> np.ndarray:
        """Uniform code length / code length, float64, (B, M)."""
        return self.uniform_bits / self.bits

    def to_pandas(self) -> pd.DataFrame:
        """One row per hidden state and label set.

        Columns: ``hidden`` (position in the call), ``label_set``, ``seed``, ``n_items``, ``n_classes``,
        ``uniform_bits``, ``model_bits``, ``data_bits``, ``bits``, ``compression``.
        """
        import pandas as pd

        hidden, label_set = (i.ravel() for i in np.indices(self.bits.shape))
        whole = {"n_items": self.n_items, "n_classes": self.n_classes, "uniform_bits": self.uniform_bits}
        parts = {name: getattr(self, name).ravel() for name in ("model_bits", "data_bits", "bits", "compression")}
        return pd.DataFrame({"hidden": hidden, "label_set": label_set, "seed": self.seed, **whole, **parts})


def log_uniform_kl(log_alpha: torch.Tensor) -> torch.Tensor:
    """KL(N(m, a · m²) ‖ log-uniform) in nats from log a, with the constant that makes it 0 for large a."""
    import torch

    # Molchanov et al. 2017, equation 14.
    return 0.63576 * torch.sigmoid(-1.87320 - 1.48695 * log_alpha) + 0.5 * torch.nn.functional.softplus(-log_alpha)


def normal_kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)) in nats, elementwise."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def variational_code(
    x: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    *,
    n_classes: int,
    seed: int = 0,
    steps: int = 4000,
    device: str = "cpu",
) -> VariationalCode:
    """Variational code of every label set given every hidden state.

    Hidden states are fitted one after the other, with the same batches and the same noise: a code does not depend on
    which others are in the call, but for rounding. States are standardised on all items, which both parties know.

    Args:
        x: features of the items to send, (B, n, width), any float type.
        labels: integers from 0 to ``n_classes`` - 1, (M, n) or (n,): the task, and control tasks after it.
        n_classes: number of classes K, at least two.
        seed: of batches and noise.
        steps: training steps of :data:`BATCH` items; see whether twice as many shorten the code.
        device: torch device with float64.

    Raises:
        UsageError: shapes or labels that do not fit together, or no steps.
        NumericalError: features that are not finite, or training that left what is finite.
    """
    if steps < 1:
        raise UsageError(f"steps is {steps}; training needs at least one.")
    problem = ProbeProblem(x, labels, n_classes, [1.0], device, steps, 1.0)
    order = generator(seed, "variational code", problem.n).permutation(problem.n)
    bits = np.empty((2, len(x), len(problem.labels)))
    for b in range(len(x)):
        rows = shuffled_rows(problem, b, order)[:, :-1]
        bits[:, b] = _fit(rows, problem.labels[:, order].astype(np.int64), n_classes, seed, steps)
        if not np.isfinite(bits[:, b]).all():
            raise NumericalError(f"Hidden state {b}: training left what is finite. Look for extreme values.")
    return VariationalCode(bits[0], bits[1], problem.n, n_classes, seed)


class _Posterior:
    """q of M probes: scales of features, weights and intercepts, each a mean and the logarithm of a variance."""

    def __init__(self, n_sets: int, width: int, n_classes: int, device: torch.device):
        import torch

        def filled(value: float, *shape: int) -> torch.Tensor:
            return torch.full((n_sets, *shape), value, device=device, requires_grad=True)

        self.scale, self.log_alpha = filled(1.0, 1, width), filled(FIRST_LOG_VARIANCE, 1, width)
        self.weight, self.weight_variance = filled(0.0, width, n_classes), filled(FIRST_LOG_VARIANCE, width, n_classes)
        self.bias, self.bias_variance = filled(0.0, 1, n_classes), filled(FIRST_LOG_VARIANCE, 1, n_classes)
        self.parameters = [
            self.scale, self.log_alpha, self.weight, self.weight_variance, self.bias, self.bias_variance,
        ]  # fmt: skip

    def kl(self) -> torch.Tensor:
        """KL(q ‖ prior) in nats, (M,)."""
        weights = normal_kl(self.weight, self.weight_variance).sum((1, 2))
        return (
            log_uniform_kl(self.log_alpha).sum((1, 2)) + weights + normal_kl(self.bias, self.bias_variance).sum((1, 2))
        )

    def losses(self, rows: torch.Tensor, labels: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
        """Cross-entropy in nats of each item by a probe of its own draw, (M, items).

        Given the scales, logits are normal: their noise is drawn in place of the weights' (Kingma et al. 2015).
        """
        import torch

        features, outputs = (torch.randn(len(rows), k, generator=noise) for k in (rows.shape[1], self.bias.shape[2]))
        scales = self.scale * (1 + (0.5 * self.log_alpha).exp() * features.to(rows.device))
        scaled = rows * scales
        mean = scaled @ self.weight + self.bias
        variance = scaled.square() @ self.weight_variance.exp() + self.bias_variance.exp()
        logits = mean + variance.sqrt() * outputs.to(rows.device)
        return -torch.log_softmax(logits, 2).gather(2, labels[:, :, None])[:, :, 0]


def _fit(rows: torch.Tensor, labels: np.ndarray, n_classes: int, seed: int, steps: int) -> np.ndarray:
    """Bits of the model and of the labels, (2, M)."""
    import torch

    n, random = len(rows), generator(seed, "variational code batches")
    noise = torch.Generator().manual_seed(int(random.integers(2**62)))
    targets = torch.from_numpy(labels).to(rows.device)
    q = _Posterior(len(labels), rows.shape[1], n_classes, rows.device)
    optimiser = torch.optim.Adam(q.parameters, lr=LEARNING_RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = torch.from_numpy(random.integers(n, size=min(BATCH, n))).to(rows.device)
        optimiser.zero_grad()
        # Sums over probes: each has its own parameters, so each minimises its own.
        (q.losses(rows[chosen], targets[:, chosen], noise).mean(1) + q.kl() / n).sum().backward()
        optimiser.step()
        falling.step()
    with torch.no_grad():
        data = torch.zeros(len(labels), dtype=torch.float64, device=rows.device)
        for _ in range(SAMPLES):
            for start in range(0, n, BATCH):
                part = slice(start, start + BATCH)
                data += q.losses(rows[part], targets[:, part], noise).sum(1, dtype=torch.float64) / SAMPLES
        return torch.stack([q.kl().double(), data]).cpu().numpy() / _LN2
