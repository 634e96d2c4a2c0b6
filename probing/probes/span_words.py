"""The states of the words in spans, and their averages: plain ones, or weighted by attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from probing.probes.standardise import standardised_rows
from spafit.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SpanWords:
    """What attention over the words of spans reads for some items, at one hidden state or at B of them.

    Attributes:
        words: float32, (words, width) or (B, words, width); spans may share words.
        spans: half-open rows of ``words`` of each item's one or two spans, (items, spans, 2).
    """

    words: np.ndarray = field(repr=False)
    spans: np.ndarray = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the averages: (items, spans × width), or (B, items, spans × width)."""
        return *self.words.shape[:-2], len(self.spans), self.spans.shape[1] * self.words.shape[-1]

    @property
    def ndim(self) -> int:
        """Two, or three where there are several hidden states."""
        return self.words.ndim

    @property
    def size(self) -> int:
        """Numbers that the states hold."""
        return self.words.size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, position: int) -> SpanWords:
        """One hidden state of several."""
        return SpanWords(self.words[position], self.spans)

    def means(self) -> np.ndarray:
        """Plain averages over the words of each span at one hidden state, side by side, float32, ``shape``."""
        import torch

        bags = span_bags(checked_spans(self.words[None], self.spans), "cpu")
        words = torch.from_numpy(self.words)
        return pool_words(words, bags, words.new_zeros(len(bags), words.shape[1])).numpy()

    def pooled(self, attention: np.ndarray, mean: np.ndarray, scale: np.ndarray, *, position: int = 0) -> torch.Tensor:
        """Averages of the standardised words of one hidden state, with weights softmax(attention · word) in each span.

        Args:
            attention: (spans, width).
            mean: subtracted from the words, (width,).
            scale: divides them afterwards, (width,).
            position: of the hidden state, for messages.

        Returns:
            float32, ``shape``.

        Raises:
            UsageError: shapes that do not fit, or an empty span.
            NumericalError: states that are not finite.
        """
        import torch

        spans = checked_spans(self.words[None], self.spans)
        if attention.shape != (spans.shape[1], self.words.shape[1]):
            raise UsageError(
                f"The probe reads {attention.shape[0]} span(s) per item of width {attention.shape[1]}; got "
                f"{spans.shape[1]} of width {self.words.shape[1]}."
            )
        x = standardised_words(self.words, mean, scale, position, "cpu")
        return pool_words(x, span_bags(spans, "cpu"), torch.from_numpy(np.asarray(attention)))


def stack_states(states: Sequence[np.ndarray | SpanWords]) -> np.ndarray | SpanWords:
    """Several hidden states of the same items as one, along a new first axis."""
    words = [s for s in states if isinstance(s, SpanWords)]
    if not words:
        return np.stack([s for s in states if not isinstance(s, SpanWords)])
    return SpanWords(np.stack([s.words for s in words]), words[0].spans)


# ---------------------------------------------------------------- pooling


@dataclass(frozen=True)
class Bags:
    """The words of one span of every item: their rows one after the other, where each span begins, its length."""

    index: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


def span_bags(spans: np.ndarray, device: str) -> list[Bags]:
    """Bags of each of the items' spans; ``spans`` as :func:`checked_spans` gives them."""
    import torch

    def of(slot: np.ndarray) -> Bags:
        lengths = slot[:, 1] - slot[:, 0]
        index = np.repeat(slot[:, 0] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        arrays = (index, np.cumsum(lengths) - lengths, lengths)
        return Bags(*(torch.from_numpy(a.astype(np.int64)).to(device) for a in arrays))

    return [of(spans[:, s]) for s in range(spans.shape[1])]


def pool_words(x: torch.Tensor, bags: Sequence[Bags], attention: torch.Tensor) -> torch.Tensor:
    """Attention-weighted means of the words of each item's spans, side by side, (n, spans × width)."""
    import torch

    pooled = []
    for bag, v in zip(bags, attention, strict=True):
        scores = (x @ v)[bag.index]
        peak = torch.segment_reduce(scores.detach(), "max", lengths=bag.lengths)
        weights = (scores - peak.repeat_interleave(bag.lengths)).exp()
        total = torch.segment_reduce(weights, "sum", lengths=bag.lengths)
        summed = torch.nn.functional.embedding_bag(bag.index, x, bag.starts, mode="sum", per_sample_weights=weights)
        pooled.append(summed / total[:, None])
    return torch.cat(pooled, 1)


def standardised_words(
    words: np.ndarray | torch.Tensor, mean: np.ndarray, scale: np.ndarray, b: int, device: str
) -> torch.Tensor:
    """Words (words, width), standardised, in one piece."""
    import torch

    out = torch.empty(tuple(words.shape), dtype=torch.float32)
    for rows, features in standardised_rows(words, mean, scale, b):
        out[rows] = features
    return out.to(device)


def checked_spans(words: np.ndarray | torch.Tensor, spans: np.ndarray) -> np.ndarray:
    """Half-open rows of ``words`` (B, words, width) as int64, (n, spans, 2).

    Raises:
        UsageError: shapes that do not fit, or an empty span.
    """
    spans = np.asarray(spans)
    if words.ndim != 3 or spans.ndim != 3 or spans.shape[2] != 2 or spans.dtype.kind not in "iu" or not len(spans):
        raise UsageError(
            f"Words have shape {tuple(words.shape)} and spans {spans.shape} of {spans.dtype}; (representations, words, "
            "width) and whole numbers (items, spans, 2) are needed."
        )
    bad = (spans[..., 0] < 0) | (spans[..., 1] <= spans[..., 0]) | (spans[..., 1] > words.shape[1])
    if bad.any():
        item = int(np.flatnonzero(bad.any(1))[0])
        raise UsageError(
            f"A span of item {item} is {spans[item].tolist()}; it must be [start, end) with start < end among "
            f"{words.shape[1]} words."
        )
    return spans.astype(np.int64)
