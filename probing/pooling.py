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
        lengths: tokens per segment, at least one, shape (segments,).
        longest: the largest of ``lengths``.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    longest: int

    @classmethod
    def of(cls, tokens: np.ndarray, lengths: np.ndarray, *, device: str = "cpu") -> Segments:
        """Build from token rows and segment lengths; every segment needs at least one token."""
        import torch

        if len(lengths) and lengths.min() < 1:
            raise ValueError("a segment without tokens cannot be pooled")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0)
        as_tensor = lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device)  # noqa: E731
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(as_tensor(tokens), as_tensor(starts), as_tensor(lengths), longest)

    def __len__(self) -> int:
        return int(self.starts.shape[0])


def pool(states: torch.Tensor, segments: Segments, how: str) -> torch.Tensor:
    """Reduce each segment's token states to one.

    Rows that no segment names (padding, special tokens) are never read, so whatever stands there has no influence.

    Args:
        states: token states of a flattened batch, shape (rows, width).
        segments: which rows belong together.
        how: ``first``, ``last``, ``mean`` or ``max`` (element-wise).

    Returns:
        Shape (segments, width). Means are accumulated, and returned, in float32 at least.
    """
    import torch

    tokens, starts, lengths = segments.tokens, segments.starts, segments.lengths
    if how == "first" or (segments.longest <= 1 and how in POOLINGS):
        return states.index_select(0, tokens[starts])
    if how == "last":
        return states.index_select(0, tokens[starts + lengths - 1])
    if how not in POOLINGS:
        raise ValueError(f"pooling {how!r} is not one of {', '.join(POOLINGS)}")
    if how == "mean" and states.dtype in (torch.float16, torch.bfloat16):
        states = states.float()
    if segments.longest > _SHORT:
        return torch.nn.functional.embedding_bag(tokens, states, starts, mode=how)
    pooled = states.index_select(0, tokens[starts])
    for j in range(1, segments.longest):
        having = (lengths > j).nonzero().squeeze(1)
        more = states.index_select(0, tokens[starts[having] + j])
        if how == "mean":
            pooled.index_add_(0, having, more)
        else:
            pooled.index_copy_(0, having, torch.maximum(pooled.index_select(0, having), more))
    return pooled.div_(lengths.unsqueeze(1)) if how == "mean" else pooled
