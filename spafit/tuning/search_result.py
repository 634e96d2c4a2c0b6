"""What a search gave: every trial as a table, the best one chosen and confirmed, importance and history as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spafit import io
from spafit.errors import DataError
from spafit.strata import StrataConfig
from spafit.tuning.objective import measured
from spafit.tuning.parameters import Parameter, TrialRecord
from spafit.tuning.space import SearchSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SearchResult:
    """A view on a search's folder.

    Attributes:
        folder: holds ``search.json``, ``trials.parquet``/``.csv``, ``strata.yaml`` where plans were searched, one
            JSON file per trial under ``trials``, pictures, and the backend's own state.
        run: the record: backend, strategy, best values, chosen and confirmed numbers.
        records: every trial that finished, in the order in which they began.
        parameters: the space's dimensions.
        space: the space of plans, or None.
    """

    folder: Path
    run: dict[str, Any]
    records: tuple[TrialRecord, ...]
    parameters: tuple[Parameter, ...] = field(repr=False)
    space: SearchSpace | None = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: str | Path, space: SearchSpace | Sequence[Parameter] = ()) -> SearchResult:
        """Read what a search wrote.

        Raises:
            DataError: there is no finished search.
        """
        from spafit.tuning.searching import read_records

        folder = Path(folder)
        record = folder / "search.json"
        if not record.is_file() or io.read_json(record).get("status") != "complete":
            raise DataError(f"{folder} holds no finished search (no search.json). Run spafit search with this --out.")
        plans = space if isinstance(space, SearchSpace) else None
        parameters = plans.parameters() if plans is not None else tuple(space)  # type: ignore[arg-type]
        return cls(folder, io.read_json(record), read_records(folder / "trials"), parameters, plans)

    @property
    def best(self) -> dict[str, Any] | None:
        """Values of the best trial."""
        return None if self.run["best"] is None else dict(self.run["best"]["values"])

    @property
    def chosen(self) -> float:
        """The best trial's objective, too good by the luck of being chosen; NaN without a feasible trial."""
        return math.nan if self.run["best"] is None else float(self.run["best"]["value"])

    @property
    def confirmed(self) -> float:
        """The mean of the best trial's values with fresh seeds on data that chose nothing; NaN where not confirmed."""
        values = [c["value"] for c in self.run["confirmed"]]
        return float(np.mean(values)) if values else math.nan

    def plan(self) -> StrataConfig | None:
        """The best trial's plan, with both numbers in its provenance; None where no plans were searched."""
        if self.space is None or self.best is None:
            return None
        config, settings = self.space.decode(self.best)
        return config.with_provenance(
            {"source": f"search: {self.run['backend']}, {self.run['strategy']}", "criterion": self.run["objectives"][0],
             "trials": len(self.records), "chosen": self.chosen, "confirmed": self.run["confirmed"], **settings,
             **({"course": self.run["best"]["course"]} if "course" in self.run["best"] else {})}
        )  # fmt: skip

    def to_pandas(self) -> pd.DataFrame:
        """One row per trial: trial, state, feasible, objectives, excesses, values, seconds, error.

        Of plans also digest, s1 and s2 (of the first stack), a column per fold, and the strata in words.
        """
        rows = []
        for r in self.records:
            row: dict[str, Any] = {"trial": r.number, "state": r.state}
            if r.outcome is not None:
                row |= {"feasible": r.outcome.feasible, **r.outcome.objectives}
                row |= {f"excess_{k}": v for k, v in r.outcome.constraints.items()}
                if self.space is not None:
                    plan = StrataConfig.from_dict(r.outcome.details["plan"])
                    s1, s2 = plan.boundaries(next(iter(plan.blocks)))
                    row |= {"digest": measured(r.values), "s1": s1, "s2": s2}
                    row |= {f"fold_{i}": v for i, v in enumerate(r.outcome.details.get("folds", ()))}
                    row |= {
                        "strata": "; ".join(
                            f"{s.stack}[{s.blocks[0]},{s.blocks[1]}) {s.method}" + (f":{s.lora.rank}" if s.lora else "")
                            for s in plan.strata
                        )
                    }
            rows.append(row | dict(r.values) | {"seconds": r.seconds, "error": r.error})
        return pd.DataFrame(rows)

    def importance(self) -> pd.Series:
        """Share of the objective's variation that each parameter explains, by functional ANOVA in a random forest.

        Over complete feasible trials; an inactive parameter stands at its lowest value. Hutter et al. (2014). Do not
        trust it with fewer than some dozens of trials, or where a strategy looked at a corner of the space alone.

        Returns:
            Shares by parameter, the largest first; empty with fewer than four trials or without variation.
        """
        from sklearn.ensemble import RandomForestRegressor

        name = self.run["objectives"][0]
        used = [r for r in self.records if r.outcome is not None and r.outcome.feasible]
        used = [r for r in used if math.isfinite(r.outcome.objectives.get(name, math.nan))]  # type: ignore[union-attr]
        y = np.array([r.outcome.objectives[name] for r in used])  # type: ignore[union-attr]
        if len(used) < 4 or y.std() == 0:
            return pd.Series(dtype=float)
        x = np.array([[_coordinate(p, r.values.get(p.name)) for p in self.parameters] for r in used])
        forest = RandomForestRegressor(200, min_samples_leaf=2, random_state=0).fit(x, y)
        random = np.random.default_rng(0)
        draws = x[random.integers(len(x), size=(1000, x.shape[1])), np.arange(x.shape[1])]
        total = forest.predict(draws).var()
        shares = {}
        for i, parameter in enumerate(self.parameters):
            levels = np.unique(np.quantile(x[:, i], np.linspace(0, 1, 9)))
            means = []
            for level in levels:
                fixed = draws.copy()
                fixed[:, i] = level
                means.append(forest.predict(fixed).mean())
            weights = np.array([(x[:, i] <= level).mean() for level in levels])
            weights = np.diff(np.concatenate([[0], weights]))
            centre = np.average(means, weights=weights)
            shares[parameter.name] = float(
                np.average((np.array(means) - centre) ** 2, weights=weights) / max(total, 1e-30)
            )
        return pd.Series(shares).sort_values(ascending=False)

    def save(self, folder: str | Path) -> Path:
        """Write record, table, the best plan and the pictures."""
        from spafit import plotting

        folder = Path(folder)
        io.write_table(folder / "trials", self.to_pandas())
        io.write_json(folder / "search.json", self.run)
        plan = self.plan()
        if plan is not None:
            plan.save(folder / "strata.yaml")
        for name, draw in (("history", self.plot), ("importance", self.plot_importance)):
            figure = draw().get_figure(root=True)
            assert figure is not None
            plotting.save_figure(figure, folder / f"{name}.png")
        return folder

    def to_markdown(self, n: int = 10) -> str:
        """The best trials, and the best one's chosen and confirmed numbers."""
        name = self.run["objectives"][0]
        table = self.to_pandas()
        lines = [f"{len(table)} trials: " + ", ".join(f"{k} {v}" for k, v in table["state"].value_counts().items())]
        if "feasible" in table and name in table:
            good = table[table["feasible"] == True].sort_values(name, ascending=False).head(n)  # noqa: E712
            shown = [c for c in (name, "strata", *(p.name for p in self.parameters)) if c in good]
            if "strata" in shown:
                said = ("groups", "s1", "fraction", "method", "rank")  # by the strata already
                shown = [c for c in shown if not any(c.rpartition(".")[2].startswith(w) for w in said)]
            lines += ["", "| trial | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
            for row in good.to_dict("records"):
                cells = ["" if v is None or v != v else f"{v:.4g}" if isinstance(v, float) else str(v) for v in
                         (row[c] for c in shown)]  # fmt: skip
                lines.append(f"| {row['trial']} | " + " | ".join(cells) + " |")
        lines += ["", self.sentence]
        return "\n".join(lines)

    @property
    def sentence(self) -> str:
        """Chosen and confirmed numbers in words."""
        if self.run["best"] is None:
            return "No trial kept every limit and ended with a number."
        text = f"Best: trial {self.run['best']['trial']}, {self.run['objectives'][0]} {self.chosen:.4f} as chosen"
        values = [c["value"] for c in self.run["confirmed"]]
        if not values and self.run.get("elsewhere"):
            return f"{text}; {self.run['elsewhere']} trials are under way elsewhere, and the last to end confirms."
        if not values:
            return text + "; not confirmed."
        spread = f" (sd {np.std(values, ddof=1):.4f})" if len(values) > 1 else ""
        return text + f", {self.confirmed:.4f}{spread} confirmed with {len(values)} fresh seed(s)."

    def plot(self, ax: Axes | None = None) -> Axes:
        """History: each trial's objective and the best so far; crosses are beyond a limit."""
        from spafit import plotting

        name = self.run["objectives"][0]
        done = [r for r in self.records if r.outcome is not None]
        outcomes = [r.outcome for r in done if r.outcome is not None]
        values = np.asarray([float(o.objectives.get(name, math.nan)) for o in outcomes])
        feasible = np.asarray([int(o.feasible) for o in outcomes]) > 0
        at = np.array([r.number for r in done])
        with plotting.style():
            if ax is None:
                ax = plotting.new_figure(width=6.4, height=3.4).subplots()
            shown = np.isfinite(values)
            ax.scatter(
                at[shown & feasible], values[shown & feasible], s=18, color=plotting.MODEL_COLORS[0], label="trial"
            )
            if (shown & ~feasible).any():
                out = shown & ~feasible
                ax.scatter(at[out], values[out], s=22, marker="x", color="0.5", label="beyond a limit")
            if (shown & feasible).any():
                best = np.maximum.accumulate(values[shown & feasible])
                ax.step(at[shown & feasible], best, where="post", color=plotting.MODEL_COLORS[1], label="best so far")
            if self.run["confirmed"]:
                ax.axhline(self.confirmed, color="0.3", linestyle="--", linewidth=1, label="best trial, confirmed")
            ax.set(xlabel="trial", ylabel=name)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False, fontsize="small")
        return ax

    def plot_importance(self, ax: Axes | None = None) -> Axes:
        """Share of the objective's variation that each parameter explains; see :meth:`importance`."""
        from spafit import plotting

        shares = self.importance()
        with plotting.style():
            if ax is None:
                ax = plotting.new_figure(width=6.0, height=1.2 + 0.28 * max(1, len(shares))).subplots()
            ax.barh([str(n) for n in shares.index], shares.to_numpy(), color=plotting.MODEL_COLORS[0])
            ax.invert_yaxis()
            ax.set(xlabel="share of the variation explained by the parameter alone", xlim=(0, 1))
        return ax

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False, float_format="{:.4g}".format) + f"<p>{escape(self.sentence)}</p>"


def _coordinate(parameter: Parameter, value: Any) -> float:
    if parameter.kind == "categorical":
        return -1.0 if value is None else float(parameter.choices.index(value))
    if value is None:
        return math.log(parameter.low) if parameter.log else float(parameter.low)
    return math.log(value) if parameter.log else float(value)
