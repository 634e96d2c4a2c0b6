"""Score tables read for people: one row per task, as plain numbers, Markdown or HTML, with a sparkline over layers."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probing.metrics import shown_metric
from probing.tasks.base import LEVELS

#: Columns that tell the curves of one task apart.
VARIANT = ("stack", "site", "pooling", "probe")
MISSING = "—"
#: Short names of the metrics beside a value, where not all tasks have accuracy.
SHORT_METRICS = {"accuracy": "acc", "micro_f1": "F1", "r2": "R²", "uuas": "UUAS"}
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class TaskRow:
    """What one task's curve comes to, at one stack, site, pooling and probe. Missing numbers are NaN (indices: None).

    Attributes:
        level: the task's level.
        task: its full name.
        stack: stack of the states.
        site: site of the states.
        pooling: how sub-words became one vector.
        probe: probe family.
        split: the test split that is reported.
        metric: the metric shown: ``accuracy``, for several labels ``micro_f1``, for numbers ``r2``.
        best: largest value of it over hidden states, with interval ``best_low``, ``best_high``.
        best_low: lower end.
        best_high: upper end.
        at: hidden state of the largest value (noise on a flat curve; see ``first``).
        first: first hidden state within one standard error of the best of ``first_of``.
        first_of: the score of ``first``: ``accuracy``, or for example ``bits − random-encoder``.
        cog: emergence centre of gravity in hidden states, with interval ``cog_low``, ``cog_high``.
        cog_low: lower end.
        cog_high: upper end.
        cog_of: what the centre of gravity was computed from, for example ``bits − random-encoder``.
        gap: the metric minus the random encoder's, at ``at``.
        selectivity: the metric minus the word-type control task's, at ``at``.
        chance: the metric of always giving the training split's most frequent class (or set of labels, or its mean).
        n: test items.
        n_seeds: distinct fits per point.
        hidden: hidden indices of ``curve``.
        curve: the metric per hidden state.
    """

    level: str
    task: str
    stack: str
    site: str
    pooling: str
    probe: str
    split: str
    metric: str
    best: float
    best_low: float
    best_high: float
    at: int | None
    first: int | None
    first_of: str
    cog: float
    cog_low: float
    cog_high: float
    cog_of: str
    gap: float
    selectivity: float
    chance: float
    n: int
    n_seeds: int
    hidden: tuple[int, ...]
    curve: tuple[float, ...]

    @property
    def variant(self) -> tuple[str, str, str, str]:
        """Stack, site, pooling and probe."""
        return (self.stack, self.site, self.pooling, self.probe)


def level_order(level: str) -> int:
    """Position of a level in tables and figures: surface, syntax, semantics, other, then the rest."""
    return LEVELS.index(level) if level in LEVELS else len(LEVELS)


def reported(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows to show: means over seeds (``seed`` missing), whose intervals cross items with seeds."""
    return scores[scores["seed"].isna()]


def primary_split(scores: pd.DataFrame, task: str) -> str:
    """The test split that is reported first: ``test``, else ``seen``, else the first by name."""
    splits = set(scores.loc[scores["task"] == task, "split"])
    return next((s for s in ("test", "seen") if s in splits), min(splits))


def ordered_tasks(scores: pd.DataFrame) -> list[tuple[str, str]]:
    """(level, task) pairs by level, then in the order of the table."""
    pairs = dict.fromkeys(zip(scores["level"].astype(str), scores["task"].astype(str), strict=True))
    return sorted(pairs, key=lambda p: level_order(p[0]))


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task names without the prefix up to the first dot where that leaves them distinct."""
    short = {t: t.split(".", 1)[-1] for t in tasks}
    return short if len(set(short.values())) == len(set(tasks)) else {t: t for t in tasks}


def curve_rows(
    scores: pd.DataFrame, *, task: str, variant: Sequence[str], control: str, metric: str, split: str
) -> pd.DataFrame:
    """The reported rows of one curve, by hidden state; empty if the run has no such curve."""
    rows = reported(scores)
    keep = (rows["task"] == task) & (rows["control"] == control) & (rows["metric"] == metric) & (rows["split"] == split)
    for column, value in zip(VARIANT, variant, strict=True):
        keep &= rows[column] == value
    return rows[keep].sort_values("hidden")


def variants(scores: pd.DataFrame, task: str) -> list[tuple[str, ...]]:
    """The (stack, site, pooling, probe) of one task's curves, in the order of the table."""
    rows = scores[scores["task"] == task]
    return list(dict.fromkeys(rows[list(VARIANT)].astype(str).itertuples(index=False, name=None)))


def overview(scores: pd.DataFrame, summaries: pd.DataFrame) -> list[TaskRow]:
    """One :class:`TaskRow` per task and (stack, site, pooling, probe), by level, then in the order of the table."""
    rows = []
    adjusted = [(m, c) for m in ("bits", "uuas") for c in ("random-encoder", "difference:random-encoder", "none")]
    every = reported(scores)
    for level, task in ordered_tasks(every):
        part = every[every["task"] == task]
        split, metric = primary_split(part, task), shown_metric(part["metric"])
        for variant in variants(part, task):
            own = curve_rows(part, task=task, variant=variant, control="none", metric=metric, split=split)
            if own.empty:
                continue
            values = own["value"].to_numpy(float)
            top = own.iloc[int(np.nanargmax(values))] if np.isfinite(values).any() else None
            at = None if top is None else int(top["hidden"])

            def gap(
                control: str,
                *,
                at: int | None = at,
                task: str = task,
                variant: Any = variant,
                split: str = split,
                metric: str = metric,
            ) -> float:
                found = curve_rows(
                    scores, task=task, variant=variant, control=f"difference:{control}", metric=metric, split=split
                )
                found = found[found["hidden"] == at]
                return float(found["value"].iloc[0]) if len(found) else float("nan")

            first = statistic(
                summaries,
                task=task,
                variant=variant,
                name="first_within_1se",
                prefer=[("accuracy", "none"), ("uuas", "none"), *adjusted],
            )
            cog = statistic(
                summaries,
                task=task,
                variant=variant,
                name="emergence_cog",
                prefer=adjusted,
            )
            rows.append(
                TaskRow(
                    level=level,
                    task=task,
                    stack=variant[0],
                    site=variant[1],
                    pooling=variant[2],
                    probe=variant[3],
                    split=split,
                    metric=metric,
                    best=float("nan") if top is None else float(top["value"]),
                    best_low=float("nan") if top is None else float(top["ci_low"]),
                    best_high=float("nan") if top is None else float(top["ci_high"]),
                    at=at,
                    first=None if first is None or pd.isna(first["value"]) else round(first["value"]),
                    first_of="" if first is None else _adjusted(str(first["metric"]), str(first["control"])),
                    cog=float("nan") if cog is None else float(cog["value"]),
                    cog_low=float("nan") if cog is None else float(cog["ci_low"]),
                    cog_high=float("nan") if cog is None else float(cog["ci_high"]),
                    cog_of="" if cog is None else _adjusted(str(cog["metric"]), str(cog["control"])),
                    gap=gap("random-encoder"),
                    selectivity=gap("word-type"),
                    chance=float(own["chance"].iloc[0]),
                    n=int(own["n"].iloc[0]),
                    n_seeds=int(own["n_seeds"].max()),
                    hidden=tuple(int(h) for h in own["hidden"]),
                    curve=tuple(values.tolist()),
                )
            )
    return rows


def statistic(
    summaries: pd.DataFrame, *, task: str, variant: Sequence[str], name: str, prefer: Sequence[tuple[str, str]]
) -> pd.Series | None:
    """The row of one summary statistic: the first of the preferred (metric, control) pairs that the run computed."""
    if summaries.empty:
        return None
    keep = (summaries["task"] == task) & (summaries["statistic"] == name)
    for column, value in zip(VARIANT, variant, strict=True):
        if column in summaries:
            keep &= summaries[column] == value
    found = summaries[keep]
    for metric, control in prefer:
        match = found[(found["metric"] == metric) & (found["control"] == control)]
        if len(match):
            return match.iloc[0]
    return None


def sparkline(values: Sequence[float], *, low: float | None = None, high: float | None = None) -> str:
    """One character per value, from ``▁`` at ``low`` to ``█`` at ``high`` (by default the extremes); missing: a space.

    Give ``low`` (for example chance) where a flat curve should look flat and high, not like magnified noise.
    """
    x = np.asarray(values, dtype=float)
    known = x[np.isfinite(x)]
    if not known.size:
        return " " * len(x)
    bottom = float(known.min()) if low is None or not np.isfinite(low) else low
    top = float(known.max()) if high is None or not np.isfinite(high) else high
    scaled = np.clip((x - bottom) / (top - bottom) if top > bottom else np.where(np.isfinite(x), 0.0, x), 0, 1)
    return "".join(" " if np.isnan(s) else _BLOCKS[round(s * (len(_BLOCKS) - 1))] for s in scaled)


def shorten_curve(values: Sequence[float], n: int) -> list[float]:
    """At most ``n`` points: means of neighbouring hidden states, for a narrow sparkline."""
    if len(values) <= n:
        return list(values)
    parts = [p[np.isfinite(p)] for p in np.array_split(np.asarray(values, dtype=float), n)]
    return [float(p.mean()) if p.size else float("nan") for p in parts]


def number(value: float | None, *, digits: int = 3, sign: bool = False) -> str:
    """``.943``, ``+.120``, ``2.31``; ``—`` where there is no number."""
    if value is None or not np.isfinite(value):
        return MISSING
    text = f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def bracket(value: float, low: float, high: float, *, digits: int = 3) -> str:
    """``.943 [.938 .948]``; the brackets are left out where there is no interval."""
    if not np.isfinite(value):
        return MISSING
    if not (np.isfinite(low) and np.isfinite(high)):
        return number(value, digits=digits)
    return f"{number(value, digits=digits)} [{number(low, digits=digits)} {number(high, digits=digits)}]"


def markdown_table(scores: pd.DataFrame, summaries: pd.DataFrame, *, width: int = 120) -> str:
    """The table that goes to a terminal or into a paper, with a legend below it.

    Columns: level, task, largest accuracy with its interval (marked R² for numbers, F1 for several labels), the hidden
    state it is at, the first hidden state within one standard error, emergence centre of gravity with its interval,
    the score minus the random encoder's and minus the control task's at that hidden state (selectivity), chance, test
    items, and the score over layers as a sparkline from chance to its maximum. Stack, site, pooling and probe become
    columns where a task has several.

    Args:
        scores: table of scores.
        summaries: table of summaries; may be empty.
        width: columns to fit into. Sparklines, spaces around bars, then task names give way; numbers never do.
    """
    rows = overview(scores, summaries)
    for points, space, clip in ((12, " ", None), (8, " ", None), (6, " ", None), (16, "", None), (5, "", 1)):
        cells = _cells(rows, points=points)
        if clip is not None:
            excess = max(len(line) for line in _lines(cells, space)) - width
            cells = _clip_names(cells, excess)
        lines = _lines(cells, space)
        if max(len(line) for line in lines) <= width:
            break
    return "\n".join(lines) + "\n\n" + legend(rows, width=width)


def legend(rows: Sequence[TaskRow], *, width: int = 120) -> str:
    """What the columns of the table mean, in the words that hold for these rows."""
    seeds = sorted({r.n_seeds for r in rows})
    adjusted, score = sorted({r.cog_of for r in rows if r.cog_of}), scores_word(rows)
    parts = [
        f"[ ]: 95 % interval, test items by sentence{' crossed with seeds' if seeds and seeds[-1] > 1 else ''}"
        f" ({_numbers(seeds)} distinct fit{'s' if seeds != [1] else ''} per point).",
        f"at: hidden state of the best {score} (0 = embeddings).",
    ]
    if first := sorted({r.first_of for r in rows if r.first_of}):
        parts.append(f"1SE: the first within one standard error of the best {' or '.join(first)}.")
    if adjusted:
        parts.append(f"CoG: emergence centre of gravity over hidden states, from {' or '.join(adjusted)}.")
    if score != "accuracy":
        meant = {"acc": "accuracy", "F1": "F1 over all labels", "R²": "share of the test items' variance",
                 "UUAS": "share of dependency edges found"}  # fmt: skip
        parts.append("; ".join(f"{k}: {meant[k]}" for k in dict.fromkeys(SHORT_METRICS[r.metric] for r in rows)) + ".")
    parts.append(f"−rand, −ctrl: {score} minus the random encoder's and minus the word-type control task's, there.")
    splits = sorted({r.split for r in rows})
    usual = {"acc": "majority class", "F1": "most frequent set of labels", "R²": "mean"}
    trained = dict.fromkeys(usual[SHORT_METRICS[r.metric]] for r in rows if r.metric != "uuas")
    chance = [f"the training {' or '.join(trained)}"] if trained else []
    chance += ["the linear chain"] if any(r.metric == "uuas" for r in rows) else []
    parts.append(f"chance: {' or '.join(chance)}. Test split: {', '.join(splits)}. layers: from chance to best.")
    return textwrap.fill(" ".join(parts), width)


def scores_word(rows: Sequence[TaskRow]) -> str:
    """``accuracy`` where that is what all rows show, else ``score``."""
    return "accuracy" if all(r.metric == "accuracy" for r in rows) else "score"


def best_words(row: TaskRow, rows: Sequence[TaskRow]) -> str:
    """A row's best value with its interval; where not all ``rows`` have accuracy, the metric before it."""
    value = bracket(row.best, row.best_low, row.best_high)
    return value if scores_word(rows) == "accuracy" else f"{SHORT_METRICS[row.metric]} {value}"


def html_table(scores: pd.DataFrame, summaries: pd.DataFrame) -> str:
    """The same table as HTML, for notebooks: escaped, without style of its own."""
    cells = _cells(overview(scores, summaries), points=32)
    head = "".join(f"<th>{html.escape(c)}</th>" for c in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_RIGHT = {"at", "1SE", "−rand", "−ctrl", "chance", "n"}


def _cells(rows: Sequence[TaskRow], *, points: int) -> list[list[str]]:
    names = short_names([r.task for r in rows])
    several = [
        c for c in VARIANT if any(getattr(a, c) != getattr(b, c) for a in rows for b in rows if a.task == b.task)
    ]
    selective = any(np.isfinite(r.selectivity) for r in rows)
    table = [
        [
            "level",
            "task",
            *several,
            f"best {scores_word(rows)}",
            "at",
            "1SE",
            "CoG",
            "−rand",
            *(["−ctrl"] if selective else []),
            "chance",
            "n",
            "layers",
        ]
    ]
    for r in rows:
        table.append(
            [
                r.level,
                _cell(names[r.task]),
                *(_cell(getattr(r, c)) for c in several),
                best_words(r, rows),
                MISSING if r.at is None else str(r.at),
                MISSING if r.first is None else str(r.first),
                bracket(r.cog, r.cog_low, r.cog_high, digits=1),
                number(r.gap, sign=True),
                *([number(r.selectivity, sign=True)] if selective else []),
                number(r.chance),
                str(r.n),
                sparkline(shorten_curve(r.curve, points), low=r.chance).rstrip() or MISSING,
            ]
        )
    return table


def _lines(cells: Sequence[Sequence[str]], space: str) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [name in _RIGHT for name in cells[0]]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "|" + "|".join(f"{space}{c}{space}" for c in padded) + "|"

    rule = "|" + "|".join(
        "-" * (w + 2 * len(space) - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)
    )
    return [line(cells[0]), rule + "|", *(line(row) for row in cells[1:])]


def _clip_names(cells: list[list[str]], excess: int) -> list[list[str]]:
    longest = max(len(row[1]) for row in cells)
    room = max(8, longest - max(excess, 0))
    return [[row[0], row[1] if len(row[1]) <= room else row[1][: room - 1] + "…", *row[2:]] for row in cells]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _adjusted(metric: str, control: str) -> str:
    control = control.removeprefix("difference:")
    metric = SHORT_METRICS[metric] if metric == "uuas" else metric
    return metric if control == "none" else f"{metric} − {control}"


def _numbers(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}" if values else "no"
