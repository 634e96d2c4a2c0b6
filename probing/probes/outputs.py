"""What a probe's outputs stand for in each kind of task: losses, their gradients, and log probabilities.

======================  =====================================  ==========================================
kind                    outputs, one row per item              loss of an item, in nats
======================  =====================================  ==========================================
``classes``             a logit per class                      −log softmax at the label
``multilabel``          log odds per label                     Σ over labels of −log sigmoid of ± log odds
``number``              one number, in standard deviations of  half the squared difference
                        the training targets
======================  =====================================  ==========================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from probing.tasks.base import Kind

if TYPE_CHECKING:
    from torch import Tensor


def loss_and_residual(outputs: Tensor, targets: Tensor, *, kind: Kind, absent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss of every item and its gradient with respect to the outputs.

    Args:
        outputs: (…, items, outputs), logits as they are: no softmax or sigmoid goes before.
        targets: (…, items): class positions, int64; float32 for numbers; bool (…, items, outputs) for several labels.
        kind: what the outputs stand for.
        absent: bool, broadcast against ``outputs``: classes or labels that take no part; None if all do.

    Returns:
        Losses in nats, (…, items), and the gradient, shaped like ``outputs`` (zero for what takes no part).
    """
    import torch

    if kind == "number":
        residual = outputs - targets[..., None]
        return 0.5 * residual.square().sum(-1), residual
    if kind == "multilabel":
        sign = targets.to(outputs.dtype)
        losses, residual = torch.nn.functional.softplus(outputs) - sign * outputs, torch.sigmoid(outputs) - sign
        if absent is not None:
            losses, residual = losses.masked_fill(absent, 0.0), residual.masked_fill(absent, 0.0)
        return losses.sum(-1), residual
    if absent is not None:
        outputs = outputs.masked_fill(absent, -torch.inf)
    log_p, index = torch.log_softmax(outputs, -1), targets[..., None]
    residual = log_p.exp().scatter_add_(-1, index, torch.full_like(index, -1, dtype=log_p.dtype))
    return -log_p.gather(-1, index)[..., 0], residual


def absent_outputs(targets: np.ndarray, n_classes: int, *, kind: Kind) -> np.ndarray:
    """Classes without a training item, or labels that every or no training item has: bool, (label sets, outputs).

    Args:
        targets: (label sets, items), or bool (label sets, items, outputs) for several labels.
        n_classes: classes or labels; not read for numbers, which have one output.
        kind: what the targets are.
    """
    if kind == "number":
        return np.zeros((len(targets), 1), dtype=bool)
    if kind == "multilabel":
        return np.asarray((targets == targets[:, :1]).all(1))
    return np.stack([np.bincount(row, minlength=n_classes) == 0 for row in targets])


def fixed_log_odds(always: np.ndarray, n_items: int) -> np.ndarray:
    """Log odds of labels that all of ``n_items`` training items have (True) or none has: half a pseudo-item against."""
    return np.where(always, np.log(2 * n_items), -np.log(2 * n_items)).astype(np.float32)
