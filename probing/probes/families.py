"""Probe families behind one interface: how they are named, and how each is fitted to all layers in one call.

======================  ================================================================================
``linear``              logistic regression; for numbers ridge regression
``low-rank:R``          the same with weights of rank R: only R directions of the states are read
``mlp:W``               one hidden layer of W units, ``max(0, ·)``; ``mlp:W,dropout=P`` drops units in training
======================  ================================================================================

Standardisation, splits, seeds, controls, intervals and files are the same for all. Families have different capacity, so
their scores differ for that reason alone: compare a family's task with its own control task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from probing.probes.fitted import FamilyFit, FittedProbe
from probing.probes.linear import DEFAULT_L2, fit_selected
from probing.probes.outputs import absent_outputs, fixed_log_odds
from probing.probes.ridge import RIDGE_L2, fit_ridge_probes
from probing.tasks.base import Kind, Task
from spafit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch


class Family(Protocol):
    """One kind of probe with its settings."""

    @property
    def name(self) -> str:
        """The family as the option spells it; the ``probe`` column of every table."""
        ...

    def check(self, task: Task, width: int | None) -> None:
        """Refuse a task, or a width of the states, that the family cannot be fitted to.

        Raises:
            UsageError: says what does not fit.
        """
        ...

    def cost(self, n: int, width: int, outputs: int) -> float:
        """Rough number of multiplications that one fit on ``n`` items takes."""
        ...

    def fit(
        self,
        x_train: np.ndarray | torch.Tensor,
        targets: np.ndarray,
        x_dev: np.ndarray | torch.Tensor,
        targets_dev: np.ndarray,
        *,
        kind: Kind,
        n_classes: int,
        l2: Sequence[float] | None,
        seed: int,
        device: str,
    ) -> FamilyFit:
        """Fit B hidden states × M label sets.

        Args:
            x_train: training features, (B, n, width), in their own units.
            targets: of M label sets, the task's first and then control tasks': int64 (M, n), bool (M, n, labels) or
                float64 (M, n), as ``kind`` says.
            x_dev: dev features, (B, n_dev, width).
            targets_dev: dev targets, shaped like ``targets``.
            kind: classes, several labels, or numbers.
            n_classes: classes or labels.
            l2: penalties to choose from on dev; None takes the family's own.
            seed: of whatever the family draws.
            device: torch device of the products; one with float64.
        """
        ...


@dataclass(frozen=True)
class Linear:
    """Logistic regression for classes (one per label where items have several), ridge regression for numbers."""

    @property
    def name(self) -> str:
        """``linear``."""
        return "linear"

    def check(self, task: Task, width: int | None) -> None:
        """Every task and width will do."""

    def cost(self, n: int, width: int, outputs: int) -> float:
        """Products of about 300 passes over the items."""
        return 300.0 * n * width * outputs

    def fit(
        self,
        x_train: np.ndarray | torch.Tensor,
        targets: np.ndarray,
        x_dev: np.ndarray | torch.Tensor,
        targets_dev: np.ndarray,
        *,
        kind: Kind,
        n_classes: int,
        l2: Sequence[float] | None,
        seed: int,
        device: str,
    ) -> FamilyFit:
        """See :meth:`Family.fit`; nothing is drawn."""
        if kind == "number":
            return fit_ridge_probes(x_train, targets, x_dev, targets_dev, l2_grid=l2 or RIDGE_L2, device=device)
        if kind == "multilabel":
            return _fit_labels(x_train, targets, x_dev, targets_dev, l2_grid=l2 or DEFAULT_L2, device=device)
        fit, chosen = fit_selected(
            x_train, targets, x_dev, targets_dev, n_classes=n_classes, l2_grid=l2 or DEFAULT_L2, device=device
        )
        probes = [
            [
                FittedProbe(
                    {"weight": fit.weights[b, m, 0], "bias": fit.bias[b, m, 0], "mean": fit.mean[b],
                     "scale": fit.scale[b]},
                    kind, ~fit.present[m], fit.n_items,
                )
                for m in range(len(targets))
            ]
            for b in range(len(x_train))
        ]  # fmt: skip
        return FamilyFit(probes, fit.converged[:, :, 0], np.repeat(chosen[:, None], len(targets), 1))


def _fit_labels(
    x_train: np.ndarray | torch.Tensor,
    targets: np.ndarray,
    x_dev: np.ndarray | torch.Tensor,
    targets_dev: np.ndarray,
    *,
    l2_grid: Sequence[float],
    device: str,
) -> FamilyFit:
    """A yes-or-no probe per label, all in one solve; one penalty per hidden state, by the dev loss of all labels."""
    sets, n, labels = targets.shape
    fit, chosen = fit_selected(
        x_train, _columns(targets), x_dev, _columns(targets_dev),
        n_classes=2, l2_grid=l2_grid, task_sets=labels, device=device,
    )  # fmt: skip
    weight = (fit.weights[:, :, 0, :, 1] - fit.weights[:, :, 0, :, 0]).reshape(len(x_train), sets, labels, -1)
    bias = (fit.bias[:, :, 0, 1] - fit.bias[:, :, 0, 0]).reshape(len(x_train), sets, labels)
    absent = absent_outputs(targets, labels, kind="multilabel")
    bias = np.where(absent, fixed_log_odds(targets[:, 0], n), bias)
    probes = [
        [
            FittedProbe(
                {"weight": np.ascontiguousarray(weight[b, m].T), "bias": bias[b, m], "mean": fit.mean[b],
                 "scale": fit.scale[b]},
                "multilabel", None, n,
            )
            for m in range(sets)
        ]
        for b in range(len(x_train))
    ]  # fmt: skip
    converged = fit.converged[:, :, 0].reshape(len(x_train), sets, labels).all(2)
    return FamilyFit(probes, converged, np.repeat(chosen[:, None], sets, 1))


def _columns(targets: np.ndarray) -> np.ndarray:
    """Bool (M, n, labels) -> int64 (M · labels, n)."""
    return targets.transpose(0, 2, 1).reshape(-1, targets.shape[1]).astype(np.int64)


#: Spellings that error messages show.
SPELLINGS = ("linear",)


def split_probes(text: str) -> list[str]:
    """Split ``linear,mlp:64,dropout=0.2`` into probes: a piece with ``=`` is an option of the probe before it."""
    found: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        if piece and "=" in piece and found:
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    return found


def parse_probes(text: str) -> list[Family]:
    """The families that a spelling such as ``linear,mlp:64`` names.

    Raises:
        UsageError: as :func:`parse_probe`.
    """
    return [parse_probe(piece) for piece in split_probes(text)]


def parse_probe(text: str) -> Family:
    """The family that one spelling such as ``low-rank:4`` names.

    Raises:
        UsageError: names no family, or a setting that it does not have.
    """
    if text == "linear":
        return Linear()
    hint = did_you_mean(text.partition(":")[0], [s.partition(":")[0] for s in SPELLINGS])
    raise UsageError(f"--probe {text!r} is not known; use {', '.join(SPELLINGS)}.{hint}")
