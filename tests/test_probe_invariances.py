"""What must not change a probe: rotated states and items in another order; and permuted labels leave nothing to find.

Each family's own test file has more of these (white features at one penalty, noise in place of states); here stand
those for features of unequal spread at the default penalties, and for the families and kinds of label left out there.
Solvers stop within 0.004 bits per item of their optimum, so no tolerance is below that.
"""

from __future__ import annotations

import numpy as np
import pytest

from probing import probe_arrays
from probing.probes.edge_span import fit_edge_attention
from probing.probes.families import Family, Linear, LowRank, Mlp
from probing.probes.mdl import online_code
from probing.probes.mixing import fit_mixes
from probing.probes.structural import fit_structural_probes
from probing.probes.variational import variational_code
from probing.tasks.base import Kind
from probing.tree_scores import score_trees
from probing.trees import Tree
from spafit.runtime import generator
from tests.structural_fixtures import planted_tree_states, random_trees, rotation

LN2 = float(np.log(2))
N, HELD, WIDTH, CLASSES = 1500, 2500, 10, 4
TRAIN, DEV, TEST = slice(0, 1000), slice(1000, N), slice(N, None)
TURN = rotation(WIDTH, seed="invariances")


def made(*, white: bool) -> tuple[np.ndarray, dict[Kind, np.ndarray]]:
    """States, in training uncorrelated and of equal spread if ``white``, and labels of every kind drawn from them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N + HELD, WIDTH))
    x = (x - x[TRAIN].mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x[TRAIN].T, bias=True))).T
    logits = x @ rng.standard_normal((WIDTH, CLASSES))
    labels: dict[Kind, np.ndarray] = {
        "classes": (logits + rng.gumbel(size=logits.shape)).argmax(1),
        "multilabel": logits + rng.logistic(size=logits.shape) > 0,
        "number": logits[:, 0] + 2 * rng.standard_normal(len(x)),
    }
    if not white:
        x = x * np.geomspace(0.3, 8, WIDTH) @ rotation(WIDTH, seed="axes") + 5
    return x.astype(np.float32), labels


WHITE, LABELS = made(white=True)
UNEQUAL, _ = made(white=False)


def turned(x: np.ndarray) -> np.ndarray:
    return (x @ TURN).astype(np.float32)


def held_out_bits(
    family: Family, x: np.ndarray, kind: Kind, *, l2: list[float] | None = None, seed: int = 0, order=TRAIN
) -> float:
    """Bits per held-out item that the outputs cost; a number's, as the logarithm of the mean squared error."""
    y, outputs = LABELS[kind], 1 if kind == "number" else CLASSES
    data = x[None, order], y[None, order], x[None, DEV], y[None, DEV]
    fit = family.fit(*data, kind=kind, n_classes=outputs, l2=l2, seed=seed, device="cpu")
    found, gold = fit.outputs(x[None, TEST], label_set=0)[0].astype(np.float64), y[TEST]
    if kind == "number":
        return float(0.5 * np.log2(((found[:, 0] - gold) ** 2).mean()))
    if kind == "multilabel":
        return float(np.logaddexp(0, np.where(gold, -found, found)).sum(1).mean() / LN2)
    log_p = fit.log_probabilities(x[None, TEST], label_set=0)[0]
    return float(-log_p[np.arange(len(gold)), gold].mean(dtype=np.float64) / LN2)


FAMILIES: list[tuple[Family, Kind]] = [
    (Linear(), "classes"), (Linear(), "multilabel"), (Linear(), "number"), (LowRank(2), "classes"),
    (LowRank(2), "multilabel"),
]  # fmt: skip
NAMES = [f"{family.name} {kind}" for family, kind in FAMILIES]


# ---------------------------------------------------------------- rotation


@pytest.mark.parametrize(("family", "kind"), FAMILIES, ids=NAMES)
def test_a_rotation_changes_no_held_out_bits(family, kind):
    # Standardising columns ties the penalty to the axes, so the optimum moves with a rotation by what the penalty
    # costs: little at the penalties that dev chooses, next to nothing at the smallest ones.
    labels = CLASSES if kind == "multilabel" else 1  # bits are summed over labels
    free, chosen = (
        [held_out_bits(family, x, kind, l2=l2) for x in (UNEQUAL, turned(UNEQUAL))] for l2 in ([1e-6], None)
    )
    print(family.name, kind, free, chosen)
    assert abs(free[0] - free[1]) < 0.004 * labels
    assert abs(chosen[0] - chosen[1]) < 0.02 * labels


@pytest.mark.parametrize("family", [Linear(), LowRank(2)], ids=lambda f: f.name)
def test_a_rotation_of_white_features_changes_nothing_for_several_labels_at_any_penalty(family):
    bits = {l2: [held_out_bits(family, x, "multilabel", l2=[l2]) for x in (WHITE, turned(WHITE))] for l2 in (0.01, 0.5)}
    print(family.name, bits)
    assert all(abs(one - other) < 0.004 * CLASSES for one, other in bits.values())
    assert bits[0.5][0] > bits[0.01][0] + 0.1  # the penalty is felt


def test_a_rotation_changes_an_mlp_no_more_than_another_seed():
    # First weights are drawn in the axes of the features: a rotation is one more draw, of the same distribution.
    bits = np.array([
        [held_out_bits(Mlp(16), x, "classes", seed=s) for s in range(4)] for x in (WHITE, turned(WHITE))
    ])  # fmt: skip
    print(bits)
    assert abs(bits[0].mean() - bits[1].mean()) < 0.03
    assert np.abs(bits - bits.mean()).max() < 0.08


def words_of_spans(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """White words in spans of two to five; the marked word of each tells the label."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 6, size=n)
    ends = np.cumsum(lengths)
    words, y = rng.standard_normal((int(ends[-1]), WIDTH)), rng.integers(3, size=n)
    at = ends - lengths + rng.integers(lengths)
    words[at, 0] += 3
    words[at, 1 + y] += 2
    return words.astype(np.float32)[None], np.stack([ends - lengths, ends], 1)[:, None], y


def test_attention_over_spans_knows_neither_axes_nor_order():
    train, dev, test = (words_of_spans(n, seed) for seed, n in enumerate((600, 300, 1500)))
    width = train[0].shape[2]
    mix = rotation(width, seed="spans")

    def bits(parts: list) -> float:
        fit, _ = fit_edge_attention(*parts[0], *parts[1], n_classes=3, l2_grid=[1e-2])
        log_p = fit.log_probabilities(parts[2][0], parts[2][1])[0, 0, 0]
        return float(-log_p[np.arange(len(parts[2][2])), parts[2][2]].mean() / LN2)

    plain = bits([train, dev, test])
    rotated = bits([((p[0] @ mix).astype(np.float32), *p[1:]) for p in (train, dev, test)])
    order = np.random.default_rng(0).permutation(len(train[2]))
    reordered = bits([(train[0], train[1][order], train[2][order]), dev, test])
    permuted = bits([(train[0], train[1], train[2][order]), dev, test])
    print(plain, rotated, reordered, permuted)
    # Where a fit stops is decided by dev every five steps, so optima agree less closely than a solver's tolerance.
    assert abs(rotated - plain) < 0.02
    assert abs(reordered - plain) < 0.02
    assert plain < np.log2(3) - 0.4
    assert permuted > np.log2(3) - 0.03  # labels of other spans


def test_an_online_code_of_unequal_features_hardly_feels_a_rotation():
    # The probes of small blocks hold by their penalty, which a rotation changes: one per cent of the code.
    y = LABELS["classes"][:N]
    code = online_code(np.stack([UNEQUAL[:N], turned(UNEQUAL[:N])]), y, n_classes=CLASSES, l2=0.01)
    print(code.bits[:, 0], code.compression[:, 0])
    assert code.bits[1, 0] == pytest.approx(code.bits[0, 0], rel=0.02)


def test_a_variational_code_feels_a_rotation_only_where_few_features_carry_the_label():
    # Its prior has one scale per feature: labels of all directions cost the same bits in any axes, those of a single
    # feature more weights once a rotation has spread it over all of them.
    rng = np.random.default_rng(0)
    single = (4 * WHITE[:N, 0] + rng.logistic(size=N) > 0).astype(int)
    dense = (2.5 * WHITE[:N].sum(1) / np.sqrt(WIDTH) + rng.logistic(size=N) > 0).astype(int)
    labels = np.stack([single, dense])
    order = rng.permutation(N)
    states = np.stack([WHITE[:N], turned(WHITE[:N])])
    code = variational_code(states, labels, n_classes=2, steps=1500)
    other = variational_code(states[:1, order], labels[:, order], n_classes=2, steps=1500)
    print("code", code.bits, "model", code.model_bits, "another order", other.bits)
    assert code.bits[1, 1] == pytest.approx(code.bits[0, 1], rel=0.03)
    np.testing.assert_allclose(code.data_bits[1], code.data_bits[0], rtol=0.03)
    assert code.model_bits[1, 0] > code.model_bits[0, 0] + 10
    np.testing.assert_allclose(other.bits, code.bits[:1].repeat(len(other.bits), 0), rtol=0.02)  # other batches, noise


# ---------------------------------------------------------------- order of items


@pytest.mark.parametrize(
    ("family", "kind", "tolerance"),
    [
        # One solve in closed form: rounding alone. Solvers that begin on part of the items: their own tolerance.
        pytest.param(Linear(), "number", 1e-5, id="ridge"),
        pytest.param(Linear(), "multilabel", 0.004 * CLASSES, id="linear"),
        pytest.param(LowRank(2), "multilabel", 0.004 * CLASSES, id="low-rank"),
    ],
)
def test_the_order_of_the_items_changes_nothing(family, kind, tolerance):
    by_label = np.argsort(LABELS[kind][TRAIN].reshape(1000, -1)[:, 0], kind="stable")
    bits = [held_out_bits(family, UNEQUAL, kind, order=rows) for rows in (np.arange(1000), by_label)]
    print(family.name, kind, bits)
    assert abs(bits[0] - bits[1]) < tolerance


def test_a_mix_of_layers_knows_no_order_of_items():
    rng = np.random.default_rng(1)
    y = LABELS["classes"]
    layers = np.stack([rng.standard_normal(WHITE.shape), WHITE, 0.5 * WHITE + rng.standard_normal(WHITE.shape)])
    layers, by_label = layers.astype(np.float32), np.argsort(y[TRAIN], kind="stable")
    fits = [
        fit_mixes(layers[:, rows], y[rows], layers[:, DEV], y[DEV], n_classes=CLASSES, l2_grid=[0.01])
        for rows in (np.arange(1000), by_label)
    ]
    gold = y[TEST][None, :, None]
    bits = [
        -np.take_along_axis(fit.log_probabilities(layers[:, TEST])[:, 0], gold, 2).mean((1, 2)) / LN2 for fit in fits
    ]
    print(bits, [fit.mix_weights[-1, 0] for fit in fits])
    np.testing.assert_allclose(bits[0], bits[1], atol=0.005)
    np.testing.assert_allclose(fits[0].mix_weights[-1, 0], fits[1].mix_weights[-1, 0], atol=0.02)


def test_structural_probes_know_no_order_of_sentences_and_find_no_trees_of_other_sentences():
    width, counts = 6, {"train": 600, "dev": 80, "test": 100}
    trees = {split: random_trees(count, width, seed=split, shortest=3) for split, count in counts.items()}
    states = {split: planted_tree_states(t, width, seed=split)[None] for split, t in trees.items()}
    lengths, random = [len(t) for t in trees["test"]], generator(0, "order of sentences")

    def scores(x: np.ndarray, gold: dict[str, list[Tree]]) -> tuple[float, float, float]:
        """Dev losses of both probes, and UUAS."""
        fit = fit_structural_probes(x, gold["train"], states["dev"], gold["dev"], rank=2 * width)
        found = score_trees(
            fit.distances(states["test"], lengths), fit.depths(states["test"], lengths), gold["test"]
        ).means("uuas", np.ones((1, len(lengths))))[0, 0]
        return float(fit.distance.dev_loss[0]), float(fit.depth.dev_loss[0]), float(found)

    def of_others(own: list[Tree]) -> list[Tree]:
        """For each sentence the tree of another one as long."""
        sizes, given = np.array([len(t) for t in own]), np.arange(len(own))
        for n in np.unique(sizes):
            given[sizes == n] = random.permutation(given[sizes == n])
        return [own[i] for i in given]

    plain, order = scores(states["train"], trees), random.permutation(counts["train"])
    parts = np.split(states["train"], np.cumsum([len(t) for t in trees["train"]])[:-1], axis=1)
    moved = np.concatenate([parts[i] for i in order], 1)
    reordered = scores(moved, {**trees, "train": [trees["train"][i] for i in order]})
    wrong = scores(states["train"], {split: of_others(own) for split, own in trees.items()})
    edges = np.array(lengths) - 1
    chance = (edges * 2 / np.array(lengths)).sum() / edges.sum()
    print(plain, reordered, wrong, chance)
    # Batches hold sentences by their position, so training takes another path to the same optimum.
    assert max(abs(one - two) for one, two in zip(plain[:2], reordered[:2], strict=True)) < 0.005
    assert plain[2] == pytest.approx(reordered[2], abs=0.01)
    assert plain[2] > 0.98
    assert abs(wrong[2] - chance) < 0.08
    assert wrong[0] > 10 * plain[0]


# ---------------------------------------------------------------- permuted labels


@pytest.mark.parametrize(
    ("kind", "probe"),
    [
        ("number", "linear"), ("number", "mlp:16"), ("multilabel", "linear"), ("multilabel", "low-rank:2"),
        ("multilabel", "mlp:16"),
    ],
)  # fmt: skip
def test_permuted_labels_save_no_bits(kind, probe):
    y = LABELS[kind].astype(float if kind == "number" else int)
    split = np.repeat(["train", "dev", "test"], [1000, 500, HELD])
    moved = np.random.default_rng(2).permutation(y)
    saved = [
        probe_arrays(UNEQUAL[None], labels, kind=kind, probe=probe, split=split, seeds=1, n_boot=100)
        .scores.query("metric == 'bits'")["value"]
        .mean()
        for labels in (y, moved)
    ]
    print(kind, probe, saved)
    assert saved[0] > 0.3
    assert -0.1 < saved[1] < 0.01 * (CLASSES if kind == "multilabel" else 1)
