"""The page of a comparison: one self-contained HTML file and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.comparison import Comparison
from analysis.comparison_rows import (
    beside_rows,
    cause_rows,
    erasure_rows,
    markdown,
    retention_rows,
    sequence_rows,
    summary_rows,
    use_rows,
    weight_rows,
)  # fmt: skip
from analysis.report import page_environment
from spafit import __version__, io, plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_comparison_report(comparison: Comparison) -> tuple[Path, ...]:
    """Write ``report.html``, ``results.md`` and ``figures/*.png`` beside a comparison's tables; return their paths."""
    from markupsafe import Markup

    folder = comparison.folder
    forgetting, drift = _forgetting_figures(comparison), _drift_figures(comparison)
    cause, use, beside = _task_figures(comparison)
    retention = _retention_figures(comparison)
    every = (*forgetting, *drift, *retention, *cause, *use, *beside)
    paths = [plotting.save_figure(f, folder / "figures" / f"{name}.png") for name, _, f in every]
    tables = {"cause": cause_rows(comparison), "erased": erasure_rows(comparison), "use": use_rows(comparison),
              "beside": beside_rows(comparison)}  # fmt: skip

    def shown(figures: list[tuple[str, str, Figure]]) -> list[dict[str, Any]]:
        return [
            {"title": title, "svg": Markup(plotting.inline_svg(figure, prefix=name, title=title))}
            for name, title, figure in figures
        ]

    run = comparison.run
    page = page_environment(escape=True).get_template("comparison.html.j2").render(
        before=run["before"], accuracy=comparison.metric == "accuracy", paragraphs=comparison.paragraphs(),
        figures=shown(forgetting),
        summary=summary_rows(comparison), drift={"figures": shown(drift)} if drift else None,
        weights=weight_rows(comparison), retention={"figures": shown(retention), "rows": retention_rows(comparison)},
        cause={"figures": shown(cause), "rows": tables["cause"], "erased": tables["erased"]},
        use={"figures": shown(use), "rows": tables["use"]},
        beside={"figures": shown(beside), "rows": tables["beside"]},
        sequence=sequence_rows(comparison), task=run.get("task"),
        notes=run["notes"], command=run["command"], version=__version__,
        facts=[
            ("models", ", ".join(f"{n} ({f['reference'] or 'unchanged'})" for n, f in run["models"].items())),
            ("tasks", ", ".join(comparison.tasks)),
            ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in run["seconds"].items())),
        ],
        colors={s: Markup(plotting.css_variables(s)) for s in ("light", "dark")},
    )  # fmt: skip
    io.write_text(folder / "report.html", page + "\n")
    parts = [comparison.to_markdown(), *comparison.paragraphs()]
    if comparison.sequence is not None:
        parts.append(markdown(sequence_rows(comparison)))
    titles = {"cause": "Cause: points of score lost", "erased": "Erased: points of score lost",
              "use": "Use: conductance", "beside": "Side by side"}  # fmt: skip
    parts += [f"**{titles[name]}**\n\n{markdown(rows)}" for name, rows in tables.items() if rows]
    io.write_text(folder / "results.md", "\n\n".join(parts) + "\n")
    return (folder / "report.html", folder / "results.md", *paths)


def _forgetting_figures(comparison: Comparison) -> list[tuple[str, str, Figure]]:
    from analysis.comparison_displays import forgetting_figure, loss_map

    found = []
    for suffix, where, own in _by_stack(comparison):
        rows = own.to_pandas()
        rows = rows.assign(model=rows["model"] + where)  # a picture by itself says its stack, too
        title = f"Lost, moved and re-encoded by hidden state, mean over tasks{where}"
        found += [
            (f"forgetting{suffix}", title, forgetting_figure(rows)),
            (f"loss_map{suffix}", f"Lost by task and hidden state{where}", loss_map(rows)),
        ]
    return found


def _by_stack(comparison: Comparison) -> list[tuple[str, str, Comparison]]:
    """Suffix of file names, words in titles, and the comparison of each stack; the first one's files have no suffix."""
    if len(comparison.stacks) == 1:
        return [("", "", comparison)]
    return [(f"-{s}" if i else "", f" ({s})", comparison.of_stack(s)) for i, s in enumerate(comparison.stacks)]


def _drift_figures(comparison: Comparison) -> list[tuple[str, str, Figure]]:
    if comparison.drift is None or comparison.cka_map is None:
        return []
    from analysis.drift_displays import plot_cka_map, plot_drift

    figures = []
    for suffix, where, own in _by_stack(comparison):
        assert own.drift is not None
        assert own.cka_map is not None
        for i, model in enumerate(own.drift["model"].unique()):
            for kind, table, draw in (("drift", own.drift, plot_drift), ("cka_map", own.cka_map, plot_cka_map)):
                ax = draw(table[table["model"] == model])
                figure = ax.get_figure(root=True)
                assert figure is not None
                title = "similarity by hidden state" if kind == "drift" else "CKA of every pair of hidden states"
                figures.append((f"{kind}-{i}{suffix}", f"{model}: {title}{where}", figure))
    return figures


def _retention_figures(comparison: Comparison) -> list[tuple[str, str, Figure]]:
    """Every model's hidden states through the lens, where one was asked for."""
    table = comparison.retention
    if table is None or not (table["head"] == "lens").any():
        return []
    from analysis.retention_displays import plot_lens

    figures = []
    for i, (model, own) in enumerate(table.groupby("model", sort=False)):
        figure = plot_lens(own).get_figure(root=True)
        assert figure is not None
        figures.append((f"lens-{i}", f"{model}: what each hidden state says of the next token", figure))
    return figures


def _task_figures(comparison: Comparison) -> tuple[list[tuple[str, str, Figure]], ...]:
    """Figures of cause (with erasing), of use, and of everything by hidden state."""
    from analysis.task_displays import beside_figure, cause_figure, erasure_figure, use_figure

    cause, use, beside = [], [], []
    if comparison.causal is not None:
        title = "Score of the trained task that is lost when blocks are reverted, skipped or resampled"
        cause.append(("cause", title, cause_figure(comparison.causal)))
    if comparison.erasure is not None:
        title = "Score of the trained task that is lost when a label is erased, by hidden state"
        cause.append(("erasure", title, erasure_figure(comparison.erasure)))
    if comparison.use is not None:
        use.append(("use", "Conductance through each block’s branches", use_figure(comparison.use)))
    for suffix, where, own in _by_stack(comparison):
        figure = beside_figure(own)
        if figure is not None:
            beside.append((f"beside{suffix}", f"Forgetting, drift, cause and use by hidden state{where}", figure))
    return cause, use, beside
