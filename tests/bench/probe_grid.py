"""The probe grid on UD EWT UPOS with MiniLM, 210 distinct fits, against a loop over scikit-learn's LogisticRegression.

7 hidden states × 5 penalties × 3 seeds × {task, control task}, 40,000 training words each. A seed redraws the training
words and the control labels. The peer fits the same standardised float32 features at the same penalties, with its
default solver and tolerance and max_iter=1000. By default it runs 28 of the 210 fits: four per hidden state, which take
turns through penalties, label sets and seeds, so that every (penalty, label set) has two or three; each fit that was
not run counts as the mean of those with its penalty and label set. `--full` runs all of them.

CPU time is that of all threads of the process. Both sides run once with the default number of threads, which the target
is about, and once with one thread each: BLAS threads that wait for work use CPU time too, in the peer more than here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.bench.table import Row, print_table
from tests.paths import SHARED

WORDS = 40_000
SEEDS = (0, 1, 2)
#: Test accuracy of the task and of its control at the penalty chosen on dev: hidden -> (task, control).
REFERENCE = {0: (0.888, 0.67), 3: (0.943, 0.57), 6: (0.871, 0.45)}

#: (hidden, penalty, label set, seed), by position.
Cell = tuple[int, int, int, int]


class Grid:
    """States and labels: everything that the timed parts read, one hidden state in memory at a time."""

    def __init__(self) -> None:
        from probing.controls import control_labels
        from probing.extraction import extract
        from probing.registry import load_tasks
        from spafit.models import load_model

        (task,) = load_tasks([f"conllu:{SHARED / 'ud' / 'UD_English-EWT'}#upos"])
        items = task.items
        split, label, text = (items[c].to_numpy() for c in ("split", "label", "text"))
        draws = [task.training_draw(seed, WORDS) for seed in SEEDS]
        needed = np.unique(text[np.concatenate([*draws, np.flatnonzero(split != "train")])])
        self.store = extract(load_model(None), [task.corpus.texts[t] for t in needed], sentence_pooling=())
        place = np.zeros(len(task.corpus.texts), dtype=np.int64)
        place[needed] = np.arange(len(needed))
        rows = self.store.word_offsets[place[text]] + items["span"].to_numpy()
        used = np.zeros(len(items), dtype=bool)
        used[np.concatenate([*draws, np.flatnonzero(split != "train")])] = True
        valid = used & self.store.word_valid[np.where(used, rows, 0)]
        positions = [d[valid[d]] for d in draws], *(np.flatnonzero((split == s) & valid) for s in ("dev", "test"))
        self.train_rows = [rows[p] for p in positions[0]]
        self.held_rows = {"dev": rows[positions[1]], "test": rows[positions[2]]}
        sets = [np.stack([label, control_labels(task, seed)]) for seed in SEEDS]
        self.train_labels = [s[:, p] for s, p in zip(sets, positions[0], strict=True)]
        self.held_labels = {
            "dev": [s[:, positions[1]] for s in sets],
            "test": [s[:, positions[2]] for s in sets],
        }
        self.classes, self.hidden = len(task.labels), self.store.num_hidden

    def states(self, hidden: int, rows: np.ndarray) -> np.ndarray:
        """Features of some words, (words, width)."""
        return self.store.words("mean", hidden=hidden, rows=rows)


def peer_cells(hidden_states: int, *, full: bool) -> set[Cell]:
    """The fits that scikit-learn runs."""
    from probing.probes.linear import DEFAULT_L2

    n = len(DEFAULT_L2)
    if full:
        return {
            (h, p, m, s) for h in range(hidden_states) for p in range(n) for m in range(2) for s in range(len(SEEDS))
        }
    return {
        (h, (h + shift) % n, m, (h + shift) % len(SEEDS))
        for h in range(hidden_states)
        for m, shifts in enumerate(((0, 2), (1, 3)))
        for shift in shifts
    }


def _bits(log_p: np.ndarray, labels: np.ndarray, seen: np.ndarray) -> float:
    """Mean log loss over items whose class has training items (the peer has no column for the others)."""
    keep = seen[labels]
    return float(-log_p[keep, labels[keep]].astype(np.float64).mean() / np.log(2))


def measure(grid: Grid, cells: set[Cell], threads: int) -> tuple[float, dict[Cell, float], dict[Cell, list[float]]]:
    """Our CPU seconds for all fits, the peer's for its cells, and differences in held-out bits (dev, test) per cell."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            ours, peer, differences = 0.0, {}, {}
            for hidden in range(grid.hidden):
                seconds, found = _one_hidden_state(grid, hidden, cells)
                ours += seconds
                for cell, cpu, difference in found:
                    peer[cell], differences[cell] = cpu, difference
                print(f"  hidden {hidden}: {seconds:.1f} CPU s, {len(found)} fits of the peer", file=sys.stderr)
            return ours, peer, differences
    finally:
        torch.set_num_threads(before)


def _one_hidden_state(grid: Grid, hidden: int, cells: set[Cell]) -> tuple[float, list[tuple[Cell, float, list[float]]]]:
    from probing.probes.linear import DEFAULT_L2, LinearProbeFit, fit_linear_probes

    fits: list[LinearProbeFit] = []
    seconds = 0.0
    for seed in range(len(SEEDS)):
        x, labels = grid.states(hidden, grid.train_rows[seed])[None], grid.train_labels[seed]
        # The task's labels mean the same in every draw, so its fits start from those of the first draw.
        earlier = first_label_set(fits[0]) if fits else None
        begun = time.process_time()
        fit = fit_linear_probes(x, labels, n_classes=grid.classes, l2=DEFAULT_L2, warm_start=earlier)
        seconds += time.process_time() - begun
        if not fit.converged.all():
            print(f"  hidden {hidden}, seed {seed}: not converged", file=sys.stderr)
        fits.append(fit)
    return seconds, list(_peer(grid, hidden, fits, sorted(c for c in cells if c[0] == hidden)))


def first_label_set(fit: Any) -> Any:
    """The part of a fit that belongs to its first label set."""
    from dataclasses import replace

    parts = {name: getattr(fit, name)[:, :1] for name in ("weights", "bias", "converged", "gap", "iterations")}
    return replace(fit, **parts, present=fit.present[:1])


def _peer(grid: Grid, hidden: int, fits: list[Any], cells: list[Cell]) -> Iterator[tuple[Cell, float, list[float]]]:
    from sklearn.linear_model import LogisticRegression

    from probing.probes.linear import DEFAULT_L2

    for cell in cells:
        _, p, m, seed = cell
        fit = fits[seed]

        def standardised(rows: np.ndarray, fit: Any = fit) -> np.ndarray:
            return (grid.states(hidden, rows) - fit.mean[0]) / fit.scale[0]

        x, y = standardised(grid.train_rows[seed]), grid.train_labels[seed][m]
        model = LogisticRegression(C=1 / (DEFAULT_L2[p] * len(x)), max_iter=1000)
        begun = time.process_time()
        model.fit(x, y)
        seconds = time.process_time() - begun
        seen, differences = fit.present[m], []
        for split, rows in grid.held_rows.items():
            logits = np.full((len(rows), grid.classes), -np.inf)
            logits[:, model.classes_] = model.decision_function(standardised(rows).astype(np.float64))
            logits -= logits.max(axis=1, keepdims=True)
            theirs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            own = fit.log_probabilities(grid.states(hidden, rows)[None], label_set=m)[0, p]
            labels = grid.held_labels[split][seed][m]
            differences.append(_bits(own, labels, seen) - _bits(theirs, labels, seen))
        yield cell, seconds, differences


def whole_grid(peer: dict[Cell, float], hidden_states: int) -> float:
    """The peer's CPU seconds for all fits: those that were not run count as the mean of their penalty and label set."""
    kinds = {(p, m) for _, p, m, _ in peer}
    means = {kind: np.mean([t for (_, p, m, _), t in peer.items() if (p, m) == kind]) for kind in kinds}
    return float(sum(means.values()) * hidden_states * len(SEEDS))


def accuracies(grid: Grid) -> list[tuple[int, float, float, float]]:
    """Hidden state, penalty chosen on dev, and test accuracy of task and control, for the first seed."""
    from probing.probes.linear import fit_selected

    rows = []
    for hidden in REFERENCE:
        x, x_dev, x_test = (
            grid.states(hidden, r)[None] for r in (grid.train_rows[0], grid.held_rows["dev"], grid.held_rows["test"])
        )
        labels, dev, test = grid.train_labels[0], grid.held_labels["dev"][0], grid.held_labels["test"][0]
        fit, l2 = fit_selected(x, labels, x_dev, dev, n_classes=grid.classes)
        right = [
            float((fit.log_probabilities(x_test, label_set=m)[0, 0].argmax(1) == test[m]).mean()) for m in range(2)
        ]
        rows.append((hidden, float(l2[0]), right[0], right[1]))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table; non-zero when a target is missed."""
    import torch

    from probing.probes.linear import DEFAULT_L2

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="run all 210 fits of the peer")
    parser.add_argument("--threads", type=int, nargs="+", help="threads to measure with; the first is the target's")
    options = parser.parse_args([] if arguments is None else arguments)
    if not SHARED.is_dir():
        print("skipped: the shared real data (../shared/data) is not here")
        return 0
    grid = Grid()
    cells = peer_cells(grid.hidden, full=options.full)
    total = grid.hidden * len(DEFAULT_L2) * 2 * len(SEEDS)
    rows, notes = [], []
    for threads in options.threads or dict.fromkeys((torch.get_num_threads(), 1)):
        ours, peer, differences = measure(grid, cells, threads)
        theirs = whole_grid(peer, grid.hidden)
        worst = max(abs(d) for pair in differences.values() for d in pair)
        figures = f"{ours:.0f} against {theirs:.0f} CPU s ({ours / total:.2f} and {theirs / total:.2f} per fit)"
        if not rows:
            rows += [
                Row(f"CPU time, scikit-learn / ours, {threads} threads", theirs / ours, 20.0, ">=", figures),
                Row(
                    "largest difference in held-out log loss, bits per item",
                    worst,
                    0.005,
                    "<=",
                    f"{len(peer)} fits on dev and test, every hidden state",
                ),
            ]
            per_hidden = [
                max(abs(d) for (h, *_), pair in differences.items() if h == hidden for d in pair)
                for hidden in range(grid.hidden)
            ]
            notes.append("the same by hidden state: " + ", ".join(f"{d:.4f}" for d in per_hidden))
        else:
            notes.append(f"with {threads} thread each: ratio {theirs / ours:.1f}, {figures}; difference {worst:.4f}")
        kinds = {
            (p, m): np.mean([t for (_, q, n, _), t in peer.items() if (q, n) == (p, m)])
            for p in range(len(DEFAULT_L2))
            for m in range(2)
        }
        notes.append(
            f"scikit-learn's CPU s per fit with {threads} thread(s), task / control: "
            + "; ".join(f"l2 {l2:g}: {kinds[p, 0]:.1f} / {kinds[p, 1]:.1f}" for p, l2 in enumerate(DEFAULT_L2))
        )
    for hidden, l2, task, control in accuracies(grid):
        wanted, reference = REFERENCE[hidden]
        rows.append(
            Row(
                f"hidden {hidden}: |test accuracy - {wanted}|",
                abs(task - wanted),
                0.01,
                "<=",
                f"accuracy {task:.3f}, control {control:.3f} (reference {reference}) at l2 {l2:g}",
            )
        )
    title = f"probe grid, MiniLM-L6, UD EWT UPOS, {WORDS} training words, {total} fits"
    return print_table(title, rows, notes=notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
