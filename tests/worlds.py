"""Simulated worlds with a known truth: score tables, effects of interventions, and run folders made of them.

Three kinds. *No structure*: flat curves, or one smooth trend that all tasks share. *Distributed*: every type of
knowledge enters everywhere, so tasks differ and types do not. *Planted*: a type's tasks emerge around the type's own
depth, or an intervention on a type's own range does a share more of its harm to it. Everything is drawn from the
generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.block_effects import BlockEffects
from analysis.holding import held_from
from probing.curves import LayerCurve
from probing.results import ProbeResults
from tests.report_fixtures import run as run_record

LEVELS = ("surface", "syntax", "semantics")
BASIC = ("surface", "syntax")


@dataclass(frozen=True)
class World:
    """What is true of some tasks.

    Attributes:
        levels: level of each task.
        truth: bits above the control, without noise, shape (tasks, hidden).
        boundaries: (s1, s2) that tell the types apart, where whole blocks do.
    """

    levels: tuple[str, ...]
    truth: np.ndarray
    boundaries: tuple[int, int] | None = None

    @property
    def num_blocks(self) -> int:
        return self.truth.shape[1] - 1

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(f"made.{level}{i}" for i, level in enumerate(self.levels))

    @property
    def held(self) -> tuple[int, int]:
        """Hidden states from which the basic types, and the other one, are held in truth."""
        basic = np.isin(self.levels, BASIC)
        first, second = (int(held_from(self.truth[own])) for own in (basic, ~basic))
        return first, max(first, second)


def levels_of(counts: Sequence[int]) -> tuple[str, ...]:
    return tuple(np.repeat(LEVELS, counts).tolist())


def rises(at: np.ndarray, num_blocks: int, *, width: float = 0.15) -> np.ndarray:
    """A rise from 0 to about 1 at each depth ``at``, which block floor(at) writes; shape (len(at), hidden)."""
    shape = 1 / (1 + np.exp(-(np.arange(num_blocks + 1) - np.asarray(at)[:, None]) / width))
    return shape - shape[:, :1]


def sizes(n: int, random: np.random.Generator) -> np.ndarray:
    """Bits that each task ever reaches, shape (n, 1)."""
    return random.uniform(0.5, 1.5, (n, 1))


def no_structure(kind: str, counts: Sequence[int], num_blocks: int, random: np.random.Generator) -> World:
    """``flat`` curves, or a smooth ``trend`` that all tasks share: linear, quadratic or saturating by chance."""
    depth = np.arange(num_blocks + 1) / num_blocks
    shapes = {
        "linear": depth,
        "quadratic": depth * (2 * random.uniform(0.6, 1.2) - depth),
        "saturating": 1 - np.exp(-depth / random.uniform(0.1, 0.5)),
    }
    shape = np.ones(num_blocks + 1) if kind == "flat" else shapes[str(random.choice(list(shapes)))]
    return World(levels_of(counts), sizes(sum(counts), random) * shape / np.abs(shape).max())


def distributed(counts: Sequence[int], num_blocks: int, random: np.random.Generator) -> World:
    """Each task enters at one to three depths of its own, anywhere, whatever its type."""
    rows = []
    for _ in range(sum(counts)):
        n = int(random.integers(1, 4))
        at = random.uniform(0.5, num_blocks - 0.5, n)
        rows.append(random.dirichlet(np.ones(n)) @ rises(at, num_blocks))
    return World(levels_of(counts), sizes(sum(counts), random) * np.array(rows))


def planted(
    counts: Sequence[int],
    num_blocks: int,
    random: np.random.Generator,
    *,
    step: float,
    sd: float,
    first: float | None = None,
) -> World:
    """Tasks emerge around their type's depth.

    Args:
        counts: tasks of each type.
        num_blocks: depth.
        random: generator.
        step: layers between successive types.
        sd: standard deviation of a type's tasks, in layers.
        first: depth of the first type; by default all of them lie around mid-depth, and ``boundaries`` are half-way
            between types where that is a whole block. With .5 the first block writes the first type, and
            ``boundaries`` are where the others begin.
    """
    start = num_blocks / 2 - step if first is None else first
    at = start + step * np.repeat(np.arange(3), counts) + sd * random.standard_normal(sum(counts))
    truth = sizes(sum(counts), random) * rises(np.clip(at, 0.5, num_blocks - 0.5), num_blocks)
    shift = step / 2 if first is None else 0.5
    apart = start + step - shift, start + 2 * step - shift
    return World(levels_of(counts), truth, (int(apart[0]), int(apart[1])) if apart[0] % 1 == 0 else None)


def curve(
    task: str, level: str, truth: np.ndarray, noise: float, random: np.random.Generator, n_boot: int = 60
) -> LayerCurve:
    """A measured curve: half of the noise's variance is shared by all hidden states, the rest by neighbours."""
    at = np.arange(len(truth))
    factor = np.linalg.cholesky(0.5 + 0.5 * 0.7 ** np.abs(np.subtract.outer(at, at)))
    values = truth + noise * factor @ random.normal(size=len(truth))
    replicates = values + noise * random.normal(size=(n_boot, len(truth))) @ factor.T
    return LayerCurve(task, level, at, values, replicates, adjusted_by="random-encoder", n_items=1000)


def curves(world: World, random: np.random.Generator, *, noise: float = 0.03) -> list[LayerCurve]:
    """The score table of a world as curves with replicates."""
    return [
        curve(t, level, truth, noise, random)
        for t, level, truth in zip(world.tasks, world.levels, world.truth, strict=True)
    ]


def effects(
    counts: Sequence[int],
    num_blocks: int,
    random: np.random.Generator,
    *,
    gap: float = 0.0,
    sd: float = 0.1,
    trend: float = 0.0,
    shuffled: bool = False,
) -> BlockEffects:
    """Harm by intervening on each block, all of it positive.

    Args:
        counts: tasks of each type.
        num_blocks: depth.
        random: generator.
        gap: share of the effect that falls in a type's own third beside what falls evenly on all blocks.
        sd: standard deviation over the tasks of one type of the share in a third, root mean square of its own third
            and another one.
        trend: how much larger than the first block's share the last one's is, for all tasks alike.
        shuffled: each task suffers as one of any type does.
    """
    ranks = np.repeat(np.arange(3), counts)
    third = np.arange(num_blocks) * 3 // num_blocks
    even = 1 + trend * np.arange(num_blocks) / num_blocks
    mean = (1 - gap) * even / even.sum() + gap * (third == ranks[:, None]) * 3 / num_blocks
    high, low = gap + (1 - gap) / 3, (1 - gap) / 3
    whole = (high * (1 - high) + low * (1 - low)) / 2 / sd**2 - 1  # of a Dirichlet distribution with that spread
    harm = random.gamma(whole * mean) * random.uniform(0.5, 2.0, (len(ranks), 1))
    if shuffled:
        harm = random.permutation(harm)
    tasks = tuple(f"made.{i}" for i in range(len(ranks)))
    return BlockEffects("blocks", tasks, levels_of(counts), harm[None], "world")


def write_run(
    world: World, folder: Path, random: np.random.Generator, *, items: int = 60, noise: float = 0.3
) -> ProbeResults:
    """The world as a probing run's folder: items of three seeds, two poolings, two probes and a random encoder.

    An item's bits are the truth, a deviation that all hidden states, seeds, poolings and probes share, and one of their
    own. The random encoder gives nothing.
    """
    hidden = world.num_blocks + 1
    settings = (("mean", "linear"), ("first", "linear"), ("mean", "mlp:16"))
    tables, scores = {}, []
    for task, level, truth in zip(world.tasks, world.levels, world.truth, strict=True):
        shared = noise * random.standard_normal((1, items))
        parts = []
        for pooling, probe in settings:
            for seed in range(3):
                for control, bits in (("none", truth), ("random-encoder", np.zeros(hidden))):
                    own = bits[:, None] + shared + noise * random.standard_normal((hidden, items))
                    parts.append(
                        pd.DataFrame(
                            {
                                "item": [f"i{i}" for i in range(items)] * hidden,
                                "group": [f"g{i}" for i in range(items)] * hidden,
                                "split": "test", "label": "x", "prediction": "x", "stack": "encoder", "site": "block",
                                "hidden": np.repeat(np.arange(hidden), items), "pooling": pooling, "probe": probe,
                                "control": control, "seed": seed, "bits": own.ravel(),
                            }
                        )
                    )  # fmt: skip
            scores.append(
                {"task": task, "level": level, "unit": "sentence", "stack": "encoder", "site": "block", "split": "test",
                 "metric": "bits", "pooling": pooling, "probe": probe, "n": items, "value": 0.0}
            )  # fmt: skip
        tables[task] = pd.concat(parts, ignore_index=True)
    table = pd.DataFrame(scores)
    record = run_record(table, blocks=world.num_blocks) | {"status": "complete"}
    ProbeResults(record, table, pd.DataFrame(), folder, tables).save(folder)
    return ProbeResults.load(folder)


def causal_rows(found: BlockEffects, world: World) -> pd.DataFrame:
    """Effects as a causal table about the world's tasks: skipping a block lowers a task's score by its harm."""
    rows = [
        {"intervention": "skip", "blocks_start": b, "blocks_stop": b + 1, "part": "block", "metric": task,
         "level": level, "effect": -harm}
        for task, level, own in zip(world.tasks, world.levels, found.harm[0], strict=True)
        for b, harm in enumerate(own)
    ]  # fmt: skip
    return pd.DataFrame(rows)
