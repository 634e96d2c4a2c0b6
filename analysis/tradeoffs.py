"""Task score against forgetting, over several ways to train: which ones lie on the Pareto front, and how surely.

A method is on the front if no other is at least as good in both and better in one. Score and forgetting of all methods
are resampled together, so that what they share (test items, probing tasks, training seeds) does not count as a
difference between them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spafit.errors import DataError, UsageError, did_you_mean
from spafit.runtime import generator
from spafit.stats import interval

#: Share of the draws from which on a finding is given.
SURE = 0.95
COLUMNS = (
    "method", "score", "score_sd", "score_low", "score_high", "forgetting", "forgetting_low", "forgetting_high",
    "n_seeds", "n_items", "n_tasks", "front", "front_share", "dominated_by", "dominated_share", "finding", "note",
)  # fmt: skip


def tradeoff_table(
    scores: pd.DataFrame, losses: pd.DataFrame, *, n_boot: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Score and forgetting of every method with intervals, the front, and in how many paired draws it holds.

    A draw takes test items (where scores are of items), probing tasks and training seeds with replacement; methods
    with the same seeds get the same draw. Forgetting is the mean over tasks and seeds.

    Do not trust intervals of fewer than about five seeds for what another training would give: resampling S seeds
    understates their variance by (S - 1) / S, and with one seed they speak of that training alone. Tasks are resampled
    as if drawn from tasks of their kind; with fewer than about ten the intervals are too short.

    Args:
        scores: columns method, seed, value (higher is better; NaN where undefined), and optionally item, with a row
            for each test item of each seed, of which the score is the mean.
        losses: columns method, seed, task, value: what each task lost, positive is a loss.
        n_boot: bootstrap draws.
        level: coverage of the intervals.
        seed: chooses the draws.

    Returns:
        One row per method, in the order of ``scores``, with the columns :data:`COLUMNS`. ``score_sd`` is over seeds.
        ``front``: by the means, ties included. ``front_share``: share of the draws in which no other method is at
        least as good in both (a tie in both counts for neither). ``dominated_by``: the method that is better in one
        and no worse in the other in most draws, ``dominated_share`` of them. ``finding``: ``front`` or ``dominated``
        where the share is at least :data:`SURE`, else ``within noise``; ``undefined`` without a score. ``note`` says
        in words what was left out, and what the intervals leave out.

    Raises:
        UsageError: missing columns or rows that stand twice.
        DataError: methods with other tasks or items than the others, or a loss that is no number.
    """
    rows, drawn = _resampled(scores, losses, n_boot=n_boot, level=level, seed=seed)
    table = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    table["front"], table["finding"] = False, "undefined"
    table[["dominated_by", "note"]] = table[["dominated_by", "note"]].astype(object).fillna("")
    if drawn:
        _place(table, [i for i, row in enumerate(rows) if row["n_seeds"]], *np.stack(list(drawn.values()), axis=-1))
    return table


def tradeoff_differences(
    scores: pd.DataFrame,
    losses: pd.DataFrame,
    *,
    against: str,
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Score and forgetting of every other method minus those of one, with paired intervals from the same draws.

    Args:
        scores: see :func:`tradeoff_table`, and its warnings; likewise the others.
        losses: see ``scores``.
        against: the method that is subtracted.
        n_boot: see ``scores``.
        level: see ``scores``.
        seed: see ``scores``.

    Returns:
        Columns method, score, score_low, score_high, forgetting, forgetting_low, forgetting_high, of every method that
        has a score; the score's interval is NaN where nothing of it was resampled.

    Raises:
        UsageError: as :func:`tradeoff_table`, or ``against`` is not a method that has a score.
        DataError: as :func:`tradeoff_table`.
    """
    rows, drawn = _resampled(scores, losses, n_boot=n_boot, level=level, seed=seed)
    if against not in drawn:
        raise UsageError(
            f"No method {against!r} with a score. Methods: {', '.join(drawn)}.{did_you_mean(against, drawn)}"
        )
    by = {str(row["method"]): row for row in rows}
    found = []
    for method in (m for m in drawn if m != against):
        row: dict[str, Any] = {"method": method}
        for k, name in enumerate(("score", "forgetting")):
            row[name] = by[method][name] - by[against][name]
            fixed = name == "score" and all(math.isnan(by[m].get("score_low", math.nan)) for m in (method, against))
            row |= _bounds(name, np.full(2, math.nan) if fixed else drawn[method][k] - drawn[against][k], level)
        found.append(row)
    return pd.DataFrame(found)


def _resampled(
    scores: pd.DataFrame, losses: pd.DataFrame, *, n_boot: int, level: float, seed: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row for every method, and the draws of score and forgetting, shape (2, n_boot), of those that have a score."""
    _check(scores, losses)
    tasks, items = sorted(losses["task"].unique()), _items(scores)
    task_counts = _counts(len(tasks), n_boot, seed, "tasks")
    item_counts = np.ones((n_boot, 1)) if items is None else _counts(len(items), n_boot, seed, "items")
    rows: list[dict[str, Any]] = []
    drawn: dict[str, np.ndarray] = {}
    for method in dict.fromkeys(scores["method"]):
        own = scores[scores["method"] == method]
        lost = losses[losses["method"] == method].pivot(index="seed", columns="task", values="value")
        score = (own.assign(item=0) if items is None else own).pivot(index="seed", columns="item", values="value")
        defined = list(score.index[score.notna().all(axis=1)])
        seeds = [s for s in defined if s in lost.index]
        row: dict[str, Any] = {
            "method": method, "n_seeds": len(seeds), "n_items": 0 if items is None else len(items),
            "n_tasks": len(tasks), "note": _note(score, defined, seeds, items),
        }  # fmt: skip
        rows.append(row)
        if not seeds:
            continue
        seed_counts = _counts(len(seeds), n_boot, seed, "seeds", *seeds)
        values, gone = score.loc[seeds].to_numpy(float), lost.loc[seeds, tasks].to_numpy(float)
        drawn[method] = np.stack(
            [
                np.einsum("bs,si,bi->b", seed_counts, values, item_counts, optimize=True),
                np.einsum("bs,st,bt->b", seed_counts, gone, task_counts, optimize=True),
            ]
        )
        row["score"], row["forgetting"] = values.mean(), gone.mean()
        row["score_sd"] = values.mean(axis=1).std(ddof=1) if len(seeds) > 1 else math.nan
        if len(seeds) > 1 or items is not None:
            row |= _bounds("score", drawn[method][0], level)
        row |= _bounds("forgetting", drawn[method][1], level)
    return rows, drawn


def tradeoff_markdown(table: pd.DataFrame) -> str:
    """The table as one that pastes: scores as they are, forgetting in points, shares of the draws."""
    lines = [
        "| method | task score | forgetting, points | seeds | front | share of draws on it | finding |",
        "|---|--:|--:|--:|:-:|--:|---|",
    ]
    notes: dict[str, list[str]] = {}
    for row in table.to_dict("records"):
        cells = (
            row["method"], _cell(row, "score", 1, ".3f"), _cell(row, "forgetting", 100, "+.1f"), row["n_seeds"],
            "✓" if row["front"] else "", _number(row["front_share"], ".2f"), _finding(row),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        if row["note"]:
            notes.setdefault(str(row["note"]), []).append(str(row["method"]))
    said = [f"{'all' if len(m) == len(table) > 1 else ', '.join(m)}: {note}." for note, m in notes.items()]
    return "\n".join([*lines, *(["", "  \n".join(said)] if said else [])])


def _cell(row: Mapping[Hashable, Any], name: str, factor: float, form: str) -> str:
    low, high = (_number(factor * row[f"{name}_{end}"], form) for end in ("low", "high"))
    return _number(factor * row[name], form) + (f" [{low} {high}]" if low != "–" else "")


def _number(value: float, form: str) -> str:
    return "–" if pd.isna(value) else f"{value:{form}}"


def _finding(row: Mapping[Hashable, Any]) -> str:
    if row["finding"] != "dominated":
        return str(row["finding"])
    return f"dominated by {row['dominated_by']} ({row['dominated_share']:.2f})"


# ---------------------------------------------------------------- the front


def at_least_as_good(score: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Whether method a is no worse than b in both; shape (…, a, b) from two arrays of shape (…, methods)."""
    # Two means of the same hits may differ by rounding, which depends on the machine: that is a tie.
    score, loss = np.round(score, 9), np.round(loss, 9)
    better = score[..., :, None] >= score[..., None, :]
    return np.asarray(better & (loss[..., :, None] <= loss[..., None, :]))


def _place(table: pd.DataFrame, known: list[int], scores: np.ndarray, losses: np.ndarray) -> None:
    """Fill in the front and its shares for the methods that have a score; draws of shape (n_boot, methods)."""
    means = table.iloc[known]
    good = at_least_as_good(means["score"].to_numpy(float), means["forgetting"].to_numpy(float))
    drawn = at_least_as_good(scores, losses)
    others = ~np.eye(len(known), dtype=bool)
    share = (drawn & ~drawn.swapaxes(1, 2)).mean(axis=0)  # a dominates b
    alone = 1 - (drawn & others).any(axis=1).mean(axis=0)
    for k, i in enumerate(known):
        worst = int(share[:, k].argmax())
        table.loc[i, "front"] = not (good & ~good.T)[:, k].any()
        table.loc[i, "front_share"], table.loc[i, "dominated_share"] = alone[k], share[worst, k]
        if share[worst, k] > 0:
            table.loc[i, "dominated_by"] = means["method"].iloc[worst]
        sure = "front" if alone[k] >= SURE else "dominated" if share[worst, k] >= SURE else "within noise"
        table.loc[i, "finding"] = sure


def _bounds(name: str, drawn: np.ndarray, level: float) -> dict[str, float]:
    low, high = interval(drawn, level)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _counts(n: int, n_boot: int, seed: int, *names: object) -> np.ndarray:
    """Weights of n things in each draw, shape (n_boot, n); they depend on n, the seed and the names alone."""
    random = generator(seed, "trade-off", *names)
    return np.asarray(random.multinomial(n, np.full(n, 1 / n), size=n_boot) / n)


def _note(score: pd.DataFrame, defined: Sequence[object], seeds: Sequence[object], items: object) -> str:
    found = []
    if len(defined) < len(score):
        found.append(f"{len(score) - len(defined)} of {len(score)} scores are undefined and left out")
    if len(seeds) < len(defined):
        found.append(f"{len(defined) - len(seeds)} of {len(score)} seeds were not compared and are left out")
    if len(seeds) == 1:
        varied = "tasks alone" if items is None else "test items and tasks alone"
        found.append(f"one seed: intervals and shares are over {varied}")
    return "; ".join(found)


def _check(scores: pd.DataFrame, losses: pd.DataFrame) -> None:
    for name, table, columns in (
        ("scores", scores, ("method", "seed", "value")), ("losses", losses, ("method", "seed", "task", "value")),
    ):  # fmt: skip
        missing = [c for c in columns if c not in table]
        if missing or table.empty:
            raise UsageError(
                f"The {name} need the columns {', '.join(columns)} and at least one row; "
                f"{missing[0] if missing else 'every row'} is missing."
            )
        keys = [c for c in ("method", "seed", "task" if name == "losses" else "item") if c in table]
        if table.duplicated(keys).any():
            twice = table[table.duplicated(keys)].iloc[0]
            shown = ", ".join(f"{k} {twice[k]}" for k in keys)
            raise UsageError(f"The {name} hold {shown} twice. Give one value.")
    if not np.isfinite(losses["value"].astype(float)).all():
        bad = losses[~np.isfinite(losses["value"].astype(float))].iloc[0]
        raise DataError(f"What {bad['task']} lost under {bad['method']} is no number. Leave this task out everywhere.")
    tasks = set(losses["task"])
    for (method, seed), own in losses.groupby(["method", "seed"], sort=False):
        if set(own["task"]) != tasks:
            gone = sorted(tasks - set(own["task"]))[0]
            raise DataError(
                f"{method}, seed {seed}, was not compared on {gone}, which others were. Compare every method on the "
                "same tasks, or choose tasks that all have."
            )


def _items(scores: pd.DataFrame) -> list[object] | None:
    """The test items, where scores are of items.

    Raises:
        DataError: not every seed of every method was scored on the same ones.
    """
    if "item" not in scores:
        return None
    items = set(scores["item"])
    for (method, seed), own in scores.groupby(["method", "seed"], sort=False):
        if set(own["item"]) != items:
            raise DataError(
                f"{method}, seed {seed}, was scored on {own['item'].nunique()} of {len(items)} test items. Score every "
                "method on the same items."
            )
    return sorted(items)
