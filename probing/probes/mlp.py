"""Probes with one hidden layer, for many layers and labellings in one program.

On standardised features a probe is ``weight · max(0, hidden_weight · x + hidden_bias) + bias``. Adam minimises the mean
loss of batches of shuffled items; after every pass (or a few, where a pass is short) the loss on dev is taken, and a
probe keeps the weights that had the lowest one and stops once several tries in a row brought no better ones. All probes
of a call start from the same weights and see the same batches and the same dropped units, drawn from the seed alone: a
probe's numbers depend on which others are in the call by rounding only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probing.probes.fitted import FamilyFit, FittedProbe
from probing.probes.outputs import absent_outputs, fixed_log_odds, loss_and_residual
from probing.probes.ridge import checked_targets, number_probe
from probing.probes.standardise import moments, standardised_rows
from probing.tasks.base import Kind
from spafit.runtime import generator

if TYPE_CHECKING:
    from torch import Tensor

LEARNING_RATE = 1e-3
BATCH = 128
#: Steps between looks at dev, at least; looks without a better loss before a probe stops; looks at most.
LOOK_STEPS, PATIENCE, MOST_LOOKS = 20, 5, 300
#: Adam's decay rates of the mean and the mean square of the gradient, and what is added to its root.
BETAS, EPSILON = (0.9, 0.999), 1e-8
#: Rows of dev that are scored at a time.
DEV_ROWS = 4096


def fit_mlp_probes(
    x_train: np.ndarray | Tensor,
    targets: np.ndarray,
    x_dev: np.ndarray | Tensor,
    targets_dev: np.ndarray,
    *,
    width: int,
    dropout: float = 0.0,
    kind: Kind,
    n_classes: int,
    seed: int = 0,
    device: str = "cpu",
) -> FamilyFit:
    """Fit every representation × label set, each stopped by its own dev loss.

    Args:
        x_train: training features, (B, n, width).
        targets: (M, n) class positions or numbers, or bool (M, n, labels).
        x_dev: dev features, (B, n_dev, width).
        targets_dev: dev targets, shaped like ``targets``.
        width: units of the hidden layer.
        dropout: probability that a hidden unit is dropped for an item in training.
        kind: what the targets are.
        n_classes: classes or labels; not read for numbers.
        seed: draws the first weights, the order of the items and the dropped units.
        device: torch device.

    Returns:
        The probes, without penalty; ``converged`` says that a probe stopped before :data:`MOST_LOOKS`.

    Raises:
        UsageError: numbers and features of different length.
        NumericalError: features or numbers that are not finite.
    """
    import torch

    n_sets, n, outputs = len(targets), x_train.shape[1], 1 if kind == "number" else n_classes
    centre, spread = np.zeros(n_sets), np.ones(n_sets)
    if kind == "number":
        y, y_dev = checked_targets(targets, len_x=n), checked_targets(targets_dev, len_x=x_dev.shape[1])
        centre, spread = y.mean(1), y.std(1)
        targets, targets_dev = ((v - centre[:, None]) / spread[:, None] for v in (y, y_dev))
        targets, targets_dev = targets.astype(np.float32), targets_dev.astype(np.float32)
    absent = absent_outputs(targets, outputs, kind=kind)
    scales = [moments(x, b) for b, x in enumerate(x_train)]
    train, dev = (
        torch.stack([_standardised(x[b], scales[b], b) for b in range(len(x_train))]).to(device)
        for x in (x_train, x_dev)
    )
    models = _Models(len(train), n_sets, train.shape[2], width, outputs, seed=seed, device=device)
    trainer = _Trainer(
        models, torch.from_numpy(targets).to(device), torch.from_numpy(targets_dev).to(device), kind=kind,
        absent=torch.from_numpy(absent).to(device) if absent.any() else None, dropout=dropout, seed=seed,
    )  # fmt: skip
    best, converged = trainer.run(train, dev)
    probes = []
    for b, (mean, scale, constant) in enumerate(scales):
        row = []
        for m in range(n_sets):
            own = {name: value[b, m].cpu().numpy() for name, value in best.items()}
            own["hidden_weight"][constant] = 0.0
            own.update(mean=mean, scale=scale)
            if kind == "number":
                hidden = (own["hidden_bias"] + dev[b].cpu().numpy() @ own["hidden_weight"]).clip(0)
                residual = (hidden @ own["weight"])[:, 0] + own["bias"] - targets_dev[m]
                row.append(number_probe(own, residual, mean=centre[m], spread=spread[m], n_items=n))
                continue
            if kind == "multilabel":
                own["weight"] = np.where(absent[m], 0.0, own["weight"]).astype(np.float32)
                own["bias"] = np.where(absent[m], fixed_log_odds(targets[m, 0], n), own["bias"]).astype(np.float32)
            row.append(FittedProbe(own, kind, absent[m] if kind == "classes" else None, n))
        probes.append(row)
    return FamilyFit(probes, converged, np.full(converged.shape, np.nan))


def _standardised(x: np.ndarray | Tensor, scales: tuple[np.ndarray, np.ndarray, np.ndarray], b: int) -> Tensor:
    import torch

    mean, scale, constant = scales
    features = torch.cat([rows for _, rows in standardised_rows(x, mean, scale, b)])
    return features.masked_fill_(torch.from_numpy(constant), 0.0)


class _Models:
    """Weights of B × M probes, shaped so that a product serves all label sets of a representation at once.

    ``hidden_weight`` (B, width, M · units), ``hidden_bias`` (B, 1, M · units), ``weight`` (B · M, units, outputs),
    ``bias`` (B · M, 1, outputs).
    """

    def __init__(self, b: int, m: int, width: int, units: int, outputs: int, *, seed: int, device: str):
        import torch

        random = generator(seed, "MLP weights", width, units, outputs)

        def uniform(fan_in: int, *shape: int) -> Tensor:
            bound = fan_in**-0.5  # the initialisation of torch's own linear layers
            return torch.from_numpy(random.uniform(-bound, bound, shape).astype(np.float32))

        self.b, self.m, self.units = b, m, units
        first, first_bias = uniform(width, width, units), uniform(width, 1, units)
        second, second_bias = uniform(units, units, outputs), uniform(units, 1, outputs)
        self.tensors = [
            first.repeat(b, 1, m).to(device), first_bias.repeat(b, 1, m).to(device),
            second.repeat(b * m, 1, 1).to(device), second_bias.repeat(b * m, 1, 1).to(device),
        ]  # fmt: skip
        self.moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in self.tensors]
        self.steps = 0

    def hidden(self, x: Tensor) -> Tensor:
        """Units before the activation, (B, rows, M · units), of features (B, rows, width)."""
        import torch

        return torch.baddbmm(self.tensors[1], x, self.tensors[0])

    def outputs(self, hidden: Tensor) -> Tensor:
        """Outputs (B, M, rows, outputs) of units (B, rows, M · units)."""
        import torch

        flat = self.by_model(hidden)
        return torch.baddbmm(self.tensors[3], flat, self.tensors[2]).view(self.b, self.m, len(flat[0]), -1)

    def by_model(self, hidden: Tensor) -> Tensor:
        """(B, rows, M · units) -> (B · M, rows, units)."""
        rows = hidden.shape[1]
        return hidden.view(self.b, rows, self.m, self.units).transpose(1, 2).reshape(-1, rows, self.units)

    def step(self, gradients: list[Tensor]) -> None:
        """One step of Adam (Kingma & Ba 2015)."""
        self.steps += 1
        size = LEARNING_RATE * (1 - BETAS[1] ** self.steps) ** 0.5 / (1 - BETAS[0] ** self.steps)
        offset = EPSILON * (1 - BETAS[1] ** self.steps) ** 0.5
        for tensor, (mean, square), gradient in zip(self.tensors, self.moments, gradients, strict=True):
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            tensor.addcdiv_(mean, square.sqrt().add_(offset), value=-size)

    def named(self) -> dict[str, Tensor]:
        """The weights by name, each (B, M, …)."""
        first, first_bias, second, second_bias = self.tensors
        b, m, units = self.b, self.m, self.units
        return {
            "hidden_weight": first.view(b, -1, m, units).transpose(1, 2),
            "hidden_bias": first_bias.view(b, m, units),
            "weight": second.view(b, m, units, -1),
            "bias": second_bias.view(b, m, -1),
        }

    def keep(self, b: Tensor, m: Tensor) -> None:
        """Keep these representations and label sets only."""

        def cut(t: Tensor, position: int) -> Tensor:
            if position < 2:
                parts = t.view(self.b, t.shape[1], self.m, self.units)[b][:, :, m]
                return parts.reshape(len(b), t.shape[1], -1).contiguous()
            return t.view(self.b, self.m, *t.shape[1:])[b][:, m].reshape(-1, *t.shape[1:]).contiguous()

        self.tensors = [cut(t, i) for i, t in enumerate(self.tensors)]
        self.moments = [(cut(x, i), cut(y, i)) for i, (x, y) in enumerate(self.moments)]
        self.b, self.m = len(b), len(m)


class _Trainer:
    """Training of all models, each stopped by its own dev loss."""

    def __init__(
        self,
        models: _Models,
        targets: Tensor,
        targets_dev: Tensor,
        *,
        kind: Kind,
        absent: Tensor | None,
        dropout: float,
        seed: int,
    ):
        self.models, self.targets, self.targets_dev = models, targets, targets_dev
        self.kind, self.absent, self.dropout = kind, absent, dropout
        self.random = generator(seed, "MLP batches", targets.shape[1])

    def run(self, train: Tensor, dev: Tensor) -> tuple[dict[str, Tensor], np.ndarray]:
        """Best weights by name, each (B, M, …), and whether each model stopped by itself."""
        import torch

        models, n = self.models, train.shape[1]
        best = {name: value.clone() for name, value in models.named().items()}
        shape = (models.b, models.m)
        lowest = torch.full(shape, torch.inf, dtype=torch.float64)
        idle, stopped = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        b, m = torch.arange(shape[0]), torch.arange(shape[1])
        targets, targets_dev, absent = self.targets, self.targets_dev, self.absent
        since = looks = 0
        while looks < MOST_LOOKS:
            order = torch.from_numpy(self.random.permutation(n)).to(train.device)
            for start in range(0, n, BATCH):
                rows = order[start : start + BATCH]
                self._step(train[:, rows], targets[:, rows], absent)
                since += 1
            if since < LOOK_STEPS:
                continue
            since, looks = 0, looks + 1
            losses = self._dev_losses(dev, targets_dev, absent)
            here = torch.full(shape, torch.inf, dtype=torch.float64)
            here[b[:, None], m] = losses
            better = (here < lowest) & ~stopped
            lowest, idle = torch.where(better, here, lowest), torch.where(better, 0, idle + 1)
            now = models.named()
            for i, j in (better[b[:, None], m]).nonzero().tolist():
                for name, value in now.items():
                    best[name][b[i], m[j]] = value[i, j]
            stopped |= idle >= PATIENCE
            if bool(stopped.all()):
                break
            live = ~stopped[b[:, None], m]
            rows_left, sets_left = live.any(1).nonzero().squeeze(1), live.any(0).nonzero().squeeze(1)
            if len(rows_left) < len(b) or len(sets_left) < len(m):
                models.keep(rows_left.to(train.device), sets_left.to(train.device))
                train, dev = train[rows_left], dev[rows_left]
                targets, targets_dev = targets[sets_left], targets_dev[sets_left]
                absent = None if absent is None else absent[sets_left]
                b, m = b[rows_left], m[sets_left]
        return best, stopped.numpy()

    def _step(self, x: Tensor, targets: Tensor, absent: Tensor | None) -> None:
        """One step on a batch: the mean loss of each model, its gradient, and Adam."""
        import torch

        models, rows = self.models, x.shape[1]
        hidden = models.hidden(x)
        active = (hidden > 0).to(x.dtype)
        if self.dropout:
            kept = self.random.random((rows, models.units), dtype=np.float32) >= self.dropout
            mask = torch.from_numpy(kept.astype(np.float32) / (1 - self.dropout)).to(x.device)
            active *= mask.repeat(1, models.m)
        hidden *= active
        outputs = models.outputs(hidden)
        mask_absent = None if absent is None else absent[:, None]
        wanted = targets.expand(models.b, *targets.shape)
        residual = loss_and_residual(outputs, wanted, kind=self.kind, absent=mask_absent)[1].flatten(0, 1) / rows
        flat, second = models.by_model(hidden), models.tensors[2]
        back = (residual @ second.transpose(1, 2)).view(models.b, models.m, rows, models.units)
        back = back.transpose(1, 2).reshape(models.b, rows, -1) * active
        models.step([
            x.transpose(1, 2) @ back, back.sum(1, keepdim=True),
            flat.transpose(1, 2) @ residual, residual.sum(1, keepdim=True),
        ])  # fmt: skip

    def _dev_losses(self, dev: Tensor, targets: Tensor, absent: Tensor | None) -> Tensor:
        """Mean loss of each model on dev, float64, (B, M)."""
        import torch

        models = self.models
        total = torch.zeros(models.b, models.m, dtype=torch.float64)
        mask = None if absent is None or self.kind == "classes" else absent[:, None]
        for start in range(0, dev.shape[1], DEV_ROWS):
            part = slice(start, start + DEV_ROWS)
            outputs = models.outputs(models.hidden(dev[:, part]).clamp_min_(0))
            wanted = targets[:, part].expand(models.b, *targets[:, part].shape)
            losses = loss_and_residual(outputs, wanted, kind=self.kind, absent=mask)[0]
            total += losses.sum(2, dtype=torch.float64).cpu()
        return total / dev.shape[1]
