"""Interventional evidence by task and block: what intervening on each block costs each task, read from tables.

Three kinds of tables hold it. ``blocks``: effects of interventions on single blocks (:data:`analysis.causal.COLUMNS`).
``erasure``: effects of erasing a task's label from one hidden state, less the controls that erase something else
(:data:`analysis.task_tables.ERASURE_COLUMNS`). ``training``: what each block adds to a task's loss through training
(the term ``lost`` of :mod:`analysis.forgetting`); training intervenes on all blocks at once, so this is the weakest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.hypothesis import Intervened
from spafit.errors import DataError, UsageError
from spafit.runtime import generator

#: Interventions on blocks that take something away, the one that is used where there are several first.
ON_BLOCKS = ("skip", "resample", "revert", "interpolate")
#: Metrics whose rise is harm. Every other one is harmed by a fall.
_LOSSES = ("loss_bits", "bits_per_token")
#: Metrics of a trained task rather than names of tasks.
_OF_ONE_TASK = ("score", *_LOSSES)
_BLOCK_COLUMNS = ("intervention", "blocks_start", "blocks_stop", "metric", "effect")


@dataclass(frozen=True)
class BlockEffects:
    """Harm done to each task by intervening on each block.

    Attributes:
        kind: how it was measured; see the module's text.
        tasks: names.
        levels: level of each task, ``other`` where unknown.
        harm: positive where the task suffers, shape (halves, tasks, blocks); two halves where effects were measured on
            two halves of the items, else one.
        source: in words, where it comes from.
    """

    kind: Intervened
    tasks: tuple[str, ...]
    levels: tuple[str, ...]
    harm: np.ndarray
    source: str

    def __post_init__(self) -> None:
        """Check shapes and values."""
        if self.harm.ndim != 3 or self.harm.shape[1] != len(self.tasks) or self.harm.shape[0] not in (1, 2):
            raise UsageError(
                f"{self.source}: harm has shape {self.harm.shape}; expected (1 or 2 halves, {len(self.tasks)} tasks, "
                "blocks)."
            )
        if not np.isfinite(self.harm).all():
            raise DataError(f"{self.source}: an effect is missing or not finite. Measure every task at every block.")

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return int(self.harm.shape[2])


def effects_from_table(table: pd.DataFrame, *, source: str, task: str | None = None) -> BlockEffects:
    """Effects of single blocks from a causal table.

    Args:
        table: the columns ``intervention``, ``blocks_start``, ``blocks_stop``, ``metric`` and ``effect``. Tasks are
            told apart by a column ``task`` or, without one, by ``metric``. Optional: ``part`` (rows of whole blocks
            are used), ``draw`` (averaged), ``level``, and ``half`` (0 or 1) for effects on two halves of the items.
        source: where it comes from, for errors.
        task: the task of all rows of a trained model's own metrics.

    Raises:
        DataError: a column is missing, or a block is missing for a task.
    """
    missing = [c for c in _BLOCK_COLUMNS if c not in table]
    if missing:
        raise DataError(
            f"{source} is no causal table: the column {missing[0]!r} is missing. It needs {', '.join(_BLOCK_COLUMNS)}, "
            "and task where the metrics are not named after tasks."
        )
    rows = table[table["blocks_stop"] - table["blocks_start"] == 1]
    if "part" in rows:
        rows = rows[rows["part"] == "block"]
    found = set(rows["intervention"])
    chosen = next((i for i in ON_BLOCKS if i in found), None)
    if chosen is None:
        raise DataError(
            f"{source} has no intervention on single whole blocks that takes something away ({', '.join(ON_BLOCKS)}); "
            f"it has {', '.join(sorted(found)) or 'none'}."
        )
    rows = rows[rows["intervention"] == chosen]
    if "task" not in rows and task is not None:
        rows = rows.assign(task=task)
    elif "task" not in rows:
        rows = rows[~rows["metric"].isin(_OF_ONE_TASK)]
        if rows.empty:
            raise DataError(
                f"{source}: the metrics are {', '.join(sorted(set(table['metric'])))}, of one task. Add a column task."
            )
        rows = rows.assign(task=rows["metric"])
    rows = _one_metric(rows)
    sign = np.where(rows["metric"].isin(_LOSSES), 1.0, -1.0)
    return _effects("blocks", rows.assign(block=rows["blocks_start"], harm=sign * rows["effect"]), source=source)


def effects_of_erasure(table: pd.DataFrame, *, levels: Mapping[str, str], source: str) -> BlockEffects:
    """Harm of erasing each task's label, less the mean of the controls at the same hidden state, by block.

    Controls of equal variance are used where there are any, random subspaces of equal rank otherwise. The harm at
    hidden k + 1 is that of block k.

    Args:
        table: columns of :data:`analysis.task_tables.ERASURE_COLUMNS`, of one model.
        levels: level of each task.
        source: where it comes from.
    """
    rows = _one_metric(table)
    sign = np.where(rows["metric"].isin(_LOSSES), 1.0, -1.0)
    rows = rows.assign(harm=sign * rows["effect"], block=rows["hidden"] - 1)
    by = rows.groupby(["task", "block", "eraser"])["harm"].mean().unstack("eraser")
    none = pd.Series(0.0, index=by.index)
    control = by.get("equal-variance", none * np.nan).fillna(by.get("random", none)).fillna(0.0)
    harm = (by["leace"] - control).rename("harm").reset_index()
    return _effects("erasure", harm.assign(level=harm["task"].map(levels)), source=source)


def effects_of_training(table: pd.DataFrame, *, source: str) -> BlockEffects:
    """What each block adds to the bits of a task that training lost: ``lost`` at hidden k + 1 less that at hidden k.

    Args:
        table: the table ``forgetting`` of a comparison, of one model, split, probe, pooling and metric.
        source: where it comes from.
    """
    rows = table[table["term"] == "lost"].sort_values("hidden", kind="stable")
    wide = rows.pivot_table(index="task", columns="hidden", values="value", sort=False, dropna=False)
    if list(wide.columns) != list(range(len(wide.columns))):
        raise DataError(f"{source}: losses are needed at every hidden state; there are {list(wide.columns)}.")
    levels = rows.drop_duplicates("task").set_index("task")["level"]
    harm = np.diff(wide.to_numpy(np.float64), axis=1)
    names = tuple(map(str, wide.index))
    return BlockEffects("training", names, tuple(str(levels[n]) for n in names), harm[None], source)


def halves_of_tasks(tasks: Sequence[str], ranks: Sequence[int], *, seed: int) -> np.ndarray:
    """Draw half of the tasks of each type, to choose ranges on; the others are tested. Shape (tasks,), bool.

    The draw depends on the seed and the set of names alone. Of an odd number the larger part is tested.
    """
    names, types = np.asarray(tasks), np.asarray(ranks)
    first = np.zeros(len(names), dtype=bool)
    for k in np.unique(types):
        own = np.flatnonzero(types == k)
        own = own[np.argsort(names[own], kind="stable")]
        order = generator(seed, "held-out halves", int(k), *names[own].tolist()).permutation(len(own))
        first[own[order[: len(own) // 2]]] = True
    return first


def read_causal(path: str | Path) -> BlockEffects:
    """Read a causal table from a CSV or parquet file.

    Raises:
        DataError: it cannot be read, or is no such table.
    """
    path = Path(path)
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as a table: {reason}. Give a CSV or parquet file.") from error
    return effects_from_table(table, source=str(path))


def _one_metric(rows: pd.DataFrame) -> pd.DataFrame:
    """Of a trained task's metrics the cross-entropy where it is there: it moves before the score does."""
    return rows[rows["metric"] == "loss_bits"] if (rows["metric"] == "loss_bits").any() else rows


def _effects(kind: Intervened, rows: pd.DataFrame, *, source: str) -> BlockEffects:
    if rows[["task", "block"]].isna().any().any():
        raise DataError(f"{source}: a task or block is missing in a row.")
    rows = rows.assign(half=rows.get("half", 0))
    halves = sorted(set(rows["half"]))
    if halves not in ([0], [0, 1]):
        raise DataError(f"{source}: the column half holds {halves}; write 0 and 1.")
    tasks = list(dict.fromkeys(rows["task"].astype(str)))
    blocks = sorted(set(rows["block"].astype(int)))
    if blocks != list(range(len(blocks))):
        raise DataError(f"{source}: every single block from 0 on is needed; there are {blocks}.")
    mean = rows.groupby(["half", "task", "block"])["harm"].mean()
    full = pd.MultiIndex.from_product([halves, tasks, blocks])
    lacking = full.difference(pd.MultiIndex.from_tuples(mean.index.tolist()))
    if len(lacking):
        half, name, block = lacking[0]
        where = f" in half {half}" if len(halves) > 1 else ""
        raise DataError(f"{source}: task {name} has no effect of block {block}{where}. Measure every block.")
    harm = mean.reindex(full).to_numpy(np.float64).reshape(len(halves), len(tasks), len(blocks))
    levels = ["other"] * len(tasks)
    if "level" in rows:
        known = rows.dropna(subset=["level"]).drop_duplicates("task").set_index("task")["level"]
        levels = [str(known.get(t, "other")) for t in tasks]
    return BlockEffects(kind, tuple(tasks), tuple(levels), harm, source)
