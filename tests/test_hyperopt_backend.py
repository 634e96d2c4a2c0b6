"""The Hyperopt backend: planted optimum, conditions, constraints, resuming, refusals, silence."""

from __future__ import annotations

import builtins
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spafit.errors import OutputError, UsageError
from spafit.tuning.hyperopt_backend import run_hyperopt
from spafit.tuning.parameters import Outcome, Parameter
from tests.paths import ROOT
from tests.planted_search import BEST, SPACE, Recorded, assert_found, best, lines

STRATEGIES = {"random": 150, "tpe": 70, "anneal": 70}  # trials that each needs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_finds_the_planted_optimum(strategy: str, tmp_path: Path):
    record = tmp_path / "record.jsonl"
    run_hyperopt(SPACE, Recorded(record), strategy=strategy, n_trials=STRATEGIES[strategy], folder=str(tmp_path))
    assert len(lines(record)) == STRATEGIES[strategy]
    assert_found(best(record))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_turned_objective_ends_elsewhere(strategy: str, tmp_path: Path):
    """Negative control: the samplers have no leaning towards the planted place."""
    record = tmp_path / "record.jsonl"
    run_hyperopt(SPACE, Recorded(record, sign=-1), strategy=strategy, n_trials=60, folder=str(tmp_path))
    with pytest.raises(AssertionError):
        assert_found({**best(record), "value": -best(record)["value"]})


def test_guided_strategies_beat_random_draws(tmp_path: Path):
    """Mean quality of the second half of 60 trials, over three seeds: random draws do not get better, the others do."""
    means = {}
    for strategy in STRATEGIES:
        values: list[float] = []
        for seed in range(3):
            folder = tmp_path / f"{strategy}-{seed}"
            record = Recorded(tmp_path / f"{folder.name}.jsonl")
            run_hyperopt(SPACE, record, strategy=strategy, n_trials=60, folder=str(folder), seed=seed)
            values += [r["value"] for r in lines(record.path)[30:]]
        means[strategy] = np.mean(values)
    assert means["tpe"] > means["random"] + 0.06
    assert means["anneal"] > means["random"] + 0.2


def test_draws_follow_the_declared_distributions(tmp_path: Path):
    """Every integer as likely, ends included; logarithms uniform; conditional ones active with their parent only."""
    space = (*SPACE, Parameter("extra", "real", low=2, high=3, when=("s1", (0, 6))))
    record = tmp_path / "record.jsonl"
    run_hyperopt(space, Recorded(record), strategy="random", n_trials=400, folder=str(tmp_path))
    drawn = [r["values"] for r in lines(record)]
    counts = Counter(v["s1"] for v in drawn)
    chi2 = sum((counts[i] - 400 / 7) ** 2 / (400 / 7) for i in range(7))
    assert chi2 < 22.5  # 0.999 quantile with 6 degrees of freedom
    logs = np.sort([(np.log10(v["lr"]) + 5) / 4 for v in drawn])
    assert np.abs(logs - (np.arange(400) + 0.5) / 400).max() < 1.95 / 20  # Kolmogorov, 0.999
    for values in drawn:
        assert ("rank" in values) == (values["method"] == "lora")
        assert ("extra" in values) == (values["s1"] in (0, 6))
        assert isinstance(values["s1"], int)
        assert list(values) == [p.name for p in space if p.name in values]
        if "rank" in values:
            assert isinstance(values["rank"], int)
            assert 1 <= values["rank"] <= 64


def test_first_configurations_are_first_and_once(tmp_path: Path):
    record = tmp_path / "record.jsonl"
    other = {"s1": 6, "fraction": 0.1, "method": "freeze", "lr": 0.01}
    first = [{**other, "rank": 64}, BEST]  # rank is not active beside freeze
    for n_trials in (1, 3, 5):
        run_hyperopt(SPACE, Recorded(record), strategy="tpe", n_trials=n_trials, folder=str(tmp_path), first=first)
    assert [r["values"] for r in lines(record)][:2] == [other, BEST]
    assert len(lines(record)) == 5
    assert sum(r["values"] in (other, BEST) for r in lines(record)) == 2


def test_interrupted_search_equals_an_uninterrupted_one(tmp_path: Path):
    for folder, calls in {"once": [30], "thrice": [7, 25, 30]}.items():
        for n_trials in calls:
            record = Recorded(tmp_path / f"{folder}.jsonl")
            run_hyperopt(SPACE, record, strategy="tpe", n_trials=n_trials, folder=str(tmp_path / folder), seed=3)
    assert lines(tmp_path / "once.jsonl") == lines(tmp_path / "thrice.jsonl")
    assert (tmp_path / "once" / "hyperopt.json").read_bytes() == (tmp_path / "thrice" / "hyperopt.json").read_bytes()


KILLED = """
from pathlib import Path
from spafit.tuning.hyperopt_backend import run_hyperopt
from tests.planted_search import SPACE, Recorded
run_hyperopt(SPACE, Recorded(Path({record!r}), steps=1, pause=0.1), strategy="tpe", n_trials=500, folder={folder!r})
"""


def test_killed_search_goes_on_and_repeats_nothing(tmp_path: Path):
    record = tmp_path / "record.jsonl"
    code = KILLED.format(record=str(record), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(lines(record)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # between two lines of the record, not within one
    time.sleep(0.05)
    process.kill()
    process.wait()
    before = len(lines(record))
    run_hyperopt(SPACE, Recorded(record), strategy="tpe", n_trials=before + 10, folder=str(tmp_path))
    after = [str(r["values"]) for r in lines(record)]
    assert before + 10 <= len(after) <= before + 11  # one may have ended whose end Hyperopt did not hear of
    assert len(set(after)) >= before + 10


@pytest.mark.parametrize("strategy", ["tpe", "anneal"])
def test_infeasible_optimum_is_not_what_is_searched(strategy: str, tmp_path: Path):
    """With s1 limited to 2 the later trials stay there; without the limit (control) they do not."""
    share = {}
    for limit in (2, 6):
        kept = []
        for seed in range(2):
            record = Recorded(tmp_path / f"{limit}-{seed}.jsonl", limit=limit)
            folder = str(tmp_path / f"{limit}-{seed}")
            run_hyperopt(SPACE, record, strategy=strategy, n_trials=70, folder=folder, first=[BEST], seed=seed)
            kept += [r["values"]["s1"] <= 2 for r in lines(record.path)[35:]]
            assert abs(best(record.path, limit=limit)["values"]["s1"] - min(limit, BEST["s1"])) <= 1
        share[limit] = np.mean(kept)
    assert share[2] > share[6] + 0.2


def test_single_value_ranks_excess_and_ignores_infeasible_quality():
    def value(quality: float, *excess: float) -> float | None:
        return Outcome({"quality": quality}, {str(i): e for i, e in enumerate(excess)}).single_value("quality")

    assert value(0.7, -1, 0) == 0.7
    ranked = [value(9, float("inf")), value(0, 1e9), value(1e9, 2), value(5, 0.5, 0.5), value(-3, 0.1), value(-1e11, 0)]
    assert ranked == sorted(ranked)  # type: ignore[type-var]
    assert len(set(ranked)) == len(ranked)
    assert all(v is not None and np.isfinite(v) for v in ranked)
    assert value(1, 2) == value(-1, 2)
    assert value(1, float("nan")) == value(9, float("inf"))
    assert value(float("nan")) is None
    with pytest.raises(UsageError, match="no 'speed'"):
        Outcome({"quality": 1}).single_value("speed")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failing_trials_count_and_are_left(strategy: str, tmp_path: Path):
    record = tmp_path / "record.jsonl"
    run_hyperopt(SPACE, Recorded(record, fails="lora"), strategy=strategy, n_trials=60, folder=str(tmp_path))
    methods = [r["values"]["method"] for r in lines(record)]
    assert len(methods) == 60
    assert "lora" in methods
    if strategy != "random":
        assert methods[40:].count("lora") < 20 / 3


def test_space_of_single_values_and_small_ranges(tmp_path: Path):
    space = (Parameter("a", "integer", low=3, high=3), Parameter("b", "categorical", choices=((1, 2),)),
             Parameter("c", "real", low=0.5, high=0.5, when=("a", (3,))))  # fmt: skip
    seen = []

    def evaluate(values, report):
        seen.append(dict(values))
        return Outcome({"quality": 1.0})

    for strategy in STRATEGIES:
        run_hyperopt(space, evaluate, strategy=strategy, n_trials=25, folder=str(tmp_path / strategy))
    assert seen == [{"a": 3, "b": (1, 2), "c": 0.5}] * 75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "grid"}, "strategy of Hyperopt is 'grid'"),
        ({"objectives": ("quality", "retention")}, "Optuna's nsga2"),
        ({"workers": 2}, "optuna or ray"),
        ({"prune": True}, "optuna or ray"),
        ({"first": [{**BEST, "s1": 7}]}, "gives 7 for 's1'. Give 0 to 6"),
        ({"first": [{**BEST, "s1": 1.5}]}, "gives 1.5 for 's1'"),
        ({"first": [{"s1": 1}]}, "no value for 'fraction'"),
        ({"first": [{**BEST, "depth": 1}]}, "'depth', which is no parameter"),
        ({"parameters": (*SPACE, SPACE[0])}, "'s1' comes twice"),
        ({"parameters": SPACE[::-1]}, "'rank' depends on 'method'"),
        ({"parameters": (*SPACE, Parameter("x", "real", when=("lr", (0.1,))))}, "'x' depends on 'lr'"),
    ],
)
def test_refuses_in_one_sentence_before_evaluating(change: dict, message: str, tmp_path: Path):
    options = {"parameters": SPACE, "strategy": "tpe", "n_trials": 3, "folder": str(tmp_path), **change}
    with pytest.raises(UsageError, match=message):
        run_hyperopt(options.pop("parameters"), Recorded(tmp_path / "record.jsonl"), **options)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_search_is_refused(tmp_path: Path):
    record = Recorded(tmp_path / "record.jsonl")
    run_hyperopt(SPACE, record, strategy="random", n_trials=1, folder=str(tmp_path))
    with pytest.raises(OutputError, match="another space"):
        run_hyperopt(SPACE[:4], record, strategy="random", n_trials=2, folder=str(tmp_path))
    with pytest.raises(OutputError, match="another objective"):
        run_hyperopt(SPACE, record, strategy="random", n_trials=2, folder=str(tmp_path), objectives=("bits",))


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "hyperopt":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r'pip install "spafit\[hyperopt\]"'):
        run_hyperopt(SPACE, Recorded(tmp_path / "r"), strategy="tpe", n_trials=1, folder=str(tmp_path))


def test_says_nothing_and_leaves_the_process_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def process_state():
        return (
            dict(os.environ),
            list(warnings.filters),
            logging.getLogger().handlers[:],
            np.random.get_state()[1].tolist(),  # noqa: NPY002 (what must not change)
        )

    before = process_state()
    run_hyperopt(SPACE, Recorded(tmp_path / "r"), strategy="tpe", n_trials=25, folder=str(tmp_path))
    assert process_state() == before
    assert capfd.readouterr() == ("", "")


def test_importing_spafit_does_not_import_it():
    code = "import spafit, sys, spafit.tuning.hyperopt_backend; sys.exit('hyperopt' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
