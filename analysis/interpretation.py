"""What a probing run means: verdict, strata, figures and the report, written beside its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.localization import LocalizationTest, localization_test
from analysis.stability import readings_of
from analysis.suggestion import StrataSuggestion, suggest_strata
from probing.results import ProbeResults
from spafit import __version__, io


@dataclass(frozen=True)
class Interpretation:
    """Verdict and strata of one run, and where everything was written.

    Attributes:
        results: the run.
        localization: the test of the hypothesis, as far as probing alone can test it.
        suggestion: strata from probing evidence alone.
        paths: files written, the ones to look at first.
    """

    results: ProbeResults
    localization: LocalizationTest
    suggestion: StrataSuggestion
    paths: tuple[Path, ...]

    def __repr__(self) -> str:
        """The run, its verdict, and where the strata start."""
        verdict, boundaries = self.localization.verdict, self.suggestion.boundaries
        return f"Interpretation({self.results!r}, verdict={verdict!r}, boundaries={boundaries})"

    @property
    def verdict(self) -> dict[str, Any]:
        """Content of ``verdict.json``."""
        return self.localization.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Scores to report, summaries, verdict and strata as plain objects, for programs."""
        content = {
            "run": self.results.run,
            "scores": self.results.to_pandas().to_dict("records"),
            "summaries": self.results.summaries.to_dict("records"),
            "verdict": self.verdict,
            "strata": self.suggestion.config.to_dict(),
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

    model = results.run["model"]
    curves = results.curves(adjusted_by="random-encoder")
    localization = localization_test(curves, num_blocks=model["blocks"], readings=readings_of(results))
    suggestion = suggest_strata(
        curves,
        num_blocks=model["blocks"],
        stack=model["stack"],
        model_id=model["name"],
        bias_roles=tuple(model["bias_roles"]),
    )
    folder = results.folder
    assert folder is not None
    verdict = localization.to_dict()
    io.write_json(folder / "verdict.json", verdict)
    suggestion.config.save(folder / "strata.yaml")
    written = folder / "figures" / "written.json"
    sources = _sources(results, verdict)
    measured = ("measures.csv",) if results.measures is not None else ()
    tables = tuple(
        folder / name for name in ("strata.yaml", "verdict.json", "scores.csv", "summaries.csv", *measured, "run.json")
    )
    if not rewrite and written.exists() and io.read_json(written)["sources"] == sources:
        paths = tuple(folder / p for p in io.read_json(written)["paths"])
        if all(p.exists() for p in paths):
            return Interpretation(results, localization, suggestion, (*paths, *tables))
    paths = write_report(results, verdict=verdict, suggestion=suggestion)
    content = {"sources": sources, "paths": [p.relative_to(folder).as_posix() for p in paths]}
    io.write_json(written, content)
    return Interpretation(results, localization, suggestion, (*paths, *tables))


def _sources(results: ProbeResults, verdict: dict[str, Any]) -> str:
    """Digest of what the report shows, so that drawing it again can be left out when nothing changed."""
    folder = results.folder
    assert folder is not None
    names = ("scores", "summaries", *(["measures"] if results.measures is not None else []))
    tables = [io.file_digest(folder / f"{name}.parquet") for name in names]
    tasks = {name: {k: v for k, v in facts.items() if k != "seconds"} for name, facts in results.run["tasks"].items()}
    return io.content_digest([__version__, *tables, verdict, tasks, results.run["model"], results.run["warnings"]])


def compare_models(results: Sequence[ProbeResults]) -> Path:
    """Draw the runs of several models over relative depth into the folder above theirs; return the figure's path."""
    from probing.displays import relative_depth

    assert results[0].folder is not None
    path = results[0].folder.parent / "relative_depth.png"
    figure = relative_depth({r.run["model"]["name"]: r.scores for r in results})
    io.atomic_write(path, lambda p: figure.savefig(p, dpi=150, bbox_inches="tight"))
    return path
