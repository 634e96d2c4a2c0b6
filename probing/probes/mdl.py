"""Online code length of labels given hidden states, for many hidden states and label sets together.

Two parties know all states; one also knows the labels and sends them in growing blocks. The first block is sent with
the uniform code. For every later block both fit a probe to all labels sent so far, and the block costs minus the sum of
log2 of the probabilities that this probe gives its labels. A label set that is learnt well, and from few items, has a
short code (Voita & Titov 2020, "Information-theoretic probing with minimum description length"). Everything is in bits.

Each block's probe is the linear probe of :mod:`probing.probes.linear` with three choices that belong to the code:

* States are standardised once, on all items: both parties know them. A few items would give some columns scales that
  are too small by orders of magnitude.
* The penalty stands for one prior that does not change as labels arrive: ``l2`` at all n items, so ``l2 · n / t`` where
  t labels are known (in scikit-learn one ``C`` for all blocks).
* Every probe gives every class some probability: those that have not been seen share half a pseudo-item each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from probing.probes.linear import (
    BATCH_COEFFICIENTS,
    DEFAULT_TOLERANCE,
    SCORED_ROWS,
    ProbeProblem,
    log_softmax_with_absent,
)
from probing.probes.standardise import moments, standardised_rows
from spafit.errors import NumericalError, UsageError, check_choice
from spafit.runtime import generator

if TYPE_CHECKING:
    import pandas as pd
    import torch

#: Shares of the items after which a block ends (Voita & Titov 2020).
FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
#: Bits in the "kbit" of published tables.
KBIT = 1024

_LN2 = float(np.log(2))


@dataclass(frozen=True)
class OnlineCode:
    """Online code lengths of M label sets given B hidden states, of one shuffle of the items.

    Compare codes of the same items only: the share of the first, uniform block and the sizes of the others follow from
    their number. A code depends on the shuffle, most for few items: look at several seeds.

    Attributes:
        block_bits: float64, (B, M, blocks): what each block costs; the first is the uniform code's.
        ends: (blocks,): items sent by the end of each block.
        n_classes: classes K, seen or not.
        l2: float64, (B,): penalties on the scale of all items.
        converged: bool, (B, M, blocks): whether each block's fit reached the tolerance; True for the first.
        seed: of the shuffle.
    """

    block_bits: np.ndarray = field(repr=False)
    ends: np.ndarray
    n_classes: int
    l2: np.ndarray
    converged: np.ndarray = field(repr=False)
    seed: int

    @property
    def n_items(self) -> int:
        """Number of items."""
        return int(self.ends[-1])

    @property
    def uniform_bits(self) -> float:
        """Length of the uniform code, n · log2 K."""
        return float(self.n_items * np.log2(self.n_classes))

    @property
    def bits(self) -> np.ndarray:
        """Code lengths, float64, (B, M)."""
        return self.block_bits.sum(2)

    @property
    def compression(self) -> np.ndarray:
        """Uniform code length / code length, float64, (B, M); about 1 or less where the states say nothing."""
        return self.uniform_bits / self.bits

    def legacy_kbit(self) -> np.ndarray:
        """Code lengths as the code of Voita & Titov 2020 adds them up, (B, M), only to set beside published tables.

        The first block is in bits, the others in nats, and 1,024 of the sum are a "kbit".
        """
        return np.asarray((self.block_bits[:, :, 0] + _LN2 * self.block_bits[:, :, 1:].sum(2)) / KBIT)

    def to_pandas(self, *, rows: Literal["codes", "blocks"] = "codes") -> pd.DataFrame:
        """One row per hidden state and label set, or per block of each.

        Columns of both: ``hidden`` (position in the call), ``label_set``, ``seed``, ``l2``, ``bits``, ``converged``.
        Codes: ``n_items``, ``n_classes``, ``uniform_bits``, ``compression``. Blocks: ``start`` and ``stop``, half-open
        positions in the shuffled items.

        Raises:
            UsageError: ``rows`` is neither.
        """
        import pandas as pd

        check_choice("rows", rows, ("codes", "blocks"))
        whole = rows == "codes"
        bits, converged = (self.bits, self.converged.all(2)) if whole else (self.block_bits, self.converged)
        index = np.indices(bits.shape)
        hidden, label_set = index[0].ravel(), index[1].ravel()
        head = {"hidden": hidden, "label_set": label_set, "seed": self.seed, "l2": self.l2[hidden]}
        if whole:
            own = {"n_items": self.n_items, "n_classes": self.n_classes, "uniform_bits": self.uniform_bits}
            tail = {"bits": bits.ravel(), "compression": self.compression.ravel()}
            return pd.DataFrame({**head, **own, **tail, "converged": converged.ravel()})
        starts = np.concatenate([[0], self.ends[:-1]])
        spans = {"start": starts[index[2].ravel()], "stop": self.ends[index[2].ravel()]}
        return pd.DataFrame({**head, **spans, "bits": bits.ravel(), "converged": converged.ravel()})


def block_ends(n_items: int, n_classes: int) -> np.ndarray:
    """Items sent by the end of each block: max(round(.001 n), K), then the later :data:`FRACTIONS` above it.

    Raises:
        UsageError: not more items than classes, so that no block could be sent with a probe.
    """
    first = max(round(FRACTIONS[0] * n_items), n_classes)
    if n_items <= first:
        raise UsageError(
            f"An online code of {n_items} items and {n_classes} classes has no block after the uniform one; it needs "
            f"at least {n_classes + 1} items."
        )
    later = [round(fraction * n_items) for fraction in FRACTIONS[1:]]
    return np.array([first] + [end for end in later if end > first])


def online_code(
    x: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    *,
    n_classes: int,
    l2: float | Sequence[float] | np.ndarray,
    seed: int = 0,
    device: str = "cpu",
    max_iterations: int = 200,
    tolerance: float = DEFAULT_TOLERANCE,
) -> OnlineCode:
    """Online code of every label set given every hidden state, all in the order of one shuffle.

    One hidden state is copied at a time. Each block's fit starts from the one before.

    Args:
        x: features of the items to send, (B, n, width), any float type.
        labels: integers from 0 to ``n_classes`` - 1, (M, n) or (n,): the task, and control tasks after it.
        n_classes: number of classes K, at least two.
        l2: penalty on the scale of :func:`~probing.probes.linear.fit_linear_probes` at all n items, one or one per
            hidden state, such as :func:`~probing.probes.linear.fit_selected` chooses on dev with these items.
        seed: of the shuffle.
        device: torch device for the products; one with float64.
        max_iterations: passes over a block's rows after which a fit is given up; ``converged`` is then False.
        tolerance: bits per item, see :data:`~probing.probes.linear.DEFAULT_TOLERANCE`.

    Raises:
        UsageError: shapes, labels or penalties that do not fit together, or not more items than classes.
        NumericalError: features that are not finite; names the hidden state.
    """
    penalties = np.atleast_1d(np.asarray(l2, dtype=np.float64))
    problem = ProbeProblem(x, labels, n_classes, penalties.tolist(), device, max_iterations, tolerance)
    if len(penalties) not in (1, len(x)):
        raise UsageError(
            f"l2 holds {len(penalties)} penalties for {len(x)} hidden state(s); give one, or one for each."
        )
    penalties = np.broadcast_to(penalties, len(x))
    ends = block_ends(problem.n, n_classes)
    order = generator(seed, "online code", problem.n).permutation(problem.n)
    shape = (len(x), len(problem.labels), len(ends))
    block_bits, converged = np.full(shape, ends[0] * np.log2(n_classes)), np.ones(shape, dtype=bool)
    together = max(1, BATCH_COEFFICIENTS // (n_classes * (problem.width + 1)))
    for b, penalty in enumerate(penalties):
        rows = shuffled_rows(problem, b, order)
        for first in range(0, shape[1], together):
            sets = slice(first, first + together)
            sent = problem.labels[sets][:, order].astype(np.int64)
            block_bits[b, sets, 1:], gap = _later_blocks(problem, rows, sent, float(penalty), ends)
            if not np.isfinite(block_bits[b]).all():
                raise NumericalError(
                    f"Hidden state {b}: a probe's probabilities are not finite although its features are. Look for "
                    "extreme values."
                )
            converged[b, sets, 1:] = gap < tolerance
    return OnlineCode(block_bits, ends, n_classes, np.array(penalties), converged, seed)


def shuffled_rows(problem: ProbeProblem, b: int, order: np.ndarray) -> torch.Tensor:
    """Features standardised on all items, in the order they are sent, and a column of ones; (n, width + 1)."""
    import torch

    mean, scale, constant = moments(problem.x[b], b)
    place = torch.from_numpy(np.argsort(order))
    rows = torch.ones(problem.n, problem.width + 1)
    for part, values in standardised_rows(problem.x[b], mean, scale, b):
        # A column that holds rounding only must not be read.
        rows[place[part], :-1] = values.masked_fill_(torch.from_numpy(constant), 0.0)
    return rows.to(problem.device)


def _later_blocks(
    problem: ProbeProblem, rows: torch.Tensor, labels: np.ndarray, l2: float, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bits of every block after the first, and its fit's distance from the minimum in bits per item, (M, blocks-1)."""
    import torch

    from probing.probes.solver import Fits, Gram, solve

    n_sets, n_classes = len(labels), problem.classes
    # The solver's first class must be present, and so is the first item's label in every block.
    labels = np.where(labels == 0, labels[:, :1], np.where(labels == labels[:, :1], 0, labels))
    targets = torch.from_numpy(labels).to(problem.device)
    sets = torch.arange(n_sets, device=problem.device)
    coefficients = torch.zeros(n_sets, n_classes, problem.width + 1, device=problem.device)
    bits, gap = np.zeros((n_sets, len(ends) - 1)), np.zeros((n_sets, len(ends) - 1))
    gram = Gram(rows)  # of states, which both parties know; it steers the solver and moves no minimum
    for i, (known, stop) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        present = np.stack([np.bincount(row[:known], minlength=n_classes) > 0 for row in labels])
        penalties = torch.full((n_sets,), l2 * problem.n / known, device=problem.device)
        taking_part = torch.from_numpy(present).to(problem.device)
        found = solve(
            Fits(rows[:known], targets[:, :known], sets, penalties, taking_part, gram=gram),
            start=coefficients,
            warm=torch.full((n_sets,), i > 0, device=problem.device),
            tolerance=problem.tolerance * _LN2,
            max_iterations=problem.max_iterations,
        )
        coefficients = found.coefficients.masked_fill(~taking_part[:, :, None], 0.0)
        gap[:, i] = found.gap.cpu().numpy() / _LN2
        for start in range(known, stop, SCORED_ROWS):
            part = slice(start, min(start + SCORED_ROWS, stop))
            for m in range(n_sets):
                log_p = log_softmax_with_absent((rows[part] @ coefficients[m].T).cpu(), present[m], known)
                right = torch.from_numpy(labels[m, part])[:, None]
                bits[m, i] -= float(log_p.gather(1, right).sum(dtype=torch.float64)) / _LN2
    return bits, gap


@dataclass(frozen=True)
class PublishedCode:
    """A published online code.

    Attributes:
        kbit: code length in units of 1,024.
        compression: uniform code length / code length.
    """

    kbit: float
    compression: float


def published_compression(
    kbit: float, *, n_items: int, n_classes: int, units: Literal["bits", "legacy_nats"] = "bits"
) -> PublishedCode:
    """Read an online code length as the tables of Voita & Titov 2020 print it.

    Their code adds the first block, t1 · log2 K in bits, to a sum of cross-entropies in nats, and 1,024 of the sum are
    a "kbit". So t1 · log2 K is taken off, the rest divided by ln 2, and both are added again: 96.02 kbit of the 950,028
    words and 45 tags of the Penn Treebank (ELMo, layer 1) are 136.3 kbit, and the compression is 37.4 instead of 53.06.

    Args:
        kbit: the printed code length.
        n_items: items that were sent.
        n_classes: number of classes.
        units: ``bits`` gives code length and compression in bits; ``legacy_nats`` leaves the published mixture, only
            to compare.

    Raises:
        UsageError: a code length below its own first block, or other units.
    """
    check_choice("units", units, ("bits", "legacy_nats"))
    first = float(block_ends(n_items, n_classes)[0] * np.log2(n_classes))
    if not np.isfinite(kbit) or kbit * KBIT < first:
        raise UsageError(
            f"A code of {kbit} kbit is shorter than its first block, {first / KBIT:.4g} kbit for {n_items} items of "
            f"{n_classes} classes. Give the printed code length in units of {KBIT}."
        )
    length = kbit * KBIT
    if units == "bits":
        length = first + (length - first) / _LN2
    return PublishedCode(length / KBIT, float(n_items * np.log2(n_classes) / length))
