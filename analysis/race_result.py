"""What a race gave: every training, the confirmation, and whether the suggestion beats the baselines."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from spafit import io
from spafit.errors import DataError
from spafit.strata import StrataConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRIAL_COLUMNS = (
    "trial", "candidate", "role", "digest", "s1", "s2", "trainable", "learning_rate", "seed", "stage", "epochs",
    "split", "metric", "value", "seconds",
)  # fmt: skip
COMPARISON_COLUMNS = (
    "suggestion", "baseline", "difference", "ci_low", "ci_high", "suggestion_score", "baseline_score", "seeds", "items",
    "keeps_tolerance",
)  # fmt: skip
Verdict = Literal["yes", "no", "within noise", "untested"]


@dataclass(frozen=True)
class RaceResult:
    """A view on a race's folder.

    Attributes:
        folder: holds ``race.json``, the tables ``trials`` and ``comparison``, and the trainings.
        run: the record: candidates with their plans, settings, seeds, cost as announced and as spent, verdict.
        trials: one row per training and metric; columns :data:`TRIAL_COLUMNS`. ``stage`` is the rung (``rung-0`` …,
            scored on held-out training items) or ``confirmation`` (scored on the official split).
        comparison: the confirmed suggestion less each confirmed baseline; columns :data:`COMPARISON_COLUMNS`.
        forgetting: what each confirmed plan forgot (candidate, seed, task, value, unit), or None.
    """

    folder: Path
    run: dict[str, Any]
    trials: pd.DataFrame
    comparison: pd.DataFrame
    forgetting: pd.DataFrame | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the suggestion beats the baselines."""
        return self.run["verdict"]

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        return str(self.run["sentence"])

    @classmethod
    def load(cls, folder: str | Path) -> RaceResult:
        """Read what a race wrote.

        Raises:
            DataError: there is none.
        """
        folder = Path(folder)
        if not (folder / "race.json").is_file() or not (folder / "trials.parquet").is_file():
            raise DataError(f"{folder} holds no race (no race.json with trials). Run spafit suggest with --race.")
        forgetting = io.read_table(folder / "forgetting") if (folder / "forgetting.parquet").is_file() else None
        return cls(
            folder, io.read_json(folder / "race.json"), io.read_table(folder / "trials"),
            io.read_table(folder / "comparison"), forgetting,
        )  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write the record and the tables."""
        folder = Path(folder)
        io.write_table(folder / "trials", self.trials)
        io.write_table(folder / "comparison", self.comparison)
        if self.forgetting is not None:
            io.write_table(folder / "forgetting", self.forgetting)
        io.write_json(folder / "race.json", self.run)
        return folder

    def to_pandas(self) -> pd.DataFrame:
        """Headline by candidate: role, s1, s2, trainable, learning_rate (the best), a column per stage, forgetting."""
        headline = self.trials[self.trials["metric"] == "headline"]
        stages = list(dict.fromkeys(headline["stage"]))
        rows = []
        for name, own in headline.groupby("candidate", sort=False):
            last = own[own["stage"] == own["stage"].iloc[-1]]
            means = last.groupby("learning_rate")["value"].mean()
            row: dict[str, Any] = {
                "candidate": name, "role": own["role"].iloc[0], "s1": own["s1"].iloc[0], "s2": own["s2"].iloc[0],
                "trainable": int(own["trainable"].iloc[0]),
                "learning_rate": float(means.idxmax()) if means.notna().any() else float("nan"),
            }  # fmt: skip
            for stage in stages:
                at = own[own["stage"] == stage].groupby("learning_rate")["value"].mean()
                row[stage] = float(at.max()) if at.notna().any() else float("nan")
            if self.forgetting is not None:
                lost = self.forgetting.loc[self.forgetting["candidate"] == name, "value"]
                row["forgetting"] = float(lost.mean()) if len(lost) else float("nan")
            rows.append(row)
        table = pd.DataFrame(rows)
        return table.sort_values(stages[::-1], ascending=False, na_position="last", ignore_index=True)

    def to_markdown(self) -> str:
        """The table of all candidates, and below it the confirmed differences."""
        table = self.to_pandas()
        stages = [c for c in map(str, table) if c.startswith("rung-") or c == "confirmation"]
        more = [c for c in ("forgetting",) if c in table]
        head = ["plan", "s1, s2", "trained", "rate", *stages, *more]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in table.to_dict("records"):
            marked = f"**{row['candidate']}**" if row["role"] == "suggestion" else str(row["candidate"])
            cells = [marked, f"{row['s1']}, {row['s2']}", f"{row['trainable']:,}", f"{row['learning_rate']:.2g}"]
            cells += ["" if pd.isna(row[c]) else f"{row[c]:.3f}" for c in (*stages, *more)]
            lines.append("| " + " | ".join(cells) + " |")
        if len(self.comparison):
            lines += ["", "| suggestion less | difference | interval |", "|---|---|---|"]
            for row in self.comparison.to_dict("records"):
                lines.append(
                    f"| {row['baseline']} | {row['difference']:+.3f} | {row['ci_low']:+.3f} to {row['ci_high']:+.3f} |"
                )
        return "\n".join([*lines, "", self.sentence])

    def stamp(self, config: StrataConfig) -> StrataConfig:
        """A plan with what the race found in its provenance: ``tested``, verdict, table, seeds, data digests."""
        run = self.run
        race = {
            "verdict": run["verdict"], "sentence": run["sentence"], "confirmed": run.get("suggestion"),
            "comparison": self.comparison.round(4).to_dict("records"), "seeds": run["confirm_seeds"],
            "data": run["data"],
        }  # fmt: skip
        return config.with_provenance({"tested": run["verdict"] != "untested", "race": race})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Confirmed differences, suggestion less baseline, with their intervals."""
        from analysis.boundary_displays import plot_race

        return plot_race(self, ax=ax)

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False, float_format="{:.3f}".format) + f"<p>{escape(self.sentence)}</p>"
