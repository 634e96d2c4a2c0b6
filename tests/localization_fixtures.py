"""Folders of planted evidence for the localization test: runs, comparisons, causal tables, published curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.comparison import KEYS, Comparison
from analysis.forgetting import COLUMNS
from probing.results import ProbeResults
from spafit.runtime import provenance
from tests.report_fixtures import run as run_record

LEVELS = ("surface", "syntax", "semantics")
TASKS = tuple((f"made.{level}{i}", level) for level in LEVELS for i in range(4))


def rise(at: float, blocks: int) -> np.ndarray:
    """A smooth rise in bits, centred on hidden state ``at``, that starts at 0."""
    shape = 1 / (1 + np.exp(-2 * (np.arange(blocks + 1) - at)))
    return shape - shape[0]


def planted_run(
    folder: Path,
    *,
    centres: Sequence[float] = (2, 6, 10),
    blocks: int = 12,
    seeds: int = 3,
    poolings: Sequence[str] = ("mean", "first"),
    probes: Sequence[str] = ("linear", "mlp:16"),
    turned: str = "",
    random_order: bool = False,
    spread: float = 0.5,
    state: int = 0,
) -> ProbeResults:
    """A run's folder whose tasks emerge around their level's centre.

    Args:
        folder: where to write.
        centres: hidden state of each level.
        blocks: depth.
        seeds: number of seeds.
        poolings: names.
        probes: names.
        turned: a seed, pooling or probe that shows the levels the other way round.
        random_order: the random encoder shows the order as well, half as strongly.
        spread: standard deviation of the centres of a level's tasks.
        state: chooses the noise.
    """
    random = np.random.default_rng(state)
    tables, scores = {}, []
    for task, level in TASKS:
        at = centres[LEVELS.index(level)] + spread * random.standard_normal()
        parts = []
        for pooling, probe in [(p, probes[0]) for p in poolings] + [(poolings[0], q) for q in probes[1:]]:
            for seed in range(seeds):
                own = blocks - at if turned in (pooling, probe, str(seed)) and turned else at
                for control in ("none", "random-encoder"):
                    truth = rise(own, blocks) if control == "none" else 0.4 * random_order * rise(at, blocks)
                    truth = truth + (0.4 * random_order * rise(at, blocks) if control == "none" else 0)
                    bits = truth[:, None] + 0.1 * random.standard_normal((blocks + 1, 40))
                    parts.append(
                        pd.DataFrame(
                            {
                                "item": [f"i{i}" for i in range(40)] * (blocks + 1),
                                "group": [f"g{i}" for i in range(40)] * (blocks + 1),
                                "split": "test", "label": "x", "prediction": "x", "stack": "encoder", "site": "block",
                                "hidden": np.repeat(np.arange(blocks + 1), 40), "pooling": pooling, "probe": probe,
                                "control": control, "seed": seed, "bits": bits.ravel(),
                            }
                        )
                    )  # fmt: skip
        tables[task] = pd.concat(parts, ignore_index=True)
        scores += [
            {"task": task, "level": level, "unit": "sentence", "stack": "encoder", "site": "block", "split": "test",
             "metric": "bits",
             "pooling": pooling, "probe": probe, "n": 40, "value": 0.0}
            for pooling in poolings for probe in probes
        ]  # fmt: skip
    table = pd.DataFrame(scores)
    record = run_record(table, blocks=blocks) | {"status": "complete"}
    results = ProbeResults(record, table, pd.DataFrame(), folder, tables)
    results.save(folder)
    return ProbeResults.load(folder)


def causal_table(
    *, blocks: int = 12, gap: float = 2.0, state: int = 0, tasks: Sequence[tuple[str, str]] = TASKS, halves: int = 1
) -> pd.DataFrame:
    """Effects of skipping single blocks on probing tasks; each type suffers more from its own third."""
    random = np.random.default_rng(state)
    rows = []
    for half in range(halves):
        for task, level in tasks:
            third = LEVELS.index(level) * blocks // 3
            for block in range(blocks):
                own = third <= block < third + blocks // 3
                harm = 1 + gap * own + 0.3 * random.standard_normal()
                rows.append(
                    {"intervention": "skip", "blocks_start": block, "blocks_stop": block + 1, "part": "block",
                     "metric": task, "level": level, "effect": -harm, "half": half}
                )  # fmt: skip
    return pd.DataFrame(rows)


def planted_comparison(
    folder: Path, *, blocks: int = 12, gap: float = 1.0, erased: bool = False, run: bool = True, state: int = 0
) -> Comparison:
    """A comparison's folder: each type's bits are lost in its own third; optionally erasure, and the run before."""
    random = np.random.default_rng(state)
    rows, erasure = [], []
    for task, level in TASKS:
        third = LEVELS.index(level) * blocks // 3
        step = 0.1 + 0.02 * random.standard_normal(blocks)
        step[third : third + blocks // 3] += gap
        lost = np.concatenate([[0.0], np.cumsum(step)])
        pre = rise(2 + 4 * LEVELS.index(level) + 0.3 * random.standard_normal(), blocks)
        for hidden in range(blocks + 1):
            for term, value in (("pre", pre[hidden]), ("lost", lost[hidden]), ("moved", 0.0)):
                for metric, factor in (("bits", 1.0), ("accuracy", -1.0)):
                    rows.append(
                        dict.fromkeys((*KEYS, *COLUMNS), "")
                        | {"model": "tuned", "task": task, "level": level, "stack": "encoder", "site": "block",
                           "pooling": "mean", "probe": "linear", "control": "none", "split": "test", "metric": metric,
                           "hidden": hidden, "term": term, "value": factor * value}
                    )  # fmt: skip
            if hidden:
                own = third < hidden <= third + blocks // 3
                for eraser, effect in (("leace", 0.02 + 0.1 * own), ("random", 0.02), ("equal-variance", 0.01)):
                    for metric, sign in (("score", -1.0), ("loss_bits", 1.0)):
                        erasure.append(
                            {"model": "tuned", "task": task, "hidden": hidden, "eraser": eraser, "draw": 0,
                             "metric": metric, "effect": sign * (effect + 0.002 * random.standard_normal())}
                        )  # fmt: skip
    record = {
        "schema_version": 1, "before": "base", "after": ["tuned"], "models": {"tuned": {"weights_digest": "x"}},
        "task": {"name": "rte"}, **provenance(),
    }  # fmt: skip
    tables = dict.fromkeys(
        ("drift", "cka_map", "weights", "retention", "causal", "interaction", "erasure", "use", "sequence")
    )
    if erased:
        tables["erasure"] = pd.DataFrame(erasure)
    Comparison(run=record, forgetting=pd.DataFrame(rows), folder=folder, **tables).save(folder)  # type: ignore[arg-type]
    if run:
        planted_run(folder / "before", blocks=blocks, state=state)
    return Comparison.load(folder)
