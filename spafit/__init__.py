"""spafit: the foundation of the layer-probing toolkit, and the stratified trainer.

Public names load on first use, so that importing this package stays instant and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "spafit.models",
    "LoadedModel": "spafit.models",
    "find_stacks": "spafit.stacks",
    "Stack": "spafit.stacks",
    "apply_strata": "spafit.adapt",
    "StratifiedModel": "spafit.adapt",
    "fit": "spafit.training",
    "search": "spafit.tuning.searching",
    "SearchSpace": "spafit.tuning.space",
    "SearchResult": "spafit.tuning.search_result",
    "FitResult": "spafit.fit_result",
    "Signal": "spafit.signals",
    "Schedule": "spafit.scheduling.schedule",
    "TrainSettings": "spafit.settings",
    "StrataConfig": "spafit.strata",
    "Stratum": "spafit.strata",
    "SpafitError": "spafit.errors",
}
__all__ = sorted(["__version__", *_PUBLIC])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'spafit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
