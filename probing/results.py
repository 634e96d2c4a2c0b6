"""Results of a probing run: a view on the files of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from probing.curves import LayerCurve
from probing.metrics import shown_metric
from probing.tree_fitting import is_tree_items, tree_curve
from probing.tree_scores import METRICS
from spafit import io
from spafit.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ITEM_KEY = ("stack", "site", "pooling", "probe")


@dataclass(frozen=True)
class ProbeResults:
    """What a probing run found.

    Attributes:
        run: content of ``run.json``: command, configuration, model, versions, seconds, status per task.
        scores: tidy scores, columns as in :data:`probing.scoring.SCORE_COLUMNS`.
        summaries: tidy layer summaries (task, level, stack, site, pooling, probe, control, metric, statistic, value,
            ci_low, ci_high, note).
        folder: where the files lie; None for results that were never written.
        item_tables: items of results that were never written, by task.
        measures: rows of the measures that were asked for (:mod:`probing.measures`), columns as ``scores``; ``probe``
            names the measure. None without any.
        only: stack that the items are restricted to (:meth:`of_stack`); None is all.
    """

    run: dict[str, Any]
    scores: pd.DataFrame
    summaries: pd.DataFrame
    folder: Path | None = None
    item_tables: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)
    measures: pd.DataFrame | None = field(default=None, repr=False)
    only: str | None = None

    def __repr__(self) -> str:
        """Folder, tasks and status; the tables are in the attributes."""
        where = "not saved" if self.folder is None else repr(str(self.folder))
        return f"ProbeResults({where}, {len(self.tasks)} task(s), status={self.run.get('status', 'unknown')!r})"

    @classmethod
    def load(cls, folder: str | Path) -> ProbeResults:
        """Read the folder that ``spafit-probe`` or :func:`probing.probe_layers` wrote.

        Raises:
            DataError: the folder is not a probing run, or a newer version of this package wrote it.
        """
        folder = Path(folder)
        if not (folder / "run.json").exists() or not (folder / "scores.parquet").exists():
            raise DataError(
                f"{folder} holds no finished probing run (run.json and scores.parquet). Give a run's folder."
            )
        run = io.read_json(folder / "run.json")
        if run.get("schema_version", 0) > io.SCHEMA_VERSION:
            raise DataError(
                f"{folder} was written with schema version {run['schema_version']}, this package reads up to "
                f"{io.SCHEMA_VERSION}. Upgrade spafit."
            )
        measures = io.read_table(folder / "measures") if (folder / "measures.parquet").exists() else None
        return cls(
            run, io.read_table(folder / "scores"), io.read_table(folder / "summaries"), folder, measures=measures
        )

    def save(self, folder: str | Path) -> Path:
        """Write run.json, the tables and the items into ``folder``; return it."""
        folder = Path(folder)
        io.write_json(folder / "run.json", self.run)
        io.write_table(folder / "scores", self.scores)
        io.write_table(folder / "summaries", self.summaries)
        if self.measures is not None:
            io.write_table(folder / "measures", self.measures)
        for task in self.tasks:
            io.write_table(folder / "items" / task, self.items(task), csv=False)
            for measure in self._measured(task):
                io.write_table(folder / "items" / f"{task}.{measure}", self.measure_items(task, measure), csv=False)
        return folder

    def _measured(self, task: str) -> list[Literal["conditional", "mix"]]:
        """Measures of a task that have pointwise values."""
        return [
            m for m in ("conditional", "mix") if self.folder and (self.folder / f"items/{task}.{m}.parquet").exists()
        ]

    def measure_items(self, task: str, measure: Literal["conditional", "mix"]) -> pd.DataFrame:
        """Pointwise values of a measure: one row per test item, hidden state, control and seed, in the column ``bits``.

        ``conditional`` has them for each ``metric``, bits beyond the first hidden state or beyond the one below.

        Raises:
            UsageError: the run has no such measure of this task.
        """
        if measure not in self._measured(task):
            raise UsageError(f"There are no items of {measure!r} for task {task!r}. Run it with --measures {measure}.")
        assert self.folder is not None
        items = io.read_table(self.folder / "items" / f"{task}.{measure}")
        return items if self.only is None else _only(items, self.only)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have scores, in the order of the run."""
        return tuple(dict.fromkeys(self.scores["task"]))

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks that were probed, in the order of the run."""
        return tuple(dict.fromkeys(self.scores["stack"].astype(str)))

    @property
    def tasks_with_bits(self) -> tuple[str, ...]:
        """:attr:`tasks` whose scores are bits per item, among others: all but trees."""
        return tuple(dict.fromkeys(self.scores.loc[self.scores["metric"] == "bits", "task"]))

    def items(self, task: str) -> pd.DataFrame:
        """One row per test item and (stack, site, hidden, pooling, probe, control, seed) (``scoring.item_table``)."""
        if task in self.item_tables:
            return self.item_tables[task]
        if task not in self.tasks:
            raise UsageError(f"No task {task!r} in these results.{did_you_mean(task, self.tasks)}")
        assert self.folder is not None
        items = io.read_table(self.folder / "items" / task)
        return items if self.only is None else _only(items, self.only)

    def of_stack(self, stack: str) -> ProbeResults:
        """The results of one stack alone, as if it alone had been probed; the files stay those of the whole run.

        Raises:
            UsageError: that stack was not probed.
        """
        if stack not in self.stacks:
            raise UsageError(f"No stack {stack!r} in these results.{did_you_mean(stack, self.stacks)}")
        if self.stacks == (stack,):
            return self
        model = self.run["model"]
        own = {k: v for k, v in model["probed"][stack].items() if k in model}
        tables = {t: items[items["stack"] == stack] for t, items in self.item_tables.items()}
        return replace(
            self, run={**self.run, "model": {**model, **own, "stack": stack}},
            scores=_only(self.scores, stack), summaries=_only(self.summaries, stack), item_tables=tables,
            measures=None if self.measures is None else _only(self.measures, stack), only=stack,
        )  # fmt: skip

    def primary_split(self, task: str) -> str:
        """The test split that summaries and the verdict use: ``test``, or ``seen`` where word types are split."""
        splits = set(self.scores.loc[self.scores["task"] == task, "split"])
        return next((s for s in ("test", "seen") if s in splits), sorted(splits)[0])

    def curve(
        self,
        task: str,
        *,
        adjusted_by: str | None = "random-encoder",
        metric: str = "bits",
        split: str | None = None,
        stack: str | None = None,
        site: str = "block",
        pooling: str | None = None,
        probe: str | None = None,
        n_boot: int = 1000,
    ) -> LayerCurve:
        """Bits saved per item (or accuracy) at each hidden state of one task, with replicates (clusters × seeds).

        Args:
            task: name of a task in these results.
            adjusted_by: control whose bits are subtracted item by item at each hidden state; None subtracts nothing.
                Where the run has no such control nothing is subtracted and the curve says ``none``.
            metric: ``bits`` saved per item, or ``accuracy``; for tasks of trees one of
                :data:`probing.tree_scores.METRICS`.
            split: test split; the primary one by default.
            stack: stack, where there are several; the first by default.
            site: site of the states.
            pooling: pooling, where there are several; the first by default.
            probe: probe family, where there are several; the first by default.
            n_boot: bootstrap replicates.
        """
        from spafit.stats import BootstrapDraw

        items = self.items(task)
        trees = is_tree_items(items)
        known = METRICS if trees else ("bits", "accuracy")
        if metric not in known:
            raise UsageError(f"Task {task!r} has no metric {metric!r}. Use {', '.join(known)}.")
        if metric == "accuracy" and pd.api.types.is_float_dtype(items["label"]):
            raise UsageError(f"Task {task!r} has numbers, which have no accuracy. Use metric='bits'.")
        split = split or self.primary_split(task)
        wanted = {"stack": stack, "site": site, "pooling": pooling, "probe": probe}
        keep = (items["split"] == split).to_numpy()
        for column, value in wanted.items():
            keep = keep & (items[column] == (value if value is not None else items[column].iloc[0])).to_numpy()
        items = items[keep]
        if items.empty:
            raise UsageError(
                f"Task {task!r} has no items at split {split!r}, stack {stack!r}, site {site!r}, pooling {pooling!r}."
            )
        level = self.scores.loc[self.scores["task"] == task, "level"].iloc[0]
        if trees:
            return tree_curve(items, task=task, level=level, metric=metric, adjusted_by=adjusted_by, n_boot=n_boot)
        own = _values(items, "none", metric)
        has_control = adjusted_by is not None and (items["control"] == adjusted_by).any()
        other = _values(items, adjusted_by, metric) if adjusted_by and has_control else None
        values = own if other is None else own - other
        first = items[(items["control"] == "none") & (items["seed"] == items["seed"].iloc[0])]
        hidden = np.sort(first["hidden"].unique())
        groups = first.loc[first["hidden"] == hidden[0], "group"].to_numpy().astype(str)
        draw = BootstrapDraw.make(groups, n_seeds=len(values), n_boot=n_boot, seed=0)
        return LayerCurve(
            task,
            level,
            hidden,
            values.mean((0, 2)),
            draw.means(values),
            metric,
            adjusted_by if other is not None and adjusted_by else "none",
            values.shape[2],
            len(values),
        )

    def curves(
        self,
        tasks: Sequence[str] | None = None,
        *,
        adjusted_by: str | None = "random-encoder",
        stack: str | None = None,
        site: str | None = None,
        pooling: str | None = None,
        n_boot: int = 1000,
    ) -> list[LayerCurve]:
        """:meth:`curve` of every task (or those named), at the block site if the run has it, else at its first site.

        Of the stack named, or the first of :attr:`stacks`.

        Tasks of trees have no bits. They are left out beside others, and given in UUAS where named or alone.
        """
        sites = list(dict.fromkeys(self.scores["site"].astype(str)))
        site = site or ("block" if "block" in sites else sites[0])
        bits = self.tasks_with_bits
        return [
            self.curve(
                t, adjusted_by=adjusted_by, metric="bits" if t in bits else "uuas", stack=stack, site=site,
                pooling=pooling, n_boot=n_boot,
            )
            for t in tasks or bits or self.tasks
        ]  # fmt: skip

    def to_pandas(self) -> pd.DataFrame:
        """The score rows to report: means over seeds, with intervals that cross items with seeds."""
        return self.scores[self.scores["seed"].isna()].reset_index(drop=True)

    def to_markdown(self) -> str:
        """One line per task with interval, control gap and a sparkline over layers."""
        from probing.displays import markdown_table

        return markdown_table(self.scores, self.summaries)

    def plot(self, ax: Axes | None = None) -> Any:
        """Layer curves with bands, of all tasks; or of one-task results into ``ax``."""
        from probing.displays import layer_curves

        return layer_curves(self.scores, metric="primary", ax=ax)

    def _repr_html_(self) -> str:
        from probing.displays import html_table

        return html_table(self.scores, self.summaries)


def summary_table(results: ProbeResults, task: str, *, n_boot: int = 1000) -> pd.DataFrame:
    """Layer summaries of one task: of its accuracy (if it has classes), bits, and bits above the random encoder's.

    Of a task of trees: of each tree metric, and of UUAS above the random encoder's.

    Columns: task, level, stack, site, pooling, probe, control (what was subtracted), metric, statistic, value, ci_low,
    ci_high, note; statistics as in :func:`probing.summaries.summarize_curve`.
    """
    from probing.summaries import summarize_curve

    results = replace(results, item_tables={task: results.items(task)})  # read once for all curves
    scores = results.scores[results.scores["task"] == task]
    controls = set(scores["control"])
    shown = shown_metric(scores["metric"])
    main = "uuas" if shown == "uuas" else "bits"
    wanted = [(m, "none") for m in ({"accuracy": ["accuracy", "bits"], "uuas": METRICS}.get(shown, ["bits"]))]
    if "random-encoder" in controls:
        wanted.append((main, "random-encoder"))
    rows = []
    for stack, site, pooling, probe in scores[list(ITEM_KEY)].drop_duplicates().itertuples(index=False, name=None):
        for metric, control in wanted:
            curve = results.curve(
                task,
                adjusted_by=None if control == "none" else control,
                metric=metric,
                stack=stack,
                site=site,
                pooling=pooling,
                probe=probe,
                n_boot=n_boot,
            )
            rows += [
                {
                    "task": task,
                    "level": curve.level,
                    "stack": stack,
                    "site": site,
                    "pooling": pooling,
                    "probe": probe,
                    "control": control,
                    "metric": metric,
                    **asdict(row),
                }
                for row in summarize_curve(curve)
            ]
    return pd.DataFrame(rows)


def _only(table: pd.DataFrame, stack: str) -> pd.DataFrame:
    return table[table["stack"] == stack].reset_index(drop=True)


def _values(items: pd.DataFrame, control: str, metric: str) -> np.ndarray:
    """Bits (or hits) by (seed, hidden, item) of one control; the rows are stored in that order."""
    part = items[items["control"] == control]
    shape = (part["seed"].nunique(), part["hidden"].nunique(), -1)
    if metric == "bits":
        return part["bits"].to_numpy(np.float64).reshape(shape)
    right = part["prediction"].to_numpy(object) == part["label"].to_numpy(object)
    return right.astype(np.float64).reshape(shape)
