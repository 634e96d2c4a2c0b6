"""The Ray backend: planted optimum, conditions, halving, resuming, refusals, silence; population-based training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spafit.errors import OutputError, UsageError
from spafit.tuning.parameters import Outcome, Parameter, Pruned, Report
from spafit.tuning.ray_backend import grid_configurations, random_configuration, run_ray
from spafit.tuning.ray_population import run_pbt
from spafit.tuning.ray_session import quiet_tune, trial_resources
from tests.paths import ROOT
from tests.planted_search import BEST, SPACE, Recorded, assert_found, best, lines

pytest.importorskip("ray", reason="Ray is not installed")
METHODS = SPACE[2].choices
OTHER = {"s1": 6, "fraction": 0.1, "method": "freeze", "lr": 0.01}


@pytest.fixture(scope="module")
def ray_on() -> Iterator[None]:
    """A Ray of the caller's own, which every search uses and leaves on."""
    with quiet_tune(seed=0):
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield
        assert ray.is_initialized()
        ray.shutdown()


@pytest.mark.parametrize(
    ("strategy", "n_trials"), [("tpe", 50), ("grid", 96), pytest.param("random", 150, marks=pytest.mark.slow)]
)
def test_finds_the_planted_optimum(strategy: str, n_trials: int, tmp_path: Path, ray_on: None):
    """And with more trials than a grid has, it stops at its end: 4 · 2 · (1 + 1 + 2) · 2 configurations."""
    record = tmp_path / "record.jsonl"
    run_ray(SPACE, Recorded(record), strategy=strategy, n_trials=n_trials, folder=str(tmp_path), workers=2)
    assert len(lines(record)) == (64 if strategy == "grid" else n_trials)
    assert_found(best(record))
    for values in (r["values"] for r in lines(record)):
        assert ("rank" in values) == (values["method"] == "lora")


@pytest.mark.slow
def test_turned_objective_ends_elsewhere_and_tpe_beats_random(tmp_path: Path, ray_on: None):
    """Negative control, and what TPE's later trials are worth against random ones."""
    record = tmp_path / "turned.jsonl"
    run_ray(SPACE, Recorded(record, sign=-1), strategy="tpe", n_trials=50, folder=str(tmp_path / "turned"))
    with pytest.raises(AssertionError):
        assert_found({**best(record), "value": -best(record)["value"]})
    means = {}
    for strategy in ("tpe", "random"):
        record = tmp_path / f"{strategy}.jsonl"
        run_ray(SPACE, Recorded(record), strategy=strategy, n_trials=60, folder=str(tmp_path / strategy))
        means[strategy] = np.mean([r["value"] for r in lines(record)[30:]])
    assert means["tpe"] > means["random"] + 0.1


def test_grid_is_every_combination_without_inactive_ones():
    grid = grid_configurations(SPACE)
    assert len(grid) == len({json.dumps(v) for v in grid}) == 64
    assert all(("rank" in v) == (v["method"] == "lora") for v in grid)
    assert grid_configurations([Parameter("n", "integer", low=2, high=4)]) == [{"n": 2}, {"n": 3}, {"n": 4}]


def test_random_draws_follow_the_declared_distributions():
    """Every integer as likely, ends included; logarithms uniform; a draw depends on its number alone."""
    space = (*SPACE, Parameter("one", "real", low=2, high=2), Parameter("extra", "real", when=("s1", (0, 6))))
    drawn = [random_configuration(space, seed=0, number=i) for i in range(400)]
    counts = Counter(v["s1"] for v in drawn)
    assert sum((counts[i] - 400 / 7) ** 2 / (400 / 7) for i in range(7)) < 22.5  # 0.999 quantile, 6 degrees
    logs = np.sort([(np.log10(v["lr"]) + 5) / 4 for v in drawn])
    assert np.abs(logs - (np.arange(400) + 0.5) / 400).max() < 1.95 / 20  # Kolmogorov, 0.999
    for values in drawn:
        assert values["one"] == 2
        assert ("rank" in values) == (values["method"] == "lora")
        assert ("extra" in values) == (values["s1"] in (0, 6))
        assert all(isinstance(values.get(n, 1), int) for n in ("s1", "rank"))
        assert 1 <= values.get("rank", 1) <= 64
    assert random_configuration(space, seed=0, number=7) == drawn[7]
    assert random_configuration(space, seed=1, number=7) != drawn[7]


@pytest.mark.parametrize("strategy", ["random", "tpe"])
def test_first_are_first_and_later_calls_count_the_earlier(strategy: str, tmp_path: Path, ray_on: None):
    record = tmp_path / "record.jsonl"
    first = [{**OTHER, "rank": 64}, BEST]  # rank is not active beside freeze
    for n_trials in (1, 5, 5):
        run_ray(SPACE, Recorded(record), strategy=strategy, n_trials=n_trials, folder=str(tmp_path), first=first)
    values = [r["values"] for r in lines(record)]
    assert values[:2] == [OTHER, BEST]
    assert len(values) == len({json.dumps(v) for v in values}) == 5
    assert sorted(p.name for p in (tmp_path / "ray").iterdir()) == ["search.json", "trials"]


def test_infeasible_optimum_and_failures_are_left(tmp_path: Path, ray_on: None):
    """With s1 limited to 2 TPE stays there (3 of 7 by chance), though the best of all is among the first."""
    record = tmp_path / "record.jsonl"
    evaluate = Recorded(record, limit=2, fails="bitfit")
    run_ray(SPACE, evaluate, strategy="tpe", n_trials=50, folder=str(tmp_path), first=[BEST])
    later = [r["values"] for r in lines(record)][25:]
    assert len(later) == 25
    assert np.mean([v["s1"] <= 2 for v in later]) > 0.7
    assert np.mean([v["method"] == "bitfit" for v in later]) < 0.2
    assert abs(best(record, limit=2)["values"]["s1"] - 2) <= 1
    told = [json.loads(p.read_text()) for p in sorted((tmp_path / "ray" / "trials").iterdir())]
    assert Counter(t["state"] for t in told)["failed"] == sum(r["steps"] == -1 for r in lines(record)) > 0
    kept = [t["value"] for t in told if t["coordinates"]["s1"] <= 2 and t["state"] == "complete"]
    broken = [t["value"] for t in told if t["coordinates"]["s1"] > 2 and t["state"] == "complete"]
    assert max(t["value"] for t in told if t["state"] == "failed") < min(broken)
    assert max(broken) < min(kept)


class Curve:
    """Reports a learning curve; good configurations first. Records what ended, and how far it came."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, values: Mapping[str, Any], report: Report) -> Outcome:
        reached = 0
        try:
            for step in range(9):
                report(step, values["x"] * (step + 1) / 9)
                reached = step + 1
        except Pruned:
            time.sleep(0.5)  # a record that takes its time is still written
            raise
        finally:
            with self.path.open("a") as f:
                f.write(json.dumps({"x": values["x"], "reached": reached}) + "\n")
        return Outcome({"quality": values["x"]})


@pytest.mark.parametrize("prune", [True, False])
def test_halving_gives_up_what_is_behind_and_never_the_best(prune: bool, tmp_path: Path, ray_on: None):
    grid = (0.9, 0.8, 1.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    space = [Parameter("x", "real", grid=grid)]
    record = tmp_path / "record.jsonl"
    run_ray(space, Curve(record), strategy="grid", n_trials=8, folder=str(tmp_path), prune=prune)
    reached = {r["x"]: r["reached"] for r in lines(record)}
    assert len(lines(record)) == 8
    assert reached[0.9] == reached[1.0] == 9
    assert {reached[x] for x in grid[3:]} == ({0} if prune else {9})
    states = Counter(json.loads(p.read_text())["state"] for p in (tmp_path / "ray" / "trials").iterdir())
    assert states["pruned"] == (6 if prune else 0)


class Span:
    """Records when each evaluation began and ended."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, values: Mapping[str, Any], report: Report) -> Outcome:
        begin = time.time()
        time.sleep(0.5)
        with self.path.open("a") as f:
            f.write(json.dumps([begin, time.time()]) + "\n")
        return Outcome({"quality": values["x"]})


@pytest.mark.parametrize(("workers", "n_trials"), [(1, 3), (2, 10)])
def test_as_many_trials_at_a_time_as_workers(workers: int, n_trials: int, tmp_path: Path, ray_on: None):
    """With two workers there are enough trials for the second process to start."""
    record = tmp_path / "record.jsonl"
    space = [Parameter("x", "real")]
    run_ray(space, Span(record), strategy="random", n_trials=n_trials, folder=str(tmp_path), workers=workers)
    spans = [json.loads(line) for line in record.read_text().splitlines()]
    assert max(sum(b <= begin < e for b, e in spans) for begin, _ in spans) == workers


THREADS = """
import json
from spafit.tuning.parameters import Outcome, Parameter
from spafit.tuning.ray_backend import run_ray
def evaluate(values, report):
    import torch
    with open("threads.txt", "a") as f:
        f.write(f"{torch.get_num_threads()} ")
    return Outcome({"quality": 1.0})
run_ray([Parameter("x", "real")], evaluate, strategy="random", n_trials=3, folder="search", workers=2)
"""


@pytest.mark.slow
def test_each_trial_has_one_torch_thread(tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", THREADS], check=True, cwd=tmp_path, env=env)
    assert (tmp_path / "threads.txt").read_text().split() == ["1"] * 3


KILLED = """
from pathlib import Path
from spafit.tuning.ray_backend import run_ray
from tests.planted_search import SPACE, Recorded
record = Recorded(Path({record!r}), steps=3, pause=0.1)
run_ray(SPACE, record, strategy={strategy!r}, n_trials=500, folder={folder!r}, workers=2)
"""


@pytest.mark.parametrize("strategy", ["random", pytest.param("tpe", marks=pytest.mark.slow)])
def test_killed_search_goes_on_and_repeats_no_finished_trial(strategy: str, tmp_path: Path, ray_on: None):
    record, folder = tmp_path / "record.jsonl", tmp_path / "search"
    code = KILLED.format(record=str(record), folder=str(folder), strategy=strategy)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 90
    while len(lines(record)) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(2)  # Ray's own processes notice and end
    told = {p.name: json.loads(p.read_text())["coordinates"] for p in (folder / "ray" / "trials").glob("*.json")}
    before = len(lines(record))
    assert 3 <= len(told) <= before <= len(told) + 2  # two may have ended whose end was not noted
    run_ray(SPACE, Recorded(record), strategy=strategy, n_trials=len(told) + 4, folder=str(folder))
    after = [{**r["values"], "method": METHODS.index(r["values"]["method"])} for r in lines(record)[before:]]
    assert len(after) == 4
    assert not any(values in told.values() for values in after)
    assert set(told) < {p.name for p in (folder / "ray" / "trials").glob("*.json")}


class Dies:
    """Ends its own process at one place: nothing can be recorded there."""

    def __call__(self, values: Mapping[str, Any], report: Report) -> Outcome:
        if values["x"] == 0.5:
            os._exit(1)
        return Outcome({"quality": values["x"]})


def test_trial_whose_process_dies_counts_as_failed(tmp_path: Path, ray_on: None):
    space = [Parameter("x", "real", grid=(0.25, 0.5, 0.75))]
    for _ in range(2):
        run_ray(space, Dies(), strategy="grid", n_trials=9, folder=str(tmp_path))
    told = [json.loads(p.read_text()) for p in (tmp_path / "ray" / "trials").iterdir()]
    assert {t["coordinates"]["x"]: t["state"] for t in told} == {0.25: "complete", 0.5: "failed", 0.75: "complete"}
    assert len(told) == 3


def test_objective_that_is_not_there_stops_the_search(tmp_path: Path, ray_on: None):
    record = tmp_path / "record.jsonl"
    with pytest.raises(UsageError, match="no 'speed'"):
        run_ray(SPACE, Recorded(record), strategy="random", n_trials=40, folder=str(tmp_path), objectives=["speed"])
    assert len(lines(record)) < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "anneal"}, "strategy of Ray is 'anneal'"),
        ({"objectives": ("quality", "retention")}, "Optuna's nsga2"),
        ({"workers": 0}, "at least one worker"),
        ({"first": [{**BEST, "s1": 7}]}, "gives 7 for 's1'. Give 0 to 6"),
        ({"strategy": "grid", "parameters": [Parameter("x", "real")]}, "needs the values of 'x'"),
        ({"parameters": SPACE[::-1]}, "'rank' depends on 'method'"),
    ],
)
def test_refuses_in_one_sentence_before_starting(change: dict, message: str, tmp_path: Path):
    options = {"parameters": SPACE, "strategy": "tpe", "n_trials": 3, "folder": str(tmp_path), **change}
    with pytest.raises(UsageError, match=message):
        run_ray(options.pop("parameters"), Recorded(tmp_path / "record.jsonl"), **options)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_search_is_refused(tmp_path: Path):
    record = Recorded(tmp_path / "record.jsonl")
    run_ray(SPACE, record, strategy="random", n_trials=0, folder=str(tmp_path))
    with pytest.raises(OutputError, match="another space"):
        run_ray(SPACE[:4], record, strategy="random", n_trials=2, folder=str(tmp_path))
    with pytest.raises(OutputError, match="another objective"):
        run_ray(SPACE, record, strategy="random", n_trials=2, folder=str(tmp_path), objectives=("bits",))


@pytest.mark.parametrize("package", ["ray", "optuna"])
def test_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import builtins

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r'pip install "spafit\[ray\]"'):
        run_ray(SPACE, Recorded(tmp_path / "r"), strategy="tpe", n_trials=1, folder=str(tmp_path))


def test_trials_share_the_gpus(monkeypatch: pytest.MonkeyPatch):
    import ray

    for gpus, workers, share in ((0, 2, None), (1, 2, 0.5), (2, 2, 1), (3, 2, 1), (4, 1, 4)):
        monkeypatch.setattr(ray, "cluster_resources", lambda gpus=gpus: {"CPU": 5.0, **({"GPU": gpus} if gpus else {})})
        assert trial_resources(workers).get("gpu") == share
        assert trial_resources(workers)["cpu"] == 1
        assert trial_resources(workers, all_cores=True)["cpu"] == 5 // workers


QUIET = """
import json, logging, os, random, signal, sys, warnings
from pathlib import Path
import numpy as np
import spafit, spafit.tuning.ray_backend
from spafit.tuning.ray_backend import run_ray
from tests.planted_search import SPACE, Recorded
assert not {{"ray", "optuna", "hyperopt"}} & set(sys.modules)
def state():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return [dict(os.environ), warnings.filters[:], logging.getLogger().handlers[:], handlers, sys.excepthook,
            random.getstate(), np.random.get_state()[1].tolist()]
before = state()
run_ray(SPACE, Recorded(Path("record.jsonl")), strategy="tpe", n_trials=3, folder="search")
after = state()
import ray
print(json.dumps([[a == b for a, b in zip(before, after)], ray.is_initialized()]))
"""


def test_starts_its_own_ray_says_nothing_and_leaves_the_process_as_it_was(tmp_path: Path):
    """In a process of its own, with warnings as errors and a relative path that must mean the same in the trials."""
    command = [sys.executable, "-W", "error", "-c", QUIET.format()]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[True] * 7, False]
    assert len(lines(tmp_path / "record.jsonl")) == 3


class Moving:
    """An error whose logarithm changes by the distance of the learning rate from the best one of the interval.

    The state is the list of rates with which it was trained, so that a lost or doubled interval would show.
    """

    def __init__(self, shrink: float):
        self.shrink = shrink

    def score(self, rates: Sequence[float]) -> float:
        best_ones = 0.5 * self.shrink ** np.arange(len(rates))
        return -float(np.log10(0.3 + np.log(np.asarray(rates) / best_ones) ** 2).sum())

    def __call__(self, values: Mapping[str, Any], state: Path) -> float:
        file = state / "rates.json"
        rates = [*(json.loads(file.read_text()) if file.exists() else []), values["lr"]]
        file.write_text(json.dumps(rates))
        return self.score(rates)


RATE = Parameter("lr", "real", low=0.01, high=1.0, log=True)


def test_population_trains_keeps_ranges_and_leaves_its_best_state(
    tmp_path: Path, ray_on: None, caplog: pytest.LogCaptureFixture
):
    step = Moving(0.5)
    found = run_pbt([RATE], step, folder=str(tmp_path), population=4, intervals=4, first=[{"lr": 1.0}], workers=2)
    assert Counter(s.member for s in found.steps) == {0: 4, 1: 4, 2: 4, 3: 4}
    assert next(s.values for s in found.steps if s.member == 0 and s.interval == 0) == {"lr": 1.0}
    assert all(0.01 <= s.values["lr"] <= 1 for s in found.steps)
    assert len({s.values["lr"] for s in found.steps}) > 4  # some were changed on the way
    assert found.best.score == max(s.score for s in found.steps if s.interval == 3)
    rates = json.loads((found.state / "rates.json").read_text())
    assert len(rates) == 4
    assert step.score(rates) == found.best.score
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "pbt.json"]
    assert len(json.loads((tmp_path / "pbt.json").read_text())) == 16
    assert caplog.records == []
    with pytest.raises(OutputError, match="another population"):
        run_pbt([RATE], step, folder=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("shrink", "wins"), [(0.8, True), (1.0, False)])
def test_population_beats_the_best_fixed_rate_only_where_the_best_one_moves(
    shrink: float, wins: bool, tmp_path: Path, ray_on: None
):
    """Against the best of 400 fixed rates. Where the best rate stays (control) nothing can beat it, nor does this."""
    step = Moving(shrink)
    fixed = [step.score([rate] * 12) for rate in np.geomspace(0.01, 1, 400)]
    found = run_pbt([RATE], step, folder=str(tmp_path), population=6, intervals=12)
    assert (found.best.score > max(fixed) + 1) == wins  # a tenth of the error
    assert found.best.score > max(fixed) - 1.5
    assert len(json.loads((found.state / "rates.json").read_text())) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": SPACE}, "cannot change 's1'"),
        (
            {"parameters": [Parameter("m", "categorical", choices=(1,)), Parameter("x", "real", when=("m", (1,)))]},
            "'m'",
        ),
        ({"population": 3}, "at least 4 members"),
        ({"intervals": 0}, "at least one interval"),
        ({"first": [{"lr": 2.0}]}, "gives 2.0 for 'lr'"),
    ],
)
def test_population_refuses_in_one_sentence(change: dict, message: str, tmp_path: Path):
    options = {"parameters": [RATE], "folder": str(tmp_path), **change}
    with pytest.raises(UsageError, match=message):
        run_pbt(options.pop("parameters"), Moving(1.0), **options)


def broken(values: Mapping[str, Any], state: Path) -> float:
    raise ValueError("no such file")


def test_population_whose_step_fails_says_so(tmp_path: Path, ray_on: None):
    with pytest.raises(RuntimeError, match="step of the population failed"):
        run_pbt([RATE], broken, folder=str(tmp_path), population=4, intervals=2)
    assert not (tmp_path / "pbt.json").exists()
