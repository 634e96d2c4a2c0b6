"""The report of a probing run: one self-contained HTML page, the same numbers as Markdown, and the figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.citations import bibtex
from analysis.complexity import complexity_curves, complexity_table, has_several_sizes
from analysis.report_content import report_content
from analysis.report_items import browsable_items, json_for_script
from spafit import io, plotting
from spafit.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.run_suggestion import StackSuggestions
    from analysis.strata_suggestion import StrataSuggestion
    from probing.results import ProbeResults

#: The page stays below this size; the item browser gives way first.
MAX_BYTES = 2_900_000


def write_report(
    results: ProbeResults,
    *,
    verdict: Mapping[str, Any] | None = None,
    suggestion: StrataSuggestion | StackSuggestions | None = None,
    folder: Path | None = None,
) -> tuple[Path, ...]:
    """Write ``report.html``, ``report.md`` and ``figures/*.png`` of a probing run.

    The page holds everything in itself (figures, styles, script, sampled test items) and loads nothing. The same
    results give the same bytes.

    Args:
        results: the run.
        verdict: content of ``verdict.json``; without it the page says that nothing was tested.
        suggestion: suggested strata, which are shaded in the figures; without it there are none.
        folder: where to write; by default where the results lie.

    Returns:
        The paths written, the page first.

    Raises:
        UsageError: the results lie nowhere and no folder was given.
        OutputError: the folder cannot be written.
    """
    folder = results.folder if folder is None else Path(folder)
    if folder is None:
        raise UsageError("These results lie in no folder. Give one: write_report(results, folder=...).")
    figures = _figures(results, suggestion)
    paths = [plotting.save_figure(f["figure"], folder / "figures" / f"{f['file']}.png") for f in figures]
    content = report_content(results, verdict=verdict, suggestion=suggestion)
    content["bibtex"] = bibtex(results.run)
    shown = [{**f, "svg": plotting.inline_svg(f["figure"], prefix=f["file"], title=f["title"])} for f in figures]
    page = _render_page(content, shown, results)
    markdown = page_environment(escape=False).get_template("report.md.j2").render(**content, figures=figures)
    io.write_text(folder / "report.html", page)
    io.write_text(folder / "report.md", re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n")
    return (folder / "report.html", folder / "report.md", *paths)


def _figures(results: ProbeResults, suggestion: StrataSuggestion | StackSuggestions | None) -> list[dict[str, Any]]:
    """Levels, tasks and heat map of each stack and site; the first is the picture at the top of the page."""
    from probing.displays import layer_curves, task_layer_heatmap
    from probing.tables import overview, scores_word

    scores = results.scores
    strata = () if suggestion is None else suggestion.config.strata
    places = list(dict.fromkeys(zip(scores["stack"].astype(str), scores["site"].astype(str), strict=True)))
    figures: list[dict[str, Any]] = []

    def add(name: str, title: str, figure: Figure, place: tuple[str, str]) -> None:
        where = "" if len(places) == 1 else f" ({place[0]}, {place[1]})"
        file = name if place == places[0] else f"{name}-{re.sub(r'[^A-Za-z0-9]+', '-', '-'.join(place))}"
        figures.append({"file": file, "kind": name, "title": title + where, "figure": figure})

    for place in places:
        stack, site = place
        shaded = strata if site == "block" else ()
        has_bits = (scores["metric"] == "bits").any()
        levels = layer_curves(
            scores, metric="bits" if has_bits else "primary", layout="levels", scale="share", strata=shaded,
            stack=stack, site=site,
        )  # fmt: skip
        add("layers", "Where each task can be read, by level", levels, place)
        word = scores_word(overview(scores, results.summaries)).capitalize()
        add("tasks", f"{word} of every task over hidden states, with controls",
            layer_curves(scores, metric="primary", strata=shaded, stack=stack, site=site), place)  # fmt: skip
        heat = task_layer_heatmap(scores, metric="primary", stack=stack, site=site)
        add("heatmap", f"{word} by task and hidden state", heat, place)
        if has_several_sizes(scores):
            title = "Task, control task and selectivity by the probe's complexity"
            add("complexity", title, complexity_curves(complexity_table(results), stack=stack, site=site), place)
    if results.measures is not None:
        from probing.measure_displays import TITLES, measure_figure

        for measure, title in TITLES.items():
            if (results.measures["probe"] == measure).any():
                figure = measure_figure(measure, results.measures, results.summaries)
                figures.append({"file": measure, "kind": "measure", "title": title, "figure": figure})
    return figures


def _render_page(content: Mapping[str, Any], figures: list[dict[str, Any]], results: ProbeResults) -> str:
    from markupsafe import Markup

    safe = [{**f, "svg": Markup(f["svg"])} for f in figures]  # made by matplotlib, which escapes its texts
    template = page_environment(escape=True).get_template("report.html.j2")
    colors = {scheme: Markup(plotting.css_variables(scheme)) for scheme in ("light", "dark")}
    frame = {**content, "figures": safe, "colors": colors}
    empty = template.render(**frame, items=Markup("[]"), browsable=[])
    budget = max(100_000, MAX_BYTES - len(empty.encode()))
    items = browsable_items(results, budget=budget)
    return template.render(**frame, items=Markup(json_for_script(items)), browsable=items) + "\n"


def page_environment(*, escape: bool) -> Any:
    """Jinja environment of this package's templates; the page escapes everything that is not marked as safe."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("analysis", "templates"), autoescape=escape, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split())
    return environment
