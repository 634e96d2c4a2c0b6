"""Variational codes: divergences against integrals, and lengths against the labels' true code and the online code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from probing.probes.mdl import online_code
from probing.probes.variational import _Posterior, log_uniform_kl, normal_kl, variational_code
from spafit.errors import NumericalError, UsageError


def planted(n: int, width: int, classes: int, *, seed: int = 0, strength: float = 3.0) -> tuple[np.ndarray, ...]:
    """Features, labels drawn from a softmax of them, and the bits of these labels by the true probabilities."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width))
    logits = strength * x @ rng.standard_normal((width, classes)) / np.sqrt(width)
    y = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return x.astype(np.float32), y, -log_p[np.arange(n), y].sum() / np.log(2)


@pytest.mark.parametrize("log_alpha", [-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 3.0, 8.0])
def test_divergence_from_the_log_uniform_prior_is_that_of_the_integral(log_alpha):
    deviation = np.exp(log_alpha / 2)

    def term(e: float) -> float:
        return norm.pdf(e) * np.log(abs(1 + deviation * e))

    pole = float(np.clip(-1 / deviation, -12, 12))
    mean = sum(quad(term, *ends, limit=400)[0] for ends in ((-12, pole), (pole, 12)))
    expected = mean - log_alpha / 2 + (np.euler_gamma + np.log(2)) / 2
    found = float(log_uniform_kl(torch.tensor(log_alpha, dtype=torch.float64)))
    print(log_alpha, found, expected)
    assert found == pytest.approx(expected, abs=0.015)
    assert found > 0


def test_divergence_of_normals_is_torchs_and_that_of_draws():
    mean, log_variance = torch.tensor([0.0, 1.5, -0.3]), torch.tensor([0.0, -4.0, 0.7])
    q, p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    found = normal_kl(mean, log_variance)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(q, p))
    draws = mean + (0.5 * log_variance).exp() * torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, (q.log_prob(draws) - p.log_prob(draws)).mean(0), atol=0.02, rtol=0)


def test_expected_cross_entropy_is_that_of_whole_probes_drawn_from_the_posterior():
    noise, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    q = _Posterior(1, 3, 4, torch.device("cpu"))
    for parameter in q.parameters:
        parameter.data = torch.from_numpy(rng.normal(-0.5, 0.8, parameter.shape).astype(np.float32))
    row, label, draws = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[2]]), 100_000
    ours = q.losses(row.expand(draws, -1), label.expand(1, draws), noise).mean().detach()
    mean, log_alpha, w, v, b, vb = (p.detach().numpy()[0] for p in q.parameters)
    z = mean[0] * (1 + np.exp(log_alpha[0] / 2) * rng.standard_normal((draws, 3)))
    weights = z[:, :, None] * (w + np.exp(v / 2) * rng.standard_normal((draws, 3, 4)))
    logits = np.einsum("d,ndk->nk", row[0].numpy(), weights) + b + np.exp(vb / 2) * rng.standard_normal((draws, 4))
    losses = np.log(np.exp(logits).sum(1)) - logits[:, 2]
    print(float(ours), losses.mean(), losses.std() / np.sqrt(draws))
    assert float(ours) == pytest.approx(losses.mean(), abs=6 * losses.std() / np.sqrt(draws))


def test_code_is_a_little_longer_than_the_labels_true_code_and_near_the_online_code():
    x, y, true = planted(4000, 12, 4)
    random = np.random.default_rng(1).integers(0, 4, len(y))
    code = variational_code(x[None], np.stack([y, random]), n_classes=4, steps=2000)
    online = online_code(x[None], y, n_classes=4, l2=1e-3)
    print(
        "true", true, "code", code.bits, "model", code.model_bits, "online", online.bits, "uniform", code.uniform_bits
    )
    assert true < code.bits[0, 0] < 1.15 * true
    assert code.bits[0, 0] == pytest.approx(online.bits[0, 0], rel=0.1)
    assert code.data_bits[0, 0] < 1.03 * true
    assert 0.98 < code.compression[0, 1] <= 1.0
    assert code.model_bits[0, 1] < code.model_bits[0, 0]  # there is nothing to say about random labels' weights


def test_noisy_labels_cost_more_and_features_that_say_nothing_little():
    x, y, _ = planted(3000, 8, 3)
    rng = np.random.default_rng(2)
    noisy = np.where(rng.random(len(y)) < 0.3, rng.integers(0, 3, len(y)), y)
    wide = np.concatenate([x, rng.standard_normal((len(y), 24)).astype(np.float32)], 1)
    clean, wider = (variational_code(s[None], np.stack([y, noisy]), n_classes=3, steps=1500) for s in (x, wide))
    print("clean, noisy", clean.bits, "with 24 columns of noise", wider.bits, clean.model_bits, wider.model_bits)
    assert clean.bits[0, 1] > 1.2 * clean.bits[0, 0]
    assert wider.model_bits[0, 0] < 2 * clean.model_bits[0, 0]  # four times the columns
    assert 0 < wider.bits[0, 0] - clean.bits[0, 0] < 24 * 6


def test_twice_the_steps_change_little_and_seeds_give_the_same_bytes():
    x, y, _ = planted(2000, 8, 3)
    code, again = (variational_code(x[None], y, n_classes=3, steps=1000) for _ in range(2))
    longer = variational_code(x[None], y, n_classes=3, steps=2000)
    other = variational_code(np.stack([planted(2000, 8, 3, seed=9)[0], x]), y, n_classes=3, steps=1000)
    print("steps", code.bits, longer.bits, "in company", other.bits)
    assert code.bits.tobytes() == again.bits.tobytes()
    assert longer.bits[0, 0] == pytest.approx(code.bits[0, 0], rel=0.02)
    assert other.bits[1, 0] == pytest.approx(code.bits[0, 0], rel=1e-4)
    table = other.to_pandas()
    assert table["bits"].tolist() == (table["model_bits"] + table["data_bits"]).tolist()
    assert table["compression"].iloc[0] == pytest.approx(2000 * np.log2(3) / table["bits"].iloc[0])


def test_bad_input_is_refused_in_one_sentence():
    x, y, _ = planted(50, 3, 3)
    with pytest.raises(UsageError, match="at least one"):
        variational_code(x[None], y, n_classes=3, steps=0)
    with pytest.raises(UsageError, match="from 0 to 1"):
        variational_code(x[None], y, n_classes=2)
    x[4, 0] = np.inf
    with pytest.raises(NumericalError, match="item 4"):
        variational_code(x[None], y, n_classes=3)
