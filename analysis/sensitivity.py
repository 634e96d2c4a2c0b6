"""How much a task's layers move when one choice of the probing run changes: pooling, probe, seed, training items.

One axis at a time: every setting differs from the base (the first pooling and probe of the first run, all its seeds) in
one choice only. What moves are layer summaries of the task's curve, so a shift is a number of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit import io
from spafit.errors import DataError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probing.results import ProbeResults

AXES = ("pooling", "probe", "seed", "training items")
#: Summaries that are followed; ``best`` is shown but decides nothing: on a flat curve it is noise.
STATISTICS = ("best", "first_within_1se", "emergence_cog")
DECIDING = ("first_within_1se", "emergence_cog")
#: A task is unstable if a deciding summary moves by more than this share of the blocks along some axis.
UNSTABLE = 1 / 3
#: Columns of :attr:`Sensitivity.table`.
COLUMNS = (
    "task", "level", "axis", "setting", "base", "statistic", "value", "ci_low", "ci_high", "shift", "share", "note"
)  # fmt: skip


@dataclass(frozen=True)
class Sensitivity:
    """Layer summaries of each task under each setting.

    Do not read a small shift as precision: only the axes that were varied are in it, and settings that share the test
    items share their noise.

    Attributes:
        table: one row per task, axis, setting and statistic, with the columns of :data:`COLUMNS`: ``base`` marks the
            settings that are compared against, ``shift`` is the value minus the base's in hidden states, ``share`` its
            size as a share of the blocks; both are missing where either value is suppressed.
        blocks: number of blocks.
    """

    table: pd.DataFrame = field(repr=False)
    blocks: int

    @property
    def unstable(self) -> dict[str, str]:
        """Tasks with a deciding summary that moves by more than a third of the depth, with what moved it most."""
        rows = self.table[self.table["statistic"].isin(DECIDING) & (self.table["share"] > UNSTABLE)]
        found = {}
        for task, own in rows.groupby("task", sort=False):
            worst = own.iloc[int(own["share"].to_numpy().argmax())]
            base = float(worst["value"]) - float(worst["shift"])
            found[str(task)] = (
                f"{_WORDS[str(worst['statistic'])]} moves from hidden {base:.1f} to {float(worst['value']):.1f} with "
                f"{worst['axis']} {worst['setting']}"
            )
        return found

    def summary(self) -> pd.DataFrame:
        """Largest shift of each task along each axis.

        Columns: task, level, axis, settings (how many beside the base), one column per statistic with the largest
        absolute shift in hidden states (missing where nothing can be compared), ``unstable``.
        """
        rows = []
        for (task, axis), own in self.table.groupby(["task", "axis"], sort=False):
            other = own[~own["base"]]
            moved = {s: _largest(other.loc[other["statistic"] == s, "shift"]) for s in STATISTICS}
            deciding = [abs(moved[s]) for s in DECIDING if np.isfinite(moved[s])]
            rows.append(
                {
                    "task": task, "level": own["level"].iloc[0], "axis": axis, "settings": other["setting"].nunique(),
                    **moved, "unstable": bool(deciding and max(deciding) > UNSTABLE * self.blocks),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """The summary as a Markdown table, and which tasks are unstable."""
        table = self.summary()
        head = ["task", "axis", "settings", *(_WORDS[s] for s in STATISTICS)]
        lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
        for row in table.to_dict("records"):
            cells = [row["task"], row["axis"], str(row["settings"])]
            cells += ["—" if not np.isfinite(row[s]) else f"{row[s]:+.1f}" for s in STATISTICS]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            "",
            f"Largest shift against the base, in hidden states of {self.blocks} blocks; — where either is suppressed. "
            f"Unstable: the first within one standard error or the centre of gravity moves by more than a third of the "
            f"depth ({UNSTABLE * self.blocks:.1f}).",
            "",
        ]
        lines += [f"- {task} is unstable: {why}." for task, why in self.unstable.items()]
        if not self.unstable:
            lines.append("- No task is unstable along the axes that were varied.")
        return "\n".join(lines) + "\n"

    def plot(self) -> Figure:
        """Where each task's layer lies under every setting, a panel per axis."""
        return _figure(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``sensitivity.parquet``, ``.csv``, ``.md`` and ``figures/sensitivity.png``; return the paths."""
        from spafit import plotting

        folder = Path(folder)
        io.write_table(folder / "sensitivity", self.table)
        io.write_json(folder / "sensitivity.json", {"blocks": self.blocks, "unstable": self.unstable})
        io.write_text(folder / "sensitivity.md", "# Sensitivity of layers\n\n" + self.to_markdown())
        picture = plotting.save_figure(self.plot(), folder / "figures" / "sensitivity.png")
        return [*(folder / f"sensitivity.{end}" for end in ("md", "csv", "parquet", "json")), picture]


_WORDS = {"best": "best", "first_within_1se": "first within 1 SE", "emergence_cog": "emergence CoG"}


def _largest(shifts: pd.Series) -> float:
    known = shifts.dropna().to_numpy(dtype=np.float64)
    return float(known[np.abs(known).argmax()]) if len(known) else float("nan")


def unstable_tasks(folder: Path) -> dict[str, str]:
    """Tasks that a run's folder says are unstable; none where no sensitivity was measured."""
    path = folder / "sensitivity.json"
    return dict(io.read_json(path)["unstable"]) if path.exists() else {}


def sensitivity(results: ProbeResults | Sequence[ProbeResults], *, n_boot: int = 1000) -> Sensitivity:
    """Follow each task's layer summaries over poolings, probes and seeds of a run, and over further runs.

    The base is the first run, with its first pooling and probe and all seeds, on bits saved beyond the random encoder
    where the run has one (UUAS for trees). Further runs of the same model and tasks add poolings, probes and numbers of
    training items; each may differ from the first run in these alone.

    Args:
        results: one run or several, the base first.
        n_boot: bootstrap replicates.

    Raises:
        DataError: runs of different models or depths.
        UsageError: nothing varies: one pooling, probe and seed, and no other number of training items.
    """
    runs = [results] if not isinstance(results, Sequence) else list(results)
    base, blocks = runs[0], int(runs[0].run["model"]["blocks"])
    check_one_stack(base)
    for other in runs[1:]:
        _check_same_model(base, other)
    rows: list[dict[str, Any]] = []
    for task in base.tasks:
        site, pooling, probe = _base_place(base, task)
        curve_of = _Curves(task, site, n_boot)
        own = curve_of.summaries(base, pooling, probe)
        size = _training_items(base, task)
        settings: dict[str, list[tuple[str, dict[str, Any]]]] = {axis: [] for axis in AXES}
        for run in runs:
            if task not in run.tasks:
                continue
            found = run.scores[(run.scores["task"] == task) & (run.scores["site"] == site)]
            same_size = _training_items(run, task) == size
            for axis, column, fixed in (("pooling", "pooling", probe), ("probe", "probe", pooling)):
                held = "probe" if column == "pooling" else "pooling"
                names = found.loc[found[held] == fixed, column].astype(str).unique()
                for name in names if same_size else ():
                    if name not in (pooling, probe) and name not in [s for s, _ in settings[axis]]:
                        pair = (name, probe) if axis == "pooling" else (pooling, name)
                        settings[axis].append((name, curve_of.summaries(run, *pair)))
            here = found[(found["pooling"] == pooling) & (found["probe"] == probe)]
            if not same_size and len(here):
                name = f"{_training_items(run, task):,}"
                settings["training items"].append((name, curve_of.summaries(run, pooling, probe)))
        settings["seed"] = list(curve_of.seeds(base, pooling, probe))
        shown = {"pooling": pooling, "probe": probe, "seed": "all", "training items": f"{size:,}"}
        level = str(base.scores.loc[base.scores["task"] == task, "level"].iloc[0])
        for axis in AXES:
            if not settings[axis]:
                continue
            for name, moved, is_base in ((shown[axis], own, True), *((n, s, False) for n, s in settings[axis])):
                rows += _rows(task, level, axis, name, moved, own, is_base, blocks)
    if not rows:
        raise UsageError(
            "Nothing varies in this run: one pooling, one probe, one seed. Add some, as in --pooling mean,first, "
            "--probe linear,mlp:64, --seeds 3, or --train-sizes 500."
        )
    return Sensitivity(pd.DataFrame(rows, columns=list(COLUMNS)), blocks)


def check_one_stack(base: ProbeResults) -> None:
    """Refuse a run of several stacks.

    Raises:
        UsageError: it is one.
    """
    if len(base.stacks) > 1:
        raise UsageError(
            f"{base.folder} is a run of the stacks {', '.join(base.stacks)}, and sensitivity is of one. Probe with one "
            "--stack."
        )


def _check_same_model(base: ProbeResults, other: ProbeResults) -> None:
    for key in ("weights_digest", "adapter_digest", "stack", "blocks"):
        one, two = (run.run["model"].get(key) for run in (base, other))
        if one != two:
            raise DataError(
                f"{other.folder} is a run of another model than {base.folder} ({key.replace('_', ' ')} differs). "
                "Sensitivity is of one model; give runs of it."
            )


def _base_place(results: ProbeResults, task: str) -> tuple[str, str, str]:
    """Site, pooling and probe of the task's first rows, at the block site if there is one."""
    found = results.scores[results.scores["task"] == task]
    at_block = found[found["site"] == "block"]
    row = (at_block if len(at_block) else found).iloc[0]
    return str(row["site"]), str(row["pooling"]), str(row["probe"])


def _training_items(results: ProbeResults, task: str) -> int:
    return int(results.scores.loc[results.scores["task"] == task, "n_train"].max())


@dataclass(frozen=True)
class _Curves:
    """Summaries of one task's curves at one site."""

    task: str
    site: str
    n_boot: int

    def summaries(self, results: ProbeResults, pooling: str, probe: str) -> dict[str, Any]:
        """Rows of :func:`probing.summaries.summarize_curve` by statistic."""
        from probing.summaries import summarize_curve

        curve = results.curve(
            self.task, adjusted_by="random-encoder", metric=_metric(results, self.task), site=self.site,
            pooling=pooling, probe=probe, n_boot=self.n_boot,
        )  # fmt: skip
        return {row.statistic: row for row in summarize_curve(curve)}

    def seeds(self, results: ProbeResults, pooling: str, probe: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The same for each seed alone. Where all seeds share one fit, only the random encoder changes."""
        items = results.items(self.task)
        seeds = sorted(int(s) for s in items["seed"].unique())
        if len(seeds) < 2:
            return
        single = items.loc[items["control"] == "none", "seed"].nunique() == 1
        for seed in seeds:
            kept = items[(items["seed"] == seed) | (single & (items["control"] == "none")).astype(bool)]
            one = replace(results, item_tables={self.task: kept})
            yield str(seed), self.summaries(one, pooling, probe)


def _metric(results: ProbeResults, task: str) -> str:
    return "bits" if task in results.tasks_with_bits else "uuas"


def _rows(
    task: str, level: str, axis: str, setting: str, found: dict[str, Any], own: dict[str, Any], base: bool, blocks: int
) -> Iterator[dict[str, Any]]:
    for statistic in STATISTICS:
        row = found[statistic]
        shift = row.value - own[statistic].value
        yield {
            "task": task, "level": level, "axis": axis, "setting": setting, "base": base, "statistic": statistic,
            "value": row.value, "ci_low": row.ci_low, "ci_high": row.ci_high, "shift": shift,
            "share": abs(shift) / blocks, "note": row.note,
        }  # fmt: skip


# ---------------------------------------------------------------- figure

#: Settings in one line of a panel's legend.
_PER_LINE = 3


def _figure(found: Sensitivity) -> Figure:
    """A panel per axis, a row per task: the centre of gravity (or first within 1 SE) of the base and every setting."""
    from spafit import plotting

    axes_there = [a for a in AXES if (found.table["axis"] == a).any()]
    tasks = list(dict.fromkeys(found.table["task"]))
    unstable, lines = found.unstable, 1
    with plotting.style():
        figure = plotting.new_figure(width=max(3.1 * len(axes_there) + 1.5, 6.0), height=0.3 * len(tasks) + 2.0)
        panels = figure.subplots(1, len(axes_there), squeeze=False, sharey=True, sharex=True)[0]
        for panel, axis in zip(panels, axes_there, strict=True):
            own = found.table[found.table["axis"] == axis]
            settings = list(dict.fromkeys(own.loc[~own["base"], "setting"]))
            for place, task in enumerate(tasks):
                rows = own[own["task"] == task]
                statistic = "emergence_cog"
                if rows[(rows["statistic"] == statistic)]["value"].isna().any() or rows.empty:
                    statistic = "first_within_1se"
                rows = rows[rows["statistic"] == statistic]
                for row in rows.to_dict("records"):
                    color = plotting.INK if row["base"] else _color(settings.index(row["setting"]))
                    filled = statistic == "emergence_cog"
                    panel.plot(
                        row["value"], place, marker="|" if row["base"] else "o", markersize=13 if row["base"] else 5,
                        markeredgewidth=2 if row["base"] else 1.2, color=color, linestyle="",
                        markerfacecolor=color if filled else plotting.PAPER, zorder=3 if row["base"] else 4,
                    )  # fmt: skip
            base = own.loc[own["base"], "setting"].iloc[0]
            panel.set_title(f"{axis} (base: {base})", loc="left", fontsize=9)
            panel.set_xlim(-0.3, found.blocks + 0.3)
            panel.set_xticks(plotting.hidden_ticks(0, found.blocks))
            panel.set_xlabel("hidden state")
            handles = [_handle(s, _color(i)) for i, s in enumerate(settings)]
            panel.legend(handles=handles, loc="lower center", fontsize=7.5, ncols=_PER_LINE, frameon=False)
            lines = max(lines, -(-len(handles) // _PER_LINE))
        panels[0].set_yticks(range(len(tasks)), [t + (" (unstable)" if t in unstable else "") for t in tasks])
        panels[0].set_ylim(len(tasks) - 0.4 + 0.7 * lines, -0.5)  # the legends stand below the tasks
        figure.suptitle(
            "Emergence centre of gravity under each setting (open: first within 1 SE, where it is suppressed)",
            x=0.01, ha="left", fontsize=9.5,
        )  # fmt: skip
    return plotting.freeze_layout(figure)


def _color(position: int) -> str:
    from spafit import plotting

    return plotting.MODEL_COLORS[position % len(plotting.MODEL_COLORS)]


def _handle(label: str, color: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, marker="o", markersize=5, linestyle="", label=label)
