"""Trees from heads: closed forms, an independent shortest-path search, what is refused, and a real treebank."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse.csgraph import shortest_path

from probing.tasks.treebank import read_treebank
from probing.trees import Tree, ancestors, length_groups, treebank_trees
from spafit.data.conllu import word_depths
from spafit.errors import DataError, UsageError
from tests.paths import SHARED, needs_shared
from tests.structural_fixtures import random_tree


def test_a_chain_and_a_star_have_their_known_distances():
    chain = Tree.from_heads([0, 1, 2, 3], name="chain")
    i = np.arange(4)
    np.testing.assert_array_equal(chain.distances, np.abs(i[:, None] - i))
    np.testing.assert_array_equal(chain.depths, i)
    star = Tree.from_heads([3, 3, 0, 3], name="star")
    np.testing.assert_array_equal(star.depths, [1, 1, 0, 1])
    np.testing.assert_array_equal(star.distances, [[0, 2, 1, 2], [2, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]])
    assert (star.root, len(star)) == (2, 4)


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_distances_are_shortest_paths_and_depths_count_from_the_root(n):
    tree = random_tree(n, seed=n)
    graph = np.zeros((n, n))
    child = np.flatnonzero(tree.heads)
    graph[child, tree.heads[child] - 1] = 1
    np.testing.assert_array_equal(tree.distances, shortest_path(graph, directed=False, unweighted=True))
    np.testing.assert_array_equal(tree.depths, tree.distances[tree.root])
    np.testing.assert_array_equal(tree.depths + 1, word_depths(tree.heads.tolist()))


def test_rows_of_ancestors_lie_as_far_apart_as_their_words():
    tree = random_tree(25, seed=3)
    above = ancestors(tree.heads, name="x").astype(int)
    np.testing.assert_array_equal(((above[:, None] - above) ** 2).sum(-1), tree.distances)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([], r"Sentence 's-7' is empty; a tree needs at least one word\. Leave the sentence out\."),
        ([0, 1, 0], r"Sentence 's-7' has 2 roots \(words 1, 3\)"),
        ([0, 4, 1], r"Sentence 's-7': word 2 has head 4; allowed are 0 \(root\) to 3"),
        ([0, 1, -1], r"Sentence 's-7': word 3 has head -1"),
        ([0, 3, 4, 2], r"Sentence 's-7': the heads form a cycle; no root is above word 2\."),
        ([2, 1], r"Sentence 's-7': the heads form a cycle; no root is above word 1\."),
        ([0, 2], r"Sentence 's-7': the heads form a cycle; no root is above word 2\."),
    ],
)
def test_what_is_no_tree_is_refused_by_name(heads, message):
    with pytest.raises(DataError, match=message):
        Tree.from_heads(heads, name="s-7")


def test_punctuation_marks_must_be_one_per_word():
    assert Tree.from_heads([0, 1], name="s", punctuation=[False, True]).punctuation.tolist() == [False, True]
    with pytest.raises(UsageError, match=r"Sentence 's' has 2 word\(s\) and punctuation marks of shape \(3,\)"):
        Tree.from_heads([0, 1], name="s", punctuation=[False, True, True])


def test_length_groups_hold_every_sentence_once():
    groups = dict(length_groups([3, 1, 3, 2]))
    assert {n: where.tolist() for n, where in groups.items()} == {1: [1], 2: [3], 3: [0, 2]}


@needs_shared
def test_english_ewt_gives_trees():
    treebank = read_treebank(SHARED / "ud" / "UD_English-EWT")
    sentences = [s for s in treebank.sentences if s.split == "test"]
    trees = treebank_trees(sentences)
    assert len(trees) == 2077
    for sentence, tree in zip(sentences, trees, strict=True):
        assert np.issubdtype(tree.distances.dtype, np.integer)
        assert (tree.distances == tree.distances.T).all()
        assert tree.depths.max() == sentence.depth - 1
        assert (tree.distances == 1).sum() == 2 * (len(tree) - 1)
        assert tree.punctuation.sum() == sentence.upos.count("PUNCT")
