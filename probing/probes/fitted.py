"""One fitted probe, of any family: the arrays that are saved, and what they say about other states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.span_words import SpanWords
from probing.probes.standardise import standardised_rows
from probing.tasks.base import Kind
from spafit.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FittedProbe:
    """A probe of one hidden state, fitted to one set of labels.

    Attributes:
        parameters: float32 arrays by name. Every probe has ``mean`` and ``scale`` (width,), which standardise the
            features, and ``weight`` (inputs, outputs) and ``bias`` (outputs,). The inputs of ``weight`` are the
            features; with ``factor`` (width, rank) features @ factor; with ``hidden_weight`` (width, hidden) and
            ``hidden_bias`` (hidden,) the units max(0, features @ hidden_weight + hidden_bias). Probes of numbers have
            ``deviation`` (1,), the root mean square of their residuals on dev, in the target's unit. With ``attention``
            (spans, width of a word) the features are the averages of the words of each span, side by side, with
            weights softmax(attention · word), of words that ``word_mean`` and ``word_scale`` standardised.
        kind: what the outputs stand for, see :mod:`probing.probes.outputs`; numbers come in the target's own unit.
        absent: bool, (outputs,): classes without a training item; None if there are none.
        n_items: training items.
    """

    parameters: Mapping[str, np.ndarray] = field(repr=False)
    kind: Kind = "classes"
    absent: np.ndarray | None = None
    n_items: int = 0

    def outputs(self, x: np.ndarray | torch.Tensor | SpanWords, *, position: int = 0) -> np.ndarray:
        """Outputs for features ``x`` (items, width) in the units of the training features; float32, (items, outputs).

        Args:
            x: the features; with ``attention`` the words of each item's spans.
            position: of the representation, for messages.

        Raises:
            UsageError: ``x`` has another width.
            NumericalError: ``x`` is not finite.
        """
        import torch

        width, own = len(self.parameters["mean"]), self.parameters
        if isinstance(x, SpanWords) != ("attention" in own):
            what = "words of spans" if "attention" in own else "one state per item"
            raise UsageError(f"The probe was fitted on {what}; x is {type(x).__name__} of shape {tuple(x.shape)}.")
        if isinstance(x, SpanWords):
            x = x.pooled(own["attention"], own["word_mean"], own["word_scale"], position=position)
        if x.ndim != 2 or x.shape[1] != width:
            raise UsageError(
                f"The probe was fitted on states of width {width}; x has shape {tuple(x.shape)}, and (items, {width}) "
                "is needed."
            )
        parts = {name: torch.from_numpy(np.asarray(value)) for name, value in own.items()}
        out = np.empty((x.shape[0], len(own["bias"])), dtype=np.float32)
        for rows, features in standardised_rows(x, own["mean"], own["scale"], position):
            if "factor" in parts:
                features = features @ parts["factor"]
            elif "hidden_weight" in parts:
                features = (parts["hidden_bias"] + features @ parts["hidden_weight"]).clamp_min_(0)
            out[rows] = parts["bias"] + features @ parts["weight"]
        return out

    def log_probabilities(self, x: np.ndarray | torch.Tensor | SpanWords, *, position: int = 0) -> np.ndarray:
        """Natural logarithms of the class probabilities, float32, (items, classes).

        A class without a training item gets half a pseudo-item's share and the others are scaled down to match, see
        :mod:`probing.probes.linear`.

        Raises:
            UsageError: the probe is not one of classes, or ``x`` has another width.
            NumericalError: ``x`` is not finite.
        """
        import torch

        if self.kind != "classes":
            raise UsageError(f"This probe is one of kind {self.kind!r}, which has no class probabilities.")
        logits = torch.from_numpy(self.outputs(x, position=position))
        if self.absent is None or not self.absent.any():
            return torch.log_softmax(logits, 1).numpy()
        absent, count = torch.from_numpy(self.absent), int(self.absent.sum())
        share = 0.5 / (self.n_items + 0.5 * count)
        log_p = torch.log_softmax(logits.masked_fill(absent, -torch.inf), 1) + float(np.log1p(-count * share))
        return log_p.masked_fill(absent, float(np.log(share))).numpy()


@dataclass(frozen=True)
class FamilyFit:
    """Probes of B hidden states × M label sets, trained on the same items.

    Attributes:
        probes: the probes, by hidden state and label set.
        converged: bool, (B, M): whether the family's criterion was met.
        l2: penalty of each fit, float64, (B, M); NaN in families that have none.
    """

    probes: Sequence[Sequence[FittedProbe]] = field(repr=False)
    converged: np.ndarray
    l2: np.ndarray

    def log_probabilities(self, x: np.ndarray | torch.Tensor | SpanWords, *, label_set: int) -> np.ndarray:
        """:meth:`FittedProbe.log_probabilities` at every hidden state: x (B, items, width) -> (B, items, classes)."""
        rows = enumerate(self.probes)
        return np.stack([probes[label_set].log_probabilities(x[b], position=b) for b, probes in rows])

    def outputs(self, x: np.ndarray | torch.Tensor | SpanWords, *, label_set: int) -> np.ndarray:
        """:meth:`FittedProbe.outputs` at every hidden state: x (B, items, width) -> (B, items, outputs)."""
        return np.stack([probes[label_set].outputs(x[b], position=b) for b, probes in enumerate(self.probes)])

    def parameters(self, b: int, m: int) -> Mapping[str, np.ndarray]:
        """The arrays to save of hidden state ``b`` and label set ``m``."""
        return self.probes[b][m].parameters
