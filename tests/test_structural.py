"""Structural probes find planted trees and nothing in noise; the scores agree with scipy and with plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.stats import spearmanr

from probing.probes.structural import StructuralProbeFit, fit_structural_probes
from probing.tree_scores import (
    METRICS,
    linear_chain,
    score_trees,
    spanning_edges,
    spearman,
    structural_arrays,
    tree_table,
)
from probing.trees import Tree
from spafit.errors import NumericalError, UsageError
from spafit.runtime import generator
from spafit.stats import BootstrapDraw
from tests.structural_fixtures import exact_states, planted_tree_states, random_tree, random_trees, rotation

WIDTH = 8
COUNTS = {"train": 600, "dev": 80, "test": 100}
TREES = {split: random_trees(count, WIDTH, seed=split) for split, count in COUNTS.items()}
LENGTHS = [len(tree) for tree in TREES["test"]]
ONCE = np.ones((1, COUNTS["test"]))


def split_states(transform=lambda x: x) -> dict[str, np.ndarray]:
    """Hidden state 0 is noise, hidden state 1 holds the trees."""
    found = {}
    for split, trees in TREES.items():
        planted = transform(planted_tree_states(trees, WIDTH, seed=split))
        noise = generator(0, "states of noise", split).standard_normal(planted.shape)
        found[split] = np.stack([noise, planted]).astype(np.float32)
    return found


def fitted(states: dict[str, np.ndarray], **settings) -> StructuralProbeFit:
    settings = {"rank": 2 * WIDTH, **settings}
    return fit_structural_probes(states["train"], TREES["train"], states["dev"], TREES["dev"], **settings)


@pytest.fixture(scope="module")
def states():
    return split_states()


@pytest.fixture(scope="module")
def probes(states):
    return fitted(states)


def test_planted_trees_are_found_and_noise_gives_none(states, probes):
    distances, depths = probes.distances(states["test"], LENGTHS), probes.depths(states["test"], LENGTHS)
    scores = score_trees(distances, depths, TREES["test"])
    chain = linear_chain(TREES["test"])
    noise, planted = (scores.means("uuas", ONCE)[0, h] for h in (0, 1))
    assert planted == 1
    assert probes.distance.dev_loss[1] < 0.02
    assert probes.depth.dev_loss[1] < 0.02
    assert probes.distance.converged.all()
    assert probes.depth.converged.all()
    # Predicted ties differ by rounding; as whole numbers they are the tree's.
    whole = score_trees([d[1:].round() for d in distances], [d[1:].round() for d in depths], TREES["test"])
    assert [whole.means(metric, ONCE)[0, 0] for metric in METRICS] == [1, 1, 1, 1]
    # Any n - 1 of the n (n - 1) / 2 edges hold a gold edge with probability 2 / n.
    edges = np.array(LENGTHS) - 1
    chance = (edges * 2 / np.array(LENGTHS)).sum() / edges.sum()
    assert abs(noise - chance) < 0.08
    assert probes.distance.dev_loss[0] > 40 * probes.distance.dev_loss[1]
    assert abs(scores.means("nspr", ONCE)[0, 0]) < 0.25
    assert chain.means("uuas", ONCE)[0, 0] < 0.6


def test_noise_stays_far_below_the_linear_chain_where_words_hang_on_neighbours():
    trees = [Tree.from_heads(np.arange(n), name=f"chain of {n}") for n in (6, 9, 12, 15)]
    assert linear_chain(trees).means("uuas", np.ones((1, 4)))[0, 0] == 1
    random = generator(0, "noise")
    noise = [random.random((1, len(t), len(t))) for t in trees]
    found = score_trees([d + d.swapaxes(1, 2) for d in noise], [d[:, 0] for d in noise], trees)
    assert found.means("uuas", np.ones((1, 4)))[0, 0] < 0.4


def test_exact_distances_and_depths_score_one():
    trees = random_trees(30, 20, seed="exact", shortest=5)
    x = exact_states(trees, 20)
    parts = np.split(x, np.cumsum([len(t) for t in trees])[:-1])
    distances = [((p[:, None] - p) ** 2).sum(-1)[None] for p in parts]
    scores = score_trees(distances, [(p**2).sum(-1)[None] for p in parts], trees)
    for metric in METRICS:
        assert scores.means(metric, np.ones((1, 30)))[0, 0] == pytest.approx(1, abs=1e-12)


def test_the_dev_loss_is_that_of_a_plain_loop(states, probes):
    for h in (0, 1):
        x = states["dev"][h].astype(np.float64)
        distance, depth = (maps.weight[h].astype(np.float64) for maps in (probes.distance, probes.depth))
        losses, start = [], 0
        for tree in TREES["dev"]:
            words = x[start : start + len(tree)]
            start += len(tree)
            far = deep = 0.0
            for i, word in enumerate(words):
                deep += abs(((word @ depth) ** 2).sum() - tree.depths[i])
                for j, other in enumerate(words):
                    far += abs((((word - other) @ distance) ** 2).sum() - tree.distances[i, j])
            losses.append([far / len(tree) ** 2, deep / len(tree)])
        wanted = np.mean(losses, 0)
        np.testing.assert_allclose(
            [probes.distance.dev_loss[h], probes.depth.dev_loss[h]], wanted, rtol=1e-4, atol=2e-5
        )


def test_predictions_are_those_of_the_saved_weights(states, probes):
    arrays = probes.arrays()
    first = states["test"][:, : LENGTHS[0]].astype(np.float64)
    far = (first[:, :, None] - first[:, None]) @ arrays["distance_weight"][:, None]
    np.testing.assert_allclose(probes.distances(states["test"], LENGTHS)[0], (far**2).sum(-1), atol=1e-4)
    deep = first @ arrays["depth_weight"]
    np.testing.assert_allclose(probes.depths(states["test"], LENGTHS)[0], (deep**2).sum(-1), atol=1e-4)


def test_a_rotation_and_other_units_change_the_optimum_within_tolerance(probes):
    turned = fitted(split_states(lambda x: 300 * x @ rotation(2 * WIDTH, seed="other")))
    for one, other in ((probes.distance, turned.distance), (probes.depth, turned.depth)):
        assert abs(one.dev_loss[1] - other.dev_loss[1]) < 0.02
        np.testing.assert_allclose(one.dev_loss[0], other.dev_loss[0], rtol=1e-3)


def test_a_shift_of_all_words_changes_no_distance(states, probes):
    shift = generator(0, "shift").standard_normal(2 * WIDTH).astype(np.float32) * 50
    moved = fitted({split: x + shift for split, x in states.items()})
    np.testing.assert_allclose(moved.distance.dev_loss, probes.distance.dev_loss, atol=0.01)


def test_columns_that_hold_rounding_alone_get_no_weight(states):
    def padded(x):
        return np.concatenate([x, np.full((*x.shape[:2], 1), 1e3 / 3, np.float32)], 2)

    found = fitted({split: padded(x) for split, x in states.items()})
    assert (found.distance.weight[:, -1] == 0).all()
    assert (found.distance.weight[:, :-1] != 0).all()
    assert found.distance.dev_loss[1] < 0.02


def test_too_low_a_rank_cannot_hold_the_trees(states, probes):
    assert fitted(states, rank=1).distance.dev_loss[1] > 10 * probes.distance.dev_loss[1]


def test_the_same_call_gives_the_same_bytes_and_hidden_states_do_not_mix(states, probes, monkeypatch):
    again = fitted(states)
    np.testing.assert_array_equal(again.distance.weight, probes.distance.weight)
    np.testing.assert_array_equal(again.depth.weight, probes.depth.weight)
    alone = fitted({split: x[1:] for split, x in states.items()})
    np.testing.assert_allclose(alone.distance.dev_loss, probes.distance.dev_loss[1:], atol=5e-3)
    monkeypatch.setattr("probing.probes.structural.CHUNK_BYTES", 1)  # one hidden state at a time
    apart = fitted(states)
    np.testing.assert_array_equal(apart.distance.weight[1:], alone.distance.weight)
    np.testing.assert_allclose(apart.depth.dev_loss, probes.depth.dev_loss, atol=5e-3)
    assert not np.array_equal(fitted(states, seed=1).distance.weight, probes.distance.weight)


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_spanning_trees_are_scipys(n):
    points = generator(0, "points", n).standard_normal((3, 5, n, 4))
    distances = ((points[..., :, None, :] - points[..., None, :, :]) ** 2).sum(-1)
    edges = spanning_edges(distances)
    assert edges.shape == (3, 5, n - 1, 2)
    for i in np.ndindex(3, 5):
        tree = minimum_spanning_tree(distances[i]).tocoo()
        wanted = {frozenset(map(int, pair)) for pair in zip(tree.row, tree.col, strict=True)}
        assert {frozenset(pair) for pair in edges[i].tolist()} == wanted


def test_spanning_trees_of_tied_and_zero_distances_have_the_least_weight():
    distances = generator(0, "ties").integers(1, 4, (40, 9, 9))
    distances = np.triu(distances, 1) + np.triu(distances, 1).swapaxes(1, 2)
    for matrix, edges in zip(distances, spanning_edges(distances), strict=True):
        assert matrix[edges[:, 0], edges[:, 1]].sum() == minimum_spanning_tree(matrix).sum()
        assert np.unique(edges).tolist() == list(range(9))
    assert np.unique(spanning_edges(np.zeros((1, 6, 6)))[0]).tolist() == list(range(6))


def test_spearman_is_scipys_with_ties():
    random = generator(0, "spearman")
    a, b = random.integers(0, 5, (6, 3, 9)), random.integers(0, 4, (6, 3, 9)) / 3
    a[0, 0], b[0, 1] = 2, 1  # do not vary
    found = spearman(a, b)
    assert found[0, 0] == found[0, 1] == 0
    for i in list(np.ndindex(6, 3))[2:]:
        assert found[i] == pytest.approx(spearmanr(a[i], b[i]).statistic, abs=1e-12)


def test_punctuation_is_left_out_of_edges_and_roots():
    # Words: 1 root, 2 comma, 3 below 1, 4 below 3; the comma lies next to everything and has the least depth.
    tree = Tree.from_heads([0, 1, 1, 3], name="x", punctuation=[False, True, False, False])
    distances = np.array([[0, 0.1, 1, 2], [0.1, 0, 0.1, 0.1], [1, 0.1, 0, 1], [2, 0.1, 1, 0]])[None]
    scores = score_trees([distances], [np.array([[0.5, 0.1, 1, 2]])], [tree])
    assert scores.gold_edges.tolist() == [2]
    assert scores.right_edges.tolist() == [[2]]
    assert scores.right_root.tolist() == [[True]]
    everything = Tree.from_heads([0, 1, 1, 3], name="x")
    counted = score_trees([distances], [np.array([[0.5, 0.1, 1, 2]])], [everything])
    assert counted.gold_edges.tolist() == [3]
    assert counted.right_edges.tolist() == [[1]]
    assert counted.right_root.tolist() == [[False]]
    marks = random_tree(1, seed=0, punctuation=[0])
    alone = score_trees([np.zeros((1, 1, 1))], [np.zeros((1, 1))], [marks])
    assert [alone.counted(metric) for metric in METRICS] == [0, 0, 0, 0]
    assert np.isnan(tree_table(alone, alone, hidden=[0])["value"]).all()


def test_the_linear_chain_joins_the_words_around_punctuation():
    tree = Tree.from_heads([3, 3, 0], name="x", punctuation=[False, True, False])
    assert linear_chain([tree]).right_edges.tolist() == [[1]]


def test_values_and_intervals_are_those_of_a_plain_loop():
    trees = [*random_trees(40, 9, seed="loop", shortest=3), random_tree(55, seed="long", punctuation=[0, 3])]
    random = generator(0, "predictions")
    distances = [np.abs(random.standard_normal((2, len(t), len(t)))) for t in trees]
    distances = [d + d.swapaxes(1, 2) for d in distances]
    depths = [random.standard_normal((2, len(t))) for t in trees]
    scores = score_trees(distances, depths, trees)
    table = tree_table(scores, linear_chain(trees), hidden=[3, 4], n_boot=50, seed=2)
    assert list(table.columns) == ["hidden", "metric", "value", "ci_low", "ci_high", "n", "linear_chain"]
    draws = BootstrapDraw.make(np.arange(41), 1, n_boot=50, seed=2).cluster_counts

    def plain(taken, metric, h):
        by_length, right, total = {}, 0, 0
        for i in np.repeat(np.arange(41), taken):
            tree, kept = trees[i], np.flatnonzero(~trees[i].punctuation)
            if metric == "uuas":
                found = minimum_spanning_tree(distances[i][h][np.ix_(kept, kept)]).toarray() > 0
                gold = tree.distances[np.ix_(kept, kept)] == 1
                right, total = right + (found & gold).sum(), total + gold.sum() // 2
            elif metric == "root_accuracy":
                if tree.root in kept:
                    right, total = right + (kept[depths[i][h][kept].argmin()] == tree.root), total + 1
            elif 5 <= len(tree) <= 50:
                pairs = zip(distances[i][h], tree.distances, strict=True)
                pairs = pairs if metric == "dspr" else [(depths[i][h], tree.depths)]
                by_length.setdefault(len(tree), []).extend(spearmanr(a, b).statistic for a, b in pairs)
        return np.mean([np.mean(v) for v in by_length.values()]) if by_length else right / total

    for row in table.itertuples():
        h = row.hidden - 3
        assert row.value == pytest.approx(plain(np.ones(41, int), row.metric, h), abs=1e-9)
        if h == 0:
            replicates = [plain(taken, row.metric, h) for taken in draws[:8]]
            np.testing.assert_allclose(scores.means(row.metric, draws[:8])[:, h], replicates, atol=1e-9)
            low, high = np.percentile(scores.means(row.metric, draws)[:, h], [2.5, 97.5])
            assert (row.ci_low, row.ci_high) == pytest.approx((low, high), abs=1e-12)
    inside = sum(5 <= len(t) <= 50 for t in trees)
    assert table.set_index("metric")["n"].loc[["dspr", "nspr"]].unique().tolist() == [inside]


def test_structural_arrays_give_one_table_for_all_hidden_states(states):
    table = structural_arrays(states, TREES, hidden=[0, 7], rank=2 * WIDTH, n_boot=200)
    assert table["hidden"].tolist() == [0] * 4 + [7] * 4
    assert table["metric"].tolist() == list(METRICS) * 2
    assert ((table["ci_low"] <= table["value"]) & (table["value"] <= table["ci_high"])).all()
    value = table.set_index(["hidden", "metric"])["value"]
    assert value[7, "uuas"] == value[7, "root_accuracy"] == 1
    assert value[0, "uuas"] < 0.5
    assert table.loc[table["metric"] == "uuas", "linear_chain"].nunique() == 1
    with pytest.raises(UsageError, match="no split 'dev'"):
        structural_arrays({"train": states["train"]}, TREES)


def test_what_does_not_fit_is_refused(states, probes):
    with pytest.raises(UsageError, match=r"rank is 17; allowed are 1 to 16, the width of the states\."):
        fitted(states, rank=17)
    with pytest.raises(UsageError, match=r"training states have shape .* and the training trees"):
        fit_structural_probes(states["train"][:, 1:], TREES["train"], states["dev"], TREES["dev"], rank=4)
    with pytest.raises(UsageError, match="both need the same hidden states and width"):
        fit_structural_probes(states["train"], TREES["train"], states["dev"][:1], TREES["dev"], rank=4)
    with pytest.raises(UsageError, match="No dev sentence has two words"):
        fit_structural_probes(states["train"], TREES["train"], states["dev"][:, :1], [random_tree(1, seed=0)], rank=4)
    with pytest.raises(UsageError, match=r"fitted on 2 hidden state\(s\) of width 16"):
        probes.distances(states["test"][:1], LENGTHS)
    with pytest.raises(UsageError, match="A sentence has 0 words"):
        probes.depths(states["test"], [*LENGTHS, 0])
    broken = {split: x.copy() for split, x in states.items()}
    broken["train"][1, 5, 3] = np.nan
    with pytest.raises(NumericalError, match=r"Representation 1 .* item 5"):
        fitted(broken)
    tree = random_tree(3, seed="t")
    with pytest.raises(UsageError, match=r"Sentence 'tree t' of 3 word\(s\) has distances of shape"):
        score_trees([np.zeros((1, 2, 2))], [np.zeros((1, 3))], [tree])
    with pytest.raises(NumericalError, match="sentence 'tree t'"):
        score_trees([np.full((1, 3, 3), np.nan)], [np.zeros((1, 3))], [tree])
    with pytest.raises(UsageError, match="no tree metric 'las'"):
        linear_chain([tree]).means("las", np.ones((1, 1)))
