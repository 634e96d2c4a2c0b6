"""Mask-correct pooling of token states into word and sentence states, vectorised over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

POOLINGS = ("first", "last", "mean", "max")

# Up to this many tokens per segment, adding the second, third, … token of all segments in turn is the fastest exact
# way on a CPU (words); beyond it, as for sentences, torch's bag reduction is.
_SHORT = 12


@dataclass(frozen=True)
class Segments:
    """Groups of token rows in a flattened batch: each group becomes one state.

    Attributes:
        tokens: row of each token in the flattened states, segment after segment, shape (tokens,).
        starts: where each segment begins in ``tokens``, shape (segments,).
        counts: tokens per segment, at least one, as a column of floats, shape (segments, 1).
        first: row of each segment's first token, shape (segments,).
        last: row of each segment's last token, shape (segments,).
        rounds: for j = 1, 2, …: which segments have a token j, and its row. None if some segment is long.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    rounds: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None

    @classmethod
    def of(cls, tokens: np.ndarray, lengths: np.ndarray, *, device: str = "cpu") -> Segments:
        """Build from token rows and segment lengths; every segment needs at least one token."""
        import torch

        if len(lengths) and lengths.min() < 1:
            raise ValueError("a segment without tokens cannot be pooled")
        starts = np.cumsum(lengths) - lengths
        longest = int(lengths.max()) if len(lengths) else 0

        def index(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

        rounds = None
        if longest <= _SHORT:
            having = [np.flatnonzero(lengths > j) for j in range(1, longest)]
            rounds = tuple((index(i), index(tokens[starts[i] + j])) for j, i in enumerate(having, 1))
        return cls(
            tokens=index(tokens),
            starts=index(starts),
            counts=index(lengths).unsqueeze(1).float(),
            first=index(tokens[starts]),
            last=index(tokens[starts + lengths - 1]),
            rounds=rounds,
        )

    def __len__(self) -> int:
        return int(self.starts.shape[0])


def pool(states: torch.Tensor, segments: Segments, how: str, *, out: torch.Tensor) -> None:
    """Reduce each segment's token states to one, into ``out``.

    Rows that no segment names (padding, special tokens) are never read, so whatever stands there has no influence.
    Means accumulate in float32 whatever the states' precision.

    Args:
        states: token states of a flattened batch, shape (rows, width).
        segments: which rows belong together.
        how: ``first``, ``last``, ``mean`` or ``max`` (element-wise).
        out: where the result goes, shape (segments, width), on any device and in any floating type.
    """
    import torch

    if how not in POOLINGS:
        raise ValueError(f"pooling {how!r} is not one of {', '.join(POOLINGS)}")
    if not len(segments):
        return
    if how == "mean" and states.dtype in (torch.float16, torch.bfloat16):
        states = states.float()
    if how in ("mean", "max") and segments.rounds is None:
        out.copy_(torch.nn.functional.embedding_bag(segments.tokens, states, segments.starts, mode=how))
        return
    # Straight into its place where that is possible: memory traffic is what pooling costs.
    direct = out.dtype == states.dtype and out.device == states.device and out.is_contiguous()
    pooled = out if direct else states.new_empty(out.shape)
    torch.index_select(states, 0, segments.last if how == "last" else segments.first, out=pooled)
    for having, rows in segments.rounds or () if how in ("mean", "max") else ():
        more = states.index_select(0, rows)
        if how == "mean":
            pooled.index_add_(0, having, more)
        else:
            pooled.index_copy_(0, having, torch.maximum(pooled.index_select(0, having), more))
    if how == "mean":
        pooled.div_(segments.counts)
    if not direct:
        out.copy_(pooled)
