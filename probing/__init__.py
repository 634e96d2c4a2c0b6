"""probing: what each layer's representation holds, with controls and intervals.

Public names load on first use, so that importing this package stays instant and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "probe_layers": "probing.running",
    "probe_arrays": "probing.arrays",
    "mix_arrays": "probing.mixes",
    "extract": "probing.extraction",
    "list_tasks": "probing.registry",
    "register_task": "probing.registry",
    "load_tasks": "probing.registry",
    "ProbeResults": "probing.results",
    "read_published": "probing.published",
    "summarize_published": "probing.published",
    "LayerCurve": "probing.curves",
    "LinearProbe": "probing.probes.estimator",
    "Task": "probing.tasks.base",
    "Corpus": "probing.tasks.base",
    "Text": "probing.tasks.base",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'probing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
