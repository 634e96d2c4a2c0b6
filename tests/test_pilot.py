"""A pilot on a tiny model: gradients against autograd, hybrids against hand-made ones, resumption, bad input."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from analysis.abilities import LanguageAbilities, ProbedAbilities
from analysis.block_evidence import BlockEvidence
from analysis.pilot import COLUMNS, Pilot, reduced, run_pilot
from analysis.pilot_suggestion import suggest_from_pilot
from analysis.placed_strata import on_model, placed_strata
from spafit import checkpoint
from spafit.adapt import apply_strata
from spafit.batches import Collator, encode
from spafit.errors import ConfigError, DataError, OutputError, UsageError
from spafit.language_models import load_language_model
from spafit.models import load_model
from spafit.presets import preset_config
from spafit.runtime import generator, torch_seed
from spafit.settings import TrainSettings
from spafit.strata import StrataConfig
from tests.test_trajectory import animal
from tests.tiny import BLOCKS, save_tiny
from tests.training_fixtures import task

matplotlib.use("agg")
SETTINGS = TrainSettings(epochs=2, batch_size=4, learning_rate=2e-2, max_length=16, select_share=0)
WARM_UP = dataclasses.replace(SETTINGS, epochs=1, learning_rate=1e-3)
KEEP = ProbedAbilities((animal(),), train_items=60, test_items=60, hidden="last")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_tiny("bert", folder)
    return folder


def pilot_in(folder: Path, bert: Path, seeds: tuple[int, ...] = (0, 1)) -> Pilot:
    return run_pilot(
        str(bert), task(48), abilities=KEEP, out=folder, methods=("bitfit", "lora+bitfit:2"), settings=SETTINGS,
        warm_up=WARM_UP, seeds=seeds, batches=4, device="cpu", quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Pilot:
    return pilot_in(tmp_path_factory.mktemp("pilot"), bert)


def rows(pilot: Pilot, quantity: str) -> pd.DataFrame:
    return pilot.table[pilot.table["quantity"] == quantity]


def test_the_table_holds_every_method_block_seed_and_item(pilot: Pilot) -> None:
    assert tuple(pilot.table.columns) == COLUMNS
    assert len(rows(pilot, "parameters")) == 2 * BLOCKS
    assert len(rows(pilot, "gradient")) == 2 * BLOCKS * 2 * 4
    abilities = rows(pilot, "ability")
    assert len(abilities) == 2 * 60 * (2 * BLOCKS + 1)
    assert Pilot.load(pilot.folder).table.equals(pilot.table)
    assert np.isfinite(pilot.relative_gradients()).all()
    assert len(pilot.relative_gradients()) == BLOCKS


def test_squared_gradients_are_those_of_autograd_in_the_planned_parameters(pilot: Pilot) -> None:
    head = pilot.folder / "head" / "seed-0" / "model"
    data = task(48)
    plain = checkpoint.load(head).merge()
    plan = placed_strata(["bitfit"], [], stack="encoder", num_blocks=BLOCKS)
    with torch_seed(0, "pilot adapter"):
        stratified = apply_strata(copy.deepcopy(plain), plan)
    frame = data.frames["train"].iloc[generator(0, "pilot batches").permutation(48)[:16]]
    encoded = encode(frame, load_model(str(head)).tokenizer, max_length=16, regression=False)
    batch = Collator(load_model(str(head)).tokenizer)([encoded[i] for i in range(4)])
    batch.pop("index")
    stratified.model.eval()
    stratified.model(**batch).loss.backward()
    named = stratified.model.named_parameters()
    own = [p.grad for n, p in named if ".layer.1." in n and n.endswith("bias") and p.grad is not None]
    expected = float(torch.stack([g.double().square().sum() for g in own]).sum())
    found = rows(pilot, "gradient").query("method == 'bitfit' and seed == 0 and item == 0 and block == 1")["value"]
    assert float(found.iloc[0]) == pytest.approx(expected, rel=1e-5)


def test_parameters_by_block_and_outside_add_up_to_the_plans_own_count(pilot: Pilot, bert: Path) -> None:
    from spafit.heads import load_with_head

    model = load_with_head(str(bert), labels=("cat", "dog"), seed=0).model
    evidence = BlockEvidence.from_pilot(pilot, n_boot=20)
    for pair in ((0, 0), (1, 2), (0, 3), (3, 3)):
        config = placed_strata(
            ["freeze", *evidence.methods], pair, stack="encoder", num_blocks=BLOCKS
        )  # fmt: skip
        counted = apply_strata(copy.deepcopy(model), config).trainable_parameters()
        s1, s2 = pair
        by_block = evidence.parameters[0, s1:s2].sum() + evidence.parameters[1, s2:].sum()
        assert counted == by_block + evidence.outside


def test_blocks_put_back_are_as_they_were_and_the_others_as_trained(pilot: Pilot, bert: Path) -> None:
    """The ability with blocks from s on as trained, against a model put together by hand."""
    before, after = load_model(str(bert)), load_model(pilot.folder / "all-blocks" / "seed-0" / "model")
    names = dict(before.model.named_parameters())
    for s, kept in ((1, "everything"), (1, "bitfit"), (0, "everything")):
        mixed = load_model(pilot.folder / "all-blocks" / "seed-0" / "model")
        with torch.no_grad():
            for name, parameter in mixed.model.named_parameters():
                block = int(name.split(".layer.")[1].split(".")[0]) if ".layer." in name else None
                if block is not None and (block < s or (kept == "bitfit" and not name.endswith("bias"))):
                    parameter.copy_(names[name])
        read = KEEP.reader(after)
        from analysis.causal import exchanged

        with exchanged(after.model, before.model, range(BLOCKS), outside=True):
            read()
        by_hand = KEEP.reader(mixed)
        with exchanged(mixed.model, before.model, range(BLOCKS), outside=True):
            by_hand()
        expected = by_hand()["animal"].values
        chosen = rows(pilot, "ability").query(f"seed == 0 and block == {s} and kept == '{kept}'")
        assert np.allclose(chosen.sort_values("item")["value"], expected, atol=1e-4)
    changed = [n for n, p in after.model.named_parameters() if not torch.equal(p, names[n])]
    with reduced(after.model, before.model, "bitfit"):
        left = [n for n, p in after.model.named_parameters() if not torch.equal(p, names[n])]
    assert left
    assert all(n.endswith("bias") for n in left if ".layer." in n)
    assert changed == [n for n, p in after.model.named_parameters() if not torch.equal(p, names[n])]


def test_reading_follows_the_weights_and_not_a_copy_of_them(bert: Path) -> None:
    """The control: a reader that looked at a copy would find nothing forgotten by whatever is done."""
    loaded = load_model(str(bert))
    read = KEEP.reader(loaded)
    first = read()["animal"].values
    assert np.array_equal(read()["animal"].values, first)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "layer.2" in name:
                parameter.mul_(0)
    assert read()["animal"].values.mean() < first.mean() - 0.1


def test_an_interrupted_pilot_goes_on_and_another_one_is_refused(tmp_path: Path, bert: Path, pilot: Pilot) -> None:
    once = pilot_in(tmp_path / "p", bert)
    assert once.table.equals(pilot.table)
    (tmp_path / "p" / "pilot.parquet").unlink()
    stamp = (tmp_path / "p" / "measured-seed-0.parquet").stat().st_mtime_ns
    again = pilot_in(tmp_path / "p", bert)
    assert again.table.equals(pilot.table)
    assert (tmp_path / "p" / "measured-seed-0.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="another pilot"):
        pilot_in(tmp_path / "p", bert, seeds=(0,))
    with pytest.raises(DataError, match="no finished pilot"):
        Pilot.load(tmp_path)


def test_a_suggestion_explains_itself_and_its_file_is_read_and_edited(pilot: Pilot, tmp_path: Path) -> None:
    suggestion = suggest_from_pilot(pilot, budget=600)
    words = suggestion.explain()
    for part in ("By the pilot, of 10 placements within at most 600 parameters", "Expected:", "Untested"):
        assert part in words
    path = suggestion.save(tmp_path / "strata.yaml")
    read = StrataConfig.load(path)
    assert read.strata == suggestion.config.strata
    assert read.provenance["tested"] is False
    text = path.read_text()
    edited = re.sub(rf"blocks: \[(\d), {BLOCKS}\]", rf"blocks: [\1, {BLOCKS + 1}]", text)
    assert edited != text
    path.write_text(edited)
    with pytest.raises(ConfigError, match=r"strata.yaml, line \d+.*goes beyond"):
        StrataConfig.load(path)
    table = suggestion.to_pandas()
    assert list(table["boundary"][:2]) == ["s1", "s2"]
    assert suggestion.plot().get_xlabel().startswith("s1")


def test_bias_free_blocks_get_norms_in_place_of_biases(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama", auto="AutoModelForCausalLM")
    language = load_language_model(tmp_path / "llama")
    keep = LanguageAbilities(language, text="the cat sees a big dog and runs " * 20, window=8)
    pilot = run_pilot(
        str(tmp_path / "llama"), task(24), abilities=keep, out=tmp_path / "pilot", settings=SETTINGS, warm_up=WARM_UP,
        methods=("bitfit", "lora+bitfit:2"), seeds=(0,), batches=2, device="cpu", quiet=True,
    )  # fmt: skip
    assert pilot.run["methods"] == ["norm", "lora+norm:2"]
    suggestion = suggest_from_pilot(pilot)
    assert {s.method for s in suggestion.config.strata} <= {"freeze", "norm", "lora+norm"}
    evidence = BlockEvidence.from_pilot(pilot, n_boot=20)
    assert evidence.forgetting[:, 0].max() > 0  # trained on something else, running text became less likely
    assert evidence.unit == "bits"
    assert preset_config("spafit-scaled-I", blocks=BLOCKS, bias_roles={"encoder": ()}).strata


def test_bad_methods_seeds_and_abilities_are_refused_before_anything_trains(tmp_path: Path, bert: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'bitfit'"):
        on_model(["bitfitt"], None)
    with pytest.raises(UsageError, match="bitfit has no rank"):
        on_model(["bitfit:3"], None)
    with pytest.raises(UsageError, match="different seeds"):
        pilot_in(tmp_path / "p", bert, seeds=(0, 0))
    with pytest.raises(UsageError, match="at least 10"):
        ProbedAbilities.of(["core.tense"], train_items=3)
    assert not (tmp_path / "p" / "head").exists()
