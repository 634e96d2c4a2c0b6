"""Cumulative scalar mixes 0…l for all l on MiniLM's states of UD EWT UPOS, against bare products of the layers.

7 hidden states × 20,000 words × 384, 17 classes, every default penalty: mixes of 1 to 7 layers, the penalty of each
chosen on 5,000 dev words. Every layer enters a mix through products: its rows times the probe's weights, and their
transpose times the residuals. The target counts exactly those that the solver asks for, pass by pass; the bare ones are
run with all mixes that read a layer stacked, the fastest way. CPU time of one thread, both in one run; the solver's
holds standardising, preconditioning, softmax, step lengths and scoring dev, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from tests.bench.probe_grid import Grid
from tests.bench.table import Row, print_table
from tests.paths import SHARED

WORDS, DEV_WORDS = 20_000, 5_000


def cpu(run: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def products(layer: np.ndarray, readers: int, classes: int) -> float:
    """CPU seconds of one layer's products with so many fits, forwards and back, over all rows."""
    import torch

    rows = torch.from_numpy(layer)
    weights = torch.randn(rows.shape[1], readers * classes)
    residuals = torch.randn(len(rows), readers * classes)
    return min(cpu(lambda: (rows @ weights, rows.T @ residuals)) for _ in range(3))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; non-zero when a target is missed."""
    import torch

    from probing.probes.mix_solver import Mixes
    from probing.probes.mixing import fit_mixes

    argparse.ArgumentParser(description=__doc__).parse_args([] if arguments is None else arguments)
    if not SHARED.is_dir():
        print("skipped: the shared real data (../shared/data) is not here")
        return 0
    grid = Grid()
    hidden = range(grid.hidden)
    train, dev = (
        np.stack([grid.states(h, rows) for h in hidden]).astype(np.float32)
        for rows in (grid.train_rows[0][:WORDS], grid.held_rows["dev"][:DEV_WORDS])
    )
    labels, labels_dev = grid.train_labels[0][0, :WORDS], grid.held_labels["dev"][0][0, :DEV_WORDS]
    classes = grid.classes
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
        seconds = cpu(lambda: found.append(fit_mixes(train, labels, dev, labels_dev, n_classes=classes)))
        bare = sum(rows / WORDS * products(train[0], readers, classes) for readers, rows in passes.items())
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
    flops = 4 * train.shape[2] * classes * sum(readers * n for readers, n in passes.items())
    notes = [
        f"{flops / bare / 1e9:.0f} GFLOP/s in the bare products; passes over all rows at the chosen penalty, by mix: "
        + ", ".join(map(str, fit.iterations[:, 0]))
    ]
    return print_table("cumulative scalar mixes, MiniLM-L6, UD EWT UPOS", rows, notes=notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
