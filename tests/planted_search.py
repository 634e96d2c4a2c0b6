"""A search space whose best configuration is known, for the tests of search backends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spafit.tuning.parameters import Outcome, Parameter, Report

#: Standard error of the planted objective, as if it were a mean over folds.
STANDARD_ERROR = 0.05
BEST = {"s1": 4, "fraction": 0.6, "method": "lora", "lr": 1e-3, "rank": 8}
SPACE = (
    Parameter("s1", "integer", low=0, high=6, grid=(0, 2, 4, 6)),
    Parameter("fraction", "real", low=0, high=1, grid=(0.2, 0.6)),
    Parameter("method", "categorical", choices=("freeze", "bitfit", "lora")),
    Parameter("lr", "real", low=1e-5, high=1e-1, log=True, grid=(1e-4, 1e-3)),
    Parameter("rank", "integer", low=1, high=64, log=True, grid=(2, 8), when=("method", ("lora",))),
)


def quality(values: Mapping[str, Any]) -> float:
    """At most 1, reached at ``BEST`` alone; flat in nothing."""
    loss = 0.06 * abs(values["s1"] - 4) + 0.2 * (values["fraction"] - 0.6) ** 2
    loss += {"freeze": 0.3, "bitfit": 0.15, "lora": 0.0}[values["method"]]
    loss += 0.04 * (math.log10(values["lr"]) + 3) ** 2
    if "rank" in values:
        loss += 0.01 * abs(math.log2(values["rank"] / 8))
    return 1 - loss


class Recorded:
    """A planted objective that writes a line for each evaluation that ends, and repeats no recorded one by itself.

    Args:
        path: JSON lines; one per evaluation.
        limit: s1 above it breaks a constraint.
        fails: value of ``method`` at which the evaluation fails.
        steps: reports before the end.
        pause: seconds per report.
        sign: -1 turns the objective round.
    """

    def __init__(
        self, path: Path, *, limit: int = 6, fails: str = "", steps: int = 0, pause: float = 0.0, sign: int = 1
    ):
        self.path, self.limit, self.fails, self.steps, self.pause, self.sign = path, limit, fails, steps, pause, sign

    def __call__(self, values: Mapping[str, Any], report: Report) -> Outcome:
        import time

        from spafit.tuning.parameters import Pruned

        value = self.sign * quality(values)
        for step in range(self.steps):
            time.sleep(self.pause)
            try:
                report(step, value)
            except Pruned:
                self._write(values, None, step + 1)
                raise
        if values["method"] == self.fails:
            self._write(values, None, -1)
            raise RuntimeError("this method fails")
        self._write(values, value, self.steps)
        return Outcome({"quality": value}, {"s1": float(values["s1"] - self.limit)})

    def _write(self, values: Mapping[str, Any], value: float | None, steps: int) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({"values": dict(values), "value": value, "steps": steps}) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """Evaluations in the order in which they ended."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best(path: Path, *, limit: int = 6) -> dict[str, Any]:
    """The best evaluation that keeps the limit."""
    return max(
        (r for r in lines(path) if r["value"] is not None and r["values"]["s1"] <= limit), key=lambda r: r["value"]
    )


def assert_found(record: dict[str, Any]) -> None:
    """Within one block of the planted optimum, and within one standard error of its value."""
    assert abs(record["values"]["s1"] - BEST["s1"]) <= 1, record
    assert record["value"] >= 1 - STANDARD_ERROR, record
