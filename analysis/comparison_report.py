"""The page of a comparison: one self-contained HTML file and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.comparison import Comparison
from analysis.report import page_environment
from spafit import __version__, io, plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Rows of the table of weights.
MOST_WEIGHTS = 12


def write_comparison_report(comparison: Comparison) -> tuple[Path, ...]:
    """Write ``report.html``, ``results.md`` and ``figures/*.png`` beside a comparison's tables; return their paths."""
    from markupsafe import Markup

    folder = comparison.folder
    forgetting, drift = _forgetting_figures(comparison), _drift_figures(comparison)
    paths = [plotting.save_figure(f, folder / "figures" / f"{name}.png") for name, _, f in (*forgetting, *drift)]

    def shown(figures: list[tuple[str, str, Figure]]) -> list[dict[str, Any]]:
        return [
            {"title": title, "svg": Markup(plotting.inline_svg(figure, prefix=name, title=title))}
            for name, title, figure in figures
        ]

    run = comparison.run
    page = page_environment(escape=True).get_template("comparison.html.j2").render(
        before=run["before"], paragraphs=comparison.paragraphs(), figures=shown(forgetting),
        summary=_summary_rows(comparison), drift={"figures": shown(drift)} if drift else None,
        weights=_weight_rows(comparison), retention=_retention_rows(comparison), beside=_beside(comparison),
        notes=run["notes"], command=run["command"], version=__version__,
        facts=[
            ("models", ", ".join(f"{n} ({f['reference'] or 'unchanged'})" for n, f in run["models"].items())),
            ("tasks", ", ".join(comparison.tasks)),
            ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in run["seconds"].items())),
        ],
        colors={s: Markup(plotting.css_variables(s)) for s in ("light", "dark")},
    )  # fmt: skip
    io.write_text(folder / "report.html", page + "\n")
    io.write_text(
        folder / "results.md", comparison.to_markdown() + "\n\n" + "\n\n".join(comparison.paragraphs()) + "\n"
    )
    return (folder / "report.html", folder / "results.md", *paths)


def _forgetting_figures(comparison: Comparison) -> list[tuple[str, str, Figure]]:
    from analysis.comparison_displays import forgetting_figure, loss_map

    rows = comparison.to_pandas()
    return [
        ("forgetting", "Lost, moved and re-encoded by hidden state, mean over tasks", forgetting_figure(rows)),
        ("loss_map", "Lost by task and hidden state", loss_map(rows)),
    ]


def _drift_figures(comparison: Comparison) -> list[tuple[str, str, Figure]]:
    if comparison.drift is None or comparison.cka_map is None:
        return []
    from analysis.drift_displays import plot_cka_map, plot_drift

    figures = []
    for i, model in enumerate(comparison.drift["model"].unique()):
        for kind, table, draw in (
            ("drift", comparison.drift, plot_drift),
            ("cka_map", comparison.cka_map, plot_cka_map),
        ):
            ax = draw(table[table["model"] == model])
            figure = ax.get_figure(root=True)
            assert figure is not None
            title = "similarity by hidden state" if kind == "drift" else "CKA of every pair of hidden states"
            figures.append((f"{kind}-{i}", f"{model}: {title}", figure))
    return figures


def _number(value: float, *, factor: float = 100.0, digits: int = 1, sign: bool = True) -> str:
    return "–" if pd.isna(value) else f"{factor * value:{'+' if sign else ''}.{digits}f}"


def _summary_rows(comparison: Comparison) -> list[dict[str, str]]:
    return [
        {
            "model": r["model"], "task": r["task"], "level": r["level"], "at": str(r["hidden"]),
            "before": _number(r["pre"], sign=False),
            "after": _number(r["recoverable"], sign=False), "lost": _number(r["lost"]),
            "95 %": f"{_number(r['ci_low'])} to {_number(r['ci_high'])}", "p": f"{r['p_layers']:.3f}",
            "moved": _number(r["moved"]), "re-encoded": _number(r["re_encoded"]),
            "largest loss": f"{_number(r['worst'])} at {r['worst_hidden']}",
        }
        for r in comparison.summary().to_dict("records")
    ]  # fmt: skip


def _weight_rows(comparison: Comparison) -> list[dict[str, str]]:
    if comparison.weights is None:
        return []
    table = comparison.weights[comparison.weights["change"] > 0]
    top = table.sort_values("relative", ascending=False, kind="stable").groupby(["model", "kind"], sort=False)
    rows = top.head(MOST_WEIGHTS // 4).sort_values(["model", "kind"], kind="stable")
    return [
        {
            "model": r["model"], "name": r["name"], "kind": r["kind"],
            "relative": _number(r["relative"], factor=1, digits=3, sign=False),
            "stable rank": _number(r["stable_rank"], factor=1, sign=False),
            "rank for 90 %": _number(r["energy_rank"], factor=1, digits=0, sign=False),
            "intruders": _number(r["intruders"], factor=1, digits=0, sign=False),
        }
        for r in rows.to_dict("records")
    ]  # fmt: skip


def _retention_rows(comparison: Comparison) -> list[dict[str, str]]:
    if comparison.retention is None:
        return []
    table = comparison.retention
    if "paradigm" in table:
        table = table[table["paradigm"] == "all"]
    rows = table.to_dict("records")
    return [{str(k): _plain(v) for k, v in r.items()} for r in rows]


def _plain(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _beside(comparison: Comparison) -> list[dict[str, str]]:
    rows = comparison.to_pandas()
    rows = rows[rows["term"].isin(["pre", "lost", "moved", "re-encoded"])]
    mean = rows.groupby(["model", "hidden", "term"], sort=False)["value"].mean().unstack("term")
    found = []
    for r in mean.reset_index().to_dict("records"):
        model, hidden = r["model"], r["hidden"]
        row = {"model": str(model), "hidden": str(hidden)}
        row |= {t: _number(r[t], sign=t != "pre") for t in ("pre", "lost", "moved", "re-encoded")}
        if comparison.drift is not None:
            own = comparison.drift[(comparison.drift["model"] == model) & (comparison.drift["hidden"] == hidden)]
            for measure, label in (
                ("cka", "CKA"),
                ("procrustes_r2", "Procrustes R²"),
                ("mutual_knn", "shared neighbours"),
            ):
                value = own[(own["measure"] == measure) & (own["variant"] == "z-scored")]["value"]
                row[label] = _number(value.iloc[0], factor=1, digits=3, sign=False) if len(value) else "–"
        found.append(row)
    return found
