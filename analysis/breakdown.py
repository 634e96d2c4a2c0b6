"""Where does it hold? Layer curves of a run split by a column of its items, such as genre, length or distance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probing.tasks.conllu import equal_bins
from probing.tree_fitting import SENTENCE_COLUMNS
from spafit import io
from spafit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probing.curves import LayerCurve
    from probing.results import ProbeResults

#: Columns of items that a run writes itself; every other one is metadata.
OWN_COLUMNS = {
    "item", "group", "text", "target", "split", "label", "stack", "site", "hidden", "pooling", "probe", "control",
    "seed", "prediction", "bits", *SENTENCE_COLUMNS,
}  # fmt: skip
#: Parts with fewer test items are left out, and numbers with more values than this are binned.
LEAST_ITEMS, MOST_VALUES, BINS = 50, 8, 4
#: Columns of :attr:`Breakdown.curves`.
CURVE_COLUMNS = (
    "task", "level", "by", "part", "pooling", "probe", "metric", "adjusted_by", "hidden", "value", "ci_low", "ci_high",
    "n",
)  # fmt: skip


@dataclass(frozen=True)
class Breakdown:
    """Layer curves and summaries of every part.

    Parts are scored by the probes that were trained on all training items. A part is a subset of the test items, so
    curves of parts differ in their noise and in what is hard there: compare where they rise, and their summaries, more
    than their heights.

    Attributes:
        curves: columns of :data:`CURVE_COLUMNS`; intervals resample clusters and seeds within the part.
        summaries: task, level, by, part, metric, adjusted_by, n, statistic, value, ci_low, ci_high, note.
        left_out: sentences on tasks without the column and parts with too few items.
    """

    curves: pd.DataFrame = field(repr=False)
    summaries: pd.DataFrame = field(repr=False)
    left_out: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """A line per task and part: items, best, first within one standard error, centre of gravity."""
        lines = ["| task | by | part | n | best | first within 1 SE | emergence CoG |", "|---|---|---|--:|--:|--:|--:|"]
        keys = ["task", "by", "part"]
        for key, own in self.summaries.groupby(keys, sort=False):
            found = own.set_index("statistic")
            cells = [_interval(found.loc[[s]].iloc[0]) for s in ("best", "first_within_1se", "emergence_cog")]
            lines.append(f"| {' | '.join(map(str, key))} | {int(own['n'].iloc[0]):,} | {' | '.join(cells)} |")
        notes = [f"- {note}" for note in self.left_out]
        return "\n".join([*lines, "", "Hidden states, with 95 % intervals; — where suppressed.", "", *notes]) + "\n"

    def plot(self) -> Figure:
        """Curves over hidden states, a panel per task and column, a line per part."""
        return _figure(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``breakdown.parquet``, ``breakdown_summaries.parquet`` (and .csv), ``.md`` and the figure."""
        from spafit import plotting

        folder = Path(folder)
        io.write_table(folder / "breakdown", self.curves)
        io.write_table(folder / "breakdown_summaries", self.summaries)
        io.write_text(folder / "breakdown.md", "# Where does it hold?\n\n" + self.to_markdown())
        picture = plotting.save_figure(self.plot(), folder / "figures" / "breakdown.png")
        names = ("breakdown.md", "breakdown.csv", "breakdown_summaries.csv")
        return [*(folder / name for name in names), picture]


def _interval(row: pd.Series) -> str:
    if not np.isfinite(row["value"]):
        return "—"
    return f"{row['value']:.1f} [{row['ci_low']:.1f} {row['ci_high']:.1f}]"


def breakdown(
    results: ProbeResults,
    by: str | Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    least_items: int = LEAST_ITEMS,
    n_boot: int = 1000,
) -> Breakdown:
    """Split each task's test items by metadata columns and give every part its layer curve.

    Scores are bits beyond the random encoder (UUAS for trees), of each task's first pooling and probe.

    Args:
        results: a run.
        by: columns of the items: metadata of the data (``genre``, ``distance`` in a treebank), or ``length``, the words
            of the text, which every task has. Numbers with more than eight values are cut into four parts of about
            equal size.
        tasks: of these tasks only.
        least_items: parts with fewer test items are left out.
        n_boot: bootstrap replicates.

    Raises:
        UsageError: no task has such a column, or no two of its parts have enough items; lists the columns there are.
    """
    from probing.summaries import summarize_curve

    columns = [by] if isinstance(by, str) else list(by)
    curves, summaries, left_out = [], [], []
    known: set[str] = set()
    for task in tasks or results.tasks:
        items = results.items(task)
        known |= {c for c in items.columns if c not in OWN_COLUMNS} | {"length"}
        for column in columns:
            values = _values(items, column)
            if values is None:
                left_out.append(f"{task} has no column {column!r}")
                continue
            for part, chosen in _parts(values):
                curve = _curve(results, task, items[chosen], n_boot, least_items)
                if curve is None:
                    left_out.append(f"{task}, {column} {part}: fewer than {least_items} test items")
                    continue
                place = {c: str(items[c].iloc[0]) for c in ("pooling", "probe")}
                shared = {
                    **place, "task": task, "level": curve.level, "by": column, "part": part, "metric": curve.metric,
                    "adjusted_by": curve.adjusted_by, "n": curve.n_items,
                }  # fmt: skip
                curves.append(_rows(curve, shared))
                summaries += [{**shared, **asdict(row)} for row in summarize_curve(curve)]
    if not summaries:
        wanted = ", ".join(columns)
        hint = did_you_mean(columns[0], known)
        reasons = f" {'; '.join(left_out[:3])}." if left_out else ""
        raise UsageError(
            f"Nothing can be split by {wanted}.{reasons} The items' columns are {', '.join(sorted(known))}.{hint}"
        )
    table = pd.concat(curves, ignore_index=True)[list(CURVE_COLUMNS)]
    return Breakdown(table, pd.DataFrame(summaries), tuple(left_out))


def part_curves(
    results: ProbeResults, column: str, *, least_items: int = LEAST_ITEMS, n_boot: int = 1000
) -> dict[str, list[LayerCurve]]:
    """Curves of every task with bits in each part of a column, parts in their order.

    Raises:
        UsageError: no task has such a column with two parts or more of enough items.
    """
    found: dict[str, list[LayerCurve]] = {}
    for task in results.tasks_with_bits:
        items = results.items(task)
        values = _values(items, column)
        for part, chosen in _parts(values) if values is not None else ():
            curve = _curve(results, task, items[chosen], n_boot, least_items)
            if curve is not None:
                found.setdefault(part, []).append(curve)
    if len(found) < 2:
        raise UsageError(
            f"No task of {results.folder} has two parts of {least_items} test items or more by {column!r}. "
            "spafit breakdown lists the columns that there are."
        )
    return found


def _values(items: pd.DataFrame, column: str) -> pd.Series | None:
    """The column of each row of items; None where the task has none."""
    if column in items.columns and column not in OWN_COLUMNS:
        found = items[column]
        return found if found.notna().any() else None
    if column == "length":
        texts = items["text"].astype("category").cat
        words = [sum(word != "⏐" for word in t.split()) for t in texts.categories]  # the mark between two texts is none
        return pd.Series(np.array(words)[texts.codes], index=items.index)
    return None


def _parts(values: pd.Series) -> Iterator[tuple[str, np.ndarray]]:
    """Name and rows of every part; rows without a value are in none."""
    plain = values.astype(values.cat.categories.dtype) if isinstance(values.dtype, pd.CategoricalDtype) else values
    numbers = pd.to_numeric(plain, errors="coerce")
    if numbers.notna().sum() == plain.notna().sum() and numbers.nunique() > MOST_VALUES:
        whole = numbers.dropna()
        if (whole == whole.round()).all() and whole.min() >= 1:
            low = 1
            for top, name in equal_bins(whole.astype(int).tolist(), BINS):
                yield name, ((numbers >= low) & (numbers <= top)).to_numpy()
                low = top + 1
            return
        edges = np.unique(np.quantile(whole, np.linspace(0, 1, BINS + 1)))
        for k, (a, b) in enumerate(itertools.pairwise(edges)):
            inside = (numbers >= a) & ((numbers <= b) if k == len(edges) - 2 else (numbers < b))
            yield f"{a:.3g} to {b:.3g}", inside.to_numpy()
        return
    for value in sorted(plain.dropna().unique(), key=lambda v: (isinstance(v, str), v)):
        yield str(value), (plain == value).to_numpy()


def _curve(
    results: ProbeResults, task: str, items: pd.DataFrame, n_boot: int, least_items: int
) -> LayerCurve | None:  # fmt: skip
    split = results.primary_split(task)
    if items.loc[items["split"] == split, "item"].nunique() < least_items:
        return None
    metric = "bits" if task in results.tasks_with_bits else "uuas"
    place = {c: str(items[c].iloc[0]) for c in ("site", "pooling", "probe")}
    one = replace(results, item_tables={task: items})
    return one.curve(task, metric=metric, n_boot=n_boot, **place)


def _rows(curve: LayerCurve, shared: dict[str, Any]) -> pd.DataFrame:
    from spafit.stats import interval

    low, high = interval(curve.replicates)
    columns = {"hidden": curve.hidden, "value": curve.values, "ci_low": low, "ci_high": high}
    return pd.DataFrame(columns).assign(**shared)


# ---------------------------------------------------------------- figure


def _figure(found: Breakdown) -> Figure:
    from spafit import plotting

    panels = list(dict.fromkeys(zip(found.curves["task"], found.curves["by"], strict=True)))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with plotting.style():
        figure = plotting.new_figure(width=max(3.9 * columns, 5.5), height=2.7 * lines + 0.5)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, (task, column) in zip(axes, panels, strict=False):
            own = found.curves[(found.curves["task"] == task) & (found.curves["by"] == column)]
            for i, (part, rows) in enumerate(own.groupby("part", sort=False)):
                color = plotting.MODEL_COLORS[i % len(plotting.MODEL_COLORS)]
                x = rows["hidden"].to_numpy()
                plotting.band(ax, x, rows["ci_low"].to_numpy(), rows["ci_high"].to_numpy(), color=color)
                label = f"{part} (n = {int(rows['n'].iloc[0]):,})"
                ax.plot(x, rows["value"], color=color, marker=".", markersize=4, label=label, zorder=3)
            ax.set_title(f"{task} by {column}", loc="left", fontsize=9)
            ax.set_xlabel("hidden state")
            control = own["adjusted_by"].iloc[0]
            words = plotting.METRIC_LABELS[str(own["metric"].iloc[0])]
            ax.set_ylabel(
                words if control == "none" else f"{words}\nbeyond the {control.replace('-', ' ')}", fontsize=8
            )
            ax.legend(fontsize=7, frameon=False)
        for ax in axes[len(panels) :]:
            ax.remove()
        figure.suptitle(f"Bands: {plotting.INTERVAL}, within each part", x=0.01, ha="left", fontsize=8)
    return plotting.freeze_layout(figure)
