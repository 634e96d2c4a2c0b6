"""What a training run over one or more seeds gave: a view on its folder."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from spafit import io
from spafit.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRIC_COLUMNS = ("seed", "step", "epoch", "split", "metric", "value")
RUN_COLUMNS = (
    "task", "method", "seed", "split", "metric", "value", "learning_rate", "epochs", "train_items", "trainable",
    "total", "steps", "seconds", "peak_memory_bytes", "saved_bytes",
)  # fmt: skip
INTERPOLATION_COLUMNS = ("seed", "share", "split", "metric", "value")
SIGNAL_COLUMNS = ("seed", "step", "epoch", "signal", "hidden", "value")
SCHEDULE_COLUMNS = ("seed", "step", "epoch", "rule", "what", "before", "after", "reason", "label")


@dataclass(frozen=True)
class FitResult:
    """A view on a training folder.

    Attributes:
        folder: holds ``run.json``, ``metrics`` and ``runs`` (parquet and CSV), and one folder per seed with ``model/``.
        run: content of ``run.json``.
        metrics: learning curves; columns :data:`METRIC_COLUMNS`. ``split`` is ``train`` (running loss), ``select``
            (held-out share of the training items) or a reported split.
        runs: one row per seed, reported split and metric; columns :data:`RUN_COLUMNS`.
        interpolation: scores between start (share 0) and trained weights (share 1), where asked for; columns
            :data:`INTERPOLATION_COLUMNS`. ``select`` is the held-out share of the training items: choose a share by
            that one, since the reported splits would otherwise be selected on.
        signals: what was measured while training (:mod:`spafit.signals`), where asked for; columns
            :data:`SIGNAL_COLUMNS`. ``hidden`` is missing for what belongs to no hidden state.
        schedule: what a schedule changed (:mod:`spafit.scheduling`), a row per change and kind of thing; columns
            :data:`SCHEDULE_COLUMNS`: after how many steps, by which rule, from what to what, and why.
    """

    folder: Path
    run: dict[str, Any]
    metrics: pd.DataFrame
    runs: pd.DataFrame
    interpolation: pd.DataFrame | None = None
    signals: pd.DataFrame | None = None
    schedule: pd.DataFrame | None = None

    @classmethod
    def load(cls, folder: str | Path) -> FitResult:
        """Read what training wrote.

        Raises:
            DataError: the folder holds no finished training.
        """
        folder = Path(folder)
        if not (folder / "runs.parquet").is_file():
            raise DataError(f"{folder} holds no finished training (no runs.parquet). Run spafit train with this --out.")
        run = io.read_json(folder / "run.json")
        return cls(
            folder, run, io.read_table(folder / "metrics"), io.read_table(folder / "runs"),
            table_if_there(folder / "interpolation"), table_if_there(folder / "signals"),
            table_if_there(folder / "schedule"),
        )  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write the tables and ``run.json`` (not the models) into ``folder``."""
        folder = Path(folder)
        io.write_table(folder / "metrics", self.metrics)
        io.write_table(folder / "runs", self.runs)
        more = {"interpolation": self.interpolation, "signals": self.signals, "schedule": self.schedule}
        for name, table in more.items():
            if table is not None:
                io.write_table(folder / name, table)
            else:  # of an earlier training in this folder
                for extension in ("parquet", "csv"):
                    (folder / f"{name}.{extension}").unlink(missing_ok=True)
        io.write_json(folder / "run.json", self.run)
        return folder

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the runs."""
        return tuple(int(s) for s in self.runs["seed"].unique())

    def model_folder(self, seed: int | None = None) -> Path:
        """Folder of one seed's saved model; the first seed's by default."""
        return self.folder / f"seed-{self.seeds[0] if seed is None else seed}" / "model"

    def to_pandas(self) -> pd.DataFrame:
        """Scores over seeds: task, method, split, metric, mean, sd (NaN for one value), seeds, defined.

        Mean and standard deviation are over the ``defined`` values among those of ``seeds`` runs; a constant
        prediction's correlation, for instance, is undefined.
        """
        grouped = self.runs.groupby(["task", "method", "split", "metric"], sort=False)["value"]
        return grouped.agg(mean="mean", sd="std", seeds="size", defined="count").reset_index()

    def to_markdown(self) -> str:
        """The table of a paper: one row per split and metric, mean ± sd over seeds, with parameters and cost.

        Where some seeds' values are undefined, the score is of the others and says how many they are.
        """
        first = self.runs.drop_duplicates("seed")
        lines = [
            "| task | method | split | metric | score | trained | seconds | peak memory |",
            "|---|---|---|---|---|---|---|---|",
        ]
        trained = (
            f"{int(first['trainable'].iloc[0]):,} ({100 * first['trainable'].iloc[0] / first['total'].iloc[0]:.2f} %)"
        )
        table = self.to_pandas()
        names = [m for m in table["metric"].unique() if m != "headline"]
        if len(names) == 1:  # the headline repeats it
            table = table[table["metric"] != "headline"]
        for row in table.to_dict("records"):
            metric = _metric(row["metric"], names)
            lines.append(
                f"| {row['task']} | {row['method']} | {row['split']} | {metric} | {_score(row)} | {trained} | "
                f"{first['seconds'].mean():.0f} | {first['peak_memory_bytes'].max() / 1e9:.2f} GB |"
            )
        return "\n".join(lines)

    def interpolation_to_markdown(self) -> str:
        """Headline by share of the way from start to trained, mean ± sd over seeds; a column per split.

        Raises:
            DataError: nothing was interpolated.
        """
        if self.interpolation is None:
            raise DataError("This run scored no interpolations. Train with the setting interpolate.")
        rows = self.interpolation[self.interpolation["metric"] == "headline"]
        table = rows.groupby(["share", "split"], sort=False)["value"].agg(["mean", "std"])
        splits = list(rows["split"].unique())
        lines = [
            "| share of the training | " + " | ".join("held out" if s == "select" else str(s) for s in splits) + " |",
            "|---" * (1 + len(splits)) + "|",
        ]
        for share in rows["share"].unique():
            cells = [table.loc[(share, s)] for s in splits]
            shown = [f"{c['mean']:.3f}" + (f" ± {c['std']:.3f}" if len(self.seeds) > 1 else "") for c in cells]
            lines.append(f"| {share:g} | " + " | ".join(shown) + " |")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Learning curves: training loss by step, and the score on held-out training items; a line per seed.

        A vertical line marks what a schedule changed, in its seed's colour where there are several.
        """
        import seaborn as sns
        from matplotlib.ticker import MaxNLocator

        from spafit.plotting import new_figure

        if ax is None:
            ax = new_figure(width=6.4, height=3.6).add_subplot()
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        loss = self.metrics[(self.metrics["split"] == "train") & (self.metrics["metric"] == "loss")]
        for n, (_, rows) in enumerate(loss.groupby("seed")):
            label = "training loss" if n == 0 else None
            ax.plot(rows["step"], rows["value"], ".-", color="#555555", linewidth=1, markersize=2, label=label)
        ax.set_xlabel("step")
        ax.set_ylabel("training loss")
        scored = self.metrics[(self.metrics["metric"] == "headline") & (self.metrics["split"] == "select")]
        if len(scored):
            other = ax.twinx()
            colours = sns.color_palette("colorblind", len(self.seeds))
            for colour, (seed, rows) in zip(colours, scored.groupby("seed"), strict=False):
                label = f"seed {seed}, held-out training items"
                other.plot(rows["step"], rows["value"], "o-", color=colour, linewidth=1.2, markersize=3, label=label)
            names = [m for m in self.runs["metric"].unique() if m != "headline"]
            other.set_ylabel(f"mean of {' and '.join(names)}" if len(names) > 1 else names[0])
        if self.schedule is not None:
            self._mark_changes(ax)
        lines = [line for axes in ax.get_figure(root=True).axes for line in axes.get_lines()]  # type: ignore[union-attr]
        named = [line for line in lines if not str(line.get_label()).startswith("_")]
        if named:  # a run shorter than the logging interval has no rows of training loss
            ax.legend(handles=named, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
        ax.set_title(f"{self.run['task']}, {self.run['method']}")
        return ax

    def _mark_changes(self, ax: Axes) -> None:
        """Vertical lines with short labels at the steps at which the schedule changed something."""
        import seaborn as sns

        assert self.schedule is not None
        colours = sns.color_palette("colorblind", len(self.seeds))
        several = len(self.seeds) > 1
        for i, seed in enumerate(self.seeds):
            own = self.schedule[self.schedule["seed"] == seed]
            for step in own["step"].unique():
                colour = colours[i] if several else "#555555"
                label = ", ".join(dict.fromkeys(own.loc[own["step"] == step, "label"]))
                ax.axvline(step, color=colour, linewidth=0.8, linestyle=":")
                ax.text(
                    step, 0.98 - 0.3 * (i % 3), label, rotation=90, fontsize=6, color=colour, va="top", ha="center",
                    transform=ax.get_xaxis_transform(),
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
                )  # fmt: skip

    def __repr__(self) -> str:
        return f"FitResult({str(self.folder)!r}, {len(self.seeds)} seeds)\n{self.to_markdown()}"

    def _repr_html_(self) -> str:
        return str(self.to_pandas().round(4).to_html(index=False))


def table_if_there(stem: Path) -> pd.DataFrame | None:
    """A table that not every run has, or None."""
    return io.read_table(stem) if stem.with_name(f"{stem.name}.parquet").is_file() else None


def _metric(name: Hashable, names: Sequence[str]) -> str:
    if name == "headline" and "bits_per_token" in names:
        return "headline: minus bits_per_token"
    if name == "headline" and "text_recall@1" in names:
        return "headline: mean of text_recall@1 and image_recall@1"
    return f"headline: mean of {' and '.join(names)}" if name == "headline" else str(name)


def _score(row: Mapping[Hashable, Any]) -> str:
    seeds = f"{row['seeds']} seed{'s' * (row['seeds'] != 1)}"
    count = seeds if row["defined"] == row["seeds"] else f"defined for {row['defined']} of {seeds}"
    if not row["defined"]:
        return f"undefined ({count})"
    spread = f" ± {row['sd']:.3f}" if row["defined"] > 1 else ""
    return f"{row['mean']:.3f}{spread} ({count})"
