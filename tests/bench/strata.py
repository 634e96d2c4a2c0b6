"""Suggestion, exact trend, race and search: what choosing strata costs, against a second, a share, or one worker."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.bench.table import Row, print_table

#: Trainings of an item in a race on the tiny model are too short to time; this many items make them long enough.
ITEMS = 1000

_WORKER = """
import sys, time
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from spafit.tuning.parameters import Outcome
from spafit.tuning.searching import search
from spafit.tuning.space import SearchSpace

def objective(values, report):
    x = torch.randn(256, 256)
    end = time.perf_counter() + 0.25
    while time.perf_counter() < end:
        x = torch.tanh(x @ x / 16)
    return Outcome({"quality": float(values["encoder.groups"])}, {}, {"plan": space.decode(values)[0].to_dict()})

space = SearchSpace({"encoder": 12})
search(objective, space, out=sys.argv[1], strategy="random", n_trials=int(sys.argv[2]))
"""


def suggestion_seconds() -> float:
    """A pilot's table of 24 blocks, 12 tasks of 300 items and 2 seeds, to a choice with 1,000 draws."""
    from analysis.block_evidence import BlockEvidence
    from analysis.boundary_choice import choose_boundaries
    from analysis.pilot import COLUMNS, Pilot

    blocks, tasks, items, seeds = 24, 12, 300, (0, 1)
    draw = np.random.default_rng(0)
    rows = []
    for method in ("bitfit", "lora+bitfit:64"):
        rows.append(pd.DataFrame({"quantity": "parameters", "method": method, "block": range(blocks), "value": 1000.0}))
        for seed in seeds:
            at = pd.MultiIndex.from_product([range(16), range(blocks)], names=["item", "block"]).to_frame(index=False)
            rows.append(at.assign(quantity="gradient", method=method, seed=seed, value=draw.random(len(at))))
    at = pd.MultiIndex.from_product([range(tasks), range(items)], names=["task", "item"]).to_frame(index=False)
    at["group"] = at["item"].astype(str)
    at["task"] = "task " + at["task"].astype(str)
    for seed in seeds:
        rows.append(at.assign(quantity="ability", kept="nothing", block=blocks, seed=seed, value=draw.random(len(at))))
        for kept in ("bitfit", "everything"):
            for block in range(blocks):
                rows.append(
                    at.assign(quantity="ability", kept=kept, block=block, seed=seed, value=draw.random(len(at)))
                )
    table = pd.concat(rows, ignore_index=True).reindex(columns=list(COLUMNS))
    run = {"methods": ["bitfit", "lora+bitfit:64"], "blocks": blocks, "seeds": list(seeds), "stack": "encoder",
           "outside_parameters": 10, "unit": "bits"}  # fmt: skip
    begun = time.perf_counter()
    choose_boundaries(BlockEvidence.from_pilot(Pilot(Path(), run, table), n_boot=1000), budget=20_000, tolerance=0.2)
    return time.perf_counter() - begun


def trend_seconds() -> float:
    """The exact trend test of 2, 3 and 5 tasks."""
    from spafit.trend import jonckheere_terpstra

    values = np.random.default_rng(0).random(10)
    begun = time.perf_counter()
    jonckheere_terpstra(values, np.repeat([0, 1, 2], [2, 3, 5]))
    return time.perf_counter() - begun


def race_share(folder: Path) -> float:
    """Seconds of a race's rungs on a random encoder of six blocks, over those of training every entry in full."""
    from transformers import BertModel

    from analysis.race_candidates import Candidate
    from analysis.racing import race
    from spafit.settings import TrainSettings
    from spafit.strata import StrataConfig
    from spafit.training import fit
    from tests.tiny import tiny_config, tiny_tokenizer
    from tests.training_fixtures import task

    blocks = 6
    BertModel(
        tiny_config("bert", hidden_size=128, intermediate_size=512, num_hidden_layers=blocks, num_attention_heads=4)
    ).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    pairs = [(a, b) for a in range(0, blocks, 2) for b in range(a, blocks + 1, 2)]
    candidates = [
        Candidate(str(pair), StrataConfig.from_boundaries({"encoder": pair}, blocks={"encoder": blocks}),
                  "suggestion" if n == 0 else "baseline", (1e-3,))
        for n, pair in enumerate(pairs)
    ]  # fmt: skip
    data = task(ITEMS, scored=20)
    settings = TrainSettings(epochs=9, batch_size=16, max_length=16)
    shared: dict[str, Any] = {"model": str(folder / "model"), "device": "cpu", "quiet": True}
    result = race(candidates, data, out=folder / "race", settings=settings, confirm_seeds=(9,), **shared)
    rungs = result.trials[(result.trials["metric"] == "headline") & (result.trials["stage"] != "confirmation")]
    begun = time.perf_counter()
    for candidate in candidates:
        fit(
            str(folder / "model"), candidate.plan, data=data, out=folder / "full" / candidate.name,
            settings=TrainSettings(epochs=9, batch_size=16, max_length=16, select_share=0.2, learning_rate=1e-3),
            device="cpu", quiet=True,
        )  # fmt: skip
    return float(rungs["seconds"].sum()) / (time.perf_counter() - begun)


def workers_ratio(folder: Path) -> float:
    """Trials per second of two one-thread workers on one journal, over those of one."""

    def seconds(count: int, trials: int) -> float:
        place = folder / f"workers-{count}"
        command = [sys.executable, "-c", _WORKER, str(place)]
        subprocess.run([*command, "1"], check=True, stderr=subprocess.DEVNULL)  # imports and the study's file
        begun = time.perf_counter()
        running = [subprocess.Popen([*command, str(trials)], stderr=subprocess.DEVNULL) for _ in range(count)]
        for process in running:
            process.wait()
        return time.perf_counter() - begun

    trials = 80
    return (trials / seconds(2, trials)) / (trials / seconds(1, trials))


def main() -> int:
    """Print the table; 1 where a figure is missed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [
            Row("suggestion: 24 blocks, 12 tasks, 1,000 draws", suggestion_seconds(), 5.0, "<=", "seconds"),
            Row("exact trend test of ten tasks", trend_seconds(), 1.0, "<=", "seconds"),
            Row("race by halving / all entries in full", race_share(folder), 0.40, "<=", "seconds of the same list"),
            Row("two search workers / one, trials per hour", workers_ratio(folder), 1.6, ">=", "one thread each"),
        ]
    return print_table("strata", rows)
