"""What a comparison of models found: a view on its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from analysis.sequence import forgetting_matrix, sequence_summaries
from spafit import io
from spafit.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Columns before those of :data:`analysis.forgetting.COLUMNS` in the table ``forgetting``.
KEYS = ("model", "task", "level", "unit", "stack", "site", "pooling", "probe", "control", "split", "metric")
CONTROLS = ("word-type", "none")
TABLES = (
    "forgetting", "drift", "cka_map", "weights", "retention", "causal", "interaction", "erasure", "use", "sequence",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Forgetting, drift, retention, cause and use in one or more models against the one that they started from.

    Attributes:
        run: content of ``run.json``: command, models, tasks, what was and was not compared, versions, seconds.
        forgetting: columns :data:`KEYS`, then :data:`analysis.forgetting.COLUMNS`. ``control`` names what was
            subtracted: ``word-type``, the control task in the same reading, or ``none``.
        drift: ``model``, ``unit``, ``stack``, then :data:`analysis.drift.COLUMNS`; None without states.
        cka_map: like ``drift``, for every pair of hidden states.
        weights: ``model``, then :data:`analysis.weights.COLUMNS`; None where the weights were not to be had.
        retention: ``model``, then what :func:`analysis.retention.retention_table` gives; None without texts.
        causal: ``model``, then :data:`analysis.task_tables.CAUSAL_COLUMNS`; None without items of the trained task.
        interaction: ``model``, then :data:`analysis.task_tables.INTERACTION_COLUMNS`.
        erasure: ``model``, then :data:`analysis.task_tables.ERASURE_COLUMNS`; None where nothing was erased.
        use: ``model``, then :data:`analysis.attribution.COLUMNS`.
        sequence: columns of :data:`analysis.sequence.COLUMNS`; None where the models are no stages of one training.
        folder: where the files lie.
    """

    run: dict[str, Any]
    forgetting: pd.DataFrame
    drift: pd.DataFrame | None
    cka_map: pd.DataFrame | None
    weights: pd.DataFrame | None
    retention: pd.DataFrame | None
    causal: pd.DataFrame | None
    interaction: pd.DataFrame | None
    erasure: pd.DataFrame | None
    use: pd.DataFrame | None
    sequence: pd.DataFrame | None
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read the folder that ``spafit compare`` wrote.

        Raises:
            DataError: the folder holds no comparison, or a newer version of this package wrote it.
        """
        folder = Path(folder)
        if not (folder / "forgetting.parquet").is_file() or not (folder / "run.json").is_file():
            raise DataError(
                f"{folder} holds no comparison (no forgetting.parquet). Run spafit compare with this --out."
            )
        run = io.read_json(folder / "run.json")
        if run.get("schema_version", 0) > io.SCHEMA_VERSION:
            raise DataError(
                f"{folder} was written with schema version {run['schema_version']}, this package reads up to "
                f"{io.SCHEMA_VERSION}. Upgrade spafit."
            )
        tables = {n: io.read_table(folder / n) if (folder / f"{n}.parquet").is_file() else None for n in TABLES}
        return cls(run=run, folder=folder, **tables)  # type: ignore[arg-type]

    def save(self, folder: str | Path) -> Path:
        """Write the tables and ``run.json`` into ``folder``."""
        folder = Path(folder)
        for name in TABLES:
            table = getattr(self, name)
            if table is not None:
                io.write_table(folder / name, table)
        io.write_json(folder / "run.json", self.run)
        return folder

    @property
    def models(self) -> tuple[str, ...]:
        """Labels of the models after training."""
        return tuple(self.run["after"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that were compared."""
        return tuple(dict.fromkeys(self.forgetting["task"]))

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks that were compared."""
        return tuple(dict.fromkeys(self.forgetting["stack"].astype(str)))

    def of_stack(self, stack: str) -> Comparison:
        """The same with the tables of hidden states (forgetting, drift, CKA) of one stack alone.

        Raises:
            UsageError: that stack was not compared.
        """
        if stack not in self.stacks:
            raise UsageError(f"No stack {stack!r} was compared.{did_you_mean(stack, self.stacks)}")
        tables = {n: getattr(self, n) for n in ("forgetting", "drift", "cka_map")}
        own = {n: t[t["stack"] == stack].reset_index(drop=True) for n, t in tables.items() if t is not None}
        return replace(self, **own)

    @property
    def metric(self) -> Literal["accuracy", "bits"]:
        """What the page shows: accuracy, or bits where all tasks are tasks of numbers, which have no accuracy."""
        return "accuracy" if (self.forgetting["metric"] == "accuracy").any() else "bits"

    def to_pandas(
        self,
        *,
        metric: Literal["accuracy", "bits"] | None = None,
        control: Literal["word-type", "none"] = "word-type",
        split: str | None = None,
        probe: str | None = None,
    ) -> pd.DataFrame:
        """Rows of the table ``forgetting`` for one metric, and each task's first test split and probe unless named.

        With ``control="word-type"``, a task that has no control task gives its own scores.

        Args:
            metric: None is :attr:`metric`.
            control: what is subtracted.
            split: a test split.
            probe: a probe family.

        Raises:
            UsageError: an unknown metric or control, or no such rows: tasks of numbers are compared in bits alone.
        """
        metric = self.metric if metric is None else metric
        for name, value, allowed in (("metric", metric, ("accuracy", "bits")), ("control", control, CONTROLS)):
            if value not in allowed:
                hint = did_you_mean(value, allowed)
                raise UsageError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.{hint}")
        rows = self.forgetting[self.forgetting["metric"] == metric]
        for column, wanted in (("split", split), ("probe", probe)):
            first = rows.groupby("task")[column].transform("first")
            rows = rows[rows[column] == (first if wanted is None else wanted)]
        if rows.empty:
            raise UsageError(
                f"No task was compared in {metric}. Tasks of numbers are compared in bits: read the table forgetting, "
                "or ask for metric='bits'."
            )
        has = rows["task"].isin(rows.loc[rows["control"] == control, "task"])
        return rows[(rows["control"] == control) | ~has].reset_index(drop=True)

    def summary(self, *, metric: Literal["accuracy", "bits"] | None = None) -> pd.DataFrame:
        """Per model, task and stack, at the hidden state where the task could be read best before training.

        The hidden state is chosen by the task's own score before training alone, so that looking for a loss does not
        find one.

        Columns: model, task, level, stack, hidden; ``pre`` and ``recoverable``, the task's own score before and after;
        ``lost_alone``, their difference; then, less the control task where there is one, ``lost``, ``ci_low``,
        ``ci_high``, ``p_layers``, ``moved``, ``re_encoded``; ``worst`` and ``worst_hidden``, the largest loss of any
        hidden state.
        """
        alone = self.to_pandas(metric=metric, control="none")
        rows = []
        keys = ["model", "task", "stack"]
        for (model, task, stack), own in self.to_pandas(metric=metric).groupby(keys, sort=False, observed=True):
            its = alone[(alone["model"] == model) & (alone["task"] == task) & (alone["stack"] == stack)]
            plain, wide = (
                t.pivot_table(index="hidden", columns="term", values="value", sort=False, dropna=False)
                for t in (its, own)
            )
            hidden = wide.index.to_numpy()
            best = int(hidden[np.nanargmax(plain["pre"].to_numpy())])
            worst = int(hidden[np.nanargmax(wide["lost"].to_numpy())])
            lost = own[(own["term"] == "lost") & (own["hidden"] == best)].iloc[0]
            rows.append(
                {
                    "model": model, "task": task, "level": own["level"].iloc[0], "stack": str(stack), "hidden": best,
                    "pre": plain.loc[best, "pre"], "recoverable": plain.loc[best, "recoverable"],
                    "lost_alone": plain.loc[best, "lost"], "lost": lost["value"], "ci_low": lost["ci_low"],
                    "ci_high": lost["ci_high"], "p_layers": lost["p_layers"], "moved": wide.loc[best, "moved"],
                    "re_encoded": wide.loc[best, "re-encoded"], "worst": wide.loc[worst, "lost"], "worst_hidden": worst,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def to_markdown(self, *, metric: Literal["accuracy", "bits"] | None = None) -> str:
        """:meth:`summary` as a table that pastes; differences are in points of accuracy, or bits."""
        metric = self.metric if metric is None else metric
        unit, factor, digits = ("points", 100.0, 1) if metric == "accuracy" else ("bits", 1.0, 3)
        several = len(self.stacks) > 1
        lines = [
            f"| model | task |{' stack |' * several} at | before | after | lost ({unit}) | moved | re-encoded | "
            "largest loss |",
            f"|---|---|{'---|' * several}--:|--:|--:|---|--:|--:|--:|",
        ]

        def number(value: float) -> str:
            return "–" if pd.isna(value) else f"{factor * value:+.{digits}f}"

        for row in self.summary(metric=metric).to_dict("records"):
            mark = "*" if row["p_layers"] < 0.05 else ""
            task = f"{row['task']} | {row['stack']}" if several else row["task"]
            lines.append(
                f"| {row['model']} | {task} | {row['hidden']} | {row['pre']:.3f} | {row['recoverable']:.3f} | "
                f"{number(row['lost'])}{mark} [{number(row['ci_low'])} {number(row['ci_high'])}] | "
                f"{number(row['moved'])} | {number(row['re_encoded'])} | "
                f"{number(row['worst'])} at {row['worst_hidden']} |"
            )
        return "\n".join(lines)

    def paragraphs(self) -> list[str]:
        """One paragraph per model in words, from its numbers; then one on the sequence, if they are its stages."""
        from analysis.comparison_words import model_in_words, sequence_in_words

        found = [model_in_words(self, model) for model in self.models]
        return found if self.sequence is None else [*found, sequence_in_words(self)]

    def plot(self, ax: Axes | None = None, *, model: str | None = None, stack: str | None = None) -> Axes:
        """Lost, moved and re-encoded by hidden state, mean over tasks, of the first model and stack unless named.

        See :mod:`analysis.comparison_displays`.
        """
        from analysis.comparison_displays import plot_forgetting

        chosen = self.models[0] if model is None else model
        if chosen not in self.models:
            raise UsageError(f"No model {chosen!r}; there are {', '.join(self.models)}.")
        rows = self.of_stack(self.stacks[0] if stack is None else stack).to_pandas()
        return plot_forgetting(rows[rows["model"] == chosen], ax=ax)

    def __repr__(self) -> str:
        """Folder, models and tasks; the tables are in the attributes."""
        return f"Comparison({str(self.folder)!r}, after={list(self.models)}, {len(self.tasks)} task(s))"

    def _repr_html_(self) -> str:
        return str(self.summary().round(3).to_html(index=False))


def stage_scores(
    comparison: Comparison, *, tasks: Sequence[str] | None = None, term: str = "recoverable"
) -> pd.DataFrame:
    """Best score over hidden states of each task before and after each stage, for :mod:`analysis.sequence`.

    Returns:
        Columns stage, task, value; the stage before training is called ``before``.
    """
    rows = comparison.to_pandas(control="none")
    names = comparison.tasks if tasks is None else tasks
    found = []
    for task in names:
        own = rows[rows["task"] == task]
        first = own[own["model"] == comparison.models[0]]
        found.append({"stage": "before", "task": task, "value": first[first["term"] == "pre"]["value"].max()})
        for model in comparison.models:
            value = own[(own["model"] == model) & (own["term"] == term)]["value"].max()
            found.append({"stage": model, "task": task, "value": value})
    return pd.DataFrame(found)


def trained_tasks(sequence: Sequence[str], models: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Stage -> probing task that it trained, checked; stages named ``-`` trained none of them.

    Raises:
        UsageError: another number of names than models, or a task that is not compared.
    """
    if len(sequence) != len(models):
        raise UsageError(
            f"sequence names the probing task of each model after training: {len(models)} are needed, got "
            f"{len(sequence)}. Write - for a stage that trained none of the tasks."
        )
    for name in sequence:
        if name not in (*tasks, "-"):
            raise UsageError(
                f"sequence: no task {name!r} is compared. Tasks: {', '.join(tasks)}.{did_you_mean(name, tasks)}"
            )
    return {model: task for model, task in zip(models, sequence, strict=True) if task != "-"}


def with_sequence(comparison: Comparison, trained: dict[str, str]) -> Comparison:
    """The comparison with its table ``sequence`` and the two published scalars in ``run``.

    Args:
        comparison: of models that were trained one after another, in that order.
        trained: stage -> the probing task that it trained.
    """
    table = stage_scores(comparison)
    scalars = sequence_summaries(forgetting_matrix(table), trained)
    return replace(comparison, sequence=table, run={**comparison.run, "sequence": {"trained": trained, **scalars}})
