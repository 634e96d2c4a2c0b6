"""The space of plans, folds, and a planted problem with folds through Optuna: found, limited, killed, confirmed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from analysis.cli.main import app
from analysis.cli.search import Confirm
from spafit.data.training import TrainData
from spafit.errors import ConfigError, ModelError, OutputError, UsageError
from spafit.presets import preset_config
from spafit.settings import TrainSettings
from spafit.training import fit
from spafit.tuning import recipes
from spafit.tuning.crossval import folds
from spafit.tuning.objective import PlanObjective, measured
from spafit.tuning.parameters import Outcome, Parameter, Report
from spafit.tuning.population import PlanStep, search_population
from spafit.tuning.recipes import read_recipes, recipe_for
from spafit.tuning.search_result import SearchResult
from spafit.tuning.searching import search
from spafit.tuning.space import SearchSpace
from tests.tiny import BLOCKS, save_tiny
from tests.training_fixtures import PLAN, QUICK, task

matplotlib.use("agg")
SPACE = SearchSpace({"encoder": 6}, groups=(1, 2, 3), ranks=(4, 16, 64))
#: The planted optimum: frozen below 2, biases below 4, LoRA of rank 16 above.
BEST, BEST_RATE, FOLDS = (2, 4), 1e-3, 5
#: Folds are harder or easier for all plans alike; the standard error of a mean over them.
FOLD_EFFECTS = np.array([-0.10, -0.04, 0.0, 0.03, 0.11])
STANDARD_ERROR = float(FOLD_EFFECTS.std(ddof=1)) / math.sqrt(FOLDS)


def quality(plan: Any) -> float:
    """At most .8, for the planted plan, rank and rate alone."""
    s1, s2 = plan.boundaries()
    loss = 0.05 * abs(s1 - BEST[0]) + 0.05 * abs(s2 - BEST[1])
    for stratum in plan.strata:
        if stratum.lora is not None:
            loss += 0.005 * abs(math.log2(stratum.lora.rank / 16))
            assert stratum.learning_rate is not None
            loss += 0.05 * math.log10(stratum.learning_rate / BEST_RATE) ** 2
    return 0.8 - loss


def planted(values: Mapping[str, Any], report: Report) -> Outcome:
    """Five folds with effects of their own, and a little noise of each plan's."""
    plan, _ = SPACE.decode(values)
    noise = np.random.default_rng(int(measured(values), 16)).normal(0, 0.005, FOLDS)
    scores = [float(quality(plan) + e + n) for e, n in zip(FOLD_EFFECTS, noise, strict=True)]
    for i, score in enumerate(scores):
        report(i, score)
    size = sum((s.blocks[1] - s.blocks[0]) * (s.lora.rank if s.lora else 1) for s in plan.strata)
    return Outcome(
        {"quality": float(np.mean(scores)), "parameters": -float(size)}, {"parameters": size - 40.0},
        {"plan": plan.to_dict(), "folds": scores},
    )  # fmt: skip


def flat(values: Mapping[str, Any], report: Report) -> Outcome:
    plan, _ = SPACE.decode(values)
    return Outcome({"quality": 0.5}, {}, {"plan": plan.to_dict()})


# ---------------------------------------------------------------- the space


def test_every_pair_of_boundaries_is_encoded_and_comes_back() -> None:
    for pair in combinations_with_replacement(range(7), 2):
        from spafit.strata import StrataConfig

        plan = StrataConfig.from_boundaries({"encoder": pair}, blocks={"encoder": 6})
        back, _ = SPACE.decode(SPACE.encode(plan, learning_rate=1e-3))
        assert [(s.blocks, s.method) for s in back.strata] == [(s.blocks, s.method) for s in plan.strata]
        assert {s.lora.rank for s in back.strata if s.lora} == {s.lora.rank for s in plan.strata if s.lora}


def test_random_values_are_always_plans_and_methods_grow_where_asked() -> None:
    space = SearchSpace(
        {"encoder": 12, "decoder": 6}, groups=(1, 2, 3, 4, 5), methods=("freeze", "bitfit", "lora", "lora+bitfit"),
        types=("I", "II"), alphas=(1.0, 2.0), dropout=(0.0, 0.2),
    )  # fmt: skip
    from spafit.tuning.ray_backend import random_configuration
    from spafit.tuning.space import COMPLEXITY

    seen = set()
    for number in range(300):
        values = random_configuration(space.parameters(), seed=0, number=number)
        plan, settings = space.decode(values)
        seen.add(len([s for s in plan.strata if s.stack == "encoder"]))
        for stack in plan.blocks:
            order = [COMPLEXITY.index(s.method) for s in plan.strata if s.stack == stack]
            assert order == sorted(order)
        trained = [s for s in plan.strata if s.method != "freeze"]
        assert settings["learning_rate"] == (min(s.learning_rate for s in trained) if trained else None)
        again, _ = space.decode(space.encode(plan))
        assert again.strata == plan.strata
    assert seen == {1, 2, 3, 4, 5}


def test_presets_are_first_trials_and_bias_free_blocks_get_norms() -> None:
    for name in ("spafit-scaled-I", "thirds", "bitfit"):
        assert SPACE.encode(preset_config(name, blocks=6))["encoder.groups"] in (1, 2, 3)
    bare = SearchSpace({"decoder": 6}, {"decoder": ()})
    assert bare.methods == ("freeze", "norm", "lora+norm")
    with pytest.raises(UsageError, match="the space has 4, 16, 64"):
        SPACE.encode(
            replace(preset_config("lora", blocks=6), strata=(replace(preset_config("lora", blocks=6).strata[0],
                    method="lora+bitfit", lora=replace(preset_config("lora", blocks=6).strata[0].lora, rank=5)),))  # type: ignore[type-var]
        )  # fmt: skip


def test_a_space_file_is_read_and_its_errors_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE.to_yaml())
    assert SearchSpace({"encoder": 6}).with_file(tmp_path / "space.yaml") == SPACE
    for text, words in (
        ("methods: [freeze, lroa]\n", r"line 1.*Did you mean 'lora'"), ("groups: [9]\n", "line 1.*from 1 to 5"),
        ("ranks: [4]\nrates: {bias: [1, 0]}\n", "line 2.*above 0"), ("methods: [ia3, lora]\n", "one PEFT adapter"),
        ("depth: 3\n", "unknown field"), ("methods: [freeze]\n", "nothing to search"),
    ):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            SPACE.with_file(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        SPACE.with_file(tmp_path / "none.yaml")


# ---------------------------------------------------------------- folds


def repeated(n: int, *, regression: bool = False) -> TrainData:
    draw = np.random.default_rng(0)
    texts = [f"text {i // 2}" for i in range(n)]  # each text twice
    labels = draw.random(n) if regression else (np.arange(n) % 5 == 0).astype(int)
    frame = pd.DataFrame({"text": texts, "label": labels, "idx": range(n)})
    labels_of, metrics = (None, ("pearson",)) if regression else (("a", "b"), ("accuracy",))
    return TrainData("t", {"train": frame}, labels_of, metrics)


@pytest.mark.parametrize("regression", [False, True])
def test_folds_are_disjoint_cover_all_keep_texts_together_and_labels_alike(regression: bool) -> None:
    data = repeated(200, regression=regression)
    found = folds(data, 5, seed=1)
    held = [f.frames["fold"] for f in found]
    assert sorted(i for h in held for i in h["idx"]) == list(range(200))
    for one in found:
        assert not set(one.frames["train"]["text"]) & set(one.frames["fold"]["text"])
        assert abs(one.frames["fold"]["label"].mean() - data.frames["train"]["label"].mean()) < 0.12
    assert [h["idx"].tolist() for h in held] == [f.frames["fold"]["idx"].tolist() for f in folds(data, 5, seed=1)]
    with pytest.raises(UsageError, match="give at least 2"):
        folds(data, 1)


# ---------------------------------------------------------------- the planted problem


def assert_planted(plan: Any) -> None:
    """Within one block of the optimum, and one standard error over folds of its quality."""
    s1, s2 = plan.boundaries()
    assert abs(s1 - BEST[0]) <= 1
    assert abs(s2 - BEST[1]) <= 1
    assert quality(plan) >= 0.8 - STANDARD_ERROR


@pytest.mark.parametrize(("strategy", "trials"), [("random", 200), ("tpe", 80)])
def test_a_strategy_finds_the_planted_plan(strategy: str, trials: int, tmp_path: Path) -> None:
    space = replace(SPACE, groups=(3,)) if strategy == "random" else SPACE
    first = [space.encode(preset_config("spafit-scaled-I", blocks=6))]
    result = search(planted, space, out=tmp_path, strategy=strategy, n_trials=trials, first=first)
    assert_planted(result.plan())
    assert result.records[0].values == first[0]


def test_hyperopt_finds_the_planted_plan_through_the_same_search(tmp_path: Path) -> None:
    space = replace(SPACE, groups=(3,))
    result = search(planted, space, out=tmp_path, backend="hyperopt", strategy="tpe", n_trials=150, seed=2)
    assert_planted(result.plan())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_finds_the_planted_plan_with_two_workers_killed_and_continued(tmp_path: Path) -> None:
    process = start(tmp_path, 1000, backend="ray", strategy="random", workers=2)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and len(list((tmp_path / "trials").glob("*.json"))) < 20:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "trials").glob("*.json")}
    assert len(before) >= 20
    space = replace(SPACE, groups=(3,))
    assert start(tmp_path, 200, backend="ray", strategy="random", workers=2).wait(timeout=400) == 0
    assert all((tmp_path / "trials" / name).stat().st_mtime_ns == stamp for name, stamp in before.items())
    result = SearchResult.load(tmp_path, space)
    assert_planted(result.plan())


def test_a_grid_finds_the_planted_plan_and_ends_with_its_last_point(tmp_path: Path) -> None:
    chosen = ("encoder.s1", "encoder.fraction2", "rate.low-rank")
    fixed = SPACE.encode(preset_config("spafit-scaled-I", blocks=6)) | {"encoder.rank3": 16}
    grid = {p.name: p for p in SPACE.parameters()}
    few = [replace(grid[n], when=None, grid=(2.5e-4, 1e-3) if "rate" in n else grid[n].grid) for n in chosen]

    def part(values: Mapping[str, Any], report: Report) -> Outcome:
        return planted({**fixed, **values}, report)

    result = search(part, few, out=tmp_path, strategy="grid", n_trials=1000)
    assert len(result.records) == 7 * 5 * 2
    assert_planted(SPACE.decode({**fixed, **(result.best or {})})[0])


def test_the_best_keeps_the_limits_and_is_confirmed_below_what_was_chosen(tmp_path: Path) -> None:
    def confirm(values: Mapping[str, Any], seed: int) -> float:
        plan, _ = SPACE.decode(values)
        return quality(plan) + float(np.random.default_rng(seed).normal(0, 0.005))

    result = search(planted, SPACE, out=tmp_path, n_trials=60, confirm=confirm, confirm_seeds=(7, 8, 9))
    table = result.to_pandas()
    best = table[table["trial"] == result.run["best"]["trial"]].iloc[0]
    assert best["feasible"]
    assert (table["feasible"] == False).any()  # noqa: E712
    assert len(result.run["confirmed"]) == 3
    assert result.confirmed == pytest.approx(np.mean([c["value"] for c in result.run["confirmed"]]))
    assert "confirmed with 3 fresh seed(s)" in result.to_markdown()
    for name in ("trials.csv", "strata.yaml", "history.png", "importance.png", "search.json"):
        assert (tmp_path / name).is_file()
    loaded = SearchResult.load(tmp_path, SPACE)
    assert loaded.to_markdown() == result.to_markdown()
    assert result.plan().provenance["confirmed"]  # type: ignore[union-attr]


def test_importance_goes_to_what_matters_and_to_nothing_on_a_flat_objective(tmp_path: Path) -> None:
    parameters = (
        Parameter("a", "real", low=0, high=1), Parameter("b", "real", low=0, high=1),
        Parameter("c", "categorical", choices=("x", "y")),
    )  # fmt: skip

    def one(values: Mapping[str, Any], report: Report) -> Outcome:
        return Outcome({"quality": (values["a"] - 0.3) ** 2 + 0.01 * (values["c"] == "x")})

    result = search(one, parameters, out=tmp_path / "one", strategy="random", n_trials=60)
    shares = result.importance()
    assert shares.index[0] == "a"
    assert shares["a"] > 0.7
    assert shares["b"] < 0.1
    none = search(flat, SPACE, out=tmp_path / "flat", strategy="random", n_trials=10)
    assert none.importance().empty


def test_several_objectives_leave_a_front_and_pruning_gives_up_what_will_not_win(tmp_path: Path) -> None:
    front = search(
        planted, SPACE, out=tmp_path / "front", strategy="nsga2", n_trials=60, objectives=("quality", "parameters")
    )
    good = [r.outcome.objectives for r in front.records if r.outcome is not None and r.outcome.feasible]
    assert max(o["quality"] for o in good) > 0.65
    pruned = search(planted, SPACE, out=tmp_path / "pruned", n_trials=60, prune=True)
    states = pruned.to_pandas()["state"].value_counts()
    assert states.get("pruned", 0) > 0
    with pytest.raises(UsageError, match="Several objectives"):
        search(planted, SPACE, out=tmp_path / "x", strategy="gp", objectives=("quality", "parameters"))


SCRIPT = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from spafit.tuning.searching import search
from tests.test_search import SPACE, planted

log = Path(sys.argv[1]) / "evaluations.txt"

def slow(values, report):
    outcome = planted(values, report)
    time.sleep(0.02)
    with log.open("a") as f:
        f.write(repr(sorted(values.items())) + "\\n")
    return outcome

search(slow, replace(SPACE, groups=(3,)), out=sys.argv[1], n_trials=int(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def start(folder: Path, n: int, **options: Any) -> subprocess.Popen[bytes]:
    """A search of ``n`` trials in a process group of its own."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(n), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)


def test_a_killed_search_goes_on_and_repeats_no_finished_trial(tmp_path: Path) -> None:
    process = start(tmp_path, 1000)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list((tmp_path / "trials").glob("*.json"))) < 15:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "trials").glob("*.json")}
    assert len(before) >= 15
    assert start(tmp_path, len(before) + 10).wait(timeout=120) == 0
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "trials").glob("*.json")}
    assert len(after) >= len(before) + 9
    assert all(after[name] == stamp for name, stamp in before.items())
    # What was evaluated but not yet on record when the process was killed is evaluated again, and nothing else.
    lines = Counter((tmp_path / "evaluations.txt").read_text().splitlines())
    finished = [repr(sorted(json.loads((tmp_path / "trials" / name).read_text())["values"].items())) for name in before]
    assert [lines[values] for values in finished] == [1] * len(finished)
    assert lines.total() <= len(lines) + 1
    assert json.loads((tmp_path / "search.json").read_text())["status"] == "complete"


WITH_CONFIRMATION = SCRIPT.replace(
    "**json.loads(sys.argv[3]))",
    "confirm=lambda values, seed: confirmed(values, seed), confirm_seeds=(7, 8), **json.loads(sys.argv[3]))",
).replace(
    "search(slow",
    """
def confirmed(values, seed):
    with (Path(sys.argv[1]) / "confirmed.txt").open("a") as f:
        f.write(json.dumps(values) + "\\n")
    return 0.5

search(slow""",
)


def test_of_two_workers_the_last_confirms_and_what_it_confirms_is_the_best_of_both(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITH_CONFIRMATION, str(tmp_path), "24", "{}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [w.wait(timeout=120) for w in workers] == [0, 0]
    result = SearchResult.load(tmp_path, replace(SPACE, groups=(3,)))
    assert result.run["status"] == "complete"
    assert [c["seed"] for c in result.run["confirmed"]] == [7, 8]
    said = {line for line in (tmp_path / "confirmed.txt").read_text().splitlines()}
    assert [json.loads(line) for line in said] == [result.best]
    assert result.chosen == max(r.outcome.objectives["quality"] for r in result.records if r.outcome is not None)


def test_bad_searches_are_refused_in_a_sentence(tmp_path: Path) -> None:
    search(flat, SPACE, out=tmp_path / "a", strategy="random", n_trials=2)
    with pytest.raises(OutputError, match="another space"):
        search(flat, SearchSpace({"encoder": 5}), out=tmp_path / "a", n_trials=2)
    with pytest.raises(OutputError, match="cannot be used"):
        search(flat, SPACE, out=tmp_path / "b", n_trials=2, storage="sqlite:////no/such/folder/x.db")
    for changes, words in (
        ({"backend": "optna"}, "it can be"), ({"strategy": "annealing"}, "it can be"), ({"n_trials": 0}, "at least 1"),
        ({"backend": "hyperopt", "storage": "x"}, "for Optuna"), ({"workers": 2}, "same command"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            search(flat, SPACE, out=tmp_path / "c", **{"n_trials": 2, **changes})  # type: ignore[arg-type]


def test_a_storage_is_shared_by_two_calls(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'search.db'}"
    search(flat, SPACE, out=tmp_path / "one", strategy="random", n_trials=6, storage=url)
    both = search(flat, SPACE, out=tmp_path / "one", strategy="random", n_trials=9, storage=url)
    assert len(both.records) == 9


# ---------------------------------------------------------------- real trainings


def test_plans_are_trained_over_folds_within_a_limit_and_adapters_kept(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    space = SearchSpace({"encoder": BLOCKS}, ranks=(2, 8), rates={"low-rank": (5e-3, 2e-2), "bias": (5e-3, 2e-2)})
    objective = PlanObjective(
        space, str(tmp_path / "bert"), folds(task(40), 2), TrainSettings(epochs=1, batch_size=8, max_length=16),
        tmp_path / "trained", max_parameters=700, max_forgetting=1.0,
        forgetting=lambda folder: float((folder / "adapter_model.safetensors").stat().st_size > 0) / 2, device="cpu",
    )  # fmt: skip
    objective.check()
    result = search(objective, space, out=tmp_path / "out", strategy="random", n_trials=6, seed=3)
    table = result.to_pandas()
    assert set(table["state"]) == {"complete"}
    trained = table[table["feasible"]]
    assert len(trained)
    assert (-trained["parameters"] <= 700).all()
    assert (trained["forgetting"] == -0.5).all()
    assert len(list((tmp_path / "trained").glob("*/fold-1/seed-0/model/adapter_config.json"))) >= 1
    too_small = replace(objective, max_parameters=10)
    with pytest.raises(UsageError, match=r"smallest plan of the space trains: \d+"):
        too_small.check()
    with pytest.raises(UsageError, match="something that measures it"):
        replace(objective, forgetting=None).check()


def test_a_search_trains_its_plans_with_a_schedule(tmp_path: Path) -> None:
    from spafit import io
    from spafit.scheduling import At, OnPlateau, Schedule
    from spafit.strata import StrataConfig

    save_tiny("bert", tmp_path / "bert")
    space = SearchSpace({"encoder": BLOCKS}, ranks=(2, 2), methods=("lora",), rates={"low-rank": (5e-3, 2e-2)})
    plain = PlanObjective(
        space, str(tmp_path / "bert"), folds(task(24), 2), TrainSettings(epochs=1, batch_size=8, max_length=16),
        tmp_path / "trained", device="cpu",
    )  # fmt: skip
    objective = replace(plain, schedule=Schedule((At(step=1, rank=6),)))
    objective.check()
    assert objective.record() != plain.record()
    result = search(objective, space, out=tmp_path / "out", strategy="random", n_trials=1, seed=3)
    (run,) = tmp_path.glob("trained/*/fold-1/run.json")
    assert [c["label"] for c in io.read_json(run)["changes"]] == ["rank 2→6"]
    sizes = [o.count(StrataConfig.from_dict(io.read_json(run)["plan"])) for o in (plain, objective)]
    assert sizes[1] > sizes[0]  # a limit counts what trains at any time
    assert -result.to_pandas()["parameters"].iloc[0] == sizes[1]
    with pytest.raises(UsageError, match="select_share is 0"):
        replace(plain, schedule=Schedule((OnPlateau("freeze"),))).check()


# ---------------------------------------------------------------- recipes and the command


@pytest.fixture(scope="module")
def population_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's population; its rates and dropout change."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("population")
    save_tiny("bert", folder / "bert")
    search_population(*population_of(folder), **POPULATION, out=folder / "out")
    return folder


POPULATION: dict[str, Any] = {"population": 4, "intervals": 3, "workers": 1, "confirm_seeds": (5,)}


def population_of(folder: Path) -> tuple[PlanObjective, dict[str, Any]]:
    rates = {"low-rank": (1e-3, 2e-2), "bias": (1e-3, 2e-2)}
    space = SearchSpace({"encoder": BLOCKS}, ranks=(2,), rates=rates, dropout=(0.0, 0.3))
    objective = PlanObjective(
        space, str(folder / "bert"), folds(task(40), 2), TrainSettings(epochs=1, batch_size=8, max_length=16),
        folder / "unused", device="cpu",
    )  # fmt: skip
    return objective, space.encode(_ranked(preset_config("spafit-scaled-I", blocks=BLOCKS), 2))


def _ranked(plan: Any, rank: int) -> Any:
    return replace(
        plan,
        strata=tuple(
            s if s.lora is None else replace(s, lora=replace(s.lora, rank=rank, alpha=rank)) for s in plan.strata
        ),
    )


def intervals_of(folder: Path) -> dict[Path, int]:
    """Trained intervals, and when they were written."""
    return {p: p.stat().st_mtime_ns for p in (folder / "out" / "trained").rglob("adapter_model.safetensors")}


def test_a_population_is_kept_and_its_best_course_gives_the_best_score_again(population_folder: Path) -> None:
    objective, plan = population_of(population_folder)
    result = SearchResult.load(population_folder / "out", objective.space)
    assert len(result.records) == 4
    course = result.run["best"]["course"]
    assert [set(values) for values in course] == [{"rate.bias", "rate.low-rank", "dropout"}] * 3
    assert pd.read_csv(population_folder / "out" / "course.csv")["epoch"].tolist() == [0, 1, 2]
    step = PlanStep(objective, plan, population_folder / "again")
    assert step.replay(course, seed=0, data=objective.folds[0], split="fold") == result.chosen
    trained = intervals_of(population_folder)
    assert len(trained) >= 4 + 3 + 3
    again = search_population(objective, plan, **POPULATION, out=population_folder / "out")
    assert again.run["best"] == result.run["best"]
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in trained.items())


def test_an_interrupted_population_trains_no_finished_interval_again(population_folder: Path) -> None:
    """As after a kill: no record of the population, the trained intervals still there."""
    objective, plan = population_of(population_folder)
    before = SearchResult.load(population_folder / "out", objective.space).run["best"]
    trained = intervals_of(population_folder)
    shutil.rmtree(population_folder / "out" / "population")
    again = search_population(objective, plan, **POPULATION, out=population_folder / "out")
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in trained.items())
    assert again.run["best"] == before  # with one worker; several end in an order of their own


def test_training_goes_on_from_a_model_of_the_same_plan_and_base_alone(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    quick = replace(QUICK, epochs=1)
    first = fit(str(tmp_path / "bert"), PLAN, data=task(), settings=quick, out=tmp_path / "one", quiet=True)
    still = replace(quick, learning_rate=1e-12, weight_decay=0.0)
    options: dict[str, Any] = {"data": task(), "quiet": True}
    begin = first.model_folder(0)
    same = fit(str(tmp_path / "bert"), PLAN, settings=still, start=begin, out=tmp_path / "two", **options)
    base = fit(str(tmp_path / "bert"), PLAN, settings=still, out=tmp_path / "three", **options)
    weights = [load_file(r.model_folder(0) / "adapter_model.safetensors") for r in (first, same, base)]
    assert all(torch.allclose(weights[0][n], t, atol=1e-6) for n, t in weights[1].items())
    assert not all(torch.allclose(weights[0][n], t, atol=1e-4) for n, t in weights[2].items())
    with pytest.raises(OutputError, match="holds another run"):  # of another start
        fit(str(tmp_path / "bert"), PLAN, settings=still, out=tmp_path / "two", **options)
    save_tiny("bert", tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match="trained on another base"):
        fit(str(tmp_path / "other"), PLAN, settings=still, start=begin, out=tmp_path / "x", **options)
    with pytest.raises(ModelError, match="another plan"):
        fit(str(tmp_path / "bert"), "bitfit", settings=still, start=begin, out=tmp_path / "y", **options)


def test_recipes_have_sources_fit_by_task_and_name_the_line_of_an_error(tmp_path: Path) -> None:
    for recipe in read_recipes():
        assert "arXiv" in recipe.source
        assert recipe.apply(SPACE).parameters()
    assert recipe_for(items=300, kind="classification", paired=True).name == "few items"
    assert recipe_for(items=5000, kind="classification", paired=True).name == "few thousand pairs"
    assert recipe_for(items=5000, kind="generation", paired=False).name == "generation"
    with pytest.raises(UsageError, match="no recipe 'x'"):
        recipe_for(items=1, kind="classification", paired=False, name="x")
    shipped = Path(recipes.__file__).with_name("recipes.yaml").read_text()
    for old, new, words in (
        ("folds: 5", "folds: 0", r"recipes.yaml, line \d+.*at least 1"),
        ("epochs: 20", "epochs: -1", r"line \d+.*epochs must be"),
        ("groups: [1, 2, 3], methods: [freeze, bitfit, lora+bitfit]", "groups: [7]", r"line \d+.*from 1 to 5"),
    ):
        (tmp_path / "recipes.yaml").write_text(shipped.replace(old, new, 1))
        with pytest.raises(ConfigError, match=words):
            read_recipes(tmp_path / "recipes.yaml")


def test_the_command_searches_and_confirms_and_its_plan_trains(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    for split, frame in task(40, scored=20).frames.items():
        frame.assign(label=frame["label"].map({0: "cat", 1: "dog"})).to_csv(tmp_path / f"{split}.csv", index=False)
    (tmp_path / "space.yaml").write_text("ranks: [2]\nrates: {low-rank: [0.01, 0.02], bias: [0.01, 0.02]}\n")
    command = [
        "search", "--model", str(tmp_path / "bert"), "--train", str(tmp_path / "train.csv"), "--validation",
        str(tmp_path / "validation.csv"), "--space", str(tmp_path / "space.yaml"), "--trials", "3", "--folds", "2",
        "--epochs", "1", "--confirm-seeds", "1", "--max-length", "16", "--out", str(tmp_path / "out"), "--quiet",
    ]  # fmt: skip
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output + repr(found.exception)
    assert "confirmed with 1 fresh seed(s)" in found.stdout
    table = pd.read_csv(tmp_path / "out" / "trials.csv")
    assert table["strata"].iloc[0] == "encoder[0,1) freeze; encoder[1,3) lora+bitfit:2"  # SPAFIT's, scaled, comes first
    plan = tmp_path / "out" / "strata.yaml"
    shown = CliRunner().invoke(
        app, ["train", "--model", str(tmp_path / "bert"), "--strata", str(plan), "--dry-run"]
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "No data"), (["--max-forgetting", "0.1"], "needs --keep"),
        (["--objectives", "forgetting"], "needs --keep"),
        (["--max-params", "few"], "neither a number"),
    ],
)  # fmt: skip
def test_bad_options_of_a_search_are_refused(options: list[str], words: str) -> None:
    found = CliRunner().invoke(app, ["search", *options])
    assert isinstance(found.exception, UsageError)
    assert words in str(found.exception)


def test_a_missing_library_names_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r'pip install "spafit\[tune\]"'):
        search(flat, SPACE, out=tmp_path, n_trials=1)


def test_a_folder_of_other_data_or_settings_is_refused_and_a_new_best_is_confirmed_anew(tmp_path: Path) -> None:
    search(flat, SPACE, out=tmp_path / "a", strategy="random", n_trials=2, depends_on=["data 1", {"epochs": 1}])
    with pytest.raises(OutputError, match="another space, data or settings"):
        search(flat, SPACE, out=tmp_path / "a", strategy="random", n_trials=2, depends_on=["data 2", {"epochs": 1}])
    save_tiny("bert", tmp_path / "bert")
    space = SearchSpace({"encoder": BLOCKS}, ranks=(2,), rates={"low-rank": (5e-3, 2e-2), "bias": (5e-3, 2e-2)})
    data = task(24, scored=12)
    objective = PlanObjective(
        space, str(tmp_path / "bert"), (data,), TrainSettings(epochs=1, max_length=16), tmp_path / "t", device="cpu"
    )
    other = replace(objective, settings=TrainSettings(epochs=2, max_length=16))
    assert list(map(repr, objective.record())) != list(map(repr, other.record()))
    assert list(map(repr, objective.record())) == list(map(repr, replace(objective).record()))
    confirm = Confirm(objective, tmp_path / "confirmed", "validation")
    one, two = (
        space.encode(preset_config(name, blocks=BLOCKS), learning_rate=1e-2) for name in ("bitfit", "head")
    )  # fmt: skip
    assert 0 <= confirm(one, 7) <= 1
    assert 0 <= confirm(two, 7) <= 1  # a search that went on may have another best trial


def test_a_plan_that_the_space_would_change_is_no_first_trial() -> None:
    backwards = preset_config("reversed:thirds", blocks=6)
    with pytest.raises(UsageError, match="do not grow with depth"):
        SPACE.encode(backwards)
    free = replace(SPACE, growing=False)
    back, _ = free.decode(free.encode(backwards))
    assert [(s.blocks, s.method) for s in back.strata] == [(s.blocks, s.method) for s in backwards.strata]


def test_a_grid_beyond_measure_is_refused(tmp_path: Path) -> None:
    huge = SearchSpace({"encoder": 24}, groups=(5,), methods=("freeze", "bitfit", "norm", "lora", "lora+bitfit"))
    with pytest.raises(UsageError, match="more than 100,000 points"):
        search(flat, huge, out=tmp_path, strategy="grid", n_trials=5)


def test_a_full_disk_ends_a_search_and_its_trial_is_tried_again(tmp_path: Path) -> None:
    full = [True]

    def objective(values: Mapping[str, Any], report: Report) -> Outcome:
        if full[0]:
            raise OutputError("Cannot write: no space left.")
        return flat(values, report)

    with pytest.raises(OutputError, match="no space"):
        search(objective, SPACE, out=tmp_path, strategy="random", n_trials=3)
    full[0] = False
    result = search(objective, SPACE, out=tmp_path, strategy="random", n_trials=3)
    assert result.to_pandas()["state"].tolist() == ["complete"] * 3
