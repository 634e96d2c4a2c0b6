"""What a probing run means: verdict, strata, figures and the report, written beside its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.localization import LocalizationTest, localization_test
from analysis.run_suggestion import StackSuggestions, merged_config
from analysis.sensitivity import unstable_tasks
from analysis.stability import readings_of
from analysis.strata_suggestion import StrataSuggestion
from analysis.suggestion import suggest_strata
from probing.results import ProbeResults
from spafit import __version__, io


@dataclass(frozen=True)
class Interpretation:
    """Verdict and strata of one run, and where everything was written.

    Attributes:
        results: the run.
        localizations: by stack, the test of the hypothesis, as far as probing alone can test it.
        suggestions: by stack, strata from probing evidence alone, and the plan for the whole model.
        verdict: content of ``verdict.json``: the test's, without tasks that sensitivity found unstable. Of several
            stacks, the first one's, with each one's under ``stacks``.
        paths: files written, the ones to look at first.
    """

    results: ProbeResults
    localizations: dict[str, LocalizationTest]
    suggestions: StackSuggestions
    verdict: dict[str, Any]
    paths: tuple[Path, ...]

    @property
    def localization(self) -> LocalizationTest:
        """The test of the first stack."""
        return next(iter(self.localizations.values()))

    @property
    def suggestion(self) -> StrataSuggestion:
        """The strata of the first stack."""
        return next(iter(self.suggestions.by_stack.values()))

    def verdict_of(self, stack: str) -> dict[str, Any]:
        """What ``verdict.json`` says of one stack."""
        found: dict[str, Any] = self.verdict.get("stacks", {}).get(stack, self.verdict)
        return found

    def __repr__(self) -> str:
        """The run, its verdict, and where the strata start."""
        verdict, boundaries = self.verdict["verdict"], self.suggestion.boundaries
        return f"Interpretation({self.results!r}, verdict={verdict!r}, boundaries={boundaries})"

    def to_dict(self) -> dict[str, Any]:
        """Scores to report, summaries, verdict and strata as plain objects, for programs."""
        content = {
            "run": self.results.run,
            "scores": self.results.to_pandas().to_dict("records"),
            "summaries": self.results.summaries.to_dict("records"),
            "verdict": self.verdict,
            "strata": self.suggestions.config.to_dict(),
            "paths": [str(p) for p in self.paths],
        }
        return io.plain(content)


def interpret(results: ProbeResults, *, rewrite: bool = False) -> Interpretation:
    """Test the hypothesis, suggest strata, and write verdict.json, strata.yaml, figures and the report page.

    Works from the run's files alone. With a random-weight encoder in the run, each curve is the task's bits minus that
    encoder's at the same hidden state; without one, the raw bits, and the verdict says so. Figures and page are
    drawn again only if what they show has changed, or with ``rewrite``.
    """
    from analysis.report import write_report

    folder = results.folder
    assert folder is not None
    unstable = unstable_tasks(folder)
    localizations, by_stack, verdicts = {}, {}, {}
    for stack in results.stacks:
        localizations[stack], by_stack[stack], verdicts[stack] = _of_stack(results.of_stack(stack), unstable)
    suggestions = StackSuggestions(by_stack, merged_config(by_stack, blocks=results.run["model"].get("stacks")))
    verdict = next(iter(verdicts.values()))
    if len(verdicts) > 1:
        words = " ".join(f"Stack {s}: {v['verdict']}. {v['sentence']}" for s, v in verdicts.items())
        verdict = {**verdict, "sentence": words, "stacks": verdicts}
    io.write_json(folder / "verdict.json", verdict)
    suggestions.config.save(folder / "strata.yaml")
    written = folder / "figures" / "written.json"
    sources = _sources(results, verdict)
    measured = ("measures.csv",) if results.measures is not None else ()
    tables = tuple(
        folder / name for name in ("strata.yaml", "verdict.json", "scores.csv", "summaries.csv", *measured, "run.json")
    )
    if not rewrite and written.exists() and io.read_json(written)["sources"] == sources:
        paths = tuple(folder / p for p in io.read_json(written)["paths"])
        if all(p.exists() for p in paths):
            return Interpretation(results, localizations, suggestions, verdict, (*paths, *tables))
    paths = write_report(results, verdict=verdict, suggestion=suggestions)
    content = {"sources": sources, "paths": [p.relative_to(folder).as_posix() for p in paths]}
    io.write_json(written, content)
    return Interpretation(results, localizations, suggestions, verdict, (*paths, *tables))


def _of_stack(
    results: ProbeResults, unstable: dict[str, str]
) -> tuple[LocalizationTest, StrataSuggestion, dict[str, Any]]:
    """Test, strata and verdict of the one stack that the results are of."""
    model = results.run["model"]
    curves = results.curves(adjusted_by="random-encoder")
    stable = [c for c in curves if c.task not in unstable]
    readings = readings_of(results, without=unstable if stable else ())
    localization = localization_test(stable or curves, num_blocks=model["blocks"], readings=readings)
    suggestion = suggest_strata(
        curves,
        num_blocks=model["blocks"],
        stack=model["stack"],
        model_id=model["name"],
        bias_roles=tuple(model["bias_roles"]),
    )
    verdict = localization.to_dict()
    left_out = {c.task: unstable[c.task] for c in curves if c.task in unstable}
    if left_out:
        verdict = _without_unstable(verdict, left_out, nothing_left=not stable)
    return localization, suggestion, verdict


def _without_unstable(verdict: dict[str, Any], left_out: dict[str, str], *, nothing_left: bool) -> dict[str, Any]:
    """The verdict with the tasks that sensitivity ruled out; inconclusive if that leaves none."""
    words = f"Left out as unstable ({len(left_out)}): " + "; ".join(f"{t}: {why}" for t, why in left_out.items()) + "."
    found = {**verdict, "unstable": left_out, "sentence": f"{verdict['sentence']} {words}"}
    return {**found, "verdict": "inconclusive"} if nothing_left else found


def _sources(results: ProbeResults, verdict: dict[str, Any]) -> str:
    """Digest of what the report shows, so that drawing it again can be left out when nothing changed."""
    folder = results.folder
    assert folder is not None
    names = ("scores", "summaries", *(["measures"] if results.measures is not None else []))
    tables = [io.file_digest(folder / f"{name}.parquet") for name in names]
    tasks = {name: {k: v for k, v in facts.items() if k != "seconds"} for name, facts in results.run["tasks"].items()}
    return io.content_digest([__version__, *tables, verdict, tasks, results.run["model"], results.run["warnings"]])


def compare_models(results: Sequence[ProbeResults]) -> Path | None:
    """Set the curves of several models, or of several treebanks with the same tasks, side by side over relative depth.

    Writes ``relative_depth.png`` and ``models.csv`` (the reported scores with the columns ``model``, ``source`` and
    ``relative_depth``) into the folder above the runs, or into the folder of the only run.

    Returns:
        The figure's path; None for one model without tasks that several sources share.
    """
    from probing.model_displays import relative_depth

    assert results[0].folder is not None
    several = len(results) > 1
    tables: dict[str, pd.DataFrame] = {}
    for run in results:
        for source, scores in _by_source(run).items():
            model = str(run.run["model"]["name"])
            name = " · ".join(n for n in (model if several or not source else "", source) if n)
            blocks = run.run["model"]["stacks"]  # of every stack; --layers may leave out the last hidden states
            depth = scores["stack"].map(blocks).fillna(run.run["model"]["blocks"])
            tables[name] = scores.assign(model=model, source=source, relative_depth=scores["hidden"] / depth)
    if len(tables) < 2:
        return None
    folder = results[0].folder.parent if several else results[0].folder
    rows = pd.concat([t[t["seed"].isna()] for t in tables.values()], ignore_index=True)
    table = rows.round({"relative_depth": 4})
    io.atomic_write(folder / "models.csv", lambda p: table.to_csv(p, index=False))
    path = folder / ("relative_depth.png" if several else "figures/relative_depth.png")
    metric = "bits" if (rows["metric"] == "bits").any() else "primary"
    figure = relative_depth(tables, metric=metric)  # type: ignore[arg-type]
    io.atomic_write(path, lambda p: figure.savefig(p, dpi=150, bbox_inches="tight"))
    return path


def _by_source(results: ProbeResults) -> dict[str, pd.DataFrame]:
    """Scores by treebank or file, tasks without its name, where two or more share a task; else all, under ``""``."""
    scores, facts = results.scores, results.run["tasks"]
    parts = {t: t.rpartition(".")[::2] for t in scores["task"].unique()}
    kinds = {t: (name, str(facts[t].get("description"))) for t, (_, name) in parts.items()}  # alike in name alone: not
    shared = [t for t in parts if list(kinds.values()).count(kinds[t]) > 1]
    if not shared:
        return {"": scores}
    found = {}
    for source in dict.fromkeys(parts[t][0] for t in shared):
        own = scores[scores["task"].isin([t for t in shared if parts[t][0] == source])]
        found[source] = own.assign(task=own["task"].map(lambda t: parts[t][1]))
    return found
