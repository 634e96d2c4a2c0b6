"""`spafit-probe` with no option: cold against the bare forward passes that it needs, warm, and `--help`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.table import Row, print_table


def _spafit_probe(*arguments: str, home: Path) -> float:
    environment = {**os.environ, "SPAFIT_CACHE": str(home / "cache")}
    code = "import sys; sys.argv[0] = 'spafit-probe'; from analysis.cli.main import probe_entry; probe_entry()"
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, env=environment, cwd=home, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begun


def bare_forward_seconds() -> float:
    """Seconds of the forward passes alone: the same texts and batches, with the model and each random encoder."""
    import torch

    from probing.config import ProbeConfig
    from probing.extraction import plan_extraction
    from probing.planning import plan_probing
    from spafit.models import load_model, randomize_weights

    with tempfile.TemporaryDirectory() as folder:
        plan = plan_probing(ProbeConfig(out=folder))
    loaded = load_model(None)
    total = 0.0
    for needed in plan.needed.values():
        batches = plan_extraction(loaded, needed.texts).encoded_batches()
        for encoder in (loaded, *(randomize_weights(loaded, s) for s in plan.config.seeds)):
            begun = time.perf_counter()
            with torch.inference_mode():
                for batch in batches:
                    encoder.model(**batch)
            total += time.perf_counter() - begun
    return total


def main() -> int:
    """Print the table; non-zero when a target is missed."""
    bare = bare_forward_seconds()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        cold = _spafit_probe("--quiet", "--out", "run", home=home)
        where = json.loads((home / "run" / "run.json").read_text())["seconds"]
        warm = _spafit_probe("--quiet", "--out", "run", home=home)
        helps = sorted(_spafit_probe("--help", home=home) for _ in range(5))
    limit = 2.5 * bare + 15
    return print_table(
        "spafit-probe, default model and tasks",
        [
            Row("cold, seconds", cold, limit, "<=", f"2.5 x bare forward passes ({bare:.1f} s) + 15 s"),
            Row("warm, seconds", warm, 15.0, "<=", "a few seconds beyond imports"),
            Row("--help, seconds (median of 5)", helps[2], 0.5, "<=", ""),
        ],
        notes=["where the cold run's time went: " + ", ".join(f"{k} {v:.1f} s" for k, v in where.items())],
    )


if __name__ == "__main__":
    sys.exit(main())
