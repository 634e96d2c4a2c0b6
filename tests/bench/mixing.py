"""Cumulative scalar mixes 0…l for all l at shapes like MiniLM's, against bare products of the layers.

7 hidden states × 20,000 items × 384, 17 classes, every default penalty: mixes of 1 to 7 layers, the penalty of each
chosen on dev. Every layer enters a mix through products: its rows times the probe's weights, and their transpose times
the residuals. The target counts exactly those that the solver asks for, pass by pass; the bare ones are run with all
mixes that read a layer stacked, the fastest way. CPU time of one thread, both in the same run; the solver's holds
standardising, preconditioning, softmax, step lengths and scoring dev, too.

Items are planted words: types drawn by Zipf's law, each with a vector and a label of its own, one token in five with
another label that layers tell from noise the better the higher they are. Columns have decaying variances.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from tests.bench.table import Row, print_table

HIDDEN, ITEMS, DEV_ITEMS, WIDTH, CLASSES, TYPES = 7, 20_000, 2_000, 384, 17, 3_000


def planted() -> tuple[np.ndarray, np.ndarray]:
    """States (hidden, items, width) and labels."""
    random = np.random.default_rng(0)
    n = ITEMS + DEV_ITEMS
    frequencies = 1 / np.arange(1, TYPES + 1)
    words = random.choice(TYPES, n, p=frequencies / frequencies.sum())
    labels = np.where(
        random.random(n) < 0.2, random.integers(CLASSES, size=n), random.integers(CLASSES, size=TYPES)[words]
    )
    vectors, centres = random.standard_normal((TYPES, WIDTH)), random.standard_normal((CLASSES, WIDTH))
    spread = np.arange(1, WIDTH + 1) ** -0.5
    states = []
    for hidden in range(HIDDEN):
        meaning = (1 - 0.1 * hidden) * vectors[words] + 0.06 * hidden * centres[labels]
        states.append(((meaning + 0.5 * random.standard_normal((n, WIDTH))) * spread).astype(np.float32))
    return np.stack(states), labels


def cpu(run: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def products(layer: np.ndarray, readers: int) -> float:
    """CPU seconds of one layer's products with so many fits, forwards and back, over all rows."""
    import torch

    rows = torch.from_numpy(layer)
    weights = torch.randn(WIDTH, readers * (CLASSES - 1))
    residuals = torch.randn(len(rows), readers * (CLASSES - 1))
    return min(cpu(lambda: (rows @ weights, rows.T @ residuals)) for _ in range(3))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; non-zero when a target is missed."""
    import torch

    from probing.probes.mix_solver import Mixes
    from probing.probes.mixing import fit_mixes

    argparse.ArgumentParser(description=__doc__).parse_args([] if arguments is None else arguments)
    states, labels = planted()
    train, dev = states[:, :ITEMS].copy(), states[:, ITEMS:].copy()
    passes: Counter[int] = Counter()  # rows × layers that so many fits read together
    evaluate = Mixes.evaluate

    def counted(self: Mixes, coefficients: torch.Tensor, n: int) -> object:
        for readers in self.readers:
            passes[readers] += n
        return evaluate(self, coefficients, n)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    Mixes.evaluate = counted  # type: ignore[assignment,method-assign]
    try:
        found = []
        seconds = cpu(lambda: found.append(fit_mixes(train, labels[:ITEMS], dev, labels[ITEMS:], n_classes=CLASSES)))
        bare = sum(rows / ITEMS * products(train[0], readers) for readers, rows in passes.items())
    finally:
        Mixes.evaluate = evaluate  # type: ignore[method-assign]
        torch.set_num_threads(before)
    fit = found[0]
    rows = [
        Row(
            "CPU time of all mixes / products of their layers", seconds / bare, 1.2, "<=",
            f"{seconds:.1f} against {bare:.1f} CPU s, 1 thread",
        ),
        Row("share of mixes that converged", float(fit.converged.mean()), 1.0, ">=", f"{fit.converged.size} mixes"),
    ]  # fmt: skip
    flops = 4 * WIDTH * (CLASSES - 1) * sum(readers * n for readers, n in passes.items())
    notes = [
        f"{flops / bare / 1e9:.0f} GFLOP/s in the bare products; passes over all rows at the chosen penalty, by mix: "
        + ", ".join(map(str, fit.iterations[:, 0]))
    ]
    return print_table("cumulative scalar mixes", rows, notes=notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
