"""Random trees, and states in which a linear map finds them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probing.trees import Tree, ancestors
from spafit.runtime import generator


def random_tree(n: int, *, seed: object, punctuation: Sequence[int] = ()) -> Tree:
    """A tree whose words, in random order, each hang below a random earlier one."""
    random = generator(0, "random tree", n, seed)
    order, heads = random.permutation(n), np.zeros(n, dtype=int)
    for k in range(1, n):
        heads[order[k]] = order[random.integers(k)] + 1
    return Tree.from_heads(heads, name=f"tree {seed}", punctuation=np.isin(np.arange(n), punctuation))


def random_trees(count: int, longest: int, *, seed: object, shortest: int = 2) -> list[Tree]:
    lengths = generator(0, "lengths", seed).integers(shortest, longest + 1, count)
    return [random_tree(int(n), seed=(seed, i)) for i, n in enumerate(lengths)]


def exact_states(trees: Sequence[Tree], width: int) -> np.ndarray:
    """States, (words, width), whose squared distances are the trees' and whose squared lengths are the depths."""
    found = []
    for tree in trees:
        above = ancestors(tree.heads, name=tree.name).astype(np.float32)
        above[:, tree.root] = 0
        found.append(np.pad(above, ((0, 0), (0, width - len(tree)))))
    return np.concatenate(found)


def planted_tree_states(trees: Sequence[Tree], width: int, *, seed: object) -> np.ndarray:
    """Exact states in the first ``width`` columns, as much noise in others, all rotated; float32 (words, 2 · width)."""
    exact = exact_states(trees, width)
    noise = generator(0, "noise", seed).standard_normal(exact.shape)
    return (np.concatenate([exact, noise], 1) @ rotation(2 * width, seed="planted")).astype(np.float32)


def rotation(width: int, *, seed: object) -> np.ndarray:
    return np.linalg.qr(generator(0, "rotation", seed).standard_normal((width, width)))[0]
