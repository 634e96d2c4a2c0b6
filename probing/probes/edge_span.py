"""Edge probing with attention: a span's state is a learned average of its words' states (Tenney et al. 2019).

With x the standardised states of the words of a span and v one vector for each of an item's spans (one or two),

    r = Σ a_i x_i,   a = softmax over the span's words of v · x_i,   log p = log softmax(W r̃ + b)

where r̃ is r, of both spans side by side, standardised once more. A fit minimises

    mean log loss in nats + l2/2 · (‖W‖² + ‖v‖²).

v = 0 is mean pooling, and a fit starts there, with W and b of the linear probe on mean-pooled states: what it gains is
what attention gains. It stops when dev no longer improves and keeps the best step, the start included, so that its log
loss on dev is never above the linear probe's of the same penalty. The edge probe of the paper further projects the
words to 256 dimensions first and has a hidden layer behind the pooling; both are left out here, so that the two probes
differ in their pooling only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probing.probes.fitted import FamilyFit, FittedProbe
from probing.probes.linear import DEFAULT_L2, LinearProbeFit, fit_linear_probes
from probing.probes.span_words import Bags, SpanWords, checked_spans, pool_words, span_bags, standardised_words
from probing.probes.standardise import moments
from probing.tasks.base import Kind, Task
from spafit.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Steps of L-BFGS between two looks at dev, and looks without an improvement after which a fit ends.
STEPS_PER_LOOK, PATIENCE = 5, 4
#: Bits per item on dev that count as an improvement when patience is counted.
IMPROVEMENT = 1e-3

_LN2 = float(np.log(2))


@dataclass(frozen=True)
class EdgeAttentionFit:
    """Edge probes of B representations × M label sets, trained on the same n items.

    Attributes:
        attention: float32, (B, M, spans, width): v, on standardised words.
        word_mean: float32, (B, width): subtracted from the states of words.
        word_scale: float32, (B, width): divides them afterwards.
        linear: the classifier on the pooled states, of width spans × width, with P = 1. Its ``converged`` and ``gap``
            are those of the linear probe on mean-pooled states, from which the fit started.
        steps: steps of L-BFGS up to the one that was kept, (B, M); 0 where attention gained nothing on dev.
        dev_bits: log loss on dev, bits per item, (B, M).
        dev_bits_mean: the same for mean pooling, (B, M).
    """

    attention: np.ndarray = field(repr=False)
    word_mean: np.ndarray = field(repr=False)
    word_scale: np.ndarray = field(repr=False)
    linear: LinearProbeFit
    steps: np.ndarray
    dev_bits: np.ndarray
    dev_bits_mean: np.ndarray

    def log_probabilities(
        self, words: np.ndarray | torch.Tensor, spans: np.ndarray, *, label_set: int | None = None
    ) -> np.ndarray:
        """Natural logarithms of the class probabilities (divide by ln 2 for bits).

        Args:
            words: states of words, (B, words, width), in the units of the training states.
            spans: half-open rows of ``words`` of each item's spans, (n, spans, 2).
            label_set: one of the M label sets; all of them by default.

        Returns:
            float32, (B, M, 1, n, classes), or (B, 1, n, classes) for one label set, as the linear probe gives them.

        Raises:
            UsageError: shapes that do not fit the fit's, or an empty span.
            NumericalError: states that are not finite.
        """
        representations, sets, slots, width = self.attention.shape
        spans = checked_spans(words, spans)
        if (words.shape[0], words.shape[2], spans.shape[1]) != (representations, width, slots):
            raise UsageError(
                f"The probe was fitted on {representations} representation(s) of width {width} and {slots} span(s) per "
                f"item; got words of shape {tuple(words.shape)} and spans of shape {spans.shape}."
            )
        import torch

        chosen = range(sets) if label_set is None else [label_set]
        out = np.empty((representations, len(chosen), 1, len(spans), self.linear.weights.shape[-1]), dtype=np.float32)
        bags = span_bags(spans, "cpu")
        for b in range(representations):
            x = standardised_words(words[b], self.word_mean[b], self.word_scale[b], b, "cpu")
            for i, m in enumerate(chosen):
                pooled = pool_words(x, bags, torch.from_numpy(self.attention[b, m]))
                out[b, i] = _at(self.linear, b, m).log_probabilities(pooled[None])[0, 0]
        return out if label_set is None else out[:, 0]


def fit_edge_attention(
    words_train: np.ndarray | torch.Tensor,
    spans_train: np.ndarray,
    labels: np.ndarray,
    words_dev: np.ndarray | torch.Tensor,
    spans_dev: np.ndarray,
    labels_dev: np.ndarray,
    *,
    n_classes: int,
    l2_grid: Sequence[float] = DEFAULT_L2,
    device: str = "cpu",
    max_steps: int = 200,
) -> tuple[EdgeAttentionFit, np.ndarray]:
    """Choose the penalty of each representation on dev and fit all label sets at it, as the linear probe does.

    Label set 0 is the task: it is fitted at every penalty, and the one with the lowest log loss on dev is kept. The
    others (control tasks) are fitted at that penalty, each stopped by its own dev labels. A representation's numbers
    do not depend on which others are in the call. The same call gives the same bytes on one machine's CPU.

    Args:
        words_train: states of the words of the training texts, (B, words, width); spans may share words.
        spans_train: half-open rows of ``words_train`` of each item's one or two spans, (n, spans, 2).
        labels: training labels, (M, n) or (n,).
        words_dev: states of the words of the dev texts, (B, words, width).
        spans_dev: like ``spans_train``, (n_dev, spans, 2).
        labels_dev: dev labels, shaped like ``labels``.
        n_classes: number of classes.
        l2_grid: penalties to choose from; equal losses go to the first.
        device: torch device of the products.
        max_steps: steps of L-BFGS after which a fit ends.

    Returns:
        The fit and the chosen penalties, (B,).

    Raises:
        UsageError: shapes, labels or penalties that do not fit together, or an empty span.
        NumericalError: states that are not finite.
    """
    spans_train, spans_dev = checked_spans(words_train, spans_train), checked_spans(words_dev, spans_dev)
    labels, dev = np.atleast_2d(np.asarray(labels)), np.atleast_2d(np.asarray(labels_dev))
    shapes = (len(words_train), words_train.shape[2], spans_train.shape[1], len(labels))
    if shapes != (len(words_dev), words_dev.shape[2], spans_dev.shape[1], len(dev)) or dev.shape[1] != len(spans_dev):
        raise UsageError(
            f"Dev has words {tuple(words_dev.shape)}, spans {spans_dev.shape} and labels {dev.shape}, which do not fit "
            f"training's {tuple(words_train.shape)}, {spans_train.shape} and {labels.shape}."
        )
    bags, bags_dev = span_bags(spans_train, device), span_bags(spans_dev, device)
    used = np.unique(np.concatenate([bag.index.cpu().numpy() for bag in bags]))
    found: list[tuple[LinearProbeFit, np.ndarray, list[_Best], np.ndarray, np.ndarray, float]] = []
    for b in range(len(words_train)):
        mean, scale, _ = moments(words_train[b][used], b)
        x = standardised_words(words_train[b], mean, scale, b, device)
        x_dev = standardised_words(words_dev[b], mean, scale, b, device)
        pooled = pool_words(x, bags, x.new_zeros(shapes[2], shapes[1])).cpu()[None]
        path = fit_linear_probes(pooled, labels[:1], n_classes=n_classes, l2=l2_grid, device=device)
        layer = _Layer(x, bags, x_dev, bags_dev, max_steps)
        tried = [layer.fit(_at(path, 0, 0, p), labels[0], dev[0]) for p in range(len(l2_grid))]
        best = int(np.argmin([t.bits for t in tried]))
        fits, starts = [tried[best]], [_at(path, 0, 0, best)]
        for m in range(1, len(labels)):
            start = fit_linear_probes(pooled, labels[m], n_classes=n_classes, l2=[l2_grid[best]], device=device)
            starts.append(start)
            fits.append(layer.fit(start, labels[m], dev[m]))
        found.append((_joined(starts, fits), np.stack([f.attention for f in fits]), fits, mean, scale, l2_grid[best]))
    chosen = np.array([f[5] for f in found])
    fit = EdgeAttentionFit(
        attention=np.stack([f[1] for f in found]),
        word_mean=np.stack([f[3] for f in found]),
        word_scale=np.stack([f[4] for f in found]),
        linear=_stacked([f[0] for f in found], chosen),
        steps=np.array([[one.steps for one in f[2]] for f in found]),
        dev_bits=np.array([[one.bits for one in f[2]] for f in found]),
        dev_bits_mean=np.array([[one.bits_mean for one in f[2]] for f in found]),
    )
    return fit, chosen


@dataclass(frozen=True)
class EdgeAttention:
    """The probe family ``edge-span:attention``: a linear probe on the learned average of a span's words."""

    @property
    def name(self) -> str:
        """``edge-span:attention``."""
        return "edge-span:attention"

    def check(self, task: Task, width: int | None) -> None:
        """Every width will do, and every task that a run fits it to."""

    def cost(self, n: int, width: int, outputs: int) -> float:
        """About sixty passes over three words an item for each of the penalties, forwards and back."""
        return 3000.0 * n * width * outputs

    def fit(
        self,
        x_train: SpanWords,
        targets: np.ndarray,
        x_dev: SpanWords,
        targets_dev: np.ndarray,
        *,
        kind: Kind,
        n_classes: int,
        l2: Sequence[float] | None,
        seed: int,
        device: str,
    ) -> FamilyFit:
        """See :meth:`probing.probes.families.Family.fit`; for classes alone, and nothing is drawn."""
        fit, chosen = fit_edge_attention(
            x_train.words, x_train.spans, targets, x_dev.words, x_dev.spans, targets_dev,
            n_classes=n_classes, l2_grid=l2 or DEFAULT_L2, device=device,
        )  # fmt: skip
        linear = fit.linear
        probes = [
            [
                FittedProbe(
                    {"weight": linear.weights[b, m, 0], "bias": linear.bias[b, m, 0], "mean": linear.mean[b],
                     "scale": linear.scale[b], "attention": fit.attention[b, m], "word_mean": fit.word_mean[b],
                     "word_scale": fit.word_scale[b]},
                    kind, ~linear.present[m], linear.n_items,
                )
                for m in range(len(targets))
            ]
            for b in range(len(x_train.words))
        ]  # fmt: skip
        return FamilyFit(probes, linear.converged[:, :, 0], np.repeat(chosen[:, None], len(targets), 1))


# ---------------------------------------------------------------- fitting


@dataclass
class _Best:
    """The step of a fit with the lowest log loss on dev, bits per item, and that of mean pooling."""

    attention: np.ndarray
    weights: np.ndarray  # (spans × width, classes), zero for absent classes
    bias: np.ndarray
    steps: int
    bits: float
    bits_mean: float


@dataclass(frozen=True)
class _Layer:
    """One representation, standardised."""

    x: torch.Tensor
    bags: list[Bags]
    x_dev: torch.Tensor
    bags_dev: list[Bags]
    max_steps: int

    def fit(self, start: LinearProbeFit, labels: np.ndarray, labels_dev: np.ndarray) -> _Best:
        """Fit one label set from the linear probe ``start`` (a single fit) on mean-pooled states."""
        import torch

        device, width = self.x.device, self.x.shape[1]
        present, l2 = np.flatnonzero(start.present[0]), float(start.l2.reshape(-1)[0])
        position = np.zeros(len(start.present[0]), dtype=np.int64)
        position[present] = np.arange(len(present))
        target = torch.from_numpy(position[labels]).to(device)
        mean, scale = (torch.from_numpy(a[0]).to(device) for a in (start.mean, start.scale))
        attention = torch.zeros(len(self.bags), width, device=device, requires_grad=True)
        weights = torch.from_numpy(start.weights[0, 0, 0][:, present]).contiguous().to(device).requires_grad_()
        bias = torch.from_numpy(start.bias[0, 0, 0][present]).to(device).requires_grad_()
        parameters = [attention, weights, bias]
        solver = torch.optim.LBFGS(parameters, max_iter=STEPS_PER_LOOK, line_search_fn="strong_wolfe")

        def objective() -> torch.Tensor:
            solver.zero_grad()
            logits = (pool_words(self.x, self.bags, attention) - mean) / scale @ weights + bias
            penalty = l2 / 2 * (weights.square().sum() + attention.square().sum())
            value = torch.nn.functional.cross_entropy(logits, target) + penalty
            value.backward()
            return value

        def now(steps: int, bits_mean: float) -> _Best:
            full = np.zeros(start.weights.shape[-2:], dtype=np.float32)
            shift = np.zeros(start.weights.shape[-1], dtype=np.float32)
            full[:, present], shift[present] = weights.detach().cpu().numpy(), bias.detach().cpu().numpy()
            found = _Best(attention.detach().cpu().numpy().copy(), full, shift, steps, np.inf, bits_mean)
            probe = _with(start, found)
            with torch.no_grad():
                log_p = probe.log_probabilities(
                    pool_words(self.x_dev, self.bags_dev, attention).cpu()[None], label_set=0
                )
            chosen = np.take_along_axis(log_p[0, 0], labels_dev[:, None], 1)
            found.bits = float(-chosen.sum(dtype=np.float64) / (len(labels_dev) * _LN2))
            return found

        best = now(0, np.nan)
        best.bits_mean = mean_bits = marked = best.bits
        waited = 0
        for steps in range(STEPS_PER_LOOK, self.max_steps + 1, STEPS_PER_LOOK):
            value = solver.step(objective)
            if not bool(torch.isfinite(value)):
                break
            here = now(steps, mean_bits)
            if here.bits < best.bits:
                best = here
            waited = 0 if best.bits < marked - IMPROVEMENT else waited + 1
            marked = min(marked, best.bits) if waited == 0 else marked
            if waited == PATIENCE:
                break
        return best


def _with(start: LinearProbeFit, found: _Best) -> LinearProbeFit:
    return replace(start, weights=found.weights[None, None, None], bias=found.bias[None, None, None])


def _at(fit: LinearProbeFit, b: int, m: int, p: int = 0) -> LinearProbeFit:
    """A single one of several fits."""
    one, sets, penalty = slice(b, b + 1), slice(m, m + 1), slice(p, p + 1)
    return LinearProbeFit(
        weights=fit.weights[one, sets, penalty],
        bias=fit.bias[one, sets, penalty],
        mean=fit.mean[one],
        scale=fit.scale[one],
        l2=fit.l2[penalty] if fit.l2.ndim == 1 else fit.l2[one],
        converged=fit.converged[one, sets, penalty],
        gap=fit.gap[one, sets, penalty],
        iterations=fit.iterations[one, sets, penalty],
        present=fit.present[sets],
        n_items=fit.n_items,
    )


def _joined(starts: Sequence[LinearProbeFit], fits: Sequence[_Best]) -> LinearProbeFit:
    """The label sets of one representation as one fit."""
    names = ("weights", "bias", "converged", "gap", "iterations")
    done = [_with(start, found) for start, found in zip(starts, fits, strict=True)]
    together: dict[str, Any] = {name: np.concatenate([getattr(d, name) for d in done], axis=1) for name in names}
    return replace(done[0], **together, present=np.concatenate([d.present for d in done]))


def _stacked(layers: Sequence[LinearProbeFit], l2: np.ndarray) -> LinearProbeFit:
    """The representations as one fit, each with its own penalty."""
    names = ("weights", "bias", "mean", "scale", "converged", "gap", "iterations")
    together: dict[str, Any] = {name: np.concatenate([getattr(layer, name) for layer in layers]) for name in names}
    return replace(layers[0], **together, l2=l2[:, None])
