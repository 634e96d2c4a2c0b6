"""analysis: what the layer curves mean, and what to do about it.

Public names load on first use, so that importing this package stays instant and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "compare": "analysis.comparing",
    "Comparison": "analysis.comparison",
    "forgetting_table": "analysis.forgetting",
    "forgetting_signal": "analysis.trajectory",
    "trajectory_figure": "analysis.trajectory",
    "Hypothesis": "analysis.hypothesis",
    "default_hypothesis": "analysis.hypothesis",
    "localize": "analysis.localization_runs",
    "read_evidence": "analysis.evidence",
    "localization_test": "analysis.localization",
    "LocalizationTest": "analysis.localization",
    "suggest_strata": "analysis.suggestion",
    "suggest_from_pilot": "analysis.pilot_suggestion",
    "run_pilot": "analysis.pilot",
    "Pilot": "analysis.pilot",
    "race": "analysis.racing",
    "RaceResult": "analysis.race_result",
    "Candidate": "analysis.race_candidates",
    "StrataSuggestion": "analysis.strata_suggestion",
    "tradeoff": "analysis.tradeoff_folders",
    "tradeoff_differences": "analysis.tradeoffs",
    "tradeoff_table": "analysis.tradeoffs",
    "interpret": "analysis.interpretation",
    "write_report": "analysis.report",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
