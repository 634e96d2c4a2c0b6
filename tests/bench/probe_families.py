"""MLPs of seven hidden states in one program against a careful torch loop over them, and ten control tasks against one.

States are Gaussian, 3,000 training items of width 384 at each of seven hidden states; from none to much of a state is
its class's direction with either sign, which no linear probe reads. The loop trains one model at a time with the same
settings and the same rule for stopping. CPU time, one thread on both sides.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from tests.bench.table import Row, print_table

HIDDEN, ITEMS, WIDTH, UNITS, CLASSES = 7, 3000, 384, 64, 4


def made(items: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States (hidden, items, width) whose strength of signal grows, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=items)
    directions = np.random.default_rng(0).standard_normal((CLASSES, WIDTH))
    states = rng.standard_normal((HIDDEN, items, WIDTH))
    for hidden in range(HIDDEN):
        sign = np.sign(rng.standard_normal((items, 1)))
        states[hidden] += 0.05 * hidden * directions[labels] * sign
    return states.astype(np.float32), labels


def careful_loop(x: np.ndarray, y: np.ndarray, dev: np.ndarray, dev_y: np.ndarray, seed: int) -> tuple[float, int]:
    """Train one MLP in plain torch; its best dev loss in bits and the number of steps."""
    import torch

    from probing.probes.mlp import BATCH, LEARNING_RATE, LOOK_STEPS, PATIENCE

    mean, scale = x.mean(0), x.std(0)
    rows, held = (torch.from_numpy((v - mean) / scale) for v in (x, dev))
    labels, held_labels = torch.from_numpy(y), torch.from_numpy(dev_y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, CLASSES))
        optimizer, loss = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), torch.nn.CrossEntropyLoss()
        best, idle, steps, since = np.inf, 0, 0, 0
        while idle < PATIENCE:
            for part in torch.randperm(len(rows)).split(BATCH):
                optimizer.zero_grad()
                loss(model(rows[part]), labels[part]).backward()
                optimizer.step()
                steps, since = steps + 1, since + 1
            if since < LOOK_STEPS:
                continue
            since = 0
            with torch.no_grad():
                now = loss(model(held), held_labels).item()
            best, idle = (now, 0) if now < best else (best, idle + 1)
    return best / np.log(2), steps


def cpu(call: object, *, times: int = 1) -> tuple[float, object]:
    """CPU seconds of a call (the smallest of a few), and what it returned."""
    seconds, found = [], None
    for _ in range(times):
        begun = time.process_time()
        found = call()  # type: ignore[operator]
        seconds.append(time.process_time() - begun)
    return min(seconds), found


def main() -> int:
    """Print the table; non-zero when a target is missed."""
    import torch
    from threadpoolctl import threadpool_limits

    from probing.probes.linear import fit_linear_probes
    from probing.probes.mlp import fit_mlp_probes

    x, y = made(ITEMS, seed=1)
    dev, dev_y = made(1000, seed=2)
    rng = np.random.default_rng(3)
    controls, dev_controls = rng.integers(CLASSES, size=(10, ITEMS)), rng.integers(CLASSES, size=(10, 1000))
    options = {"width": UNITS, "kind": "classes", "n_classes": CLASSES}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            ours, fit = cpu(lambda: fit_mlp_probes(x, y[None], dev, dev_y[None], **options))
            theirs, peer = cpu(lambda: [careful_loop(x[h], y, dev[h], dev_y, h) for h in range(HIDDEN)])
            linear = [
                cpu(lambda n=n: fit_linear_probes(x, controls[:n], n_classes=CLASSES, l2=[0.01]), times=3)[0]
                for n in (1, 10)
            ]
            mlp = [
                cpu(lambda n=n: fit_mlp_probes(x[:2], controls[:n], dev[:2], dev_controls[:n], **options))[0]
                for n in (1, 10)
            ]
    finally:
        torch.set_num_threads(before)
    log_p = fit.log_probabilities(dev, label_set=0)  # type: ignore[attr-defined]
    bits = -log_p[:, np.arange(1000), dev_y].mean(1) / np.log(2)
    loop = np.array([b for b, _ in peer])  # type: ignore[attr-defined]
    rows = [
        Row("MLPs of 7 hidden states, CPU time, ours / sum of a loop's", ours / theirs, 1.1, "<=",
            f"{ours:.1f} against {theirs:.1f} CPU s"),
        Row("mean difference of their dev loss, bits", abs(float((bits - loop).mean())), 0.05, "<=",
            f"ours {np.round(bits, 2).tolist()}, loop {np.round(loop, 2).tolist()}"),
        Row("ten seeds of the control task / one, linear probes of 7 hidden states", linear[1] / linear[0], 6.0, "<=",
            f"{linear[1]:.2f} against {linear[0]:.2f} CPU s"),
        Row("ten seeds of the control task / one, MLPs of 2 hidden states", mlp[1] / mlp[0], 6.0, "<=",
            f"{mlp[1]:.1f} against {mlp[0]:.1f} CPU s"),
    ]  # fmt: skip
    return print_table(f"probe families, {ITEMS:,} training items, width {WIDTH}", rows)


if __name__ == "__main__":
    sys.exit(main())
