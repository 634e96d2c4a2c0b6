"""Probe families behind one interface: how they are named, and how each is fitted to all layers in one call.

======================  ================================================================================
``linear``              logistic regression; for numbers ridge regression
``low-rank:R``          the same with weights of rank R: only R directions of the states are read
``mlp:W``               one hidden layer of W units, ``max(0, ·)``; ``mlp:W,dropout=P`` drops units in training
``structural``          tree distances and depths from maps of rank 64 (``structural:R`` of rank R); for trees alone
``edge-span``           the linear probe on the mean of the words of a span, or of two spans side by side
``edge-span:attention`` the same on an average whose weights are learned (:mod:`.edge_span`)
======================  ================================================================================

A run fits each family to the tasks that it suits: ``structural`` to trees; ``edge-span`` to labelled spans and pairs of
spans, with attention only where they have one label each; the others to everything but trees. The words of a span are
those that white space parts. An item whose span has a word without a state is left out for all families of the run.

Standardisation, splits, seeds, controls, intervals and files are the same for all. Families have different capacity, so
their scores differ for that reason alone: compare a family's task with its own control task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from probing.probes.edge_span import EdgeAttention
from probing.probes.fitted import FamilyFit, FittedProbe
from probing.probes.linear import DEFAULT_L2, fit_selected
from probing.probes.lowrank import fit_low_rank_probes
from probing.probes.mlp import fit_mlp_probes
from probing.probes.outputs import absent_outputs, fixed_log_odds
from probing.probes.ridge import RIDGE_L2, fit_ridge_probes
from probing.probes.structural import RANK
from probing.tasks.base import Kind, Task
from spafit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch


class NamedFamily(Protocol):
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


class Family(NamedFamily, Protocol):
    """A kind of probe that reads items one by one."""

    def fit(
        self,
        x_train: Any,
        targets: np.ndarray,
        x_dev: Any,
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
            x_train: training features, (B, n, width), in their own units; :class:`.span_words.SpanWords` for attention.
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
    converged = np.asarray(fit.converged[:, :, 0].reshape(len(x_train), sets, labels).all(2))
    return FamilyFit(probes, converged, np.repeat(chosen[:, None], sets, 1))


def _columns(targets: np.ndarray) -> np.ndarray:
    """Bool (M, n, labels) -> int64 (M · labels, n)."""
    return targets.transpose(0, 2, 1).reshape(-1, targets.shape[1]).astype(np.int64)


@dataclass(frozen=True)
class LowRank:
    """Logistic regression with weights of a small rank.

    Attributes:
        rank: number of directions of a state that are read.
    """

    rank: int

    @property
    def name(self) -> str:
        """``low-rank:R``."""
        return f"low-rank:{self.rank}"

    def check(self, task: Task, width: int | None) -> None:
        """See :meth:`Family.check`: numbers have one output, and the rank goes up to the outputs and the width."""
        if task.kind == "number":
            raise UsageError(
                f"--probe {self.name}: task {task.name!r} predicts one number, whose weights have rank 1 in any case. "
                "Use linear."
            )
        limits = (len(task.labels), f"the number of labels of task {task.name!r}"), (width, "the states' width")
        for size, of in limits:
            if size is not None and self.rank > size:
                raise UsageError(
                    f"--probe {self.name}: rank {self.rank} is above {of} ({size}). Use low-rank:{size} or less."
                )

    def cost(self, n: int, width: int, outputs: int) -> float:
        """The linear fit that it starts from, and as many passes again."""
        return 300.0 * n * width * outputs + 1000.0 * n * width * self.rank

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
        return fit_low_rank_probes(
            x_train, targets, x_dev, targets_dev, rank=self.rank, kind=kind, n_classes=n_classes,
            l2_grid=l2 or DEFAULT_L2, device=device,
        )  # fmt: skip


@dataclass(frozen=True)
class Mlp:
    """One hidden layer of rectified linear units.

    Attributes:
        width: number of units.
        dropout: probability that a unit is dropped for an item in training.
    """

    width: int
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """``mlp:W`` or ``mlp:W,dropout=P``."""
        return f"mlp:{self.width}" + (f",dropout={self.dropout:g}" if self.dropout else "")

    def check(self, task: Task, width: int | None) -> None:
        """Every task and width will do."""

    def cost(self, n: int, width: int, outputs: int) -> float:
        """Products forwards and back of about thirty passes over the items."""
        return 200.0 * n * self.width * (width + outputs)

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
        """See :meth:`Family.fit`; penalties are not read: training stops early instead."""
        return fit_mlp_probes(
            x_train, targets, x_dev, targets_dev, width=self.width, dropout=self.dropout, kind=kind,
            n_classes=n_classes, seed=seed, device=device,
        )  # fmt: skip


@dataclass(frozen=True)
class Structural:
    """Maps under which squared distances are tree distances and squared lengths depths (:mod:`.structural`).

    Attributes:
        rank: rows of the maps.
    """

    rank: int = RANK

    @property
    def name(self) -> str:
        """``structural:R``."""
        return f"structural:{self.rank}"

    def check(self, task: Task, width: int | None) -> None:
        """See :meth:`NamedFamily.check`: the rank goes up to the width."""
        if width is not None and self.rank > width:
            raise UsageError(
                f"--probe {self.name}: rank {self.rank} is above the states' width ({width}). Use structural:{width} "
                "or less."
            )

    def cost(self, n: int, width: int, outputs: int) -> float:
        """Products of about forty passes over the words, forwards and back, for distances and depths."""
        return 200.0 * n * width * self.rank


@dataclass(frozen=True)
class EdgeMean(Linear):
    """The linear probe on the mean of a span's words, where ``linear`` reads the mean of all its sub-words."""

    @property
    def name(self) -> str:
        """``edge-span``."""
        return "edge-span"


def reads_words(family: NamedFamily) -> bool:
    """Whether a family reads the state of each word of a span."""
    return isinstance(family, EdgeMean | EdgeAttention)


def suits(family: NamedFamily, task: Task) -> bool:
    """Whether a run fits this family to this task.

    Structural probes are fitted to trees, edge-span probes to classes of spans or pairs of spans (with means to several
    labels per item, too), the others to everything but trees.
    """
    if reads_words(family):
        kinds = ("classes",) if isinstance(family, EdgeAttention) else ("classes", "multilabel")
        return task.unit in ("span", "span-pair") and task.kind in kinds
    return isinstance(family, Structural) == (task.kind == "tree")


def check_suited(families: Sequence[NamedFamily], tasks: Sequence[Task]) -> None:
    """Refuse a task that no family suits, and a family that suits no task.

    Raises:
        UsageError: names it, with what to add or leave out.
    """
    for task in tasks:
        if not any(suits(family, task) for family in families):
            names = ", ".join(f.name for f in families)
            other = "structural" if task.kind == "tree" else "linear"
            raise UsageError(
                f"--probe {names} fits no probe to task {task.name!r}, whose labels are "
                f"{'trees' if task.kind == 'tree' else f'{task.kind} of {task.unit}s'}. Add {other}, as in --probe "
                f"{other},{names}."
            )
    for family in families:
        if tasks and not any(suits(family, task) for task in tasks):
            what = "it suits"
            if isinstance(family, Structural):
                what = "of trees, such as conllu:PATH#tree"
            elif reads_words(family):
                one = "spans with one label each" if isinstance(family, EdgeAttention) else "labelled spans"
                what = f"of {one}, such as iob:PATH#spans"
            raise UsageError(f"--probe {family.name}: there is no task {what}. Add one, or leave the probe out.")


#: Spellings that error messages show.
SPELLINGS = ("linear", "low-rank:R", "mlp:W", "mlp:W,dropout=P", "structural:R", "edge-span", "edge-span:attention")


def split_probes(text: str) -> list[str]:
    """Split ``linear,mlp:64,dropout=0.2`` into probes: a piece with ``=`` is an option of the probe before it."""
    found: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        if piece and "=" in piece and found:
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    return found


def parse_probes(text: str) -> list[Family | Structural]:
    """The families that a spelling such as ``linear,mlp:64`` names.

    Raises:
        UsageError: as :func:`parse_probe`.
    """
    return [parse_probe(piece) for piece in split_probes(text)]


def parse_probe(text: str) -> Family | Structural:
    """The family that one spelling such as ``low-rank:4`` names.

    Raises:
        UsageError: names no family, or a setting that it does not have.
    """
    head, *options = text.split(",")
    family, _, size = head.partition(":")
    if family not in ("linear", "low-rank", "mlp", "structural", "edge-span"):
        hint = did_you_mean(family, list(dict.fromkeys(s.partition(":")[0] for s in SPELLINGS)))
        raise UsageError(f"--probe {text!r} is not known; use {', '.join(SPELLINGS)}.{hint}")
    if family == "linear":
        if size or options:
            raise UsageError(f"--probe {text!r}: the linear probe has no settings here. Write linear.")
        return Linear()
    if family == "edge-span":
        if text not in ("edge-span", "edge-span:attention"):
            raise UsageError(f"--probe {text!r} is not known; write edge-span or edge-span:attention.")
        return EdgeMean() if text == "edge-span" else EdgeAttention()
    if family == "structural" and text == "structural":
        return Structural()
    if not (size.isascii() and size.isdigit() and int(size) > 0):
        what = "number of hidden units, such as mlp:64" if family == "mlp" else f"rank, such as {family}:4"
        raise UsageError(f"--probe {text!r} needs its {what}.")
    if family != "mlp":
        if options:
            raise UsageError(f"--probe {text!r}: a {family} probe has no settings but its rank. Write {family}:{size}.")
        return LowRank(int(size)) if family == "low-rank" else Structural(int(size))
    dropout = 0.0
    for option in options:
        name, _, value = option.partition("=")
        if name != "dropout":
            raise UsageError(
                f"--probe {text!r}: an MLP has no setting {name!r}; use dropout, as in mlp:64,dropout=0.2."
            )
        try:
            dropout = float(value)
        except ValueError:
            dropout = -1.0
        if not 0 <= dropout < 1:
            raise UsageError(f"--probe {text!r}: dropout must be a number from 0 to below 1, such as dropout=0.2.")
    return Mlp(int(size), dropout)
