"""What each block gains and forgets, with bootstrap draws: arrays behind a choice of boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from analysis.pilot import KEPT, Pilot
from spafit.errors import DataError, UsageError
from spafit.runtime import generator
from spafit.stats import BootstrapDraw


@dataclass(frozen=True)
class BlockEvidence:
    """Gain by method and block, and forgetting by what blocks keep; point estimates and paired bootstrap draws.

    Attributes:
        stack: the stack.
        num_blocks: L.
        methods: the M methods that were measured, such as ``bitfit`` and ``lora+bitfit:64``.
        parameters: that each method trains in each block, shape (M, L).
        outside: parameters that train outside the blocks (head, pooler).
        gain: share of what the last method would gain in all blocks together, shape (M, L).
        gain_draws: its bootstrap draws, batches crossed with seeds, shape (draws, M, L).
        gain_units: of each batch of each seed, shape (units, M, L).
        kept: names of the K things that blocks can keep.
        forgetting: what is forgotten with the blocks from s on as trained, in ``unit``, shape (K, L + 1); 0 at s = L.
        forgetting_draws: its draws, items by cluster, tasks and seeds, shape (draws, K, L + 1).
        unit: ``bits`` per item or token, or ``points``.
        before: the ability before training, the mean over tasks.
        tasks: names of what was read.
        seeds: number of seeds.
    """

    stack: str
    num_blocks: int
    methods: tuple[str, ...]
    parameters: np.ndarray
    outside: int
    gain: np.ndarray
    gain_draws: np.ndarray = field(repr=False)
    gain_units: np.ndarray = field(repr=False)
    kept: tuple[str, ...]
    forgetting: np.ndarray
    forgetting_draws: np.ndarray = field(repr=False)
    unit: str
    before: float
    tasks: tuple[str, ...]
    seeds: int

    @classmethod
    def from_pilot(cls, pilot: Pilot, *, n_boot: int = 1000, seed: int = 0) -> BlockEvidence:
        """Arrays and draws from a pilot's table.

        Gradients of each seed are divided by their mean total under the last method, so that seeds weigh alike. A draw
        takes batches and seeds for the gain, and clusters of items, tasks and seeds for what is forgotten, all with
        replacement; seeds are the same ones in both.

        Raises:
            DataError: the table lacks a part, or a value is not finite.
            UsageError: fewer than 20 draws.
        """
        if n_boot < 20:
            raise UsageError(f"n_boot is {n_boot}; intervals need at least 20 draws (1000 is the default).")
        table, run = pilot.table, pilot.run
        methods, blocks, seeds = tuple(run["methods"]), int(run["blocks"]), [int(s) for s in run["seeds"]]
        if not np.isfinite(table["value"].to_numpy(float)).all():
            raise DataError(f"{pilot.folder}: the pilot's table holds values that are not finite. Lower its rate.")
        rows = table[table["quantity"] == "parameters"].sort_values("block")
        parameters = np.stack([rows.loc[rows["method"] == m, "value"].to_numpy(float) for m in methods])
        units = _gradients(table, methods, blocks, seeds)
        units = units / units[:, :, -1].sum(-1).mean(1)[:, None, None, None]  # seeds, batches, methods, blocks
        batches = BootstrapDraw.make(np.arange(units.shape[1]), len(seeds), n_boot=n_boot, seed=seed)
        flat = np.moveaxis(units.reshape(len(seeds), units.shape[1], -1), 2, 1)
        gain_draws = batches.means(flat).reshape(n_boot, len(methods), blocks)
        total = gain_draws[:, -1].sum(-1)[:, None, None]
        kept, tasks, before, lost, lost_draws = _forgetting(table, blocks, seeds, batches, n_boot=n_boot, seed=seed)
        return cls(
            str(run["stack"]), blocks, methods, parameters, int(run["outside_parameters"]), units.mean((0, 1)),
            gain_draws / total, units.reshape(-1, len(methods), blocks), kept, lost, lost_draws, str(run["unit"]),
            before, tasks, len(seeds),
        )  # fmt: skip

    def kept_by(self, method: str) -> int:
        """Position in ``kept`` of what a block keeps of the pilot under a method."""
        name = KEPT.get(method, "everything")
        return self.kept.index(name if name in self.kept else "everything")

    @property
    def n_boot(self) -> int:
        """Number of draws."""
        return len(self.gain_draws)


def _gradients(table: pd.DataFrame, methods: Sequence[str], blocks: int, seeds: Sequence[int]) -> np.ndarray:
    rows = table[table["quantity"] == "gradient"]
    ordered = rows.sort_values(["seed", "item", "block"])
    found = [ordered.loc[ordered["method"] == m, "value"].to_numpy(float) for m in methods]
    if not found or any(len(f) == 0 or len(f) != len(found[0]) or len(f) % (len(seeds) * blocks) for f in found):
        raise DataError("The pilot's table lacks gradients of some method, seed or block. Run the pilot again.")
    return np.stack([f.reshape(len(seeds), -1, blocks) for f in found], axis=2)


def _forgetting(
    table: pd.DataFrame, blocks: int, seeds: Sequence[int], batches: BootstrapDraw, *, n_boot: int, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...], float, np.ndarray, np.ndarray]:
    rows = table[table["quantity"] == "ability"]
    kept = tuple(k for k in dict.fromkeys(rows["kept"]) if k != "nothing")
    tasks = tuple(dict.fromkeys(rows["task"]))
    points, draws, levels = [], [], []
    for task in tasks:
        own = rows[rows["task"] == task].sort_values(["seed", "item"])
        first = own[(own["kept"] == "nothing") & (own["seed"] == seeds[0])]
        before = own.loc[own["kept"] == "nothing", "value"].to_numpy(float).reshape(len(seeds), -1)
        curves = np.zeros((len(seeds), len(kept) * (blocks + 1), before.shape[1]))
        for i, name in enumerate(kept):
            for s in range(blocks):
                at = own.loc[(own["kept"] == name) & (own["block"] == s), "value"].to_numpy(float)
                if at.size != before.size:
                    raise DataError(f"The pilot's table lacks {task} with blocks from {s} on. Run the pilot again.")
                curves[:, i * (blocks + 1) + s] = before - at.reshape(before.shape)
        draw = BootstrapDraw.make(first["group"].to_numpy(), len(seeds), n_boot=n_boot, seed=seed)
        draw = replace(draw, seed_counts=batches.seed_counts)
        points.append(curves.mean((0, 2)))
        draws.append(draw.means(curves))
        levels.append(before.mean())
    weights = np.ones((n_boot, len(tasks))) / len(tasks)
    if len(tasks) > 1:
        random = generator(seed, "tasks of a pilot")
        weights = random.multinomial(len(tasks), np.full(len(tasks), 1 / len(tasks)), size=n_boot) / len(tasks)
    shape = (len(kept), blocks + 1)
    drawn = np.einsum("bt,tbc->bc", weights, np.stack(draws)).reshape(n_boot, *shape)
    return kept, tasks, float(np.mean(levels)), np.mean(points, axis=0).reshape(shape), drawn
