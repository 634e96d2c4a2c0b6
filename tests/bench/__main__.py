"""All benchmarks in one table: `python -m tests.bench [name …]`; exits non-zero where a figure is missed."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "extraction",
    "seq2seq",
    "probe_grid",
    "memory",
    "command",
    "training",
    "before_after",
    "probe_families",
    "mixing",
    "codes",
    "structural",
    "strata",
)

if __name__ == "__main__":
    chosen = sys.argv[1:] or NAMES
    unknown = [n for n in chosen if n not in NAMES]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; one of {', '.join(NAMES)}")
    sys.exit(max(importlib.import_module(f"tests.bench.{name}").main() for name in chosen))
