"""Every probe family finds planted truth, nothing in noise, and what an independent implementation finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import f1_score, r2_score

from probing.arrays import probe_arrays
from probing.config import ProbeConfig
from probing.probes.families import Family, Linear, LowRank, Mlp, parse_probe, split_probes
from probing.probes.linear import fit_linear_probes
from probing.probes.lowrank import fit_low_rank_probes
from probing.probes.mlp import fit_mlp_probes
from probing.probes.outputs import loss_and_residual
from probing.probes.ridge import fit_ridge_probes
from probing.results import ProbeResults
from spafit.errors import NumericalError, TaskError, UsageError
from spafit.stats import BootstrapDraw
from tests.planted import planted_states

FAMILIES: dict[str, Family] = {f.name: f for f in (Linear(), LowRank(2), Mlp(16), Mlp(16, 0.2))}
LN2 = np.log(2)


def made(n: int, width: int = 12, classes: int = 4, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features and labels drawn from a softmax of two of their directions."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)) @ rng.standard_normal((width, width))
    logits = 1.2 * x @ rng.standard_normal((width, 2)) @ rng.standard_normal((2, classes)) / np.sqrt(width)
    return x.astype(np.float32), (logits + rng.gumbel(size=logits.shape)).argmax(1)


def halves(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    k = 2 * len(x) // 3
    return x[None, :k], y[None, :k], x[None, k:], y[None, k:]


def fitted(family: Family, x: np.ndarray, y: np.ndarray, *, kind: str = "classes", n_classes: int = 4, **more):
    train, labels, dev, dev_labels = halves(x, y)
    options = {"kind": kind, "n_classes": n_classes, "l2": None, "seed": 0, "device": "cpu", **more}
    return family.fit(train, labels, dev, dev_labels, **options)


def held_out_bits(fit, x: np.ndarray, y: np.ndarray) -> float:
    """Mean log loss on items that were never seen."""
    log_p = fit.log_probabilities(x[None], label_set=0)[0]
    return float(-log_p[np.arange(len(y)), y].mean() / LN2)


# ---------------------------------------------------------------- names


def test_names_are_read_split_and_written_back():
    assert split_probes("linear, mlp:64,dropout=0.2,low-rank:4") == ["linear", "mlp:64,dropout=0.2", "low-rank:4"]
    for name, family in FAMILIES.items():
        assert parse_probe(name) == family
    assert ProbeConfig(probe=("linear,mlp:8", "low-rank:2")).probe == ("linear", "mlp:8", "low-rank:2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("liner", "Did you mean 'linear'"),
        ("linear:3", "no settings"),
        ("mlp", "such as mlp:64"),
        ("low-rank:0", "such as low-rank:4"),
        ("mlp:8,width=3", "no setting 'width'"),
        ("mlp:8,dropout=1", "below 1"),
        ("mlp:8,dropout=x", "below 1"),
        ("low-rank:2,l2=1", "no settings but its rank"),
    ],
)
def test_a_name_that_means_nothing_is_one_sentence(text, message):
    with pytest.raises(UsageError, match=message):
        ProbeConfig(probe=(text,))


def test_a_probe_is_named_once_and_at_least_once():
    with pytest.raises(UsageError, match="names one twice"):
        ProbeConfig(probe=("mlp:8", "mlp:8,dropout=0"))
    with pytest.raises(UsageError, match="--probe is empty"):
        ProbeConfig(probe=())


@pytest.mark.parametrize(("rank", "of"), [(3, "number of labels"), (2, "states' width")])
def test_a_rank_above_classes_or_width_is_refused(rank, of):
    states, labels = planted_states(1, blocks=1, items=200, width=1)
    with pytest.raises(UsageError, match=rf"low-rank:{rank}.*{of}.*Use low-rank:{rank - 1} or less"):
        probe_arrays(states, labels, probe=f"low-rank:{rank}", n_boot=100)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("kind", ["classes", "multilabel", "number"])
def test_losses_take_logits_as_they_are_and_their_gradients_are_autograds(kind):
    # A softmax or sigmoid before the loss, nats taken for bits, or a mean where a sum belongs would each differ.
    rng = np.random.default_rng(0)
    outputs = torch.from_numpy(3 * rng.standard_normal((2, 50, 1 if kind == "number" else 5))).requires_grad_()
    targets = {
        "classes": torch.from_numpy(rng.integers(5, size=(2, 50))),
        "multilabel": torch.from_numpy(rng.random((2, 50, 5)) < 0.4),
        "number": torch.from_numpy(rng.standard_normal((2, 50))),
    }[kind]
    peer = {
        "classes": lambda: torch.nn.functional.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), reduction="none"
        ),
        "multilabel": lambda: torch.nn.functional.binary_cross_entropy_with_logits(
            outputs, targets.double(), reduction="none"
        ).sum(2),
        "number": lambda: 0.5 * (outputs[..., 0] - targets) ** 2,
    }[kind]().reshape(2, 50)  # fmt: skip
    loss, residual = loss_and_residual(outputs.detach(), targets, kind=kind, absent=None)
    np.testing.assert_allclose(loss, peer.detach(), atol=1e-9)
    peer.sum().backward()
    np.testing.assert_allclose(residual, outputs.grad, atol=1e-9)


# ---------------------------------------------------------------- low rank


def plain_low_rank(z: np.ndarray, y: np.ndarray, classes: int, rank: int, l2: float, seed: int) -> tuple:
    """The same objective by scipy from a random start, in float64."""
    width, eye = z.shape[1], np.eye(classes)[y]

    def parts(v):
        a, b = width * rank, rank * classes
        return v[:a].reshape(width, rank), v[a : a + b].reshape(rank, classes), v[a + b :]

    def objective(v):
        p, q, bias = parts(v)
        w = p @ q
        log_p = log_softmax(z @ w + bias, axis=1)
        residual = (np.exp(log_p) - eye) / len(y)
        slope = z.T @ residual + l2 * w
        value = -(log_p * eye).sum() / len(y) + l2 / 2 * (w**2).sum()
        return value, np.concatenate([(slope @ q.T).ravel(), (p.T @ slope).ravel(), residual.sum(0)])

    start = 0.3 * np.random.default_rng(seed).standard_normal(width * rank + rank * classes + classes)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-12})
    return found.fun, parts(found.x)


@pytest.mark.parametrize(("rank", "l2"), [(1, 1e-2), (2, 1e-3), (2, 0.2), (3, 1e-2)])
def test_a_low_rank_fit_is_the_best_of_many_starts_of_an_independent_solver(rank, l2):
    x, y = made(3000)
    x, y, new, new_y = x[:900], y[:900], x[900:], y[900:]
    mean, scale = x.mean(0), x.std(0)
    z = ((x - mean) / scale).astype(float)
    best = min((plain_low_rank(z, y, 4, rank, l2, seed) for seed in range(6)), key=lambda f: f[0])
    fit = fit_low_rank_probes(x[None], y[None], x[None], y[None], rank=rank, kind="classes", n_classes=4, l2_grid=[l2])
    assert fit.converged.all()
    own = fit.parameters(0, 0)
    w = own["factor"].astype(float) @ own["weight"].astype(float)
    assert np.linalg.matrix_rank(w, tol=1e-4) <= rank
    log_p = log_softmax(z @ w + own["bias"], axis=1)
    value = -log_p[np.arange(len(y)), y].mean() + l2 / 2 * (w**2).sum()
    assert -1e-4 < (value - best[0]) / LN2 < 1e-3
    p, q, bias = best[1]
    peer = log_softmax((new - mean) / scale @ p @ q + bias, axis=1)
    assert abs(held_out_bits(fit, new, new_y) + peer[np.arange(len(new)), new_y].mean() / LN2) < 0.005


@pytest.mark.parametrize("kind", ["classes", "multilabel"])
def test_with_full_rank_a_low_rank_probe_is_the_linear_probe(kind):
    x, y = made(4000)
    train, labels = x[:1500], y if kind == "classes" else np.stack([y == 0, y >= 2, x[:, 0] > 1], 1)
    sets = labels[None] if kind == "classes" else labels.T.astype(int)
    fit = fitted(
        LowRank(labels.max() + 1 if kind == "classes" else 3),
        train,
        labels[:1500],
        kind=kind,
        n_classes=4 if kind == "classes" else 3,
    )
    n = len(halves(train, labels[:1500])[0][0])
    peer = fit_linear_probes(
        x[None, :n], sets[:, :n], n_classes=int(sets.max()) + 1, l2=[fit.l2[0, 0]], tolerance=1e-6
    ).log_probabilities(x[None, 1500:])[0, :, 0]
    expected = -np.take_along_axis(peer, sets[:, 1500:, None], 2).sum() / 2500 / LN2
    outputs = torch.from_numpy(fit.outputs(x[None, 1500:], label_set=0))
    own = loss_and_residual(outputs, torch.from_numpy(labels[None, 1500:]), kind=kind, absent=None)[0].mean() / LN2
    assert abs(float(own) - expected) < 0.005


def test_too_small_a_rank_loses_what_the_linear_probe_reads():
    x, y = made(3000)
    bits = {r: held_out_bits(fitted(LowRank(r), x[:2000], y[:2000]), x[2000:], y[2000:]) for r in (1, 2)}
    linear = held_out_bits(fitted(Linear(), x[:2000], y[:2000]), x[2000:], y[2000:])
    assert bits[1] > linear + 0.05  # the labels depend on two directions
    assert abs(bits[2] - linear) < 0.02


# ---------------------------------------------------------------- MLP


def careful_mlp(x, y, dev, dev_y, test, test_y, width: int, seed: int) -> float:
    """One model in plain torch: shuffled batches, gradients zeroed once a step, dev loss over all items."""
    torch.manual_seed(seed)
    mean, scale = x.mean(0), x.std(0)
    x, dev, test = (torch.from_numpy((v - mean) / scale) for v in (x, dev, test))
    y, dev_y, test_y = (torch.from_numpy(v) for v in (y, dev_y, test_y))
    model = torch.nn.Sequential(torch.nn.Linear(x.shape[1], width), torch.nn.ReLU(), torch.nn.Linear(width, 4))
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-3), torch.nn.CrossEntropyLoss()
    best, idle, kept = np.inf, 0, None
    while idle < 5:
        for rows in (r for _ in range(3) for r in torch.randperm(len(x)).split(128)):  # three passes between looks
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            now = loss(model(dev), dev_y).item()
            best, idle, kept = (now, 0, loss(model(test), test_y).item()) if now < best else (best, idle + 1, kept)
    return kept / LN2


def curved(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels that no linear probe reads: the signs of two products of features."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 8)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] > 0).astype(int) + 2 * (x[:, 2] * x[:, 3] > 0)


def test_an_mlp_has_the_held_out_loss_of_a_careful_loop_over_one_model():
    x, y = curved(3000)
    parts = (x[:1000], y[:1000], x[1000:1400], y[1000:1400], x[1400:], y[1400:])
    with torch.random.fork_rng():
        peer = [careful_mlp(*parts, 32, seed) for seed in range(2)]
    own = []
    for seed in range(2):
        fit = fit_mlp_probes(
            parts[0][None], parts[1][None], parts[2][None], parts[3][None], width=32, kind="classes", n_classes=4,
            seed=seed,
        )  # fmt: skip
        assert fit.converged.all()
        own.append(held_out_bits(fit, parts[4], parts[5]))
    assert abs(np.mean(own) - np.mean(peer)) < 0.05
    linear = held_out_bits(fitted(Linear(), x[:1400], y[:1400]), parts[4], parts[5])
    assert np.mean(own) < 0.7 < 1.95 < linear  # of two bits


def test_items_sorted_by_label_are_shuffled_before_they_are_batched():
    x, y = curved(1500)
    order = np.argsort(y[:700], kind="stable")
    sets = [np.arange(700), order]
    bits = []
    for rows in sets:
        fit = fit_mlp_probes(
            x[None, rows], y[None, rows], x[None, 700:1000], y[None, 700:1000], width=32, kind="classes", n_classes=4
        )
        bits.append(held_out_bits(fit, x[1000:], y[1000:]))
    assert abs(bits[0] - bits[1]) < 0.15
    assert max(bits) < 1.2


def test_the_dev_loss_is_a_mean_over_items_not_over_blocks(monkeypatch):
    x, y = curved(600)
    found = []
    monkeypatch.setattr("probing.probes.mlp.MOST_LOOKS", 20)
    for rows in (4096, 199):  # the last block then holds one item
        monkeypatch.setattr("probing.probes.mlp.DEV_ROWS", rows)
        fit = fitted(Mlp(16), x, y)
        found.append(fit.parameters(0, 0)["weight"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_mlps_of_a_batch_are_those_fitted_alone(monkeypatch):
    monkeypatch.setattr("probing.probes.mlp.MOST_LOOKS", 25)
    rng = np.random.default_rng(0)
    x, y = curved(900)
    other = rng.standard_normal(x.shape).astype(np.float32)
    sets = np.stack([y, rng.permutation(y), (x[:, 4] > 0).astype(int)])
    both = np.stack([x, other])
    options = {"width": 16, "kind": "classes", "n_classes": 4, "seed": 3, "dropout": 0.1}
    together = fit_mlp_probes(both[:, :600], sets[:, :600], both[:, 600:], sets[:, 600:], **options)
    for b in range(2):
        for m in range(3):
            alone = fit_mlp_probes(
                both[b : b + 1, :600], sets[m : m + 1, :600], both[b : b + 1, 600:], sets[m : m + 1, 600:], **options
            )
            for name, value in alone.parameters(0, 0).items():
                np.testing.assert_allclose(together.parameters(b, m)[name], value, atol=0.02, err_msg=name)


def test_an_mlp_is_its_seeds_and_leaves_the_global_state_alone():
    x, y = curved(200)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = fitted(Mlp(8, 0.3), x, y, seed=4).parameters(0, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (fitted(Mlp(8, 0.3), x, y, seed=s).parameters(0, 0) for s in (4, 5))
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert first["weight"].tobytes() != other["weight"].tobytes()


def test_the_weights_with_the_best_dev_loss_are_kept():
    rng = np.random.default_rng(0)
    x, _ = made(300, 40)
    noise = rng.integers(4, size=300)
    fit = fitted(Mlp(64), x, noise)
    assert fit.converged.all()
    assert held_out_bits(fit, x[200:], noise[200:]) < 2.1  # trained on, it would be far above two bits
    assert held_out_bits(fit, x[:200], noise[:200]) > 1.0


# ---------------------------------------------------------------- numbers


def test_ridge_regression_is_scikit_learns_at_every_penalty_and_chooses_by_dev():
    rng = np.random.default_rng(0)
    x, _ = made(400, 20)
    y = 50 + 7 * (x @ rng.standard_normal(20) + 8 * rng.standard_normal(400))
    train, dev = slice(0, 200), slice(200, 300)
    z = (x[train] - x[train].mean(0)) / x[train].std(0)
    new = (x - x[train].mean(0)) / x[train].std(0)
    losses = []
    for l2 in (1e-3, 0.1, 1.0, 30.0):
        fit = fit_ridge_probes(x[None, train], y[None, train], x[None, dev], y[None, dev], l2_grid=[l2])
        peer = Ridge(alpha=l2 * 200).fit(z.astype(float), y[train])
        found = fit.outputs(x[None], label_set=0)[0, :, 0]
        np.testing.assert_allclose(found, peer.predict(new), rtol=1e-3, atol=1e-2)
        residual = peer.predict(new[dev]) - y[dev]
        losses.append((residual**2).mean())
        assert fit.parameters(0, 0)["deviation"][0] == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-3)
    every = fit_ridge_probes(x[None, train], y[None, train], x[None, dev], y[None, dev], l2_grid=[1e-3, 0.1, 1.0, 30.0])
    assert every.l2[0, 0] == [1e-3, 0.1, 1.0, 30.0][int(np.argmin(losses))]


@pytest.mark.parametrize("probe", ["linear", "mlp:16"])
def test_bits_of_numbers_are_those_of_the_gaussian_that_made_them(probe):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4000, 6)).astype(np.float32)
    y = 100 + 3 * x[1, :, 0] + 4 * x[1, :, 1] + 2.5 * rng.standard_normal(4000)
    results = probe_arrays(x, y, kind="number", probe=probe, seeds=1, n_boot=100, groups=np.arange(4000))
    table = results.to_pandas().set_index(["metric", "hidden"])["value"]
    assert table["bits", 1] == pytest.approx(0.5 * np.log2(1 + 25 / 6.25), abs=0.06)
    assert table["r2", 1] == pytest.approx(25 / (25 + 6.25), abs=0.03)
    assert abs(table["r2", 0]) < 0.02
    assert table["bits", 0] < 0.01
    assert abs(table["spearman", 0]) < 0.1
    items = results.items("task").query("hidden == 1")
    assert table["r2", 1] == pytest.approx(r2_score(items["label"], items["prediction"]), abs=1e-6)
    assert table["spearman", 1] == pytest.approx(spearmanr(items["label"], items["prediction"])[0], abs=1e-6)
    assert (results.to_pandas()["chance"] <= 0.001).all()
    assert (results.to_pandas()["chance"] > -0.05).all()


def test_bits_do_not_change_with_the_unit_of_the_numbers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 600, 6)).astype(np.float32)
    y = x[0, :, 0] + rng.standard_normal(600)
    tables = [probe_arrays(x, v, kind="number", seeds=1, n_boot=100).scores for v in (y, 1000 * y - 7)]
    np.testing.assert_allclose(tables[0]["value"], tables[1]["value"], atol=1e-4)


def test_intervals_of_r2_and_rank_correlation_cover_the_truth():
    rng = np.random.default_rng(1)
    covered = []
    truth = 1 / (1 + 1)
    for _ in range(60):
        y = rng.standard_normal(300)
        draw = BootstrapDraw.make(np.arange(300), n_seeds=1, n_boot=300)
        noisy = y + rng.standard_normal(300)
        low, high = np.percentile(draw.spearman(y[None], noisy[None, None])[:, 0], [2.5, 97.5])
        expected = 6 / np.pi * np.arcsin(np.sqrt(truth) / 2)  # of a Gaussian pair with this correlation
        covered.append(low <= expected <= high)
    assert np.mean(covered) > 0.85


def test_replicates_of_the_rank_correlation_rank_each_resample_anew():
    rng = np.random.default_rng(0)
    y, predicted = rng.integers(6, size=80).astype(float), rng.standard_normal(80)  # with ties
    draw = BootstrapDraw.make(rng.integers(30, size=80), n_seeds=1, n_boot=40)
    found = draw.spearman(y[None], predicted[None, None])[:, 0]
    for b in range(40):
        rows = np.repeat(np.arange(80), draw.cluster_counts[b][draw.codes])
        a, c = rankdata(y[rows]), rankdata(predicted[rows])
        assert found[b] == pytest.approx(np.corrcoef(a, c)[0, 1], abs=1e-9)


@pytest.mark.parametrize(
    ("y", "message"),
    [(np.full(400, 3.0), "every training target is 3"), (np.r_[np.nan, np.zeros(399)], "missing or not finite")],
)
def test_targets_that_are_constant_or_missing_are_one_sentence(y, message):
    states, _ = planted_states(1, blocks=1, items=400)
    with pytest.raises(TaskError, match=message):
        probe_arrays(states, y, kind="number")


def test_direct_calls_refuse_such_targets_too():
    x = np.random.default_rng(0).standard_normal((1, 30, 3))
    with pytest.raises(UsageError, match="is the same"):
        fit_ridge_probes(x, np.ones((1, 30)), x, np.ones((1, 30)))
    with pytest.raises(NumericalError, match="Target 2 of set 0"):
        fit_ridge_probes(x, np.r_[0, 1, np.nan, np.ones(27)][None], x, np.ones((1, 30)))
    with pytest.raises(UsageError, match="one number"):
        probe_arrays(x, np.arange(30.0), kind="number", probe="low-rank:1")


def test_a_control_of_numbers_draws_one_per_type_and_is_read_from_identity():
    rng = np.random.default_rng(0)
    types = rng.integers(0, 15, 2000)
    y = rng.standard_normal(15)[types] + 0.3 * rng.standard_normal(2000)
    states = np.stack([np.eye(15)[types], rng.standard_normal((2000, 15))])
    results = probe_arrays(states, y, kind="number", control=[f"t{t}" for t in types], n_boot=100)
    table = results.to_pandas().set_index(["control", "metric", "hidden"])["value"]
    assert table["word-type", "r2", 0] > 0.99
    assert table["word-type", "r2", 1] < 0.05
    assert table["none", "r2", 0] > 0.8
    difference = table["none", "r2", 0] - table["word-type", "r2", 0]
    assert table["difference:word-type", "r2", 0] == pytest.approx(difference)


# ---------------------------------------------------------------- several labels


def several(n: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, n, 10)).astype(np.float32)
    scores = 4 * x[1] @ rng.standard_normal((10, 5)) / 3 + rng.logistic(size=(n, 5)) - 1
    return x, (scores > 0).astype(int)


@pytest.mark.parametrize("probe", ["linear", "low-rank:5", "mlp:16"])
def test_several_labels_are_each_read_and_scored_like_scikit_learn_scores_them(probe):
    x, y = several()
    results = probe_arrays(x, y, kind="multilabel", probe=probe, seeds=1, n_boot=100)
    table = results.to_pandas().set_index(["metric", "hidden"])["value"]
    items = results.items("task").query("hidden == 1")
    gold, found = (
        np.array([[str(i) in str(text).split(", ") for i in range(5)] for text in items[c]])
        for c in ("label", "prediction")
    )
    assert table["micro_f1", 1] == pytest.approx(f1_score(gold, found, average="micro"))
    assert table["accuracy", 1] == pytest.approx((gold == found).all(1).mean())
    assert table["micro_f1", 1] > 0.75
    assert table["bits", 1] > 1.0
    assert table["bits", 0] < 0.02


def test_the_linear_probe_of_several_labels_is_one_logistic_regression_per_label():
    from sklearn.linear_model import LogisticRegression

    x, y = several()
    fit = fitted(Linear(), x[1], y.astype(bool), kind="multilabel", n_classes=5, l2=[0.01])
    z = x[1][:1000]
    standard = (z - z.mean(0)) / z.std(0)
    for k in range(5):
        peer = LogisticRegression(C=2 / (0.01 * 1000), tol=1e-8).fit(standard, y[:1000, k])
        found = 1 / (1 + np.exp(-fit.outputs(z[None], label_set=0)[0, :, k]))
        assert np.abs(found - peer.predict_proba(standard)[:, 1]).max() < 0.1
        loss = [-np.log2(np.where(y[:1000, k], p, 1 - p)).mean() for p in (found, peer.predict_proba(standard)[:, 1])]
        assert abs(loss[0] - loss[1]) < 0.01


@pytest.mark.parametrize("family", [Linear(), LowRank(2), Mlp(8)], ids=lambda f: f.name)
def test_a_label_that_no_training_item_has_gets_half_a_pseudo_item(family):
    x, y = several(600)
    y = y.astype(bool)
    y[:, 1], y[:, 3] = False, True
    fit = fitted(family, x[1], y, kind="multilabel", n_classes=5)
    odds = fit.outputs(x[1:], label_set=0)[0]
    np.testing.assert_allclose(1 / (1 + np.exp(-odds[:, 1].astype(float))), 0.5 / 400.5, rtol=1e-4)
    np.testing.assert_allclose(1 / (1 + np.exp(odds[:, 3].astype(float))), 0.5 / 400.5, rtol=1e-4)


# ---------------------------------------------------------------- all families


@pytest.mark.parametrize("name", ["linear", "low-rank:1", "mlp:16", "mlp:16,dropout=0.2"])
def test_every_family_finds_what_was_planted_and_nothing_where_labels_are_drawn(name):
    states, labels = planted_states(1, blocks=2, items=900, width=8)
    noise = np.random.default_rng(9).permutation(labels)
    results = [probe_arrays(states, y, probe=name, seeds=1, n_boot=100) for y in (labels, noise)]
    planted, nothing = (
        r.to_pandas().query("metric == 'bits'").sort_values("hidden")["value"].to_numpy() for r in results
    )
    assert planted[2] > 0.7
    assert np.abs(planted[:2]).max() < 0.05
    assert (nothing < 0.02).all()
    assert set(results[0].scores["probe"]) == {name}


def rotation(width: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(3).standard_normal((width, width)))[0]


@pytest.mark.parametrize("family", [Linear(), LowRank(2)], ids=lambda f: f.name)
def test_rotating_features_of_equal_spread_changes_nothing(family):
    x, y = made(1500)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x[:1000].T)), (x - x[:1000].mean(0)).T).T.astype(np.float32)
    turned = (x @ rotation(12)).astype(np.float32)
    bits = [held_out_bits(fitted(family, v, y, l2=[0.01]), v[1000:], y[1000:]) for v in (x, turned)]
    assert abs(bits[0] - bits[1]) < 0.005


def test_rotating_features_changes_no_regression():
    x, _ = made(900)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x[:600].T)), (x - x[:600].mean(0)).T).T.astype(np.float32)
    y = x[:, 0] + np.random.default_rng(0).standard_normal(900)
    turned = (x @ rotation(12)).astype(np.float32)
    outputs = [fitted(Linear(), v, y, kind="number").outputs(v[None], label_set=0) for v in (x, turned)]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2e-3)


@pytest.mark.parametrize("name", ["linear", "low-rank:2", "mlp:16"])
def test_the_order_of_the_items_changes_nothing(name):
    x, y = made(1500)
    order = np.random.default_rng(0).permutation(1000)
    rows = np.r_[order, np.arange(1000, 1500)]
    bits = [held_out_bits(fitted(parse_probe(name), v, t), v[1000:], t[1000:]) for v, t in ((x, y), (x[rows], y[rows]))]
    assert abs(bits[0] - bits[1]) < (0.03 if name.startswith("mlp") else 0.003)


def test_several_families_share_a_table_and_a_control_of_the_same_family():
    states, labels = planted_states(1, blocks=2, items=400)
    types = [f"t{i % 20}" for i in range(400)]
    results = probe_arrays(states, labels, control=types, probe="linear,mlp:8", seeds=2, n_boot=100)
    assert list(dict.fromkeys(results.scores["probe"])) == ["linear", "mlp:8"]
    rows = results.scores.groupby("probe").size()
    assert rows["linear"] == rows["mlp:8"]
    assert results.curve("task").values == pytest.approx(results.curve("task", probe="linear").values)
    assert not np.allclose(results.curve("task", probe="mlp:8").values, results.curve("task").values)
    text = results.to_markdown()
    assert "| mlp:8 " in text
    assert "best accuracy" in text


def test_the_table_says_which_score_it_shows():
    states, labels = planted_states(1, blocks=2, items=300)
    numbers: ProbeResults = probe_arrays(states, labels + 0.1 * states[0, :, 0], kind="number", seeds=1, n_boot=100)
    text = numbers.to_markdown()
    assert "best score" in text
    assert "| R² ." in text
    assert "share of the test items' variance" in " ".join(text.split())
    assert numbers.plot() is not None
    with pytest.raises(UsageError, match="have no accuracy"):
        numbers.curve("task", metric="accuracy")


def test_seeds_that_train_on_the_same_items_share_one_call_for_all_their_controls(monkeypatch):
    states, labels = planted_states(1, blocks=1, items=400)
    types = [f"t{i % 20}" for i in range(400)]
    calls = []
    real = Linear.fit

    def counted(self, x, targets, *more, **options):
        calls.append(len(targets))
        return real(self, x, targets, *more, **options)

    monkeypatch.setattr(Linear, "fit", counted)
    together = probe_arrays(states, labels, control=types, max_train=10_000, seeds=3, n_boot=100).scores
    assert calls == [4]
    one = probe_arrays(states, labels, control=types, max_train=10_000, seeds=(1,), n_boot=100).scores
    pick = "control == 'word-type' and seed == 1 and metric == 'bits'"
    np.testing.assert_allclose(together.query(pick)["value"], one.query(pick)["value"], atol=0.02)
