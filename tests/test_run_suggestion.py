"""Strata from folders of probing runs: one model together, two refused, stack by stack, within a budget, by command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest
from typer.testing import CliRunner

from analysis.cli.main import app
from analysis.run_suggestion import merged_config, suggest_from_runs
from analysis.suggestion import suggest_strata
from probing.results import ProbeResults
from probing.running import probe_layers
from spafit.errors import UsageError
from spafit.strata import StrataConfig
from tests.test_suggestion import stepped
from tests.tiny import BLOCKS, save_tiny

matplotlib.use("agg")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[ProbeResults]:
    """Two runs of one model with different tasks, and one of another model."""
    place = tmp_path_factory.mktemp("runs")
    save_tiny("bert", place / "bert")
    save_tiny("bert", place / "other", seed=1)
    found = []
    for name, model, task in (("a", "bert", "core.tense"), ("b", "bert", "core.voice"), ("c", "other", "core.tense")):
        probe_layers(
            str(place / model), [task], controls=(), seeds=1, max_train=60, out=place / name, device="cpu",
            cache_dir=place / "cache", quiet=True,
        )  # fmt: skip
        found.append(ProbeResults.load(place / name))
    return found


def test_runs_of_one_model_are_taken_together_and_of_two_refused(runs: list[ProbeResults]) -> None:
    found = suggest_from_runs(runs[:2])
    assert list(found) == ["encoder"]
    assert sorted(t for names in found["encoder"].tasks.values() for t in names) == ["core.tense", "core.voice"]
    with pytest.raises(UsageError, match="two different models"):
        suggest_from_runs([runs[0], runs[2]])
    with pytest.raises(UsageError, match="no probing run"):
        suggest_from_runs([])
    with pytest.raises(UsageError, match="several curves"):
        suggest_from_runs([runs[0], runs[0]])


def test_each_stack_has_strata_of_its_own_in_one_plan() -> None:
    suggestions = {
        "encoder": suggest_strata(stepped(12, 3, 8), num_blocks=12, stack="encoder"),
        "decoder": suggest_strata(stepped(6, 1, 4), num_blocks=6, stack="decoder"),
    }
    plan = merged_config(suggestions, blocks={"encoder": 12, "decoder": 6, "image": 2})
    assert plan.boundaries("encoder") == suggestions["encoder"].boundaries
    assert plan.boundaries("decoder") == suggestions["decoder"].boundaries
    assert plan.provenance["not_probed"] == ["image"]
    assert [s.method for s in plan.strata if s.stack == "image"] == ["freeze"]
    assert set(plan.provenance["stacks"]) == {"encoder", "decoder"}


def test_a_budget_moves_boundaries_no_further_than_it_must() -> None:
    def count(plan: StrataConfig) -> int:
        return sum((s.blocks[1] - s.blocks[0]) * {"freeze": 0, "bitfit": 1}.get(s.method, 10) for s in plan.strata)

    free = suggest_strata(stepped(12, 3, 8), num_blocks=12)
    assert count(free.config) > 30
    kept = suggest_strata(stepped(12, 3, 8), num_blocks=12, budget=30, count=count)
    assert count(kept.config) <= 30
    moved = sum(abs(a - b) for a, b in zip(free.boundaries, kept.boundaries, strict=True))
    for pair in ((a, b) for a in range(13) for b in range(a, 13)):  # no nearer pair keeps it
        plan = StrataConfig.from_boundaries({"encoder": pair}, blocks={"encoder": 12})
        if count(plan) <= 30:
            assert sum(abs(a - b) for a, b in zip(free.boundaries, pair, strict=True)) >= moved
    assert "Moved from" in kept.explain()
    with pytest.raises(UsageError, match="smallest plan of these strata trains: 0"):
        suggest_strata(stepped(12, 3, 8), num_blocks=12, budget=-1, count=count)
    with pytest.raises(UsageError, match="to count"):
        suggest_strata(stepped(12, 3, 8), num_blocks=12, budget=5)


@pytest.mark.parametrize(
    "methods", [("lora:8",), ("freeze", "lora"), ("freeze", "norm", "bitfit", "lora:4", "lora:16")]
)
def test_one_to_five_strata_from_probing_alone(methods: tuple[str, ...]) -> None:
    found = suggest_strata(stepped(12, 3, 8), num_blocks=12, strata=methods)
    own = sorted(found.config.strata, key=lambda s: s.blocks)
    assert [s.method for s in own] == [m.partition(":")[0] for m in methods]
    assert [s.lora.rank for s in own if s.lora] == [int(m.partition(":")[2] or 64) for m in methods if "lora" in m]
    assert "Untested" in found.explain()
    assert found.plot() is not None
    with pytest.raises(UsageError, match="from one to 5"):
        suggest_strata(stepped(12, 3, 8), num_blocks=12, strata=("freeze",) * 6)


def test_the_command_writes_a_plan_that_train_reads(runs: list[ProbeResults], tmp_path: Path) -> None:
    folders: list[Any] = [str(r.folder) for r in runs[:2]]
    found = CliRunner().invoke(app, ["suggest", *folders, "--out", str(tmp_path), "--budget", "200"])
    assert found.exit_code == 0, found.output + repr(found.exception)
    plan = StrataConfig.load(tmp_path / "strata.yaml")
    assert dict(plan.blocks) == {"encoder": BLOCKS}
    assert plan.provenance["tested"] is False
    model = str(runs[0].run["model"]["reference"])
    shown = CliRunner().invoke(
        app, ["train", "--model", model, "--strata", str(tmp_path / "strata.yaml"), "--dry-run"]
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "20"], "smallest plan of these strata trains"),
        (["--tolerance", "2points"], "read in bits"),
        (["--model", "OTHER"], "two different models"),
    ],
)
def test_what_cannot_be_kept_is_said_before_the_pilot_trains(
    options: list[str], words: str, runs: list[ProbeResults], tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "the cat runs,a\nthe dog runs,b\n" * 20)
    other = str(runs[2].run["model"]["reference"])
    given = [other if o == "OTHER" else o for o in options]
    command = ["suggest", str(runs[0].folder), "--train", str(tmp_path / "t.csv"), "--keep", "core.tense"]
    found = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), *given])
    assert isinstance(found.exception, UsageError), found.output
    assert words in str(found.exception)
    assert not (tmp_path / "out" / "pilot").exists()
