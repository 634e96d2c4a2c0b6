"""Attention over the words of spans: against a loop of one span at a time, a planted position, and random labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probing.probes.edge_span import EdgeAttentionFit, fit_edge_attention
from probing.probes.linear import fit_selected
from spafit.errors import UsageError

CLASSES, WIDTH = 3, 12


def planted(n: int, seed: int, *, spans: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spans of three to six words of which only the last tells the label; feature 0 marks the last words.

    All other words show a random class in just the same way, so that a mean over the span says little. With two spans
    the label is that of the second one.
    """
    rng = np.random.default_rng(seed)
    words, ranges, labels = [], [], []
    for _ in range(n):
        own = []
        for _ in range(spans):
            length = int(rng.integers(3, 7))
            shown = rng.integers(CLASSES, size=length)
            block = rng.normal(size=(length, WIDTH)) * 0.3
            block[np.arange(length), 1 + shown] += 1.5
            block[-1, 0] += 2.0
            own.append((len(words), len(words) + length))
            words += list(block)
            label = shown[-1]
        ranges.append(own)
        labels.append(label)
    return np.array(words, dtype=np.float32)[None], np.array(ranges), np.array(labels)


def accuracy(fit: EdgeAttentionFit, words: np.ndarray, spans: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (fit.log_probabilities(words, spans, label_set=0)[:, 0].argmax(-1) == labels).mean(-1)


def means(words: np.ndarray, spans: np.ndarray) -> np.ndarray:
    return np.stack([[np.concatenate([x[a:b].mean(0) for a, b in item]) for item in spans] for x in words])


def by_hand(fit: EdgeAttentionFit, words: np.ndarray, spans: np.ndarray, b: int, m: int, l2: float, labels: np.ndarray):
    """One item and one span at a time: log probabilities, penalised objective, largest entry of its gradient."""
    v = torch.tensor(fit.attention[b, m], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor(fit.linear.weights[b, m, 0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(fit.linear.bias[b, m, 0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor((words[b] - fit.word_mean[b]) / fit.word_scale[b], dtype=torch.float64)
    log_p = []
    for item in spans:
        parts = []
        for slot, (start, end) in enumerate(item):
            share = torch.softmax(x[start:end] @ v[slot], 0)
            parts.append((share[:, None] * x[start:end]).sum(0))
        pooled = (torch.cat(parts) - torch.tensor(fit.linear.mean[b])) / torch.tensor(fit.linear.scale[b])
        log_p.append(torch.log_softmax(pooled @ weights + bias, 0))
    table = torch.stack(log_p)
    objective = -table[np.arange(len(labels)), labels].mean() + l2 / 2 * (weights.square().sum() + v.square().sum())
    objective.backward()
    gradient = max(float(p.grad.abs().max()) for p in (v, weights, bias))
    return table.detach().numpy(), float(objective.detach()), gradient


@pytest.mark.parametrize("spans", [1, 2])
def test_probabilities_are_those_of_a_loop_over_items_and_the_objective_is_at_rest(spans):
    words, ranges, labels = planted(150, 0, spans=spans)
    fit, l2 = fit_edge_attention(
        words, ranges, labels, words, ranges, labels, n_classes=CLASSES, l2_grid=[0.02], max_steps=1000
    )
    table, objective, gradient = by_hand(fit, words, ranges, 0, 0, l2[0], labels)
    assert np.allclose(fit.log_probabilities(words, ranges)[0, 0, 0], table, atol=1e-5)
    # Training is its own dev here; the penalty is no part of dev's loss, so a fit ends close to the objective's rest.
    assert gradient < 0.02
    assert objective < np.log(CLASSES) * 0.6


def test_an_independent_optimiser_finds_the_same_minimum():
    words, ranges, labels = planted(200, 1)
    fit, l2 = fit_edge_attention(
        words, ranges, labels, words, ranges, labels, n_classes=CLASSES, l2_grid=[0.02], max_steps=1000
    )
    _, objective, _ = by_hand(fit, words, ranges, 0, 0, l2[0], labels)
    x = torch.tensor((words[0] - fit.word_mean[0]) / fit.word_scale[0])
    longest = int((ranges[:, 0, 1] - ranges[:, 0, 0]).max())
    rows = torch.tensor(ranges[:, 0, :1] + np.arange(longest))
    outside = rows >= torch.tensor(ranges[:, 0, 1:])
    padded = x[rows.clamp(max=len(x) - 1)]
    mean, scale = torch.tensor(fit.linear.mean[0]), torch.tensor(fit.linear.scale[0])
    v, weights, bias = torch.zeros(WIDTH), torch.zeros(WIDTH, CLASSES), torch.zeros(CLASSES)
    parameters = [p.requires_grad_() for p in (v, weights, bias)]
    adam = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(3000):
        adam.zero_grad()
        share = (padded @ v).masked_fill(outside, -torch.inf).softmax(1)
        pooled = ((share[..., None] * padded).sum(1) - mean) / scale
        loss = torch.nn.functional.cross_entropy(pooled @ weights + bias, torch.tensor(labels))
        loss = loss + float(l2[0]) / 2 * (weights.square().sum() + v.square().sum())
        loss.backward()
        adam.step()
    # Not closer: the step that is kept has the lowest loss on dev (here: training), which knows no penalty.
    assert objective == pytest.approx(float(loss.detach()), abs=0.01 * np.log(2))


@pytest.mark.parametrize("spans", [1, 2])
def test_attention_finds_the_word_that_carries_the_label_and_a_mean_does_not(spans):
    train, dev, test = (planted(n, seed, spans=spans) for n, seed in ((800, 0), (300, 1), (500, 2)))
    fit, _ = fit_edge_attention(*train, *dev, n_classes=CLASSES)
    linear, _ = fit_selected(means(*train[:2]), train[2], means(*dev[:2]), dev[2], n_classes=CLASSES)
    by_mean = (linear.log_probabilities(means(*test[:2]))[0, 0, 0].argmax(-1) == test[2]).mean()
    assert accuracy(fit, *test)[0] > 0.95
    assert by_mean < 0.75
    slot = fit.attention[0, 0, -1]
    assert np.abs(slot).argmax() == 0  # it looks at the mark of last words
    assert slot[0] > 1
    assert fit.dev_bits[0, 0] < fit.dev_bits_mean[0, 0] - 0.5


def test_random_labels_are_not_found():
    rng = np.random.default_rng(7)
    train, dev, test = (planted(n, seed) for n, seed in ((600, 0), (300, 1), (1000, 2)))
    train, dev, test = ((w, s, rng.integers(CLASSES, size=len(y))) for w, s, y in (train, dev, test))
    fit, _ = fit_edge_attention(*train, *dev, n_classes=CLASSES)
    assert abs(accuracy(fit, *test)[0] - 1 / CLASSES) < 4 * np.sqrt(2 / 9 / 1000)
    log_p = fit.log_probabilities(test[0], test[1])[0, 0, 0]
    assert -log_p[np.arange(1000), test[2]].mean() / np.log(2) > np.log2(CLASSES) - 0.05  # nothing saved


def test_it_is_never_worse_on_dev_than_mean_pooling_and_each_representation_stands_alone():
    rng = np.random.default_rng(3)
    train, dev = planted(300, 0), planted(200, 1)
    noise = [rng.normal(size=(1, part[0].shape[1], WIDTH)).astype(np.float32) for part in (train, dev)]
    words, words_dev = np.concatenate([noise[0], train[0]]), np.concatenate([noise[1], dev[0]])
    control = rng.integers(CLASSES, size=(2, 300))
    labels, labels_dev = np.stack([train[2], control[0]]), np.stack([dev[2], control[1][:200]])
    fit, l2 = fit_edge_attention(words, train[1], labels, words_dev, dev[1], labels_dev, n_classes=CLASSES)
    assert fit.attention.shape == (2, 2, 1, WIDTH)
    assert fit.log_probabilities(words, train[1]).shape == (2, 2, 1, 300, CLASSES)
    assert (fit.dev_bits <= fit.dev_bits_mean).all()
    alone, l2_alone = fit_edge_attention(*train, *dev, n_classes=CLASSES)
    assert l2_alone[0] == l2[1]
    assert np.array_equal(alone.attention[0, 0], fit.attention[1, 0])
    again, _ = fit_edge_attention(*train, *dev, n_classes=CLASSES)
    assert again.linear.weights.tobytes() == alone.linear.weights.tobytes()


def test_a_class_without_training_items_keeps_its_small_share():
    words, ranges, labels = planted(200, 0)
    labels = np.where(labels == 1, 2, labels)
    fit, _ = fit_edge_attention(words, ranges, labels, words, ranges, labels, n_classes=CLASSES, l2_grid=[0.01])
    p = np.exp(fit.log_probabilities(words, ranges)[0, 0, 0])
    assert np.allclose(p.sum(1), 1, atol=1e-5)
    assert np.allclose(p[:, 1], 0.5 / 200.5, atol=1e-6)


def test_spans_that_cannot_be_pooled_are_named():
    words, ranges, labels = planted(20, 0)
    bad = ranges.copy()
    bad[4, 0, 1] = bad[4, 0, 0]
    with pytest.raises(UsageError, match="A span of item 4 is"):
        fit_edge_attention(words, bad, labels, words, ranges, labels, n_classes=CLASSES)
    with pytest.raises(UsageError, match="which do not fit training's"):
        fit_edge_attention(words, ranges, labels, words, np.tile(ranges, (1, 2, 1)), labels, n_classes=CLASSES)
