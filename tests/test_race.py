"""The race: candidates, halving, differences against a plain loop, verdicts, tolerance, time, resumption, command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.abilities import ProbedAbilities
from analysis.cli.main import app
from analysis.halving import promoted, ranked, schedule
from analysis.race_candidates import Candidate, by_relative_gradient, standard_baselines
from analysis.race_result import RaceResult
from analysis.race_trainings import Entry
from analysis.race_verdict import compare_confirmed, sentence_of, verdict_of
from analysis.racing import race
from spafit.adapt import count_trainable
from spafit.errors import DataError, OutputError, UsageError
from spafit.heads import load_with_head
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig
from tests.test_trajectory import animal
from tests.tiny import BLOCKS, save_tiny
from tests.training_fixtures import task

matplotlib.use("agg")
SETTINGS = TrainSettings(epochs=4, batch_size=8, max_length=16)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_tiny("bert", folder)
    return folder


def plan(s1: int, s2: int, blocks: int = BLOCKS) -> StrataConfig:
    return StrataConfig.from_boundaries({"encoder": (s1, s2)}, blocks={"encoder": blocks})


def few(rate: float = 1e-2) -> list[Candidate]:
    """A suggestion and three baselines, one of them protected; two share the frozen prefix."""
    return [
        Candidate("mine", plan(1, 2), "suggestion", (rate,)),
        Candidate("other", plan(1, 1), "baseline", (rate,), protected=True),
        Candidate("bias", plan(0, BLOCKS), "baseline", (rate, rate / 10)),
        Candidate("frozen", plan(BLOCKS, BLOCKS), "baseline", (1e-6,)),
    ]


def run(folder: Path, bert: Path, candidates: list[Candidate] | None = None, **changes: Any) -> RaceResult:
    options: dict[str, Any] = {"settings": SETTINGS, "rungs": 2, "eta": 2, "confirm_seeds": (100, 101)} | changes
    return race(
        candidates or few(), task(60, scored=40), model=str(bert), out=folder, device="cpu", quiet=True, **options
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> RaceResult:
    return run(tmp_path_factory.mktemp("race"), bert)


# ---------------------------------------------------------------- candidates


def test_baselines_answer_what_it_is_about_a_suggestion_and_none_stands_twice(bert: Path) -> None:
    model = load_with_head(str(bert), labels=("a", "b"), seed=0).model
    own = plan(1, 2)
    found = {c.name: c for c in standard_baselines(own, model, relative_gradients=np.array([3.0, 1.0, 2.0]))}
    assert {"spafit-scaled-II", "lora", "bitfit", "full", "head", "last-1", "lora-matched", "reversed"} <= set(found)
    assert "count-only" in found
    assert found["count-only"].protected
    assert "thirds" not in found  # equal to the suggestion at three blocks
    wanted = count_trainable(model, own)
    assert abs(count_trainable(model, found["lora-matched"].plan) - wanted) <= 0.02 * wanted
    ordered = by_relative_gradient(own, np.array([3.0, 1.0, 2.0]))
    assert [(s.blocks, s.method) for s in ordered.strata] == [
        ((0, 1), "lora+bitfit"), ((1, 2), "freeze"), ((2, 3), "bitfit"),
    ]  # fmt: skip
    with_remedy = [c.name for c in standard_baselines(own, model, remedies=["l2sp:0.1"])]
    assert "lora + l2sp:0.1" in with_remedy


# ---------------------------------------------------------------- halving


def test_rungs_share_out_less_than_two_fifths_of_training_everything() -> None:
    entries = [Entry(Candidate(str(i), plan(0, 0), "baseline"), 1.0) for i in range(40)]
    rungs = schedule(entries, rungs=3, eta=3, epochs=9)
    assert rungs == [(40, 1.0), (13, 3.0), (4, 9.0)]
    assert sum(n * e for n, e in rungs) / (40 * 9) <= 0.4


def test_ranks_go_by_score_then_loss_and_what_forgets_too_much_comes_last() -> None:
    entries = [Entry(Candidate(name, plan(0, 0), "baseline"), 1.0) for name in "abcd"]
    scores = {"a": (0.5, 2.0, 0.0), "b": (0.5, 1.0, 0.0), "c": (0.9, 1.0, 0.5), "d": (float("nan"), 9.0, 0.0)}
    rows = [
        {"candidate": n, "learning_rate": 1.0, "stage": "rung-0", "metric": m, "value": v}
        for n, values in scores.items() for m, v in zip(("headline", "loss", "forgetting"), values, strict=True)
    ]  # fmt: skip

    def names(**more: Any) -> str:
        return "".join(e.candidate.name for e in ranked(entries, rows, "rung-0", **more))

    assert names() == "cbad"
    assert names(tolerance=0.1) == "badc"
    entries[3] = Entry(replace(entries[3].candidate, role="suggestion"), 1.0)
    assert {e.candidate.name for e in promoted(entries, rows, "rung-0", 2)} == {"c", "d"}  # the suggestion goes on


# ---------------------------------------------------------------- the verdict


def scored(right: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"idx": range(len(labels)), "label": labels, "prediction": np.where(right, labels, 1 - labels)})


def test_differences_are_paired_over_items_and_seeds() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    right = {n: {s: draw.random(200) < p for s in (1, 2, 3)} for n, p in (("mine", 0.8), ("other", 0.6))}
    confirmed = {n: {s: scored(r, labels) for s, r in by.items()} for n, by in right.items()}
    table = compare_confirmed("mine", confirmed, ("accuracy",), n_boot=4000)
    gap = np.stack([right["mine"][s].astype(float) - right["other"][s] for s in (1, 2, 3)])
    assert table["difference"].iloc[0] == pytest.approx(gap.mean())
    # An independent reading of the same bootstrap: items and seeds drawn one by one.
    by_hand = [
        gap[draw.integers(3, size=3)][:, draw.integers(200, size=200)].mean() for _ in range(4000)
    ]  # fmt: skip
    low, high = np.percentile(by_hand, [2.5, 97.5])
    assert table["ci_low"].iloc[0] == pytest.approx(low, abs=0.01)
    assert table["ci_high"].iloc[0] == pytest.approx(high, abs=0.01)
    assert verdict_of(table) == "yes"
    same = compare_confirmed("mine", {"mine": confirmed["mine"], "other": confirmed["mine"]}, ("accuracy",))
    assert tuple(same[["difference", "ci_low", "ci_high"]].iloc[0]) == (0, 0, 0)
    assert verdict_of(same) == "within noise"


def test_plans_that_do_not_differ_are_told_apart_in_few_of_many_worlds() -> None:
    """The negative control of the verdict: 300 worlds of equal plans, five seeds."""
    hits = 0
    for world in range(300):
        draw = np.random.default_rng(world)
        labels, hard = draw.integers(0, 2, 150), draw.random(150)
        confirmed = {
            n: {s: scored(draw.random(150) < 0.5 + 0.5 * hard, labels) for s in range(5)} for n in ("mine", "other")
        }
        hits += verdict_of(compare_confirmed("mine", confirmed, ("accuracy",), n_boot=300)) != "within noise"
    assert hits / 300 <= 0.08  # five seeds resampled understate their own variance by a fifth


def test_the_verdict_is_against_all_that_keep_the_tolerance() -> None:
    def table(*rows: tuple[str, float, float, bool]) -> pd.DataFrame:
        return pd.DataFrame(
            [{"baseline": n, "difference": (lo + hi) / 2, "ci_low": lo, "ci_high": hi, "keeps_tolerance": k,
              "baseline_score": 0.5, "seeds": 5, "items": 9} for n, lo, hi, k in rows]
        )  # fmt: skip

    assert verdict_of(table(("a", 0.1, 0.2, True), ("b", -0.3, -0.1, False))) == "yes"
    assert verdict_of(table(("a", 0.1, 0.2, True), ("b", -0.3, -0.1, True))) == "no"
    assert verdict_of(table(("a", 0.1, 0.2, True), ("b", -0.1, 0.1, True))) == "within noise"
    assert verdict_of(table(("a", 0.1, 0.2, True)), suggestion_keeps=False) == "no"
    assert verdict_of(table()) == "untested"
    words = sentence_of("yes", "mine", table(("a", 0.1, 0.2, True), ("b", -0.3, -0.1, False)), "")
    assert "less the best of them, a" in words
    assert "Beyond the tolerance: b" in words


# ---------------------------------------------------------------- a race on a tiny model


def test_every_stage_is_in_the_table_and_finalists_were_confirmed_on_other_data(result: RaceResult) -> None:
    headline = result.trials[result.trials["metric"] == "headline"]
    assert set(headline["stage"]) == {"rung-0", "rung-1", "confirmation"}
    assert len(headline[headline["stage"] == "rung-0"]) == 5
    assert set(headline.loc[headline["stage"] == "confirmation", "split"]) == {"validation"}
    assert set(headline.loc[headline["stage"] != "confirmation", "split"]) == {"held-out"}
    assert "mine" in set(headline.loc[headline["stage"] == "confirmation", "candidate"])
    assert "other" in set(headline.loc[headline["stage"] == "confirmation", "candidate"])
    assert result.verdict in ("yes", "no", "within noise")
    assert result.run["complete"]
    assert result.run["spent"]["passes"] == pytest.approx(
        result.run["announced"]["passes"] + result.run["announced"]["confirmation_passes"], rel=0.35
    )
    assert "**mine**" in result.to_markdown()
    assert RaceResult.load(result.folder).to_markdown() == result.to_markdown()
    assert result.plot().get_xlabel()


def test_plans_with_the_same_frozen_blocks_share_their_prefix(result: RaceResult) -> None:
    kept = [p for p in (result.folder / "prefix").iterdir() if (p / "prefix.bin").is_file()]
    assert len(kept) == 2  # below block 1, shared by two plans and all rungs and seeds; below the end


def test_a_stamped_plan_says_what_tested_it(result: RaceResult, tmp_path: Path) -> None:
    path = result.stamp(plan(1, 2)).save(tmp_path / "strata.yaml")
    provenance = StrataConfig.load(path).provenance
    assert provenance["tested"] is True
    assert provenance["race"]["verdict"] == result.verdict
    assert provenance["race"]["seeds"] == [100, 101]


def test_a_second_call_trains_nothing_and_another_race_is_refused(
    result: RaceResult, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spafit.trainer import StratifiedTrainer

    def no_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a finished training was trained again")

    monkeypatch.setattr(StratifiedTrainer, "training_step", no_step)
    again = run(result.folder, bert)
    pd.testing.assert_frame_equal(again.trials, result.trials)
    with pytest.raises(OutputError, match="another race"):
        run(result.folder, bert, rungs=1)


def test_a_race_stops_at_its_time_and_goes_on_with_more(tmp_path: Path, bert: Path) -> None:
    short = run(tmp_path / "r", bert, time_budget=1e-3)
    assert short.verdict == "untested"
    assert "time budget" in short.sentence
    assert 0 < len(short.trials["trial"].unique()) < 5
    full = run(tmp_path / "r", bert)
    assert full.verdict != "untested"
    assert short.stamp(plan(1, 2)).provenance["tested"] is False


def test_what_forgets_more_than_is_tolerated_is_left_behind(tmp_path: Path, bert: Path) -> None:
    keep = ProbedAbilities((animal(),), train_items=60, test_items=60, hidden="last")
    candidates = [
        Candidate("mine", plan(2, 3), "suggestion", (1e-4,)),
        Candidate("wild", plan(0, 0), "baseline", (3.0,)),
    ]
    found = run(tmp_path / "r", bert, candidates, rungs=1, abilities=keep, tolerance=0.05)
    assert found.forgetting is not None
    means = found.forgetting.groupby("candidate")["value"].mean()
    assert means["wild"] > 0.05
    assert abs(means["mine"]) < 0.05
    assert found.verdict == "yes"
    assert "alone keeps the tolerance" in found.sentence


def test_bad_races_are_refused_in_a_sentence(tmp_path: Path, bert: Path) -> None:
    own = few()
    for changes, words in (
        ({"candidates": own[1:]}, "at least one suggestion"), ({"candidates": own[:1]}, "at least one baseline"),
        ({"candidates": [own[0], own[0], own[1]]}, "one name"), ({"confirm_seeds": (0,)}, "fresh seeds"),
        ({"rungs": 0}, "rungs is 0"), ({"tolerance": 0.1}, "needs abilities"), ({"time_budget": 0.0}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            run(tmp_path / "r", bert, **changes)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds no race"):
        RaceResult.load(tmp_path)


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_goes_from_a_task_to_raced_strata(tmp_path: Path, bert: Path) -> None:
    data = task(60, scored=40)
    for split, frame in data.frames.items():
        frame.assign(label=frame["label"].map({0: "cat", 1: "dog"})).to_csv(tmp_path / f"{split}.csv", index=False)
    command = [
        "suggest", "--model", str(bert), "--train", str(tmp_path / "train.csv"), "--validation",
        str(tmp_path / "validation.csv"), "--keep", "core.tense", "--keep-items", "40", "--strata",
        "freeze,bitfit,lora+bitfit:2", "--budget", "900", "--max-length", "16", "--pilot-seeds", "1", "--race",
        "--epochs", "1", "--confirm-seeds", "1", "--short-list", "1", "--out", str(tmp_path / "out"), "--quiet",
    ]  # fmt: skip
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output + repr(found.exception)
    assert "By the pilot" in found.stdout
    assert "Suggestion beats the baselines:" in found.stdout
    saved = StrataConfig.load(tmp_path / "out" / "strata.yaml")
    assert saved.provenance["tested"] is True
    assert saved.provenance["race"]["sentence"] in found.stdout
    for name in ("suggestion.png", "race.png", "placements.csv", "race/trials.csv"):
        assert (tmp_path / "out" / name).is_file()
    again = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(again.stdout)["race"]["verdict"] == saved.provenance["race"]["verdict"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to suggest from"),
        (["RUN", "--tolerance", "1bits"], "needs a pilot"),
        (["RUN", "--race"], "needs a pilot"),
        (["RUN", "--budget", "many"], "neither a number"),
        (["--train", "T", "--keep-text", "a", "--keep-blimp", "b"], "two units"),
    ],
)
def test_bad_options_are_refused_before_any_weight_is_read(options: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\nthe cat,a\nthe dog,b\n" * 10)
    given = [{"T": str(tmp_path / "t.csv"), "RUN": str(tmp_path)}.get(o, o) for o in options]
    found = CliRunner().invoke(app, ["suggest", *given])
    assert found.exit_code != 0
    assert words in str(found.exception)
