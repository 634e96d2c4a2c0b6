"""A training problem whose best strata are known, and one where depth makes no difference, through pilot and race."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.abilities import ProbedAbilities
from analysis.pilot import run_pilot
from analysis.pilot_suggestion import suggest_from_pilot
from analysis.race_candidates import Candidate, standard_baselines, suggested_candidates
from analysis.racing import race
from spafit.heads import load_with_head
from spafit.presets import scaled_boundaries
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig
from tests.planted_training import PLANTED_BLOCKS, old_data, order_task, save_planted
from tests.tiny import save_tiny
from tests.training_fixtures import task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
#: Bits that may be lost: next to nothing. Training the last block alone loses exactly none of what is read below it.
TOLERANCE = 0.0004


def test_a_pilot_finds_the_block_that_has_to_change_and_the_race_confirms_it(tmp_path: Path) -> None:
    """Order is known below and must stay; only the upper block can let the head see what the new task asks."""
    model = str(tmp_path / "model")
    save_planted(Path(model))
    data = old_data()
    keep = ProbedAbilities((order_task(),), train_items=300, test_items=300, hidden=PLANTED_BLOCKS - 1)
    pilot = run_pilot(
        model, data, abilities=keep, out=tmp_path / "pilot", methods=("lora+bitfit:8",), seeds=(0, 1),
        adapter_type="II",
        settings=TrainSettings(epochs=10, learning_rate=1e-2, select_share=0, max_length=16),
        warm_up=TrainSettings(epochs=1, learning_rate=1e-3, select_share=0, max_length=16), device="cpu", quiet=True,
    )  # fmt: skip
    suggestion = suggest_from_pilot(pilot, tolerance=TOLERANCE)
    assert suggestion.choice is not None
    assert PLANTED_BLOCKS - 2 <= suggestion.choice.boundaries[0] <= PLANTED_BLOCKS - 1  # within one block
    assert suggestion.choice.beats_null
    free = suggest_from_pilot(pilot)  # the control: without a limit nothing keeps the lower blocks
    assert free.choice is not None
    rows = free.choice.table.set_index("s1")
    assert rows.loc[0, "forgetting"] > TOLERANCE
    assert rows.loc[PLANTED_BLOCKS - 1, "forgetting"] == 0

    headed = load_with_head(model, labels=data.labels, seed=0)
    # The last block in full is the suggestion's own place with another method, and says nothing against the place; all
    # blocks in full and at rank 64 are left out to save time, since lora-matched stands for training everywhere.
    left_out = ("last-1", "full", "lora")
    baselines = [b for b in standard_baselines(suggestion.config, headed.model, random=2) if b.name not in left_out]
    candidates = [
        replace(c, learning_rates=(1e-2,))
        for c in [
            *suggested_candidates(suggestion, n=2, bias_roles=pilot.run["bias_roles"], adapter_type="II"),
            *baselines,
        ]
    ]
    result = race(
        candidates, data, model=model, out=tmp_path / "race", rungs=1, confirm_seeds=(100, 101, 102, 103, 104),
        settings=TrainSettings(epochs=10, max_length=16), abilities=keep, tolerance=TOLERANCE, device="cpu", quiet=True,
    )  # fmt: skip
    print(result.to_markdown())
    assert result.verdict == "yes"
    assert result.forgetting is not None
    own = result.forgetting[result.forgetting["candidate"] == result.run["suggestion"]]
    assert own["value"].mean() <= TOLERANCE


def test_where_depth_makes_no_difference_the_race_says_within_noise(tmp_path: Path) -> None:
    """Which animal a sentence names is told by every hidden state; any plan learns it."""
    model = str(tmp_path / "model")
    save_tiny("bert", Path(model))
    data = task(200, scored=200)
    headed = load_with_head(model, labels=data.labels, seed=0)
    blocks = 3
    own = StrataConfig.from_boundaries({"encoder": (0, 2)}, blocks={"encoder": blocks})
    assert scaled_boundaries(blocks) != (0, 2)
    candidates = [
        replace(c, learning_rates=(5e-3,))
        for c in [Candidate("suggested", own, "suggestion"), *standard_baselines(own, headed.model, random=1)]
    ]
    result = race(
        candidates, data, model=model, out=tmp_path / "race", rungs=1, confirm_seeds=(100, 101, 102),
        settings=TrainSettings(epochs=6, max_length=16), device="cpu", quiet=True,
    )  # fmt: skip
    print(result.to_markdown())
    assert result.comparison["suggestion_score"].iloc[0] > 0.9
    assert result.verdict == "within noise"
