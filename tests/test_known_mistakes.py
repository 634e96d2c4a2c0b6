"""Mistakes that published probing tools made: each test fails where this package makes it, and shows that it would.

A test compares a public routine with scikit-learn, a closed form, a plain loop or a count of forward passes, and holds
the mistaken variant, written out in a few lines, against the same tolerance.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

import analysis
import probing
import spafit
from analysis.attribution import item_conductance
from analysis.causal import windows
from analysis.hsic import Shift
from probing import probe_arrays, probe_layers
from probing.controls import control_labels
from probing.extraction import extract
from probing.probes.edge_span import fit_edge_attention
from probing.probes.families import Linear
from probing.probes.linear import fit_linear_probes, fit_selected
from probing.probes.lowrank import fit_low_rank_probes
from probing.probes.mdl import online_code, published_compression
from probing.probes.mixing import fit_mixes
from probing.probes.mlp import BATCH, LEARNING_RATE, LOOK_STEPS, PATIENCE, fit_mlp_probes
from probing.probes.structural import fit_structural_probes
from probing.probes.variational import variational_code
from probing.probes.vinfo import ProbeSplits, v_information
from probing.tasks.base import Corpus, Task, Text
from spafit.errors import SpafitError
from spafit.models import load_model, randomize_weights
from spafit.runtime import generator
from spafit.stats import max_t
from tests.extraction_fixtures import some_texts, tiny_loaded
from tests.structural_fixtures import planted_tree_states, random_trees

LN2 = float(np.log(2))
CLASSES, WIDTH, N_TRAIN, L2 = 4, 8, 1200, 0.05

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: The loss as it should be, and with a normalisation before it.
CROSS_ENTROPIES: dict[str, Loss] = {
    "right": functional.cross_entropy,
    "softmax before": lambda logits, y: functional.cross_entropy(logits.softmax(1), y),
    "sigmoid before": lambda logits, y: functional.cross_entropy(logits.sigmoid(), y),
}
LABEL_LOSSES: dict[str, Loss] = {
    "right": lambda logits, y: functional.binary_cross_entropy_with_logits(logits, y.to(logits)) * y.shape[1],
    "sigmoid before": lambda logits, y: (
        functional.binary_cross_entropy_with_logits(logits.sigmoid(), y.to(logits)) * y.shape[1]
    ),
}


def made() -> tuple[np.ndarray, np.ndarray]:
    """White features (their columns have mean 0, deviation 1 and no correlation in training) and classes of them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N_TRAIN + 3000, WIDTH))
    x = (x - x[:N_TRAIN].mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x[:N_TRAIN].T, bias=True))).T
    logits = x @ rng.standard_normal((WIDTH, CLASSES))
    return x.astype(np.float32), (logits + rng.gumbel(size=logits.shape)).argmax(1)


X, Y = made()
TRAIN, TEST = slice(None, N_TRAIN), slice(N_TRAIN, None)
#: Three yes-or-no questions about each item.
SEVERAL = np.stack([Y == 0, Y >= 2, X[:, 0] + X[:, 1] + np.random.default_rng(1).logistic(size=len(X)) > 0], 1)


def bits(log_p: np.ndarray, y: np.ndarray) -> float:
    """Mean cross-entropy in bits per item."""
    return float(-log_p[np.arange(len(y)), y].mean(dtype=np.float64) / LN2)


def label_bits(log_odds: np.ndarray, y: np.ndarray) -> float:
    """Bits per item of several yes-or-no labels together."""
    odds = log_odds.astype(np.float64)
    return float(np.logaddexp(0, np.where(y, -odds, odds)).sum(1).mean() / LN2)


def logistic(
    x: np.ndarray, y: np.ndarray, outputs: int, *, loss: Loss, l2: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Logits that minimise mean ``loss`` + l2/2 · ‖W‖², by torch's own L-BFGS in float64."""
    rows, labels = torch.from_numpy(x).double(), torch.from_numpy(y)
    weight = torch.zeros(x.shape[1], outputs, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(outputs, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = loss(rows @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(closure)
    w, b = weight.detach().numpy(), bias.detach().numpy()
    return lambda new: new @ w + b


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(1).numpy()


# ---------------------------------------------------------------- softmax or sigmoid before the cross-entropy


def linear_log_p() -> np.ndarray:
    fit = fit_linear_probes(X[None, TRAIN], Y[TRAIN], n_classes=CLASSES, l2=[L2])
    return fit.log_probabilities(X[None, TEST])[0, 0, 0]


def low_rank_log_p() -> np.ndarray:
    train = X[None, TRAIN], Y[None, TRAIN]
    options = {"rank": CLASSES, "kind": "classes", "n_classes": CLASSES, "l2_grid": [L2]}
    return fit_low_rank_probes(*train, *train, **options).log_probabilities(X[None, TEST], label_set=0)[0]


def one_word_span_log_p() -> np.ndarray:
    """Attention over spans of a single word has nothing to choose: the linear probe of that word's state."""
    spans = np.arange(len(X))[:, None, None] + np.array([0, 1])
    train = X[None, TRAIN], spans[TRAIN], Y[TRAIN]
    fit, _ = fit_edge_attention(*train, *train, n_classes=CLASSES, l2_grid=[L2])
    return fit.log_probabilities(X[None, TEST], spans[: len(X) - N_TRAIN])[0, 0, 0]


def mix_of_one_log_p() -> np.ndarray:
    """A mix of one layer whose columns have equal spread is the linear probe of that layer."""
    train = X[None, TRAIN], Y[TRAIN]
    return fit_mixes(*train, *train, n_classes=CLASSES, l2_grid=[L2]).log_probabilities(X[None, TEST])[0, 0]


PROBES = {
    "linear": linear_log_p, "low rank": low_rank_log_p, "attention": one_word_span_log_p, "mix": mix_of_one_log_p,
}  # fmt: skip


@pytest.fixture(scope="module")
def logistic_bits() -> dict[str, float]:
    """Held-out bits of an independent optimum under each loss; the right one is scikit-learn's."""
    found = {
        name: bits(log_softmax(logistic(X[TRAIN], Y[TRAIN], CLASSES, loss=loss, l2=L2)(X[TEST])), Y[TEST])
        for name, loss in CROSS_ENTROPIES.items()
    }
    peer = LogisticRegression(C=1 / (L2 * N_TRAIN), tol=1e-8).fit(X[TRAIN], Y[TRAIN])
    assert bits(peer.predict_log_proba(X[TEST]), Y[TEST]) == pytest.approx(found["right"], abs=1e-4)
    return found


@pytest.mark.parametrize("name", PROBES)
def test_no_softmax_before_the_cross_entropy(name, logistic_bits):
    log_p = PROBES[name]()
    found = bits(log_p, Y[TEST])
    print(name, found, logistic_bits)
    assert abs(found - logistic_bits["right"]) < 0.005  # bits per item
    assert abs(logistic_bits["softmax before"] - logistic_bits["right"]) > 0.1  # trained with the mistake
    assert bits(log_softmax(np.exp(log_p)), Y[TEST]) > found + 0.3  # scored with it


#: Strong, so that the mistake, whose loss is flatter, gives way to it.
ATTENTION_L2 = 0.2


def spans_of_three(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spans of three words, one of which is marked in column 0 and tells the label."""
    rng = np.random.default_rng(seed)
    words, y = rng.standard_normal((n, 3, WIDTH)).astype(np.float32), rng.integers(3, size=n)
    at = np.arange(n), rng.integers(3, size=n)
    words[*at, 0] += 3
    words[*at, 1 + y] += 1.5
    starts = 3 * np.arange(n)
    return words.reshape(1, -1, WIDTH), np.stack([starts, starts + 3], 1)[:, None], y


def plain_attention(words: np.ndarray, y: np.ndarray, new: np.ndarray, *, loss: Loss) -> np.ndarray:
    """Log probabilities of attention over spans of three, the same objective by torch's L-BFGS in float64."""
    mean, scale = words.mean(0), words.std(0)
    x, held = (torch.from_numpy((v - mean) / scale).double().view(-1, 3, WIDTH) for v in (words, new))
    centre, spread = x.mean(1).mean(0), x.mean(1).std(0, unbiased=False)
    tensors = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((WIDTH,), (WIDTH, 3), (3,))]
    solver = torch.optim.LBFGS(tensors, max_iter=500, line_search_fn="strong_wolfe")

    def logits(part: torch.Tensor) -> torch.Tensor:
        v, w, b = tensors
        pooled = ((part @ v).softmax(1)[..., None] * part).sum(1)
        return (pooled - centre) / spread @ w + b

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = loss(logits(x), torch.from_numpy(y)) + ATTENTION_L2 / 2 * sum(t.square().sum() for t in tensors[:2])
        value.backward()
        return value

    solver.step(closure)
    return logits(held).log_softmax(1).detach().numpy()


def test_no_softmax_before_the_cross_entropy_of_attention_over_words():
    train, new = spans_of_three(1500, seed=0), spans_of_three(2000, seed=1)
    fit, _ = fit_edge_attention(*train, *train, n_classes=3, l2_grid=[ATTENTION_L2])
    found = bits(fit.log_probabilities(new[0], new[1])[0, 0, 0], new[2])
    wanted = {
        name: bits(plain_attention(train[0][0], train[2], new[0][0], loss=loss), new[2])
        for name, loss in CROSS_ENTROPIES.items()
    }
    print(found, wanted)
    assert abs(found - wanted["right"]) < 0.005
    assert abs(wanted["softmax before"] - wanted["right"]) > 0.1


def test_no_sigmoid_before_the_cross_entropy_of_several_labels(logistic_bits):
    train = X[None, TRAIN], SEVERAL[None, TRAIN]
    fit = Linear().fit(*train, *train, kind="multilabel", n_classes=3, l2=[L2], seed=0, device="cpu")
    found = label_bits(fit.outputs(X[None, TEST], label_set=0)[0], SEVERAL[TEST])
    # Two columns of opposite sign share a label's weight, so their penalty is half of one column's.
    wanted = {
        name: label_bits(logistic(X[TRAIN], SEVERAL[TRAIN], 3, loss=loss, l2=L2 / 2)(X[TEST]), SEVERAL[TEST])
        for name, loss in LABEL_LOSSES.items()
    }
    peers = [LogisticRegression(C=2 / (L2 * N_TRAIN), tol=1e-8).fit(X[TRAIN], SEVERAL[TRAIN, k]) for k in range(3)]
    odds = np.stack([peer.decision_function(X[TEST]) for peer in peers], 1)
    print(found, wanted, logistic_bits)
    assert label_bits(odds, SEVERAL[TEST]) == pytest.approx(wanted["right"], abs=1e-4)
    assert abs(found - wanted["right"]) < 3 * 0.005
    assert abs(wanted["sigmoid before"] - wanted["right"]) > 3 * 0.02
    assert abs(logistic_bits["sigmoid before"] - logistic_bits["right"]) > 0.02  # of one label among several classes


# ---------------------------------------------------------------- training loops

UNITS, LOOKS = 32, 20


def curved(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The signs of two products of features, which a hidden layer is needed for; items sorted by label."""
    x = np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(int) + 2 * (x[:, 2] * x[:, 3] > 0)
    order = np.argsort(y, kind="stable")
    return x[order], y[order]


def plain_mlp(train, dev, new: np.ndarray, outputs: int, *, loss: Loss, mistake: str = "") -> np.ndarray:
    """Outputs for ``new`` of one model trained by a plain loop, from the same weights and in the same batches.

    ``mistake``: ``return`` leaves a pass after its first batch; ``half`` zeroes the gradients of every batch and steps
    after every second one; ``unshuffled`` takes the items as they come.
    """
    (x, y), (x_dev, y_dev) = train, dev
    mean, scale = x.mean(0), x.std(0)
    x, x_dev, new = (torch.from_numpy((v - mean) / scale) for v in (x, x_dev, new))
    y, y_dev = torch.from_numpy(y), torch.from_numpy(y_dev)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, outputs))
    random = generator(0, "MLP weights", WIDTH, UNITS, outputs)
    with torch.no_grad():
        for layer, width in ((model[0], WIDTH), (model[2], UNITS)):
            bound = width**-0.5
            layer.weight.copy_(torch.from_numpy(random.uniform(-bound, bound, tuple(layer.weight.T.shape))).T)
            layer.bias.copy_(torch.from_numpy(random.uniform(-bound, bound, (1, len(layer.bias))))[0])
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    batches = generator(0, "MLP batches", len(x))
    passes = -(-LOOK_STEPS // -(-len(x) // BATCH))  # between two looks at dev
    lowest, idle, kept = np.inf, 0, torch.zeros(0)
    for _ in range(LOOKS):
        for _ in range(passes):
            order = np.arange(len(x)) if mistake == "unshuffled" else batches.permutation(len(x))
            for i, rows in enumerate(np.split(order, range(BATCH, len(x), BATCH))):
                adam.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
                if mistake != "half" or i % 2:
                    adam.step()
                if mistake == "return":
                    break
        with torch.no_grad():
            now = float(loss(model(x_dev), y_dev))
            lowest, idle, kept = (now, 0, model(new)) if now < lowest else (lowest, idle + 1, kept)
        if idle == PATIENCE:
            break
    return kept.numpy()


@pytest.fixture(scope="module")
def mlp_bits() -> dict[str, float]:
    """Held-out bits of the package's MLP after a given number of looks at dev, and of plain loops."""
    (x, y), dev, (new, new_y) = train = curved(900), curved(400, seed=1), curved(2000, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        # Part of the way: where training ends, one that is merely slow has caught up.
        patch.setattr("probing.probes.mlp.MOST_LOOKS", LOOKS)
        fit = fit_mlp_probes(
            x[None], y[None], dev[0][None], dev[1][None], width=UNITS, kind="classes", n_classes=CLASSES
        )
    found = {"ours": bits(fit.log_probabilities(new[None], label_set=0)[0], new_y)}
    for mistake in ("", "return", "half", "unshuffled"):
        outputs = plain_mlp(train[0], dev, new, CLASSES, loss=functional.cross_entropy, mistake=mistake)
        found[mistake or "right"] = bits(log_softmax(outputs), new_y)
    outputs = plain_mlp(train[0], dev, new, CLASSES, loss=CROSS_ENTROPIES["softmax before"])
    found["softmax before"] = bits(log_softmax(outputs), new_y)
    print(found)
    return found


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param("return", id="no_return_inside_the_loop"),
        pytest.param("half", id="every_batch_has_its_step"),
        pytest.param("unshuffled", id="batches_are_shuffled"),
        pytest.param("softmax before", id="no_softmax_before_the_loss"),
    ],
)
def test_an_mlp_is_trained_as_a_plain_loop_trains_it(mistake, mlp_bits):
    assert abs(mlp_bits["ours"] - mlp_bits["right"]) < 0.005
    assert abs(mlp_bits[mistake] - mlp_bits["right"]) > 0.02


def test_no_sigmoid_before_an_mlps_loss_of_several_labels(monkeypatch):
    monkeypatch.setattr("probing.probes.mlp.MOST_LOOKS", LOOKS)
    dev = slice(N_TRAIN, N_TRAIN + 500)
    fit = fit_mlp_probes(
        X[None, TRAIN], SEVERAL[None, TRAIN], X[None, dev], SEVERAL[None, dev], width=UNITS, kind="multilabel",
        n_classes=3,
    )  # fmt: skip
    found = label_bits(fit.outputs(X[None, TEST], label_set=0)[0], SEVERAL[TEST])
    data = (X[TRAIN], SEVERAL[TRAIN]), (X[dev], SEVERAL[dev]), X[TEST]
    wanted = {name: label_bits(plain_mlp(*data, 3, loss=loss), SEVERAL[TEST]) for name, loss in LABEL_LOSSES.items()}
    print(found, wanted)
    assert abs(found - wanted["right"]) < 0.005
    assert abs(wanted["sigmoid before"] - wanted["right"]) > 0.02


def intercept_code(y: np.ndarray) -> tuple[float, float]:
    """KL and expected cross-entropy in nats of the best normal posterior of two intercepts with priors N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights, ones, n = weights / weights.sum(), int(y.sum()), len(y)

    def parts(v: np.ndarray) -> tuple[float, float]:
        means, variances = v[:2], np.exp(v[2:])
        kl = 0.5 * (means**2 + variances - 1 - v[2:]).sum()
        odds = means[1] - means[0] + np.sqrt(variances.sum()) * nodes
        return kl, float(weights @ ((n - ones) * np.logaddexp(0, odds) + ones * np.logaddexp(0, -odds)))

    return parts(minimize(lambda v: sum(parts(v)), np.array([0.0, 0, -3, -3]), method="BFGS").x)


def test_a_variational_code_is_trained_to_the_optimum_of_quadrature_and_both_its_parts_are_in_bits():
    # A column that does not vary leaves the intercepts alone to be learnt; the last batch is not full.
    y = (np.random.default_rng(0).random(1300) < 0.2).astype(int)
    kl, loss = intercept_code(y)
    code = variational_code(np.ones((1, len(y), 1), np.float32), y, n_classes=2, steps=2500)
    stopped = variational_code(np.ones((1, len(y), 1), np.float32), y, n_classes=2, steps=1)
    total = (kl + loss) / LN2
    print(code.model_bits, kl / LN2, code.data_bits, loss / LN2, "one step", stopped.bits)
    assert code.bits[0, 0] == pytest.approx(total, rel=0.002)
    assert code.data_bits[0, 0] == pytest.approx(loss / LN2, rel=0.002)
    assert code.model_bits[0, 0] == pytest.approx(kl / LN2, rel=0.1)
    assert stopped.bits[0, 0] > 1.1 * total  # a return inside the loop
    assert kl < 0.8 * kl / LN2  # a model in nats beside labels in bits
    assert kl + loss / LN2 < total - 1
    batches = [
        part.mean() for part in np.split(-np.log2(np.where(y == 1, y.mean(), 1 - y.mean())), range(256, 1300, 256))
    ]
    assert sum(batches) / len(y) < 0.01 * code.data_bits[0, 0] / len(y)  # means of batches, divided by n


# ---------------------------------------------------------------- means over batches


def test_the_loss_on_dev_is_a_mean_over_items_and_not_over_batches(monkeypatch):
    # One wrong item in a batch of its own would outweigh 400 right ones in the batch before it.
    x = np.tile([-1.0, 1.0], 200).astype(np.float32)[:, None] + np.linspace(-0.1, 0.1, 400, dtype=np.float32)[:, None]
    y = np.tile([0, 1], 200)
    dev, dev_y = np.concatenate([x, [[3.0]]]).astype(np.float32), np.append(y, 0)
    grid = [1e-3, 0.5]
    path = fit_linear_probes(x[None], y, n_classes=2, l2=grid)
    losses = -path.log_probabilities(dev[None])[0, 0][:, np.arange(401), dev_y]  # (penalties, items)
    by_item = losses.mean(1)
    by_batch = (losses[:, :400].mean(1) + losses[:, 400]) / 401
    print(by_item, by_batch)
    assert by_item.argmin() == 0
    assert by_batch.argmin() == 1
    for rows in (400, 8192):
        monkeypatch.setattr("probing.probes.linear.SCORED_ROWS", rows)
        assert fit_selected(x[None], y, dev[None], dev_y, n_classes=2, l2_grid=grid)[1][0] == grid[0]


def test_scores_of_held_out_items_are_sums_over_items_however_they_are_cut(monkeypatch):
    def scored() -> np.ndarray:
        splits = ProbeSplits((X[None, :600], X[None, 600:900], X[None, 900:]), (Y[:600], Y[600:900], Y[900:]), CLASSES)
        code = online_code(X[None, :900], Y[:900], n_classes=CLASSES, l2=0.02)
        return np.array([
            v_information(splits, np.arange(len(Y) - 900), n_boot=10, l2_grid=[L2]).bits[0, 0], code.bits[0, 0],
        ])  # fmt: skip

    whole = scored()
    for module in ("linear", "vinfo", "mdl"):
        monkeypatch.setattr(f"probing.probes.{module}.SCORED_ROWS", 7)
    np.testing.assert_allclose(scored(), whole, rtol=1e-5)
    losses = -linear_log_p()[np.arange(len(Y) - N_TRAIN), Y[TEST]]
    batches = sum(part.mean() for part in np.split(losses, range(7, len(losses), 7))) / len(losses)
    assert batches < 0.2 * losses.mean()


def test_the_loss_of_a_structural_probe_is_a_mean_over_sentences_however_they_are_cut(monkeypatch):
    train, dev = (random_trees(count, 6, seed=split) for count, split in ((60, "train"), (33, "dev")))
    states = [planted_tree_states(trees, 6, seed=len(trees))[None] for trees in (train, dev)]
    monkeypatch.setattr("probing.probes.structural.MOST_LOOKS", 3)  # far from a perfect fit
    monkeypatch.setattr("probing.probes.structural.SCORED_WORDS", 25)  # several sentences, the last batch not full
    fit = fit_structural_probes(states[0], train, states[1], dev, rank=6)
    distances = fit.distances(states[1], [len(tree) for tree in dev])
    losses = np.array([np.abs(d[0] - tree.distances).mean() for d, tree in zip(distances, dev, strict=True)])
    print(fit.distance.dev_loss, losses.mean())
    assert fit.distance.dev_loss[0] == pytest.approx(losses.mean(), rel=1e-4)
    batches = np.split(losses[np.argsort([len(tree) for tree in dev], kind="stable")], range(5, 33, 5))
    assert abs(np.mean([b.mean() for b in batches]) / losses.mean() - 1) > 1e-3  # a mean of means
    assert sum(b.mean() for b in batches) / 33 < 0.5 * losses.mean()


# ---------------------------------------------------------------- nats and bits


def test_information_is_in_bits_everywhere():
    # States that tell one of eight labels tell 3 bits, which are 2.08 nats; noise leaves each label its 3 bits.
    rng = np.random.default_rng(0)
    y = rng.permutation(np.tile(np.arange(8), 300))
    states = np.stack([rng.standard_normal((len(y), 8)), 4 * np.eye(8)[y]])
    cuts = [slice(0, 1200), slice(1200, 1600), slice(1600, None)]
    splits = ProbeSplits(tuple(states[:, c] for c in cuts), tuple(y[c] for c in cuts), 8)
    information = v_information(splits, np.arange(800), l2_grid=(1e-5, 10.0), n_boot=10)
    conditional = v_information(splits, np.arange(800), base="first", l2_grid=(1e-5, 10.0), n_boot=10)
    table = probe_arrays(states, y, seeds=1, l2=(1e-5, 10.0), n_boot=10).scores.query("metric == 'bits'")
    code = online_code(states[:1], y, n_classes=8, l2=10.0)
    mix = fit_mixes(states[:, cuts[0]], y[cuts[0]], states[:, cuts[1]], y[cuts[1]], n_classes=8, l2_grid=[10.0])
    three = {
        "V-information": information.bits[1, 0],
        "label entropy": information.label_entropy[0],
        "conditional": conditional.bits[0, 0],
        "bits saved": table.query("hidden == 1")["value"].mean(),
        "online code": code.bits[0, 0] / len(y),
        "uniform code": code.uniform_bits / len(y),
        "mix": bits(mix.log_probabilities(states[:, cuts[2]])[0, 0], y[cuts[2]]),
    }
    print(three)
    for name, value in three.items():
        assert value == pytest.approx(3, abs=0.06), name
        assert abs(value - 3 * LN2) > 0.8, name
    assert abs(information.bits[0, 0]) < 0.06


def test_a_code_of_bits_and_nats_is_given_on_request_only():
    code = online_code(X[None, :900], Y[:900], n_classes=CLASSES, l2=0.02)
    mixed = float(code.legacy_kbit()[0, 0])
    read = published_compression(mixed, n_items=900, n_classes=CLASSES)
    assert read.compression == pytest.approx(code.compression[0, 0])
    assert mixed * 1024 < 0.75 * code.bits[0, 0]
    assert published_compression(mixed, n_items=900, n_classes=CLASSES, units="legacy_nats").kbit == mixed


# ---------------------------------------------------------------- an enum compared with a string


class Spelled(Enum):
    """Settings as members of an enumeration, none of which equals its own spelling."""

    BITS = "bits"
    BLOCK = "block"
    CODES = "codes"
    INITIALISE = "initialise"
    LABELS = "labels"
    LEFT = "left"
    MEAN = "mean"
    NUMBER = "number"
    RAW = "raw"
    SINGLE = "single"
    TWO_SIDED = "two-sided"


def test_no_setting_is_an_enumeration_that_a_comparison_with_its_spelling_would_miss():
    def imported(tree: ast.Module) -> set[str]:
        nodes = list(ast.walk(tree))
        plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}

    files = [path for package in (spafit, probing, analysis) for path in Path(package.__path__[0]).rglob("*.py")]
    assert len(files) > 100
    assert [str(p) for p in files if "enum" in imported(ast.parse(p.read_text(encoding="utf-8")))] == []
    assert "enum" in imported(ast.parse("from enum import Enum"))


REFUSED: dict[str, Callable[[Any], object]] = {
    "number": lambda kind: probe_arrays(X[None, :300], X[:300, 0], kind=kind, seeds=1, n_boot=10),
    "labels": lambda base: v_information(
        ProbeSplits((X[None, :300],) * 3, (Y[:300],) * 3, CLASSES), np.arange(300), base=base, n_boot=10
    ),
    "bits": lambda units: published_compression(96.02, n_items=950_028, n_classes=45, units=units),
    "codes": lambda rows: online_code(X[None, :300], Y[:300], n_classes=CLASSES, l2=0.1).to_pandas(rows=rows),
    "two-sided": lambda alternative: max_t(
        np.ones(2), np.random.default_rng(0).random((50, 2)), alternative=alternative
    ),
    "raw": lambda variant: Shift.of(X[:50], variant),
    "single": lambda kind: windows(4, kind),
    "left": lambda rule: item_conductance(tiny_loaded().model, [3, 4, 5], rule=rule),
    "initialise": lambda how: randomize_weights(tiny_loaded(), 0, how=how),
    "block": lambda site: extract(tiny_loaded(), some_texts(2), sites=(site,), device="cpu"),
    "mean": lambda pooling: extract(tiny_loaded(), some_texts(2), word_pooling=(pooling,), device="cpu"),
}


@pytest.mark.parametrize("spelling", REFUSED)
def test_what_equals_no_spelling_is_refused_and_takes_no_other_branch(spelling, cache):
    # ``value == "bits"`` is false for a member that is spelt so: the code would go on with what stands after ``else``.
    assert Spelled(spelling) != spelling
    with pytest.raises(SpafitError, match="Spelled"):
        REFUSED[spelling](Spelled(spelling))
    with pytest.raises(SpafitError, match="nonsense"):
        REFUSED[spelling]("nonsense")


# ---------------------------------------------------------------- one pass per text

WORDS = ("dog", "cat", "nurse", "baker", "river", "stone", "house", "garden")


def word_tasks(texts: int = 150) -> list[Task]:
    """Two tasks about the words of the same texts."""
    rng = np.random.default_rng(0)
    nouns = rng.integers(len(WORDS), size=texts)
    plural = rng.integers(2, size=texts)
    corpus = Corpus("made", tuple(
        Text.from_words(["The", WORDS[k] + "s" * p, "near", "it", str(i)])
        for i, (k, p) in enumerate(zip(nouns, plural, strict=True))
    ))  # fmt: skip
    split = np.where(np.arange(texts) < 0.6 * texts, "train", np.where(np.arange(texts) < 0.75 * texts, "dev", "test"))
    items = pd.DataFrame({
        "item": [f"i{i}" for i in range(texts)], "text": np.arange(texts), "span": 1, "label": plural, "split": split,
        "group": [f"s{i}" for i in range(texts)], "control": [WORDS[k] for k in nouns],
    })  # fmt: skip
    task = Task("made.plural", "syntax", "word", ("singular", "plural"), corpus, items)
    animate = replace(task, name="made.animate", items=items.assign(label=(nouns < 4).astype(int)))
    return [task, animate]


def test_every_text_is_encoded_once_for_all_layers_tasks_controls_and_seeds(small_bert, tmp_path, cache):
    rows: Counter[str] = Counter()

    def count(module: torch.nn.Module, args, output) -> None:
        if type(module).__name__ == "BertLayer":
            rows["blocks"] += len(output[0] if isinstance(output, tuple) else output)

    tasks = word_tasks()
    texts = len(tasks[0].corpus.texts)
    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        results = probe_layers(
            str(small_bert), tasks, out=tmp_path / "run", seeds=(0, 1), controls=("word-type", "random-encoder"),
            max_train=10_000, n_boot=100, quiet=True,
        )  # fmt: skip
        once = rows["blocks"]
        loaded = load_model(small_bert)
        rows.clear()
        for hidden in range(4):  # the mistake: each layer asks for its own pass
            extract(loaded, tasks[0].corpus.texts, cache_dir=tmp_path / str(hidden), device="cpu")
        per_layer = rows["blocks"]
    finally:
        handle.remove()
    assert set(results.scores["hidden"]) == {0, 1, 2, 3}
    assert set(results.scores["task"]) == {"made.plural", "made.animate"}
    assert once == 3 * texts * (1 + 2)  # each of three blocks once, in the model and in a random encoder per seed
    assert per_layer == 4 * 3 * texts


# ---------------------------------------------------------------- control labels


def per_split(task: Task, seed: int) -> np.ndarray:
    """The mistake: every split draws its own labels for the same types."""
    rng, out = np.random.default_rng(seed), np.empty(len(task.items), dtype=int)
    for part in ("train", "dev", "test"):
        rows = (task.items["split"] == part).to_numpy()
        types, inverse = np.unique(task.items.loc[rows, "control"], return_inverse=True)
        out[rows] = rng.integers(len(task.labels), size=len(types))[inverse]
    return out


def of_types(kind: str) -> Task:
    """40 types that all occur in every split."""
    rng, n = np.random.default_rng(0), 1200
    types = np.concatenate([rng.permutation(np.tile(np.arange(40), 10)) for _ in range(3)])
    label = {
        "classes": rng.integers(4, size=n),
        "number": rng.standard_normal(n),
        "multilabel": [",".join(str(k) for k in np.flatnonzero(row)) for row in rng.random((n, 4)) < 0.4],
    }[kind]
    items = pd.DataFrame({
        "item": np.arange(n).astype(str), "text": np.arange(n), "span": 0, "label": label,
        "split": np.repeat(["train", "dev", "test"], 400), "group": np.arange(n).astype(str),
        "control": [f"w{t}" for t in types],
    })  # fmt: skip
    corpus = Corpus("made", tuple(Text.from_words([f"w{t}"]) for t in types))
    return Task("made", "other", "word", () if kind == "number" else tuple("abcd"), corpus, items, kind=kind).validate()


def labels_of_a_type(task: Task, labels: np.ndarray) -> float:
    """Distinct labels per type over all splits, on average."""
    rows = pd.DataFrame(labels.reshape(len(labels), -1)).assign(type=task.items["control"].to_numpy())
    return len(rows.drop_duplicates()) / 40


@pytest.mark.parametrize("kind", ["classes", "multilabel", "number"])
def test_control_labels_are_drawn_once_per_type_for_all_splits(kind):
    task = of_types(kind)
    first, second = (control_labels(task, seed) for seed in (0, 1))
    assert labels_of_a_type(task, first) == 1
    assert not np.array_equal(first, second)
    assert len(np.unique(first, axis=0)) > 3  # and not one label for all types
    if kind == "classes":
        assert labels_of_a_type(task, per_split(task, 0)) > 1.8


def test_a_control_is_read_from_identity_which_labels_drawn_per_split_would_prevent():
    task = of_types("classes")
    states = np.eye(40)[task.items["control"].str[1:].astype(int)][None]
    split, own = task.items["split"], task.items["label"].to_numpy()
    results = probe_arrays(states, own, split=split, control=task.items["control"], seeds=2, n_boot=10).scores
    ours = results.query("control == 'word-type' and metric == 'accuracy'")["value"]
    mistaken = probe_arrays(states, per_split(task, 0), split=split, seeds=2, n_boot=10).scores
    assert ours.min() > 0.99
    assert mistaken.query("metric == 'accuracy'")["value"].max() < 0.5
