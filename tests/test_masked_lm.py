"""A masked language model that really learnt something: it beats controls, and is grafted after tuning."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from analysis.lens import fit_lens, lens_scores
from analysis.token_scores import score, windows
from spafit import load_model
from spafit.language_models import LanguageModel, graft, load_language_model
from spafit.training import fit
from tests.paths import ROOT, SHARED, needs_shared
from tests.test_lens import running_text
from tests.training_fixtures import QUICK

STUDY = ROOT / "docs" / "results" / "masked_lm"
pytestmark = pytest.mark.skipif(not STUDY.is_dir(), reason="runs in a checkout, not beside a wheel")
WIKITEXT = SHARED / "text" / "wikitext-2"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"masked_lm_{name}", STUDY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pretraining = script("pretrain") if STUDY.is_dir() else ModuleType("missing")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model of two blocks, trained for seconds on a part of WikiText-2's validation text."""
    text = pretraining.read_text(WIKITEXT / "valid.txt")[:300_000]
    recipe = pretraining.Recipe(
        vocabulary=1000, width=64, blocks=2, heads=2, window=32, batch=16, steps=700, learning_rate=4e-3
    )  # fmt: skip
    return Path(pretraining.pretrain(text, tmp_path_factory.mktemp("masked-lm") / "base", recipe, quiet=True))


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = running_text(0, 2000)
    recipe = pretraining.Recipe(vocabulary=60, width=16, blocks=2, heads=2, window=16, batch=2, steps=8)
    whole = load_language_model(pretraining.pretrain(text, tmp_path / "whole", recipe, every=3, quiet=True))
    draw = pretraining._masked_windows

    def breaks(ids: torch.Tensor, recipe: object, step: int) -> object:
        if step == 5:
            raise KeyboardInterrupt
        return draw(ids, recipe, step)

    monkeypatch.setattr(pretraining, "_masked_windows", breaks)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(text, tmp_path / "broken", recipe, every=3, quiet=True)
    seen: list[int] = []
    monkeypatch.setattr(pretraining, "_masked_windows", lambda i, r, step: seen.append(step) or draw(i, r, step))
    resumed = load_language_model(pretraining.pretrain(text, tmp_path / "broken", recipe, every=3, quiet=True))
    assert seen == [3, 4, 5, 6, 7]
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pretraining.pretrain(text, tmp_path / "broken", recipe, quiet=True)  # finished: nothing is trained
    assert len(seen) == 5
    fresh = pretraining.untrained(whole.tokenizer, recipe)
    assert not torch.equal(fresh.bert.embeddings.word_embeddings.weight, whole.body.get_input_embeddings().weight)


def test_masks_cover_the_share_asked_for_and_never_special_tokens() -> None:
    ids = torch.randint(5, 100, (5000,), generator=torch.Generator().manual_seed(0))
    ids[::10] = 1
    recipe = pretraining.Recipe(window=50, batch=400, masked=0.3)
    inputs, places, targets = pretraining._masked_windows(ids, recipe, 0)
    assert (targets >= 5).all()
    ordinary = 48 * 400 * 0.9
    assert int(places.sum()) / ordinary == pytest.approx(0.3, abs=0.015)
    assert float((inputs[places] == 4).double().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((inputs[places] == targets).double().mean()) == pytest.approx(0.1, abs=0.02)
    others = inputs[~places]
    assert (others != 4).all()
    assert inputs[:, 0].tolist() == [2] * 400
    assert inputs[:, -1].tolist() == [3] * 400


@needs_shared
def test_it_learnt_something(small: Path) -> None:
    own = load_language_model(small)
    assert own.kind == "masked"
    recipe = pretraining.Recipe(vocabulary=1000, width=64, blocks=2, heads=2, window=32)
    fresh = LanguageModel(pretraining.untrained(own.tokenizer, recipe), own.tokenizer, "masked", "untrained")
    text = pretraining.read_text(WIKITEXT / "test.txt")[:3000]
    table = script("run").control_table(own, fresh, pretraining.read_text(WIKITEXT / "valid.txt"), text, None)
    bits = table.set_index("model")["bits_per_token"]
    assert bits["trained"] < bits["untrained"] - 1.5
    assert bits["trained"] < bits["token frequencies"] - 0.05  # what stands beside a token says something of it
    assert bits["untrained"] == pytest.approx(np.log2(1000), abs=0.4)
    assert (table["tokens"] == table["tokens"].iloc[0]).all()
    texts = windows(own, text, length=32)
    assert bits["trained"] == pytest.approx(-score(own, texts).log_p.mean() / np.log(2))


@needs_shared
def test_after_tuning_the_graft_keeps_the_original_head_tied_to_nothing(small: Path, tmp_path: Path) -> None:
    from spafit.data.training import glue_data

    own = load_language_model(small)
    kept = own.model.get_output_embeddings().weight.clone()
    assert own.model.get_output_embeddings().weight is own.body.get_input_embeddings().weight  # tied, before
    data = glue_data("sst2", SHARED / "glue", files={"train": "train.tsv", "validation": "dev.tsv"})
    data = data.limited(24, seed=0).limited(8, seed=0, split="validation")
    settings = replace(QUICK, epochs=1, max_length=32)
    result = fit(str(small), "full", data=data, settings=settings, seeds=(0,), out=tmp_path / "full")
    after = graft(own, load_model(str(result.model_folder())).model, name="full")
    head, embeddings = after.model.get_output_embeddings().weight, after.body.get_input_embeddings().weight
    assert torch.equal(head, kept)
    assert not torch.equal(embeddings, kept)
    assert head.data_ptr() != embeddings.data_ptr()
    texts = windows(own, pretraining.read_text(WIKITEXT / "test.txt")[:1500], length=32)
    other = windows(own, pretraining.read_text(WIKITEXT / "test.txt")[1500:6000], length=32)
    found = lens_scores(own, after, fit_lens(own, other), texts)
    assert (found.kl.mean(1) > 0).all()  # the embeddings were tuned, too
    assert found.error[-1].mean() < 0.05 * found.constant.mean()
