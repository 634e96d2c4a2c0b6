"""How well predicted distances and depths give back dependency trees, with intervals over sentences.

The four measures are those of Hewitt & Manning (2019):

- ``uuas``: share of gold edges among the edges of the minimum spanning tree of the predicted distances, over all
  sentences together. Punctuation is left out: the spanning tree joins the other words, and only edges between two of
  them are gold. (The paper's code also counts, where punctuation governs words, the edges that then join its
  dependents.)
- ``dspr``: Spearman's correlation of predicted and gold distances from a word to all words of the sentence, itself
  included, averaged over the words of all sentences of one length, then over the lengths from 5 to 50.
- ``nspr``: Spearman's correlation of predicted and gold depths of a sentence, averaged likewise.
- ``root_accuracy``: share of sentences where the word of least predicted depth, punctuation left out, is the root;
  sentences whose root is punctuation are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from probing.probes.structural import RANK, fit_structural_probes
from probing.trees import Tree, length_groups
from spafit.errors import NumericalError, UsageError
from spafit.stats import BootstrapDraw, interval

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("uuas", "dspr", "nspr", "root_accuracy")
#: Shortest and longest sentence that the rank correlations are averaged over.
LENGTHS = (5, 50)


@dataclass(frozen=True)
class TreeScores:
    """Scores of S sentences at H hidden states, sentence by sentence.

    Attributes:
        lengths: words, (S,).
        gold_edges: edges between words that are not punctuation, (S,).
        right_edges: those of them that were found, (H, S).
        distance_spearman: mean over the words of a sentence, (H, S).
        depth_spearman: (H, S).
        has_root: whether the root is not punctuation, (S,).
        right_root: whether it was found, (H, S); False where ``has_root`` is.
    """

    lengths: np.ndarray = field(repr=False)
    gold_edges: np.ndarray = field(repr=False)
    right_edges: np.ndarray = field(repr=False)
    distance_spearman: np.ndarray = field(repr=False)
    depth_spearman: np.ndarray = field(repr=False)
    has_root: np.ndarray = field(repr=False)
    right_root: np.ndarray = field(repr=False)

    def of(self, chosen: np.ndarray) -> TreeScores:
        """The scores of some sentences: a mask or positions, (S,)."""
        per_hidden = {"right_edges", "distance_spearman", "depth_spearman", "right_root"}
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return TreeScores(**{n: v[:, chosen] if n in per_hidden else v[chosen] for n, v in parts.items()})

    def counted(self, metric: str) -> int:
        """Number of sentences that a metric is taken over."""
        return int((self._parts(metric)[1] > 0).sum())

    def means(self, metric: str, counts: np.ndarray) -> np.ndarray:
        """One of :data:`METRICS` on resampled sentences.

        Args:
            metric: the measure.
            counts: how often each sentence is taken, (resamples, S).

        Returns:
            float64, (resamples, H). Lengths of which a resample has no sentence do not count in it; NaN where it has
            no sentence to count at all.

        Raises:
            UsageError: an unknown metric.
        """
        values, weights, strata = self._parts(metric)
        total = np.zeros((len(counts), len(values)))
        found = np.zeros((len(counts), 1))
        for stratum in np.unique(strata[weights > 0]):
            there = np.flatnonzero((strata == stratum) & (weights > 0))
            taken = counts[:, there].astype(np.float64)
            share = taken @ weights[there][:, None]
            total += np.divide(taken @ values[:, there].T, share, out=np.zeros_like(total), where=share > 0)
            found += share > 0
        return np.divide(total, found, out=np.full_like(total, np.nan), where=found > 0)

    def _parts(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums (H, S) and weights (S,) whose ratio is the metric, and the strata (S,) it is averaged over."""
        one = np.zeros_like(self.lengths)
        if metric == "uuas":
            return self.right_edges, self.gold_edges.astype(np.float64), one
        if metric == "root_accuracy":
            return self.right_root, self.has_root.astype(np.float64), one
        if metric not in METRICS:
            raise UsageError(f"There is no tree metric {metric!r}. Use one of {', '.join(METRICS)}.")
        inside = (self.lengths >= LENGTHS[0]) & (self.lengths <= LENGTHS[1])
        values = self.distance_spearman if metric == "dspr" else self.depth_spearman
        return values, inside.astype(np.float64), self.lengths


def score_trees(distances: Sequence[np.ndarray], depths: Sequence[np.ndarray], trees: Sequence[Tree]) -> TreeScores:
    """Score predicted distances and depths against trees.

    Args:
        distances: for each sentence of n words (H, n, n), symmetric.
        depths: for each sentence (H, n).
        trees: the gold trees.

    Raises:
        UsageError: no sentences, or shapes that do not fit the trees; names the sentence.
        NumericalError: a prediction that is not finite; names the sentence.
    """
    if not len(trees) == len(distances) == len(depths) or not len(trees):
        raise UsageError(
            f"There are {len(trees)} tree(s), {len(distances)} matrices of distances and {len(depths)} rows of depths; "
            "give one of each per sentence, and at least one sentence."
        )
    hidden = len(distances[0])
    for tree, matrix, row in zip(trees, distances, depths, strict=True):
        n = len(tree)
        if matrix.shape != (hidden, n, n) or row.shape != (hidden, n):
            raise UsageError(
                f"Sentence {tree.name!r} of {n} word(s) has distances of shape {matrix.shape} and depths of shape "
                f"{row.shape}; ({hidden}, {n}, {n}) and ({hidden}, {n}) are needed."
            )
        if not (np.isfinite(matrix).all() and np.isfinite(row).all()):
            raise NumericalError(f"The predictions for sentence {tree.name!r} hold NaN or infinite values.")
    lengths = np.array([len(tree) for tree in trees])
    by_distance, by_depth = np.zeros((2, hidden, len(trees)))
    for _, where in length_groups(lengths):
        gold = np.stack([trees[i].distances for i in where])
        by_distance[:, where] = spearman(np.stack([distances[i] for i in where], 1), gold[None]).mean(-1)
        by_depth[:, where] = spearman(
            np.stack([depths[i] for i in where], 1), np.stack([trees[i].depths for i in where])
        )
    kept = [np.flatnonzero(~tree.punctuation) for tree in trees]
    gold_edges, right_edges = np.zeros(len(trees), dtype=np.int64), np.zeros((hidden, len(trees)), dtype=np.int64)
    has_root, right_root = np.zeros(len(trees), dtype=bool), np.zeros((hidden, len(trees)), dtype=bool)
    for m, where in length_groups([len(words) for words in kept]):
        if m == 0:
            continue
        least = np.stack([depths[i][:, kept[i]].argmin(1) for i in where], 1)
        roots = np.array([_position(kept[i], trees[i].root) for i in where])
        has_root[where], right_root[:, where] = roots >= 0, least == roots
        adjacent = np.stack([trees[i].distances[np.ix_(kept[i], kept[i])] == 1 for i in where])
        gold_edges[where] = adjacent.sum((1, 2)) // 2
        inner = np.stack([distances[i][:, kept[i][:, None], kept[i]] for i in where], 1)
        edges = spanning_edges(inner)
        sentence = np.arange(len(where))[:, None]
        right_edges[:, where] = adjacent[sentence, edges[..., 0], edges[..., 1]].sum(-1)
    return TreeScores(lengths, gold_edges, right_edges, by_distance, by_depth, has_root, right_root)


def _position(words: np.ndarray, word: int) -> int:
    found = np.flatnonzero(words == word)
    return int(found[0]) if len(found) else -1


def spanning_edges(distances: np.ndarray) -> np.ndarray:
    """Edges of minimum spanning trees, all at once by Prim's algorithm.

    Args:
        distances: (…, n, n), symmetric. Of equal distances the one to the first word outside the tree is taken.

    Returns:
        int64, (…, n - 1, 2): positions of the two words of each edge.
    """
    n = distances.shape[-1]
    flat = distances.reshape(-1, n, n)
    rows = np.arange(len(flat))
    edges = np.empty((len(flat), n - 1, 2), dtype=np.int64)
    nearest, via = flat[:, 0].astype(np.float64), np.zeros((len(flat), n), dtype=np.int64)
    nearest[:, 0] = np.inf
    inside = np.zeros((len(flat), n), dtype=bool)
    inside[:, 0] = True
    for step in range(n - 1):
        word = nearest.argmin(1)
        edges[:, step, 0], edges[:, step, 1] = via[rows, word], word
        inside[rows, word] = True
        closer = (flat[rows, word] < nearest) & ~inside
        nearest, via = np.where(closer, flat[rows, word], nearest), np.where(closer, word[:, None], via)
        nearest[rows, word] = np.inf
    return edges.reshape(*distances.shape[:-2], n - 1, 2)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis, ties sharing a rank; 0 where one side does not vary."""
    a, b = (rankdata(v, axis=-1) for v in (a, b))
    a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    product = (a * b).sum(-1)
    return np.divide(product, size, out=np.zeros_like(product), where=size > 1e-9)


def linear_chain(trees: Sequence[Tree]) -> TreeScores:
    """Scores of the baseline that knows the order of words alone: neighbours are joined, and depth is the position."""
    places = [np.arange(len(tree), dtype=np.float32) for tree in trees]
    return score_trees([np.abs(p[:, None] - p)[None] for p in places], [p[None] for p in places], trees)


def tree_table(
    scores: TreeScores,
    chain: TreeScores,
    *,
    hidden: Sequence[int],
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Tidy scores with 95 % intervals; all hidden states and metrics share one resample of the sentences.

    Args:
        scores: from :func:`score_trees`.
        chain: from :func:`linear_chain`, of the same trees.
        hidden: hidden index of each of the H rows of scores.
        n_boot: bootstrap replicates.
        seed: chooses the resample.

    Returns:
        Columns ``hidden``, ``metric``, ``value``, ``ci_low``, ``ci_high``, ``n`` (sentences counted) and
        ``linear_chain`` (the value of the baseline on them). Values are NaN where no sentence counts. The interval
        speaks about these probes: training sentences are not redrawn.

    Raises:
        UsageError: ``hidden`` of another length, or fewer than two replicates.
    """
    if len(hidden) != len(scores.right_edges):
        raise UsageError(f"hidden names {len(hidden)} hidden state(s); there are scores of {len(scores.right_edges)}.")
    sentences = np.arange(len(scores.lengths))
    counts = BootstrapDraw.make(sentences, 1, n_boot=n_boot, seed=seed).cluster_counts
    once = np.ones((1, len(sentences)))
    tables = []
    for metric in METRICS:
        replicates = scores.means(metric, counts)
        replicates = replicates[~np.isnan(replicates).any(1)]  # resamples without a single sentence that counts
        nothing = np.full((2, len(hidden)), np.nan)
        low, high = interval(replicates) if len(replicates) else nothing
        columns = {
            "hidden": list(hidden), "metric": metric, "value": scores.means(metric, once)[0],
            "ci_low": low, "ci_high": high, "n": scores.counted(metric),
            "linear_chain": chain.means(metric, once)[0, 0],
        }  # fmt: skip
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True).sort_values("hidden", kind="stable", ignore_index=True)


def structural_arrays(
    states: Mapping[str, np.ndarray | Tensor],
    trees: Mapping[str, Sequence[Tree]],
    *,
    hidden: Sequence[int] | None = None,
    rank: int = RANK,
    seed: int = 0,
    n_boot: int = 1000,
    device: str = "cpu",
) -> pd.DataFrame:
    """Train structural probes on ``train``, stop them on ``dev``, and score them on ``test``.

    Args:
        states: for each of the three splits (H, words, width), the words of its sentences one after the other.
        trees: for each split the trees of those sentences.
        hidden: hidden index of each of the H states; 0 to H - 1 by default.
        rank: rank of the probes, at most the width.
        seed: draws first weights, order of sentences, and the resample.
        n_boot: bootstrap replicates.
        device: torch device of the products.

    Returns:
        The table of :func:`tree_table`.

    Raises:
        UsageError: a split is missing, or shapes do not fit together.
        NumericalError: states that are not finite.
    """
    for split in ("train", "dev", "test"):
        if split not in states or split not in trees:
            raise UsageError(f"states or trees have no split {split!r}; give train, dev and test.")
    probes = fit_structural_probes(
        states["train"], trees["train"], states["dev"], trees["dev"], rank=rank, seed=seed, device=device
    )
    test = trees["test"]
    lengths = [len(tree) for tree in test]
    scores = score_trees(probes.distances(states["test"], lengths), probes.depths(states["test"], lengths), test)
    names = range(len(states["test"])) if hidden is None else hidden
    return tree_table(scores, linear_chain(test), hidden=names, n_boot=n_boot, seed=seed)
